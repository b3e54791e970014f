"""Experts of a layer in one tensor: where they may lie, and in which order."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_rows, read_tensor
from allocator.errors import CheckpointError
from allocator.families import Role, family_of, registry

L = "model.layers.{}.mlp.experts."


@pytest.fixture
def stacked(checkpoints, tmp_path):
    """`write(layer, ...)`: the DeepSeek checkpoint with its second layer's experts as another's."""
    source = checkpoints["deepseek"]
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())

    def write(layer, *, keep=True, alternating=False, **changes):
        made = dict(tensors)
        halves = [
            np.stack([made[L.format(1) + f"{e}.{kind}_proj.weight"] for e in range(8)])
            for kind in ("gate", "up")
        ]
        if alternating:
            both = np.stack(halves, 2).reshape(8, -1, halves[0].shape[-1])
        else:
            both = np.concatenate(halves, 1)
        if not keep:
            for name in [n for n in made if n.startswith(L.format(1)) and "down" not in n]:
                del made[name]
        made[L.format(layer) + "gate_up_proj"] = both
        save_file(made, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return tmp_path, halves

    return write


def test_a_stack_in_a_dense_layer_is_one_line(stacked):
    path, _ = stacked(0)
    with pytest.raises(CheckpointError, match="layer 0 lacks nothing and has mlp") as e:
        read_inventory(path)
    assert "\n" not in str(e.value)


def test_a_stack_of_multi_token_prediction_is_left_out(stacked):
    path, _ = stacked(3, num_nextn_predict_layers=1)
    inventory = read_inventory(path)
    tensor = inventory.tensors[L.format(3) + "gate_up_proj"]
    assert (tensor.role, tensor.layer) == (Role.NEXTN, 3)
    assert all(t.layer != 3 for t in inventory.tensors.values() if t.role.is_expert)


def test_rows_of_gate_and_up_may_take_turns(stacked, monkeypatch):
    path, halves = stacked(1, keep=False, alternating=True)
    family = family_of({"model_type": "deepseek_v3"})
    stacks = tuple(replace(s, alternating=len(s.roles) == 2) for s in family.stacks)
    monkeypatch.setitem(registry._FAMILIES, family.model_type, replace(family, stacks=stacks))
    inventory = read_inventory(path)
    for kind, matrices in zip(("gate", "up"), halves, strict=True):
        for expert, matrix in enumerate(matrices):
            name = L.format(1) + f"{expert}.{kind}_proj.weight"
            np.testing.assert_array_equal(read_tensor(inventory, name), matrix)
            np.testing.assert_array_equal(read_rows(inventory, name, 5, 9), matrix[5:9])


def test_names_may_have_another_prefix():
    family = family_of({"model_type": "qwen3_moe"})
    nested = replace(family, prefixes=(("model.language_model.", "model."),))
    name = "model.language_model.layers.3.mlp.experts.5.up_proj.weight"
    assert family.match(name) is None
    assert nested.match(name) == family.match(name.replace("language_model.", ""))
    assert nested.match_stack("model.language_model.layers.3.mlp.experts.down_proj")[1] == 3
    assert nested.foreign_layer("model.language_model.layers.48.eh_proj.weight") == 48
