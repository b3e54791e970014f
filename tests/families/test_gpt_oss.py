"""gpt-oss as it is released: experts in MXFP4, and YaRN whose bounds are not whole channels."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from allocator import api
from allocator.checkpoint.inventory import MXFP4
from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_rows, read_tensor
from allocator.codecs import codec_of
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError, TargetError
from allocator.export.gguf.exact import kl_divergence
from allocator.export.gguf.files import read_gguf, write_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.formats import format_named
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF, SAFETENSORS
from allocator.targets.group_weights import group_digest
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


def written(layout, path, fmt, formats=None):
    """A file with the experts in a format, all else in F32 or as `formats` say."""
    formats = formats or {n: fmt if g.role.is_expert else "F32" for n, g in layout.groups.items()}
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


@pytest.fixture(scope="module")
def file(case, tmp_path_factory):
    """The checkpoint in a GGUF: experts in MXFP4, all else in BF16, but for one matrix in Q8_0."""
    layout = GGUF.layout(read_inventory(case.path))
    formats = {n: "MXFP4" if g.role.is_expert else "BF16" for n, g in layout.groups.items()}
    formats["layers.0.attention.q"] = "Q8_0"
    path = tmp_path_factory.mktemp("mxfp4") / "model.gguf"
    everyone = dict.fromkeys(layout.layers, tuple(range(8)))
    allocation = Allocation.of(target="gguf", retained=everyone, formats=formats, experts_used=2)
    released = load_file(case.path / "model.safetensors")
    write_gguf(path, layout, allocation, _Repacked(layout, formats, released))
    return path


@dataclass(frozen=True)
class _Repacked(CheckpointTensors):
    """Experts as released, in blocks of an exponent and 32 codes: `i` and `i + 16` in a byte."""

    released: dict = field(default_factory=dict)

    def encoded(self, name):
        group = self.layout.groups[name]
        if not group.role.is_expert:
            return super().encoded(name)
        kind = str(group.role).rpartition(".")[2]
        whole = "down_proj" if kind == "down" else "gate_up_proj"
        rows = {"down": slice(None), "gate": slice(0, None, 2), "up": slice(1, None, 2)}[kind]
        stem = f"model.layers.{group.layer}.mlp.experts.{whole}"
        pairs, exponents = (
            self.released[f"{stem}_{part}"][:, rows] for part in ("blocks", "scales")
        )
        codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)  # (..., blocks, 32)
        data = codes[..., :16] | codes[..., 16:] << 4
        return torch.cat([exponents[..., None], data], -1).flatten(-2).numpy()


def test_a_file_in_mxfp4_is_the_released_checkpoint(case, file):
    """Digests are those of the released safetensors, values those that gguf-py decodes."""
    own, again = map(read_inventory, (case.path, file))
    stored = {t.name: t for t in GGUFReader(file).tensors}
    experts = [t for t in own.tensors.values() if t.role.is_expert]
    assert {t.dtype for t in experts} == {MXFP4}
    for tensor in experts:
        assert again.tensor_digest(tensor.name) == own.tensor_digest(tensor.name)
        assert again.tensors[tensor.name].total_bytes == tensor.total_bytes
        kind = str(tensor.role).rpartition(".")[2]
        of_all = stored[f"blk.{tensor.layer}.ffn_{kind}_exps.weight"]
        values = dequantize(of_all.data, GGMLQuantizationType.MXFP4)[tensor.expert]
        np.testing.assert_array_equal(read_tensor(again, tensor.name), values)
        np.testing.assert_array_equal(read_rows(again, tensor.name, 3, 7), values[3:7])
    layouts = [GGUF.layout(inventory) for inventory in (own, again)]
    for name, group in layouts[0].groups.items():
        ours = layouts[1].groups[name]
        same = group_digest(layouts[1], ours) == group_digest(layouts[0], group)
        assert same == (name != "layers.0.attention.q")
        assert ours.offered()[0].name == (
            "MXFP4" if group.role.is_expert else "BF16" if same else "Q8_0"
        )
    sizes = [
        sum(t.total_bytes for t in of.tensors.values() if t.role.is_expert) for of in (own, again)
    ]
    assert sizes[0] == sizes[1]


def test_a_file_in_mxfp4_is_computed_and_written_again(case, file, tmp_path):
    """As stock llama.cpp computes it; the values stay, where a zero may lose its sign."""
    layout = GGUF.layout(read_inventory(file))
    formats = {n: g.offered()[0].name for n, g in layout.groups.items()}
    again = read_gguf(written(layout, tmp_path / "again.gguf", "MXFP4", formats))
    for name, (fmt, shape, data) in read_gguf(file).items():
        assert again[name][:2] == (fmt, shape)
        known = format_named(fmt)
        one, other = (codec_of(known).decode(d, known) for d in (data, again[name][2]))
        np.testing.assert_array_equal(one, other)
    own = swap(layout).model
    with LlamaCpp(file, context=64, threads=1) as runtime:
        off = [kl_divergence(logits(own, ids).numpy(), runtime.logits(ids)) for ids in case.ids]
    assert np.mean(off) <= ROUNDING


@pytest.mark.slow
def test_the_converters_file_of_the_released_form_is_the_checkpoint(case, convert, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(case.path, source)
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["GptOssForCausalLM"]
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "theirs.gguf", vocabulary=False)
    own, again = map(read_inventory, (case.path, tmp_path / "theirs.gguf"))
    for tensor in own.tensors.values():
        if tensor.role.is_expert:
            assert again.tensor_digest(tensor.name) == own.tensor_digest(tensor.name)
        else:
            values = (read_tensor(of, tensor.name) for of in (own, again))
            np.testing.assert_array_equal(*values)


def test_experts_in_mxfp4_are_of_gpt_oss_alone(tmp_path):
    """Another model in MXFP4 is low-bit already."""
    (tmp_path / "model").mkdir()
    config = {k: v for k, v in CONFIG.items() if not k.startswith(("rope", "sliding"))}
    config |= {"model_type": "mixtral"}
    layout = GGUF.layout(read_inventory(random_checkpoint(config, tmp_path / "model").path))
    written(layout, tmp_path / "model.gguf", "MXFP4")
    with pytest.raises(CheckpointError, match="is stored in MXFP4, low-bit already"):
        read_inventory(tmp_path / "model.gguf")


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
