"""The proxy loss against float64 formulas on transformers' own logits, and its bookkeeping."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.scoring.candidates import Candidate
from allocator.scoring.documents import Document
from allocator.scoring.scorer import Scorer, by_domain, mean, perplexity
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF

torch.set_num_threads(1)
LENGTHS = (17, 17, 17, 9, 9, 17, 21, 17)
FIELDS = ("kl", "top1", "overlap", "nll")


@pytest.fixture(scope="module", params=["deepseek", "qwen3_tied"])
def path(request, checkpoints):
    return checkpoints[request.param]


@pytest.fixture(scope="module")
def swap(path, tmp_path_factory):
    layout = GGUF.layout(read_inventory(path))
    return SwapModel(layout, Encodings(tmp_path_factory.mktemp("bank"), layout, {}).decoded)


@pytest.fixture
def documents(make_documents):
    return make_documents(LENGTHS)


def allocation(swap, fmt, n_experts=8, experts_used=2):
    return Allocation.of(
        target="gguf",
        retained=dict.fromkeys(swap.layout.layers, tuple(range(8 - n_experts, 8))),
        formats=dict.fromkeys(swap.layout.groups, fmt),
        experts_used=experts_used,
    )


def same(a, b, tolerance=1e-6):
    for field in FIELDS:
        np.testing.assert_allclose(getattr(a, field), getattr(b, field), rtol=0, atol=tolerance)


def identical(a, b):
    same(a, b, 0)


@torch.inference_mode()
def naive(original, candidate, document):
    """KL, top-1, overlap and nll of one document, alone in its batch, in float64."""
    ids = torch.tensor([document.ids])
    p = original(ids).logits[0].double().log_softmax(-1)
    q = candidate(ids).logits[0].double().log_softmax(-1)
    n = len(document.ids)
    kl = functional.kl_div(q, p, reduction="sum", log_target=True) / n
    top1 = sum(int(p[i].argmax() == q[i].argmax()) for i in range(n)) / n
    overlap = torch.minimum(p.exp(), q.exp()).sum() / n
    nll = functional.cross_entropy(q[:-1], ids[0, 1:])
    return float(kl), top1, float(overlap), float(nll)


def test_every_measure_is_its_formula(path, swap, documents):
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    losses = Scorer(swap, documents).score(allocation(swap, "Q4_0", 5))
    expected = [naive(original, swap.model, d) for d in documents]
    for field, values in zip(FIELDS, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(getattr(losses, field), values, rtol=2e-5, atol=2e-6)
    assert (losses.kl > 1e-2).all()
    assert (losses.top1 < 1).any()


def test_small_losses_are_exact_too(path, swap, documents):
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    losses = Scorer(swap, documents).score(allocation(swap, "Q8_0"))
    expected = [naive(original, swap.model, d)[0] for d in documents]
    assert min(expected) < 0.001
    np.testing.assert_allclose(losses.kl, expected, rtol=1e-3, atol=5e-7)


def test_the_original_loses_nothing(swap, documents):
    scorer = Scorer(swap, documents)
    scorer.score(allocation(swap, "Q4_0"))
    swap.reset()
    losses = scorer.score_installed()
    np.testing.assert_allclose(losses.kl, 0, atol=1e-6)
    np.testing.assert_array_equal(losses.top1, 1)
    np.testing.assert_allclose(losses.overlap, 1, atol=1e-5)


def test_slices_add_up(swap, documents):
    scorer, chosen = Scorer(swap, documents), allocation(swap, "Q4_0", 6)
    parts = scorer.score(chosen, 0, 4) + scorer.score(chosen, 4, 8)
    same(parts, scorer.score(chosen))
    same(scorer.score(chosen, 2, 3) + scorer.score(chosen, 3, 5), scorer.score(chosen, 2, 5))
    assert len(scorer.score(chosen, 3, 3).kl) == 0


def test_batching_does_not_matter(swap, documents):
    chosen = allocation(swap, "Q4_0", 6)
    whole = Scorer(swap, documents).score(chosen)
    same(Scorer(swap, documents, batch_tokens=1).score(chosen), whole)
    same(Scorer(swap, documents, batch_tokens=40).score(chosen), whole)


def test_the_cache_does_not_matter_and_keeps_its_limit(swap, documents):
    chosen, row = allocation(swap, "Q4_0", 6), 512 * 4
    whole = Scorer(swap, documents).score(chosen)
    for size in (0, row * 30, row * 40):
        scorer = Scorer(swap, documents, cache_bytes=size)
        identical(scorer.score(chosen), whole)
        identical(scorer.score(chosen), whole)
        assert scorer.cached_bytes <= size


def test_twice_is_the_same(swap, documents):
    scorer, chosen = Scorer(swap, documents), allocation(swap, "Q5_0", 6)
    first = scorer.score(chosen)
    scorer.score(allocation(swap, "Q4_0", 3, experts_used=1))
    identical(scorer.score(chosen), first)
    identical(Scorer(swap, documents).score(chosen), first)


def test_what_was_asked_before_does_not_matter(swap, documents):
    """A study that goes on after a stop asks in another order and must get the same values."""
    chosen = allocation(swap, "Q4_0", 6)
    whole = Scorer(swap, documents).score(chosen)
    for first in ((0, 1), (0, 2), (3, 6), (7, 8)):
        scorer = Scorer(swap, documents)
        scorer.score(chosen, *first)
        identical(scorer.score(chosen), whole)


def test_two_scorers_share_a_model(swap, documents, make_documents):
    """Search and selection in turn, the second one meeting its documents late."""
    other, chosen = make_documents((13, 13, 19), seed=1), allocation(swap, "Q4_0", 5)
    alone = Scorer(swap, documents).score(chosen), Scorer(swap, other).score(chosen)
    search, selection = Scorer(swap, documents), Scorer(swap, other)
    identical(search.score(chosen, 0, 4), Scorer(swap, documents).score(chosen, 0, 4))
    identical(selection.score_installed(), alone[1])
    identical(search.score_installed(), alone[0])
    identical(search.score_installed(), alone[0])
    search.score(allocation(swap, "Q8_0"))
    identical(selection.score(chosen), alone[1])
    identical(search.score(chosen), alone[0])


def test_installed_is_what_is_scored_when_the_reference_is_missing(swap, documents):
    chosen = allocation(swap, "Q4_0", 5)
    expected = Scorer(swap, documents).score(chosen)
    assert (expected.kl > 1e-2).all()
    identical(Scorer(swap, documents).score_installed(), expected)
    identical(Scorer(swap, documents).score_model(swap.model), expected)


def test_logits_of_another_runtime(swap, documents):
    scorer = Scorer(swap, documents, batch_tokens=1)
    losses = scorer.score(allocation(swap, "Q4_0", 5))
    logits = scorer.candidate_logits(3)
    found = Scorer(swap, documents, batch_tokens=1).score_logits(3, logits.copy())
    np.testing.assert_array_equal(found, [getattr(losses, f)[3] for f in FIELDS])


def test_means_weigh_tokens():
    documents = [Document((0,) * 3, "a"), Document((0,) * 5, "b"), Document((0,) * 2, "a")]
    values = np.array([1.0, 2.0, 4.0])
    assert mean(values, documents) == pytest.approx((3 + 10 + 8) / 10)
    assert by_domain(values, documents) == pytest.approx({"a": 11 / 5, "b": 2})
    assert perplexity(values, documents) == pytest.approx(math.exp((2 + 8 + 4) / 7))


def test_summary_is_of_the_first_documents(swap, documents):
    scorer = Scorer(swap, documents)
    losses = scorer.score(allocation(swap, "Q4_0"), 0, 4)
    summary = scorer.summary(losses)
    weights = np.array(LENGTHS[:4])
    assert summary["loss"] == pytest.approx((losses.kl * weights).sum() / weights.sum())
    assert summary["tokens"] == weights.sum()
    assert set(summary["kl_by_domain"]) == {"d0", "d1"}


def layers_run(swap, scorer, chosen, *span):
    """Losses of a candidate, and how many documents every layer ran."""
    ran = {}
    handles = [
        block.input_layernorm.register_forward_pre_hook(  # a layer that is skipped runs none
            lambda _, args, layer=layer: ran.update({layer: ran.get(layer, 0) + len(args[0])})
        )
        for layer, block in enumerate(swap.model.model.layers)
    ]
    try:
        swap.put(chosen)
        return scorer.score_installed(*span), ran
    finally:
        for handle in handles:
            handle.remove()


def changed(candidate, **formats):
    return replace(candidate, format_of={**candidate.format_of, **formats})


def test_a_candidate_begins_in_the_first_layer_where_it_is_new(swap, documents):
    scorer, n = Scorer(swap, documents), len(documents)
    n_layers = swap.layout.inventory.n_layers
    one = Candidate.of(allocation(swap, "Q8_0"))
    _, ran = layers_run(swap, scorer, one)
    assert ran[0] == 2 * n  # the original's too
    for layer in range(n_layers):
        late = changed(one, **{f"layers.{layer}.attention.o": "Q4_0"})
        found, ran = layers_run(swap, scorer, late)  # and is no better
        assert ran == dict.fromkeys(range(layer, n_layers), n)
        fresh = Scorer(swap, documents, layer_input_bytes=0)
        whole, ran = layers_run(swap, fresh, late)
        assert ran[layer] > n
        identical(found, whole)
        assert (found.kl != scorer.score(allocation(swap, "Q8_0")).kl).any()


@pytest.mark.parametrize(
    "told",
    [{"experts_used": 1}, {"retained_experts": 5}, {"format_of": "embedding"}],
    ids=str,
)
def test_what_is_told_or_retained_begins_where_it_counts(swap, documents, told):
    scorer, one = Scorer(swap, documents), Candidate.of(allocation(swap, "Q8_0"))
    layers_run(swap, scorer, one)
    if "retained_experts" in told:
        last = max(swap.layout.layers)
        told = {"retained_experts": {**one.retained_experts, last: tuple(range(5))}}
    if "format_of" in told:
        told = {"format_of": {**one.format_of, "embedding": "Q4_0"}}
    other = replace(one, **told)
    found, ran = layers_run(swap, scorer, other)
    first = max(swap.layout.layers) if "retained_experts" in told else 0
    assert min(ran) == first
    identical(found, layers_run(swap, Scorer(swap, documents, layer_input_bytes=0), other)[0])


def test_other_batches_are_other_states(swap, documents):
    """The last bit of a sum depends on the batch that it is part of."""
    one = Candidate.of(allocation(swap, "Q8_0"))
    scorer = Scorer(swap, documents, batch_tokens=40)
    layers_run(swap, scorer, one)
    _, ran = layers_run(swap, scorer, one, 0, 1)  # alone, not with the second
    assert min(ran) == 0
    _, ran = layers_run(swap, scorer, one, 0, 1)
    assert min(ran) == swap.layout.inventory.n_layers - 1


def test_a_settings_change_of_the_original_runs_its_own_layers_only(swap, documents):
    scorer = Scorer(swap, documents, from_original=True)
    original = Candidate.original(swap.layout)
    last = swap.layout.inventory.n_layers - 1
    scorer.ensure_reference(len(documents))
    late = changed(original, **{f"layers.{last}.attention.o": "Q4_0"})
    found, ran = layers_run(swap, scorer, late)
    assert ran == {last: len(documents)}
    assert (found.kl > 1e-5).any()


def test_threads_change_nothing(swap, documents):
    """Batches side by side give the very same numbers as one after the other."""
    chosen = allocation(swap, "Q4_0", 6)
    one = Scorer(swap, documents, batch_tokens=40).score(chosen)
    scorer = Scorer(swap, documents, batch_tokens=40, threads=3)
    identical(scorer.score(chosen), one)
    later = Scorer(swap, documents, batch_tokens=40, layer_input_bytes=0)
    last = f"layers.{swap.layout.inventory.n_layers - 1}.attention.o"
    late = changed(Candidate.of(chosen), **{last: "Q8_0"})
    begun, ran = layers_run(swap, scorer, late)
    assert len(ran) == 1
    identical(begun, layers_run(swap, later, late)[0])
