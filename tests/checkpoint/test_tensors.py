"""Weights as read here against the safetensors library, torch, and transformers' use of kv_b."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from allocator.checkpoint.halves import join_kv_b, split_kv_b
from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_rows, read_tensor
from allocator.errors import CheckpointError
from allocator.targets import GGUF, SAFETENSORS
from allocator.targets.group_weights import group_digest, group_weights


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


# -- FP8 in blocks

Q = "model.layers.1.self_attn.q_a_proj.weight"
FINITE = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)


def edit_fp8(block, factor=lambda generator, shape: torch.randn(shape, generator=generator)):
    """Makes every projection random codes, with a factor per block."""

    def edit(tensors):
        generator = torch.Generator().manual_seed(0)
        for name, tensor in list(tensors.items()):
            if "_proj" in name:
                codes = torch.randint(254, tensor.shape, generator=generator)
                tensors[name] = FINITE[codes].view(torch.float8_e4m3fn)
                n_blocks = [-(-n // b) for n, b in zip(tensor.shape, block, strict=True)]
                tensors[f"{name}_scale_inv"] = factor(generator, n_blocks)

    return edit


def quantization(fp8, block):
    return {**fp8.config, "weight_block_size": list(block)}


@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        *((b, torch.float32) for b in ((128, 128), (32, 48), (48, 32), (1, 7), (64, 10**30))),
        ((128, 128), torch.bfloat16),  # as Qwen's own files have them
        ((1, 7), torch.bfloat16),
        ((32, 48), torch.float16),
    ],
)
def test_fp8_is_decoded_as_by_torch(checkpoints, change_checkpoint, fp8, block, dtype):
    """Every code; factors from the least to those whose products are nearly the largest."""
    least, most = (-7, 4.8) if dtype == torch.float16 else (-45, 35.8)

    def factor(generator, shape):
        return (10 ** torch.empty(shape).uniform_(least, most, generator=generator)).to(dtype)

    path = change_checkpoint(
        checkpoints["deepseek"],
        edit_fp8(block, factor),
        quantization_config=quantization(fp8, block),
    )
    inventory = read_inventory(path)
    theirs = load_file(path / "model.safetensors")
    n_scaled, codes = 0, set()
    for name in inventory.tensors:
        expected = theirs[name].float()
        if theirs[name].dtype == torch.float8_e4m3fn:
            widths = [min(b, n) for b, n in zip(block, expected.shape, strict=True)]
            assert theirs[f"{name}_scale_inv"].dtype == dtype
            scale = theirs[f"{name}_scale_inv"].float()
            expected *= fp8.over_blocks(scale, expected.shape, widths)
            codes.update(theirs[name].view(torch.uint8).flatten().tolist())
            n_scaled += 1
        found = read_tensor(inventory, name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.view(np.int32), expected.numpy().view(np.int32))
    assert n_scaled == 72
    assert codes == set(FINITE.tolist())


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("place", [(0, 0), (40, 17), (63, 63)])
def test_nan_codes_are_refused(checkpoints, change_checkpoint, fp8, code, place):
    def edit(tensors):
        edit_fp8((48, 48))(tensors)
        tensors[Q].view(torch.uint8)[place] = code

    path = change_checkpoint(
        checkpoints["deepseek"], edit, quantization_config=quantization(fp8, (48, 48))
    )
    inventory = read_inventory(path)
    assert np.isfinite(read_tensor(inventory, Q.replace("q_a", "q_b"))).all()
    with pytest.raises(CheckpointError, match=f"{Q} holds a NaN code") as caught:
        read_tensor(inventory, Q)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [float("inf"), float("-inf"), float("nan"), 1e38])
def test_factors_that_are_no_numbers_or_too_large(checkpoints, change_checkpoint, fp8, factor):
    def edit(tensors):
        edit_fp8((48, 48))(tensors)
        tensors[f"{Q}_scale_inv"][1, 1] = factor

    path = change_checkpoint(
        checkpoints["deepseek"], edit, quantization_config=quantization(fp8, (48, 48))
    )
    with pytest.raises(CheckpointError, match=f"or a factor in {Q}_scale_inv is too large"):
        read_tensor(read_inventory(path), Q)


def test_decoding_fp8_takes_little_memory(checkpoints, change_checkpoint, fp8):
    name = "lm_head.weight"

    def edit(tensors):
        tensors[name] = torch.zeros(2048, 2048).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(16, 16)

    path = change_checkpoint(
        checkpoints["deepseek"], edit, quantization_config=quantization(fp8, (128, 128))
    )
    inventory = read_inventory(path)
    tracemalloc.start()
    values = read_tensor(inventory, name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert values.nbytes < peak < 2 * values.nbytes


def test_a_scale_that_ends_early_raises(checkpoints, change_checkpoint, fp8, as_they_are):
    path = change_checkpoint(
        checkpoints["deepseek"],
        edit_fp8((48, 48)),
        quantization_config=quantization(fp8, (48, 48)),
    )
    inventory = read_inventory(path)
    scale = inventory.tensors[Q].scale
    with open(path / scale.file, "r+b") as file:
        file.truncate(scale.offset + scale.nbytes - 4)
    with pytest.raises(CheckpointError, match=f"ends inside ({Q}|{Q}_scale_inv);"):
        read_tensor(as_they_are(inventory), Q)


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


def test_a_file_that_ends_early_raises(checkpoints, change_checkpoint, as_they_are):
    path = change_checkpoint(checkpoints["deepseek"])
    inventory = read_inventory(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    last = max(inventory.tensors.values(), key=lambda t: t.offset)
    with pytest.raises(CheckpointError, match=f"ends inside {last.name}"):
        read_tensor(as_they_are(inventory), last.name)


# -- rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [(0, 1), (0, 64), (5, 23), (63, 64)])
def test_rows_are_those_of_the_tensor(checkpoints, change_checkpoint, dtype, rows):
    inventory = read_inventory(change_checkpoint(checkpoints["deepseek"], edit_dtype(dtype)))
    for name in (Q, "model.embed_tokens.weight", "model.layers.1.mlp.experts.7.down_proj.weight"):
        whole = read_tensor(inventory, name)
        np.testing.assert_array_equal(read_rows(inventory, name, *rows), whole[slice(*rows)])


@pytest.mark.parametrize("block", [(128, 128), (32, 48), (48, 32), (1, 7), (10**30, 5)])
@pytest.mark.parametrize("rows", [(0, 64), (5, 23), (31, 33), (32, 48), (47, 64), (63, 64)])
def test_rows_of_fp8_have_their_blocks_factors(checkpoints, change_checkpoint, fp8, block, rows):
    dtype = torch.bfloat16 if block == (48, 32) else torch.float32

    def factor(generator, shape):
        return torch.empty(shape).uniform_(0.5, 2, generator=generator).to(dtype)

    path = change_checkpoint(
        checkpoints["deepseek"],
        edit_fp8(block, factor),
        quantization_config=quantization(fp8, block),
    )
    inventory = read_inventory(path)
    assert inventory.tensors[Q].scale is not None
    whole = read_tensor(inventory, Q)
    np.testing.assert_array_equal(read_rows(inventory, Q, *rows), whole[slice(*rows)])


def test_only_rows_that_are_asked_for_are_read(checkpoints, change_checkpoint, as_they_are):
    inventory = read_inventory(change_checkpoint(checkpoints["deepseek"]))
    info = inventory.tensors[Q]
    whole = read_tensor(inventory, Q)
    with open(inventory.path / info.file, "r+b") as file:
        file.truncate(info.offset + 20 * info.nbytes // 64)
    inventory = as_they_are(inventory)
    np.testing.assert_array_equal(read_rows(inventory, Q, 7, 20), whole[7:20])
    with pytest.raises(CheckpointError, match=f"ends inside {Q}"):
        read_rows(inventory, Q, 7, 21)
