"""Our F32 files of layers with linear attention beside those of llama.cpp's own converter."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader

from allocator.checkpoint.inventory import read_inventory
from allocator.checkpoint.tensors import read_tensor
from allocator.decision.allocation import Allocation
from allocator.export.gguf.files import write_gguf
from allocator.targets import GGUF
from allocator.targets.group_weights import group_weights
from allocator.testing.family_runs import random_checkpoint

pytestmark = pytest.mark.slow

CONFIG = {
    "vocab_size": 151936, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 128, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "intermediate_size": 96, "num_hidden_layers": 4,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}  # fmt: skip

OF_ARCHITECTURE = {
    "qwen3next": {"vocab_size"},
    "qwen35moe": {"vocab_size", "feed_forward_length"},  # no layer has a block of that width
}
"""Keys that differ beside those of all: see `test_converter`."""


class Checkpoint:
    """A source of F32 bytes, by our readers."""

    def __init__(self, layout):
        self.layout = layout

    def encoded(self, name):
        return np.ascontiguousarray(group_weights(self.layout, self.layout.groups[name])).view("u1")

    def full_precision(self, kept):
        return read_tensor(self.layout.inventory, kept.source)


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5_moe_text"])
def files(request, released, package, tmp_path_factory):
    """The family, and readers of ours and of the converter's."""
    checkpoint, folder = (tmp_path_factory.mktemp(name) for name in ("checkpoint", "files"))
    random_checkpoint(CONFIG | {"model_type": request.param}, checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(released("qwen3") / name, checkpoint)
    (script,) = package("llama.cpp").rglob("convert_hf_to_gguf.py")
    subprocess.run(
        [sys.executable, script, checkpoint, "--outtype", "f32", "--no-mtp", "--outfile",
         folder / "theirs.gguf"],
        check=True, capture_output=True, cwd=script.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    layout = GGUF.layout(read_inventory(checkpoint))
    allocation = Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, tuple(range(8))),
        formats=dict.fromkeys(layout.groups, "F32"),
        experts_used=2,
    )
    write_gguf(folder / "ours.gguf", layout, allocation, Checkpoint(layout))
    return GGUFReader(folder / "ours.gguf"), GGUFReader(folder / "theirs.gguf")


def test_tensors(files):
    ours, theirs = ({t.name: t for t in reader.tensors} for reader in files)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        assert ours[name].shape.tolist() == tensor.shape.tolist(), name
        if name.endswith("ssm_a"):  # exponentials of two libraries
            np.testing.assert_allclose(ours[name].data, tensor.data, rtol=2e-7)
        else:
            np.testing.assert_array_equal(ours[name].data, tensor.data, name)


def test_keys(files):
    ours, theirs = (
        {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        for reader in files
    )
    different = {k for k in set(ours) | set(theirs) if ours.get(k) != theirs.get(k)}
    architecture = ours["general.architecture"]
    expected = {f"{architecture}.{key}" for key in OF_ARCHITECTURE[architecture]}
    assert different == {"general.file_type", "general.name", "general.size_label",
                         "tokenizer.ggml.add_eos_token", *expected}  # fmt: skip
