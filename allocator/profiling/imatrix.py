"""Importance vectors of a checkpoint's groups from a file of llama-imatrix.

In: the file, and a layout. Out: vectors by group, in the group's columns. Invariants: the file is
held against the checkpoint, tensor by tensor; what is taken otherwise than the file has it, or not
at all, is a line of `notes`; a vector has no zeros, as those of `profiling.statistics`.

A file of llama-imatrix is over the columns of a GGUF's matrices. For another target, columns are
put into its own order, and pieces of one matrix, which read the same inputs, are averaged.

llama-imatrix leaves out what it does not see: the embedding; the head, unless `--process-output`
is given; and halves of latent attention, by kind of attention. Groups without a vector are measured
by the study's own calibration pass.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from allocator.checkpoint.gguf.imatrix import Imatrix, Means, read_imatrix
from allocator.checkpoint.tensors import Floats
from allocator.errors import AllocatorError, CalibrationError
from allocator.families import Role
from allocator.targets import GGUF, Group, Layout

_MAY_LACK = (Role.EMBEDDING, Role.HEAD, Role.K_B, Role.V_B)
_WHOLE_KV_B = re.compile(r"blk\.\d+\.attn_kv_b\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_WAY_OUT = "make it with llama-imatrix from a GGUF of this checkpoint with all its experts"


@dataclass(frozen=True)
class GivenImportance:
    """Importance that a study does not measure.

    Attributes:
        sha256: of the file.
        vectors: per group, float32 `(in,)`, `(heads, in)` or `(experts, in)`; groups may be absent.
        notes: lines on what was taken otherwise than the file has it, and what was not.
    """

    sha256: str
    vectors: Mapping[str, Floats]
    notes: tuple[str, ...]


def given_importance(path: Path, layout: Layout) -> GivenImportance:
    """Reads importance vectors from a file of llama-imatrix.

    Args:
        path: of the file, GGUF or binary.
        layout: whose groups get vectors.

    Raises:
        CalibrationError: if the file is damaged, of another checkpoint, or of a pruned one.
    """
    imatrix = read_imatrix(path)
    in_gguf = _gguf_layout(path, layout)
    bound = _Bound(imatrix, in_gguf)
    vectors = bound.vectors()
    if in_gguf.target != layout.target:
        vectors = _translated(vectors, in_gguf, layout)
    absent = [g.name for g in layout.groups.values() if g.importance and g.name not in vectors]
    notes = [*imatrix.notes, *bound.notes]
    if absent:
        notes.append(
            f"{path.name}: measured by the calibration pass, because the file does not have them: "
            f"{_listed(absent)}"
        )
    return GivenImportance(imatrix.sha256, vectors, tuple(notes))


def _gguf_layout(path: Path, layout: Layout) -> Layout:
    try:
        return GGUF.layout(layout.inventory)
    except AllocatorError as error:
        raise CalibrationError(
            f"{path}: an imatrix has llama.cpp's names, which this checkpoint has none of: {error}"
        ) from None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class _Bound:
    """A file held against a layout of target gguf."""

    def __init__(self, imatrix: Imatrix, layout: Layout) -> None:
        self._imatrix, self._layout = imatrix, layout
        self._unused = dict(imatrix.tensors)
        self._unreached: list[str] = []
        self._padded = 0
        self.notes: list[str] = []

    def vectors(self) -> dict[str, Floats]:
        vectors: dict[str, Floats] = {}
        missing: list[Group] = []
        for group in self._layout.groups.values():
            if not group.importance:
                continue
            name = self._name(group)
            if name is None:
                missing.append(group)
                continue
            self._unused.pop(name, None)
            vectors[group.name] = self._vector(group, name, self._imatrix.tensors[name])
        self._check_missing(missing, len(vectors))
        self._check_unused()
        if self._unreached:
            self.notes.append(
                f"{self._file}: no token of its text reached {_listed(self._unreached)}; these "
                "experts have the mean of their layer's"
            )
        if self._padded:
            self.notes.append(
                f"{self._file}: {self._padded} matrices are as wide as unpadded experts; their "
                "vectors are padded with zeros"
            )
        return vectors

    @property
    def _file(self) -> str:
        return self._imatrix.path.name

    def _fail(self, what: str) -> CalibrationError:
        return CalibrationError(f"{self._imatrix.path}: {what}; {_WAY_OUT}")

    def _name(self, group: Group) -> str | None:
        """What the file calls a group; gate and up in one tensor read the same inputs."""
        both = re.sub(r"ffn_(gate|up)_exps", "ffn_gate_up_exps", group.stored_as)
        return next((n for n in (group.stored_as, both) if n in self._imatrix.tensors), None)

    def _vector(self, group: Group, name: str, means: Means) -> Floats:
        *outer, width = (*group.shape[:-2], group.shape[-1])
        n_matrices = prod(outer)
        values = means.values
        by_head = not group.role.is_expert
        if by_head and len(values) == width:  # older versions have one vector for all heads
            values = np.tile(values, n_matrices)
        narrow = self._unpadded(group)
        if len(values) == n_matrices * narrow != n_matrices * width:
            rows = np.zeros((n_matrices, width), np.float32)
            rows[:, :narrow] = values.reshape(n_matrices, narrow)
            values, self._padded = rows.reshape(-1), self._padded + 1
        if len(values) != n_matrices * width or len(means.counts) not in (1, n_matrices):
            raise self._fail(
                f"{name} has {len(means.counts)} counts and {len(means.values)} values, this "
                f"checkpoint's has {n_matrices} matrices of {width} columns"
            )
        counts = np.broadcast_to(means.counts, n_matrices)
        rows = np.array(values, np.float32).reshape(n_matrices, width)
        reached = counts > 0
        if group.role.is_expert:
            if self._imatrix.is_binary:  # which has ones in place of what no token reached
                reached = reached & (rows != 1).any(1) & (rows != 0).any(1)
            self._unreached += [f"{name} expert {i}" for i in np.flatnonzero(~reached)]
        if not reached.any() or (not group.role.is_expert and not reached.all()):
            raise self._fail(f"no token reached {name}: its counts are zero")
        mean = np.average(rows[reached], axis=0, weights=counts[reached])
        rows[~reached] = mean.astype(np.float32)
        least = np.float32(rows.mean() * 1e-6 + 1e-30)
        rows = np.where(rows > 0, rows, least).astype(np.float32)
        return rows.reshape(*outer, width)

    def _unpadded(self, group: Group) -> int:
        """Columns of a group's matrices before their experts were padded."""
        source = self._layout.inventory.tensors[group.sources[0]]
        moved = group.is_rearranged or group.role in (Role.K_B, Role.V_B)
        return group.shape[-1] if moved or source.unpadded is None else source.unpadded[-1]

    def _check_missing(self, missing: Sequence[Group], n_there: int) -> None:
        names = [group.stored_as for group in missing if group.role not in _MAY_LACK]
        if names:
            raise self._fail(
                f"no entry for {len(names)} of this checkpoint's {n_there + len(missing)} "
                f"matrices ({_listed(names)})"
            )

    def _check_unused(self) -> None:
        """Refuses entries of no tensor of the checkpoint; notes those that are of no use."""
        unencoded = {tensor.stored_as for tensor in self._layout.full_precision}
        n_layers = self._layout.inventory.n_layers
        has_halves = any(g.role is Role.V_B for g in self._layout.groups.values())
        reasons: dict[str, list[str]] = defaultdict(list)
        unknown = []
        for name in self._unused:
            layer = _LAYER.match(name)
            if name in unencoded:
                reasons["stay in full precision"].append(name)
            elif layer is not None and int(layer[1]) >= n_layers:
                reasons["are of multi-token prediction, which is left out"].append(name)
            elif has_halves and _WHOLE_KV_B.fullmatch(name):
                reasons["are of a matrix that the file has in two halves"].append(name)
            else:
                unknown.append(name)
        if unknown:
            raise self._fail(
                f"{len(unknown)} entries are of no matrix of this checkpoint ({_listed(unknown)})"
            )
        for why, names in reasons.items():
            self.notes.append(f"{self._file}: {len(names)} entries {why} ({_listed(names)})")


def _translated(
    vectors: Mapping[str, Floats], in_gguf: Layout, layout: Layout
) -> dict[str, Floats]:
    """Vectors for the groups of another target: in the columns of the checkpoint's matrices."""
    by_source: dict[str, list[Floats]] = defaultdict(list)
    for group in in_gguf.groups.values():
        if group.name not in vectors or group.role in (Role.K_B, Role.V_B):
            continue
        vector = vectors[group.name]
        if group.columns is not None:
            own = np.empty_like(vector)
            own[..., list(group.columns)] = vector
            vector = own
        by_source[group.sources[0]].append(vector)
    return {
        group.name: _mean(by_source[group.sources[0]])
        for group in layout.groups.values()
        if group.importance and group.sources[0] in by_source
    }


def _mean(vectors: Sequence[Floats]) -> Floats:
    if len(vectors) == 1:
        return vectors[0]
    mean: Floats = np.stack(vectors).astype(np.float64).mean(0).astype(np.float32)
    return mean
