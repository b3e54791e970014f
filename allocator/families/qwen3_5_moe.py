"""Qwen3.5 and 3.6, those with routed experts: the language model alone.

Sources: transformers' `modeling_qwen3_5_moe`; llama.cpp's loader and graph of `qwen35moe`, and what
its converter makes of these checkpoints. llama.cpp has the heads of values in another order: the
first of every head of keys, then the second of each, and so on. So all that stands by value head is
in that order, the columns of `out_proj` too.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from allocator.errors import CheckpointError, TargetError
from allocator.families.base import Family, Parts, Rule
from allocator.families.common import (
    NEVER_NULL,
    NORMED_ATTENTION,
    STACKS,
    B,
    L,
    layer,
)
from allocator.families.config import Config
from allocator.families.gguf import Fixed, Gguf, GgufFacts, ModelFacts, Pair
from allocator.families.keys import Keys, LinearKeys
from allocator.families.linear import (
    MIXED,
    SHARED_BLOCK,
    is_linear,
    linear_layer,
    linear_rules,
    mixed_layers,
    mixed_pairs,
    mixed_source,
    tiled_channels,
    tiled_heads,
    tiled_values,
)
from allocator.families.roles import Role
from allocator.families.rope import rope_parameters
from allocator.families.transforms import reordered

_HEADS = (reordered("value heads tiled over heads of keys", tiled_heads),)
_CHANNELS = (reordered("channels of values tiled over heads of keys", tiled_channels),)
_SECTIONS = (11, 11, 10)  # transformers' own
_N_SECTIONS = 4  # of llama.cpp
_A = L + "linear_attn."
_INPUTS = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")
_RULES = (
    *MIXED,
    Rule(_A + "in_proj_qkv.weight", Role.LINEAR_QKV, "linear_channels x hidden",
         B + "attn_qkv.weight"),
    Rule(_A + "in_proj_z.weight", Role.LINEAR_Z, "linear_values x hidden", B + "attn_gate.weight"),
    Rule(_A + "in_proj_a.weight", Role.LINEAR_AB, "linear_heads x hidden", B + "ssm_alpha.weight",
         transforms=_HEADS),
    Rule(_A + "in_proj_b.weight", Role.LINEAR_AB, "linear_heads x hidden", B + "ssm_beta.weight",
         transforms=_HEADS),
    *linear_rules(_HEADS, _CHANNELS),
)  # fmt: skip


def _layer_parts(config: Config, number: int) -> Parts:
    if is_linear(config, number):
        return linear_layer(_INPUTS, SHARED_BLOCK)
    return layer(NORMED_ATTENTION, SHARED_BLOCK)


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    yield from mixed_pairs(facts, "qwen35moe")
    sections = _sections(rope_parameters(facts.config))
    if sum(sections) > facts.dimensions.head:
        raise TargetError(
            f"gguf: mrope_section {sections} needs heads of at least {sum(sections)} channels in "
            f"llama.cpp, got {facts.dimensions.head}; use target safetensors"
        )
    yield "rope.dimension_sections", sections


def _sections(rope: dict[str, Any]) -> tuple[int, ...]:
    """How rotated pairs are divided among time, height and width; in text these are equal."""
    sections = rope.get("mrope_section", _SECTIONS)
    whole = isinstance(sections, list | tuple) and all(type(n) is int and n >= 0 for n in sections)
    if not whole or not 0 < len(sections) <= _N_SECTIONS or not any(sections[:3]):
        raise CheckpointError(
            f"config.json: mrope_section is {sections!r}, needed up to {_N_SECTIONS} numbers"
        )
    return (*sections, *(0,) * (_N_SECTIONS - len(sections)))


QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe",
    models="Qwen3.5-35B-A3B, 122B-A10B, 397B-A17B, Qwen3.6-35B-A3B: their language models",
    rules=_RULES,
    keys=Keys(
        experts=("num_experts", "num_local_experts"), dense_width="moe_intermediate_size",
        linear=LinearKeys(),
    ),
    layer_parts=_layer_parts,
    layers=mixed_layers(_INPUTS, (SHARED_BLOCK,)),
    stacks=STACKS,
    gguf=Gguf(
        "qwen35moe",
        _hyperparameters,
        None,
        fixed=(Fixed("hidden_act", "silu", "silu"), Fixed("attn_output_gate", True, True)),
        row_orders={Role.LINEAR_QKV: tiled_channels, Role.LINEAR_Z: tiled_values},
        column_orders={Role.LINEAR_OUT: tiled_values},
    ),
    ignored=(r"model\.visual\..*", r"mtp\..*"),
    text_key="text_config",
    prefixes=(("model.language_model.", "model."),),
    built_as="qwen3_5_moe_text",
    never_null=(NEVER_NULL - {"intermediate_size"})
    | {
        "attention_dropout", "head_dim", "linear_conv_kernel_dim", "linear_key_head_dim",
        "linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim",
        "num_key_value_heads", "router_aux_loss_coef", "shared_expert_intermediate_size",
    },
    bias_keys=("attention_bias",),
)  # fmt: skip


def _source(file: GgufFacts) -> Config:
    own = mixed_source(file)
    sections = file["rope.dimension_sections"]
    rope = {
        "rope_type": "default",
        "rope_theta": file.pairs.get("rope.freq_base", 10000.0),
        "partial_rotary_factor": own.pop("partial_rotary_factor"),
        "mrope_section": list(sections[:3] if isinstance(sections, tuple) else [sections] * 3),
        "mrope_interleaved": True,
    }
    return own | {"rope_parameters": rope}


assert QWEN3_5_MOE.gguf is not None
QWEN3_5_MOE_TEXT = replace(
    QWEN3_5_MOE,
    gguf=replace(QWEN3_5_MOE.gguf, source=_source),
    model_type="qwen3_5_moe_text",
    models="the language model of Qwen3.5 or 3.6, as transformers saves it alone",
    text_key=None,
    built_as=None,
)
