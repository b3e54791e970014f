"""A file of llama.cpp's importance matrix, read without trust.

In: what `llama-imatrix` writes: GGUF with sums of squares (`.in_sum2`) and `.counts` of tokens, or
the binary form before it (`.dat`). Out: mean squares of every matrix's input channels, under
llama.cpp's names. Invariants: every length is checked against the file before it is used; means are
the float32 that llama-quantize computes from the file; values are finite and not negative.

Sources: `common/imatrix-loader.cpp`, `tools/imatrix/imatrix.cpp`, `tools/quantize/quantize.cpp`.
"""

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from allocator.checkpoint.gguf.reader import MAGIC, Entry, read_header
from allocator.errors import CalibrationError, reason

SUMS, COUNTS = ".in_sum2", ".counts"
"""What llama.cpp appends to a tensor's name."""
_WAY_OUT = "make it again with llama-imatrix"
_LONGEST_NAME = 1024
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Means:
    """What a file says of the inputs of one tensor.

    Attributes:
        values: mean squares, `(matrices x channels,)`, float32; of a matrix that no token reached
            whatever the file has.
        counts: tokens by matrix, `(matrices,)`; one for all where the file has one, which is 1 in
            the binary form: its means are of unknown numbers of tokens.
    """

    values: _Floats
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Imatrix:
    """A file of importance.

    Attributes:
        path: of the file.
        sha256: of the file.
        tensors: means by llama.cpp's name.
        is_binary: whether it is in the form before GGUF.
        notes: lines on what of the file is not used.
    """

    path: Path
    sha256: str
    tensors: Mapping[str, Means]
    is_binary: bool
    notes: tuple[str, ...] = ()


def read_imatrix(path: Path) -> Imatrix:
    """Reads a file of llama-imatrix.

    Raises:
        CalibrationError: if the file is missing, truncated, damaged or something else, or a value
            is not finite or negative.
    """
    try:
        with open(path, "rb") as file:
            binary = file.read(len(MAGIC)) != MAGIC
            file.seek(0)
            sha256 = file_digest(file, "sha256").hexdigest()
            file.seek(0)
            data = file.read() if binary else b""
    except OSError as error:
        raise CalibrationError(
            f"{path}: cannot be read ({reason(error)}); needed a file of llama-imatrix"
        ) from None
    notes: tuple[str, ...] = ()
    if binary:
        tensors = dict(_Binary(path, data).entries())
    else:
        tensors, notes = _of_gguf(path)
    for name, means in tensors.items():
        _check_values(path, name, means)
    return Imatrix(path, sha256, tensors, binary, notes)


def _check_values(path: Path, name: str, means: Means) -> None:
    for what, bad in (
        ("not finite", ~np.isfinite(means.values)),
        ("negative", means.values < 0),
    ):
        if n := int(bad.sum()):
            raise CalibrationError(
                f"{path}: {name} has {n} values that are {what} (first: channel "
                f"{int(bad.argmax())}); {_WAY_OUT}"
            )


# -- GGUF


def _of_gguf(path: Path) -> tuple[dict[str, Means], tuple[str, ...]]:
    header = read_header(path, error=CalibrationError, way_out=_WAY_OUT, values=False)
    by_kind: dict[str, dict[str, Entry]] = {SUMS: {}, COUNTS: {}}
    others: Counter[str] = Counter()
    for entry in header.entries:
        stem, dot, kind = entry.name.rpartition(".")
        if dot + kind in by_kind:
            by_kind[dot + kind][stem] = entry
        else:
            others[dot + kind] += 1
    sums, counts = by_kind[SUMS], by_kind[COUNTS]
    if not sums:
        raise CalibrationError(
            f"{path}: {len(header.entries)} tensors, none of them {SUMS}; this is no importance "
            f"matrix: {_WAY_OUT}"
        )
    if alone := sorted(sums.keys() ^ counts.keys()):
        lacks = COUNTS if alone[0] in sums else SUMS
        raise CalibrationError(f"{path}: {alone[0]} has no {lacks}; {_WAY_OUT}")
    means = {}
    for name, entry in sums.items():
        for part in (entry, counts[name]):
            if part.format is None or part.format.name != "F32":
                raise CalibrationError(
                    f"{path}: {part.name} is of ggml type {part.kind}, needed F32; {_WAY_OUT}"
                )
        values, numbers = (
            np.frombuffer(header.data, "<f4", part.nbytes // 4, part.offset)
            for part in (entry, counts[name])
        )
        means[name] = _means(path, name, values, numbers)
    kinds = ", ".join(f"{n} of {kind}" for kind, n in sorted(others.items()))
    notes = (f"{path.name}: other tensors are not used: {kinds}",) if others else ()
    return means, notes


def _means(path: Path, name: str, sums: _Floats, counts: _Floats) -> Means:
    if len(sums) % len(counts):
        raise CalibrationError(
            f"{path}: {name} has {len(sums)} sums for {len(counts)} counts; {_WAY_OUT}"
        )
    if not (np.isfinite(counts) & (counts >= 0) & (counts < 2**53)).all():
        raise CalibrationError(
            f"{path}: {name} has counts that are no numbers of tokens; {_WAY_OUT}"
        )
    numbers = np.rint(counts).astype(np.int64)
    by_matrix = sums.reshape(len(counts), -1)
    divisors = np.maximum(numbers, 1).astype(np.float32)
    return Means((by_matrix / divisors[:, None]).reshape(-1), numbers)


# -- the binary form


class _Binary:
    """Reads forward in a file of the binary form; refuses to pass its end."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, 0

    def entries(self) -> Iterator[tuple[str, Means]]:
        n_entries = self._number("entries", 1, len(self._data) // 12)
        names = set()
        for _ in range(n_entries):
            name = self._text(self._number("letters of a name", 1, _LONGEST_NAME))
            if name in names:
                raise self._fail(f"{name} a second time")
            names.add(name)
            n_calls = self._number(f"calls of {name}", 0, 2**31 - 1)
            n_values = self._number(f"values of {name}", 1, len(self._data) // 4)
            values = np.frombuffer(self._take(4 * n_values), "<f4")
            # without a call, llama-quantize takes the values as they are
            yield (
                name,
                Means(
                    (values / np.float32(max(n_calls, 1))).astype(np.float32), np.ones(1, np.int64)
                ),
            )
        if self._at < len(self._data):  # left out by the oldest versions
            self._number("chunks", -(2**31), 2**31 - 1)
        if self._at < len(self._data):
            self._take(self._number("letters of a file's name", 0, len(self._data)))
        if self._at < len(self._data):
            raise self._fail(f"{len(self._data) - self._at} bytes after the last entry")

    def _number(self, what: str, least: int, most: int) -> int:
        value: int = struct.unpack("<i", self._take(4))[0]
        if not least <= value <= most:
            self._at -= 4
            raise self._fail(f"{value} {what} announced")
        return value

    def _text(self, n_letters: int) -> str:
        try:
            return self._take(n_letters).decode()
        except UnicodeDecodeError:
            raise self._fail("a name that is no text") from None

    def _take(self, n_bytes: int) -> bytes:
        taken = self._data[self._at : self._at + n_bytes]
        if len(taken) < n_bytes:
            raise self._fail(f"{n_bytes} bytes announced, {len(taken)} left")
        self._at += n_bytes
        return taken

    def _fail(self, what: str) -> CalibrationError:
        return CalibrationError(
            f"{self._path}: {what} at byte {self._at} of {len(self._data)}; neither a GGUF nor an "
            f"importance matrix in llama.cpp's binary form that is whole: {_WAY_OUT}"
        )
