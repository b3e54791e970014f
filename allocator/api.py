"""The verbs, each one public function; the CLI parses, calls one of these, and prints.

Every function takes paths and plain values, and returns data (often a pandas table). Progress bars
are shown when `progress` is true; nothing else is printed.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import optuna
import pandas as pd

from allocator.app.allocation_files import check_same_checkpoint
from allocator.app.estimate import SearchEstimate
from allocator.app.estimate import estimate as _estimate
from allocator.app.planning import RUNTIME, Plan, first_paths, write_first
from allocator.app.planning import plan as _plan
from allocator.app.request import SearchRequest
from allocator.app.resources import ResourceOptions, Resources, StudyOptions
from allocator.app.search_stage import SearchResult
from allocator.app.search_stage import search as _search
from allocator.app.study_file import BudgetSpec, DeviceBudgetSpec
from allocator.app.study_folder import StudyFolder
from allocator.app.trial_table import trials_table, write_front
from allocator.checkpoint.inventory import read_inventory
from allocator.checkpoint.outline import planned_inventory
from allocator.codecs import identity_of
from allocator.comparison.pool import CompareEstimate, check_comparison, estimate_runs, run_all
from allocator.comparison.runs import CompareRequest, Run, chosen_runs
from allocator.comparison.table import write_results
from allocator.decision.allocation_record import AllocationRecord, note_digests
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.difference import difference
from allocator.decision.mixes import canonical
from allocator.decision.parameters import FormatOf, is_setting, largest_first, parse
from allocator.decision.search_space import SearchSpace, bind
from allocator.errors import (
    CalibrationError,
    CheckpointError,
    StudyError,
    TargetError,
    VerifyError,
)
from allocator.evaluation.held_out import evaluate
from allocator.export.checkpoint import Written
from allocator.export.checkpoint import materialize as _materialize
from allocator.export.manifest import Manifest
from allocator.export.runtimes import runtime_named
from allocator.export.tensors import EncodedTensors
from allocator.export.verification import LOSS_TOLERANCE, Verification, check_tolerance
from allocator.export.verification import verify as _verify
from allocator.prediction.priors import Prior, published, transferred
from allocator.prediction.profile import Profile
from allocator.prediction.surrogate import from_profile
from allocator.study.leases import LEASE_SECONDS
from allocator.study.stop_rule import StopRule
from allocator.study.storages import journal_path, open_storage
from allocator.targets import target_named


def inspect(checkpoint: str | Path, *, target: str = "safetensors") -> pd.DataFrame:
    """Groups of a checkpoint in a target, with the formats offered; no weights are read.

    `attrs["notes"]` of the table are lines on what is left out, what the runtime must be told, and
    what a gguf file of it could not have: a tokenizer.
    """
    chosen = target_named(target)
    layout = chosen.layout(read_inventory(checkpoint))
    notes = []
    try:
        chosen.check_tokenizer(layout.inventory)
    except (CheckpointError, TargetError) as error:
        notes.append(f"no tokenizer: {error}")
    rows = [
        {
            "group": g.name,
            "shape": "x".join(map(str, g.shape)),
            "weights": int(np.prod(g.shape)),
            "tensors": len(g.sources),
            "formats": " ".join(f.name for f in g.offered()),
        }
        for g in layout.groups.values()
    ]
    table = pd.DataFrame(rows)
    table.attrs["notes"] = (*layout.notes, *notes)
    return table


def plan(
    config: str | Path,
    *,
    device: DeviceBudgetSpec | None = None,
    experts: Sequence[int] = (),
    kv_format: str | None = None,
    micro_batch: int | None = None,
    profile: str | Path | None = None,
    out: str | Path | None = None,
    **options: Unpack[ResourceOptions],
) -> Plan:
    """What a model would take, and a first allocation, from its `config.json` alone.

    Args:
        config: the file, or its directory; no weights are needed.
        device: to fit in; without it there are sizes alone.
        experts: retained counts to look at; all, three quarters and five eighths by default.
        kv_format: of keys and values.
        micro_batch: tokens computed at once.
        profile: study of a smaller relative, whose losses are taken over; measured if need be.
        out: folder for the allocations that fit.
        options: as of `ResourceOptions`, for the profile.

    Raises:
        AllocatorError: one line on whatever is wrong.
    """
    Resources.of(options)  # refuses unknown keywords
    asked: dict[str, Any] = {
        "budget": None if device is None else device.budget(Path()),
        "counts": experts,
        "kv_format": kv_format,
        "micro_batch": micro_batch,
    }
    inventory = planned_inventory(Path(config))
    found = _plan(inventory, prior=published(), **asked)
    if out is not None:
        first_paths(found, Path(out))
    if profile is not None:  # which may take hours to measure
        found = _plan(inventory, prior=_transferred(profile, **options), **asked)
    if out is not None:
        write_first(found, Path(out))
    return found


def _transferred(study: str | Path, **options: Unpack[ResourceOptions]) -> Prior:
    study_folder = StudyFolder(study, target=RUNTIME, **options)
    measured = study_folder.profile
    space = bind(SearchSpace(schema=1), study_folder.layout, measured.saliency)
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
    lease_seconds: float = LEASE_SECONDS,
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
            copy of the model; only a search of one worker is reproducible.
        lease_seconds: a worker that is silent for longer counts as dead; others make its trials.
        options: as of `StudyOptions`.

    Raises:
        AllocatorError: one line on whatever is wrong, before anything is written.
    """
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
            lease_seconds=lease_seconds,
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
    sampler: str | None = None,
    seed: int | None = None,
    **options: Unpack[StudyOptions],
) -> SearchEstimate:
    """Prices a search without starting it: `search --dry-run`; arguments as of `search`.

    Raises:
        AllocatorError: one line on whatever is wrong.
    """
    return _estimate(
        SearchRequest(
            study=Path(study),
            budget=BudgetSpec(file=budget, weights=weights_budget, device=device),
            stop=StopRule(trials=trials),
            sampler=sampler,
            seed=seed,
            target=options.get("target"),
            resources=Resources.of(options),
        )
    )


def profile(study: str | Path, **options: Unpack[StudyOptions]) -> Profile:
    """Builds or continues a study's profile."""
    return StudyFolder(study, **options).profile


def front(
    study: str | Path, *, storage: str | None = None, **options: Unpack[StudyOptions]
) -> pd.DataFrame:
    """Returns the non-dominated COMPLETE trials, smallest first; writes `front.json`."""
    study_folder = StudyFolder(study, **options)
    path = journal_path(storage, study_folder.path)
    try:
        if path is not None and not path.exists():
            raise KeyError(path)
        opened = optuna.load_study(
            study_name=study_folder.study_name(storage),
            storage=open_storage(storage, study_folder.path),
        )
    except KeyError:
        raise StudyError(
            f"{study_folder.path}: no study yet in {storage or 'its own journal'}; launch "
            "`allocator search` first, or name the --storage that it was launched with"
        ) from None
    return write_front(study_folder, opened)


def score(
    study: str | Path,
    allocation: str | Path,
    *,
    base: str | None = None,
    **options: Unpack[StudyOptions],
) -> dict[str, Any]:
    """Scores any allocation on the search split: loss, per domain, bytes, effective bits."""
    study_folder = StudyFolder(study, **options)
    decision, importance = study_folder.read_encoded(allocation, base=base)
    size = decision.nbytes(study_folder.layout)
    scored = study_folder.calibration.trial_documents
    scorer = study_folder.scorers.encoded_with(importance, scored, beside=Path(allocation))
    return scorer.summary(scorer.score(decision)) | {
        "digest": decision.digest,
        "bytes": {"encoded": size.encoded, "kept": size.full_precision, "file": size.file},
        "effective_bits": size.encoded * 8 / study_folder.inventory.n_searched_weights,
        "experts": decision.counts,
    }


def explain(
    study: str | Path, allocation: str | Path, **options: Unpack[StudyOptions]
) -> pd.DataFrame:
    """Per decision of an allocation: bytes, predicted loss, and the next step up and down.

    `predicted_loss` is of a small change there: the part by jumps goes with the square root of
    all changes, so the column adds up to the prediction less half of that part. Columns `up` and
    `down` name the neighbouring value, by bytes at the allocation's retained counts; `up_bytes`
    and `up_loss` are what it adds. Bytes are of the searched matrices, or of the whole device where
    study.toml's budget is one; of a setting, what it takes beyond its smallest choice.

    Raises:
        SpaceError: if the study's space does not hold the allocation.
    """
    study_folder = StudyFolder(study, **options)
    decision = study_folder.read_allocation(allocation)
    surrogate, space = study_folder.surrogate, study_folder.space
    device = study_folder.spec.budget.device
    costs = Costs(
        space, Budget(1 << 62, "weights") if device is None else device.budget(study_folder.path)
    )
    params = space.complete(space.params(decision))
    counts = space.layer_counts(params)
    loss, predicted = surrogate.loss_at(params), surrogate.predict(params)
    rows = []
    settings = (name for name in space.distributions if is_setting(name))
    for name in (*space.format_params.values(), *space.count_params, *settings):
        key, value, values = parse(name), params[name], list(space.choices[name])
        if isinstance(key, FormatOf):
            count = counts.get(space.layer_of[key.group], 0)
            values = [v for v in values if canonical(v, count) == v]
        if largest_first(name):  # the order of those that cost the same
            values.reverse()
        values.sort(key=lambda v: costs.affected({**params, name: v}, [name]))
        before = costs.affected(params, [name])
        row = {
            "decision": name,
            "value": value,
            "bytes": before,
            "predicted_loss": loss(name, value),
        }
        if is_setting(name):  # beyond what cannot be saved
            row["bytes"] -= costs.affected({**params, name: values[0]}, [name])
        at = values.index(value)
        for label, index in (("up", at + 1), ("down", at - 1)):
            inside = 0 <= index < len(values)
            other = values[index] if inside else None
            row[label] = other
            row[f"{label}_bytes"] = (
                costs.affected({**params, name: other}, [name]) - before if inside else None
            )
            row[f"{label}_loss"] = (
                surrogate.predict({**params, name: other}) - predicted if inside else None
            )
        rows.append(row)
    return pd.DataFrame(rows)


def diff(one: str | Path, other: str | Path) -> pd.DataFrame:
    """Lists the decisions in which two allocation files differ: `decision`, `one`, `other`.

    Args:
        one: a record as `search` writes it, or a plain `allocation.json`.
        other: another; of a different checkpoint or target it is compared where names are shared.

    Raises:
        SpaceError: if a file is no allocation.
    """
    return difference(one, other).rows


def materialize(
    study: str | Path,
    allocation: str | Path,
    out: str | Path,
    *,
    container: str | None = None,
    record: bool = False,
    **options: Unpack[StudyOptions],
) -> Written:
    """Writes the checkpoint of an allocation file.

    Args:
        study: the folder it belongs to.
        allocation: a file as `search` writes it.
        out: directory to make.
        container: name of the target whose runtime is to read it; the study's by default.
        record: note the weights' sha256 in the allocation file, for `reproduce`.
        options: as of `StudyOptions`.

    Raises:
        StudyError: if the allocation file was changed meanwhile, and `record` is set; the
            checkpoint of the earlier one is there then.
        CheckpointError: if the checkpoint, the importance or the weights of the file are not here.
        TargetError: if the container's runtime cannot express the allocation.
    """
    study_folder = StudyFolder(study, **options)
    path = Path(allocation)
    wanted = AllocationRecord.read(path)
    check_same_checkpoint(wanted.checkpoint, study_folder.inventory)
    container = container or study_folder.spec.target
    runtime_named(container).check_can_write(wanted.decision)
    encodings = study_folder.encodings.of(wanted.importance)
    source = EncodedTensors(encodings, wanted.decision)
    if wanted.weights_digest != source.digest:
        raise CheckpointError(
            f"{path}: of weights {wanted.weights_digest[:12]}, which are not here; needed the file "
            "that holds them"
        )
    written = _materialize(
        source,
        Path(out),
        container=container,
        importance=wanted.importance,
        workload=wanted.workload,
    )
    if record:
        note_digests(path, wanted, {container: written.manifest.sha256[written.manifest.file]})
    return written


def verify(
    study: str | Path,
    folder: str | Path,
    *,
    documents: int | None = None,
    tolerance: float | None = None,
    encode: bool = False,
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
        options: as of `StudyOptions`.

    Raises:
        VerifyError: at the first thing that is not as it should be.
    """
    study_folder = StudyFolder(study, **options)
    manifest = Manifest.read(Path(folder))
    check_same_checkpoint(manifest.checkpoint, study_folder.inventory)
    check_tolerance(tolerance)
    split = study_folder.calibration.search
    if documents is not None and not 0 < documents <= len(split):
        raise CalibrationError(f"{documents} documents: needed 1..{len(split)}, the search split")
    paths = sorted((study_folder.path / "allocations").glob("*.json"))
    records = {path.name: AllocationRecord.read(path) for path in paths}
    encodings = study_folder.encodings.of(manifest.importance)
    scorer = study_folder.scorers.on(
        split[:documents] if documents else study_folder.calibration.trial_documents,
        model=study_folder.scorers.model_with(encodings),
        progress="torch",
    )
    found = _verify(
        Path(folder),
        partial(EncodedTensors, encodings, encode=encode),
        scorer,
        tolerance=tolerance,
        progress=study_folder.progress,
    )
    for name, record in records.items():
        known = record.loss.get("search")
        if documents is not None or record.digest != manifest.allocation or known is None:
            continue
        if abs(known - found.loss) > LOSS_TOLERANCE:
            raise VerifyError(
                f"{folder}: proxy loss {found.loss:.6f}, {name} says {known:.6f}; the study "
                "was run on another calibration or version"
            )
    return found


def compare(
    study: str | Path,
    *,
    text: Path | None = None,
    cache: Path | None = None,
    threads: int | None = None,
    on_run: Callable[[Run], None] | None = None,
    targets: Sequence[str] | None = None,
    samplers: Sequence[str] | None = None,
    weights: Sequence[int] | None = None,
    seeds: int | None = None,
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

    Returns:
        What `summary.csv` holds: medians and ranges over seeds, of all finished runs.

    Raises:
        AllocatorError: one line on whatever is wrong, before the first run where it can be seen
            then.
    """
    folder, workers = Path(study), threads or len(os.sched_getaffinity(0))
    runs = chosen_runs(folder, targets=targets, samplers=samplers, weights=weights, seeds=seeds)
    request = CompareRequest(folder, text, cache, workers)
    check_comparison(request, runs)
    for run in run_all(request, runs):
        if on_run is not None:
            on_run(run)
    return write_results(request)


def estimate_compare(
    study: str | Path,
    *,
    text: Path | None = None,
    cache: Path | None = None,
    threads: int | None = None,
    targets: Sequence[str] | None = None,
    samplers: Sequence[str] | None = None,
    weights: Sequence[int] | None = None,
    seeds: int | None = None,
) -> CompareEstimate:
    """Prices what `compare` would run, after the same checks: `compare --dry-run`."""
    folder, workers = Path(study), threads or len(os.sched_getaffinity(0))
    runs = chosen_runs(folder, targets=targets, samplers=samplers, weights=weights, seeds=seeds)
    request = CompareRequest(folder, text, cache, workers)
    check_comparison(request, runs)
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

    Args:
        allocation: `<study>/allocations/<name>.json`.
        out: parent directory; `<study>/out` by default.
        study: if the file lies elsewhere.
        containers: which; by default those whose sha256 the file records, else the target.
        options: as of `StudyOptions`.

    Raises:
        CheckpointError: if the source checkpoint is another one.
        VerifyError: if a rebuilt file differs from the recorded one.
    """
    Resources.of(options)  # refuses unknown keywords
    path = Path(allocation)
    record = AllocationRecord.read(path)
    folder = Path(study if study is not None else Path(os.path.realpath(path)).parent.parent)
    parent = Path(out) if out is not None else folder / "out"
    check_same_checkpoint(record.checkpoint, StudyFolder(folder, **options).inventory)
    parent.mkdir(parents=True, exist_ok=True)
    rebuilt = []
    for container in containers or tuple(record.sha256) or (record.decision.target,):
        written = materialize(
            folder, path, parent / f"{path.stem}-{container}", container=container, **options
        )
        digest = written.manifest.sha256[written.manifest.file]
        if container in record.sha256 and digest != record.sha256[container]:
            raise VerifyError(
                f"{written.folder}: sha256 {digest[:12]}…, {path.name} records "
                f"{record.sha256[container][:12]}… (written by {record.codec}, here "
                f"{identity_of(record.decision.stored_formats)}); "
                "install the versions of constraints.txt; the folder is left for a look"
            )
        rebuilt.append(written)
    return rebuilt


__all__ = [
    "estimate", "evaluate", "explain", "front", "inspect", "materialize", "plan", "profile",
    "reproduce", "score", "search", "trials_table", "verify",
]  # fmt: skip
