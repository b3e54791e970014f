"""Hunyuan-A13B.

Sources: transformers' `modeling_hunyuan_v1_moe`; llama.cpp's loader and graph of `hunyuan-moe`, and
its converter.
"""

from collections.abc import Iterator

from allocator.families.base import Family, Rule
from allocator.families.common import (
    BASE,
    EXPERTS,
    FFN_NORM,
    GROUPED_ATTENTION,
    KEYS_VALUES,
    NEVER_NULL,
    PROJECTIONS,
    SHARED,
    STACKS,
    B,
    L,
    layer,
    shared_expert,
)
from allocator.families.config import Config, count, number, whole
from allocator.families.gguf import Fixed, Gguf, ModelFacts, Pair, grouped_pairs, nothing_else
from allocator.families.keys import Keys
from allocator.families.roles import Role
from allocator.families.rope import rope_parameters
from allocator.families.sizes import Scoring

_LAYER = layer(
    (*GROUPED_ATTENTION, "query_layernorm", "key_layernorm"),
    (
        "mlp.gate.wg",
        *(f"mlp.experts.{{expert}}.{name}" for name in PROJECTIONS.values()),
        *(f"mlp.shared_mlp.{name}" for name in SHARED),
    ),
)


def _with_one_topk(config: Config) -> Config:
    """The config with a number for the same one in every layer, as a list."""
    used = config.get("moe_topk")
    if not isinstance(used, list) or used != used[:1] * len(used) or not used:
        return config
    return {**config, "moe_topk": used[0]}


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SOFTMAX, True


def _static(config: Config) -> Config:
    """The config with the base by which `alpha` stretches the rotation, once and for all."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "dynamic" or not rope.get("alpha"):
        return config
    width = count(config, "head_dim", 4)
    base = number(rope, "rope_theta") * number(rope, "alpha") ** (width / (width - 2))
    others = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
    return {**others, "rope_parameters": {"rope_type": "default", "rope_theta": base}}


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    yield from grouped_pairs(facts)
    yield "expert_shared_count", 1
    yield "expert_shared_feed_forward_length", whole(facts.config, facts.keys.shared_width)


HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    models="Hunyuan-A13B",
    rules=(
        *BASE,
        *FFN_NORM,
        *KEYS_VALUES,
        *(
            Rule(L + f"self_attn.{name}_layernorm.weight", Role.NORM, "head",
                 B + f"attn_{name[0]}_norm.weight")
            for name in ("query", "key")
        ),
        Rule(L + "mlp.gate.wg.weight", Role.ROUTER, "experts x hidden", B + "ffn_gate_inp.weight"),
        *EXPERTS,
        *shared_expert("shared_mlp"),
    ),
    keys=Keys(
        experts=("num_experts",), experts_used="moe_topk", expert_width="intermediate_size",
        shared_width="intermediate_size", default_epsilon=1e-5,
    ),
    layer_parts=lambda config, number: _LAYER,
    layers=(_LAYER,),
    scoring=_scoring,
    completed=_with_one_topk,
    stacks=STACKS,
    gguf=Gguf(
        "hunyuan-moe",
        _hyperparameters,
        None,
        fixed=(Fixed("hidden_act", "silu", "silu"),),
        rotation=_static,
        source=nothing_else,
    ),
    never_null=NEVER_NULL - {"moe_intermediate_size"},
    bias_keys=("attention_bias",),
)  # fmt: skip
