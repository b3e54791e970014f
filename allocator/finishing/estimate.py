"""What finishing would take: tokens, seconds from a short measurement, disk and memory.

In: a `Finisher`, and the seconds of a forward pass per token. Out: a `FinishEstimate`. Invariant:
nothing is written, and no weights are changed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import numpy as np
import torch

from allocator.codecs import codec_of
from allocator.codecs.blocks import BlockFormat
from allocator.finishing.codes import choose
from allocator.finishing.finish import FinishDocuments, Finisher, Part, first_tokens
from allocator.finishing.recipe import Recipe
from allocator.finishing.tuning import TuningSettings
from allocator.formats import Format
from allocator.profiling.second_moments import PASS_BYTES, moments_bytes
from allocator.scoring.documents import Document
from allocator.scoring.scorer import CACHE_BYTES, Scorer
from allocator.scoring.side_by_side import affordable_threads

FORWARDS_OF_MOMENTS = 4
"""Forward passes that a token of second moments costs: forward, backward, and the products."""
FORWARDS_OF_STEP = 4
"""Forward passes that a token of a tuning step costs: the original's, forward and backward."""
_TUNING = TuningSettings()
_TIMED_WEIGHTS, _TIMED_WEIGHTS_ON_DEVICE = 1 << 16, 1 << 24
"""Weights whose choice is timed, on a CPU and on devices, which so few would leave idle."""
_TIMED_DOCUMENTS = 8


@dataclass(frozen=True)
class FinishEstimate:
    """What finishing would take.

    Attributes:
        moments_tokens: forward tokens behind second moments, of which some may be on disk.
        tuning_tokens: forward tokens of tuning steps.
        weights: whose codes are still to be chosen.
        seconds: of second moments, codes, tuning and scoring.
        disk_bytes: that the cache and the file of finished weights take.
        memory_bytes: beside the model: distributions of the original, and second moments or
            gradients.
        ready: an earlier run has done it all.
    """

    moments_tokens: int
    tuning_tokens: int
    weights: int
    seconds: dict[str, float]
    disk_bytes: int
    memory_bytes: int
    ready: bool = False

    @property
    def total_seconds(self) -> float:
        """Seconds of everything."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class FinishTokens:
    """Forward tokens of finishing, by what they are for.

    Attributes:
        moments: behind second moments.
        tuned: that tuning steps take.
        checked: of one check of the tuning.
        scored: of all losses, before and after.
    """

    moments: int
    tuned: int
    checked: int
    scored: int

    @classmethod
    def of(cls, recipe: Recipe, documents: FinishDocuments, *, moments: bool = True) -> Self:
        """Counts them.

        Args:
            recipe: of the finishing.
            documents: whose tokens are counted.
            moments: whether second moments are still to be measured.
        """
        behind = _tokens(first_tokens(documents.search, recipe.moments_tokens)) if moments else 0
        tuned = min(recipe.tuning_tokens, _tokens(documents.search)) if recipe.tunes else 0
        checked = _tokens(documents.selection[: _TUNING.check_documents]) if tuned else 0
        # the original once, and the weights before, after their codes, and after tuning
        scored = 3 * _tokens(documents.scored)
        scored += (4 if tuned else 3) * _tokens(documents.selection)
        return cls(behind, tuned, checked, scored)

    def seconds(self, recipe: Recipe, seconds_per_token: float) -> dict[str, float]:
        """Returns the seconds of forward and backward passes, by what they are for.

        Args:
            recipe: of the finishing.
            seconds_per_token: of a candidate's forward pass.
        """
        tuning = FORWARDS_OF_STEP * self.tuned + (_TUNING.checks + 1) * self.checked
        return {
            "second moments": seconds_per_token
            * self.moments
            * (FORWARDS_OF_MOMENTS if recipe.fisher else 1),
            "tuning": seconds_per_token * tuning,
            "scoring": seconds_per_token * self.scored,
        }


def seconds_per_token(finisher: Finisher) -> float:
    """Measures the seconds per token of a candidate's forward pass, with the model in memory."""
    scorer = finisher.scorer(finisher.documents.selection[:_TIMED_DOCUMENTS])
    assert isinstance(scorer, Scorer)
    scorer.ensure_reference(scorer.n_documents)
    began = time.perf_counter()
    scorer.score_installed()
    return (time.perf_counter() - began) / scorer.n_tokens


def estimate(finisher: Finisher, seconds_per_token: float) -> FinishEstimate:
    """Prices what a finisher would do; codes are timed on some rows per format.

    Args:
        finisher: of the allocation.
        seconds_per_token: of a candidate's forward pass.
    """
    recipe, documents = finisher.recipe, finisher.documents
    if finisher.known() is not None:
        return FinishEstimate(0, 0, 0, {}, 0, 0, ready=True)
    missing = finisher.missing()
    tokens = FinishTokens.of(recipe, documents, moments=bool(missing))
    seconds = tokens.seconds(recipe, seconds_per_token) | {
        "codes": _choice_seconds(finisher, missing)
    }
    encoded = sum(prod(finisher.plain.shape(p.group.name, p.number)) for p in missing)
    inventory = finisher.plain.layout.inventory
    parts = (documents.scored, documents.selection)
    distributions = [4 * inventory.dimensions.vocabulary * _tokens(part) for part in parts]
    sums = sum(moments_bytes(len(p.experts) or 1, p.group.shape[-1]) for p in missing)
    gradients = _gradient_bytes(finisher) if tokens.tuned else 0
    memory = sum(min(nbytes, CACHE_BYTES) for nbytes in distributions)
    memory += max(min(sums, PASS_BYTES), gradients)
    return FinishEstimate(
        moments_tokens=tokens.moments,
        tuning_tokens=tokens.tuned,
        weights=sum(p.n_weights for p in missing),
        seconds=seconds,
        disk_bytes=2 * encoded,
        memory_bytes=memory,
    )


def _gradient_bytes(finisher: Finisher) -> int:
    """Gradients of the passes that run at once, of one that waits for its turn, and their sum."""
    each = 4 * finisher.plain.layout.inventory.n_computed_weights
    threads = affordable_threads(finisher.model.model, finisher.threads, each)
    return each * (threads + 2 if threads > 1 else 2)


def _choice_seconds(finisher: Finisher, parts: Sequence[Part]) -> float:
    """Seconds of one round over all weights, from a round over some rows in each format."""
    by_format: dict[str, list[Part]] = {}
    for part in parts:
        by_format.setdefault(part.fmt.name, []).append(part)
    return sum(
        _seconds_per_weight(finisher, max(members, key=lambda p: p.n_weights))
        * sum(p.n_weights for p in members)
        for members in by_format.values()
    )


def _seconds_per_weight(finisher: Finisher, part: Part) -> float:
    encoded = finisher.plain.encoded(part.group.name, part.number)
    width = part.group.shape[-1]
    rows = encoded.reshape(-1, encoded.shape[-1])[: _timed_rows(width, finisher.device)]
    data = torch.from_numpy(np.array(rows)).to(finisher.device)
    return _timed_choice(data, part.block_format, width, finisher.recipe.rounds)


def seconds_per_weight(fmt: Format, width: int, *, rounds: int, device: str) -> float | None:
    """Measures how long codes of a format take to choose, on random weights.

    Args:
        fmt: the format.
        width: inputs of a row.
        rounds: of descent.
        device: torch's.

    Returns:
        None where the format's codes cannot be chosen anew.
    """
    codec, on = codec_of(fmt), torch.device(device)
    block_format = codec.block_format(fmt)
    if block_format is None:
        return None
    weights = np.random.default_rng(0).standard_normal((_timed_rows(width, on), width), np.float32)
    encoded = codec.encode(weights, fmt, np.ones(width, np.float32))
    return _timed_choice(torch.from_numpy(encoded).to(on), block_format, width, rounds)


def _timed_rows(width: int, device: torch.device) -> int:
    timed = _TIMED_WEIGHTS if device.type == "cpu" else _TIMED_WEIGHTS_ON_DEVICE
    return max(1, timed // width)


def _timed_choice(rows: torch.Tensor, block_format: BlockFormat, width: int, rounds: int) -> float:
    """Seconds per weight of a choice of codes; `rows` is `(rows, bytes per row)`."""
    data = rows[None]
    weights = block_format.values(data)
    moments = torch.eye(width, device=weights.device)[None]
    with torch.inference_mode():
        first = choose(weights[:, :1], data[:, :1], block_format, moments)  # makes tables
        first.after.cpu()  # waits for the device
        began = time.perf_counter()
        chosen = choose(weights, data, block_format, moments, rounds=rounds)
        chosen.after.cpu()
    return (time.perf_counter() - began) / weights.numel()


def _tokens(documents: Sequence[Document]) -> int:
    return sum(len(d.ids) for d in documents)
