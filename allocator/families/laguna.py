"""Laguna.

Sources: transformers' `modeling_laguna`, and its `conversion_mapping` for names on disk;
llama.cpp's loader and graph of `laguna`, and its converter.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from allocator.errors import CheckpointError, TargetError
from allocator.families.base import Family, Parts, Rule
from allocator.families.common import (
    BASE,
    BIASED_ROUTED,
    DENSE,
    EXPERTS,
    FFN_NORM,
    HEAD_NORMS,
    KEYS_VALUES,
    MLP,
    NEVER_NULL,
    NORMED_ATTENTION,
    SELECTION_BIAS,
    SHARED,
    STACKS,
    B,
    L,
    also_named,
    layer,
    shared_expert,
)
from allocator.families.config import FULL, SLIDING, Config, count, number, whole
from allocator.families.gguf import (
    SIGMOID,
    Fixed,
    Gguf,
    GgufFacts,
    ModelFacts,
    Pair,
    Window,
    grouped_pairs,
    leading_dense,
)
from allocator.families.keys import Keys
from allocator.families.roles import Role
from allocator.families.rope import rope_of_kind
from allocator.families.sizes import Scoring

_ROPE = {  # transformers' own, where a config has none
    FULL: {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}
_ON_DISK = {
    "mlp.gate.e_score": "mlp.experts.e_score",
    "mlp.shared_experts.": "mlp.shared_expert.",
}
_RULES = (
    *BASE,
    *FFN_NORM,
    *KEYS_VALUES,
    *HEAD_NORMS,
    Rule(L + "self_attn.g_proj.weight", Role.ATTENTION_GATE, "gates x hidden",
         B + "attn_gate.weight"),
    *MLP,
    *EXPERTS,
    *also_named((SELECTION_BIAS, *shared_expert("shared_experts")), _ON_DISK),
)  # fmt: skip
_ATTENTION = (*NORMED_ATTENTION, "g_proj")
_ROUTED = (*BIASED_ROUTED, *(f"mlp.shared_experts.{name}" for name in SHARED))


def _listed(config: Config, key: str, default: list[Any]) -> list[Any]:
    """A value per layer."""
    values, n_layers = config.get(key), count(config, "num_hidden_layers")
    values = default if values is None else values
    if not isinstance(values, list) or len(values) != n_layers:
        raise CheckpointError(
            f"config.json: {key} is {values!r}, needed a list of {n_layers}, one for each layer"
        )
    return values


def _heads(config: Config) -> list[int]:
    same = [count(config, "num_attention_heads")] * count(config, "num_hidden_layers")
    heads = _listed(config, "num_attention_heads_per_layer", same)
    if not all(type(n) is int and n >= 1 for n in heads):
        raise CheckpointError(
            f"config.json: num_attention_heads_per_layer is {heads!r}, needed numbers from 1"
        )
    return heads


def _kinds(config: Config) -> list[str]:
    return _listed(config, "layer_types", [FULL] * count(config, "num_hidden_layers"))


def _layer_sizes(config: Config, number: int) -> Mapping[str, int]:
    heads, gating = _heads(config)[number], config.get("gating", True)
    queries = heads * count(config, "head_dim", default=128)
    if gating not in (True, "per-head", "per-element"):
        raise CheckpointError(
            f"config.json: gating is {gating!r}, needed true, 'per-head' or 'per-element'"
        )
    gates = queries if gating == "per-element" else heads
    return {"heads": heads, "queries": queries, "attended": queries, "gates": gates}


def _layer_parts(config: Config, number: int) -> Parts:
    n_layers = count(config, "num_hidden_layers")
    kinds = _listed(config, "mlp_layer_types", ["dense"] + ["sparse"] * (n_layers - 1))
    return layer(_ATTENTION, _ROUTED if kinds[number] == "sparse" else DENSE)


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SIGMOID, True


def _full_rope(config: Config) -> Config:
    """The config with the rotation of layers of full attention alone, of the part of a head."""
    rope = {
        k: v for k, v in rope_of_kind(config, FULL, _ROPE).items() if k != "partial_rotary_factor"
    }
    return {**config, "rope_parameters": rope}


def _rotated(config: Config, head: int, kind: str) -> int:
    rope = {"partial_rotary_factor": 1.0, **rope_of_kind(config, kind, _ROPE)}
    return int(head * number(rope, "partial_rotary_factor"))


def _window(config: Config, n_layers: int) -> Window:
    kinds = _kinds(config)
    tokens = count(config, "sliding_window", default=512) if SLIDING in kinds else 0
    return Window.over(tokens, kinds)


def _windows(config: Config, head: int) -> Iterator[Pair]:
    """What a file says of layers with a sliding window."""
    kinds = _kinds(config)
    every = next((i for i, kind in enumerate(kinds) if i and kind == FULL), len(kinds))
    if kinds != [SLIDING if i % every else FULL for i in range(len(kinds))]:
        raise TargetError(
            "gguf: llama.cpp gives laguna full attention in the first of every few layers, as many "
            "each time, and a sliding window in the others; config.json has other layer_types: use "
            "target safetensors"
        )
    rope = rope_of_kind(config, SLIDING, _ROPE)
    if rope.get("rope_type", "default") != "default":
        raise TargetError(
            f"gguf: llama.cpp rotates layers of laguna with a sliding window without scaling, "
            f"config.json has {rope.get('rope_type')!r}; use target safetensors"
        )
    yield "attention.sliding_window", _window(config, len(kinds)).tokens
    yield "attention.sliding_window_pattern", every
    yield "rope.freq_base_swa", number(rope, "rope_theta")
    yield "rope.dimension_count_swa", _rotated(config, head, SLIDING)


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    config, head = facts.config, facts.dimensions.head
    for key, value in grouped_pairs(facts):
        full = key == "rope.dimension_count"
        yield key, _rotated(config, head, FULL) if full else value
    if SLIDING in _kinds(config):
        yield from _windows(config, head)
    yield "expert_shared_feed_forward_length", whole(config, facts.keys.shared_width)
    yield "leading_dense_block_count", leading_dense(facts)
    yield "expert_gating_func", SIGMOID
    yield "expert_weights_norm", True
    yield "expert_weights_scale", facts.router.scale


_INTERVAL = 4  # llama.cpp's own: the first of every four layers is full


def _source(file: GgufFacts) -> Config:
    n_layers, n_dense = file["block_count"], file.pairs.get("leading_dense_block_count", 0)
    head, heads = file["attention.key_length"], file.by_layer("attention.head_count")
    gates = file.shapes["blk.0.attn_gate.weight"][0]
    full = file.rope() | {"partial_rotary_factor": file["rope.dimension_count"] / head}
    own: dict[str, Any] = {
        "num_attention_heads": max(heads),
        "num_attention_heads_per_layer": list(heads),
        "gating": "per-head" if gates == heads[0] else "per-element",
        "mlp_layer_types": ["dense"] * n_dense + ["sparse"] * (n_layers - n_dense),
        "shared_expert_intermediate_size": file["expert_shared_feed_forward_length"],
        "moe_routed_scaling_factor": file.pairs.get("expert_weights_scale", 1.0),
        "layer_types": [FULL] * n_layers,
        "rope_parameters": {FULL: full, SLIDING: _ROPE[SLIDING]},
    }
    if not (window := file.pairs.get("attention.sliding_window", 0)):
        return own
    every = file.pairs.get("attention.sliding_window_pattern", _INTERVAL)
    sliding = {
        "rope_type": "default",
        "rope_theta": file.pairs.get("rope.freq_base_swa", full["rope_theta"]),
        "partial_rotary_factor": file["rope.dimension_count_swa"] / head,
    }
    return own | {
        "sliding_window": window,
        "layer_types": [SLIDING if i % every else FULL for i in range(n_layers)],
        "rope_parameters": {FULL: full, SLIDING: sliding},
    }


LAGUNA = Family(
    model_type="laguna",
    models="Laguna-XS.2, S.2, M.1",
    rules=_RULES,
    keys=Keys(
        experts=("num_experts",), scale="moe_routed_scaling_factor",
        heads_by_layer="num_attention_heads_per_layer",
    ),
    layer_parts=_layer_parts,
    layers=tuple(layer(_ATTENTION, block) for block in (DENSE, _ROUTED)),
    layer_sizes=_layer_sizes,
    scoring=_scoring,
    stacks=STACKS,
    gguf=Gguf(
        "laguna",
        _hyperparameters,
        None,
        fixed=(
            Fixed("hidden_act", "silu", "silu"),
            Fixed("moe_router_logit_softcapping", 0.0, 0.0),
        ),
        window=_window,
        rotation=_full_rope,
        source=_source,
        absent={
            "attention.sliding_window_pattern": lambda pairs: _INTERVAL,
            "expert_gating_func": lambda pairs: SIGMOID,
            "rope.freq_base_swa": lambda pairs: pairs.get("rope.freq_base", 10000.0),
        },
    ),
    selection_bias=True,
    scales_gates=True,
    never_null=NEVER_NULL | {"head_dim", "num_key_value_heads", "sliding_window"},
    bias_keys=("attention_bias",),
)  # fmt: skip
