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

_COSTS = 1 << 19
"""Costs computed at once on a CPU, rows times points: 2 MB, within its cache."""
_COSTS_ON_DEVICE = 1 << 28
_SEVENS = [0, 7, 14, 21]
"""Lowest bits of 4 times 7 signs in a word."""
_RUN = 64
"""Costs of a run, within which minima are searched first."""
_SHIFT = 0.125
"""Of the levels of the IQ1 types."""
_POINTS = 2048
"""Points of the IQ1 types, without shifts."""


@cache
def _grid(name: str) -> torch.Tensor:
    """Returns the points of a type, `(points, columns)` float32."""
    from gguf import quants

    quantization = getattr(quants, name)
    quantization.init_grid()
    return torch.from_numpy(quantization.grid.copy()).float().reshape(quantization.grid_shape)


def _fields(d: torch.Tensor, subscales: torch.Tensor, codes: torch.Tensor) -> Fields:
    """Makes fields of those of each block, `(..., blocks, n)`; `d` are two bytes."""
    return Fields(read_half(d), subscales.flatten(-2).int(), None, codes.flatten(-2).int())


def _row(*parts: torch.Tensor) -> torch.Tensor:
    """Joins the bytes of each block, `(..., blocks, bytes)`, to rows."""
    return torch.cat([part.to(torch.uint8) for part in parts], -1).flatten(-2)


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
        self._devices: dict[torch.device, _Tables] = {}

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

    def _tables(self, device: torch.device) -> "_Tables":
        if device not in self._devices:
            self._devices[device] = _Tables(self.grid.to(device), self.unit)
        return self._devices[device]

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns magnitudes times signs, `(..., unit)`."""
        tables = self._tables(codes.device)
        indices, bits = self._split(codes)
        return _rows(tables.grid, indices).flatten(-2) * _rows(tables.signs, bits)

    def best(self, pull: torch.Tensor, metric: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Tries the signs of the unconstrained optimum, and flips of signs of the best point."""
        tables = self._tables(pull.device)
        optimum = _optimum(pull, metric)
        minus = optimum < 0
        bits = (minus * tables.places).sum(-1)
        if self.even:
            weakest = (optimum.square() * metric.diagonal(dim1=-2, dim2=-1)[:, None]).argmin(-1)
            odd = (minus.sum(-1) % 2).bool()
            bits = torch.where(odd, bits ^ tables.places[weakest], bits)
        indices, _ = self._split(codes)
        indices = self._nearest(pull, metric, indices, bits)
        points = _rows(tables.grid, indices).flatten(-2)
        return self._join(indices, self._flipped(pull, metric, points, bits))

    def _nearest(
        self, pull: torch.Tensor, metric: torch.Tensor, indices: torch.Tensor, bits: torch.Tensor
    ) -> torch.Tensor:
        """Returns the points of least cost for given signs, one point of a unit after the other.

        Args:
            pull: `experts x rows x unit`.
            metric: `experts x unit x unit`.
            indices: `experts x rows x points of a unit`, the present ones.
            bits: `experts x rows`, signs.
        """
        tables = self._tables(pull.device)
        width, n_points = tables.grid.shape[-1], indices.shape[-1]
        chosen: list[torch.Tensor] = []
        for i in range(n_points):
            columns = slice(i * width, (i + 1) * width)
            own = pull[..., columns]
            if n_points > 1:
                other = chosen[0] if i else indices[..., 1]
                place = slice((1 - i) * width, (2 - i) * width)
                levels = _rows(tables.grid, other) * _rows(tables.signs, bits)[..., place]
                own = own - levels @ metric[:, place, columns]
            signs = bits >> i * width & (1 << width) - 1
            pairs = metric[:, tables.first + i * width, tables.second + i * width]
            products = _rows(tables.sign_pairs, signs) * pairs[:, None]
            features = torch.cat([products, own * _rows(tables.point_signs, signs)], -1)
            chosen.append(_least(features, tables.features))
        return torch.stack(chosen, -1)

    def _flipped(
        self, pull: torch.Tensor, metric: torch.Tensor, points: torch.Tensor, bits: torch.Tensor
    ) -> torch.Tensor:
        """Flips the sign, or the two signs, that lower the cost most; none if none does."""
        tables = self._tables(pull.device)
        levels = points * _rows(tables.signs, bits)
        step = -2 * levels
        single = step * (step * metric.diagonal(dim1=-2, dim2=-1)[:, None])
        single = single + 2 * step * (levels @ metric - pull)
        if not self.even:
            change, chosen = single.min(-1)
            return torch.where(change < 0, bits ^ tables.places[chosen], bits)
        cross = 2 * metric
        cross.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        # the flip that goes best with each, and of those pairs the best
        pairs = step[..., :, None] * step[..., None, :] * cross[:, None] + single[..., None, :]
        change, second = pairs.min(-1)
        change, first = (change + single).min(-1)
        flips = tables.places[first] | tables.places[second.gather(-1, first[..., None])[..., 0]]
        return torch.where(change < 0, bits ^ flips, bits)


class _Tables:
    """What a grid's searches look up, on one device.

    Attributes:
        grid: `points x columns`.
        features: `features x points`, products of two columns, then columns times -2.
        signs: `sign bits x columns of a unit`, plus and minus one.
        point_signs: the same for the columns of one point.
        sign_pairs: `sign bits of a point x pairs`, products of two signs, twice for two columns.
        first, second: `(pairs,)`, the columns of each pair.
        places: `(unit,)`, the bit of each column's sign.
    """

    def __init__(self, grid: torch.Tensor, unit: int) -> None:
        device, width = grid.device, grid.shape[-1]
        self.grid = grid
        self.first, self.second = torch.triu_indices(width, width, device=device)
        products = grid[:, self.first] * grid[:, self.second]
        self.features = torch.cat([products, -2 * grid], -1).T.contiguous()
        self.signs = _signs(unit).to(device)
        self.point_signs = _signs(width).to(device)
        twice = torch.where(self.first == self.second, 1.0, 2.0)
        self.sign_pairs = self.point_signs[:, self.first] * self.point_signs[:, self.second] * twice
        self.places = 1 << torch.arange(unit, device=device)


def _signs(n: int) -> torch.Tensor:
    """Returns the signs that each number's bits say, `2^n x n`."""
    return 1.0 - 2.0 * read_bits(torch.arange(1 << n), [*range(n)], 1)


def _rows(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Returns rows of a table, `(..., columns)`; faster than indexing."""
    chosen: torch.Tensor = table.index_select(0, indices.reshape(-1))
    return chosen.reshape(*indices.shape, table.shape[-1])


def _optimum(pull: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Returns levels of least cost if any number were a level, `experts x rows x unit`."""
    scale = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-30
    eye = torch.eye(metric.shape[-1], device=metric.device)
    inverse: torch.Tensor = torch.linalg.inv(metric + 1e-6 * scale * eye)
    return pull @ inverse


def _least(features: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Returns for each row the column of the least product.

    Args:
        features: `(..., features)`.
        table: `features x columns`.
    """
    flat = features.reshape(-1, features.shape[-1])
    limit = _COSTS if features.device.type == "cpu" else _COSTS_ON_DEVICE
    pieces = torch.split(flat, max(1, limit // table.shape[1]))
    return torch.cat([_argmin(piece @ table) for piece in pieces]).view(features.shape[:-1])


def _argmin(costs: torch.Tensor) -> torch.Tensor:
    """Returns the column of each row's minimum: torch finds minima faster than their places."""
    runs = costs.view(len(costs), -1, _RUN)
    run = runs.amin(-1).argmin(-1)
    column = runs[torch.arange(len(costs), device=costs.device), run].argmin(-1)
    return run * _RUN + column


class _IQ2XXS(GridFormat):
    unit, group, even = 8, 32, True
    factors = (0.5 + torch.arange(16)) * 0.25

    def unpack(self, data: torch.Tensor) -> Fields:
        """Reads `d`, then per 32 columns 4 indices and a word of 4 times 7 signs and a scale."""
        blocks = cut(data, 2 + 64)
        pairs = cut(blocks[..., 2:], 8)
        words = read_words(pairs[..., 4:], 4)[..., 0]
        signs = _with_parity(read_bits(words, _SEVENS, 7))
        codes = self._join(pairs[..., :4, None].long(), signs)
        return _fields(blocks[..., :2], words >> 28, codes.flatten(-2))

    def pack(self, fields: Fields) -> torch.Tensor:
        """Writes what `unpack` reads."""
        indices, signs = self._split(cut(fields.codes, 8, 4))
        words = join_bits(signs & 127, _SEVENS) | cut(fields.subscales, 8).long() << 28
        pairs = torch.cat([indices[..., 0].to(torch.uint8), write_words(words[..., None], 4)], -1)
        return _row(write_half(fields.scales), pairs.flatten(-2))


class _IQ2XS(GridFormat):
    unit, group, even = 8, 16, True
    factors = (0.5 + torch.arange(16)) * 0.25

    def unpack(self, data: torch.Tensor) -> Fields:
        """Reads `d`, then words of 9 bits of index and 7 signs, then scales of 4 bits."""
        blocks = cut(data, 2 + 64 + 8)
        words = read_words(blocks[..., 2:66], 2)
        codes = self._join((words & 511)[..., None], _with_parity(words >> 9))
        return _fields(blocks[..., :2], _nibbles(blocks[..., 66:]), codes)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Writes what `unpack` reads."""
        indices, signs = self._split(cut(fields.codes, 32))
        words = write_words(indices[..., 0] | (signs & 127) << 9, 2)
        scales = _bytes_of_nibbles(cut(fields.subscales, 16))
        return _row(write_half(fields.scales), words, scales)


class _IQ2S(GridFormat):
    unit, group, index_bits = 8, 16, 10
    factors = (0.5 + torch.arange(16)) * 0.25

    def unpack(self, data: torch.Tensor) -> Fields:
        """Reads `d`, then lower bytes of indices, signs, 2 upper bits of indices, scales."""
        blocks = cut(data, 2 + 32 + 32 + 8 + 8)
        upper = read_bits(blocks[..., 66:74], [0, 2, 4, 6], 2).flatten(-2)
        indices = blocks[..., 2:34] | upper << 8
        codes = self._join(indices[..., None], blocks[..., 34:66].long())
        return _fields(blocks[..., :2], _nibbles(blocks[..., 74:]), codes)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Writes what `unpack` reads."""
        indices, signs = self._split(cut(fields.codes, 32))
        lower, upper = indices[..., 0] & 255, join_bits(cut(indices[..., 0] >> 8, 4), [0, 2, 4, 6])
        scales = _bytes_of_nibbles(cut(fields.subscales, 16))
        return _row(write_half(fields.scales), lower, signs, upper, scales)


class _IQ3XXS(GridFormat):
    unit, group, even, index_bits = 8, 32, True, 8
    factors = (0.5 + torch.arange(16)) * 0.5

    def unpack(self, data: torch.Tensor) -> Fields:
        """Reads `d`, indices of 4 columns, and words of 4 times 7 signs and a scale."""
        blocks = cut(data, 2 + 64 + 32)
        words = read_words(blocks[..., 66:], 4)
        signs = _with_parity(read_bits(words, _SEVENS, 7)).flatten(-2)
        codes = self._join(cut(blocks[..., 2:66], 2).long(), signs)
        return _fields(blocks[..., :2], words >> 28, codes)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Writes what `unpack` reads."""
        indices, signs = self._split(cut(fields.codes, 32))
        words = join_bits(cut(signs & 127, 4), _SEVENS) | cut(fields.subscales, 8).long() << 28
        return _row(write_half(fields.scales), indices.flatten(-2), write_words(words, 4))


class _IQ3S(GridFormat):
    unit, group = 4, 32
    factors = 1.0 + 2 * torch.arange(16)

    def unpack(self, data: torch.Tensor) -> Fields:
        """Reads `d`, then lower bytes of indices, their upper bits, signs, scales of 4 bits."""
        blocks = cut(data, 2 + 64 + 8 + 32 + 4)
        upper = read_bits(blocks[..., 66:74], [*range(8)], 1).flatten(-2)
        codes = self._join(
            (blocks[..., 2:66] | upper << 8)[..., None], _nibbles(blocks[..., 74:106])
        )
        return _fields(blocks[..., :2], _nibbles(blocks[..., 106:]), codes)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Writes what `unpack` reads."""
        indices, signs = self._split(cut(fields.codes, 64))
        lower, upper = indices[..., 0] & 255, join_bits(cut(indices[..., 0] >> 8, 8), [*range(8)])
        scales = _bytes_of_nibbles(cut(fields.subscales, 8))
        return _row(write_half(fields.scales), lower, upper, _bytes_of_nibbles(signs), scales)


class _Ternary(GridFormat):
    """The IQ1 types: levels -1, 0 and 1 of a grid without signs, and a shift of 1/8 up or down.

    Attributes:
        near: points near a pattern that are tried, with each shift that a code can say.
    """

    near = 24

    unit, index_bits = 8, 12

    def __init__(self, fmt: Format) -> None:
        super().__init__(fmt)
        self._near: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def best(self, pull: torch.Tensor, metric: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Returns the best of the points near the unconstrained optimum, rounded to -1, 0, 1."""
        grid = self._tables(pull.device).grid
        own = ((grid @ metric) * grid).sum(-1)
        indices, points = self._neighbours(pull.device)
        optimum = _optimum(pull, metric)
        places = 3 ** torch.arange(8, device=pull.device)
        costs, chosen = [], []
        for half in range(len(grid) // _POINTS):
            shift = 0.0 if len(grid) == _POINTS else _SHIFT * (1 - 2 * half)
            digits = (optimum - shift).round().clamp(-1, 1).long() + 1
            pattern = (digits * places).sum(-1)
            near = indices.index_select(0, pattern.view(-1)).view(*pattern.shape, -1)
            levels = _rows(points, pattern).view(*near.shape, 8)
            along = (levels * pull[..., None, :]).sum(-1) + shift * pull.sum(-1, keepdim=True)
            near = near + half * _POINTS
            cost = own.gather(1, near.flatten(1)).view_as(near) - 2 * along
            least, place = cost.min(-1)
            costs.append(least)
            chosen.append(near.gather(-1, place[..., None])[..., 0])
        if len(costs) == 1:
            return chosen[0].int()
        return torch.where(costs[0] <= costs[1], chosen[0], chosen[1]).int()

    def _neighbours(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns for each of the 3^8 patterns of -1, 0 and 1 the indices of points near it.

        Returns:
            Indices `patterns x near` and the points, `patterns x 8 near`.
        """
        if device not in self._near:
            patterns = torch.arange(3**8)[:, None] // 3 ** torch.arange(8) % 3 - 1.0
            points = _grid(self.fmt.name)
            distances = patterns.square().sum(-1)[:, None] - 2 * patterns @ points.T
            near = (distances + points.square().sum(-1)).topk(self.near, largest=False).indices
            self._near[device] = near.to(device), points[near].flatten(1).to(device)
        return self._near[device]


class _IQ1S(_Ternary):
    group = 32
    factors = (1.0 + 2 * torch.arange(8)).repeat(2)
    shifts = factors * torch.tensor([_SHIFT] * 8 + [-_SHIFT] * 8)

    def unpack(self, data: torch.Tensor) -> Fields:
        """Reads `d`, lower bytes of indices, and per 32 a word: 4 times 3 bits, scale, shift."""
        blocks = cut(data, 2 + 32 + 16)
        words = read_words(blocks[..., 34:], 2)
        codes = blocks[..., 2:34] | read_bits(words, [0, 3, 6, 9], 3).flatten(-2) << 8
        return _fields(blocks[..., :2], words >> 12, codes)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Writes what `unpack` reads."""
        codes = cut(fields.codes, 32)
        upper = join_bits(cut(codes >> 8, 4), [0, 3, 6, 9])
        words = write_words(upper | cut(fields.subscales, 8).long() << 12, 2)
        return _row(write_half(fields.scales), codes & 255, words)


class _IQ1M(_Ternary):
    group, near = 16, 12
    factors = 1.0 + 2 * torch.arange(8)

    @cached_property
    def grid(self) -> torch.Tensor:
        """All points, shifted up, then all of them shifted down: the shift is part of a code."""
        points = _grid("IQ1_M")
        return torch.cat([points + _SHIFT, points - _SHIFT])

    def unpack(self, data: torch.Tensor) -> Fields:
        """Reads lower bytes of indices, nibbles of 3 upper bits and a shift, and 4 words.

        Each word has 4 scales of 3 bits and, in its upper 4 bits, a part of `d`.
        """
        blocks = cut(data, 32 + 16 + 8)
        words = read_words(blocks[..., 48:], 2)
        d = write_words(join_bits(words >> 12, [0, 4, 8, 12])[..., None], 2)
        codes = blocks[..., :32] | _nibbles(blocks[..., 32:48]) << 8
        return _fields(d, read_bits(words, [0, 3, 6, 9], 3).flatten(-2), codes)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Writes what `unpack` reads."""
        codes = cut(fields.codes, 32)
        d = read_bits(read_words(write_half(fields.scales), 2)[..., 0], [0, 4, 8, 12], 4)
        words = join_bits(cut(fields.subscales, 4, 4), [0, 3, 6, 9]) | d << 12
        return _row(codes & 255, _bytes_of_nibbles(codes >> 8), write_words(words, 2))


GRIDS: dict[str, Callable[[Format], BlockFormat]] = {
    "IQ3_S": _IQ3S,
    "IQ3_XXS": _IQ3XXS,
    "IQ2_S": _IQ2S,
    "IQ2_XS": _IQ2XS,
    "IQ2_XXS": _IQ2XXS,
    "IQ1_M": _IQ1M,
    "IQ1_S": _IQ1S,
}
"""Makes the block format of a type, by name."""
