"""Weights as read here against the safetensors library, torch, and transformers' use of kv_b."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from allocator.codecs.source import (
    group_digest,
    group_weights,
    join_kv_b,
    read_tensor,
    split_kv_b,
)
from allocator.errors import CheckpointError
from allocator.inventory import read_inventory
from allocator.targets import GGUF, SAFETENSORS


def edit_dtype(dtype):
    def edit(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype)

    return edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_read_exactly(checkpoints, change_checkpoint, dtype):
    path = change_checkpoint(checkpoints["deepseek"], edit_dtype(dtype))
    inventory = read_inventory(path)
    theirs = load_file(path / "model.safetensors")
    assert set(theirs) == set(inventory.tensors)
    for name, tensor in theirs.items():
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(read_tensor(inventory, name), tensor.float().numpy())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_split_and_join_are_inverse(heads, nope, value, rank):
    weight = np.random.default_rng(0).normal(size=(heads * (nope + value), rank))
    k_b, v_b = split_kv_b(weight, heads=heads, nope=nope)
    assert k_b.shape == (heads, rank, nope)
    assert v_b.shape == (heads, value, rank)
    np.testing.assert_array_equal(join_kv_b(k_b, v_b), weight)


def test_halves_of_kv_b_compute_what_transformers_computes(checkpoints):
    inventory = read_inventory(checkpoints["deepseek"])
    groups = GGUF.layout(inventory).groups
    layout = GGUF.layout(inventory)
    k_b = torch.from_numpy(group_weights(layout, groups["layers.1.attention.k_b"]))
    v_b = torch.from_numpy(group_weights(layout, groups["layers.1.attention.v_b"]))
    weight = load_file(checkpoints["deepseek"] / "model.safetensors")[
        "model.layers.1.self_attn.kv_b_proj.weight"
    ]
    latent, q_nope = torch.randn(7, 256), torch.randn(7, 4, 32)
    # DeepseekV3Attention: kv_b_proj(latent) viewed as (..., heads, nope + value), then split
    keys, values = (latent @ weight.T).view(7, 4, 64).split([32, 32], -1)
    torch.testing.assert_close(torch.einsum("hvr,tr->thv", v_b, latent), values)
    absorbed = torch.einsum("hrn,thn->thr", k_b, q_nope)  # llama.cpp: the query meets the latent
    scores = torch.einsum("thr,sr->hts", absorbed, latent)
    expected = torch.einsum("thn,shn->hts", q_nope, keys)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek", "qwen3"])
@pytest.mark.parametrize("kind", ["gate", "up", "down"])
def test_experts_are_stacked_in_expert_order(checkpoints, name, kind):
    layout = SAFETENSORS.layout(read_inventory(checkpoints[name]))
    theirs = load_file(checkpoints[name] / "model.safetensors")
    stacked = group_weights(layout, layout.groups[f"layers.1.experts.{kind}"])
    for expert in range(8):
        tensor = theirs[f"model.layers.1.mlp.experts.{expert}.{kind}_proj.weight"]
        np.testing.assert_array_equal(stacked[expert], tensor.float().numpy())


def test_digests_follow_content_and_layout(checkpoints, change_checkpoint):
    layout = GGUF.layout(read_inventory(checkpoints["deepseek"]))
    digests = {name: group_digest(layout, group) for name, group in layout.groups.items()}
    assert len(set(digests.values())) == len(digests)

    def edit(tensors):
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 5] += 1

    changed = GGUF.layout(read_inventory(change_checkpoint(checkpoints["deepseek"], edit)))
    assert {n for n, g in changed.groups.items() if group_digest(changed, g) != digests[n]} == {
        "layers.1.experts.up"
    }


def test_a_file_that_ends_early_raises(checkpoints, change_checkpoint):
    path = change_checkpoint(checkpoints["deepseek"])
    inventory = read_inventory(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    last = max(inventory.tensors.values(), key=lambda t: t.offset)
    with pytest.raises(CheckpointError, match=f"ends inside {last.name}"):
        read_tensor(inventory, last.name)
