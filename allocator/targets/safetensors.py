"""Target `safetensors`: our own loader for transformers; any count per layer and format per group.

A safetensors file is 8 bytes of header length, a JSON header padded with spaces to 8 bytes, and the
tensor data without gaps (https://github.com/huggingface/safetensors#format). Encoded groups are
`U8` tensors of shape `(..., bytes per row)` under the group's name, or one per part under the
group's and the format's (`layers.3.experts.down.IQ1_S`); full-precision tensors have the
checkpoint's names and dtypes. Where a shard size is asked for, the same tensors in the same order
are cut into files of at most so many bytes of tensors, with an index, as transformers does it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from allocator.checkpoint.inventory import DTYPE_BYTES, Inventory
from allocator.formats import FORMATS, Format, parts
from allocator.targets.base import Target
from allocator.targets.layout import (
    FullPrecision,
    Group,
    Layout,
    in_file_order,
    part_names,
    plain_groups,
    width_notes,
)

Entry = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape
INDEX_NAME = "model.safetensors.index.json"
"""Of the file that says which shard has a tensor."""

_LONGEST_OFFSET = 10**16 - 1  # bytes
SHARD_BYTES = 5 * 10**9
"""Where nothing else is asked for: of one file, the most bytes of tensors, as the hub's library."""


def entries(
    layout: Layout, *, retained: Mapping[int, tuple[int, ...]], formats: Mapping[str, str]
) -> list[Entry]:
    """Lists every tensor of the file, in order: groups part by part, then full-precision tensors.

    Args:
        layout: the tensors.
        retained: experts by MoE layer.
        formats: format or parts by group.
    """
    rows: list[Entry] = []
    for group in layout.groups.values():
        stored = parts(formats[group.name], group.experts(retained))
        for name, (fmt, experts) in zip(part_names(group.name, stored), stored, strict=True):
            rows.append(_encoded(name, group, fmt, len(experts)))
    for tensor in layout.full_precision:
        shape = tensor.shape_with(len(retained.get(tensor.layer or 0, ())))
        dtype = layout.inventory.tensors[tensor.source].dtype
        rows.append((tensor.source, dtype, shape))
    return rows


def _encoded(name: str, group: Group, fmt: Format, n_experts: int) -> Entry:
    *outer, in_features = group.shape_with(n_experts)
    return name, "U8", (*outer, fmt.nbytes((1, in_features)))


def nbytes(entry: Entry) -> int:
    """Returns the bytes of a tensor."""
    _, dtype, shape = entry
    return prod(shape, start={"U8": 1, **DTYPE_BYTES}[dtype])


@dataclass(frozen=True)
class Shard:
    """One of the files that the tensors of a checkpoint lie in.

    Attributes:
        name: of the file.
        rows: its tensors, in order.
    """

    name: str
    rows: tuple[Entry, ...]


def cut(rows: Iterable[Entry], shard_bytes: int) -> list[Shard]:
    """Cuts tensors into files, in order: as few as fit into each, a larger tensor alone.

    Args:
        rows: every tensor.
        shard_bytes: the most bytes of tensors in a file.
    """
    files: list[list[Entry]] = [[]]
    free = shard_bytes
    for row in rows:
        if nbytes(row) > free and files[-1]:
            files.append([])
            free = shard_bytes
        files[-1].append(row)
        free -= nbytes(row)
    return [
        Shard(f"model-{n:05d}-of-{len(files):05d}.safetensors", tuple(file))
        for n, file in enumerate(files, 1)
    ]


def index(shards: Sequence[Shard], sha256: str) -> bytes:
    """Returns the index of shards, as transformers reads it.

    Args:
        shards: all.
        sha256: of one file with the same tensors.
    """
    total = sum(nbytes(row) for shard in shards for row in shard.rows)
    content = {
        "metadata": {"sha256": sha256, "total_size": total},
        "weight_map": {name: shard.name for shard in shards for name, *_ in shard.rows},
    }
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def header(rows: Iterable[Entry]) -> bytes:
    """Returns the bytes before the tensor data of a file with these tensors, in this order."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for row in rows:
        name, dtype, shape = row
        start, end = end, end + nbytes(row)
        table[name] = _described(dtype, shape, start, end)
    text = _json(table)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _described(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _json(table: object) -> bytes:
    return json.dumps(table, separators=(",", ":")).encode()


class SafetensorsTarget(Target):
    """See the module.

    Args:
        shard_bytes: the most bytes of tensors in a file; None for one file.
    """

    name = "safetensors"
    one_expert_count = False
    mixes_experts = True
    alignment = 1

    def __init__(self, shard_bytes: int | None = None) -> None:
        self._shard_bytes = shard_bytes

    def shards(self, rows: Sequence[Entry]) -> list[Shard]:
        """Returns the files that tensors lie in; none where they fit into one."""
        shards = [] if self._shard_bytes is None else cut(rows, self._shard_bytes)
        return shards if len(shards) > 1 else []

    def layout(self, inventory: Inventory) -> Layout:
        """Returns groups as the checkpoint stores them, the experts of a projection stacked."""
        full_precision = tuple(
            FullPrecision(t.name, t.name, t.role, t.layer, t.shape, t.dtype)
            for t in inventory.tensors.values()
            if not t.role.is_encoded and t.role != "nextn"
        )
        groups = in_file_order(plain_groups(inventory, {}))
        notes = (*inventory.notes, *width_notes(inventory, groups.values()))
        return Layout(self.name, inventory, groups, full_precision, notes)

    def header_bytes(
        self,
        layout: Layout,
        *,
        retained: Mapping[int, tuple[int, ...]],
        formats: Mapping[str, str],
        experts_used: int,
    ) -> int:
        """Returns the bytes of length prefix and JSON header; of all shards, and their index."""
        rows = entries(layout, retained=retained, formats=formats)
        if not (shards := self.shards(rows)):
            return len(header(rows))
        return sum(len(header(shard.rows)) for shard in shards) + len(index(shards, "0" * 64))

    def full_precision_bytes(self, layout: Layout, tensor: FullPrecision, n_experts: int) -> int:
        """Returns the bytes of a full-precision tensor in the checkpoint's own dtype."""
        source = layout.inventory.tensors[tensor.source]
        return source.nbytes // source.shape[0] * tensor.shape_with(n_experts)[0]

    def parts_overhead(self, group: Group, names: Sequence[str]) -> int:
        """Bounds the bytes that the header grows by when a group is in parts of these formats.

        The first part takes the group's row and a longer name, every other a row of its own. The
        bound is in whole words of 8 bytes, so that several fit however the header is padded.
        """
        table: dict[str, object] = {}
        for name in names[1:]:
            stored_as, dtype, shape = _encoded(
                f"{group.name}.{name}", group, FORMATS[name], group.shape[0]
            )
            table[stored_as] = _described(dtype, shape, _LONGEST_OFFSET, _LONGEST_OFFSET)
        added = len(f".{names[0]}") + len(_json(table))  # two braces for at least one comma
        return -(-added // 8) * 8


SAFETENSORS = SafetensorsTarget()
