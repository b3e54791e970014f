"""Results as JSON has them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from allocator.app.plain_values import plain


def test_values_are_as_json_has_them():
    @dataclass
    class Result:
        path: Path
        loss: float
        counts: dict
        _private: int = 3

    result = Result(Path("a/b"), float("nan"), {0: np.int64(7), 1: object()})
    assert plain(result) == {"path": "a/b", "loss": None, "counts": {"0": 7}}


def test_a_table_is_rows_with_whole_sizes():
    table = pd.DataFrame({"name": ["a", "b"], "up_bytes": [5, None], "kl": [0.5, float("inf")]})
    table.attrs["notes"] = ("odd",)
    made = {
        "rows": [
            {"name": "a", "up_bytes": 5, "kl": 0.5},
            {"name": "b", "up_bytes": None, "kl": None},
        ],
        "notes": ["odd"],
    }
    assert json.dumps(plain(table)) == json.dumps(made)
