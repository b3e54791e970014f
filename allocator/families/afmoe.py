"""AFMoE, the architecture of Trinity.

Sources: transformers' `modeling_afmoe`; llama.cpp's loader and graph of `afmoe`.
"""

from collections.abc import Iterator

from allocator.errors import TargetError
from allocator.families.base import Family, Parts, Rule
from allocator.families.common import (
    BASE,
    DENSE,
    EXPERTS,
    HEAD_NORMS,
    KEYS_VALUES,
    MLP,
    NEVER_NULL,
    NORMED_ATTENTION,
    PROJECTIONS,
    SHARED,
    STACKS,
    B,
    L,
    layer,
    shared_expert,
)
from allocator.families.config import FULL, SLIDING, Config, count
from allocator.families.gguf import (
    SIGMOID,
    Fixed,
    Gguf,
    GgufFacts,
    ModelFacts,
    Pair,
    Window,
    grouped_pairs,
    scaled_router_pairs,
)
from allocator.families.keys import Keys
from allocator.families.roles import Role
from allocator.families.sizes import Scoring

_INTERVAL = 4  # llama.cpp's own, which no key changes: the last of every four layers is full

_RULES = (
    *BASE,
    *KEYS_VALUES,
    *HEAD_NORMS,
    Rule(L + "self_attn.gate_proj.weight", Role.ATTENTION_GATE, "queries x hidden",
         B + "attn_gate.weight"),
    Rule(L + "post_attention_layernorm.weight", Role.NORM, "hidden",
         B + "post_attention_norm.weight"),
    Rule(L + "pre_mlp_layernorm.weight", Role.NORM, "hidden", B + "ffn_norm.weight"),
    Rule(L + "post_mlp_layernorm.weight", Role.NORM, "hidden", B + "post_ffw_norm.weight"),
    Rule(L + "mlp.router.gate.weight", Role.ROUTER, "experts x hidden", B + "ffn_gate_inp.weight"),
    Rule(L + "mlp.expert_bias", Role.ROUTER_BIAS, "experts", B + "exp_probs_b.bias"),
    *EXPERTS,
    *shared_expert("shared_experts"),
    *MLP[1:],
)  # fmt: skip
_ATTENTION = (*NORMED_ATTENTION, "gate_proj")
_AROUND = ("pre_mlp_layernorm", "post_mlp_layernorm")
_UNSHARED = (
    "mlp.router.gate",
    "mlp.expert_bias",
    *(f"mlp.experts.{{expert}}.{name}" for name in PROJECTIONS.values()),
)
_ROUTED = (*_UNSHARED, *(f"mlp.shared_experts.{name}" for name in SHARED))


def _layer_parts(config: Config, number: int) -> Parts:
    is_dense = number < count(config, "num_dense_layers", 0, default=1)
    return layer(_ATTENTION, (*_AROUND, *(DENSE if is_dense else _ROUTED)))


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SIGMOID, True


def _kinds(config: Config, n_layers: int) -> list[str]:
    kinds = config.get("layer_types")
    if kinds is None:
        every = count(config, "global_attn_every_n_layers", default=4)
        return [SLIDING if (number + 1) % every else FULL for number in range(n_layers)]
    return list(kinds) if isinstance(kinds, (list, tuple)) else [repr(kinds)]


def _window(config: Config, n_layers: int) -> Window:
    return Window.over(count(config, "sliding_window"), _kinds(config, n_layers))


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    n_layers = facts.dimensions.n_layers
    own = [SLIDING if (number + 1) % _INTERVAL else FULL for number in range(n_layers)]
    if _kinds(facts.config, n_layers) != own:
        raise TargetError(
            f"gguf: llama.cpp gives the last of every {_INTERVAL} layers of afmoe full attention "
            "without positions, and the others a sliding window; config.json has other layer_types:"
            " use target safetensors"
        )
    yield from grouped_pairs(facts)
    yield "attention.sliding_window", _window(facts.config, n_layers).tokens
    yield "attention.sliding_window_pattern", _INTERVAL
    yield "expert_gating_func", SIGMOID
    yield from scaled_router_pairs(facts)


def _source(file: GgufFacts) -> Config:
    return {
        "num_dense_layers": file.pairs.get("leading_dense_block_count", 0),
        "num_shared_experts": file["expert_shared_count"],
        "route_scale": file.pairs.get("expert_weights_scale", 1.0),
        "sliding_window": file["attention.sliding_window"],
    }


AFMOE = Family(
    model_type="afmoe",
    models="Trinity-Nano, Trinity-Mini, Trinity-Large",
    rules=_RULES,
    keys=Keys(
        experts=("num_experts",), shared_experts="num_shared_experts", scale="route_scale",
        default_epsilon=1e-5,
    ),
    layer_parts=_layer_parts,
    layers=tuple(layer(_ATTENTION, (*_AROUND, *block)) for block in (DENSE, _ROUTED)),
    scoring=_scoring,
    stacks=STACKS,
    gguf=Gguf(
        "afmoe",
        _hyperparameters,
        None,
        fixed=(Fixed("hidden_act", "silu", "silu"), Fixed("mup_enabled", True, False)),
        window=_window,
        source=_source,
        absent={
            "attention.sliding_window_pattern": lambda pairs: _INTERVAL,
            "expert_gating_func": lambda pairs: SIGMOID,
        },
    ),
    selection_bias=True,
    scales_gates=True,
    never_null=NEVER_NULL,
    bias_keys=("attention_bias",),
)  # fmt: skip
