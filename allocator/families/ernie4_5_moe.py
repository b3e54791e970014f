"""ERNIE-4.5 with experts.

Sources: transformers' `modeling_ernie4_5_moe`, and its `conversion_mapping` for names on disk;
llama.cpp's loader and graph of `ernie4_5-moe`, and its converter for what is left out.
"""

from collections.abc import Iterator
from dataclasses import replace

from allocator.families.base import Family, Parts
from allocator.families.common import (
    BASE,
    DENSE,
    EXPERTS,
    FFN_NORM,
    GROUPED_ATTENTION,
    KEYS_VALUES,
    MLP,
    NEVER_NULL,
    ROUTED,
    SELECTION_BIAS,
    SHARED,
    STACKS,
    L,
    also_named,
    layer,
    layers,
    shared_expert,
)
from allocator.families.config import Config, count, is_tied_by_default
from allocator.families.gguf import (
    Fixed,
    Gguf,
    GgufFacts,
    ModelFacts,
    Pair,
    grouped_pairs,
    leading_dense,
)
from allocator.families.keys import Keys
from allocator.families.rope import with_base
from allocator.families.sizes import Scoring

_BIAS = "mlp.gate.moe_statics.e_score_correction_bias"
_ROUTER_BIAS = replace(SELECTION_BIAS, pattern=L + _BIAS, in_one_row=True)
_ROUTED = (*ROUTED, _BIAS)
_WITH_SHARED = (*_ROUTED, *(f"mlp.shared_experts.{name}" for name in SHARED))


def _layer_parts(config: Config, number: int) -> Parts:
    last = config.get("moe_layer_end_index", -1)
    first = count(config, "moe_layer_start_index", 0, default=1)
    routes = number >= first and (last in (-1, None) or number <= last)
    if not routes or (number + 1) % count(config, "moe_layer_interval", default=1):
        return layer(GROUPED_ATTENTION, DENSE)
    shared = config.get("moe_num_shared_experts", 2)
    return layer(GROUPED_ATTENTION, _WITH_SHARED if shared else _ROUTED)


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SOFTMAX, True


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    yield from grouped_pairs(facts)
    yield "leading_dense_block_count", leading_dense(facts)
    yield "interleave_moe_layer_step", 1  # of a loader that knows no dense layer after the first
    if n_shared := facts.dimensions.n_shared:
        yield "expert_shared_count", n_shared
        yield "expert_shared_feed_forward_length", facts.dimensions.sizes["shared_width"] or 0


def _source(file: GgufFacts) -> Config:
    return {
        "moe_layer_start_index": file.pairs.get("leading_dense_block_count", 0),
        "moe_num_shared_experts": file.pairs.get("expert_shared_count", 0),
    }


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    models="ERNIE-4.5-21B-A3B, 300B-A47B",
    rules=(
        *BASE,
        *FFN_NORM,
        *KEYS_VALUES,
        *MLP,
        *EXPERTS,
        *shared_expert("shared_experts"),
        *also_named((_ROUTER_BIAS,), {"mlp.gate.moe_statics.": "mlp.moe_statics."}),
    ),
    keys=Keys(
        experts=("moe_num_experts", "num_experts"), experts_used="moe_k",
        shared_experts="moe_num_shared_experts", default_epsilon=1e-5,
    ),
    layer_parts=_layer_parts,
    layers=layers((GROUPED_ATTENTION,), (DENSE, _ROUTED, _WITH_SHARED)),
    scoring=_scoring,
    tied=is_tied_by_default,
    stacks=STACKS,
    gguf=Gguf(
        "ernie4_5-moe",
        _hyperparameters,
        None,
        fixed=(Fixed("hidden_act", "silu", "silu"), Fixed("moe_norm_min", 1e-12, 1e-12)),
        rotation=with_base(500000.0),
        source=_source,
    ),
    ignored=(r"model\.mtp_.*",),
    selection_bias=True,
    never_null=NEVER_NULL - {"attention_bias"},
    bias_keys=("use_bias",),
)  # fmt: skip
