"""A group's weights as float32, in the layout that its target encodes.

In: a group of a layout. Out: its values, `(out, in)`, `(experts, out, in)` or `(heads, out, in)`.
Invariant: `join_kv_b(*split_kv_b(w)) == w`, and a stacked group is in expert order.
"""

import hashlib

import numpy as np

from allocator.checkpoint.tensors import Floats, read_tensor
from allocator.families import Role
from allocator.targets.layout import Group, Layout


def split_kv_b(weight: Floats, *, heads: int, nope: int) -> tuple[Floats, Floats]:
    """Splits `kv_b` as llama.cpp stores it.

    Args:
        weight: `(heads * (nope + value), rank)`.
        heads: attention heads.
        nope: rows of a head's keys without rotation.

    Returns:
        `k_b` `(heads, rank, nope)` and `v_b` `(heads, value, rank)`.
    """
    halves = weight.reshape(heads, -1, weight.shape[-1])
    k_b = np.ascontiguousarray(halves[:, :nope].transpose(0, 2, 1))
    return k_b, np.ascontiguousarray(halves[:, nope:])


def join_kv_b(k_b: Floats, v_b: Floats) -> Floats:
    """Joins `k_b` and `v_b`; the inverse of `split_kv_b`.

    Args:
        k_b: `(heads, rank, nope)`.
        v_b: `(heads, value, rank)`.

    Returns:
        `(heads * (nope + value), rank)`.
    """
    joined = np.concatenate([k_b.transpose(0, 2, 1), v_b], axis=1)
    return joined.reshape(-1, joined.shape[-1])


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
