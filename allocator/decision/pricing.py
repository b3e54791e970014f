"""Bytes of a quantized checkpoint: in its file, in a device's memory, and read per decoded token.

In: a layout, and what is stored of it: formats by group, retained experts by layer, settings of the
runtime. Out: integers. Invariant: every item is an integer, a total is the sum of what is listed,
and the bytes of a file are the bytes that are written.

The functions price one tensor or group each. `StoredBytes` sums them over a whole checkpoint;
`costs.Costs` sums them over the choices of a search space.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from allocator.decision.mixes import split
from allocator.families import Role
from allocator.formats import FORMATS, Parts, parts
from allocator.targets import FullPrecision, Group, Layout, Target
from allocator.targets.device_memory import DeviceMemory, RuntimeSettings, Workload


@cache
def part_bytes(shape: tuple[int, ...], value: str) -> tuple[int, ...]:
    """Returns the bytes of each part of a group of this shape, in a format or a mix.

    Args:
        shape: `(out, in)` or `(experts, out, in)`; a mix divides the first axis.
        value: a format's name, or a mix as in `mixes`.
    """
    return tuple(FORMATS[f].nbytes((n, *shape[1:])) for f, n in split(value, shape[0]))


def group_reads(
    layout: Layout, group: Group, nbytes: int, *, experts_used: int, n_experts: int
) -> int:
    """Returns the bytes that decoding one token reads of a group, rounded up.

    Of routed experts a token reads the share that is used, of an embedding that is no head one row.

    Args:
        layout: of the group.
        group: routed experts, or one matrix.
        nbytes: bytes that the group occupies.
        experts_used: routed experts per token.
        n_experts: experts that the group's layer retains.
    """
    if group.role.is_expert and group.layer is not None:
        return -(-nbytes * experts_used // n_experts)
    if group.role is Role.EMBEDDING and not layout.inventory.tied_embeddings:
        return nbytes // group.shape[0]
    return nbytes


def full_precision_reads(tensor: FullPrecision, *, experts_used: int, n_experts: int) -> int:
    """Returns the bytes that decoding one token reads of a full-precision tensor, rounded up.

    Args:
        tensor: a router, norm or bias.
        experts_used: routed experts per token, the share of an expert's bias that is read.
        n_experts: experts that its layer retains.
    """
    nbytes = tensor.nbytes(n_experts)
    used = tensor.role is Role.EXPERT_BIAS
    return -(-nbytes * experts_used // n_experts) if used else nbytes


def extremes(layout: Layout, container: Target, n_experts: int) -> tuple[int, int]:
    """Returns the least and the most bytes of tensor data where every layer retains `n_experts`.

    Args:
        layout: every group in its smallest or in its largest format.
        container: the kind of file, which pads tensors.
        n_experts: retained experts per MoE layer.
    """
    full_precision = sum(
        container.padded(container.full_precision_bytes(layout, k, n_experts))
        for k in layout.full_precision
    )
    sizes = [
        [container.padded(f.nbytes(g.shape_with(n_experts))) for f in g.offered()]
        for g in layout.groups.values()
    ]
    return full_precision + sum(map(min, sizes)), full_precision + sum(map(max, sizes))


@dataclass(frozen=True, slots=True)
class FileBytes:
    """Bytes of a checkpoint file, itemised.

    Attributes:
        encoded: of the searched matrices.
        full_precision: of routers and norms.
        padding: between tensors.
        header: before the tensors.
    """

    encoded: int
    full_precision: int
    padding: int
    header: int

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return self.encoded + self.full_precision

    @property
    def overhead(self) -> int:
        """Bytes of the file that belong to no tensor."""
        return self.padding + self.header

    @property
    def file(self) -> int:
        """Bytes of the file."""
        return self.tensors + self.overhead


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes of a checkpoint that stores a layout in given formats.

    Attributes:
        layout: the groups and full-precision tensors.
        container: the kind of file; a device's memory is that of its runtime.
        retained: retained experts by MoE layer.
        formats: format or parts by group.
        settings: of the runtime.
    """

    layout: Layout
    container: Target
    retained: Mapping[int, tuple[int, ...]]
    formats: Mapping[str, str]
    settings: RuntimeSettings

    def parts(self, group: str) -> Parts:
        """Returns the formats of a group, and the experts that each stores.

        Raises:
            FormatError: if a format is unknown.
            SpaceError: if the parts are not those of the retained experts.
        """
        return parts(self.formats[group], self.layout.groups[group].experts(self.retained))

    def group(self, name: str) -> int:
        """Returns the encoded bytes of one group, all parts included."""
        group = self.layout.groups[name]
        return sum(fmt.nbytes(group.shape_with(len(experts))) for fmt, experts in self.parts(name))

    @property
    def file(self) -> FileBytes:
        """The file, itemised."""
        encoded, full_precision = self._groups(), self._full_precision()
        padding = sum(self.container.padded(n) - n for n in (*encoded, *full_precision))
        return FileBytes(sum(encoded), sum(full_precision), padding, self.header)

    @property
    def header(self) -> int:
        """Bytes of the file before its tensors."""
        return self.container.header_bytes(
            self.layout,
            retained=self.retained,
            formats=self.formats,
            experts_used=self.settings.experts_used,
        )

    @property
    def encoded(self) -> int:
        """Bytes of the searched matrices."""
        return sum(self._groups())

    @property
    def weights(self) -> int:
        """Bytes of all tensors in memory, each padded as in the file."""
        return sum(map(self.container.padded, (*self._groups(), *self._full_precision())))

    def device_memory(self, workload: Workload) -> DeviceMemory:
        """Returns what the runtime occupies on a device, itemised.

        Raises:
            TargetError: if nothing is known of the runtime.
        """
        return self.container.device_memory(
            self.layout.inventory,
            workload,
            self.settings,
            weights=self.weights,
            n_experts=max(map(len, self.retained.values())),
        )

    def token_bytes(self, context: int) -> int:
        """Returns the bytes that decoding one token reads: weights, and keys and values.

        Of keys and values in layers with a sliding window a token reads that window.

        Args:
            context: tokens before it.

        Raises:
            TargetError: if nothing is known of the runtime.
        """
        layout, used = self.layout, self.settings.experts_used
        groups = sum(
            group_reads(
                layout,
                group,
                self.group(name),
                experts_used=used,
                n_experts=self._count(group.layer),
            )
            for name, group in layout.groups.items()
        )
        full_precision = sum(
            full_precision_reads(k, experts_used=used, n_experts=self._count(k.layer))
            for k in layout.full_precision
        )
        kv = self.container.kv_bytes(layout.inventory, self.settings.kv_format, context)
        return groups + full_precision + kv

    def _groups(self) -> list[int]:
        return [self.group(name) for name in self.layout.groups]

    def _full_precision(self) -> list[int]:
        return [
            self.container.full_precision_bytes(self.layout, k, self._count(k.layer))
            for k in self.layout.full_precision
        ]

    def _count(self, layer: int | None) -> int:
        """Experts that a layer retains; 0 where it has none."""
        return 0 if layer is None else len(self.retained.get(layer, ()))
