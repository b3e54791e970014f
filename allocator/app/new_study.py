"""A new study: a folder with a study.toml and a search space that have every key, explained.

In: a model, and values. Out: the two files. Invariant: nothing is overwritten; a search takes the
files as they are, for the budget is above the floor and the model opens.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from allocator.app.study_file import (
    BudgetSpec,
    DeviceBudgetSpec,
    StreamedSpec,
    StudySpec,
    chosen_budget,
)
from allocator.app.study_path import STUDY_FILE, check_new
from allocator.checkpoint.padding import padded
from allocator.checkpoint.reading import read_inventory
from allocator.decision.budget import Budget
from allocator.decision.costs import budget_notes, check_budget
from allocator.decision.search_space import SearchSpace, bind
from allocator.decision.space import Space
from allocator.errors import StudyError
from allocator.files.machine import free_memory
from allocator.files.shipped import SEARCH_SPACES, named_file
from allocator.files.toml_files import faults_of, missing_files, typed
from allocator.targets import target_named
from allocator.units import show_bytes

SPACE_FILE = "space.toml"
HELD_OUT = 1 / 8
"""Share of the calibration text that a study without a report keeps for `evaluate`."""
DEFAULT_BITS = 3.0
"""Effective bits of a study that is made without a budget."""
_MOST_BITS = 32
_ABOVE_FLOOR = 1.1  # where the floor is above the default


class StudyValues(TypedDict, total=False):
    """Values of a new study; all others have their defaults.

    Attributes:
        target: `gguf` (the default) or `safetensors`.
        budget: bytes of the whole file, e.g. `12GiB`.
        weights_budget: bytes of the searched matrices.
        bits: effective bits, which give the bytes of the searched matrices.
        device: a whole device as the limit; a preset is a name, or a path from here.
        calibration: file or files with text or token ids, for search and selection.
        report: file or files of held-out text.
        space: search-space file, or the name of a shipped one; else the folder gets its own.
        sampler: name of the sampler.
        trials: in all.
        seed: of everything that is drawn.
        tokenizer: `checkpoint` or `none`.
        expert_width: to which experts are padded.
    """

    target: str | None
    budget: str | int | None
    weights_budget: str | int | None
    bits: float | None
    device: DeviceBudgetSpec | None
    calibration: str | Path | list[str | Path] | None
    report: str | Path | list[str | Path] | None
    space: str | Path | None
    sampler: str | None
    trials: int | None
    seed: int | None
    tokenizer: str | None
    expert_width: int | None


@dataclass(frozen=True, slots=True)
class NewStudy:
    """A study that was made.

    Attributes:
        folder: with study.toml.
        spec: what study.toml says.
        budget: the limit.
        floor: bytes of the smallest allocation that count against the limit.
        ceiling: those of the largest.
        notes: decisions that nobody asked for, one line each.
    """

    folder: Path
    spec: StudySpec
    budget: Budget
    floor: int
    ceiling: int
    notes: tuple[str, ...]


def new_study(model: Path, out: Path | None, values: StudyValues) -> NewStudy:
    """Makes the folder of a study; its search space is beside study.toml where none is given.

    Args:
        model: directory with safetensors, or a GGUF model.
        out: the folder; `<name of the model>-study` by default.
        values: of the study.

    Raises:
        TypeError: if a value is unknown.
        AllocatorError: if there is a study already, the model cannot be opened, or values are
            wrong: one line per fault.
    """
    for name in values:
        if name not in StudyValues.__annotations__:
            known = ", ".join(StudyValues.__annotations__)
            raise TypeError(f"unknown value {name!r} of a study; the known ones are {known}")
    folder = Path(f"{model.resolve().name.removesuffix('.gguf')}-study") if out is None else out
    check_new(folder)
    inventory = read_inventory(model)
    spec = _spec(model, folder, values)
    if spec.expert_width is not None:
        inventory = padded(inventory, spec.expert_width)
    inventory = replace(inventory, without_tokenizer=spec.tokenizer == "none")
    target = target_named(spec.target)
    layout = target.layout(inventory)
    target.check_tokenizer(inventory)
    space = bind(_search_space(spec, folder), layout, None)
    notes = []
    if spec.budget == BudgetSpec():
        limit, note = _weights_limit(values.get("bits"), space)
        spec = msgspec.structs.replace(spec, budget=BudgetSpec(weights=limit))
        notes += note
    budget = chosen_budget(spec.budget, folder, inventory=inventory)
    check_budget(space, budget)
    notes += budget_notes(space, budget)
    needed, free = 2 * inventory.float32_bytes, free_memory()
    if needed > free:
        spec = msgspec.structs.replace(spec, streamed=StreamedSpec())
        notes.append(
            f"with its gradients the model takes {show_bytes(needed)} of memory, "
            f"{show_bytes(int(free))} are free: [streamed] reads it layer by layer"
        )
    floor, ceiling = (budget.used(end.stored(layout)) for end in (space.smallest, space.largest))
    if spec.space == SPACE_FILE and not (folder / SPACE_FILE).exists():
        SearchSpace(schema=1).write(folder / SPACE_FILE)
    spec.write(folder)
    return NewStudy(folder, spec, budget, floor, ceiling, tuple(notes))


def asked_spec(model: Path, folder: Path, values: StudyValues) -> StudySpec:
    """Returns the study that values ask for, in a folder that may have one already.

    Args:
        model: as of `new_study`.
        folder: that paths are relative to.
        values: of the study.

    Raises:
        AllocatorError: as `new_study`.
    """
    spec, bits = _spec(model, folder, values), values.get("bits")
    if bits is None:
        return spec
    limit = _bytes_at(bits, read_inventory(model).n_searched_weights)
    return msgspec.structs.replace(spec, budget=BudgetSpec(weights=limit))


def _bytes_at(bits: float, n_weights: int) -> int:
    return int(n_weights * bits / 8)


def _search_space(spec: StudySpec, folder: Path) -> SearchSpace:
    if spec.space == SPACE_FILE and not (folder / SPACE_FILE).exists():
        return SearchSpace(schema=1)
    return SearchSpace.read(named_file(spec.space, kind=SEARCH_SPACES, relative_to=folder))


def _weights_limit(bits: float | None, space: Space) -> tuple[int, list[str]]:
    """Bytes of the searched matrices, and a note where nobody said how many."""
    n_weights = space.layout.inventory.n_searched_weights
    if bits is not None:
        return _bytes_at(bits, n_weights), []
    floor = space.smallest.nbytes(space.layout).encoded
    limit = max(_bytes_at(DEFAULT_BITS, n_weights), int(floor * _ABOVE_FLOOR))
    return limit, [
        f"no budget was given: {limit * 8 / n_weights:.2f} bits per searched weight; change it "
        f"under [budget] in {STUDY_FILE}, or with --budget of `allocator search`"
    ]


def _spec(model: Path, folder: Path, values: StudyValues) -> StudySpec:
    """The study of the values.

    Raises:
        StudyError: one line per fault.
    """
    data = _data(model, folder, values)
    from_cwd = _data(model, Path(), values) | {"space": os.fspath(values.get("space") or "")}
    faults = [
        *_budget_faults(values),
        *faults_of(data, StudySpec),
        *missing_files(from_cwd, StudySpec, Path.cwd()),
    ]
    if faults:
        raise StudyError("\n".join(map(_in_options, faults)))
    return typed(data, StudySpec)


_OPTIONS = {
    "[budget] weights and file": "--weights-budget and --budget",
    "[budget] weights": "--weights-budget",
    "[budget] file": "--budget",
    "[budget.device] preset": "--device",
    "[budget.device] memory": "--device-memory",
    "[calibration] documents": "--calibration",
    "[calibration] report": "--report",
}
"""Options by the keys of study.toml that have other names there."""


def _in_options(fault: str) -> str:
    """A fault of the values in words of the command line, since there is no study.toml yet."""
    key = re.match(r"(\[[\w.]+\] )?\w+( and \w+)?", fault)
    if key is None:  # about options already
        return fault
    option = "--" + key[0].rpartition("] ")[2].replace("_", "-")
    return _OPTIONS.get(key[0], option) + re.sub("^ = ", " ", fault[key.end() :])


def _budget_faults(values: StudyValues) -> Iterator[str]:
    bits = values.get("bits")
    if bits is None:
        return
    if not 0 < bits <= _MOST_BITS:
        yield f"--bits {bits}: needed a number above 0 and up to {_MOST_BITS}"
    if any(values.get(name) is not None for name in ("budget", "weights_budget", "device")):
        yield "--bits: needed alone, without --budget, --weights-budget and --device"


def _data(model: Path, folder: Path, values: StudyValues) -> dict[str, Any]:
    """The data of study.toml, without what has no value; paths are relative to `folder`."""

    def path(given: Any) -> Any:
        if isinstance(given, list | tuple):
            return path(given[0]) if len(given) == 1 else [path(one) for one in given]
        text = os.fspath(given)
        if os.path.isabs(text) or not os.path.exists(text):  # not a file: it may be a name
            return text
        return os.path.relpath(os.path.abspath(text), os.path.realpath(folder))

    device = values.get("device")
    limits: dict[str, Any] = {
        "weights": values.get("weights_budget"),
        "file": values.get("budget"),
        "device": None if device is None else _given(msgspec.to_builtins(device)),
    }
    if limits["device"] and "preset" in limits["device"]:
        limits["device"]["preset"] = path(limits["device"]["preset"])
    report = values.get("report")
    texts = {"documents": values.get("calibration"), "report": report}
    held_out = {"held_out": HELD_OUT} if report is None else {}
    plain = ("sampler", "trials", "seed", "tokenizer", "expert_width")
    space = values.get("space")
    return _given(
        {
            "schema": 1,
            "checkpoint": path(model),
            "target": values.get("target") or "gguf",
            "space": SPACE_FILE if space is None else path(space),
            **{name: values.get(name) for name in plain},
            "budget": _given(limits),
            "calibration": {name: path(given) for name, given in _given(texts).items()} | held_out,
        }
    )


def _given(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if value is not None}
