"""Writes a set of golden files: `python tests/golden/make.py tests/golden/<version>`.

The checkpoint, the documents and the study are the same on every machine: they come from sha256,
not from a library's random numbers. The study is searched, its pick is materialized and a
comparison of one run is made by the command line of the code that is checked out; what is committed
is then copied.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
STUDY = """schema = 1
checkpoint = "../checkpoint"
target = "gguf"
tokenizer = "none"
trials = 8

[budget]
weights = 30000

[calibration]
documents = "documents.jsonl"
report = "report.jsonl"
search_documents = 4
rungs = [2]
measured_documents = 2
curvature_documents = 2

[compare]
samplers = ["knapsack"]
weights = [30000]
seeds = { gguf = 1 }
tokens = 6000
"""


def numbers(seed: str, n: int) -> np.ndarray:
    """`n` integers of 16 bits, the same everywhere."""
    blocks = (hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(-(-n // 16)))
    return np.frombuffer(b"".join(blocks), np.uint16)[:n]


def write_checkpoint(folder: Path) -> Path:
    """Float32 weights, uniform, as large as a trained model's."""
    c, tensors = CONFIG, {}

    def add(name: str, *shape: int) -> None:
        flat = numbers(name, int(np.prod(shape))).astype(np.float32) / np.float32(32768) - 1
        scale = np.float32((3 / shape[-1]) ** 0.5) if len(shape) > 1 else np.float32(0.1)
        tensors[name] = (flat * scale + np.float32(len(shape) == 1)).reshape(shape)

    hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
    rows = {"q": 32, "k": 16, "v": 16}
    for name in ("model.embed_tokens", "lm_head"):
        add(f"{name}.weight", c["vocab_size"], hidden)
    add("model.norm.weight", hidden)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"{at}.{name}.weight", hidden)
        for name, n in rows.items():
            add(f"{at}.self_attn.{name}_proj.weight", n, hidden)
        add(f"{at}.self_attn.o_proj.weight", hidden, rows["q"])
        for name in ("q_norm", "k_norm"):
            add(f"{at}.self_attn.{name}.weight", c["head_dim"])
        add(f"{at}.mlp.gate.weight", c["num_experts"], hidden)
        for expert in range(c["num_experts"]):
            for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)),
                                ("down", (hidden, inner))):  # fmt: skip
                add(f"{at}.mlp.experts.{expert}.{name}_proj.weight", *shape)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    return folder


def write_study(folder: Path) -> Path:
    """The study beside `checkpoint`, never launched."""
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text(STUDY)
    for name, n in (("documents", 9), ("report", 3)):
        found = [(numbers(f"{name} {i}", 24) % CONFIG["vocab_size"]).tolist() for i in range(n)]
        rows = [json.dumps({"ids": ids, "domain": "d"}) + "\n" for ids in found]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


def main(out: Path) -> None:
    """Runs the commands of README.md in a temporary folder, then copies what is committed."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_checkpoint(root / "checkpoint")
        study, cache = write_study(root / "study"), root / "cache"
        for command in (
            ["search", "study"],
            ["materialize", "study/allocations/pick.json", "pick", "--record"],
            ["compare", "study"],
        ):
            arguments = [*command, "--cache", "cache", "--threads", "1", "--quiet"]
            subprocess.run([sys.executable, "-m", "allocator", *arguments], cwd=root, check=True)
        profile = next((cache / "profiles").glob("*/profile.json"))
        shutil.copytree(
            study / "allocations",
            out / "study" / "allocations",
            ignore=shutil.ignore_patterns(".lock"),
        )
        (out / "study" / "runs").mkdir()
        for run in (study / "runs").glob("*.json"):
            shutil.copy(run, out / "study" / "runs")
        shutil.copy(study / "journal", out / "study")
        shutil.copy(study / "front.json", out / "study")
        shutil.copy(profile, out)
        (out / "manifest").mkdir()
        for name in ("manifest.json", "allocation.json"):
            shutil.copy(root / "pick" / name, out / "manifest")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
