"""MiniMax-M2.

Sources: transformers' `modeling_minimax_m2`, and its `conversion_mapping` for names on disk;
llama.cpp's loader and graph of `minimax-m2`.
"""

from collections.abc import Iterator

from allocator.families.base import Family, Rule
from allocator.families.common import (
    BASE,
    EXPERTS,
    FFN_NORM,
    KEYS_VALUES,
    MLP,
    NEVER_NULL,
    NORMED_ATTENTION,
    ROUTED,
    STACKS,
    WIDE_NORMS,
    B,
    L,
    also_named,
    layer,
)
from allocator.families.config import Config
from allocator.families.gguf import SIGMOID, Fixed, Gguf, ModelFacts, Pair, grouped_pairs
from allocator.families.keys import Keys
from allocator.families.mixtral import ON_DISK
from allocator.families.roles import Role
from allocator.families.sizes import Scoring

_BIAS = "mlp.e_score_correction_bias"
_LAYER = layer(NORMED_ATTENTION, (*ROUTED, _BIAS))
_ROUTER_BIAS = Rule(L + _BIAS, Role.ROUTER_BIAS, "experts", B + "exp_probs_b.bias")


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SIGMOID, True


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    yield from grouped_pairs(facts, rotated=1.0)
    yield "expert_gating_func", SIGMOID


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    models="MiniMax-M2, M2.1, M2.5",
    rules=(
        *BASE,
        *FFN_NORM,
        *KEYS_VALUES,
        *WIDE_NORMS,
        *also_named((MLP[0], _ROUTER_BIAS, *EXPERTS), ON_DISK),
    ),
    keys=Keys(experts=("num_local_experts", "num_experts"), expert_width="intermediate_size"),
    layer_parts=lambda config, number: _LAYER,
    layers=(_LAYER,),
    scoring=_scoring,
    stacks=STACKS,
    gguf=Gguf(
        "minimax-m2",
        _hyperparameters,
        None,
        fixed=(
            Fixed("hidden_act", "silu", "silu"),
            Fixed("scoring_func", "sigmoid", "sigmoid"),
        ),
        source=lambda file: {"rotary_dim": file["rope.dimension_count"]},
    ),
    selection_bias=True,
    never_null=NEVER_NULL - {"moe_intermediate_size", "attention_bias"},
)
