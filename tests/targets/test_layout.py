"""Layouts of both targets against the checkpoint they lay out, and safetensors' own reader."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from allocator.checkpoint.reading import read_inventory
from allocator.errors import CheckpointError, TargetError
from allocator.families import Role
from allocator.formats import FORMATS
from allocator.targets import GGUF, SAFETENSORS, TARGETS, target_named
from allocator.targets.safetensors import entries, header


@pytest.fixture(scope="module")
def inventories(saved, reference, tiny):
    return {n: read_inventory(p) for n, p in saved.items()} | {"reference": reference, "tiny": tiny}


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("kind", ["qwen", "deepseek", "reference", "tiny"])
class TestEveryLayout:
    def test_every_tensor_is_somewhere_once(self, inventories, kind, target):
        layout = target.layout(inventories[kind])
        found = Counter(name for g in layout.groups.values() for name in set(g.sources))
        halves = [g for g in layout.groups.values() if g.role in (Role.K_B, Role.V_B)]
        found.subtract(name for g in halves if g.role is Role.V_B for name in g.sources)
        found.update(k.source for k in layout.full_precision)
        assert found == Counter(inventories[kind].tensors.keys())

    def test_weights_agree(self, inventories, kind, target):
        inventory = inventories[kind]
        layout = target.layout(inventory)
        n_groups = sum(math.prod(g.shape) for g in layout.groups.values())
        n_kept = sum(math.prod(k.shape) for k in layout.full_precision)
        assert n_groups == inventory.n_searched_weights
        assert n_groups + n_kept == sum(math.prod(t.shape) for t in inventory.tensors.values())

    def test_groups_hold_what_their_sources_hold(self, inventories, kind, target):
        tensors = inventories[kind].tensors
        for group in target.layout(inventories[kind]).groups.values():
            n = sum(math.prod(tensors[s].shape) for s in group.sources)
            if group.role not in (Role.K_B, Role.V_B):
                assert math.prod(group.shape) == n
                assert {tensors[s].layer for s in group.sources} == {group.layer}
            if group.role.is_expert:
                assert [tensors[s].expert for s in group.sources] == list(range(group.shape[0]))

    def test_names_are_distinct(self, inventories, kind, target):
        layout = target.layout(inventories[kind])
        stored = [g.stored_as for g in layout.groups.values()]
        stored += [k.stored_as for k in layout.full_precision]
        assert len(set(stored)) == len(stored)
        assert [g.name for g in layout.groups.values()] == list(layout.groups)

    def test_only_an_untied_embedding_has_no_importance(self, inventories, kind, target):
        layout = target.layout(inventories[kind])
        without = [g.name for g in layout.groups.values() if not g.importance]
        assert without == ([] if kind == "reference" else ["embedding"])
        if without:
            assert not any(f.needs_importance for f in layout.groups["embedding"].offered())


def test_kv_b_is_split_for_gguf(inventories):
    inventory = inventories["reference"]
    groups = GGUF.layout(inventory).groups
    for layer in range(6):
        whole = inventory.of_role(Role.KV_B, layer)[0]
        k_b, v_b = groups[f"layers.{layer}.attention.k_b"], groups[f"layers.{layer}.attention.v_b"]
        assert (k_b.shape, v_b.shape) == ((4, 128, 64), (4, 64, 128))
        assert math.prod(k_b.shape) + math.prod(v_b.shape) == math.prod(whole.shape)
        assert k_b.sources == v_b.sources == (whole.name,)
    assert "layers.0.attention.kv_b" in SAFETENSORS.layout(inventory).groups


def test_kv_b_of_another_shape(inventories):
    inventory = inventories["reference"]
    for change in ({"v_head_dim": 32}, {"num_attention_heads": 8}, {"kv_lora_rank": 64}):
        odd = replace(inventory, config={**inventory.config, **change})
        with pytest.raises(CheckpointError, match=r"kv_b_proj.weight has shape \(512, 128\)"):
            GGUF.layout(odd)


def test_nextn_is_in_no_layout(tmp_path, make, tiny):
    extra = {
        "model.layers.2.eh_proj.weight": (64, 128),
        "model.layers.2.mlp.gate.weight": (4, 64),
        "model.layers.2.input_layernorm.weight": (64,),
    }
    folder = make.zeros(tmp_path, tensors=make.tensors() | extra, num_nextn_predict_layers=1)
    for target in TARGETS.values():
        layout, plain = target.layout(read_inventory(folder)), target.layout(tiny)
        assert layout.groups == plain.groups
        assert [k.source for k in layout.full_precision] == [k.source for k in plain.full_precision]


def test_order_is_outside_then_by_layer(inventories):
    names = list(SAFETENSORS.layout(inventories["tiny"]).groups)
    assert names[:2] == ["embedding", "head"]
    assert [n.split(".")[1] for n in names[2:]] == ["0"] * 7 + ["1"] * 7


def test_gguf_keeps_float32_and_safetensors_the_checkpoints(inventories):
    assert {k.dtype for k in GGUF.layout(inventories["deepseek"]).full_precision} == {"F32"}
    inventory = inventories["deepseek"]  # router biases in float32, the rest in bfloat16
    kept = SAFETENSORS.layout(inventory).full_precision
    assert {k.dtype for k in kept} == {"BF16", "F32"}
    assert all(k.dtype == inventory.tensors[k.source].dtype for k in kept)


def test_fewer_experts(layouts):
    for layout in layouts.values():
        group = layout.groups["layers.1.experts.down"]
        assert group.shape_with(7) == (7, 256, 256)
        assert layout.groups["embedding"].shape_with(7) == (8192, 256)
        router = next(k for k in layout.full_precision if k.role is Role.ROUTER)
        norm = next(k for k in layout.full_precision if k.role is Role.NORM)
        width = {"F32": 4, "BF16": 2, "F16": 2}
        assert router.nbytes(7) == 7 * 256 * width[router.dtype]
        assert norm.nbytes(7) == norm.shape[0] * width[norm.dtype]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALED = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("qwen", {"norm_topk_prob": False}, "qwen3moe with norm_topk_prob = True, .* False"),
        ("qwen", {"use_sliding_window": True}, "use_sliding_window = False, .* True"),
        ("qwen", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ("qwen", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ("qwen", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_type = 'llama3'"),
        ("qwen", {"rope_scaling": {**YARN, "truncate": False}}, "truncate = False"),
        ("qwen", {"rope_scaling": YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen", {"rope_scaling": {**YARN, "attention_factor": 1.0}}, r"by 1\.13863, .* means 1;"),
        ("qwen", {"rope_scaling": SCALED}, r"rotated .* by 1\.13863, attention_factor \(or mscale"),
        ("qwen", {"rope_parameters": {"full_attention": YARN}}, r"kind of layer \(full_attention"),
        ("qwen", {"hidden_act": "gelu"}, "silu"),
        ("reference", {"rope_interleave": 0}, "rotates interleaved pairs"),
        ("reference", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("reference", {"rope_scaling": YARN}, "equal mscale and mscale_all_dim"),
        ("reference", {"rope_scaling": {**SCALED, "attention_factor": 1.2}}, "means 1.2; use"),
        ("reference", {"q_lora_rank": None}, "26 or 27 layers, .* got 6 layers and 8,192 tokens"),
    ],
)
def test_what_llama_cpp_would_compute_wrongly_is_refused(inventories, kind, changes, match):
    odd = with_config(inventories[kind], changes)
    with pytest.raises(TargetError, match=match) as caught:
        GGUF.layout(odd)
    assert "\n" not in str(caught.value)
    assert "use target safetensors" in str(caught.value) or "scoring_func" in changes
    assert SAFETENSORS.layout(odd).groups


def with_config(inventory, changes):
    dropped = {"rope_parameters"} if "rope_scaling" in changes else set()
    kept = {k: v for k, v in inventory.config.items() if k not in dropped}
    return replace(inventory, config={**kept, **changes})


def yarn_notes(layout):
    return [note for note in layout.notes if "yarn" in note]


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("qwen", YARN),
        ("qwen", {**YARN, "attention_factor": 1 + 0.1 * math.log(4)}),
        ("qwen", {**YARN, "mscale": 0.7, "truncate": True}),  # mscale alone says nothing
        ("reference", SCALED),
        ("reference", {**SCALED, "attention_factor": 1.0}),
        ("reference", {**SCALED, "beta_fast": 32, "beta_slow": None}),
    ],
)
def test_yarn_that_llama_cpp_computes_is_laid_out(inventories, kind, rope):
    assert yarn_notes(GGUF.layout(with_config(inventories[kind], {"rope_scaling": rope}))) == []


def test_what_llama_cpp_must_be_told_is_noted(inventories):
    rope = {**SCALED, "beta_fast": 1.0, "beta_slow": 1}
    odd = with_config(inventories["reference"], {"rope_scaling": rope})
    (note,) = yarn_notes(GGUF.layout(odd))
    assert "must be told --yarn-beta-fast 1 --yarn-beta-slow 1: its loader of deepseek2" in note
    assert yarn_notes(SAFETENSORS.layout(odd)) == []  # transformers reads them


def test_layers_of_two_kinds_are_refused_for_gguf(tmp_path, make):
    tensors = {n: s for n, s in make.tensors().items() if ".layers.0.mlp." not in n}
    for name, shape in (("gate", (64, 64)), ("up", (64, 64)), ("down", (64, 64))):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] = shape
    inventory = read_inventory(make.zeros(tmp_path, tensors=tensors, mlp_only_layers=[0]))
    with pytest.raises(TargetError, match="needs experts in every layer of qwen3moe, some are"):
        GGUF.layout(inventory)
    assert SAFETENSORS.layout(inventory).layers == (1,)


def test_target_named():
    assert target_named("gguf") is GGUF
    with pytest.raises(TargetError, match="unknown target 'mlx'; known: gguf, safetensors"):
        target_named("mlx")


@pytest.mark.parametrize("kind", ["qwen", "deepseek", "reference"])
@pytest.mark.parametrize("pick", [0, -1])
def test_a_file_with_our_header_is_one_that_safetensors_reads(tmp_path, inventories, kind, pick):
    layout = SAFETENSORS.layout(inventories[kind])
    formats = {n: g.offered()[pick].name for n, g in layout.groups.items()}
    retained = {layer: tuple(range(8 - 4 * (i % 2))) for i, layer in enumerate(layout.layers)}
    rows = entries(layout, retained=retained, formats=formats)
    head = header(rows)
    kept = sum(k.nbytes(len(retained.get(k.layer, ()))) for k in layout.full_precision)
    encoded = sum(
        FORMATS[formats[n]].nbytes(g.shape_with(len(retained.get(g.layer, ()))))
        for n, g in layout.groups.items()
    )
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + encoded + kept)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(name for name, _, _ in rows)
        for name, dtype, shape in rows:
            part = file.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (dtype, shape)
    assert sum(t.nbytes for t in load_file(path).values()) == encoded + kept
    args = {"retained": retained, "formats": formats, "experts_used": 2}
    assert SAFETENSORS.header_bytes(layout, **args) == len(head)
    assert len(head) % 8 == 0
    assert json.loads(head[8:])["embedding"]["data_offsets"][0] == 0


def test_parts_are_tensors_of_their_own(tmp_path, layouts):
    """In a file that safetensors' own reader opens, with the names and sizes spelled out."""
    layout = layouts["safetensors"]
    retained = dict.fromkeys(layout.layers, (1, 4, 6, 9, 23))
    formats = dict.fromkeys(layout.groups, "Q8_0")
    formats["layers.2.experts.down"] = "IQ2_XXS:1,9+IQ1_S:4,6,23"
    rows = entries(layout, retained=retained, formats=formats)
    names = [name for name, _, _ in rows]
    at = names.index("layers.2.experts.down.IQ2_XXS")
    assert rows[at : at + 2] == [
        ("layers.2.experts.down.IQ2_XXS", "U8", (2, 256, 66)),  # 256 weights = 66 bytes
        ("layers.2.experts.down.IQ1_S", "U8", (3, 256, 50)),
    ]
    assert names[at - 1] == "layers.2.attention.q_b"
    assert names[at + 2] == "layers.2.experts.gate"
    head = header(rows)
    assert SAFETENSORS.header_bytes(
        layout, retained=retained, formats=formats, experts_used=2
    ) == len(head)
    widths = {"U8": 1, "BF16": 2, "F32": 4}
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(widths[d] * math.prod(shape) for _, d, shape in rows))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, dtype, shape in rows:
            part = file.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (dtype, shape)


@pytest.mark.parametrize("names", [("Q8_0", "Q6_K"), ("IQ2_XXS", "IQ1_S")])
@pytest.mark.parametrize("n_groups", [1, 7, 15])
def test_parts_overhead_is_a_close_bound(layouts, names, n_groups):
    """Of what the header grows by from that of the largest format, for any number of groups."""
    layout = layouts["safetensors"]
    experts = tuple(range(24))
    args = {"retained": dict.fromkeys(layout.layers, experts), "experts_used": 4}
    plain = dict.fromkeys(layout.groups, "Q8_0")
    before = SAFETENSORS.header_bytes(layout, formats=plain, **args)
    groups = [g for g in layout.groups if ".experts." in g][:n_groups]
    for n in (1, 12, 23):
        head, tail = (",".join(map(str, e)) for e in (experts[:n], experts[n:]))
        mixed = plain | dict.fromkeys(groups, f"{names[0]}:{head}+{names[1]}:{tail}")
        grown = SAFETENSORS.header_bytes(layout, formats=mixed, **args) - before
        bound = sum(SAFETENSORS.parts_overhead(layout.groups[g], names) for g in groups)
        assert 0 <= bound - grown <= 40 * n_groups


@pytest.mark.parametrize("nbytes", [0, 1, 31, 32, 33, 1000])
def test_padding(nbytes):
    assert SAFETENSORS.padded(nbytes) == nbytes
    assert GGUF.padded(nbytes) == math.ceil(nbytes / 32) * 32
