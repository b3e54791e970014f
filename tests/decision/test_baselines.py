"""What people do without a search, under the names that llama-quantize would really store."""

import csv
import itertools
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from allocator.checkpoint.reading import read_inventory
from allocator.decision.baselines import baselines, hand_rule, mixed
from allocator.export.gguf.runtime import GgufRuntime
from allocator.formats import FORMATS, fallback
from allocator.targets import GGUF, SAFETENSORS, TARGETS


def by_index(layout):
    n = layout.inventory.n_experts
    size = n // layout.inventory.expert_groups
    order = sorted(range(n), key=lambda e: e % size)
    return dict.fromkeys(layout.layers, tuple(order))


@pytest.fixture(scope="module")
def many(layouts, tiny, saved, reference):
    grouped = replace(reference, config={**reference.config, "n_group": 4, "topk_group": 2})
    found = dict(layouts)
    for name, target in TARGETS.items():
        found |= {f"{name} tiny": target.layout(tiny), f"{name} 4x6": target.layout(grouped)}
        found[f"{name} 4x2"] = target.layout(read_inventory(saved["deepseek"]))
    return found


KINDS = [f"{t}{s}" for t, s in itertools.product(TARGETS, ("", " tiny", " 4x6", " 4x2"))]


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_allocations_with_names_of_their_own(many, kind):
    layout = many[kind]
    made = list(baselines(layout, by_index(layout), pruned=True))
    assert len({name for name, _ in made}) == len(made)
    for _, allocation in made:
        allocation.check(layout)
    whole = dict(baselines(layout, by_index(layout)))
    assert whole.items() <= dict(made).items()
    n = layout.inventory.n_experts
    assert all(set(a.counts.values()) == {n} for a in whole.values())


def test_counts_of_the_reference(layouts):
    made = baselines(layouts["gguf"], by_index(layouts["gguf"]), pruned=True)
    assert sorted({n for _, a in made for n in a.counts.values()}) == [8, 12, 16, 20, 24]


def test_ranking_says_who_stays(layouts):
    layout = layouts["safetensors"]
    rankings = {x: tuple((5 * e + x) % 24 for e in range(24)) for x in layout.layers}
    made = mixed(layout, rankings, experts="Q4_K", rest="Q6_K", count=3)
    assert made.retained_experts[2] == (2, 7, 12)


def test_uniform_q4_k_of_the_reference(layouts):
    """Rows of 128 and 64 are no superblocks: llama-quantize stores Q5_0."""
    stored = dict(baselines(layouts["gguf"], by_index(layouts["gguf"])))["Q4_K"].format_of
    for name, group in layouts["gguf"].groups.items():
        assert stored[name] == {256: "Q4_K", 768: "Q4_K", 128: "Q5_0", 64: "Q5_0"}[group.shape[-1]]
    assert stored["layers.2.attention.k_b"] == stored["layers.2.attention.v_b"] == "Q5_0"
    flat = dict(baselines(layouts["safetensors"], by_index(layouts["safetensors"])))
    assert flat["IQ2_XXS"].format_of["layers.2.attention.kv_b"] == "IQ4_NL"


def test_mixes_are_of_two_roles(layouts):
    for name, allocation in baselines(layouts["gguf"], by_index(layouts["gguf"])):
        if " / " not in name:
            continue
        experts, rest = name.split(" / ")
        assert FORMATS[experts].bits < FORMATS[rest].bits
        assert allocation.format_of["layers.1.experts.down"] == experts
        assert allocation.format_of["layers.1.shared.down"] == rest
        assert allocation.format_of["embedding"] == rest


def test_skilled_mixes_add_to_the_others(layouts):
    """Held against the entries of a tensor-type file that says the same."""
    layout = layouts["gguf"]
    plain = dict(baselines(layout, by_index(layout)))
    skilled = dict(baselines(layout, by_index(layout), skilled=True))
    assert plain.items() <= skilled.items()
    assert list(skilled)[: len(plain)] == list(plain)
    assert len({a.digest for a in skilled.values()}) == len(skilled)
    text = "ffn_down_exps=IQ2_XS\nffn_(gate|up)_exps=IQ2_XXS\n"
    said = GgufRuntime().read_recipe(text, layout)
    made = skilled["IQ2_XXS, down IQ2_XS / Q5_K"].format_of
    assert len(said) == 3 * len(layout.layers)
    for name, group in layout.groups.items():
        assert made[name] == said.get(name, fallback("Q5_K", group.shape).name)
    rests = {name.rpartition(" / ")[2] for name in skilled if " / " in name}
    assert rests == {"Q6_K", "Q5_K", "Q4_K", "IQ4_XS"}


def test_uniform_formats_come_largest_first(layouts):
    made = baselines(layouts["gguf"], by_index(layouts["gguf"]))
    sizes = [a.nbytes(layouts["gguf"]).encoded for n, a in made if "/" not in n]
    assert len(sizes) == 12
    assert sizes == sorted(sizes, reverse=True)


def test_an_embedding_without_importance(tmp_path, make):
    wide = {"hidden_size": 256}
    folder = make.zeros(tmp_path, tensors=make.tensors(**wide), **wide)
    for target in (GGUF, SAFETENSORS):
        layout = target.layout(read_inventory(folder))
        rows = baselines(layout, by_index(layout))
        made = {name.partition(" (")[0]: allocation for name, allocation in rows}
        assert made["IQ2_XXS"].format_of["embedding"] == "Q2_K"
        assert made["IQ2_XXS"].format_of["head"] == "IQ2_XXS"
        assert made["IQ3_S"].format_of["embedding"] == "IQ3_S"


# -- the hand rule


@pytest.mark.parametrize("kind", KINDS)
def test_the_hand_rule_is_an_allocation_of_every_layout(many, kind):
    layout = many[kind]
    made = dict(hand_rule(layout, by_index(layout)))
    assert len(made) >= 1
    for name, allocation in made.items():
        allocation.check(layout)
        (count,) = set(allocation.counts.values())
        assert count % layout.inventory.expert_groups == 0
        n = layout.inventory.n_experts
        assert name == ("hand rule" if count == n else f"hand rule, {count} experts")
    counts = [a.counts for a in made.values()]
    assert counts == sorted(counts, key=lambda c: -sum(c.values()))


def test_the_hand_rule_on_the_reference(layouts):
    """Six layers: the outer eighths are layers 0 and 5."""
    layout = layouts["gguf"]
    rankings = {x: tuple((5 * e + x) % 24 for e in range(24)) for x in layout.layers}
    made = dict(hand_rule(layout, rankings))
    assert list(made) == ["hand rule", "hand rule, 18 experts", "hand rule, 15 experts"]
    for count, allocation in zip((24, 18, 15), made.values(), strict=True):
        assert allocation.experts_used == layout.inventory.experts_used
        for x in layout.layers:
            assert allocation.retained_experts[x] == tuple(sorted(rankings[x][:count]))
    assert len({a.formats for a in made.values()}) == 1
    stored = made["hand rule"].format_of
    by_role = {
        "experts.gate": "IQ1_S IQ1_S IQ1_S IQ1_S IQ1_M",
        "experts.up": "IQ1_S IQ1_S IQ1_S IQ1_S IQ1_M",
        "experts.down": "IQ1_M IQ1_M IQ1_M IQ1_M IQ2_XXS",
        "shared.gate": "IQ3_S IQ3_S IQ3_S IQ3_S Q4_K",
        "shared.up": "IQ3_S IQ3_S IQ3_S IQ3_S Q4_K",
        "shared.down": "Q4_K Q4_K Q4_K Q4_K Q5_K",
        "attention.q_a": "Q4_K Q4_K Q4_K Q4_K Q4_K",
        "attention.o": "Q4_K Q4_K Q4_K Q4_K Q4_K",
        "attention.k_b": "Q5_0 Q5_0 Q5_0 Q5_0 Q5_0",  # rows of 64: llama-quantize's fallback
    }
    for role, formats in by_role.items():
        assert [stored[f"layers.{x}.{role}"] for x in range(1, 6)] == formats.split()
    assert {stored[f"layers.0.mlp.{p}"] for p in ("gate", "up", "down")} == {"Q4_K"}
    assert layout.inventory.tied_embeddings
    assert stored["embedding"] == "Q5_K"


def test_the_hand_rule_by_position(tmp_path, make):
    """Of 17 layers, the first and the last three are a step higher; a head of its own."""
    wide = {"hidden_size": 256, "num_hidden_layers": 17}
    layout = GGUF.layout(read_inventory(make.zeros(tmp_path, tensors=make.tensors(**wide), **wide)))
    made = dict(hand_rule(layout, by_index(layout), retained=(1 / 2,)))
    assert list(made) == ["hand rule, 2 experts"]
    stored = made["hand rule, 2 experts"].format_of
    gates = [stored[f"layers.{x}.experts.gate"] for x in range(17)]
    assert gates == ["IQ1_M"] * 3 + ["IQ1_S"] * 11 + ["IQ1_M"] * 3
    assert stored["layers.5.experts.down"] == "IQ4_NL"  # rows of 32
    assert (stored["embedding"], stored["head"]) == ("Q4_K", "Q5_K")


# -- names


def test_names_of_the_reference_are_those_of_its_committed_figures(layouts):
    """A hundredth of its weights cannot be stored as named, and is not worth a word."""
    path = Path(__file__).parents[2] / "studies/reference/baselines.csv"
    with path.open(encoding="utf-8") as file:
        committed = {(row["target"], row["name"]) for row in csv.DictReader(file)}
    for target, layout in layouts.items():
        names = {name for name, _ in baselines(layout, by_index(layout), pruned=True)}
        assert {name for t, name in committed if t == target} <= names
        assert not any("(" in name for name in names)


@pytest.mark.parametrize("inner", [32, 352, 256])
def test_a_name_says_what_is_stored_otherwise(tmp_path, make, inner):
    """Rows of 32 and 352 are no superblocks; counted from the allocation's own formats."""
    wide = {"hidden_size": 256}
    tensors = {
        name: tuple(inner if n == 32 and "experts" in name else n for n in shape)
        for name, shape in make.tensors(**wide).items()
    }
    layout = GGUF.layout(read_inventory(make.zeros(tmp_path, tensors=tensors, **wide)))
    made = dict(baselines(layout, by_index(layout), pruned=True))
    plain = re.compile(r"(\w+)(?: / (\w+))?(?: \((.*)\))?(?:, (\d+) experts)?")
    for name, allocation in made.items():
        experts, rest, said, _ = plain.fullmatch(name).groups()
        groups = [
            group
            for group, fmt in allocation.formats
            if fmt != (experts if ".experts." in group else rest or experts)
        ]
        other = Counter(allocation.format_of[group] for group in groups)
        found = {
            fmt: int(n) for fmt, n in re.findall(r"(\w+) in (\d+) groups?(?:, |$)", said or "")
        }
        weights = sum(math.prod(layout.groups[group].shape) for group in groups)
        assert found == (other if weights > 0.05 * layout.inventory.n_searched_weights else {})
    if inner == 256:
        assert "Q6_K" in made
    else:
        assert "Q6_K (Q8_0 in 4 groups)" in made  # two layers: output rows of 64, down of `inner`
        assert "IQ2_S / Q6_K (Q8_0 in 2 groups, IQ4_NL in 2 groups), 2 experts" in made
