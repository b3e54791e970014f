"""Tables of a study's committed files, for notebooks and reports.

In: `front.json`, `baselines.csv`, `held-out.json`, allocation records. Out: pandas tables.
Invariant: read-only; these files alone are read, and no checkpoint or journal; torch is never
loaded.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from allocator.app.held_out_file import HeldOut
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import StudyError, reason
from allocator.files.checksums import unseal
from allocator.formats import format_named
from allocator.study.trials import SEARCHED

THIS_STUDY = "this study"
"""Calibration of baselines that the study itself measured."""
BASELINE_COLUMNS = ("calibration", "target", "split", "name", "bytes", "kl")
OUTSIDE = "outside"
"""Row of an allocation's grid for the tensors outside the layers: embedding and head."""


def front_table(folder: str | Path) -> pd.DataFrame:
    """Reads every scored trial of `front.json`, losses on the search split in nats per token.

    Returns:
        The columns of `api.trials_table`, and `series` (`knapsack`, `proposal` or `baseline`),
        `complete` (scored on the full split; a lost race's loss is over its first `tokens` only)
        and `on_front`.

    Raises:
        StudyError: if the folder has no readable `front.json`, or it holds no trial.
    """
    path = Path(folder) / "front.json"
    try:
        data = unseal(path.read_bytes())
        if unknown := set(data) - {"schema", "split", "lock", "front", "trials"}:
            raise ValueError(f"unknown key {min(unknown)!r}")
        schema, trials = data["schema"], data["trials"]
        chosen = {row["trial"] for row in data["front"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StudyError(
            f"{path}: no front ({reason(error)}); run `allocator search`, or write it again: "
            "`allocator front`"
        ) from None
    if schema != 1:
        raise StudyError(f"{path}: schema {schema}, needed 1; write it again: `allocator front`")
    if not trials:
        raise StudyError(f"{path}: no scored trial yet; give the search more --trials or --time")
    return with_series(pd.DataFrame(trials), chosen)


def with_series(table: pd.DataFrame, on_front: Collection[int]) -> pd.DataFrame:
    """Returns rows of `api.trials_table` with the further columns of `front_table`.

    Args:
        table: with at least one row.
        on_front: numbers of the trials on the front.
    """
    return table.assign(
        series=[SEARCHED.get(kind, "baseline") for kind in table["kind"]],
        complete=table["state"] == "COMPLETE",
        on_front=table["trial"].isin(list(on_front)),
    )


def baselines_table(folder: str | Path) -> pd.DataFrame:
    """Reads the held-out baselines of a study: `kl` in nats per token.

    They are those of `baselines.csv`, where somebody made one, then those that `evaluate` kept in
    `held-out.json` (`calibration` is `this study`). Without either file there are no rows.

    Raises:
        StudyError: if a column is missing, or a file is damaged.
    """
    path = Path(folder) / "baselines.csv"
    tables = []
    if path.exists():
        table = pd.read_csv(path)
        if missing := [c for c in BASELINE_COLUMNS if c not in table]:
            raise StudyError(f"{path}: no column {missing[0]!r}, got {list(table)}; write it again")
        tables.append(table)
    if (held_out := HeldOut.read(Path(folder))) is not None:
        rows = [
            (THIS_STUDY, held_out.target, split.split, row.name, row.bytes, row.kl)
            for split in held_out.longest
            for row in split.baselines
        ]
        tables.append(pd.DataFrame(rows, columns=list(BASELINE_COLUMNS)))
    tables = [table for table in tables if len(table)]
    if not tables:
        return pd.DataFrame(columns=BASELINE_COLUMNS)
    return pd.concat(tables, ignore_index=True)


def held_out_table(folder: str | Path) -> pd.DataFrame:
    """Reads the held-out figures of allocation files that `evaluate` kept.

    Returns:
        A row per split and allocation file, `unfinished` where its weights are: `split`, `name`,
        `allocation` (digest), `weights` (digest of finished ones), `bytes`, `kl` (nats per token),
        `perplexity`, `top1`; no rows where nothing was evaluated.

    Raises:
        StudyError: if the file is damaged.
    """
    held_out = HeldOut.read(Path(folder))
    columns = ["name", "allocation", "weights", "bytes", "kl", "perplexity", "top1"]
    rows = [
        {"split": split.split} | {c: getattr(row, c) for c in columns}
        for split in (() if held_out is None else held_out.longest)
        for row in split.rows
        if row.kind == "allocation"
    ]
    return pd.DataFrame(rows, columns=["split", *columns])


def allocation_grid(allocation: Allocation) -> pd.DataFrame:
    """Returns formats, `layers x roles`; the empty string where a layer has no such tensor.

    Parts are shown with their numbers of experts: `IQ2_XXS*8+IQ1_S*16`. Rows are layer numbers as
    text, ascending, then `OUTSIDE`. Columns are group names without their `layers.<n>.`, such as
    `experts.down`, then the groups outside the layers.
    """
    layers: dict[int, dict[str, str]] = {}
    outside: dict[str, str] = {}
    for group, text in allocation.formats:
        fmt = "+".join(f"{name}*{n}" if n else name for name, n in _counted(text))
        if group.startswith("layers."):
            _, layer, role = group.split(".", 2)
            layers.setdefault(int(layer), {})[role] = fmt
        else:
            outside[group] = fmt
    rows = {str(layer): layers[layer] for layer in sorted(layers)} | {OUTSIDE: outside}
    roles = sorted({role for row in layers.values() for role in row}) + sorted(outside)
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=roles).fillna("")


def grid_bits(grid: pd.DataFrame) -> pd.DataFrame:
    """Returns the effective bits per weight of a grid, `layers x roles`; NaN for empty cells."""
    return grid.map(lambda cell: _bits(cell) if cell else math.nan)


def _counted(text: str) -> list[tuple[str, int]]:
    """Formats of a group and the number of experts in each; 0 for a plain format."""
    pieces = [piece.partition(":") for piece in text.split("+")]
    return [(name, experts.count(",") + 1 if experts else 0) for name, _, experts in pieces]


def _bits(cell: str) -> float:
    pieces = [piece.partition("*") for piece in cell.split("+")]
    rows = [(format_named(name).bits, int(n or 1)) for name, _, n in pieces]
    return sum(bits * n for bits, n in rows) / sum(n for _, n in rows)


def records_table(records: Sequence[AllocationRecord]) -> pd.DataFrame:
    """Returns bytes, bits, losses and retained experts of allocations, one column each.

    Losses of finished weights have rows of their own where a record names some.
    """
    columns = {}
    for record in records:
        counts = record.decision.counts.values()
        finished = {} if record.finished is None else record.finished.after
        columns[record.name] = (
            {"from a trial of kind": record.kind}
            | {f"{name} (bytes)": n for name, n in record.bytes.items()}
            | {"effective bits": round(record.effective_bits, 4)}
            | {f"KL on {s} (nats/token)": round(v, 5) for s, v in record.loss.items()}
            | {f"KL on {s}, finished": round(v, 5) for s, v in finished.items()}
            | {"retained experts per layer": " ".join(map(str, counts))}
            | {"digest": record.digest[:12]}
        )
    return pd.DataFrame(columns)
