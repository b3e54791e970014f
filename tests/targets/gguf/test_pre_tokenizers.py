"""Every way to cut text that the table names: llama.cpp cuts as the tokenizers library.

The steps are those of released `tokenizer.json` files. A tokenizer is trained on the very strings
until nothing is left to merge: a piece is then one token, and another cut is another token.
"""

import json
from itertools import pairwise
from unicodedata import category as kind

import pytest
import tokenizers

from allocator.checkpoint.gguf.pre_tokenizers import PRE_TOKENIZERS
from allocator.checkpoint.reading import read_inventory
from allocator.errors import TargetError
from allocator.targets.gguf.tokenizer import tokenizer

BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
}  # fmt: skip


def split(pattern, behavior="Isolated", *, invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
QWEN35 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
GPT_4O = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
DEEPSEEK_LLM = (
    "[\r\n]",
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-"
    "\u1f1dἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴ"
    "ℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-\ud7ff]+",
)
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"  # noqa: E501
KIMI = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
LINES = r"(?:\r?\n)+(?!\r?\n)"
DIGITS = {"type": "Digits", "individual_digits": True}
STEPS = {  # llama.cpp's name and whether ignore_merges is set, with the steps of a released file
    "olmo": ("gpt-2", False, [{**BYTE_LEVEL, "use_regex": True}]),
    "qwen2": ("qwen2", False, [split(QWEN2), BYTE_LEVEL]),
    "qwen35": ("qwen35", False, [split(QWEN35), BYTE_LEVEL]),
    "llama-bpe": ("llama-bpe", True, [split(LLAMA3), BYTE_LEVEL]),
    "glm4": ("glm4", False, [split(LLAMA3), BYTE_LEVEL]),
    "gpt-4o": ("gpt-4o", True, [split(GPT_4O), BYTE_LEVEL]),
    "minimax-m2": ("gpt-4o", False, [split(GPT_4O, "Removed", invert=True), BYTE_LEVEL]),
    "tekken": ("tekken", True, [split(TEKKEN), BYTE_LEVEL]),
    "bailingmoe2": ("bailingmoe2", False, [split(BAILING), BYTE_LEVEL]),
    "laguna": ("laguna", False, [split(LINES, "MergedWithNext"), split(QWEN2), BYTE_LEVEL]),
    "kimi-k2": ("kimi-k2", False, [split(KIMI), BYTE_LEVEL]),
    "deepseek-llm": ("deepseek-llm", False, [*map(split, DEEPSEEK_LLM), DIGITS, BYTE_LEVEL]),
    "deepseek-v3": ("deepseek-v3", False, [*map(split, DEEPSEEK_V3), BYTE_LEVEL]),
}


IGNORES_MERGES = ("llama-bpe", "tekken")


@pytest.fixture(scope="module")
def trained(tokenizer_file, tmp_path_factory):
    """`trained(name, chosen)`: a GGUF with a tokenizer that makes one token of every piece."""

    def make(name, chosen):
        _, ignores, steps = STEPS[name]
        cut = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
        model = {"type": "BPE", "vocab": {}, "merges": []}
        empty = {"version": "1.0", "added_tokens": [], "pre_tokenizer": cut, "model": model}
        library = tokenizers.Tokenizer.from_str(json.dumps(empty))
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=1_000_000, min_frequency=1, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        library.train_from_iterator(chosen, trainer)
        raw = json.loads(library.to_str())
        raw["model"]["ignore_merges"] = ignores
        folder = tmp_path_factory.mktemp(name)
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        (folder / "tokenizer_config.json").write_text("{}")
        return tokenizer_file(folder)

    return make


# -- where llama.cpp is known to cut otherwise

CASE = "upper case beyond ASCII within a word"  # seen where a merge joins parts of characters alone
REASONS = {  # said in docs/gguf.md
    "combining marks": lambda text: any(kind(c)[0] == "M" for c in text),
    CASE: lambda text: any(
        a.isalpha() and kind(b) in ("Lu", "Lt") and b > "\x7f" for a, b in pairwise(text)
    ),
    "a long s after an apostrophe": lambda text: "'ſ" in text,
    "numerals and later planes of Han": lambda text: any(
        "\u3007" <= c <= "\u303b" or c >= "\U0002ebe0" for c in text
    ),
    "neighbouring digits beyond ASCII": lambda text: any(
        kind(a)[0] == kind(b)[0] == "N" and a > "\x7f" for a, b in pairwise(text)
    ),
    "space beyond ASCII": lambda text: any(c.isspace() and ord(c) > 0x7F for c in text),
    "carriage returns": lambda text: "\r" in text,
}
CASED = ("combining marks", CASE, "a long s after an apostrophe")
KNOWN = {
    "gpt-4o": CASED,
    "minimax-m2": CASED,
    "tekken": CASED[:2],
    "kimi-k2": (*CASED, "numerals and later planes of Han"),
    "laguna": ("carriage returns",),
    "deepseek-llm": ("space beyond ASCII", "neighbouring digits beyond ASCII"),
}


def unexplained(name, texts):
    """Those without a known reason, of characters that Unicode has assigned."""
    known = [REASONS[reason] for reason in KNOWN.get(name, ())]
    return [
        text
        for text in texts
        if not any(kind(c) in ("Cn", "Co") for c in text) and not any(k(text) for k in known)
    ]


@pytest.mark.parametrize("name", STEPS)
def test_a_pre_tokenizers_strings(name, trained, strings, cut_otherwise, taken_over):
    chosen = strings(n=300)
    file = trained(name, chosen)
    fields = {f.key: f.value for f in tokenizer(file.inventory)}
    assert fields["tokenizer.ggml.pre"] == STEPS[name][0]
    assert len(unexplained(name, chosen)) > 100
    assert unexplained(name, cut_otherwise(file, chosen)) == []
    ignored = STEPS[name][1] != (STEPS[name][0] in IGNORES_MERGES)  # llama.cpp goes by the name
    assert ignored or taken_over(file, chosen) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_pre_tokenizers_2000_strings(name, trained, strings, cut_otherwise):
    """Each reason alone is seen in a string: the list names none that llama.cpp has not."""
    chosen = strings(n=2000)
    bad = cut_otherwise(trained(name, chosen), chosen)
    assert unexplained(name, bad) == []
    alone = [{r for r in KNOWN.get(name, ()) if REASONS[r](text)} for text in bad]
    seen = {reason for reasons in alone if len(reasons) == 1 for reason in reasons}
    assert set(KNOWN.get(name, ())) - seen <= {CASE}
    print(f"{name}: {len(bad)} of 2000 strings differ, {len(unexplained(name, chosen))} may not")


def test_every_pre_tokenizer_of_the_table_is_compared():
    names = {named.name for several in PRE_TOKENIZERS.values() for named in several}
    assert names == {pre for pre, _, _ in STEPS.values()}


def test_merges_of_digits_are_refused_where_llama_cpp_does_not_part_them(trained, strings):
    file = trained("deepseek-llm", strings(n=20))
    path = file.inventory.path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["12"] = len(raw["model"]["vocab"]) - 1
    raw["model"]["merges"].append(["1", "2"])
    path.write_text(json.dumps(raw))
    with pytest.raises(TargetError, match=r"merge \('1', '2'\) of digits"):
        tokenizer(read_inventory(file.inventory.path))


@pytest.mark.parametrize("steps", [[split(QWEN2, "Removed"), BYTE_LEVEL], [split(QWEN2)]])
def test_steps_that_lose_text_or_bytes_are_refused(steps, trained, strings):
    file = trained("qwen2", strings(n=20))
    path = file.inventory.path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    path.write_text(json.dumps(raw))
    with pytest.raises(TargetError, match=r"drops or joins|no byte level"):
        tokenizer(read_inventory(file.inventory.path))


def test_ignored_merges_are_expressed_where_merges_give_every_token(trained, strings):
    """llama.cpp's gpt-4o looks at merges always."""
    file = trained("gpt-4o", strings(n=20))
    path = file.inventory.path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["merges"].pop()
    path.write_text(json.dumps(raw))
    with pytest.raises(TargetError, match="ignore_merges = True with pre-tokenizer gpt-4o"):
        tokenizer(read_inventory(file.inventory.path))
