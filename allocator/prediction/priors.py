"""Expected losses of formats and pruning, before anything is measured of a checkpoint.

In: published figures, or the surrogate of a smaller relative. Out: a `Prior`, and the `Surrogate`
that it gives for a space. Invariant: these losses are predictions, good for a first allocation and
never reported; at one retained count their optimum is exact, as of any surrogate.

The form is that of HIGGS (arXiv 2411.17525, theorem 1): to first order, the loss is a sum over
matrices of a sensitivity times the relative squared error `e` of the matrix. Our reference model
agrees: over its 70 groups, the curvature of a format over `Format.gaussian_error` is the same for
all formats from 1.6 to 8.5 bits, most within 5 %. So a prior is one sensitivity per role and
relative depth, `w`, in nats per token for `e = 1` in every layer; a group of one of `n` layers
costs `w e / n`. A prior counts layers and not weights: the loss of a matrix goes with the error of
its output, whose size does not depend on the number of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt

from allocator.decision.mixes import split
from allocator.decision.space import Space
from allocator.errors import SpaceError
from allocator.families import Role
from allocator.formats import FORMATS, format_named
from allocator.prediction.profile import bundle_of
from allocator.prediction.surrogate import Surrogate
from allocator.targets import Group

Floats = npt.NDArray[np.float64]
Curve = Mapping[float, float]
"""Values by relative depth: the middle of a layer's place among all layers, in 0..1."""

ROLE_WEIGHTS = {
    Role.EMBEDDING: 1.27, Role.HEAD: 1.27,
    Role.Q: 0.04, Role.K: 0.04, Role.V: 0.34, Role.O: 0.34,
    Role.Q_A: 0.026, Role.Q_B: 0.041,
    Role.KV_A: 0.40, Role.KV_B: 0.28, Role.K_B: 0.019, Role.V_B: 0.265,
    Role.LINEAR_QKVZ: 0.76, Role.LINEAR_QKV: 0.42, Role.LINEAR_Z: 0.34, Role.LINEAR_OUT: 0.34,
    Role.SSM_IN: 0.76, Role.SSM_OUT: 0.34, Role.LATENT_IN: 0.124, Role.LATENT_OUT: 0.180,
    Role.CONV_IN: 1.02, Role.CONV_OUT: 0.34, Role.ATTENTION_GATE: 0.34,
    Role.MLP_GATE: 0.29, Role.MLP_UP: 0.27, Role.MLP_DOWN: 0.64,
    Role.EXPERT_GATE: 0.154, Role.EXPERT_UP: 0.124, Role.EXPERT_DOWN: 0.180,
    Role.SHARED_GATE: 0.041, Role.SHARED_UP: 0.033, Role.SHARED_DOWN: 0.037,
}  # fmt: skip
"""Nats per token for a relative squared error of 1 in the matrices of that role in every layer.

Measured on our reference model (studies/reference: DeepSeek-V3's architecture, 29 million weights,
6 layers, text of the search split): the curvature of each group over `Format.gaussian_error`,
median over formats, mean over layers, times layers. Three are not measured there and set by
argument: the head is the embedding in that model, so each is given the loss of both; scores are
products of queries and keys, so plain Q and K are given what `q_b` has; the output is a product of
values and `o`, so V is given what O has. `kv_b` is its two halves together. No layer of it has
linear attention: the gate `z` multiplies what `out` gets, so both are given what O has, as is a
gate of plain attention, and one matrix for several is given what these have together. Nor does it
have short convolutions: what goes through them is taken for values, and their two gates are given
as much each. A state space model is taken for linear attention; projections to and from the space
that experts compute in are given what `up` and `down` have, with whose errors theirs add up."""

_ALIKE: Mapping[Role, tuple[Role, ...]] = {
    Role.HEAD: (Role.EMBEDDING,),
    Role.EMBEDDING: (Role.HEAD,),
    Role.Q: (Role.Q_B,), Role.K: (Role.Q_B,), Role.V: (Role.O,),
    Role.Q_A: (Role.Q,), Role.Q_B: (Role.Q,),
    Role.KV_A: (Role.V,), Role.KV_B: (Role.V_B, Role.V), Role.K_B: (Role.K,),
    Role.V_B: (Role.KV_B, Role.V),
    Role.LINEAR_QKV: (Role.V, Role.V_B), Role.LINEAR_Z: (Role.O,), Role.LINEAR_OUT: (Role.O,),
    Role.LINEAR_QKVZ: (Role.LINEAR_QKV, Role.V, Role.V_B),
    Role.SSM_IN: (Role.LINEAR_QKVZ, Role.V, Role.V_B), Role.SSM_OUT: (Role.LINEAR_OUT, Role.O),
    Role.LATENT_IN: (Role.EXPERT_UP,), Role.LATENT_OUT: (Role.EXPERT_DOWN,),
    Role.CONV_IN: (Role.V, Role.V_B), Role.CONV_OUT: (Role.O,), Role.ATTENTION_GATE: (Role.O,),
    Role.MLP_GATE: (Role.EXPERT_GATE,), Role.MLP_UP: (Role.EXPERT_UP,),
    Role.MLP_DOWN: (Role.EXPERT_DOWN,),
    Role.SHARED_GATE: (Role.EXPERT_GATE,), Role.SHARED_UP: (Role.EXPERT_UP,),
    Role.SHARED_DOWN: (Role.EXPERT_DOWN,),
}  # fmt: skip
"""Fallback roles, used where the relative lacks a role."""


@dataclass(frozen=True)
class Prior:
    """Expected losses, by role and relative depth.

    Attributes:
        source: of the expectations, for a person to read.
        weights: by role and format, nats per token for a relative squared error of 1 in every
            layer; the empty name stands for formats that are not listed.
        coupling: by part of a layer (`attention`, `mlp`, or a group outside the layers), `c` of the
            loss by jumps; parts that are not listed have none.
        pruned: by retained share, nats per token when every layer keeps that share; empty if
            nothing is known of pruning.
    """

    source: str
    weights: Mapping[Role, Mapping[str, Curve]]
    coupling: Mapping[str, Curve] = field(default_factory=dict)
    pruned: Mapping[float, Curve] = field(default_factory=dict)

    def loss(self, group: Group, fmt: str, n_layers: int) -> float:
        """Returns the expected second-order loss of a group in a format, nats per token.

        Raises:
            SpaceError: if nothing is known of its role.
        """
        weights = self.weights.get(group.role)
        if group.source_format is not None and fmt == group.source_format.name:
            return 0.0  # as the original has it
        if weights is None:
            raise SpaceError(
                f"{self.source}: nothing is known of {group.role}, which {group.name} is; plan "
                "without a profile"
            )
        weight = _at(weights.get(fmt, weights[""]), _depth(group.layer, n_layers))
        return weight * format_named(fmt).gaussian_error / (1 if group.layer is None else n_layers)

    def surrogate(self, space: Space) -> Surrogate:
        """Returns the surrogate of these expectations.

        Where nothing is known of pruning, pruning alone costs 0, and only allocations with the same
        retained counts compare.

        Raises:
            SpaceError: if nothing is known of a group's role.
        """
        inventory, n = space.layout.inventory, space.layout.inventory.n_layers
        smooth, coupling = {}, {}
        for name, group in space.layout.groups.items():
            counts = space.counts if group.role.is_expert else (1,)
            smooth[name] = np.array(
                [[self._mixed(group, v, c, n) for v in space.formats[name]] for c in counts]
            )
            curve = self.coupling.get(_part(group), {0.5: 0.0})
            coupling[name] = _at(curve, _depth(group.layer, n))
        shares = [count / inventory.n_experts for count in space.counts]
        pruned = {layer: self._pruned(shares, layer, n) for layer in space.layout.layers}
        return Surrogate(space, smooth, coupling, pruned)

    def _mixed(self, group: Group, value: str, count: int, n_layers: int) -> float:
        """Loss of a format, or of a mix, whose parts count by their experts."""
        parts = [(self.loss(group, fmt, n_layers), k) for fmt, k in split(value, count)]
        return sum(loss * k for loss, k in parts) / count

    def _pruned(self, shares: list[float], layer: int, n_layers: int) -> Floats:
        known = sorted({1.0, *self.pruned})
        depth = _depth(layer, n_layers)
        losses = [_at(self.pruned.get(s, {0.5: 0.0}), depth) / n_layers for s in known]
        return np.interp(shares, known, losses)


def published() -> Prior:
    """Returns the prior `Format.gaussian_error` times `ROLE_WEIGHTS`, without pruning."""
    return Prior(
        "Gaussian errors of the formats x sensitivities by role of the reference model",
        {role: {"": {0.5: weight}} for role, weight in ROLE_WEIGHTS.items()},
    )


def transferred(relative: Surrogate, name: str) -> Prior:
    """Returns the prior of a smaller relative's losses, by role and relative depth.

    Formats that the relative cannot store in a role get the median weight of its other formats. A
    role that the relative lacks gets the weights of a role in the same place.

    Args:
        relative: of a profile, with all experts among its counts.
        name: of the relative, for a person to read.
    """
    space = relative.space
    n = space.layout.inventory.n_layers
    weights: dict[Role, dict[str, dict[float, float]]] = {}
    coupling: dict[str, dict[float, float]] = {}
    for group_name, group in space.layout.groups.items():
        depth = _depth(group.layer, n)
        coupling.setdefault(_part(group), {})[depth] = relative.coupling[group_name]
        known = {
            fmt: float(loss) / format_named(fmt).gaussian_error * (1 if group.layer is None else n)
            for fmt, loss in zip(
                space.formats[group_name], relative.error_losses[group_name][-1], strict=True
            )
            if _is_inexact(fmt)
        }
        for fmt, weight in {**known, "": median(known.values())}.items():
            weights.setdefault(group.role, {}).setdefault(fmt, {})[depth] = weight
    pruned: dict[float, dict[float, float]] = {}
    for layer, losses in relative.count_losses.items():
        for count, loss in zip(space.counts, losses, strict=True):
            share = count / space.layout.inventory.n_experts
            pruned.setdefault(share, {})[_depth(layer, n)] = float(loss) * n
    for role in Role:
        nearest = next((r for r in _ALIKE.get(role, ()) if r in weights), None)
        if role not in weights and nearest is not None:
            weights[role] = weights[nearest]
    source = f"the profile of {name}, by role and relative depth"
    return Prior(source, weights, coupling, pruned)


def _is_inexact(value: str) -> bool:
    """Tells whether a choice is one format, and loses something."""
    return value in FORMATS and FORMATS[value].gaussian_error > 0


def _part(group: Group) -> str:
    """`attention`, `mlp`, or the group's own name outside the layers."""
    return bundle_of(group).rpartition(".")[2]


def _depth(layer: int | None, n_layers: int) -> float:
    return 0.5 if layer is None else (layer + 0.5) / n_layers


def _at(curve: Curve, depth: float) -> float:
    """The value at a depth: linear between known depths, constant beyond them."""
    depths = sorted(curve)
    return float(np.interp(depth, depths, [curve[d] for d in depths]))
