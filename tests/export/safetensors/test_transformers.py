"""`from_pretrained`, with our quantizer and without it, against `allocator.load`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load as load_file_bytes
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, Qwen3MoeForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import allocator.transformers  # noqa: F401 - registers the quantizer
from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.errors import AllocatorError, CheckpointError
from allocator.export.checkpoint import materialize
from allocator.export.safetensors.directory import FILE_NAME
from allocator.export.safetensors.loading import load
from allocator.export.tensors import EncodedTensors
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF

IDS = torch.tensor([[0, 17, 301, 44, 5, 123, 9, 77], [0, 3, 8, 400, 401, 1, 2, 3]])
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
CASES = [("deepseek", "gguf"), ("deepseek", "safetensors"), ("qwen3", "safetensors")]


@pytest.fixture(params=CASES, ids="-".join)
def folder(request, written):
    return written(*request.param, "safetensors").folder


@torch.inference_mode()
def test_logits_and_generated_tokens_are_the_loaders(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ours = load(folder)
    assert torch.equal(model(IDS).logits, ours(IDS).logits)
    mask = torch.ones_like(IDS)
    options = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    tokens = model.generate(IDS, **options, **GREEDY)
    expected = ours.generate(IDS, **options, **GREEDY)
    assert torch.equal(tokens.sequences, expected.sequences)
    for step, logits in enumerate(tokens.logits):  # against passes without a cache
        whole = ours(tokens.sequences[:, : IDS.shape[1] + step], use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_cache_of_few_bits_is_encoded_token_by_token(make_checkpoint, tmp_path):
    """Against passes over the whole text, whose keys and values are scored as llama.cpp's."""
    layout = GGUF.layout(read_inventory(make_checkpoint(tmp_path / "made", "qwen3", head_dim=32)))
    allocation, exact = (
        Allocation.of(
            target="gguf", retained=dict.fromkeys(layout.layers, (0, 1, 3, 5)),
            formats=dict.fromkeys(layout.groups, "Q8_0"), experts_used=2, kv_format=kv_format,
        )
        for kv_format in ("q4_0", "f16")
    )  # fmt: skip
    encodings = Encodings(tmp_path / "bank", layout, {})
    source = EncodedTensors(encodings, allocation)
    materialize(source, tmp_path / "out", container="safetensors", importance="i" * 64)
    swap = SwapModel(layout, encodings.decoded)
    swap.put_allocation(allocation)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    options = {"return_dict_in_generate": True, "output_logits": True}
    made = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options, **GREEDY)
    for step, logits in enumerate(made.logits):
        whole = swap.model(made.sequences[:, : IDS.shape[1] + step], use_cache=False)
        torch.testing.assert_close(logits, whole.logits[:, -1], rtol=0, atol=1e-5)
    first = model(IDS, use_cache=True)  # a loop of one's own
    step = model(made.sequences[:, 8:9], past_key_values=first.past_key_values).logits[:, -1]
    torch.testing.assert_close(step, made.logits[1], rtol=0, atol=1e-5)
    swap.put_allocation(exact)
    assert not torch.allclose(made.logits[0], swap.model(IDS).logits[:, -1], atol=1e-3)


def test_saved_again_has_equal_bytes(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    for name in (FILE_NAME, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_number_format_is_asked_for_by_name(folder):
    expected = load(folder)(IDS).logits
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", attn_implementation="sdpa"
    )
    with torch.inference_mode():
        logits = model(IDS).logits
    assert (model.dtype, logits.dtype) == (torch.bfloat16, torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.1 * float(expected.std()))


@pytest.mark.parametrize("opener", ["auto", "its class"])
def test_without_the_import_transformers_says_what_to_import(written, monkeypatch, opener):
    folder = written("qwen3", "safetensors", "safetensors").folder
    for table in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(table, "moe-allocator")
    stock = AutoModelForCausalLM if opener == "auto" else Qwen3MoeForCausalLM
    with pytest.raises(ValueError, match=r"run `import allocator\.transformers` before"):
        stock.from_pretrained(folder)


# -- what is not opened


@pytest.fixture
def copy(written, tmp_path):
    source = written("qwen3", "safetensors", "safetensors").folder
    return shutil.copytree(source, tmp_path / "copy")


def refused(folder, match, **options):
    with pytest.raises(AllocatorError, match=match) as caught:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_damaged_folder_is_refused_in_one_line(copy):
    file, config = copy / FILE_NAME, json.loads((copy / "config.json").read_text())
    whole = file.read_bytes()
    for data in (b"", whole[:100], whole[:-1]):
        file.write_bytes(data)
        refused(copy, "cannot be opened")
    tensors = load_file_bytes(whole)
    for name in ("layers.1.attention.q", "model.norm.weight"):
        save_file({k: v for k, v in tensors.items() if k != name}, file)
        refused(copy, "0 weights of")
    file.write_bytes(whole)
    described = config["quantization_config"]
    for part, match in ((described, "schema 2"), (described["allocation"], "unknown field")):
        part["schema"] = 2
        (copy / "config.json").write_text(json.dumps(config))
        refused(copy, f"^{copy}.*{match}")
        part["schema"] = 1


def test_other_devices_and_classes_are_refused(written):
    folder = written("qwen3", "safetensors", "safetensors").folder
    refused(folder, "decoded on the CPU", device_map={"": "meta"})
    with pytest.raises(AllocatorError, match="opened as Qwen3MoeModel, needed Qwen3MoeForCausalLM"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="already quantized"):
        read_inventory(folder)
