"""The streamed pass against the model in memory (itself held against transformers)."""

import numpy as np
import torch

from allocator.checkpoint import tensors as source
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.profiling.statistics import collect, collect_streamed
from allocator.scoring.candidates import Weights
from allocator.scoring.scorer import Scorer
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import StreamedScorer
from allocator.scoring.swap_model import SwapModel

torch.set_num_threads(1)
FIELDS = ("kl", "top1", "overlap", "nll")


def allocation(layout, fmt, *, first=0, used=2, **changes):
    """All groups in one format, experts from `first` on, changed where named."""
    formats = dict.fromkeys(layout.groups, fmt) | changes
    return Allocation.of(
        target=layout.target,
        retained=dict.fromkeys(layout.layers, tuple(range(first, 8))),
        formats=formats,
        experts_used=used,
    )


def scorer(layout, encodings, documents):
    return StreamedScorer(StreamedModel(layout, Weights(layout, lambda: encodings)), documents)


def candidates(layout):
    last = max(layout.layers)
    return [
        allocation(layout, "Q8_0"),
        allocation(layout, "Q4_0", first=2),
        allocation(layout, "Q8_0", **{f"layers.{last}.experts.down": "Q4_0"}),
        allocation(layout, "Q5_0", first=4, used=1),
    ]


def same(a, b, tolerance=1e-6):
    for field in FIELDS:
        np.testing.assert_allclose(getattr(a, field), getattr(b, field), rtol=0, atol=tolerance)


def test_streamed_losses_are_those_of_the_model_in_memory(layout, documents, tmp_path):
    encodings = Encodings(tmp_path / "bank", layout, {})
    in_memory = Scorer(SwapModel(layout, encodings.decoded), documents)
    streamed = scorer(layout, Encodings(tmp_path / "other", layout, {}), documents)
    found = streamed.score_many(candidates(layout))
    for losses, candidate in zip(found, candidates(layout), strict=True):
        same(losses, in_memory.score(candidate))
    later = streamed.score(candidates(layout)[1], 1, 4)  # without the original this time
    same(later, in_memory.score(candidates(layout)[1], 1, 4))


def test_each_matrix_of_a_layer_is_read_once_for_all_candidates(
    layout, documents, tmp_path, monkeypatch
):
    streamed = scorer(layout, Encodings(tmp_path, layout, {}), documents)
    for group in layout.groups.values():
        for name in group.sources:
            layout.inventory.tensor_digest(name)
    reads = []
    read_raw = source.read_raw
    monkeypatch.setattr(source, "read_raw", lambda i, info: reads.append(info) or read_raw(i, info))
    streamed.score_many(candidates(layout))
    searched = [t for t in reads if t.role.is_encoded and t.layer is not None]
    halves = {
        n
        for g in layout.groups.values()
        if len(g.shape) == 3 and not g.role.is_expert
        for n in g.sources
    }
    counts = {t.name: sum(r.name == t.name for r in searched) for t in searched}
    assert counts
    assert all(n == (2 if name in halves else 1) for name, n in counts.items())


def test_what_candidates_share_is_computed_once(layout, documents, tmp_path, monkeypatch):
    a, c = candidates(layout)[0], candidates(layout)[2]  # differ in the last layer only
    streamed = scorer(layout, Encodings(tmp_path, layout, {}), documents)
    streamed.score_many([a])
    runs = []
    run = StreamedModel.run
    monkeypatch.setattr(
        StreamedModel,
        "run",
        lambda self, layer, states: runs.append((layer, len(states))) or run(self, layer, states),
    )
    both = streamed.score_many([a, c, a])
    last = max(layout.layers)
    assert runs == [(x, 1 + (x >= last)) for x in range(layout.inventory.n_layers)]
    np.testing.assert_array_equal(both[0].kl, both[2].kl)
    assert (both[0].kl != both[1].kl).any()


def test_nothing_of_a_layer_stays_in_memory(layout, documents, tmp_path):
    streamed = scorer(layout, Encodings(tmp_path, layout, {}), documents)
    streamed.score_many(candidates(layout))
    model = streamed.model.model
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert all(p.is_meta for n, p in model.named_parameters() if "norm" not in n)


def test_head_and_comparison_in_chunks_give_the_same(layout, documents, tmp_path):
    encodings = Encodings(tmp_path, layout, {})
    whole = scorer(layout, encodings, documents).score_many(candidates(layout))
    rows_bytes = 4 * layout.groups["embedding"].shape[-1] * 100
    model = StreamedModel(layout, Weights(layout, lambda: encodings), rows_bytes=rows_bytes)
    in_pieces = StreamedScorer(model, documents, logits_bytes=4 * 512 * 30)
    pieces = in_pieces.score_many(candidates(layout))
    for a, b in zip(whole, pieces, strict=True):
        same(a, b)


def test_statistics_are_those_of_the_model_in_memory(layout, documents, tmp_path):
    swap = SwapModel(layout, Encodings(tmp_path, layout, {}).decoded)
    whole = collect(swap.model, layout, documents)
    weights = Weights(layout, lambda: Encodings(tmp_path, layout, {}))
    found = collect_streamed(StreamedModel(layout, weights), documents, scratch=tmp_path)
    assert found.counts == whole.counts
    assert found.unreached == whole.unreached
    assert found.importance.keys() == whole.importance.keys()
    for name, values in whole.importance.items():
        np.testing.assert_allclose(found.importance[name], values, rtol=1e-4, err_msg=name)
    for method, layers in whole.saliency.items():
        for layer, values in layers.items():
            np.testing.assert_allclose(found.saliency[method][layer], values, rtol=1e-4)
