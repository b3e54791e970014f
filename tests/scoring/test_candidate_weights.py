"""Weights that a candidate brings along: norms, routers and codes of its own, and back again."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from allocator.checkpoint.tensors import read_tensor
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.families import Role
from allocator.scoring.candidates import Candidate, Weights, retained_rows, rows_of
from allocator.scoring.scorer import Scorer
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import StreamedScorer
from allocator.scoring.swap_model import SwapModel

torch.set_num_threads(1)


class Changed:
    """The encodings' weights, and the checkpoint's norms and routers, but for some of them.

    Args:
        encodings: what everything else is of.
        digest: of the weights.
        full_precision: new values of whole tensors, by checkpoint name.
        groups: factors of decoded values, by group.
    """

    def __init__(self, encodings, digest, *, full_precision=None, groups=None):
        self.digest = digest
        self._encodings = encodings
        self._tensors, self._factors = full_precision or {}, groups or {}
        self.has, self.put = encodings.has, encodings.put
        self.encoded, self.release = encodings.encoded, encodings.release

    def decoded(self, name, fmt, experts=None):
        return self._encodings.decoded(name, fmt, experts) * np.float32(self._factors.get(name, 1))

    def full_precision(self, tensor, experts):
        whole = self._tensors.get(tensor.source)
        if whole is None:
            whole = read_tensor(self._encodings.layout.inventory, tensor.source)
        return rows_of(whole, experts)


def allocation(layout, first=2, fmt="Q8_0"):
    retained = dict.fromkeys(layout.layers, tuple(range(first, 8)))
    formats = dict.fromkeys(layout.groups, fmt)
    return Allocation.of(target=layout.target, retained=retained, formats=formats, experts_used=2)


def of_role(layout, role, layer=None):
    return next(t for t in layout.full_precision if (t.role, t.layer) == (role, layer))


def changes(layout):
    """A norm of a layer, the last norm, and the row of expert 5 in a router; each by itself."""
    layer = max(layout.layers)
    tensors = {
        "a norm": of_role(layout, Role.NORM, layer),
        "the last norm": of_role(layout, Role.NORM),
        "a router row": of_role(layout, Role.ROUTER, layer),
    }
    changed = {}
    for what, tensor in tensors.items():
        values = read_tensor(layout.inventory, tensor.source).copy()
        rows = values[5:6] if what == "a router row" else values
        rows *= np.float32(1.25)
        changed[what] = {tensor.source: values}
    return changed


@pytest.fixture(params=["in memory", "streamed"])
def scorer(request, layout, documents, tmp_path):
    encodings = Encodings(tmp_path / "bank", layout, {})
    if request.param == "in memory":
        made = Scorer(SwapModel(layout, encodings.decoded), documents)
    else:
        made = StreamedScorer(StreamedModel(layout, Weights(layout, lambda: encodings)), documents)
    made.encodings = encodings
    return made


def losses(scorer, candidate):
    return scorer.score(candidate).kl


def test_norms_and_router_rows_are_put_in_and_back(scorer, layout):
    plain, pruned = allocation(layout, 0), allocation(layout, 2)
    before = losses(scorer, plain), losses(scorer, pruned)
    for what, tensors in changes(layout).items():
        own = Changed(scorer.encodings, what, full_precision=tensors)
        for known, chosen in zip(before, (plain, pruned), strict=True):
            changed = losses(scorer, Candidate.of(chosen, own))
            assert (changed != known).any(), what
            np.testing.assert_array_equal(losses(scorer, chosen), known)
            np.testing.assert_array_equal(losses(scorer, Candidate.of(chosen, own)), changed)
    original = scorer.score_original()
    assert not original.kl.any()
    np.testing.assert_array_equal(losses(scorer, plain), before[0])


def test_a_removed_experts_row_changes_nothing(scorer, layout):
    tensors = changes(layout)["a router row"]
    chosen = allocation(layout, 6)
    own = Changed(scorer.encodings, "removed", full_precision=tensors)
    np.testing.assert_array_equal(losses(scorer, Candidate.of(chosen, own)), losses(scorer, chosen))


@pytest.mark.parametrize("name", ["layers.1.experts.down", "layers.1.attention.o"])
def test_groups_have_the_values_that_are_brought_along(scorer, layout, name):
    chosen = allocation(layout)
    before = losses(scorer, chosen)
    same, other = (Changed(scorer.encodings, str(by), groups={name: by}) for by in (1, 1.25))
    assert name in layout.groups
    np.testing.assert_array_equal(losses(scorer, Candidate.of(chosen, same)), before)
    changed = losses(scorer, Candidate.of(chosen, other))
    assert (changed != before).any()
    np.testing.assert_array_equal(losses(scorer, chosen), before)
    np.testing.assert_array_equal(losses(scorer, Candidate.of(chosen, other)), changed)


def test_where_the_original_stays_no_weights_are_asked(scorer, layout):
    groups = dict.fromkeys(layout.groups, 2)
    own = Changed(scorer.encodings, "doubled", groups=groups)
    assert not losses(scorer, replace(Candidate.original(layout), weights=own)).any()


def test_both_models_compute_the_same(layout, documents, tmp_path):
    encodings = Encodings(tmp_path, layout, {})
    tensors = {name: x for by_name in changes(layout).values() for name, x in by_name.items()}
    own = Changed(encodings, "all", full_precision=tensors, groups={"layers.1.experts.down": 1.25})
    candidate = Candidate.of(allocation(layout), own)
    in_memory = Scorer(SwapModel(layout, encodings.decoded), documents)
    model = StreamedModel(layout, Weights(layout, lambda: encodings))
    found = StreamedScorer(model, documents).score_many([candidate, allocation(layout)])
    for losses, which in zip(found, (candidate, allocation(layout)), strict=True):
        np.testing.assert_allclose(losses.kl, in_memory.score(which).kl, rtol=0, atol=1e-6)


def test_a_model_holds_what_was_brought_along_while_it_is_the_original(layout, tmp_path):
    encodings = Encodings(tmp_path, layout, {})
    swap = SwapModel(layout, encodings.decoded)
    tensors = changes(layout)["a norm"]
    ((name, values),) = tensors.items()
    own = Changed(encodings, "a norm", full_precision=tensors)
    parameter = dict(swap.model.named_parameters())[name]
    original = parameter.clone()
    swap.put(Candidate.of(allocation(layout), own))
    assert swap.candidate.weights is own
    assert torch.equal(parameter, torch.from_numpy(values))
    with swap.original():
        assert torch.equal(parameter, original)
        assert swap.candidate.weights is None
    assert torch.equal(parameter, torch.from_numpy(values))


def test_weights_that_fail_half_way_are_put_again(layout, tmp_path):
    encodings = Encodings(tmp_path, layout, {})
    swap = SwapModel(layout, encodings.decoded)
    tensors = changes(layout)["the last norm"]
    own = Changed(encodings, "once", full_precision=tensors)
    answer = own.full_precision

    def failing(tensor, experts):
        if tensor.role.has_row_per_expert:
            raise OSError("the disk is gone")
        return answer(tensor, experts)

    before = {name: x.clone() for name, x in swap.model.named_parameters()}
    own.full_precision = failing
    with pytest.raises(OSError, match="gone"):
        swap.put(Candidate.of(allocation(layout, 0), own))
    swap.reset()
    assert all(torch.equal(x, before[name]) for name, x in swap.model.named_parameters())


def test_rows_are_those_of_retained_experts(layout):
    layer = max(layout.layers)
    retained = dict.fromkeys(layout.layers, (1, 4))
    assert retained_rows(of_role(layout, Role.ROUTER, layer), retained) == (1, 4)
    assert retained_rows(of_role(layout, Role.NORM, layer), retained) is None


def test_experts_of_a_layer_are_counted_on_the_screen(layout, tmp_path, every_step):
    encodings = Encodings(tmp_path / "bank", layout, {})
    weights = Weights(layout, lambda: encodings)
    layer = max(layout.layers)
    groups = [g for g in layout.groups.values() if g.layer == layer and g.role.is_expert]
    original = Candidate.original(layout)
    assert list(weights.in_turn([3, 5, 6], groups, [original])) == [3, 5, 6]
    assert f"layer {layer}: 1/3 experts" in every_step.getvalue()
