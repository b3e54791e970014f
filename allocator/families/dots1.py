"""dots.llm1: Qwen3-MoE's attention with DeepSeek-V3's router.

Sources: transformers' `modeling_dots1`; llama.cpp's loader and graph of `dots1`.
"""

from collections.abc import Iterator

from allocator.errors import TargetError
from allocator.families.base import Family, Parts
from allocator.families.common import (
    BIASED_ROUTED,
    COMMON,
    DENSE,
    HEAD_NORMS,
    KEYS_VALUES,
    NEVER_NULL,
    NORMED_ATTENTION,
    SELECTION_BIAS,
    STACKS,
    WITH_SHARED,
    dense_then_routed,
    layers,
    shared_expert,
)
from allocator.families.config import SLIDING, Config
from allocator.families.gguf import (
    SIGMOID,
    Fixed,
    Gguf,
    ModelFacts,
    Pair,
    check_equal_heads,
    grouped_pairs,
    scaled_router_pairs,
    scaled_router_source,
)
from allocator.families.keys import Keys
from allocator.families.sizes import Scoring


def _layer_parts(config: Config, layer: int) -> Parts:
    return dense_then_routed(NORMED_ATTENTION, config, layer)


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SIGMOID, bool(config.get("norm_topk_prob", False))


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    yield from grouped_pairs(facts)
    yield from scaled_router_pairs(facts)
    yield "expert_gating_func", SIGMOID


def _check(facts: ModelFacts) -> None:
    check_equal_heads(facts, "dots1")
    if SLIDING in (facts.config.get("layer_types") or ()):
        raise TargetError(
            "gguf: llama.cpp computes dots1 without a sliding window, layer_types in config.json "
            "have one; use target safetensors"
        )


DOTS1 = Family(
    model_type="dots1",
    models="dots.llm1",
    rules=(*COMMON, *KEYS_VALUES, *HEAD_NORMS, SELECTION_BIAS, *shared_expert("shared_experts")),
    keys=Keys(experts=("n_routed_experts", "num_local_experts")),
    layer_parts=_layer_parts,
    layers=layers((NORMED_ATTENTION,), (DENSE, BIASED_ROUTED, WITH_SHARED)),
    scoring=_scoring,
    stacks=STACKS,
    gguf=Gguf(
        "dots1",
        _hyperparameters,
        None,
        fixed=(Fixed("hidden_act", "silu", "silu"),),
        check=_check,
        source=lambda file: scaled_router_source(file) | {"sliding_window": None},
    ),
    ranks_groups=True,
    selection_bias=True,
    scales_gates=True,
    never_null=NEVER_NULL | {"routed_scaling_factor"},
    bias_keys=("attention_bias",),
)
