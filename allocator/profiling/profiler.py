"""The profile stage: what a checkpoint loses by every change that a search may make, resumable.

In: a profile's inputs, and the cache. Out: a folder named by the digest of the inputs:
`statistics.json` and `importance.safetensors` (one pass of the original), `curvature.json`
(second-order loss of every group, expert and format: one more pass, with gradients), `losses.jsonl`
(measured KL of a few changes, each of one bundle of groups or one layer's count), and
`profile.json` when all is there. Invariant: every stage is measured once for all studies with the
same inputs; see `ProfileFolder` for what a kill or a damaged file costs.

How a stage is measured differs: with the model in memory (`in_memory_profiler`), or layer by layer
(`streamed_profiler`). Everything else is the same and is here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from allocator.codecs.encodings import Encodings, open_encodings
from allocator.decision.allocation import Allocation
from allocator.decision.search_space import Experts, SearchSpace, bind
from allocator.decision.space import Space
from allocator.files.atomic import locked
from allocator.files.checksums import load_arrays, log_damage, save_arrays
from allocator.files.progress import step
from allocator.formats import Format
from allocator.prediction.profile import Change, Profile
from allocator.profiling.changes import (
    CountChange,
    FormatChange,
    MeasuredChange,
    SettingChange,
    original_settings,
    profile_changes,
    setting_changes,
    share_of_layers,
)
from allocator.profiling.curvature import FORWARDS
from allocator.profiling.inputs import ProfileInputs
from allocator.profiling.profile_files import Lines, ProfileFolder
from allocator.profiling.statistics import Statistics, importance_digest
from allocator.scoring import documents as calibration
from allocator.scoring.candidates import Candidate
from allocator.scoring.scorer import mean
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import AnyScorer
from allocator.scoring.swap_model import SwapModel
from allocator.targets import Group

STATISTICS, CURVATURE = "statistics", "curvature"
"""Stages that a streamed pass checkpoints layer by layer, in folders of these names."""
_SALIENCY_BITS = 2.0625
"""Effective bits of the format whose loss ranks experts."""

Losses = dict[str, dict[str, list[float]]]
"""Nats per token by group and format: one value per routed expert, else one value."""


class _CurvatureFile(msgspec.Struct, forbid_unknown_fields=True):
    """`curvature.json`."""

    curvature: Losses


class _LossFile(msgspec.Struct, forbid_unknown_fields=True):
    """`selection-*.json`: nats per token."""

    loss: float


class _StatisticsFile(msgspec.Struct, forbid_unknown_fields=True):
    """`statistics.json`; `importance` names the vectors of `importance.safetensors`."""

    importance: str
    saliency: dict[str, dict[int, list[float]]]
    counts: dict[int, list[int]]
    n_tokens: int
    unreached: list[tuple[int, int]]


class Profiler(ABC):
    """Builds a profile, or resumes one, and measures what a search asks for later.

    A subclass says how statistics, curvature and losses are measured, and nothing else.

    Args:
        inputs: what the profile depends on.
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
        self.cache = cache
        self.files = ProfileFolder(cache, inputs.digest)
        self.threads = threads
        self.progress = progress
        self.encodings_cap = encodings_cap
        self.torch_device = torch_device

    # -- how a profile is measured

    @property
    @abstractmethod
    def model(self) -> SwapModel | StreamedModel:
        """The original, which candidates are put into."""

    @abstractmethod
    def measure_statistics(self) -> Statistics:
        """Runs the original over the calibration documents."""

    @abstractmethod
    def measure_curvature(self) -> Losses:
        """Prices every offered format of every group, to second order around the original."""

    @abstractmethod
    def measure_losses(self, candidates: Iterable[Candidate]) -> Iterator[float]:
        """Yields the loss of each candidate on the measured documents, nats per token."""

    @abstractmethod
    def anchor(self, group: Group, bits: float) -> str:
        """Returns the format near some effective bits that a group is measured in."""

    # -- stages

    @property
    def folder(self) -> Path:
        """The folder of the profile's files."""
        return self.files.path

    @cached_property
    def statistics(self) -> Statistics:
        """Importance, saliency and routing; measured once."""
        name, weights = "statistics.json", self.folder / "importance.safetensors"

        def read(quiet: bool) -> Statistics | None:
            plain = self.files.read(name, _StatisticsFile, quiet=quiet)
            vectors = None if plain is None else load_arrays(weights, self.files.digest)
            if plain is None or vectors is None:
                return None
            if importance_digest(vectors) != plain.importance:
                log_damage(weights, ValueError(f"not the vectors that {name} names"))
                return None
            return Statistics(
                vectors, plain.saliency, plain.counts, plain.n_tokens, plain.unreached
            )

        def build() -> None:
            measured = self.measure_statistics()
            if self.inputs.given_importance is not None:
                vectors = {**measured.importance, **self.inputs.given_importance}
                measured = replace(measured, importance=vectors)
            save_arrays(weights, measured.importance, self.files.digest)
            self.files.write(
                name,
                _StatisticsFile(
                    importance_digest(measured.importance),
                    measured.saliency,
                    measured.counts,
                    measured.n_tokens,
                    measured.unreached,
                ),
            )
            self.files.remove_scratch(STATISTICS)

        return self.files.stage(name, read, build)

    @cached_property
    def encodings(self) -> Encodings:
        """Encoded weights under this profile's importance."""
        vectors = self.statistics.importance
        cap = self.encodings_cap
        return open_encodings(self.cache, self.layout, vectors, threads=self.threads, cap_bytes=cap)

    @cached_property
    def curvature(self) -> Losses:
        """Second-order loss around the original, by group and format; measured once."""
        name = "curvature.json"

        def read(quiet: bool) -> _CurvatureFile | None:
            return self.files.read(name, _CurvatureFile, quiet=quiet)

        def build() -> None:
            self.files.write(name, _CurvatureFile(self.measure_curvature()))
            self.files.remove_scratch(CURVATURE)

        return self.files.stage(name, read, build).curvature

    @cached_property
    def saliency(self) -> dict[str, dict[int, list[float]]]:
        """Per method, per MoE layer, one value per expert; experts of high saliency stay."""
        return {"fisher": self._fisher(), **self.statistics.saliency}

    def _fisher(self) -> dict[int, list[float]]:
        """An expert's share of what its layer loses in a small format."""
        values = {}
        for layer in self.layout.layers:
            rows = [
                self.curvature[g.name][nearest_format(g.offered(), _SALIENCY_BITS)]
                for g in self.layout.groups.values()
                if g.role.is_expert and g.layer == layer
            ]
            values[layer] = [float(v) for v in np.sum(rows, axis=0)]
        return values

    def space(self, spec: SearchSpace) -> Space:
        """Binds a search space with this profile's saliency."""
        return bind(spec, self.layout, self.saliency)

    def profile(self) -> Profile:
        """Returns the whole profile; of several processes one builds it, and the others wait."""
        return self.files.read_or_build("profile.json", Profile, self.build)

    def build(self) -> Profile:
        """Puts the profile together; stages that are on the disk are read."""
        statistics = self.statistics
        losses = self._change_losses()
        pruned: dict[int, dict[int, float]] = {}
        measured: list[Change] = []
        for change in self.changes():
            loss = losses[change.name]
            if isinstance(change, CountChange):
                pruned.setdefault(change.layer, {})[change.count] = loss
            else:
                measured.append(Change(change.bundle, dict(change.formats), loss))
        return Profile(
            checkpoint=self.layout.inventory.digest,
            calibration=calibration.digest(self.inputs.documents),
            target=self.layout.target,
            importance=importance_digest(statistics.importance),
            n_tokens=statistics.n_tokens,
            measured_tokens=self.inputs.measured_tokens,
            curvature_tokens=self.inputs.curvature_tokens,
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
        n_measured = self.inputs.measured_tokens
        shares = [share_of_layers(change, self.layout) for change in self.changes()]
        return {
            "statistics": self.inputs.n_tokens,
            "curvature": FORWARDS * self.inputs.curvature_tokens,
            "reference": n_measured,  # its distributions, and its states before every layer
            "changes": round(n_measured * sum(shares)),
        }

    # -- measured changes

    def changes(self) -> Iterator[FormatChange | CountChange]:
        """Yields the changes that the profile measures."""
        return profile_changes(self.inputs, self.anchor)

    def _change_losses(self) -> dict[str, float]:
        changes = {change.name: change for change in self.changes()}
        lines = self.files.lines(
            "losses.jsonl", lambda row: _is_loss(row) and row["change"] in changes
        )
        return self._measured(list(changes.values()), lines, self.progress)

    def setting_losses(self, space: Space) -> dict[str, dict[Any, float]]:
        """Measures what the original loses by every setting of a space alone.

        Returns:
            Nats per token by setting and value, the original's value included.
        """
        changes = setting_changes(space)
        with locked(self.folder / "settings"):
            losses = self._measured(changes, self.files.lines("settings.jsonl", _is_loss))
        original = original_settings(self.layout)
        by_setting: dict[str, dict[Any, float]] = {}
        for change in changes:
            values = by_setting.setdefault(change.setting, {original[change.setting]: 0.0})
            values[change.value] = losses[change.name]
        return by_setting

    def setting_tokens(self, space: Space) -> int:
        """Returns the forward tokens that `setting_losses` costs, measured or not."""
        n_changes = len(setting_changes(space))
        reference = 1 if n_changes else 0
        return (n_changes + reference) * self.inputs.measured_tokens

    def _measured(
        self, changes: Sequence[MeasuredChange], lines: Lines, progress: bool = False
    ) -> dict[str, float]:
        """Losses by the name of a change; those without a line are measured and appended."""
        losses = {row["change"]: row["kl"] for row in lines.rows}
        missing = [change for change in changes if change.name not in losses]
        if not missing:
            return losses
        with step(
            "measuring", len(changes), initial=len(losses), unit="changes", shown=progress
        ) as bar:
            measured = self.measure_losses(map(self.candidate, missing))
            for change, loss in zip(missing, measured, strict=True):
                losses[change.name] = loss
                lines.append({"change": change.name, "kl": loss})
                bar.update()
        return losses

    def candidate(self, change: MeasuredChange) -> Candidate:
        """Returns the original with a change."""
        original = Candidate.original(self.layout)
        if isinstance(change, SettingChange):
            return replace(original, **{change.setting: change.value})
        if isinstance(change, FormatChange):
            return replace(original, format_of={**original.format_of, **change.formats})
        space = self.space(SearchSpace(schema=1, experts=Experts(saliency=self.inputs.saliency)))
        experts = space.retained(change.layer, change.count)
        return replace(
            original, retained_experts={**original.retained_experts, change.layer: experts}
        )

    def selection_loss(self, allocation: Allocation, scorer: AnyScorer) -> float:
        """Measures the loss of an allocation on a scorer's documents, or reads it from the cache.

        Returns:
            Nats per token.
        """
        key = f"{calibration.digest(scorer.documents)[:16]}-{allocation.digest[:32]}"
        name = f"selection-{key}.json"
        measured = self.files.read(name, _LossFile)
        if measured is None:
            measured = _LossFile(mean(scorer.score(allocation).kl, scorer.documents))
            if math.isfinite(measured.loss):
                self.files.write(name, measured)
        return measured.loss


def _is_loss(row: dict[str, Any]) -> bool:
    """Whether a row is a change's name and a finite number."""
    kl = row.get("kl")
    return isinstance(row.get("change"), str) and isinstance(kl, float) and math.isfinite(kl)


def nearest_format(formats: Iterable[Format], bits: float) -> str:
    """Returns the name of the format whose effective bits are nearest; of equal ones the first."""
    return min(formats, key=lambda f: (abs(f.bits - bits), f.name)).name
