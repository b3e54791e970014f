"""Our loader for transformers, as a runtime: the container `safetensors`.

In: a source of tensors of any target's layout. Out: a directory that `allocator.load` opens.
Invariant: the loader rounds no activations, so a loss that differs means other weights or another
function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.safetensors import read_json
from allocator.checkpoint.tokenizer import has_tokenizer
from allocator.codecs import Bytes
from allocator.decision.allocation import Allocation
from allocator.errors import TargetError
from allocator.export.base import Comparison, Runtime
from allocator.export.safetensors.directory import EARLIER_NAME, FILE_NAME, write_config
from allocator.targets import SAFETENSORS, FullPrecision, Layout
from allocator.targets.safetensors import (
    INDEX_NAME,
    Entry,
    SafetensorsTarget,
    Shard,
    entries,
    header,
    nbytes,
)

if TYPE_CHECKING:  # these load torch
    from allocator.export.stored import StoredTensor, StoredWeights
    from allocator.export.tensors import TensorSource
    from allocator.scoring.streamed_scorer import AnyScorer

SAFETENSORS_TOLERANCE = 1e-5
"""Difference of the re-opened safetensors checkpoint's proxy loss, nats per token."""


class SafetensorsRuntime(Runtime):
    """See the module.

    A model that does not fit in memory runs layer by layer; what stands for transformers is then
    the same pass over the weights that the file holds.
    """

    earlier_names = (EARLIER_NAME,)
    tolerance = SAFETENSORS_TOLERANCE
    program = "transformers"
    divergence_name = "difference"
    library = "transformers"
    index_name = INDEX_NAME

    def __init__(self, target: SafetensorsTarget = SAFETENSORS, file_name: str = FILE_NAME) -> None:
        self.target: SafetensorsTarget = target
        self.file_name = file_name

    def usage(self, inventory: Inventory, options: str) -> list[str]:
        """Returns lines of Markdown with Python that opens the directory."""
        text = has_tokenizer(inventory)
        generate = [
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_ID")',
            'ids = tokenizer("Once", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))",
        ]
        return [
            "With transformers and moe-allocator, on the CPU. Weights stay encoded in memory; each "
            "layer is decoded when it runs. Without the first line, transformers refuses it.",
            "",
            "```python",
            "import allocator.transformers",
            f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if text else ''}",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_ID")',
            *(generate if text else ()),
            "```",
        ]

    def can_write(self, allocation: Allocation) -> bool:
        """Says yes: the file stores any target's groups, under the layout's names."""
        return True

    def in_shards(
        self, layout: Layout, allocation: Allocation, shard_bytes: int
    ) -> SafetensorsRuntime:
        """Returns the runtime whose target cuts the weights into shards, if there are several.

        Raises:
            TargetError: if the size is none.
        """
        if shard_bytes < 1:
            raise TargetError(f"shards of {shard_bytes:,} bytes: needed at least 1, e.g. 5GB")
        cutting = SafetensorsRuntime(SafetensorsTarget(shard_bytes), self.index_name)
        return cutting if cutting._shards(layout, allocation) else self

    def _shards(self, layout: Layout, allocation: Allocation) -> list[Shard]:
        """The files that the tensors lie in; none where they lie in one."""
        return self.target.shards(_rows(layout, allocation))

    def weights_names(self, source: TensorSource) -> tuple[str, ...]:
        """Returns the names of all files of the weights, the index included."""
        shards = self._shards(source.layout, source.allocation)
        return (*(shard.name for shard in shards), self.file_name)

    def places(self, source: TensorSource) -> Iterator[tuple[str, int]]:
        """Yields where every tensor begins, in order: file name and offset."""
        shards = self._shards(source.layout, source.allocation)
        if not shards:
            yield from super().places(source)
        for shard in shards:
            start = len(header(shard.rows))
            for row in shard.rows:
                yield shard.name, start
                start += nbytes(row)

    def one_file_digest(self, folder: Path) -> str | None:
        """Returns what the index of a written directory says; None without one."""
        if self.file_name != self.index_name:
            return None
        digest: str = read_json(folder / self.index_name)["metadata"]["sha256"]
        return digest

    def write(self, folder: Path, source: TensorSource, workload: Mapping[str, int]) -> str:
        """Writes the weights, config.json with the allocation, and the tokenizer's files."""
        from allocator.export.safetensors.files import write_safetensors  # which loads torch

        rows = _rows(source.layout, source.allocation)
        write_safetensors(folder, source, rows, self.target.shards(rows))
        write_config(folder, source.layout, source.allocation)
        return ""

    def read(self, path: Path, layout: Layout) -> dict[str, StoredTensor]:
        """Reads every tensor, by the layout's names, which are the file's.

        Raises:
            VerifyError: if the file cannot be opened.
        """
        from allocator.export.safetensors.files import read_safetensors  # which loads torch

        return read_safetensors(path.parent)

    def full_precision_bytes(self, source: TensorSource, tensor: FullPrecision) -> Bytes:
        """Returns the bytes in the checkpoint's dtype: `(rows, bytes)` or `(bytes,)`."""
        return source.full_precision_raw(tensor)

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
        """Scores the re-opened checkpoint; see `Runtime.compare`.

        Raises:
            VerifyError: if its loss is another.
        """
        from allocator.export.safetensors.comparison import compare  # which loads torch

        return compare(path, stored, scorer, loss=loss, tolerance=tolerance)


def _rows(layout: Layout, allocation: Allocation) -> list[Entry]:
    retained, formats = allocation.retained_experts, allocation.format_of
    return entries(layout, retained=retained, formats=formats)


SAFETENSORS_RUNTIME = SafetensorsRuntime()
