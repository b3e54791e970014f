"""The file of finished weights, which lies beside the record of their allocation.

A safetensors file: how the bytes of every group, or part of one, that finishing changed differ from
the codec's (`codes.<name>`, exclusive or, deflated by zlib), and every norm or router that it
changed (`values.<tensor>`, float32, exact in the checkpoint's own dtype). Its metadata say what
finished them, with the sha256 of the bytes and values and a checksum. In: finished bytes and
values. Out: the file, named by its content; and back. Invariant: the digest covers allocation,
checkpoint, importance and all finished bytes and values; none is used before it was compared with
its sha256; what a file lacks is as the codecs encode it.

On the reference pick the differences take .52 of the bytes.
"""

import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from allocator.checkpoint.tensors import Floats
from allocator.codecs import Bytes
from allocator.decision.allocation_record import Finishing, finished_name
from allocator.errors import CheckpointError, first_line
from allocator.files.checksums import seal_line, unseal
from allocator.files.progress import waiting

_KEY = "finished"
_CODES, _VALUES = "codes.", "values."
_OF = "finished weights"
_MOST_PARTS = 6  # in memory: a layer's projections in two formats each, expert by expert
_DTYPES = {"uint8": "U8", "float32": "F32"}


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file of finished weights says of itself.

    Attributes:
        allocation: digest of the allocation.
        checkpoint: digest of the source checkpoint.
        importance: digest of the importance vectors of the unfinished weights.
        codec: that encoded them.
        finishing: what finished the weights.
        tensors: sha256 of finished bytes and values, by their names in the file.
        schema: of the file.
    """

    allocation: str
    checkpoint: str
    importance: str
    codec: str
    finishing: Finishing
    tensors: dict[str, str]
    schema: int = 1

    @property
    def weights(self) -> str:
        """The digest of the finished weights; recipe and losses are no part of it."""
        named = {
            "allocation": self.allocation,
            "checkpoint": self.checkpoint,
            "importance": self.importance,
            "tensors": self.tensors,
        }
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """An opened file of finished weights, see `read_artifact`.

    Attributes:
        path: the file.
        description: what it says of itself, found to be undamaged.
    """

    path: Path
    description: Description
    _whole: Bytes
    _spans: Mapping[str, tuple[int, int, tuple[int, ...]]]
    _codes: OrderedDict[str, Bytes] = field(default_factory=OrderedDict)

    @property
    def weights(self) -> str:
        """The digest of the finished weights."""
        return self.description.weights

    def codes(self, name: str, plain: Callable[[], Bytes]) -> Bytes | None:
        """Returns the bytes of a group, or of a part of one: `(..., rows, bytes per row)`.

        Args:
            name: of the group or the part, see `part_names`.
            plain: returns its bytes as the codec encodes it, in the same shape.

        Returns:
            None where finishing left the codec's bytes.

        Raises:
            CheckpointError: if the bytes are damaged.
        """
        key = _CODES + name
        if key not in self._spans:
            return None
        if name not in self._codes:
            before = plain()
            begin, end, _ = self._spans[key]
            changes = _inflated(self._whole[begin:end], before.nbytes)
            data = None if changes is None else before ^ changes.reshape(before.shape)
            if data is None or _digest(data) != self.description.tensors[key]:
                raise damaged(
                    self.path,
                    f"{name} comes to other bytes, from an encoding that {self.description.codec} "
                    "made",
                )
            data.flags.writeable = False
            self._codes[name] = data
            if len(self._codes) > _MOST_PARTS:
                self._codes.popitem(last=False)
        return self._codes[name]

    def values(self, source: str) -> Floats | None:
        """Returns a norm, `(width,)`, or a router's retained rows, `(retained, hidden)`; float32.

        Args:
            source: name of the tensor in the checkpoint.

        Returns:
            None where finishing left the checkpoint's values.

        Raises:
            CheckpointError: if the values are damaged.
        """
        key = _VALUES + source
        if key not in self._spans:
            return None
        begin, end, shape = self._spans[key]
        data = self._whole[begin:end]
        if _digest(data) != self.description.tensors[key]:
            raise damaged(self.path, f"{source} is not what was written")
        return data.view(np.float32).reshape(shape)

    def holds(self, name: str, stored: Bytes) -> bool | None:
        """Tells whether stored bytes are those of a group, or of a part of one, by digest.

        Args:
            name: of the group or the part.
            stored: `(..., bytes per row)`; only the order of the bytes counts.

        Returns:
            None where finishing left the codec's bytes.
        """
        known = self.description.tensors.get(_CODES + name)
        return None if known is None else known == _digest(stored)


def write_artifact(
    folder: Path,
    description: Description,
    codes: Mapping[str, Bytes],
    values: Mapping[str, Floats],
    plain: Callable[[str], Bytes],
) -> Artifact:
    """Writes a file of finished weights under the name of its content, whole or not at all.

    Args:
        folder: where; made if missing.
        description: without `tensors`, which are the digests of what is written.
        codes: bytes by part, `(..., rows, bytes per row)`; those that differ from the codec's.
        values: by tensor of the checkpoint, `(width,)` or `(retained, hidden)`, float32; those
            that differ from the checkpoint's.
        plain: returns a part's bytes as the codec encodes it, in the shape of `codes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    rows: dict[str, object] = {}
    with (
        waiting("writing the finished weights") as shown,
        TemporaryFile(dir=folder) as body,
    ):  # the header in front of it says its lengths
        for name, digest, data in _stored(codes, values, plain):
            shown.note(name)
            begin = body.tell()
            body.write(data.data)
            digests[name] = digest
            rows[name] = {
                "dtype": _DTYPES[data.dtype.name],
                "shape": data.shape,
                "data_offsets": [begin, body.tell()],
            }
        description = msgspec.structs.replace(description, tensors=digests)
        sealed = {_KEY: seal_line(description, _OF).decode()}
        path = folder / finished_name(description.weights)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                file.write(_header({"__metadata__": sealed, **rows}))
                body.seek(0)
                shutil.copyfileobj(body, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return read_artifact(path, description.weights)


def _stored(
    codes: Mapping[str, Bytes], values: Mapping[str, Floats], plain: Callable[[str], Bytes]
) -> Iterator[tuple[str, str, Bytes | Floats]]:
    """Yields names in the file, digests, and what the file has: one tensor in memory at a time."""
    for name in sorted(values):  # first, where the header's padding aligns them
        yield _VALUES + name, _digest(values[name]), np.ascontiguousarray(values[name])
    for name in sorted(codes):
        data = codes[name]
        changes = np.ascontiguousarray(data ^ plain(name))
        deflated = np.frombuffer(zlib.compress(changes.data), np.uint8)
        yield _CODES + name, _digest(data), deflated


def _header(table: Mapping[str, object]) -> bytes:
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_artifact(path: Path, weights: str) -> Artifact:
    """Opens a file of finished weights; its tensors are compared when they are asked for.

    Args:
        path: the file.
        weights: digest that its content must have.

    Raises:
        CheckpointError: if the file is missing, damaged, or of other weights.
    """
    try:
        with safe_open(path, framework="np") as file:  # checks every length and offset
            names = set(file.keys())
            text = (file.metadata() or {})[_KEY]
        description = msgspec.convert(unseal(text.encode(), _OF, required=True), Description)
        if description.schema != 1:
            raise ValueError(f"schema {description.schema}, needed 1")
        if names != set(description.tensors):
            raise ValueError("it holds other tensors than it says")
        with open(path, "rb") as opened:
            whole = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        spans = _spans(whole)
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise damaged(path, first_line(error)[:200]) from None
    if description.weights != weights:
        raise damaged(path, f"it holds weights {description.weights[:12]}, needed {weights[:12]}")
    return Artifact(path, description, whole, spans)


def damaged(path: Path, why: str) -> CheckpointError:
    """Returns the error on a file of finished weights that cannot be used."""
    return CheckpointError(
        f"{path}: no finished weights ({why}); restore the file, finish the allocation again "
        "(`allocator finish`), or write the plain weights (--unfinished)"
    )


def _inflated(data: Bytes, nbytes: int) -> Bytes | None:
    """The bytes that were deflated, `(nbytes,)`; None if they are damaged, or not as many."""
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data.data, nbytes + 1)
    except zlib.error:
        return None
    whole = len(plain) == nbytes and inflater.eof and not inflater.unused_data
    return np.frombuffer(plain, np.uint8) if whole else None


def _spans(whole: Bytes) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """Begin, end and shape of every tensor; the library has checked the header."""
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:start].tobytes())
    return {
        name: (
            start + row["data_offsets"][0],
            start + row["data_offsets"][1],
            tuple(row["shape"]),
        )
        for name, row in header.items()
        if name != "__metadata__"
    }


def _digest(data: Bytes | Floats) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()
