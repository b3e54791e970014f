"""The statistics pass against a naive one: transformers' eager model, plain hooks, loops."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from allocator.checkpoint.reading import read_inventory
from allocator.families import Role
from allocator.profiling.statistics import collect
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF, SAFETENSORS

torch.set_num_threads(1)
LENGTHS = (17, 17, 9, 21, 21)


def no_formats(*args):
    pytest.fail("the statistics pass runs the original")


@pytest.fixture(scope="module", params=["deepseek", "qwen3", "qwen3_tied"])
def path(request, checkpoints):
    return checkpoints[request.param]


@pytest.fixture(scope="module")
def layout(path):
    return GGUF.layout(read_inventory(path))


@pytest.fixture(scope="module")
def documents(make_documents):
    return make_documents(LENGTHS)


@pytest.fixture(scope="module")
def swap(layout):
    return SwapModel(layout, no_formats)


@pytest.fixture(scope="module")
def found(swap, layout, documents):
    return collect(swap.model, layout, documents, batch_tokens=40)


class Naive:
    """Inputs of every linear layer, and what every token did in every expert."""

    @torch.inference_mode()
    def __init__(self, path, documents):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        model.set_experts_implementation("eager")
        self.inputs, self.outputs, self.calls = {}, {}, {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self.linear(name))
            if name.endswith("mlp.experts"):
                module.register_forward_hook(self.experts(int(name.split(".")[2])))
        for document in documents:
            model(torch.tensor([document.ids]), use_cache=False)

    def linear(self, name):
        def hook(module, args, output):
            self.inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
            self.outputs.setdefault(name, []).append(output.reshape(-1, output.shape[-1]))

        return hook

    def experts(self, layer):
        def hook(module, args, output):
            for x, experts, gates in zip(*args, strict=True):
                for e, g in zip(experts.tolist(), gates, strict=True):
                    gate, up = (module.gate_up_proj[e] @ x).chunk(2)
                    inner = functional.silu(gate) * up
                    out = module.down_proj[e] @ inner
                    self.calls.setdefault(layer, []).append((e, x, inner, out, float(g)))

        return hook


@pytest.fixture(scope="module")
def naive(path, documents):
    return Naive(path, documents)


def mean_square(rows):
    return torch.cat(rows).double().square().mean(0).numpy()


def test_linear_groups_get_the_mean_square_of_their_input(found, naive, layout):
    checked = 0
    for name, group in layout.groups.items():
        special = (Role.EMBEDDING, Role.HEAD, Role.K_B, Role.V_B)
        if group.role.is_expert or group.role in special:
            continue
        expected = mean_square(naive.inputs[group.sources[0].removesuffix(".weight")])
        np.testing.assert_allclose(found.importance[name], expected, rtol=1e-4)
        checked += 1
    assert checked > 6


def test_halves_of_kv_b(found, naive, layout):
    groups = [g for g in layout.groups.values() if g.role in (Role.K_B, Role.V_B)]
    if layout.inventory.family.model_type != "deepseek_v3":
        assert not groups
        return
    for group in groups:
        at = f"model.layers.{group.layer}.self_attn"
        if group.role is Role.V_B:
            expected = mean_square(naive.inputs[f"{at}.kv_b_proj"])
            assert expected.shape == (256,)
        else:  # transformers: view(..., heads, nope + rope), the first nope are not rotated
            q = torch.cat(naive.outputs[f"{at}.q_b_proj"])
            expected = np.stack([mean_square([q[:, 48 * h : 48 * h + 32]]) for h in range(4)])
        np.testing.assert_allclose(found.importance[group.name], expected, rtol=1e-4)


def test_the_embedding_counts_as_a_head_only_when_it_is_one(found, naive, layout):
    expected = mean_square(naive.inputs["lm_head"])
    if layout.inventory.tied_embeddings:
        np.testing.assert_allclose(found.importance["embedding"], expected, rtol=1e-4)
    else:
        np.testing.assert_allclose(found.importance["head"], expected, rtol=1e-4)
        assert "embedding" not in found.importance
    assert set(found.importance) == {n for n, g in layout.groups.items() if g.importance}


def test_counts_and_saliency(found, naive, layout):
    assert found.n_tokens == sum(LENGTHS)
    for layer in layout.layers:
        calls = naive.calls[layer]
        assert sum(found.counts[layer]) == sum(LENGTHS) * 2
        for e in range(8):
            mine = [(float(out.norm()), g) for expert, _, _, out, g in calls if expert == e]
            n = len(mine)
            assert found.counts[layer][e] == n
            expected = {
                "reap": sum(norm * g for norm, g in mine) / max(n, 1),
                "norm": sum(norm for norm, _ in mine) / max(n, 1),
                "frequency": n,
                "gate": sum(g for _, g in mine),
            }
            for method, value in expected.items():
                assert found.saliency[method][layer][e] == pytest.approx(value, rel=1e-4), method


def test_expert_importance_is_per_expert(found, naive, layout):
    for layer in layout.layers:
        for kind, slot in (("gate", 1), ("up", 1), ("down", 2)):
            values = found.importance[f"layers.{layer}.experts.{kind}"]
            calls = naive.calls[layer]
            everyone = mean_square([c[slot][None] for c in calls])
            for e in range(8):
                mine = [c[slot][None] for c in calls if c[0] == e]
                expected = mean_square(mine) if mine else everyone
                np.testing.assert_allclose(values[e], expected, rtol=1e-4, atol=1e-7)


def test_an_unreached_expert_is_listed(found, layout):
    zero = [(layer, e) for layer, row in found.counts.items() for e in range(8) if not row[e]]
    assert found.unreached == zero
    if layout.inventory.family.model_type == "deepseek_v3":
        assert (1, 5) in zero


def test_importance_has_shape_dtype_and_no_zeros(found, layout):
    for name, values in found.importance.items():
        group = layout.groups[name]
        assert values.dtype == np.float32
        assert values.shape[-1] == group.shape[-1]
        np.broadcast_shapes(values.shape, (*group.shape[:-2], group.shape[-1]))
        assert (values > 0).all()


def test_a_channel_that_is_always_zero_keeps_a_little(checkpoints, change_checkpoint, documents):
    def edit(tensors):
        tensors["model.layers.1.input_layernorm.weight"][3] = 0

    layout = SAFETENSORS.layout(read_inventory(change_checkpoint(checkpoints["qwen3"], edit)))
    values = collect(SwapModel(layout, no_formats).model, layout, documents).importance
    assert 0 < values["layers.1.attention.q"][3] < 1e-5 * values["layers.1.attention.q"].mean()


@torch.inference_mode()
def test_the_model_is_left_as_it_was(layout, documents):
    model = SwapModel(layout, no_formats).model
    ids = torch.tensor([documents[0].ids])
    before = model(ids).logits

    def hooks():
        return [{**m._forward_hooks, **m._forward_pre_hooks} for m in model.modules()]

    at_first = hooks()
    collect(model, layout, documents)
    assert torch.equal(model(ids).logits, before)
    assert hooks() == at_first

    def fail(*args):
        raise RuntimeError("stop")

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        collect(model, layout, documents)
    handle.remove()
    assert hooks() == at_first


def test_attention_without_a_query_rank(make_checkpoint, tmp_path, documents):
    """llama.cpp takes such models with 26 or 27 layers: Moonlight's shape."""
    path = make_checkpoint(
        tmp_path / "x", "deepseek", q_lora_rank=None, num_hidden_layers=27, kv_lora_rank=32
    )
    layout = GGUF.layout(read_inventory(path))
    found = collect(SwapModel(layout, no_formats).model, layout, documents[:1])
    q = Naive(path, documents[:1]).outputs["model.layers.9.self_attn.q_proj"]
    expected = np.stack([mean_square([torch.cat(q)[:, 48 * h : 48 * h + 32]]) for h in range(4)])
    np.testing.assert_allclose(found.importance["layers.9.attention.k_b"], expected, rtol=1e-3)
