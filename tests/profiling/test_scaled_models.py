"""Everything that is streamed, on models that scale more than registered families do.

transformers' own code is changed for both, the model in memory and the streamed one: blocks that
scale the sum of their experts by its size; an embedding that is scaled, and logits that are capped.
"""

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoeSparseMoeBlock,
)

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.finishing.kl_gradient import KlGradient
from allocator.profiling.curvature import measure
from allocator.profiling.second_moments import second_moments, second_moments_streamed
from allocator.profiling.statistics import collect, collect_streamed
from allocator.profiling.streamed_gradient import measure_streamed
from allocator.scoring.candidates import Candidate, Weights
from allocator.scoring.experts import use_watcher
from allocator.scoring.scorer import Scorer
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import StreamedScorer
from allocator.scoring.swap_model import SwapModel
from allocator.targets import TARGETS
from allocator.targets.group_weights import group_weights

torch.set_num_threads(1)
BLOCKS = {"deepseek": DeepseekV3MoE, "qwen3": Qwen3MoeSparseMoeBlock}


def scale_blocks(monkeypatch, block):
    usual = block.forward

    def scaled(self, hidden):
        output = usual(self, hidden)
        return 1.5 * output * (output.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    monkeypatch.setattr(block, "forward", scaled)


def scale_ends(monkeypatch):
    whole, inner = Qwen3MoeForCausalLM.forward, Qwen3MoeModel.forward

    def capped(self, **given):
        output = whole(self, **given)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output

    def scaled(self, input_ids=None, inputs_embeds=None, **given):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        return inner(self, inputs_embeds=3 * inputs_embeds, **given)

    monkeypatch.setattr(Qwen3MoeForCausalLM, "forward", capped)
    monkeypatch.setattr(Qwen3MoeModel, "forward", scaled)


@pytest.fixture(params=[*BLOCKS, "qwen3_ends", "qwen3_tied_ends"])
def layout(request, checkpoints, monkeypatch):
    name = request.param.removesuffix("_ends")
    if name == request.param:
        scale_blocks(monkeypatch, BLOCKS[name])
    else:
        scale_ends(monkeypatch)
    return TARGETS["gguf"].layout(read_inventory(checkpoints[name]))


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


def log_probs(swap, document):
    """Of what a model holds now, by its own forward."""
    ids = torch.tensor([document.ids])
    return torch.log_softmax(swap.model(input_ids=ids, use_cache=False).logits[0], -1)


@torch.inference_mode()
def test_losses_in_memory(swap, documents):
    original = [log_probs(swap, document) for document in documents]
    scorer = Scorer(swap, documents)
    losses = scorer.score(allocation(swap.layout, first=3))
    for i, (document, p) in enumerate(zip(documents, original, strict=True)):
        q = log_probs(swap, document)
        assert losses.kl[i] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
        logits = torch.from_numpy(scorer.candidate_logits(i))
        torch.testing.assert_close(torch.log_softmax(logits, -1), q)


def test_gradients_in_memory(swap, documents):
    with torch.inference_mode():
        original = [log_probs(swap, document) for document in documents[:2]]
    swap.put_allocation(allocation(swap.layout, first=3))
    name = "model.layers.1.post_attention_layernorm.weight"
    parameter = dict(swap.model.named_parameters())[name]
    gradient_of = KlGradient(swap, documents, [name])
    loss, gradient = gradient_of.at([0, 1], lambda: parameter.grad.clone())
    for layer in swap.layout.layers:
        use_watcher(swap.model, layer, lambda *_: None)
    parameter.requires_grad_(True)
    expected, n_tokens = 0.0, sum(len(d.ids) for d in documents[:2])
    for p, document in zip(original, documents, strict=False):
        fixed = p.clone()
        expected += (fixed.exp() * (fixed - log_probs(swap, document))).sum() / n_tokens
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    (by_hand,) = torch.autograd.grad(expected, parameter)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-6)
