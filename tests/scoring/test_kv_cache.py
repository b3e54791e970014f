"""Keys and values in the scoring forward, against llama.cpp's own cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.export.checkpoint import materialize
from allocator.export.gguf.exact import kl_divergence
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.export.safetensors.loading import load
from allocator.export.tensors import EncodedTensors
from allocator.profiling.statistics import importance_digest
from allocator.scoring.candidates import Candidate, Weights
from allocator.scoring.documents import Document
from allocator.scoring.kv_cache import hadamard, keys_values
from allocator.scoring.scorer import Scorer
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import StreamedScorer
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF

torch.set_num_threads(1)
N_DOCUMENTS, LENGTH = 3, 128


@pytest.fixture(scope="module")
def opened(reference, make_checkpoint, tmp_path_factory):
    """By name: layout, a model, and a GGUF of the original's weights in F32."""
    wide = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    every = {"num_experts": 4, "num_experts_per_tok": 4}  # no choice that noise could turn
    made = {}

    def get(name):
        if name in made:
            return made[name]
        folder = tmp_path_factory.mktemp("kv")
        if name == "latent":
            inventory = reference
        else:
            size = int(name.removeprefix("head "))
            inventory = read_inventory(
                make_checkpoint(folder / "checkpoint", "qwen3", head_dim=size, **wide, **every)
            )
        layout = GGUF.layout(inventory)
        whole = Allocation.of(
            target="gguf",
            retained=dict.fromkeys(layout.layers, tuple(range(inventory.n_experts))),
            formats=dict.fromkeys(layout.groups, "F32"),
            experts_used=inventory.experts_used,
        )
        encodings = Encodings(folder / "bank", layout, {}, threads=1)
        materialize(
            EncodedTensors(encodings, whole),
            folder / "gguf",
            container="gguf",
            importance=importance_digest({}),
        )
        rng = np.random.default_rng(0)
        ids = rng.integers(inventory.dimensions.vocabulary, size=(N_DOCUMENTS, LENGTH))
        documents = [Document(tuple(map(int, row)), "x") for row in ids]
        made[name] = layout, encodings, whole, folder / "gguf" / "model.gguf", documents
        return made[name]

    return get


def off(ours, theirs):
    return float(np.mean([kl_divergence(a, b) for a, b in zip(ours, theirs, strict=True)]))


@pytest.mark.parametrize("name", ["latent", "head 32", "head 64", "head 128"])
@pytest.mark.parametrize("kv_format", ["q8_0", "q4_0", "q8_0/q4_0", "q4_0/f16"])
def test_a_candidate_computes_what_llama_cpp_does(opened, name, kv_format):
    """Nearer to llama.cpp with the same cache than the exact one is, by far."""
    layout, encodings, whole, path, documents = opened(name)
    if name == "latent" and "/" in kv_format:
        pytest.skip("latent attention stores keys and values in one row")
    scorer = Scorer(SwapModel(layout, encodings.decoded), documents, threads=1)
    logits = {}
    for fmt in ("f16", kv_format):
        scorer.swap.put(replace(Candidate.of(whole), kv_format=fmt))
        logits[fmt] = [scorer.candidate_logits(i) for i in range(N_DOCUMENTS)]
    with LlamaCpp(path, context=LENGTH, exact=False, kv_format=kv_format) as llama:
        theirs = [llama.logits(d.ids) for d in documents]
    exact, ours = off(logits["f16"], theirs), off(logits[kv_format], theirs)
    assert exact > 1e-5
    assert ours < 0.5 * exact


def test_streamed_and_in_memory_agree(opened):
    layout, encodings, whole, _, documents = opened("head 64")
    allocation = Allocation.of(
        target="gguf", retained=whole.retained_experts, formats=whole.format_of,
        experts_used=1, kv_format="q4_0",
    )  # fmt: skip
    scorer = Scorer(SwapModel(layout, encodings.decoded), documents, threads=1)
    streamed = StreamedScorer(StreamedModel(layout, Weights(layout, lambda: encodings)), documents)
    both = streamed.score_many([allocation, whole])
    found = scorer.score(allocation).kl
    assert found.mean() > 1e-3
    np.testing.assert_allclose(both[0].kl, found, atol=1e-6)
    np.testing.assert_allclose(both[1].kl, scorer.score(whole).kl, atol=1e-6)


def test_the_original_is_scored_exact_beside_a_candidate(opened):
    layout, encodings, whole, *_ = opened("head 64")
    swap = SwapModel(layout, encodings.decoded)
    swap.put(replace(Candidate.of(whole), kv_format="q4_0"))
    with swap.original():
        assert swap.kv_format == "f16"
    assert swap.kv_format == "q4_0"


@pytest.mark.parametrize("n", [1, 2, 64, 128])
def test_hadamard_is_its_own_inverse(n):
    found = hadamard(n)
    np.testing.assert_allclose(found @ found, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(np.abs(found.numpy()), n**-0.5, rtol=1e-6)


def test_gradients_pass_as_if_nothing_had_happened(opened):
    dimensions = opened("head 64")[0].inventory.dimensions
    keys = torch.randn(1, 2, 5, 64, requires_grad=True)
    found, values = keys_values(GGUF, dimensions, "q4_0/q8_0").update(keys, keys, 0)
    wide, narrow = (float((x - keys).detach().abs().max()) for x in (values, found))
    assert 0 < wide < narrow
    found.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_f16_is_what_models_compute_already(opened):
    dimensions = opened("head 64")[0].inventory.dimensions
    assert keys_values(GGUF, dimensions, "f16") is None
    assert keys_values(GGUF, dimensions, "f16/q8_0") is not None


@pytest.mark.parametrize("name", ["latent", "head 64"])
def test_a_written_checkpoint_is_loaded_with_them(opened, tmp_path, name):
    layout, encodings, whole, _, documents = opened(name)
    allocation = replace(whole, kv_format="q4_0")
    materialize(
        EncodedTensors(encodings, allocation),
        tmp_path / "out",
        container="safetensors",
        importance=importance_digest({}),
    )
    scorer = Scorer(SwapModel(layout, encodings.decoded), documents, threads=1)
    found = scorer.score(allocation).kl
    assert found.mean() > 1e-3
    np.testing.assert_allclose(scorer.score_model(load(tmp_path / "out")).kl, found, atol=1e-5)
