"""Qwen3-Next.

Sources: transformers' `modeling_qwen3_next`; llama.cpp's loader and graph of `qwen3next`.
"""

from collections.abc import Iterator

from allocator.families.base import Family, Parts, Rule
from allocator.families.common import (
    DENSE,
    NEVER_NULL,
    NORMED_ATTENTION,
    STACKS,
    B,
    L,
    is_sparse,
    layer,
)
from allocator.families.config import Config
from allocator.families.gguf import Fixed, Gguf, ModelFacts, Pair, Piece
from allocator.families.keys import Keys, LinearKeys
from allocator.families.linear import (
    DENSE_MLP,
    MIXED,
    SHARED_BLOCK,
    is_linear,
    linear_layer,
    linear_rules,
    mixed_layers,
    mixed_pairs,
    mixed_source,
    whole_rows,
)
from allocator.families.roles import Role
from allocator.families.sizes import Scoring

_A = L + "linear_attn."
_INPUTS = ("in_proj_qkvz", "in_proj_ba")
_RULES = (
    *MIXED,
    *DENSE_MLP,
    Rule(_A + "in_proj_qkvz.weight", Role.LINEAR_QKVZ, "linear_inputs x hidden",
         B + "ssm_in.weight"),
    Rule(_A + "in_proj_ba.weight", Role.LINEAR_AB, "linear_gates x hidden", B + "ssm_ba.weight"),
    *linear_rules(),
)  # fmt: skip


def _layer_parts(config: Config, number: int) -> Parts:
    block = SHARED_BLOCK if is_sparse(config, number) else DENSE
    if is_linear(config, number):
        return linear_layer(_INPUTS, block)
    return layer(NORMED_ATTENTION, block)


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SOFTMAX, bool(config.get("norm_topk_prob", True))


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    yield from mixed_pairs(facts, "qwen3next")


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    models="Qwen3-Next-80B-A3B, Qwen3-Coder-Next",
    rules=_RULES,
    keys=Keys(experts=("num_experts", "num_local_experts"), linear=LinearKeys()),
    layer_parts=_layer_parts,
    layers=mixed_layers(_INPUTS, (DENSE, SHARED_BLOCK)),
    scoring=_scoring,
    stacks=STACKS,
    gguf=Gguf(
        "qwen3next",
        _hyperparameters,
        None,
        fixed=(
            Fixed("hidden_act", "silu", "silu"),
            Fixed("norm_topk_prob", True, True),
            Fixed("attn_output_gate", True, True),
        ),
        pieces=(
            Piece(Role.LINEAR_QKVZ, Role.LINEAR_QKV, B + "attn_qkv.weight",
                  lambda dimensions: whole_rows(dimensions)[0]),
            Piece(Role.LINEAR_QKVZ, Role.LINEAR_Z, B + "attn_gate.weight",
                  lambda dimensions: whole_rows(dimensions)[1]),
        ),
        source=mixed_source,
    ),
    ignored=(r"mtp\..*",),
    never_null=NEVER_NULL
    | {
        "attention_dropout", "decoder_sparse_step", "head_dim", "linear_conv_kernel_dim",
        "linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads",
        "linear_value_head_dim", "norm_topk_prob", "num_key_value_heads", "router_aux_loss_coef",
        "shared_expert_intermediate_size",
    },
    bias_keys=("attention_bias",),
)  # fmt: skip
