"""Estimated time and disk of a search, from a few timed forward passes and measured rates.

In: a search request. Out: bytes, counts and seconds. Invariant: nothing is written; the seconds are
an upper estimate (every trial scored in full, every format encoded anew).
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from allocator.app.pick import check_tokens, pick_tokens
from allocator.app.request import Launch, SearchRequest
from allocator.app.study_folder import StudyFolder
from allocator.codecs import codec_of
from allocator.decision.budget import Budget
from allocator.decision.costs import budget_notes
from allocator.samplers.auto import ROUND
from allocator.study.storages import check_storage
from allocator.targets.device_memory import DeviceMemory

_PRICE_WEIGHTS_PER_SECOND = 6e6
"""The curvature's price of all offered formats of one weight, decoded, one core (measured)."""
_TIMED_TOKENS, _TIMES = 256, 5


@dataclass(frozen=True)
class SearchEstimate:
    """What a search would take, measured on a few documents.

    Attributes:
        floor: bytes of the smallest allocation, counted as the budget counts.
        ceiling: of the largest.
        budget: the limit.
        beside: floor and ceiling as the limit beside it counts, if there is one.
        memory: of both, itemised, where it is a device's.
        groups: number of groups with more than one format.
        counts: possible retained counts.
        seconds_per_full_trial: to score one allocation on the full search split.
        profile_ready: whether the profile exists already.
        profile_seconds: to build it, if not.
        total_seconds: an upper estimate of profile and search: every trial scored in full, every
            gradient step of `auto` at a new incumbent.
        limit: which limit that search reaches first: `trials`, `seconds` or `tokens`.
        notes: what is left out, and what the runtime must be told.
        calibration: records and windows by split, and how many each stage reads, as two lines.
    """

    floor: int
    ceiling: int
    budget: Budget
    beside: tuple[int, int] | None
    memory: tuple[DeviceMemory, DeviceMemory] | None
    groups: int
    counts: tuple[int, ...]
    seconds_per_full_trial: float
    profile_ready: bool
    profile_seconds: float
    total_seconds: float
    limit: str
    notes: tuple[str, ...]
    calibration: tuple[str, str]


@dataclass(frozen=True)
class _Seconds:
    trial: float
    profile: float
    gradient: float


def estimate(request: SearchRequest) -> SearchEstimate:
    """Prices a search without starting it: `search --dry-run`.

    Raises:
        AllocatorError: one line on whatever is wrong with the request.
    """
    study_folder = StudyFolder(request.study, target=request.target, **request.resources.options)
    return estimate_in(study_folder, request)


def estimate_in(study_folder: StudyFolder, request: SearchRequest) -> SearchEstimate:
    """Returns the estimate of a search in a folder that is open already.

    Args:
        study_folder: of the request, opened with its target and resources.
        request: of the search.

    Raises:
        AllocatorError: as `estimate`.
    """
    launch = study_folder.launch(request)
    check_storage(launch.storage, study_folder.path)
    if study_folder.spec.calibration.has_report:
        _ = study_folder.calibration.report
    if launch.stop.tokens is not None:
        check_tokens(study_folder, launch.stop.tokens, "raise --tokens")
    budget, space = launch.budget, study_folder.unranked_space
    seconds = (
        _in_memory(study_folder) if study_folder.spec.streamed is None else _streamed(study_folder)
    )
    ready = (study_folder.profiler.folder / "profile.json").exists()
    profile_seconds = 0.0 if ready else seconds.profile
    searching, limit = min(
        (s, name) for name, s in _limits(study_folder, launch, seconds) if s is not None
    )
    smallest, largest = (end.stored(space.layout) for end in (space.smallest, space.largest))
    ends = budget.memory(smallest), budget.memory(largest)
    (floor, ceiling), *beside = (
        (each.used(smallest), each.used(largest)) for each in budget.limits
    )
    return SearchEstimate(
        floor=floor,
        ceiling=ceiling,
        budget=budget,
        beside=beside[0] if beside else None,
        memory=None if ends[0] is None or ends[1] is None else (ends[0], ends[1]),
        groups=sum(len(v) > 1 for v in space.formats.values()),
        counts=space.counts,
        seconds_per_full_trial=seconds.trial,
        profile_ready=ready,
        profile_seconds=profile_seconds,
        total_seconds=profile_seconds + searching,
        limit=limit,
        notes=(
            *budget_notes(space, budget),
            *space.layout.notes,
            *study_folder.importance_notes,
        ),
        calibration=(study_folder.calibration.summary, study_folder.calibration.use),
    )


def _limits(
    study_folder: StudyFolder, launch: Launch, seconds: _Seconds
) -> Iterator[tuple[str, float | None]]:
    """Seconds of a search up to each of its limits, by name; None where it has none."""
    stop, in_trials, in_tokens = launch.stop, None, None
    if stop.trials is not None:
        n_gradients = math.ceil(stop.trials / ROUND) if launch.sampler == "auto" else 0
        in_trials = seconds.trial * stop.trials + n_gradients * seconds.gradient
    if stop.tokens is not None:
        searched = stop.tokens - study_folder.base_tokens - pick_tokens(study_folder)
        in_tokens = seconds.trial / study_folder.scorers.trials.n_tokens * searched
    yield from (("trials", in_trials), ("seconds", stop.seconds), ("tokens", in_tokens))


def seconds_per_token(study_folder: StudyFolder, *, documents: int, threads: int) -> float:
    """Returns the seconds of a candidate's forward pass, per token.

    Args:
        study_folder: of the study.
        documents: of the search split, that are timed where the model is in memory.
        threads: cores.
    """
    from allocator.scoring.scorer import Scorer
    from allocator.scoring.swap_model import SwapModel

    if study_folder.spec.streamed is not None:
        return _streamed(study_folder).trial / study_folder.scorers.trials.n_tokens
    chosen = study_folder.calibration.search[:documents]
    model = study_folder.scorers.model
    assert isinstance(model, SwapModel)
    scorer = Scorer(model, chosen, threads=threads)
    scorer.ensure_reference(len(chosen))
    began = time.perf_counter()
    scorer.score_installed()
    return (time.perf_counter() - began) / scorer.n_tokens


@dataclass(frozen=True)
class _Encoding:
    """Seconds of encoding every group.

    Attributes:
        every_format: in each format that is offered.
        one_format: in one of them, the mean.
        preparation: to make the encoders' tables, in every process.
    """

    every_format: float
    one_format: float
    preparation: float

    @classmethod
    def of(cls, study_folder: StudyFolder) -> "_Encoding":
        every, one, formats = 0.0, 0.0, set()
        for group in study_folder.layout.groups.values():
            offered = group.offered()
            per_weight = sum(1 / codec_of(f).weights_per_second(f) for f in offered)
            seconds = math.prod(group.shape) * per_weight / study_folder.threads
            every += seconds
            one += seconds / len(offered)
            formats |= {*offered}
        return cls(every, one, sum(codec_of(f).preparation_seconds(f) for f in formats))


def _in_memory(study_folder: StudyFolder) -> _Seconds:
    from allocator.profiling.in_memory_profiler import InMemoryProfiler

    per_token = seconds_per_token(study_folder, documents=16, threads=study_folder.threads)
    weights = study_folder.inventory.n_computed_weights
    pricing = weights / _PRICE_WEIGHTS_PER_SECOND
    encoding = _Encoding.of(study_folder)
    passes = study_folder.profiler.forward_tokens
    # watching every input of the statistics pass takes half as long as the pass itself
    tokens = sum(passes.values()) + passes["statistics"] / 2
    profiler = study_folder.profiler
    assert isinstance(profiler, InMemoryProfiler)
    gradient_tokens = profiler.gradient_tokens(study_folder.scorers.gradients)
    return _Seconds(
        trial=per_token * study_folder.scorers.trials.n_tokens,
        profile=per_token * tokens + encoding.every_format + encoding.preparation + pricing,
        gradient=per_token * gradient_tokens + 2 * pricing,  # each format's loss, and its move
    )


def _streamed(study_folder: StudyFolder) -> _Seconds:
    """Reading is paid once per pass, computing once per candidate."""
    from allocator.profiling.streamed_profiler import StreamedProfiler

    spec = study_folder.spec.streamed
    assert spec is not None
    reading, per_token = _one_expert(study_folder)
    together = spec.candidates
    encoding = _Encoding.of(study_folder)
    computing = per_token * study_folder.scorers.trials.n_tokens * (together + 1)
    passes = study_folder.profiler.forward_tokens
    n_changes = sum(1 for _ in study_folder.profiler.changes())
    assert isinstance(study_folder.profiler, StreamedProfiler)
    # statistics, curvature there and back
    n_passes = 3 + math.ceil(n_changes / study_folder.profiler.side_by_side)
    priced = spec.rows * encoding.every_format + encoding.preparation
    anchors = 2 * encoding.one_format
    return _Seconds(
        trial=(reading + computing + together * encoding.one_format) / together,
        profile=n_passes * reading + per_token * sum(passes.values()) + priced + anchors,
        gradient=0.0,
    )


def encoded_seconds_per_token(study_folder: StudyFolder) -> float:
    """Returns the seconds of a streamed pass per token, where no format is to be encoded.

    Args:
        study_folder: of a study whose model is streamed; a pass has the tokens of its trials.
    """
    reading, per_token = _one_expert(study_folder)
    return per_token + reading / study_folder.scorers.trials.n_tokens


def _one_expert(study_folder: StudyFolder) -> tuple[float, float]:
    """Seconds to read the whole checkpoint, and of a token through all layers: from one expert."""
    import torch

    from allocator.scoring.streamed_model import StreamedModel

    model, inventory = study_folder.scorers.model, study_folder.inventory
    assert isinstance(model, StreamedModel)
    groups = model.projections(study_folder.layout.layers[0])
    began = time.perf_counter()
    weights = [model.expert(model.original, g, 0) for g in groups]
    n_read = sum(w.numel() for w in weights)
    reading = (time.perf_counter() - began) / n_read
    model.weights.forget()
    least = math.inf
    for _ in range(_TIMES):  # so short a time is that of other programs, too
        began = time.perf_counter()
        for w in weights:
            _ = float((torch.ones(_TIMED_TOKENS, w.shape[1], device=w.device) @ w.T)[0, 0])
        least = min(least, time.perf_counter() - began)
    computing = least / n_read / _TIMED_TOKENS
    idle = 1 - inventory.experts_used / inventory.n_experts
    experts = sum(
        math.prod(g.shape) for g in study_folder.layout.groups.values() if g.role.is_expert
    )
    active = inventory.n_computed_weights - idle * experts
    return reading * inventory.n_computed_weights, computing * active
