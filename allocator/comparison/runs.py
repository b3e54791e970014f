"""Which runs a comparison is made of, and what a finished one leaves.

In: the `[compare]` section of a study folder's study.toml. Out: `Run`s in the order in which they
tell most, and `RunResult`s from `runs/*.json`. Invariant: no two runs of a plan are the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from allocator.app.study_file import CompareSpec, StudySpec
from allocator.errors import StudyError
from allocator.files.checksums import unseal

Baselines = Literal["near", "none"]
"""Which baselines stand beside the runs."""


@dataclass(frozen=True)
class CompareRequest:
    """A comparison as it is asked for.

    Attributes:
        folder: of the study.
        text: a further held-out file.
        cache: folder for profiles and encoded weights; None for `$ALLOCATOR_CACHE`.
        workers: processes at a time, one core each.
        baselines: `near`: uniform formats, role mixes and the hand rule stand beside; or `none`.
        progress: shows what takes long.

    Raises:
        StudyError: if `baselines` is neither.
    """

    folder: Path
    text: Path | None = None
    cache: Path | None = None
    workers: int = 1
    baselines: Baselines = "near"
    progress: bool = False

    def __post_init__(self) -> None:
        if self.baselines not in get_args(Baselines):
            raise StudyError(f"baselines {self.baselines!r}: needed near or none")


@dataclass(frozen=True)
class Run:
    """One searcher on one problem."""

    target: str
    weights: int
    sampler: str
    seed: int
    tokens: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.target}-{self.weights}-{self.sampler}-{self.seed}-{self.tokens}"

    def file(self, folder: Path) -> Path:
        """Returns the path of the file that a finished run leaves in a comparison's folder."""
        return folder / "runs" / f"{self.name}.json"


def planned(spec: CompareSpec) -> list[Run]:
    """Returns all runs, the ones that tell most first: first seeds, long runs, more seeds."""
    runs = [
        (seed, 0, Run(target, weights, sampler, seed, spec.tokens))
        for target, n_seeds in spec.seeds.items()
        for seed in range(n_seeds)
        for weights in spec.budgets
        for sampler in spec.samplers
    ]
    runs += [
        (0, 1, Run(long.target, weights, long.sampler, 0, long.tokens))
        for long in spec.long
        for weights in long.budgets
    ]
    order = list(spec.seeds)
    return [run for *_, run in sorted(runs, key=lambda r: (r[0], r[1], order.index(r[2].target)))]


def compare_spec(folder: Path) -> CompareSpec:
    """Reads the `[compare]` section.

    Raises:
        StudyError: if there is none.
    """
    spec = StudySpec.read(folder).compare
    if spec is None:
        raise StudyError(
            f"{folder}/study.toml: no [compare] section; add one, docs/comparing.md shows how"
        )
    return spec


def chosen_runs(
    folder: Path,
    *,
    targets: Sequence[str] | None = None,
    samplers: Sequence[str] | None = None,
    weights: Sequence[int] | None = None,
    seeds: int | None = None,
) -> list[Run]:
    """Returns the planned runs, narrowed down by the values that are given.

    Args:
        folder: of the study.
        targets: runs of these targets only.
        samplers: runs of these samplers only.
        weights: runs under these budgets only, bytes of the searched matrices.
        seeds: at most this number of seeds.

    Raises:
        StudyError: if a value is in no run, no run has all values, or a run is planned twice.
    """
    runs = planned(compare_spec(folder))
    for run in runs:
        if runs.count(run) > 1:
            raise StudyError(f"{folder}/study.toml: [compare] plans {run.name} twice; remove one")
    _check_known(folder, "--target", targets, (r.target for r in runs))
    _check_known(folder, "--sampler", samplers, (r.sampler for r in runs))
    _check_known(folder, "--weights", weights, (r.weights for r in runs))
    chosen = [
        run
        for run in runs
        if (targets is None or run.target in targets)
        and (samplers is None or run.sampler in samplers)
        and (weights is None or run.weights in weights)
        and (seeds is None or run.seed < seeds)
    ]
    if not chosen:
        raise StudyError(
            f"{folder}: no run has all of what --target, --sampler and --weights ask for; leave "
            "one of them out"
        )
    return chosen


def _check_known(
    folder: Path, option: str, wanted: Sequence[Any] | None, known: Iterable[Any]
) -> None:
    listed = list(dict.fromkeys(known))
    for value in wanted or ():
        if value not in listed:
            raise StudyError(
                f"{option} {value}: not under [compare] in {folder}/study.toml, which has "
                f"{', '.join(map(str, listed))}; add it there"
            )


class Point(msgspec.Struct):
    """The best trial after a number of forward tokens, and its mean KL on the splits."""

    tokens: int
    search: float
    selection: float
    report: float
    text: float | None = None


class Spent(msgspec.Struct):
    """Seconds of a run, by what they were spent on."""

    scoring: float
    gradient: float
    sampler: float
    storage: float

    @property
    def overhead(self) -> float:
        """Share of the sampler and the storage."""
        total = self.scoring + self.gradient + self.sampler + self.storage
        return (self.sampler + self.storage) / max(total, 1e-9)


class RunResult(msgspec.Struct, forbid_unknown_fields=True):
    """A finished run's file.

    Attributes:
        lock: its inputs; equal for all runs that may stand in one table.
        forward_tokens: spent, the pick included.
        base_tokens: of these, before the first trial.
        trials: by state.
        course: points of the way, the pick last.
        knapsack: the allocation of the first trial.
        pick: the allocation that was picked.
    """

    schema: Literal[1]
    target: str
    weights: int
    sampler: str
    seed: int
    tokens: int
    lock: dict[str, Any]
    forward_tokens: int
    base_tokens: int
    seconds: float
    spent: Spent
    trials: dict[Literal["COMPLETE", "PRUNED", "FAIL"], int]
    course: Annotated[list[Point], msgspec.Meta(min_length=1)]
    knapsack: dict[str, Any]
    pick: dict[str, Any]

    @property
    def run(self) -> Run:
        """What it is the result of."""
        return Run(self.target, self.weights, self.sampler, self.seed, self.tokens)


def results(folder: Path) -> list[RunResult]:
    """Reads all finished runs.

    Raises:
        StudyError: if a file among them is not that of a run.
    """
    finished = []
    for path in sorted((folder / "runs").glob("*.json")):
        try:
            finished.append(msgspec.convert(unseal(path.read_bytes()), RunResult))
        except ValueError as error:
            raise StudyError(
                f"{path}: not the file of a finished run ({error}); restore it, or move it away "
                "and compare again"
            ) from None
    return finished
