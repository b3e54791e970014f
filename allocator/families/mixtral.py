"""Mixtral.

Sources: transformers' `modeling_mixtral`, and its `conversion_mapping` for names on disk;
llama.cpp's loader and graph of `llama`.
"""

from allocator.families.base import Family
from allocator.families.common import (
    BASE,
    EXPERTS,
    FFN_NORM,
    GROUPED_ATTENTION,
    KEYS_VALUES,
    MLP,
    NEVER_NULL,
    ROUTED,
    STACKS,
    also_named,
    layer,
)
from allocator.families.gguf import (
    ComputeGraph,
    Fixed,
    Gguf,
    grouped_pairs,
    nothing_else,
    paired_halves,
)
from allocator.families.keys import Keys
from allocator.families.roles import Role

ON_DISK = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".up_proj.": ".w3.",
    ".down_proj.": ".w2.",
}
"""Parts of names in checkpoints, by what they are in the model."""
_LAYER = layer(GROUPED_ATTENTION, ROUTED)


MIXTRAL = Family(
    model_type="mixtral",
    models="Mixtral-8x7B, 8x22B",
    rules=(*BASE, *FFN_NORM, *KEYS_VALUES, *also_named((MLP[0], *EXPERTS), ON_DISK)),
    keys=Keys(experts=("num_local_experts",), expert_width="intermediate_size"),
    layer_parts=lambda config, number: _LAYER,
    layers=(_LAYER,),
    stacks=STACKS,
    gguf=Gguf(
        "llama",
        grouped_pairs,
        ComputeGraph.GROUPED,
        fixed=(Fixed("hidden_act", "silu", "silu"), Fixed("sliding_window", None, None)),
        row_orders={
            Role.Q: lambda dimensions: paired_halves(dimensions.heads, dimensions.head),
            Role.K: lambda dimensions: paired_halves(dimensions.kv_heads, dimensions.head),
        },
        source=nothing_else,
    ),
    never_null=NEVER_NULL - {"moe_intermediate_size", "attention_bias"},
)
