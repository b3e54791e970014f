"""gpt-oss: sizes alone, for `allocator plan`.

Sources: transformers' `modeling_gpt_oss`; llama.cpp's graph of `gpt-oss`.
"""

from allocator.errors import CheckpointError, TargetError
from allocator.families.base import Family, Parts, Rule, Support
from allocator.families.common import (
    BASE,
    EXPERTS,
    GROUPED_ATTENTION,
    KEYS_VALUES,
    ROUTED,
    B,
    L,
    layer,
)
from allocator.families.config import Config
from allocator.families.gguf import ComputeGraph, Gguf, Window
from allocator.families.keys import Keys
from allocator.families.roles import Role
from allocator.families.sizes import Scoring

_ALTERNATING = ("sliding_attention", "full_attention")
_ATTENTION = (*GROUPED_ATTENTION, *(f"{name}.bias" for name in GROUPED_ATTENTION), "sinks")
_KINDS = ("gate", "up", "down")
_ROUTED = (
    "mlp.router",
    "mlp.router.bias",
    *ROUTED[1:],
    *(f"mlp.experts.{kind}_proj_bias" for kind in _KINDS),
)
_BIASES = (  # of attention: the checkpoint's name, its axes, llama.cpp's name
    ("q_proj", "queries", "q"),
    ("k_proj", "keys", "k"),
    ("v_proj", "keys", "v"),
    ("o_proj", "hidden", "output"),
)
_RULES = (
    *BASE,
    *KEYS_VALUES,
    Rule(L + "post_attention_layernorm.weight", Role.NORM, "hidden",
         B + "post_attention_norm.weight"),
    *(
        Rule(L + f"self_attn.{name}.bias", Role.BIAS, axes, B + f"attn_{gguf}.bias")
        for name, axes, gguf in _BIASES
    ),
    Rule(L + "self_attn.sinks", Role.BIAS, "heads", B + "attn_sinks.weight"),
    Rule(L + "mlp.router.weight", Role.ROUTER, "experts x hidden", B + "ffn_gate_inp.weight"),
    Rule(L + "mlp.router.bias", Role.ROUTER_BIAS, "experts", B + "ffn_gate_inp.bias"),
    # a checkpoint has the experts of a layer, gate and up, in one tensor; these are its parts
    *EXPERTS,
    *(
        Rule(
            L + f"mlp.experts.{kind}_proj_bias",
            Role.EXPERT_BIAS,
            "experts x hidden" if kind == "down" else "experts x expert_width",
            B + f"ffn_{kind}_exps.bias",
        )
        for kind in _KINDS
    ),
)  # fmt: skip


def _layer_parts(config: Config, number: int) -> Parts:
    if not config.get("attention_bias", True):
        raise CheckpointError("config.json: attention_bias is false, needed true as in gpt_oss")
    return layer(_ATTENTION, _ROUTED)


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SOFTMAX_OF_CHOSEN, False


def _window(config: Config, n_layers: int) -> Window:
    tokens, kinds = config.get("sliding_window"), config.get("layer_types") or _ALTERNATING
    if type(tokens) is not int or tokens < 1:
        raise TargetError(f"gguf: sliding_window is {tokens!r}, needed a number from 1")
    listed = isinstance(kinds, (list, tuple))
    if not listed or any(kind != _ALTERNATING[layer % 2] for layer, kind in enumerate(kinds)):
        raise TargetError(
            "gguf: llama.cpp gives gpt-oss a sliding window in every other layer, from the first "
            "on; config.json has other layer_types"
        )
    return Window(tokens, frozenset(range(0, n_layers, 2)))  # set_swa_pattern(2)


GPT_OSS = Family(
    model_type="gpt_oss",
    models="gpt-oss-20b, 120b",
    rules=_RULES,
    keys=Keys(experts=("num_local_experts",), expert_width="intermediate_size"),
    layer_parts=_layer_parts,
    layers=(layer(_ATTENTION, _ROUTED),),
    scoring=_scoring,
    gguf=Gguf("gpt-oss", None, ComputeGraph.GROUPED, window=_window),
    support=Support.PLANNED,
)
