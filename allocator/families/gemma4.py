"""Gemma-4, those with routed experts: the language model alone.

Sources: transformers' `modeling_gemma4` and `configuration_gemma4`; llama.cpp's loader and graph of
`gemma4`, and its converter. Every layer has a dense block, and routed experts beside it. Layers of
full attention have heads of another width, and their keys are their values where config.json says
so. There the first channels of a head alone are rotated, each with its partner in the other half,
as if all were: llama.cpp is told so by a tensor of factors, which no checkpoint has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from allocator.errors import CheckpointError, TargetError
from allocator.families.base import Family, Parts, Rule, Stack
from allocator.families.common import (
    BASE,
    DENSE,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    KEYS_VALUES,
    MLP,
    NEVER_NULL,
    PROJECTIONS,
    B,
    L,
    expert_rules,
    layer,
)
from allocator.families.config import (
    FULL,
    SLIDING,
    Config,
    count,
    is_tied_by_default,
    number,
)
from allocator.families.gguf import Fixed, Gguf, GgufFacts, Made, ModelFacts, Pair, Window
from allocator.families.keys import Keys
from allocator.families.roles import Role
from allocator.families.rope import rope_of_kind

_INTERVAL = 6  # transformers' own: the last of every six layers is full
_GELU = "gelu_pytorch_tanh"
_ROPE = {  # transformers' own, where a config has none
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
_UNROTATED = 1e30
"""What llama.cpp divides the angle of a channel by that is not rotated, as its converter does."""
_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
}
_R = L + "router."
_RULES = (
    *BASE,
    *KEYS_VALUES,
    *HEAD_NORMS,
    *(Rule(f"{L}{own}.weight", Role.NORM, "hidden", f"{B}{theirs}.weight")
      for own, theirs in _NORMS.items()),
    *MLP[1:],
    Rule(_R + "proj.weight", Role.ROUTER, "experts x hidden", B + "ffn_gate_inp.weight"),
    Rule(_R + "scale", Role.NORM, "hidden", B + "ffn_gate_inp.scale"),
    Rule(_R + "per_expert_scale", Role.EXPERT_SCALE, "experts", B + "ffn_down_exps.scale"),
    *expert_rules(L + "experts.{expert}.{kind}.weight", PROJECTIONS),
    Rule(L + "layer_scalar", Role.LAYER_SCALE, "one", B + "layer_output_scale.weight"),
)  # fmt: skip
_STACKS = (
    Stack(L + "experts.gate_up_proj", (Role.EXPERT_GATE, Role.EXPERT_UP)),
    Stack(L + "experts.down_proj", (Role.EXPERT_DOWN,)),
)
_BLOCK = (
    *_NORMS,
    *DENSE,
    *(f"router.{name}" for name in ("proj", "scale", "per_expert_scale")),
    *(f"experts.{{expert}}.{name}" for name in PROJECTIONS.values()),
    "layer_scalar",
)
_HEADS = ("q_norm", "k_norm")
_LAYER = layer((*GROUPED_ATTENTION, *_HEADS), _BLOCK)
_KEYS_ALONE = _LAYER - {"self_attn.v_proj"}
_NEEDED = (  # key, transformers' own value, needed value, what it is about
    ("enable_moe_block", False, True, "routed experts"),
    ("hidden_size_per_layer_input", 256, 0, "no embedding per layer"),
    ("num_kv_shared_layers", 0, 0, "keys and values in every layer"),
)


def _check(config: Config) -> None:
    for key, default, needed, meaning in _NEEDED:
        value = config.get(key, default)
        if (value or 0) != needed:
            raise CheckpointError(
                f"config.json: {key} is {value!r}, needed {needed!r} ({meaning}); other models of "
                "Gemma-4 are not supported"
            )
    if config.get("use_bidirectional_attention") == "all":
        raise CheckpointError(
            "config.json: use_bidirectional_attention is 'all', needed a model whose tokens look "
            "back alone"
        )


def _kinds(config: Config) -> list[str]:
    """Kinds of the layers; transformers makes the last one full, whatever config.json says."""
    n_layers, kinds = count(config, "num_hidden_layers"), config.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if (i + 1) % _INTERVAL else FULL for i in range(n_layers)]
    known = isinstance(kinds, list) and all(kind in (SLIDING, FULL) for kind in kinds)
    if not known or len(kinds) != n_layers:
        raise CheckpointError(
            f"config.json: layer_types is {kinds!r}, needed a list of {n_layers}, each {SLIDING} "
            f"or {FULL}"
        )
    return [*kinds[:-1], FULL]


def _own_sizes(config: Config, number: int) -> Mapping[str, Any]:
    """What config.json says of one layer, where that is not what it says of all."""
    if "per_layer_config" in config:
        layers = config["per_layer_config"] or {}
        if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
            raise CheckpointError(
                f"config.json: per_layer_config is {layers!r}, needed a table per layer"
            )
        own: dict[str, Mapping[str, Any]] = {
            str(key).lstrip("0") or "0": sizes
            for key, sizes in layers.items()  # padded with zeros
        }
        return own.get(str(number), {})
    if _kinds(config)[number] == SLIDING:
        return {}
    sizes = {"head_dim": config.get("global_head_dim", 512)}
    heads = config.get("num_global_key_value_heads") if _keys_are_values(config) else None
    return sizes if heads is None else {**sizes, "num_key_value_heads": heads}


def _keys_are_values(config: Config) -> bool:
    return bool(config.get("attention_k_eq_v", False))


def _heads(config: Config, number: int) -> tuple[int, int]:
    """Width of a head, and heads of keys, of a layer."""
    own = _own_sizes(config, number)
    if other := sorted(set(own) - {"head_dim", "num_key_value_heads"}):
        raise CheckpointError(
            f"config.json: per_layer_config has {other[0]} for layer {number}, which is not "
            "supported; needed head_dim and num_key_value_heads alone"
        )
    sizes = {"head_dim": 256, "num_key_value_heads": 4, **config, **own}
    return count(sizes, "head_dim"), count(sizes, "num_key_value_heads")


def _layer_sizes(config: Config, number: int) -> Mapping[str, int]:
    head, kv_heads = _heads(config, number)
    queries = head * count(config, "num_attention_heads")
    return {"head": head, "keys": head * kv_heads, "queries": queries, "attended": queries}


def _layer_parts(config: Config, number: int) -> Parts:
    _check(config)
    alone = _keys_are_values(config) and _kinds(config)[number] == FULL
    return _KEYS_ALONE if alone else _LAYER


def _rope_of(config: Config, kind: str) -> dict[str, Any]:
    """How positions are rotated in layers of a kind."""
    rope = rope_of_kind(config, kind, _ROPE)
    known = ("default",) if kind == SLIDING else ("default", "proportional")
    if (got := rope.get("rope_type", "default")) not in known:
        raise TargetError(
            f"gguf: llama.cpp rotates layers of gemma4 with {kind} as {' or '.join(known)}, "
            f"config.json has {got!r}; use target safetensors"
        )
    return rope


def _full_rope(config: Config) -> Config:
    """The config with the base of layers of full attention alone; `_made` says the rest."""
    rope = {"rope_type": "default", "rope_theta": number(_rope_of(config, FULL), "rope_theta")}
    return {**config, "rope_parameters": rope}


def _full_head(config: Config) -> int:
    return _heads(config, _kinds(config).index(FULL))[0]


def _made(facts: ModelFacts) -> tuple[Made, ...]:
    """Factors that angles of layers of full attention are divided by, one per pair of channels."""
    head = _full_head(facts.config)
    rope = {"partial_rotary_factor": 1.0, "factor": 1.0, **_rope_of(facts.config, FULL)}
    if rope.get("rope_type", "default") == "default":
        return (Made("rope_freqs.weight", (1.0,) * (head // 2)),)
    rotated = int(number(rope, "partial_rotary_factor") * head // 2)
    factors = (number(rope, "factor"),) * rotated + (_UNROTATED,) * (head // 2 - rotated)
    return (Made("rope_freqs.weight", factors),)


def _window(config: Config, n_layers: int) -> Window:
    return Window.over(count(config, "sliding_window", default=512), _kinds(config))


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    config = facts.config
    kinds = _kinds(config)
    sizes = [_heads(config, i) for i in range(len(kinds))]
    widths = {kind: {head for (head, _), k in zip(sizes, kinds, strict=True) if k == kind}
              for kind in (SLIDING, FULL)}  # fmt: skip
    if max(map(len, widths.values())) > 1:
        raise TargetError(
            "gguf: llama.cpp gives all layers of gemma4 with one kind of attention heads of one "
            f"width, config.json has {sorted(map(sorted, widths.values()))}; use target safetensors"
        )
    full = _full_head(config)
    sliding = min(widths[SLIDING], default=full)
    kv_heads = tuple(heads for _, heads in sizes)
    yield "attention.head_count_kv", kv_heads
    yield "attention.key_length", full
    yield "attention.value_length", full
    yield "attention.key_length_swa", sliding
    yield "attention.value_length_swa", sliding
    yield "attention.sliding_window", _window(config, 0).tokens
    yield "attention.sliding_window_pattern", tuple(int(kind == SLIDING) for kind in kinds)
    yield "attention.shared_kv_layers", 0
    yield "embedding_length_per_layer_input", 0
    yield "rope.dimension_count", full
    yield "rope.dimension_count_swa", sliding
    yield "rope.freq_base_swa", number(_rope_of(config, SLIDING), "rope_theta")
    if config.get("final_logit_softcapping") is not None:
        yield "final_logit_softcapping", number(config, "final_logit_softcapping")


def _source(file: GgufFacts) -> Config:
    windows = file.by_layer("attention.sliding_window_pattern")
    kinds = [SLIDING if window else FULL for window in windows]
    kv_heads = {SLIDING: 1, FULL: 1}  # of kinds that no layer has
    kv_heads |= dict(zip(kinds, file.by_layer("attention.head_count_kv"), strict=True))
    full = [i for i, kind in enumerate(kinds) if kind == FULL]
    has_values = any(f"blk.{i}.attn_v.weight" in file.shapes for i in full)
    base = file.rope()["rope_theta"]
    sliding = {
        "rope_type": "default",
        "rope_theta": file.pairs.get("rope.freq_base_swa", base),
    }
    return {
        "layer_types": kinds,
        "sliding_window": file["attention.sliding_window"],
        "head_dim": file["attention.key_length_swa"],
        "global_head_dim": file["attention.key_length"],
        "attention_k_eq_v": not has_values,
        "num_key_value_heads": kv_heads[SLIDING if SLIDING in kinds else FULL],
        "num_global_key_value_heads": kv_heads[FULL],
        "enable_moe_block": True,
        "hidden_size_per_layer_input": file["embedding_length_per_layer_input"],
        "num_kv_shared_layers": file.pairs.get("attention.shared_kv_layers", 0),
        "final_logit_softcapping": file.pairs.get("final_logit_softcapping"),
        "rope_parameters": {SLIDING: sliding, FULL: _rope_of_factors(file, base)},
    }


def _rope_of_factors(file: GgufFacts, base: float) -> dict[str, Any]:
    """How layers of full attention are rotated, of the tensor that `_made` makes."""
    factors = file.read("rope_freqs.weight")
    rotated = sum(factor < _UNROTATED / 2 for factor in factors)
    if not rotated or set(factors) == {1.0}:
        return {"rope_type": "default", "rope_theta": base}
    return {
        "rope_type": "proportional",
        "rope_theta": base,
        "partial_rotary_factor": rotated / len(factors),
        "factor": factors[0],
    }


GEMMA4_TEXT = Family(
    model_type="gemma4_text",
    models="the language model of Gemma-4, as transformers saves it alone",
    rules=_RULES,
    keys=Keys(experts=("num_experts",), experts_used="top_k_experts"),
    router_reads_config=True,
    layer_parts=_layer_parts,
    layers=(_LAYER, _KEYS_ALONE),
    layer_sizes=_layer_sizes,
    tied=is_tied_by_default,
    stacks=_STACKS,
    gguf=Gguf(
        "gemma4",
        _hyperparameters,
        None,
        fixed=(Fixed("hidden_activation", _GELU, _GELU),),
        window=_window,
        rotation=_full_rope,
        made=_made,
        source=_source,
        absent={
            "attention.shared_kv_layers": lambda pairs: 0,
            "rope.freq_base_swa": lambda pairs: pairs.get("rope.freq_base", 10000.0),
        },
    ),
    never_null=NEVER_NULL
    | {
        "attention_k_eq_v", "enable_moe_block", "head_dim", "hidden_activation",
        "hidden_size_per_layer_input", "num_key_value_heads", "num_kv_shared_layers",
        "sliding_window",
    },
    bias_keys=("attention_bias",),
)  # fmt: skip
assert GEMMA4_TEXT.gguf is not None
GEMMA4 = replace(
    GEMMA4_TEXT,
    gguf=replace(GEMMA4_TEXT.gguf, source=None),
    model_type="gemma4",
    models="Gemma-4-26B-A4B: its language model",
    ignored=(r"model\.(vision_tower|audio_tower|embed_vision|embed_audio)\..*",),
    text_key="text_config",
    prefixes=(("model.language_model.", "model."),),
    built_as="gemma4_text",
)
