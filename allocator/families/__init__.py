"""The naming table of each architecture: the only place that knows tensor names.

In: a `config.json` as a mapping. Out: a `Family` that says, for every tensor name, its role, layer
and expert, the name llama.cpp gives it, and where transformers keeps it. Invariant: a name that no
rule matches is an error upstream, so nothing of a checkpoint is ever left behind unseen.

`FAMILIES` are read, searched and written. `PLANNED` has beside them those whose sizes are known,
for `allocator plan`, and nothing more.

Sources: transformers' `modeling_deepseek_v3`, `modeling_qwen3_moe`, `modeling_mixtral` (names on
disk in its `conversion_mapping`) and `modeling_gpt_oss`; llama.cpp's tensor names as in gguf-py's
`constants.MODEL_TENSORS`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import product
from typing import Any

from allocator.errors import CheckpointError


class Role(StrEnum):
    """What a tensor does; the value names its group."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    EXPERT_GATE = "experts.gate"
    EXPERT_UP = "experts.up"
    EXPERT_DOWN = "experts.down"
    SHARED_GATE = "shared.gate"
    SHARED_UP = "shared.up"
    SHARED_DOWN = "shared.down"
    MLP_GATE = "mlp.gate"
    MLP_UP = "mlp.up"
    MLP_DOWN = "mlp.down"
    Q = "attention.q"
    K = "attention.k"
    V = "attention.v"
    O = "attention.o"  # noqa: E741
    Q_A = "attention.q_a"
    Q_B = "attention.q_b"
    KV_A = "attention.kv_a"
    KV_B = "attention.kv_b"
    K_B = "attention.k_b"
    V_B = "attention.v_b"
    BIAS = "bias"
    EXPERT_BIAS = "experts.bias"
    NEXTN = "nextn"

    @property
    def is_expert(self) -> bool:
        """A routed expert's matrix."""
        return self in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)

    @property
    def is_router(self) -> bool:
        """A tensor with one row or value per routed expert."""
        return self in (Role.ROUTER, Role.ROUTER_BIAS, Role.EXPERT_BIAS)

    @property
    def is_encoded(self) -> bool:
        """A matrix whose format is searched; routers, norms and biases keep full precision."""
        return not self.is_router and self not in (Role.NORM, Role.BIAS, Role.NEXTN)


@dataclass(frozen=True)
class Rule:
    """One tensor name of an architecture.

    Attributes:
        pattern: the checkpoint's name with `{layer}` and `{expert}`.
        role: what it does.
        gguf: llama.cpp's name with `{layer}`; experts of a layer share one.
    """

    pattern: str
    role: Role
    gguf: str

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """The pattern with named groups for layer and expert."""
        text = re.escape(self.pattern)
        for key in ("layer", "expert"):
            text = text.replace(rf"\{{{key}\}}", rf"(?P<{key}>0|[1-9][0-9]{{0,5}})")
        return re.compile(text)


SCALE_SUFFIX = "_scale_inv"
"""After the name of an FP8 matrix: that of the factors which its blocks are multiplied by."""

COMPUTED = re.compile(
    r"model\.(layers\.(0|[1-9][0-9]{0,5})\.self_attn\.)?rotary_emb\."
    r"(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)
"""Names of buffers that every architecture here computes from `config.json`, stored or not."""

Parts = frozenset[str]
"""Patterns of a layer's tensors, without the layer and `.weight`."""


def _rules(*rows: tuple[str, Role, str]) -> tuple[Rule, ...]:
    return tuple(Rule(*row) for row in rows)


_L = "model.layers.{layer}."
_BASE = _rules(
    ("model.embed_tokens.weight", Role.EMBEDDING, "token_embd.weight"),
    ("lm_head.weight", Role.HEAD, "output.weight"),
    ("model.norm.weight", Role.NORM, "output_norm.weight"),
    (_L + "input_layernorm.weight", Role.NORM, "blk.{layer}.attn_norm.weight"),
    (_L + "self_attn.o_proj.weight", Role.O, "blk.{layer}.attn_output.weight"),
    (_L + "self_attn.q_proj.weight", Role.Q, "blk.{layer}.attn_q.weight"),
)
_KEYS_VALUES = _rules(
    (_L + "self_attn.k_proj.weight", Role.K, "blk.{layer}.attn_k.weight"),
    (_L + "self_attn.v_proj.weight", Role.V, "blk.{layer}.attn_v.weight"),
)
_FFN_NORM = _rules(
    (_L + "post_attention_layernorm.weight", Role.NORM, "blk.{layer}.ffn_norm.weight"),
)
_KINDS = (("gate", Role.EXPERT_GATE), ("up", Role.EXPERT_UP), ("down", Role.EXPERT_DOWN))
_EXPERTS = _rules(
    *(
        (
            _L + f"mlp.experts.{{expert}}.{kind}_proj.weight",
            role,
            f"blk.{{layer}}.ffn_{kind}_exps.weight",
        )
        for kind, role in _KINDS
    )
)
_COMMON = (
    _BASE
    + _FFN_NORM
    + _rules(
        (_L + "mlp.gate.weight", Role.ROUTER, "blk.{layer}.ffn_gate_inp.weight"),
        (_L + "mlp.gate_proj.weight", Role.MLP_GATE, "blk.{layer}.ffn_gate.weight"),
        (_L + "mlp.up_proj.weight", Role.MLP_UP, "blk.{layer}.ffn_up.weight"),
        (_L + "mlp.down_proj.weight", Role.MLP_DOWN, "blk.{layer}.ffn_down.weight"),
    )
    + _EXPERTS
)


_NORMS = ("input_layernorm", "post_attention_layernorm")
_DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ROUTED = ("mlp.gate", *(f"mlp.experts.{{expert}}.{kind}_proj" for kind in ("gate", "up", "down")))
_SHARED = tuple(f"mlp.shared_experts.{kind}_proj" for kind in ("gate", "up", "down"))
_MLA = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")


def _layers(
    attentions: tuple[tuple[str, ...], ...], mlps: tuple[tuple[str, ...], ...]
) -> tuple[Parts, ...]:
    return tuple(
        frozenset((*_NORMS, *(f"self_attn.{name}" for name in attention), *mlp))
        for attention, mlp in product(attentions, mlps)
    )


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        model_type: transformers' name, as in `config.json`.
        gguf_architecture: llama.cpp's name.
        rules: one per tensor name.
        n_experts_keys: where `config.json` may say how many routed experts a layer has.
        layers: the sets of tensors that may make up a layer.
        n_nextn_layers: multi-token-prediction layers where `config.json` does not say.
        router_groups: `n_group` and `topk_group` where `config.json` does not say, as transformers
            has them.
        never_null: keys of `config.json` that may be left out, but with which transformers refuses
            null.
    """

    model_type: str
    gguf_architecture: str
    rules: tuple[Rule, ...]
    n_experts_keys: tuple[str, ...]
    layers: tuple[Parts, ...]
    n_nextn_layers: int
    router_groups: tuple[int, int] = (1, 1)
    never_null: frozenset[str] = frozenset()

    def part(self, rule: Rule) -> str:
        """What a rule's tensor is called within its layer, as in `layers`."""
        return rule.pattern.removeprefix(_L).removesuffix(".weight")

    def foreign_layer(self, name: str) -> int | None:
        """The layer of a tensor that no rule knows (multi-token prediction has its own)."""
        found = re.match(r"model\.layers\.(0|[1-9][0-9]{0,5})\.", name)
        return None if found is None else int(found[1])

    def match(self, name: str) -> tuple[Rule, int | None, int | None] | None:
        """The rule, layer and expert of a tensor name; None if no rule knows it."""
        for rule in self.rules:
            if found := rule.regex.fullmatch(name):
                numbers = found.groupdict()
                layer, expert = numbers.get("layer"), numbers.get("expert")
                return (
                    rule,
                    None if layer is None else int(layer),
                    None if expert is None else int(expert),
                )
        return None

    def gguf_name(self, role: Role, layer: int | None) -> str:
        """llama.cpp's name of the tensor with this role; for roles that occur once per layer."""
        return next(r.gguf for r in self.rules if r.role is role).format(layer=layer)

    def source_name(self, role: Role, layer: int | None) -> str:
        """The checkpoint's name of the (first) tensor with this role; of `kv_b` for its halves."""
        wanted = Role.KV_B if role in (Role.K_B, Role.V_B) else role
        return next(r.pattern for r in self.rules if r.role is wanted).format(layer=layer, expert=0)

    def n_experts_key(self, config: Mapping[str, Any]) -> str:
        """The key under which `config` says how many routed experts a layer has.

        Raises:
            CheckpointError: if it has none of the known ones.
        """
        for key in self.n_experts_keys:
            if key in config:
                return key
        raise CheckpointError(
            f"config.json: no {' or '.join(self.n_experts_keys)} for model_type "
            f"{self.model_type!r}; a MoE checkpoint names its number of routed experts"
        )


_NEVER_NULL = frozenset({
    "attention_bias", "hidden_act", "initializer_range", "intermediate_size",
    "max_position_embeddings", "moe_intermediate_size", "num_attention_heads",
    "output_router_logits", "rms_norm_eps", "tie_word_embeddings", "use_cache",
})  # fmt: skip

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    gguf_architecture="deepseek2",
    rules=_COMMON
    + _rules(
        (_L + "self_attn.q_a_proj.weight", Role.Q_A, "blk.{layer}.attn_q_a.weight"),
        (_L + "self_attn.q_a_layernorm.weight", Role.NORM, "blk.{layer}.attn_q_a_norm.weight"),
        (_L + "self_attn.q_b_proj.weight", Role.Q_B, "blk.{layer}.attn_q_b.weight"),
        (_L + "self_attn.kv_a_proj_with_mqa.weight", Role.KV_A, "blk.{layer}.attn_kv_a_mqa.weight"),
        (_L + "self_attn.kv_a_layernorm.weight", Role.NORM, "blk.{layer}.attn_kv_a_norm.weight"),
        (_L + "self_attn.kv_b_proj.weight", Role.KV_B, "blk.{layer}.attn_kv_b.weight"),
        (_L + "mlp.gate.e_score_correction_bias", Role.ROUTER_BIAS, "blk.{layer}.exp_probs_b.bias"),
        (
            _L + "mlp.shared_experts.gate_proj.weight",
            Role.SHARED_GATE,
            "blk.{layer}.ffn_gate_shexp.weight",
        ),
        (
            _L + "mlp.shared_experts.up_proj.weight",
            Role.SHARED_UP,
            "blk.{layer}.ffn_up_shexp.weight",
        ),
        (
            _L + "mlp.shared_experts.down_proj.weight",
            Role.SHARED_DOWN,
            "blk.{layer}.ffn_down_shexp.weight",
        ),
        # not in a checkpoint: the two halves of kv_b that llama.cpp stores
        ("k_b of kv_b {layer}", Role.K_B, "blk.{layer}.attn_k_b.weight"),
        ("v_b of kv_b {layer}", Role.V_B, "blk.{layer}.attn_v_b.weight"),
    ),
    n_experts_keys=("n_routed_experts", "num_local_experts"),
    layers=_layers(
        ((*_MLA, "q_proj"), (*_MLA, "q_a_proj", "q_a_layernorm", "q_b_proj")),
        (
            _DENSE,
            (*_ROUTED, "mlp.gate.e_score_correction_bias"),
            (*_ROUTED, "mlp.gate.e_score_correction_bias", *_SHARED),
        ),
    ),
    n_nextn_layers=1,
    router_groups=(8, 4),
    never_null=_NEVER_NULL
    | {
        "first_k_dense_replace", "kv_lora_rank", "n_shared_experts", "qk_nope_head_dim",
        "qk_rope_head_dim", "routed_scaling_factor", "v_head_dim",
    },
)  # fmt: skip

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    gguf_architecture="qwen3moe",
    rules=_COMMON
    + _KEYS_VALUES
    + _rules(
        (_L + "self_attn.q_norm.weight", Role.NORM, "blk.{layer}.attn_q_norm.weight"),
        (_L + "self_attn.k_norm.weight", Role.NORM, "blk.{layer}.attn_k_norm.weight"),
    ),
    n_experts_keys=("num_experts", "num_local_experts"),
    layers=_layers(
        (("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),), (_DENSE, _ROUTED)
    ),
    n_nextn_layers=0,
    never_null=_NEVER_NULL
    | {
        "attention_dropout", "decoder_sparse_step", "head_dim", "norm_topk_prob",
        "num_key_value_heads", "router_aux_loss_coef", "use_sliding_window",
    },
)  # fmt: skip

_W = {"gate": "w1", "up": "w3", "down": "w2"}
_SPARSE = "block_sparse_moe."
_GQA = ("q_proj", "k_proj", "v_proj", "o_proj")

MIXTRAL = Family(
    model_type="mixtral",
    gguf_architecture="llama",
    rules=_BASE
    + _FFN_NORM
    + _KEYS_VALUES
    + _rules(
        (_L + _SPARSE + "gate.weight", Role.ROUTER, "blk.{layer}.ffn_gate_inp.weight"),
        *(
            (
                _L + _SPARSE + f"experts.{{expert}}.{_W[kind]}.weight",
                role,
                f"blk.{{layer}}.ffn_{kind}_exps.weight",
            )
            for kind, role in _KINDS
        ),
    ),
    n_experts_keys=("num_local_experts",),
    layers=_layers(
        (_GQA,),
        ((_SPARSE + "gate", *(f"{_SPARSE}experts.{{expert}}.{_W[kind]}" for kind, _ in _KINDS)),),
    ),
    n_nextn_layers=0,
)

_BIASED = tuple(zip(_GQA, ("q", "k", "v", "output"), strict=True))

GPT_OSS = Family(
    model_type="gpt_oss",
    gguf_architecture="gpt-oss",
    rules=_BASE
    + _KEYS_VALUES
    + _rules(
        (
            _L + "post_attention_layernorm.weight",
            Role.NORM,
            "blk.{layer}.post_attention_norm.weight",
        ),
        *(
            (_L + f"self_attn.{name}.bias", Role.BIAS, f"blk.{{layer}}.attn_{gguf}.bias")
            for name, gguf in _BIASED
        ),
        (_L + "self_attn.sinks", Role.BIAS, "blk.{layer}.attn_sinks.weight"),
        (_L + "mlp.router.weight", Role.ROUTER, "blk.{layer}.ffn_gate_inp.weight"),
        (_L + "mlp.router.bias", Role.ROUTER_BIAS, "blk.{layer}.ffn_gate_inp.bias"),
    )
    # a checkpoint has the experts of a layer, gate and up, in one tensor; these are its parts
    + _EXPERTS
    + _rules(
        *(
            (
                _L + f"mlp.experts.{kind}_proj_bias",
                Role.EXPERT_BIAS,
                f"blk.{{layer}}.ffn_{kind}_exps.bias",
            )
            for kind, _ in _KINDS
        )
    ),
    n_experts_keys=("num_local_experts",),
    layers=_layers(
        ((*_GQA, *(f"{name}.bias" for name in _GQA), "sinks"),),
        (
            (
                "mlp.router",
                "mlp.router.bias",
                *_ROUTED[1:],
                *(f"mlp.experts.{kind}_proj_bias" for kind, _ in _KINDS),
            ),
        ),
    ),
    n_nextn_layers=0,
)

FAMILIES = {family.model_type: family for family in (DEEPSEEK_V3, QWEN3_MOE)}
PLANNED = FAMILIES | {family.model_type: family for family in (MIXTRAL, GPT_OSS)}
"""Whose tensors `allocator plan` knows; of those not in `FAMILIES`, no checkpoint is read."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
        CheckpointError: if its `model_type` is not one of those that are read.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in set(PLANNED) - set(FAMILIES):
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}, whose sizes alone are known: `allocator "
            f"plan` works with it; read, searched and written: {', '.join(FAMILIES)}"
        )
    return _named(config, FAMILIES)


def planned_family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`, also of those that are planned only.

    Raises:
        CheckpointError: if its `model_type` is not one of ours.
    """
    return _named(config, PLANNED)


def _named(config: Mapping[str, Any], families: Mapping[str, Family]) -> Family:
    model_type = config.get("model_type")
    for key, inner in config.items() if "num_hidden_layers" not in config else ():
        if isinstance(inner, dict) and "num_hidden_layers" in inner:
            raise CheckpointError(
                f"config.json: model_type is {model_type!r} with a language model of type "
                f"{inner.get('model_type')!r} inside of {key}: models of text and more are not "
                "supported; save the language model alone, e.g. with transformers, and name that"
            )
    if isinstance(model_type, str) and model_type in families:
        return families[model_type]
    only = ", ".join(sorted(set(PLANNED) - set(FAMILIES)))
    raise CheckpointError(
        f"config.json: model_type {model_type!r} is not supported yet; supported: "
        f"{', '.join(FAMILIES)}; planned (`allocator plan` only): {only}"
    )
