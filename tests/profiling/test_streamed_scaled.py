"""Everything that is streamed, on layers that scale the sum of their experts by its size.

No registered family does; so transformers' own block is changed for both, the model in memory and
the streamed one.
"""

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from allocator.checkpoint.inventory import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.profiling.curvature import measure
from allocator.profiling.second_moments import second_moments, second_moments_streamed
from allocator.profiling.statistics import collect, collect_streamed
from allocator.profiling.streamed_gradient import measure_streamed
from allocator.scoring.candidates import Candidate, Weights
from allocator.scoring.scorer import Scorer
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import StreamedScorer
from allocator.scoring.swap_model import SwapModel
from allocator.targets import TARGETS
from allocator.targets.group_weights import group_weights

torch.set_num_threads(1)
BLOCKS = {"deepseek": DeepseekV3MoE, "qwen3": Qwen3MoeSparseMoeBlock}


@pytest.fixture(params=BLOCKS)
def layout(request, checkpoints, monkeypatch):
    block = BLOCKS[request.param]
    usual = block.forward

    def scaled(self, hidden):
        output = usual(self, hidden)
        return 1.5 * output * (output.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    monkeypatch.setattr(block, "forward", scaled)
    return TARGETS["gguf"].layout(read_inventory(checkpoints[request.param]))


@pytest.fixture
def encodings(layout, tmp_path):
    return Encodings(tmp_path / "bank", layout, {})


@pytest.fixture
def swap(layout, encodings):
    return SwapModel(layout, encodings.decoded)


@pytest.fixture
def streamed(layout, encodings):
    return StreamedModel(layout, Weights(layout, lambda: encodings))


def allocation(layout, first=0, **changes):
    formats = dict.fromkeys(layout.groups, "Q8_0") | changes
    retained = dict.fromkeys(layout.layers, tuple(range(first, 8)))
    return Allocation.of(target=layout.target, retained=retained, formats=formats, experts_used=2)


def test_losses(swap, streamed, documents):
    layout = swap.layout
    candidates = [
        allocation(layout),
        allocation(layout, first=3),
        allocation(layout, **{f"layers.{max(layout.layers)}.attention.o": "Q4_0"}),
    ]
    in_memory = Scorer(swap, documents)
    scorer = StreamedScorer(streamed, documents)
    for losses, candidate in zip(scorer.score_many(candidates), candidates, strict=True):
        for field in ("kl", "top1", "overlap", "nll"):
            np.testing.assert_allclose(
                getattr(losses, field), getattr(in_memory.score(candidate), field), atol=1e-6
            )


def test_statistics(swap, streamed, documents, tmp_path):
    expected = collect(swap.model, swap.layout, documents)
    found = collect_streamed(streamed, documents, scratch=tmp_path)
    assert found.counts == expected.counts
    for name, values in expected.importance.items():
        np.testing.assert_allclose(found.importance[name], values, rtol=1e-4)
    for method, by_layer in expected.saliency.items():
        for layer, values in by_layer.items():
            np.testing.assert_allclose(found.saliency[method][layer], values, rtol=1e-4, atol=1e-6)


def test_prices(swap, streamed, documents, tmp_path):
    layout, found = swap.layout, {}

    def change_of(group, expert=None):
        rng = np.random.default_rng(len(group.name))
        weights = group_weights(layout, group)
        change = (0.1 * weights * rng.standard_normal(weights.shape)).astype(np.float32)
        return change if expert is None else change[expert]

    def take(group, expert, curvature):
        change = change_of(group, expert)
        rows = np.arange(len(change))
        price = curvature.price_sample(group, change, rows, expert or 0)
        found[group.name, expert or 0] = price

    measure_streamed(streamed, documents, take, scratch=tmp_path, batch_tokens=40)
    expected = measure(swap, documents, batch_tokens=40)
    for group in layout.groups.values():
        experts = range(8) if group.role.is_expert else ()
        for expert, price in enumerate(expected.price(group, change_of(group), experts)):
            assert found.get((group.name, expert), 0.0) == pytest.approx(price, rel=2e-3, abs=1e-9)


def test_second_moments(swap, streamed, documents, tmp_path):
    layout = swap.layout
    candidate = Candidate.of(allocation(layout, first=3))
    swap.put(candidate)
    groups = [group for group in layout.groups.values() if group.importance]
    expected = {g.name: h for g, h in second_moments(swap, documents, groups, fisher=False)}
    for group, places, h in second_moments_streamed(
        streamed, documents, groups, candidate, scratch=tmp_path
    ):
        values = expected[group.name][list(places)] if places else expected[group.name]
        torch.testing.assert_close(h, values, rtol=1e-4, atol=1e-5)
