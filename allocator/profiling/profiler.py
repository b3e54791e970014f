"""The profile stage: statistics, curvature, and the loss of a few changes, resumable.

In: a checkpoint in a layout, and calibration documents. Out: a folder named by the digest of its
inputs: `statistics.json` and `importance.safetensors` (one pass of the original), `curvature.json`
(second-order loss of every group, expert and format: one more pass, with gradients), `losses.jsonl`
(measured KL of a few changes, each of one bundle of groups or one layer's count), and
`profile.json` when all is there. Invariants: a kill costs at most the line being measured; every
file carries a checksum of its content and of what it belongs to, and a damaged one is measured
again, with one line.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from tqdm import tqdm

from allocator.checkpoint.tensors import Floats
from allocator.codecs import versions_of
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import DEFAULT_KV_FORMAT, Allocation
from allocator.decision.parameters import EXPERTS_USED, KV_FORMAT
from allocator.decision.search_space import Experts, SearchSpace, bind
from allocator.decision.space import Space
from allocator.errors import CalibrationError
from allocator.families import Role
from allocator.files.atomic import locked, write_whole
from allocator.files.checksums import (
    load_arrays,
    log_damage,
    read_checked,
    save_arrays,
    seal_line,
    unseal,
    write_checked,
)
from allocator.prediction.profile import Change, Profile, bundle_of
from allocator.prediction.surrogate import LocalPrices
from allocator.profiling.curvature import FORWARDS, FORWARDS_WITH_SLOPE, Curvature, measure
from allocator.profiling.statistics import Statistics, collect, importance_digest
from allocator.scoring import documents as calibration
from allocator.scoring.candidates import Candidate
from allocator.scoring.documents import Document
from allocator.scoring.scorer import Scorer, mean
from allocator.scoring.streamed import AnyScorer
from allocator.scoring.swap_model import SwapModel, destination
from allocator.targets import Group, Layout
from allocator.targets.group_weights import group_weights

ANCHOR_BITS = (1.75, 3.0)
"""Each bundle's loss is measured with its groups in their formats nearest to these."""
FAST = 1e7
"""Where prices are of sampled rows: those formats encode as many weights a second (one core)."""
_LOOK = FORWARDS_WITH_SLOPE + 1  # and the original's own forward
_SALIENCY_BITS = 2.0625  # the format whose loss ranks experts
PRUNED_SHARES = (5 / 6, 2 / 3, 1 / 2, 1 / 3, 1 / 4)
"""Each layer's loss is measured at these shares of its experts."""
_FORM = 2  # of the files in a profile's folder; those of another form are in folders of their own

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """The original with one setting changed: `experts_used` or `kv_format`."""

    name: str
    value: Any


Measured = Change | tuple[int, int] | Setting
"""What is measured: a bundle in some formats, `(layer, retained count)`, or a setting."""


@dataclass(frozen=True)
class ProfileInputs:
    """Everything a profile depends on.

    Attributes:
        layout: the target bound to the checkpoint.
        documents: the calibration documents for the statistics; the first ones are scored.
        n_measured: documents scored for each change.
        n_curvature: documents behind the curvature.
        saliency: the ranking that prune losses are measured with.
        sampled_rows: share of a matrix's rows that its prices are of; None for all, with the model
            in memory.
    """

    layout: Layout
    documents: tuple[Document, ...]
    n_measured: int
    n_curvature: int
    saliency: str
    sampled_rows: float | None = None

    @cached_property
    def digest(self) -> str:
        """Names the profile."""
        parts = {
            "checkpoint": self.layout.inventory.digest,
            "target": self.layout.target,
            "documents": calibration.digest(self.documents),
            "n_measured": self.n_measured,
            "n_curvature": self.n_curvature,
            "saliency": self.saliency,
            "anchors": [ANCHOR_BITS, PRUNED_SHARES],
            **versions_of(f for g in self.layout.groups.values() for f in g.offered()),
            "schema": 2,
        }
        if self.sampled_rows is not None:
            parts["sampled_rows"] = self.sampled_rows
            parts["fast"] = FAST
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


STATISTICS, CURVATURE = "statistics", "curvature"
"""Stages that are kept layer by layer where the checkpoint is streamed."""


class _Prices(msgspec.Struct, forbid_unknown_fields=True):
    """`curvature.json`."""

    curvature: dict[str, dict[str, list[float]]]


class _Around(_Prices, forbid_unknown_fields=True):
    """`around-*.json`."""

    moves: dict[str, dict[str, list[float]]]


class _Loss(msgspec.Struct, forbid_unknown_fields=True):
    """`selection-*.json`: nats per token."""

    loss: float


class _Routing(msgspec.Struct, forbid_unknown_fields=True):
    """`statistics.json`; `importance` names the vectors beside it."""

    importance: str
    saliency: dict[str, dict[int, list[float]]]
    counts: dict[int, list[int]]
    n_tokens: int
    unreached: list[tuple[int, int]]


class Lines:
    """A JSON-lines file that is appended to; rows that cannot be used are dropped, with one line.

    Args:
        path: of the file.
        of: what its rows belong to.
        wanted: whether a whole row can be used.

    Attributes:
        rows: what it holds.
        n_dropped: rows that were damaged or not wanted, a torn last one not counted.
    """

    def __init__(
        self, path: Path, of: str = "", wanted: Callable[[dict[str, Any]], bool] = lambda row: True
    ) -> None:
        self.path, self._of = path, f"{path.name} {of}"
        self.rows: list[dict[str, Any]] = []
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        lines, kept = whole.split(b"\n") if whole else [], []
        odd: list[tuple[int, Exception]] = []
        for number, line in enumerate(lines, start=1):
            try:
                row = unseal(line, self._of, required=True)
                if not wanted(row):
                    raise ValueError("no finite number for anything that is asked for")
            except (ValueError, RecursionError) as error:
                odd.append((number, error))
            else:
                kept.append(line)
                self.rows.append(row)
        self.n_dropped = len(odd)
        if odd:
            number, why = odd[0]
            more = f", and {len(odd) - 1} more" if odd[1:] else ""
            log_damage(path.with_name(f"{path.name}, line {number}{more}"), why)
        if path.exists():
            write_whole(path, b"".join(line + b"\n" for line in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row, in the file first."""
        with open(self.path, "ab") as file:
            file.write(seal_line(row, self._of) + b"\n")
        self.rows.append(row)

    def sync(self) -> None:
        """Returns when the disk has all rows."""
        with open(self.path, "a", encoding="utf-8") as file:
            os.fsync(file.fileno())


class Profiler:
    """Builds or continues a profile.

    Args:
        inputs: what it depends on.
        cache: where profiles and the encodings live.
        threads: for encoding.
        progress: shows bars.
        encodings_cap: bytes that the encodings may occupy, if limited.
        torch_device: where forward passes run.
    """

    def __init__(
        self,
        inputs: ProfileInputs,
        cache: Path,
        *,
        threads: int = 1,
        progress: bool = False,
        encodings_cap: int | None = None,
        torch_device: str = "cpu",
    ) -> None:
        self.inputs = inputs
        self.layout = inputs.layout
        self.folder = cache / "profiles" / f"{inputs.digest[:32]}-{_FORM}"
        self.cache = cache
        self.threads = threads
        self.progress = progress
        self.encodings_cap = encodings_cap
        self.torch_device = torch_device
        self.folder.mkdir(parents=True, exist_ok=True)
        self._building = False

    @cached_property
    def statistics(self) -> Statistics:
        """Importance, saliency and routing; measured once."""
        path, weights = self.folder / "statistics.json", self.folder / "importance.safetensors"

        def read(quiet: bool) -> Statistics | None:
            found = read_checked(path, _Routing, self._of, quiet=quiet)
            vectors = None if found is None else load_arrays(weights, self._of)
            if found is None or vectors is None:
                return None
            if importance_digest(vectors) != found.importance:
                log_damage(weights, ValueError(f"not the vectors that {path.name} names"))
                return None
            return Statistics(
                vectors, found.saliency, found.counts, found.n_tokens, found.unreached
            )

        def build() -> None:
            found = self._collect()
            save_arrays(weights, found.importance, self._of)
            named = importance_digest(found.importance)
            plain = _Routing(named, found.saliency, found.counts, found.n_tokens, found.unreached)
            write_checked(path, plain, self._of)
            self._forget(STATISTICS)

        return self._kept(path, read, build)

    @cached_property
    def encodings(self) -> Encodings:
        """Encoded weights under this profile's importance."""
        return Encodings(
            self.cache / "bank",
            self.layout,
            self.statistics.importance,
            threads=self.threads,
            cap_bytes=self.encodings_cap,
        )

    @cached_property
    def swap(self) -> SwapModel:
        """The model that candidates are put into; encodings are opened when one needs them."""
        return SwapModel(self.layout, self._decoded, device=self.torch_device)

    def _decoded(self, name: str, fmt: str, experts: tuple[int, ...] | None) -> Floats:
        self.encodings.release()  # the model holds a copy of what it asked for before
        return self.encodings.decoded(name, fmt, experts)

    @cached_property
    def curvature(self) -> dict[str, dict[str, list[float]]]:
        """Second-order loss around the original, by group and format; measured once."""
        path = self.folder / "curvature.json"

        def build() -> None:
            write_checked(path, _Prices(self._curvature()), self._of)
            self._forget(CURVATURE)

        return self._kept(path, self._reads(path, _Prices), build).curvature

    def _collect(self) -> Statistics:
        return collect(self.swap.model, self.layout, self.inputs.documents, progress=self.progress)

    def _curvature(self) -> dict[str, dict[str, list[float]]]:
        with self.swap.original():
            found = measure(self.swap, self.inputs.documents[: self.inputs.n_curvature])
        return self._priced(found)

    def _priced(self, curvature: Curvature) -> dict[str, dict[str, list[float]]]:
        """What the original's `curvature` says of every offered format of every group."""
        wanted = sum(len(g.offered()) for g in self.layout.groups.values())
        bar = tqdm(total=wanted, desc="encoding", disable=not self.progress)
        prices: dict[str, dict[str, list[float]]] = {}
        for group in self.layout.groups.values():
            weights = group_weights(self.layout, group)
            experts = range(len(weights)) if group.role.is_expert else ()
            row = prices[group.name] = {}
            self.encodings.release()
            for fmt in group.offered():
                decoded = self.encodings.decoded(group.name, fmt.name)
                row[fmt.name] = curvature.price(group, decoded - weights, experts)
                bar.update()
        bar.close()
        return prices

    def local_prices(self, allocation: Allocation, scorer: Scorer, *, part: int) -> LocalPrices:
        """What a gradient says around a candidate; kept by content.

        Curvature of experts that the candidate does not retain is the original's, scaled as their
        layer's retained ones are.

        Args:
            allocation: the candidate.
            scorer: of search documents; they are taken `n_curvature` at a time.
            part: which of these.
        """
        n = min(self.inputs.n_curvature, scorer.n_documents)
        start = part % max(scorer.n_documents // n, 1) * n
        documents = scorer.documents[start : start + n]
        name = f"around-{allocation.digest[:32]}-{calibration.digest(documents)[:16]}.json"
        path = self.folder / name
        prices = read_checked(path, _Around, self._of)
        if prices is None:
            scorer.ensure_reference(start + n)
            self.swap.put_allocation(allocation)
            found = measure(self.swap, documents, reference=lambda i: scorer.reference(start + i))
            prices = _Around(*self._priced_around(allocation, found))
            write_checked(path, prices, self._of)
        return LocalPrices(
            prices.curvature, prices.moves, _LOOK * sum(len(d.ids) for d in documents)
        )

    def selection_loss(self, allocation: Allocation, scorer: AnyScorer) -> float:
        """The loss of an allocation on a scorer's documents, nats per token; kept by content."""
        key = f"{calibration.digest(scorer.documents)[:16]}-{allocation.digest[:32]}"
        path = self.folder / f"selection-{key}.json"
        known = read_checked(path, _Loss, self._of)
        if known is None:
            known = _Loss(mean(scorer.score(allocation).kl, scorer.documents))
            if math.isfinite(known.loss):
                write_checked(path, known, self._of)
        return known.loss

    def gradient_tokens(self, scorer: Scorer) -> int:
        """The most forward tokens that `local_prices` costs."""
        n = min(self.inputs.n_curvature, scorer.n_documents)
        sizes = [len(d.ids) for d in scorer.documents]
        starts = range(0, scorer.n_documents - n + 1, n)
        return _LOOK * max(sum(sizes[i : i + n]) for i in starts)

    def _priced_around(
        self, allocation: Allocation, found: Curvature
    ) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, list[float]]]]:
        curvature: dict[str, dict[str, list[float]]] = {}
        moves: dict[str, dict[str, list[float]]] = {}
        dimensions = self.layout.inventory.dimensions
        for name, group in self.layout.groups.items():
            experts = allocation.retained_experts[group.layer or 0] if group.role.is_expert else ()
            weights = group_weights(self.layout, group)
            weights = weights[list(experts)] if experts else weights
            held = destination(self.swap.model, dimensions, group).cpu().numpy()
            tangent = found.tangent(group, held - weights, experts)
            curvature[name], moves[name] = {}, {}
            self.encodings.release()
            for fmt in group.offered():
                change = self.encodings.decoded(name, fmt.name, experts or None) - weights
                there = found.price(group, change, experts)
                step = tangent.steps(change, there)
                if experts:
                    there = _completed(self.curvature[name][fmt.name], there, experts)
                    everyone = dict(zip(experts, step, strict=True))
                    step = [everyone.get(e, 0.0) for e in range(len(there))]
                curvature[name][fmt.name], moves[name][fmt.name] = there, step
        return curvature, moves

    @cached_property
    def saliency(self) -> dict[str, dict[int, list[float]]]:
        """Per method, per MoE layer, one value per expert, higher = keep."""
        return {"fisher": self._fisher(), **self.statistics.saliency}

    def _fisher(self) -> dict[int, list[float]]:
        """How much an expert's loss in a small format is: its share of what the layer's cost."""
        found = {}
        for layer in self.layout.layers:
            rows = [
                self.curvature[g.name][_nearest(g, _SALIENCY_BITS)]
                for g in self.layout.groups.values()
                if g.role.is_expert and g.layer == layer
            ]
            found[layer] = [float(v) for v in np.sum(rows, axis=0)]
        return found

    def space(self, spec: SearchSpace) -> Space:
        """A search space bound with this profile's saliency."""
        return bind(spec, self.layout, self.saliency)

    def profile(self) -> Profile:
        """The finished profile; of several processes one builds it, and the others wait."""
        path = self.folder / "profile.json"
        build = partial(self._write_profile, path)
        return self._kept(path, self._reads(path, Profile), build)

    def _write_profile(self, path: Path) -> None:
        write_checked(path, self._build(), self._of)

    @property
    def _of(self) -> str:
        """What the files of the folder belong to."""
        return self.inputs.digest

    def _reads(self, path: Path, kind: type[T]) -> Callable[[bool], T | None]:
        return lambda quiet: read_checked(path, kind, self._of, quiet=quiet)

    def _kept(self, path: Path, read: Callable[[bool], T | None], build: Callable[[], None]) -> T:
        """What a stage has left; of several processes one builds what is missing or damaged.

        Args:
            path: of the stage's last file.
            read: gets whether to be quiet; returns None where `build` is needed.
            build: leaves the files.
        """
        if not self._building and (found := read(True)) is not None:
            return found
        with self._alone():
            if (found := read(False)) is None:
                build()
                found = read(False)
        if found is None:
            raise CalibrationError(
                f"{path}: does not come back as it was written; needed finite values, and a disk "
                "that keeps what it is given"
            )
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock of those who build, once."""
        if self._building:
            yield
            return
        with locked(self.folder / "building"):
            self._building = True
            try:
                yield
            finally:
                self._building = False

    def _forget(self, stage: str) -> None:
        """Removes what a finished stage has kept to go on from: nothing here."""

    def _build(self) -> Profile:
        statistics = self.statistics
        measured, pruned = self._losses()
        return Profile(
            checkpoint=self.layout.inventory.digest,
            calibration=calibration.digest(self.inputs.documents),
            target=self.layout.target,
            importance=importance_digest(statistics.importance),
            n_tokens=statistics.n_tokens,
            measured_tokens=self._tokens(self.inputs.n_measured),
            curvature_tokens=self._tokens(self.inputs.n_curvature),
            forward_tokens=self.forward_tokens,
            saliency=self.saliency,
            unreached=statistics.unreached,
            counts=statistics.counts,
            curvature=self.curvature,
            measured=measured,
            pruned=pruned,
            saliency_method=self.inputs.saliency,
        )

    @property
    def forward_tokens(self) -> dict[str, int]:
        """What each stage costs, finished or not, in tokens through all layers."""
        n_measured = self._tokens(self.inputs.n_measured)
        return {
            "statistics": self._tokens(),
            "curvature": FORWARDS * self._tokens(self.inputs.n_curvature),
            "reference": n_measured,  # its distributions, and its states before every layer
            "changes": round(n_measured * sum(map(self._depth, self.changes()))),
        }

    def _tokens(self, n_documents: int | None = None) -> int:
        return sum(len(d.ids) for d in self.inputs.documents[:n_documents])

    @property
    def _measured_documents(self) -> Sequence[Document]:
        return self.inputs.documents[: self.inputs.n_measured]

    def changes(self) -> Iterator[Measured]:
        """What is measured: bundles in small formats, and `(layer, retained count)`."""
        bundles: dict[str, list[Group]] = {}
        for group in self.layout.groups.values():
            bundles.setdefault(bundle_of(group), []).append(group)
        for name, groups in bundles.items():
            small, large = ({g.name: self.anchor(g, bits) for g in groups} for bits in ANCHOR_BITS)
            yield Change(name, small, math.nan)
            if large != small:
                yield Change(name, large, math.nan)
        inventory = self.layout.inventory
        step = inventory.expert_groups
        least = inventory.least_experts(inventory.experts_used)
        counts = (round(share * inventory.n_experts / step) * step for share in PRUNED_SHARES)
        counts_measured = sorted({max(least, n) for n in counts} | {least}, reverse=True)
        for layer in self.layout.layers:
            for count in counts_measured:
                if count < inventory.n_experts:
                    yield layer, count

    def anchor(self, group: Group, bits: float) -> str:
        """The format that a group is measured in."""
        return _nearest(group, bits)

    def _first_layer(self, change: Measured) -> int:
        """The first layer that measuring a change runs."""
        if isinstance(change, Setting):
            return 0
        if isinstance(change, tuple):
            return change[0]
        group = self.layout.groups[next(iter(change.formats))]
        if group.role is Role.HEAD:  # it multiplies what the last layer gives
            return self.layout.inventory.n_layers - 1
        return group.layer or 0

    def _depth(self, change: Measured) -> float:
        """The share of the layers that measuring a change runs."""
        n_layers = self.layout.inventory.n_layers
        return (n_layers - self._first_layer(change)) / n_layers

    def _losses(self) -> tuple[list[Change], dict[int, dict[int, float]]]:
        changes = list(self.changes())
        asked = {_line(c) for c in changes}
        lines = Lines(
            self.folder / "losses.jsonl",
            self._of,
            lambda row: _is_loss(row) and row["change"] in asked,
        )
        done = {row["change"]: row["kl"] for row in lines.rows}
        bar = tqdm(
            total=len(changes), initial=len(done), desc="measuring", disable=not self.progress
        )
        for change, kl in self._measured([c for c in changes if _line(c) not in done]):
            done[_line(change)] = kl
            lines.append({"change": _line(change), "kl": kl})
            bar.update()
        bar.close()
        measured = [
            Change(c.bundle, c.formats, done[_line(c)]) for c in changes if isinstance(c, Change)
        ]
        pruned: dict[int, dict[int, float]] = {}
        for change in changes:
            if isinstance(change, tuple):
                pruned.setdefault(change[0], {})[change[1]] = done[_line(change)]
        return measured, pruned

    def _measured(self, changes: Sequence[Measured]) -> Iterator[tuple[Measured, float]]:
        """Measures changes, as they are asked for."""
        if not changes:
            return
        scorer = Scorer(
            self.swap, self._measured_documents, threads=self.threads,
            boundary_bytes=math.inf, from_original=True,
        )  # fmt: skip
        scorer.ensure_reference(len(scorer.documents))
        for change in changes:
            scorer.swap.put(self.candidate(change))
            yield change, mean(scorer.score_installed().kl, scorer.documents)

    def settings(self, space: Space) -> dict[str, dict[Any, float]]:
        """What the original loses by every setting of a space alone, nats per token; kept."""
        wanted = settings_of(space)
        with locked(self.folder / "settings"):
            lines = Lines(self.folder / "settings.jsonl", self._of, _is_loss)
            done = {row["change"]: row["kl"] for row in lines.rows}
            for setting, kl in self._measured([s for s in wanted if _line(s) not in done]):
                done[_line(setting)] = kl
                lines.append({"change": _line(setting), "kl": kl})
        found: dict[str, dict[Any, float]] = {}
        for setting in wanted:
            found.setdefault(setting.name, {})[setting.value] = done[_line(setting)]
        originals = {
            EXPERTS_USED.name: self.layout.inventory.experts_used,
            KV_FORMAT.name: DEFAULT_KV_FORMAT,
        }
        return {name: {originals[name]: 0.0} | losses for name, losses in found.items()}

    def settings_tokens(self, space: Space) -> int:
        """Forward tokens that `settings` costs, measured or not."""
        wanted = settings_of(space)
        reference = 1 if wanted else 0
        return (len(wanted) + reference) * self._tokens(self.inputs.n_measured)

    def candidate(self, change: Measured) -> Candidate:
        """The original with a change."""
        original = Candidate.original(self.layout)
        if isinstance(change, Setting):
            return replace(original, **{change.name: change.value})
        if not isinstance(change, tuple):
            return replace(original, format_of={**original.format_of, **change.formats})
        space = self.space(SearchSpace(schema=1, experts=Experts(saliency=self.inputs.saliency)))
        retained = {**original.retained_experts, change[0]: space.retained(*change)}
        return replace(original, retained_experts=retained)


def _completed(original: list[float], held: list[float], experts: tuple[int, ...]) -> list[float]:
    """One value per expert: the held ones' own, the others' scaled as these."""
    before = sum(original[e] for e in experts)
    factor = sum(held) / before if before > 0 else 1.0
    found = [value * factor for value in original]
    for expert, value in zip(experts, held, strict=True):
        found[expert] = value
    return found


def settings_of(space: Space) -> list[Setting]:
    """Every setting of a space that is not the original's, where there is a choice."""
    choices = {
        name: space.choices[name]
        for name in (EXPERTS_USED.name, KV_FORMAT.name)
        if name in space.choices
    }
    original = {
        EXPERTS_USED.name: space.layout.inventory.experts_used,
        KV_FORMAT.name: DEFAULT_KV_FORMAT,
    }
    return [
        Setting(name, value)
        for name, values in choices.items()
        for value in values
        if len(values) > 1 and value != original[name]
    ]


def _is_loss(row: dict[str, Any]) -> bool:
    """Whether a row is a change's name and a finite number."""
    kl = row.get("kl")
    return isinstance(row.get("change"), str) and isinstance(kl, float) and math.isfinite(kl)


def _line(change: Measured) -> str:
    """The name of a change in `losses.jsonl`."""
    if isinstance(change, Setting):
        return f"{change.name} {change.value}"
    if isinstance(change, tuple):
        return f"layers.{change[0]} retains {change[1]}"
    return f"{change.bundle}: " + " ".join(f"{g}={f}" for g, f in change.formats.items())


def _nearest(group: Group, bits: float) -> str:
    return min(group.offered(), key=lambda f: (abs(f.bits - bits), f.name)).name
