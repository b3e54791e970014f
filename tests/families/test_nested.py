"""A language model inside a model of text and more, as Qwen3.5 is uploaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from allocator.checkpoint.reading import read_inventory
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF
from allocator.targets.gguf.metadata import hyperparameters
from allocator.testing.family_runs import random_checkpoint, stack_experts

CONFIG = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 512, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2, "max_position_embeddings": 128, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0], "mrope_interleaved": True,
    },
}  # fmt: skip
OTHERS = {
    "model.visual.patch_embed.proj.weight": torch.ones(8, 3),
    "model.visual.blocks.0.norm1.weight": torch.ones(8),
    "mtp.fc.weight": torch.ones(64, 128),
    "mtp.layers.0.mlp.experts.gate_up_proj": torch.ones(8, 64, 64),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return random_checkpoint(CONFIG, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def uploaded(alone, tmp_path_factory):
    """The model as it is uploaded: nested, its experts stacked, beside other parts."""
    stacked, folder = (tmp_path_factory.mktemp(name) for name in ("stacked", "uploaded"))
    stack_experts(alone, stacked, transposed=False)
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(stacked / "model.safetensors").items()
    }
    save_file(tensors | OTHERS, folder / "model.safetensors", {"format": "pt"})
    stored = json.loads((alone.path / "config.json").read_text())
    inner = {k: v for k, v in stored.items() if k not in ("architectures", "tie_word_embeddings")}
    config = {
        "model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": inner, "vision_config": {"model_type": "qwen3_5_moe_vision", "depth": 1},
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_transformers_reads_it_as_the_same_language_model(alone, uploaded):
    model = AutoModelForCausalLM.from_pretrained(
        uploaded, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model.eval()(torch.tensor([alone.ids[0]])).logits[0]
    torch.testing.assert_close(logits, alone.logits[0], rtol=0, atol=1e-5)


def test_its_tensors_are_those_of_the_language_model(alone, uploaded):
    inventory, whole = read_inventory(alone.path), read_inventory(uploaded)
    assert set(whole.tensors) == set(inventory.tensors)
    for name in inventory.tensors:
        assert whole.tensor_digest(name) == inventory.tensor_digest(name)
    assert {place.name for place in whole.ignored} == set(OTHERS)


def test_it_computes_and_describes_itself_as_the_language_model(alone, uploaded):
    layout = GGUF.layout(read_inventory(uploaded))
    swap = SwapModel(layout, lambda *_: pytest.fail("nothing is encoded"))
    with torch.no_grad():
        logits = swap.model(torch.tensor([alone.ids[0]])).logits[0]
    torch.testing.assert_close(logits, alone.logits[0], rtol=0, atol=1e-4)
    counts = {"n_experts": 8, "experts_used": 2}
    described = hyperparameters(read_inventory(alone.path), **counts)
    assert hyperparameters(layout.inventory, **counts) == described
