"""The profile of a checkpoint that does not fit in memory.

In: what `Profiler` takes, and a share of rows. Out: the same profile. Invariants: every pass reads
the checkpoint layer by layer (see `scoring.streamed_model`, `profiling.streamed_gradient`); prices
are those of the sampled rows, over their share of the squared gradients; which rows is fixed by a
group's name.

Rows are encoded on their own: formats know no row but the one that they encode. A sixteenth of the
rows costs a sixteenth of the encoding, which is nearly all that a profile costs. The measured
changes need all rows; where prices are of a sample, changes are made in formats that encode fast:
the ones nearest to the anchors' bits take hours for what a pass reads in minutes.
"""

import zlib
from collections.abc import Iterable, Iterator
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
from allocator.profiling.inputs import FAST_WEIGHTS_PER_SECOND
from allocator.profiling.profile_files import Lines
from allocator.profiling.profiler import (
    CURVATURE,
    STATISTICS,
    Losses,
    Profiler,
    nearest_format,
)
from allocator.profiling.statistics import Statistics, collect_streamed
from allocator.profiling.streamed_gradient import measure_streamed
from allocator.scoring.candidates import Candidate, Weights
from allocator.scoring.scorer import mean
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import StreamedScorer
from allocator.targets import Group

_LEAST_SIDE_BY_SIDE = 8
"""Changes that are measured in one pass, at least: each has hidden states of its own from its
layer on."""
_STATES_BYTES = 256 << 20
"""Of hidden states in one pass; while experts run there are four times as many."""


class _SettledFile(msgspec.Struct, forbid_unknown_fields=True):
    """`settled.json`: rows of prices whose layers' gradients may be relied on."""

    n_rows: int


class StreamedProfiler(Profiler):
    """Builds a profile layer by layer, see the module.

    Attributes:
        least_rows: rows of a matrix that are priced at least, however small their share.
    """

    least_rows = 16

    @cached_property
    def model(self) -> StreamedModel:
        """The original, layer by layer."""
        weights = Weights(self.layout, lambda: self.encodings)
        return StreamedModel(self.layout, weights, device=self.torch_device)

    def measure_statistics(self) -> Statistics:
        """Runs the original over the calibration documents; a stopped pass resumes."""
        return collect_streamed(
            self.model,
            self.inputs.documents,
            scratch=self.files.scratch(STATISTICS),
            of=self.files.digest,
            progress=self.progress,
        )

    def measure_curvature(self) -> Losses:
        """Prices every offered format of every group, sampled rows; a stopped pass resumes."""
        prices = _PricesInProgress(self.files.scratch(CURVATURE), self.files.digest)

        def take(group: Group, expert: int | None, curvature: Curvature) -> None:
            prices.add(group, expert, self._priced(group, expert, curvature))

        _ = self.encodings  # its importance takes a pass of the same model
        measure_streamed(
            self.model, self.inputs.curvature_documents, take, prices.settle,
            scratch=prices.folder, of=self.files.digest, progress=self.progress,
        )  # fmt: skip
        losses: Losses = {}
        for group in self.layout.groups.values():
            n = group.shape[0] if group.role.is_expert else 1
            losses[group.name] = {fmt.name: [0.0] * n for fmt in self._priced_formats(group)}
        for row in prices.lines.rows:
            for name, price in row["prices"].items():
                losses[row["group"]][name][row["expert"]] = price
        return losses

    def _priced(self, group: Group, expert: int | None, curvature: Curvature) -> dict[str, float]:
        """By format, what the sampled rows say that the whole group or expert loses."""
        rows = self._rows(group, expert, curvature)
        weights = self._weights(group, expert, rows)
        importance = self._importance(group, expert, rows)
        prices = {}
        for fmt in self._priced_formats(group):
            codec = codec_of(fmt)
            encoded = codec.encode(weights, fmt, importance, threads=self.threads)
            change = codec.decode(encoded, fmt) - weights
            prices[fmt.name] = curvature.price_sample(group, change, rows, expert or 0)
        return prices

    def measure_losses(self, candidates: Iterable[Candidate]) -> Iterator[float]:
        """Yields the loss of each candidate; several share a pass."""
        scorer = StreamedScorer(
            self.model, self.inputs.measured_documents, side_by_side=self.side_by_side
        )
        for losses in scorer.each(candidates):
            yield mean(losses.kl, scorer.documents)

    @property
    def side_by_side(self) -> int:
        """Changes that are measured in one pass."""
        width = self.layout.inventory.dimensions.hidden
        state_bytes = 4 * width * self.inputs.measured_tokens
        return max(_LEAST_SIDE_BY_SIDE, _STATES_BYTES // state_bytes)

    def anchor(self, group: Group, bits: float) -> str:
        """Returns the nearest offered format, or with sampled rows the nearest that is fast."""
        if self.inputs.sampled_rows == 1:
            return nearest_format(group.offered(), bits)
        fast = (
            f
            for f in FORMATS.values()
            if codec_of(f).weights_per_second(f) >= FAST_WEIGHTS_PER_SECOND
        )
        return nearest_format(filter(group.can_hold, fast), bits)

    def _priced_formats(self, group: Group) -> list[Format]:
        """Offered formats, and those of the measured changes."""
        anchors = [format_named(self.anchor(group, bits)) for bits in self.inputs.anchor_bits]
        return list(dict.fromkeys((*group.offered(), *anchors)))

    def _rows(self, group: Group, expert: int | None, curvature: Curvature) -> Ints:
        """Rows (of groups with heads: heads) that stand for all, ascending, `(rows,)`."""
        assert self.inputs.sampled_rows is not None
        n_rows = group.shape[1] if group.role.is_expert else group.shape[0]
        n_sampled = min(n_rows, max(self.least_rows, round(self.inputs.sampled_rows * n_rows)))
        rng = np.random.default_rng(zlib.crc32(f"{group.name} {expert}".encode()))
        rows = np.sort(rng.permutation(n_rows)[:n_sampled])
        if group.role is Role.EMBEDDING:
            rows = np.union1d(rows, curvature.looked_up)
        return rows

    def _weights(self, group: Group, expert: int | None, rows: Ints) -> Floats:
        """The original's values of some rows, `(rows, ..., in)`."""
        if group.role not in (Role.EMBEDDING, Role.HEAD):
            return self.model.weights.of(self.model.original, group, expert)[rows]
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
        chosen: Floats = importance[rows if expert is None else expert]
        return chosen


class _PricesInProgress:
    """Prices that a curvature pass has appended, so that a stopped pass resumes.

    Args:
        folder: of the pass, which its gradients are in too.
        of: digest of the inputs that the prices belong to.
    """

    def __init__(self, folder: Path, of: str) -> None:
        self.folder = folder
        self._of = of
        self._settled = folder / "settled.json"
        self.lines = Lines(folder / "prices.jsonl", of)
        settled = read_checked(self._settled, _SettledFile, of)
        if settled is None or self.lines.n_dropped or settled.n_rows > len(self.lines.rows):
            for gradients in folder.glob("gradients-*"):  # their layers' prices are lost
                gradients.unlink()

    def add(self, group: Group, expert: int | None, prices: dict[str, float]) -> None:
        """Appends the prices of a group, or of one of its experts."""
        self.lines.append({"group": group.name, "expert": expert or 0, "prices": prices})

    def settle(self) -> None:
        """Waits until the disk has all prices, before the pass notes that a layer is finished."""
        self.lines.sync()
        write_checked(self._settled, _SettledFile(len(self.lines.rows)), self._of)
