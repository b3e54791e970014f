"""The inventory of a checkpoint that nobody has fetched: from `config.json` alone, by shapes.

In: a `config.json`, of a family in `families.PLANNED`. Out: the `Inventory` that `read_inventory`
makes of such a checkpoint in bfloat16, without files; the experts of one whose `quant_method` is
mxfp4 are in that. Invariant: names come from the family's
table, and every layer is one of the sets that the family knows, so a config that asks for tensors
without a rule is an error.

Sources of shapes: transformers' `modeling_deepseek_v3`, `modeling_qwen3_moe`, `modeling_mixtral`
and `modeling_gpt_oss`; of multi-token prediction DeepSeek-V3's `README_WEIGHTS.md`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from allocator.checkpoint.inventory import MXFP4, Inventory, TensorInfo, check_config, read_json
from allocator.checkpoint.refusals import no_directory
from allocator.errors import CheckpointError
from allocator.families import Family, Role, planned_family_of
from allocator.formats import FORMATS

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
"""By `Family.part`: the tensors that a config asks for; experts stand for each of them."""

_DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def planned_inventory(config: Path | Mapping[str, Any]) -> Inventory:
    """What a checkpoint with this `config.json` holds; of its tensors, file and offset say nothing.

    Args:
        config: the file, the directory that it lies in, or its content.

    Raises:
        CheckpointError: if it is missing, of an unknown architecture, or lacks or contradicts what
            shapes are made of.
    """
    where, content = _read(config)
    family = planned_family_of(content)
    check_config(where, content, family)
    shapes = _SHAPES[family.model_type](content)
    tensors = {
        info.name: info
        for info in (
            *_outside(family, shapes),
            *_layers(family, content, shapes),
            *_nextn(family, content, shapes),
        )
    }
    found = Inventory(where, content, family, tensors)
    if not found.moe_layers:
        raise CheckpointError(
            f"{where}/config.json: no layer routes to experts; needed a MoE model's config.json"
        )
    return found


def _read(config: Path | Mapping[str, Any]) -> tuple[Path, Mapping[str, Any]]:
    if isinstance(config, Mapping):
        return Path("."), config
    path = config / "config.json" if config.is_dir() else config
    if not path.is_file() or path.suffix in (".gguf", ".safetensors"):
        raise CheckpointError(no_directory(config))
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: needed an object, as in a checkpoint's config.json")
    return path.parent, content


def _outside(family: Family, shapes: Shapes) -> Iterator[TensorInfo]:
    for rule in family.rules:
        if "{layer}" not in rule.pattern and (shape := shapes.get(family.part(rule))):
            yield _info(rule.pattern, shape, rule.role, None)


def _layers(family: Family, config: Mapping[str, Any], shapes: Shapes) -> Iterator[TensorInfo]:
    for layer in range(config["num_hidden_layers"]):
        yield from _layer(family, config, shapes, layer)


def _layer(
    family: Family, config: Mapping[str, Any], shapes: Shapes, layer: int
) -> Iterator[TensorInfo]:
    dense = _is_dense(family, config, layer)
    rules = [r for r in family.rules if "{layer}" in r.pattern and family.part(r) in shapes]
    rules = [
        r
        for r in rules
        if not family.part(r).startswith(("mlp.", "block_sparse_moe."))
        or (family.part(r) in _DENSE) is dense
    ]
    if (found := frozenset(map(family.part, rules))) not in family.layers:
        nearest = min(family.layers, key=lambda whole: len(whole ^ found))
        raise CheckpointError(
            f"config.json: layer {layer} would have {', '.join(sorted(nearest ^ found))} or not, "
            f"unlike any known layer of {family.model_type}; is this another architecture?"
        )
    for rule in rules:
        shape = shapes[family.part(rule)]
        routed = "{expert}" in rule.pattern
        for expert in range(config[family.n_experts_key(config)]) if routed else (None,):
            name = rule.pattern.format(layer=layer, expert=expert)
            dtype = MXFP4 if routed and _is_mxfp4(config) else "BF16"
            yield _info(name, shape, rule.role, layer, expert, dtype)


def _nextn(family: Family, config: Mapping[str, Any], shapes: Shapes) -> Iterator[TensorInfo]:
    """A layer like the others with an embedding, a head and a projection of its own."""
    hidden, vocab, first = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    own = {
        "embed_tokens": (vocab, hidden),
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
        "shared_head.norm": (hidden,),
        "shared_head.head": (vocab, hidden),
    }
    for layer in range(first, first + (config.get("num_nextn_predict_layers") or 0)):
        for name, shape in own.items():
            yield _info(f"model.layers.{layer}.{name}.weight", shape, Role.NEXTN, layer)
        for t in _layer(family, config, shapes, layer):
            yield _info(t.name, t.shape, Role.NEXTN, layer, t.expert, t.dtype)


def _info(
    name: str,
    shape: Shape,
    role: Role,
    layer: int | None,
    expert: int | None = None,
    dtype: str = "BF16",
) -> TensorInfo:
    nbytes = FORMATS[dtype].nbytes(shape)
    return TensorInfo(name, shape, dtype, "", 0, nbytes, role, layer, expert)


def _is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether experts are in MXFP4, and nothing else: transformers converts no other modules."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "mxfp4"


def _is_dense(family: Family, config: Mapping[str, Any], layer: int) -> bool:
    if family.model_type == "deepseek_v3":
        return layer < _int(config, "first_k_dense_replace", 0)
    if family.model_type == "qwen3_moe":
        every = _int(config, "decoder_sparse_step", 1, default=1)
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise CheckpointError(f"config.json: mlp_only_layers is {dense!r}, needed a list")
        return layer in dense or (layer + 1) % every != 0
    return False


# -- shapes


def _common(config: Mapping[str, Any]) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tied = bool(config.get("tie_word_embeddings", False))
    return {
        "model.embed_tokens": (vocab, hidden),
        **({} if tied else {"lm_head": (vocab, hidden)}),
        **dict.fromkeys(("model.norm", *_NORMS), (hidden,)),
    }


def _mlp(prefix: str, hidden: int, width: int, names: tuple[str, str, str]) -> Shapes:
    """Gate, up and down, by their names."""
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return {prefix + name: shape for name, shape in zip(names, shapes, strict=True)}


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _gqa(config: Mapping[str, Any]) -> Shapes:
    """Attention with a head of keys and values per group of heads."""
    hidden, heads = config["hidden_size"], _int(config, "num_attention_heads", 1)
    head = config.get("head_dim") or hidden // heads
    kv = _int(config, "num_key_value_heads", 1, default=heads) * head
    return {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads * head),
    }


def _deepseek_v3(config: Mapping[str, Any]) -> Shapes:
    _refuse(config, "attention_bias")
    hidden, heads = config["hidden_size"], _int(config, "num_attention_heads", 1)
    rank, rope = _int(config, "kv_lora_rank", 1), _int(config, "qk_rope_head_dim", 1)
    nope, value = _int(config, "qk_nope_head_dim", 1), _int(config, "v_head_dim", 1)
    n, width = config["n_routed_experts"], _int(config, "moe_intermediate_size", 1)
    q = heads * (nope + rope)
    shapes = _common(config) | {
        "self_attn.kv_a_proj_with_mqa": (rank + rope, hidden),
        "self_attn.kv_a_layernorm": (rank,),
        "self_attn.kv_b_proj": (heads * (nope + value), rank),
        "self_attn.o_proj": (hidden, heads * value),
        "mlp.gate": (n, hidden),
        "mlp.gate.e_score_correction_bias": (n,),
    }
    if config.get("q_lora_rank") is None:
        shapes["self_attn.q_proj"] = (q, hidden)
    else:
        q_rank = _int(config, "q_lora_rank", 1)
        shapes["self_attn.q_a_proj"] = (q_rank, hidden)
        shapes["self_attn.q_a_layernorm"] = (q_rank,)
        shapes["self_attn.q_b_proj"] = (q, q_rank)
    shapes |= _mlp("mlp.", hidden, _int(config, "intermediate_size", 1), _PROJECTIONS)
    shapes |= _mlp("mlp.experts.{expert}.", hidden, width, _PROJECTIONS)
    if shared := config.get("n_shared_experts"):
        shapes |= _mlp("mlp.shared_experts.", hidden, shared * width, _PROJECTIONS)
    return shapes


def _qwen3_moe(config: Mapping[str, Any]) -> Shapes:
    _refuse(config, "attention_bias")
    hidden, attention = config["hidden_size"], _gqa(config)
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    n = config.get("num_experts", config.get("num_local_experts"))
    assert isinstance(n, int)
    return (
        _common(config)
        | attention
        | {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,), "mlp.gate": (n, hidden)}
        | _mlp("mlp.", hidden, _int(config, "intermediate_size", 1), _PROJECTIONS)
        | _mlp(
            "mlp.experts.{expert}.", hidden, _int(config, "moe_intermediate_size", 1), _PROJECTIONS
        )
    )


def _mixtral(config: Mapping[str, Any]) -> Shapes:
    hidden, width = config["hidden_size"], _int(config, "intermediate_size", 1)
    return (
        _common(config)
        | _gqa(config)
        | {"block_sparse_moe.gate": (config["num_local_experts"], hidden)}
        | _mlp("block_sparse_moe.experts.{expert}.", hidden, width, ("w1", "w3", "w2"))
    )


def _gpt_oss(config: Mapping[str, Any]) -> Shapes:
    if not config.get("attention_bias", True):
        raise CheckpointError("config.json: attention_bias is false, needed true as in gpt_oss")
    hidden, width = config["hidden_size"], _int(config, "intermediate_size", 1)
    n, attention = config["num_local_experts"], _gqa(config)
    return (
        _common(config)
        | attention
        | {f"{name}.bias": shape[:1] for name, shape in attention.items()}
        | {"self_attn.sinks": (_int(config, "num_attention_heads", 1),)}
        | {"mlp.router": (n, hidden), "mlp.router.bias": (n,)}
        | _mlp("mlp.experts.{expert}.", hidden, width, _PROJECTIONS)
        | dict.fromkeys(("mlp.experts.gate_proj_bias", "mlp.experts.up_proj_bias"), (n, width))
        | {"mlp.experts.down_proj_bias": (n, hidden)}
    )


_SHAPES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "deepseek_v3": _deepseek_v3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
}


def _refuse(config: Mapping[str, Any], key: str) -> None:
    if config.get(key):
        raise CheckpointError(
            f"config.json: {key} is {config[key]!r}, but {config['model_type']} is not supported "
            "with biases; needed a checkpoint without them"
        )


def _int(config: Mapping[str, Any], key: str, least: int, *, default: int | None = None) -> int:
    value = config.get(key, default)
    if type(value) is not int or value < least:
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a number from {least}")
    return value
