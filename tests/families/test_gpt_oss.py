"""gpt-oss as it is released: experts in MXFP4, and YaRN whose bounds are not whole channels."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from allocator import api
from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation import Allocation
from allocator.errors import TargetError
from allocator.export.gguf.exact import kl_divergence
from allocator.export.gguf.files import read_gguf, write_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF, SAFETENSORS
from allocator.testing.family_runs import EXACT, FamilyCase, random_checkpoint
from allocator.testing.tensors import CheckpointTensors

YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIG = {
    "model_type": "gpt_oss", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "sliding_window": 16, "rope_scaling": YARN, "rope_theta": 150000,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case(FamilyCase):
    in_bfloat16: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A checkpoint whose experts are in MXFP4, and the same in bfloat16 as transformers has it."""
    case = random_checkpoint(CONFIG, tmp_path_factory.mktemp("bfloat16"))
    torch.manual_seed(1)
    tensors = load_file(case.path / "model.safetensors")
    released = {}
    for name, values in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            released[name] = values
            continue
        experts, columns, rows = values.shape
        codes = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(122, 125, codes.shape[:-1], dtype=torch.uint8)
        released |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
        values.copy_(convert_moe_packed_tensors(codes, exponents))
    save_file(tensors, case.path / "model.safetensors", {"format": "pt"})
    folder = tmp_path_factory.mktemp("released")
    save_file(released, folder / "model.safetensors", {"format": "pt"})
    stored = CONFIG | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(stored))
    model = AutoModelForCausalLM.from_pretrained(
        case.path, dtype=torch.float32, attn_implementation="eager"
    )
    return Case(folder, model.eval(), case.ids, case.path)


def swap(layout):
    return SwapModel(layout, lambda *_: pytest.fail("nothing is encoded"))


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_safetensors_computes_as_the_config_says(case):
    layout = SAFETENSORS.layout(read_inventory(case.path))
    assert layout.computed is None
    own = swap(layout).model
    for ids, wanted in zip(case.ids, case.logits, strict=True):
        torch.testing.assert_close(logits(own, ids), wanted, rtol=0, atol=2e-5)


def written(layout, path, fmt):
    """A file with the experts in a format, all else in F32."""
    formats = {n: fmt if g.role.is_expert else "F32" for n, g in layout.groups.items()}
    everyone = dict.fromkeys(layout.layers, tuple(range(8)))
    allocation = Allocation.of(target="gguf", retained=everyone, formats=formats, experts_used=2)
    write_gguf(path, layout, allocation, CheckpointTensors(layout, formats))
    return path


def test_gguf_is_scored_as_llama_cpp_computes(case, tmp_path):
    """The difference to the checkpoint, which safetensors computes, is noted."""
    layout = GGUF.layout(read_inventory(case.path))
    (note,) = [n for n in layout.notes if "truncate" in n]
    assert "scored as llama.cpp computes" in note
    path = written(layout, tmp_path / "model.gguf", "F32")
    own = swap(layout).model
    off, deployed = [], []
    with LlamaCpp(path, context=64, threads=1) as runtime:
        for ids, original in zip(case.ids, case.logits, strict=True):
            theirs = runtime.logits(ids)
            deployed.append(kl_divergence(logits(own, ids).numpy(), theirs))
            off.append(kl_divergence(original.numpy(), theirs))
    assert np.mean(deployed) <= EXACT
    assert np.mean(off) > 1000 * EXACT


def test_experts_in_mxfp4_are_those_of_the_checkpoint(case, tmp_path):
    """Decoded by gguf-py, which computes in numpy."""
    layout = GGUF.layout(read_inventory(case.path))
    tensors = read_gguf(written(layout, tmp_path / "model.gguf", "MXFP4"))
    state = case.model.state_dict()
    for layer in range(3):
        both = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"].transpose(1, 2)
        down = state[f"model.layers.{layer}.mlp.experts.down_proj"].transpose(1, 2)
        for kind, matrices in {"gate": both[:, ::2], "up": both[:, 1::2], "down": down}.items():
            fmt, _, data = tensors[f"blk.{layer}.ffn_{kind}_exps.weight"]
            assert fmt == "MXFP4"
            decoded = dequantize(data, GGMLQuantizationType.MXFP4)
            np.testing.assert_array_equal(decoded, matrices.numpy())


def test_layers_in_another_order_are_refused_for_gguf(case, tmp_path):
    config = json.loads((case.path / "config.json").read_text())
    config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    (tmp_path / "model.safetensors").symlink_to(case.path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TargetError, match="sliding window in every other layer"):
        GGUF.layout(read_inventory(tmp_path))


ROUNDING = 0.2
"""Most KL(torch || llama.cpp) as deployed: rounding turns choices of experts in random models."""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["released", "bfloat16"])
def test_from_a_search_over_finishing_to_files_of_both_kinds(case, tmp_path, write_study, form):
    """Biases and sinks of the files are those of the checkpoint."""
    checkpoint = case.path if form == "released" else case.in_bfloat16
    study = write_study(tmp_path / "study", checkpoint)
    options = {"cache": tmp_path / "cache", "threads": 1}
    api.search(study, trials=3, **options)
    pick = study / "allocations/pick.json"
    api.finish(study, pick, tokens=256, **options)
    for container in ("gguf", "safetensors"):
        folder = tmp_path / container
        api.materialize(study, pick, folder, container=container, **options)
        tolerance = ROUNDING if container == "gguf" else None
        api.verify(study, folder, tolerance=tolerance, **options)
    tensors = read_gguf(tmp_path / "gguf/model.gguf")
    retained = json.loads(pick.read_text())["allocation"]["retained"]
    state = case.model.state_dict()
    for layer in range(3):
        rows = retained[str(layer)]
        both = state[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"][rows]
        wanted = {"ffn_gate_exps.bias": both[:, ::2], "ffn_up_exps.bias": both[:, 1::2]}
        wanted["attn_sinks.weight"] = state[f"model.layers.{layer}.self_attn.sinks"]
        wanted["attn_output.bias"] = state[f"model.layers.{layer}.self_attn.o_proj.bias"]
        for name, values in wanted.items():
            stored = tensors[f"blk.{layer}.{name}"][2].view(np.float32)
            np.testing.assert_array_equal(stored, values.numpy())
