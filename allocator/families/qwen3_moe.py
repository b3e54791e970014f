"""Qwen3-MoE.

Sources: transformers' `modeling_qwen3_moe`; llama.cpp's loader and graph of `qwen3moe`.
"""

from collections.abc import Iterator

from allocator.families.base import Family, Parts
from allocator.families.common import (
    COMMON,
    DENSE,
    HEAD_NORMS,
    KEYS_VALUES,
    NEVER_NULL,
    NORMED_ATTENTION,
    ROUTED,
    STACKS,
    is_sparse,
    layer,
    layers,
    softmax_router,
)
from allocator.families.config import Config
from allocator.families.gguf import (
    ComputeGraph,
    Fixed,
    Gguf,
    ModelFacts,
    Pair,
    check_all_route,
    grouped_pairs,
    nothing_else,
)
from allocator.families.keys import Keys

_KEYS = Keys(experts=("num_experts", "num_local_experts"))
_RULES = (
    *COMMON,
    *KEYS_VALUES,
    *HEAD_NORMS,
)


def _layer_parts(config: Config, number: int) -> Parts:
    return layer(NORMED_ATTENTION, ROUTED if is_sparse(config, number) else DENSE)


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    check_all_route(facts, "qwen3moe")
    yield from grouped_pairs(facts)


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    models="Qwen3-30B-A3B, 235B-A22B, Coder",
    rules=_RULES,
    keys=_KEYS,
    layer_parts=_layer_parts,
    layers=layers((NORMED_ATTENTION,), (DENSE, ROUTED)),
    scoring=softmax_router,
    stacks=STACKS,
    gguf=Gguf(
        "qwen3moe",
        _hyperparameters,
        ComputeGraph.GROUPED,
        fixed=(
            Fixed("hidden_act", "silu", "silu"),
            Fixed("norm_topk_prob", True, False),
            Fixed("use_sliding_window", False, False),
        ),
        source=nothing_else,
    ),
    never_null=NEVER_NULL
    | {
        "attention_dropout", "decoder_sparse_step", "head_dim", "norm_topk_prob",
        "num_key_value_heads", "router_aux_loss_coef", "use_sliding_window",
    },
    bias_keys=("attention_bias",),
)  # fmt: skip
