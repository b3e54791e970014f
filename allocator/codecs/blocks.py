"""What the bytes of a block format are made of, so that its codes can be chosen anew.

In: encoded rows as uint8 tensors. Out: scales, sub-scales, minima and codes, and back to bytes.
Invariant: `pack(unpack(data))` is `data` for whatever the codec wrote, and `values` are exactly
what the codec decodes.

Every format decodes a weight by one formula, in float32 and in this order:

    (scale * factors[sub-scale]) * level + scale * shifts[sub-scale]
        - scale_of_minima * minima[minimum]

One *scale* (float16, ggml's `d`), and in some formats one of minima (`dmin`), per *block*; one
sub-scale and one minimum per *group* of columns; one code per *unit* of columns, which says the
levels of all of them (signs are part of a code). A format without sub-scales has one factor, 1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch

from allocator.formats import Format


@dataclass(frozen=True, slots=True)
class Fields:
    """What encoded rows say.

    Attributes:
        scales: `(..., blocks, 1)` float16, or `(..., blocks, 2)` with the scale of minima.
        subscales: `(..., groups)` int32, indices of `BlockFormat.factors`.
        minima: `(..., groups)` int32, indices of `BlockFormat.minima`; None where there are none.
        codes: `(..., units)` int32.
    """

    scales: torch.Tensor
    subscales: torch.Tensor
    minima: torch.Tensor | None
    codes: torch.Tensor


class BlockFormat(ABC):
    """The structure of one format.

    Attributes:
        fmt: the format.
        unit: columns that one code says: 1, 4 or 8.
        group: columns that share a sub-scale and a minimum.
        factors: `(n,)` float32, what each sub-scale multiplies the scale by.
        shifts: `(n,)` float32, what each sub-scale adds, in units of the scale; None for zeros.
        minima: `(m,)` float32, what each minimum multiplies the scale of minima by; None where the
            format has no minima.
    """

    fmt: Format
    unit: int
    group: int
    factors: torch.Tensor
    shifts: torch.Tensor | None = None
    minima: torch.Tensor | None = None

    @abstractmethod
    def unpack(self, data: torch.Tensor) -> Fields:
        """Reads the fields of rows.

        Args:
            data: `(..., row bytes)` uint8.
        """

    @abstractmethod
    def pack(self, fields: Fields) -> torch.Tensor:
        """Writes fields as bytes, `(..., row bytes)` uint8; the inverse of `unpack`."""

    @abstractmethod
    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the levels of codes `(...)`, `(..., unit)` float32."""

    @abstractmethod
    def best(self, pull: torch.Tensor, metric: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Chooses codes of one unit of columns.

        A code with the levels `p` costs `p metric p' - 2 pull p'`. The best need not be reached,
        and the returned code may even cost more than the present one: the caller compares.

        Args:
            pull: `experts x rows x unit` float32.
            metric: `experts x unit x unit` float32, symmetric, not negative.
            codes: `experts x rows` int32, the present codes.

        Returns:
            `experts x rows` int32.
        """

    def parts(self, fields: Fields) -> list[torch.Tensor]:
        """Returns the values' part in each of the fp16 scales, `(..., in)` float32 each.

        The first is proportional to the scale, the second, where there is one, to the scale of
        minima; their sum is what `values` returns.
        """
        subscales = fields.subscales.long()
        units = self.levels(fields.codes)
        levels = units.reshape(*subscales.shape, self.group)
        factor, shift, minimum = self.affine(fields)
        first = factor[..., None] * levels
        if shift is not None:
            first = first + shift[..., None]
        parts = [first.flatten(-2)]
        if minimum is not None:
            parts.append((-minimum)[..., None].expand_as(levels).flatten(-2))
        return parts

    def affine(
        self, fields: Fields
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns what a level is multiplied by, what is added, and what is subtracted.

        Returns:
            `(..., groups)` float32 each; None where the format has none.
        """
        device = fields.scales.device
        n = fields.subscales.shape[-1] // fields.scales.shape[-2]  # groups of a block
        scales = fields.scales.float().repeat_interleave(n, -2)
        factor = scales[..., 0] * self.factors.to(device)[fields.subscales.long()]
        shift = minimum = None
        if self.shifts is not None:
            shift = scales[..., 0] * self.shifts.to(device)[fields.subscales.long()]
        if self.minima is not None and fields.minima is not None:
            minimum = scales[..., 1] * self.minima.to(device)[fields.minima.long()]
        return factor, shift, minimum

    def values(self, data: torch.Tensor) -> torch.Tensor:
        """Decodes rows `(..., row bytes)`, `(..., in)` float32, exactly as the codec does."""
        parts = self.parts(self.unpack(data))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class ScalarFormat(BlockFormat):
    """A format with one code per column.

    A format of this kind says `unpack` and `pack`, and calls `__init__`.

    Attributes:
        table: `(codes,)` float32, the level of each code.
    """

    unit = 1

    def __init__(self, table: torch.Tensor, *, unused: torch.Tensor | None = None) -> None:
        """Takes the levels of all codes, each another one.

        Args:
            table: `(codes,)` float32.
            unused: `(codes,)` bool, codes that are read and never chosen.
        """
        self.table = table
        ordered, codes = table.sort()
        if unused is not None:
            ordered, codes = ordered[~unused[codes]], codes[~unused[codes]]
        self._uniform = bool((ordered.diff() == 1).all())
        self._least, self._largest = float(ordered[0]), float(ordered[-1])
        middles = (ordered[1:] + ordered[:-1]) / 2
        tables: tuple[torch.Tensor, ...] = (table, ordered, codes.int(), middles)
        self._devices = {table.device: tables}

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns `(..., 1)` float32."""
        table, *_ = self._tables(codes.device)
        return table[codes.long()][..., None]

    def nearest_levels(self, levels: torch.Tensor) -> torch.Tensor:
        """Returns the levels of the table that are nearest to `(...)`, float32."""
        if self._uniform:
            return levels.round().clamp(self._least, self._largest)
        _, ordered, _, middles = self._tables(levels.device)
        return ordered[torch.bucketize(levels.contiguous(), middles)]

    def codes_of(self, levels: torch.Tensor) -> torch.Tensor:
        """Returns the codes of levels `(...)` of the table, int32."""
        _, ordered, codes, _ = self._tables(levels.device)
        if self._uniform:
            return codes[(levels - self._least).long()]
        return codes[torch.bucketize(levels.contiguous(), ordered)]

    def best(self, pull: torch.Tensor, metric: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Returns the code nearest to the optimum; the present one where no code costs anything."""
        slope = metric[..., 0]
        optimum = pull[..., 0] / torch.where(slope > 0, slope, 1.0)
        return torch.where(slope > 0, self.codes_of(self.nearest_levels(optimum)), codes)

    def _tables(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Returns levels of codes, then levels in order, their codes, and what is between them."""
        if device not in self._devices:
            tables = next(iter(self._devices.values()))
            self._devices[device] = tuple(table.to(device) for table in tables)
        return self._devices[device]


def cut(values: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Returns `(..., n)` as `(..., pieces, *sizes)`."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // prod(sizes), *sizes)


def read_half(data: torch.Tensor) -> torch.Tensor:
    """Reads `(..., 2 n)` bytes as `(..., n)` float16."""
    return data.clone(memory_format=torch.contiguous_format).view(torch.float16)


def write_half(scales: torch.Tensor) -> torch.Tensor:
    """Writes `(..., n)` float16 as `(..., 2 n)` bytes."""
    return scales.contiguous().view(torch.uint8)


def read_words(data: torch.Tensor, size: int) -> torch.Tensor:
    """Reads little-endian words of `size` bytes, `(..., size n)` bytes as `(..., n)` int64."""
    places = 8 * torch.arange(size, device=data.device)
    return (cut(data, size).long() << places).sum(-1)


def write_words(words: torch.Tensor, size: int) -> torch.Tensor:
    """Writes `(..., n)` integers as little-endian words, `(..., size n)` bytes."""
    places = 8 * torch.arange(size, device=words.device)
    return (words.long()[..., None] >> places & 0xFF).flatten(-2).to(torch.uint8)


def read_bits(words: torch.Tensor, places: list[int], n_bits: int) -> torch.Tensor:
    """Cuts `n_bits` at each of `places` out of `(...)` words, `(..., places)` int64."""
    shifts = torch.tensor(places).to(words.device)
    return words.long()[..., None] >> shifts & ((1 << n_bits) - 1)


def join_bits(parts: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Joins `(..., places)` integers to words `(...)` int64; the inverse of `read_bits`."""
    shifts = torch.tensor(places).to(parts.device)
    return (parts.long() << shifts).sum(-1)
