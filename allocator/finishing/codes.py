"""Chooses the codes of encoded weights anew, against the second moments of their inputs.

In: weights `w`, their encoding, and `H`, the sum of `x x'` over inputs `x` (weighted or not). Out:
bytes of the same format and size whose decoded weights `q` have a lower `(w - q) H (w - q)'`, the
output's squared error over those inputs. Invariant: a move is taken only if that quadratic falls,
and no row ends with a higher one than it began with.

A first pass chooses codes alone, each as if the columns behind it could take any values to answer
its error; a row keeps them if its quadratic falls. The rounds then end in a lower minimum than from
the given codes (arXiv 2210.17323, 2307.13304: error feedback).

A round goes through the columns in order. The codes of a unit of columns are chosen in the metric
of the unit's own block of `H`, everything else fixed; after the last unit of a group its sub-scale
and its minimum, after the last group of a block its scales in closed form, rounded to float16. The
gradient `(w - q) H` is computed anew for every 256 columns and kept up to date among them.

At the least squared error, rounded weights are smaller than the weights: `q H (w - q)' = 0`, so a
row's output is `q x = a w x` and noise, with the gain `a = (w H q') / (w H w') < 1`. Noise of many
rows averages out; the gain is the same error in every expert and layer, and the quadratic does not
see that. `with_gain` gives it back by the scales, at a little more noise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from allocator.codecs.blocks import BlockFormat, Fields, ScalarFormat

_WINDOW = 256
"""Columns among which the gradient is kept up to date; a multiple of every block's columns."""
_WEIGHTS, _WEIGHTS_ON_DEVICE = 1 << 21, 1 << 27
"""Weights whose codes are chosen at once, on a CPU and on other devices."""
_ROWS = 512
"""Rows of wide matrices, of which so many are chosen at once anyway: a column's operations are too
small else."""
_VALUES = 1 << 24
"""Of a matrix that is changed in place, those that are copied at a time."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen.

    Attributes:
        data: `experts x rows x row bytes` uint8.
        before: `(experts,)` the quadratic of the given encoding, float64.
        after: `(experts,)` the quadratic of `data`, float64.
    """

    data: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def choose(
    weights: torch.Tensor,
    data: torch.Tensor,
    block_format: BlockFormat,
    moments: torch.Tensor,
    *,
    rounds: int = 1,
    ahead: bool = True,
) -> Chosen:
    """Chooses codes, sub-scales, minima and scales of encoded matrices.

    Args:
        weights: `experts x rows x in` float32.
        data: `experts x rows x row bytes` uint8, an encoding to start from.
        block_format: of the encoding.
        moments: `experts x in x in` float32, symmetric, not negative.
        rounds: passes over all columns.
        ahead: a pass in front of them chooses codes that later columns compensate.
    """
    chosen = torch.empty_like(data)
    before = torch.zeros(len(data), dtype=torch.float64, device=data.device)
    after = torch.zeros_like(before)
    n_experts, n_rows = _at_once(weights)
    for experts in _slices(len(weights), n_experts):
        h = moments[experts]
        free = compensated(h, block_format.unit) if ahead else None
        for rows in _slices(weights.shape[1], n_rows):
            descent = _Descent(weights[experts, rows], data[experts, rows], block_format, h)
            before[experts] += descent.losses.double().sum(-1)
            if free is not None:
                descent.look_ahead(free)
            for _ in range(rounds):
                descent.round()
            after[experts] += descent.losses.double().sum(-1)
            chosen[experts, rows] = descent.data
        del free  # not in memory beside the next experts'
    return Chosen(chosen, before, after)


def with_gain(
    weights: torch.Tensor,
    data: torch.Tensor,
    block_format: BlockFormat,
    moments: torch.Tensor,
    share: float,
) -> torch.Tensor:
    """Returns encoded matrices whose rows have a share of the gain back that rounding took.

    Args:
        weights: `experts x rows x in` float32.
        data: `experts x rows x row bytes` uint8.
        block_format: of the encoding.
        moments: `experts x in x in` float32, symmetric, not negative.
        share: 0 leaves rows as they are, 1 makes their gain 1. Rows of a gain below one half stay.
    """
    scaled = torch.empty_like(data)
    n_experts, n_rows = _at_once(weights)
    for experts in _slices(len(weights), n_experts):
        for rows in _slices(weights.shape[1], n_rows):
            own, encoded = weights[experts, rows], data[experts, rows]
            along = own @ moments[experts]
            whole = (along * own).sum(-1)
            gained = (along * block_format.values(encoded)).sum(-1)
            lost = torch.where(gained > 0.5 * whole, whole / gained - 1, 0.0)
            fields = block_format.unpack(encoded)
            factors = 1 + share * lost[..., None, None]
            scales = (fields.scales.float() * factors).clamp(-65504, 65504).half()
            scaled[experts, rows] = block_format.pack(replace(fields, scales=scales))
    return scaled


def quadratic(weights: torch.Tensor, values: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Returns `(w - q) H (w - q)'` of each row.

    Args:
        weights: `experts x rows x in`.
        values: decoded weights, in the same shape.
        moments: `experts x in x in`, symmetric; half of each is read.

    Returns:
        `experts x rows`.
    """
    error = weights - values
    losses = torch.zeros_like(error[..., 0])
    for columns in _slices(error.shape[-1], _WINDOW):
        own = error[..., columns]
        product = own @ moments[:, columns, columns]
        if columns.start:
            before = slice(0, columns.start)
            product += 2 * (error[..., before] @ moments[:, before, columns])
        losses += (product * own).sum(-1)
    return losses


def compensated(moments: torch.Tensor, unit: int) -> torch.Tensor:
    """Returns the moments of errors that the columns behind compensate as well as they can.

    With `H = R R'`, `R` upper triangular, an error costs `|e R|^2`. Columns behind a unit answer
    its error, so that of its own columns alone counts: with the diagonal blocks `R_u` of `R`, a
    unit's code is best at the least `|(e R)_u|^2`, whose gradient is `(e R)_u R_u'`.

    Args:
        moments: `experts x in x in`.
        unit: columns that are chosen at once.

    Returns:
        `experts x in x in`: `R` times its diagonal blocks transposed, zeros below these blocks;
        all zeros, which moves nothing, where the moments are not positive.
    """
    # one copy of the moments, changed in place: that of a wide matrix takes more than a gigabyte
    columns = moments.flip(-2, -1)
    experts, width, _ = columns.shape
    root, info = columns.mT, torch.empty(experts, dtype=torch.int32, device=columns.device)
    torch.linalg.cholesky_ex(root, out=(root, info))
    columns.masked_fill_((info != 0)[:, None, None], 0.0)
    for matrix in columns:
        _reverse(matrix.view(-1))  # its rows are the columns of R now
        blocks = matrix.view(width // unit, unit, width // unit, unit).diagonal(dim1=0, dim2=2)
        diagonal = blocks.permute(2, 1, 0).clone()
        units = matrix.view(width // unit, unit, width)
        for some in _slices(len(units), max(1, _VALUES // (unit * width))):
            units[some] = diagonal[some] @ units[some]
    return columns.mT


def _reverse(values: torch.Tensor) -> None:
    """Reverses the order of `(n,)` values in place."""
    n = len(values)
    for first in _slices(n // 2, _VALUES):
        last = slice(n - first.stop, n - first.start)
        moved = values[first].flip(0)
        values[first] = values[last].flip(0)
        values[last] = moved


def _at_once(weights: torch.Tensor) -> tuple[int, int]:
    """Returns experts and rows whose codes are chosen at once."""
    _, rows, width = weights.shape
    limit = _WEIGHTS if weights.device.type == "cpu" else _WEIGHTS_ON_DEVICE
    n_rows = min(rows, max(_ROWS, limit // width))
    return max(1, limit // (width * n_rows)), n_rows


def _slices(n: int, step: int) -> Iterator[slice]:
    """Yields slices of `step` that cover `n`."""
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


class _Descent:
    """Coordinate descent over the fields of some rows.

    Attributes:
        data: `experts x rows x row bytes`, the best so far.
        losses: `experts x rows`, its quadratic.
    """

    def __init__(
        self, weights: torch.Tensor, data: torch.Tensor, form: BlockFormat, moments: torch.Tensor
    ) -> None:
        self._weights, self._form, self._moments = weights, form, moments
        self.data = data
        self.losses = quadratic(weights, form.values(data), moments)
        device = data.device
        self._factors = form.factors.to(device)
        self._shifts = None if form.shifts is None else form.shifts.to(device)
        self._minima = None if form.minima is None else form.minima.to(device)

    def look_ahead(self, moments: torch.Tensor) -> None:
        """Chooses codes as if the codes of all later columns were free; keeps rows that fell.

        Args:
            moments: as `compensated` returns them.
        """
        self._pass(moments, codes_only=True)

    def round(self) -> None:
        """Goes over all columns once; rows whose quadratic did not fall stay as they were."""
        self._pass(self._moments, codes_only=False)

    def _pass(self, moments: torch.Tensor, *, codes_only: bool) -> None:
        """Goes over all columns once, choosing in other moments or in those of the quadratic."""
        self._fields = self._form.unpack(self.data)
        self._levels = self._form.levels(self._fields.codes).flatten(-2)
        self._values = self._form.values(self.data)
        width = self._weights.shape[-1]
        for window in _slices(width, _WINDOW):
            self._window(window, moments, codes_only)
        data = self._form.pack(self._fields)
        losses = quadratic(self._weights, self._form.values(data), self._moments)
        falls = losses < self.losses
        self.data = torch.where(falls[..., None], data, self.data)
        self.losses = torch.where(falls, losses, self.losses)

    def _window(self, window: slice, moments: torch.Tensor, codes_only: bool) -> None:
        """Chooses all fields of a window of columns."""
        form, block = self._form, self._form.fmt.block
        # below the diagonal blocks compensated moments are zeros
        rows = slice(0, window.stop) if codes_only else slice(None)
        error = self._weights[..., rows] - self._values[..., rows]
        self._start = window.start
        self._gradient = error @ moments[:, rows, window]
        self._metric = moments[:, window, window]
        for first in range(window.start, window.stop, block):
            for start in range(first, first + block, form.group):
                part = self._part(slice(start, start + form.group))
                if isinstance(form, ScalarFormat):
                    self._choose_scalars(form, part, checked=not codes_only)
                else:
                    self._choose_codes(part)
                if not codes_only:
                    self._choose_subscales(part)
                self._put_back(part)
            if not codes_only:
                part = self._part(slice(first, first + block))
                self._choose_scales(part)
                self._put_back(part)

    def _part(self, columns: slice) -> "_Part":
        """Copies what moves of some columns of the window need."""
        local = slice(columns.start - self._start, columns.stop - self._start)
        return _Part(
            columns,
            self._metric[:, local, local].contiguous(),
            self._gradient[..., local].contiguous(),
            # moves write into it; of a single row `contiguous` would give no copy
            self._values[..., columns].clone(memory_format=torch.contiguous_format),
        )

    def _put_back(self, part: "_Part") -> None:
        """Takes over the values of some columns, and what they change in the gradient."""
        columns = part.columns
        local = slice(columns.start - self._start, columns.stop - self._start)
        if local.stop - local.start == self._gradient.shape[-1]:
            self._gradient = part.gradient
        else:
            step = part.values - self._values[..., columns]
            self._gradient -= step @ self._metric[:, local]
        self._values[..., columns] = part.values

    def _choose_codes(self, part: "_Part") -> None:
        """Chooses the codes of a group of columns, unit after unit."""
        form, start = self._form, part.columns.start
        factor, offset = self._affine(start // form.group)
        usable = factor.abs() > 1e-30
        inverse = torch.where(usable, 1 / factor, 0.0)[..., None]
        factor, offset = factor[..., None], offset[..., None]
        for first in range(0, form.group, form.unit):
            own, unit = slice(first, first + form.unit), (start + first) // form.unit
            columns = slice(start + first, start + first + form.unit)
            metric, levels = part.metric[:, own, own], self._levels[..., columns]
            pull = torch.baddbmm(part.gradient[..., own] * inverse, levels, metric)
            present = self._fields.codes[..., unit]
            codes = torch.where(usable, form.best(pull, metric, present), present)
            chosen = form.levels(codes)
            moved = part.move(factor * chosen + offset, own)
            self._fields.codes[..., unit] = torch.where(moved, codes, present)
            self._levels[..., columns] = torch.where(moved[..., None], chosen, levels)

    def _choose_scalars(self, form: ScalarFormat, part: "_Part", *, checked: bool) -> None:
        """Chooses the codes of a group of columns, each with a code of its own, in order.

        All of them move at once, or none.
        """
        columns = part.columns
        factor, offset = self._affine(columns.start // form.group)
        usable = factor.abs() > 1e-30
        inverse = torch.where(usable, 1 / factor, 0.0)
        # columns x experts x rows; a copy, because it changes
        gradient = part.gradient.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
        present = self._levels[..., columns].permute(2, 0, 1).contiguous()
        levels = torch.empty_like(present)
        metric = part.metric.permute(1, 2, 0)[..., None].contiguous()  # last: experts x 1
        for i in range(form.group):
            slope = metric[i, i]
            optimum = torch.addcmul(present[i], gradient[i], inverse / slope.clamp_min(1e-30))
            levels[i] = form.nearest_levels(optimum)
            step = (levels[i] - present[i]) * factor
            gradient[i + 1 :].addcmul_(metric[i, i + 1 :], step, value=-1)
        levels = levels.permute(1, 2, 0)
        values = factor[..., None] * levels + offset[..., None]
        moved = part.move(values, checked=checked)[..., None]
        for stored, chosen in ((self._levels, levels), (self._fields.codes, form.codes_of(levels))):
            stored[..., columns] = torch.where(moved, chosen, stored[..., columns])

    def _affine(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what levels of a group are multiplied by, and what is added, per row."""
        one = self._of_group(group)
        factor, shift, minimum = self._form.affine(one)
        offset = torch.zeros_like(factor) if shift is None else shift
        if minimum is not None:
            offset = offset - minimum
        return factor[..., 0], offset[..., 0]

    def _of_group(self, group: int) -> Fields:
        """Returns scales, sub-scales and minima of one group."""
        fields, block = self._fields, group * self._form.group // self._form.fmt.block
        return Fields(
            fields.scales[..., block : block + 1, :],
            fields.subscales[..., group : group + 1],
            None if fields.minima is None else fields.minima[..., group : group + 1],
            fields.codes,
        )

    def _choose_subscales(self, part: "_Part") -> None:
        """Chooses a group's sub-scale, then its minimum, its codes as they are."""
        form, fields, metric = self._form, self._fields, part.metric
        group, block = part.columns.start // form.group, part.columns.start // form.fmt.block
        levels = self._levels[..., part.columns]
        if len(self._factors) > 1:
            factor, _ = self._affine(group)
            scale = fields.scales[..., block, 0].float()[..., None]
            alpha = scale * self._factors - factor[..., None]
            along = levels @ metric
            change = alpha.square() * (along * levels).sum(-1)[..., None]
            change -= 2 * alpha * (levels * part.gradient).sum(-1)[..., None]
            if self._shifts is not None:
                present = scale[..., 0] * self._shifts[fields.subscales[..., group].long()]
                beta = scale * self._shifts - present[..., None]
                change += 2 * alpha * beta * along.sum(-1)[..., None]
                change += beta.square() * metric.sum((-2, -1))[:, None, None]
                change -= 2 * beta * part.gradient.sum(-1)[..., None]
            self._try_group(part, levels, subscales=change.argmin(-1).int())
        if self._minima is not None and len(self._minima) > 1:
            scale = fields.scales[..., block, 1].float()[..., None]
            assert fields.minima is not None
            present = self._minima[fields.minima[..., group].long()]
            beta = -scale * (self._minima - present[..., None])
            change = beta.square() * metric.sum((-2, -1))[:, None, None]
            change = change - 2 * beta * part.gradient.sum(-1)[..., None]
            self._try_group(part, levels, minima=change.argmin(-1).int())

    def _try_group(self, part: "_Part", levels: torch.Tensor, **fields: torch.Tensor) -> None:
        """Takes a group's new sub-scales or minima, `experts x rows`, where the quadratic falls."""
        group = part.columns.start // self._form.group
        one = self._of_group(group)
        one = replace(one, **{name: values[..., None] for name, values in fields.items()})
        factor, shift, minimum = self._form.affine(one)
        values = factor * levels
        if shift is not None:
            values = values + shift
        if minimum is not None:
            values = values - minimum
        moved = part.move(values)
        for name, chosen in fields.items():
            present = getattr(self._fields, name)[..., group]
            present.copy_(torch.where(moved, chosen, present))

    def _choose_scales(self, part: "_Part") -> None:
        """Chooses a block's scales, one after the other: in closed form, rounded to float16."""
        form, fields = self._form, self._fields
        width, n = form.fmt.block, form.fmt.block // form.group
        block = part.columns.start // width
        groups = slice(block * n, (block + 1) * n)
        for which in range(fields.scales.shape[-1]):
            unit = torch.zeros_like(fields.scales[..., block : block + 1, :])
            unit[..., which] = 1
            one = Fields(
                unit,
                fields.subscales[..., groups],
                None if fields.minima is None else fields.minima[..., groups],
                fields.codes[..., block * width // form.unit : (block + 1) * width // form.unit],
            )
            direction = form.parts(one)[which]
            curvature = ((direction @ part.metric) * direction).sum(-1)
            step = (direction * part.gradient).sum(-1) / curvature.clamp_min(1e-30)
            present = fields.scales[..., block, which]
            scale = (present.float() + step).clamp(-65504, 65504).half()
            scales = fields.scales[..., block : block + 1, :].clone()
            scales[..., 0, which] = scale
            parts = form.parts(replace(one, scales=scales))
            values = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            moved = part.move(values)
            present.copy_(torch.where(moved, scale, present))


@dataclass(slots=True)
class _Part:
    """Some columns of the rows, everything else fixed.

    Attributes:
        columns: which.
        metric: their block of the moments, `experts x columns x columns`.
        gradient: `experts x rows x columns`.
        values: `experts x rows x columns`.
    """

    columns: slice
    metric: torch.Tensor
    gradient: torch.Tensor
    values: torch.Tensor

    def move(
        self, values: torch.Tensor, own: slice = slice(None), *, checked: bool = True
    ) -> torch.Tensor:
        """Takes values of its `own` columns where the quadratic falls, `experts x rows` bool."""
        present = self.values[..., own]
        step = values - present
        if checked:
            change = step * (step @ self.metric[:, own, own] - 2 * self.gradient[..., own])
            falls = change.sum(-1) < 0
        else:
            falls = step.any(-1)
        self.values[..., own] = torch.where(falls[..., None], values, present)
        step = step * falls[..., None]
        self.gradient = torch.baddbmm(self.gradient, step, self.metric[:, own], alpha=-1)
        return falls
