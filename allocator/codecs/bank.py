"""Encoded weights, on disk, by content.

In: a group and a format. Out: its encoded bytes with all experts, memory-mapped. Invariant: the key
is (weights' digest, format, importance digest, codec version), so an entry is never stale; entries
are written whole and renamed, so two processes may share a bank and a kill leaves none torn.
Experts are encoded one by one, so retaining some of them is indexing.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from allocator.codecs import ggml
from allocator.codecs.ggml import Bytes, Floats
from allocator.codecs.source import group_digest, group_weights
from allocator.errors import FormatError
from allocator.files import write_whole
from allocator.formats import format_named
from allocator.records import codec
from allocator.targets import Layout


class Bank:
    """The encoded groups of one checkpoint in one layout.

    Args:
        folder: where entries live; made if missing.
        layout: the groups.
        importance: per group, `(in,)` or `(experts or heads, in)`; others are encoded plainly.
        threads: for encoding.
    """

    def __init__(
        self, folder: Path, layout: Layout, importance: Mapping[str, Floats], *, threads: int = 1
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.importance = importance
        self.threads = threads
        self._digests: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def encoded(self, name: str, fmt: str) -> Bytes:
        """A group in a format: `(..., rows, bytes per row)`, all experts, read-only.

        Raises:
            FormatError: if the format cannot store the group or lacks its importance.
        """
        group = self.layout.groups[name]
        row_bytes = format_named(fmt).nbytes((1, group.shape[-1]))
        path = self.folder / f"{self._key(name, fmt)}.bin"
        if not path.exists():
            write_whole(path, self._encode(name, fmt).data)
        shape = (*group.shape[:-1], row_bytes)
        if path.stat().st_size != int(np.prod(shape)):
            raise FormatError(f"{path}: damaged bank entry; delete it and run again")
        return np.memmap(path, np.uint8, "r", shape=shape)

    def decoded(self, name: str, fmt: str, experts: tuple[int, ...] | None = None) -> Floats:
        """A group in a format, decoded to float32; of a routed projection, these experts."""
        data = self.encoded(name, fmt)
        return ggml.decode(data if experts is None else data[list(experts)], format_named(fmt))

    def group_importance(self, name: str) -> Floats | None:
        """Importance of a group's input channels, if there is any."""
        return self.importance.get(name) if self.layout.groups[name].importance else None

    def _key(self, name: str, fmt: str) -> str:
        if name not in self._digests:
            group = self.layout.groups[name]
            weighted = self.group_importance(name)
            parts = (
                group_digest(self.layout, group),
                "" if weighted is None else weighted.tobytes().hex(),
            )
            self._digests[name] = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        return hashlib.sha256(f"{self._digests[name]} {fmt} {codec()}".encode()).hexdigest()

    def _encode(self, name: str, fmt: str) -> Bytes:
        weights = group_weights(self.layout, self.layout.groups[name])
        return ggml.encode(
            weights, format_named(fmt), self.group_importance(name), threads=self.threads
        )
