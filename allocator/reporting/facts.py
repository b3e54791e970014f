"""What a study has on disk, read for a report: nothing is measured, and no weight is read.

In: a study folder, a storage, the cache. Out: frozen `Facts`. Invariant: whatever is not there is
None or empty; what is damaged raises its one-line error; torch is never loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, Unpack

import optuna
import pandas as pd
from optuna.trial import TrialState

from allocator import __version__
from allocator.app.held_out_file import HeldOut
from allocator.app.record_weights import artifact_path
from allocator.app.resources import StudyOptions
from allocator.app.study_file import chosen_budget
from allocator.app.study_folder import StudyFolder
from allocator.app.tables import baselines_table, front_table, with_series
from allocator.app.trial_table import front_rows, trials_table
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import AllocatorError, StudyError, VerifyError
from allocator.export.manifest import Manifest
from allocator.files.checksums import unseal
from allocator.finishing.artifact import read_artifact
from allocator.prediction.profile import Profile
from allocator.profiling.profile_files import profile_folder
from allocator.study.optuna_study import LOCK
from allocator.study.storages import reaching
from allocator.study.trials import ALLOCATION, RESULT
from allocator.targets import Layout, target_named
from allocator.targets.device_memory import DeviceMemory, Workload
from allocator.targets.gguf.general import general_name, short_count

_CODES = "codes."


@dataclass(frozen=True, slots=True)
class RoleBytes:
    """What the tensors of one role take.

    Attributes:
        role: its name.
        weights: that are stored, retained experts alone.
        nbytes: of the encoded weights.
    """

    role: str
    weights: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The checkpoint, as its headers say.

    Attributes:
        name: as a GGUF of it is named.
        family: its architecture.
        parameters: in all, in three digits.
        layers: of the decoder.
        experts: routed experts per MoE layer.
        experts_used: routed experts per token.
        stored_bytes: of the matrices whose format is searched, in the checkpoint.
        stored_bits: the same per weight.
    """

    name: str
    family: str
    parameters: str
    layers: int
    experts: int
    experts_used: int
    stored_bytes: int
    stored_bits: float


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A checkpoint that was written of the reported allocation.

    Attributes:
        folder: relative to the study's folder.
        container: whose runtime reads it.
        file_bytes: its size.
        sha256: of the weights' file.
    """

    folder: str
    container: str
    file_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Changed:
    """What a file of finished weights holds.

    Attributes:
        groups: names of groups, or parts of groups, with other bytes.
        values: names of norms and routers with other values.
    """

    groups: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows.

    Attributes:
        study: name of the folder.
        target: of the study.
        sampler: that searched.
        budget: the limits, as the study was launched with them.
        file: of the reported allocation, relative to the study; empty without one.
        record: the reported allocation; None where the search has not picked yet.
        trials: scored trials, columns as of `front_table`.
        running: trials that have not ended.
        domains: KL per domain on the search split, by digest of the allocation.
        held_out: held-out figures; None where nothing was evaluated.
        older_baselines: held-out baselines of `baselines.csv`.
        model: the checkpoint; None where it cannot be read.
        no_model: why not.
        sizes: by role, largest first; empty where the checkpoint cannot be read.
        profile: what the search was launched with; None where the cache does not have it.
        memory: the device's, itemised; None where nothing is known of it.
        no_memory: why not.
        workload: what runs on that device.
        is_device_budget: whether the budget is that of a device.
        changed: by finishing; None without the file of finished weights.
        written: checkpoints in the study's `out`.
        has_report_split: whether the study has a held-out split.
        version: of this package.
    """

    study: str
    target: str
    sampler: str
    budget: tuple[tuple[int, str], ...]
    file: str
    record: AllocationRecord | None
    trials: pd.DataFrame
    running: int
    domains: Mapping[str, Mapping[str, float]]
    held_out: HeldOut | None
    older_baselines: pd.DataFrame
    model: ModelFacts | None
    no_model: str
    sizes: tuple[RoleBytes, ...]
    profile: Profile | None
    memory: DeviceMemory | None
    no_memory: str
    workload: Workload | None
    is_device_budget: bool
    changed: Changed | None
    written: tuple[WrittenFile, ...]
    has_report_split: bool
    version: str = __version__

    @property
    def decision(self) -> Allocation | None:
        """The reported allocation."""
        return None if self.record is None else self.record.decision


def read_facts(
    study: str | Path,
    *,
    allocation: str | Path | None = None,
    storage: str | None = None,
    **options: Unpack[StudyOptions],
) -> Facts:
    """Reads what a report shows.

    Args:
        study: the folder.
        allocation: the record that is reported; `allocations/pick.json` by default.
        storage: as of `search`; by default the folder's own journal, else its `front.json`.
        options: as of `StudyOptions`.

    Raises:
        AllocatorError: if there is neither a trial nor an allocation, or a file is damaged.
    """
    study_folder = StudyFolder(study, **options)
    folder = study_folder.path
    path = folder / "allocations/pick.json" if allocation is None else Path(allocation)
    record = AllocationRecord.read(path) if allocation or path.exists() else None
    trials, lock, running, domains = _trials(study_folder, storage)
    name = folder.resolve().name
    if record is None and trials.empty and not running:
        raise StudyError(
            f"{folder}: nothing to report yet: no trial in {storage or 'its journal'}, no "
            f"front.json, no allocation; launch `allocator search {folder}`, or name its --storage"
        )
    target = study_folder.spec.target if record is None else record.decision.target
    if lock.get("target", target) != target:  # trials of another target say nothing of it
        trials, domains = pd.DataFrame(), {}
    there: StudyOptions = {**options, "target": target}
    layout, no_model = _layout(StudyFolder(study, **there))
    held_out = HeldOut.read(folder)
    if held_out is not None and record is not None and held_out.checkpoint != record.checkpoint:
        held_out = None
    older = baselines_table(folder)
    memory, workload, no_memory = _memory(record, layout, study_folder)
    return Facts(
        study=name,
        target=target,
        sampler=str(lock.get("sampler", study_folder.spec.sampler)),
        budget=_budget(lock, study_folder),
        file=_relative(path, folder) if record is not None else "",
        record=record,
        trials=trials,
        running=running,
        domains=domains,
        held_out=held_out,
        older_baselines=older[older["target"] == target],
        model=None if layout is None else _model(layout),
        no_model=no_model,
        sizes=() if layout is None or record is None else _sizes(layout, record.decision),
        profile=_profile(study_folder.cache, lock),
        memory=memory,
        no_memory=no_memory,
        workload=workload,
        is_device_budget=record is not None and "device_total" in record.bytes,
        changed=None if record is None else _changed(record, path, study_folder),
        written=() if record is None else tuple(_written(folder, record)),
        has_report_split=study_folder.spec.calibration.has_report,
    )


def _relative(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return path.name


# -- trials


def _trials(
    study_folder: StudyFolder, storage: str | None
) -> tuple[pd.DataFrame, dict[str, Any], int, dict[str, dict[str, float]]]:
    """The scored trials, the study's lock, the number of running trials, and KL per domain."""
    opened = _opened(study_folder, storage)
    if opened is None:
        return (*_committed(study_folder.path), 0, {})
    with reaching(storage):
        table = trials_table(opened)
        domains: dict[str, dict[str, float]] = {}
        running = 0
        for trial in opened.get_trials(deepcopy=False):
            running += trial.state == TrialState.RUNNING
            if trial.state == TrialState.COMPLETE and RESULT in trial.user_attrs:
                digest = Allocation.from_json(trial.user_attrs[ALLOCATION]).digest
                domains.setdefault(digest, trial.user_attrs[RESULT].get("kl_by_domain", {}))
        lock = opened.user_attrs.get(LOCK, {})
    if len(table):
        chosen = front_rows(table)
        table = with_series(table, [int(n) for n in chosen["trial"]] if len(chosen) else [])
    return table, lock, running, domains


def _opened(study_folder: StudyFolder, storage: str | None) -> optuna.Study | None:
    """The Optuna study; None where the folder has no journal of its own.

    Raises:
        StudyError: if a storage is named that has no such study.
    """
    opened = study_folder.searched(storage)
    if opened is None and storage is not None:
        raise StudyError(
            f"{study_folder.path}: no study yet in {storage}; name the --storage that it was "
            "launched with"
        )
    return opened


def _committed(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    path = folder / "front.json"
    if not path.exists():
        return pd.DataFrame(), {}
    data = unseal(path.read_bytes()) if path.stat().st_size else {}
    if not data.get("trials"):
        return pd.DataFrame(), data.get("lock") or {}
    return front_table(folder), data.get("lock") or {}


def _budget(lock: Mapping[str, Any], study_folder: StudyFolder) -> tuple[tuple[int, str], ...]:
    """The limits: bytes, and what they bound."""
    if text := lock.get("budget"):
        pairs = (part.partition(" (") for part in str(text).split(" and "))
        return tuple((int(n), bounds.rstrip(")")) for n, _, bounds in pairs)
    try:
        budget = chosen_budget(study_folder.spec.budget, study_folder.path, None)
    except AllocatorError:
        return ()
    return tuple((limit.nbytes, limit.bounds) for limit in budget.limits)


# -- the checkpoint


def _layout(study_folder: StudyFolder) -> tuple[Layout | None, str]:
    """The checkpoint in the target's layout, or why it cannot be read."""
    try:
        return study_folder.layout, ""
    except (AllocatorError, OSError) as error:
        return None, str(error).replace(f"{study_folder.path}/", "")


def _model(layout: Layout) -> ModelFacts:
    inventory = layout.inventory
    encoded = [t for t in inventory.tensors.values() if t.role.is_encoded]
    stored = sum(t.total_bytes for t in encoded)
    return ModelFacts(
        name=general_name(inventory),
        family=inventory.family.model_type,
        parameters=short_count(sum(prod(t.shape) for t in inventory.tensors.values())),
        layers=inventory.n_layers,
        experts=inventory.n_experts,
        experts_used=inventory.experts_used,
        stored_bytes=stored,
        stored_bits=stored * 8 / inventory.n_searched_weights,
    )


def _sizes(layout: Layout, decision: Allocation) -> tuple[RoleBytes, ...]:
    """Bytes by role; empty where the allocation is not of this checkpoint."""
    try:
        decision.check(layout)
    except AllocatorError:
        return ()
    stored = decision.stored(layout)
    sums: dict[str, list[int]] = {}
    for name, group in layout.groups.items():
        known = sums.setdefault(str(group.role), [0, 0])
        known[0] += prod(group.shape_with(len(group.experts(decision.retained_experts))))
        known[1] += stored.group(name)
    rows = (RoleBytes(role, weights, nbytes) for role, (weights, nbytes) in sums.items())
    return tuple(sorted(rows, key=lambda row: (-row.nbytes, row.role)))


def _memory(
    record: AllocationRecord | None, layout: Layout | None, study_folder: StudyFolder
) -> tuple[DeviceMemory | None, Workload | None, str]:
    """A device's memory with what runs there, or why it is not known."""
    if record is None:
        return None, None, "no allocation was picked yet"
    prefix = "device_"
    known = {f.name: record.bytes.get(prefix + f.name) for f in fields(DeviceMemory)}
    if all(n is not None for n in known.values()):
        return DeviceMemory(**known), Workload(**record.workload), ""  # type: ignore[arg-type]
    target = target_named(record.decision.target)
    if not target.predicts_memory:
        return None, None, f"nothing is known of the memory of target {target.name}'s runtime"
    if layout is None:
        return None, None, "the checkpoint cannot be read"
    workload = Workload()
    try:
        record.decision.check(layout)
        return record.decision.device_memory(layout, workload), workload, ""
    except AllocatorError as error:
        return None, None, str(error)


# -- further files


def _profile(cache: Path, lock: Mapping[str, Any]) -> Profile | None:
    digest = str(lock.get("profile", ""))
    path = profile_folder(cache, digest) / "profile.json"
    return Profile.read(path, digest) if digest and path.exists() else None


def _changed(record: AllocationRecord, path: Path, study_folder: StudyFolder) -> Changed | None:
    if record.finished is None:
        return None
    file = artifact_path(study_folder, record.weights_digest, path)
    if file is None:
        return None
    tensors = sorted(read_artifact(file, record.weights_digest).description.tensors)
    return Changed(
        groups=tuple(t.removeprefix(_CODES) for t in tensors if t.startswith(_CODES)),
        values=tuple(t.partition(".")[2] for t in tensors if not t.startswith(_CODES)),
    )


def _written(folder: Path, record: AllocationRecord) -> list[WrittenFile]:
    """Checkpoints in the study's `out` that hold the record's weights."""
    files = []
    for path in sorted((folder / "out").glob("*/manifest.json")):
        try:
            manifest = Manifest.read(path.parent)
        except VerifyError:
            continue  # being written, or no business of this report
        if (manifest.allocation, manifest.weights_digest) == (record.digest, record.weights_digest):
            files.append(
                WrittenFile(
                    path.parent.relative_to(folder).as_posix(),
                    manifest.container,
                    manifest.file_bytes,
                    manifest.sha256_of_weights,
                )
            )
    return files
