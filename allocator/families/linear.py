"""Layers with linear attention (gated delta net) among others, as Qwen3-Next and Qwen3.5 have them.

Sources: transformers' `modeling_qwen3_next` and `modeling_qwen3_5_moe`; llama.cpp's loaders and
graphs of `qwen3next` and `qwen35moe`, and what its converter makes of these checkpoints.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from allocator.errors import CheckpointError, TargetError
from allocator.families.base import Parts, Rule
from allocator.families.common import (
    BASE,
    EXPERTS,
    HEAD_NORMS,
    KEYS_VALUES,
    MLP,
    NORMED_ATTENTION,
    NORMS,
    ROUTED,
    SHARED,
    B,
    L,
    layer,
    shared_expert,
)
from allocator.families.config import FULL, Config, count, whole
from allocator.families.gguf import (
    GgufFacts,
    ModelFacts,
    Pair,
    check_all_route,
    grouped_pairs,
)
from allocator.families.keys import LinearKeys
from allocator.families.roles import Role
from allocator.families.sizes import Dimensions, LinearAttention
from allocator.families.transforms import MINUS_EXP, Transform

LINEAR = "linear_attention"
_INTERVAL = 4  # transformers' own, and llama.cpp's
_ROTATED = 0.25  # of a head, where config.json does not say
_A = L + "linear_attn."


def _centered(rule: Rule) -> Rule:
    """A norm whose weight transformers adds one to."""
    return replace(rule, adds_one=True) if rule.role is Role.NORM else rule


def _gated(rule: Rule) -> Rule:
    """Queries have a gate beside each head, in rows that take turns head by head."""
    return replace(rule, shape="gated_queries x hidden") if rule.role is Role.Q else rule


SHARED_BLOCK = (
    *ROUTED,
    *(f"mlp.shared_expert.{name}" for name in SHARED),
    "mlp.shared_expert_gate",
)
MIXED = (
    *map(_centered, map(_gated, BASE)),
    _centered(
        Rule(L + "post_attention_layernorm.weight", Role.NORM, "hidden",
             B + "post_attention_norm.weight")
    ),
    *KEYS_VALUES,
    *map(_centered, HEAD_NORMS),
    MLP[0],
    *EXPERTS,
    *shared_expert("shared_expert"),
    Rule(L + "mlp.shared_expert_gate.weight", Role.SHARED_ROUTER, "one x hidden",
         B + "ffn_gate_inp_shexp.weight"),
)  # fmt: skip
"""Everything but linear attention."""
DENSE_MLP = MLP[1:]


def linear_rules(
    heads: tuple[Transform, ...] = (), channels: tuple[Transform, ...] = ()
) -> tuple[Rule, ...]:
    """Returns the rules of linear attention that both families have.

    Args:
        heads: what llama.cpp makes of the order of value heads.
        channels: what it makes of the order of the convolution's channels.
    """
    return (
        Rule(_A + "conv1d.weight", Role.LINEAR_STATE, "linear_channels x one x kernel",
             B + "ssm_conv1d.weight", transforms=channels, gguf_shape="linear_channels x kernel"),
        Rule(_A + "A_log", Role.LINEAR_STATE, "linear_heads", B + "ssm_a",
             transforms=(MINUS_EXP, *heads)),
        Rule(_A + "dt_bias", Role.LINEAR_STATE, "linear_heads", B + "ssm_dt.bias",
             transforms=heads),
        Rule(_A + "norm.weight", Role.NORM, "linear_head", B + "ssm_norm.weight"),
        Rule(_A + "out_proj.weight", Role.LINEAR_OUT, "hidden x linear_values",
             B + "ssm_out.weight"),
    )  # fmt: skip


_LINEAR = ("conv1d", "A_log", "dt_bias", "norm", "out_proj")


def linear_layer(projections: tuple[str, ...], mlp: tuple[str, ...]) -> Parts:
    """Returns the tensors of a layer with linear attention.

    Args:
        projections: of what enters it, by their names there.
        mlp: of its block.
    """
    names = (*(f"linear_attn.{name}" for name in (*projections, *_LINEAR)), *mlp)
    return frozenset((*NORMS, *names))


def mixed_layers(
    projections: tuple[str, ...], mlps: tuple[tuple[str, ...], ...]
) -> tuple[Parts, ...]:
    """Returns the layers with either attention and each of these blocks."""
    full = [layer(NORMED_ATTENTION, mlp) for mlp in mlps]
    return (*full, *(linear_layer(projections, mlp) for mlp in mlps))


def is_linear(config: Config, number: int) -> bool:
    """Returns whether a layer has linear attention.

    Raises:
        CheckpointError: if `config` contradicts itself.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return (number + 1) % count(config, "full_attention_interval", default=_INTERVAL) != 0
    if not isinstance(kinds, list) or not set(kinds) <= {LINEAR, FULL} or len(kinds) <= number:
        raise CheckpointError(
            f"config.json: layer_types is {kinds!r}, needed {LINEAR!r} or {FULL!r} for every layer"
        )
    return bool(kinds[number] == LINEAR)


# -- llama.cpp


def mixed_pairs(facts: ModelFacts, architecture: str) -> Iterator[Pair]:
    """Yields what a file says of layers with either attention, and of the shared expert.

    Raises:
        TargetError: if llama.cpp does not load such layers.
    """
    check_all_route(facts, architecture)
    linear, keys, config = facts.dimensions.linear, facts.keys.linear, facts.config
    assert linear is not None
    assert keys is not None
    if linear.key_head != linear.value_head:
        raise TargetError(
            f"gguf: llama.cpp loads {architecture} with keys as wide as values, config.json says "
            f"{keys.key_head} = {linear.key_head} and {keys.value_head} = {linear.value_head}; use "
            "target safetensors"
        )
    yield from grouped_pairs(facts, rotated=_ROTATED)
    yield "expert_shared_feed_forward_length", whole(config, facts.keys.shared_width)
    yield "ssm.conv_kernel", linear.kernel
    yield "ssm.inner_size", linear.values
    yield "ssm.state_size", linear.key_head
    yield "ssm.time_step_rank", linear.value_heads
    yield "ssm.group_count", linear.key_heads
    yield _pattern(config, facts.dimensions.n_layers)


def _pattern(config: Config, n_layers: int) -> Pair:
    """Which layers have linear attention: an interval, which more versions read, or a list."""
    linear = tuple(is_linear(config, i) for i in range(n_layers))
    full = [i for i, is_linear in enumerate(linear) if not is_linear]
    every = full[0] + 1 if full else n_layers + 1
    if linear == tuple((i + 1) % every != 0 for i in range(n_layers)):
        return "full_attention_interval", every
    return "attention.recurrent_layers", tuple(map(int, linear))


def mixed_source(file: GgufFacts) -> dict[str, Any]:
    """Returns the keys of `config.json` that `mixed_pairs` are made of."""
    keys = LinearKeys()
    return {
        "shared_expert_intermediate_size": file["expert_shared_feed_forward_length"],
        keys.kernel: file["ssm.conv_kernel"],
        keys.key_heads: file["ssm.group_count"],
        keys.value_heads: file["ssm.time_step_rank"],
        keys.key_head: file["ssm.state_size"],
        keys.value_head: file["ssm.inner_size"] // file["ssm.time_step_rank"],
        "partial_rotary_factor": file["rope.dimension_count"] / file["attention.key_length"],
        "layer_types": [LINEAR if linear else FULL for linear in _linear_layers(file)],
    }


def _linear_layers(file: GgufFacts) -> list[bool]:
    """Which layers have linear attention."""
    key = "attention.recurrent_layers"
    if key not in file.pairs:
        every = file.pairs.get("full_attention_interval", _INTERVAL)
        return [(layer + 1) % every != 0 for layer in range(file["block_count"])]
    return [bool(linear) for linear in file.by_layer(key)]


@lru_cache
def whole_rows(dimensions: Dimensions) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns which rows of Qwen3-Next's one input projection are of q, k and v, and which of z.

    The checkpoint has q, k, v and z of one head of keys after the other.
    """
    x = _linear_of(dimensions)
    of_head = (x.key_head, x.key_head, x.sharing * x.value_head, x.sharing * x.value_head)
    numbers = np.arange(x.key_heads * sum(of_head)).reshape(x.key_heads, -1)
    parts = np.split(numbers, np.cumsum(of_head)[:-1], axis=1)
    q, k, v, z = (part.reshape(-1) for part in parts)
    return tuple(map(int, np.concatenate([q, k, v]))), tuple(map(int, z))


def tiled_heads(dimensions: Dimensions) -> tuple[int, ...]:
    """Returns heads of values in llama.cpp's order.

    The checkpoint has those that share a head of keys as neighbours.
    """
    return _tiled(_linear_of(dimensions), 1)


@lru_cache
def tiled_values(dimensions: Dimensions) -> tuple[int, ...]:
    """Returns channels of values with their heads in llama.cpp's order."""
    linear = _linear_of(dimensions)
    return _tiled(linear, linear.value_head)


@lru_cache
def tiled_channels(dimensions: Dimensions) -> tuple[int, ...]:
    """Returns channels of queries, keys and values, the heads of values in llama.cpp's order."""
    before = 2 * _linear_of(dimensions).keys
    return (*range(before), *(before + channel for channel in tiled_values(dimensions)))


def _tiled(x: LinearAttention, width: int) -> tuple[int, ...]:
    numbers = np.arange(x.value_heads * width).reshape(x.key_heads, x.sharing, width)
    return tuple(map(int, numbers.transpose(1, 0, 2).reshape(-1)))


def _linear_of(dimensions: Dimensions) -> LinearAttention:
    assert dimensions.linear is not None
    return dimensions.linear
