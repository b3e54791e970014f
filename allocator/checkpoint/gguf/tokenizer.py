"""The tokenizer of a GGUF file, so that calibration text is cut as llama.cpp cuts text with it.

In: the pairs of a file. Out: what `tokenizer.json` and `tokenizer_config.json` would say.
Invariant: ids are those of llama.cpp, so there is no normalizer, which llama.cpp has none of; what
is not known to be cut alike by the `tokenizers` library is an error.

Sources: llama.cpp's vocabulary loader (src/llama-vocab.cpp).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from allocator.checkpoint.gguf.pre_tokenizers import ALSO_NAMED, PRE_TOKENIZERS, steps
from allocator.checkpoint.gguf.sentencepieces import PREPEND, REPLACE
from allocator.errors import CheckpointError

_T = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)  # `llama_token_type`
ID_KEYS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding",
    "mask": "mask",
}  # fmt: skip
"""What llama.cpp calls a role, in keys of ids."""
_OWN_IDS = {"bos": 1, "eos": 2, "unk": 0}  # of model llama, where a file has none
_WITH_BOS = ("llama-bpe", "tekken")  # to which llama.cpp adds bos unless a file says otherwise
_WAY_OUT = "give calibration documents as ids"

Pairs = Mapping[str, Any]


def has_tokenizer(pairs: Pairs) -> bool:
    """Returns whether a file can read text, of its values by key."""
    return pairs.get(f"{_T}model") not in (None, "no_vocab", "none")


def tokenizer_files(pairs: Pairs, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what `tokenizer.json` and `tokenizer_config.json` of a file's tokenizer say.

    Args:
        pairs: the file's values by key.
        where: the file, for messages.

    Raises:
        CheckpointError: if it is damaged, or not known to be cut alike.
    """
    tokens = _list(pairs, "tokens", str, where)
    types = _list(pairs, "token_type", int, where) or (_NORMAL,) * len(tokens)
    if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(
            f"{where}: {len(tokens)} tokens ({len(set(tokens))} of them different) of "
            f"{len(types)} types; needed a type for each of different ones: fetch it again"
        )
    vocabulary = {
        text: n for n, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED
    }
    kind = pairs[f"{_T}model"]
    if kind == "gpt2":
        name, parts = _byte_level(pairs, vocabulary, where)
        adds_bos = name in _WITH_BOS
    elif kind == "llama":
        normal = {text: n for text, n in vocabulary.items() if types[n] == _NORMAL}
        parts, adds_bos = _sentence_piece(pairs, vocabulary, normal, where), True
        unknown = [text for text, n in vocabulary.items() if types[n] == _UNKNOWN]
        parts["model"]["unk_token"] = unknown[0] if unknown else None
    else:
        raise _refusal(where, f"{_T}model is {kind!r}, needed gpt2 or llama")
    added = [
        {"id": n, "content": text, "special": types[n] != _USER_DEFINED, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for text, n in vocabulary.items() if types[n] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    raw = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}
    return raw, _config(pairs, tokens, _OWN_IDS if kind == "llama" else {}, adds_bos, where)


def _refusal(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what}, to cut text as llama.cpp does; {_WAY_OUT}")


def _list(pairs: Pairs, key: str, kind: type, where: str) -> tuple[Any, ...]:
    """The values of an array; none if there is none."""
    values = pairs.get(_T + key, ())
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
        raise CheckpointError(f"{where}: {_T}{key} is no list of {kind.__name__}; fetch it again")
    return values


def _byte_level(
    pairs: Pairs, vocabulary: Mapping[str, int], where: str
) -> tuple[str, dict[str, Any]]:
    """Parts of a `tokenizer.json` of GPT-2's form, and llama.cpp's name of the way text is cut."""
    named = pairs.get(f"{_T}pre")
    name = ALSO_NAMED.get(str(named), named)
    known = {of.name: (chain, of) for chain, all_of in PRE_TOKENIZERS.items() for of in all_of}
    if name not in known:
        raise _refusal(where, f"{_T}pre is {named!r}, needed one of {', '.join(sorted(known))}")
    chain, of = known[name]
    merges = [merge.partition(" ") for merge in _list(pairs, "merges", str, where)]
    lacks = next((m for m in merges if not {m[0], m[2], m[0] + m[2]} <= vocabulary.keys()), None)
    if not merges or lacks is not None:
        got = "no merges" if lacks is None else f"a merge of {lacks[0]!r} and {lacks[2]!r}"
        raise _refusal(where, f"{got}, needed merges of tokens")
    return of.name, {
        "normalizer": None,
        "pre_tokenizer": steps(chain),
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "vocab": dict(vocabulary),
            "merges": [[left, right] for left, _, right in merges],
            "ignore_merges": of.ignores_merges,
        },
    }  # fmt: skip


def _sentence_piece(
    pairs: Pairs, vocabulary: Mapping[str, int], normal: Mapping[str, int], where: str
) -> dict[str, Any]:
    """Parts of a `tokenizer.json` of SentencePiece's form, but for its unknown token."""
    scores = _list(pairs, "scores", float, where)
    if len(scores) < len(vocabulary):
        raise _refusal(where, f"{len(scores)} scores, needed one for each token")
    prefix = pairs.get(f"{_T}add_space_prefix", True) is True
    ends = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [PREPEND, REPLACE] if prefix else [REPLACE],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *ends,
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": dict(vocabulary),
            "merges": list(_merges(normal, scores, where)),
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
        },
    }


def _merges(
    vocabulary: Mapping[str, int], scores: Sequence[float], where: str
) -> Iterator[list[str]]:
    """Yields every pair whose union is a token, that of the highest score first.

    llama.cpp merges two pieces whenever their union is a token, in the order of scores.
    """
    cuts: dict[str, list[list[str]]] = {}
    for text in sorted(vocabulary, key=len):  # its parts are shorter
        found = [
            [text[:at], text[at:]]
            for at in range(1, len(text))
            if all(p in vocabulary and (len(p) == 1 or p in cuts) for p in (text[:at], text[at:]))
        ]
        if found:
            cuts[text] = found
    order = sorted(cuts, key=lambda text: -scores[vocabulary[text]])
    if len({scores[vocabulary[text]] for text in order}) < len(order):
        raise _refusal(where, "tokens of one score, needed scores that order all merges")
    for text in order:
        yield from cuts[text]


def _config(
    pairs: Pairs, tokens: Sequence[str], own_ids: Mapping[str, int], adds_bos: bool, where: str
) -> dict[str, Any]:
    """What `tokenizer_config.json` would say."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, key in ID_KEYS.items():
        number = pairs.get(f"{_T}{key}_token_id", own_ids.get(role))
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise CheckpointError(
                f"{where}: {_T}{key}_token_id is {number!r} of {len(tokens)} tokens; fetch it again"
            )
        config[f"{role}_token"] = tokens[number]
    config["add_bos_token"] = pairs.get(f"{_T}add_bos_token", adds_bos) is True
    config["add_eos_token"] = pairs.get(f"{_T}add_eos_token", False) is True
    begin = "tokenizer.chat_template"
    templates = {"default": pairs[begin]} if begin in pairs else {}
    for name in pairs.get(f"{begin}s", ()):
        if f"{begin}.{name}" in pairs:
            templates[str(name)] = pairs[f"{begin}.{name}"]
    if templates.keys() == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": n, "template": text} for n, text in templates.items()]
    return config
