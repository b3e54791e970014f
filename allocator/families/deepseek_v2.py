"""DeepSeek-V2 and V2-Lite: the attention of DeepSeek-V3 with another router.

Sources: transformers' `modeling_deepseek_v2`; llama.cpp's loader and graph of `deepseek2`.
"""

from collections.abc import Iterator
from dataclasses import replace

from allocator.errors import CheckpointError, TargetError
from allocator.families.base import Parts
from allocator.families.common import DENSE, ROUTED, SHARED, layer, layers
from allocator.families.config import Config, count
from allocator.families.deepseek_v3 import (
    DEEPSEEK_V3,
    WITH_RANK,
    WITHOUT_RANK,
    latent_attention,
    latent_pairs,
)
from allocator.families.gguf import SOFTMAX, GgufFacts, ModelFacts, Pair, scaled_router_source
from allocator.families.roles import Role
from allocator.families.sizes import Scoring

_BLOCK = (*ROUTED, *(f"mlp.shared_experts.{name}" for name in SHARED))

_METHODS = ("greedy", "group_limited_greedy")  # that transformers computes


def _layer_parts(config: Config, number: int) -> Parts:
    is_dense = number < count(config, "first_k_dense_replace", 0)
    return layer(latent_attention(config), DENSE if is_dense else _BLOCK)


def _scoring(config: Config) -> tuple[str, bool]:
    if config.get("topk_method", _METHODS[0]) not in _METHODS:
        raise CheckpointError(
            f"config.json: topk_method is {config['topk_method']!r}, needed {' or '.join(_METHODS)}"
        )
    return Scoring.SOFTMAX, False


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    if facts.router.groups > 1 and facts.config.get("topk_method") == _METHODS[1]:
        raise TargetError(
            "gguf: transformers ranks router groups (n_group) of deepseek_v2 by their best expert, "
            "llama.cpp by their two best; use target safetensors"
        )
    yield from latent_pairs(facts)
    yield "expert_gating_func", SOFTMAX


def _source(file: GgufFacts) -> Config:
    source = scaled_router_source(file)
    return source | {"topk_method": _METHODS[source["n_group"] > 1], "norm_topk_prob": False}


DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    model_type="deepseek_v2",
    models="DeepSeek-V2, V2-Lite, Coder-V2",
    rules=tuple(rule for rule in DEEPSEEK_V3.rules if rule.role is not Role.ROUTER_BIAS),
    layer_parts=_layer_parts,
    layers=layers((WITHOUT_RANK, WITH_RANK), (DENSE, _BLOCK)),
    scoring=_scoring,
    gguf=replace(
        DEEPSEEK_V3.for_gguf(), hyperparameters=_hyperparameters, graph=None, source=_source
    ),
    router_groups=(1, 1),
    selection_bias=False,
    bias_keys=("attention_bias", "mlp_bias"),
    plan_notes=lambda config: (),
)
