"""Tensors that several architectures share, as transformers and llama.cpp name them.

Sources: transformers' `modeling_*`; llama.cpp's tensor names as in gguf-py's
`constants.MODEL_TENSORS`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product

from allocator.errors import CheckpointError
from allocator.families.base import Parts, Rule, Stack
from allocator.families.config import Config, count
from allocator.families.roles import Role
from allocator.families.sizes import Scoring

L = "model.layers.{layer}."
B = "blk.{layer}."

BASE = (
    Rule("model.embed_tokens.weight", Role.EMBEDDING, "vocabulary x hidden", "token_embd.weight"),
    Rule("lm_head.weight", Role.HEAD, "vocabulary x hidden", "output.weight"),
    Rule("model.norm.weight", Role.NORM, "hidden", "output_norm.weight"),
    Rule(L + "input_layernorm.weight", Role.NORM, "hidden", B + "attn_norm.weight"),
    Rule(L + "self_attn.o_proj.weight", Role.O, "hidden x attended", B + "attn_output.weight"),
    Rule(L + "self_attn.q_proj.weight", Role.Q, "queries x hidden", B + "attn_q.weight"),
)
KEYS_VALUES = (
    Rule(L + "self_attn.k_proj.weight", Role.K, "keys x hidden", B + "attn_k.weight"),
    Rule(L + "self_attn.v_proj.weight", Role.V, "keys x hidden", B + "attn_v.weight"),
)
FFN_NORM = (
    Rule(L + "post_attention_layernorm.weight", Role.NORM, "hidden", B + "ffn_norm.weight"),
)
EXPERT_ROLES = {"gate": Role.EXPERT_GATE, "up": Role.EXPERT_UP, "down": Role.EXPERT_DOWN}


def expert_rules(pattern: str, names: dict[str, str]) -> tuple[Rule, ...]:
    """Returns the rules of a routed expert's three matrices.

    Args:
        pattern: the checkpoint's name, with `{kind}` for the matrix.
        names: what the checkpoint calls gate, up and down.
    """
    shapes = {"gate": "expert_width x hidden", "up": "expert_width x hidden"}
    return tuple(
        Rule(
            pattern.replace("{kind}", names[kind]),
            role,
            shapes.get(kind, "hidden x expert_width"),
            B + f"ffn_{kind}_exps.weight",
        )
        for kind, role in EXPERT_ROLES.items()
    )


PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
EXPERTS = expert_rules(L + "mlp.experts.{expert}.{kind}.weight", PROJECTIONS)
STACKS = (
    Stack(L + "mlp.experts.gate_up_proj", (Role.EXPERT_GATE, Role.EXPERT_UP)),
    Stack(L + "mlp.experts.down_proj", (Role.EXPERT_DOWN,)),
)
"""As transformers has them in a model, and some uploads on disk."""
MLP = (
    Rule(L + "mlp.gate.weight", Role.ROUTER, "experts x hidden", B + "ffn_gate_inp.weight"),
    Rule(L + "mlp.gate_proj.weight", Role.MLP_GATE, "dense_width x hidden", B + "ffn_gate.weight"),
    Rule(L + "mlp.up_proj.weight", Role.MLP_UP, "dense_width x hidden", B + "ffn_up.weight"),
    Rule(L + "mlp.down_proj.weight", Role.MLP_DOWN, "hidden x dense_width", B + "ffn_down.weight"),
)
COMMON = BASE + FFN_NORM + MLP + EXPERTS


def also_named(rules: Iterable[Rule], names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Returns rules with a further name each, in which parts of the name are replaced.

    Args:
        rules: those whose names have none of the parts stay as they are.
        names: the other part by the part that it replaces.
    """
    return tuple(map(partial(_also_named, names), rules))


def _also_named(names: Mapping[str, str], rule: Rule) -> Rule:
    other = rule.pattern
    for part, new in names.items():
        other = other.replace(part, new)
    return rule if other == rule.pattern else replace(rule, aliases=(*rule.aliases, other))


def shared_expert(name: str) -> tuple[Rule, ...]:
    """Returns the rules of the shared experts' matrices; `name` is what their block is called."""
    prefix = L + f"mlp.{name}."
    return (
        Rule(prefix + "gate_proj.weight", Role.SHARED_GATE, "shared_width x hidden",
             B + "ffn_gate_shexp.weight"),
        Rule(prefix + "up_proj.weight", Role.SHARED_UP, "shared_width x hidden",
             B + "ffn_up_shexp.weight"),
        Rule(prefix + "down_proj.weight", Role.SHARED_DOWN, "hidden x shared_width",
             B + "ffn_down_shexp.weight"),
    )  # fmt: skip


SELECTION_BIAS = Rule(
    L + "mlp.gate.e_score_correction_bias", Role.ROUTER_BIAS, "experts", B + "exp_probs_b.bias"
)
HEAD_NORMS = tuple(
    Rule(L + f"self_attn.{kind}_norm.weight", Role.NORM, "head", B + f"attn_{kind}_norm.weight")
    for kind in ("q", "k")
)
WIDE_NORMS = tuple(
    Rule(L + f"self_attn.{kind}_norm.weight", Role.NORM, axes, B + f"attn_{kind}_norm.weight")
    for kind, axes in (("q", "queries"), ("k", "keys"))
)
"""Norms over the queries, and keys, of all heads together."""
QKV_BIASES = tuple(
    Rule(L + f"self_attn.{kind}_proj.bias", Role.BIAS, axes, B + f"attn_{kind}.bias")
    for kind, axes in (("q", "queries"), ("k", "keys"), ("v", "keys"))
)

# -- sets of tensors that make up a layer, by `Rule.part`

NORMS = ("input_layernorm", "post_attention_layernorm")
GROUPED_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BIASED_ATTENTION = (*GROUPED_ATTENTION, *(f"{name}.bias" for name in GROUPED_ATTENTION[:3]))
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHARED = tuple(f"{kind}_proj" for kind in ("gate", "up", "down"))
NORMED_ATTENTION = (*GROUPED_ATTENTION, "q_norm", "k_norm")
ROUTED = ("mlp.gate", *(f"mlp.experts.{{expert}}.{name}" for name in PROJECTIONS.values()))

BIASED_ROUTED = (*ROUTED, "mlp.gate.e_score_correction_bias")
WITH_SHARED = (*BIASED_ROUTED, *(f"mlp.shared_experts.{name}" for name in SHARED))


def layer(attention: tuple[str, ...], mlp: tuple[str, ...]) -> Parts:
    """Returns the tensors of a layer with this attention (names in `self_attn`) and this block."""
    return frozenset((*NORMS, *(f"self_attn.{name}" for name in attention), *mlp))


def layers(
    attentions: tuple[tuple[str, ...], ...], mlps: tuple[tuple[str, ...], ...]
) -> tuple[Parts, ...]:
    """Returns the layers with every pair of an attention and a block."""
    return tuple(layer(attention, mlp) for attention, mlp in product(attentions, mlps))


def dense_then_routed(attention: tuple[str, ...], config: Config, number: int) -> Parts:
    """Returns a layer of a model whose first layers are dense, as DeepSeek-V3's.

    Raises:
        CheckpointError: if `config` contradicts itself.
    """
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list) and len(kinds) > number:
        is_dense = kinds[number] == "dense"
    else:
        is_dense = number < count(config, "first_k_dense_replace", 0)
    if is_dense:
        return layer(attention, DENSE)
    return layer(attention, WITH_SHARED if config.get("n_shared_experts") else BIASED_ROUTED)


def is_sparse(config: Config, number: int) -> bool:
    """Returns whether a layer routes, in configs of the Qwen families.

    Raises:
        CheckpointError: if `config` contradicts itself.
    """
    every = count(config, "decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise CheckpointError(f"config.json: mlp_only_layers is {dense!r}, needed a list")
    return number not in dense and (number + 1) % every == 0


def softmax_router(config: Config) -> tuple[str, bool]:
    """Returns how a router scores by softmax that normalizes gates if `config` says so."""
    return Scoring.SOFTMAX, bool(config.get("norm_topk_prob", False))


NEVER_NULL = frozenset({
    "attention_bias", "hidden_act", "initializer_range", "intermediate_size",
    "max_position_embeddings", "moe_intermediate_size", "num_attention_heads",
    "output_router_logits", "rms_norm_eps", "tie_word_embeddings", "use_cache",
})  # fmt: skip
"""Keys with which transformers refuses null in every architecture here."""
