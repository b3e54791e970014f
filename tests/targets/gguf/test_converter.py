"""Our F32 file beside that of llama.cpp's own converter, key by key and tensor by tensor."""

import json
import shutil

import numpy as np
import pytest
from gguf import GGUFReader

from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation import Allocation
from allocator.export.gguf.files import write_gguf
from allocator.targets import GGUF
from allocator.testing.tensors import CheckpointTensors

pytestmark = pytest.mark.slow

TEMPLATES = [
    {"name": "default", "template": "{{ messages }}"},
    {"name": "tool_use", "template": "{{ tools }}"},
    {"name": "rag 2", "template": "{{ documents }}"},
]
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "do_sample": True}

EXPECTED = {  # differences by key, "-" where a file has none: reason, ours, the converter's
    "general.file_type": ("a mix of formats has no file type", "-", 0),
    "general.size_label": ("a label of the experts at hand; ours may be pruned", "-", str),
    "general.name": ("theirs is made of the directory's name, our bytes must not be", str, str),
    "qwen3moe.rope.dimension_count": ("written out; llama.cpp takes the head's width", 16, "-"),
    "qwen3moe.vocab_size": ("written out; llama.cpp counts the tokens", 151936, "-"),
    "tokenizer.ggml.add_eos_token": ("written out; llama.cpp's default", False, "-"),
    "deepseek2.expert_gating_func": (
        "transformers 5 writes no scoring_func, and llama.cpp would take softmax", 2, "-",
    ),
    "tokenizer.ggml.pre": (
        "the converter hashes what transformers cuts, which in version 5 puts no bos before a "
        "text; joyai-llm cuts by the very patterns of deepseek-v3", "deepseek-v3", "joyai-llm",
    ),
}  # fmt: skip
OF = {
    "qwen3": {"general.file_type", "general.size_label", "general.name",
              "qwen3moe.rope.dimension_count", "qwen3moe.vocab_size",
              "tokenizer.ggml.add_eos_token"},
    "deepseek": {"general.file_type", "general.size_label", "general.name",
                 "deepseek2.expert_gating_func", "tokenizer.ggml.pre"},
}  # fmt: skip


def edit(path, change):
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(data)
    path.write_text(json.dumps(data))


@pytest.fixture(scope="module", params=["qwen3", "deepseek"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(kind, released, make_checkpoint, tmp_path_factory):
    """A tiny model with a real tokenizer, named chat templates and sampling."""
    folder = tmp_path_factory.mktemp("converter") / kind
    changes = {"qwen3": {"vocab_size": 151936}, "deepseek": {"vocab_size": 129280}}[kind]
    if kind == "deepseek":
        changes |= {"n_group": 4, "topk_group": 2}
    make_checkpoint(folder, kind, dtype="bfloat16", **changes)
    source = released({"qwen3": "qwen3", "deepseek": "deepseek-v3"}[kind])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    edit(folder / "generation_config.json", lambda c: c.update(SAMPLING))
    if kind == "deepseek":  # a list, and a token id that is a list
        edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATES))
        return folder
    edit(folder / "tokenizer_config.json", lambda c: c.pop("chat_template"))
    default, *named = TEMPLATES
    (folder / "chat_template.jinja").write_text(default["template"])
    (folder / "additional_chat_templates").mkdir()
    for one in named:
        (folder / f"additional_chat_templates/{one['name']}.jinja").write_text(one["template"])
    return folder


@pytest.fixture(scope="module")
def files(checkpoint, convert, tmp_path_factory):
    """Readers of ours and of the converter's."""
    folder = tmp_path_factory.mktemp("files")
    convert(checkpoint, folder / "theirs.gguf")
    layout = GGUF.layout(read_inventory(checkpoint))
    everything = tuple(range(layout.inventory.n_experts))
    allocation = Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, everything),
        formats=dict.fromkeys(layout.groups, "F32"),
        experts_used=layout.inventory.experts_used,
    )
    write_gguf(folder / "ours.gguf", layout, allocation, CheckpointTensors(layout))
    assert (folder / "ours.gguf").stat().st_size == allocation.nbytes(layout).file
    return GGUFReader(folder / "ours.gguf"), GGUFReader(folder / "theirs.gguf")


def pairs(reader):
    """Type and value by key; the order of names is no difference."""
    found = {
        key: ([kind.name for kind in field.types], field.contents())
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    names = "tokenizer.chat_templates"
    found[names] = (found[names][0], sorted(found[names][1]))
    return found


def agrees(value, expected):
    return isinstance(value, expected) if isinstance(expected, type) else value == expected


def test_keys(kind, files):
    ours, theirs = (pairs(reader) for reader in files)
    assert len(set(ours) & set(theirs)) > 30
    assert {"tokenizer.chat_template.rag_2", "general.sampling.top_k"} <= set(ours)
    different = {k for k in set(ours) | set(theirs) if ours.get(k) != theirs.get(k)}
    for key in sorted(different):
        reason = EXPECTED.get(key, ("?",))[0]
        found = [of.get(key, ([], "-"))[1] for of in (ours, theirs)]
        print(f"{kind}: {key}: {found[0]!r} / {found[1]!r}: {reason}")
    assert different == OF[kind]
    for key in different:
        found = [of.get(key, ([], "-"))[1] for of in (ours, theirs)]
        assert all(map(agrees, found, EXPECTED[key][1:])), (key, found)


def test_tensors(files):
    ours, theirs = ({t.name: t for t in reader.tensors} for reader in files)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        assert ours[name].shape.tolist() == tensor.shape.tolist(), name
        np.testing.assert_array_equal(ours[name].data.view("u1"), tensor.data.view("u1"), name)
