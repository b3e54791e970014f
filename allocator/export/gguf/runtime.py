"""Stock llama.cpp as a runtime: the container `gguf`.

In: a source of tensors of target gguf. Out: a file that stock llama.cpp loads, the recipe that
makes llama-quantize choose the same formats, and the options that a program must be given.
Invariant: a tolerance allows rounding of activations alone; a file that llama.cpp computes
otherwise in exact arithmetic too is refused.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from allocator.codecs import Bytes
from allocator.decision.allocation import DEFAULT_KV_FORMAT
from allocator.errors import VerifyError
from allocator.export.base import Comparison, Exact, Runtime
from allocator.export.gguf.exact import EXACT_TOLERANCE, compare_exactly, kl_divergence
from allocator.export.gguf.files import read_gguf, write_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.export.gguf.recipes import (
    llama_cpp_options,
    parse_tensor_type_file,
    tensor_type_file,
)
from allocator.export.stored import StoredTensor, StoredWeights
from allocator.export.tensors import TensorSource
from allocator.scoring.scorer import mean
from allocator.scoring.streamed_scorer import AnyScorer, StreamedScorer
from allocator.scoring.swap_model import device_of
from allocator.targets import GGUF, FullPrecision, Layout
from allocator.targets.gguf.metadata import yarn_betas

LLAMACPP_TOLERANCE = 5e-3
"""KL(torch || llama.cpp), nats per token: llama.cpp quantizes activations, torch does not."""


class GgufRuntime(Runtime):
    """See the module."""

    target = GGUF
    file_name = "model.gguf"
    tolerance = LLAMACPP_TOLERANCE
    program = "llama.cpp"
    divergence_name = "KL(torch || llama.cpp)"
    options_file = "llama-cpp-options.txt"

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
            VerifyError: if the file is missing, truncated or damaged.
        """
        names = {g.stored_as: g.name for g in layout.groups.values()}
        names |= {t.stored_as: t.source for t in layout.full_precision}
        return {
            names.get(name, name): StoredTensor(data, fmt)
            for name, (fmt, _, data) in read_gguf(path).items()
        }

    def full_precision_bytes(self, source: TensorSource, tensor: FullPrecision) -> Bytes:
        """Returns the bytes in float32: `(..., bytes per row)`."""
        return source.full_precision(tensor).view(np.uint8)

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
        runtime_loss, divergence = _run(path, stored, scorer, progress)
        exact = None
        if not divergence <= min(tolerance, LLAMACPP_TOLERANCE):  # it never hides semantics
            exact = compare_exactly(
                path, stored, scorer.documents, device=_device_of(scorer), progress=progress
            )
            _judge(path.parent, divergence, tolerance, exact)
        return Comparison(runtime_loss, divergence, exact)

    def read_recipe(self, text: str, layout: Layout) -> dict[str, str]:
        """Reads llama-quantize's `--tensor-type-file`.

        Raises:
            FormatError: if an entry is malformed or its type unknown, naming the line.
        """
        return parse_tensor_type_file(text, layout)


def _run(
    path: Path, stored: StoredWeights, scorer: AnyScorer, progress: bool
) -> tuple[float, float]:
    """Runs llama.cpp on a scorer's documents: proxy loss there, and KL(torch || llama.cpp)."""
    divergence, runtime = [], []
    longest = max(len(d.ids) for d in scorer.documents)
    chosen = stored.allocation.kv_format
    with LlamaCpp(
        path,
        context=longest,
        exact=False,
        kv_format=None if chosen == DEFAULT_KV_FORMAT else chosen,  # else llama.cpp's own defaults
        yarn_betas=yarn_betas(stored.layout.inventory),
    ) as llama:
        shown = tqdm(scorer.documents, desc="llama.cpp", unit="doc", disable=not progress)
        for index, document in enumerate(shown):
            logits = llama.logits(document.ids)
            runtime.append(scorer.score_logits(index, logits)[0])
            divergence.append(kl_divergence(scorer.candidate_logits(index), logits))
    return (
        mean(np.array(runtime), scorer.documents),
        mean(np.array(divergence), scorer.documents),
    )


def _judge(folder: Path, divergence: float, tolerance: float, exact: Exact) -> None:
    """Raises:
    VerifyError: if llama.cpp computes something else, or rounds more than is allowed.
    """
    off = f"{folder}: all tensors are equal, but its runtime is off by {divergence:.2e} nats per "
    off += "token"
    if not exact.divergence <= EXACT_TOLERANCE:
        raise VerifyError(
            f"{off}, and in exact arithmetic{exact.part} still by {exact.divergence:.2e} (at most "
            f"{EXACT_TOLERANCE:.0e}): llama.cpp computes another function of these weights, which "
            "no --tolerance allows; materialize it again, or use target safetensors and report it "
            "with its config.json"
        )
    if not divergence <= tolerance:
        raise VerifyError(
            f"{off}, at most {tolerance:.0e} allowed; that is rounding of activations, in exact "
            f"arithmetic{exact.part} it agrees to {exact.divergence:.0e}: allow it with "
            f"--tolerance {1.1 * divergence:.1e}"
        )


def _device_of(scorer: AnyScorer) -> str:
    """Where it computes, as torch names it."""
    if isinstance(scorer, StreamedScorer):
        return str(scorer.model.device)
    return str(device_of(scorer.swap.model))


GGUF_RUNTIME = GgufRuntime()
