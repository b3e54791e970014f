"""What all targets share: `Group`, `FullPrecision`, `Layout`, and the `Target` contract."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from allocator.checkpoint.inventory import DTYPE_BYTES, MXFP4, Inventory
from allocator.errors import TargetError
from allocator.families import Role
from allocator.formats import FORMATS, Format, offered
from allocator.targets.device_memory import DeviceMemory, RuntimeSettings, Workload


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
        source_format: the format that the checkpoint holds it in; None if it holds floats.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    stored_as: str
    importance: bool = True
    source_format: Format | None = None

    def shape_with(self, n_experts: int) -> tuple[int, ...]:
        """Its shape when its layer retains `n_experts`."""
        return (n_experts, *self.shape[1:]) if self.role.is_expert else self.shape

    def experts(self, retained: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
        """Which experts it stores, of those retained by MoE layer; `()` if it has none."""
        return retained[self.layer] if self.role.is_expert and self.layer is not None else ()

    def offered(self) -> tuple[Format, ...]:
        """Formats that store it as named, largest first."""
        return offered(self.shape, importance=self.importance, source=self.source_format)


@dataclass(frozen=True, slots=True)
class FullPrecision:
    """A tensor kept in full precision: a norm, a router, a router's bias.

    Attributes:
        source: its name in the checkpoint.
        stored_as: its name in the target's file.
        dtype: `F32`, `F16` or `BF16`, as the target stores it.
    """

    source: str
    stored_as: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    dtype: str

    def shape_with(self, n_experts: int) -> tuple[int, ...]:
        """Its shape when its layer retains `n_experts`."""
        return (n_experts, *self.shape[1:]) if self.role.is_router else self.shape

    def nbytes(self, n_experts: int) -> int:
        """Its bytes when its layer retains `n_experts`."""
        return prod(self.shape_with(n_experts)) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """A target bound to an inventory.

    Attributes:
        target: the name of the target.
        inventory: the checkpoint.
        groups: by name, in file order.
        kept: what stays in full precision, in file order.
        notes: what a user must know of it: what is left out, what the runtime must be told.
    """

    target: str
    inventory: Inventory
    groups: Mapping[str, Group]
    full_precision: tuple[FullPrecision, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """MoE layers: the ones with a retained count."""
        return self.inventory.moe_layers


class Target(ABC):
    """What every runtime's contract answers.

    Attributes:
        name: as in study.toml.
        one_expert_count: the runtime knows one retained count for all layers.
        mixes_experts: the experts of one projection may be stored in several formats (parts).
        alignment: tensor data in its file starts at multiples of this many bytes.
    """

    name: str
    one_expert_count: bool
    mixes_experts: bool
    alignment: int

    @abstractmethod
    def layout(self, inventory: Inventory) -> Layout:
        """The groups and kept tensors of a checkpoint in this target."""

    @abstractmethod
    def header_bytes(
        self,
        layout: Layout,
        *,
        retained: Mapping[int, tuple[int, ...]],
        formats: Mapping[str, str],
        experts_used: int,
    ) -> int:
        """Bytes before the tensor data, alignment included.

        Args:
            layout: the tensors, in this or (for a container) another target's layout.
            retained: experts by MoE layer.
            formats: format or parts by group.
            experts_used: routed experts per token.
        """

    def parts_overhead(self, group: Group, names: Sequence[str]) -> int:
        """At most what the header grows by when a group is stored in parts of these formats."""
        assert self.mixes_experts, f"{self.name}: {group.name} in parts {names}"
        return 0

    def check_kv_format(self, inventory: Inventory, kv_format: str) -> None:
        """Raises:
        TargetError: if the runtime does not store keys and values so.
        """
        if kv_format != "f16":
            raise TargetError(
                f"kv_format {kv_format!r} with target {self.name}: it is chosen for llama.cpp's "
                "cache; needed 'f16', or target gguf"
            )

    def check_micro_batch(self, micro_batch: int) -> None:
        """Raises:
        TargetError: if the runtime cannot be told so.
        """
        raise TargetError(
            f"micro_batch {micro_batch}: our loader of target {self.name} knows none; leave it "
            "out, or use target gguf"
        )

    def kv_bytes(self, inventory: Inventory, kv_format: str, context: int) -> int:
        """Bytes of keys and values that decoding a token reads of a full context.

        Raises:
            TargetError: if nothing is known of the runtime.
        """
        raise TargetError(self._unknown_memory)

    def device_memory(
        self,
        inventory: Inventory,
        workload: Workload,
        settings: RuntimeSettings,
        *,
        weights: int,
        n_experts: int,
    ) -> DeviceMemory:
        """What the runtime occupies, itemised.

        Args:
            inventory: the checkpoint.
            workload: what runs.
            settings: what the runtime is told.
            weights: bytes of tensor data.
            n_experts: the most that a layer retains.

        Raises:
            TargetError: if nothing is known of the runtime.
        """
        raise TargetError(self._unknown_memory)

    @property
    def _unknown_memory(self) -> str:
        return (
            f"target {self.name}: our loader decodes weights to float32, so its memory is not "
            "budgeted; use target gguf"
        )

    def padded(self, nbytes: int) -> int:
        """Bytes that tensor data of `nbytes` occupies in the file."""
        return -(-nbytes // self.alignment) * self.alignment


def plain_groups(
    inventory: Inventory, stored_as: Mapping[str, str], skip: Iterable[Role] = ()
) -> list[Group]:
    """One group per matrix, one per projection of a layer's experts.

    Args:
        inventory: the checkpoint.
        stored_as: the target's name of each checkpoint tensor.
        skip: roles that the target lays out in its own way.
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
            source_format=FORMATS[MXFP4] if tensor.dtype == MXFP4 else None,
        )
    return list(groups.values())


def in_file_order(groups: Iterable[Group]) -> dict[str, Group]:
    """Groups by name: outside the layers first, then layer by layer."""
    ordered = sorted(groups, key=lambda g: (-1 if g.layer is None else g.layer, g.name))
    return {group.name: group for group in ordered}
