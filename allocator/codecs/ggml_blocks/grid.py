"""ggml's IQ1, IQ2 and IQ3 types: four or eight columns are one point of a grid, and signs.

In: rows of 256-blocks as ggml writes them. Out: their fields, and codes that cost least in the
metric of a unit of columns. The grids are those of gguf-py, which decodes the same types.

A code holds, from bit 0 on, the indices of its points (two in IQ3_XXS), then the signs of its
columns, a bit each, set for minus. Types with 7 stored signs per 8 columns have an even number of
minus signs; their codes still hold all 8.

A point with magnitudes `m` and signs `s` costs `sum over i, j of s_i s_j A_ij m_i m_j - 2 sum over
i of s_i b_i m_i` in the metric `A` with the pull `b`. For given signs that is one row of features
times one table of the grid, so all rows and points are one matrix product.
"""

from collections.abc import Callable
from functools import cache, cached_property

import torch

from allocator.codecs.blocks import (
    BlockFormat,
    Fields,
    cut,
    join_bits,
    read_bits,
    read_half,
    read_words,
    write_half,
    write_words,
)
from allocator.formats import Format

_COSTS = 1 << 21
"""Costs computed at once on a CPU, rows times points: 8 MB, within its cache."""
_COSTS_ON_DEVICE = 1 << 28


@cache
def _grid(name: str) -> torch.Tensor:
    """Returns the points of a type, `(points, columns)` float32."""
    from gguf import quants

    quantization = getattr(quants, name)
    quantization.init_grid()
    return torch.from_numpy(quantization.grid.copy()).float().reshape(quantization.grid_shape)


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """Reads bytes `(..., n)` as nibbles `(..., 2 n)`, the lower of each byte first."""
    return read_bits(data, [0, 4], 4).flatten(-2)


def _bytes_of_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    return join_bits(cut(nibbles, 2), [0, 4]).to(torch.uint8)


def _with_parity(stored: torch.Tensor) -> torch.Tensor:
    """Adds the eighth sign to 7 stored ones, so that an even number is set."""
    return stored | read_bits(stored, [*range(7)], 1).sum(-1) % 2 << 7


class GridFormat(BlockFormat):
    """A type whose codes are points of a grid, with signs of their own or without.

    Attributes:
        even: an even number of a unit's signs is minus.
        point: columns of one point.
        index_bits: bits of one index in a code.
    """

    even = False
    index_bits = 9

    def __init__(self, fmt: Format) -> None:
        self.fmt = fmt
        self._devices: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    @cached_property
    def grid(self) -> torch.Tensor:
        """The points, `(points, columns)` float32."""
        return _grid(self.fmt.name)

    def _split(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns indices `(..., points of a unit)` and sign bits `(...)`, int64."""
        codes = codes.long()
        n_points = self.unit // self.grid.shape[-1]
        places = [self.index_bits * i for i in range(n_points)]
        return read_bits(codes, places, self.index_bits), codes >> self.index_bits * n_points

    def _join(self, indices: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        n_points = indices.shape[-1]
        places = [self.index_bits * i for i in range(n_points)]
        return (join_bits(indices, places) | signs << self.index_bits * n_points).int()

    def _tables(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Returns points, features of points, signs of sign bits and their places."""
        if device not in self._devices:
            grid = self.grid
            first, second = torch.triu_indices(grid.shape[-1], grid.shape[-1])
            features = torch.cat([grid[:, first] * grid[:, second], grid], -1).T.contiguous()
            bits = read_bits(torch.arange(1 << self.unit), [*range(self.unit)], 1)
            tables = (grid, features, 1.0 - 2.0 * bits, 1 << torch.arange(self.unit))
            self._devices[device] = tuple(table.to(device) for table in tables)
        return self._devices[device]

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns magnitudes times signs, `(..., unit)`."""
        grid, _, signs, _ = self._tables(codes.device)
        indices, bits = self._split(codes)
        return grid[indices].flatten(-2) * signs[bits]

    def best(self, pull: torch.Tensor, metric: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Tries the signs of the unconstrained optimum, then flips of signs, then points again."""
        grid, _, sign_table, places = self._tables(pull.device)
        scale = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye = torch.eye(self.unit, device=pull.device)
        optimum = torch.linalg.solve(metric + 1e-6 * scale * eye, pull, left=False)
        bits = ((optimum < 0) * places).sum(-1)
        if self.even:
            odd = ((optimum < 0).sum(-1) % 2).bool()
            weakest = (optimum.square() * metric.diagonal(dim1=-2, dim2=-1)[:, None]).argmin(-1)
            bits = torch.where(odd, bits ^ places[weakest], bits)
        indices, _ = self._split(codes)
        for _ in range(2):
            indices = self._nearest(pull, metric, indices, sign_table[bits])
            bits = self._flipped(pull, metric, grid[indices].flatten(-2), bits)
        return self._join(indices, bits)

    def _nearest(
        self, pull: torch.Tensor, metric: torch.Tensor, indices: torch.Tensor, signs: torch.Tensor
    ) -> torch.Tensor:
        """Returns the points of least cost for given signs, one point of a unit after the other.

        Args:
            pull: `experts x rows x unit`.
            metric: `experts x unit x unit`.
            indices: `experts x rows x points of a unit`, the present ones.
            signs: `experts x rows x unit`, plus and minus one.
        """
        grid, table, _, _ = self._tables(pull.device)
        width = grid.shape[-1]
        first, second = torch.triu_indices(width, width, device=pull.device)
        twice = torch.where(first == second, 1.0, 2.0)
        indices = indices.clone()
        for i in range(indices.shape[-1]):
            columns = slice(i * width, (i + 1) * width)
            own, s = pull[..., columns], signs[..., columns]
            if indices.shape[-1] > 1:
                levels = grid[indices].flatten(-2) * signs
                levels[..., columns] = 0
                own = own - levels @ metric[:, :, columns]
            pairs = metric[:, first + i * width, second + i * width] * twice
            features = torch.cat(
                [pairs[:, None] * s[..., first] * s[..., second], -2 * own * s], -1
            )
            indices[..., i] = _least(features, table)
        return indices

    def _flipped(
        self, pull: torch.Tensor, metric: torch.Tensor, points: torch.Tensor, bits: torch.Tensor
    ) -> torch.Tensor:
        """Flips the sign, or the two signs, that lower the cost most; none if none does."""
        _, _, sign_table, places = self._tables(pull.device)
        levels = points * sign_table[bits]
        step = -2 * levels
        single = step * (step * metric.diagonal(dim1=-2, dim2=-1)[:, None])
        single = single + 2 * step * (levels @ metric - pull)
        if not self.even:
            change, chosen = single.min(-1)
            return torch.where(change < 0, bits ^ places[chosen], bits)
        first, second = torch.triu_indices(self.unit, self.unit, 1, device=pull.device)
        pairs = single[..., first] + single[..., second]
        pairs = pairs + 2 * step[..., first] * step[..., second] * metric[:, None, first, second]
        change, chosen = pairs.min(-1)
        flips = places[first] | places[second]
        return torch.where(change < 0, bits ^ flips[chosen], bits)


def _least(features: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Returns for each row the column of the least product.

    Args:
        features: `(..., features)`.
        table: `features x columns`.
    """
    flat = features.reshape(-1, features.shape[-1])
    limit = _COSTS if features.device.type == "cpu" else _COSTS_ON_DEVICE
    pieces = torch.split(flat, max(1, limit // table.shape[1]))
    return torch.cat([(piece @ table).argmin(-1) for piece in pieces]).view(features.shape[:-1])


class _IQ2XXS(GridFormat):
    unit, group, even = 8, 32, True
    factors = (0.5 + torch.arange(16)) * 0.25

    def unpack(self, data: torch.Tensor) -> Fields:
        """Reads `d`, then per 32 columns 4 indices and a word of 4 times 7 signs and a scale."""
        blocks = cut(data, 2 + 64)
        pairs = cut(blocks[..., 2:], 8)
        words = read_words(pairs[..., 4:], 4)[..., 0]
        signs = _with_parity(read_bits(words, [0, 7, 14, 21], 7))
        codes = self._join(pairs[..., :4, None].long(), signs)
        return Fields(
            read_half(blocks[..., :2]), (words >> 28).flatten(-2).int(), None, codes.flatten(-3)
        )

    def pack(self, fields: Fields) -> torch.Tensor:
        """Writes what `unpack` reads."""
        indices, signs = self._split(cut(fields.codes, 8, 4))
        words = join_bits(signs & 127, [0, 7, 14, 21]) | cut(fields.subscales, 8).long() << 28
        pairs = torch.cat([indices[..., 0].to(torch.uint8), write_words(words[..., None], 4)], -1)
        return torch.cat([write_half(fields.scales), pairs.flatten(-2)], -1).flatten(-2)


GRIDS: dict[str, Callable[[Format], BlockFormat]] = {"IQ2_XXS": _IQ2XXS}
"""Makes the block format of a type, by name."""
