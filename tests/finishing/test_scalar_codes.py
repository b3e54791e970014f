"""Types with one code per column: where the descent ends, no other bits of a block are better.

Every alternative is written into the bytes, decoded by ggml and summed in float64.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from allocator.codecs.ggml import GGML
from allocator.codecs.ggml_blocks.scalar import SCALARS
from allocator.finishing.codes import choose
from allocator.formats.ggml import FORMATS

FORMS = {name: make(FORMATS[name]) for name, make in SCALARS.items()}
TOLERANCE = 1e-4  # of the quadratic: float32 sums choose


def one_block(name, *, seed=0):
    """One row of one block, ggml's encoding and second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    width = FORMATS[name].block
    x = rng.normal(size=(2 * width, width)) @ (np.eye(width) + rng.normal(size=(width, width)) / 9)
    moments = (x.T @ x / len(x)).astype(np.float32)
    weights = rng.normal(size=(1, 1, width)).astype(np.float32)
    data = GGML.encode(weights, FORMATS[name], np.ascontiguousarray(moments.diagonal())[None])
    return tuple(torch.from_numpy(array) for array in (weights, data, moments[None]))


def quadratics(name, weights, moments, fields):
    """The quadratic of each of many versions of a row, as ggml decodes it."""
    data = FORMS[name].pack(fields)
    error = weights[0].double() - torch.from_numpy(GGML.decode(data.numpy(), FORMATS[name]))
    return ((error @ moments[0].double()) * error).sum(-1)


def versions(values, choices):
    """Copies of `(1, 1, n)` values, each with one of them replaced by one of the choices."""
    values = values[0]
    n = values.shape[-1]
    copies = values.expand(len(choices) * n, -1).clone()
    place = torch.arange(n).repeat(len(choices))
    copies[torch.arange(len(copies)), place] = choices.repeat_interleave(n).to(values.dtype)
    return copies


@pytest.fixture(scope="module", params=SCALARS)
def settled(request):
    """A block after rounds that changed nothing more, and its quadratic."""
    name = request.param
    weights, data, moments = one_block(name)
    for _ in range(60):
        previous = data
        data = choose(weights, data, FORMS[name], moments, rounds=1, ahead=False).data
        if torch.equal(data, previous):
            break
    assert torch.equal(data, previous)
    fields = FORMS[name].unpack(data)
    return name, weights, moments, fields, quadratics(name, weights, moments, fields).item()


def alternatives(fields, **changed):
    """Fields of many versions of one row, `(versions, ...)`, that differ in one field."""
    n = len(next(iter(changed.values())))
    same = {
        key: None if value is None else value[0].expand(n, *value.shape[2:])
        for key in ("scales", "subscales", "minima", "codes")
        for value in (getattr(fields, key),)
    }
    return replace(fields, **same | changed)


def test_no_other_code_is_better(settled):
    name, weights, moments, fields, best = settled
    codes = versions(fields.codes, torch.arange(len(FORMS[name].table)))
    others = quadratics(name, weights, moments, alternatives(fields, codes=codes))
    assert others.min() >= best * (1 - TOLERANCE)
    assert others.max() > 1.01 * best


def test_no_other_subscale_or_minimum_is_better(settled):
    name, weights, moments, fields, best = settled
    form = FORMS[name]
    for key, n in (
        ("subscales", len(form.factors)),
        ("minima", len([] if form.minima is None else form.minima)),
    ):
        if n > 1:
            changed = {key: versions(getattr(fields, key), torch.arange(n))}
            others = quadratics(name, weights, moments, alternatives(fields, **changed))
            assert others.min() >= best * (1 - TOLERANCE)
            assert others.max() > 1.01 * best


def test_no_other_scale_is_better(settled):
    name, weights, moments, fields, best = settled
    near = fields.scales[0, 0].view(torch.int16).long() + torch.arange(-9, 10)[:, None, None]
    for i in range(fields.scales.shape[-1]):
        scales = fields.scales[0].expand(len(near), 1, -1).clone()
        scales[..., i] = near[..., i].to(torch.int16).view(torch.float16)
        others = quadratics(name, weights, moments, alternatives(fields, scales=scales))
        assert others.min() >= best * (1 - TOLERANCE)
        assert others.max() > best


@pytest.mark.parametrize("name", SCALARS)
def test_the_nearest_level_is_chosen(name):
    form = FORMS[name]
    levels = torch.linspace(-200, 200, 4001, dtype=torch.float64)
    offered = form.table.double()
    if name == "Q8_0":  # -128 is not chosen
        offered = offered[offered > -128]
    least = (levels[:, None] - offered).abs().amin(-1)
    chosen = form.nearest_levels(levels.float())
    torch.testing.assert_close((levels - chosen).abs(), least, rtol=0, atol=1e-4)
    assert torch.equal(form.levels(form.codes_of(chosen))[..., 0], chosen)
