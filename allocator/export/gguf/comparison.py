"""Compares a written GGUF in llama.cpp with torch, and names the cause of a difference.

In: a file whose tensors are known to be right, and documents. Out: its loss in llama.cpp, and how
far llama.cpp is off torch. Invariant: a file that llama.cpp computes otherwise in exact arithmetic
too is refused at any tolerance.
"""

from pathlib import Path

import numpy as np

from allocator.decision.allocation import DEFAULT_KV_FORMAT
from allocator.errors import VerifyError
from allocator.export.base import Comparison, Exact
from allocator.export.gguf.exact import EXACT_TOLERANCE, compare_exactly, kl_divergence
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.export.stored import StoredWeights
from allocator.files.progress import stepping
from allocator.scoring.scorer import mean
from allocator.scoring.streamed_scorer import AnyScorer, StreamedScorer
from allocator.scoring.swap_model import device_of
from allocator.targets.gguf.metadata import yarn_betas


def compare(
    path: Path,
    stored: StoredWeights,
    scorer: AnyScorer,
    *,
    tolerance: float,
    usual: float,
    progress: bool = False,
) -> Comparison:
    """Runs llama.cpp with its own defaults, in exact arithmetic too where it is far off.

    Args:
        path: the file.
        stored: its weights.
        scorer: scored the candidate that the file holds last.
        tolerance: how far llama.cpp may be off, nats per token.
        usual: how far it usually is; beyond that the comparison is made in exact arithmetic too.
        progress: shows a bar.

    Raises:
        VerifyError: if llama.cpp computes something else, or rounds more than is allowed.
    """
    runtime_loss, divergence = _run(path, stored, scorer, progress)
    exact = None
    if not divergence <= min(tolerance, usual):  # a large tolerance never hides another function
        exact = compare_exactly(
            path, stored, scorer.documents, device=_device_of(scorer), progress=progress
        )
        _judge(path.parent, divergence, tolerance, exact)
    return Comparison(runtime_loss, divergence, exact)


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
        shown = stepping(scorer.documents, "llama.cpp", unit="documents", shown=progress)
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
