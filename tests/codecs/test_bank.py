"""The bank: what is encoded once, what is encoded anew, and what a crash leaves."""

import subprocess
import sys

import numpy as np
import pytest

from allocator.codecs.bank import Bank
from allocator.codecs.ggml import decode, encode
from allocator.codecs.source import group_weights
from allocator.errors import FormatError
from allocator.formats import FORMATS
from allocator.inventory import read_inventory
from allocator.targets import GGUF

UP, V_B = "layers.1.experts.up", "layers.1.attention.v_b"


@pytest.fixture
def layout(checkpoints):
    return GGUF.layout(read_inventory(checkpoints["deepseek"]))


def importance(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {UP: (8, 64), V_B: (256,), "embedding": (64,)}
    return {n: rng.lognormal(sigma=2, size=s).astype(np.float32) for n, s in shapes.items()}


def entries(folder):
    return sorted(folder.glob("*.bin"))


def test_an_entry_is_encoded_once(tmp_path, layout, monkeypatch):
    first = np.array(Bank(tmp_path, layout, importance()).encoded(UP, "Q4_0"))
    (entry,) = entries(tmp_path)
    before = entry.stat().st_mtime_ns
    monkeypatch.setattr(
        "allocator.codecs.ggml.encode", lambda *a, **k: pytest.fail("encoded again")
    )
    again = Bank(tmp_path, layout, importance()).encoded(UP, "Q4_0")
    np.testing.assert_array_equal(first, again)
    assert not again.flags.writeable
    assert entries(tmp_path) == [entry]
    assert entry.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", [UP, V_B])
def test_entries_are_the_codecs_bytes(tmp_path, layout, name):
    bank = Bank(tmp_path, layout, importance(), threads=2)
    fmt = FORMATS["IQ4_NL"]
    expected = encode(group_weights(layout, layout.groups[name]), fmt, importance()[name])
    np.testing.assert_array_equal(bank.encoded(name, fmt.name), expected)
    np.testing.assert_array_equal(bank.decoded(name, fmt.name), decode(expected, fmt))


def test_every_part_of_the_key_makes_another_entry(tmp_path, layout):
    Bank(tmp_path, layout, importance()).encoded(UP, "Q4_0")
    other = Bank(tmp_path, layout, importance(1)).encoded(UP, "Q4_0")
    assert len(entries(tmp_path)) == 2
    expected = encode(group_weights(layout, layout.groups[UP]), FORMATS["Q4_0"], importance(1)[UP])
    np.testing.assert_array_equal(other, expected)
    Bank(tmp_path, layout, {}).encoded(UP, "Q4_0")
    assert len(entries(tmp_path)) == 3
    Bank(tmp_path, layout, {}).encoded(UP, "Q5_0")
    assert len(entries(tmp_path)) == 4
    Bank(tmp_path, layout, {}).encoded("layers.2.experts.up", "Q5_0")
    assert len(entries(tmp_path)) == 5


def test_importance_of_a_group_that_has_none_is_left_out(tmp_path, layout):
    bank = Bank(tmp_path, layout, importance())
    assert not layout.groups["embedding"].importance  # looked up, not multiplied: the head is apart
    assert bank.group_importance("embedding") is None
    bank.encoded("embedding", "Q4_0")
    Bank(tmp_path, layout, {}).encoded("embedding", "Q4_0")
    assert len(entries(tmp_path)) == 1


def test_missing_importance_raises_and_leaves_nothing(tmp_path, layout):
    with pytest.raises(FormatError, match="needs an importance"):
        Bank(tmp_path, layout, {}).encoded(V_B, "IQ2_XXS")
    assert list(tmp_path.iterdir()) == []


def test_retained_experts_are_rows_of_the_entry(tmp_path, layout):
    bank, fmt, kept = Bank(tmp_path, layout, importance()), FORMATS["Q5_0"], (1, 4, 6)
    alone = encode(
        group_weights(layout, layout.groups[UP])[list(kept)], fmt, importance()[UP][list(kept)]
    )
    np.testing.assert_array_equal(bank.encoded(UP, "Q5_0")[list(kept)], alone)
    np.testing.assert_array_equal(bank.decoded(UP, "Q5_0", kept), decode(alone, fmt))


@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_entry_is_named(tmp_path, layout, size):
    bank = Bank(tmp_path, layout, importance())
    bank.encoded(UP, "Q4_0")
    (entry,) = entries(tmp_path)
    entry.write_bytes(entry.read_bytes()[:size])
    with pytest.raises(FormatError, match=f"{entry.name}: damaged.*delete it"):
        bank.encoded(UP, "Q4_0")
    entry.unlink()
    bank.encoded(UP, "Q4_0")


def test_a_write_that_fails_leaves_no_entry(tmp_path, layout, monkeypatch):
    bank = Bank(tmp_path, layout, importance())

    def full(handle):
        assert list(tmp_path.iterdir())  # half of it is there
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("allocator.files.os.fsync", full)
        with pytest.raises(OSError, match="full"):
            bank.encoded(UP, "Q4_0")
    assert list(tmp_path.iterdir()) == []
    bank.encoded(UP, "Q4_0")


def test_what_a_kill_leaves_is_no_entry(tmp_path, layout):
    whole = np.array(Bank(tmp_path / "a", layout, importance()).encoded(UP, "Q4_0"))
    (entry,) = entries(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f"{entry.name}.123.part").write_bytes(b"half")
    bank = Bank(tmp_path / "b", layout, importance())
    np.testing.assert_array_equal(bank.encoded(UP, "Q4_0"), whole)


WRITE = """
import sys
from pathlib import Path
from allocator.codecs.bank import Bank
from allocator.inventory import read_inventory
from allocator.targets import GGUF
layout = GGUF.layout(read_inventory(Path(sys.argv[1])))
bank = Bank(Path(sys.argv[2]), layout, {})
for name in layout.groups:
    bank.encoded(name, "Q8_0")
"""


def test_two_processes_share_a_bank(tmp_path, layout, checkpoints):
    command = [sys.executable, "-c", WRITE, str(checkpoints["deepseek"]), str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert [p.suffix for p in tmp_path.iterdir()] == [".bin"] * len(layout.groups)
    bank = Bank(tmp_path, layout, {})
    for name, group in layout.groups.items():
        expected = encode(group_weights(layout, group), FORMATS["Q8_0"])
        np.testing.assert_array_equal(bank.encoded(name, "Q8_0"), expected)
