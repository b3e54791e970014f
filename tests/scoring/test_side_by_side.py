"""Work side by side: in order, never waiting for ever, with the sums of one after the other."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from allocator.checkpoint.reading import read_inventory
from allocator.finishing.kl_gradient import KlGradient
from allocator.profiling.curvature import measure
from allocator.profiling.products import Calls, run_backward
from allocator.profiling.second_moments import second_moments
from allocator.profiling.statistics import collect
from allocator.scoring.experts import use_sorted_experts, use_watcher
from allocator.scoring.scorer import Scorer
from allocator.scoring.side_by_side import affordable_threads, side_by_side
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF

LENGTHS = (17, 17, 9, 21, 21, 21, 12, 12, 17, 17)


@pytest.fixture(autouse=True)
def one_thread():
    """Operations have one thread, as those of passes side by side, whatever tests ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["deepseek", "qwen3"])
def the(request, checkpoints, make_documents):
    layout = GGUF.layout(read_inventory(checkpoints[request.param]))
    swap = SwapModel(layout, lambda *_: pytest.fail("nothing is encoded"))
    return SimpleNamespace(swap=swap, layout=layout, documents=make_documents(LENGTHS))


def test_results_are_in_order_whatever_ends_first():
    second = threading.Event()

    def work(item):
        if item == 0:
            assert second.wait(60)  # the first ends after the second
        if item == 1:
            second.set()
        return item

    assert list(side_by_side(work, range(7), 2)) == list(range(7))


def test_few_results_wait():
    begun = []
    results = side_by_side(begun.append, range(50), 3)
    next(results)
    assert len(begun) <= 1 + 4
    results.close()
    assert len(begun) <= 1 + 4


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("fails_at", ["forward", "calls"])
def test_what_fails_ends_it(the, threads, fails_at):
    runs = []

    def fail(*_):
        runs.append(threading.current_thread())
        if len(runs) == 2:
            raise ValueError("out of tune")

    model = the.swap.model
    for layer in the.layout.layers:
        use_watcher(model, layer, lambda *_: None)
    failing = model.model.norm.register_forward_hook(fail) if fails_at == "forward" else None
    each = fail if fails_at == "calls" else lambda *_: None
    try:
        with pytest.raises(ValueError, match="out of tune"):
            run_backward(
                model, the.documents, Calls(), each, seed=0, batch_tokens=20, threads=threads
            )
    finally:
        use_sorted_experts(model, the.layout.layers)
        if failing is not None:
            failing.remove()


def test_as_many_run_as_memory_allows(the, monkeypatch):
    from allocator.scoring import side_by_side as module

    monkeypatch.setattr(module, "free_memory", lambda: 1000)
    model = the.swap.model
    assert [affordable_threads(model, 4, n) for n in (0, 50, 100, 200, 10_000)] == [4, 4, 4, 1, 1]


def test_statistics(the):
    alone, together = (
        collect(the.swap.model, the.layout, the.documents, batch_tokens=40, threads=n)
        for n in (1, 3)
    )
    assert alone.saliency == together.saliency
    assert alone.counts == together.counts
    for name, vector in alone.importance.items():
        np.testing.assert_array_equal(vector, together.importance[name])


def test_curvature_and_slope(the):
    scorer = Scorer(the.swap, the.documents)
    scorer.ensure_reference(len(the.documents))
    the.swap.reset()
    alone, together = (
        measure(the.swap, the.documents, reference=scorer.reference, batch_tokens=20, threads=n)
        for n in (1, 3)
    )
    rng = np.random.default_rng(0)
    for group in the.layout.groups.values():
        change = rng.standard_normal(group.shape, np.float32)
        experts = range(len(change)) if group.role.is_expert else ()
        assert alone.price(group, change, experts) == together.price(group, change, experts)
        assert alone.slope(group, change) == together.slope(group, change)


def test_second_moments(the):
    groups = list(the.layout.groups.values())
    alone, together = (
        {g.name: h for g, h in second_moments(
            the.swap, the.documents, groups, batch_tokens=20, threads=n
        )}
        for n in (1, 3)
    )  # fmt: skip
    for name, moments in alone.items():
        assert torch.equal(moments, together[name]), name


def test_gradients(the):
    names = [name for name, _ in the.swap.model.named_parameters()]
    gradients = []
    for n in (1, 3):
        gradient_of = KlGradient(the.swap, the.documents, names, threads=n)
        the.swap.reset()
        the.swap.model.model.norm.weight.mul_(1.1)
        loss, arrived = gradient_of.at(
            range(len(the.documents)),
            lambda: {k: p.grad.clone() for k, p in the.swap.model.named_parameters()},
        )
        the.swap.model.model.norm.weight.div_(1.1)
        gradients.append((loss, arrived))
    (loss, alone), (same_loss, together) = gradients
    assert loss == same_loss > 0
    assert all(torch.equal(alone[name], together[name]) for name in names)
