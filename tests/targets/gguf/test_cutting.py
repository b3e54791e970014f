"""llama.cpp cuts text, by the file that is written, as the tokenizers library by the checkpoint."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import tokenizers

from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tokenizer import read_tokenizer
from allocator.errors import TargetError
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.targets.gguf import tokenizer as gguf_tokenizer

REFERENCE = Path(__file__).parents[3] / "studies/reference/model"
NFC = tokenizers.normalizers.NFC()


def differences(file, strings, n=2000):
    """Strings that the two cut otherwise; and those of them that are still cut so in NFC."""
    found = read_tokenizer(file.inventory)
    library = tokenizers.Tokenizer.from_file(str(found.path / "tokenizer.json"))
    chosen = strings([a.content for a in found.added.values()], n=n)
    raw, composed = [], []
    with LlamaCpp(file.path, context=32, threads=1) as runtime:
        for text in chosen:
            ids = [*found.prefix, *library.encode(text, add_special_tokens=False).ids]
            if runtime.tokenize(text, markup=True) == ids:
                continue
            raw.append(text)
            if runtime.tokenize(NFC.normalize_str(text), markup=True) != ids:
                composed.append(text)
    assert len(set(chosen)) > 0.95 * n
    return raw, composed


def test_the_reference_models_strings(tokenizer_file, strings):
    assert differences(tokenizer_file(REFERENCE), strings, n=700) == ([], [])


@pytest.mark.slow
def test_the_reference_models_2000_strings(tokenizer_file, strings):
    assert differences(tokenizer_file(REFERENCE), strings) == ([], [])


@pytest.mark.slow
def test_a_wrong_pre_tokenizer_is_seen(tokenizer_file, strings):
    file = tokenizer_file(REFERENCE)
    data = file.path.read_bytes()
    at = data.index(b"gpt-2", data.index(b"tokenizer.ggml.pre"))
    file.path.write_bytes(data[:at] + b"qwen2" + data[at + 5 :])
    raw, _ = differences(file, strings)
    assert len(raw) > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pre"),
    [
        ("deepseek-v3", "deepseek-v3"),
        ("deepseek-v3.1", "deepseek-v3"),
        ("llama-3.1", "llama-bpe"),
        ("qwen3", "qwen2"),
    ],
)
def test_a_released_tokenizers_2000_strings(released, tokenizer_file, strings, name, pre):
    """llama.cpp composes no characters: it cuts by NFC only what is in NFC already."""
    file = tokenizer_file(released(name))
    fields = {f.key: f.value for f in gguf_tokenizer.tokenizer(file.inventory)}
    assert fields["tokenizer.ggml.pre"] == pre
    raw, composed = differences(file, strings)
    assert composed == []
    if name == "qwen3":  # the only one of these whose normalizer is NFC
        assert all(NFC.normalize_str(text) != text for text in raw)
    else:
        assert raw == []
    print(f"{name}: {len(raw)} of 2000 strings differ, all of them not in NFC")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.1", "qwen3", "llama-3.1"])
def test_released_markup_in_raw_text_is_no_control_token(released, tokenizer_file, name):
    """What looks special must not be spoken by a user's text; it is read where markup is asked."""
    file = tokenizer_file(released(name))
    fields = {f.key: f.value for f in gguf_tokenizer.tokenizer(file.inventory)}
    with LlamaCpp(file.path, context=32, threads=1) as runtime:
        prefix = runtime.tokenize("")
        for number, added in read_tokenizer(file.inventory).added.items():
            assert runtime.tokenize(added.content, markup=True) == [*prefix, number]
            control = fields["tokenizer.ggml.token_type"][number] == 3
            assert (runtime.tokenize(added.content) == [*prefix, number]) is not control
            if added.content[:2] + added.content[-2:] in ("<||>", "<｜｜>"):
                assert control


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "pre"),
    [("gpt-oss", "gpt2", "gpt-4o"), ("llama-2", "llama", None), ("gemma-3", "gemma4", None)],
)
def test_a_released_tokenizer_of_another_form(
    released, tokenizer_file, strings, cut_otherwise, name, model, pre
):
    """gpt-4o of llama.cpp cuts words before a combining mark, and knows no long s."""
    file = tokenizer_file(released(name))
    fields = {f.key: f.value for f in gguf_tokenizer.tokenizer(file.inventory)}
    assert (fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")) == (model, pre)
    added = [a.content for a in read_tokenizer(file.inventory).added.values()]
    bad = cut_otherwise(file, strings(added))
    if name == "gpt-oss":
        marked = [t for t in bad if any(unicodedata.category(c)[0] == "M" for c in t)]
        bad = [t for t in bad if t not in marked and "'ſ" not in t]
        assert marked
    if name == "gemma-3":  # added tokens of several spaces are put out as spaces, so read as such
        bad = [t for t in bad if "▁▁" not in t]
    assert bad == []


def test_markup_of_added_tokens(tokenizer_file, tmp_path):
    """Types as llama.cpp's converter gives them, seen in what llama.cpp cuts."""
    raw = json.loads((REFERENCE / "tokenizer.json").read_text())
    texts = [
        "<|User|>",
        "<｜Bot｜>",
        "<unused7>",
        "<pad>",
        "<think>",
        "[INST]",
        "<|open",
        "special",
    ]
    raw["added_tokens"] += [
        {"id": 8192 + n, "content": text, "special": text == "special", "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    shutil.copy(REFERENCE / "tokenizer_config.json", tmp_path)
    file = tokenizer_file(tmp_path)
    with LlamaCpp(file.path, context=32, threads=1) as runtime:
        seen = {t: runtime.tokenize(t) == [8192 + n] for n, t in enumerate(texts)}
        assert all(runtime.tokenize(t, markup=True) == [8192 + n] for n, t in enumerate(texts))
    assert [t for t, one in seen.items() if one] == ["<think>", "[INST]", "<|open"]


def test_tokens_that_the_config_alone_names_are_added(tokenizer_file, tmp_path):
    """As transformers reads them."""
    shutil.copy(REFERENCE / "tokenizer.json", tmp_path)
    config = json.loads((REFERENCE / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        "0": {"content": "<|endoftext|>", "special": True},
        "8190": {"content": "<think>", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    file = tokenizer_file(tmp_path)
    assert read_tokenizer(read_inventory(file.inventory.path)).texts[8190] == "<think>"
    with LlamaCpp(file.path, context=32, threads=1) as runtime:
        assert runtime.tokenize("<think>") == [8190]


ENDS = ["<|user|>", "<|observation|>", "</assistant>", "<|im_end|>"]


@pytest.fixture
def with_ends(tokenizer_file, tmp_path):
    """`with_ends(texts)`: a GGUF of a checkpoint that ends replies at these tokens of ENDS."""

    def make(texts):
        raw = json.loads((REFERENCE / "tokenizer.json").read_text())
        ids = {text: 8192 + n for n, text in enumerate(ENDS)}
        raw["added_tokens"] += [
            {"id": n, "content": text, "special": False, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for text, n in ids.items()
        ]  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        shutil.copy(REFERENCE / "tokenizer_config.json", tmp_path)
        ends = {"eos_token_id": [0, *(ids[text] for text in texts)]}
        (tmp_path / "generation_config.json").write_text(json.dumps(ends))
        return tokenizer_file(tmp_path)

    return make


@pytest.mark.parametrize("texts", [[], ENDS[:1], ENDS[1:], [ENDS[0], ENDS[1]]])
def test_tokens_that_end_a_reply(with_ends, texts):
    """llama.cpp ends at those listed, at eos, and at `<|im_end|>` whatever a file lists."""
    file = with_ends(texts)
    with LlamaCpp(file.path, context=32, threads=1) as runtime:
        ids = [n for n in range(runtime.n_vocab) if runtime.ends_reply(n)]
        control = {text: runtime.tokenize(text) != [8192 + n] for n, text in enumerate(ENDS)}
    wanted = {*texts, "<|im_end|>"}
    assert ids == [0, *(8192 + n for n, text in enumerate(ENDS) if text in wanted)]
    assert control["</assistant>"] is ("</assistant>" in texts)


def test_more_ends_than_llama_cpp_has_room_for_are_refused(with_ends):
    with pytest.raises(TargetError, match="needed at most 2"):
        with_ends(ENDS)


def test_added_runs_of_spaces_are_cut_out_first(tokenizer_file, tmp_path, strings, cut_otherwise):
    """As GPT-NeoX and OLMoE have them: 2 to 24 spaces, not special, matched after normalizing."""
    raw = json.loads((REFERENCE / "tokenizer.json").read_text())
    raw["added_tokens"] += [
        {"id": 8192 + n, "content": " " * (24 - n), "special": False, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": True}
        for n in range(23)
    ]  # fmt: skip
    raw["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    shutil.copy(REFERENCE / "tokenizer_config.json", tmp_path)
    file = tokenizer_file(tmp_path)
    spaces = [f"{'a' * (n % 3)}{' ' * n}b  c" for n in range(60)]
    chosen = [NFC.normalize_str(text) for text in [*spaces, *strings(n=200)]]
    assert cut_otherwise(file, chosen) == []
    assert read_tokenizer(file.inventory).added[8192].content == " " * 24
