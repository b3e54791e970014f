"""Tables read from the committed files of a study, compared with the files themselves."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from allocator.app.held_out_file import HeldOutRow, HeldOutSplit, keep_row
from allocator.app.tables import (
    BASELINE_COLUMNS,
    OUTSIDE,
    allocation_grid,
    baselines_table,
    front_table,
    grid_bits,
    held_out_table,
    records_table,
)
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import StudyError

REFERENCE = Path(__file__).parents[2] / "studies/reference"


def trial(number, kind="proposal", state="COMPLETE"):
    return {"trial": number, "kind": kind, "state": state, "bytes": 10 - number, "loss": 0.1}


def write_front(folder, **changes):
    trials = [
        trial(0, "knapsack"),
        trial(1),
        trial(2, state="PRUNED"),
        trial(3, "IQ1_S / Q4_K"),
        trial(4, "IQ2_XXS", "PRUNED"),
    ]
    data = {"schema": 1, "split": "search", "lock": {}, "front": [trials[1]], "trials": trials}
    (folder / "front.json").write_text(json.dumps(data | changes))


def test_front_table_tells_the_series_apart(tmp_path):
    write_front(tmp_path)
    table = front_table(tmp_path)
    assert list(table["series"]) == ["knapsack", "proposal", "proposal", "baseline", "baseline"]
    assert list(table["complete"]) == [True, True, False, True, False]
    assert list(table["on_front"]) == [False, True, False, False, False]
    assert list(table["bytes"]) == [10, 9, 8, 7, 6]


def test_front_table_without_a_trial(tmp_path):
    write_front(tmp_path, front=[], trials=[])
    with pytest.raises(StudyError, match="no scored trial"):
        front_table(tmp_path)


def test_front_table_of_the_reference():
    table = front_table(REFERENCE)
    committed = json.loads((REFERENCE / "front.json").read_text())
    assert list(table[table["on_front"]].sort_values("bytes")["trial"]) == [
        row["trial"] for row in committed["front"]
    ]
    assert len(table) == len(committed["trials"])
    assert table[table["on_front"]]["complete"].all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "allocator search"),
        ("{", "no front"),
        ('{"schema": 1}', "'trials'"),
        ("[]", "no front"),
    ],
)
def test_front_table_of_no_front(tmp_path, content, said):
    if content is not None:
        (tmp_path / "front.json").write_text(content)
    with pytest.raises(StudyError, match=said):
        front_table(tmp_path)


def test_front_table_of_another_schema(tmp_path):
    write_front(tmp_path, schema=2)
    with pytest.raises(StudyError, match="schema 2, needed 1"):
        front_table(tmp_path)


def test_baselines_table(tmp_path):
    assert list(baselines_table(tmp_path)) == list(BASELINE_COLUMNS)
    assert len(baselines_table(tmp_path)) == 0
    (tmp_path / "baselines.csv").write_text(
        "calibration,target,split,name,bytes,kl\ngenerated,gguf,report,IQ1_S / Q4_K,7855104,0.16\n"
    )
    table = baselines_table(tmp_path)
    assert table.to_dict("records") == [
        {
            "calibration": "generated",
            "target": "gguf",
            "split": "report",
            "name": "IQ1_S / Q4_K",
            "bytes": 7855104,
            "kl": 0.16,
        }
    ]
    (tmp_path / "baselines.csv").write_text("target,bytes\ngguf,1\n")
    with pytest.raises(StudyError, match="no column 'calibration'"):
        baselines_table(tmp_path)


def test_held_out_figures_of_the_study_itself(tmp_path):
    """Of the longest measurement of a split; the original is no baseline."""
    (tmp_path / "baselines.csv").write_text(
        "calibration,target,split,name,bytes,kl\nwiki,gguf,report,Q2_K,9,0.5\n"
    )
    figures = {"perplexity": 2.0, "top1": 0.5, "bits": 2.0, "experts": ""}
    for n, name, kind in (
        (1, "short", "baseline"),
        (2, "original", "original"),
        (2, "Q4_K", "baseline"),
        (2, "pick", "allocation"),
    ):
        per_document = dict.fromkeys(("kl_of", "nll_of", "top1_of"), [0.25] * n)
        row = HeldOutRow(
            name=name, kind=kind, allocation="a", weights="", bytes=8, kl=0.25, **figures,
            **per_document,
        )  # fmt: skip
        empty = HeldOutSplit("report", f"of {n}", [4] * n, [""] * n, [])
        keep_row(tmp_path, "checkpoint", "gguf", empty, row)
    table = baselines_table(tmp_path)
    assert table[["calibration", "name", "kl"]].to_numpy().tolist() == [
        ["wiki", "Q2_K", 0.5],
        ["this study", "Q4_K", 0.25],
    ]
    assert held_out_table(tmp_path)[["split", "name", "bytes"]].to_numpy().tolist() == [
        ["report", "pick", 8]
    ]
    assert len(held_out_table(tmp_path / "nowhere")) == 0


FORMATS = {
    "embedding": "Q6_K",
    "head": "Q8_0",
    "layers.0.mlp.down": "Q5_K",
    "layers.10.experts.down": "IQ1_S",
    "layers.2.attention.o": "Q4_0",
    "layers.2.experts.down": "Q4_K",
}


def test_allocation_grid():
    allocation = Allocation.of(target="gguf", retained={}, formats=FORMATS, experts_used=2)
    grid = allocation_grid(allocation)
    expected = pd.DataFrame(
        [
            ["", "", "Q5_K", "", ""],
            ["Q4_0", "Q4_K", "", "", ""],
            ["", "IQ1_S", "", "", ""],
            ["", "", "", "Q6_K", "Q8_0"],
        ],
        index=["0", "2", "10", OUTSIDE],
        columns=["attention.o", "experts.down", "mlp.down", "embedding", "head"],
    )
    pd.testing.assert_frame_equal(grid, expected, check_dtype=False)
    bits = grid_bits(grid)
    assert bits.notna().to_numpy().tolist() == (expected != "").to_numpy().tolist()
    assert bits.loc["2", "attention.o"] == 4.5  # 18 bytes for 32 weights
    assert bits.loc["10", "experts.down"] == 1.5625  # 50 bytes for 256 weights


def test_allocation_grid_of_parts():
    formats = FORMATS | {"layers.2.experts.down": "IQ2_XXS:0,3,5+IQ1_S:1,2,4,7,8,9"}
    grid = allocation_grid(
        Allocation.of(target="safetensors", retained={}, formats=formats, experts_used=2)
    )
    assert grid.loc["2", "experts.down"] == "IQ2_XXS*3+IQ1_S*6"
    assert grid.loc["10", "experts.down"] == "IQ1_S"
    # 66 and 50 bytes for 256 weights, of 3 and 6 experts
    bits = (3 * 66 + 6 * 50) * 8 / (9 * 256)
    assert grid_bits(grid).loc["2", "experts.down"] == pytest.approx(bits)


@pytest.mark.parametrize("name", ["pick", "knapsack"])
def test_grid_of_the_reference_holds_every_group(name):
    path = REFERENCE / f"allocations/{name}.json"
    formats = json.loads(path.read_text())["allocation"]["formats"]
    grid = allocation_grid(AllocationRecord.read(path).decision)
    found = {
        role if layer == OUTSIDE else f"layers.{layer}.{role}": fmt
        for layer, row in grid.iterrows()
        for role, fmt in row.items()
        if fmt
    }
    assert found == formats


def test_records_table():
    records = [
        AllocationRecord.read(REFERENCE / f"allocations/{n}.json") for n in ("pick", "knapsack")
    ]
    table = records_table(records)
    plain = json.loads((REFERENCE / "allocations/pick.json").read_text())
    assert list(table) == ["pick", "knapsack"]
    assert table.loc["encoded (bytes)", "pick"] == plain["bytes"]["encoded"]
    assert table.loc["KL on selection (nats/token)", "pick"] == pytest.approx(
        plain["loss"]["selection"], abs=1e-5
    )
    counts = [str(len(kept)) for kept in plain["allocation"]["retained"].values()]
    assert table.loc["retained experts per layer", "pick"].split() == counts


def test_tables_need_the_committed_files_alone(tmp_path):
    shutil.copy(REFERENCE / "front.json", tmp_path)
    assert len(front_table(tmp_path))
