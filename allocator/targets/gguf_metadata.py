"""Every key and value of a GGUF file, so that stock llama.cpp computes as the checkpoint does.

In: an inventory and the two expert counts. Out: `Field`s in file order, and their exact bytes.
Invariant: a config or tokenizer that llama.cpp would silently compute in another way is an error,
and the bytes do not depend on the expert counts.

Sources: llama.cpp's loaders of `deepseek2` and `qwen3moe`; gguf-py's `constants.Keys`; the GGUF
specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFValueType, TokenType

from allocator.errors import CheckpointError, TargetError
from allocator.families import Role
from allocator.inventory import Inventory, read_json

Value = int | float | bool | str | tuple[int, ...] | tuple[str, ...]

_SCALAR_BYTES = {GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
                 GGUFValueType.BOOL: 1}  # fmt: skip
_SIGMOID = 2  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Field:
    """One key/value pair; `element` is the type of an array's values."""

    key: str
    value: Value
    type: GGUFValueType
    element: GGUFValueType | None = None

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the pair in the file."""
        key = 8 + len(self.key.encode())  # length + text
        if self.element is None:
            return key + 4 + _value_bytes(self.type, self.value)  # type + value
        assert isinstance(self.value, tuple)
        values = sum(_value_bytes(self.element, v) for v in self.value)
        return key + 4 + 4 + 8 + values  # type + element type + count + values


def _value_bytes(kind: GGUFValueType, value: Any) -> int:
    if kind == GGUFValueType.STRING:
        return 8 + len(value.encode())
    return _SCALAR_BYTES[kind]


def metadata_bytes(fields: Iterable[Field]) -> int:
    """Bytes of the key/value section as gguf-py's `GGUFWriter` writes it."""
    return sum(field.nbytes for field in fields)


def metadata(inventory: Inventory, *, n_experts: int, experts_used: int) -> list[Field]:
    """Every key/value pair of the file, `general.architecture` first.

    There is no `general.file_type`: a mix has none, and without the key llama.cpp names the most
    frequent tensor type. No value depends on where the checkpoint lies: same weights, same bytes.

    Args:
        inventory: the checkpoint.
        n_experts: routed experts that every MoE layer retains.
        experts_used: routed experts per token.

    Raises:
        CheckpointError: if `config.json` or the tokenizer lacks or contradicts what is needed.
        TargetError: if llama.cpp cannot express the model, its tokenizer or these counts.
    """
    return [
        _string("general.architecture", inventory.family.gguf_architecture),
        _string("general.type", "model"),
        _string("general.name", inventory.family.model_type),
        _uint("general.quantization_version", GGML_QUANT_VERSION),
        *hyperparameters(inventory, n_experts=n_experts, experts_used=experts_used),
        *tokenizer(inventory),
    ]


# -- hyperparameters


def hyperparameters(inventory: Inventory, *, n_experts: int, experts_used: int) -> list[Field]:
    """The pairs that say how the model is computed; none of them is read from another file.

    Raises:
        CheckpointError: if `config.json` lacks or contradicts what is needed.
        TargetError: if llama.cpp computes the model in another way, or not with these counts.
    """
    arch = inventory.family.gguf_architecture
    _check_router_groups(inventory, n_experts, experts_used)
    of_family = _deepseek2 if arch == "deepseek2" else _qwen3moe
    return [
        *_shared_hparams(inventory, arch),
        _uint(f"{arch}.expert_count", n_experts),
        _uint(f"{arch}.expert_used_count", experts_used),
        *of_family(inventory, arch),
        *_rope(inventory, arch),
    ]


def _check_router_groups(inventory: Inventory, n_experts: int, experts_used: int) -> None:
    groups = inventory.expert_groups
    if groups == 1:
        return
    size, chosen = n_experts // groups, inventory.expert_groups_used
    # a group is ranked by its two best experts, and only the chosen groups' experts are used
    if n_experts % groups or size < 2 or experts_used > size * chosen:
        raise TargetError(
            f"gguf: {experts_used} of {n_experts} retained experts in {groups} router groups "
            f"(n_group) of which {chosen} are chosen; retain a multiple of {groups}, at least two "
            f"per group and {experts_used} in the chosen ones"
        )


def _shared_hparams(inventory: Inventory, arch: str) -> Iterator[Field]:
    config = inventory.config
    yield _uint(f"{arch}.vocab_size", _n_vocab(inventory))
    yield _uint(f"{arch}.block_count", inventory.n_layers)
    yield _uint(f"{arch}.context_length", _int(config, "max_position_embeddings"))
    yield _uint(f"{arch}.embedding_length", _int(config, "hidden_size"))
    yield _uint(f"{arch}.feed_forward_length", _int(config, "intermediate_size"))
    yield _uint(f"{arch}.expert_feed_forward_length", _int(config, "moe_intermediate_size"))
    yield _uint(f"{arch}.attention.head_count", _int(config, "num_attention_heads"))
    yield _float(
        f"{arch}.attention.layer_norm_rms_epsilon",
        _number({"rms_norm_eps": 1e-6, **config}, "rms_norm_eps"),
    )
    if config.get("hidden_act", "silu") != "silu":
        raise TargetError(
            f"gguf: llama.cpp computes {arch} with silu, config.json says hidden_act = "
            f"{config['hidden_act']!r}; use target safetensors"
        )


def _deepseek2(inventory: Inventory, arch: str) -> Iterator[Field]:
    config = inventory.config
    rank, rope = _int(config, "kv_lora_rank"), _int(config, "qk_rope_head_dim")
    nope, value = _int(config, "qk_nope_head_dim"), _int(config, "v_head_dim")
    if config.get("scoring_func") not in (None, "sigmoid"):
        raise TargetError(
            f"gguf: config.json says scoring_func = {config['scoring_func']!r}, which transformers "
            "computes as a sigmoid all the same; set it to 'sigmoid' if that is meant"
        )
    # multi-head latent attention runs as attention with one key/value head of rank + rope
    yield _uint(f"{arch}.attention.head_count_kv", 1)
    yield _uint(f"{arch}.attention.key_length", rank + rope)
    yield _uint(f"{arch}.attention.value_length", rank)
    yield _uint(f"{arch}.attention.key_length_mla", nope + rope)
    yield _uint(f"{arch}.attention.value_length_mla", value)
    yield _uint(f"{arch}.attention.kv_lora_rank", rank)
    if config.get("q_lora_rank") is not None:
        yield _uint(f"{arch}.attention.q_lora_rank", _int(config, "q_lora_rank"))
    yield _uint(f"{arch}.rope.dimension_count", rope)
    yield _uint(f"{arch}.leading_dense_block_count", _leading_dense(inventory))
    yield _uint(f"{arch}.expert_shared_count", _int(config, "n_shared_experts"))
    yield _float(f"{arch}.expert_weights_scale", _number(config, "routed_scaling_factor"))
    yield _bool(f"{arch}.expert_weights_norm", bool(config.get("norm_topk_prob", True)))
    yield _uint(f"{arch}.expert_gating_func", _SIGMOID)
    if inventory.expert_groups > 1:
        yield _uint(f"{arch}.expert_group_count", inventory.expert_groups)
        yield _uint(f"{arch}.expert_group_used_count", inventory.expert_groups_used)


def _qwen3moe(inventory: Inventory, arch: str) -> Iterator[Field]:
    config = inventory.config
    for key, needed in (("norm_topk_prob", True), ("use_sliding_window", False)):
        if bool(config.get(key, False)) is not needed:
            raise TargetError(
                f"gguf: llama.cpp computes {arch} with {key} = {needed}, config.json says "
                f"{config.get(key)!r}; use target safetensors"
            )
    if _leading_dense(inventory):
        raise TargetError(
            f"gguf: llama.cpp needs experts in every layer of {arch}, some are dense; "
            "use target safetensors"
        )
    head = config.get("head_dim") or _int(config, "hidden_size") // _int(
        config, "num_attention_heads"
    )
    yield _uint(f"{arch}.attention.head_count_kv", _int(config, "num_key_value_heads"))
    yield _uint(f"{arch}.attention.key_length", head)
    yield _uint(f"{arch}.attention.value_length", head)
    yield _uint(f"{arch}.rope.dimension_count", head)


def _leading_dense(inventory: Inventory) -> int:
    first = inventory.moe_layers[0]
    if inventory.moe_layers != tuple(range(first, inventory.n_layers)):
        raise TargetError(
            f"gguf: llama.cpp needs experts in every layer from the first on that has them, got "
            f"layers {inventory.moe_layers} of {inventory.n_layers}; use target safetensors"
        )
    return first


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are rotated, from wherever `config.json` says so, as transformers takes it.

    Raises:
        CheckpointError: if it is no table.
        TargetError: if it differs between kinds of layers.
    """
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json: rope_scaling is {found!r}, needed a table")
    if kinds := [key for key, value in found.items() if isinstance(value, dict)]:
        raise TargetError(
            f"gguf: rope_parameters differ by kind of layer ({', '.join(kinds)}), which llama.cpp "
            "does not compute in this architecture; use target safetensors"
        )
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **found}
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    longest = "max_position_embeddings"
    rope.setdefault(f"original_{longest}", config.get(longest))
    if f"original_{longest}" in config:
        rope[f"original_{longest}"] = config[f"original_{longest}"]
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    return rope


def yarn_betas(inventory: Inventory) -> tuple[float, float] | None:
    """`beta_fast` and `beta_slow` that llama.cpp must be told; None where its own are right.

    Its loaders of these architectures read neither from the file.
    """
    rope = rope_parameters(inventory.config)
    if rope["rope_type"] != "yarn":
        return None
    betas = tuple(
        _number(rope, key) if rope.get(key) else own for key, own in zip(_BETAS, _OWN, strict=True)
    )
    return None if betas == _OWN else (betas[0], betas[1])


_BETAS, _OWN = ("beta_fast", "beta_slow"), (32.0, 1.0)


def _rope(inventory: Inventory, arch: str) -> Iterator[Field]:
    rope = rope_parameters(inventory.config)
    yield _float(f"{arch}.rope.freq_base", _number(rope, "rope_theta"))
    if rope["rope_type"] == "default":
        return
    _check_yarn(rope, arch)
    if arch == "deepseek2":
        # the loader divides by 0.1 again (TAG_DEEPSEEK2_YARN_LOG_MUL_FIX)
        yield _float(
            f"{arch}.rope.scaling.yarn_log_multiplier", 0.1 * _number(rope, "mscale_all_dim")
        )
    yield _string(f"{arch}.rope.scaling.type", "yarn")
    yield _float(f"{arch}.rope.scaling.factor", _number(rope, "factor"))
    yield _uint(
        f"{arch}.rope.scaling.original_context_length",
        _int(rope, "original_max_position_embeddings"),
    )
    for key in _BETAS:
        if rope.get(key) is not None:
            yield _float(f"{arch}.rope.scaling.yarn_{key}", _number(rope, key))


def _check_yarn(rope: Mapping[str, Any], arch: str) -> None:
    """Refuses what llama.cpp rotates otherwise, and cannot be told."""
    odd = {
        "rope_type": rope["rope_type"] == "yarn",
        "truncate": rope.get("truncate", True) is True,
        "partial_rotary_factor": rope["partial_rotary_factor"] in (None, 1),
    }
    if found := next((key for key, fine in odd.items() if not fine), None):
        raise TargetError(
            f"gguf: rope with {found} = {rope[found]!r} is not known to be computed by llama.cpp "
            "as by transformers; use target safetensors"
        )
    scale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    # llama.cpp assumes mscale == mscale_all_dim (or mscale = 1), as in every released model
    if arch == "deepseek2" and (not all_dim or scale != all_dim):
        raise TargetError(
            f"gguf: llama.cpp needs equal mscale and mscale_all_dim in deepseek2, config.json "
            f"has {scale!r} and {all_dim!r}; use target safetensors"
        )
    theirs, ours = _attention_factor(rope), 1.0
    if arch != "deepseek2":
        ours = 1 + 0.1 * math.log(_number(rope, "factor"))
    if not math.isclose(theirs, ours, rel_tol=1e-6):
        raise TargetError(
            f"gguf: llama.cpp multiplies rotated queries and keys of {arch} by {ours:.6g}, "
            f"attention_factor (or mscale) in config.json means {theirs:.6g}; use target "
            "safetensors"
        )


def _attention_factor(rope: Mapping[str, Any]) -> float:
    """What transformers multiplies cosines and sines by under yarn."""
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    factor = _number(rope, "factor")

    def scaled(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scaled(_number(rope, "mscale")) / scaled(_number(rope, "mscale_all_dim"))
    return scaled(1.0)


# -- tokenizer


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
    return _tokenizer(inventory.path, _n_vocab(inventory), ids, tuple(versions))


@lru_cache(maxsize=8)
def _tokenizer(
    path: Path,
    n_vocab: int,
    config_ids: tuple[tuple[str, int | None], ...],
    versions: tuple[tuple[int, int], ...],
) -> tuple[Field, ...]:
    if not (path / "tokenizer.json").exists():
        return (_string("tokenizer.ggml.model", "no_vocab"),)
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
    yield _string("tokenizer.ggml.model", "gpt2")
    yield _string("tokenizer.ggml.pre", pre)
    yield _array("tokenizer.ggml.tokens", tokens, GGUFValueType.STRING)
    yield _array("tokenizer.ggml.token_type", types, GGUFValueType.INT32)
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"])
    if bad := next((m for m in merges if m.count(" ") != 1), None):
        raise TargetError(
            f"gguf: {path}/tokenizer.json: merge {bad!r} is no pair of byte-level tokens"
        )
    if merges:
        yield _array("tokenizer.ggml.merges", merges, GGUFValueType.STRING)
    ids = {text: number for number, text in enumerate(tokens)}
    found: dict[str, int] = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        text = config.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        number = ids.get(text, config_ids[role]) if text else config_ids[role]
        if number is not None:
            found[role] = number
            yield _uint(f"tokenizer.ggml.{name}_token_id", number)
    yield _bool("tokenizer.ggml.add_bos_token", _adds(raw, config, "bos", tokens, found))
    yield _bool("tokenizer.ggml.add_eos_token", _adds(raw, config, "eos", tokens, found))
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
        yield _string("tokenizer.chat_template", template)


# -- small parts


def _n_vocab(inventory: Inventory) -> int:
    return inventory.of_role(Role.EMBEDDING)[0].shape[0]


def _first(value: Any) -> int | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else None


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a number")
    if key == "factor" and not value > 0:
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a positive number")
    return float(value)


def _int(config: Mapping[str, Any], key: str) -> int:
    value = _number(config, key)
    if value != int(value) or not 0 <= value < 2**32:
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a whole number")
    return int(value)


def _uint(key: str, value: int) -> Field:
    return Field(key, value, GGUFValueType.UINT32)


def _float(key: str, value: float) -> Field:
    return Field(key, value, GGUFValueType.FLOAT32)


def _bool(key: str, value: bool) -> Field:
    return Field(key, value, GGUFValueType.BOOL)


def _string(key: str, value: str) -> Field:
    return Field(key, value, GGUFValueType.STRING)


def _array(key: str, value: tuple[int, ...] | tuple[str, ...], element: GGUFValueType) -> Field:
    return Field(key, value, GGUFValueType.ARRAY, element)
