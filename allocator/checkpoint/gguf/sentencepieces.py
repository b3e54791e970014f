"""Tokenizers of SentencePiece's form: whole texts of plain characters, with bytes as a fallback.

In: a `tokenizer.json` whose model is BPE with `byte_fallback`. Out: what llama.cpp calls such a
tokenizer, whether a space is put before a text, and the scores by which llama.cpp merges.
Invariant: merges that scores cannot say are an error.

llama.cpp has two models for this form. `llama` (Llama 2, Mixtral) merges the pair whose union has
the highest score, by the texts of tokens alone. `gemma4` goes by the list of merges, but parts runs
of line ends from all else before.

Sources: llama.cpp's vocabulary loader (src/llama-vocab.cpp); `Prepend`, `Replace` and `Metaspace`
of the tokenizers library.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SPACE = "▁"
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
_SPLIT = {  # cuts nothing: no space is left after the normalizer
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
}  # fmt: skip
_BYTES = tuple(f"<0x{n:02X}>" for n in range(256))


@dataclass(frozen=True, slots=True)
class Form:
    """How llama.cpp reads a tokenizer of SentencePiece's form.

    Attributes:
        model: of `tokenizer.ggml.model`.
        prefix: whether a space is put before a text.
    """

    model: str
    prefix: bool


def form(raw: Mapping[str, Any]) -> Form | None:
    """Returns how llama.cpp reads a `tokenizer.json`; None where it would read it otherwise."""
    normalizer, cut = raw.get("normalizer"), raw.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if steps == [PREPEND, REPLACE] and cut is None:
        return Form("llama", prefix=True)
    if steps == [REPLACE] and cut in (None, _SPLIT):
        return Form("gemma4", prefix=False)
    if steps or not cut or cut["type"] != "Metaspace" or cut.get("split", True):
        return None
    scheme = cut.get("prepend_scheme", "always")
    if cut["replacement"] != SPACE or scheme not in ("always", "first", "never"):
        return None
    return Form("gemma4", prefix=False) if scheme == "never" else Form("llama", prefix=True)


def missing_bytes(raw: Mapping[str, Any]) -> list[str]:
    """Lists the bytes that have no token."""
    return [text for text in _BYTES if text not in raw["model"]["vocab"]]


def is_byte(text: str) -> bool:
    """Returns whether a token stands for one byte."""
    return text in _BYTES


def scores(raw: Mapping[str, Any], added: frozenset[str]) -> dict[str, float]:
    """Returns a score per token that merges make: the earlier it is made, the higher.

    Args:
        raw: a `tokenizer.json`.
        added: texts of added tokens, which are cut out before any merge.

    Raises:
        ValueError: if llama.cpp would merge otherwise by scores.
    """
    vocabulary = raw["model"]["vocab"]
    merges = list(pairs(raw))
    order: dict[str, int] = {}
    last = None
    for left, right in merges:
        union = left + right
        if union != last and union in order:
            raise ValueError(f"the merges of {union!r} do not follow one another")
        order.setdefault(union, len(order))
        last = union
    known = set(merges)
    for text in vocabulary.keys() - added:
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if (left, right) in known:
                continue
            if all(len(part) == 1 or part in order for part in (left, right)):
                raise ValueError(f"{text!r} is no merge of {left!r} and {right!r}")
    return {text: float(-rank) for text, rank in order.items()}


def parts_line_ends(raw: Mapping[str, Any]) -> bool:
    """Returns whether no merge joins line ends with anything else."""
    return all({*union} == {"\n"} for a, b in pairs(raw) if "\n" in (union := a + b))


def pairs(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the merges of a `tokenizer.json` in either of its two spellings.

    Raises:
        ValueError: if one is no pair.
    """
    for merge in raw["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right
