"""Nemotron-H: configs of older versions, dense blocks, and what llama.cpp computes otherwise."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator import api
from allocator.checkpoint.outline import planned_inventory
from allocator.checkpoint.padding import padded
from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError, TargetError
from allocator.export.gguf.exact import kl_divergence
from allocator.export.gguf.files import write_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF, SAFETENSORS
from allocator.testing.family_runs import EXACT, random_checkpoint
from allocator.testing.tensors import CheckpointTensors

CONFIG = {
    "model_type": "nemotron_h", "vocab_size": 512, "hidden_size": 64, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "hybrid_override_pattern": "ME*", "num_hidden_layers": 3, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "conv_kernel": 4, "chunk_size": 16,
    "intermediate_size": 96, "moe_intermediate_size": 96, "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 64, "num_experts_per_tok": 2, "time_step_min": 0.05,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return random_checkpoint(CONFIG, tmp_path_factory.mktemp("nemotron"))


def logits(layout, ids):
    swap = SwapModel(layout, lambda *_: pytest.fail("nothing is encoded"))
    with torch.no_grad():
        return swap.model(torch.tensor([ids])).logits[0]


def test_target_gguf_computes_without_a_least_step_as_llama_cpp_does(case, tmp_path):
    inventory = read_inventory(case.path)
    layout = GGUF.layout(inventory)
    assert any("time_step_min = 0.05" in note for note in layout.notes)
    assert not any("time_step" in note for note in SAFETENSORS.layout(inventory).notes)
    own, computed = case.logits[0], logits(layout, case.ids[0])
    torch.testing.assert_close(
        logits(SAFETENSORS.layout(inventory), case.ids[0]), own, rtol=0, atol=2e-5
    )
    allocation = Allocation.of(
        target="gguf", retained={1: (0, 1, 2, 3)}, formats=dict.fromkeys(layout.groups, "F32"),
        experts_used=2,
    )  # fmt: skip
    write_gguf(tmp_path / "model.gguf", layout, allocation, CheckpointTensors(layout))
    with LlamaCpp(tmp_path / "model.gguf", context=64, threads=1) as runtime:
        theirs = runtime.logits(case.ids[0])
    assert kl_divergence(computed.numpy(), theirs) <= EXACT
    assert kl_divergence(own.numpy(), theirs) > 1e-5


def test_configs_and_names_of_older_versions_are_the_same(case, tmp_path):
    """As released: letters for layers, `backbone.` before names, multi-token prediction aside."""
    inventory = read_inventory(case.path)
    stored = load_file(case.path / "model.safetensors")
    assert any(name.startswith("backbone.") for name in stored)
    config = {k: v for k, v in CONFIG.items() if k != "conv_kernel"}
    config |= {"mamba_d_conv": 4, "num_nextn_predict_layers": 1}
    save_file(
        {
            "mtp.layers.0.norm.weight": torch.zeros(64),
            **{name.replace("backbone.", "model."): tensor for name, tensor in stored.items()},
        },
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = read_inventory(tmp_path)
    assert set(again.tensors) == set(inventory.tensors) == set(planned_inventory(CONFIG).tensors)
    torch.testing.assert_close(
        logits(SAFETENSORS.layout(again), case.ids[0]), case.logits[0], rtol=0, atol=2e-5
    )
    named = CONFIG | {"layers_block_type": ["mamba", "moe", "attention"]}
    assert set(planned_inventory(named).tensors) == set(inventory.tensors)


def test_dense_blocks_are_computed_and_refused_by_target_gguf(tmp_path):
    case = random_checkpoint(CONFIG | {"hybrid_override_pattern": "-E*"}, tmp_path)
    inventory = read_inventory(tmp_path)
    torch.testing.assert_close(
        logits(SAFETENSORS.layout(inventory), case.ids[0]), case.logits[0], rtol=0, atol=2e-5
    )
    with pytest.raises(TargetError, match="layers of kind 'mlp'; use target safetensors"):
        GGUF.layout(inventory)


def test_experts_without_gate_are_padded(case):
    inventory = padded(read_inventory(case.path), 128)
    layout = SAFETENSORS.layout(inventory)
    assert layout.groups["layers.1.experts.down"].shape == (4, 64, 128)
    torch.testing.assert_close(logits(layout, case.ids[0]), case.logits[0], rtol=0, atol=2e-5)


def test_what_a_sequence_remembers_is_read_of_every_kind_of_layer():
    """4 heads x 16 x 16 numbers, and 3 tokens of the convolution's 4 x 16 + 2 x 2 x 16 channels."""
    space = 4 * (4 * 16 * 16 + 3 * (4 * 16 + 2 * 2 * 16))
    attention = 256 * 2 * 2 * 16 * 2  # cells, keys and values, heads, width, bytes
    inventory = planned_inventory(CONFIG)
    assert GGUF.kv_bytes(inventory, "f16", 256) == space + attention


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hybrid_override_pattern": "ME?"}, "layers_block_type"),
        ({"hybrid_override_pattern": "ME"}, "for each of 3 layers"),
        ({"hybrid_override_pattern": None}, "layers_block_type"),
        ({"layers_block_type": [None, "moe", "moe"]}, "layers_block_type"),
        ({"tie_word_embeddings": True}, "a head of its own; needed false"),
        ({"mamba_num_heads": 3}, "needed a multiple of n_groups"),
        ({"mlp_bias": True}, "mlp_bias is True"),
    ],
)
def test_configs_that_make_no_sense_are_one_line(changed, message):
    with pytest.raises(CheckpointError, match=message):
        planned_inventory(CONFIG | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"mlp_hidden_act": "silu"}, "mlp_hidden_act"), ({"use_conv_bias": False}, "use_conv_bias")],
)
def test_what_llama_cpp_hard_codes_is_refused(changed, message):
    with pytest.raises(TargetError, match=message):
        GGUF.layout(planned_inventory(CONFIG | changed))


def test_layers_are_told_by_two_lists():
    inventory = planned_inventory(CONFIG)
    pairs = dict(inventory.family.for_gguf().pairs(inventory.facts, n_experts=4, experts_used=2))
    assert pairs["nemotron_h_moe.feed_forward_length"] == (0, 96, 0)
    assert pairs["nemotron_h_moe.attention.head_count_kv"] == (0, 0, 2)
    shapes = {k.stored_as: k.shape_in_file for k in GGUF.layout(inventory).full_precision}
    assert shapes["blk.0.ssm_a"] == shapes["blk.0.ssm_d"] == (4, 1)
    assert shapes["blk.0.ssm_norm.weight"] == (2, 32)
    assert np.prod(shapes["blk.0.ssm_conv1d.weight"]) == 128 * 4


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_a_search_is_finished_in_memory_and_layer_by_layer(tmp_path, write_study, streamed):
    """With experts in latents: what follows them is measured with what they give."""
    (tmp_path / "model").mkdir()
    random_checkpoint(CONFIG | {"moe_latent_size": 32}, tmp_path / "model")
    study = write_study(tmp_path / "study", tmp_path / "model")
    if streamed:
        with (study / "study.toml").open("a") as file:
            file.write("\n[streamed]\ncandidates = 3\nrows = 0.5\n")
    options = {"cache": tmp_path / "cache", "threads": 1}
    api.search(study, trials=3, **options)
    pick = study / "allocations/pick.json"
    result = api.finish(study, pick, tokens=96, **options)
    api.materialize(study, result.record, tmp_path / "gguf", container="gguf", **options)
    api.verify(study, tmp_path / "gguf", tolerance=0.2, **options)
