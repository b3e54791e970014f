"""The re-opened checkpoint against the scored candidate, its memory, and stock transformers."""

import gc
import json
import shutil
from functools import partial
from math import prod

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import allocator.transformers  # noqa: F401 - registers the quantizer
from allocator.errors import AllocatorError, CheckpointError, VerifyError
from allocator.export.manifest import file_digest, files_in
from allocator.export.safetensors.directory import FILE_NAME
from allocator.export.safetensors.loading import load
from allocator.export.tensors import EncodedTensors
from allocator.export.verification import verify
from allocator.targets import target_named

CASES = [("deepseek", "gguf"), ("deepseek", "safetensors"), ("qwen3", "gguf"),
         ("qwen3", "safetensors")]  # fmt: skip
IDS = torch.tensor([[0, 17, 301, 44, 5, 123, 9, 77], [0, 3, 8, 400, 401, 1, 2, 3]])


@pytest.fixture(params=CASES, ids="-".join)
def opened(request, case, written):
    """The case, and its safetensors directory."""
    return case(*request.param), written(*request.param, "safetensors").folder


def candidate_logits(made):
    allocation = made.allocation()
    swap = made.scorer.swap
    swap.put_allocation(allocation)
    with torch.inference_mode():
        return swap.model(IDS).logits


@torch.inference_mode()
def test_logits_are_the_candidates(opened):
    made, folder = opened
    expected = candidate_logits(made)
    assert expected.std() > 0.1
    for dense in (False, True):
        model = load(folder, dense=dense)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)  # again


@torch.inference_mode()
@pytest.mark.parametrize("name", ["deepseek", "qwen3"])
def test_weights_of_parts_are_each_experts_decoding(case, written, name):
    """Against gguf-py's decoding of each expert's own encoding, from the file."""
    made = case(name, "safetensors")
    folder = written(name, "safetensors", "safetensors").folder
    allocation, model = made.allocation(), load(folder, dense=True)
    for group, text in allocation.formats:
        if ":" not in text:
            continue
        layer = int(group.split(".")[1])
        experts = model.model.layers[layer].mlp.experts
        fused = experts.gate_up_proj
        whole = experts.down_proj if group.endswith("down") else fused[:, fused.shape[1] // 2 :]
        kept, seen = allocation.retained_experts[layer], []
        for piece in text.split("+"):
            fmt, numbers = piece.split(":")
            for expert in map(int, numbers.split(",")):
                encoded = made.encodings.encoded(group, fmt)[expert]
                expected = dequantize(encoded, GGMLQuantizationType[fmt])
                assert (whole[kept.index(expert)].numpy() == expected).all(), (group, expert)
                seen.append(expert)
        assert sorted(seen) == list(kept)


def rewritten(folder, change):
    """Writes the directory's file again with its tensors changed."""
    tensors = load_file(folder / FILE_NAME)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / FILE_NAME)


def test_parts_that_are_missing_or_of_other_sizes_are_refused(written, tmp_path):
    source = written("qwen3", "safetensors", "safetensors").folder

    def missing(tensors):
        del tensors[next(n for n in tensors if n.startswith("layers.1.experts.down."))]

    def moved(tensors):
        name = next(n for n in tensors if n.startswith("layers.1.experts.down."))
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    def renamed(tensors):
        name = next(n for n in tensors if n.startswith("layers.1.experts.down."))
        tensors[name.rpartition(".")[0] + ".F32"] = tensors.pop(name)

    for change in (missing, moved, renamed):
        folder = tmp_path / change.__name__
        shutil.copytree(source, folder)
        rewritten(folder, change)
        with pytest.raises(CheckpointError, match="materialize the checkpoint again") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_tied_embeddings(checkpoints, tmp_path):
    from allocator.checkpoint.reading import read_inventory
    from allocator.codecs.encodings import Encodings
    from allocator.decision.allocation import Allocation
    from allocator.export.checkpoint import materialize
    from allocator.export.tensors import EncodedTensors
    from allocator.scoring.swap_model import SwapModel
    from allocator.targets import SAFETENSORS

    layout = SAFETENSORS.layout(read_inventory(checkpoints["qwen3_tied"]))
    allocation = Allocation.of(
        target="safetensors", retained=dict.fromkeys(layout.layers, (0, 3, 5)),
        formats=dict.fromkeys(layout.groups, "Q8_0"), experts_used=2,
    )  # fmt: skip
    encodings = Encodings(tmp_path / "bank", layout, {})
    source = EncodedTensors(encodings, allocation)
    materialize(source, tmp_path / "out", container="safetensors", importance="i")
    swap = SwapModel(layout, encodings.decoded)
    swap.put_allocation(allocation)
    with torch.inference_mode():
        expected = swap.model(IDS).logits
        for dense in (False, True):
            logits = load(tmp_path / "out", dense=dense)(IDS).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def live_storages():
    """Bytes by address of the memory behind every tensor that is alive."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def largest_layer(made, allocation):
    """float32 bytes of the decoder layer with the most weights."""
    layers = {}
    for group in made.layout.groups.values():
        shape = group.shape_with(allocation.counts.get(group.layer, 0))
        layers[group.layer] = layers.get(group.layer, 0) + 4 * prod(shape)
    for kept in made.layout.full_precision:
        shape = kept.shape_with(allocation.counts.get(kept.layer, 0))
        layers[kept.layer] = layers.get(kept.layer, 0) + 4 * prod(shape)
    return max(n for layer, n in layers.items() if layer is not None)


ACTIVATIONS = 64 << 10  # one token's hidden states, masks and logits, and the rotary tables


@torch.inference_mode()
@pytest.mark.parametrize("opener", [load, AutoModelForCausalLM.from_pretrained])
def test_resident_bytes_stay_below_the_file_and_one_layer(opened, opener, request):
    made, folder = opened
    allocation = made.allocation()
    file = allocation.nbytes(made.layout, target_named("safetensors")).tensors
    layer = largest_layer(made, allocation)
    before = live_storages()
    gc.freeze()  # looks at what is made from now on
    request.addfinalizer(gc.unfreeze)
    model = opener(folder)
    seen = []

    def measure(*_):
        now = live_storages()
        seen.append(sum(n for at, n in now.items() if at not in before))

    watched = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    for module in watched:
        module.register_forward_pre_hook(measure)  # after the one that fills it
    model(IDS[:1, :1], use_cache=False)
    assert len(seen) == len(watched)
    assert max(seen) <= file + layer + ACTIVATIONS
    assert max(seen) >= layer  # the measurement sees the decoded layer
    measure()
    assert seen[-1] <= file + ACTIVATIONS  # and afterwards nothing is decoded
    assert layer > 2 * ACTIVATIONS


def test_generate_goes_through_load(opened):
    _, folder = opened
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    found = load(folder).generate(IDS, attention_mask=mask, **options)
    assert found.shape == (2, IDS.shape[1] + 5)
    dense = load(folder, dense=True).generate(IDS, attention_mask=mask, **options)
    assert torch.equal(found, dense)
    with torch.inference_mode():  # greedy by hand, without a cache
        model, ids = load(folder), IDS
        for _ in range(5):
            logits = model(ids, use_cache=False).logits[:, -1]
            logits[:, 0] = -torch.inf  # the end of text, held back by min_new_tokens
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


# -- what is not loaded


@pytest.fixture
def copy(written, tmp_path):
    source = written("qwen3", "safetensors", "safetensors").folder
    return shutil.copytree(source, tmp_path / "copy")


@torch.inference_mode()
def test_a_directory_of_an_earlier_version_is_loaded_and_verified(case, written, copy):
    made = case("qwen3", "safetensors")
    (copy / FILE_NAME).rename(copy / "encoded.safetensors")
    config = json.loads((copy / "config.json").read_text())
    del config["transformers_weights"], config["quantization_config"]["schema"]
    (copy / "config.json").write_text(json.dumps(config))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["file"] = "encoded.safetensors"
    names = [name for name in files_in(copy) if name != "manifest.json"]
    manifest["sha256"] = {name: file_digest(copy / name) for name in names}
    del manifest["checksum"]  # which a hand-made change goes without
    (copy / "manifest.json").write_text(json.dumps(manifest))
    folder = written("qwen3", "safetensors", "safetensors").folder
    assert torch.equal(load(copy)(IDS).logits, load(folder)(IDS).logits)
    verify(copy, partial(EncodedTensors, made.encodings), made.scorer)


def test_a_foreign_directory_is_refused(checkpoints):
    with pytest.raises(VerifyError, match="quant_method None"):
        load(checkpoints["qwen3"])


@pytest.mark.parametrize("n", [0, 7, 100, -1, -100_000])
def test_a_truncated_file_is_refused(copy, n):
    path = copy / FILE_NAME
    path.write_bytes(path.read_bytes()[:n])
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load(copy)


def test_a_missing_tensor_is_refused(copy):
    from safetensors.torch import load_file, save_file

    path = copy / FILE_NAME
    for name in ("layers.1.attention.q", "model.layers.0.input_layernorm.weight"):
        tensors = load_file(path)
        assert name in tensors
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises(CheckpointError, match="0 weights of"):
            load(copy)
        save_file(tensors, path)


@pytest.mark.parametrize(
    "odd", ["surprise", "layers.x.experts", "model.layers.9.norm.weight", "model.layers.0.odd"]
)
def test_an_unknown_tensor_is_refused(copy, odd):
    from safetensors.torch import load_file, save_file

    path = copy / FILE_NAME
    save_file({**load_file(path), odd: torch.zeros(3)}, path)
    with pytest.raises(AllocatorError):
        load(copy)


def test_a_tensor_of_another_shape_is_refused(copy):
    from safetensors.torch import load_file, save_file

    path = copy / FILE_NAME
    tensors = load_file(path)
    tensors["head"] = tensors["head"][:-1].clone()
    save_file(tensors, path)
    with pytest.raises(AllocatorError):
        load(copy)


def test_a_config_without_its_allocation_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["allocation"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(AllocatorError):
        load(copy)
