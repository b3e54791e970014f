"""A checkpoint's tensors as float32.

In: a tensor of an inventory, whole or by rows. Out: its values. Invariant: FP8 in blocks is decoded
as torch does: the code's value times its block's factor (F32, F16 or BF16), in float32; MXFP4 as
the specification says (OCP Microscaling Formats, 5.4 and 6.3), which float32 holds exactly; a value
that is no number is refused.
"""

from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from allocator.checkpoint.inventory import FP8, MXFP4, MXFP4_BLOCK, Inventory, Stored, TensorInfo
from allocator.errors import CheckpointError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
_Stored = TypeVar("_Stored", bound=Stored)


def _e4m3() -> Floats:
    """Values of the 256 codes: sign, 4 bits of exponent (bias 7), 3 of mantissa.

    There is no infinity, and one NaN per sign (OCP 8-bit floating point specification, 5.1).
    """
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    # 2^(e-7) (1 + m/8); without an exponent 2^-6 m/8
    magnitude = np.ldexp(np.where(exponent, mantissa + 8.0, mantissa), np.maximum(exponent, 1) - 10)
    magnitude[codes & 127 == 127] = np.nan
    values: Floats = np.where(codes < 128, magnitude, -magnitude).astype(np.float32)
    return values


_E4M3 = _e4m3()


def _e2m1_pairs() -> Floats:
    """Values of the two codes of a byte, the lower four bits first, `(256, 2)`.

    Of a code: sign, 2 bits of exponent (bias 1), 1 of mantissa.
    """
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([magnitudes, -magnitudes])
    codes = np.arange(256)
    return np.stack([values[codes & 15], values[codes >> 4]], -1)


_E2M1_PAIRS = _e2m1_pairs()
_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
"""Powers of two, by exponent with a bias of 127; the last stands for no number."""


def read_raw(inventory: Inventory, info: Stored) -> npt.NDArray[np.uint8]:
    """Reads the stored bytes of one tensor, `(nbytes,)`.

    Raises:
        CheckpointError: if the file ends before it, or changed since its header was read.
    """
    return inventory.read_raw(info)


def read_tensor(inventory: Inventory, name: str) -> Floats:
    """Reads one tensor of the checkpoint as float32, exactly, whatever its dtype.

    The shape is the stored one: `(rows, in_features)` of a matrix, `(width,)` of a vector.

    Raises:
        CheckpointError: if its file ends early, or the tensor has values that are no numbers.
    """
    info = inventory.tensors[name]
    if info.unpadded is None:
        return _read(inventory, info)
    return read_rows(inventory, name, 0, info.shape[0])


def read_rows(inventory: Inventory, name: str, start: int, stop: int) -> Floats:
    """Reads rows `start` to `stop` of a matrix as float32, exactly.

    No other rows of the file are read; of FP8, whole blocks are read, and of a part of a stored
    matrix, or one made of others, all of that.

    Returns:
        `(rows, in_features)`, with `stop - start` rows.

    Raises:
        CheckpointError: as `read_tensor`.
    """
    info = inventory.tensors[name]
    if info.unpadded is None:
        return _read_rows(inventory, info, start, stop)
    values = np.zeros((stop - start, *info.shape[1:]), np.float32)
    rows, columns = info.unpadded
    if start < rows:
        stored = _read_rows(inventory, info.as_stored, start, min(stop, rows))
        values[: len(stored), :columns] = stored
    return values


def _read_rows(inventory: Inventory, info: TensorInfo, start: int, stop: int) -> Floats:
    if info.part is not None or info.made is not None:
        return _read(inventory, info)[start:stop]
    if info.scale is None:
        return _read(inventory, _rows_of(info, start, stop))
    block = inventory.scale_block[0] if info.dtype == FP8 else 1
    first = start // block * block
    scale = _rows_of(info.scale, start // block, -(-stop // block))
    return _read(inventory, replace(_rows_of(info, first, stop), scale=scale))[start - first :]


def _rows_of(stored: _Stored, start: int, stop: int) -> _Stored:
    row_bytes = stored.nbytes // stored.shape[0]
    return replace(
        stored,
        shape=(stop - start, *stored.shape[1:]),
        offset=stored.offset + start * row_bytes,
        nbytes=(stop - start) * row_bytes,
    )


def _read(inventory: Inventory, info: TensorInfo) -> Floats:
    if info.dtype == MXFP4:
        assert info.scale is not None, info.name
        values = _in_blocks(read_raw(inventory, info), read_raw(inventory, info.scale))
    elif info.made is not None:
        stored = info.made.stored
        pieces = [floats_of(read_raw(inventory, s), s.dtype).reshape(s.shape) for s in stored]
        values = np.ascontiguousarray(info.made.make(pieces))
    elif info.scale is not None:
        scale = floats_of(read_raw(inventory, info.scale), info.scale.dtype)
        scaled = _scaled(
            read_raw(inventory, info).reshape(info.shape),
            scale.reshape(info.scale.shape),
            inventory.scale_block,
        )
        if scaled is None:
            raise CheckpointError(
                f"{info.file}: {info.name} holds a NaN code, or a factor in {info.scale.name} is "
                "too large; needed finite weights: fetch the checkpoint again"
            )
        values = scaled
    else:
        values = floats_of(read_raw(inventory, info), info.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(values.sum()) or np.isfinite(values).all()  # a sum is cheaper
    if not finite:
        raise CheckpointError(
            f"{info.file}: {info.name} holds a NaN or an infinity; needed finite weights: fetch "
            "the checkpoint again"
        )
    return values.reshape(info.shape)


def floats_of(raw: npt.NDArray[np.uint8], dtype: str) -> Floats:
    """Converts stored floats, `F32`, `F16` or `BF16`, to float32, exactly; decodes `Q8_0`.

    Args:
        raw: `(n * bytes of the dtype,)`, of Q8_0 in whole blocks.
        dtype: of the stored floats.

    Returns:
        `(n,)`.
    """
    if dtype == "Q8_0":  # blocks of a float16 scale and 32 codes
        blocks = raw.reshape(-1, 2 + 32)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return (blocks[:, 2:].view(np.int8) * scales).reshape(-1)
    if dtype == "BF16":
        bits = raw.view(np.uint16).astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    return raw.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def _in_blocks(codes: npt.NDArray[np.uint8], exponents: npt.NDArray[np.uint8]) -> Floats:
    """MXFP4's values, `(32 * blocks,)`, of `(16 * blocks,)` codes and `(blocks,)` exponents."""
    values = _E2M1_PAIRS[codes].reshape(-1, MXFP4_BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= _E8M0[exponents][:, None]
    return values.reshape(-1)


def _scaled(codes: npt.NDArray[np.uint8], scale: Floats, block: tuple[int, int]) -> Floats | None:
    """Decoded E4M3 codes times their block's factor; None if a product is not finite.

    Works through the matrix by rows of blocks, so that it needs little memory beyond the result.
    """
    values = np.empty(codes.shape, np.float32)
    rows, columns = (min(b, n) for b, n in zip(block, codes.shape, strict=True))
    for number, factors in enumerate(scale):
        at = slice(number * rows, (number + 1) * rows)
        np.take(_E4M3, codes[at], out=values[at], mode="clip")  # another mode needs a copy
        with np.errstate(over="ignore", invalid="ignore"):
            values[at] *= np.repeat(factors, columns)[: codes.shape[1]]
        if not np.isfinite(values[at]).all():
            return None
    return values
