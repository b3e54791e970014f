"""Compares the decisions of two allocation files.

In: two files, records or plain `allocation.json`. Out: a row per decision that differs, and a line
on checkpoints, losses, bytes and importance. Invariant: read-only; files for different checkpoints
or targets are compared where they name the same decisions.

The same study on another kind of processor is the usual reason: its forward passes round otherwise,
importance vectors differ in their last bits, and encoded weights, losses and picks follow.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import (
    AllocationRecord,
    importance_name,
    read_allocation,
    read_importance,
)
from allocator.decision.parameters import (
    EXPERTS_USED,
    KV_FORMAT,
    MICRO_BATCH,
    ExpertsOf,
    FormatOf,
)


@dataclass(frozen=True)
class Difference:
    """The differences between two allocation files.

    Attributes:
        rows: columns `decision`, `one`, `other`; for `retained.<layer>` the experts that the other
            file does not retain.
        line: how many decisions differ, of how many, and other differences.
    """

    rows: pd.DataFrame
    line: str


def difference(one: str | Path, other: str | Path) -> Difference:
    """Compares two allocation files.

    Raises:
        SpaceError: if a file is no allocation file.
        CheckpointError: if its file of importance vectors is damaged.
    """
    paths = Path(one), Path(other)
    (a, a_record), (b, b_record) = (read_allocation(path) for path in paths)
    mine, its = _decisions(a), _decisions(b)
    shared = [name for name in mine if name in its]
    rows = [_row(name, mine[name], its[name]) for name in shared if mine[name] != its[name]]
    clauses = [f"{len(rows)} of {len(shared)} decisions differ"]
    if alone := len(mine.keys() ^ its.keys()):
        clauses.append(f"{alone} more are in one file alone")
    if a.target != b.target:
        clauses.append(f"targets {a.target} and {b.target}")
    if a_record is not None and b_record is not None:
        clauses += _of_records(paths, a_record, b_record)
    return Difference(pd.DataFrame(rows, columns=["decision", "one", "other"]), "; ".join(clauses))


def _decisions(allocation: Allocation) -> dict[str, Any]:
    """Values by decision; the set of experts for `retained.<layer>`."""
    return {
        **{FormatOf(group).name: fmt for group, fmt in allocation.formats},
        **{ExpertsOf(layer).name: len(experts) for layer, experts in allocation.retained},
        **{f"retained.{layer}": frozenset(experts) for layer, experts in allocation.retained},
        EXPERTS_USED.name: allocation.experts_used,
        KV_FORMAT.name: allocation.kv_format,
        MICRO_BATCH.name: allocation.micro_batch,
    }


def _row(name: str, one: Any, other: Any) -> dict[str, Any]:
    if isinstance(one, frozenset):
        one, other = (" ".join(map(str, sorted(x))) for x in (one - other, other - one))
    return {"decision": name, "one": one, "other": other}


def _of_records(
    paths: tuple[Path, Path], one: AllocationRecord, other: AllocationRecord
) -> list[str]:
    """Clauses on checkpoints, losses, bytes and importance."""
    clauses = []
    if one.checkpoint != other.checkpoint:
        clauses.append(f"other checkpoint ({one.checkpoint[:12]} and {other.checkpoint[:12]})")
    losses = [
        f"{split} {one.loss[split]:.6f} and {other.loss[split]:.6f}"
        for split in one.loss
        if split in other.loss
    ]
    if losses:
        clauses.append(f"{', '.join(losses)} nats per token")
    for what in ("file", "encoded"):
        if what in one.bytes and what in other.bytes:
            clauses.append(f"{one.bytes[what]:,} and {other.bytes[what]:,} {what} bytes")
            break
    if one.codec != other.codec:
        clauses.append(f"encoded by {one.codec} and {other.codec}")
    return [*clauses, _of_importance(paths, one.importance, other.importance)]


def _of_importance(paths: tuple[Path, Path], one: str, other: str) -> str:
    if one == other:
        return "same importance"
    files = [p.parent / importance_name(d) for p, d in zip(paths, (one, other), strict=True)]
    if not all(file.is_file() for file in files):
        return f"importance differs ({one[:12]} and {other[:12]})"
    mine, its = (read_importance(file) for file in files)
    shared = [n for n in mine if n in its and mine[n].shape == its[n].shape]
    apart = max((_apart(mine[n], its[n]) for n in shared), default=0.0)
    return f"importance differs by at most {apart:.1e} of a value in {len(shared)} shared vectors"


def _apart(one: Any, other: Any) -> float:
    """The largest difference of two values of two vectors, over the greater of both values."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    greater = np.maximum(np.abs(a), np.abs(b))
    apart = np.divide(np.abs(a - b), greater, out=np.zeros_like(a), where=greater > 0)
    return float(apart.max(initial=0.0))
