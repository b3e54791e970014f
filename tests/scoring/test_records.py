"""Files of calibration text: what is read of each kind, and the line that each bad one gives."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer

from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tokenizer import read_tokenizer
from allocator.errors import CalibrationError
from allocator.scoring.chat import ChatTemplate
from allocator.scoring.documents import read_windows
from allocator.scoring.records import default_records, read_records

REFERENCE = Path(__file__).parents[2] / "studies/reference/model"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a <b> & ö"}]
TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif -%}
    <|{{ m.role }}|>{% generation %}{{ m.content | tojson }}{% endgeneration %}
{% endfor %}{{ eos_token }}"""


def fields(path):
    return [dict(record.fields) for record in read_records(path)]


@pytest.fixture
def chatty(tmp_path):
    """A folder with the reference's tokenizer and a chat template, as a checkpoint."""
    folder = tmp_path / "chatty"
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(REFERENCE / "tokenizer.json")
    config = json.loads((REFERENCE / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    (folder / "config.json").write_text((REFERENCE / "config.json").read_text())
    return replace(read_inventory(REFERENCE), path=folder)


def test_a_text_file_is_one_record(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n{two}\n".encode())
    assert fields(tmp_path / "a.txt") == [{"text": "one\n\n{two}\n"}]


def test_a_table_holds_what_lines_hold(tmp_path):
    rows = [{"text": "one", "domain": "x", "n": 1}, {"text": "two", "domain": "y", "n": 2}]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet") == [
        {"text": r["text"], "domain": r["domain"]} for r in rows
    ]
    pd.DataFrame({"messages": [CHAT]}).to_parquet(tmp_path / "b.parquet")
    assert fields(tmp_path / "b.parquet") == [{"messages": CHAT}]


def test_messages_are_what_transformers_makes_of_them(chatty, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    found = read_windows(tmp_path / "a.jsonl", read_tokenizer(chatty), window=1)
    told = AutoTokenizer.from_pretrained(chatty.path)
    assert [i for d in found for i in d.ids] == told.apply_chat_template(CHAT, return_dict=False)


def test_a_chat_is_the_same_on_any_day(chatty):
    template = "{% macro head() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ head() }}"
    (chatty.path / "chat_template.jinja").write_text(template)
    assert ChatTemplate(read_tokenizer(chatty)).render({"messages": CHAT}, "x") == "26 Jul 2024"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", r"a\.txt: no documents; the file is empty"),
        ("a.jsonl", b"", r"a\.jsonl: no documents; the file is empty"),
        ("a.txt", b"caf\xe9", r"cannot be read as UTF-8 \(byte 0xe9\); convert .* iconv"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"cannot be read as UTF-8 \(byte 0xe9\)"),
        (
            "a.json",
            b'[{"text": "x"}]',
            r"a\.json: holds a JSON array; needed one record a line: jq",
        ),
        ("a.json", b'{\n"text": "x"}', r"a\.json: holds one JSON value over several lines"),
        ("a.jsonl", b'"text"', r"a\.jsonl:1: needed an object .* is a JSON str"),
        (
            "a.jsonl",
            b'{"content": "x", "n": 1}',
            r"a\.jsonl:1: needed .*; its fields are content, n",
        ),
        ("a.jsonl", b'{"messages": []}', r"a\.jsonl:1: needed messages, a list of objects"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}', r"a\.jsonl:1: needed messages, a list"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "tool"}]}',
            r":1: the chat template refuses .*no tools",
        ),
        ("a.txt", b"short", r"less text than one window of 64 tokens \(\d\); add text, or"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read as parquet"),
    ],
)
def test_a_bad_file_is_one_line_with_the_way_out(chatty, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_windows(tmp_path / name, read_tokenizer(chatty), window=64)
    assert "\n" not in str(caught.value)


def test_other_columns_are_named(tmp_path):
    pd.DataFrame({"prompt": ["x"], "reply": ["y"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match="its columns are prompt, reply"):
        fields(tmp_path / "a.parquet")


def test_a_tokenizer_without_a_chat_template_is_named():
    with pytest.raises(
        CalibrationError, match=r"no chat template, .* put its chat_template\.jinja"
    ):
        ChatTemplate(read_tokenizer(read_inventory(REFERENCE)))


def test_the_default_text_is_many_records_of_many_kinds():
    texts = [record.fields["text"] for record in default_records()]
    assert 150_000 < sum(len(text.encode()) for text in texts) < 250_000
    assert len({record.domain for record in default_records()}) == 10
    assert len(set(texts)) == len(texts) > 200
    assert all(text == text.strip("\n") and "%%" not in text for text in texts)
    assert max(len(text.encode()) for text in texts) < 5_000
