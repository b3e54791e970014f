"""The profile of a checkpoint that does not fit in memory.

In: what `Profiler` takes, and a share of rows. Out: the same profile. Invariants: every pass reads
the checkpoint layer by layer (see `proxy.stream`, `proxy.backward`); prices are those of the
sampled rows, over their share of the squared gradients; which rows is fixed by a group's name.

Rows are encoded on their own: formats know no row but the one that they encode. A sixteenth
of them costs a sixteenth of the encoding, which is nearly all that a profile costs. The measured
changes need all rows; where prices are of a sample they are made in formats that encode fast: the
ones nearest to `ANCHOR_BITS` take hours for what a pass reads in minutes.
"""

import shutil
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from allocator.checkpoint.tensors import Floats, Ints, read_rows
from allocator.codecs import codec_of
from allocator.families import Role
from allocator.files.checksums import read_checked, write_checked
from allocator.formats import FORMATS, Format, format_named
from allocator.profiling.curvature import Curvature
from allocator.profiling.profiler import (
    ANCHOR_BITS,
    CURVATURE,
    FAST,
    STATISTICS,
    Lines,
    Measured,
    Profiler,
)
from allocator.profiling.statistics import Statistics, collect_streamed
from allocator.profiling.streamed_gradient import measure_streamed
from allocator.scoring.candidates import Weights
from allocator.scoring.scorer import mean
from allocator.scoring.streamed import StreamedModel, StreamedScorer
from allocator.targets import Group

SIDE_BY_SIDE = 8
"""Changes that are measured in one pass, at least: each has hidden states of its own from its layer
on."""
_STATES_BYTES = 256 << 20
"""Of hidden states in one pass; while experts run there are four times as many."""
_LEAST_ROWS = 16


class _Settled(msgspec.Struct, forbid_unknown_fields=True):
    """`settled.json`: rows of prices whose layers' gradients may be relied on."""

    n_rows: int


class StreamedProfiler(Profiler):
    """See the module."""

    @cached_property
    def streamed(self) -> StreamedModel:
        """The original, layer by layer."""
        weights = Weights(self.layout, lambda: self.encodings)
        return StreamedModel(self.layout, weights, device=self.torch_device)

    def _collect(self) -> Statistics:
        return collect_streamed(
            self.streamed,
            self.inputs.documents,
            scratch=self._scratch(STATISTICS),
            of=self._of,
            progress=self.progress,
        )

    def _scratch(self, stage: str) -> Path:
        """Where a stage keeps what it has come to; a kill costs at most a layer."""
        folder = self.folder / stage
        folder.mkdir(exist_ok=True)
        return folder

    def _forget(self, stage: str) -> None:
        shutil.rmtree(self.folder / stage, ignore_errors=True)

    def _curvature(self) -> dict[str, dict[str, list[float]]]:
        scratch = self._scratch(CURVATURE)
        lines, path = Lines(scratch / "prices.jsonl", self._of), scratch / "settled.json"
        settled = read_checked(path, _Settled, self._of)
        if settled is None or lines.n_dropped or settled.n_rows > len(lines.rows):
            for gradients in scratch.glob("gradients-*"):  # their layers' prices are lost
                gradients.unlink()

        def settle() -> None:
            lines.sync()
            write_checked(path, _Settled(len(lines.rows)), self._of)

        def take(group: Group, expert: int | None, curvature: Curvature) -> None:
            rows = self._rows(group, expert, curvature)
            weights = self._weights(group, expert, rows)
            importance = self._importance(group, expert, rows)
            found = {}
            for fmt in self._priced_formats(group):
                codec = codec_of(fmt)
                encoded = codec.encode(weights, fmt, importance, threads=self.threads)
                change = codec.decode(encoded, fmt) - weights
                found[fmt.name] = curvature.price_sample(group, change, rows, expert or 0)
            lines.append({"group": group.name, "expert": expert or 0, "prices": found})

        _ = self.encodings  # its importance takes a pass of the same model
        documents = self.inputs.documents[: self.inputs.n_curvature]
        measure_streamed(
            self.streamed, documents, take, settle,
            scratch=scratch, of=self._of, progress=self.progress,
        )  # fmt: skip
        prices: dict[str, dict[str, list[float]]] = {}
        for group in self.layout.groups.values():
            n = group.shape[0] if group.role.is_expert else 1
            prices[group.name] = {fmt.name: [0.0] * n for fmt in self._priced_formats(group)}
        for row in lines.rows:
            for name, price in row["prices"].items():
                prices[row["group"]][name][row["expert"]] = price
        return prices

    def anchor(self, group: Group, bits: float) -> str:
        """The nearest format, or the nearest that encodes fast."""
        if self.inputs.sampled_rows == 1:
            return super().anchor(group, bits)
        fast = [f for f in FORMATS.values() if codec_of(f).weights_per_second(f) >= FAST]
        stores = [f for f in fast if group.can_hold(f)]
        return min(stores, key=lambda f: (abs(f.bits - bits), f.name)).name

    def _priced_formats(self, group: Group) -> list[Format]:
        """Offered ones, and those of the measured changes."""
        anchors = [format_named(self.anchor(group, bits)) for bits in ANCHOR_BITS]
        return list(dict.fromkeys((*group.offered(), *anchors)))

    def _rows(self, group: Group, expert: int | None, curvature: Curvature) -> Ints:
        """Rows (of groups with heads: heads) that stand for all, ascending."""
        assert self.inputs.sampled_rows is not None
        n_rows = group.shape[1] if group.role.is_expert else group.shape[0]
        wanted = min(n_rows, max(_LEAST_ROWS, round(self.inputs.sampled_rows * n_rows)))
        rng = np.random.default_rng(zlib.crc32(f"{group.name} {expert}".encode()))
        rows = np.sort(rng.permutation(n_rows)[:wanted])
        if group.role is Role.EMBEDDING:
            rows = np.union1d(rows, curvature.looked_up)
        return rows

    def _weights(self, group: Group, expert: int | None, rows: Ints) -> Floats:
        if group.role not in (Role.EMBEDDING, Role.HEAD):
            return self.streamed.weights.of(self.streamed.original, group, expert)[rows]
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        runs = np.split(rows, starts[1:])  # of neighbours, each one read
        inventory, source = self.layout.inventory, group.sources[0]
        return np.concatenate(
            [read_rows(inventory, source, int(run[0]), int(run[-1]) + 1) for run in runs]
        )

    def _importance(self, group: Group, expert: int | None, rows: Ints) -> Floats | None:
        importance = self.encodings.group_importance(group.name)
        if importance is None or importance.ndim == 1:
            return importance
        found: Floats = importance[rows if expert is None else expert]
        return found

    @property
    def side_by_side(self) -> int:
        """Changes in one pass."""
        width = self.layout.inventory.dimensions.hidden
        state_bytes = 4 * width * self._tokens(self.inputs.n_measured)
        return max(SIDE_BY_SIDE, _STATES_BYTES // state_bytes)

    def _measured(self, changes: Sequence[Measured]) -> Iterator[tuple[Measured, float]]:
        if not changes:
            return
        scorer = StreamedScorer(
            self.streamed, self._measured_documents, side_by_side=self.side_by_side
        )
        losses = scorer.each(map(self.candidate, changes))
        for change, found in zip(changes, losses, strict=True):
            yield change, mean(found.kl, scorer.documents)
