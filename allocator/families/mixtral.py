"""Mixtral: sizes alone, for `allocator plan`.

Sources: transformers' `modeling_mixtral` (names on disk in its `conversion_mapping`); llama.cpp's
graph of `llama`.
"""

from allocator.families.base import Family, Parts, Rule, Support
from allocator.families.common import (
    BASE,
    FFN_NORM,
    GROUPED_ATTENTION,
    KEYS_VALUES,
    B,
    L,
    expert_rules,
    layer,
)
from allocator.families.config import Config
from allocator.families.gguf import ComputeGraph, Gguf
from allocator.families.keys import Keys
from allocator.families.roles import Role

_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
_BLOCK = "block_sparse_moe."
_ROUTED = (_BLOCK + "gate", *(f"{_BLOCK}experts.{{expert}}.{name}" for name in _NAMES.values()))


def _layer_parts(config: Config, number: int) -> Parts:
    return layer(GROUPED_ATTENTION, _ROUTED)


MIXTRAL = Family(
    model_type="mixtral",
    rules=(
        *BASE,
        *FFN_NORM,
        *KEYS_VALUES,
        Rule(L + _BLOCK + "gate.weight", Role.ROUTER, "experts x hidden",
             B + "ffn_gate_inp.weight"),
        *expert_rules(L + _BLOCK + "experts.{expert}.{kind}.weight", _NAMES),
    ),
    keys=Keys(experts=("num_local_experts",), expert_width="intermediate_size"),
    layer_parts=_layer_parts,
    layers=(layer(GROUPED_ATTENTION, _ROUTED),),
    gguf=Gguf("llama", None, ComputeGraph.GROUPED),
    support=Support.PLANNED,
)  # fmt: skip
