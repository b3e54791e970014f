"""Decisions: canonical, digestible, exact in bytes, and refused where they are none."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation import Allocation
from allocator.decision.budget import Budget
from allocator.decision.pricing import FileBytes
from allocator.errors import BudgetError, FormatError, SpaceError
from allocator.formats import FORMATS
from allocator.targets import GGUF, SAFETENSORS

COMMITTED = sorted((Path(__file__).parents[2] / "studies").glob("*/allocations/*.json"))


def some(layout, seed=0, **changes):
    """A random allocation of the layout."""
    rng = random.Random(seed)
    inventory = layout.inventory
    same = rng.randint(inventory.experts_used, inventory.n_experts)
    counts = [
        same
        if layout.target == "gguf"
        else rng.randint(inventory.experts_used, inventory.n_experts)
        for _ in layout.layers
    ]
    made = {
        "target": layout.target,
        "retained": {
            x: tuple(rng.sample(range(inventory.n_experts), n))
            for x, n in zip(layout.layers, counts, strict=True)
        },
        "formats": {n: rng.choice(g.offered()).name for n, g in layout.groups.items()},
        "experts_used": inventory.experts_used,
    }
    if layout.target == "safetensors" and not changes:
        for name in rng.sample([n for n in layout.groups if ".experts." in n], 2):
            made["formats"][name] = in_parts(layout.groups[name], made["retained"], rng)
    return Allocation.of(**made | changes)


def in_parts(group, retained, rng):
    """A group's experts dealt out at random over two of its formats."""
    experts = retained[group.layer]
    n = rng.randint(1, len(experts) - 1)
    names = [f.name for f in group.offered()]
    i, j = sorted(rng.sample(range(len(names)), 2))
    return f"{names[i]}:{listed(experts[:n])}+{names[j]}:{listed(experts[n:])}"


def listed(experts):
    return ",".join(map(str, sorted(experts)))


ALLOCATIONS = st.builds(
    Allocation.of,
    target=st.sampled_from(["gguf", "safetensors"]),
    retained=st.dictionaries(
        st.integers(0, 90), st.lists(st.integers(0, 300), unique=True, max_size=5).map(tuple)
    ),
    formats=st.dictionaries(
        st.text(), st.sampled_from([*sorted(FORMATS), "IQ2_XXS:0,3+IQ1_S:1", "Q8_0:2+IQ1_S:0,1,5"])
    ),
    experts_used=st.integers(1, 16),
    kv_format=st.sampled_from(["f16", "q8_0"]),
)


@given(ALLOCATIONS)
def test_json_round_trip(allocation):
    text = json.dumps(allocation.to_json())
    back = Allocation.from_json(json.loads(text))
    assert back == allocation
    assert back.digest == allocation.digest
    assert hash(back) == hash(allocation)


@given(ALLOCATIONS, st.randoms(use_true_random=False))
def test_order_does_not_matter(allocation, rng):
    def shuffled(mapping):
        rows = list(mapping.items())
        rng.shuffle(rows)
        return dict(rows)

    again = Allocation.of(
        target=allocation.target,
        retained={
            x: tuple(rng.sample(e, len(e))) for x, e in shuffled(dict(allocation.retained)).items()
        },
        formats=shuffled(allocation.format_of),
        experts_used=allocation.experts_used,
        kv_format=allocation.kv_format,
    )
    assert again == allocation
    assert again.digest == allocation.digest


def test_digest_is_stable():
    """Published files are named by it: sha256 of the JSON with sorted keys, spelled out here."""
    allocation = Allocation.of(
        target="gguf", retained={10: (3, 1), 2: (0, 5)}, formats={"b": "Q4_K"}, experts_used=2
    )
    text = (
        '{"experts_used": 2, "formats": {"b": "Q4_K"}, "kv_format": "f16", '
        '"retained": {"10": [1, 3], "2": [0, 5]}, "target": "gguf"}'
    )
    assert allocation.digest == hashlib.sha256(text.encode()).hexdigest()


@given(ALLOCATIONS)
def test_another_decision_has_another_digest(allocation):
    for change in (
        {"experts_used": 99},
        {"kv_format": "x"},
        {"target": "y"},
        {"retained": {1: [2]}},
    ):
        changed = Allocation.from_json(allocation.to_json() | change)
        assert (changed == allocation) == (changed.digest == allocation.digest)
        assert changed.digest != allocation.digest or change == {"retained": {1: [2]}}


@pytest.mark.parametrize(
    "change",
    [
        {"formats": None},
        {"retained": {"a": [1]}},
        {"retained": [1]},
        {"bits": 4},
        {"experts_used": "many"},
        {"formats": {"a": 4}},
        {"target": 1},
    ],
)
def test_other_json_is_refused(layouts, change):
    data = some(layouts["gguf"]).to_json()
    with pytest.raises(SpaceError, match=r"allocation: .*"):
        Allocation.from_json(data | change)
    for odd in (None, [], "x", {}):
        with pytest.raises(SpaceError, match="allocation: "):
            Allocation.from_json(odd)


# -- bytes


def by_hand(layout, allocation, alignment):
    """Bytes of every tensor, from gguf-py's sizes: (encoded, kept, padding)."""
    counts = {layer: len(e) for layer, e in allocation.retained}
    encoded, kept = [], []
    for name, text in allocation.formats:
        group = layout.groups[name]
        for piece in text.split("+"):
            fmt, _, experts = piece.partition(":")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[fmt]]
            shape = list(group.shape)
            if ".experts." in name:
                shape[0] = len(experts.split(",")) if experts else counts[group.layer]
            encoded.append(int(np.prod(shape)) // block * block_bytes)
    for k in layout.full_precision:
        shape = list(k.shape)
        if ".mlp.gate." in k.source:
            shape[0] = counts[k.layer]
        dtype = "F32" if layout.target == "gguf" else layout.inventory.tensors[k.source].dtype
        kept.append(int(np.prod(shape)) * (4 if dtype == "F32" else 2))
    padding = sum(-n % alignment for n in encoded + kept)
    return sum(encoded), sum(kept), padding


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [GGUF, SAFETENSORS], ids=["gguf", "safetensors"])
def test_bytes(layouts, target, seed):
    layout = layouts[target.name]
    allocation = some(layout, seed)
    allocation.check(layout)
    assert any("+" in f for _, f in allocation.formats) == target.mixes_experts
    size = allocation.nbytes(layout)
    encoded, kept, padding = by_hand(layout, allocation, target.alignment)
    header = target.header_bytes(
        layout,
        retained=allocation.retained_experts,
        formats=allocation.format_of,
        experts_used=allocation.experts_used,
    )
    assert (size.encoded, size.full_precision, size.overhead) == (encoded, kept, header + padding)
    assert size.file == encoded + kept + padding + header
    assert size.tensors == encoded + kept
    assert sum(allocation.stored(layout).group(n) for n in layout.groups) == encoded


def test_bytes_of_gguf_groups_in_a_safetensors_container(layouts):
    """Groups as llama.cpp has them; kept tensors and header as safetensors has them."""
    layout = layouts["gguf"]
    allocation = some(layout)
    inside, own = allocation.nbytes(layout, SAFETENSORS), allocation.nbytes(layout)
    assert inside.encoded == own.encoded
    tensors = layout.inventory.tensors
    assert inside.full_precision == sum(
        tensors[k.source].nbytes // k.shape[0]
        * (len(allocation.retained_experts[k.layer]) if k.role.has_row_per_expert else k.shape[0])
        for k in layout.full_precision
    )  # fmt: skip
    assert inside.overhead % 8 == 0


def test_budget():
    size = FileBytes(encoded=100, full_precision=20, padding=2, header=1)
    assert (size.tensors, size.overhead, size.file) == (120, 3, 123)
    Budget(1, "file").check_positive()
    for nbytes in (0, -5):
        with pytest.raises(BudgetError, match=f"budget of {nbytes} bytes"):
            Budget(nbytes, "file").check_positive()


# -- refusals


def changed_formats(**changes):
    return lambda a: {"formats": {**a.format_of, **changes}}


def changed_layer(experts):
    return lambda a: {"retained": {**a.retained_experts, 3: experts}}


D, E = "layers.1.experts.down", "layers.1.attention.k_b"
REFUSED = {
    "other target": (
        lambda a: {"target": "safetensors"},
        "for target 'safetensors', needed 'gguf'",
    ),
    "unknown group": (changed_formats(extra="Q4_K"), "group 'extra' is not in both"),
    "missing group": (
        lambda a: {"formats": {n: f for n, f in a.formats if n != D}},
        f"group '{D}' is not in both",
    ),
    "missing layer": (
        lambda a: {"retained": {x: e for x, e in a.retained if x != 3}},
        r"layers \(1, 2, 4, 5\), the checkpoint routes in \(1, 2, 3, 4, 5\)",
    ),
    "dense layer": (
        lambda a: {"retained": {**a.retained_experts, 0: (1, 2, 3, 4)}},
        r"layers \(0, 1, 2, 3, 4, 5\)",
    ),
    "too many used": (lambda a: {"experts_used": 5}, r"5 experts used, needed 1..4"),
    "none used": (lambda a: {"experts_used": 0}, r"0 experts used, needed 1..4"),
    "no expert of the layer": (changed_layer((0, 1, 2, 24)), "layer 3 retains .*24"),
    "negative expert": (changed_layer((-1, 1, 2, 3)), "layer 3 retains"),
    "an expert twice": (changed_layer((1, 1, 2, 3, 4)), "layer 3 retains"),
    "too few experts": (changed_layer((1, 2, 3)), "layer 3 retains 3 experts, fewer than the 4"),
    "two counts": (changed_layer(tuple(range(23))), "knows one retained count"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(layouts, why):
    change, match = REFUSED[why]
    layout = layouts["gguf"]
    whole = some(layout, retained={x: tuple(range(24)) for x in layout.layers})
    whole.check(layout)
    data = {
        "target": whole.target,
        "retained": whole.retained_experts,
        "formats": whole.format_of,
        "experts_used": whole.experts_used,
    }
    with pytest.raises(SpaceError, match=match):
        Allocation.of(**data | change(whole)).check(layout)


EXPERTS = tuple(range(24))
PARTS = {  # group, text, what is said
    "outside of experts": ("embedding", f"Q8_0:0,1+IQ1_S:{listed(EXPERTS[2:])}", "give it one"),
    "of a shared expert": ("layers.1.shared.down", "Q8_0:0+IQ1_S:1", "only groups of routed"),
    "malformed": (D, "Q8_0:0+IQ1_S", f"{D}: part 'IQ1_S': needed FORMAT:experts"),
    "a space's choice": (D, "Q8_0*8+IQ1_S", f"{D}: part 'Q8_0.8': needed FORMAT:experts"),
    "unknown": (D, f"Q8:0+IQ1_S:{listed(EXPERTS[1:])}", f"{D}: unknown format 'Q8'"),
    "missing": (D, f"Q8_0:0+IQ1_S:{listed(EXPERTS[2:])}", f"{D}: parts hold expert 1 0 times"),
    "doubled": (D, f"Q8_0:0,1+IQ1_S:{listed(EXPERTS[1:])}", f"{D}: parts hold expert 1 2 times"),
    "not retained": (D, f"Q8_0:24+IQ1_S:{listed(EXPERTS)}", f"{D}: a part holds expert 24, which"),
    "order of bits": (D, f"IQ1_S:0+Q8_0:{listed(EXPERTS[1:])}", f"{D}: parts of IQ1_S, Q8_0: nee"),
    "order of experts": (D, f"Q8_0:1,0+IQ1_S:{listed(EXPERTS[2:])}", f"{D}: parts of Q8_0, IQ1_S"),
    "one part": (D, f"Q8_0:{listed(EXPERTS)}", f"{D}: parts of Q8_0: needed two formats"),
}


@pytest.mark.parametrize("why", PARTS)
def test_refused_parts(layouts, why):
    name, text, match = PARTS[why]
    layout = layouts["safetensors"]
    plain = some(layout, retained=dict.fromkeys(layout.layers, EXPERTS))
    good = f"Q8_0:0,1+IQ1_S:{listed(EXPERTS[2:])}"
    replace(plain, formats=tuple((plain.format_of | {D: good}).items())).check(layout)
    odd = replace(plain, formats=tuple((plain.format_of | {name: text}).items()))
    with pytest.raises(SpaceError, match=match) as caught:
        odd.check(layout)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("allocation: ")


def test_gguf_has_no_parts(layouts):
    layout = layouts["gguf"]
    whole = some(layout, retained=dict.fromkeys(layout.layers, EXPERTS))
    formats = whole.format_of | {D: f"Q8_0:0+IQ1_S:{listed(EXPERTS[1:])}"}
    with pytest.raises(SpaceError, match="target gguf stores the experts of a projection in one"):
        replace(whole, formats=tuple(formats.items())).check(layout)


def test_parts_that_do_not_store(saved):
    layout = SAFETENSORS.layout(read_inventory(saved["qwen"]))  # rows of 32
    name = "layers.1.experts.down"
    retained = dict.fromkeys(layout.layers, tuple(range(8)))
    formats = some(layout, retained=retained).format_of | {name: "Q8_0:0+IQ1_S:1,2,3,4,5,6,7"}
    with pytest.raises(FormatError, match="IQ1_S: in_features 32 is not a multiple"):
        some(layout, retained=retained, formats=formats).check(layout)


def test_digest_with_parts_is_stable():
    allocation = Allocation.of(
        target="safetensors",
        retained={2: (5, 0, 7)},
        formats={"b": "IQ2_XXS:0,7+IQ1_S:5", "a": "Q4_K"},
        experts_used=2,
    )
    text = (
        '{"experts_used": 2, "formats": {"a": "Q4_K", "b": "IQ2_XXS:0,7+IQ1_S:5"}, '
        '"kv_format": "f16", "retained": {"2": [0, 5, 7]}, "target": "safetensors"}'
    )
    assert allocation.digest == hashlib.sha256(text.encode()).hexdigest()
    assert Allocation.from_json(json.loads(text)) == allocation


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: "-".join(p.parts[-3::2]))
def test_committed_digests_are_unchanged(path):
    data = json.loads(path.read_text())["allocation"]
    text = json.dumps(data, sort_keys=True)
    assert Allocation.from_json(data).digest == hashlib.sha256(text.encode()).hexdigest()


def test_formats_that_do_not_store(layouts):
    layout = layouts["gguf"]
    for fmt, match in (("Q4_K", "in_features 64 is not a multiple"), ("Q4", "unknown format 'Q4'")):
        formats = some(layout).format_of | {E: fmt}
        with pytest.raises(FormatError, match=match):
            some(layout, formats=formats).check(layout)


def test_importance_is_needed(layouts, tmp_path, make):
    wide = {"hidden_size": 256}
    folder = make.zeros(tmp_path, tensors=make.tensors(**wide), **wide)
    layout = SAFETENSORS.layout(read_inventory(folder))
    allocation = some(layout)
    allocation.check(layout)
    odd = some(layout, formats=allocation.format_of | {"embedding": "IQ2_XXS"})
    with pytest.raises(SpaceError, match="embedding has no importance, which IQ2_XXS needs"):
        odd.check(layout)
    some(layout, formats=allocation.format_of | {"head": "IQ2_XXS"}).check(layout)


def test_router_groups_stay_equal(saved):
    layout = SAFETENSORS.layout(read_inventory(saved["deepseek"]))  # 4 groups of 2, 2 chosen
    some(layout, retained=dict.fromkeys(layout.layers, tuple(range(8)))).check(layout)
    few = dict.fromkeys(layout.layers, (0, 2, 4, 6))
    with pytest.raises(SpaceError, match="retains 4 experts, fewer than the 8"):
        some(layout, retained=few).check(layout)


def test_router_groups_of_other_sizes(reference):
    config = {**reference.config, "n_group": 4, "topk_group": 2}  # 6 experts each
    layout = SAFETENSORS.layout(replace(reference, config=config))
    equal = [e for e in range(24) if e % 6 < 3]
    some(layout, retained=dict.fromkeys(layout.layers, tuple(equal))).check(layout)
    odd = [*equal[1:], 3]  # the same groups
    some(layout, retained=dict.fromkeys(layout.layers, tuple(odd))).check(layout)
    for bad in ([*equal[1:], 9], list(range(12)), list(range(9))):
        with pytest.raises(SpaceError, match="by router group, needed as many in each of 4"):
            some(layout, retained=dict.fromkeys(layout.layers, tuple(bad))).check(layout)
