"""ggml's types whose every column has a code of its own: the K types, the 32-blocks, and IQ4.

In: rows of blocks as ggml writes them. Out: their fields, and for each column the code of least
cost. Invariant: reading and writing share one table of places, the byte and the bit of each number
of a block.

A code is the number that the block stores, not negative. Its level is the code plus an offset
(`Q4_0`: -8 to 7), or one of 16 values of IQ4. Q4_1 and Q5_1 add their second scale: they have one
minimum, -1, which takes no bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from allocator.codecs.blocks import Fields, ScalarFormat, cut, read_half, write_half
from allocator.codecs.ggml_blocks.scales import first_scale_byte, scales_per_block
from allocator.formats import Format

_Places = Sequence[tuple[int, int]]  # of each number: byte of the block, lowest bit in the byte


def _packed(first: int, n_bytes: int, n_bits: int, n: int) -> _Places:
    """Returns where `n` numbers of `n_bits` are that fill runs of `n_bytes`, low bits first."""
    run = n_bytes * 8 // n_bits
    return [
        (first + i // run * n_bytes + i % n_bytes, i % run // n_bytes * n_bits) for i in range(n)
    ]


class _Numbers:
    """Numbers that a block stores: in one piece each, or low bits and high bits apart.

    Attributes:
        n: how many numbers.
    """

    def __init__(self, *pieces: tuple[int, _Places]) -> None:
        """Takes the bits of each piece and their places, the lowest bits first."""
        self.n = len(pieces[0][1])
        self._bits = [n_bits for n_bits, _ in pieces]
        self._places = [torch.tensor(places) for _, places in pieces]

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """Cuts numbers out of `(..., block bytes)`, `(..., numbers)` int32."""
        numbers, low = torch.zeros((), dtype=torch.int32, device=blocks.device), 0
        for n_bits, places in zip(self._bits, self._places, strict=True):
            byte, bit = places.to(blocks.device).unbind(-1)
            piece = blocks[..., byte] >> bit.to(torch.uint8) & (1 << n_bits) - 1
            numbers = numbers | piece.int() << low
            low += n_bits
        return numbers

    def write(self, numbers: torch.Tensor, blocks: torch.Tensor) -> None:
        """Puts numbers into `(..., block bytes)`, in whose places there are zeros."""
        for n_bits, places in zip(self._bits, self._places, strict=True):
            byte, bit = places.to(blocks.device).unbind(-1)
            piece = (numbers & (1 << n_bits) - 1).to(torch.uint8) << bit.to(torch.uint8)
            blocks.index_add_(-1, byte, piece)  # no bit has two owners: a sum is an or
            numbers = numbers >> n_bits


@dataclass(frozen=True)
class _Type:
    """What tells one type from another.

    Attributes:
        levels: the level of each code.
        codes: where codes are.
        factors: the factor of each sub-scale.
        subscales: where sub-scales are; None for types without.
        minima: the factor of each minimum; empty for types without a second scale.
        minimum: where minima are; None where there is one for all.
    """

    levels: Sequence[float]
    codes: _Numbers
    factors: Sequence[float] = (1.0,)
    subscales: _Numbers | None = None
    minima: Sequence[float] = ()
    minimum: _Numbers | None = None


_SIGNED_BYTES = (*range(128), *range(-128, 0))
_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _six_bits(first: int, *, minima: bool) -> _Numbers:
    """Returns where the 8 sub-scales or minima of Q4_K and Q5_K are, in 12 bytes.

    The first four have bytes of their own; the low bits of the last four share the last bytes, and
    their high bits are those that 6-bit numbers leave free in the others.
    """
    own = [first + 4 * minima + i for i in range(4)]
    shared = [(first + 8 + i, 4 * minima) for i in range(4)]
    low = [(byte, 0) for byte in own] + shared
    high = [(byte, 4) for byte in own] + [(byte, 6) for byte in own]
    return _Numbers((4, low), (2, high))


def _k4_or_k5(codes: _Numbers, n_codes: int) -> _Type:
    return _Type(
        levels=range(n_codes),
        codes=codes,
        factors=range(64),
        subscales=_six_bits(4, minima=False),
        minima=range(64),
        minimum=_six_bits(4, minima=True),
    )


_NIBBLES = {first: (4, _packed(first, 16, 4, 32)) for first in (2, 4, 6, 8)}
_FIFTH_BITS = {first: (1, _packed(first, 1, 1, 32)) for first in (2, 4)}

_TYPES = {
    "Q8_0": _Type(_SIGNED_BYTES, _Numbers((8, _packed(2, 32, 8, 32)))),
    "Q5_0": _Type(range(-16, 16), _Numbers(_NIBBLES[6], _FIFTH_BITS[2])),
    "Q4_0": _Type(range(-8, 8), _Numbers(_NIBBLES[2])),
    "Q5_1": _Type(range(32), _Numbers(_NIBBLES[8], _FIFTH_BITS[4]), minima=(-1.0,)),
    "Q4_1": _Type(range(16), _Numbers(_NIBBLES[4]), minima=(-1.0,)),
    "IQ4_NL": _Type(_IQ4_LEVELS, _Numbers(_NIBBLES[2])),
    "IQ4_XS": _Type(  # d, high 2 bits and low 4 bits of sub-scales, codes
        _IQ4_LEVELS,
        _Numbers((4, _packed(8, 16, 4, 256))),
        factors=range(-32, 32),
        subscales=_Numbers((4, _packed(4, 1, 4, 8)), (2, _packed(2, 1, 2, 8))),
    ),
    "Q6_K": _Type(  # low 4 bits, high 2 bits, sub-scales, d
        range(-32, 32),
        _Numbers((4, _packed(0, 64, 4, 256)), (2, _packed(128, 32, 2, 256))),
        factors=_SIGNED_BYTES,
        subscales=_Numbers((8, _packed(128 + 64, 16, 8, 16))),
    ),
    "Q5_K": _k4_or_k5(  # d, dmin, sub-scales and minima, high bit, low 4 bits
        _Numbers((4, _packed(16 + 32, 32, 4, 256)), (1, _packed(16, 32, 1, 256))), 32
    ),
    "Q4_K": _k4_or_k5(_Numbers((4, _packed(16, 32, 4, 256))), 16),
    "Q3_K": _Type(  # high bit, low 2 bits, sub-scales' low 4 bits and high 2 bits, d
        range(-4, 4),
        _Numbers((2, _packed(32, 32, 2, 256)), (1, _packed(0, 32, 1, 256))),
        factors=range(-32, 32),
        subscales=_Numbers((4, _packed(96, 8, 4, 16)), (2, _packed(96 + 8, 4, 2, 16))),
    ),
    "Q2_K": _Type(  # sub-scales in the low halves of 16 bytes, minima in the high; codes; d, dmin
        range(4),
        _Numbers((2, _packed(16, 32, 2, 256))),
        factors=range(16),
        subscales=_Numbers((4, _packed(0, 16, 4, 32)[:16])),
        minima=range(16),
        minimum=_Numbers((4, _packed(0, 16, 4, 32)[16:])),
    ),
}  # fmt: skip


class _GgmlScalar(ScalarFormat):
    """One of ggml's types."""

    def __init__(self, fmt: Format) -> None:
        self._type = _TYPES[fmt.name]
        table = torch.tensor(self._type.levels, dtype=torch.float32)
        # ggml writes no -128 into Q8_0, and fast kernels need not expect it
        super().__init__(table, unused=table == -128)
        self.fmt = fmt
        self.factors = torch.tensor(self._type.factors, dtype=torch.float32)
        if self._type.minima:
            self.minima = torch.tensor(self._type.minima, dtype=torch.float32)
        self.group = fmt.block // (self._type.subscales.n if self._type.subscales else 1)
        first = first_scale_byte(fmt)
        self._scales = slice(first, first + 2 * scales_per_block(fmt))

    def unpack(self, data: torch.Tensor) -> Fields:
        """Reads the fields of rows `(..., row bytes)`."""
        blocks = cut(data, self.fmt.block_bytes)
        one = torch.zeros((*blocks.shape[:-1], 1), dtype=torch.int32, device=data.device)
        subscales, minima = self._type.subscales, self._type.minimum
        return Fields(
            read_half(blocks[..., self._scales]),
            (subscales.read(blocks) if subscales else one).flatten(-2),
            None if self.minima is None else (minima.read(blocks) if minima else one).flatten(-2),
            self._type.codes.read(blocks).flatten(-2),
        )

    def pack(self, fields: Fields) -> torch.Tensor:
        """Writes what `unpack` reads."""
        shape = (*fields.scales.shape[:-1], self.fmt.block_bytes)
        blocks = torch.zeros(shape, dtype=torch.uint8, device=fields.scales.device)
        blocks[..., self._scales] = write_half(fields.scales)
        numbers = (
            (self._type.codes, fields.codes),
            (self._type.subscales, fields.subscales),
            (self._type.minimum, fields.minima),
        )
        for places, values in numbers:
            if places is not None and values is not None:
                places.write(cut(values, places.n), blocks)
        return blocks.flatten(-2)


SCALARS: dict[str, Callable[[Format], ScalarFormat]] = {name: _GgmlScalar for name in _TYPES}
"""Makes the block format of a type, by name."""
