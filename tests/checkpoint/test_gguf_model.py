"""A GGUF file as a checkpoint: held against safetensors of equal weights, and gguf-py's reader."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from allocator import api, load
from allocator.checkpoint.outline import planned_inventory
from allocator.checkpoint.padding import padded
from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_rows, read_tensor
from allocator.checkpoint.tokenizer import read_tokenizer
from allocator.cli import main
from allocator.codecs import codec_of
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.errors import CalibrationError, CheckpointError
from allocator.evaluation.held_out import _Tasks
from allocator.evaluation.lm_eval_tasks import OWN
from allocator.export.checkpoint import materialize
from allocator.export.gguf.files import read_gguf, write_gguf
from allocator.export.safetensors.directory import write_config
from allocator.export.tensors import EncodedTensors
from allocator.families import Role, family_of, registry
from allocator.families.gguf_source import family_of_gguf
from allocator.formats import format_named
from allocator.scoring.candidates import Candidate, Weights
from allocator.scoring.documents import Document, read_windows
from allocator.scoring.streamed_model import States, StreamedModel
from allocator.targets import GGUF, SAFETENSORS, TARGETS
from allocator.targets.gguf.metadata import hyperparameters
from allocator.targets.group_weights import group_digest, group_weights
from allocator.testing.family_runs import random_checkpoint

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": False,
    "sliding_window": None, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LFM2 = {
    "model_type": "lfm2_moe", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "num_experts": 8,
    "num_experts_per_tok": 2, "num_dense_layers": 1, "moe_intermediate_size": 32,
    "conv_L_cache": 3, "norm_eps": 1e-5, "max_position_embeddings": 128,
}  # fmt: skip


QWEN3_5 = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 64, "hidden_size": 32, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "linear_conv_kernel_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
}  # fmt: skip


class Plain:
    """Every group in one format, without importance."""

    def __init__(self, layout, fmt):
        self.layout, self.format = layout, format_named(fmt)

    def encoded(self, name):
        weights = group_weights(self.layout, self.layout.groups[name])
        return codec_of(self.format).encode(weights, self.format)

    def full_precision(self, tensor):
        return read_tensor(self.layout.inventory, tensor.source)


def everything(layout, formats):
    return Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, tuple(range(layout.inventory.n_experts))),
        formats=dict.fromkeys(layout.groups, formats) if isinstance(formats, str) else formats,
        experts_used=layout.inventory.experts_used,
    )


@pytest.fixture(scope="module")
def sources(checkpoints, make_checkpoint, tmp_path_factory):
    """Checkpoints by family, in bfloat16."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "mixtral").mkdir()
    return {
        "mixtral": random_checkpoint(MIXTRAL, folder / "mixtral").path,
        "deepseek": make_checkpoint(folder / "deepseek", "deepseek", dtype="bfloat16"),
    }


@pytest.fixture(scope="module")
def file_of(sources, tmp_path_factory):
    """`file_of(kind, fmt)`: the checkpoint in a GGUF of ours."""
    made = {}

    def write(kind, fmt):
        if (kind, fmt) not in made:
            layout = GGUF.layout(read_inventory(sources[kind]))
            path = tmp_path_factory.mktemp(f"{kind}-{fmt}") / "model.gguf"
            write_gguf(path, layout, everything(layout, fmt), Plain(layout, fmt))
            made[kind, fmt] = path
        return made[kind, fmt]

    return write


def rewritten(source, path, *, pairs=None, tensors=None, **split):
    """A file with other pairs (None for none) and tensors, by gguf-py alone."""
    reader = GGUFReader(source)
    fields = {
        key: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    writer = GGUFWriter(path, fields.pop("general.architecture")[0], **split)
    for key, value in (pairs or {}).items():
        kind = gguf.GGUFValueType.get_type(value) if value is not None else None
        old = fields.pop(key, (None, kind, None))
        if value is not None:
            fields[key] = (value, old[1], old[2])
    for key, (value, kind, element) in fields.items():
        writer.add_key_value(key, value, kind, sub_type=element)
    for tensor in reader.tensors:
        name, kind = tensor.name, tensor.tensor_type
        name, kind = (tensors or {}).get(name, (name, kind))
        shape = tuple(tensor.shape.tolist())[::-1]
        data = tensor.data
        if kind is not tensor.tensor_type:
            data = gguf.quants.quantize(data.view(np.float32).reshape(shape), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- equal weights


@pytest.mark.parametrize("kind", ["deepseek", "mixtral"])
def test_the_same_decision_gives_the_same_file(sources, file_of, tmp_path, kind):
    """One allocation and one set of importance vectors, from safetensors and from a GGUF."""
    inventories = [read_inventory(path) for path in (sources[kind], file_of(kind, "BF16"))]
    layouts = [GGUF.layout(inventory) for inventory in inventories]
    rng = np.random.default_rng(0)
    formats, importance = {}, {}
    for name, group in layouts[0].groups.items():
        assert group_digest(layouts[1], layouts[1].groups[name]) == group_digest(layouts[0], group)
        offered = [f.name for f in group.offered()]
        assert offered == [f.name for f in layouts[1].groups[name].offered()]
        quick = [f for f in offered if not re.match("IQ[123]|BF16", f)]  # without large tables
        formats[name] = str(rng.choice(quick))
        if group.importance:
            shape = (*group.shape[:-2], group.shape[-1])
            importance[name] = rng.uniform(0.5, 2, shape).astype(np.float32)
    written = []
    for name, layout in zip(("one", "other"), layouts, strict=True):
        encodings = Encodings(tmp_path / name, layout, importance)
        tensors = EncodedTensors(encodings, everything(layout, formats))
        write_gguf(tmp_path / f"{name}.gguf", layout, tensors.allocation, tensors)
        written.append((tmp_path / f"{name}.gguf").read_bytes())
    assert written[0] == written[1]


def test_a_streamed_model_reads_single_experts(sources, file_of):
    """Logits, layer by layer, of a file in place of the checkpoint; experts from the stack."""
    documents = [[Document(tuple(range(20)), "")]]
    found = []
    for path in (sources["mixtral"], file_of("mixtral", "BF16")):
        layout = GGUF.layout(read_inventory(path))
        candidate = Candidate.original(layout)
        model = StreamedModel(layout, Weights(layout, lambda: pytest.fail("nothing is encoded")))
        states = [States(candidate, [0], model.embed(documents, candidate))]
        for layer in range(layout.inventory.n_layers):
            model.run(layer, states)
        found.append(model.logits(states[0].hidden[0][0], candidate))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["deepseek", "mixtral"])
def test_q8_0_is_decoded_as_gguf_py_decodes(file_of, kind):
    path = file_of(kind, "Q8_0")
    stored = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors
    }
    inventory = read_inventory(path)
    experts = inventory.of_role("experts.up", 1)
    assert {t.dtype for t in experts} == {"Q8_0"}
    for tensor, values in zip(experts, stored["blk.1.ffn_up_exps.weight"], strict=True):
        np.testing.assert_array_equal(read_tensor(inventory, tensor.name), values)
        np.testing.assert_array_equal(read_rows(inventory, tensor.name, 3, 9), values[3:9])
    if kind == "mixtral":  # neighbours of a head are rotated there, halves in transformers
        pairs = stored["blk.1.attn_q.weight"].reshape(4, 16, 2, 64).swapaxes(1, 2)
        name, values = "self_attn.q_proj.weight", pairs.reshape(128, 64)
    else:
        k_b, v_b = (stored[f"blk.1.attn_{half}_b.weight"] for half in "kv")
        heads = [np.concatenate([k.T, v]) for k, v in zip(k_b, v_b, strict=True)]
        name, values = "self_attn.kv_b_proj.weight", np.concatenate(heads)
    name = f"model.layers.1.{name}"
    np.testing.assert_array_equal(read_tensor(inventory, name), values)
    np.testing.assert_array_equal(read_rows(inventory, name, 5, 40), values[5:40])
    layout = GGUF.layout(inventory)
    assert layout.groups["layers.1.experts.up"].offered()[0].name == "Q8_0"
    digests = {inventory.tensor_digest(t.name) for t in experts}
    assert len(digests) == len(experts)


@pytest.mark.parametrize("kind", ["full_attention", "conv"])
def test_layers_of_one_kind_are_read_back(kind):
    """A list of equal values may be one value in a file's pairs."""
    planned = planned_inventory(LFM2 | {"layer_types": [kind] * 3})
    layout = GGUF.layout(planned)
    pairs = {f.key: f.value for f in hyperparameters(planned, n_experts=8, experts_used=2)}
    pairs["general.architecture"] = "lfm2moe"
    shapes = {g.stored_as: g.shape for g in layout.groups.values()}
    shapes |= {k.stored_as: k.shape for k in layout.full_precision}
    family, facts = family_of_gguf(pairs, shapes, "model.gguf")
    assert family.model_type == "lfm2_moe"
    assert facts.config["layer_types"] == [kind] * 3


def test_padded_experts_are_those_of_the_checkpoint(sources, file_of):
    """96 neurons, in rows of a stacked tensor, as 128."""
    plain, ours = (
        GGUF.layout(padded(read_inventory(path), 128))
        for path in (sources["mixtral"], file_of("mixtral", "BF16"))
    )
    for name, group in plain.groups.items():
        assert group_digest(ours, ours.groups[name]) == group_digest(plain, group)
    low = read_inventory(file_of("mixtral", "Q8_0"))
    wide = padded(low, 128)
    for role, added in ((Role.EXPERT_UP, ((0, 32), (0, 0))), (Role.EXPERT_DOWN, ((0, 0), (0, 32)))):
        name = low.of_role(role, 1)[7].name
        wanted = np.pad(read_tensor(low, name), added)
        np.testing.assert_array_equal(read_tensor(wide, name), wanted)
        np.testing.assert_array_equal(read_rows(wide, name, 60, 64), wanted[60:64])


@pytest.mark.parametrize("fmt", ["F16", "F32"])
def test_floats_are_read_exactly(file_of, fmt):
    stored = {t.name: t.data for t in GGUFReader(file_of("mixtral", fmt)).tensors}
    inventory = read_inventory(file_of("mixtral", fmt))
    for name, own in (("blk.0.attn_v", "self_attn.v_proj"), ("blk.0.ffn_gate_inp", "mlp.gate")):
        values = read_tensor(inventory, f"model.layers.0.{own}.weight")
        np.testing.assert_array_equal(values, stored[f"{name}.weight"].astype(np.float32))
    (down,) = [t for t in inventory.of_role("experts.down", 1) if t.expert == 5]
    assert down.dtype == fmt
    wanted = stored["blk.1.ffn_down_exps.weight"][5].astype(np.float32)
    np.testing.assert_array_equal(read_tensor(inventory, down.name), wanted)


def test_q8_0_is_written_again_as_it_is(file_of, tmp_path):
    path = file_of("deepseek", "Q8_0")
    layout = GGUF.layout(read_inventory(path))
    write_gguf(tmp_path / "again.gguf", layout, everything(layout, "Q8_0"), Plain(layout, "Q8_0"))
    for name, (fmt, _, data) in read_gguf(path).items():
        again = read_gguf(tmp_path / "again.gguf")[name]
        assert again[0] == fmt
        np.testing.assert_array_equal(again[2], data)


@pytest.mark.parametrize(("head", "whole"), [(16, False), (32, True)])
def test_blocks_of_other_columns_are_no_exact_q8_0(tmp_path, monkeypatch, head, whole):
    """llama.cpp has heads of `linear.out` in another order: whole blocks of 32 where heads are."""
    (tmp_path / "model").mkdir()
    config = QWEN3_5 | {"linear_key_head_dim": head, "linear_value_head_dim": head}
    layout = GGUF.layout(read_inventory(random_checkpoint(config, tmp_path / "model").path))
    path = tmp_path / "model.gguf"
    write_gguf(path, layout, everything(layout, "Q8_0"), Plain(layout, "Q8_0"))
    inventory = read_inventory(path)
    for target in (GGUF, SAFETENSORS):
        layout = target.layout(inventory)
        for name in ("layers.0.linear.out", "layers.1.attention.o"):
            weights = group_weights(layout, layout.groups[name])
            fmt = format_named("Q8_0")
            again = codec_of(fmt).decode(codec_of(fmt).encode(weights, fmt), fmt)
            exact = target is GGUF or whole or "linear" not in name
            assert np.array_equal(again, weights) == exact
            assert layout.groups[name].offered()[0].name == ("Q8_0" if exact else "BF16")
    name = layout.groups["layers.0.linear.out"].sources[0]
    own = inventory.tensor_digest(name)
    family = family_of(config)
    other = replace(family, gguf=replace(family.gguf, column_orders={}))
    known = {**registry._FAMILIES, "qwen3_5_moe_text": other}
    del known["qwen3_5_moe"]  # of a copy: the order of the table stays
    monkeypatch.setattr(registry, "_FAMILIES", known)
    unordered = read_inventory(path)
    assert not np.array_equal(read_tensor(unordered, name), read_tensor(inventory, name))
    assert unordered.tensor_digest(name) != own


def test_the_order_of_rows_is_a_part_of_a_digest(file_of, tmp_path):
    """The same bytes in heads of another width are another matrix."""
    pairs = {"attention.head_count": 2, "attention.head_count_kv": 1}
    pairs |= dict.fromkeys(("attention.key_length", "attention.value_length"), 64)
    pairs |= {"rope.dimension_count": 64}
    path = file_of("mixtral", "Q8_0")
    wide = rewritten(
        path, tmp_path / "wide.gguf", pairs={f"llama.{key}": value for key, value in pairs.items()}
    )
    one, other = (
        {r: inventory.tensor_digest(inventory.of_role(r, 1)[0].name) for r in (Role.Q, Role.V)}
        for inventory in map(read_inventory, (path, wide))
    )
    assert one[Role.V] == other[Role.V]
    assert one[Role.Q] != other[Role.Q]


# -- the tokenizer, and what else is carried over


REFERENCE = Path(__file__).parents[2] / "studies/reference/model"


@pytest.fixture(scope="module")
def with_tokenizer(make_checkpoint, tmp_path_factory):
    """A GGUF of a small model with the reference model's tokenizer and sampling."""
    folder = tmp_path_factory.mktemp("reference")
    make_checkpoint(folder, "qwen3", dtype="bfloat16", vocab_size=8192)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(REFERENCE / name, folder)
    layout = GGUF.layout(read_inventory(folder))
    write_gguf(folder / "model.gguf", layout, everything(layout, "BF16"), Plain(layout, "BF16"))
    return folder / "model.gguf"


def test_pairs_are_carried_over(with_tokenizer, tmp_path):
    """What a file says besides the model is said again, type by type, whatever it is."""
    template = "{{ messages }}"
    others = {
        "general.sampling.temp": 0.25,
        "general.name": "A Name",
        "general.license": "mit",
        "tokenizer.chat_template": template,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.precompiled_charsmap": [1, 2, 255],
    }
    path = rewritten(with_tokenizer, tmp_path / "source.gguf", pairs=others)
    layout = GGUF.layout(read_inventory(path))
    allocation = everything(layout, "BF16")
    write_gguf(tmp_path / "again.gguf", layout, allocation, Plain(layout, "BF16"))
    assert (tmp_path / "again.gguf").stat().st_size == allocation.nbytes(layout).file
    source, again = (GGUFReader(tmp_path / f"{name}.gguf") for name in ("source", "again"))

    def pairs(reader):
        return {
            key: (field.types, field.contents())
            for key, field in reader.fields.items()
            if key.startswith(("tokenizer.", "general.name", "general.sampling."))
        }

    assert pairs(again) == pairs(source)
    assert {*others} - {"general.license"} <= pairs(again).keys()
    assert "general.license" not in again.fields


def test_our_own_file_is_written_again_byte_for_byte(with_tokenizer, tmp_path):
    layout = GGUF.layout(read_inventory(with_tokenizer))
    write_gguf(tmp_path / "a.gguf", layout, everything(layout, "BF16"), Plain(layout, "BF16"))
    assert (tmp_path / "a.gguf").read_bytes() == with_tokenizer.read_bytes()


def test_calibration_text_is_cut_as_by_the_checkpoints_own(with_tokenizer, tmp_path):
    text = (REFERENCE / "README.md").read_text()
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    own, taken = (
        read_windows(tmp_path / "text.jsonl", read_tokenizer(read_inventory(path)), window=64)
        for path in (REFERENCE, with_tokenizer)
    )
    assert own == taken
    assert len(own) > 3


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_without_tokenizer_is_refused_where_text_is_read(file_of, target):
    inventory = read_inventory(file_of("mixtral", "BF16"))
    assert read_tokenizer(inventory) is None
    if target == "gguf":
        with pytest.raises(CheckpointError, match="nor any other tokenizer"):
            TARGETS[target].check_tokenizer(inventory)
    TARGETS[target].check_tokenizer(replace(inventory, without_tokenizer=True))


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        ({"tokenizer.ggml.pre": "superbpe"}, "pre is 'superbpe', needed one of bailingmoe2, "),
        ({"tokenizer.ggml.model": "t5"}, "model is 't5', needed gpt2 or llama"),
        ({"tokenizer.ggml.merges": ()}, "no merges, needed merges of tokens"),
        ({"tokenizer.ggml.bos_token_id": 99999}, "bos_token_id is 99999 of 8192 tokens"),
        ({"tokenizer.ggml.tokens": ("a", "a")}, r"2 tokens \(1 of them different\) of 8192"),
    ],
)
def test_tokenizers_that_are_not_known_are_refused_for_text(with_tokenizer, pairs, match):
    """Documents of ids need none, and a file gets the pairs as they are."""
    inventory = read_inventory(with_tokenizer)
    changed = dict(inventory.gguf.pairs)
    for key, value in pairs.items():
        changed[key] = replace(changed[key], value=value)
    inventory = replace(inventory, gguf=replace(inventory.gguf, pairs=changed))
    with pytest.raises(CheckpointError, match=match) as caught:
        read_tokenizer(inventory)
    assert "\n" not in str(caught.value)
    if "tokens" not in next(iter(pairs)):
        GGUF.check_tokenizer(inventory)
        return
    with pytest.raises(CheckpointError, match="2 tokens, but the embedding has 8192 rows"):
        GGUF.check_tokenizer(inventory)


def test_a_safetensors_directory_can_be_made_of_a_file(file_of, sources, tmp_path):
    """config.json from the pairs: transformers builds the model of the original from it."""
    layout = SAFETENSORS.layout(read_inventory(file_of("mixtral", "BF16")))
    allocation = replace(everything(layout, "BF16"), target="safetensors")
    encodings = Encodings(tmp_path / "cache", layout, {})
    folder = tmp_path / "written"
    materialize(
        EncodedTensors(encodings, allocation), folder, container="safetensors", importance=""
    )
    ids = torch.arange(30)[None]
    original = AutoModelForCausalLM.from_pretrained(sources["mixtral"], dtype=torch.float32)
    with torch.no_grad():
        own, wanted = load(folder)(ids).logits, original(ids).logits
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)


def test_tokenizer_files_are_written_beside_safetensors(with_tokenizer, tmp_path):
    layout = SAFETENSORS.layout(read_inventory(with_tokenizer))
    write_config(tmp_path, layout, replace(everything(layout, "BF16"), target="safetensors"))
    made, own = (AutoTokenizer.from_pretrained(path) for path in (tmp_path, REFERENCE))
    text = (REFERENCE / "README.md").read_text()
    assert made(text).input_ids == own(text).input_ids
    assert (made.bos_token, made.eos_token) == (own.bos_token, own.eos_token)


def test_lm_eval_gets_a_tokenizer_made_of_the_vocabulary(with_tokenizer, file_of, tmp_path):
    """Tasks of a GGUF are those of the directory whose tokenizer it has."""
    documents = [Document(tuple(range(10 + i, 110 + i)), "text") for i in range(4)]
    written = []
    for name, path in (("gguf", with_tokenizer), ("directory", with_tokenizer.parent)):
        study = SimpleNamespace(inventory=read_inventory(path), cache=tmp_path / name)
        _Tasks(study, documents, OWN, limit=None)
        files = sorted((tmp_path / name / "lm-eval").glob("*.jsonl"))
        written.append([file.read_bytes() for file in files])
    assert len(written[0]) == 2
    assert written[0] == written[1]
    study = SimpleNamespace(inventory=read_inventory(file_of("mixtral", "BF16")), cache=tmp_path)
    with pytest.raises(CalibrationError, match="no tokenizer, which --tasks needs"):
        _Tasks(study, documents, OWN, limit=None)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fmt"), [("mixtral", "BF16"), ("deepseek", "Q8_0")])
@pytest.mark.parametrize("streamed", [False, True])
def test_from_a_search_to_files_of_both_kinds(file_of, tmp_path, write_study, kind, fmt, streamed):
    study = write_study(tmp_path / "study", file_of(kind, fmt))
    if streamed:
        with open(study / "study.toml", "a") as file:
            file.write("\n[streamed]\ncandidates = 2\n")
    options = {"cache": tmp_path / "cache", "threads": 1}
    api.search(study, trials=4, **options)
    pick = study / "allocations/pick.json"
    for container in ("gguf", "safetensors"):
        folder = tmp_path / container
        api.materialize(study, pick, folder, container=container, **options)
        tolerance = 0.2 if container == "gguf" else None  # rounding turns choices of experts
        api.verify(study, folder, tolerance=tolerance, **options)


# -- parts and places


def test_parts_are_one_model(file_of, tmp_path):
    whole = read_inventory(file_of("mixtral", "BF16"))
    rewritten(whole.path, tmp_path / "model.gguf", split_max_tensors=9)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    for path in (tmp_path, parts[0], parts[1]):  # the directory, the first, any
        inventory = read_inventory(path)
        assert inventory.digest == whole.digest
        assert inventory.path == parts[0]
        assert len(inventory.files) == len(parts)
    inventory = read_inventory(tmp_path, digests=tmp_path / "digests")
    assert inventory.digest == whole.digest
    parts[1].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"1 of . parts are missing, e.g. model-00002"):
        read_inventory(parts[0])
    with pytest.raises(CheckpointError, match=r"part 2 of . as it says, 1 of 1 by name"):
        read_inventory(tmp_path / "other.gguf")


def test_layers_of_multi_token_prediction_are_left_out(file_of, tmp_path):
    """A layer after the others, as the converter writes one; its tensors may be low-bit."""
    whole = read_inventory(file_of("mixtral", "F32"))
    names = {
        f"blk.1.{kind}.weight": (f"blk.1.{kind}.weight", gguf.GGMLQuantizationType.Q4_0)
        for kind in ("attn_k", "attn_v", "attn_q")
    }
    pairs = {"llama.nextn_predict_layers": 1}
    path = rewritten(whole.path, tmp_path / "model.gguf", pairs=pairs, tensors=names)
    inventory = read_inventory(path)
    assert inventory.n_layers == 1
    assert {t.layer for t in inventory.tensors.values()} == {0, None}
    assert any("left out" in note for note in inventory.notes)


def test_the_command_line_takes_a_file(file_of, capsys):
    path = file_of("deepseek", "BF16")
    for target in ("gguf", "safetensors"):
        assert main(["inspect", str(path), "--target", target]) in (0, None)
        assert "a GGUF model, read as deepseek_v3" in capsys.readouterr().out
    assert main(["plan", str(path)]) in (0, None)
    assert main(["plan", str(path.parent)]) in (0, None)


# -- refusals: one line with a way out


def refused(path, match):
    with pytest.raises(CheckpointError) as caught:
        read_inventory(path)
    assert "\n" not in str(caught.value)
    assert re.search(match, str(caught.value)), caught.value
    assert str(path) in str(caught.value)


Q4 = gguf.GGMLQuantizationType.Q4_0
BAD = {  # changed pairs and tensors: what is said
    "a missing pair": (
        {"deepseek2.attention.key_length_mla": None}, {}, "no deepseek2.attention.key_length_mla",
    ),
    "a missing router": (  # llama.cpp takes softmax
        {"deepseek2.expert_gating_func": None}, {},
        "expert_gating_func is missing, which llama.cpp takes for 1, but 2 in a deepseek_v3",
    ),
    "a missing size": (
        {"deepseek2.attention.layer_norm_rms_epsilon": None}, {}, "no deepseek2.attention.layer_n",
    ),
    "another router": (
        {"deepseek2.expert_gating_func": 3}, {}, "deepseek2.expert_gating_func is 3, but 2",
    ),
    "another size": (
        {"deepseek2.attention.key_length": 300}, {}, "key_length is 300, but 272",
    ),
    "an unknown pair": (
        {"deepseek2.logit_scale": 2.0}, {}, "deepseek2.logit_scale is 2.0, with which deepseek_v3",
    ),
    "no experts": ({"deepseek2.expert_count": None}, {}, "without deepseek2.expert_count"),
    "no layers": ({"deepseek2.block_count": 0}, {}, "block_count is 0, needed one number"),
    "more layers than any model has": (
        {"deepseek2.block_count": 4_000_000_000}, {}, "block_count is 4000000000, needed one",
    ),
    "a value of another kind": (
        {
            "deepseek2.rope.scaling.type": "yarn", "deepseek2.rope.scaling.factor": 2.0,
            "deepseek2.rope.scaling.yarn_log_multiplier": "ten",
        },
        {}, "its pairs make no sense",
    ),
    "another kind of rotation": (
        {"deepseek2.rope.scaling.type": "linear", "deepseek2.rope.scaling.factor": 2.0}, {},
        "'linear'",
    ),
    "low-bit": (
        {}, {"blk.1.ffn_up_exps.weight": ("blk.1.ffn_up_exps.weight", Q4)},
        "blk.1.ffn_up_exps.weight is stored in Q4_0, low-bit already; needed a file in BF16",
    ),
    "an unknown tensor": (
        {}, {"blk.1.attn_norm.weight": ("blk.1.attn_gate.weight", gguf.GGMLQuantizationType.F32)},
        "blk.N.attn_gate.weight is no tensor of deepseek_v3",
    ),
    "half of a tensor": (
        {}, {"blk.1.attn_k_b.weight": ("blk.7.attn_k_b.weight", gguf.GGMLQuantizationType.F32)},
        "blk.1.attn_k_b.weight is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_the_cause_is_named(file_of, tmp_path, bad):
    pairs, tensors, match = BAD[bad]
    whole = file_of("deepseek", "F32")
    refused(rewritten(whole, tmp_path / "bad.gguf", pairs=pairs, tensors=tensors), match)


def test_a_dense_llama_is_refused(file_of, tmp_path):
    pairs = {"llama.expert_count": 0}
    path = rewritten(file_of("mixtral", "BF16"), tmp_path / "bad.gguf", pairs=pairs)
    refused(path, "llama without llama.expert_count; needed a Mixture-of-Experts model")


def test_a_family_that_cannot_be_taken_back_is_refused(file_of, monkeypatch):
    """The table says so, and not the name."""
    family = family_of({"model_type": "mixtral"})
    other = replace(family, gguf=replace(family.gguf, source=None))
    monkeypatch.setitem(registry._FAMILIES, "mixtral", other)
    refused(file_of("mixtral", "BF16"), "a GGUF file of mixtral is not read as a checkpoint yet")


@pytest.mark.parametrize(
    ("n", "said"),
    [(3, ""), (20, ""), (700, ""), (5000, ""), (-1, "ends at byte"), (-100, "ends at byte")],
)
def test_truncated_files_are_refused(file_of, tmp_path, n, said):
    (tmp_path / "cut.gguf").write_bytes(file_of("deepseek", "BF16").read_bytes()[:n])
    refused(tmp_path / "cut.gguf", f"{said}.*fetch it again")


def test_a_file_that_changes_is_refused(file_of, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(file_of("mixtral", "BF16").read_bytes())
    inventory = read_inventory(path)
    path.write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="changed or replaced"):
        inventory.check_unchanged()
    with pytest.raises(CheckpointError, match="changed or replaced"):
        read_tensor(inventory, "model.layers.0.self_attn.q_proj.weight")
