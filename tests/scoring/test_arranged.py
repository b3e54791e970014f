"""Models whose matrices are those of a GGUF: what they compute, and what is measured of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from allocator.checkpoint.reading import read_inventory
from allocator.codecs import codec_of
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.export.checkpoint import materialize
from allocator.export.safetensors.loading import load
from allocator.export.tensors import EncodedTensors
from allocator.finishing.relative_changes import NORMS, RelativeChanges
from allocator.formats import format_named
from allocator.profiling.second_moments import second_moments
from allocator.profiling.statistics import collect
from allocator.scoring.candidates import Candidate, Weights
from allocator.scoring.documents import Document
from allocator.scoring.streamed_model import States, StreamedModel
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF, SAFETENSORS
from allocator.testing.family_runs import random_checkpoint

K_HEADS, SHARING, WIDTH = 2, 3, 16
CONFIG = {
    "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96, "intermediate_size": 96, "num_hidden_layers": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": WIDTH, "linear_value_head_dim": WIDTH,
    "linear_num_key_heads": K_HEADS, "linear_num_value_heads": K_HEADS * SHARING,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
OUT, QKV, Z = "layers.0.linear.out", "layers.0.linear.qkv", "layers.0.linear.z"
FORMAT = "Q4_0"  # blocks of 32 weights, of two heads


def tiled(values):
    """Channels of values `(..., heads * width)` with the first head of every head of keys first."""
    by_head = values.reshape(*values.shape[:-1], K_HEADS, SHARING, WIDTH)
    return np.ascontiguousarray(np.swapaxes(by_head, -3, -2)).reshape(values.shape)


class Case:
    """A random checkpoint, in both layouts."""

    def __init__(self, model_type, folder):
        self.checkpoint = random_checkpoint(CONFIG | {"model_type": model_type}, folder)
        inventory = read_inventory(folder)
        self.layouts = {"gguf": GGUF.layout(inventory), "own": SAFETENSORS.layout(inventory)}
        self.swaps = {
            name: SwapModel(layout, lambda *_: pytest.fail("nothing is encoded"))
            for name, layout in self.layouts.items()
        }
        self.documents = [Document(tuple(ids), "") for ids in self.checkpoint.ids]
        self.importance = {
            name: collect(swap.model, swap.layout, self.documents).importance
            for name, swap in self.swaps.items()
        }

    def weight(self, name):
        return self.checkpoint.model.get_submodule(f"model.layers.0.linear_attn.{name}").weight


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5_moe_text"])
def the(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("arranged"))


def changed(weights, importance):
    """Weights after encoding and decoding."""
    fmt = format_named(FORMAT)
    codec = codec_of(fmt)
    encoded = codec.encode(np.ascontiguousarray(weights), fmt, importance)
    return torch.from_numpy(codec.decode(encoded, fmt))


def encode_by_hand(the):
    """Encodes the transformers model's linear attention as llama.cpp has it, in place.

    Returns:
        The groups of the layout that these are.
    """
    importance, (out, *_) = the.importance["own"], [the.weight("out_proj")]
    if hasattr(the.checkpoint.model.model.layers[0].linear_attn, "in_proj_qkvz"):
        whole = the.weight("in_proj_qkvz")
        by_head = whole.detach().view(K_HEADS, -1, 64)
        widths = [WIDTH, WIDTH, SHARING * WIDTH, SHARING * WIDTH]
        parts = [p.reshape(-1, 64) for p in by_head.split(widths, dim=1)]
        weights = importance["layers.0.linear.qkvz"]
        qkv = changed(torch.cat(parts[:3]).numpy(), weights)
        *three, z = *qkv.split([len(p) for p in parts[:3]]), changed(parts[3].numpy(), weights)
        made = torch.cat([p.view(K_HEADS, -1, 64) for p in (*three, z)], 1)
        whole.data.copy_(made.view(whole.shape))
        out.data.copy_(changed(out.detach().numpy(), importance[OUT]))
        return QKV, Z, OUT
    own = changed(tiled(out.detach().numpy()), tiled(importance[OUT]))
    by_head = own.view(64, SHARING, K_HEADS, WIDTH).transpose(1, 2)
    out.data.copy_(by_head.reshape(out.shape))
    return (OUT,)


def test_a_candidate_is_scored_as_its_file_is_computed(the, tmp_path):
    layout, model = the.layouts["gguf"], the.checkpoint.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = the.checkpoint.logits
    groups = encode_by_hand(the)
    wanted = the.checkpoint.logits
    model.load_state_dict(before)
    assert not torch.allclose(wanted[0], plain[0], atol=1e-2)
    encodings = Encodings(tmp_path, layout, the.importance["gguf"])
    swap = SwapModel(layout, encodings.decoded)
    candidate = Candidate.original(layout)
    formats = {**candidate.format_of, **dict.fromkeys(groups, FORMAT)}
    candidate = replace(candidate, format_of=formats)
    swap.put(candidate)
    streamed = StreamedModel(
        layout, Weights(layout, lambda: Encodings(tmp_path / "b", layout, the.importance["gguf"]))
    )
    for document, logits in zip(the.documents, wanted, strict=True):
        with torch.no_grad():
            own = swap.model(torch.tensor([document.ids])).logits[0]
            states = [States(candidate, [0], streamed.embed([[document]], candidate))]
            for layer in range(2):
                streamed.run(layer, states)
            other = streamed.logits(states[0].hidden[0][0], candidate)
        torch.testing.assert_close(own, logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(other, logits, rtol=0, atol=1e-4)


def test_importance_is_that_of_the_files_columns(the):
    ours, own = the.importance["gguf"], the.importance["own"]
    if Z in own:
        np.testing.assert_allclose(ours[OUT], tiled(own[OUT]), rtol=1e-4)
        assert not np.allclose(ours[OUT], own[OUT], rtol=0.05)
    else:
        np.testing.assert_allclose(ours[QKV], own["layers.0.linear.qkvz"], rtol=1e-4)
        np.testing.assert_array_equal(ours[QKV], ours[Z])
        np.testing.assert_allclose(ours[OUT], own[OUT], rtol=1e-4)


@pytest.mark.parametrize("fisher", [False, True])
def test_second_moments_are_those_of_the_files_columns(the, fisher):
    def moments(name):
        swap = the.swaps[name]
        chosen = [group for group in swap.layout.groups.values() if group.name == OUT]
        ((_, h),) = second_moments(swap, the.documents, chosen, fisher=fisher)
        return h

    ours, own = moments("gguf"), moments("own").numpy()
    if Z in the.layouts["own"].groups:
        own = tiled(tiled(own).T).T
    np.testing.assert_allclose(ours.numpy(), own, rtol=1e-2, atol=1e-4 * np.abs(own).max())


def test_encoded_keys_and_values_leave_linear_attention_alone(the):
    swap, exact = the.swaps["gguf"], the.checkpoint.logits
    swap.put(replace(Candidate.original(swap.layout), kv_format="q8_0"))
    with torch.no_grad():
        own = swap.model(torch.tensor([the.documents[0].ids])).logits[0]
    swap.reset()
    assert 1e-5 < (own - exact[0]).abs().mean() < 0.05


def test_norms_that_add_one_to_their_weights_change_by_the_sums(the, tmp_path):
    layout = the.layouts["gguf"]
    whole = Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, tuple(range(8))),
        formats=dict.fromkeys(layout.groups, "F32"),
        experts_used=2,
    )
    source = EncodedTensors(Encodings(tmp_path, layout, {}), whole)
    changes = RelativeChanges(source, frozenset({NORMS}))
    moved = changes.tensors(np.full(changes.n, 1 / 8, np.float32))
    of_one = {"added": "model.norm.weight", "plain": "model.layers.0.linear_attn.norm.weight"}
    for kind, name in of_one.items():
        before = the.checkpoint.model.get_parameter(name).detach().numpy()
        step = moved[name].data.reshape(-1).view(np.float32) - before
        factors = before + 1 if kind == "added" else before
        wanted = np.sqrt(np.square(factors).mean()) / 8
        np.testing.assert_allclose(step, np.full_like(step, wanted), rtol=0.05)


def test_a_loaded_checkpoint_computes_what_its_candidate_does(the, tmp_path):
    layout = the.layouts["gguf"]
    formats = dict.fromkeys(layout.groups, FORMAT)
    allocation = Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, (0, 1, 2, 4, 5, 7)),
        formats=formats,
        experts_used=2,
    )
    encodings = Encodings(tmp_path / "bank", layout, the.importance["gguf"])
    materialize(
        EncodedTensors(encodings, allocation), tmp_path / "own", container="safetensors",
        importance="",
    )  # fmt: skip
    swap = SwapModel(layout, encodings.decoded)
    swap.put(Candidate.of(allocation))
    for dense in (False, True):
        loaded = load(tmp_path / "own", dense=dense)
        for document in the.documents:
            ids = torch.tensor([document.ids])
            with torch.no_grad():
                torch.testing.assert_close(
                    loaded(ids).logits, swap.model(ids).logits, rtol=0, atol=1e-5
                )
