"""Nemotron-H with experts: every layer is one of Mamba-2, attention, experts, or a dense block.

Experts have two matrices, up and down, with a squared ReLU between them. In Nemotron-3 Super they
compute in a narrower space, with a projection to it before the experts and one back after them.

Sources: transformers' `modeling_nemotron_h` and `configuration_nemotron_h`; llama.cpp's loader and
graph of `nemotron_h_moe`, and its converter.
"""

from collections.abc import Iterator

from allocator.errors import CheckpointError, TargetError
from allocator.families.base import Family, Parts, Rule, Stack
from allocator.families.common import B, L
from allocator.families.config import Config, count, number, whole
from allocator.families.gguf import Fixed, Gguf, GgufFacts, ModelFacts, Pair, grouped_pairs
from allocator.families.keys import Keys, StateSpaceKeys
from allocator.families.roles import Role
from allocator.families.sizes import Scoring
from allocator.families.transforms import MINUS_EXP

_MAMBA, _ATTENTION, _ROUTED, _DENSE = "linear_attention", "full_attention", "moe", "mlp"
_LETTERS = {"M": _MAMBA, "*": _ATTENTION, "E": _ROUTED, "-": _DENSE}
_NAMES = {"mamba": _MAMBA, "attention": _ATTENTION}
"""Of kinds of layers, in configs before transformers 5."""
_KEYS = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_dt_min": "time_step_min",
    "mamba_conv_bias": "use_conv_bias", "layer_types": "layers_block_type",
}  # fmt: skip
"""Keys that transformers reads in place of others."""
_LEAST = 1e-30
"""A step that is as good as none: llama.cpp knows no least step."""

_M = L + "mixer."
_SHARED = _M + "shared_experts."
_RULES = (
    Rule("model.embeddings.weight", Role.EMBEDDING, "vocabulary x hidden", "token_embd.weight"),
    Rule("lm_head.weight", Role.HEAD, "vocabulary x hidden", "output.weight"),
    Rule("model.norm_f.weight", Role.NORM, "hidden", "output_norm.weight"),
    Rule(L + "norm.weight", Role.NORM, "hidden", B + "attn_norm.weight"),
    Rule(_M + "in_proj.weight", Role.SSM_IN, "ssm_inputs x hidden", B + "ssm_in.weight"),
    Rule(_M + "conv1d.weight", Role.SSM_STATE, "ssm_channels x one x kernel",
         B + "ssm_conv1d.weight", gguf_shape="ssm_channels x kernel"),
    Rule(_M + "conv1d.bias", Role.BIAS, "ssm_channels", B + "ssm_conv1d.bias"),
    Rule(_M + "dt_bias", Role.SSM_STATE, "ssm_heads", B + "ssm_dt.bias"),
    Rule(_M + "A_log", Role.SSM_STATE, "ssm_heads", B + "ssm_a", transforms=(MINUS_EXP,),
         gguf_shape="ssm_heads x one"),
    Rule(_M + "D", Role.SSM_STATE, "ssm_heads", B + "ssm_d", gguf_shape="ssm_heads x one"),
    Rule(_M + "norm.weight", Role.NORM, "ssm_values", B + "ssm_norm.weight",
         gguf_shape="ssm_groups x ssm_group"),
    Rule(_M + "out_proj.weight", Role.SSM_OUT, "hidden x ssm_values", B + "ssm_out.weight"),
    Rule(_M + "q_proj.weight", Role.Q, "queries x hidden", B + "attn_q.weight"),
    Rule(_M + "k_proj.weight", Role.K, "keys x hidden", B + "attn_k.weight"),
    Rule(_M + "v_proj.weight", Role.V, "keys x hidden", B + "attn_v.weight"),
    Rule(_M + "o_proj.weight", Role.O, "hidden x attended", B + "attn_output.weight"),
    Rule(_M + "gate.weight", Role.ROUTER, "experts x hidden", B + "ffn_gate_inp.weight"),
    Rule(_M + "gate.e_score_correction_bias", Role.ROUTER_BIAS, "experts", B + "exp_probs_b.bias"),
    Rule(_M + "fc1_latent_proj.weight", Role.LATENT_IN, "expert_hidden x hidden",
         B + "ffn_latent_down.weight"),
    Rule(_M + "fc2_latent_proj.weight", Role.LATENT_OUT, "hidden x expert_hidden",
         B + "ffn_latent_up.weight"),
    Rule(_M + "experts.{expert}.up_proj.weight", Role.EXPERT_UP, "expert_width x expert_hidden",
         B + "ffn_up_exps.weight"),
    Rule(_M + "experts.{expert}.down_proj.weight", Role.EXPERT_DOWN,
         "expert_hidden x expert_width", B + "ffn_down_exps.weight"),
    Rule(_SHARED + "up_proj.weight", Role.SHARED_UP, "shared_width x hidden",
         B + "ffn_up_shexp.weight"),
    Rule(_SHARED + "down_proj.weight", Role.SHARED_DOWN, "hidden x shared_width",
         B + "ffn_down_shexp.weight"),
    Rule(_M + "up_proj.weight", Role.MLP_UP, "dense_width x hidden", B + "ffn_up.weight"),
    Rule(_M + "down_proj.weight", Role.MLP_DOWN, "hidden x dense_width", B + "ffn_down.weight"),
)  # fmt: skip


def _layer(*names: str) -> Parts:
    return frozenset(("norm", *(f"mixer.{name}" for name in names)))


_UNBIASED = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj")
_EXPERTS = (
    "gate", "gate.e_score_correction_bias",
    *(f"{block}.{name}_proj" for block in ("experts.{expert}", "shared_experts")
      for name in ("up", "down")),
)  # fmt: skip
_PLAIN = {
    _MAMBA: _layer(*_UNBIASED, "conv1d.bias"),
    _ATTENTION: _layer("q_proj", "k_proj", "v_proj", "o_proj"),
    _ROUTED: _layer(*_EXPERTS),
    _DENSE: _layer("up_proj", "down_proj"),
}
_WITHOUT_BIAS = _layer(*_UNBIASED)
_IN_LATENTS = _layer(*_EXPERTS, "fc1_latent_proj", "fc2_latent_proj")


def _completed(config: Config) -> Config:
    """A config with the keys of transformers 5, and with its number of layers."""
    config = {_KEYS.get(key, key): value for key, value in config.items()}
    if config.get("tie_word_embeddings"):
        raise CheckpointError(
            "config.json: tie_word_embeddings is true, but transformers gives nemotron_h a head of "
            "its own; needed false"
        )
    pattern = config.get("hybrid_override_pattern")
    if config.get("layers_block_type") is None and isinstance(pattern, str):
        config["layers_block_type"] = [_LETTERS.get(letter, letter) for letter in pattern]
    kinds = config.get("layers_block_type")
    if isinstance(kinds, list):
        config.setdefault("num_hidden_layers", len(kinds))
    return config


def _kinds(config: Config) -> list[str]:
    """What every layer is."""
    kinds, n_layers = config.get("layers_block_type"), count(config, "num_hidden_layers")
    if isinstance(kinds, list):
        kinds = [_NAMES.get(kind, kind) if isinstance(kind, str) else "" for kind in kinds]
    if not isinstance(kinds, list) or len(kinds) != n_layers or not set(kinds) <= set(_PLAIN):
        raise CheckpointError(
            f"config.json: layers_block_type (or hybrid_override_pattern) is {kinds!r}, needed one "
            f"of {', '.join(_PLAIN)} for each of {n_layers} layers"
        )
    return kinds


def _layer_parts(config: Config, number: int) -> Parts:
    kind = _kinds(config)[number]
    if kind == _MAMBA and not config.get("use_conv_bias", True):
        return _WITHOUT_BIAS
    if kind == _ROUTED and config.get("moe_latent_size") is not None:
        return _IN_LATENTS
    return _PLAIN[kind]


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SIGMOID, bool(config.get("norm_topk_prob", True))


# -- llama.cpp


def _check(facts: ModelFacts) -> None:
    if _DENSE in _kinds(facts.config):
        raise TargetError(
            "gguf: llama.cpp loads nemotron_h_moe with experts in every layer that is no attention "
            "and no Mamba, config.json has layers of kind 'mlp'; use target safetensors"
        )


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    config, keys, dimensions, router = facts.config, facts.keys, facts.dimensions, facts.router
    kinds, space = _kinds(config), dimensions.state_space
    assert space is not None
    width = whole(config, keys.expert_width)
    for key, value in grouped_pairs(facts):
        if key == "attention.head_count_kv":  # this and the next key tell layers apart
            yield key, tuple(dimensions.kv_heads * (kind == _ATTENTION) for kind in kinds)
        elif key != "rope.dimension_count":  # nothing is rotated
            yield key, value
    epsilon = number({keys.norm_epsilon: keys.default_epsilon, **config}, keys.norm_epsilon)
    yield "attention.layer_norm_epsilon", epsilon  # read, and used by multi-token prediction alone
    yield "feed_forward_length", tuple(width * (kind == _ROUTED) for kind in kinds)
    yield "expert_shared_count", 1
    yield "expert_shared_feed_forward_length", whole(config, keys.shared_width)
    yield "expert_weights_norm", router.normalizes
    yield "expert_weights_scale", router.scale
    if router.groups > 1:
        yield "expert_group_count", router.groups
        yield "expert_group_used_count", router.groups_used
    if dimensions.expert_hidden is not None:
        yield "moe_latent_size", dimensions.expert_hidden
    yield "ssm.conv_kernel", space.kernel
    yield "ssm.inner_size", space.values
    yield "ssm.state_size", space.state
    yield "ssm.time_step_rank", space.heads
    yield "ssm.group_count", space.groups


def _least_step(config: Config) -> float:
    return number({"time_step_min": 0.001, **config}, "time_step_min")


def _computed(config: Config) -> Config:
    """What llama.cpp computes with: steps are as short as the weights make them."""
    return config if _least_step(config) <= _LEAST else {**config, "time_step_min": _LEAST}


def _otherwise(config: Config) -> tuple[str, ...]:
    least = _least_step(config)
    if least <= _LEAST:
        return ()
    return (
        f"llama.cpp computes Mamba-2 without a least step, transformers with time_step_min = "
        f"{least:g}: the original and all candidates are scored as llama.cpp computes them; target "
        "safetensors computes as transformers does",
    )


def _source(file: GgufFacts) -> Config:
    keys = StateSpaceKeys()
    layers = zip(
        file.by_layer("attention.head_count_kv"), file.by_layer("feed_forward_length"), strict=True
    )
    width, heads = file["expert_feed_forward_length"], file["ssm.time_step_rank"]
    return {
        "layers_block_type": [
            _ATTENTION if kv_heads else _ROUTED if ff_width else _MAMBA
            for kv_heads, ff_width in layers
        ],
        "intermediate_size": width,  # of dense blocks, which no layer is
        "num_key_value_heads": max(file.by_layer("attention.head_count_kv")),
        "moe_shared_expert_intermediate_size": file["expert_shared_feed_forward_length"],
        "n_shared_experts": file["expert_shared_count"],
        "norm_topk_prob": file.pairs.get("expert_weights_norm", False),
        "routed_scaling_factor": file.pairs.get("expert_weights_scale", 1.0),
        "n_group": file.pairs.get("expert_group_count", 1),
        "topk_group": file.pairs.get("expert_group_used_count", 1),
        "moe_latent_size": file.pairs.get("moe_latent_size"),
        "time_step_min": _LEAST,  # llama.cpp knows no other
        keys.kernel: file["ssm.conv_kernel"],
        keys.heads: heads,
        keys.head: file["ssm.inner_size"] // heads,
        keys.state: file["ssm.state_size"],
        keys.groups: file["ssm.group_count"],
    }


NEMOTRON_H = Family(
    model_type="nemotron_h",
    models="Nemotron-3 Nano 30B-A3B, Super 120B-A12B",
    rules=_RULES,
    keys=Keys(
        experts=("n_routed_experts", "num_local_experts"), norm_epsilon="layer_norm_epsilon",
        default_epsilon=1e-5, shared_width="moe_shared_expert_intermediate_size",
        state_space=StateSpaceKeys(), expert_hidden="moe_latent_size",
        nextn="",  # layers of multi-token prediction lie outside of the others, and are ignored
    ),
    layer_parts=_layer_parts,
    layers=(*_PLAIN.values(), _WITHOUT_BIAS, _IN_LATENTS),
    scoring=_scoring,
    completed=_completed,
    stacks=(
        Stack(_M + "experts.up_proj", (Role.EXPERT_UP,)),
        Stack(_M + "experts.down_proj", (Role.EXPERT_DOWN,)),
    ),
    gguf=Gguf(
        "nemotron_h_moe",
        _hyperparameters,
        None,
        fixed=(
            Fixed("mlp_hidden_act", "relu2", "relu2"),
            Fixed("mamba_hidden_act", "silu", "silu"),
            Fixed("use_conv_bias", True, True),
        ),
        check=_check,
        computed=_computed,
        rotation=lambda config: {},  # whatever a config says of it
        otherwise=_otherwise,
        source=_source,
        absent={
            "attention.layer_norm_rms_epsilon": lambda pairs: pairs["attention.layer_norm_epsilon"],
        },
        unread=frozenset({  # nothing is rotated, and no layer of multi-token prediction computed
            "attention.layer_norm_epsilon", "rope.dimension_count", "rope.freq_base",
        }),
    ),
    ignored=(r"mtp\..*",),
    prefixes=(("backbone.", "model."),),
    ranks_groups=True,
    selection_bias=True,
    scales_gates=True,
    never_null=frozenset({
        "attention_bias", "chunk_size", "conv_kernel", "head_dim", "initializer_range",
        "intermediate_size", "layer_norm_epsilon", "mamba_head_dim", "mamba_hidden_act",
        "mamba_num_heads", "max_position_embeddings", "mlp_bias", "mlp_hidden_act",
        "moe_intermediate_size", "moe_shared_expert_intermediate_size", "n_groups",
        "norm_topk_prob", "num_attention_heads", "routed_scaling_factor", "ssm_state_size",
        "tie_word_embeddings", "time_step_min", "use_bias", "use_cache", "use_conv_bias",
    }),
    bias_keys=("attention_bias", "mlp_bias", "use_bias"),
)  # fmt: skip
