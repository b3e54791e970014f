"""A checkpoint in FP8 from end to end, against torch's decoding of it and transformers."""

from functools import partial
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from allocator import api
from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.safetensors import read_json
from allocator.checkpoint.tensors import read_tensor
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.evaluation.held_out import original_row
from allocator.export.checkpoint import materialize
from allocator.export.safetensors.loading import load
from allocator.export.safetensors.runtime import SAFETENSORS_TOLERANCE
from allocator.export.tensors import EncodedTensors
from allocator.export.verification import verify
from allocator.scoring.scorer import Scorer
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF, TARGETS

torch.set_num_threads(1)
IDS = torch.randint(512, (2, 23), generator=torch.Generator().manual_seed(0))
RETAINED = (0, 2, 3, 4, 6, 7)


@pytest.fixture(scope="module")
def two(tmp_path_factory, make_checkpoint, fp8):
    """`fp8`, a random DeepSeek-V3; `plain`, the same as torch decodes it; `decoded`, its tensors.

    Dimensions of 64, 160, 192, 256 and 272: blocks of 128 that are whole, partial and alone.
    """
    folder = tmp_path_factory.mktemp("fp8")
    source = make_checkpoint(
        folder / "source", "deepseek", dtype="bfloat16",
        hidden_size=256, intermediate_size=160, moe_intermediate_size=192,
    )  # fmt: skip
    decoded = fp8.write(source, folder / "fp8")
    (folder / "plain").mkdir()
    save_file(decoded, folder / "plain/model.safetensors")
    (folder / "plain/config.json").write_bytes((source / "config.json").read_bytes())
    return SimpleNamespace(fp8=folder / "fp8", plain=folder / "plain", decoded=decoded)


def transformers_model(path):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def swap_model(path, target):
    return SwapModel(TARGETS[target].layout(read_inventory(path)), no_formats)


def no_formats(*args):
    pytest.fail("decoded a format although only the original was asked for")


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def test_every_tensor_is_torchs_decoding(two):
    inventory = read_inventory(two.fp8)
    assert set(inventory.tensors) == set(two.decoded)
    assert {t.dtype for t in inventory.tensors.values()} >= {"F8_E4M3", "BF16"}
    for name, tensor in two.decoded.items():
        found, expected = read_tensor(inventory, name), tensor.float().numpy()
        np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("target", TARGETS)
def test_the_model_is_transformers_with_the_decoded_weights(two, target):
    swap = swap_model(two.fp8, target)
    theirs = transformers_model(two.plain)
    torch.testing.assert_close(logits(swap.model), logits(theirs), rtol=1e-5, atol=1e-5)
    expected = theirs.state_dict()
    found = swap.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not hasattr(swap.model.config, "quantization_config")


def test_bytes_of_the_original(two, make_documents):
    """The size that `evaluate` prints beside the original has the scales."""
    scorer = Scorer(swap_model(two.fp8, "gguf"), make_documents([16], seed=1))
    row = original_row(read_inventory(two.fp8), scorer.documents, scorer.score_original())
    nbytes = 0
    for path in two.fp8.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                nbytes += 0 if tensor.dim() == 1 or "mlp.gate." in name else tensor.nbytes
    assert row["bytes"] == nbytes
    assert row["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_inspect_lists_what_the_decoded_checkpoint_has(two, target):
    assert api.inspect(two.fp8, target=target).equals(api.inspect(two.plain, target=target))


def chosen(layout, fmt):
    return Allocation.of(
        target=layout.target,
        retained=dict.fromkeys(layout.layers, RETAINED),
        formats=dict.fromkeys(layout.groups, fmt),
        experts_used=2,
    )


@pytest.fixture(scope="module")
def written(two, tmp_path_factory):
    """`written(kind, container, fmt)`: bank and directory of the checkpoint `fp8` or `plain`."""
    folder, made = tmp_path_factory.mktemp("written"), {}

    def get(kind, container, fmt):
        key = f"{kind}-{container}-{fmt}"
        if key not in made:
            layout = GGUF.layout(read_inventory(getattr(two, kind)))
            encodings = Encodings(folder / f"bank-{kind}", layout, {})
            materialize(
                EncodedTensors(encodings, chosen(layout, fmt)),
                folder / key,
                container=container,
                importance="i" * 64,
            )
            made[key] = encodings, folder / key
        return made[key]

    return get


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_written_files_are_those_of_the_decoded_checkpoint(written, container):
    """Nothing of FP8 is left: every file but the manifest, which names the source, is equal."""
    ours, theirs = (written(kind, container, "Q8_0")[1] for kind in ("fp8", "plain"))
    names = {path.name for path in theirs.iterdir()}
    assert {path.name for path in ours.iterdir()} == names
    for name in names - {"manifest.json"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    if container == "safetensors":
        found = read_json(ours / "config.json")["quantization_config"]
        assert set(found) == {"quant_method", "schema", "allocation"}
        assert found["quant_method"] == "moe-allocator"


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_what_is_written_verifies(written, make_documents, container):
    encodings, folder = written("fp8", container, "BF16")
    scorer = Scorer(
        SwapModel(encodings.layout, encodings.decoded), make_documents([32] * 3, seed=1)
    )
    limit = 0.05 if container == "gguf" else SAFETENSORS_TOLERANCE  # llama.cpp rounds activations
    found = verify(folder, partial(EncodedTensors, encodings), scorer, tolerance=limit)
    assert found.n_tensors == len(encodings.layout.groups) + len(encodings.layout.full_precision)
    assert found.loss > 0.01


def test_loaded_model_is_transformers_with_the_rounded_weights(two, written):
    """BF16 is torch's own cast of torch's decoding; two experts are kept from no token."""
    _, folder = written("fp8", "safetensors", "BF16")
    theirs = transformers_model(two.plain)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() > 1 and not name.endswith("mlp.gate.weight"):
                parameter.copy_(parameter.bfloat16())
        for layer in (1, 2):  # out of the choice, as experts that are gone
            bias = theirs.model.layers[layer].mlp.gate.e_score_correction_bias
            bias[[e for e in range(8) if e not in RETAINED]] = -1e9
    torch.testing.assert_close(logits(load(folder)), logits(theirs), rtol=0, atol=1e-5)


def test_gguf_holds_no_fp8(written, two):
    """Read by gguf-py: a router as in the checkpoint, and the retained experts' values."""
    _, folder = written("fp8", "gguf", "BF16")
    reader = gguf.GGUFReader(folder / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {t.tensor_type.name for t in reader.tensors} == {"BF16", "F32"}
    router = two.decoded["model.layers.1.mlp.gate.weight"].float()[list(RETAINED)]
    np.testing.assert_array_equal(tensors["blk.1.ffn_gate_inp.weight"].data, router.numpy())
    stacked = tensors["blk.2.ffn_down_exps.weight"]
    found = gguf.dequantize(stacked.data, stacked.tensor_type)
    for place, expert in enumerate(RETAINED):
        values = two.decoded[f"model.layers.2.mlp.experts.{expert}.down_proj.weight"]
        np.testing.assert_array_equal(found[place], values.bfloat16().float().numpy())
