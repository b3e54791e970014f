"""Experts padded with zeros: against a checkpoint with the zeros in its files, and transformers."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator import api
from allocator.app import estimate as searching
from allocator.app.planning import summarised
from allocator.checkpoint.padding import padded
from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_rows, read_tensor
from allocator.errors import AllocatorError, CheckpointError
from allocator.finishing import estimate as finishing
from allocator.scoring.candidates import Weights
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.swap_model import SwapModel
from allocator.targets import TARGETS
from allocator.targets.group_weights import group_digest
from allocator.targets.layout import width_notes
from allocator.testing.family_runs import random_checkpoint

CONFIG = {
    "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 160,
    "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 256,
    "kv_lora_rank": 256, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 64,
    "max_position_embeddings": 128, "routed_scaling_factor": 2.5, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return random_checkpoint(CONFIG, tmp_path_factory.mktemp("narrow"))


@pytest.fixture(scope="module")
def twin(case, tmp_path_factory):
    """The same with zeros in its files: routed experts of 256, both shared ones together 512."""
    folder, bits = tmp_path_factory.mktemp("wide"), {}
    model = {n: t for n, t in case.model.state_dict().items() if ".mlp.experts." not in n}
    model.pop("lm_head.weight")
    for e in range(4):
        gate_up = case.model.model.layers[1].mlp.experts.gate_up_proj[e]
        down = case.model.model.layers[1].mlp.experts.down_proj[e]
        at = f"model.layers.1.mlp.experts.{e}."
        model |= {f"{at}gate_proj.weight": gate_up[:160], f"{at}up_proj.weight": gate_up[160:]}
        model[f"{at}down_proj.weight"] = down
    for name, tensor in model.items():
        values = tensor.detach()
        if ".experts." in name or ".shared_experts." in name:
            more = 96 * (2 if "shared" in name else 1)
            edge = (0, more) if "down_proj" in name else (0, 0, 0, more)
            values = torch.nn.functional.pad(values, edge)
        bits[name] = values.to(torch.bfloat16).contiguous()
    save_file(bits, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((case.path / "config.json").read_text()) | {"moe_intermediate_size": 256}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_it_is_the_checkpoint_with_zeros_in_its_files(case, twin):
    inventory, wide = padded(read_inventory(case.path), 256), read_inventory(twin)
    assert dict(inventory.config) == dict(wide.config)
    assert {n: t.shape for n, t in inventory.tensors.items()} == {
        n: t.shape for n, t in wide.tensors.items()
    }
    for name in wide.tensors:
        np.testing.assert_array_equal(read_tensor(inventory, name), read_tensor(wide, name))
    one, other = (TARGETS["gguf"].layout(i) for i in (inventory, wide))
    assert {n: g.offered() for n, g in one.groups.items()} == {
        n: g.offered() for n, g in other.groups.items()
    }
    assert "IQ2_XXS" in {f.name for f in one.groups["layers.1.experts.down"].offered()}


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (150, 170), (158, 160), (160, 200), (0, 256)])
def test_rows_are_those_of_the_whole(case, start, stop):
    inventory = padded(read_inventory(case.path), 256)
    for name in (GATE, DOWN):
        whole = read_tensor(inventory, name)
        np.testing.assert_array_equal(read_rows(inventory, name, start, stop), whole[start:stop])


def test_it_computes_what_transformers_computes_of_the_files(case):
    inventory = padded(read_inventory(case.path), 256)
    swap = SwapModel(TARGETS["safetensors"].layout(inventory), lambda *_: pytest.fail("encoded"))
    assert swap.model.config.moe_intermediate_size == 256
    for ids, logits in zip(case.ids, case.logits, strict=True):
        with torch.no_grad():
            own = swap.model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(own, logits, rtol=0, atol=2e-5)


def test_effective_bits_count_what_the_files_hold(case):
    inventory = read_inventory(case.path)
    assert padded(inventory, 256).n_searched_weights == inventory.n_searched_weights
    assert padded(inventory, 160) is inventory


def test_what_is_made_of_it_is_not_that_of_the_files(case, tmp_path):
    plain = read_inventory(case.path, digests=tmp_path)
    wide, wider = padded(plain, 256), padded(plain, 320)
    digests = [i.tensor_digest(DOWN) for i in (plain, wide, wider, padded(plain, 256))]
    assert len({*digests}) == 3
    assert digests[1] == digests[3]
    assert wide.tensor_digest("model.norm.weight") == plain.tensor_digest("model.norm.weight")
    assert len({i.digest for i in (plain, wide, wider)}) == 3


def test_equal_weights_have_equal_digests_however_they_are_stored(case, twin):
    groups = [TARGETS["gguf"].layout(padded(read_inventory(p), 256)) for p in (case.path, twin)]
    plain = [group_digest(layout, layout.groups["layers.0.mlp.down"]) for layout in groups]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("width", [128, 159, 321, 0, -256])
def test_a_width_that_is_none_is_one_line(case, width):
    with pytest.raises(CheckpointError, match=f"are 160 wide, cannot be padded to {width}") as e:
        padded(read_inventory(case.path), width)
    assert "\n" not in str(e.value)


def test_a_matrix_of_another_shape_is_one_line(case, tmp_path):
    (stored,) = case.path.glob("*.safetensors")
    tensors = load_file(stored)
    for name in [n for n in tensors if ".shared_experts." in n]:
        tensors[name] = tensors[name][:200, :200].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((case.path / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"shared\.\w+\) has shape \(200, 200\), needed"):
        padded(read_inventory(tmp_path), 256)


@pytest.mark.slow
def test_from_a_search_to_a_file_of_the_width(case, twin, tmp_path, write_study):
    """Its file is that of the checkpoint with zeros in its files; llama.cpp runs it."""
    options = {"cache": tmp_path / "cache", "threads": 1}
    study = write_study(tmp_path / "study", twin, share=0.1)
    toml = study / "study.toml"
    toml.write_text(toml.read_text().replace(f'"{twin}"', f'"{case.path}"\nexpert_width = 256'))
    assert f'"{case.path}"' in toml.read_text()
    api.search(study, trials=3, **options)
    pick = study / "allocations/pick.json"
    folder = tmp_path / "gguf"
    api.materialize(study, pick, folder, container="gguf", **options)
    api.verify(study, folder, tolerance=0.2, **options)
    written = (folder / "model.gguf").read_bytes()
    toml.write_text(toml.read_text().replace(f'"{case.path}"\nexpert_width = 256', f'"{twin}"'))
    with pytest.raises(AllocatorError):
        api.search(study, trials=4, **options)  # another checkpoint
    other = write_study(tmp_path / "other", twin, share=0.1)
    api.search(other, trials=3, **options)
    own = other / "allocations/pick.json"
    api.materialize(other, own, tmp_path / "twin", container="gguf", **options)
    assert (tmp_path / "twin" / "model.gguf").read_bytes() == written


@pytest.mark.parametrize("target", ["gguf", "safetensors"])
def test_whoever_needs_it_is_told(case, target):
    def noted(inventory):
        notes = TARGETS[target].layout(inventory).notes
        return [note for note in notes if "expert_width" in note]

    inventory = read_inventory(case.path)
    assert noted(inventory) == []  # 256 are more than half as much again
    (note,) = noted(padded(inventory, 224))
    assert note.startswith("experts are 224 wide: no format below ")
    assert "expert_width = 256" in note
    assert "14.3% more weights" in note
    assert noted(padded(inventory, 256)) == []


@pytest.mark.parametrize("target", ["gguf", "safetensors"])
def test_padding_does_not_help_rows_of_the_hidden_width(case, tiny, target):
    def noted(inventory):
        layout = TARGETS[target].layout(inventory)
        return layout, [note for note in layout.notes if "experts read" in note]

    assert noted(padded(read_inventory(case.path), 224))[1] == []  # it reads 256
    layout, (note,) = noted(tiny)
    assert note.startswith("experts read 64 values: no format below 4.5 bits (")
    assert "rows of gate and up, nor rows of other matrices that read 64 values" in note
    least = {g.offered()[-1].bits for g in layout.groups.values() if g.shape[-1] == 64}
    assert least == {4.5}
    latent = replace(layout.groups["layers.0.experts.up"], shape=(4, 32, 512))
    down = replace(layout.groups["layers.0.experts.down"], shape=(4, 512, 32))
    assert width_notes(tiny, (latent, down)) == ()


def test_zeros_count_in_time_and_memory_and_in_no_number_of_parameters(case, monkeypatch):
    inventory = read_inventory(case.path)
    layout = TARGETS["safetensors"].layout(padded(inventory, 256))
    added = 256 * 96 * 3 * (4 + 2)  # columns and rows of four routed and two shared experts
    computed = inventory.n_searched_weights + added
    assert layout.inventory.n_computed_weights == computed
    assert summarised(layout.inventory) == summarised(inventory)

    model = StreamedModel(layout, Weights(layout, lambda: pytest.fail("encoded")))
    finisher = SimpleNamespace(plain=SimpleNamespace(layout=layout), model=model, threads=1)
    assert finishing._gradient_bytes(finisher) == 2 * 4 * computed

    scorers = SimpleNamespace(model=model)
    study = SimpleNamespace(scorers=scorers, inventory=layout.inventory, layout=layout)
    clock = itertools.count()  # seconds: one expert is read in one, and computed in one
    monkeypatch.setattr(searching.time, "perf_counter", lambda: next(clock))
    reading, computing = searching._one_expert(study)
    one, idle = 3 * 256 * 256, 2 / 4
    assert reading == pytest.approx(computed / one)
    assert computing * 256 == pytest.approx((computed - idle * 4 * one) / one)


def test_inspected_and_planned_with_a_width(case):
    table = api.inspect(case.path, target="gguf", expert_width=256).set_index("group")
    assert table.loc["layers.1.experts.down", "shape"] == "4x256x256"
    assert table.loc["layers.1.shared.down", "shape"] == "256x512"
    narrow, wide = (api.plan(case.path, expert_width=width) for width in (None, 256))
    assert wide.bounds != narrow.bounds
    with pytest.raises(CheckpointError, match="are 160 wide"):
        api.plan(case.path, expert_width=100)
