"""Gemma-4 as it is uploaded, and what its config.json may say otherwise."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from allocator.checkpoint.outline import planned_inventory
from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError, TargetError, VerifyError
from allocator.export.gguf.exact import kl_divergence
from allocator.export.gguf.files import write_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.export.gguf.runtime import GGUF_RUNTIME
from allocator.families import Made
from allocator.scoring.candidates import Candidate
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF, SAFETENSORS
from allocator.targets.gguf.memory import kv_read_bytes
from allocator.targets.gguf.metadata import hyperparameters
from allocator.testing.family_runs import random_checkpoint
from allocator.testing.tensors import CheckpointTensors

CONFIG = {
    "model_type": "gemma4_text", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2,
    "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "enable_moe_block": True,
    "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "global_head_dim": 32,
    "num_global_key_value_heads": 1, "sliding_window": 8, "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 3.0,
    "rms_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
COUNTS = {"n_experts": 4, "experts_used": 2}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return random_checkpoint(CONFIG, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def layout(case):
    return GGUF.layout(read_inventory(case.path))


def refuse(*_):
    pytest.fail("nothing is encoded")


def computed(path, ids, **changes):
    """Logits `(tokens, vocabulary)` of transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **changes
    )
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0]


def everything(layout, *, experts_used):
    return Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, tuple(range(4))),
        formats=dict.fromkeys(layout.groups, "F32"),
        experts_used=experts_used,
    )


def test_a_token_uses_fewer_experts(case, layout):
    swap = SwapModel(layout, refuse)
    wanted = {n: computed(case.path, case.ids[0], top_k_experts=n) for n in (1, 2)}
    assert not torch.allclose(wanted[1], wanted[2], atol=1e-3)
    original = Candidate.original(layout)
    for n in (1, 2):
        swap.put(replace(original, experts_used=n))
        with torch.no_grad():
            own = swap.model(torch.tensor([case.ids[0]])).logits[0]
        torch.testing.assert_close(own, wanted[n], rtol=0, atol=2e-5)


def test_uploaded_it_is_the_same_language_model(case, layout, tmp_path):
    (stored,) = case.path.glob("*.safetensors")
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(stored).items()
    }
    others = {
        "model.vision_tower.patch_embedder.input_proj.weight": torch.ones(8, 3),
        "model.embed_vision.embedding_projection.weight": torch.ones(32, 8),
    }
    save_file(tensors | others, tmp_path / "model.safetensors", {"format": "pt"})
    inner = {k: v for k, v in CONFIG.items() if k != "pad_token_id"}
    config = {"model_type": "gemma4", "text_config": inner, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = GGUF.layout(read_inventory(tmp_path))
    assert {place.name for place in whole.inventory.ignored} == set(others)
    assert set(whole.inventory.tensors) == set(layout.inventory.tensors)
    assert hyperparameters(whole.inventory, **COUNTS) == hyperparameters(layout.inventory, **COUNTS)
    assert whole.made == layout.made
    swap = SwapModel(whole, refuse)
    with torch.no_grad():
        own = swap.model(torch.tensor([case.ids[0]])).logits[0]
    torch.testing.assert_close(own, case.logits[0], rtol=0, atol=2e-5)


def test_sizes_per_layer_are_those_of_both_spellings(case):
    saved = json.loads((case.path / "config.json").read_text())
    assert "per_layer_config" in saved
    assert "global_head_dim" not in saved
    described = [planned_inventory(config) for config in (CONFIG, saved)]
    shapes = [{n: t.shape for n, t in inventory.tensors.items()} for inventory in described]
    assert shapes[0] == shapes[1]
    assert hyperparameters(described[0], **COUNTS) == hyperparameters(described[1], **COUNTS)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.7},
        {"rope_type": "proportional", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 1e4},
    ],
)
def test_factors_are_the_angles_that_transformers_turns_by(rope, tmp_path):
    kinds = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = CONFIG | {"rope_parameters": kinds | {"full_attention": rope}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = AutoConfig.from_pretrained(tmp_path)
    base = rope["rope_theta"] ** -(torch.arange(0, 32, 2) / 32)
    angles = base
    if rope["rope_type"] != "default":
        full = settings.per_layer_config["full_attention"]
        angles, _ = ROPE_INIT_FUNCTIONS["proportional"](full, layer_type="full_attention")
    (made,) = GGUF.layout(planned_inventory(config)).made
    np.testing.assert_allclose(base / torch.tensor(made.values), angles, rtol=1e-6, atol=1e-29)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input is 8, needed 0"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1, needed 0"),
        ({"enable_moe_block": False}, "enable_moe_block is False, needed True"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"layer_types": ["full_attention"]}, "needed a list of 2"),
        ({"per_layer_config": [1]}, "needed a table per layer"),
        ({"per_layer_config": {"1": {"hidden_size": 8}}}, "has hidden_size for layer 1"),
        ({"attention_bias": True}, "not supported with biases"),
    ],
)
def test_other_models_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        planned_inventory(CONFIG | changes)


THREE = CONFIG | {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (THREE | {"per_layer_config": {"2": {"head_dim": 32}}}, "heads of one width"),
        (CONFIG | {"rope_parameters": {"sliding_attention": YARN, "full_attention": YARN}},
         "rotates layers of gemma4"),
        (CONFIG | {"hidden_activation": "silu"}, "hidden_activation"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(config, message):
    inventory = planned_inventory(config)
    assert SAFETENSORS.layout(inventory).groups
    with pytest.raises(TargetError, match=message):
        GGUF.layout(inventory)


def test_a_file_with_other_factors_is_refused(layout, tmp_path):
    allocation = everything(layout, experts_used=2)
    path = tmp_path / "model.gguf"
    write_gguf(path, layout, allocation, CheckpointTensors(layout))
    assert path.stat().st_size == allocation.nbytes(layout).file
    GGUF_RUNTIME.read(path, layout)
    all_rotated = replace(layout, made=(Made("rope_freqs.weight", (1.0,) * 16),))
    with pytest.raises(VerifyError, match=r"rope_freqs\.weight holds other values"):
        GGUF_RUNTIME.read(path, all_rotated)
    with pytest.raises(VerifyError, match=r"no tensor other\.weight"):
        GGUF_RUNTIME.read(path, replace(layout, made=(Made("other.weight", (1.0,)),)))


WIDE = THREE | {  # both widths are rotated before they are stored; all experts are used
    "head_dim": 64, "global_head_dim": 256, "top_k_experts": 4,
}  # fmt: skip


def test_keys_and_values_are_stored_as_in_llama_cpp(tmp_path):
    """Nearer to llama.cpp with the same cache than the exact one is, by far."""
    (tmp_path / "model").mkdir()
    case = random_checkpoint(WIDE, tmp_path / "model")
    layout = GGUF.layout(read_inventory(case.path))
    allocation = everything(layout, experts_used=4)
    path = tmp_path / "model.gguf"
    write_gguf(path, layout, allocation, CheckpointTensors(layout))
    with LlamaCpp(path, context=64, exact=False, kv_format="q4_0") as llama:
        theirs = [llama.logits(ids) for ids in case.ids]
    off = {}
    swap = SwapModel(layout, refuse)
    for kv_format in ("f16", "q4_0"):
        swap.put(replace(Candidate.original(layout), kv_format=kv_format))
        with torch.no_grad():
            ours = [swap.model(torch.tensor([ids])).logits[0].numpy() for ids in case.ids]
        off[kv_format] = np.mean([kl_divergence(*pair) for pair in zip(ours, theirs, strict=True)])
    assert off["f16"] > 1e-5
    assert off["q4_0"] < 0.2 * off["f16"]


def test_keys_and_values_of_all_layers_are_read():
    """A layer with a window of 8 and 2 heads of 64; two that read all of it, 1 head of 256."""
    inventory = planned_inventory(WIDE)
    for fmt, of_64, of_256 in (("f16", 128, 512), ("q8_0", 68, 272)):
        read = kv_read_bytes(inventory, kv_format=fmt, context=256)
        assert read == 2 * (8 * 2 * of_64 + 2 * 256 * 1 * of_256)
