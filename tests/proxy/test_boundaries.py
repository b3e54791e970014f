"""What is kept of hidden states: by content, the last used, within its bytes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from allocator.proxy.boundaries import Boundaries, Choices
from allocator.proxy.weights import Candidate

STATES = torch.zeros(4, 4)  # 64 bytes


def test_the_last_used_stay_within_the_bytes():
    kept = Boundaries(3 * STATES.nbytes)
    for name in "abc":
        kept.keep(name, [0], STATES)
    assert kept.get("a", [0]) is STATES  # used again
    kept.keep("d", [0], STATES)
    assert [name for name in "abcd" if kept.get(name, [0]) is not None] == ["a", "c", "d"]
    kept.keep("large", [0], torch.zeros(100, 100))
    assert kept.get("large", [0]) is None
    assert kept.get("d", [0]) is STATES


def test_the_deepest_layer_is_of_all_batches():
    kept = Boundaries(1e6)
    before = ["x0", "x1", "x2", "x3"]
    assert kept.deepest(before, [[0], [1]]) == 0
    for layer, batch in ((1, 0), (2, 0), (3, 0), (1, 1), (2, 1)):
        kept.keep(before[layer], [batch], STATES)
    assert kept.deepest(before, [[0]]) == 3
    assert kept.deepest(before, [[0], [1]]) == 2
    assert kept.deepest(before, [[0, 1]]) == 0
    assert kept.deepest(["y0", "y1", "y2", "y3"], [[0]]) == 0


def test_several_threads_keep_count():
    kept = Boundaries(50 * STATES.nbytes)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: kept.keep(str(i % 300), [i], STATES), range(3000)))
    there = sum(kept.get(str(i % 300), [i]) is not None for i in range(3000))
    assert there == 50
    assert kept._held_bytes == 50 * STATES.nbytes


def test_digests_differ_from_the_first_decision_on(layout):
    choices, original = Choices(layout), Candidate.original(layout)
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
