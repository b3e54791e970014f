"""Target `safetensors`: our own loader for transformers; any count per layer and format per group.

A safetensors file is 8 bytes of header length, a JSON header padded with spaces to 8 bytes, and the
tensor data without gaps (https://github.com/huggingface/safetensors#format). Encoded groups are
`U8` tensors of shape `(..., bytes per row)` under the group's name; kept tensors keep name and
dtype.
"""

import json
from collections.abc import Iterable, Mapping

from allocator.formats import FORMATS
from allocator.inventory import DTYPE_BYTES, Inventory
from allocator.targets.layout import Kept, Layout, Target, in_file_order, plain_groups

Entry = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape


def entries(
    layout: Layout, *, retained: Mapping[int, int], formats: Mapping[str, str]
) -> list[Entry]:
    """Every tensor of the file, in order: encoded groups, then kept tensors."""
    rows: list[Entry] = []
    for group in layout.groups.values():
        *outer, in_features = group.shape_with(retained.get(group.layer or 0, 0))
        row_bytes = FORMATS[formats[group.name]].nbytes((1, in_features))
        rows.append((group.name, "U8", (*outer, row_bytes)))
    for kept in layout.kept:
        shape = kept.shape_with(retained.get(kept.layer or 0, 0))
        dtype = layout.inventory.tensors[kept.source].dtype
        rows.append((kept.source, dtype, shape))
    return rows


def header(rows: Iterable[Entry]) -> bytes:
    """The bytes before the tensor data of a file with these tensors, in this order."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in rows:
        nbytes = {"U8": 1, **DTYPE_BYTES}[dtype]
        for n in shape:
            nbytes *= n
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class SafetensorsTarget(Target):
    """See the module."""

    name = "safetensors"
    one_expert_count = False
    alignment = 1

    def layout(self, inventory: Inventory) -> Layout:
        """Groups as the checkpoint stores them; experts of a projection stacked."""
        kept = tuple(
            Kept(t.name, t.name, t.role, t.layer, t.shape, t.dtype)
            for t in inventory.tensors.values()
            if not t.role.is_encoded and t.role != "nextn"
        )
        return Layout(self.name, inventory, in_file_order(plain_groups(inventory, {})), kept)

    def header_bytes(
        self,
        layout: Layout,
        *,
        retained: Mapping[int, int],
        formats: Mapping[str, str],
        experts_used: int,
    ) -> int:
        """Length prefix and JSON header."""
        return len(header(entries(layout, retained=retained, formats=formats)))


SAFETENSORS = SafetensorsTarget()
