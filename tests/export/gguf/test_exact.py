"""Rounding of activations is told from another function of the weights."""

import os
import shutil
import struct
from functools import partial

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from allocator.errors import VerifyError
from allocator.export.gguf import exact
from allocator.export.gguf.exact import EXACT_TOLERANCE, compare_exactly
from allocator.export.gguf.files import read_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.export.gguf.runtime import GGUF_RUNTIME, LLAMACPP_TOLERANCE
from allocator.export.manifest import file_digest
from allocator.export.stored import StoredWeights
from allocator.export.tensors import EncodedTensors
from allocator.export.verification import verify
from allocator.files.checksums import seal, unseal
from allocator.formats import FORMATS
from allocator.scoring.candidates import Weights
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import StreamedScorer

SEED = {"deepseek": 0, "qwen3": 4}  # of allocations that llama.cpp rounds beyond 5e-3


@pytest.fixture(scope="module")
def made(case, tmp_path_factory):
    """`made(name)`: the case, an allocation of mixed formats, and its directory."""
    found = {}

    def get(name):
        if name not in found:
            the = case(name, "gguf")
            allocation = the.allocation(SEED[name])
            folder = tmp_path_factory.mktemp("exact") / name
            found[name] = the, allocation, the.write(folder, "gguf", allocation)
        return found[name]

    return get


def compared(made, allocation, folder, documents=None, **options):
    path = folder / GGUF_RUNTIME.file_name
    tensors = GGUF_RUNTIME.read(path, made.layout)
    stored = StoredWeights(made.layout, allocation, tensors, file_digest(path))
    return compare_exactly(path, stored, documents or made.scorer.documents, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_bytes_decode_to_zeros(name):
    """In gguf-py, which is not what writes and runs the files."""
    fmt = FORMATS[name]
    zeros = np.zeros((2, fmt.nbytes((1, 256))), np.uint8)
    assert not dequantize(zeros, GGMLQuantizationType[fmt.name]).any()


@pytest.mark.parametrize("n_layers", [1, 2])
def test_the_decoded_file_computes_what_transformers_computes(case, tmp_path, n_layers):
    """A checkpoint of BF16 weights in BF16, stock transformers with so many layers."""
    the = case("qwen3", "gguf")
    everyone = tuple(range(8))
    allocation = the.allocation(formats=("BF16",))
    allocation = allocation.of(
        target="gguf", retained=dict.fromkeys(the.layout.layers, everyone),
        formats=allocation.format_of, experts_used=2,
    )  # fmt: skip
    path = the.write(tmp_path / "out", "gguf", allocation).folder / "model.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        the.path, dtype=torch.float32, num_hidden_layers=n_layers
    ).eval()
    with open(tmp_path / "decoded.gguf", "w+b") as file:
        opened = exact.write_decoded(file, path, read_gguf(path), n_layers)
        with LlamaCpp(opened, threads=1) as llama:
            for document in the.scorer.documents:
                with torch.no_grad():
                    p = model(torch.tensor([document.ids])).logits[0].double().log_softmax(-1)
                q = torch.from_numpy(llama.logits(document.ids)).double().log_softmax(-1)
                assert (p.exp() * (p - q)).sum(-1).mean() < 1e-10
    kinds = {name: fmt for name, (fmt, _, _) in read_gguf(tmp_path / "decoded.gguf").items()}
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == "F32"
    assert kinds["blk.1.attn_q.weight"] == ("F32" if n_layers == 2 else "BF16")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", SEED)
def test_rounding_of_activations_is_said_and_allowed(made, name, streamed):
    the, _, written = made(name)
    scorer = the.scorer
    if streamed:
        weights = Weights(the.layout, lambda: the.encodings)
        scorer = StreamedScorer(StreamedModel(the.layout, weights), scorer.documents)
    with pytest.raises(VerifyError, match=r"rounding of activations, .* agrees to \de-1\d") as said:
        verify(written.folder, partial(EncodedTensors, the.encodings), scorer)
    assert "\n" not in str(said.value)
    tolerance = float(str(said.value).split("--tolerance ")[1])
    found = verify(
        written.folder, partial(EncodedTensors, the.encodings), scorer, tolerance=tolerance
    )
    assert LLAMACPP_TOLERANCE < found.divergence <= tolerance < 1.3 * found.divergence
    assert found.exact.divergence < 1e-10
    assert found.exact.n_layers == the.layout.inventory.n_layers


def patched(folder, key, code, value):
    """Puts another value of the same length into the metadata; the manifest agrees."""
    path, text = folder / "model.gguf", key.encode()
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<Q", len(text)) + text) + 8 + len(text) + 4
    struct.pack_into(f"<{code}", data, at, value)
    path.write_bytes(data)
    manifest = unseal((folder / "manifest.json").read_bytes())
    manifest["sha256"]["model.gguf"] = file_digest(path)
    (folder / "manifest.json").write_bytes(seal(manifest))


@pytest.mark.parametrize(
    ("name", "key", "code", "value", "part"),
    [
        ("qwen3", "qwen3moe.rope.freq_base", "f", 20000.0, False),
        ("qwen3", "qwen3moe.expert_used_count", "I", 1, True),
        ("deepseek", "deepseek2.expert_gating_func", "I", 1, False),  # softmax
        ("deepseek", "deepseek2.expert_weights_norm", "?", False, True),
        ("deepseek", "deepseek2.rope.freq_base", "f", 20000.0, True),
    ],
    ids=[
        "rope",
        "experts used, first layers",
        "gating",
        "norm, first layers",
        "rope, first layers",
    ],
)
def test_another_function_is_refused_at_any_tolerance(
    made, tmp_path, monkeypatch, name, key, code, value, part
):
    the, _, written = made(name)
    folder = shutil.copytree(written.folder, tmp_path / "copy")
    patched(folder, key, code, value)
    if part:
        monkeypatch.setattr(exact, "free_memory", lambda: 0)
    for tolerance in (None, 1.0):
        with pytest.raises(VerifyError, match="another function of these weights") as said:
            verify(folder, partial(EncodedTensors, the.encodings), the.scorer, tolerance=tolerance)
        assert "allow it with" not in str(said.value)
        assert "\n" not in str(said.value)
        first = the.layout.layers[0] + 1
        assert (f"(first {first} of " in str(said.value)) == part


@pytest.mark.parametrize("name", SEED)
def test_the_first_layers_agree_where_memory_is_short(made, name):
    the, allocation, written = made(name)
    found = compared(the, allocation, written.folder, memory=0)
    assert found.divergence < 1e-10
    assert found.n_layers == the.layout.layers[0] + 1 < found.of_layers


def test_what_llama_cpp_is_told_is_no_matter_of_the_weights(case, tmp_path):
    """Keys and values in Q8_0 are rounding; fewer experts used are not, and both sides use them."""
    the = case("qwen3", "gguf")
    plain = the.allocation(1)
    told = plain.of(
        target="gguf", retained=plain.retained_experts, formats=plain.format_of, experts_used=1,
        kv_format="q8_0",
    )  # fmt: skip
    written = the.write(tmp_path / "out", "gguf", plain)
    folder = written.folder
    patched(folder, "qwen3moe.expert_used_count", "I", 1)
    found = compared(the, told, folder)
    assert found.divergence < 1e-10
    assert compared(the, plain, folder).divergence > EXACT_TOLERANCE


def test_the_decoded_file_has_no_name(made, monkeypatch):
    the, allocation, written = made("qwen3")
    seen = []
    plain = LlamaCpp.logits

    def spied(llama, ids):
        seen.append(sorted(os.listdir(written.folder.parent)))
        assert os.stat(llama.path).st_nlink == 0
        return plain(llama, ids)

    before = sorted(os.listdir(written.folder.parent))
    monkeypatch.setattr(LlamaCpp, "logits", spied)
    compared(the, allocation, written.folder)
    assert seen == [before] * 3


def test_no_room_is_one_line(made, monkeypatch):
    the, _, written = made("deepseek")
    monkeypatch.setattr(
        exact.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 0)
    )
    with pytest.raises(VerifyError, match=r"[\d,]+ bytes needed in .* or .*; free some") as said:
        verify(written.folder, partial(EncodedTensors, the.encodings), the.scorer, tolerance=1.0)
    assert "\n" not in str(said.value)


def test_the_longest_documents_are_compared(made, make_documents, monkeypatch):
    the, allocation, written = made("qwen3")
    asked = []
    plain = LlamaCpp.logits
    monkeypatch.setattr(
        LlamaCpp, "logits", lambda llama, ids: asked.append(len(ids)) or plain(llama, ids)
    )
    for lengths, expected in (((8, 30, 16, 4), [30, 16]), ((60, 8), [60])):
        asked.clear()
        compared(the, allocation, written.folder, make_documents(lengths), n_tokens=50)
        assert asked == expected
