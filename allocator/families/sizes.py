"""Sizes of a model, and how it routes: what other modules ask instead of `config.json`."""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class Scoring(StrEnum):
    """What a router makes of its logits."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SOFTMAX_OF_CHOSEN = "softmax of the chosen experts' logits"


@dataclass(frozen=True)
class Router:
    """How a token's experts are chosen and weighed.

    Attributes:
        scoring: what gates are made of: a `Scoring`, or a word of the family's own.
        normalizes: whether the chosen gates are divided by their sum.
        scale: factor on the gates after that.
        groups: into which experts are divided; 1 for none.
        groups_used: of those, how many a token's experts may come from.
        ranks_groups: whether groups are ranked by their two best experts, even a single one.
        selection_bias: whether a bias per expert takes part in the choice, and not in the gate.
    """

    scoring: str = Scoring.SOFTMAX
    normalizes: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    ranks_groups: bool = False
    selection_bias: bool = False

    def least_experts(self, used: int) -> int:
        """Returns the fewest experts per layer from which `used` can be chosen."""
        if not self.ranks_groups:
            return used
        return self.groups * max(2, -(-used // self.groups_used))


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Sizes of multi-head latent attention: keys and values are read from one row per token.

    Attributes:
        rank: of the latents, from which keys and values are made.
        q_rank: of the queries; None where they are made from the states.
        nope: of a head's queries and keys, the width without rotation.
        rope: the width with rotation; the rotated part of keys is shared by all heads.
        value: a head's width of values.
        interleaved: whether neighbours are rotated as pairs, as checkpoints store them.
    """

    rank: int
    q_rank: int | None
    nope: int
    rope: int
    value: int
    interleaved: bool = True


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """Sizes of linear attention with a state per value head, which no token makes longer.

    Attributes:
        key_heads: of queries, and of keys.
        value_heads: a multiple of `key_heads`: neighbours share a head of keys.
        key_head: a head's width of queries and keys.
        value_head: a head's width of values.
        kernel: tokens that the convolution before it reaches over.
    """

    key_heads: int
    value_heads: int
    key_head: int
    value_head: int
    kernel: int

    @property
    def keys(self) -> int:
        """Width of all heads' keys."""
        return self.key_heads * self.key_head

    @property
    def values(self) -> int:
        """Width of all heads' values."""
        return self.value_heads * self.value_head

    @property
    def sharing(self) -> int:
        """Heads of values that share a head of keys."""
        return self.value_heads // self.key_heads


@dataclass(frozen=True, slots=True)
class StateSpace:
    """Sizes of a state space model (Mamba-2), whose state no token makes longer.

    Attributes:
        heads: of values.
        head: a head's width.
        state: numbers that are remembered for every value.
        groups: of heads that share what writes and what reads their states.
        kernel: tokens that the convolution before it reaches over.
    """

    heads: int
    head: int
    state: int
    groups: int
    kernel: int

    @property
    def values(self) -> int:
        """Width of all heads."""
        return self.heads * self.head

    @property
    def channels(self) -> int:
        """Channels of the convolution: values, and what writes and reads states."""
        return self.values + 2 * self.groups * self.state


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model.

    Attributes:
        hidden: width of the states between layers.
        vocabulary: tokens.
        n_layers: decoder layers, without those of multi-token prediction.
        heads: of queries.
        kv_heads: of keys and values.
        head: width of a head under grouped attention.
        experts: routed, per MoE layer.
        expert_width: of a routed expert; None if `config.json` does not say.
        dense_width: of the feed-forward block of a dense layer; None if not said.
        n_shared: shared experts per MoE layer.
        shared_width: of all of them together, where `config.json` says; else theirs are as wide as
            routed experts.
        latent: sizes of latent attention; None for grouped attention.
        linear: sizes of linear attention; None where no layer has it.
        state_space: sizes of a state space model; None where no layer is one.
        expert_hidden: width of what routed experts get and give; None for `hidden`.
        conv_kernel: tokens that a short convolution reaches over; None where no layer is one.
    """

    hidden: int
    vocabulary: int
    n_layers: int
    heads: int
    kv_heads: int
    head: int
    experts: int
    expert_width: int | None
    dense_width: int | None
    n_shared: int = 0
    shared_width: int | None = None
    latent: LatentAttention | None = None
    linear: LinearAttention | None = None
    state_space: StateSpace | None = None
    expert_hidden: int | None = None
    conv_kernel: int | None = None

    @cached_property
    def sizes(self) -> dict[str, int | None]:
        """By the names that `Rule.shape` uses."""
        width, shared = self.expert_width, self.shared_width
        if shared is None and width is not None:
            shared = self.n_shared * width
        named = {
            "hidden": self.hidden,
            "twice_hidden": 2 * self.hidden,
            "thrice_hidden": 3 * self.hidden,
            "vocabulary": self.vocabulary,
            "experts": self.experts,
            "expert_width": width,
            "expert_hidden": self.expert_hidden or self.hidden,
            "shared_width": shared,
            "one": 1,
            "conv_kernel": self.conv_kernel,
            "dense_width": self.dense_width,
            "heads": self.heads,
            "head": self.head,
            "queries": self.heads * self.head,
            "gated_queries": 2 * self.heads * self.head,
            "keys": self.kv_heads * self.head,
            "attended": self.heads * self.head,
        }
        if (x := self.latent) is not None:
            named |= {
                "rank": x.rank,
                "q_rank": x.q_rank,
                "row": x.rank + x.rope,
                "queries": self.heads * (x.nope + x.rope),
                "keys_values": self.heads * (x.nope + x.value),
                "attended": self.heads * x.value,
            }
        if (y := self.linear) is not None:
            named |= {
                "linear_heads": y.value_heads,
                "linear_gates": 2 * y.value_heads,
                "linear_head": y.value_head,
                "linear_values": y.values,
                "linear_channels": 2 * y.keys + y.values,
                "linear_inputs": 2 * y.keys + 2 * y.values,
                "kernel": y.kernel,
            }
        if (z := self.state_space) is not None:
            named |= {
                "ssm_heads": z.heads,
                "ssm_values": z.values,
                "ssm_channels": z.channels,
                "ssm_inputs": z.values + z.channels + z.heads,
                "ssm_groups": z.groups,
                "ssm_group": z.values // z.groups,
                "kernel": z.kernel,
            }
        return named
