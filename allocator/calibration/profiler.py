"""The profile stage: statistics, format errors, and the loss of single changes, resumable.

In: a checkpoint in a layout, and calibration documents. Out: a folder named by the digest of its
inputs: `statistics.json` and `importance.safetensors` (one pass of the original), `errors.jsonl`
(weighted error per group and format), `losses.jsonl` (measured KL of one change at a time), and
`profile.json` when all is there. Invariant: a kill costs at most the line being measured.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import load_file, save
from tqdm import tqdm

from allocator.calibration import documents as calibration
from allocator.calibration.documents import Document
from allocator.calibration.statistics import Statistics, collect
from allocator.codecs.bank import Bank
from allocator.codecs.ggml import decode
from allocator.codecs.source import Floats, group_weights
from allocator.files import write_whole
from allocator.formats import format_named
from allocator.profile import Profile
from allocator.proxy.model import SwapModel
from allocator.proxy.scorer import Scorer, mean
from allocator.space import Experts, SearchSpace, Space, bind
from allocator.targets import Group, Layout

ANCHOR_BITS = (1.75, 3.0)
"""Each group's loss is measured in its formats nearest to these, the rest is inferred."""
PRUNED_SHARES = (5 / 6, 2 / 3, 1 / 2, 1 / 3, 1 / 4)
"""Each layer's loss is measured at these shares of its experts."""


@dataclass(frozen=True)
class ProfileInputs:
    """Everything a profile depends on.

    Attributes:
        layout: the target bound to the checkpoint.
        documents: the calibration documents for the statistics; the first ones are scored.
        n_measured: documents scored for each single change.
        saliency: the ranking that prune losses are measured with.
    """

    layout: Layout
    documents: tuple[Document, ...]
    n_measured: int
    saliency: str

    @cached_property
    def digest(self) -> str:
        """Names the profile."""
        parts = {
            "checkpoint": self.layout.inventory.digest,
            "target": self.layout.target,
            "documents": calibration.digest(self.documents),
            "n_measured": self.n_measured,
            "saliency": self.saliency,
            "anchors": [ANCHOR_BITS, PRUNED_SHARES],
            "codec": version("xllamacpp"),
            "schema": 1,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def importance_digest(importance: dict[str, Floats]) -> str:
    """Names importance vectors by content."""
    total = hashlib.sha256()
    for name in sorted(importance):
        total.update(f"{name} {importance[name].shape}\n".encode() + importance[name].tobytes())
    return total.hexdigest()


class _Lines:
    """A JSON-lines file that is appended to; a torn last line is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        if path.exists():
            write_whole(path, whole + b"\n" if whole else b"")

    def append(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)


class Profiler:
    """Builds or continues a profile.

    Args:
        inputs: what it depends on.
        cache: where profiles and the bank live.
        threads: for encoding.
        progress: shows bars.
    """

    def __init__(
        self, inputs: ProfileInputs, cache: Path, *, threads: int = 1, progress: bool = False
    ) -> None:
        self.inputs = inputs
        self.layout = inputs.layout
        self.folder = cache / "profiles" / inputs.digest[:32]
        self.cache = cache
        self.threads = threads
        self.progress = progress
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def statistics(self) -> Statistics:
        """Importance, saliency and routing; measured once."""
        path, weights = self.folder / "statistics.json", self.folder / "importance.safetensors"
        if not path.exists():
            found = collect(
                self.swap.model, self.layout, self.inputs.documents, progress=self.progress
            )
            write_whole(weights, save(found.importance))
            plain = {
                "saliency": found.saliency,
                "counts": found.counts,
                "n_tokens": found.n_tokens,
                "unreached": found.unreached,
            }
            write_whole(path, json.dumps(plain, indent=1).encode())
        data = msgspec.convert(
            {**json.loads(path.read_text()), "importance": {}}, Statistics, strict=False
        )
        data.importance.update(load_file(weights))
        return data

    @cached_property
    def bank(self) -> Bank:
        """Encoded weights under this profile's importance."""
        return Bank(
            self.cache / "bank", self.layout, self.statistics.importance, threads=self.threads
        )

    @cached_property
    def swap(self) -> SwapModel:
        """The model that candidates are put into; the bank is opened when one needs it."""
        return SwapModel(self.layout, lambda *wanted: self.bank.decoded(*wanted))

    def space(self, spec: SearchSpace) -> Space:
        """A search space bound with this profile's saliency."""
        return bind(spec, self.layout, self.statistics.saliency)

    def profile(self) -> Profile:
        """The finished profile."""
        path = self.folder / "profile.json"
        if not path.exists():
            write_whole(path, self._build().to_bytes())
        return Profile.read(path)

    def _build(self) -> Profile:
        statistics = self.statistics
        errors = self._errors()
        measured, pruned = self._losses()
        return Profile(
            checkpoint=self.layout.inventory.digest,
            calibration=calibration.digest(self.inputs.documents),
            target=self.layout.target,
            importance=importance_digest(statistics.importance),
            n_tokens=statistics.n_tokens,
            measured_tokens=sum(len(d.ids) for d in self._measured_documents),
            saliency=statistics.saliency,
            unreached=statistics.unreached,
            counts=statistics.counts,
            errors=errors,
            measured=measured,
            pruned=pruned,
            saliency_method=self.inputs.saliency,
        )

    @property
    def _measured_documents(self) -> Sequence[Document]:
        return self.inputs.documents[: self.inputs.n_measured]

    def _errors(self) -> dict[str, dict[str, float]]:
        lines = _Lines(self.folder / "errors.jsonl")
        done = {(row["group"], row["format"]) for row in lines.rows}
        wanted = [(g, f.name) for g in self.layout.groups.values() for f in g.offered()]
        bar = tqdm(total=len(wanted), initial=len(done), desc="encoding", disable=not self.progress)
        for group in self.layout.groups.values():
            formats = [f.name for f in group.offered() if (group.name, f.name) not in done]
            if not formats:
                continue
            weights = group_weights(self.layout, group)
            energy = self._energy(group)
            total = float((weights.astype(np.float64) ** 2 * energy).sum())
            for fmt in formats:
                decoded = decode(self.bank.encoded(group.name, fmt), format_named(fmt))
                lost = float(((decoded - weights).astype(np.float64) ** 2 * energy).sum())
                lines.append({"group": group.name, "format": fmt, "error": lost / total})
                bar.update()
        bar.close()
        found: dict[str, dict[str, float]] = {}
        for row in lines.rows:
            found.setdefault(row["group"], {})[row["format"]] = row["error"]
        return found

    def _energy(self, group: Group) -> Floats | np.float64:
        """Squared input per channel, summed over tokens: `(..., 1, in)`."""
        importance = self.bank.group_importance(group.name)
        if importance is None:
            return np.float64(1)
        energy = importance[..., None, :]
        if group.role.is_expert and group.layer is not None:
            counts = np.maximum(self.statistics.counts[group.layer], 1)
            energy = energy * counts[:, None, None]
        return np.asarray(energy)

    def changes(self) -> Iterator[tuple[str, str | int]]:
        """Single changes: `(group, format)` and `(experts.<layer>, count)`."""
        for group in self.layout.groups.values():
            for fmt in dict.fromkeys(_nearest(group, bits) for bits in ANCHOR_BITS):
                yield group.name, fmt
        inventory = self.layout.inventory
        step = inventory.expert_groups
        least = inventory.least_experts(inventory.experts_used)
        counts = (round(share * inventory.n_experts / step) * step for share in PRUNED_SHARES)
        counts_measured = sorted({max(least, n) for n in counts} | {least}, reverse=True)
        for layer in self.layout.layers:
            for count in counts_measured:
                if count < inventory.n_experts:
                    yield f"experts.{layer}", count

    def _losses(self) -> tuple[dict[str, dict[str, float]], dict[int, dict[int, float]]]:
        lines = _Lines(self.folder / "losses.jsonl")
        done = {(row["change"], row["to"]): row["kl"] for row in lines.rows}
        changes = list(self.changes())
        bar = tqdm(
            total=len(changes), initial=len(done), desc="measuring", disable=not self.progress
        )
        scorer: Scorer | None = None
        space = self.space(SearchSpace(schema=1, experts=Experts(saliency=self.inputs.saliency)))
        for change, to in changes:
            if (change, to) in done:
                continue
            scorer = scorer or Scorer(self.swap, self._measured_documents, threads=self.threads)
            kl = self._measure(scorer, space, change, to)
            lines.append({"change": change, "to": to, "kl": kl})
            done[change, to] = kl
            bar.update()
        bar.close()
        measured: dict[str, dict[str, float]] = {}
        pruned: dict[int, dict[int, float]] = {}
        for (change, to), kl in done.items():
            if isinstance(to, int):
                pruned.setdefault(int(change.removeprefix("experts.")), {})[to] = kl
            else:
                measured.setdefault(change, {})[to] = kl
        return measured, pruned

    def _measure(self, scorer: Scorer, space: Space, change: str, to: str | int) -> float:
        layout = self.layout
        formats: dict[str, str | None] = dict.fromkeys(layout.groups)
        retained = dict.fromkeys(layout.layers, tuple(range(layout.inventory.n_experts)))
        first: int | None
        if isinstance(to, int):
            first = int(change.removeprefix("experts."))
            retained[first] = space.retained(first, to)
        else:
            first = layout.groups[change].layer
            formats[change] = to
        scorer.ensure_reference(len(scorer.documents))
        scorer.swap.put(
            formats=formats, retained=retained, experts_used=layout.inventory.experts_used
        )
        losses = scorer.score_installed() if first is None else scorer.score_from(first)
        return mean(losses.kl, scorer.documents)


def _nearest(group: Group, bits: float) -> str:
    return min(group.offered(), key=lambda f: (abs(f.bits - bits), f.name)).name
