"""The streamed backward pass against autograd through the whole model."""

import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from allocator.codecs.encodings import Encodings
from allocator.families import Role
from allocator.profiling.curvature import measure
from allocator.profiling.streamed_gradient import measure_streamed
from allocator.scoring.candidates import Weights
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.swap_model import SwapModel
from allocator.targets.group_weights import group_weights

torch.set_num_threads(1)


def changes(layout, group):
    """A change of every weight, and the same for one expert."""
    rng = np.random.default_rng(len(group.name))
    weights = group_weights(layout, group)
    return (weights * 0.1 * rng.standard_normal(weights.shape)).astype(np.float32)


def streamed_prices(
    layout, documents, tmp_path, rows_of, *, batch_tokens=40, place=None, stop=10**9
):
    """Price of every group (of every expert) from the rows that `rows_of` names.

    What was priced until the `stop`th is returned.
    """
    prices = {}

    def take(group, expert, curvature):
        if len(prices) == stop:
            raise KeyboardInterrupt
        change = changes(layout, group)
        change = change if expert is None else change[expert]
        rows = rows_of(group, len(change), curvature)
        prices[group.name, expert or 0] = curvature.price_sample(
            group, change[rows], rows, expert or 0
        )

    streamed = StreamedModel(
        layout, Weights(layout, lambda: Encodings(tmp_path / "bank", layout, {}))
    )
    place = place or Path(tempfile.mkdtemp(dir=tmp_path))
    place.mkdir(exist_ok=True)
    with suppress(KeyboardInterrupt):
        measure_streamed(streamed, documents, take, scratch=place, batch_tokens=batch_tokens)
    return prices


def all_rows(group, n, curvature):
    return np.arange(n)


@pytest.mark.parametrize("batch_tokens", [40, 1000])
def test_prices_are_those_of_the_whole_model(layout, documents, tmp_path, batch_tokens):
    found = streamed_prices(layout, documents, tmp_path, all_rows, batch_tokens=batch_tokens)
    swap = SwapModel(layout, Encodings(tmp_path / "bank", layout, {}).decoded)
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


@pytest.mark.parametrize("stop", [0, 1, 9, 25])
def test_a_pass_that_was_stopped_goes_on_where_it_was(
    layout, documents, tmp_path, stop, monkeypatch
):
    whole = streamed_prices(layout, documents, tmp_path, all_rows)
    place = tmp_path / "pass"
    before = streamed_prices(layout, documents, tmp_path, all_rows, place=place, stop=stop)
    assert len(before) == stop
    run, n_layers = [], layout.inventory.n_layers
    plain = StreamedModel.run
    monkeypatch.setattr(
        StreamedModel,
        "run",
        lambda self, layer, *a, **k: (run.append(layer), plain(self, layer, *a, **k)),
    )
    after = streamed_prices(layout, documents, tmp_path, all_rows, place=place)
    assert run == []  # forwards it was through
    assert {**before, **after} == whole
    assert len(before) + len(after) < len(whole) + len(whole) / n_layers + 3


def test_a_forward_pass_that_was_stopped_goes_on(layout, documents, tmp_path, monkeypatch):
    whole = streamed_prices(layout, documents, tmp_path, all_rows)
    place = tmp_path / "pass"
    run, plain = [], StreamedModel.run

    def stopped(self, layer, *args, **options):
        if layer == 1 and run.count(0) == 1 and 1 not in run:
            run.append(1)
            raise KeyboardInterrupt
        run.append(layer)
        plain(self, layer, *args, **options)

    monkeypatch.setattr(StreamedModel, "run", stopped)
    assert streamed_prices(layout, documents, tmp_path, all_rows, place=place) == {}
    assert streamed_prices(layout, documents, tmp_path, all_rows, place=place) == whole
    assert run == [0, 1, *range(1, layout.inventory.n_layers)]
