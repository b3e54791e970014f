"""What is no checkpoint that is read, through the command line: one line that names the cause."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeForCausalLM

from allocator.checkpoint.reading import read_inventory
from allocator.cli import main
from allocator.errors import CheckpointError
from allocator.families import family_of

torch.set_num_threads(1)
AT = "model.layers.0."
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 4998702192\n" % 7
)  # as git leaves it


class Folder:
    """A checkpoint of zeros of the real form, to be changed."""

    def __init__(self, path, make):
        self.path, self.make = path, make
        self.shapes, self.dtypes, self.config = make.tensors(), {}, {}

    def write(self):
        self.make.zeros(self.path, tensors=self.shapes, dtypes=self.dtypes, **self.config)
        return self.path

    def replaced(self, suffix, **by):
        """Every projection's `weight` in other tensors: name to (shape, dtype)."""
        for name in [n for n in self.shapes if "_proj" in n]:
            del self.shapes[name]
            for new, (shape, dtype) in by.items():
                full = name.removesuffix("weight") + new.replace("__", ".")
                self.shapes[full], self.dtypes[full] = shape, dtype
        self.config["quantization_config"] = {"quant_method": suffix}
        return self.write()


def biases(f):
    for name in ("q_proj", "k_proj", "v_proj"):
        f.shapes[f"{AT}self_attn.{name}.bias"] = (64,)
    f.config["attention_bias"] = True
    return f.write(), r"q_proj.bias is a bias \(attention_bias in config.json\), which qwen3_moe is"


def stacked(f):
    for name in [n for n in f.shapes if ".experts." in n]:
        del f.shapes[name]
    for layer in range(2):
        f.shapes[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = (4, 48, 64)
        f.shapes[f"model.layers.{layer}.mlp.experts.down_proj"] = (4, 64, 32)
    return f.write(), r"gate_up_proj of \w+ has shape \(4, 48, 64\), needed experts x 64 x 64, or x"


def prefixed(f, prefix):
    f.shapes = {n.replace("model.", prefix, 1): shape for n, shape in f.shapes.items()}
    return f.write(), f"has the prefix '{re.escape(prefix)}', needed 'model.'"


def bare(f):  # saved without its head
    f.shapes = {n.removeprefix("model."): s for n, s in f.shapes.items() if "lm_head" not in n}
    return f.write(), "has the prefix '', needed 'model.'"


def nested(f, outer="qwen3_vl_moe"):
    f.config = {"model_type": outer, "num_hidden_layers": None} | {
        "text_config": {"model_type": "qwen3_moe", "num_hidden_layers": 2}
    }
    return f.write(), rf"model_type is '{outer}' with .* type 'qwen3_moe' inside of text_config"


def towers(f):
    f.shapes["model.visual.blocks.0.attn.qkv.weight"] = (8, 8)
    return f.write(), "is of a model of images or sound"


def adapter(f):
    f.shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = (8, 64)
    return f.write(), "is of an adapter"


def own_mtp(f):
    f.shapes["mtp.layers.0.input_layernorm.weight"] = (64,)
    return f.write(), "is of multi-token prediction under a name of its own"


def no_values(f):
    f.shapes[f"{AT}mlp.experts.0.up_proj.weight"] = (0, 64)
    f.config["n_shared_experts"] = 0
    return f.write(), r"n_shared_experts is 0 in config.json, and .* shape \(0, 64\), so no values"


def table(f, dtype="I64"):
    f.shapes[f"{AT}mlp.gate.tid2eid"] = (48, 2)
    f.dtypes[f"{AT}mlp.gate.tid2eid"] = dtype
    return f.write(), f"tid2eid is stored as {dtype}, whole numbers: packed weights, or a table"


def gptq(f):
    found = f.replaced(
        "gptq", qweight=((8, 32), "I32"), qzeros=((1, 8), "I32"),
        scales=((1, 64), "F16"), g_idx=((64,), "I32"),
    )  # fmt: skip
    return found, r"of weights quantized as GPTQ or AWQ \(quant_method 'gptq'\).*in BF16, F16, F32"


def awq(f):
    found = f.replaced(
        "awq", qweight=((64, 8), "I32"), qzeros=((1, 8), "I32"), scales=((1, 64), "F16")
    )
    return found, r"quantized as GPTQ or AWQ \(quant_method 'awq'\)"


def bitsandbytes(f):
    found = f.replaced(
        "bitsandbytes", weight=((2048, 1), "U8"), weight__absmax=((64,), "F32"),
        weight__quant_map=((16,), "F32"), weight__quant_state__bitsandbytes__nf4=((80,), "U8"),
    )  # fmt: skip
    return found, "quantized as bitsandbytes"


def compressed(f):
    found = f.replaced(
        "compressed-tensors", weight_packed=((64, 8), "I32"), weight_scale=((64, 1), "BF16"),
        weight_shape=((2,), "I64"),
    )  # fmt: skip
    return found, "quantized as compressed-tensors"


def mxfp4(f):
    f.shapes[f"{AT}mlp.experts.gate_up_proj_blocks"] = (4, 64, 2, 16)
    f.shapes[f"{AT}mlp.experts.gate_up_proj_scales"] = (4, 64, 2)
    f.dtypes |= dict.fromkeys((n for n in f.shapes if "gate_up" in n), "U8")
    return f.write(), "quantized as MXFP4"


def nvfp4(f):
    found = f.replaced(
        "modelopt", weight=((64, 32), "U8"), weight_scale=((64, 4), "F8_E4M3"),
        weight_scale_2=((1,), "F32"), input_scale=((1,), "F32"),
    )  # fmt: skip
    return found, "quantized as NVFP4"


def fp8_per_tensor(f):
    found = f.replaced("fp8", weight=((64, 64), "F8_E4M3"), weight_scale=((1,), "F32"))
    return found, "quantized as FP8 with other scales"


def mlx(f):
    found = f.replaced(
        "mlx", weight=((64, 8), "U32"), scales=((64, 1), "BF16"), biases=((64, 1), "BF16")
    )
    return found, "quantized as MLX"


def doubles(f):
    f.dtypes[f"{AT}mlp.gate.weight"] = "F8_E5M2"
    return f.write(), "gate.weight is stored as F8_E5M2, needed one of F32, .*convert"


def lfs_weights(f):
    (f.write() / "model.safetensors").write_bytes(POINTER)
    return f.path, "model.safetensors: a git-lfs pointer in place of the file; .*git lfs pull"


def lfs_config(f):
    (f.write() / "config.json").write_bytes(POINTER)
    return f.path, "config.json: a git-lfs pointer"


def gguf_file(f):
    f.path.mkdir()
    (f.path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    return f.path / "model.gguf", "model.gguf: GGUF of version 0, needed 3; fetch it again"


def gguf_folder(f):
    return gguf_file(f)[0].parent, "model.gguf: GGUF of version 0"


def gguf_models(f):
    (gguf_file(f)[0].with_name("model-Q8_0.gguf")).touch()
    return f.path, r"2 GGUF models \(model-Q8_0.gguf, model.gguf\); name the file of one"


def gguf_part(f):
    path, _ = gguf_file(f)
    path = path.rename(path.with_name("model-00002-of-00003.gguf"))
    return path, "2 of 3 parts are missing, e.g. model-00001-of-00003.gguf; fetch them"


def safetensors_file(f):
    return f.write() / "model.safetensors", f"one file of a checkpoint: .* lies in, {f.path}"


def hub_id(f):
    return "Qwen/Qwen3-30B-A3B", "Qwen3-30B-A3B: no such.*hf download Qwen/Qwen3-30B-A3B --local-di"


def hub_cache(f):
    snapshot = f.path / "models--a--b/snapshots/0123"
    f.path = snapshot
    f.write()
    return snapshot.parents[1], f"one of its snapshots, e.g. {snapshot}"


def unknown_type(f):
    f.config["model_type"] = "llama4_text"
    return (
        f.write(),
        "model_type 'llama4_text' is not supported yet; supported: deepseek_v3, qwen3_moe, kimi",
    )


def pickles(f):
    (f.write() / "model.safetensors").unlink()
    (f.path / "pytorch_model-00001-of-00002.bin").touch()
    return f.path, "weights as pickles alone"


def interrupted(f):
    (f.write() / "model.safetensors").unlink()
    (f.path / ".cache/huggingface/download").mkdir(parents=True)
    (f.path / ".cache/huggingface/download/model.abc.incomplete").touch()
    return f.path, "no weights yet: an interrupted download; run it again"


def missing_shards(f):
    files = [f"model-{n:05}-of-00007.safetensors" for n in range(1, 8)]
    (f.write() / "model.safetensors").rename(f.path / files[2])
    index = {"weight_map": {str(n): file for n, file in enumerate(files)}}
    (f.path / "model.safetensors.index.json").write_text(json.dumps(index))
    return f.path, f"6 of 7 shards of the index are missing, e.g. {files[0]}; fetch the rest"


def no_index(f):
    (f.write() / "model.safetensors").rename(f.path / "model-00001-of-00002.safetensors")
    return f.path, "1 safetensors files .* without model.safetensors.index.json; fetch it"


def no_config(f):
    (f.write() / "config.json").unlink()
    return f.path, "config.json: no such file; needed a checkpoint directory"


def null_value(f):
    f.config["head_dim"] = 32
    f.write()
    edit(f.path / "config.json", head_dim=None)
    return f.path, "config.json: head_dim is null, which transformers refuses"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def case(build, *arguments):
    name = "-".join([build.__name__, *arguments])
    return pytest.param(lambda f: build(f, *arguments), id=name)


CASES = [
    case(biases), case(stacked), case(bare), case(nested), case(nested, "qwen3_moe"),
    case(prefixed, "model.language_model."), case(prefixed, "language_model.model."),
    case(prefixed, "module.model."),
    case(towers), case(adapter), case(own_mtp), case(no_values), case(table), case(table, "U8"),
    case(gptq), case(awq), case(bitsandbytes), case(compressed), case(mxfp4), case(nvfp4),
    case(fp8_per_tensor), case(mlx), case(doubles), case(lfs_weights), case(lfs_config),
    case(gguf_file), case(gguf_folder), case(gguf_models),
    case(gguf_part), case(safetensors_file), case(hub_id), case(hub_cache),
    case(unknown_type), case(pickles), case(interrupted), case(missing_shards), case(no_index),
    case(no_config), case(null_value),
]  # fmt: skip


@pytest.mark.parametrize("build", CASES)
def test_the_cause_is_named_in_one_line(tmp_path, make, capsys, build):
    path, match = build(Folder(tmp_path / "model", make))
    assert main(["inspect", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"allocator inspect: .*{match}.*\n", err), err
    code = main(["plan", str(path)])  # which looks at config.json alone
    out, err = capsys.readouterr()
    assert (code, len(err.splitlines())) in ((2, 1), (0, 0)), err
    assert (out == "") is (code == 2)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (nested, "inside of text_config"), (hub_id, "hf download"), (lfs_config, "a git-lfs point"),
        (gguf_file, "GGUF of version"), (safetensors_file, "one file of"),
        (no_config, "no such file"), (unknown_type, "supported: .*gpt_oss"),
        (null_value, "head_dim is null"),
    ],
)  # fmt: skip
def test_a_plan_is_refused_for_the_same_cause(tmp_path, make, capsys, build, match):
    path, _ = build(Folder(tmp_path / "model", make))
    assert main(["plan", str(path)]) == 2
    assert re.fullmatch(f"allocator plan: .*{match}.*\n", capsys.readouterr().err)


# -- against transformers


def test_experts_stacked_by_transformers_are_those_of_the_checkpoint(tmp_path, checkpoints):
    """Stacked by transformers' own modules (its save_pretrained keeps the form that was loaded)."""
    shutil.copytree(checkpoints["qwen3"], tmp_path / "stacked")
    state = dict(Qwen3MoeForCausalLM.from_pretrained(checkpoints["qwen3"]).state_dict())
    save_file(state, tmp_path / "stacked/model.safetensors", {"format": "pt"})
    whole, stacked = (read_inventory(p) for p in (checkpoints["qwen3"], tmp_path / "stacked"))
    assert set(stacked.tensors) == set(whole.tensors)
    assert all(stacked.tensor_digest(n) == whole.tensor_digest(n) for n in whole.tensors)


@pytest.mark.parametrize("name", ["deepseek", "qwen3"])
def test_null_is_refused_where_transformers_refuses_it(tmp_path, checkpoints, name):
    config = json.loads((checkpoints[name] / "config.json").read_text())
    family = family_of(config)
    refused = set()
    for key in config:
        (tmp_path / "config.json").write_text(json.dumps(config | {key: None}))
        try:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        except Exception:  # of several kinds
            refused.add(key)
    assert family.never_null & set(config) == refused & family.never_null
    for file in checkpoints[name].glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    for key in refused:
        (tmp_path / "config.json").write_text(json.dumps(config | {key: None}))
        with pytest.raises(CheckpointError, match=key):
            read_inventory(tmp_path)


# -- computed buffers


BUFFERS = {
    "model.rotary_emb.inv_freq": torch.float32,
    **{f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.float32 for n in range(2)},
    "model.layers.1.self_attn.rotary_emb.cos_cached": torch.float64,
}


def test_computed_buffers_are_left_out_and_listed(checkpoints, change_checkpoint, capsys):
    def add(tensors):
        tensors |= {n: torch.rand(8, dtype=dtype) for n, dtype in BUFFERS.items()}

    plain, found = (
        read_inventory(checkpoints["qwen3"]),
        change_checkpoint(checkpoints["qwen3"], add),
    )
    inventory = read_inventory(found)
    assert {s.name for s in inventory.computed} == set(BUFFERS)
    assert set(inventory.tensors) == set(plain.tensors)
    assert inventory.digest == plain.digest
    assert main(["inspect", str(found)]) == 0
    said = " ".join(capsys.readouterr().out.split())  # lines end where 80 columns do
    assert "left out: 4 buffers that the model computes itself, 160 bytes, e.g. model." in said
    assert main(["inspect", str(checkpoints["qwen3"])]) == 0
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.layers.0.mlp.rotary_emb.inv_freq", "rotary_emb.inv_freq"])
def test_a_buffer_elsewhere_is_no_computed_one(tmp_path, make, name):
    with pytest.raises(CheckpointError, match=name):
        read_inventory(make.zeros(tmp_path, tensors=make.tensors() | {name: (8,)}))
