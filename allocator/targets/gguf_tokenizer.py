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

from allocator.errors import CheckpointError, TargetError
from allocator.families import Role
from allocator.inventory import Inventory, read_json
from allocator.targets.gguf_fields import Field, array_field, bool_field, string_field, uint_field

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def tokenizer(inventory: Inventory) -> tuple[Field, ...]:
    """The tokenizer's pairs; read once per version of its files.

    Raises:
        CheckpointError: if its files contradict the checkpoint.
        TargetError: if llama.cpp cannot express it.
    """
    versions = []
    for name in _TOKENIZER_FILES:
        try:
            stat = (inventory.path / name).stat()
            versions.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            versions.append((0, 0))
    ids = tuple(
        (role, _first(inventory.config.get(f"{role}_token_id"))) for role in ("bos", "eos", "pad")
    )
    return _tokenizer(inventory.path, n_vocab(inventory), ids, tuple(versions))


@lru_cache(maxsize=8)
def _tokenizer(
    path: Path,
    n_vocab: int,
    config_ids: tuple[tuple[str, int | None], ...],
    versions: tuple[tuple[int, int], ...],
) -> tuple[Field, ...]:
    if not (path / "tokenizer.json").exists():
        return (string_field("tokenizer.ggml.model", "no_vocab"),)
    raw = read_json(path / "tokenizer.json")
    config_path = path / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    try:
        return tuple(_bpe(path, raw, config, n_vocab, dict(config_ids)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path}/tokenizer.json: unreadable tokenizer ({error!r}); fetch the file again"
        ) from None


def _bpe(
    path: Path,
    raw: Mapping[str, Any],
    config: Mapping[str, Any],
    n_vocab: int,
    config_ids: Mapping[str, int | None],
) -> Iterator[Field]:
    pre = _pre_tokenizer(path, raw)
    tokens, types = _tokens(path, raw, n_vocab)
    yield string_field("tokenizer.ggml.model", "gpt2")
    yield string_field("tokenizer.ggml.pre", pre)
    yield array_field("tokenizer.ggml.tokens", tokens, GGUFValueType.STRING)
    yield array_field("tokenizer.ggml.token_type", types, GGUFValueType.INT32)
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"])
    if bad := next((m for m in merges if m.count(" ") != 1), None):
        raise TargetError(
            f"gguf: {path}/tokenizer.json: merge {bad!r} is no pair of byte-level tokens"
        )
    if merges:
        yield array_field("tokenizer.ggml.merges", merges, GGUFValueType.STRING)
    ids = {text: number for number, text in enumerate(tokens)}
    found: dict[str, int] = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        text = config.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        number = ids.get(text, config_ids[role]) if text else config_ids[role]
        if number is not None:
            found[role] = number
            yield uint_field(f"tokenizer.ggml.{name}_token_id", number)
    yield bool_field("tokenizer.ggml.add_bos_token", _adds(raw, config, "bos", tokens, found))
    yield bool_field("tokenizer.ggml.add_eos_token", _adds(raw, config, "eos", tokens, found))
    yield from _chat_template(path, config)


def _tokens(
    path: Path, raw: Mapping[str, Any], n_vocab: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and llama.cpp's types of tokens 0..n_vocab-1; rows without a token are unused."""
    texts = {int(number): str(text) for text, number in raw["model"]["vocab"].items()}
    types = dict.fromkeys(texts, int(TokenType.NORMAL))
    for added in raw.get("added_tokens") or ():
        number = int(added["id"])
        texts[number] = str(added["content"])
        types[number] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if min(texts) < 0 or max(texts) >= n_vocab:
        raise CheckpointError(
            f"{path}/tokenizer.json: token {max(texts)}, but the embedding has {n_vocab} rows; "
            "this tokenizer belongs to another checkpoint"
        )
    return (
        tuple(texts.get(n, f"[PAD{n}]") for n in range(n_vocab)),
        tuple(types.get(n, int(TokenType.UNUSED)) for n in range(n_vocab)),
    )


# llama.cpp's name of a pre-tokenizer by the patterns of tokenizer.json, line ends escaped
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PRE_TOKENIZERS = {
    (): "gpt-2",
    (_WORDS + r"\p{N}" + _TAIL,): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _TAIL,): "llama-bpe",
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
        r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "deepseek-v3",
}


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
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise refuse(
            f"pre-tokenizer {[s['type'] for s in steps]} with prefix space or no byte level"
        )
    # ByteLevel cuts by GPT-2's pattern itself unless told not to
    if bool(last.get("use_regex", True)) is bool(patterns) or patterns not in _PRE_TOKENIZERS:
        raise refuse(f"pre-tokenizer with patterns {patterns}")
    name = _PRE_TOKENIZERS[patterns]
    if bool(model.get("ignore_merges")) is not (name == "llama-bpe"):
        raise refuse(f"ignore_merges = {model.get('ignore_merges')} with pre-tokenizer {name}")
    return name


def _adds(
    raw: Mapping[str, Any],
    config: Mapping[str, Any],
    role: str,
    tokens: tuple[str, ...],
    ids: Mapping[str, int],
) -> bool:
    """Whether the tokenizer itself puts bos before, or eos after, a text."""
    if role not in ids:
        return False
    if (told := config.get(f"add_{role}_token")) is not None:
        return bool(told)
    post = raw.get("post_processor") or {}
    steps = post.get("processors", [post])
    single: list[dict[str, Any]] = next(
        (s["single"] for s in steps if s.get("type") == "TemplateProcessing"), []
    )
    edge = (single[0] if role == "bos" else single[-1]) if single else {}
    return bool(edge.get("SpecialToken", {}).get("id") == tokens[ids[role]])


def _chat_template(path: Path, config: Mapping[str, Any]) -> Iterator[Field]:
    file = path / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if isinstance(template, str) and template:
        yield string_field("tokenizer.chat_template", template)


# -- small parts


def n_vocab(inventory: Inventory) -> int:
    """Rows of the embedding."""
    return inventory.of_role(Role.EMBEDDING)[0].shape[0]


def _first(value: Any) -> int | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else None
