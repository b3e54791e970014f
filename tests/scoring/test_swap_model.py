"""The exchangeable model against transformers: loading, exchanging, pruning, fewer experts used."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import nn
from transformers import AutoModelForCausalLM

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.errors import CheckpointError
from allocator.scoring import swap_model as model
from allocator.scoring.candidates import Candidate
from allocator.scoring.documents import read_documents
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF, SAFETENSORS

torch.set_num_threads(1)
REFERENCE = Path(__file__).parents[2] / "studies/reference/model"
TEXT = REFERENCE.parent / "generated/calibration.jsonl"
NAMES = ("deepseek", "qwen3", "qwen3_tied")
IDS = torch.randint(512, (2, 23), generator=torch.Generator().manual_seed(0))


def transformers_model(path, **config):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **config
    ).eval()


class Decoding:
    """What a model decodes with; logs what it is asked for, and fails where it is told to."""

    def __init__(self, encodings):
        self.encodings = encodings
        self.calls = []
        self.fails_at = None

    def __call__(self, name, fmt, experts):
        if self.encodings is None:
            pytest.fail("decoded a format although only the original was asked for")
        self.calls.append((name, fmt, experts))
        if (fmt, experts) == self.fails_at:
            raise OSError("the disk is gone")
        return self.encodings.decoded(name, fmt, experts)


def swap_model(path, folder=None, target=GGUF):
    layout = target.layout(read_inventory(path))
    encodings = None if folder is None else Encodings(folder, layout, {})
    decoding = Decoding(encodings)
    swap = SwapModel(layout, decoding)
    swap.encodings, swap.decoding = encodings, decoding
    return swap


@torch.inference_mode()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def snapshot(model):
    return {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}


def put(swap, fmt=None, retained=None, experts_used=2):
    layers = swap.layout.layers
    swap.put(
        Candidate(
            format_of=dict.fromkeys(swap.layout.groups, fmt),
            retained_experts={
                layer: (retained or {}).get(layer, tuple(range(8))) for layer in layers
            },
            experts_used=experts_used,
        )
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [GGUF, SAFETENSORS], ids=lambda t: t.name)
def test_the_original_is_the_reference_model(target):
    ids = torch.tensor([read_documents(TEXT, vocab_size=8192)[0].ids[:128]])
    swap = swap_model(REFERENCE, target=target)
    close(logits(swap.model, ids), logits(transformers_model(REFERENCE), ids))


@pytest.mark.parametrize("name", NAMES)
def test_the_original_is_transformers_model(checkpoints, name):
    ours, theirs = swap_model(checkpoints[name]).model, transformers_model(checkpoints[name])
    close(logits(ours), logits(theirs))
    expected = snapshot(theirs)
    for key, value in snapshot(ours).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_reset_brings_the_original_back(checkpoints, name, tmp_path):
    swap = swap_model(checkpoints[name], tmp_path)
    before, expected = snapshot(swap.model), logits(swap.model)
    put(swap, "Q4_0", dict.fromkeys(swap.layout.layers, (0, 3, 4)), experts_used=1)
    assert not torch.allclose(logits(swap.model), expected, atol=1e-2)
    swap.reset()
    after = snapshot(swap.model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(swap.model), expected)


def in_parts(swap, texts):
    """Puts routed experts in parts `texts` of experts 0, 2, 3, 5, 7; the rest in Q8_0."""
    layers = swap.layout.layers
    formats = {
        n: texts[g.role.value.split(".")[1]] if g.role.is_expert else "Q8_0"
        for n, g in swap.layout.groups.items()
    }
    retained = dict.fromkeys(layers, (0, 2, 3, 5, 7))
    swap.put(Candidate(format_of=formats, retained_experts=retained, experts_used=2))


FIRST = {"gate": "Q8_0:2,7+Q4_0:0,3,5", "up": "Q5_0", "down": "Q5_0:0,3+Q4_0:2,5,7"}
SECOND = {"gate": "Q8_0:2,3+Q4_0:0,5,7", "up": "Q8_0:5+Q5_0:0,2,3,7", "down": "Q4_0"}


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_each_experts_own_decoding(checkpoints, name, tmp_path):
    swap = swap_model(checkpoints[name], tmp_path, SAFETENSORS)
    for texts in (FIRST, SECOND, FIRST):  # the way does not matter
        in_parts(swap, texts)
        for layer in swap.layout.layers:
            experts = swap.model.model.layers[layer].mlp.experts
            gate, up = experts.gate_up_proj.chunk(2, dim=1)
            for role, found in (("gate", gate), ("up", up), ("down", experts.down_proj)):
                for place, expert in enumerate((0, 2, 3, 5, 7)):
                    pieces = [p.partition(":") for p in texts[role].split("+")]
                    fmt = next(f for f, _, e in pieces if not e or str(expert) in e.split(","))
                    encoded = swap.encodings.encoded(f"layers.{layer}.experts.{role}", fmt)[expert]
                    expected = dequantize(encoded, GGMLQuantizationType[fmt])
                    assert (found[place].numpy() == expected).all(), (layer, role, expert)


def test_parts_decode_only_what_changes(checkpoints, tmp_path):
    swap = swap_model(checkpoints["qwen3"], tmp_path, SAFETENSORS)
    in_parts(swap, FIRST)
    calls = swap.decoding.calls
    calls.clear()
    in_parts(swap, FIRST)
    assert calls == []
    in_parts(swap, SECOND)
    assert {(g.split(".")[3], fmt, experts) for g, fmt, experts in calls} == {
        ("gate", "Q8_0", (3,)),
        ("gate", "Q4_0", (7,)),
        ("up", "Q8_0", (5,)),
        ("down", "Q4_0", (0, 3)),
    }
    assert len(calls) == 4 * len(swap.layout.layers)


def test_parts_that_fail_half_way_are_put_again(checkpoints, tmp_path):
    """A failed put may leave a group half changed; the next one must not trust what it held."""
    swap = swap_model(checkpoints["qwen3"], tmp_path, SAFETENSORS)
    in_parts(swap, FIRST)
    expected = snapshot(swap.model)
    swap.decoding.fails_at = ("Q4_0", (7,))
    with pytest.raises(OSError, match="gone"):
        in_parts(swap, SECOND)
    swap.decoding.fails_at = None
    in_parts(swap, FIRST)
    after = snapshot(swap.model)
    assert all(torch.equal(after[key], expected[key]) for key in expected)


def test_original_puts_parts_back(checkpoints, tmp_path):
    swap = swap_model(checkpoints["qwen3"], tmp_path, SAFETENSORS)
    plain = logits(swap.model)
    in_parts(swap, FIRST)
    held = snapshot(swap.model)
    with swap.original() as model:
        assert torch.equal(logits(model), plain)
    after = snapshot(swap.model)
    assert all(torch.equal(after[key], held[key]) for key in held)


@pytest.mark.parametrize("name", NAMES)
def test_the_way_to_a_candidate_does_not_matter(checkpoints, name, tmp_path):
    direct, wandering = (swap_model(checkpoints[name], tmp_path) for _ in range(2))
    last = wandering.layout.layers[-1]
    put(wandering, "Q8_0", {last: (0, 1, 2, 3)})
    logits(wandering.model)
    put(wandering, None, {last: (4, 5, 6, 7)}, experts_used=1)
    with torch.inference_mode():  # a scorer puts in inference mode, a person need not
        put(wandering, "Q5_0", {1: (1, 2, 7)})
    put(wandering, "Q4_0", {1: (1, 2, 7)})
    put(direct, "Q4_0", {1: (1, 2, 7)})
    a, b = snapshot(direct.model), snapshot(wandering.model)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(logits(direct.model), logits(wandering.model))


@pytest.mark.parametrize("name", NAMES)
def test_original_puts_back_what_was_held(checkpoints, name, tmp_path):
    swap = swap_model(checkpoints[name], tmp_path)
    plain = logits(swap.model)
    put(swap, "Q4_0", {1: (1, 2, 7)}, experts_used=1)
    held = snapshot(swap.model), logits(swap.model)
    with swap.original() as model:
        assert torch.equal(logits(model), plain)
    after = snapshot(swap.model)
    assert all(torch.equal(after[key], held[0][key]) for key in after)
    assert torch.equal(logits(swap.model), held[1])


def shrink(model, layer, kept):
    block, kept = model.model.layers[layer].mlp, list(kept)
    for name in ("gate_up_proj", "down_proj"):
        value = getattr(block.experts, name).detach()[kept]
        setattr(block.experts, name, nn.Parameter(value))
    block.gate.weight = nn.Parameter(block.gate.weight.detach()[kept])
    if hasattr(block.gate, "e_score_correction_bias"):
        block.gate.e_score_correction_bias = block.gate.e_score_correction_bias[kept]
    block.experts.num_experts = block.gate.num_experts = len(kept)


def masked_router(gate, removed, hidden):
    """A router that never chooses `removed`; from the papers' formulas."""
    scores = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
    if hasattr(gate, "e_score_correction_bias"):  # DeepSeek-V3: sigmoid, bias for the choice only
        values = scores.sigmoid()
        choice = (values + gate.e_score_correction_bias).index_fill(1, removed, -torch.inf)
        index = choice.topk(gate.top_k).indices
        gates = values.gather(1, index)
        gates = gates / gates.sum(1, keepdim=True) * gate.routed_scaling_factor
    else:
        gates, index = scores.index_fill(1, removed, -torch.inf).softmax(1).topk(gate.top_k)
        gates = gates / gates.sum(1, keepdim=True)
    return scores, gates, index


@pytest.mark.parametrize("name", NAMES)
def test_pruning_is_shrinking_by_hand_and_masking_the_router(checkpoints, name):
    swap = swap_model(checkpoints[name])
    layers = swap.layout.layers
    retained = {layers[0]: (0, 2, 5, 7), layers[1]: (1, 2, 3, 4, 6)}
    put(swap, None, retained)
    found = logits(swap.model)
    shrunk, masked = (transformers_model(checkpoints[name]) for _ in range(2))
    for layer, kept in retained.items():
        shrink(shrunk, layer, kept)
        gate = masked.model.layers[layer].mlp.gate
        removed = torch.tensor(sorted(set(range(8)) - set(kept)))
        gate.forward = partial(masked_router, gate, removed)
    close(found, logits(shrunk))
    close(found, logits(masked))
    assert not torch.allclose(found, logits(transformers_model(checkpoints[name])), atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_fewer_experts_used_is_the_config_saying_so(checkpoints, name):
    swap = swap_model(checkpoints[name])
    put(swap, experts_used=1)
    close(logits(swap.model), logits(transformers_model(checkpoints[name], num_experts_per_tok=1)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [GGUF, SAFETENSORS], ids=lambda t: t.name)
def test_every_group_in_f32_is_the_original(checkpoints, name, target, tmp_path):
    swap = swap_model(checkpoints[name], tmp_path, target)
    before = snapshot(swap.model)
    with torch.no_grad():
        for parameter in swap.model.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
    put(swap, "F32")
    after = snapshot(swap.model)
    routers = {k.source for k in swap.layout.full_precision if k.role.has_row_per_expert}
    assert all(torch.equal(after[k], v) for k, v in before.items() if k not in routers)


def test_a_group_changes_nothing_but_its_own_weights(checkpoints, tmp_path):
    swap = swap_model(checkpoints["deepseek"], tmp_path)
    before = snapshot(swap.model)
    formats = dict.fromkeys(swap.layout.groups)
    formats["layers.1.attention.v_b"] = "Q4_0"
    swap.put(Candidate(format_of=formats, retained_experts=swap.retained, experts_used=2))
    after = snapshot(swap.model)
    assert {k for k in after if not torch.equal(after[k], before[k])} == {
        "model.layers.1.self_attn.kv_b_proj.weight"
    }
    changed = after["model.layers.1.self_attn.kv_b_proj.weight"].view(4, 64, 256)
    original = before["model.layers.1.self_attn.kv_b_proj.weight"].view(4, 64, 256)
    assert torch.equal(changed[:, :32], original[:, :32])
    assert (changed[:, 32:] != original[:, 32:]).any(-1).all()


@pytest.mark.parametrize(
    "missing",
    [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.2.self_attn.kv_a_layernorm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.gate.weight",
        "lm_head.weight",
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_raises(checkpoints, change_checkpoint, missing):
    path = change_checkpoint(checkpoints["deepseek"], lambda tensors: tensors.pop(missing))
    with pytest.raises(CheckpointError, match="checkpoint"):
        swap_model(path, target=SAFETENSORS)


@pytest.mark.parametrize(
    "config",
    [
        {"first_k_dense_replace": 2},
        {"q_lora_rank": None},
        {"vocab_size": 500},
        {"intermediate_size": 64},
        {"moe_intermediate_size": 32},
        {"kv_lora_rank": 128},
    ],
    ids=str,
)
def test_a_config_of_another_model_raises(checkpoints, change_checkpoint, config):
    path = change_checkpoint(checkpoints["deepseek"], **config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        swap_model(path, target=SAFETENSORS)


def test_a_head_in_the_checkpoint_counts_whatever_the_config_says(checkpoints, change_checkpoint):
    swap = swap_model(change_checkpoint(checkpoints["qwen3"], tie_word_embeddings=True))
    assert torch.equal(logits(swap.model), logits(swap_model(checkpoints["qwen3"]).model))


def test_nothing_is_left_uninitialised_after_pruning(checkpoints):
    swap = swap_model(checkpoints["deepseek"])
    put(swap, None, {1: (0, 1), 2: (5, 6, 7)})
    assert all(np.isfinite(v.numpy()).all() for v in snapshot(swap.model).values())
    assert swap.retained == {1: (0, 1), 2: (5, 6, 7)}


@pytest.mark.parametrize("name", NAMES)
def test_a_put_that_fails_does_not_spoil_the_next(checkpoints, name, tmp_path):
    swap = swap_model(checkpoints[name], tmp_path)
    before = snapshot(swap.model)
    with pytest.raises(KeyError):
        swap.put(
            Candidate(
                format_of={"no such group": None},
                retained_experts=dict.fromkeys(swap.layout.layers, (0, 3, 4)),
                experts_used=1,
            )
        )
    swap.reset()
    after = snapshot(swap.model)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_stop_while_experts_are_resized_leaves_nothing_wrong(checkpoints, monkeypatch):
    swap = swap_model(checkpoints["deepseek"])
    everyone = Candidate.original(swap.layout)
    few = dict.fromkeys(swap.layout.layers, (0, 3, 4))
    with torch.inference_mode():
        expected = swap.model(IDS).logits.clone()
    for name in ("resize_experts", "install_full_precision"):
        plain = getattr(model, name)

        def stopped(*args, plain=plain):
            plain(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(model, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                swap.put(replace(everyone, retained_experts=few, experts_used=1))
        swap.put(everyone)
        with torch.inference_mode():
            torch.testing.assert_close(swap.model(IDS).logits, expected, rtol=0, atol=0)
