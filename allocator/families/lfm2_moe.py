"""LFM2-MoE: short convolutions in place of attention in most layers.

Sources: transformers' `modeling_lfm2_moe`; llama.cpp's loader and graph of `lfm2moe`, and its
converter.
"""

from collections.abc import Iterator

from allocator.errors import CheckpointError, TargetError
from allocator.families.base import Family, Parts, Rule, Stack
from allocator.families.common import KEYS_VALUES, B, L, expert_rules
from allocator.families.config import Config, count
from allocator.families.gguf import (
    SIGMOID,
    Fixed,
    Gguf,
    GgufFacts,
    ModelFacts,
    Pair,
    grouped_pairs,
    leading_dense,
)
from allocator.families.keys import Keys
from allocator.families.roles import Role
from allocator.families.rope import with_base
from allocator.families.sizes import Scoring

_CONVOLUTION, _ATTENTION = "conv", "full_attention"
_F = L + "feed_forward."
_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}

_RULES = (
    Rule("model.embed_tokens.weight", Role.EMBEDDING, "vocabulary x hidden", "token_embd.weight"),
    Rule("lm_head.weight", Role.HEAD, "vocabulary x hidden", "output.weight"),
    Rule("model.embedding_norm.weight", Role.NORM, "hidden", "token_embd_norm.weight"),
    Rule(L + "operator_norm.weight", Role.NORM, "hidden", B + "attn_norm.weight"),
    Rule(L + "ffn_norm.weight", Role.NORM, "hidden", B + "ffn_norm.weight"),
    Rule(L + "conv.in_proj.weight", Role.CONV_IN, "thrice_hidden x hidden",
         B + "shortconv.in_proj.weight"),
    Rule(L + "conv.conv.weight", Role.CONV_KERNEL, "hidden x one x conv_kernel",
         B + "shortconv.conv.weight", gguf_shape="hidden x conv_kernel"),
    Rule(L + "conv.out_proj.weight", Role.CONV_OUT, "hidden x hidden",
         B + "shortconv.out_proj.weight"),
    Rule(L + "self_attn.q_proj.weight", Role.Q, "queries x hidden", B + "attn_q.weight"),
    *KEYS_VALUES,
    Rule(L + "self_attn.out_proj.weight", Role.O, "hidden x attended", B + "attn_output.weight"),
    Rule(L + "self_attn.q_layernorm.weight", Role.NORM, "head", B + "attn_q_norm.weight"),
    Rule(L + "self_attn.k_layernorm.weight", Role.NORM, "head", B + "attn_k_norm.weight"),
    Rule(_F + "gate.weight", Role.ROUTER, "experts x hidden", B + "ffn_gate_inp.weight"),
    Rule(_F + "expert_bias", Role.ROUTER_BIAS, "experts", B + "exp_probs_b.bias"),
    *expert_rules(_F + "experts.{expert}.{kind}.weight", _NAMES),
    Rule(_F + "w1.weight", Role.MLP_GATE, "dense_width x hidden", B + "ffn_gate.weight"),
    Rule(_F + "w3.weight", Role.MLP_UP, "dense_width x hidden", B + "ffn_up.weight"),
    Rule(_F + "w2.weight", Role.MLP_DOWN, "hidden x dense_width", B + "ffn_down.weight"),
)  # fmt: skip
_NORMS = ("operator_norm", "ffn_norm")
_OPERATORS = {
    _CONVOLUTION: tuple(f"conv.{name}" for name in ("in_proj", "conv", "out_proj")),
    _ATTENTION: tuple(
        f"self_attn.{name}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj", "q_layernorm", "k_layernorm")
    ),
}
_DENSE = tuple(f"feed_forward.{name}" for name in _NAMES.values())
_UNBIASED = (
    "feed_forward.gate",
    *(f"feed_forward.experts.{{expert}}.{name}" for name in _NAMES.values()),
)
_ROUTED = (*_UNBIASED, "feed_forward.expert_bias")


def _kinds(config: Config) -> list[str]:
    """What every layer has in the place of attention."""
    kinds, n_layers = config.get("layer_types"), count(config, "num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != n_layers or not set(kinds) <= set(_OPERATORS):
        raise CheckpointError(
            f"config.json: layer_types is {kinds!r}, needed {_CONVOLUTION!r} or {_ATTENTION!r} for "
            f"each of {n_layers} layers"
        )
    return kinds


def _layer_parts(config: Config, number: int) -> Parts:
    if number < count(config, "num_dense_layers", 0, default=2):
        block: tuple[str, ...] = _DENSE
    else:
        block = _ROUTED if config.get("use_expert_bias", True) else _UNBIASED
    return frozenset((*_NORMS, *_OPERATORS[_kinds(config)[number]], *block))


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SIGMOID, bool(config.get("norm_topk_prob", True))


def _is_tied(config: Config) -> bool:
    return bool(config.get("tie_embedding", config.get("tie_word_embeddings", True)))


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    dimensions = facts.dimensions
    if dimensions.heads * dimensions.head != dimensions.hidden:
        raise TargetError(
            f"gguf: llama.cpp loads lfm2moe with heads that are as wide as the states together, "
            f"got {dimensions.heads} of {dimensions.head} and {dimensions.hidden}; use target "
            "safetensors"
        )
    for key, value in grouped_pairs(facts):
        if key == "attention.head_count_kv":  # no heads are what tells convolutions
            kinds = _kinds(facts.config)
            yield key, tuple(dimensions.kv_heads * (kind == _ATTENTION) for kind in kinds)
        else:
            yield key, value
    yield "shortconv.l_cache", dimensions.sizes["conv_kernel"] or 0
    yield "leading_dense_block_count", leading_dense(facts)
    yield "expert_gating_func", SIGMOID


def _source(file: GgufFacts) -> Config:
    heads = file.by_layer("attention.head_count_kv")
    return {
        "num_key_value_heads": max(heads),
        "layer_types": [_ATTENTION if n else _CONVOLUTION for n in heads],
        "conv_L_cache": file["shortconv.l_cache"],
        "num_dense_layers": file.pairs.get("leading_dense_block_count", 0),
    }


LFM2_MOE = Family(
    model_type="lfm2_moe",
    models="LFM2-8B-A1B, 24B-A2B, LFM2.5",
    rules=_RULES,
    keys=Keys(
        experts=("num_experts",), norm_epsilon="norm_eps", default_epsilon=1e-5,
        conv_kernel="conv_L_cache",
    ),
    layer_parts=_layer_parts,
    layers=tuple(
        frozenset((*_NORMS, *operator, *block))
        for operator in _OPERATORS.values()
        for block in (_DENSE, _UNBIASED, _ROUTED)
    ),
    scoring=_scoring,
    tied=_is_tied,
    stacks=(
        Stack(_F + "experts.gate_up_proj", (Role.EXPERT_GATE, Role.EXPERT_UP)),
        Stack(_F + "experts.down_proj", (Role.EXPERT_DOWN,)),
    ),
    gguf=Gguf(
        "lfm2moe",
        _hyperparameters,
        None,
        fixed=(
            Fixed("norm_topk_prob", True, True),
            Fixed("routed_scaling_factor", 1.0, 1.0),
            Fixed("use_expert_bias", True, True),
        ),
        rotation=with_base(1_000_000.0),
        source=_source,
    ),
    selection_bias=True,
    scales_gates=True,
    never_null=frozenset({
        "conv_L_cache", "conv_bias", "initializer_range", "intermediate_size",
        "max_position_embeddings", "moe_intermediate_size", "norm_eps", "norm_topk_prob",
        "num_attention_heads", "num_dense_layers", "num_key_value_heads", "output_router_logits",
        "routed_scaling_factor", "tie_word_embeddings", "use_cache", "use_expert_bias",
    }),
    bias_keys=("conv_bias",),
)  # fmt: skip
