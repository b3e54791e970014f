"""Our loader for transformers, as a runtime: the container `safetensors`.

In: a source of tensors of any target's layout. Out: a directory that `allocator.load` opens.
Invariant: the loader rounds no activations, so a loss that differs means other weights or another
function.
"""

from collections.abc import Mapping
from pathlib import Path

from allocator.codecs import Bytes
from allocator.decision.allocation import Allocation
from allocator.errors import VerifyError
from allocator.export.base import Comparison, Runtime
from allocator.export.safetensors.files import (
    FILE_NAME,
    read_safetensors,
    write_config,
    write_safetensors,
)
from allocator.export.safetensors.loading import load
from allocator.export.stored import StoredTensor, StoredWeights
from allocator.export.tensors import TensorSource
from allocator.scoring.candidates import Weights
from allocator.scoring.scorer import mean
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import AnyScorer, StreamedScorer
from allocator.targets import SAFETENSORS, FullPrecision, Layout

SAFETENSORS_TOLERANCE = 1e-5
"""Difference of the re-opened safetensors checkpoint's proxy loss, nats per token."""


class SafetensorsRuntime(Runtime):
    """See the module.

    A model that does not fit in memory runs layer by layer; what stands for transformers is then
    the same pass over the weights that the file holds.
    """

    target = SAFETENSORS
    file_name = FILE_NAME
    tolerance = SAFETENSORS_TOLERANCE
    program = "transformers"
    divergence_name = "difference"

    def can_write(self, allocation: Allocation) -> bool:
        """Says yes: the file stores any target's groups, under the layout's names."""
        return True

    def write(self, folder: Path, source: TensorSource, workload: Mapping[str, int]) -> str:
        """Writes the file, config.json with the allocation, and the tokenizer's files."""
        write_safetensors(folder / self.file_name, source)
        write_config(folder, source.layout, source.allocation)
        return ""

    def read(self, path: Path, layout: Layout) -> dict[str, StoredTensor]:
        """Reads every tensor, by the layout's names, which are the file's.

        Raises:
            VerifyError: if the file cannot be opened.
        """
        return read_safetensors(path)

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
        if isinstance(scorer, StreamedScorer):
            weights = Weights(stored.layout, lambda: stored)
            model = StreamedModel(stored.layout, weights, device=str(scorer.model.device))
            again = StreamedScorer(model, scorer.documents).score(stored.candidate)
        else:
            again = scorer.score_model(load(path.parent))
        runtime_loss = mean(again.kl, scorer.documents)
        divergence = abs(runtime_loss - loss)
        if not divergence <= tolerance:
            raise VerifyError(
                f"{path.parent}: all tensors are equal, but its runtime is off by {divergence:.2e} "
                f"nats per token, at most {tolerance:.0e} allowed; transformers rounds no "
                "activations, so it computes something else: install the transformers of "
                "constraints.txt, or report it"
            )
        return Comparison(runtime_loss, divergence)


SAFETENSORS_RUNTIME = SafetensorsRuntime()
