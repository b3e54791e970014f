"""A disk cache of encoded weights, whose entries are named by content.

In: a group, a format, experts. Out: their encoded bytes, memory-mapped. An entry (`entries`) holds
a group in a format, one slot per routed expert. Only slots that are asked for are read from the
checkpoint and encoded, a piece of weights at a time; the next piece is read meanwhile.

Invariant: the key is (weights' digest, format, importance digest, codec identity), so an entry is
never stale. A kill leaves a slot absent, never wrong. Two processes that fill one slot write the
same bytes, so there are no locks. An entry may be removed at any time: what is mapped stays
readable, and whoever asks next encodes again.

Every slot is compared with its digest each time that it is asked for. A slot that differs is
encoded again, with a warning. What is handed out is mapped, so it may still change on the disk
while it is used: bytes that outlive the process are compared with the digests of `given` where the
bytes end up.
"""

import errno
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
import xxhash

from allocator.checkpoint.tensors import read_rows
from allocator.codecs.base import Bytes, Floats
from allocator.codecs.capped_folder import WAY_OUT, CappedFolder
from allocator.codecs.entries import Entry, SlotDigests, opened, write_at
from allocator.codecs.registry import codec_of
from allocator.errors import AllocatorError
from allocator.families import Role
from allocator.formats import format_named
from allocator.targets import Group, Layout
from allocator.targets.group_weights import group_digest, group_weights

_FOLDER = "bank"  # as it was called; caches stay as they are
PIECE_BYTES = 32 << 20
"""Weights that are encoded at once, as float32; at least one row."""
_BLOCK_ROWS = 128  # rows of an FP8 checkpoint that share their factors: pieces are whole ones
_HEADS = (Role.K_B, Role.V_B)
_SUFFIX = ".checked"
_REMOVABLE = (_SUFFIX, ".slots", ".bin")  # the others: of earlier versions, which nobody reads


def open_encodings(
    cache: Path,
    layout: Layout,
    importance: Mapping[str, Floats],
    *,
    threads: int,
    cap_bytes: int | None,
) -> "Encodings":
    """Opens the encoded weights in a study's cache.

    Args:
        cache: folder of the cache, which holds profiles too.
        layout: the groups.
        importance: per group, `(in,)` or `(experts or heads, in)`.
        threads: for encoding.
        cap_bytes: of disk that encoded weights may occupy.
    """
    folder = cache / _FOLDER
    return Encodings(folder, layout, importance, threads=threads, cap_bytes=cap_bytes)


class Encodings:
    """The encoded groups of one checkpoint in one layout.

    Args:
        folder: where entries live; made if missing.
        layout: the groups.
        importance: per group, `(in,)` or `(experts or heads, in)`; others are encoded plainly.
        threads: for encoding.
        cap_bytes: of disk that the folder may occupy; beyond the cap entries are removed, those
            used longest ago first, and none that was used since the last `release`.
        piece_bytes: of weights in float32 that are encoded at once.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        importance: Mapping[str, Floats],
        *,
        threads: int = 1,
        cap_bytes: int | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.importance = importance
        self.threads = threads
        self.piece_bytes = piece_bytes
        self.cap_bytes = cap_bytes
        self._capped = CappedFolder(folder, cap_bytes, removable=_REMOVABLE)
        self._digests: dict[str, str] = {}
        self._entries: dict[tuple[str, str], Entry] = {}

    def encoded(self, name: str, fmt: str, experts: Sequence[int] | None = None) -> Bytes:
        """Returns a group in a format; encodes what is not cached.

        Args:
            name: the group.
            fmt: the format.
            experts: of a routed projection, only these, in this order; the others are not encoded.
                All by default.

        Returns:
            `(..., rows, bytes per row)`, read-only.

        Raises:
            FormatError: if the format cannot store the group or lacks its importance.
            CheckpointError: if the checkpoint changed since it was opened.
            AllocatorError: if the disk is full, or gives back other bytes than it was given.
        """
        return self.given(name, fmt, experts)[0]

    def given(
        self, name: str, fmt: str, experts: Sequence[int] | None = None
    ) -> tuple[Bytes, SlotDigests]:
        """Returns a group in a format, as `encoded` does, and the digests of the returned bytes.

        Returns:
            `(..., rows, bytes per row)`, read-only; and one digest per slot.

        Raises:
            AllocatorError: as `encoded`.
        """
        entry = self._entry(name, fmt)
        chosen = list(range(entry.n_slots) if experts is None else experts)
        data, digests = self._checked(name, entry, chosen)
        seals = SlotDigests(
            tuple((entry.seed_of(slot), digests[slot].tobytes()) for slot in chosen),
            entry.slot_bytes,
        )
        first = min(chosen, default=0)
        if experts is None:
            return data, seals
        if chosen == list(range(first, first + len(chosen))):
            return data[first : first + len(chosen)], seals
        data = data[chosen]
        data.flags.writeable = False
        return data, seals

    def decoded(self, name: str, fmt: str, experts: Sequence[int] | None = None) -> Floats:
        """Decodes a group in a format; of a routed projection, these experts.

        Returns:
            `(..., rows, in_features)`, float32.

        Raises:
            AllocatorError: as `encoded`.
        """
        known = format_named(fmt)
        return codec_of(known).decode(self.encoded(name, fmt, experts), known)

    def anew(self, folder: Path) -> "Encodings":
        """Opens another folder for the same groups and importance."""
        return Encodings(
            folder,
            self.layout,
            self.importance,
            threads=self.threads,
            piece_bytes=self.piece_bytes,
        )

    def has(self, name: str, fmt: str, expert: int | None = None) -> bool:
        """Tells whether an expert of a routed projection, or another group, is encoded already.

        Its bytes are compared with their digest when they are asked for.
        """
        entry = self._entry(name, fmt)
        try:
            with opened(entry.path, os.O_RDONLY) as handle:
                return entry.has(handle, expert or 0)
        except FileNotFoundError:
            return False

    def put(self, name: str, fmt: str, expert: int | None, weights: Floats) -> None:
        """Encodes weights that are in memory, unless they are encoded already.

        Args:
            name: the group.
            fmt: the format.
            expert: of a routed projection, whose weights they are; None for other groups.
            weights: `(out, in)`, or the group's shape; as the checkpoint has them.

        Raises:
            FormatError: if the format cannot store the group or lacks its importance.
            AllocatorError: if the disk is full.
        """
        if self.has(name, fmt, expert):
            return
        entry, slot = self._entry(name, fmt), expert or 0
        importance = self._slot_importance(name, entry)
        encoded = codec_of(entry.fmt).encode(
            weights,
            entry.fmt,
            None if importance is None else importance[slot],
            threads=self.threads,
        )
        with self._writable(name, entry) as handle:
            self._store(handle, entry, [slot], 0, encoded, {})

    def release(self) -> None:
        """Lets the entries used so far be removed, where there is a cap."""
        self._capped.release()

    def path_of(self, name: str, fmt: str) -> Path:
        """Returns the file of a group in a format, whether the file is there or not.

        Raises:
            FormatError: if the format cannot store the group.
        """
        return Path(self._entry(name, fmt).path)

    def group_importance(self, name: str) -> Floats | None:
        """Returns a group's importance, `(in,)` or `(experts or heads, in)`; None without any."""
        return self.importance.get(name) if self.layout.groups[name].importance else None

    # -- entries

    def _entry(self, name: str, fmt: str) -> Entry:
        if (name, fmt) not in self._entries:
            group = self.layout.groups[name]
            known = format_named(fmt)
            shape = (*group.shape[:-1], known.nbytes((1, group.shape[-1])))
            key = self._key(name, fmt)
            path = str(self.folder / f"{key}{_SUFFIX}")
            n_slots = group.shape[0] if group.role.is_expert else 1
            self._entries[name, fmt] = Entry(path, int(key[:16], 16), known, shape, n_slots)
        return self._entries[name, fmt]

    def _key(self, name: str, fmt: str) -> str:
        if name not in self._digests:
            group = self.layout.groups[name]
            weighted = self.group_importance(name)
            parts = (
                group_digest(self.layout, group),
                "" if weighted is None else weighted.tobytes().hex(),
            )
            self._digests[name] = sha256(" ".join(parts).encode()).hexdigest()
        encoder = codec_of(format_named(fmt)).identity
        return sha256(f"{self._digests[name]} {fmt} {encoder}".encode()).hexdigest()

    def _checked(self, name: str, entry: Entry, slots: Sequence[int]) -> tuple[Bytes, Bytes]:
        """Maps all slots of an entry, and their digests; the given slots agree with theirs."""
        try:
            with opened(entry.path, os.O_RDONLY) as handle:
                if os.fstat(handle).st_size == entry.file_bytes:
                    self._capped.use(handle, entry.path)
                    data, digests = entry.mapped(handle)
                    if not any(entry.wrong_slots(slots, data, digests)):
                        return data, digests
        except FileNotFoundError:
            pass
        with self._writable(name, entry) as handle:
            data, digests = entry.mapped(handle)  # of what may be another file by now
            absent, damaged = entry.wrong_slots(slots, data, digests)
            if damaged:
                self._warn(name, entry, f"slots {', '.join(map(str, damaged))} of {entry.n_slots}")
            self._fill(handle, name, entry, sorted(absent + damaged))
            if any(entry.wrong_slots(absent + damaged, data, digests)):
                raise AllocatorError(
                    f"{entry.path}: bytes come back from the disk other than they were written; "
                    "move the cache ($ALLOCATOR_CACHE) to another disk"
                )
        return data, digests

    def _warn(self, name: str, entry: Entry, what: str) -> None:
        logging.getLogger(__name__).warning(
            "%s: damaged encoding of %s in %s (%s); encoded again",
            entry.path, name, entry.fmt.name, what,
        )  # fmt: skip

    @contextmanager
    def _writable(self, name: str, entry: Entry) -> Iterator[int]:
        """Opens an entry's file for the body, made if missing, and of its size.

        A file that was too short lacks the digests of its last slots: these count as absent.
        """
        try:
            with opened(entry.path, os.O_RDWR | os.O_CREAT) as handle:
                size = os.fstat(handle).st_size
                if size != entry.file_bytes:
                    os.ftruncate(handle, entry.file_bytes)  # never below what others have mapped
                    if size:  # else it was just made
                        self._warn(name, entry, f"{size} bytes instead of {entry.file_bytes}")
                self._capped.use(handle, entry.path)
                yield handle
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise AllocatorError(f"{self.folder}: {error.strerror}; {WAY_OUT}") from None

    # -- filling

    def _fill(self, handle: int, name: str, entry: Entry, slots: list[int]) -> None:
        """Encodes slots piece by piece; the next one is read and the last one written meanwhile."""
        group, importance = self.layout.groups[name], self._slot_importance(name, entry)
        pieces = list(_pieces(group, slots, self.piece_bytes))
        begun: dict[int, xxhash.xxh3_128] = {}
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            coming = [reader.submit(self._read, group, *piece) for piece in pieces[:1]]
            stored: Future[None] | None = None
            for number, (filled, rows) in enumerate(pieces, 1):
                weights = coming.pop().result()
                coming += [reader.submit(self._read, group, *p) for p in pieces[number:][:1]]
                encoded = codec_of(entry.fmt).encode(
                    weights,
                    entry.fmt,
                    None if importance is None else importance[filled],
                    threads=self.threads,
                )
                if stored is not None:
                    stored.result()
                stored = writer.submit(
                    self._store, handle, entry, filled, rows.start, encoded, begun
                )
            if stored is not None:
                stored.result()

    def _read(self, group: Group, slots: list[int], rows: slice) -> Floats:
        """Reads rows of some slots, `(slots, rows, in)`; a whole slot where rows lie apart."""
        if group.role in _HEADS or group.is_rearranged:
            return group_weights(self.layout, group)[None]
        inventory, sources = self.layout.inventory, [group.sources[slot] for slot in slots]
        weights = [read_rows(inventory, source, rows.start, rows.stop) for source in sources]
        return weights[0][None] if len(weights) == 1 else np.stack(weights)

    def _slot_importance(self, name: str, entry: Entry) -> Floats | None:
        """Returns a group's importance with an axis of slots before it."""
        importance, group = self.group_importance(name), self.layout.groups[name]
        if importance is None or not group.role.is_expert:
            return None if importance is None else importance[None]
        return np.broadcast_to(importance, (entry.n_slots, group.shape[-1]))

    def _store(
        self,
        handle: int,
        entry: Entry,
        slots: list[int],
        start: int,
        encoded: Bytes,
        begun: dict[int, xxhash.xxh3_128],
    ) -> None:
        """Writes rows of some slots, in order; after the last row also their digests.

        Until then `begun` has the digests of the rows so far.
        """
        self._capped.check_free(handle, encoded.nbytes)
        by_slot = encoded.reshape(len(slots), -1)
        offset = start * entry.shape[-1]
        for slot, data in zip(slots, by_slot, strict=True):
            if slot not in begun:
                begun[slot] = entry.hasher(slot)
            begun[slot].update(data.data)
            write_at(handle, data.data, slot * entry.slot_bytes + offset)
        if offset + by_slot.shape[1] == entry.slot_bytes:
            os.fdatasync(handle)
            for slot in slots:
                write_at(handle, memoryview(begun.pop(slot).digest()), entry.digest_at(slot))
        self._capped.wrote(encoded.nbytes)


def _pieces(group: Group, slots: list[int], piece_bytes: int) -> Iterator[tuple[list[int], slice]]:
    """Yields what is encoded at once: all rows of some slots, or some rows of one slot."""
    rows, width = group.shape[-2:]
    most = max(1, piece_bytes // (4 * width))
    if group.role in _HEADS or group.is_rearranged:
        most = rows  # they are cut from one matrix
    if most < rows:
        step = most // _BLOCK_ROWS * _BLOCK_ROWS or most
        for slot in slots:
            for start in range(0, rows, step):
                yield [slot], slice(start, min(start + step, rows))
    else:
        for first in range(0, len(slots), most // rows):
            yield slots[first : first + most // rows], slice(0, rows)
