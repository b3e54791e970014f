"""`study.toml`: the question a study asks, parsed once into frozen typed values."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec

from allocator.app.device_presets import read_device_preset
from allocator.decision.budget import Budget
from allocator.errors import AllocatorError, StudyError
from allocator.files.atomic import read_toml
from allocator.files.shipped import DEVICES, named_file
from allocator.samplers import check_sampler
from allocator.targets import target_named
from allocator.targets.device_memory import Workload
from allocator.units import parse_bytes


class DeviceBudgetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole device as the limit, and what runs on it; sizes as `128GiB` or plain bytes.

    Attributes:
        preset: a shipped device by its name, e.g. `geforce-rtx-4090`, or a file of that grammar;
            gives `memory` and `bandwidth`.
        memory: of the device.
        context: tokens of a sequence; 4096 by default.
        sequences: in memory at once; 1 by default.
        reserve: for everything else on the device; nothing by default.
        bandwidth: bytes read from memory in a second.
        min_tokens_per_second: a limit on what the bandwidth allows.
    """

    preset: str | None = None
    memory: str | int | None = None
    context: int | None = None
    sequences: int | None = None
    reserve: str | int | None = None
    bandwidth: str | int | None = None
    min_tokens_per_second: float | None = None

    def over(self, other: "DeviceBudgetSpec") -> "DeviceBudgetSpec":
        """Returns this budget, with the other's values where this one has none."""
        given = {n: v for n in self.__struct_fields__ if (v := getattr(self, n)) is not None}
        return msgspec.structs.replace(other, **given)

    def budget(self, folder: Path) -> Budget:
        """Returns the limit of the device.

        Args:
            folder: that `preset` is relative to.

        Raises:
            AllocatorError: if there is no memory, or a number makes no sense.
        """
        preset = None
        if self.preset is not None:
            file = named_file(self.preset, kind=DEVICES, relative_to=folder)
            preset = read_device_preset(file)
        memory, bandwidth = self.memory, self.bandwidth
        if preset is not None:
            memory = preset.memory if memory is None else memory
            bandwidth = preset.bandwidth if bandwidth is None else bandwidth
        if memory is None:
            raise StudyError(
                "a device budget without memory: give --device-memory SIZE, or --device FILE"
            )
        workload = Workload(
            context=4096 if self.context is None else self.context,
            sequences=1 if self.sequences is None else self.sequences,
            reserve=0 if self.reserve is None else parse_bytes(self.reserve),
            bandwidth=None if bandwidth is None else parse_bytes(bandwidth),
            min_tokens_per_second=self.min_tokens_per_second,
        )
        workload.check()
        budget = Budget(parse_bytes(memory), "device", workload)
        budget.check_positive()
        return budget


class BudgetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the three limits, or a device and one of the others."""

    weights: str | int | None = None
    file: str | int | None = None
    device: DeviceBudgetSpec | None = None


class CalibrationSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where tokens come from, and how many each stage uses.

    Attributes:
        documents: JSON lines with `ids` or `text`, for search and selection.
        splits: JSON with lists `search` and `selection` of record indices; else every third
            document (of its domain) is for selection.
        report: JSON lines for the published figures.
        statistics_documents: documents of the search split behind importance and routing
            statistics; all by default.
        search_documents: documents that a COMPLETE trial is scored on, from the search split.
        selection_documents: documents of the selection split that the pick is made on.
        rungs: documents after which a losing trial is stopped.
        measured_documents: documents behind each measured change; up to 8 by default.
        curvature_documents: documents behind the curvature; up to 16 by default.
        window: tokens per document when records hold text.
    """

    documents: str
    splits: str | None = None
    report: str | None = None
    statistics_documents: int | None = None
    search_documents: int | None = None
    selection_documents: int | None = None
    rungs: tuple[int, ...] = (8, 32)
    measured_documents: int | None = None
    curvature_documents: int | None = None
    window: int = 256


class LongRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Runs of one seed with more forward tokens."""

    sampler: str
    target: str
    weights: list[int | str]
    tokens: int

    @property
    def budgets(self) -> list[int]:
        """`weights` in bytes."""
        return [parse_bytes(w) for w in self.weights]


_OWN_REFERENCES = ("knapsack", "baseline")


class CompareSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The runs of `compare`.

    Attributes:
        samplers: by name.
        weights: budgets of the searched matrices, bytes or sizes such as `8MiB`.
        seeds: number of seeds by target.
        tokens: forward tokens of every run, profile included.
        report_documents: documents of the report split behind the figures.
        references: allocation files to stand beside, by name; `{target}`, `{bits}` (effective, e.g.
            2.25 or 3.0) and `{weights}` are filled in, paths are relative to study.toml.
        long: runs with more tokens.
    """

    samplers: list[str]
    weights: list[int | str]
    seeds: dict[str, int]
    tokens: int = 400_000
    report_documents: int | None = None
    references: dict[str, str] = {}  # msgspec copies it
    long: list[LongRun] = []  # msgspec copies it

    @property
    def budgets(self) -> list[int]:
        """`weights` in bytes."""
        return [parse_bytes(w) for w in self.weights]


MOST_TRIALS = 2**31 - 1
"""Most trials of a study: databases number trials with 32 bits."""
MOST_CANDIDATES = 256
"""Most candidates in one pass: a started batch is completed, whatever the limit on trials."""


class StreamedSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model that does not fit in memory is read: layer by layer, from the checkpoint.

    Attributes:
        candidates: scored in one pass; each has hidden states of its own.
        rows: share of a matrix's rows that its prices are measured on.
    """

    candidates: int = 4
    rows: float = 1 / 16


class StudySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `study.toml`; paths are relative to it.

    Attributes:
        target: name of the runtime's contract, e.g. `gguf` or `safetensors`.
        tokenizer: the checkpoint's own goes into a gguf, or `none`: that file reads ids alone.
        streamed: for a model that does not fit in memory.
        expert_width: to which experts are padded with zeros, so that formats of few bits hold
            their rows of down.
    """

    schema: int
    checkpoint: str
    target: str
    calibration: CalibrationSpec
    space: str = ""
    budget: BudgetSpec = BudgetSpec()
    sampler: str = "auto"
    seed: int = 0
    trials: int = 100
    tokenizer: Literal["checkpoint", "none"] = "checkpoint"
    streamed: StreamedSpec | None = None
    expert_width: int | None = None
    compare: CompareSpec | None = None

    @classmethod
    def read(cls, folder: Path) -> "StudySpec":
        """Reads `folder/study.toml`.

        Raises:
            StudyError: if it is missing, or something in it is wrong.
        """
        path = folder / "study.toml"
        spec = read_toml(path, cls, StudyError)
        if spec.schema != 1:
            raise StudyError(f"{path}: schema {spec.schema}, needed 1; use a newer allocator")
        try:
            _check_names(spec)
        except AllocatorError as error:
            raise StudyError(f"{path}: {error}") from None
        c = spec.calibration
        counts = (
            c.statistics_documents,
            c.measured_documents,
            c.curvature_documents,
            c.search_documents,
            c.selection_documents,
            c.window,
        )
        if any(n is not None and n < 1 for n in (*c.rungs, *counts, spec.trials)):
            raise StudyError(f"{path}: trials and the counts of [calibration] must be positive")
        if spec.trials > MOST_TRIALS:
            raise StudyError(
                f"{path}: trials = {spec.trials}, needed at most {MOST_TRIALS:,}; --time and "
                "--tokens limit a search, too"
            )
        if list(c.rungs) != sorted(set(c.rungs)):
            raise StudyError(
                f"{path}: [calibration] rungs = {list(c.rungs)}, needed rising numbers of "
                f"documents, each once: {sorted(set(c.rungs))}"
            )
        if spec.compare is not None:
            _check_compare(path, spec.compare)
        if spec.streamed is not None:
            _check_streamed(path, spec.streamed)
        return spec


def _check_names(spec: StudySpec) -> None:
    check_sampler(spec.sampler)
    target_named(spec.target)
    if spec.compare is not None:
        for name in (*spec.compare.samplers, *(long.sampler for long in spec.compare.long)):
            check_sampler(name)
        for target in (*spec.compare.seeds, *(long.target for long in spec.compare.long)):
            target_named(target)


def _check_streamed(path: Path, spec: StreamedSpec) -> None:
    if not 1 <= spec.candidates <= MOST_CANDIDATES or not 0 < spec.rows <= 1:
        raise StudyError(
            f"{path}: [streamed] candidates = {spec.candidates}, rows = {spec.rows:g}; needed 1 to "
            f"{MOST_CANDIDATES}, and a share above 0 and up to 1"
        )


def _check_compare(path: Path, spec: CompareSpec) -> None:
    where = f"{path}: [compare]"
    for name in ("samplers", "weights", "seeds"):
        if not getattr(spec, name):
            raise StudyError(f"{where} {name} is empty; name at least one")
    counts = {
        "tokens": (spec.tokens, *(long.tokens for long in spec.long)),
        "weights": (*spec.budgets, *(n for long in spec.long for n in long.budgets)),
        "seeds": spec.seeds.values(),
        "report_documents": () if spec.report_documents is None else (spec.report_documents,),
    }
    for name, numbers in counts.items():
        if least := [n for n in numbers if n < 1]:
            raise StudyError(f"{where} {name}: {least[0]}, needed a positive number")
    for name, pattern in spec.references.items():
        if name in _OWN_REFERENCES:
            raise StudyError(f"{where} references: {name!r} is in the table already; rename it")
        try:
            pattern.format(target="", weights=0, bits=0.0)
        except (LookupError, ValueError, AttributeError):
            raise StudyError(
                f"{where} references: {pattern!r}; only {{target}}, {{bits}} and {{weights}} are "
                "filled in"
            ) from None


def chosen_budget(spec: BudgetSpec, folder: Path, asked: BudgetSpec | None = None) -> Budget:
    """Returns the budget of a launch: the limits that are asked for, else the study's.

    What is no limit of its own (context, sequences, reserve, bandwidth, tokens per second) changes
    what runs on the study's device, and leaves the study's limits as they are.

    Args:
        spec: the study's.
        folder: that its device preset is relative to.
        asked: the whole file or the searched matrices replace the study's limits; a device does
            too, or changes single values where the study has a device already.

    Raises:
        StudyError: if there is no limit, or both of file and weights.
    """
    asked = asked or BudgetSpec()
    named = asked.file is not None or asked.weights is not None
    device = asked.device
    if device is not None:
        named |= device.memory is not None or device.preset is not None
        known = spec.device or DeviceBudgetSpec()
        if device.preset is not None:  # the study's own figures are of another device
            known = msgspec.structs.replace(known, memory=None, bandwidth=None)
        device = device.over(known)
    if named:
        spec = BudgetSpec(weights=asked.weights, file=asked.file, device=device)
    elif device is not None:
        spec = msgspec.structs.replace(spec, device=device)
    plain = [
        *(Budget(parse_bytes(size), "file") for size in (spec.file,) if size is not None),
        *(Budget(parse_bytes(size), "weights") for size in (spec.weights,) if size is not None),
    ]
    if len(plain) > 1 or (not plain and spec.device is None):
        raise StudyError(
            "needed one budget: --budget SIZE (the whole file), --weights-budget SIZE (the "
            "searched matrices) or --device-memory SIZE (everything in memory; one of the others "
            "may stand beside it), or [budget] in study.toml"
        )
    if spec.device is None:
        return plain[0]
    return replace(spec.device.budget(folder), beside=plain[0] if plain else None)
