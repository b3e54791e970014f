"""Tuning: gradients against finite differences, losses against a fresh model, and resuming."""

from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from allocator.checkpoint.reading import read_inventory
from allocator.codecs import codec_of
from allocator.codecs.encodings import Encodings
from allocator.errors import AllocatorError, CalibrationError
from allocator.export.stored import StoredWeights
from allocator.export.tensors import EncodedTensors
from allocator.families import Role
from allocator.finishing import kl_gradient, relative_changes, tuning
from allocator.finishing.kl_gradient import KlGradient
from allocator.finishing.relative_changes import KINDS, NORMS, ROUTERS, SCALES, RelativeChanges
from allocator.finishing.tuning import TuningSettings, steps_of, tune
from allocator.scoring.scorer import Scorer, mean
from allocator.scoring.swap_model import SwapModel
from allocator.targets import TARGETS

torch.set_num_threads(1)
CASES = [("deepseek", "gguf"), ("qwen3_tied", "gguf"), ("qwen3", "safetensors")]


class Source(EncodedTensors):
    """Scales of 3 significant bits, so that a change of 1/64 or 1/128 of one is a float16."""

    def encoded(self, name, part=0):
        fmt, _ = self.allocation.parts(self.layout, name)[part]
        data = super().encoded(name, part)
        scales = codec_of(fmt).scales(data, fmt)
        if scales is None:
            return data
        bits = scales.view(np.uint16) & 0xFF00
        return codec_of(fmt).with_scales(data, fmt, bits.view(np.float16))


SMOOTH = {  # every retained expert is used: no change sends a token elsewhere
    "deepseek": {},
    "qwen3_tied": {"tie_word_embeddings": True},
    "qwen3": {},
}


@pytest.fixture(scope="module")
def case(checkpoints, make_checkpoint, make_documents, allocation_of, tmp_path_factory):
    """`case(name, target)`: what tuning takes; loaded once."""
    made = {}

    def smooth(name):
        kind = name.removesuffix("_tied")
        folder = tmp_path_factory.mktemp("smooth")
        return make_checkpoint(folder, kind, num_experts_per_tok=7, **SMOOTH[name])

    def get(name, target="gguf", *, sparse=True):
        if (name, target, sparse) not in made:
            path = checkpoints[name] if sparse else smooth(name)
            layout = TARGETS[target].layout(read_inventory(path))
            encodings = Encodings(tmp_path_factory.mktemp("bank"), layout, {})
            swap = SwapModel(layout, encodings.decoded)
            source = Source(encodings, allocation_of(layout))
            documents = make_documents([16] * 14 + [9] * 4, seed=3)
            made[name, target, sparse] = SimpleNamespace(
                layout=layout, swap=swap, source=source, encodings=encodings,
                documents=documents, selection=make_documents([16] * 6, seed=4),
                fresh=lambda: SwapModel(layout, encodings.decoded),
            )  # fmt: skip
        return made[name, target, sparse]

    return get


# -- gradients


def loss_at(made, changes, vector):
    weights = changes.weights(vector, sha256(vector.tobytes()).hexdigest())
    scorer = made.scorer
    made.swap.put(weights.candidate)
    return mean(scorer.score_installed().kl, scorer.documents)


def difference(made, changes, vector, direction, step):
    """The central difference along a direction, two of them extrapolated."""

    def slope(h):
        ahead, back = (loss_at(made, changes, vector + s * h * direction) for s in (1, -1))
        return (ahead - back) / (2 * h)

    return (4 * slope(step / 2) - slope(step)) / 3


@pytest.mark.parametrize(("name", "target"), CASES)
def test_gradients_are_finite_differences(case, name, target):
    made = case(name, target, sparse=False)
    documents = made.documents[-2:]
    made.scorer = Scorer(made.swap, documents, layer_input_bytes=0)
    made.scorer.ensure_reference(2)
    changes = RelativeChanges(made.source)
    gradient_of = KlGradient(made.swap, documents, changes.parameters(made.swap.model))
    at = np.zeros(changes.n, np.float32)
    loss = loss_at(made, changes, at)
    found, gradient = gradient_of.at(range(2), lambda: changes.gradient(made.swap.model, at))
    assert found == pytest.approx(loss, rel=1e-5)
    assert gradient.dtype == np.float32
    names = set()
    for tensor, place in changes.places.items():
        names.add(tensor.partition(".Q")[0])
        direction = np.zeros(changes.n, np.float32)
        chosen = place.start + np.argsort(-np.abs(gradient[place]))[:12]
        direction[chosen] = np.sign(gradient[chosen])
        scales = place.start < changes.slices[SCALES].stop
        step = 2**-6 if scales else 2**-9
        expected = difference(made, changes, at, direction, step)
        got = float(gradient @ direction)
        assert got == pytest.approx(expected, rel=0.02, abs=2e-4), tensor
    full = {t.source for t in made.layout.full_precision if t.role is not Role.ROUTER_BIAS}
    assert names == full | {n for n in made.layout.groups if "shared.up" not in n}


def test_no_change_gives_the_bytes_that_came_in(case):
    made = case("deepseek")
    changes = RelativeChanges(made.source)
    tensors = changes.tensors(np.zeros(changes.n, np.float32))
    for name, group in made.layout.groups.items():
        np.testing.assert_array_equal(tensors[name].data, made.source.encoded(group.name))
    for tensor in made.layout.full_precision:
        stored = tensors[tensor.source].data.reshape(-1).view(np.float32)
        np.testing.assert_array_equal(stored, made.source.full_precision(tensor).reshape(-1))


def test_norms_and_routers_are_rounded_to_the_checkpoints_dtype(case):
    made = case("qwen3", "safetensors")  # BF16
    changes = RelativeChanges(made.source, frozenset({NORMS, ROUTERS}))
    vector = np.full(changes.n, 0.01, np.float32)
    tensors = changes.tensors(vector)
    for tensor in made.layout.full_precision:
        before = torch.from_numpy(made.source.full_precision(tensor).copy())
        rms = before.double().square().mean(-1, keepdim=True).sqrt()
        expected = (before + 0.01 * rms).float().bfloat16().float()
        stored = tensors[tensor.source]
        assert stored.format == "BF16"
        bits = np.ascontiguousarray(stored.data).reshape(-1).view(np.uint16).astype(np.uint32) << 16
        after = torch.from_numpy(bits.view(np.float32)).view(before.shape)
        torch.testing.assert_close(after, expected, rtol=2**-7, atol=0)
        assert not torch.equal(after, before)
    for name in made.layout.groups:
        for part in [n for n in tensors if n == name or n.startswith(name + ".Q")]:
            assert tensors[part].data.dtype == np.uint8


def test_gradients_are_nowhere_afterwards(case):
    made = case("deepseek")
    changes = RelativeChanges(made.source, frozenset({ROUTERS}))
    gradient_of = KlGradient(made.swap, made.documents[:2], changes.parameters(made.swap.model))
    made.swap.put(changes.weights(np.zeros(changes.n, np.float32), "start").candidate)

    def arrived():
        return {n for n, p in made.swap.model.named_parameters() if p.grad is not None}

    _, with_gradient = gradient_of.at([0, 1], arrived)
    assert with_gradient == changes.parameters(made.swap.model)
    assert not arrived()
    assert not any(p.requires_grad for p in made.swap.model.parameters())


def test_gradients_that_do_not_fit_are_refused_in_one_line(case, monkeypatch):
    made = case("deepseek")
    changes = RelativeChanges(made.source)
    monkeypatch.setattr(kl_gradient, "free_on", lambda _: 1000)
    with pytest.raises(AllocatorError, match=r"1,000 B of memory are free; finish without") as e:
        KlGradient(made.swap, made.documents, changes.parameters(made.swap.model))
    assert "\n" not in str(e.value)


# -- runs

SETTINGS = TuningSettings(tokens=200, batch_tokens=40, checks=3, rate=0.01)


def tuned(made, settings=SETTINGS, *, swap=None, folder=None):
    selection = Scorer(swap or made.swap, made.selection)
    return tune(made.source, made.documents, selection, settings, folder=folder)


@pytest.mark.parametrize(("name", "target"), CASES)
def test_less_is_lost_and_that_is_what_the_codec_decodes(case, name, target):
    """A model of its own, with what the codec decodes of the bytes, loses what was said."""
    made = case(name, target)
    settings = TuningSettings(tokens=200, batch_tokens=40, checks=3)
    done = tuned(made, settings)
    assert done.after < 0.98 * done.before
    assert done.after == min(check.loss for check in done.checks)
    plain = RelativeChanges(made.source).tensors(
        np.zeros(RelativeChanges(made.source).n, np.float32)
    )
    assert done.tensors.keys() == plain.keys()
    changed = set()
    for tensor, stored in done.tensors.items():
        assert stored.data.nbytes == plain[tensor].data.nbytes
        assert stored.format == plain[tensor].format
        if stored.data.tobytes() != plain[tensor].data.tobytes():
            changed.add(tensor)
    fixed = {n for n in plain if "shared.up" in n or "e_score_correction_bias" in n}
    assert changed == plain.keys() - fixed
    weights = StoredWeights(made.layout, made.source.allocation, done.tensors, done.digest)
    scorer = Scorer(made.fresh(), made.selection)
    assert mean(scorer.score(weights.candidate).kl, made.selection) == done.after
    scorer = Scorer(made.fresh(), made.selection)
    start = StoredWeights(made.layout, made.source.allocation, plain, "plain")
    assert mean(scorer.score(start.candidate).kl, made.selection) == done.before


def test_it_is_never_worse_than_before(case):
    """Steps that are far too large end in the bytes that came in."""
    made = case("qwen3_tied")
    done = tuned(made, TuningSettings(tokens=200, batch_tokens=40, checks=5, rate=0.5))
    losses = [check.loss for check in done.checks]
    assert max(losses) > losses[0]
    assert done.after == min(losses)
    if min(losses) == losses[0]:
        n = RelativeChanges(made.source).n
        plain = RelativeChanges(made.source).tensors(np.zeros(n, np.float32))
        assert done.digest == tuning.tensors_digest(plain)
    rates = [check.rate for check in done.checks[1:]]
    falls = [loss >= min(losses[: i + 1]) for i, loss in enumerate(losses[1:])]
    for i, fell in enumerate(falls[:-1]):
        assert rates[i + 1] == (rates[i] / 2 if fell else rates[i])


@pytest.mark.parametrize("kinds", [(SCALES,), (NORMS,), (ROUTERS,), (NORMS, ROUTERS)])
def test_only_what_was_asked_for_changes(case, kinds):
    made = case("deepseek")
    changes = RelativeChanges(made.source)
    plain = changes.tensors(np.zeros(changes.n, np.float32))
    done = tuned(
        made, TuningSettings(tokens=160, batch_tokens=80, checks=2, rate=0.003, kinds=kinds)
    )
    roles = {t.source: t.role for t in made.layout.full_precision}
    kind_of = {Role.NORM: NORMS, Role.ROUTER: ROUTERS, Role.ROUTER_BIAS: ""}
    for name, stored in done.tensors.items():
        if stored.data.tobytes() != plain[name].data.tobytes():
            assert (kind_of[roles[name]] if name in roles else SCALES) in kinds
    assert done.after < done.before


def test_the_result_depends_on_the_seed_and_on_nothing_else(case):
    made = case("qwen3_tied")
    first, second = tuned(made), tuned(made, swap=made.fresh())
    assert first.digest == second.digest
    assert first.checks == second.checks
    other = tuned(made, TuningSettings(tokens=200, batch_tokens=40, checks=3, rate=0.01, seed=1))
    assert other.digest != first.digest


class Killed(BaseException):
    """Ends a process in place of a signal: nothing may be written after it."""


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_resumes_to_the_same_bytes(case, tmp_path, monkeypatch, seed):
    made = case("qwen3_tied")
    settings = TuningSettings(tokens=240, batch_tokens=32, checks=3, rate=0.02)
    expected = tuned(made, settings)
    rng = np.random.default_rng(seed)
    n_steps, calls = len(steps_of(made.documents, settings)), 0
    kills = sorted(rng.choice(np.arange(1, n_steps + 1), 2, replace=False).tolist())
    gradient = RelativeChanges.gradient

    def counted(self, *args):
        nonlocal calls
        calls += 1
        if kills and calls == kills[0]:
            kills.pop(0)
            calls = 0
            raise Killed
        return gradient(self, *args)

    monkeypatch.setattr(RelativeChanges, "gradient", counted)
    n_killed = 0
    while True:
        try:
            done = tuned(made, settings, swap=made.fresh(), folder=tmp_path)
            break
        except Killed:
            n_killed += 1
    assert n_killed
    assert done.digest == expected.digest
    assert done.checks == expected.checks
    calls = 0
    again = tuned(made, settings, swap=made.fresh(), folder=tmp_path)
    assert calls == 0  # nothing is left to do
    assert again.digest == expected.digest


def test_another_run_does_not_resume_from_it(case, tmp_path, caplog):
    made = case("qwen3_tied")
    tuned(made, folder=tmp_path)
    other = TuningSettings(tokens=200, batch_tokens=40, checks=3, rate=0.02)
    assert tuned(made, other, folder=tmp_path).digest == tuned(made, other).digest


def test_steps_use_each_document_once(make_documents):
    documents = make_documents([16] * 14 + [9] * 4)
    settings = TuningSettings(tokens=10**6, batch_tokens=40)
    steps = steps_of(documents, settings)
    assert sorted(i for step in steps for i in step) == list(range(18))
    assert all(sum(len(documents[i].ids) for i in step) <= 40 for step in steps)
    assert steps == steps_of(documents, settings)
    twice = steps_of(documents, TuningSettings(tokens=10**6, batch_tokens=40, epochs=2))
    assert sorted(i for step in twice for i in step) == sorted([*range(18), *range(18)])
    few = steps_of(documents, TuningSettings(tokens=100, batch_tokens=40))
    assert 80 <= sum(len(documents[i].ids) for step in few for i in step) <= 100


def test_no_documents_are_refused(case):
    made = case("qwen3_tied")
    with pytest.raises(CalibrationError, match="0 selection documents"):
        tune(made.source, made.documents, Scorer(made.swap, ()), SETTINGS)
    with pytest.raises(CalibrationError, match="5 tokens; needed"):
        tuned(made, TuningSettings(tokens=5))


def test_kinds_are_the_ones_that_exist():
    assert relative_changes.KINDS == KINDS == (SCALES, NORMS, ROUTERS)
