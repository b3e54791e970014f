"""gpt-oss.

Sources: transformers' `modeling_gpt_oss` and `integrations/mxfp4`; llama.cpp's loader and graph of
`gpt-oss` (`models/openai-moe.cpp`), and its converter.
"""

from collections.abc import Iterator
from typing import Any

from allocator.errors import CheckpointError, TargetError
from allocator.families.base import Family, Joined, Parts, Rule, Stack
from allocator.families.common import (
    BASE,
    EXPERTS,
    GROUPED_ATTENTION,
    KEYS_VALUES,
    NEVER_NULL,
    ROUTED,
    B,
    L,
    layer,
)
from allocator.families.config import FULL, SLIDING, Config
from allocator.families.gguf import (
    ComputeGraph,
    Fixed,
    Gguf,
    GgufFacts,
    ModelFacts,
    Pair,
    Window,
    grouped_pairs,
)
from allocator.families.keys import Keys
from allocator.families.roles import Role
from allocator.families.rope import rope_parameters
from allocator.families.sizes import Scoring

_ALTERNATING = (SLIDING, FULL)
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
    *EXPERTS,  # these, and the biases of gate and up, are parts of one tensor
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
    return _LAYER


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SOFTMAX_OF_CHOSEN, False


_ROPE = {  # transformers' own, where a config has none
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_THETA = 150000.0


def _with_rope(config: Config) -> Config:
    """The config with transformers' own rotation where it has none."""
    rope: Any = config.get("rope_scaling") or config.get("rope_parameters") or _ROPE
    if not isinstance(rope, dict):
        return config  # refused where it is read
    others = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
    own = {"rope_theta": config.get("rope_theta", _THETA), **rope}
    return {**others, "rope_parameters": own}


def _computed(config: Config) -> Config:
    """What llama.cpp computes with: it rounds the bounds of YaRN's ramp to whole channels."""
    config = _with_rope(config)
    if rope_parameters(config)["rope_type"] != "yarn":
        return config
    return {**config, "rope_parameters": {**config["rope_parameters"], "truncate": True}}


def _otherwise(config: Config) -> tuple[str, ...]:
    rope = rope_parameters(_with_rope(config))
    if rope["rope_type"] != "yarn" or rope.get("truncate", True):
        return ()
    return (
        "llama.cpp computes YaRN of gpt-oss as with truncate = true, config.json says false: the "
        "original and all candidates are scored as llama.cpp computes them; target safetensors "
        "computes as config.json says",
    )


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    yield from grouped_pairs(facts)
    window = _window(facts.config, facts.dimensions.n_layers)
    yield "attention.sliding_window", window.tokens


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


def _source(file: GgufFacts) -> Config:
    own = {"sliding_window": file["attention.sliding_window"]}
    if "rope.scaling.type" in file.pairs:
        return own
    base = file.pairs.get("rope.freq_base", 10000.0)  # llama.cpp's own
    return own | {"rope_parameters": {"rope_type": "default", "rope_theta": base}}


_LAYER = layer(_ATTENTION, _ROUTED)
_STACKS = (
    Stack(
        L + "mlp.experts.gate_up_proj", (Role.EXPERT_GATE, Role.EXPERT_UP),
        transposed=True, alternating=True, in_mxfp4=True,
    ),
    Stack(L + "mlp.experts.down_proj", (Role.EXPERT_DOWN,), transposed=True, in_mxfp4=True),
)  # fmt: skip
_JOINED = (
    Joined(
        L + "mlp.experts.gate_up_proj_bias",
        tuple(L + f"mlp.experts.{kind}_proj_bias" for kind in ("gate", "up")),
    ),
)

GPT_OSS = Family(
    model_type="gpt_oss",
    models="gpt-oss-20b, 120b",
    rules=_RULES,
    keys=Keys(
        experts=("num_local_experts",), expert_width="intermediate_size", default_epsilon=1e-5
    ),
    layer_parts=_layer_parts,
    layers=(_LAYER,),
    scoring=_scoring,
    stacks=_STACKS,
    joined=_JOINED,
    gguf=Gguf(
        "gpt-oss",
        _hyperparameters,
        ComputeGraph.GROUPED,
        fixed=(Fixed("swiglu_alpha", 1.702, 1.702), Fixed("swiglu_limit", 7.0, 7.0)),
        window=_window,
        computed=_computed,
        otherwise=_otherwise,
        source=_source,
    ),
    never_null=NEVER_NULL - {"moe_intermediate_size"},
)
