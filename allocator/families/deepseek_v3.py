"""DeepSeek-V3, and other models of its architecture.

Sources: transformers' `modeling_deepseek_v3`; llama.cpp's loader and graph of `deepseek2`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from allocator.errors import TargetError
from allocator.families.base import Family, Parts, Rule
from allocator.families.common import (
    BIASED_ROUTED,
    COMMON,
    DENSE,
    NEVER_NULL,
    SELECTION_BIAS,
    STACKS,
    WITH_SHARED,
    B,
    L,
    dense_then_routed,
    layers,
    shared_expert,
)
from allocator.families.config import Config
from allocator.families.gguf import (
    SIGMOID,
    SOFTMAX,
    ComputeGraph,
    Fixed,
    Gguf,
    Half,
    ModelFacts,
    Pair,
    scaled_router_pairs,
    scaled_router_source,
)
from allocator.families.keys import Keys, LatentKeys
from allocator.families.roles import Role
from allocator.families.sizes import Scoring

_WITHOUT_Q_RANK = {26: None, 27: None, 48: 128_256}
"""Layers, and rows of the embedding, by which llama.cpp tells deepseek2 models without q_lora_rank
apart from the others; None: any."""
_REPORTED = (61, 256)  # layers and experts of DeepSeek-V3 itself
_HAND_RULE = (
    "hand rule: formats by role and layer of arXiv 2509.25689, which reports 103 GB for its "
    "DeepSeek-V3 with fewer experts"
)
_KEYS = Keys(experts=("n_routed_experts", "num_local_experts"), latent=LatentKeys())

_LATENT = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
WITHOUT_RANK = (*_LATENT, "q_proj")
WITH_RANK = (*_LATENT, "q_a_proj", "q_a_layernorm", "q_b_proj")

_A = L + "self_attn."
_RULES = (
    *COMMON,
    Rule(_A + "q_a_proj.weight", Role.Q_A, "q_rank x hidden", B + "attn_q_a.weight"),
    Rule(_A + "q_a_layernorm.weight", Role.NORM, "q_rank", B + "attn_q_a_norm.weight"),
    Rule(_A + "q_b_proj.weight", Role.Q_B, "queries x q_rank", B + "attn_q_b.weight"),
    Rule(_A + "kv_a_proj_with_mqa.weight", Role.KV_A, "row x hidden", B + "attn_kv_a_mqa.weight"),
    Rule(_A + "kv_a_layernorm.weight", Role.NORM, "rank", B + "attn_kv_a_norm.weight"),
    Rule(_A + "kv_b_proj.weight", Role.KV_B, "keys_values x rank", B + "attn_kv_b.weight"),
    SELECTION_BIAS,
    *shared_expert("shared_experts"),
)


def latent_attention(config: Config) -> tuple[str, ...]:
    """Returns the tensors of a layer's latent attention."""
    return WITHOUT_RANK if config.get("q_lora_rank") is None else WITH_RANK


def _layer_parts(config: Config, layer: int) -> Parts:
    return dense_then_routed(latent_attention(config), config, layer)


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SIGMOID, bool(config.get("norm_topk_prob", True))


def latent_pairs(facts: ModelFacts) -> Iterator[Pair]:
    """Yields what a file of deepseek2 says of attention and experts, but not how they are scored.

    Multi-head latent attention runs there as attention with one key/value head of rank + rope.
    """
    latent = facts.dimensions.latent
    assert latent is not None
    yield "attention.head_count_kv", 1
    yield "attention.key_length", latent.rank + latent.rope
    yield "attention.value_length", latent.rank
    yield "attention.key_length_mla", latent.nope + latent.rope
    yield "attention.value_length_mla", latent.value
    yield "attention.kv_lora_rank", latent.rank
    if latent.q_rank is not None:
        yield "attention.q_lora_rank", latent.q_rank
    yield "rope.dimension_count", latent.rope
    yield from scaled_router_pairs(facts)


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    config, router = facts.config, facts.router
    if config.get("scoring_func") not in (None, "sigmoid"):
        raise TargetError(
            f"gguf: config.json says scoring_func = {config['scoring_func']!r}, which transformers "
            "computes as a sigmoid all the same; set it to 'sigmoid' if that is meant"
        )
    yield from latent_pairs(facts)
    yield "expert_gating_func", SIGMOID
    if router.groups > 1:
        yield "expert_group_count", router.groups
        yield "expert_group_used_count", router.groups_used


def _check(facts: ModelFacts) -> None:
    latent, n_layers, tokens = facts.dimensions.latent, facts.dimensions.n_layers, facts.vocabulary
    assert latent is not None
    if latent.q_rank is None and _WITHOUT_Q_RANK.get(n_layers, 0) not in (None, tokens):
        raise TargetError(
            "gguf: llama.cpp loads a deepseek2 model without q_lora_rank only with 26 or 27 "
            f"layers, or with 48 and 128,256 tokens; got {n_layers} layers and {tokens:,} tokens; "
            "use target safetensors"
        )
    if not latent.interleaved:
        raise TargetError(
            "gguf: llama.cpp rotates interleaved pairs in deepseek2, config.json says "
            "rope_interleave = false; use target safetensors"
        )


def _gating_of(pairs: Mapping[str, Any]) -> int:
    """What llama.cpp's loader takes where a file does not say how experts are scored."""
    flash = pairs["block_count"] in (47, 48) and pairs.get("vocab_size") == 154_880
    return SIGMOID if flash else SOFTMAX


def _plan_notes(config: Config) -> tuple[str, ...]:
    size = (config.get("num_hidden_layers"), config.get("n_routed_experts"))
    return (_HAND_RULE,) if size == _REPORTED else ()


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    models="DeepSeek-V3, R1, Moonlight",
    rules=_RULES,
    keys=_KEYS,
    layer_parts=_layer_parts,
    layers=layers((WITHOUT_RANK, WITH_RANK), (DENSE, BIASED_ROUTED, WITH_SHARED)),
    scoring=_scoring,
    stacks=STACKS,
    gguf=Gguf(
        "deepseek2",
        _hyperparameters,
        ComputeGraph.LATENT,
        fixed=(Fixed("hidden_act", "silu", "silu"),),
        check=_check,
        halves=(
            Half(Role.KV_B, Role.K_B, B + "attn_k_b.weight"),
            Half(Role.KV_B, Role.V_B, B + "attn_v_b.weight"),
        ),
        divides_mscale=True,
        source=scaled_router_source,
        absent={"expert_gating_func": _gating_of},
    ),
    n_nextn_layers=1,
    router_groups=(8, 4),
    ranks_groups=True,
    selection_bias=True,
    scales_gates=True,
    never_null=NEVER_NULL
    | {
        "first_k_dense_replace", "kv_lora_rank", "n_shared_experts", "qk_nope_head_dim",
        "qk_rope_head_dim", "routed_scaling_factor", "v_head_dim",
    },
    bias_keys=("attention_bias",),
    plan_notes=_plan_notes,
)  # fmt: skip
