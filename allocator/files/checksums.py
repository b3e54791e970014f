"""Files that carry a checksum of their own content, so that damage is seen before it is used.

In: plain values or arrays, and a path. Out: one JSON that a person can open, or one safetensors
file; and the values back. Invariant: what is read back was written. A file of the cache that is
missing or damaged is None, and whoever asked measures again; a durable one raises.

The checksum is one more key, `checksum`, over all others as JSON in a fixed form: a file may be
indented anew, but no value may change. A flipped bit in that key leaves a file with an unknown key
and no checksum; the cache takes no such file, and a record with unknown keys is refused. A file of
the cache is damaged under another name too, and beside other inputs (`of`).
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from allocator.errors import first_line
from allocator.files.atomic import write_whole

CHECKSUM = "checksum"
_N_DIGITS = 32  # of the sha256: 128 bits

T = TypeVar("T")
Array = npt.NDArray[Any]

_log = logging.getLogger(__name__)


def checksum(plain: Mapping[str, Any], of: str = "") -> str:
    """Computes the checksum of an object, as JSON gives it back, without its own key.

    Args:
        plain: keys are text, and sequences lists.
        of: what it belongs to; another one gives another checksum.
    """
    others = {key: value for key, value in plain.items() if key != CHECKSUM}
    body = msgspec.json.encode(others, order="deterministic")
    return hashlib.sha256(of.encode() + b"\n" + body).hexdigest()[:_N_DIGITS]


def seal(value: Any, of: str = "") -> bytes:
    """Encodes an object (a dict, or a struct) as JSON to read, with its checksum."""
    return msgspec.json.format(seal_line(value, of), indent=1) + b"\n"


def seal_line(value: Any, of: str = "") -> bytes:
    """Encodes as `seal` does, in one line and without its newline."""
    plain = msgspec.json.decode(msgspec.json.encode(value))
    return msgspec.json.encode({**plain, CHECKSUM: checksum(plain, of)})


def unseal(data: bytes, of: str = "", *, required: bool = False) -> dict[str, Any]:
    """Decodes an object whose checksum holds, and returns it without the checksum.

    Args:
        data: as `seal` and `seal_line` write it, or an earlier form without a checksum.
        of: what it belongs to.
        required: refuses one without a checksum.

    Raises:
        ValueError: if it is no object, or its checksum is another's; says so in a few words.
    """
    plain = json.loads(data)  # which reads NaN, as Optuna and earlier forms write it
    if not isinstance(plain, dict):
        raise ValueError("no JSON object")
    known = plain.pop(CHECKSUM, None)
    if known is None and not required:
        return plain
    if known != (wanted := checksum(plain, of)):
        raise ValueError(
            f"its {CHECKSUM} is {known}, that of its content {wanted}: damaged, or edited by hand"
        )
    return plain


def write_checked(path: Path, value: Any, of: str = "") -> None:
    """Writes a JSON file of the cache, whole or not at all."""
    write_whole(path, seal(value, f"{path.name} {of}"))


def read_checked(path: Path, kind: type[T], of: str = "", *, quiet: bool = False) -> T | None:
    """Reads a JSON file of the cache.

    Args:
        path: of the file.
        kind: what it holds; for `msgspec.convert`.
        of: as when it was written.
        quiet: logs no line on a damaged one.

    Returns:
        None if it is missing or damaged.
    """
    try:
        plain = unseal(path.read_bytes(), f"{path.name} {of}", required=True)
        return msgspec.convert(plain, kind, strict=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        if not quiet:
            log_damage(path, error)
        return None


def log_damage(path: Path, error: Exception, then: str = "measured again") -> None:
    """Logs one line on a file of the cache that cannot be used."""
    _log.warning("%s: damaged (%s); %s", path, first_line(error)[:200], then)


def save_arrays(path: Path, arrays: Mapping[str, Array], of: str = "") -> None:
    """Writes arrays as safetensors with their checksum, to the disk, whole or not at all.

    Args:
        path: the file.
        arrays: by name, of any shape `(...,)`.
        of: what the arrays belong to; part of the checksum.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(whole, part, {CHECKSUM: arrays_checksum(whole, f"{path.name} {of}")})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_arrays(path: Path, of: str = "") -> dict[str, Array] | None:
    """Reads arrays as `save_arrays` wrote them, by name, each of its own shape `(...,)`.

    Returns:
        None if the file is missing, or damaged; damage is logged in one line.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            known = (file.metadata() or {}).get(CHECKSUM)
        if known != arrays_checksum(arrays, f"{path.name} {of}"):
            raise ValueError(f"its {CHECKSUM} is not that of its content")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        log_damage(path, error)
        return None
    return arrays


def arrays_checksum(arrays: Mapping[str, Array], of: str = "") -> str:
    """Computes the checksum of names, types, shapes `(...,)` and bytes."""
    total = hashlib.sha256(of.encode() + b"\n")
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()[:_N_DIGITS]
