"""One call from a model to a verified checkpoint that fits: `allocator quantize`.

In: a model (a path, or an id on the hub) and a limit in bytes. Out: a study folder with the pick,
its finished weights, and the written checkpoint, verified in its runtime; `quantized.json` sums it
up. Invariant: every stage is the verb of the same name on the same folder, so each can be looked
at, killed, resumed or run alone; the same call resumes.
"""

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Unpack

import msgspec

from allocator import api
from allocator.app.finish_stage import recipe_of
from allocator.app.new_study import SPACE_FILE, StudyValues, asked_spec, new_study
from allocator.app.outcome import Outcome
from allocator.app.request import SearchRequest
from allocator.app.resources import ResourceOptions, Resources
from allocator.app.study_file import BudgetSpec, StudySpec, chosen_budget
from allocator.app.study_path import STUDY_FILE, check_new
from allocator.checkpoint.hub import model_path
from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import AllocatorError, StudyError
from allocator.export.manifest import MANIFEST, Manifest
from allocator.export.runtimes import runtime_named
from allocator.files.atomic import write_whole
from allocator.files.checksums import seal, unseal
from allocator.files.outputs import check_output_folder
from allocator.files.progress import step
from allocator.pipeline.estimate import RoadEstimate, estimate_road
from allocator.study.stop_rule import StopRule
from allocator.units import check_duration

Stage = Literal["profile", "search", "finish", "materialize", "verify"]
RESULT = "quantized.json"
_LIMITS = ("budget", "weights_budget", "bits", "device")


@dataclass(frozen=True)
class QuantizeRequest:
    """A request of `quantize`.

    Attributes:
        model: a directory, a GGUF file, or an id on the hub.
        values: of the study; what is left out has its default.
        out: the study's folder; named for model and limit by default.
        seconds: time limit of all stages together.
        finish: finishes the pick.
        resources: what may be used of the machine.
    """

    model: str | Path
    values: StudyValues
    out: Path | None = None
    seconds: float | None = None
    finish: bool = True
    resources: Resources = field(default_factory=Resources)

    @property
    def study(self) -> Path:
        """The study's folder; by default named for model and limit: `Qwen3-30B-A3B-12GiB`."""
        if self.out is not None:
            return self.out
        values, name = self.values, str(self.model).partition("@")[0].replace(":", "-")
        parts = [Path(name).name.removesuffix(".gguf")]
        bits, device = values.get("bits"), values.get("device")
        if bits is not None:
            parts.append(f"{bits:g}-bits")
        parts += [str(size) for n in _LIMITS[:2] if (size := values.get(n)) is not None]
        if device is not None:
            parts.append(str(device.memory) if device.preset is None else Path(device.preset).stem)
        if (target := values.get("target")) is not None:
            parts.append(target)
        return Path("-".join(parts))


@dataclass(frozen=True)
class QuantizePlan:
    """The stages of a request, with their estimate.

    Attributes:
        model: as it was named.
        inventory: of the checkpoint.
        study: folder.
        checkpoint: directory that will be written.
        target: name of the target.
        road: the estimate.
        seconds: time limit; None for none.
    """

    model: str
    inventory: Inventory
    study: Path
    checkpoint: Path
    target: str
    road: RoadEstimate
    seconds: float | None


class Quantized(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The result of `quantize`.

    Attributes:
        checkpoint: directory of the written checkpoint, relative to the study.
        file: of the weights in it; the index where they are in shards.
        file_bytes: of that file, shards included.
        sha256: of that file.
        bits: effective bits of the searched matrices.
        experts: retained per layer.
        loss: proxy loss per split before finishing, nats per token.
        finished: the same after finishing; None where nothing finished it.
        search: the pick among the trials, before finishing.
        runtime_loss: of the file in its runtime, on the documents of a trial.
        divergence: between torch and the runtime, which rounds activations.
        exact: the same without that rounding, where it was compared.
        allocation: digest of the allocation.
        weights: digest of the finished weights; empty without.
        request: digest of the request: study, search space, finishing, time limit.
    """

    checkpoint: str
    file: str
    file_bytes: int
    sha256: str
    bits: float
    experts: dict[str, int]
    loss: dict[str, float]
    finished: dict[str, float] | None
    search: Outcome
    runtime_loss: float
    divergence: float
    exact: float | None
    allocation: str
    weights: str
    request: str
    schema: int = 1


class QuantizeOptions(StudyValues, ResourceOptions, total=False):
    """Keywords of `quantize`: values of the study, and what may be used of the machine."""


def quantize(
    model: str | Path,
    out: str | Path | None = None,
    *,
    seconds: float | None = None,
    finish: bool = True,
    on_plan: Callable[[QuantizePlan], None] | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    **options: Unpack[QuantizeOptions],
) -> Quantized:
    """Searches, finishes, writes and verifies a checkpoint that fits; the same call resumes.

    Args:
        model: a directory, a GGUF file, or an id on the hub, see `model_path`.
        out: the study's folder; named for model and limit by default.
        seconds: time limit of all stages together.
        finish: finishes the pick.
        on_plan: called with the plan and its estimate before anything is measured at length.
        on_stage: called when a stage begins.
        options: as of `StudyValues`, a limit among them, and of `ResourceOptions`.

    Raises:
        AllocatorError: one line on whatever is wrong, before the first stage where it can be seen
            then.
    """
    given: dict[str, Any] = dict(options)
    machine: Any = {n: given.pop(n) for n in ResourceOptions.__annotations__ if n in given}
    values: Any = given
    request = QuantizeRequest(
        model=model,
        values=values,
        out=None if out is None else Path(out),
        seconds=seconds,
        finish=finish,
        resources=Resources.of(machine),
    )
    return run(request, on_plan=on_plan, on_stage=on_stage)


def run(
    request: QuantizeRequest,
    *,
    on_plan: Callable[[QuantizePlan], None] | None = None,
    on_stage: Callable[[Stage], None] | None = None,
) -> Quantized:
    """Runs the stages of a request; see `quantize`."""
    began = time.monotonic()
    checked = _CheckedRequest(request)
    if checked.spec is not None and (earlier := _earlier(request)) is not None:
        return earlier
    plan = checked.plan()
    if on_plan is not None:
        on_plan(plan)
    if not (plan.study / STUDY_FILE).is_file():
        new_study(plan.inventory.path, plan.study, request.values)
    return _Road(request, plan, began, on_stage or (lambda _: None)).run()


def plan_of(request: QuantizeRequest) -> QuantizePlan:
    """Prices the stages: `quantize --dry-run`; writes nothing.

    Raises:
        StudyError: if the folder holds another study, or the time does not suffice.
        AllocatorError: one line on whatever else is wrong.
    """
    return _CheckedRequest(request).plan()


class _CheckedRequest:
    """A request whose limits, model and study (if there is one) were read and accepted."""

    def __init__(self, request: QuantizeRequest) -> None:
        if all(request.values.get(name) is None for name in _LIMITS):
            raise StudyError(
                "needed a limit: --budget SIZE (the whole file), --bits B (effective bits of the "
                "matrices) or --device NAME (everything in its memory)"
            )
        if request.seconds is not None:
            check_duration("--time", request.seconds, least=1)
        self.request = request
        self.study = request.study
        self.spec: StudySpec | None = None
        is_new = not (self.study / STUDY_FILE).is_file()
        if is_new:
            _check_place(self.study)
        self.model = model_path(request.model, progress=request.resources.progress)
        if not is_new:
            self.spec = StudySpec.read(self.study)
            asked = asked_spec(self.model, self.study, request.values)
            _check_same(self.study, self.spec, asked, request.values)

    def plan(self) -> QuantizePlan:
        """Prices the stages."""
        request, study, spec = self.request, self.study, self.spec
        if spec is not None:
            check_output_folder("--out", study)
            road = _priced(request, spec, study)
        else:
            spec, road = self._priced_before_it_is_there()
        _check_time(request.seconds, road)
        return QuantizePlan(
            model=str(request.model),
            inventory=read_inventory(self.model),
            study=study,
            checkpoint=study / "out" / f"pick-{spec.target}",
            target=spec.target,
            road=road,
            seconds=request.seconds,
        )

    def _priced_before_it_is_there(self) -> tuple[StudySpec, RoadEstimate]:
        """The study that would be made, and its price, from a temporary copy."""
        with TemporaryDirectory() as place:
            copy = Path(os.path.realpath(place))
            try:
                spec = new_study(self.model, copy, self.request.values).spec
                return spec, _priced(self.request, spec, copy)
            except AllocatorError as error:
                outside = re.compile(re.escape(str(copy)) + r"/\.\.\S*")  # files it refers to
                message = outside.sub(lambda path: os.path.relpath(path[0]), str(error))
                raise type(error)(message.replace(str(copy), str(self.study))) from None


def _check_place(study: Path) -> None:
    """Raises:
    StudyError: if a study cannot be made there, or there are other files.
    """
    check_new(study)
    others = sorted(p.name for p in study.glob("*") if p.name != SPACE_FILE)
    if others:
        raise StudyError(
            f"{study}: no {STUDY_FILE}, and other files ({others[0]}); name a new folder with "
            f"--out, or make the study there first: `allocator init MODEL --out {study}`"
        )


def _digest(request: QuantizeRequest) -> str:
    """Names a request: study.toml and its search space, finishing, and the time limit."""
    study = request.study
    spec = StudySpec.read(study)
    space = study / spec.space if spec.space else study / STUDY_FILE
    digest = hashlib.sha256(msgspec.json.encode(spec))
    digest.update(space.read_bytes() if space.is_file() else b"")
    digest.update(f"{request.finish} {request.seconds}".encode())
    return digest.hexdigest()


def _priced(request: QuantizeRequest, spec: StudySpec, study: Path) -> RoadEstimate:
    seconds = request.seconds
    stop = StopRule(trials=spec.trials) if seconds is None else StopRule(seconds=seconds)
    search = SearchRequest(study, stop=stop, resources=request.resources)
    with step("timing forward passes"):
        return estimate_road(search, recipe_of() if request.finish else None)


_KEY_OF = {
    "budget": "budget", "weights_budget": "budget", "bits": "budget", "device": "budget",
    "calibration": "calibration.documents", "report": "calibration.report",
}  # fmt: skip
"""Keys of study.toml of values that have another name there."""


def _check_same(folder: Path, known: StudySpec, asked: StudySpec, values: StudyValues) -> None:
    """Raises:
    StudyError: if a folder's study says otherwise than a request.
    """
    given = {_KEY_OF.get(name, name) for name, value in values.items() if value is not None}
    for name in ("checkpoint", *sorted(given)):
        old, new = map(attrgetter(name), (known, asked))
        if name == "checkpoint":
            old, new = (os.path.realpath(folder / path) for path in (old, new))
        if old != new and not (name == "budget" and _same_limits(folder, old, new)):
            raise StudyError(
                f"{folder / STUDY_FILE}: {name} is {_shown(old)}, asked for {_shown(new)}; name "
                "another folder with --out, or change the file"
            )


def _same_limits(folder: Path, one: BudgetSpec, other: BudgetSpec) -> bool:
    """Whether two budgets are the same bytes, however they are written."""
    return chosen_budget(one, folder) == chosen_budget(other, folder)


def _shown(value: Any) -> str:
    """A value of study.toml in a line."""
    if not isinstance(value, msgspec.Struct):
        return repr(value)
    set_ = {n: v for n in value.__struct_fields__ if (v := getattr(value, n)) is not None}
    return ", ".join(f"{n} = {_shown(v)}" for n, v in set_.items()) or "none"


def _check_time(seconds: float | None, road: RoadEstimate) -> None:
    """Raises:
    StudyError: if the profile alone is estimated to take longer than all stages may.
    """
    if seconds is not None and road.seconds["profile"] > seconds:
        raise StudyError(
            f"--time: {seconds:.0f} s, and the profile alone takes about "
            f"{road.seconds['profile']:.0f} s; give more time, or fewer calibration documents"
        )


def _earlier(request: QuantizeRequest) -> Quantized | None:
    """The result of an earlier call; None if its request was another one, or files are missing."""
    study = request.study
    quantized = _read(study)
    if quantized is None or quantized.request != _digest(request):
        return None
    try:
        record = AllocationRecord.read(study / "allocations/pick.json")
        folder = study / quantized.checkpoint
        size = Manifest.read(folder).size_of_weights(folder)
    except (OSError, AllocatorError):
        return None
    record = record if quantized.weights else record.unfinished
    same = (quantized.allocation, quantized.weights) == (record.digest, record.weights_digest)
    return quantized if same and size == quantized.file_bytes else None


def _read(study: Path) -> Quantized | None:
    """`quantized.json`; None if there is none, or it is damaged."""
    try:
        return msgspec.convert(unseal((study / RESULT).read_bytes()), Quantized)
    except (OSError, ValueError):
        return None


class _Road:
    """Runs the stages of one request, in order."""

    def __init__(
        self,
        request: QuantizeRequest,
        plan: QuantizePlan,
        began: float,
        on_stage: Callable[[Stage], None],
    ) -> None:
        self._request, self._plan, self._began = request, plan, began
        self._on_stage = on_stage
        self._study, self._options = plan.study, request.resources.options

    def run(self) -> Quantized:
        """Runs them all."""
        plan, study = self._plan, self._study
        self._on_stage("profile")
        api.profile(study, **self._options)
        self._on_stage("search")
        searched = api.search(study, seconds=self._seconds_of_search(), **self._options)
        if self._request.finish:
            self._on_stage("finish")
            left = self._seconds_left("materialize", "verify")
            api.finish(study, searched.pick, seconds=left, **self._options)
        self._on_stage("materialize")
        plan.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self._remove_earlier()
        written = api.materialize(
            study, searched.pick, plan.checkpoint, record=True,
            unfinished=not self._request.finish, **self._options,
        )  # fmt: skip
        self._on_stage("verify")
        # rounding by the runtime is no fault of the file: the figure is shown, and nothing refused
        tolerance = math.inf if runtime_named(plan.target).tells_rounding else None
        verified = api.verify(study, plan.checkpoint, tolerance=tolerance, **self._options)
        record = AllocationRecord.read(searched.pick)
        record = record if self._request.finish else record.unfinished
        manifest = written.manifest
        quantized = Quantized(
            checkpoint=os.path.relpath(plan.checkpoint, study),
            file=manifest.file,
            file_bytes=manifest.file_bytes,
            sha256=manifest.sha256[manifest.file],
            bits=record.effective_bits,
            experts={str(layer): n for layer, n in record.decision.counts.items()},
            loss=record.loss,
            finished=None if record.finished is None else record.finished.after,
            search=searched.outcome,
            runtime_loss=verified.runtime_loss,
            divergence=verified.divergence,
            exact=None if verified.exact is None else verified.exact.divergence,
            allocation=record.digest,
            weights=record.weights_digest,
            request=_digest(self._request),
        )
        write_whole(study / RESULT, seal(quantized))
        return quantized

    def _remove_earlier(self) -> None:
        """Removes the checkpoint that an earlier call wrote, and nothing else."""
        folder, known = self._plan.checkpoint, _read(self._study)
        if known is None or not (folder / MANIFEST).is_file():
            return
        manifest = Manifest.read(folder)
        if manifest.sha256.get(known.file) == known.sha256:
            (self._study / RESULT).unlink()
            shutil.rmtree(folder)

    def _seconds_of_search(self) -> float | None:
        left = self._seconds_left("finish", "materialize", "verify")
        return None if left is None else max(0.0, left)

    def _seconds_left(self, *after: Stage) -> float | None:
        """Seconds until the later stages have to begin; None without a time limit."""
        if self._plan.seconds is None:
            return None
        later = sum(self._plan.road.seconds.get(stage, 0.0) for stage in after)
        spent = time.monotonic() - self._began
        return max(0.0, self._plan.seconds - spent - later)
