"""Estimates for all stages of `quantize`: seconds, disk and memory, from timed forward passes.

In: a request of a search, and how its pick is to be finished. Out: a `RoadEstimate`. Invariant:
nothing is written; sizes are upper estimates.
"""

from dataclasses import dataclass
from math import prod

from allocator.app.estimate import SearchEstimate, encoded_seconds_per_token, estimate_in
from allocator.app.finish_stage import finish_documents
from allocator.app.request import SearchRequest
from allocator.app.study_folder import StudyFolder
from allocator.decision.costs import holds_whole_model
from allocator.errors import BudgetError
from allocator.files.machine import free_disk, load_per_core
from allocator.finishing.recipe import Recipe
from allocator.formats import Format
from allocator.units import show_size

_COPY_BYTES_PER_SECOND = 200e6
"""Of a file that is written, read back and hashed; assumed (`studies/scale` measured its disk)."""
_BUSY = 1.2
"""Processes per core from which a machine counts as busy with other programs, too."""
_RUNTIME_FORWARDS = 3
"""Forward passes that a verified token takes, assumed: in torch, and in the slower runtime."""


@dataclass(frozen=True)
class RoadEstimate:
    """Time, disk and memory of `quantize`.

    Attributes:
        search: floor, ceiling, and the estimate of the search alone.
        seconds: by stage, in order.
        disk_bytes: of encoded weights and written files, at most.
        free_bytes: of the disk that the cache is on.
        memory_bytes: of the model, and of its gradients; None where it is read layer by layer.
        load: of the machine while forward passes were timed, processes per core.
    """

    search: SearchEstimate
    seconds: dict[str, float]
    disk_bytes: int
    free_bytes: int
    memory_bytes: int | None
    load: float

    @property
    def total_seconds(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings before the first stage: a busy machine, too little disk."""
        notes = []
        if self.load > _BUSY:
            notes.append(
                f"other programs keep this machine busy ({self.load:.1f} processes per core): once "
                "they end, all stages take less"
            )
        if self.disk_bytes > self.free_bytes:
            notes.append(
                f"the disk of the cache has {show_size(self.free_bytes)} free; name another with "
                "--cache, or limit encoded weights: $ALLOCATOR_BANK_CAP"
            )
        return tuple(notes)


def estimate_road(request: SearchRequest, recipe: Recipe | None) -> RoadEstimate:
    """Prices every stage.

    Args:
        request: of the search.
        recipe: of finishing; None to leave it out.

    Raises:
        BudgetError: if the whole model fits as it is.
        AllocatorError: one line on whatever else is wrong with the request.
    """
    study_folder = StudyFolder(request.study, target=request.target, **request.resources.options)
    _check_needed(study_folder)
    search = estimate_in(study_folder, request)
    streamed = study_folder.spec.streamed is not None
    tokens = study_folder.scorers.trials.n_tokens
    per_token = search.seconds_per_full_trial / tokens
    written = min(search.budget.nbytes, search.ceiling)
    seconds = {
        "profile": search.profile_seconds,
        "search": search.total_seconds - search.profile_seconds,
    }
    if recipe is not None:
        used = recipe.layer_by_layer if streamed else recipe
        each = encoded_seconds_per_token(study_folder) if streamed else per_token
        seconds["finish"] = _finish_seconds(study_folder, used, each, written)
    copying = written / _COPY_BYTES_PER_SECOND
    seconds["materialize"] = copying
    seconds["verify"] = copying + per_token * tokens * _RUNTIME_FORWARDS
    return RoadEstimate(
        search=search,
        seconds=seconds,
        disk_bytes=_disk_bytes(study_folder, written, finished=recipe is not None),
        free_bytes=free_disk(study_folder.cache),
        memory_bytes=None if streamed else 2 * study_folder.inventory.float32_bytes,
        load=load_per_core(),
    )


def _check_needed(study_folder: StudyFolder) -> None:
    """Raises:
    BudgetError: if nothing needs to be compressed.
    """
    space, budget = study_folder.unranked_space, study_folder.budget()
    if not holds_whole_model(space, budget):
        return
    whole = budget.used(space.largest.stored(space.layout))
    raise BudgetError(
        f"the budget, {show_size(budget.nbytes)}, holds the whole model, {show_size(whole)}: "
        "nothing needs to be compressed; run the model as it is (for llama.cpp, "
        "convert_hf_to_gguf.py writes a GGUF of it), or name a smaller budget"
    )


def _finish_seconds(
    study_folder: StudyFolder, recipe: Recipe, per_token: float, written: int
) -> float:
    from allocator.finishing.estimate import FinishTokens, seconds_per_weight

    documents = finish_documents(study_folder)
    fmt, width = _typical(study_folder, written)
    per_weight = seconds_per_weight(
        fmt, width, rounds=recipe.rounds, device=study_folder.torch_device
    )
    weights = study_folder.inventory.n_computed_weights
    passes = FinishTokens.of(recipe, documents).seconds(recipe, per_token)
    return sum(passes.values()) + (per_weight or 0.0) * weights


def _typical(study_folder: StudyFolder, written: int) -> tuple[Format, int]:
    """The format of the largest group nearest to the bits that are written, and its width."""
    groups = study_folder.layout.groups.values()
    largest = max(groups, key=lambda group: prod(group.shape))
    bits = written * 8 / study_folder.inventory.n_searched_weights
    return min(largest.offered(), key=lambda fmt: abs(fmt.bits - bits)), largest.shape[-1]


def _disk_bytes(study_folder: StudyFolder, written: int, *, finished: bool) -> int:
    """Encoded weights of all formats that are priced, finished weights twice, and the file."""
    banked = 0
    for group in study_folder.layout.groups.values():
        each = [fmt.nbytes(group.shape) for fmt in group.offered()]
        banked += sum(each) if study_folder.spec.streamed is None else 3 * max(each) // 2
    if study_folder.encodings_cap is not None:
        banked = min(banked, study_folder.encodings_cap)
    return banked + (2 * written if finished else 0) + written
