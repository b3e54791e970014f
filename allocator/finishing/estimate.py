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
from allocator.finishing.finish import FinishDocuments, Finisher, Part, first_tokens, parts_of
from allocator.finishing.recipe import Recipe
from allocator.finishing.streamed_tuning import LONG_STEPS, PASS_TOKENS, TRIED
from allocator.finishing.tuning import TuningSettings
from allocator.formats import Format
from allocator.profiling.second_moments import PASS_BYTES, STREAMED_BYTES, moments_bytes
from allocator.scoring.documents import Document
from allocator.scoring.scorer import CACHE_BYTES, Scorer
from allocator.scoring.side_by_side import affordable_threads

FORWARDS_OF_MOMENTS = 4
"""Forward passes that a token of second moments costs: forward, backward, and the products."""
FORWARDS_OF_STEP = 4
"""Forward passes that a token of a tuning step costs: the original's, forward and backward."""
FORWARDS_OF_LONG_STEP = 6
"""The same layer by layer, where a layer runs once more on the way back."""
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
            gradients; of a streamed model all, states and a layer at a time.
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
        if recipe.streamed:  # the original is checked, too; each step at each of the rates
            checks = 2 + len(TRIED) * LONG_STEPS
            tuning = FORWARDS_OF_LONG_STEP * self.tuned + checks * self.checked
        else:
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
    encoded = _encoded_bytes(finisher, missing)
    disk = encoded + _encoded_bytes(finisher, parts_of(finisher.plain))
    if recipe.streamed:
        memory = _streamed_memory(finisher, tokens, missing)
        disk += _streamed_disk(finisher, tokens)
    else:
        memory = _memory(finisher, tokens, missing)
    return FinishEstimate(
        moments_tokens=tokens.moments,
        tuning_tokens=tokens.tuned,
        weights=sum(p.n_weights for p in missing),
        seconds=seconds,
        disk_bytes=disk,
        memory_bytes=memory,
    )


def _encoded_bytes(finisher: Finisher, parts: Sequence[Part]) -> int:
    return sum(prod(finisher.plain.shape(p.group.name, p.number)) for p in parts)


def _memory(finisher: Finisher, tokens: FinishTokens, missing: Sequence[Part]) -> int:
    """Distributions of the original, and second moments or gradients, beside the model."""
    vocabulary = finisher.plain.layout.inventory.dimensions.vocabulary
    parts = (finisher.documents.scored, finisher.documents.selection)
    distributions = sum(min(4 * vocabulary * _tokens(part), CACHE_BYTES) for part in parts)
    sums = sum(moments_bytes(len(p.experts) or 1, p.group.shape[-1]) for p in missing)
    gradients = _gradient_bytes(finisher) if tokens.tuned else 0
    return distributions + max(min(sums, PASS_BYTES), gradients)


def _streamed_memory(finisher: Finisher, tokens: FinishTokens, missing: Sequence[Part]) -> int:
    """The most of any stage: states, and what is in memory of a layer."""
    layout, documents = finisher.plain.layout, finisher.documents
    dimensions = layout.inventory.dimensions
    state = 4 * dimensions.hidden
    final = state * (_tokens(documents.scored) + _tokens(documents.selection))  # the original's
    scored = max(_tokens(documents.scored), _tokens(documents.selection))
    logits = 4 * dimensions.vocabulary
    weights: dict[int | None, int] = {}  # of a layer without its routed experts
    for group in layout.groups.values():
        if group.layer is not None and not group.role.is_expert:
            weights[group.layer] = weights.get(group.layer, 0) + 4 * prod(group.shape)
    experts = [prod(g.shape[1:]) for g in layout.groups.values() if g.role.is_expert]
    layer = max(weights.values()) + 2 * 3 * 4 * max(experts)  # one is read ahead
    sums = [moments_bytes(len(p.experts) or 1, p.group.shape[-1]) for p in missing]
    moments = 3 * state * tokens.moments + max(
        [min(size, STREAMED_BYTES) for size in sums], default=0
    )
    encoded: dict[int | None, int] = {}
    for part in parts_of(finisher.plain):
        nbytes = prod(finisher.plain.shape(part.group.name, part.number))
        encoded[part.group.layer] = encoded.get(part.group.layer, 0) + nbytes
    scoring = 4 * state * scored + min(STREAMED_BYTES, 3 * logits * scored)
    tuning = 0
    if tokens.tuned:
        layers = 3 * max(encoded.values())  # as they came, and under the changes of two tried rates
        step = 4 * state * (tokens.tuned // LONG_STEPS) + 5 * logits * PASS_TOKENS
        tuning = layers + max(step, 3 * state * tokens.checked)
    return final + layer + max(moments, scoring, tuning)


def _streamed_disk(finisher: Finisher, tokens: FinishTokens) -> int:
    """States, gradients and changes, by layer; or the states of second moments."""
    inventory = finisher.plain.layout.inventory
    state, n_layers = 4 * inventory.dimensions.hidden, inventory.n_layers
    scales = sum(2 * p.n_weights // p.fmt.block for p in parts_of(finisher.plain))  # at most
    step = state * (tokens.tuned // LONG_STEPS) * 2 * (n_layers + 1) + 3 * 4 * scales
    return max(2 * state * tokens.moments, step if tokens.tuned else 0)


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
