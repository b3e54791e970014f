"""The public verbs, each one function; the command line parses, calls one of these, and prints.

In: paths and plain values. Out: data, often a pandas table, and files. Progress bars are shown when
`progress` is true; nothing else is printed. Invariant: importing this module loads nothing but
Python's own modules, and a verb loads torch only after it has read and accepted its files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

if TYPE_CHECKING:
    import pandas as pd

    from allocator.app.estimate import SearchEstimate
    from allocator.app.finish_stage import FinishRequest, FinishResult
    from allocator.app.new_study import NewStudy, StudyValues
    from allocator.app.planning import Plan
    from allocator.app.resources import ResourceOptions, StudyOptions
    from allocator.app.search_stage import SearchResult
    from allocator.app.study_file import DeviceBudgetSpec
    from allocator.app.study_folder import StudyFolder
    from allocator.app.trial_table import trials_table
    from allocator.checkpoint.inventory import Inventory
    from allocator.comparison.pool import CompareEstimate
    from allocator.comparison.runs import Baselines, CompareRequest, Run
    from allocator.decision.allocation_record import AllocationRecord
    from allocator.evaluation.held_out import evaluate
    from allocator.export.base import Runtime
    from allocator.export.checkpoint import Written
    from allocator.export.verification import Verification
    from allocator.finishing.estimate import FinishEstimate
    from allocator.prediction.priors import Prior
    from allocator.prediction.profile import Profile
    from allocator.reporting.report import report
    from allocator.targets import Layout


_STAGES = {  # verbs that are written where their stage is
    "evaluate": "allocator.evaluation.held_out",
    "report": "allocator.reporting.report",
    "trials_table": "allocator.app.trial_table",
}
__all__ = [
    "compare",
    "diff",
    "estimate",
    "estimate_compare",
    "estimate_finish",
    "evaluate",
    "explain",
    "finish",
    "front",
    "imatrix",
    "init",
    "inspect",
    "materialize",
    "plan",
    "profile",
    "report",
    "reproduce",
    "score",
    "score_gguf",
    "search",
    "trials_table",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _STAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_STAGES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))


def inspect(
    checkpoint: str | Path, *, target: str = "safetensors", expert_width: int | None = None
) -> pd.DataFrame:
    """Groups of a checkpoint in a target, with the formats offered; no weights are read.

    The checkpoint is a directory with safetensors, or a GGUF model in BF16, F16, F32 or Q8_0.

    With `expert_width`, experts are padded to it, as by study.toml's key of that name.

    `attrs["notes"]` of the table are lines on what is left out, what the runtime must be told, and
    what a gguf file of it could not have: a tokenizer.
    """
    from allocator.checkpoint.reading import read_inventory
    from allocator.errors import CheckpointError, TargetError

    inventory = _padded(read_inventory(checkpoint), expert_width)

    from allocator.targets import target_named

    chosen = target_named(target)
    layout = chosen.layout(inventory)
    notes = []
    try:
        chosen.check_tokenizer(layout.inventory)
    except (CheckpointError, TargetError) as error:
        notes.append(f"no tokenizer: {error}")
    rows = [
        {
            "group": g.name,
            "shape": "x".join(map(str, g.shape)),
            "weights": prod(g.shape),
            "tensors": len(g.sources),
            "formats": " ".join(f.name for f in g.offered()),
        }
        for g in layout.groups.values()
    ]

    import pandas as pd

    table = pd.DataFrame(rows)
    table.attrs["notes"] = (*layout.notes, *notes)
    return table


def _padded(inventory: Inventory, expert_width: int | None) -> Inventory:
    from allocator.checkpoint.padding import padded

    return inventory if expert_width is None else padded(inventory, expert_width)


def init(
    model: str | Path,
    out: str | Path | None = None,
    *,
    progress: bool = False,
    **values: Unpack[StudyValues],
) -> NewStudy:
    """Makes a study of a model: a folder with a study.toml and a space.toml, every key explained.

    A study may also be made from typed values, `StudySpec(...).write(folder)`.

    Args:
        model: directory with safetensors, a GGUF model, or an id on the Hugging Face hub.
        out: folder of the study; `<name of the model>-study` by default.
        progress: shows bars of what is fetched.
        values: as of `StudyValues`; what is left out has its default.

    Raises:
        AllocatorError: if there is a study already, the model cannot be opened, or values are
            wrong: one line per fault. Nothing is written then.
    """
    from allocator.app.study_path import check_new
    from allocator.files.outputs import check_output_folder

    if out is None:
        check_output_folder("--out", Path())
    else:
        check_new(Path(out))

    from allocator.checkpoint.hub import model_path

    path = model_path(model, progress=progress)

    from allocator.app.new_study import new_study

    return new_study(path, None if out is None else Path(out), values)


def plan(
    config: str | Path,
    *,
    device: DeviceBudgetSpec | None = None,
    experts: Sequence[int] = (),
    kv_format: str | None = None,
    micro_batch: int | None = None,
    profile: str | Path | None = None,
    out: str | Path | None = None,
    expert_width: int | None = None,
    **options: Unpack[ResourceOptions],
) -> Plan:
    """Plans a model from its `config.json` alone: its sizes, and first allocations that fit.

    Args:
        config: the file, or its directory; no weights are needed.
        device: device budget to fit in; without a device budget, the plan has sizes alone.
        experts: retained counts to plan for; all, three quarters and five eighths by default.
        kv_format: format of cached keys and values.
        micro_batch: tokens computed at once.
        profile: study of a smaller relative, whose losses are taken over; profiled if need be.
        out: folder for the allocations that fit.
        expert_width: that experts are padded to, as by study.toml's key of that name.
        options: as of `ResourceOptions`, for the profile.

    Raises:
        AllocatorError: one line on whatever is wrong.
    """
    from allocator.app.resources import Resources
    from allocator.files.outputs import check_output_folder

    Resources.of(options)  # refuses unknown keywords
    if out is not None:
        check_output_folder("--out", Path(out))
    asked: dict[str, Any] = {
        "budget": None if device is None else device.budget(Path()),
        "counts": experts,
        "kv_format": kv_format,
        "micro_batch": micro_batch,
    }

    from allocator.checkpoint.outline import planned_inventory

    inventory = _padded(planned_inventory(Path(config)), expert_width)

    from allocator.app.planning import first_paths, write_first
    from allocator.app.planning import plan as _plan
    from allocator.prediction.priors import published

    if device is not None:
        device.check_context(inventory)
    planned = _plan(inventory, prior=published(), **asked)
    if out is not None:
        first_paths(planned, Path(out))
    if profile is not None:  # which may take hours to measure
        planned = _plan(inventory, prior=_transferred(profile, **options), **asked)
    if out is not None:
        write_first(planned, Path(out))
    return planned


def _transferred(study: str | Path, **options: Unpack[ResourceOptions]) -> Prior:
    from allocator.app.planning import RUNTIME
    from allocator.app.study_folder import StudyFolder

    study_folder = StudyFolder(study, target=RUNTIME, **options)
    measured = study_folder.profile

    from allocator.decision.search_space import SearchSpace, bind

    space = bind(SearchSpace(schema=1), study_folder.layout, measured.saliency)

    from allocator.prediction.priors import transferred
    from allocator.prediction.surrogate import from_profile

    return transferred(from_profile(measured, space), str(study))


def search(
    study: str | Path,
    *,
    budget: str | None = None,
    weights_budget: str | None = None,
    device: DeviceBudgetSpec | None = None,
    trials: int | None = None,
    seconds: float | None = None,
    tokens: int | None = None,
    storage: str | None = None,
    sampler: str | None = None,
    seed: int | None = None,
    join: bool = False,
    workers: int = 1,
    lease_seconds: float | None = None,
    **options: Unpack[StudyOptions],
) -> SearchResult:
    """Launches or resumes a study, then picks among its front on the selection split.

    Several searches may work on one study, on one machine or many: no trial is lost or made twice,
    and each returns when the trials that the others have at its end have ended, too.

    Args:
        study: its folder.
        budget: bytes of the whole file, e.g. `12MiB`; study.toml's by default. With `device`, a
            second limit.
        weights_budget: bytes of the searched matrices alone. With `device`, a second limit.
        device: limit on everything in a device's memory, and what runs there.
        trials: proposals in the study in total; study.toml's where neither `trials`, `seconds` nor
            `tokens` is given.
        seconds: time limit; replaces study.toml's `trials`.
        tokens: limit on forward tokens, profile and pick included; replaces study.toml's `trials`.
        storage: a database URL, `grpc://HOST:PORT` or `journal:PATH`; by default a journal in the
            folder.
        sampler: name of the sampler; study.toml's by default.
        seed: of the study; study.toml's by default.
        join: works beside a search that is running on this machine.
        workers: processes that search side by side, each with its share of the cores and its own
            copy of the model; only a search of one worker is reproducible, and to the last bit
            only on one thread.
        lease_seconds: a worker that is silent for longer counts as dead, and others make its
            trials; a minute by default.
        options: as of `StudyOptions`.

    Raises:
        AllocatorError: one line on whatever is wrong, before anything is written.
    """
    from allocator.app.request import SearchRequest
    from allocator.app.resources import Resources
    from allocator.app.search_stage import search as _search
    from allocator.app.study_file import BudgetSpec
    from allocator.study.leases import LEASE_SECONDS
    from allocator.study.stop_rule import StopRule

    return _search(
        SearchRequest(
            study=Path(study),
            budget=BudgetSpec(file=budget, weights=weights_budget, device=device),
            stop=StopRule(trials=trials, seconds=seconds, tokens=tokens),
            sampler=sampler,
            seed=seed,
            storage=storage,
            join=join,
            workers=workers,
            lease_seconds=LEASE_SECONDS if lease_seconds is None else lease_seconds,
            target=options.get("target"),
            resources=Resources.of(options),
        )
    )


def estimate(
    study: str | Path,
    *,
    budget: str | None = None,
    weights_budget: str | None = None,
    device: DeviceBudgetSpec | None = None,
    trials: int | None = None,
    seconds: float | None = None,
    tokens: int | None = None,
    storage: str | None = None,
    sampler: str | None = None,
    seed: int | None = None,
    **options: Unpack[StudyOptions],
) -> SearchEstimate:
    """Prices a search without starting it: `search --dry-run`; arguments as of `search`.

    Raises:
        AllocatorError: one line on whatever is wrong.
    """
    from allocator.app.estimate import estimate as _estimate
    from allocator.app.request import SearchRequest
    from allocator.app.resources import Resources
    from allocator.app.study_file import BudgetSpec
    from allocator.study.stop_rule import StopRule

    return _estimate(
        SearchRequest(
            study=Path(study),
            budget=BudgetSpec(file=budget, weights=weights_budget, device=device),
            stop=StopRule(trials=trials, seconds=seconds, tokens=tokens),
            sampler=sampler,
            seed=seed,
            storage=storage,
            target=options.get("target"),
            resources=Resources.of(options),
        )
    )


def profile(study: str | Path, **options: Unpack[StudyOptions]) -> Profile:
    """Builds or continues a study's profile."""
    from allocator.app.study_folder import StudyFolder

    return StudyFolder(study, **options).profile


def front(
    study: str | Path, *, storage: str | None = None, **options: Unpack[StudyOptions]
) -> pd.DataFrame:
    """Returns the non-dominated COMPLETE trials, smallest first; writes `front.json`."""
    from allocator.app.study_folder import StudyFolder
    from allocator.errors import StudyError

    study_folder = StudyFolder(study, **options)
    opened = study_folder.searched(storage)
    if opened is None:
        raise StudyError(
            f"{study_folder.path}: no study yet in {storage or 'its own journal'}; launch "
            "`allocator search` first, or name the --storage that it was launched with"
        )

    from allocator.app.trial_table import write_front
    from allocator.study.optuna_study import LOCK

    asked = options.get("target")
    searched = opened.user_attrs.get(LOCK, {}).get("target")
    if asked is not None and asked != searched:
        raise StudyError(
            f"{study_folder.path}: its study was searched for target {searched!r}, asked for "
            f"{asked!r}; leave the target out"
        )
    table = write_front(study_folder, opened)
    if table.empty:
        raise StudyError(
            f"{study_folder.path}: no trial is finished yet; continue with `allocator search`"
        )
    return table


def score(
    study: str | Path,
    allocation: str | Path,
    *,
    base: str | None = None,
    **options: Unpack[StudyOptions],
) -> dict[str, Any]:
    """Scores any allocation on the search split: loss, per domain, bytes, effective bits.

    A record that names finished weights is scored with them.
    """
    from allocator.app.study_folder import StudyFolder

    study_folder = StudyFolder(study, **options)
    decision, importance = study_folder.read_encoded(allocation, base=base)
    size = decision.nbytes(study_folder.layout)
    scored = study_folder.calibration.trial_documents
    scorer = study_folder.scorers.encoded_with(importance, scored, beside=Path(allocation))

    from allocator.app.record_weights import finished_candidate

    candidate = finished_candidate(study_folder, Path(allocation)) or decision
    return scorer.summary(scorer.score(candidate)) | {
        "digest": decision.digest,
        "bytes": {"encoded": size.encoded, "kept": size.full_precision, "file": size.file},
        "effective_bits": size.encoded * 8 / study_folder.inventory.n_searched_weights,
        "experts": decision.counts,
    }


def score_gguf(
    study: str | Path,
    file: str | Path,
    *,
    documents: int | None = None,
    **options: Unpack[StudyOptions],
) -> pd.DataFrame:
    """Scores anybody's GGUF of the study's model in llama.cpp, beside the study's pick.

    Headers are checked first. llama.cpp's own reader of files is native code, and runs in a process
    of its own.

    Args:
        study: the folder whose held-out documents are scored: of the report split, else of the
            selection split.
        file: the GGUF, or any part of a split one.
        documents: that are scored; up to 48 by default.
        options: as of `StudyOptions`.

    Returns:
        A row per file: bytes, effective bits, experts, KL in nats per token, and by domain;
        `attrs` has `split` and `notes`. The pick's row is there if it is of target gguf.

    Raises:
        AllocatorError: one line on whatever is wrong with the file.
    """
    from allocator.app.study_folder import StudyFolder
    from allocator.decision.allocation_record import AllocationRecord

    options["target"] = "gguf"
    study_folder = StudyFolder(study, **options)
    pick = study_folder.path / "allocations" / "pick.json"

    from allocator.evaluation.gguf_score import score_gguf as _score_gguf
    from allocator.export.gguf.runtime import GGUF_RUNTIME

    def write(folder: Path) -> Path:
        return materialize(study, pick, folder / "pick", **options).folder / GGUF_RUNTIME.file_name

    writable = pick.is_file() and GGUF_RUNTIME.can_write(AllocationRecord.read(pick).decision)
    return _score_gguf(study_folder, Path(file), write if writable else None, documents=documents)


def explain(
    study: str | Path, allocation: str | Path, **options: Unpack[StudyOptions]
) -> pd.DataFrame:
    """Tabulates an allocation by decision: bytes, predicted loss, the next step up and down.

    `predicted_loss` is of a small change there: the part by jumps goes with the square root of
    all changes, so the column adds up to the prediction less half of that part. Columns `up` and
    `down` name the neighbouring value, by bytes at the allocation's retained counts; `up_bytes`
    and `up_loss` are what it adds. Bytes are of the searched matrices, or of the whole device where
    study.toml's budget is one; of a setting, what it takes beyond its smallest choice.

    `attrs["losses"]` has what the file says was measured: `(split, unfinished, finished)`, nats per
    token, the last None where nothing finished it.

    Raises:
        SpaceError: if the study's space does not hold the allocation.
    """
    from allocator.app.study_folder import StudyFolder
    from allocator.decision.allocation_record import recorded_losses

    study_folder = StudyFolder(study, **options)
    decision = study_folder.read_allocation(allocation)
    device = study_folder.spec.budget.device
    budget = None if device is None else device.budget(study_folder.path)

    from allocator.app.explanation import explanation

    table = explanation(decision, study_folder.space, study_folder.surrogate, budget)
    table.attrs["losses"] = recorded_losses(Path(allocation))
    return table


def diff(one: str | Path, other: str | Path) -> pd.DataFrame:
    """Lists the decisions in which two allocation files differ: `decision`, `one`, `other`.

    Args:
        one: a record as `search` writes it, or a plain `allocation.json`.
        other: another; of a different checkpoint or target it is compared where names are shared.

    Raises:
        SpaceError: if a file is no allocation.
    """
    from allocator.decision.difference import difference

    return difference(one, other).rows


def finish(
    study: str | Path,
    allocation: str | Path,
    *,
    base: str | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    tuning: bool = True,
    seed: int | None = None,
    out: str | None = None,
    resolve: bool = False,
    on_estimate: Callable[[FinishEstimate], None] | None = None,
    **options: Unpack[StudyOptions],
) -> FinishResult:
    """Finishes an allocation: the same formats and bytes at less loss; resumable.

    Codes are chosen anew against the second moments of their inputs, then norms, routers and block
    scales are tuned end to end. The record, which is made where there is none, names the finished
    weights; their file lies beside it.

    Args:
        study: the folder whose documents are used.
        allocation: a record as `search` writes it, a plain `allocation.json`, a llama-quantize
            `--tensor-type-file`, or a format's name: `Q2_K`, or `Q2_K/Q6_K` for routed experts and
            the rest.
        base: of a tensor-type file, format of the tensors that it does not name.
        tokens: most search tokens behind second moments, and most that are tuned on; 65,536 and
            61,440 by default.
        seconds: time limit; ends tuning early, which the record says.
        tuning: tunes after the codes.
        seed: of what is drawn; 0 by default.
        out: name of the record to write; by default the one that was given, or one in the study's
            `allocations` that is named for the file or the format.
        resolve: finishes another allocation, that of least predicted loss after finishing under
            the limits of the given one; it becomes a record of its own, `<name>-resolved`. Builds
            the study's profile where there is none.
        on_estimate: called with the estimate, before any weights are computed.
        options: as of `StudyOptions`.

    Raises:
        AllocatorError: one line on whatever is wrong, before anything is measured where it can be
            seen then.
    """
    from allocator.app.finish_stage import finish as _finish

    return _finish(
        _finish_request(
            study, allocation, base=base, tokens=tokens, seconds=seconds, tuning=tuning, seed=seed,
            out=out, resolve=resolve, **options,
        ),
        on_estimate,
    )  # fmt: skip


def estimate_finish(
    study: str | Path,
    allocation: str | Path,
    *,
    base: str | None = None,
    tokens: int | None = None,
    tuning: bool = True,
    seed: int | None = None,
    out: str | None = None,
    **options: Unpack[StudyOptions],
) -> FinishEstimate:
    """Prices what `finish` would do, after the same checks: `finish --dry-run`."""
    from allocator.app.finish_stage import estimate as _estimate

    return _estimate(
        _finish_request(
            study, allocation, base=base, tokens=tokens, seconds=None, tuning=tuning, seed=seed,
            out=out, **options,
        )
    )  # fmt: skip


def _finish_request(
    study: str | Path,
    allocation: str | Path,
    *,
    base: str | None,
    tokens: int | None,
    seconds: float | None,
    tuning: bool,
    seed: int | None,
    out: str | None,
    resolve: bool = False,
    **options: Unpack[StudyOptions],
) -> FinishRequest:
    from allocator.app.finish_stage import FinishRequest, recipe_of
    from allocator.app.resources import Resources

    return FinishRequest(
        study=Path(study),
        allocation=Path(allocation),
        base=base,
        recipe=recipe_of(tokens=tokens, tuning=tuning, seed=seed),
        seconds=seconds,
        out=out,
        target=options.get("target"),
        resources=Resources.of(options),
        resolve=resolve,
    )


def imatrix(
    study: str | Path,
    out: str | Path,
    *,
    allocation: str | Path | None = None,
    **options: Unpack[StudyOptions],
) -> tuple[Path, ...]:
    """Writes importance vectors as a file that llama-quantize takes.

    Args:
        study: the folder whose calibration pass gives the vectors, or whose imatrix does.
        out: of the file; `.dat` gives the binary form, anything else GGUF.
        allocation: an allocation file of target gguf: its own vectors, of the experts that it
            retains, and beside `out` its formats, as `<out without suffix>.tensor-types.txt`.
        options: as of `StudyOptions`.

    Returns:
        The files.

    Raises:
        OutputError: if `out` cannot be written.
        TargetError: if llama.cpp has not the model's tensors, or not the allocation's.
    """
    from allocator.app.study_folder import StudyFolder
    from allocator.files.outputs import check_output_file

    options["target"] = "gguf"
    check_output_file("OUT", Path(out))
    study_folder = StudyFolder(study, **options)

    from allocator.app.imatrix_stage import write

    return write(study_folder, Path(out), None if allocation is None else Path(allocation))


def materialize(
    study: str | Path,
    allocation: str | Path,
    out: str | Path,
    *,
    container: str | None = None,
    record: bool = False,
    unfinished: bool = False,
    floats: str | None = None,
    shard_size: int | str | None = None,
    **options: Unpack[StudyOptions],
) -> Written:
    """Writes the checkpoint of an allocation file, with its finished weights if it names some.

    Args:
        study: the folder it belongs to.
        allocation: a file as `search` writes it.
        out: directory to make.
        container: name of the target whose runtime is to read it; the study's by default.
        record: note the weights' sha256 in the allocation file, for `reproduce`.
        unfinished: writes the weights as their codecs encode them, also where the file names
            finished ones.
        floats: `BF16`, `F16` or `F32`: writes every matrix of the retained experts and of the rest
            in this format, e.g. for llama-quantize.
        shard_size: the most bytes of tensors in a file of container safetensors; `none` for one
            file. By default 5GB, unless one file is within a limit of the record and shards, with
            their headers and index, are not.
        options: as of `StudyOptions`.

    Raises:
        SpaceError: if `floats` is no such format, or asked for with `record`.
        OutputError: if the directory cannot be made, or with `record` the file not be written.
        StudyError: if the allocation file was changed meanwhile, and `record` is set; the
            checkpoint of the earlier one is there then.
        CheckpointError: if the checkpoint, the importance or the weights of the file are not here.
        BudgetError: if `shard_size` exceeds a limit of the record that one file does not.
        TargetError: if the container's runtime cannot express the allocation, or has no shards.
    """
    from allocator.app.allocation_files import check_same_checkpoint
    from allocator.app.study_folder import StudyFolder
    from allocator.decision.allocation_record import AllocationRecord, note_digests
    from allocator.files.outputs import check_output_file

    study_folder = StudyFolder(study, **options)
    path = Path(allocation)
    wanted = AllocationRecord.read(path)
    if record:
        check_output_file("--record", path)
    check_same_checkpoint(wanted.checkpoint, study_folder.inventory)
    container = container or study_folder.spec.target

    from allocator.export.checkpoint import check_place
    from allocator.export.checkpoint import materialize as _materialize
    from allocator.export.runtimes import runtime_named

    runtime = runtime_named(container)
    if floats is not None:
        wanted = _in_floats(wanted, floats, record=record)
    runtime.check_can_write(wanted.decision)
    wanted.decision.check(study_folder.layout)
    chosen = wanted.unfinished if unfinished else wanted
    shard_bytes = _shard_bytes(shard_size, runtime, study_folder.layout, wanted)
    if shard_bytes is not None:
        runtime = runtime.in_shards(study_folder.layout, wanted.decision, shard_bytes)
    size = wanted.decision.nbytes(study_folder.layout, runtime.target)
    check_place(Path(out), wanted.decision, chosen.weights_digest, container, size.file)

    from allocator.app.record_weights import source_of

    source = source_of(study_folder, chosen, beside=path)

    written = _materialize(
        source,
        Path(out),
        container=container,
        importance=wanted.importance,
        workload=wanted.workload,
        record=wanted,
        shard_bytes=shard_bytes,
    )
    if record:
        digests = {container: written.manifest.sha256_of_weights}
        note_digests(path, wanted, digests, unfinished=unfinished)
    return written


def _shard_bytes(
    asked: int | str | None, runtime: Runtime, layout: Layout, record: AllocationRecord
) -> int | None:
    """Returns the most bytes of tensors in a file of an allocation's weights; None for one file.

    Raises:
        BudgetError: if one file is within a limit of the record, and the shards asked for are not.
    """
    from allocator.errors import BudgetError
    from allocator.targets.safetensors import SHARD_BYTES
    from allocator.units import parse_bytes

    if asked == "none" or (asked is None and not runtime.index_name):
        return None
    shard_bytes = SHARD_BYTES if asked is None else parse_bytes(asked)
    shards = runtime.in_shards(layout, record.decision, shard_bytes)
    one, cut = (record.decision.nbytes(layout, r.target).file for r in (runtime, shards))
    limits = (nbytes for name, nbytes in record.bytes.items() if name.startswith("budget"))
    exceeded = [limit for limit in limits if one <= limit < cut]
    if not exceeded:
        return shard_bytes
    if asked is None:
        return None
    raise BudgetError(
        f"--shard-size {asked}: {cut:,} bytes with the headers and the index of shards, the limit "
        f"of the record is {min(exceeded):,}; needed larger shards, or none: one file has {one:,}"
    )


def _in_floats(wanted: AllocationRecord, fmt: str, *, record: bool) -> AllocationRecord:
    from msgspec.structs import replace

    from allocator.decision.allocation import Allocation
    from allocator.errors import SpaceError

    known = ("BF16", "F16", "F32")
    if fmt not in known or record:
        raise SpaceError(
            f"floats = {fmt!r}{' with record' if record else ''}: needed one of "
            f"{', '.join(known)}, and no record of it: the file holds other weights than the "
            "allocation's"
        )
    decision = wanted.decision
    written = Allocation.of(
        target=decision.target,
        retained=decision.retained_experts,
        formats=dict.fromkeys(decision.format_of, fmt),
        experts_used=decision.experts_used,
    )
    plain = wanted.unfinished
    return replace(plain, allocation=written.to_json(), digest=written.digest, sha256={})


def verify(
    study: str | Path,
    folder: str | Path,
    *,
    documents: int | None = None,
    tolerance: float | None = None,
    encode: bool = False,
    allocation: str | Path | None = None,
    **options: Unpack[StudyOptions],
) -> Verification:
    """Re-opens a written checkpoint in its runtime and compares it with its allocation.

    Args:
        study: the folder it belongs to.
        folder: the checkpoint's directory.
        documents: of the search split, scored in torch and in the runtime; by default those that a
            trial is scored on, and then the trial's loss must come out again.
        tolerance: how far the runtime may be off, nats per token; by default 1e-5 in transformers
            and 5e-3 in llama.cpp, whose kernels round activations to 8 bits.
        encode: encodes every group anew from the checkpoint, without the cache, and compares.
        allocation: the file that it was made from, where that lies outside of the study's
            `allocations`; importance and finished weights may lie beside it.
        options: as of `StudyOptions`.

    Raises:
        VerifyError: at the first thing that is not as it should be.
    """
    from allocator.app.allocation_files import check_same_checkpoint
    from allocator.app.study_folder import StudyFolder
    from allocator.decision.allocation_record import AllocationRecord
    from allocator.errors import CalibrationError, VerifyError

    study_folder = StudyFolder(study, **options)

    from allocator.export.base import check_tolerance
    from allocator.export.manifest import Manifest

    check_tolerance(tolerance)
    manifest = Manifest.read(Path(folder))
    check_same_checkpoint(manifest.checkpoint, study_folder.inventory)
    split = study_folder.calibration.search
    if documents is not None and not 0 < documents <= len(split):
        raise CalibrationError(f"{documents} documents: needed 1..{len(split)}, the search split")
    beside = None if allocation is None else Path(allocation)
    paths = sorted((study_folder.path / "allocations").glob("*.json"))
    paths += [] if beside is None else [beside]
    records = {path.name: AllocationRecord.read(path) for path in paths}

    from allocator.app.record_weights import opener_of
    from allocator.export.verification import LOSS_TOLERANCE
    from allocator.export.verification import verify as _verify

    weights, importance = manifest.weights_digest, manifest.importance
    encodings = study_folder.encodings.of(importance, beside=beside)
    open_source = opener_of(study_folder, weights, importance, encodings, beside, encode=encode)
    scorer = study_folder.scorers.on(
        split[:documents] if documents else study_folder.calibration.trial_documents,
        model=study_folder.scorers.model_with(encodings),
        progress="torch",
    )

    verification = _verify(
        Path(folder),
        open_source,
        scorer,
        tolerance=tolerance,
        progress=study_folder.progress,
    )

    for name, record in records.items():
        named = record if weights else record.unfinished
        known = named.losses.get("search")
        same = (record.digest, named.weights_digest) == (manifest.allocation, weights)
        if documents is not None or not same or known is None:
            continue
        if abs(known - verification.loss) > LOSS_TOLERANCE:
            raise VerifyError(
                f"{folder}: proxy loss {verification.loss:.6f}, {name} says {known:.6f}; the study "
                "was run on another calibration or version"
            )
    return verification


def compare(
    study: str | Path,
    *,
    text: str | Path | None = None,
    cache: str | Path | None = None,
    threads: int | None = None,
    on_run: Callable[[Run], None] | None = None,
    targets: Sequence[str] | None = None,
    samplers: Sequence[str] | None = None,
    weights: Sequence[int] | None = None,
    seeds: int | None = None,
    baselines: Baselines = "near",
    progress: bool = False,
) -> pd.DataFrame:
    """Runs the searchers of study.toml's `[compare]` section that are not finished yet.

    Args:
        study: its folder; `runs/*.json`, `compare.csv`, `summary.csv` and `compare.png` go there.
        text: a further held-out file.
        cache: as of `StudyOptions`.
        threads: processes at a time, one core each; all cores by default.
        on_run: called when a run is finished.
        targets: runs of these targets only.
        samplers: runs of these samplers only.
        weights: runs under these budgets only, bytes of the searched matrices.
        seeds: at most this number of seeds.
        baselines: `near` the budgets, or `none`; the table's column is then empty.
        progress: shows bars.

    Returns:
        What `summary.csv` holds: medians and ranges over seeds, of all finished runs.

    Raises:
        AllocatorError: one line on whatever is wrong, before the first run where it can be seen
            then.
    """
    from allocator.comparison.runs import chosen_runs

    folder = Path(study)
    runs = chosen_runs(folder, targets=targets, samplers=samplers, weights=weights, seeds=seeds)
    request = _checked_comparison(
        folder, runs, text=text, cache=cache, threads=threads, baselines=baselines,
        progress=progress,
    )  # fmt: skip

    from allocator.comparison.pool import run_all

    for run in run_all(request, runs):
        if on_run is not None:
            on_run(run)

    from allocator.comparison.table import write_results

    return write_results(request)


def _checked_comparison(
    folder: Path,
    runs: list[Run],
    *,
    text: str | Path | None,
    cache: str | Path | None,
    threads: int | None,
    baselines: Baselines,
    progress: bool,
) -> CompareRequest:
    """Returns what runs are asked for with, after the checks that come before the first run."""
    from allocator.app.resources import Resources
    from allocator.comparison.pool import check_comparison
    from allocator.comparison.runs import CompareRequest

    resources = Resources.of({"cache": cache, "threads": threads})
    request = CompareRequest(
        folder,
        None if text is None else Path(text),
        resources.cache,
        resources.threads or len(os.sched_getaffinity(0)),
        baselines,
        progress,
    )
    check_comparison(request, runs)
    return request


def estimate_compare(
    study: str | Path,
    *,
    text: str | Path | None = None,
    cache: str | Path | None = None,
    threads: int | None = None,
    targets: Sequence[str] | None = None,
    samplers: Sequence[str] | None = None,
    weights: Sequence[int] | None = None,
    seeds: int | None = None,
    baselines: Baselines = "near",
    progress: bool = False,
) -> CompareEstimate:
    """Prices what `compare` would run, after the same checks: `compare --dry-run`."""
    from allocator.comparison.runs import chosen_runs

    folder = Path(study)
    runs = chosen_runs(folder, targets=targets, samplers=samplers, weights=weights, seeds=seeds)
    request = _checked_comparison(
        folder, runs, text=text, cache=cache, threads=threads, baselines=baselines,
        progress=progress,
    )  # fmt: skip

    from allocator.comparison.pool import estimate_runs

    return estimate_runs(request, runs)


def reproduce(
    allocation: str | Path,
    out: str | Path | None = None,
    *,
    study: str | Path | None = None,
    containers: Sequence[str] = (),
    **options: Unpack[StudyOptions],
) -> list[Written]:
    """Rebuilds the checkpoints of a committed allocation and compares their sha256.

    Finished weights come from their file. Where that is not here, the allocation is finished anew
    by the record's recipe: on the same kind of processor, with as many threads, to the same bytes.

    Args:
        allocation: `<study>/allocations/<name>.json`.
        out: parent directory; `<study>/out` by default.
        study: if the file lies elsewhere.
        containers: which of those whose sha256 the file records; all by default.
        options: as of `StudyOptions`.

    Raises:
        CheckpointError: if the source checkpoint is another one.
        VerifyError: if no sha256 is recorded, a rebuilt file differs from the recorded one, or
            weights that were finished anew do.
    """
    from allocator.app.allocation_files import check_same_checkpoint
    from allocator.app.resources import Resources
    from allocator.app.study_folder import StudyFolder
    from allocator.decision.allocation_record import AllocationRecord
    from allocator.errors import VerifyError
    from allocator.files.outputs import check_output_folder

    Resources.of(options)  # refuses unknown keywords
    path = Path(allocation)
    record = AllocationRecord.read(path)
    folder = Path(study if study is not None else Path(os.path.realpath(path)).parent.parent)
    parent = Path(out) if out is not None else folder / "out"
    check_output_folder("--out", parent)
    study_folder = StudyFolder(folder, **options)
    check_same_checkpoint(record.checkpoint, study_folder.inventory)
    containers = containers or tuple(record.sha256)
    if not containers or {*containers} - record.sha256.keys():
        named = ", ".join(containers) or record.decision.target
        raise VerifyError(
            f"{path}: no sha256 of {named} is recorded, so no file was compared; `allocator "
            f"materialize {path} OUT --record` writes one and records it"
        )
    parent.mkdir(parents=True, exist_ok=True)
    _ensure_finished(study_folder, record, path)
    rebuilt = []

    from allocator.codecs import identity_of

    for container in containers:
        written = materialize(
            folder, path, parent / f"{path.stem}-{container}", container=container, **options
        )
        digest = written.manifest.sha256_of_weights
        if digest != record.sha256[container]:
            raise VerifyError(
                f"{written.folder}: sha256 {digest[:12]}…, {path.name} records "
                f"{record.sha256[container][:12]}… (written by {record.codec}, here "
                f"{identity_of(record.decision.stored_formats)}); "
                "install the versions of constraints.txt; the folder is left for a look"
            )
        rebuilt.append(written)
    return rebuilt


def _ensure_finished(study_folder: StudyFolder, record: AllocationRecord, path: Path) -> None:
    """Finishes an allocation anew where its record names finished weights that are not here.

    Raises:
        VerifyError: if these come to other bytes.
    """
    from allocator.app.record_weights import artifact_path
    from allocator.errors import VerifyError

    known = record.finished
    if known is None or artifact_path(study_folder, record.weights_digest, path) is not None:
        return

    from allocator.app.finish_stage import finish_anew

    artifact = finish_anew(study_folder, record, path)
    if artifact.weights == record.weights_digest:
        return
    after = artifact.description.finishing.after
    losses = ", ".join(
        f"{split} {after[split]:.6f} here and {loss:.6f} recorded"
        for split, loss in known.after.items()
        if split in after
    )
    raise VerifyError(
        f"{path}: same recipe, other bytes: weights {artifact.weights[:12]} here, recorded "
        f"{record.weights_digest[:12]}; loss {losses} nats per token: another processor rounds "
        "otherwise; for the same bytes restore the file of the finished weights"
    )
