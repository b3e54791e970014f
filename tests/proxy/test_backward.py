"""The streamed backward pass against autograd through the whole model."""

import numpy as np
import pytest
import torch

from allocator.codecs.bank import Bank
from allocator.codecs.source import group_weights
from allocator.families import Role
from allocator.proxy.backward import measure_streamed
from allocator.proxy.curvature import measure
from allocator.proxy.model import SwapModel
from allocator.proxy.stream import StreamedModel, Weights

torch.set_num_threads(1)


def changes(layout, group):
    """A change of every weight, and the same for one expert."""
    rng = np.random.default_rng(len(group.name))
    weights = group_weights(layout, group)
    return (weights * 0.1 * rng.standard_normal(weights.shape)).astype(np.float32)


def streamed_prices(layout, documents, tmp_path, rows_of, *, batch_tokens=40):
    """Price of every group (of every expert) from the rows that `rows_of` names."""
    prices = {}

    def take(group, expert, curvature):
        change = changes(layout, group)
        change = change if expert is None else change[expert]
        rows = rows_of(group, len(change), curvature)
        prices[group.name, expert or 0] = curvature.price_sample(
            group, change[rows], rows, expert or 0
        )

    streamed = StreamedModel(layout, Weights(layout, lambda: Bank(tmp_path / "bank", layout, {})))
    measure_streamed(streamed, documents, take, scratch=tmp_path, batch_tokens=batch_tokens)
    return prices


def all_rows(group, n, curvature):
    return np.arange(n)


@pytest.mark.parametrize("batch_tokens", [40, 1000])
def test_prices_are_those_of_the_whole_model(layout, documents, tmp_path, batch_tokens):
    found = streamed_prices(layout, documents, tmp_path, all_rows, batch_tokens=batch_tokens)
    swap = SwapModel(layout, Bank(tmp_path / "bank", layout, {}).decoded)
    whole = measure(swap, documents, batch_tokens=batch_tokens)
    n_experts = layout.inventory.n_experts
    compared = 0
    for group in layout.groups.values():
        experts = range(n_experts) if group.role.is_expert else ()
        wanted = whole.price(group, changes(layout, group), experts)
        for i, value in enumerate(wanted):
            assert found.get((group.name, i), 0.0) == pytest.approx(value, rel=2e-3, abs=1e-12)
            compared += value > 0
    assert compared > len(layout.groups)
    assert list(tmp_path.iterdir()) == [tmp_path / "bank"]  # the states are gone


def test_some_rows_stand_for_all(layout, documents, tmp_path):
    rng = np.random.default_rng(0)

    def sample(group, n, curvature):
        rows = np.sort(rng.permutation(n)[: max(1, n // 2)])
        if group.role is Role.EMBEDDING:
            rows = np.union1d(rows, curvature.looked_up)
        return rows

    whole = streamed_prices(layout, documents, tmp_path, all_rows)
    some = streamed_prices(layout, documents, tmp_path, sample)
    assert some.keys() == whole.keys()
    logs = [np.log(some[k] / v) for k, v in whole.items() if v > 0]
    assert abs(np.mean(logs)) < 0.05
    assert 0 < np.std(logs) < 0.4
