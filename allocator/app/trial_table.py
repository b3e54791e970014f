"""The trials of a study as a table, and its front.

In: an Optuna study. Out: a row per scored trial, and `front.json`. Invariant: abandoned trials and
trials that still run are in neither.
"""

from typing import Any

import optuna
import pandas as pd

from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation import Allocation
from allocator.decision.front import Point
from allocator.decision.front import front as front_of
from allocator.files.atomic import write_whole
from allocator.files.checksums import seal
from allocator.study.optuna_study import LOCK
from allocator.study.trials import KIND, RESULT, allocation_of, is_abandoned


def trials_table(study: optuna.Study) -> pd.DataFrame:
    """Returns a row per scored trial: kind, state, bytes, losses, retained counts."""
    rows = []
    for t in study.get_trials(deepcopy=False):
        if RESULT not in t.user_attrs or is_abandoned(t) or not t.state.is_finished():
            continue
        result = t.user_attrs[RESULT]
        allocation = allocation_of(t)
        rows.append(
            {
                "trial": t.number,
                "kind": t.user_attrs[KIND],
                "state": t.state.name,
                "bytes": result["bytes"]["encoded"],
                "file_bytes": result["bytes"]["file"],
                "effective_bits": result["effective_bits"],
                "loss": result["loss"],
                "predicted": result["predicted"],
                "tokens": result["tokens"],
                "top1": result["top1"],
                "experts": " ".join(str(n) for n in allocation.counts.values()),
            }
            | (_on_device(allocation, result) if "memory" in result else {})
        )
    return pd.DataFrame(rows)


def _on_device(allocation: Allocation, result: dict[str, Any]) -> dict[str, Any]:
    """Further columns of a trial under a device budget."""
    return {
        "memory_bytes": sum(result["memory"].values()),
        "token_bytes": result["token_bytes"],
        "tokens_per_second": result["tokens_per_second"],
        **allocation.runtime_settings._asdict(),
    }


def write_front(study_folder: StudyFolder, study: optuna.Study) -> pd.DataFrame:
    """Writes `front.json`; returns the front's rows of `trials_table`, as of `front_rows`."""
    table = trials_table(study)
    rows = front_rows(table)
    data = {
        "schema": 1,
        "split": "search",
        "lock": study.user_attrs.get(LOCK),
        "front": rows.to_dict("records"),
        "trials": table.to_dict("records"),
    }
    write_whole(study_folder.path / "front.json", seal(data))
    return rows


def front_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the non-dominated COMPLETE rows of `trials_table`, smallest first.

    Under a device budget the front has three axes: memory, loss, and bytes read per token.
    """
    done = table[table["state"] == "COMPLETE"] if len(table) else table
    size, read = ("memory_bytes", "token_bytes") if "memory_bytes" in done else ("bytes", None)
    points = [
        Point(str(r["trial"]), int(r[size]), float(r["loss"]), int(r[read]) if read else 0)
        for r in done.to_dict("records")
    ]
    chosen = [int(p.name) for p in front_of(points)]
    return done.set_index("trial").loc[chosen].reset_index() if chosen else done
