"""The tokenizer's pairs of a GGUF file, so that stock llama.cpp reads text as the checkpoint does.

In: an inventory, whose directory holds the tokenizer's files. Out: `Field`s in file order.
Invariant: a tokenizer that llama.cpp would silently apply in another way is an error, and the bytes
do not depend on where the checkpoint lies.

Sources: llama.cpp's vocabulary loader (src/llama-vocab.cpp); gguf-py's `constants.Keys`.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.tokenizer import Tokenizer, missing_tokenizer, read_tokenizer
from allocator.errors import CheckpointError, TargetError
from allocator.families import Role
from allocator.targets.gguf.fields import Field, array_field, bool_field, string_field, uint_field


def tokenizer(inventory: Inventory) -> tuple[Field, ...]:
    """Returns the tokenizer's pairs, which are made once per version of its files.

    A checkpoint without any gives a file that reads token ids alone, as does one whose tokenizer is
    not wanted.

    Raises:
        CheckpointError: if its files contradict the checkpoint.
        TargetError: if llama.cpp cannot express it.
    """
    checkpoint_tokenizer = None if inventory.without_tokenizer else read_tokenizer(inventory)
    if checkpoint_tokenizer is None:
        return (string_field("tokenizer.ggml.model", "no_vocab"),)
    return _fields(checkpoint_tokenizer, n_vocab(inventory))


def check_tokenizer(inventory: Inventory) -> None:
    """Checks that a file can read text, where it is to.

    Raises:
        CheckpointError: if the checkpoint has no tokenizer, or one that contradicts it.
        TargetError: if llama.cpp cannot express it.
    """
    if not inventory.without_tokenizer and read_tokenizer(inventory) is None:
        raise missing_tokenizer(inventory.path)
    tokenizer(inventory)


@lru_cache(maxsize=8)
def _fields(source: Tokenizer, n_vocab: int) -> tuple[Field, ...]:
    try:
        return tuple(_bpe(source, n_vocab))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{source.path}/tokenizer.json: unreadable tokenizer ({error!r}); fetch its files again"
        ) from None


def _bpe(source: Tokenizer, n_vocab: int) -> Iterator[Field]:
    pre = _pre_tokenizer(source.path, source.raw)
    tokens, types = _tokens(source, n_vocab)
    yield string_field("tokenizer.ggml.model", "gpt2")
    yield string_field("tokenizer.ggml.pre", pre)
    yield array_field("tokenizer.ggml.tokens", tokens, GGUFValueType.STRING)
    yield array_field("tokenizer.ggml.token_type", types, GGUFValueType.INT32)
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in source.raw["model"]["merges"])
    if bad := next((m for m in merges if m.count(" ") != 1), None):
        raise TargetError(
            f"gguf: {source.path}/tokenizer.json: merge {bad!r} is no pair of byte-level tokens"
        )
    if merges:
        yield array_field("tokenizer.ggml.merges", merges, GGUFValueType.STRING)
    for role, number in source.special_ids.items():
        yield uint_field(f"tokenizer.ggml.{_ID_NAMES.get(role, role)}_token_id", number)
    yield bool_field("tokenizer.ggml.add_bos_token", source.adds("bos"))
    yield bool_field("tokenizer.ggml.add_eos_token", source.adds("eos"))
    yield from _chat_templates(source)


_ID_NAMES = {"pad": "padding", "unk": "unknown", "sep": "seperator"}  # as llama.cpp spells them


def _tokens(source: Tokenizer, n_vocab: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and llama.cpp's types of tokens 0..n_vocab-1; rows without a token are unused."""
    texts = source.texts
    types = dict.fromkeys(texts, int(TokenType.NORMAL))
    for number, added in source.added.items():
        control = added.special or _looks_special(added.content)
        types[number] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    if min(texts) < 0 or max(texts) >= n_vocab:
        raise CheckpointError(
            f"{source.path}/tokenizer.json: token {max(texts)}, but the embedding has {n_vocab} "
            "rows; this tokenizer belongs to another checkpoint"
        )
    rows = tuple(texts.get(n, f"[PAD{n}]") for n in range(n_vocab))
    if len(first := {text: n for n, text in reversed(list(enumerate(rows)))}) < n_vocab:
        again = next(n for n, text in enumerate(rows) if first[text] != n)
        raise CheckpointError(  # llama.cpp aborts the whole process on such a file
            f"{source.path}: tokens {first[rows[again]]} and {again} are both {rows[again]!r}, "
            "needed one id for each text; fetch the tokenizer's files again"
        )
    return (
        rows,
        tuple(types.get(n, int(TokenType.UNUSED)) for n in range(n_vocab)),
    )


def _looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for markup whatever its file says.

    DeepSeek's `<｜User｜>` is not special there; as an ordinary token, a user's raw text could
    speak in another role.
    """
    marks = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(a) and text.endswith(z) for a, z in marks
    )


_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PRE_TOKENIZERS = {
    (): "gpt-2",
    (_WORDS + r"\p{N}" + _TAIL,): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _TAIL,): "llama-bpe",
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
        r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "deepseek-v3",
}
"""llama.cpp's name of a pre-tokenizer by the patterns of tokenizer.json, line ends escaped."""


def _pre_tokenizer(path: Path, raw: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way text is cut before the merges."""

    def refuse(what: str) -> TargetError:
        return TargetError(
            f"gguf: {path}/tokenizer.json: {what} has no counterpart in llama.cpp; "
            "use target safetensors"
        )

    model = raw["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise refuse(f"model {model['type']} (byte_fallback = {model.get('byte_fallback')})")
    normalizer = raw.get("normalizer") or {"type": "Sequence", "normalizers": []}
    if normalizer != {"type": "Sequence", "normalizers": []} and normalizer["type"] != "NFC":
        raise refuse(f"normalizer {normalizer['type']}")
    cut = raw.get("pre_tokenizer") or {"type": "none"}
    steps = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    *splits, last = steps
    patterns = tuple(
        str(s.get("pattern", {}).get("Regex")).replace("\r", r"\r").replace("\n", r"\n")
        for s in splits
    )
    if any(s.get("behavior") != "Isolated" or s.get("invert") for s in splits):
        raise refuse(f"pre-tokenizer that drops or joins what it cuts ({splits})")
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise refuse(
            f"pre-tokenizer {[s['type'] for s in steps]} with prefix space or no byte level"
        )
    # ByteLevel cuts by GPT-2's pattern itself unless told not to
    if bool(last.get("use_regex", True)) is bool(patterns) or patterns not in PRE_TOKENIZERS:
        raise refuse(f"pre-tokenizer with patterns {patterns}")
    name = PRE_TOKENIZERS[patterns]
    if bool(model.get("ignore_merges")) is not (name == "llama-bpe"):
        raise refuse(f"ignore_merges = {model.get('ignore_merges')} with pre-tokenizer {name}")
    return name


def _chat_templates(source: Tokenizer) -> Iterator[Field]:
    """The default one, and named ones under llama.cpp's letters and digits, listed by name."""
    named = {}
    for name, text in source.chat_templates.items():
        if name == "default":
            continue
        plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
        if not plain or plain == "default" or plain in named:
            raise CheckpointError(
                f"{source.path}: chat template {name!r} is {plain!r} in a gguf, which is taken; "
                "rename it"
            )
        named[plain] = text
    for plain, text in named.items():
        yield string_field(f"tokenizer.chat_template.{plain}", text)
    if named:
        yield array_field("tokenizer.chat_templates", tuple(named), GGUFValueType.STRING)
    if "default" in source.chat_templates:
        yield string_field("tokenizer.chat_template", source.chat_templates["default"])


def n_vocab(inventory: Inventory) -> int:
    """Returns the rows of the embedding."""
    return inventory.of_role(Role.EMBEDDING)[0].shape[0]
