"""OLMoE.

Sources: transformers' `modeling_olmoe`; llama.cpp's loader and graph of `olmoe`.
"""

from collections.abc import Iterator

from allocator.errors import TargetError
from allocator.families.base import Family, Parts
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
    layer,
)
from allocator.families.config import Config
from allocator.families.gguf import Fixed, Gguf, ModelFacts, Pair
from allocator.families.keys import Keys
from allocator.families.sizes import Scoring

_LAYER = layer(NORMED_ATTENTION, ROUTED)
_RULES = (
    *BASE,
    *FFN_NORM,
    *KEYS_VALUES,
    MLP[0],
    *EXPERTS,
    *WIDE_NORMS,
)


def _layer_parts(config: Config, number: int) -> Parts:
    return _LAYER


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SOFTMAX, bool(config.get("norm_topk_prob", False))


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    yield "attention.head_count_kv", facts.dimensions.kv_heads
    yield "rope.dimension_count", facts.dimensions.head


def _check(facts: ModelFacts) -> None:
    dimensions = facts.dimensions
    if dimensions.kv_heads != dimensions.heads:
        raise TargetError(
            f"gguf: llama.cpp loads olmoe with as many heads of keys as of queries, got "
            f"{dimensions.kv_heads} and {dimensions.heads}; use target safetensors"
        )


OLMOE = Family(
    model_type="olmoe",
    models="OLMoE-1B-7B",
    rules=_RULES,
    keys=Keys(experts=("num_experts",), expert_width="intermediate_size"),
    layer_parts=_layer_parts,
    layers=(_LAYER,),
    scoring=_scoring,
    stacks=STACKS,
    gguf=Gguf(
        "olmoe",
        _hyperparameters,
        None,
        fixed=(
            Fixed("hidden_act", "silu", "silu"),
            Fixed("norm_topk_prob", False, False),
            Fixed("clip_qkv", None, None),
        ),
        check=_check,
    ),
    never_null=NEVER_NULL - {"moe_intermediate_size"},
    bias_keys=("attention_bias",),
)
