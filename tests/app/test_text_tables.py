"""Tables as text: 80 columns, every value whole, nothing where nothing is known."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.app.text_tables import table_text


def test_sizes_are_short_or_exact():
    table = pd.DataFrame({"name": ["a", "b"], "bytes": [5 << 30, 1536]})
    lines = [line.split() for line in table_text(table).splitlines()[:3]]
    assert lines == [["name", "matrices"], ["a", "5.00", "GiB"], ["b", "1.50", "KiB"]]
    assert "5,368,709,120" in table_text(table, exact=True)


def test_what_is_unknown_is_empty():
    nothing = {"loss": [0.25, float("nan")], "up": ["Q4_K", None], "top1": [None, float("nan")]}
    text = table_text(pd.DataFrame({"trial": [1, 2], **nothing}), meanings=False)
    assert [line.split() for line in text.splitlines()] == [
        ["trial", "loss", "up"], ["1", "0.25000", "Q4_K"], ["2"],
    ]  # fmt: skip


def test_a_wide_table_is_printed_in_parts_and_its_constants_once():
    names = {f"a_column_of_{i}": [i * 1000, i * 1000 + 1] for i in range(1, 9)}
    text = table_text(pd.DataFrame({"name": ["one", "two"], "split": ["report"] * 2, **names}))
    assert text.endswith("in every row: split report")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("one ") for line in lines) == 2
    assert all(f"{i},000" in text and f"{i},001" in text for i in range(1, 9))


def test_a_key_that_leaves_no_room_makes_lists():
    name = "x" * 79
    lines = table_text(pd.DataFrame({"name": [name, "b"], "bits": [2.0, 3.0]})).splitlines()
    assert ["name", name] == lines[0].split()
    assert ["bits", "2.000"] in [line.split() for line in lines]


@pytest.mark.parametrize("keys", [1, 2])
@settings(max_examples=40)
@given(st.data())
def test_no_word_is_lost_or_broken(keys, data):
    word = st.text("abXYZ[]:_é漢", min_size=1, max_size=24)
    cell = st.lists(word, min_size=1, max_size=6).map(" ".join)
    n = data.draw(st.integers(1, 3))
    columns = data.draw(st.lists(word, min_size=3, max_size=8, unique=True))
    rows = {c: data.draw(st.lists(cell, min_size=n, max_size=n)) for c in columns}
    text = table_text(pd.DataFrame(rows), keys=keys)
    words = {w for cells in rows.values() for c in cells for w in c.split()}
    assert words | set(columns) <= {w.strip(",") for w in text.split()}


def test_bold_is_for_a_terminal_alone():
    table = pd.DataFrame({"name": ["a"]})
    assert "\x1b" not in table_text(table)
    assert "\x1b[1m" in table_text(table, bold=True)
    assert "\x1b[3" not in table_text(table, bold=True)
