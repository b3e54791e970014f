"""Two allocation files side by side: what differs is what was changed by hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from allocator import api
from allocator.cli import main
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError

PICK = Path(__file__).parents[2] / "studies/reference/allocations/pick.json"


@pytest.fixture
def change(tmp_path):
    """`change(name, edit, **keys)`: the reference's pick with its decision edited; a record."""

    def make(name, edit=lambda decision: None, **keys):
        data = json.loads(PICK.read_text()) | keys
        for key in ("checksum", "weights", "finishing"):  # a hand-made change, of nothing finished
            del data[key]
        edit(data["allocation"])
        data["digest"] = Allocation.from_json(data["allocation"]).digest
        path = tmp_path / name / "pick.json"
        path.parent.mkdir()
        path.write_text(json.dumps(data))
        return path

    return make


@pytest.fixture
def shown(capsys):
    """Table rows and closing line that the command prints."""

    def run(one, other):
        assert main(["diff", str(one), str(other)]) == 0
        lines = capsys.readouterr().out.splitlines()
        end = next(i for i, line in enumerate(lines) if " decisions differ" in line)
        return lines[1:end], " ".join(lines[end:])

    return run


def n_decisions():
    allocation = json.loads(PICK.read_text())["allocation"]
    return len(allocation["formats"]) + 2 * len(allocation["retained"]) + 3


def test_every_kind_of_decision_has_a_row(change, shown):
    def edit(decision):
        decision["formats"]["embedding"] = "BF16"
        layer = min(decision["retained"])
        decision["retained"][layer] = decision["retained"][layer][1:]
        decision |= {"experts_used": 1, "kv_format": "q8_0", "micro_batch": 64}

    other = change("other", edit)
    before = json.loads(PICK.read_text())["allocation"]
    layer = min(before["retained"])
    experts = before["retained"][layer]
    rows = api.diff(PICK, other)
    assert rows.set_index("decision").to_dict("index") == {
        "format.embedding": {"one": before["formats"]["embedding"], "other": "BF16"},
        f"experts.{layer}": {"one": len(experts), "other": len(experts) - 1},
        f"retained.{layer}": {"one": str(experts[0]), "other": ""},
        "experts_used": {"one": before["experts_used"], "other": 1},
        "kv_format": {"one": before["kv_format"], "other": "q8_0"},
        "micro_batch": {"one": before.get("micro_batch"), "other": 64},
    }
    printed, line = shown(PICK, other)
    assert [row.split()[0] for row in printed] == list(rows["decision"])
    assert line.startswith(f"6 of {n_decisions()} decisions differ; search ")


def test_other_experts_of_the_same_count(change):
    def edit(decision):
        layer = min(decision["retained"])
        kept = set(decision["retained"][layer])
        free = min(set(range(24)) - kept)
        decision["retained"][layer] = sorted(kept - {max(kept)} | {free})

    def fewer(decision):
        layer = min(decision["retained"])
        decision["retained"][layer] = decision["retained"][layer][:-1]

    one = change("one", fewer)  # a file of which an expert is free
    other = change("other", lambda decision: (fewer(decision), edit(decision)))
    (row,) = api.diff(one, other).to_dict("records")
    layer = row["decision"].removeprefix("retained.")
    before, after = (
        set(json.loads(p.read_text())["allocation"]["retained"][layer]) for p in (one, other)
    )
    assert row["one"] == str(*(before - after))
    assert row["other"] == str(*(after - before))


def test_the_line_names_losses_bytes_importance_and_checkpoint(change, shown):
    record = json.loads(PICK.read_text())
    rows, line = shown(PICK, PICK)
    assert not rows
    assert line.startswith(f"0 of {n_decisions()} decisions differ; ")
    assert line.endswith("; same importance")
    assert f"{record['bytes']['file']:,} and {record['bytes']['file']:,} file bytes" in line
    far = change(
        "far", lambda d: d | {}, importance="0" * 64, checkpoint="1" * 64, codec="ggml 0",
        loss={"search": 0.5},
    )  # fmt: skip
    rows, line = shown(PICK, far)
    assert not rows
    for part in (
        f"search {record['loss']['search']:.6f} and 0.500000 nats per token",
        f"other checkpoint ({record['checkpoint'][:12]} and 111111111111)",
        f"encoded by {record['codec']} and ggml 0",
        f"importance differs ({record['importance'][:12]} and 000000000000)",
    ):
        assert part in line
    assert "selection" not in line


@pytest.mark.parametrize("factor", [1 + 1e-3, 3.0, 0.5, 0.0])
def test_importance_beside_both_is_compared(change, shown, factor):
    """One value of one vector is multiplied: that is the largest relative difference."""
    record = json.loads(PICK.read_text())
    vectors = load_file(PICK.parent / f"importance-{record['importance'][:12]}.safetensors")
    name = next(n for n, v in vectors.items() if v.max() > 0)
    where = np.unravel_index(vectors[name].argmax(), vectors[name].shape)
    vectors[name][where] *= factor
    other = change("other", importance="ab" * 32)
    save_file(vectors, other.parent / "importance-abababababab.safetensors")
    apart = abs(factor - 1) / max(factor, 1)
    _, line = shown(PICK, other)
    assert line.endswith(f"by at most {apart:.1e} of a value in {len(vectors)} shared vectors")
    (other.parent / "importance-abababababab.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        api.diff(PICK, other)


def test_plain_files_of_other_targets_are_compared_where_they_can_be(tmp_path, shown):
    decision = json.loads(PICK.read_text())["allocation"]
    target = {"gguf": "safetensors", "safetensors": "gguf"}[decision["target"]]
    formats = {name: fmt for name, fmt in decision["formats"].items() if name != "embedding"}
    plain = tmp_path / "allocation.json"
    plain.write_text(json.dumps(decision | {"target": target, "formats": formats}))
    rows, line = shown(PICK, plain)
    assert not rows
    assert line == (
        f"0 of {n_decisions() - 1} decisions differ; 1 more are in one file alone; "
        f"targets {decision['target']} and {target}"
    )


def test_what_is_no_allocation_is_one_line(tmp_path, capsys):
    odd = tmp_path / "odd.json"
    for text in (None, "{", '{"a": 1}'):
        if text is not None:
            odd.write_text(text)
        assert main(["diff", str(PICK), str(odd)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert str(odd) in err


def test_it_does_not_load_torch():
    code = (
        f"import sys; from allocator.cli import main; main(['diff', {str(PICK)!r}, {str(PICK)!r}])"
        "; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
