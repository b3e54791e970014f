"""Norms to whose values transformers adds one, tuned: what a model multiplies by, and files."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from allocator import load
from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import floats_of
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.export.checkpoint import materialize
from allocator.export.gguf.files import read_gguf, write_gguf
from allocator.export.tensors import EncodedTensors
from allocator.finishing.relative_changes import NORMS, RelativeChanges
from allocator.finishing.tensors import FinishedTensors
from allocator.finishing.tuning import TuningSettings, tune
from allocator.scoring.scorer import Scorer
from allocator.scoring.swap_model import SwapModel
from allocator.targets import TARGETS
from allocator.testing.family_runs import random_checkpoint
from allocator.testing.tensors import CheckpointTensors

CONFIG = {
    "model_type": "qwen3_next", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2,
    "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "rms_norm_eps": 1e-6,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "max_position_embeddings": 128,
    "layer_types": ["linear_attention", "full_attention"], "tie_word_embeddings": False,
    "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def allocation_of(layout, fmt):
    return Allocation.of(
        target=layout.target,
        retained=dict.fromkeys(layout.layers, tuple(range(8))),
        formats=dict.fromkeys(layout.groups, fmt),
        experts_used=2,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint in safetensors, and its GGUF."""
    case = random_checkpoint(CONFIG, tmp_path_factory.mktemp("original"))
    layout = TARGETS["gguf"].layout(read_inventory(case.path))
    path = case.path.parent / "original.gguf"
    allocation = allocation_of(layout, "BF16")
    write_gguf(path, layout, allocation, CheckpointTensors(layout, allocation.format_of))
    return SimpleNamespace(paths={"safetensors": case.path, "gguf": path}, model=case.model)


@pytest.fixture(params=["safetensors", "gguf"])
def checkpoint(request, original):
    return read_inventory(original.paths[request.param])


def multiplied_by(model, name):
    """What a norm multiplies by, `(width,)`, as transformers computes; of gates a constant."""
    module = model.get_submodule(name.removesuffix(".weight"))
    ones = torch.ones(1, len(module.weight))
    with torch.no_grad():
        return (module(ones, ones) if "Gated" in type(module).__name__ else module(ones))[0]


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_is_relative_to_what_the_model_multiplies_by(checkpoint, target, tmp_path):
    layout = TARGETS[target].layout(checkpoint)
    encodings = Encodings(tmp_path, layout, {})
    source = EncodedTensors(encodings, allocation_of(layout, "Q8_0"))
    changes = RelativeChanges(source, frozenset({NORMS}))
    swap = SwapModel(layout, encodings.decoded)
    names = list(changes.places)
    assert len(names) == 2 * 2 + 1 + 2 + 1  # around two layers, last, of heads, of linear attention
    before = {name: multiplied_by(swap.model, name) for name in names}
    swap.put(changes.weights(np.full(changes.n, 0.05, np.float32), "changed").candidate)
    for name, factors in before.items():
        moved = multiplied_by(swap.model, name) - factors
        unit = factors.square().mean().sqrt()
        torch.testing.assert_close(moved, (0.05 * unit).expand_as(moved), rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    ("checkpoint", "target"),
    [
        ("safetensors", "safetensors"),
        pytest.param("gguf", "safetensors", marks=pytest.mark.slow),
        pytest.param("gguf", "gguf", marks=pytest.mark.slow),
    ],
    indirect=["checkpoint"],
)
def test_files_of_both_containers_have_the_tuned_loss(
    original, checkpoint, target, tmp_path, make_documents
):
    """transformers loses with them what tuning said; llama.cpp's norms have one more."""
    layout = TARGETS[target].layout(checkpoint)
    encodings = Encodings(tmp_path / "cache", layout, {})
    source = EncodedTensors(encodings, allocation_of(layout, "Q4_0"))
    documents = make_documents([16] * 10, seed=3)
    selection = Scorer(SwapModel(layout, encodings.decoded), documents[:4])
    settings = TuningSettings(tokens=160, batch_tokens=40, checks=2, rate=0.01, kinds=(NORMS,))
    done = tune(source, documents, selection, settings)
    assert done.after < done.before

    def values(name):
        stored = done.tensors[name]
        floats = floats_of(np.ascontiguousarray(stored.data).reshape(-1), stored.format)
        return floats.reshape(checkpoint.tensors[name].shape)

    changed = SimpleNamespace(
        weights=done.digest, values=values, codes=lambda *_: None, holds=lambda *_: None
    )
    finished = FinishedTensors(source, changed)
    materialize(finished, tmp_path / "written", container="safetensors", importance="")
    again = load(tmp_path / "written")
    divergences = []
    for document in documents[:4]:
        ids = torch.tensor([document.ids])
        with torch.no_grad():
            wanted, own = (
                model(ids).logits[0].log_softmax(-1) for model in (original.model, again)
            )
        divergences += (wanted.exp() * (wanted - own)).sum(-1).tolist()
    assert np.mean(divergences) == pytest.approx(done.after, abs=1e-5)
    if target == "gguf":
        write_gguf(tmp_path / "model.gguf", layout, finished.allocation, finished)
        stored = read_gguf(tmp_path / "model.gguf")["output_norm.weight"][2].view(np.float32)
        np.testing.assert_array_equal(stored, values("model.norm.weight") + np.float32(1))
