"""The tokenizer's pairs of a GGUF file, so that stock llama.cpp reads text as the checkpoint does.

In: an inventory, whose directory holds the tokenizer's files. Out: `Field`s in file order.
Invariant: a tokenizer that llama.cpp would silently apply in another way is an error, and the bytes
do not depend on where the checkpoint lies.

Sources: llama.cpp's vocabulary loader (src/llama-vocab.cpp); gguf-py's `constants.Keys`.
"""

import json
from collections.abc import Iterator
from functools import lru_cache

from gguf import GGUFValueType, TokenType

from allocator.checkpoint.gguf import pre_tokenizers, sentencepieces
from allocator.checkpoint.gguf.sentencepieces import Form
from allocator.checkpoint.gguf.tokenizer import ID_KEYS
from allocator.checkpoint.inventory import GgufModel, Inventory
from allocator.checkpoint.tokenizer import (
    Tokenizer,
    has_tokenizer,
    missing_tokenizer,
    read_tokenizer,
)
from allocator.errors import CheckpointError, TargetError, first_line
from allocator.families import Role
from allocator.targets.gguf.fields import (
    Field,
    array_field,
    bool_field,
    carried_fields,
    string_field,
    uint_field,
)


def tokenizer(inventory: Inventory) -> tuple[Field, ...]:
    """Returns the tokenizer's pairs, which are made once per version of its files.

    A checkpoint without any gives a file that reads token ids alone, as does one whose tokenizer is
    not wanted.

    Raises:
        CheckpointError: if its files contradict the checkpoint.
        TargetError: if llama.cpp cannot express it.
    """
    if not inventory.without_tokenizer:
        if inventory.gguf is not None and has_tokenizer(inventory):
            return _carried(inventory.gguf, n_vocab(inventory))
        if inventory.gguf is None and (source := read_tokenizer(inventory)) is not None:
            return _fields(source, n_vocab(inventory))
    return (string_field("tokenizer.ggml.model", "no_vocab"),)


def check_tokenizer(inventory: Inventory) -> None:
    """Checks that a file can read text, where it is to.

    Raises:
        CheckpointError: if the checkpoint has no tokenizer, or one that contradicts it.
        TargetError: if llama.cpp cannot express it.
    """
    fields = tokenizer(inventory)
    if not inventory.without_tokenizer and len(fields) == 1:
        raise missing_tokenizer(inventory.path)


@lru_cache(maxsize=8)
def _carried(model: GgufModel, n_vocab: int) -> tuple[Field, ...]:
    """The pairs of a GGUF model's own tokenizer, as they are."""
    n_tokens = len(model.values.get("tokenizer.ggml.tokens") or ())
    if n_tokens != n_vocab:
        raise CheckpointError(
            f"{model.path}: {n_tokens} tokens, but the embedding has {n_vocab} rows; fetch it again"
        )
    return carried_fields(model, "tokenizer.")


@lru_cache(maxsize=8)
def _fields(source: Tokenizer, n_vocab: int) -> tuple[Field, ...]:
    try:
        return tuple(_pairs(source, n_vocab))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{source.path}/tokenizer.json: unreadable tokenizer ({error!r}); fetch its files again"
        ) from None


def _pairs(source: Tokenizer, n_vocab: int) -> Iterator[Field]:
    _check_model(source)
    pieces = _form(source) if source.raw["model"].get("byte_fallback") else None
    pre = _pre_tokenizer(source) if pieces is None else None
    tokens, types = _tokens(source, n_vocab, pieces)
    yield string_field("tokenizer.ggml.model", pieces.model if pieces else "gpt2")
    if pre:
        yield string_field("tokenizer.ggml.pre", pre)
    yield array_field("tokenizer.ggml.tokens", tokens, GGUFValueType.STRING)
    if pieces:
        scores = _scores(source, tokens, pieces)
        yield array_field("tokenizer.ggml.scores", scores, GGUFValueType.FLOAT32)
    yield array_field("tokenizer.ggml.token_type", types, GGUFValueType.INT32)
    merges = _merges(source)
    if merges and not (pieces and pieces.model == "llama"):
        yield array_field("tokenizer.ggml.merges", merges, GGUFValueType.STRING)
    ends = dict(zip(("eot", "eom"), _other_ends(source), strict=False))
    for role, number in (source.special_ids | ends).items():
        yield uint_field(f"tokenizer.ggml.{ID_KEYS.get(role, role)}_token_id", number)
    yield bool_field("tokenizer.ggml.add_bos_token", source.adds("bos"))
    yield bool_field("tokenizer.ggml.add_eos_token", source.adds("eos"))
    if pieces:
        yield bool_field("tokenizer.ggml.add_space_prefix", pieces.prefix)
    yield from _chat_templates(source)


def _refusal(source: Tokenizer, what: str) -> TargetError:
    return TargetError(
        f"gguf: {source.path}/tokenizer.json: {what} has no counterpart in llama.cpp; "
        "use target safetensors"
    )


def _check_model(source: Tokenizer) -> None:
    model = source.raw["model"]
    names = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if model["type"] != "BPE" or any(model.get(name) for name in names):
        raise _refusal(source, f"model {model['type']} ({ {n: model.get(n) for n in names} })")


def _merges(source: Tokenizer) -> tuple[str, ...]:
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in source.raw["model"]["merges"])
    if bad := next((m for m in merges if m.count(" ") != 1), None):
        raise TargetError(f"gguf: {source.path}/tokenizer.json: merge {bad!r} is no pair of tokens")
    return merges


def _form(source: Tokenizer) -> Form:
    """How llama.cpp reads a tokenizer of SentencePiece's form."""
    raw = source.raw
    form = sentencepieces.form(raw)
    if form is None:
        cut = {name: raw.get(name) for name in ("normalizer", "pre_tokenizer")}
        raise _refusal(source, f"byte fallback with {cut}")
    if raw["model"].get("ignore_merges"):
        raise _refusal(source, "byte fallback with ignore_merges")
    if missing := sentencepieces.missing_bytes(raw):
        raise _refusal(source, f"byte fallback without token {missing[0]}")
    if form.model == "gemma4" and not sentencepieces.parts_line_ends(raw):
        raise _refusal(source, "a merge of line ends and other characters")
    return form


def _scores(source: Tokenizer, tokens: tuple[str, ...], form: Form) -> tuple[float, ...]:
    """Scores by id; a token that no merge makes has the lowest, which nothing looks at."""
    if form.model != "llama":
        return (0.0,) * len(tokens)  # merges are listed
    added = frozenset(a.content for a in source.added.values())
    try:
        scores = sentencepieces.scores(source.raw, added)
    except ValueError as error:
        raise _refusal(source, f"an order of merges ({error})") from None
    lowest = float(-len(scores))
    return tuple(scores.get(text, lowest) for text in tokens)


def _tokens(
    source: Tokenizer, n_vocab: int, form: Form | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and llama.cpp's types of tokens 0..n_vocab-1; rows without a token are unused."""
    texts = dict(source.texts)
    types = dict.fromkeys(texts, int(TokenType.NORMAL))
    if form:
        types |= {n: int(TokenType.BYTE) for n, t in texts.items() if sentencepieces.is_byte(t)}
    ends = _other_ends(source)
    for number, added in source.added.items():
        control = added.special or number in ends or _looks_special(added.content)
        if form and form.model == "gemma4" and added.content in _RENDERED:
            control = False
        types[number] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
        if form and not control:  # llama.cpp puts out such a text as it is
            texts[number] = added.content.replace(sentencepieces.SPACE, " ")
    if form and (unknown := source.raw["model"].get("unk_token")) in source.raw["model"]["vocab"]:
        types[source.raw["model"]["vocab"][unknown]] = int(TokenType.UNKNOWN)
    if cut := next((text for text in texts.values() if "\0" in text), None):
        raise _refusal(source, f"token {cut!r} with a NUL, where llama.cpp ends a text,")
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


_RENDERED = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
     "<tool_response|>", '<|"|>')
)  # fmt: skip
"""Markup of Gemma 4 that llama.cpp's parser of replies has to see, so that it is no control."""


def _other_ends(source: Tokenizer) -> list[int]:
    """Tokens that end a reply beside eos, and that llama.cpp does not know by their texts."""
    eos = source.special_ids.get("eos")
    ends = [n for n in source.end_ids if n != eos and source.texts[n] not in _KNOWN_ENDS]
    if len(ends) > 2:
        texts = [source.texts[n] for n in ends]
        raise TargetError(
            f"gguf: {source.path}/generation_config.json: {texts} end a reply, needed at most 2 "
            "that llama.cpp does not know by itself; remove the others from its eos_token_id"
        )
    return ends


_KNOWN_ENDS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
     "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
     "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
     "<｜end▁of▁sentence｜>", "[e~[")
)  # fmt: skip
"""Texts of tokens that llama.cpp ends a generation at whatever a file says."""


def _looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for markup whatever its file says.

    DeepSeek's `<｜User｜>` is not special there; as an ordinary token, a user's raw text could
    speak in another role.
    """
    marks = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(a) and text.endswith(z) for a, z in marks
    )


def _pre_tokenizer(source: Tokenizer) -> str:
    """llama.cpp's name of the way text is cut before the merges."""
    raw = source.raw
    normalizer = raw.get("normalizer") or {"type": "Sequence", "normalizers": []}
    if normalizer != {"type": "Sequence", "normalizers": []} and normalizer["type"] != "NFC":
        raise _refusal(source, f"normalizer {normalizer['type']}")
    try:
        steps = pre_tokenizers.chain(raw.get("pre_tokenizer"))
    except ValueError as error:
        raise _refusal(source, f"pre-tokenizer {error}") from None
    if steps not in pre_tokenizers.PRE_TOKENIZERS:
        raise _refusal(source, f"pre-tokenizer with patterns {steps}")
    names = pre_tokenizers.PRE_TOKENIZERS[steps]
    if names[0].lone_digits and (joined := _joined_digits(source)):
        raise _refusal(source, f"merge {joined} of digits, which {names[0].name} does not part,")
    ignores = bool(raw["model"].get("ignore_merges"))
    if named := next((n for n in names if n.ignores_merges is ignores), None):
        return named.name
    if text := _not_merged(source):
        raise _refusal(
            source,
            f"ignore_merges = {ignores} with pre-tokenizer {names[0].name}, where merges do not "
            f"give token {text!r},",
        )
    return names[0].name


def _joined_digits(source: Tokenizer) -> tuple[str, str] | None:
    """A merge of two digits, if there is one."""
    digits = frozenset("0123456789")
    merges = sentencepieces.pairs(source.raw)
    return next((pair for pair in merges if pair[0][-1] in digits and pair[1][0] in digits), None)


def _not_merged(source: Tokenizer) -> str | None:
    """A token that the merges alone do not give, if there is one."""
    from tokenizers import Tokenizer as Library

    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    plain = {**source.raw, **dict.fromkeys(names), "added_tokens": []}
    plain["model"] = {**source.raw["model"], "ignore_merges": False}
    try:
        library = Library.from_str(json.dumps(plain))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(first_line(error)) from None
    texts = list(source.raw["model"]["vocab"])
    encoded = library.encode_batch(texts, add_special_tokens=False)
    return next((text for text, e in zip(texts, encoded, strict=True) if len(e.ids) != 1), None)


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
