"""Chosen codes against ggml's decoder, float64 sums and brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from allocator.codecs.ggml import GGML
from allocator.finishing import codes
from allocator.finishing.codes import choose, compensated, with_gain
from allocator.formats.ggml import FORMATS

FORMS = {name: GGML.block_format(fmt) for name, fmt in FORMATS.items()}
KNOWN = [name for name, form in FORMS.items() if form is not None]


def problem(name, *, experts=2, rows=6, width=512, seed=0):
    """Weights, ggml's encoding with importance, and second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    mixed = np.eye(width) + rng.normal(size=(width, width)) / width**0.5
    x = rng.normal(size=(experts, 2 * width, width)) * rng.lognormal(size=width) @ mixed
    moments = (x.transpose(0, 2, 1) @ x / (2 * width)).astype(np.float32)
    weights = rng.normal(size=(experts, rows, width)).astype(np.float32)
    importance = np.ascontiguousarray(moments.diagonal(axis1=-2, axis2=-1))
    data = GGML.encode(weights, FORMATS[name], importance)
    return tuple(torch.from_numpy(a) for a in (weights, data, moments))


def exact(name, weights, data, moments):
    """The quadratic of each row of what ggml decodes, in float64."""
    error = weights.double() - torch.from_numpy(GGML.decode(data.numpy(), FORMATS[name]))
    return torch.einsum("eri,eij,erj->er", error, moments.double(), error)


@pytest.mark.parametrize("name", KNOWN)
def test_the_quadratic_is_that_of_what_ggml_decodes(name):
    weights, data, moments = problem(name)
    chosen = choose(weights, data, FORMS[name], moments)
    assert chosen.data.shape == data.shape
    before = exact(name, weights, data, moments).sum(-1)
    after = exact(name, weights, chosen.data, moments).sum(-1)
    torch.testing.assert_close(chosen.before, before, rtol=1e-4, atol=0)
    torch.testing.assert_close(chosen.after, after, rtol=1e-4, atol=0)
    assert (after < 0.85 * before).all()


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rows_get_back_the_gain_that_rounding_took(name, share):
    weights, data, moments = problem(name)
    chosen = choose(weights, data, FORMS[name], moments).data
    scaled = with_gain(weights, chosen, FORMS[name], moments, share)

    def gains(encoded):
        q = GGML.decode(encoded.numpy(), FORMATS[name]).astype(np.float64)
        w, h = weights.numpy().astype(np.float64), moments.numpy().astype(np.float64)
        along = w @ h
        return (along * q).sum(-1) / (along * w).sum(-1)

    before, after = gains(chosen), gains(scaled)
    assert before.mean() < 1 + 1e-4  # the quadratic shrinks rows, unless they are nearly exact
    np.testing.assert_allclose(after, before * (1 + share * (1 / before - 1)), rtol=1e-3)
    if share == 0:
        assert torch.equal(scaled, chosen)


def test_rows_that_point_elsewhere_stay():
    weights, data, moments = problem("Q4_K")
    data = torch.from_numpy(GGML.encode(-weights.numpy(), FORMATS["Q4_K"], None))
    assert torch.equal(with_gain(weights, data, FORMS["Q4_K"], moments, 1.0), data)
    zeros = torch.zeros_like(weights)
    assert torch.equal(with_gain(zeros, data, FORMS["Q4_K"], moments, 1.0), data)


@pytest.mark.parametrize("name", KNOWN)
def test_no_row_loses_more_than_before(name):
    weights, data, moments = problem(name)
    losses = exact(name, weights, data, moments)
    for _ in range(3):
        data = choose(weights, data, FORMS[name], moments, rounds=1).data
        after = exact(name, weights, data, moments)
        assert (after <= losses * (1 + 1e-6)).all()
        losses = after


@pytest.mark.parametrize("name", KNOWN)
def test_with_a_diagonal_it_is_no_worse_than_ggml(name):
    weights, data, moments = problem(name)
    moments = torch.diag_embed(moments.diagonal(dim1=-2, dim2=-1))
    chosen = choose(weights, data, FORMS[name], moments)
    after = exact(name, weights, chosen.data, moments)
    assert (after <= exact(name, weights, data, moments)).all()


@pytest.mark.parametrize("name", KNOWN)
def test_a_row_alone_ends_where_it_does_beside_others(name):
    """Memory of a single row is laid out otherwise; sums differ by rounding alone."""
    weights, data, moments = problem(name, experts=1, rows=2)
    beside = choose(weights, data, FORMS[name], moments).data[:, :1]
    alone = choose(weights[:, :1], data[:, :1], FORMS[name], moments).data
    losses = [exact(name, weights[:, :1], row, moments) for row in (beside, alone)]
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)


def every_code(name):
    """All codes of one unit, `(codes,)`: of a grid, points with all allowed signs."""
    form = FORMS[name]
    if form.unit == 1:
        return torch.arange(len(form.table), dtype=torch.int32)
    n_points = form.unit // form.grid.shape[-1]
    indices = torch.cartesian_prod(*[torch.arange(len(form.grid))] * n_points)
    indices = indices.view(-1, n_points)
    if name.startswith("IQ1"):
        return indices[:, 0].int()
    signs = torch.arange(1 << form.unit)
    if form.even:
        ones = sum(signs >> i & 1 for i in range(form.unit))
        signs = signs[ones % 2 == 0]
    packed = sum(indices[:, i] << form.index_bits * i for i in range(n_points))
    return (packed[:, None] | signs << form.index_bits * n_points).flatten().int()


@pytest.mark.parametrize("name", ["IQ3_S", "IQ2_S", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q4_K", "IQ4_NL"])
def test_one_free_unit_gets_nearly_the_best_of_all_codes(name):
    """Compares with brute force; what a search may miss is seldom and little."""
    form = FORMS[name]
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 40, form.unit)) @ (
        np.eye(form.unit) + 0.1 * rng.normal(size=(form.unit, form.unit))
    )
    metric = torch.from_numpy(x.transpose(0, 2, 1) @ x / 40).float()
    codes = every_code(name)
    levels = form.levels(codes).double()
    target = levels.std() * torch.from_numpy(rng.normal(size=(2, 40, form.unit)))
    pull = (target @ metric.double()).float()
    present = codes[torch.from_numpy(rng.integers(0, len(codes), (2, 40)))]
    chosen = form.levels(form.best(pull, metric, present)).double()
    for expert in range(2):
        m, t = metric[expert].double(), target[expert]
        costs = ((levels @ m) * levels).sum(-1) - 2 * (t @ m) @ levels.T
        own = ((chosen[expert] @ m) * chosen[expert]).sum(-1) - 2 * ((t @ m) * chosen[expert]).sum(
            -1
        )
        constant = ((t @ m) * t).sum(-1)
        ratio = (own + constant) / (costs.min(-1).values + constant)
        assert (ratio > 1 - 1e-3).all()
        assert ratio.mean() < (1.1 if form.unit > 1 else 1.0001), ratio
        assert (ratio < 1.001).float().mean() > 0.6


def test_what_is_fixed_by_zeros_of_the_moments_does_not_matter():
    """A diagonal with one unit of columns: its codes are those of brute force."""
    weights, data, _ = problem("IQ3_S", experts=1, rows=8, width=256)
    form = FORMS["IQ3_S"]
    weight = torch.linspace(1, 2, 4)
    moments = torch.zeros(1, 256, 256)
    moments[0, range(4), range(4)] = weight
    fields = form.unpack(data)
    factor = form.affine(fields)[0][0, :, 0]
    levels = form.levels(every_code("IQ3_S"))
    costs = (factor[:, None, None] * levels - weights[0, :, None, :4]).square() @ weight
    chosen = choose(weights, data, form, moments, rounds=1, ahead=False)
    kept = form.unpack(chosen.data)
    only_codes = form.values(form.pack(replace(fields, codes=kept.codes)))
    unit = (only_codes - weights)[0, :, :4].square() @ weight
    torch.testing.assert_close(unit, costs.min(-1).values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("n_values", [5, 1 << 24])
@pytest.mark.parametrize("unit", [1, 4])
def test_columns_behind_compensate_as_well_as_they_can(unit, n_values, monkeypatch):
    """What a step costs, against the least quadratic over all errors of the columns behind."""
    monkeypatch.setattr(codes, "_VALUES", n_values)  # that are copied at a time
    rng = np.random.default_rng(0)
    root = rng.normal(size=(16, 8))
    moments = root.T @ root
    matrix = compensated(torch.from_numpy(moments)[None], unit)[0].numpy()

    def least(error, stop):
        free = moments[stop:, stop:]
        pull = moments[stop:, :stop] @ error[:stop]
        fixed = error[:stop] @ moments[:stop, :stop] @ error[:stop]
        return fixed - (pull @ np.linalg.solve(free, pull) if free.size else 0)

    for start in range(0, 8, unit):
        columns, stop = slice(start, start + unit), start + unit
        error, step = rng.normal(size=8), np.zeros(8)
        step[columns] = rng.normal(size=unit)
        costs = step @ matrix @ step - 2 * step @ (error @ matrix)
        change = least(error - step, stop) - least(error, stop)
        np.testing.assert_allclose(costs, change, rtol=1e-8)


def test_a_wide_matrix_is_factored_once_for_all_its_rows(monkeypatch):
    weights, data, moments = problem("Q4_K")
    whole = choose(weights, data, FORMS["Q4_K"], moments)
    factored = []

    def watched(h, unit):
        factored.append(h.shape)
        return compensated(h, unit)

    monkeypatch.setattr(codes, "compensated", watched)
    monkeypatch.setattr(codes, "_WEIGHTS", 512)
    monkeypatch.setattr(codes, "_ROWS", 2)  # of six at once
    parted = choose(weights, data, FORMS["Q4_K"], moments)
    assert factored == [(1, 512, 512)] * 2
    torch.testing.assert_close(parted.after, whole.after, rtol=1e-5, atol=0)


def test_moments_that_are_not_positive_compensate_nothing():
    _, _, moments = problem("Q4_K")
    moments[1] = -moments[1]
    matrix = compensated(moments, 4)
    assert matrix[0].any()
    assert not matrix[1].any()


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "Q2_K"])
def test_looking_ahead_ends_lower(name):
    """Not in Q2_K: on these inputs its two bits clip what the columns behind should answer."""
    weights, data, moments = problem(name)
    ahead = choose(weights, data, FORMS[name], moments, rounds=1)
    plain = choose(weights, data, FORMS[name], moments, rounds=1, ahead=False)
    assert (ahead.after.sum() < plain.after.sum()).all()


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS"])
def test_inputs_that_never_came_change_nothing(name):
    weights, data, moments = problem(name)
    moments[0] = 0
    chosen = choose(weights, data, FORMS[name], moments)
    assert torch.equal(chosen.data[0], data[0])
    assert (chosen.data[1] != data[1]).any()
