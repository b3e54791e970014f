"""Tuning layer by layer: gradients against the model in memory, kills, and what is gained."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from allocator.codecs.encodings import Encodings
from allocator.export.stored import StoredWeights
from allocator.export.tensors import EncodedTensors
from allocator.finishing import streamed_tuning
from allocator.finishing.kl_gradient import KlGradient
from allocator.finishing.layer_gradient import head_gradient, layer_gradient
from allocator.finishing.relative_changes import KINDS, NORMS, RelativeChanges
from allocator.finishing.streamed_tuning import long_steps, tune_streamed
from allocator.finishing.tuning import TuningSettings
from allocator.scoring.candidates import Weights
from allocator.scoring.scorer import Scorer, mean
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import StreamedScorer
from allocator.scoring.swap_model import SwapModel

torch.set_num_threads(1)


@pytest.fixture
def case(layout, allocation_of, tmp_path):
    """An allocation's plain tensors, and models: streamed, and in memory."""
    encodings = Encodings(tmp_path / "bank", layout, {})
    folder = tmp_path / "pass"
    folder.mkdir()
    return SimpleNamespace(
        layout=layout,
        folder=folder,
        source=EncodedTensors(encodings, allocation_of(layout)),
        streamed=StreamedModel(layout, Weights(layout, lambda: encodings)),
        swap=lambda: SwapModel(layout, encodings.decoded),
    )


def test_gradients_are_those_of_the_model_in_memory(case, documents):
    """From layer to layer they are what autograd gives of the whole model at once."""
    source, streamed, n_layers = case.source, case.streamed, case.layout.inventory.n_layers
    whole, rng = RelativeChanges(source), np.random.default_rng(0)
    vector = (0.05 * rng.standard_normal(whole.n)).astype(np.float32)
    for name in whole.places.keys() & {"head", "embedding"}:
        vector[whole.places[name]] = 0
    candidate = whole.weights(vector, "changed").candidate
    swap = case.swap()
    gradient_of = KlGradient(swap, documents, whole.parameters(swap.model))
    swap.put(candidate)
    _, wanted = gradient_of.at(range(len(documents)), lambda: whole.gradient(swap.model, vector))

    checkpoints = streamed.layer_checkpoints(case.folder, documents, 40)
    original = streamed.states_before(n_layers, checkpoints, "original")
    states = [
        streamed.states_before(layer, checkpoints, "own", candidate)
        for layer in range(n_layers + 1)
    ]
    gradients, found = None, {}
    for layer in (None, *reversed(range(n_layers))):
        changes = RelativeChanges(source, {NORMS} if layer is None else set(KINDS), layer)
        own = np.concatenate([vector[whole.places[name]] for name in changes.places])
        if layer is None:
            by_changes, gradients = head_gradient(
                streamed, changes, own, candidate, original, states[-1]
            )
        else:
            by_changes, gradients = layer_gradient(
                streamed, layer, changes, own, candidate, states[layer], gradients
            )
        found |= {name: by_changes[place] for name, place in changes.places.items()}
    assert found.keys() == whole.places.keys() - {"head", "embedding"}
    for name, gradient in found.items():
        np.testing.assert_allclose(
            gradient, wanted[whole.places[name]],
            rtol=2e-3, atol=1e-5 * abs(wanted[whole.places[name]]).max(), err_msg=name,
        )  # fmt: skip
        assert gradient.any(), name
    assert not any(p.requires_grad for p in streamed.model.parameters())


SETTINGS = TuningSettings(tokens=128, rate=0.004)


class Killed(BaseException):
    """Ends a process in place of a signal: nothing may be written after it."""


@pytest.fixture
def tuned(case, make_documents, tmp_path, monkeypatch):
    """`tuned(folder)`: tunes an allocation layer by layer there."""
    documents, selection = make_documents([16] * 10 + [9] * 4, 3), make_documents([16] * 4, 4)

    monkeypatch.setattr(streamed_tuning, "LONG_STEPS", 2)
    monkeypatch.setattr(streamed_tuning, "_LEAST_CHUNKS", 4)

    def run(folder, settings=SETTINGS, **options):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        scorer = StreamedScorer(case.streamed, selection)
        return tune_streamed(
            case.source, documents, scorer, settings, folder=place, of="these", **options
        )

    return run


def bytes_of(done):
    return {name: (stored.format, stored.data.tobytes()) for name, stored in done.tensors.items()}


@pytest.mark.parametrize("layout", [("deepseek", "gguf"), ("qwen3_tied", "gguf")], indirect=True)
def test_less_is_lost_and_that_is_what_the_model_in_memory_loses(case, tuned, make_documents):
    done = tuned("run")
    assert done.after < 0.99 * done.before
    assert [check.loss for check in done.checks] == sorted({c.loss for c in done.checks})[::-1]
    tensors = dict(done.tensors)
    weights = StoredWeights(case.layout, case.source.allocation, tensors, done.digest)
    scorer = Scorer(case.swap(), make_documents([16] * 4, 4))
    assert mean(scorer.score(weights.candidate).kl, scorer.documents) == pytest.approx(
        done.after, abs=1e-6
    )
    changes = RelativeChanges(case.source)
    plain = changes.tensors(np.zeros(changes.n, np.float32))
    assert tensors.keys() == plain.keys()
    for name, stored in tensors.items():
        assert (stored.format, stored.data.shape) == (plain[name].format, plain[name].data.shape)
        no_scales = stored.format == "BF16" and name in case.layout.groups
        fixed = no_scales or name in ("embedding", "head") or "e_score_correction_bias" in name
        assert np.array_equal(stored.data, plain[name].data) == fixed, name


@pytest.mark.parametrize("layout", [("deepseek", "gguf")], indirect=True)
def test_killed_at_any_file_it_ends_in_the_same_bytes(tuned, monkeypatch, tmp_path):
    whole = tuned("whole")
    replace, kills = Path.replace, 0

    def killed_after(n):
        left = [n]

        def dying(self, target):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return replace(self, target)

        return dying

    for n in range(1, 60, 5):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed_after(n))
            try:
                done = tuned("killed")
                break
            except Killed:
                kills += 1
    assert kills > 2
    assert bytes_of(done) == bytes_of(whole)
    assert done.checks == whole.checks
    left, expected = ({p.name for p in (tmp_path / n).iterdir()} for n in ("killed", "whole"))
    assert left == expected


@pytest.mark.parametrize("layout", [("qwen3", "safetensors")], indirect=True)
def test_a_limit_of_steps_ends_it_and_it_goes_on(tuned):
    whole = tuned("whole")
    stopped = tuned("stopped", stop=lambda made: made >= 1)
    assert stopped.stopped == 1
    again = tuned("again", stop=lambda made: made >= 1)
    assert bytes_of(again) == bytes_of(stopped) != bytes_of(whole)
    on = tuned("stopped")
    assert (on.stopped, on.digest, bytes_of(on)) == (None, whole.digest, bytes_of(whole))


@pytest.mark.parametrize("layout", [("qwen3", "safetensors")], indirect=True)
def test_steps_that_lose_more_are_not_taken(case, tuned):
    done = tuned("wild", dataclasses.replace(SETTINGS, rate=300.0))
    assert done.after == done.before
    changes = RelativeChanges(case.source)
    plain = changes.tensors(np.zeros(changes.n, np.float32))
    assert {name: stored.data.tobytes() for name, stored in done.tensors.items()} == {
        name: stored.data.tobytes() for name, stored in plain.items()
    }


def test_chunks_are_shared_out_in_order():
    chunks = [[i] for i in range(30)]
    steps = long_steps(chunks)
    assert [len(step) for step in steps] == [8, 7, 7, 8]
    assert [chunk for step in steps for chunk in step] == chunks
    assert long_steps(chunks[:8]) == [chunks[:8]]
    assert long_steps(chunks[:2]) == [chunks[:2]]


def test_fewer_tokens_than_chunks_make_one_step(case, make_documents, tmp_path):
    scorer = StreamedScorer(case.streamed, make_documents([9], 4))
    done = tune_streamed(
        case.source, make_documents([6], 3), scorer, SETTINGS, folder=tmp_path, of="these"
    )
    assert len(done.checks) in (1, 2)  # the step was taken, or lost more
    assert done.after <= done.before
