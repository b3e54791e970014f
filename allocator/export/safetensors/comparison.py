"""Compares a written safetensors directory, as `allocator.load` opens it, with torch.

In: a file whose tensors are known to be right, and documents. Out: its loss, and the difference
from the candidate's. Invariant: a model that does not fit in memory runs layer by layer on the
weights that the file holds.
"""

from pathlib import Path

from allocator.errors import VerifyError
from allocator.export.base import Comparison
from allocator.export.safetensors.loading import load
from allocator.export.stored import StoredWeights
from allocator.files.progress import waiting
from allocator.scoring.candidates import Weights
from allocator.scoring.scorer import mean
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import AnyScorer, StreamedScorer


def compare(
    path: Path, stored: StoredWeights, scorer: AnyScorer, *, loss: float, tolerance: float
) -> Comparison:
    """Scores the re-opened checkpoint.

    Args:
        path: the file.
        stored: its weights.
        scorer: scored the candidate that the file holds last.
        loss: proxy loss of that candidate, nats per token.
        tolerance: how far the loss may be off, nats per token.

    Raises:
        VerifyError: if its loss is another.
    """
    if isinstance(scorer, StreamedScorer):
        weights = Weights(stored.layout, lambda: stored)
        streamed = StreamedModel(stored.layout, weights, device=str(scorer.model.device))
        again = StreamedScorer(streamed, scorer.documents).score(stored.candidate)
    else:
        with waiting("opening the checkpoint in transformers"):
            model = load(path.parent)
        again = scorer.score_model(model)
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
