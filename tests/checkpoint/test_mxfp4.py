"""Experts in MXFP4, as gpt-oss is released, are read as transformers decodes them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from allocator.checkpoint.inventory import MXFP4
from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_rows, read_tensor
from allocator.codecs import codec_of
from allocator.errors import CheckpointError
from allocator.families import Role
from allocator.formats import FORMATS
from allocator.targets import GGUF, SAFETENSORS

HIDDEN, WIDTH, EXPERTS = 64, 96, 4
CONFIG = {
    "model_type": "gpt_oss", "vocab_size": 96, "hidden_size": HIDDEN, "intermediate_size": WIDTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"],
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
E = "model.layers.{}.mlp.experts."
ROWS = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}


def write(folder, tensors, **changes):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Tensors of a checkpoint in MXFP4, with codes and exponents at random."""
    folder = tmp_path_factory.mktemp("saved")
    plain = {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for name, (rows, columns) in ROWS.items():
            del tensors[E.format(layer) + name]
            codes = torch.randint(256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8)
            exponents = torch.randint(100, 135, codes.shape[:-1], dtype=torch.uint8)
            tensors[E.format(layer) + f"{name}_blocks"] = codes
            tensors[E.format(layer) + f"{name}_scales"] = exponents
    for name, values in tensors.items():
        if "bias" in name:
            values.copy_(torch.randn(values.shape))
    return tensors


@pytest.fixture
def checkpoint(released, tmp_path):
    return write(tmp_path, released)


def decoded(tensors, layer, name):
    """As transformers decodes it, `(experts, in, out)`."""
    stem = E.format(layer) + name
    return convert_moe_packed_tensors(
        tensors[f"{stem}_blocks"], tensors[f"{stem}_scales"], dtype=torch.float32
    )


def test_values_are_those_of_transformers(checkpoint, released):
    inventory = read_inventory(checkpoint)
    for layer in range(2):
        both, down = (decoded(released, layer, name) for name in ROWS)
        for expert in range(EXPERTS):
            wanted = {"gate": both[expert, :, ::2], "up": both[expert, :, 1::2]}
            for kind, matrix in (wanted | {"down": down[expert]}).items():
                name = E.format(layer) + f"{expert}.{kind}_proj.weight"
                assert inventory.tensors[name].dtype == MXFP4
                values = read_tensor(inventory, name)
                np.testing.assert_array_equal(values, matrix.T.numpy())
                np.testing.assert_array_equal(read_rows(inventory, name, 3, 11), values[3:11])


def test_biases_of_gate_and_up_take_turns(checkpoint, released):
    inventory = read_inventory(checkpoint)
    stored = released[E.format(1) + "gate_up_proj_bias"].float().numpy()
    for number, kind in enumerate(("gate", "up")):
        name = E.format(1) + f"{kind}_proj_bias"
        assert inventory.tensors[name].role is Role.EXPERT_BIAS
        np.testing.assert_array_equal(read_tensor(inventory, name), stored[:, number::2])
        assert inventory.family.place_in_model(name) == (
            E.format(1) + "gate_up_proj_bias",
            (..., slice(number, None, 2)),
        )


@pytest.mark.parametrize("target", [GGUF, SAFETENSORS], ids=["gguf", "safetensors"])
def test_the_format_loses_nothing_and_no_larger_one_is_offered(checkpoint, target):
    layout = target.layout(read_inventory(checkpoint))
    mxfp4 = FORMATS["MXFP4"]
    for group in layout.groups.values():
        if not group.role.is_expert:
            assert group.source_format is None
            continue
        assert group.offered()[0] == mxfp4
        for name in group.sources:
            values = read_tensor(layout.inventory, name)
            data = codec_of(mxfp4).encode(values, mxfp4)
            np.testing.assert_array_equal(codec_of(mxfp4).decode(data, mxfp4), values)


def test_digests_are_of_codes_exponents_and_places(checkpoint, released, tmp_path):
    before = read_inventory(checkpoint)
    digests = {name: before.tensor_digest(name) for name in before.tensors}
    assert len(set(digests.values())) > 2 * 3 * EXPERTS
    changed = dict(released)
    scales = changed[E.format(0) + "gate_up_proj_scales"].clone()
    scales[2, 5] += 1  # a row of up
    changed[E.format(0) + "gate_up_proj_scales"] = scales
    (tmp_path / "other").mkdir()
    after = read_inventory(write(tmp_path / "other", changed))
    other = {n for n in digests if after.tensor_digest(n) != digests[n]}
    assert other == {E.format(0) + "2.up_proj.weight"}


def without(tensors, name):
    return {n: t for n, t in tensors.items() if n != E.format(1) + name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "down_proj_scales"), "down_proj_blocks of 96 columns without expo"),
        (lambda t: without(t, "down_proj_blocks"), "down_proj_scales without .*down_proj_blocks"),
        (lambda t: without(t, "down_proj_bias"), "layer 1 lacks mlp.experts.down_proj_bias"),
        (
            lambda t: t | {E.format(0) + "gate_up_proj_bias": torch.zeros(EXPERTS, WIDTH)},
            r"gate_up_proj_bias of F32 has shape \(4, 96\), needed \(4, 192\)",
        ),
        (
            lambda t: t | {E.format(0) + "down_proj_scales": torch.zeros(4, 64, 2).byte()},
            r"down_proj_scales has shape \(4, 64, 2\), needed \(4, 64, 3\)",
        ),
        (
            lambda t: t | {E.format(0) + "down_proj_blocks": torch.zeros(4, 64, 3, 8).byte()},
            r"down_proj_blocks has shape \(4, 64, 3, 8\), needed \(4, 64, 3, 16\)",
        ),
    ],
)
def test_what_is_missing_is_named(released, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        read_inventory(write(tmp_path, change(released)))
    assert "\n" not in str(error.value)


def test_an_exponent_that_is_no_number_is_refused(released, tmp_path):
    changed = dict(released)
    scales = changed[E.format(0) + "down_proj_scales"].clone()
    scales[1, 0, 0] = 255
    changed[E.format(0) + "down_proj_scales"] = scales
    inventory = read_inventory(write(tmp_path, changed))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight holds a NaN"):
        read_tensor(inventory, E.format(0) + "1.down_proj.weight")


def test_one_expert_is_read_at_a_time(checkpoint, monkeypatch):
    inventory, sizes = read_inventory(checkpoint), []
    usual = np.fromfile

    def counted(file, dtype, *, count, offset):
        sizes.append(count)
        return usual(file, dtype, count=count, offset=offset)

    monkeypatch.setattr(np, "fromfile", counted)
    for kind in ("gate", "up", "down"):
        read_tensor(inventory, E.format(0) + f"3.{kind}_proj.weight")
    assert max(sizes) == 2 * WIDTH * HIDDEN // 2
