"""Reads and writes the float16 scales in blocks of ggml's formats.

A block's decoded weights are linear in its scales: `weights = d * A - dmin * B`, or `d * A` alone,
where `A` and `B` come from the rest of its bytes. Q4_1 and Q5_1 add their minimum, so `B` is -1.

In: bytes that ggml wrote. Out: their scales; the same bytes with other scales. Invariant: no other
bit changes, so `A` and `B` stay. BF16, F16 and F32 have no scales; the scale of MXFP4 is a power of
two, stored as its exponent, and has no float16.
"""

import numpy as np
import numpy.typing as npt

from allocator.codecs.base import Bytes, Halves
from allocator.formats import Format

_FIRST = {  # bytes in front of the first scale; a second one follows the first
    "Q8_0": 0, "Q5_0": 0, "Q4_0": 0, "IQ4_NL": 0, "IQ4_XS": 0,
    "Q5_1": 0, "Q4_1": 0, "Q5_K": 0, "Q4_K": 0,
    "Q6_K": 128 + 64 + 16,  # after low 4 bits, high 2 bits, sub-scales
    "Q3_K": 32 + 64 + 12,  # after high bits, low 2 bits, sub-scales
    "Q2_K": 16 + 64,  # after sub-scales and minima, codes
    "IQ3_S": 0, "IQ3_XXS": 0, "IQ2_S": 0, "IQ2_XS": 0, "IQ2_XXS": 0, "IQ1_S": 0,
    "IQ1_M": 32 + 16,  # after codes, high bits and shifts: in the upper 4 bits of 4 words
}  # fmt: skip
_TWO = {"Q5_1", "Q4_1", "Q5_K", "Q4_K", "Q2_K"}
_NIBBLES = np.arange(0, 16, 4, dtype=np.uint16)  # where the bits of word 0, 1, 2, 3 go in IQ1_M's d


def scales_per_block(fmt: Format) -> int:
    """Returns 1 (`d`), 2 (`d` and `dmin`), or 0 for formats without float16 scales."""
    return 0 if fmt.name not in _FIRST else 2 if fmt.name in _TWO else 1


def first_scale_byte(fmt: Format) -> int:
    """Returns how many bytes of a block are in front of its scales, which lie side by side.

    In blocks of IQ1_M the 16 bits of the scale are spread over the bytes behind.
    """
    return _FIRST[fmt.name]


def read_scales(data: Bytes, fmt: Format) -> Halves | None:
    """Returns the scales of every block.

    Args:
        data: `(..., bytes per row)`.
        fmt: one of ggml's formats.

    Returns:
        `(..., blocks, 1)` with `d`, or `(..., blocks, 2)` with `d` and `dmin` (for Q4_1 and Q5_1
        the minimum, which is added), a copy; None for formats without float16 scales.
    """
    if not scales_per_block(fmt):
        return None
    if fmt.name == "IQ1_M":
        nibbles = (_iq1_m_words(data, fmt) >> 12) << _NIBBLES
        return np.bitwise_or.reduce(nibbles, axis=-1, keepdims=True).view(np.float16)
    return _blocks(data, fmt)[..., _where(fmt)].copy().view(np.float16)


def write_scales(data: Bytes, fmt: Format, scales: Halves) -> Bytes:
    """Returns the same bytes with other scales.

    Args:
        data: `(..., bytes per row)`.
        fmt: a format with float16 scales.
        scales: float16 as `read_scales` returns them.

    Returns:
        `(..., bytes per row)`, a copy.
    """
    changed = np.array(data, order="C")
    if fmt.name == "IQ1_M":
        nibbles = (scales.view(np.uint16) >> _NIBBLES) << 12
        words = _iq1_m_words(data, fmt) & 0x0FFF | nibbles
        _blocks(changed, fmt)[..., _FIRST[fmt.name] :] = words.astype("<u2").view(np.uint8)
    else:
        halves = np.ascontiguousarray(scales, dtype="<f2")
        _blocks(changed, fmt)[..., _where(fmt)] = halves.view(np.uint8)
    return changed


def _blocks(data: Bytes, fmt: Format) -> Bytes:
    return data.reshape(*data.shape[:-1], -1, fmt.block_bytes)


def _where(fmt: Format) -> slice:
    first = _FIRST[fmt.name]
    return slice(first, first + 2 * scales_per_block(fmt))


def _iq1_m_words(data: Bytes, fmt: Format) -> npt.NDArray[np.uint16]:
    """Returns `(..., blocks, 4)`: four 3-bit sub-scales and four bits of `d` in each word."""
    return _blocks(data, fmt)[..., _FIRST[fmt.name] :].copy().view("<u2").astype(np.uint16)
