"""What is cache of hidden states: by content, of the best candidate, within its bytes."""

import math
from dataclasses import replace

import pytest
import torch

from allocator.scoring.candidates import Candidate
from allocator.scoring.layer_inputs import LayerDecisions, LayerInputCache

SPAN = ((0,), (1, 2))


def entered(layers):
    """64 and 128 bytes a layer, which say where they are from."""
    return {i: {batch: torch.full((len(batch), 16), float(i)) for batch in SPAN} for i in layers}


def before(name, n=4):
    return [f"{name}{i}" for i in range(n)]


def test_the_best_is_cache():
    cache = LayerInputCache(1e6)
    assert cache.first(SPAN, before("x")) == 0
    cache.offer(SPAN, 0.5, before("x"), entered(range(4)))
    cache.offer(SPAN, 0.6, before("worse"), entered(range(4)))
    cache.offer(SPAN, math.nan, before("broken"), entered(range(4)))
    assert cache.first(SPAN, before("x")) == 3
    assert cache.first(SPAN, [*before("x")[:2], "y2", "y3"]) == 1
    assert cache.first(SPAN, before("worse")) == 0
    assert cache.first(SPAN[:1], before("x")) == 0
    cache.offer(SPAN, 0.4, before("better"), entered(range(4)))
    assert cache.first(SPAN, before("x")) == 0
    assert cache.first(SPAN, before("better")) == 3


def test_nothing_broken_is_cache_first():
    cache = LayerInputCache(1e6)
    cache.offer(SPAN, math.nan, before("broken"), entered(range(4)))
    cache.offer(SPAN, math.inf, before("broken"), entered(range(4)))
    assert cache.first(SPAN, before("broken")) == 0


def test_a_better_one_that_began_later_keeps_what_it_began_with():
    cache = LayerInputCache(1e6)
    first, later = entered(range(4)), entered([2, 3])
    cache.offer(SPAN, 0.5, before("x"), first)
    child = [*before("x")[:3], "y3"]
    assert cache.first(SPAN, child) == 2
    cache.offer(SPAN, 0.4, child, later)
    assert cache.first(SPAN, child) == 3
    assert cache.inputs(SPAN, 1) is first[1]
    assert cache.inputs(SPAN, 3) is later[3]


@pytest.mark.parametrize(
    ("layers", "left"), [(4, [0, 1, 2, 3]), (3, [0, 2]), (2, [0, 2]), (1, [0])]
)
def test_where_all_layers_are_too_many_some_are_cache(layers, left):
    cache = LayerInputCache(layers * 192)
    cache.offer(SPAN, 0.5, before("x"), entered(range(4)))
    found = [i for i in range(4) if cache.first(SPAN, [*before("x")[: i + 1], *"yyyy"][:4]) == i]
    assert found == left


def test_bytes_are_of_all_spans():
    other = ((7,),)
    cache = LayerInputCache(4 * 192 + 64)
    cache.offer(SPAN, 0.5, before("x"), entered(range(4)))
    cache.offer(other, 0.5, before("x"), {i: {(7,): torch.zeros(1, 16)} for i in range(4)})
    assert cache.first(SPAN, before("x")) == 3
    assert cache.first(other, before("x")) == 0  # the first layer alone is cache


def test_digests_differ_from_the_first_decision_on(layout):
    choices, original = LayerDecisions(layout), Candidate.original(layout)
    n_layers = layout.inventory.n_layers
    before = choices.before(original)
    assert len(set(before)) == len(before) == n_layers

    def alike(other):
        pairs = zip(before, choices.before(other), strict=True)
        return [a == b for a, b in pairs]

    for name, group in layout.groups.items():
        other = replace(original, format_of={**original.format_of, name: "Q4_0"})
        last = n_layers if group.layer is None else group.layer  # of a head, no layer knows
        first = -1 if name == "embedding" else last
        assert alike(other) == [layer <= first for layer in range(n_layers)], name
    told = replace(original, kv_format="q8_0")
    assert alike(told) == [True, *[False] * (n_layers - 1)]
