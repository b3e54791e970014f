"""Chosen codes against ggml's decoder, float64 sums and brute force."""

import numpy as np
import pytest
import torch

from allocator.codecs.ggml import GGML
from allocator.finishing.codes import choose
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
