"""Stock llama.cpp as a runtime: the container `gguf`.

In: a source of tensors of target gguf. Out: a file that stock llama.cpp loads, the recipe that
makes llama-quantize choose the same formats, and the options that a program must be given.
Invariant: a tolerance allows rounding of activations alone; a file that llama.cpp computes
otherwise in exact arithmetic too is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from allocator.checkpoint.inventory import Inventory
from allocator.codecs import Bytes
from allocator.errors import VerifyError
from allocator.export.base import Comparison, Runtime
from allocator.export.gguf.files import from_file, read_gguf, row_order, to_file, write_gguf
from allocator.export.gguf.recipes import (
    llama_cpp_options,
    parse_tensor_type_file,
    tensor_type_file,
)
from allocator.targets import GGUF, FullPrecision, Layout

if TYPE_CHECKING:  # these load torch
    from allocator.export.stored import StoredTensor, StoredWeights
    from allocator.export.tensors import TensorSource
    from allocator.scoring.streamed_scorer import AnyScorer

LLAMACPP_TOLERANCE = 5e-3
"""KL(torch || llama.cpp), nats per token: llama.cpp quantizes activations, torch does not."""


class GgufRuntime(Runtime):
    """See the module."""

    target = GGUF
    file_name = "model.gguf"
    tolerance = LLAMACPP_TOLERANCE
    program = "llama.cpp"
    divergence_name = "KL(torch || llama.cpp)"
    tells_rounding = True
    options_file = "llama-cpp-options.txt"
    library = "gguf"

    def usage(self, inventory: Inventory, options: str) -> list[str]:
        """Returns lines of Markdown with a command of llama.cpp."""
        command = f"llama-cli -m {self.file_name}{f' {options}' if options else ''}"
        return ["With stock llama.cpp:", "", "```sh", command, "```"]

    def write(self, folder: Path, source: TensorSource, workload: Mapping[str, int]) -> str:
        """Writes the file, llama-quantize's recipe, and options if there are any.

        Raises:
            CheckpointError: if the checkpoint's config or tokenizer is not usable.
            TargetError: if llama.cpp cannot express them.
        """
        layout, allocation = source.layout, source.allocation
        write_gguf(folder / self.file_name, layout, allocation, source)
        (folder / "tensor-types.txt").write_text(tensor_type_file(layout, allocation))
        if options := llama_cpp_options(layout, allocation, workload):
            (folder / self.options_file).write_text(options + "\n")
        return options

    def read(self, path: Path, layout: Layout) -> dict[str, StoredTensor]:
        """Reads every tensor, by the layout's names.

        Raises:
            VerifyError: if the file is missing, truncated or damaged, or a tensor that no
                checkpoint has is another than needed.
        """
        groups = {g.stored_as: g for g in layout.groups.values()}
        unencoded = {t.stored_as: t for t in layout.full_precision}
        made = {t.name: t for t in layout.made}

        from allocator.export.stored import StoredTensor  # which loads torch

        tensors = {}
        for name, (fmt, _, data) in read_gguf(path).items():
            if name in groups:
                own = groups[name].name
                tensors[own] = StoredTensor(self.in_order(data, layout, own), fmt)
            elif name in unencoded:
                tensor = unencoded[name]
                values = _own_values(data, layout, tensor) if fmt == tensor.dtype else data
                tensors[tensor.source] = StoredTensor(values, fmt)
            elif name in made:
                wanted = np.array(made.pop(name).values, np.float32).tobytes()
                if (fmt, data.tobytes()) != ("F32", wanted):
                    raise VerifyError(f"{path}: {name} holds other values than config.json means")
            else:
                tensors[name] = StoredTensor(data, fmt)
        if made:
            raise VerifyError(f"{path}: no tensor {min(made)}; write the file again")
        return tensors

    def in_order(self, data: Bytes, layout: Layout, name: str) -> Bytes:
        """Returns a group's bytes in the checkpoint's order of rows."""
        order = row_order(layout, layout.groups[name])
        if isinstance(order, slice) or data.shape[-2] != len(order):  # of another model
            return data
        ordered = np.empty_like(data)
        ordered[..., order, :] = data
        return ordered

    def full_precision_bytes(self, source: TensorSource, tensor: FullPrecision) -> Bytes:
        """Returns the bytes in float32 that come back from a file: `(..., bytes per row)`."""
        values = source.full_precision(tensor)
        if tensor.transforms:
            stored = to_file(source.layout, tensor, values)
            values = from_file(source.layout, tensor, stored)
        return values.view(np.uint8)

    def compare(
        self,
        path: Path,
        stored: StoredWeights,
        scorer: AnyScorer,
        *,
        loss: float,
        tolerance: float,
        progress: bool = False,
    ) -> Comparison:
        """Runs llama.cpp with its own defaults, in exact arithmetic too where it is far off.

        Raises:
            VerifyError: if llama.cpp computes something else, or rounds more than is allowed.
        """
        from allocator.export.gguf.comparison import compare  # which loads torch

        usual = self.tolerance
        return compare(path, stored, scorer, tolerance=tolerance, usual=usual, progress=progress)

    def read_recipe(self, text: str, layout: Layout) -> dict[str, str]:
        """Reads llama-quantize's `--tensor-type-file`.

        Raises:
            FormatError: if an entry is malformed or its type unknown, naming the line.
        """
        return parse_tensor_type_file(text, layout)


def _own_values(data: Bytes, layout: Layout, tensor: FullPrecision) -> Bytes:
    """The bytes of the checkpoint's values, `(..., bytes per row)`; of another model, as stored."""
    if not tensor.transforms or data.size != 4 * prod(tensor.shape):
        return data
    stored = np.ascontiguousarray(data).reshape(-1).view(np.float32).reshape(tensor.shape)
    return from_file(layout, tensor, stored).view(np.uint8)


GGUF_RUNTIME = GgufRuntime()
