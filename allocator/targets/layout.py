"""How a checkpoint lies in a target's file: which tensors are encoded together, which are not.

In: an inventory, and the target's names. Out: `Group`s, `FullPrecision` tensors, a `Layout` of
both. Invariant: groups stand outside the layers first, then layer by layer, in every target's file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from allocator.checkpoint.inventory import DTYPE_BYTES, MXFP4, Inventory, TensorInfo
from allocator.families import Config, Made, Role, Transform
from allocator.formats import FORMATS, Format, Parts, offered

_FORMATS = (MXFP4, "Q8_0")
"""What a checkpoint may hold a matrix in that a target's file can, too."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that share one format, encoded as one tensor of the target's file.

    Attributes:
        name: `layers.3.experts.down`, `embedding`, ...; the same words for every family.
        role: what it does; `K_B` and `V_B` are halves of a checkpoint's `KV_B`.
        layer: its layer, if it has one.
        shape: `(out, in)`, `(experts, out, in)` or `(heads, out, in)`, all experts retained.
        sources: the checkpoint's tensors, in expert order.
        stored_as: its name in the target's file.
        importance: whether its input channels have an importance vector.
        source_format: the format that the checkpoint holds its blocks in; None if it holds floats,
            or blocks of other columns.
        codecs: those whose formats the target's file can hold; None for all.
        rows: of its source, of which it has some alone, in this order; None for all.
        columns: of its source, in this order; None for the source's own.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    stored_as: str
    importance: bool = True
    source_format: Format | None = None
    codecs: tuple[str, ...] | None = None
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None

    @property
    def is_rearranged(self) -> bool:
        """Whether it has other rows, or another order of columns, than its source."""
        return self.rows is not None or self.columns is not None

    def shape_with(self, n_experts: int) -> tuple[int, ...]:
        """Returns its shape when its layer retains `n_experts`."""
        return (n_experts, *self.shape[1:]) if self.role.is_expert else self.shape

    def experts(self, retained: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the experts that it stores, of those retained by MoE layer; `()` if none."""
        return retained[self.layer] if self.role.is_expert and self.layer is not None else ()

    def offered(self) -> tuple[Format, ...]:
        """Returns the formats that a search considers for it, largest first."""
        return offered(
            self.shape,
            importance=self.importance,
            source=self.source_format,
            codecs=self.codecs,
        )

    def can_hold(self, fmt: Format) -> bool:
        """Tells whether the target's file can hold it in this format, as named."""
        known = self.codecs is None or fmt.codec in self.codecs
        return known and fmt.stores(self.shape)


@dataclass(frozen=True, slots=True)
class FullPrecision:
    """A tensor that stays in full precision: a norm, a router, a router's bias.

    Attributes:
        source: its name in the checkpoint.
        stored_as: its name in the target's file.
        dtype: `F32`, `F16` or `BF16`, as the target stores it.
        transforms: of its values in the target's file.
        shape_in_file: what the target's file has; None for `shape`.
    """

    source: str
    stored_as: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    transforms: tuple[Transform, ...] = ()
    shape_in_file: tuple[int, ...] | None = None

    def shape_with(self, n_experts: int) -> tuple[int, ...]:
        """Returns its shape when its layer retains `n_experts`."""
        return (n_experts, *self.shape[1:]) if self.role.has_row_per_expert else self.shape

    def stored_shape_with(self, n_experts: int) -> tuple[int, ...]:
        """Returns its shape in the target's file when its layer retains `n_experts`."""
        return self.shape_in_file or self.shape_with(n_experts)

    def nbytes(self, n_experts: int) -> int:
        """Returns its bytes when its layer retains `n_experts`."""
        return prod(self.shape_with(n_experts)) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class CacheRows:
    """How a runtime's cache stores its keys, or its values.

    Attributes:
        fmt: of the rows; None for 16-bit floats, which are taken as exact.
        rotation: order of the Hadamard matrix that rotates heads before; 0 for none.
    """

    fmt: Format | None = None
    rotation: int = 0


@dataclass(frozen=True)
class Layout:
    """A target bound to an inventory.

    Attributes:
        target: the name of the target.
        inventory: the checkpoint.
        groups: by name, in file order.
        full_precision: tensors that are not encoded, in file order, after all groups.
        notes: what a user must know of it: what is left out, what the runtime must be told.
        computed: a config in place of the checkpoint's, by which transformers computes as the
            runtime does; None where the checkpoint's says it.
        made: tensors of the target's file that no checkpoint has, before all groups; a part of the
            file's overhead.
    """

    target: str
    inventory: Inventory
    groups: Mapping[str, Group]
    full_precision: tuple[FullPrecision, ...]
    notes: tuple[str, ...] = ()
    computed: Config | None = None
    made: tuple[Made, ...] = ()

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """MoE layers: the ones with a retained count."""
        return self.inventory.moe_layers


def plain_groups(
    inventory: Inventory,
    stored_as: Mapping[str, str],
    skip: Iterable[Role] = (),
    codecs: tuple[str, ...] | None = None,
) -> list[Group]:
    """Makes one group per matrix, and one per projection of a layer's experts.

    Args:
        inventory: the checkpoint.
        stored_as: the target's name of each checkpoint tensor.
        skip: roles that the target lays out in its own way.
        codecs: those whose formats the target's file can hold; None for all.
    """
    groups: dict[str, Group] = {}
    for tensor in inventory.tensors.values():
        if not tensor.role.is_encoded or tensor.role in tuple(skip):
            continue
        name = str(tensor.role) if tensor.layer is None else f"layers.{tensor.layer}.{tensor.role}"
        if name in groups:
            continue
        members = inventory.of_role(tensor.role, tensor.layer)
        stacked = (len(members),) if tensor.role.is_expert else ()
        groups[name] = Group(
            name=name,
            role=tensor.role,
            layer=tensor.layer,
            shape=(*stacked, *tensor.shape),
            sources=tuple(t.name for t in members),
            stored_as=stored_as.get(tensor.name, name),
            # an embedding that is only looked up multiplies nothing
            importance=tensor.role is not Role.EMBEDDING or inventory.tied_embeddings,
            source_format=source_format(tensor),
            codecs=codecs,
        )
    return list(groups.values())


def source_format(tensor: TensorInfo, columns: Sequence[int] | None = None) -> Format | None:
    """Returns the format that a checkpoint holds whole blocks of a matrix in; None for no such.

    Args:
        tensor: the matrix.
        columns: of the matrix, in the order that a target's file has them; None for its own.
    """
    joined = tensor.made is not None and len(tensor.made.stored) > 1  # of rows of other matrices
    if tensor.dtype not in _FORMATS or joined:
        return None
    fmt = FORMATS[tensor.dtype]
    stored = None if tensor.made is None else tensor.made.columns
    if stored is columns is None:
        return fmt
    every = range(tensor.shape[-1])
    places = np.argsort(every if stored is None else stored)  # in the file, by column
    places = places[list(every if columns is None else columns)]
    blocks = places.reshape(-1, fmt.block)
    first = blocks[:, :1]
    whole = not (first % fmt.block).any() and (blocks == first + np.arange(fmt.block)).all()
    return fmt if whole else None


_WIDE = 256
"""Weights in a block of the formats of few bits."""
_MOST_PADDING = 1.5
"""Of a width: padding beyond it costs more than formats of fewer bits bring."""


def width_notes(inventory: Inventory, groups: Iterable[Group]) -> tuple[str, ...]:
    """Returns lines on matrices of experts that formats of few bits cannot hold.

    Padding changes the rows of down, and no others.

    Args:
        inventory: the checkpoint.
        groups: of the layout.
    """
    by_role = {group.role: group for group in groups if group.role.is_expert}
    return (*_width_of_down(inventory, by_role), *_width_of_up(by_role))


def _width_of_up(by_role: Mapping[Role, Group]) -> tuple[str, ...]:
    up = by_role.get(Role.EXPERT_UP)
    if up is None or up.shape[-1] % _WIDE == 0:
        return ()
    width, least = up.shape[-1], up.offered()[-1]
    kinds = "gate and up" if Role.EXPERT_GATE in by_role else "up"
    return (
        f"experts read {width} values: no format below {least.bits:.3g} bits ({least.name}) holds "
        f"rows of {kinds}, nor rows of other matrices that read {width} values; padding experts "
        "does not change these",
    )


def _width_of_down(inventory: Inventory, by_role: Mapping[Role, Group]) -> tuple[str, ...]:
    down = by_role.get(Role.EXPERT_DOWN)
    biased = any(tensor.role is Role.EXPERT_BIAS for tensor in inventory.tensors.values())
    if down is None or down.shape[-1] % _WIDE == 0 or biased:
        return ()
    width = down.shape[-1]
    padded, least = -(-width // _WIDE) * _WIDE, down.offered()[-1]
    if padded > _MOST_PADDING * width:
        return ()
    return (
        f"experts are {width} wide: no format below {least.bits:.3g} bits ({least.name}) holds "
        f"rows of down; expert_width = {padded} in study.toml pads experts with zeros, "
        f"{padded / width - 1:.1%} more weights, and formats of fewer bits do (docs/families.md)",
    )


def in_file_order(groups: Iterable[Group]) -> dict[str, Group]:
    """Returns groups by name: outside the layers first, then layer by layer."""
    ordered = sorted(groups, key=lambda g: (-1 if g.layer is None else g.layer, g.name))
    return {group.name: group for group in ordered}


def part_names(group: str, stored: Parts) -> tuple[str, ...]:
    """Returns a name for each part of a group: the group's, with the format's where it has several.

    Args:
        group: its name.
        stored: formats, and the experts that each stores.
    """
    if len(stored) == 1:
        return (group,)
    return tuple(f"{group}.{fmt.name}" for fmt, _ in stored)
