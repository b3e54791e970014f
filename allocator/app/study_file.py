"""`study.toml`: the question a study asks, parsed once into frozen typed values.

In: a study folder. Out: a `StudySpec`. Invariant: the descriptions of its fields are the only ones;
`docs/study-toml.md`, the JSON schema, the commented file of `allocator init` and error texts are
made from them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from allocator.app.device_presets import read_device_preset
from allocator.app.study_path import STUDY_FILE, check_new
from allocator.checkpoint.inventory import Inventory
from allocator.decision.budget import Budget
from allocator.errors import BudgetError, StudyError
from allocator.files.keys import About
from allocator.files.shipped import DEVICES, SEARCH_SPACES, named_file
from allocator.files.toml_files import check_files, read_toml
from allocator.files.toml_template import write_toml
from allocator.samplers import MOST_SEED, SAMPLERS
from allocator.targets import TARGETS
from allocator.targets.device_memory import Workload
from allocator.units import parse_bytes


class DeviceBudgetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole device as the limit, and what runs on it: see `docs/study-toml.md`."""

    preset: Annotated[
        str | None,
        About(
            "A device by its name, or a file (docs/search-spaces.md); gives `memory` and "
            "`bandwidth`.",
            path=True,
            shipped=DEVICES,
            example="geforce-rtx-4090",
        ),
    ] = None
    memory: Annotated[
        str | int | None,
        About(
            "All memory that the model may take at run time: weights, keys and values, compute "
            "buffers, reserve. Required without `preset`.",
            size=True,
            default="the preset's",
            example="24GiB",
        ),
    ] = None
    context: Annotated[
        int | None,
        About(
            "Tokens of a sequence, all of whose keys and values are in memory.",
            least=1,
            default="4096",
            example=8192,
        ),
    ] = None
    sequences: Annotated[
        int | None,
        About("Sequences in memory at once.", least=1, default="1", example=1),
    ] = None
    reserve: Annotated[
        str | int | None,
        About(
            "Bytes for everything else on the device.",
            size=True,
            least=0,
            default="0",
            example="1GiB",
        ),
    ] = None
    bandwidth: Annotated[
        str | int | None,
        About(
            "Bytes read from memory in a second; limits tokens per second.",
            size=True,
            default="the preset's",
            example="1008GB",
        ),
    ] = None
    min_tokens_per_second: Annotated[
        float | None,
        About(
            "Least tokens per second when decoding: a token may read bandwidth / this number of "
            "bytes.",
            above=0,
            default="no such limit",
            example=40,
        ),
    ] = None

    def over(self, other: "DeviceBudgetSpec") -> "DeviceBudgetSpec":
        """Returns this budget, with the other's values where this one has none."""
        given = {n: v for n in self.__struct_fields__ if (v := getattr(self, n)) is not None}
        return msgspec.structs.replace(other, **given)

    def check_context(self, inventory: Inventory) -> None:
        """Checks that the model has a position for every token of a sequence.

        The default is no wish of anybody, and passes.

        Args:
            inventory: the checkpoint.

        Raises:
            BudgetError: if the model has fewer positions than `context`.
        """
        key = inventory.facts.keys.context
        positions = inventory.facts.config.get(key)
        if self.context is not None and type(positions) is int and self.context > positions:
            raise BudgetError(
                f"context {self.context}: the model has {positions} positions ({key}); needed "
                f"--context {positions} or less ([budget.device] of study.toml), or a checkpoint "
                "whose positions reach that far"
            )

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
                "a device budget without memory: give --device-memory SIZE, or --device NAME"
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
    """The hard limit in bytes: `file`, `weights` or `device`, or `device` and one of the others."""

    exclusive: ClassVar[tuple[tuple[str, str], ...]] = (("weights", "file"),)

    weights: Annotated[
        str | int | None,
        About(
            "Bytes of the searched matrices alone: everything but routers, norms and the file's "
            "header.",
            size=True,
            example="11GiB",
        ),
    ] = None
    file: Annotated[
        str | int | None, About("Bytes of the whole file.", size=True, example="12GiB")
    ] = None
    device: Annotated[
        DeviceBudgetSpec | None, About("A whole device as the limit, and what runs on it.")
    ] = None


class CalibrationSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where tokens come from, and how many documents each stage reads (docs/calibration.md).

    A document is what is scored together: a window of `window` tokens where records have text or
    messages, a whole record where records have token ids.
    """

    exclusive: ClassVar[tuple[tuple[str, str], ...]] = (
        ("held_out", "report"),
        ("held_out", "splits"),
    )

    documents: Annotated[
        str | tuple[str, ...] | None,
        About(
            "Text for search and selection: .txt, .parquet, or JSON lines with `text`, `messages` "
            "or `ids`, and optionally `domain`.",
            path=True,
            filled=True,
            default="a default text of several languages and code",
            example="calibration.jsonl",
        ),
    ] = None
    splits: Annotated[
        str | None,
        About(
            "JSON with lists `search` and `selection` of document indices, counted from 0.",
            path=True,
            default="every third document of its domain is for selection",
            example="splits.json",
        ),
    ] = None
    report: Annotated[
        str | tuple[str, ...] | None,
        About(
            "Held-out text, in files as of `documents`, for published figures: `evaluate` and "
            "`compare`.",
            path=True,
            filled=True,
            example="report.jsonl",
        ),
    ] = None
    held_out: Annotated[
        float | None,
        About(
            "Share of every domain's documents, the last ones, that only `evaluate` reads; in the "
            "place of `report`.",
            above=0,
            most=0.5,
            default="none",
            example=0.125,
        ),
    ] = None
    statistics_documents: Annotated[
        int | None,
        About(
            "Search documents behind importance vectors and routing statistics.",
            least=1,
            default="all of the search split",
            example=128,
        ),
    ] = None
    search_documents: Annotated[
        int | None,
        About(
            "Search documents that a COMPLETE trial is scored on.",
            least=1,
            default="all of the search split",
            example=64,
        ),
    ] = None
    selection_documents: Annotated[
        int | None,
        About(
            "Selection documents that the pick is made on.",
            least=1,
            default="all of the selection split",
            example=64,
        ),
    ] = None
    rungs: Annotated[
        tuple[int, ...],
        About(
            "Documents after which a losing trial stops. Empty: every trial is scored in full.",
            least=1,
            rising=True,
        ),
    ] = (8, 32)
    measured_documents: Annotated[
        int | None,
        About(
            "Search documents behind each measured change of the profile.",
            least=1,
            default="up to 8",
            example=8,
        ),
    ] = None
    curvature_documents: Annotated[
        int | None,
        About(
            "Search documents behind the curvature, and behind each gradient step.",
            least=1,
            default="up to 16",
            example=16,
        ),
    ] = None
    window: Annotated[
        int, About("Tokens per document where records have text or messages.", least=1)
    ] = 256
    imatrix: Annotated[
        str | None,
        About(
            "File of llama.cpp's llama-imatrix, GGUF or `.dat`, whose importance is taken.",
            path=True,
            default="importance is measured",
            example="imatrix.gguf",
        ),
    ] = None

    @property
    def has_report(self) -> bool:
        """Whether there is held-out text."""
        return self.report is not None or self.held_out is not None


def _sampler_names() -> Iterable[str]:
    return SAMPLERS


def _target_names() -> Iterable[str]:
    return TARGETS


class LongRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Runs of one seed with more forward tokens."""

    sampler: Annotated[str, About("The sampler.", names=_sampler_names, example="evolution")]
    target: Annotated[str, About("The target.", names=_target_names, example="gguf")]
    weights: Annotated[
        list[int | str],
        About("Budgets of the searched matrices.", size=True, filled=True, example=["8MiB"]),
    ]
    tokens: Annotated[int, About("Forward tokens of the run.", least=1, example=4_000_000)]

    @property
    def budgets(self) -> list[int]:
        """`weights` in bytes."""
        return [parse_bytes(w) for w in self.weights]


_OWN_REFERENCES = ("knapsack", "baseline")


class CompareSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The runs of `allocator compare`: searchers side by side, with equal forward tokens."""

    samplers: Annotated[
        list[str],
        About("The samplers.", names=_sampler_names, filled=True, example=["auto", "knapsack"]),
    ]
    weights: Annotated[
        list[int | str],
        About("Budgets of the searched matrices.", size=True, filled=True, example=["8MiB"]),
    ]
    seeds: Annotated[
        dict[str, int],
        About(
            "The number of seeds by target.",
            names=_target_names,
            least=1,
            filled=True,
            example=dict(gguf=3),
        ),
    ]
    tokens: Annotated[
        int,
        About("Forward tokens of each run: profile, original, trials, gradients, pick.", least=1),
    ] = 400_000
    report_documents: Annotated[
        int | None,
        About("Report documents behind the figures.", least=1, default="all", example=48),
    ] = None
    references: Annotated[
        dict[str, str],
        About(
            "Allocation files to stand beside, by name. `{target}`, `{bits}` (effective, such as "
            "2.25 or 3.0) and `{weights}` are filled in; paths are relative to this file.",
            default="none",
            example={"frozen": "allocations/{target}-{bits}.json"},
        ),
    ] = {}  # msgspec copies it
    long: Annotated[
        list[LongRun], About("Runs of one seed with more tokens.", default="none")
    ] = []  # msgspec copies it

    def faults(self) -> Iterator[str]:
        """Lists what is wrong beyond single keys."""
        for name, pattern in self.references.items():
            if name in _OWN_REFERENCES:
                yield f"references: {name!r} is in the table already; rename it"
            try:
                pattern.format(target="", weights=0, bits=0.0)
            except (LookupError, ValueError, AttributeError):
                yield (
                    f"references: {pattern!r}; only {{target}}, {{bits}} and {{weights}} are "
                    "filled in"
                )

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

    A study without this table has the model in memory.
    """

    candidates: Annotated[
        int,
        About(
            "Candidates scored in one pass over the checkpoint; each has hidden states of its own.",
            least=1,
            most=MOST_CANDIDATES,
        ),
    ] = 4
    rows: Annotated[
        float, About("Share of a matrix's rows that its prices are measured on.", above=0, most=1)
    ] = 1 / 16


class StudySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The question that a study asks; paths are relative to its study.toml."""

    schema: Annotated[int, About("Version of this grammar.", least=1, most=1, example=1)]
    checkpoint: Annotated[
        str,
        About(
            "The model: a directory with safetensors and config.json, or a GGUF in BF16, F16, F32 "
            "or Q8_0.",
            path=True,
            example="/models/my-moe",
        ),
    ]
    target: Annotated[
        str,
        About(
            "What the written checkpoint is for: `gguf` for llama.cpp, `safetensors` for "
            "transformers.",
            names=_target_names,
            example="gguf",
        ),
    ]
    calibration: Annotated[CalibrationSpec, About("Where tokens come from.")] = CalibrationSpec()
    space: Annotated[
        str,
        About(
            "A search-space file: formats, pins and limits set by hand (docs/search-spaces.md).",
            path=True,
            shipped=SEARCH_SPACES,
            default="everything that the target can store",
            example="space.toml",
        ),
    ] = ""
    budget: Annotated[
        BudgetSpec, About("The hard limit in bytes; the command line may name another one.")
    ] = BudgetSpec()
    sampler: Annotated[
        str, About("What proposes trials; `auto` is the best one known.", names=_sampler_names)
    ] = "auto"
    seed: Annotated[int, About("Of everything that is drawn.", least=0, most=MOST_SEED)] = 0
    trials: Annotated[
        int,
        About(
            "Trials of the study in all; `--time` and `--tokens` limit a search, too.",
            least=1,
            most=MOST_TRIALS,
        ),
    ] = 100
    tokenizer: Annotated[
        Literal["checkpoint", "none"],
        About("Whether a GGUF gets the checkpoint's tokenizer, or none and reads token ids alone."),
    ] = "checkpoint"
    streamed: Annotated[StreamedSpec | None, About("For a model that does not fit in memory.")] = (
        None
    )
    expert_width: Annotated[
        int | None,
        About(
            "Neurons to which experts are padded with zeros, so that formats of few bits hold "
            "their rows of down (docs/families.md).",
            least=1,
            default="no padding",
            example=1536,
        ),
    ] = None
    compare: Annotated[CompareSpec | None, About("The runs of `allocator compare`.")] = None

    @classmethod
    def read(cls, folder: Path) -> "StudySpec":
        """Reads `folder/study.toml`.

        Raises:
            StudyError: if it is missing; else one line per fault of the file.
        """
        path = folder / STUDY_FILE
        if not path.exists():
            raise StudyError(
                f"{path}: no such file; `allocator init MODEL --out {folder}` writes one"
            )
        return read_toml(path, cls, StudyError)

    def write(self, folder: Path) -> Path:
        """Writes `folder/study.toml`, with every key and what it means; makes the folder.

        Returns:
            Its path.

        Raises:
            StudyError: if there is one already, or values are wrong: one line per fault.
        """
        check_new(folder)
        path = folder / STUDY_FILE
        title = "What this study asks; paths are relative to this file. Launch: allocator search."
        write_toml(path, self, StudyError, title=title, schema="study")
        return path

    def check_files(self, folder: Path) -> None:
        """Raises:
        StudyError: one line per file that is named in `folder/study.toml` and does not exist.
        """
        check_files(folder / STUDY_FILE, self, StudyError)


def chosen_budget(
    spec: BudgetSpec,
    folder: Path,
    asked: BudgetSpec | None = None,
    *,
    inventory: Inventory | None = None,
) -> Budget:
    """Returns the budget of a launch: the limits that are asked for, else the study's.

    What is no limit of its own (context, sequences, reserve, bandwidth, tokens per second) changes
    what runs on the study's device, and leaves the study's limits as they are.

    Args:
        spec: the study's.
        folder: that its device preset is relative to.
        asked: the whole file or the searched matrices replace the study's limits; a device does
            too, or changes single values where the study has a device already.
        inventory: the checkpoint, which must have the positions of a device's context.

    Raises:
        StudyError: if there is no limit, or both of file and weights.
        BudgetError: if the checkpoint has fewer positions.
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
    if inventory is not None:
        spec.device.check_context(inventory)
    return replace(spec.device.budget(folder), beside=plain[0] if plain else None)
