"""Calibration files: what is refused, how text is cut, how domains are mixed."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from allocator.calibration.documents import (
    Document,
    batches,
    digest,
    interleaved,
    read_documents,
    read_windows,
)
from allocator.errors import CalibrationError

REFERENCE = Path(__file__).parents[2] / "studies/reference/model"


def write(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


GOOD = {"ids": [0, 1, 2], "domain": "a", "text": "x"}


def test_documents_in_file_order(tmp_path):
    path = write(tmp_path / "x", GOOD, {"ids": [0, 9]})
    assert read_documents(path, vocab_size=10) == [
        Document((0, 1, 2), "a", "x"),
        Document((0, 9), "", None),
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json}\n", "x:2: no JSON"),
        ('{"ids": [0, 1\n', "x:2: no JSON"),
        ("[1, 2]\n", "x:2: needed an object"),
        ({"domain": "a"}, "x:2: needed an object with ids or text"),
        ({"text": "only"}, "x:2: needed ids"),
        ({"ids": []}, "x:2: needed ids"),
        ({"ids": [0]}, "x:2: needed ids"),
        ({"ids": "0 1"}, "x:2: needed ids"),
        ({"ids": [0, 1.5]}, "x:2: needed ids"),
        ({"ids": [0, -1]}, "x:2: needed ids.*below 10"),
        ({"ids": [0, 10]}, "x:2: needed ids.*below 10"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    with pytest.raises(CalibrationError, match=message):
        read_documents(write(tmp_path / "x", GOOD, bad, GOOD), vocab_size=10)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(CalibrationError, match="no documents"):
        read_documents(write(tmp_path / "x"), vocab_size=10)
    with pytest.raises(CalibrationError, match=r"missing.*cannot be read"):
        read_documents(tmp_path / "missing", vocab_size=10)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match=r"binary.*cannot be read"):
        read_documents(tmp_path / "binary", vocab_size=10)


def test_windows_are_cut_from_concatenated_text(tmp_path):
    texts = {"a": ["one two three four five", "six"], "b": ["seven eight nine ten eleven"]}
    order = [("a", 0), ("b", 0), ("a", 1)]
    path = write(tmp_path / "x", *({"text": texts[d][i], "domain": d} for d, i in order))
    tokenizer = Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))
    expected = []
    for domain in ("a", "b"):
        stream = []
        for text in texts[domain]:
            stream += [0, *tokenizer.encode(text, add_special_tokens=False).ids]
        expected += [
            Document(tuple(stream[4 * i : 4 * i + 4]), domain) for i in range(len(stream) // 4)
        ]
    assert len(expected) > 2
    assert read_windows(path, REFERENCE, window=4) == expected
    assert read_windows(path, REFERENCE, window=4)[0].ids[0] == 0


def test_windows_need_text_and_enough_of_it(tmp_path):
    path = write(tmp_path / "x", {"text": "a short text"})
    with pytest.raises(CalibrationError, match="less text than one window of 64"):
        read_windows(path, REFERENCE, window=64)
    with pytest.raises(CalibrationError, match=r"tokenizer\.json"):
        read_windows(path, tmp_path, window=2)
    for bad in ({"ids": [0, 1]}, {"text": None}):
        with pytest.raises(CalibrationError, match="y:2: needed text"):
            read_windows(write(tmp_path / "y", {"text": "x"}, bad), REFERENCE, window=2)


@given(st.lists(st.sampled_from("abc")))
def test_prefixes_of_interleaved_documents_are_representative(domains):
    documents = [Document((0, i), domain) for i, domain in enumerate(domains)]
    mixed = interleaved(documents)
    assert sorted(d.ids for d in mixed) == sorted(d.ids for d in documents)
    totals = {d: domains.count(d) for d in domains}
    for stop in range(len(mixed) + 1):
        seen = {d: sum(m.domain == d for m in mixed[:stop]) for d in totals}
        behind = [n for d, n in seen.items() if n < totals[d]]  # domains with documents left
        assert max(seen.values(), default=0) - min(behind, default=10**9) <= 1
    for domain in totals:
        ids = [m.ids for m in mixed if m.domain == domain]
        assert ids == sorted(ids)


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 20), st.data())
def test_batches_cover_a_slice_in_order(lengths, n_tokens, data):
    documents = [Document((0,) * n) for n in lengths]
    start = data.draw(st.integers(0, len(lengths)))
    stop = data.draw(st.integers(start, len(lengths)))
    found = list(batches(documents, start, stop, n_tokens=n_tokens))
    assert [i for batch in found for i in batch] == list(range(start, stop))
    for batch in found:
        assert len({lengths[i] for i in batch}) == 1
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= n_tokens


def test_digest_follows_ids_and_their_order():
    a, b = Document((0, 1, 2)), Document((0, 3))
    different = [[a, b], [b, a], [a], [Document((0, 1)), Document((2, 0, 3))], []]
    assert len({digest(documents) for documents in different}) == len(different)
    assert digest([a]) == digest([Document((0, 1, 2), "domain", "text")])
