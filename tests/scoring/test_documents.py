"""Calibration files: what is refused, how text is cut, how domains are mixed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tokenizer import read_tokenizer
from allocator.errors import CalibrationError
from allocator.scoring.documents import (
    Document,
    batches,
    digest,
    interleaved,
    read_documents,
    read_windows,
)
from allocator.targets.gguf import tokenizer as gguf_tokenizer

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
        ({"domain": "a"}, "x:2: needed an object with ids, text or messages"),
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


@pytest.fixture
def reading(tmp_path):
    """`reading(edit, **config)`: the reference's tokenizer, its files and config.json edited."""
    inventory = read_inventory(REFERENCE)

    def make(edit=lambda raw, config: None, **changes):
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        names = "tokenizer.json", "tokenizer_config.json"
        raw, told = (json.loads((REFERENCE / name).read_text()) for name in names)
        edit(raw, told)
        for name, content in zip(names, (raw, told), strict=True):
            (folder / name).write_text(json.dumps(content))
        config = {**inventory.config, **changes}
        config = {key: value for key, value in config.items() if value != "absent"}
        return replace(inventory, path=folder, config=config)

    return make


TEXTS = {"a": ["one two three four five", "six"], "b": ["seven eight nine ten eleven"]}


def cut(prefix, window):
    """What windows over TEXTS are, by the tokenizers library."""
    library = tokenizers.Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))
    found = []
    for domain, texts in TEXTS.items():
        stream = []
        for text in texts:
            stream += [*prefix, *library.encode(text, add_special_tokens=False).ids]
        found += [
            Document(tuple(stream[window * i : window * (i + 1)]), domain)
            for i in range(len(stream) // window)
        ]
    return found


@pytest.fixture
def texts(tmp_path):
    order = [("a", 0), ("b", 0), ("a", 1)]
    return write(tmp_path / "x", *({"text": TEXTS[d][i], "domain": d} for d, i in order))


def told(**changes):
    return lambda raw, config: config.update(changes)


def template(raw, config, token="<|endoftext|>", number=0):
    text = {"Sequence": {"id": "A", "type_id": 0}}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def foreign_template(raw, config):
    template(raw, config, "!", raw["model"]["vocab"]["!"])


@pytest.mark.parametrize(
    ("edit", "bos", "prefix"),
    [
        # it adds none, whatever config.json says
        (told(), 0, ()),
        (told(), None, ()),
        (told(bos_token=None), 7, ()),
        (told(bos_token=None, add_bos_token=False), [7, 8], ()),
        # it adds its own, whatever config.json says
        (told(add_bos_token=True), None, (0,)),
        (told(add_bos_token=True), "absent", (0,)),
        (told(add_bos_token=True), 7, (0,)),
        (told(add_bos_token=True, bos_token={"content": "<|endoftext|>"}), [7, 8], (0,)),
        # it adds one that config.json alone names
        (told(add_bos_token=True, bos_token=None), 7, (7,)),
        (told(add_bos_token=True, bos_token=None), [7, 8], (7,)),
        # there is none to add
        (told(add_bos_token=True, bos_token=None), None, ()),
        (told(add_bos_token=True, bos_token=None), "absent", ()),
        (told(add_bos_token=True, bos_token=None), [], ()),
        (told(add_bos_token=True, bos_token=None), True, ()),
        # by its post-processor
        (template, None, (0,)),
        (template, 0, (0,)),
        (foreign_template, 0, ()),
    ],
)
def test_what_stands_before_a_text_is_the_tokenizers_habit(
    reading, texts, edit, bos, prefix, every_step
):
    inventory = reading(edit, bos_token_id=bos)
    found = read_windows(texts, read_tokenizer(inventory), window=4)
    n = len(texts.read_text().splitlines())
    assert f"tokenizing {texts}: {n}/{n} records" in every_step.getvalue()
    assert found == cut(prefix, 4)
    assert len(found) > 2
    fields = {f.key: f.value for f in gguf_tokenizer.tokenizer(inventory)}
    assert fields["tokenizer.ggml.add_bos_token"] is bool(prefix)
    if prefix:
        assert fields["tokenizer.ggml.bos_token_id"] == prefix[0]


def test_the_habit_is_what_transformers_puts_before_a_text(reading):
    """Where transformers reads it as we do: from a post-processor, and none."""
    for edit in (told(), template):
        inventory = reading(edit)
        (inventory.path / "config.json").write_text(json.dumps(dict(inventory.config)))
        ids = AutoTokenizer.from_pretrained(inventory.path)("one two")["input_ids"]
        plain = AutoTokenizer.from_pretrained(REFERENCE)("one two", add_special_tokens=False)
        assert ids == [*read_tokenizer(inventory).prefix, *plain["input_ids"]]


def test_windows_need_text_and_enough_of_it(tmp_path, reading):
    tokenizer = read_tokenizer(reading())
    path = write(tmp_path / "x", {"text": "a short text"})
    with pytest.raises(CalibrationError, match="less text than one window of 64"):
        read_windows(path, tokenizer, window=64)
    broken = reading(lambda raw, config: raw["model"].pop("vocab"))
    with pytest.raises(CalibrationError, match=r"tokenizer\.json"):
        read_windows(path, read_tokenizer(broken), window=2)
    for bad in ({"ids": [0, 1]}, {"text": None}):
        with pytest.raises(CalibrationError, match="y:2: needed text"):
            read_windows(write(tmp_path / "y", {"text": "x"}, bad), tokenizer, window=2)


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
