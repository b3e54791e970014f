"""llama.cpp's names of the ways in which byte-level tokenizers cut a text before their merges.

In: the `pre_tokenizer` of a `tokenizer.json`. Out: a name that llama.cpp knows, and whether it
takes a piece that is a token whole without looking at merges. Invariant: a name is chosen by how a
text is cut, never by a model's name; what llama.cpp has no name for is an error.

Sources: pre-tokenizers of released `tokenizer.json` files, as the packages that the tests name and
the census of `actual-computer/toks` have them; llama.cpp's own table (src/llama-vocab.cpp).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Chain = tuple[str, ...]
"""Patterns that cut one after the other, and other steps by name; line ends are escaped."""


@dataclass(frozen=True, slots=True)
class Named:
    """What llama.cpp calls a pre-tokenizer.

    Attributes:
        name: of `tokenizer.ggml.pre`.
        ignores_merges: whether a piece that is a token stays whole whatever the merges say.
        lone_digits: whether the file parts digits, where llama.cpp cuts runs of them.
    """

    name: str
    ignores_merges: bool = False
    lone_digits: bool = False


GPT_2 = "ByteLevel"
"""GPT-2's own pattern, which the step `ByteLevel` has built in."""
DIGITS = "Digits"
NEXT = "MergedWithNext "
"""Before a pattern whose matches are cut off with what follows."""

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _TAIL
_LINES = r"(?:\r?\n)+(?!\r?\n)"
_PREFIX, _UPPER, _LOWER = (
    r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
)  # fmt: skip
_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST


def _cased(suffix: str) -> str:
    """Words that end in lower case, or else in upper case."""
    return f"{_PREFIX}{_UPPER}*{_LOWER}+{suffix}|{_PREFIX}{_UPPER}+{_LOWER}*{suffix}|"


_BICAMERAL = (  # letters of scripts with two cases, as DeepSeek lists them
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

PRE_TOKENIZERS: Mapping[Chain, tuple[Named, ...]] = {
    # GPT-2, OLMoE and others of GPT-NeoX's form
    (GPT_2,): (Named("gpt-2"),),
    # Qwen2 to Qwen3, dots.llm1
    (_QWEN2,): (Named("qwen2"),),
    # Qwen3.5, Qwen3.6
    (
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _REST,
    ): (Named("qwen35"),),
    # Llama 3, LFM2; GLM-4 to GLM-5
    (_WORDS + r"\p{N}{1,3}" + _TAIL,): (Named("llama-bpe", ignores_merges=True), Named("glm4")),
    # gpt-oss; MiniMax-M2 has the same pattern
    (_cased(_CONTRACTION + "?") + r"\p{N}{1,3}" + _PATHS,): (Named("gpt-4o"),),
    # Mistral-Nemo, Nemotron-3
    (_cased("") + r"\p{N}" + _PATHS,): (Named("tekken", ignores_merges=True),),
    # Ling
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    ): (Named("bailingmoe2"),),
    # Laguna
    (f"{NEXT}{_LINES}", _QWEN2): (Named("laguna"),),
    # Kimi
    (
        r"[\p{Han}]+|" + _cased(_CONTRACTION + "?").replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]")
        + r"\p{N}{1,3}" + _TAIL,
    ): (Named("kimi-k2"),),
    # DeepSeek-V2-Lite
    (
        r"[\r\n]",
        rf"\s?[{_BICAMERAL}]+",
        "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
        r"\s+$",
        "[一-龥\u0800-一가-\ud7ff]+",
        DIGITS,
    ): (Named("deepseek-llm", lone_digits=True),),
    # DeepSeek-V3
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
        r" ?[\p{P}\p{S}]+[\r\n]*|" + _REST,
    ): (Named("deepseek-v3"),),
}  # fmt: skip


ALSO_NAMED: Mapping[str, str] = {
    "olmo": "gpt-2", "a.x-4.0": "gpt-2", "gigachat": "gpt-2", "mellum": "gpt-2",
    "deepseek-r1-qwen": "qwen2", "kormo": "qwen2", "megrez": "qwen2",
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "lfm2": "llama-bpe", "falcon3": "llama-bpe",
    "chatglm-bpe": "glm4",
    "llama4": "gpt-4o", "kanana2": "gpt-4o", "minimax-m2": "gpt-4o",
    "bailingmoe": "bailingmoe2", "llada-moe": "bailingmoe2",
    "joyai-llm": "deepseek-v3", "hunyuan-dense": "deepseek-v3",
}  # fmt: skip
"""Further names of llama.cpp's, by which it cuts as by one of the table."""


def steps(cuts: Chain) -> dict[str, Any]:
    """Returns the pre-tokenizer of a `tokenizer.json` with these steps; the inverse of `chain`."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if cuts == (GPT_2,):
        return level | {"use_regex": True}
    made: list[dict[str, Any]] = []
    for cut in cuts:
        if cut == DIGITS:
            made.append({"type": "Digits", "individual_digits": True})
            continue
        pattern = {"Regex": cut.removeprefix(NEXT)}
        behavior = "MergedWithNext" if cut.startswith(NEXT) else "Isolated"
        made.append({"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False})
    return {"type": "Sequence", "pretokenizers": [*made, level | {"use_regex": False}]}


def chain(pre_tokenizer: Mapping[str, Any] | None) -> Chain:
    """Returns the steps of a byte-level pre-tokenizer.

    Raises:
        ValueError: if it has steps of another kind; the text names them.
    """
    cut = pre_tokenizer or {"type": "none"}
    *steps, last = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        kinds = [step["type"] for step in (*steps, last)]
        raise ValueError(f"{kinds} with prefix space or no byte level")
    # ByteLevel cuts by GPT-2's pattern itself unless told not to
    own = (GPT_2,) if last.get("use_regex", True) else ()
    return tuple(_step(step, alone=len(steps) == 1) for step in steps) + own


def _step(step: Mapping[str, Any], *, alone: bool) -> str:
    if step["type"] == "Digits" and step.get("individual_digits"):
        return DIGITS
    form = step.get("behavior"), bool(step.get("invert"))
    merged = form == ("MergedWithNext", False)
    # the second form drops what its pattern does not match; a lone one of the table matches all
    if form != ("Isolated", False) and not merged and not (alone and form == ("Removed", True)):
        raise ValueError(f"that drops or joins what it cuts ({step})")
    pattern = str(step.get("pattern", {}).get("Regex"))
    return (NEXT if merged else "") + pattern.replace("\r", r"\r").replace("\n", r"\n")
