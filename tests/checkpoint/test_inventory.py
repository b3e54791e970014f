"""Checkpoints as transformers writes them, and every way in which one may be damaged."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.safetensors import read_header
from allocator.checkpoint.tensors import read_tensor
from allocator.errors import CheckpointError
from allocator.families import Role

REFERENCE = Path(__file__).parents[2] / "studies/reference/model"


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def by_safetensors(folder):
    """Name to (shape, dtype), as the safetensors library reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


@pytest.mark.parametrize("kind", ["qwen", "deepseek", "reference"])
def test_everything_that_safetensors_reads(saved, kind):
    folder = {**saved, "reference": REFERENCE}[kind]
    inventory = read_inventory(folder)
    found = {t.name: (t.shape, t.dtype) for t in inventory.tensors.values()}
    assert found == by_safetensors(folder)


def test_bytes_are_where_the_inventory_says(saved):
    import torch

    for folder in saved.values():
        for info in read_inventory(folder).tensors.values():
            with safe_open(folder / info.file, "pt") as file:
                values = file.get_tensor(info.name)
            with open(folder / info.file, "rb") as file:
                file.seek(info.offset)
                raw = file.read(info.nbytes)
            assert raw == values.contiguous().view(torch.uint8).numpy().tobytes()


def test_counts(saved):
    qwen, deepseek = (read_inventory(saved[k]) for k in ("qwen", "deepseek"))
    assert (qwen.n_layers, qwen.moe_layers, qwen.n_experts, qwen.experts_used) == (2, (0, 1), 8, 2)
    assert (deepseek.moe_layers, deepseek.n_experts, deepseek.expert_groups) == ((1, 2), 8, 4)
    assert qwen.expert_groups == 1
    assert not qwen.tied_embeddings
    assert read_inventory(REFERENCE).tied_embeddings


def test_experts_come_in_order(saved):
    for folder in saved.values():
        inventory = read_inventory(folder)
        found = inventory.of_role(Role.EXPERT_UP, 1)
        assert [t.expert for t in found] == list(range(8))
        assert found[3].name == "model.layers.1.mlp.experts.3.up_proj.weight"


def test_searched_weights_by_hand(tiny):
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 4 * 3 * 32 * 64  # q and o, k and v, experts
    assert tiny.n_searched_weights == 2 * layer + 2 * 48 * 64  # and embedding and head


def test_fewest_experts(saved, tiny):
    assert [tiny.least_experts(n) for n in (1, 2)] == [1, 2]
    deepseek = read_inventory(saved["deepseek"])  # 4 groups, 2 chosen, 2 per group for its rank
    assert [deepseek.least_experts(n) for n in (1, 2, 4, 5)] == [8, 8, 8, 12]


def change_last_byte(folder, place):
    with open(folder / place.file, "r+b") as file:
        file.seek(place.offset + place.nbytes - 1)
        file.write(b"\1")


def test_digest_follows_the_content(tmp_path, make, as_they_are):
    folder = make.zeros(tmp_path / "a")
    before = read_inventory(folder).digest
    assert read_inventory(make.zeros(tmp_path / "b")).digest == before
    info = read_inventory(folder).tensors["model.layers.1.mlp.gate.weight"]
    change_last_byte(folder, info)
    after = read_inventory(folder)
    assert after.digest != before
    file = folder / info.file
    os.truncate(file, info.offset + 1)
    with pytest.raises(CheckpointError, match=r"ends inside model.layers.1.mlp.gate.weight"):
        as_they_are(after).tensor_digest(info.name)


def test_reads_no_weights(tmp_path, make):
    """A sparse file of 100 GB."""
    config = {"vocab_size": 100_000_000, "hidden_size": 512}
    changed = make.tensors(**config)
    folder = make.zeros(tmp_path, tensors=changed, **config)
    stat = (folder / "model.safetensors").stat()
    assert stat.st_size > 100e9
    assert stat.st_blocks * 512 < 1e6
    began = time.perf_counter()
    inventory = read_inventory(folder)
    assert time.perf_counter() - began < 1
    assert inventory.tensors["lm_head.weight"].nbytes == 2 * 512 * 100_000_000


# -- multi-token prediction


def with_nextn(make, folder, layer=2, n=1):
    extra = {
        f"model.layers.{layer}.eh_proj.weight": (64, 128),
        f"model.layers.{layer}.shared_head.norm.weight": (64,),
        f"model.layers.{layer}.self_attn.q_proj.weight": (64, 64),
        f"model.layers.{layer}.mlp.experts.0.up_proj.weight": (32, 64),
    }
    return make.zeros(folder, tensors=make.tensors() | extra, num_nextn_predict_layers=n), extra


def test_nextn_layers_are_seen_and_left_out(tmp_path, make, tiny):
    folder, extra = with_nextn(make, tmp_path)
    inventory = read_inventory(folder)
    assert {t.name for t in inventory.tensors.values() if t.role is Role.NEXTN} == set(extra)
    assert {t.layer for t in inventory.tensors.values() if t.role is Role.NEXTN} == {2}
    assert inventory.moe_layers == (0, 1)
    assert inventory.n_searched_weights == tiny.n_searched_weights


@pytest.mark.parametrize(("layer", "n"), [(2, 0), (3, 1), (2, None), (99, 1)])
def test_more_layers_than_config_says(tmp_path, make, layer, n):
    folder, _ = with_nextn(make, tmp_path, layer, n)
    with pytest.raises(CheckpointError, match=rf"model.layers.{layer}\..* is no tensor"):
        read_inventory(folder)


# -- FP8

Q = "model.layers.0.self_attn.q_proj.weight"
BLOCK = [48, 40]


@pytest.fixture(scope="module")
def in_fp8(tmp_path_factory, make_checkpoint, fp8):
    """A random DeepSeek-V3 in FP8, in two shards, and its tensors as torch decodes them."""
    folder = tmp_path_factory.mktemp("fp8")
    source = make_checkpoint(folder / "plain", "deepseek", dtype="bfloat16", intermediate_size=160)
    return folder / "fp8", fp8.write(source, folder / "fp8"), source


def test_scales_are_part_of_their_tensors(in_fp8):
    import torch

    folder, _, source = in_fp8
    inventory, theirs = read_inventory(folder), by_safetensors(folder)
    scaled = {t.name: t for t in inventory.tensors.values() if t.dtype == "F8_E4M3"}
    found = {t.name: (t.shape, t.dtype) for t in inventory.tensors.values()}
    found |= {t.scale.name: (t.scale.shape, t.scale.dtype) for t in scaled.values()}
    assert found == theirs
    assert len(theirs) == len(inventory.tensors) + len(scaled)
    plain = read_inventory(source)
    assert set(inventory.tensors) == set(plain.tensors)
    assert inventory.n_searched_weights == plain.n_searched_weights
    assert len(scaled) == 3 * (2 * 8 + 2 + 1) + 3 * 5  # experts, shared, dense; attention
    for name, info in inventory.tensors.items():
        assert (info.scale is not None) == (name in scaled)
        assert info.total_bytes == info.nbytes + (info.scale.nbytes if info.scale else 0)
    for info in (t.scale for t in scaled.values()):
        with safe_open(folder / info.file, "pt") as file:
            values = file.get_tensor(info.name)
        raw = (folder / info.file).read_bytes()[info.offset : info.offset + info.nbytes]
        assert raw == values.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def zeros_fp8(tmp_path, make, fp8):
    """`write(change, **config)`: a checkpoint of zeros whose projections are FP8.

    `change` edits a table of name to (shape, dtype); `more` are further tensors in FP8.
    """

    def write(change=lambda table: None, *, more=None, block=BLOCK, **config):
        table = {}
        for name, shape in {**make.tensors(), **(more or {})}.items():
            table[name] = shape, "BF16"
            if "_proj" in name:
                table[name] = shape, "F8_E4M3"
                n_blocks = tuple(-(-n // b) for n, b in zip(shape, BLOCK, strict=True))
                table[f"{name}_scale_inv"] = n_blocks, "F32"
        change(table)
        config = {"quantization_config": {**fp8.config, "weight_block_size": block}, **config}
        shapes = {name: shape for name, (shape, _) in table.items()}
        dtypes = {name: dtype for name, (_, dtype) in table.items()}
        return make.zeros(tmp_path, tensors=shapes, dtypes=dtypes, **config)

    return write


def test_nextn_layers_in_fp8_are_left_out(zeros_fp8, tiny):
    more = {"model.layers.2.eh_proj.weight": (64, 128), "model.layers.2.enorm.weight": (64,)}
    inventory = read_inventory(zeros_fp8(more=more, num_nextn_predict_layers=1))
    assert {t.name for t in inventory.tensors.values() if t.role is Role.NEXTN} == set(more)
    assert inventory.n_searched_weights == tiny.n_searched_weights
    assert inventory.moe_layers == (0, 1)


def test_digests_follow_scales_and_blocks(zeros_fp8):
    folder = zeros_fp8()
    before = read_inventory(folder)
    known = {name: before.tensor_digest(name) for name in before.tensors}
    whole = before.digest
    change_last_byte(folder, before.tensors[Q].scale)
    after = read_inventory(folder)
    assert {n for n in known if after.tensor_digest(n) != known[n]} == {Q}
    assert after.digest != whole
    other = read_inventory(zeros_fp8(block=[40, 40]))  # as many blocks, of other weights
    assert other.tensors[Q].scale.shape == (2, 2)
    projections = {name for name in known if "_proj" in name}
    assert {n for n in known if other.tensor_digest(n) != known[n]} == projections


def test_digest_of_a_scale_that_ends_early(zeros_fp8, as_they_are):
    folder = zeros_fp8()
    inventory = read_inventory(folder)
    scale = inventory.tensors[Q].scale
    os.truncate(folder / scale.file, scale.offset + scale.nbytes - 1)
    with pytest.raises(CheckpointError, match=r"ends inside .*q_proj.weight_scale_inv"):
        as_they_are(inventory).tensor_digest(Q)


@pytest.mark.parametrize(
    "found",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes_4bit", "load_in_4bit": True},
        {"quant_method": "mxfp4"},
        {},
        "int8",
    ],
)
def test_quantization_that_no_tensor_uses(tmp_path, make, tiny, found):
    """As in checkpoints that were converted to bfloat16 with their config.json copied."""
    inventory = read_inventory(make.zeros(tmp_path, quantization_config=found))
    assert inventory.tensors == tiny.tensors
    assert [n.partition(",")[0] for n in inventory.notes] == [
        f"left out: config.json says quant_method {method_of(found)!r}"
    ]
    assert tiny.notes == ()


def method_of(found):
    return str(found.get("quant_method") if isinstance(found, dict) else found)


ROUTER = "model.layers.1.mlp.gate.weight"
NORM = "model.layers.1.input_layernorm.weight"


def stored_as(dtype, *names, shape=None):
    def change(table):
        for name in names:
            table[name] = shape or table[name][0], dtype

    return change


def kept_in_fp8(name, scale_shape):
    def change(table):
        table[name] = table[name][0], "F8_E4M3"
        table[f"{name}_scale_inv"] = scale_shape, "F32"

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{Q}_scale_inv"), rf"{Q} is stored as F8_E4M3 without its {Q}_scale_inv"),
        (lambda t: t.pop(Q), rf"{Q}_scale_inv scales a weight that is missing, needed one in F8"),
        (stored_as("BF16", Q), "scales a weight that is stored as BF16, needed one in F8_E4M3"),
        (stored_as("F8_E5M2", Q), f"{Q} is stored as F8_E5M2, needed one of .*F8_E4M3; convert"),
        (stored_as("F8_E8M0", f"{Q}_scale_inv"), "_scale_inv is stored as F8_E8M0, needed one of"),
        (stored_as("U8", f"{Q}_scale_inv"), "_scale_inv is stored as U8, whole numbers"),
        *(
            (stored_as(dtype, f"{Q}_scale_inv", shape=shape), r"BF16 of shape \(2, 2\): a fact")
            for shape in ((2, 1), (1, 2), (2, 3), (4,), (1, 2, 2), (64, 64))
            for dtype in ("F32", "BF16")
        ),
        (
            kept_in_fp8(ROUTER, (1, 2)),
            rf"{ROUTER} \(router\) is stored as F8_E4M3, but kept in full",
        ),
        (kept_in_fp8(NORM, (2,)), rf"{NORM} \(norm\) is stored as F8_E4M3, but kept in full"),
    ],
)
def test_odd_fp8(zeros_fp8, change, match):
    refused(zeros_fp8(change), match)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (None, "F8_E4M3, but config.json has no quantization_config"),
        ({"quant_method": "gptq"}, "'gptq' of a checkpoint in F8_E4M3, needed 'fp8'"),
        ({}, "quant_method is None of a checkpoint in F8_E4M3, needed 'fp8'"),
        (["fp8"], "quant_method is None of a checkpoint in F8_E4M3, needed 'fp8'"),
        ({"quant_method": "fp8"}, r"weight_block_size is None, needed two numbers from 1"),
        *(
            ({"quant_method": "fp8", "weight_block_size": block}, "_size is .*, needed two numb")
            for block in (None, 48, "48", [48], [48, 40, 1], [0, 40], [48, -40], [48.0, 40],
                          [True, 40], [[48], 40], {"48": 40})
        ),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"BF16 of shape \(1, 1\)"),
    ],
)  # fmt: skip
def test_odd_quantization(zeros_fp8, found, match):
    refused(zeros_fp8(quantization_config=found), match)


# -- damage


def header_of(folder):
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), len(data) - 8 - length


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_inventory(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 8, 9, 500, -1, -4096])
def test_truncated(tmp_path, make, size):
    file = make.zeros(tmp_path) / "model.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    refused(tmp_path, "truncated")


def test_tail(tmp_path, make):
    file = make.zeros(tmp_path) / "model.safetensors"
    os.truncate(file, file.stat().st_size + 1)
    refused(tmp_path, "has a tail")


@pytest.mark.parametrize("length", [0, 1, 100, 10**6, 2**63, 2**64 - 1])
def test_header_length_lies(tmp_path, make, length):
    with open(make.zeros(tmp_path) / "model.safetensors", "r+b") as file:
        file.write(length.to_bytes(8, "little"))
    refused(tmp_path, "header")


ODD_HEADERS = {
    "overlap": lambda h: h[Q].update(data_offsets=h[Q.replace("q_", "o_")]["data_offsets"]),
    "shifted": lambda h: h[Q].update(data_offsets=[n - 2 for n in h[Q]["data_offsets"]]),
    "gap": lambda h: h.pop(Q),
    "wrong shape": lambda h: h[Q].update(shape=[64, 65]),
    "negative": lambda h: h[Q].update(shape=[-64, -64]),
    "empty": lambda h: h[Q].update(shape=[0, 64]),
    "one offset": lambda h: h[Q].update(data_offsets=[0]),
    "no offsets": lambda h: h[Q].update(data_offsets=[]),
    "three offsets": lambda h: h[Q].update(data_offsets=[0, 1, 2]),
    "null offsets": lambda h: h[Q].update(data_offsets=None),
    "infinite": lambda h: h[Q].update(shape=[float("inf"), 1]),
    "fraction": lambda h: h[Q].update(shape=[64.5, 64]),
    "text": lambda h: h[Q].update(shape=["64", "64"]),
    "no dtype": lambda h: h[Q].pop("dtype"),
    "list": lambda h: h.update({Q: []}),
    "huge": lambda h: h[Q].update(shape=[10**30, 64]),
    "other dtype": lambda h: h[Q].update(dtype="F8_E5M2"),
    "other width": lambda h: h[Q].update(dtype="F8_E4M3"),
    "one dimension": lambda h: h[Q].update(shape=[64 * 64]),
    "three dimensions": lambda h: h[Q].update(shape=[1, 64, 64]),
    "scalar": lambda h: h["model.norm.weight"].update(shape=[8, 8]),
}


@pytest.mark.parametrize("odd", ODD_HEADERS)
def test_headers_that_do_not_describe_their_file(tmp_path, make, odd):
    header, n_data = header_of(make.zeros(tmp_path))
    ODD_HEADERS[odd](header)
    make.raw(tmp_path / "model.safetensors", header, n_data)
    refused(tmp_path, "header|q_proj|model.norm")


@pytest.mark.parametrize("text", [b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 90_000, b'{"a": ' * 9])
def test_headers_that_are_no_table(tmp_path, make, text):
    make.raw(make.zeros(tmp_path) / "model.safetensors", text, 16)
    refused(tmp_path, "model.safetensors|missing")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, make):
    folder = make.zeros(tmp_path_factory.mktemp("whole"))
    return folder, (folder / "model.safetensors").read_bytes(), read_inventory(folder)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_damage_of_a_header(whole, data):
    folder, good, inventory = whole
    n_header = 8 + int.from_bytes(good[:8], "little")
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, n_header - 1))
        bad[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789{}[]",:. e-'))
    (folder / "model.safetensors").write_bytes(bad)
    try:
        found = read_inventory(folder)
    except CheckpointError:
        return
    # what a digit turned into another may say, the rest of the header must still agree with
    assert found == inventory


def test_unreadable_config(tmp_path, make):
    (make.zeros(tmp_path) / "config.json").write_text("{")
    refused(tmp_path, "config.json: cannot be read")
    (tmp_path / "config.json").write_bytes(b"\xff\xff")
    refused(tmp_path, "config.json: cannot be read")
    (tmp_path / "config.json").write_text("[" * 100_000)
    refused(tmp_path, "config.json: cannot be read")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json: needed an object")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json: no such file")
    refused(tmp_path / "nowhere", "no such directory")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported yet; supported: deepseek"),
        ({"model_type": None}, "no model_type; needed the config.json"),
        ({"num_experts": None}, "no num_experts or num_local_experts"),
        ({"num_experts": "four"}, "num_experts is 'four'"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 5}, r"4 experts.gate tensors, needed experts 0..4"),
        ({"num_experts": 3}, r"4 experts.gate tensors, needed experts 0..2"),
        ({"num_experts": 10**15}, "num_experts is"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers is"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is no tensor"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts_per_tok": 5}, "5 of 4 experts used"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"n_group": 3, "topk_group": 1}, "4 experts used|in 1 of 3 groups"),
        ({"n_group": 2, "topk_group": "1"}, "topk_group is '1'"),
        ({"n_group": 0}, "n_group is 0"),
        ({"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers is '1'"),
    ],
)
def test_config(tmp_path, make, changes, match):
    refused(make.zeros(tmp_path, **changes), match)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.layers.1.mlp.experts.2.up_proj.weight", "layer 1 has 3 experts.up tensors"),
        ("model.layers.1.mlp.gate.weight", "layer 1 lacks mlp.gate"),
        ("model.layers.0.self_attn.k_proj.weight", "layer 0 lacks self_attn.k_proj"),
        ("model.layers.0.input_layernorm.weight", "layer 0 lacks input_layernorm"),
        ("model.norm.weight", "model.norm.weight is missing"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight is missing"),
        ("lm_head.weight", "lm_head.weight is missing"),
    ],
)
def test_missing_tensors(tmp_path, make, name, match):
    tensors = make.tensors()
    del tensors[name]
    refused(make.zeros(tmp_path, tensors=tensors), match)


@pytest.mark.parametrize(
    "name", ["extra.weight", "model.layers.0.mlp.up_proj.gweight", "x.99.y", "x.².y", "x.٣.y"]
)
def test_unknown_tensor(tmp_path, make, name):
    folder = make.zeros(tmp_path, tensors=make.tensors() | {name: (2, 2)})
    refused(folder, "is no tensor of qwen3_moe")


def test_a_layer_of_two_kinds(tmp_path, make):
    extra = {"model.layers.0.mlp.up_proj.weight": (32, 64)}
    refused(make.zeros(tmp_path, tensors=make.tensors() | extra), "has mlp.up_proj")


def test_experts_of_two_shapes(tmp_path, make):
    tensors = make.tensors() | {"model.layers.1.mlp.experts.2.up_proj.weight": (64, 64)}
    refused(make.zeros(tmp_path, tensors=tensors), "of one shape")


def test_router_of_other_experts(tmp_path, make):
    tensors = make.tensors() | {"model.layers.1.mlp.gate.weight": (5, 64)}
    refused(make.zeros(tmp_path, tensors=tensors), "needed 4 rows as config.json says")


# -- shards


@pytest.fixture
def shards(saved, tmp_path):
    shutil.copytree(saved["deepseek"], tmp_path / "d")
    return tmp_path / "d"


INDEX = "model.safetensors.index.json"
MOVED = "model.layers.1.mlp.gate.weight"


def test_missing_shard(shards):
    lost = sorted(shards.glob("model-*"))[2]
    lost.unlink()
    refused(shards, rf"1 of \d+ shards of the index are missing, e.g. {lost.name}; fetch")
    (shards / "abc.incomplete").touch()
    refused(shards, "the download was interrupted: run it again")


def test_neither_file(shards):
    (shards / INDEX).unlink()
    refused(shards, r"\d safetensors files .* without model.safetensors.index.json; fetch")
    for file in shards.glob("*.safetensors"):
        file.unlink()
    refused(shards, "neither model.safetensors nor")


@pytest.mark.parametrize(
    "file", ["../x", "/etc/passwd", "..", ".", "", "a/b", 7, None, [], {}, "a\0b", "x" * 5000]
)
def test_index_points_elsewhere(shards, file):
    (shards.parent / "x").write_bytes(b"")
    edit(shards / INDEX, lambda index: index["weight_map"].update({MOVED: file}))
    refused(shards, "no file name inside|are missing")


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", '{"weight_map": []}', '{"weight_map": {}}', "{"]
)
def test_odd_index(shards, text):
    (shards / INDEX).write_text(text)
    refused(shards, "index.json")


def test_tensor_of_the_index_is_in_no_shard(shards):
    name = "model.layers.1.mlp.gate.bias"
    file = min(shards.glob("model-*")).name
    edit(shards / INDEX, lambda index: index["weight_map"].update({name: file}))
    refused(shards, f"{name} is in the index but in no shard")


def test_tensor_of_a_shard_is_not_in_the_index(shards):
    edit(shards / INDEX, lambda index: index["weight_map"].pop(MOVED))
    refused(shards, f"{MOVED} is in model-.* by index, in nowhere")


def test_tensor_is_in_another_shard(shards):
    def move(index):
        files = sorted(set(index["weight_map"].values()) - {index["weight_map"][MOVED]})
        index["weight_map"][MOVED] = files[0]

    edit(shards / INDEX, move)
    refused(shards, f"{MOVED} is in model-.* by index, in model-")


def test_header_rows_cover_the_file(saved):
    for file in saved["deepseek"].glob("*.safetensors"):
        rows = list(read_header(file))
        ends = [offset + nbytes for *_, offset, nbytes in rows]
        assert [offset for *_, offset, _ in rows][1:] == ends[:-1]
        assert ends[-1] == file.stat().st_size


# -- files that change while they are in use

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def used(checkpoints, tmp_path):
    """A checkpoint behind a link, and another of the same shapes beside it."""
    for name in ("one", "two"):
        shutil.copytree(checkpoints["qwen3"], tmp_path / name)
    other = read_inventory(tmp_path / "two").tensors[Q_PROJ]
    change_last_byte(tmp_path / "two", other)
    (tmp_path / "link").symlink_to("one")
    time.sleep(0.03)  # the clock of a file system ticks every few milliseconds
    return tmp_path / "link"


def in_place(path):
    file, stat = path / "model.safetensors", (path / "model.safetensors").stat()
    with open(file, "r+b") as handle:
        handle.seek(-1, 2)
        byte = handle.read(1)[0]
        handle.seek(-1, 2)
        handle.write(bytes([byte ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def renamed(path):
    os.replace(path.parent / "two/model.safetensors", path / "model.safetensors")


def there_and_back(path):
    file = path / "model.safetensors"
    aside = path.parent / "aside"
    file.rename(aside)
    os.replace(path.parent / "two/model.safetensors", file)
    os.replace(aside, file)


def relinked(path):
    path.unlink()
    path.symlink_to("two")


def removed(path):
    (path / "model.safetensors").unlink()


def touched(path):
    os.utime(path / "model.safetensors")


def other_config(path):
    edit(path / "config.json", lambda data: data.update(rope_theta=12345.0))


CHANGES = [in_place, renamed, there_and_back, relinked, removed, touched]


@pytest.mark.parametrize("change", [*CHANGES, other_config])
def test_a_change_after_the_headers_were_read_is_refused(used, change):
    inventory = read_inventory(used)
    inventory.check_unchanged()
    change(used)
    with pytest.raises(CheckpointError, match="changed or replaced since it was opened") as caught:
        inventory.check_unchanged()
    assert "\n" not in str(caught.value)
    named = "config.json" if change in (other_config, relinked) else "model.safetensors"
    assert str(caught.value).startswith(f"{used / named}: ")
    if change not in (other_config, removed):
        for read in (inventory.tensor_digest, lambda name: read_tensor(inventory, name)):
            with pytest.raises(CheckpointError, match="changed or replaced"):
                read(Q_PROJ)
    if change is not removed:
        again = read_inventory(used)
        again.check_unchanged()
        np.testing.assert_array_equal(read_tensor(again, Q_PROJ), by_package(used)[Q_PROJ])


def by_package(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).float().numpy() for name in (Q_PROJ,)}


@pytest.mark.parametrize("change", [in_place, touched])
def test_a_change_while_weights_are_read_is_refused(used, monkeypatch, change):
    inventory, plain = read_inventory(used), np.fromfile

    def read(*args, **options):
        found = plain(*args, **options)
        change(used)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(np, "fromfile", read)
        with pytest.raises(CheckpointError, match="changed or replaced"):
            read_tensor(inventory, Q_PROJ)
    with pytest.raises(CheckpointError, match="changed or replaced"):
        read_tensor(inventory, Q_PROJ)


def test_a_replacement_that_is_gone_again_was_not_read(used, monkeypatch):
    """Of a folder that was linked to another for the time of one read, nobody learns by names."""
    inventory = read_inventory(used)

    def opening(*args):
        relinked(used)
        handle = open(*args)  # noqa: SIM115 - for whoever asked
        used.unlink()
        used.symlink_to("one")
        return handle

    with monkeypatch.context() as patch:
        patch.setattr("allocator.checkpoint.inventory.open", opening, raising=False)
        with pytest.raises(CheckpointError, match="changed or replaced"):
            read_tensor(inventory, Q_PROJ)
    inventory.check_unchanged()
    np.testing.assert_array_equal(read_tensor(inventory, Q_PROJ), by_package(used)[Q_PROJ])
