"""A group's weights as float32, in the layout that its target encodes.

In: a group of a layout. Out: its values, `(out, in)`, `(experts, out, in)` or `(heads, out, in)`.
Invariant: a stacked group is in expert order.
"""

import hashlib

import numpy as np

from allocator.checkpoint.halves import split_kv_b
from allocator.checkpoint.tensors import Floats, read_tensor
from allocator.families import Role
from allocator.targets.layout import Group, Layout


def group_weights(layout: Layout, group: Group) -> Floats:
    """Returns all weights of a group in `group.shape`, every expert included, as float32.

    Returns:
        `(out, in)`, `(experts, out, in)` or `(heads, out, in)`.
    """
    inventory = layout.inventory
    if group.role in (Role.K_B, Role.V_B):
        latent = inventory.dimensions.latent
        assert latent is not None, group.name
        halves = split_kv_b(
            read_tensor(inventory, group.sources[0]),
            heads=inventory.dimensions.heads,
            nope=latent.nope,
        )
        return halves[group.role is Role.V_B]
    if group.role.is_expert:
        return np.stack([read_tensor(inventory, name) for name in group.sources])
    weights = read_tensor(inventory, group.sources[0])
    if group.rows is not None:
        weights = weights[list(group.rows)]
    if group.columns is not None:
        weights = np.ascontiguousarray(weights[:, list(group.columns)])
    return weights


def group_digest(layout: Layout, group: Group) -> str:
    """Names what `group_weights` returns, by content and layout; reads the group once."""
    parts = [layout.inventory.tensor_digest(name) for name in group.sources]
    half = str(group.role) if group.role in (Role.K_B, Role.V_B) else ""
    places = [f"{group.rows} {group.columns}"] if group.is_rearranged else []
    return hashlib.sha256(" ".join((half, *parts, *places)).encode()).hexdigest()
