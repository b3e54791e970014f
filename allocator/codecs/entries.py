"""The file that holds one group of weights in one format.

A sparse file of fixed size: one slot of encoded bytes per routed expert (a single slot for every
other group), and after the slots one digest per slot, zeros where the slot is absent. In: an
`Entry`, a file descriptor. Out: mapped slots, and which of them are absent or damaged. Invariant: a
slot's digest is taken of the bytes in memory and written after the slot is on the disk, so a kill
leaves the slot absent, never wrong.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np
import xxhash

from allocator.codecs.base import Bytes
from allocator.formats import Format

DIGEST_BYTES = 16
_ABSENT = bytes(DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a group in a format is stored.

    The seed of the digests is the entry's own, so that digests of one entry do not match in
    another.

    Attributes:
        path: of the file.
        seed: of the first slot's digest.
        fmt: the format.
        shape: `(..., rows, bytes per row)` with all slots.
        n_slots: routed experts, or 1.
    """

    path: str
    seed: int
    fmt: Format
    shape: tuple[int, ...]
    n_slots: int

    @property
    def slots_bytes(self) -> int:
        """Bytes of all slots."""
        return prod(self.shape)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.slots_bytes // self.n_slots

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.slots_bytes + DIGEST_BYTES * self.n_slots

    def digest_at(self, slot: int) -> int:
        """Returns the offset of a slot's digest in the file."""
        return self.slots_bytes + DIGEST_BYTES * slot

    def seed_of(self, slot: int) -> int:
        """Returns the seed of a slot's digest."""
        return (self.seed + slot) % 2**64

    def hasher(self, slot: int) -> xxhash.xxh3_128:
        """Begins the digest of a slot."""
        return xxhash.xxh3_128(seed=self.seed_of(slot))

    def has(self, handle: int, slot: int) -> bool:
        """Tells whether an open file is whole and has a slot; the slot's bytes are not checked."""
        if os.fstat(handle).st_size != self.file_bytes:
            return False
        return os.pread(handle, DIGEST_BYTES, self.digest_at(slot)) != _ABSENT

    def mapped(self, handle: int) -> tuple[Bytes, Bytes]:
        """Maps an open file.

        Returns:
            All slots, of `shape`, and their digests, `slots x 16`. What other processes write
            shows up in both.
        """
        whole = np.frombuffer(mmap.mmap(handle, self.file_bytes, access=mmap.ACCESS_READ), np.uint8)
        slots, digests = np.split(whole, [self.slots_bytes])
        return slots.reshape(self.shape), digests.reshape(self.n_slots, DIGEST_BYTES)

    def wrong_slots(
        self, slots: Sequence[int], data: Bytes, digests: Bytes
    ) -> tuple[list[int], list[int]]:
        """Compares slots with their digests.

        Args:
            slots: which.
            data: all slots, as `mapped` returns them.
            digests: `slots x 16`.

        Returns:
            Slots that are absent, and slots that differ from their digests.
        """
        flat, stored = data.reshape(-1).data, digests.tobytes()
        absent, damaged = [], []
        for slot in dict.fromkeys(slots):
            digest = stored[slot * DIGEST_BYTES : (slot + 1) * DIGEST_BYTES]
            if digest == _ABSENT:
                absent.append(slot)
            elif digest != _digest(flat, slot, self.slot_bytes, self.seed_of(slot)):
                damaged.append(slot)
        return absent, damaged


@dataclass(frozen=True, slots=True)
class SlotDigests:
    """Digests that recognise the bytes of some slots wherever the bytes are.

    Attributes:
        seals: by slot, the seed and the digest of its bytes.
        slot_bytes: of each slot.
    """

    seals: tuple[tuple[int, bytes], ...]
    slot_bytes: int

    def match(self, data: Bytes) -> bool:
        """Tells whether `data` is the bytes of these slots in their order.

        Args:
            data: `(..., bytes per row)`; only the order of the bytes counts.
        """
        if data.size != len(self.seals) * self.slot_bytes:
            return False
        flat = np.ascontiguousarray(data).reshape(-1).data
        return all(
            _digest(flat, slot, self.slot_bytes, seed) == digest
            for slot, (seed, digest) in enumerate(self.seals)
        )


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """Opens a file for the body."""
    handle = os.open(path, flags, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Writes all of `data`; the kernel writes at most 2 GiB at once."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], offset + done)


def _digest(data: memoryview, slot: int, slot_bytes: int, seed: int) -> bytes:
    """Returns the digest of one of many slots."""
    digest: bytes = xxhash.xxh3_128_digest(
        data[slot * slot_bytes : (slot + 1) * slot_bytes], seed=seed
    )
    return digest
