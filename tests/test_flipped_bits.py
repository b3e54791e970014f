"""A flipped bit in any kind of file is rebuilt, refused or harmless; see studies/faults."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "studies/faults/scripts"))
import flip_bits

N_KINDS = 24
REFUSED = ("study: journal", "study: allocations", "study: runs", "written: weights")
REBUILT = ("cache: importance", "cache: losses.jsonl", "cache: digests", "cache: curvature.json")


def check(table, n_kinds, shown):
    assert len(table) == n_kinds
    for kind, counts in table.items():
        assert sum(counts.values()) == 1, kind
        assert not counts["SILENT"], shown
        assert not counts["TRACEBACK"], shown
    for kind in REFUSED:
        assert table[kind]["refused"], kind


def test_one_flip_of_eight_kinds(capsys):
    table = flip_bits.run(8, 3, only=REFUSED + REBUILT)
    check(table, 8, capsys.readouterr().out)


@pytest.mark.slow
def test_one_flip_of_every_kind(capsys):
    check(flip_bits.run(N_KINDS, 4), N_KINDS, capsys.readouterr().out)
