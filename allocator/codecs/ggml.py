"""ggml's own quantizers, from the shared object in the xllamacpp wheel.

In: float32 rows and, where the format wants it, an importance vector per input channel. Out: the
bytes that ggml writes; and back. Invariant: row widths and sizes are checked here, because the
library truncates silently and aborts the process when importance is missing.

`ggml_quantize_chunk` and `to_float` release the GIL here (ctypes), so threads encode in parallel.
"""

import ctypes
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from allocator.errors import FormatError
from allocator.formats import Format

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

ENCODE_SPEED = {
    "BF16": 4e8, "Q8_0": 3.2e8, "Q6_K": 2.1e7, "Q5_K": 5.5e6, "Q4_K": 6.2e6, "Q3_K": 1.7e7,
    "Q2_K": 5.7e6, "Q5_0": 2.5e7, "Q4_0": 2.4e7, "Q5_1": 5.5e6, "Q4_1": 5.3e6, "IQ4_NL": 1.9e6,
    "IQ4_XS": 2.0e6, "IQ3_S": 2.4e6, "IQ3_XXS": 1.8e6, "IQ2_S": 3.5e6, "IQ2_XS": 1.0e6,
    "IQ2_XXS": 1.9e6, "IQ1_M": 4.7e6, "IQ1_S": 4.3e6,
}  # fmt: skip
"""Weights per second, one core, with importance: measured on normal rows of 2048 (those with a
block of 32, of 7168)."""

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):  # ggml.h: struct ggml_type_traits
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """ggml and llama.cpp, loaded once per process.

    Raises:
        FormatError: if the wheel is not installed.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    spec = importlib.util.find_spec("xllamacpp")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    found = sorted(folder.glob("xllamacpp*.so")) if folder else []
    if not found:
        raise FormatError("ggml is not installed: pip install xllamacpp")
    lib = ctypes.CDLL(str(found[0]))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    lib.ggml_quantize_init.argtypes = (ctypes.c_int,)
    lib.ggml_quantize_init.restype = None
    return lib


@cache
def _traits(fmt: Format) -> _TypeTraits:
    traits: _TypeTraits = library().ggml_get_type_traits(fmt.ggml_type).contents
    # the table in formats.py against the library that will write the bytes
    if (traits.blck_size, traits.type_size) != (fmt.block, fmt.block_bytes):
        raise FormatError(
            f"{fmt.name}: this ggml stores {traits.blck_size} weights in {traits.type_size} bytes, "
            f"needed {fmt.block} in {fmt.block_bytes}; install the xllamacpp of constraints.txt"
        )
    return traits


@cache
def prepare(fmt: Format) -> None:
    """Builds the format's tables (seconds for the IQ1 and IQ2 types), once per process."""
    _traits(fmt)
    library().ggml_quantize_init(fmt.ggml_type)


def encode(
    weights: Floats, fmt: Format, importance: Floats | None = None, *, threads: int = 1
) -> Bytes:
    """Encodes rows.

    Args:
        weights: `(..., rows, in_features)`.
        fmt: the format.
        importance: `(..., in_features)` with the leading axes of `weights` or none, non-negative;
            used for the formats that ggml weights by it.
        threads: rows are split over so many.

    Returns:
        `(..., rows, bytes per row)`.

    Raises:
        FormatError: if the rows are no whole blocks, or importance is missing where it is needed.
    """
    *outer, rows, width = weights.shape
    row_bytes = fmt.nbytes((1, width))
    if fmt.needs_importance and importance is None:
        raise FormatError(f"{fmt.name} needs an importance vector; profile the checkpoint first")
    prepare(fmt)
    flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, rows, width)
    if not np.isfinite(flat).all():
        raise FormatError(f"{fmt.name}: weights are not finite; the checkpoint is damaged")
    if importance is not None and not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise FormatError(f"{fmt.name}: importance must be finite and not negative; profile again")
    out = np.zeros((len(flat), rows, row_bytes), np.uint8)
    if fmt.name == "F32":
        out[:] = flat.view(np.uint8).reshape(out.shape)
        return out.reshape(*outer, rows, row_bytes)
    channels = None
    if importance is not None:
        channels = np.ascontiguousarray(
            np.broadcast_to(importance, (*outer, width)), dtype=np.float32
        ).reshape(-1, width)

    def work(piece: tuple[int, int, int]) -> None:
        matrix, start, stop = piece
        library().ggml_quantize_chunk(
            fmt.ggml_type,
            flat[matrix, start:stop].ctypes.data,
            out[matrix, start:stop].ctypes.data,
            0,
            stop - start,
            width,
            None if channels is None else channels[matrix].ctypes.data,
        )

    step = max(1, -(-rows // threads)) if len(flat) < threads else rows
    pieces = [(m, i, min(i + step, rows)) for m in range(len(flat)) for i in range(0, rows, step)]
    _run(work, pieces, threads)
    return out.reshape(*outer, rows, row_bytes)


def decode(data: Bytes, fmt: Format, *, out: Floats | None = None) -> Floats:
    """Decodes rows.

    Args:
        data: `(..., bytes per row)`, contiguous.
        fmt: the format.
        out: float32 memory to decode into, contiguous, `(..., in_features)`.

    Returns:
        `(..., in_features)` float32.
    """
    *outer, row_bytes = data.shape
    width = row_bytes // fmt.block_bytes * fmt.block
    if out is None:
        out = np.empty((*outer, width), np.float32)
    assert out.shape == (*outer, width)
    assert out.flags.c_contiguous
    assert out.dtype == np.float32
    data = np.ascontiguousarray(data)
    if fmt.name == "F32":
        out[...] = data.view(np.float32)
        return out
    if out.size:
        address = _traits(fmt).to_float
        _TO_FLOAT(address)(data.ctypes.data, out.ctypes.data, out.size)
    return out


def _run(work: object, pieces: list[tuple[int, int, int]], threads: int) -> None:
    assert callable(work)
    if threads == 1 or len(pieces) == 1:
        for piece in pieces:
            work(piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, pieces):
            pass
