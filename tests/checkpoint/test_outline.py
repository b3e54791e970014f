"""Inventories by shapes: against checkpoints, transformers' own models, and published figures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from allocator.app.planning import summarised
from allocator.checkpoint.outline import planned_inventory
from allocator.checkpoint.reading import read_inventory
from allocator.errors import CheckpointError
from allocator.families import Support, family_of, registry

REFERENCE = Path(__file__).parents[2] / "studies/reference/model"
CONFIGS = Path(__file__).parents[1] / "data/configs"
BILLION = 10**9


def rows(inventory):
    return {
        t.name: (t.shape, t.role, t.layer, t.expert, inventory.family.match(t.name))
        for t in inventory.tensors.values()
    }


@pytest.mark.parametrize("kind", ["reference", "deepseek", "qwen3", "qwen3_tied"])
def test_what_a_checkpoint_holds(checkpoints, kind):
    path = {**checkpoints, "reference": REFERENCE}[kind]
    planned, read = planned_inventory(path / "config.json"), read_inventory(path)
    if kind == "deepseek":  # transformers writes 1 into config.json, and no such layer
        planned = planned_inventory({**planned.config, "num_nextn_predict_layers": 0})
    assert rows(planned) == rows(read)
    assert planned.n_searched_weights == read.n_searched_weights
    assert planned.moe_layers == read.moe_layers


def fused(inventory):
    """Names and shapes as transformers 5 has them: experts of a layer in two tensors."""
    found, n = {}, inventory.n_experts
    for t in inventory.tensors.values():
        name = t.name.replace("block_sparse_moe", "mlp")
        if t.role.is_expert:
            prefix = name.rpartition(f".{t.expert}.")[0]
            rows, columns = t.shape
            if t.role == "experts.down":
                found[f"{prefix}.down_proj"] = (n, rows, columns)
            else:
                found[f"{prefix}.gate_up_proj"] = (n, 2 * rows, columns)
        elif t.role == "experts.bias" and "down" not in name:
            name = name.replace("gate_proj", "gate_up_proj").replace("up_up", "up")
            if "gate_up" in name:
                found[name] = (n, 2 * t.shape[1])
        elif t.role != "nextn":
            found[name] = t.shape
    if inventory.family.model_type == "gpt_oss":  # input channels first
        found = {
            k: (v[0], v[2], v[1]) if k.endswith(("up_proj", "down_proj")) else v
            for k, v in found.items()
        }
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda p: p.stem)
def test_what_transformers_builds(path, tmp_path):
    (tmp_path / "config.json").write_text(path.read_text())
    config = AutoConfig.from_pretrained(tmp_path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = {n: tuple(p.shape) for n, p in model.named_parameters()}
    theirs |= {n: tuple(b.shape) for n, b in model.named_buffers() if "e_score" in n}
    assert fused(planned_inventory(path)) == theirs


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # model cards; active with both embedding and head
        ("qwen3-235b-a22b", 235.1, 22.2),
        ("mixtral-8x7b", 46.7, 12.9),
        ("gpt-oss-120b", 116.83, 5.13 + 0.58),  # the card leaves the embedding out of active ones
    ],
)
def test_published_parameters(name, total, active):
    found = summarised(planned_inventory(CONFIGS / f"{name}.json"))
    assert found.parameters / BILLION == pytest.approx(total, abs=0.05)
    assert found.active / BILLION == pytest.approx(active, abs=0.05)
    assert found.nextn == 0


def test_published_parameters_of_qwen3_30b():
    found = summarised(planned_inventory(CONFIGS / "qwen3-30b-a3b.json"))
    assert found.parameters / BILLION == pytest.approx(30.5, abs=0.05)
    assert found.active / BILLION == pytest.approx(3.3, abs=0.06)  # 3.353: the card cuts it off


def test_published_parameters_of_deepseek_v3():
    found = summarised(planned_inventory(CONFIGS / "deepseek-v3.json"))
    assert found.parameters / BILLION == pytest.approx(671.0, abs=0.05)
    # README_WEIGHTS.md: 11.5B of its own, embedding and head of 0.9B each beside them; 685B in all
    assert found.nextn / BILLION == pytest.approx(11.5 + 0.9 + 0.9, abs=0.2)
    assert (found.parameters + found.nextn) / BILLION == pytest.approx(685, abs=0.6)
    # 36.7B with the head alone, README_WEIGHTS.md's way of counting; 37B in the paper
    assert (found.active - found.embedding) / BILLION == pytest.approx(36.7, abs=0.1)
    assert (found.layers, found.moe_layers, found.experts, found.experts_used) == (61, 58, 256, 8)


def test_no_checkpoint_of_a_planned_family_is_read(tmp_path, monkeypatch):
    family = replace(family_of({"model_type": "mixtral"}), support=Support.PLANNED)
    monkeypatch.setitem(registry._FAMILIES, "mixtral", family)
    (tmp_path / "config.json").write_text((CONFIGS / "mixtral-8x7b.json").read_text())
    with pytest.raises(CheckpointError, match="whose sizes alone are known"):
        read_inventory(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek-v3", {"model_type": "llama"}, "not supported yet; supported: deepseek_v3"),
        (
            "deepseek-v3",
            {"attention_bias": True},
            "attention_bias is True, but deepseek_v3 is not supported",
        ),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank is null, which transformers refuses"),
        ("deepseek-v3", {"topk_group": None}, "topk_group is None"),
        ("deepseek-v3", {"n_group": 512}, "8 of 256 experts used, in 4 of 512 groups"),
        ("deepseek-v3", {"num_hidden_layers": "61"}, "num_hidden_layers is '61'"),
        ("qwen3-30b-a3b", {"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ("gpt-oss-120b", {"attention_bias": False}, "attention_bias is false"),
    ],
)
def test_what_is_refused(name, changes, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((CONFIGS / f"{name}.json").read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        planned_inventory(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_goes_before_gguf_files_beside_it(tmp_path):
    (tmp_path / "config.json").write_bytes((CONFIGS / "mixtral-8x7b.json").read_bytes())
    for name in ("Q4_K_M", "Q8_0"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    assert rows(planned_inventory(tmp_path)) == rows(planned_inventory(tmp_path / "config.json"))
