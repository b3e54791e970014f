"""The grammar of search spaces, and params and allocations as each other's inverse."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution

from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation import Allocation
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.search_space import SearchSpace, bind
from allocator.errors import SpaceError, TargetError
from allocator.families import Role
from allocator.formats import FORMATS
from allocator.targets import SAFETENSORS, TARGETS

SHIPPED = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.toml"))
TARGET_NAMES = list(TARGETS)


@pytest.fixture
def spec(tmp_path):
    """Parses a search space."""

    def parse(text="", head="schema = 1\n"):
        path = tmp_path / "space.toml"
        path.write_text(head + text)
        return SearchSpace.read(path)

    return parse


# -- the file


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
@pytest.mark.parametrize("target", TARGET_NAMES)
def test_shipped_spaces_bind(layouts, profiles, path, target):
    layout = layouts[target]
    if path.stem == "whole-device" and target == "safetensors":
        with pytest.raises(TargetError, match="or target gguf"):
            bind(SearchSpace.read(path), layout, profiles[target].saliency)
        return
    space = bind(SearchSpace.read(path), layout, profiles[target].saliency)
    space.smallest.check(layout)
    space.largest.check(layout)
    assert space.smallest.nbytes(layout).file < space.largest.nbytes(layout).file


def test_careful_spares_attention_and_what_layers_have_in_its_place():
    careful = SearchSpace.read(next(path for path in SHIPPED if path.stem == "careful"))
    (pin,) = (pin for pin in careful.pin if pin.minimum == "IQ4_XS")
    kinds = {True: set(), False: set()}
    for role in (role for role in Role if role.is_encoded):
        kinds[pin.matches(f"layers.3.{role}")].add(role.split(".")[0])
    assert kinds[True] == {"attention", "linear", "ssm", "conv"}
    assert kinds[False] == {"embedding", "head", "experts", "shared", "mlp", "latent"}


def test_something_is_shipped():
    assert {p.stem for p in SHIPPED} >= {"default", "careful"}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("colour = 1", "colour: unknown key; known: schema, formats, .*, pin"),
        ("[experts]\nmin = 3", r"\[experts\] min: unknown key; did you mean minimum\?"),
        (
            '[[pin]]\npattern = "*"\nfmt = "Q4_K"',
            r"\[\[pin\]\] fmt: unknown key; did you mean format\?",
        ),
        (
            "[[pin]]\nformat = 'Q4_K'",
            r"\[\[pin\]\] pattern: missing; add under \[\[pin\]\] the line: pattern = ",
        ),
        (
            'formats = ["Q4_K", "Q4_KM"]',
            r'formats has "Q4_KM": needed one of "F32", .*; did you mean "Q4_K"\?',
        ),
        (
            '[[pin]]\npattern = "*"\nformat = "q4_k"',
            r'format = "q4_k": needed one of .*; did you mean "Q4_K"\?',
        ),
        ('[[pin]]\npattern = "*"\nminimum = "4 bits"', 'minimum = "4 bits": needed one of'),
        ('[[pin]]\npattern = "*"\nmaximum = "x"', 'maximum = "x": needed one of'),
        (
            "[experts]\nminimum = 'few'",
            r'\[experts\] minimum = "few": needed a whole number, 1 or more',
        ),
        (
            "[experts]\nminimum = 0",
            r"space.toml: \[experts\] minimum = 0: needed a whole number, 1 or more",
        ),
        (
            "[experts]\nminimum = -1",
            r"space.toml: \[experts\] minimum = -1: needed a whole number, 1 or more",
        ),
        (
            "[experts]\nmaximum = 0",
            r"space.toml: \[experts\] maximum = 0: needed a whole number, 1 or more",
        ),
        (
            "[experts.protected]\nfirst = [0]",
            r'\[experts\] protected has the key "first": needed a whole number',
        ),
        ("formats = ", "space.toml: Invalid value"),
        ("\0", "space.toml: "),
    ],
)
def test_refused_files(spec, text, match):
    with pytest.raises(SpaceError, match=match) as caught:
        spec(text)
    assert "space.toml: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_schema(spec, tmp_path):
    with pytest.raises(
        SpaceError, match=r"schema: missing; add above the first \[table\] the line: schema = 1$"
    ):
        spec(head="")
    with pytest.raises(SpaceError, match="schema 2, needed 1"):
        spec(head="schema = 2")
    with pytest.raises(SpaceError, match=r"nowhere.toml: no such file"):
        SearchSpace.read(tmp_path / "nowhere.toml")
    with pytest.raises(SpaceError, match="directory"):
        SearchSpace.read(tmp_path)
    (tmp_path / "latin").write_bytes(b"schema = 1 # \xe4")
    with pytest.raises(SpaceError, match="latin: "):
        SearchSpace.read(tmp_path / "latin")


# -- pins and limits


def formats(spec, layout, text, *, mixes=False):
    """By group; without mixes unless they are wanted."""
    found = bind(spec(text), layout, None).formats
    return found if mixes else {n: tuple(v for v in f if "+" not in v) for n, f in found.items()}


def pin(pattern, **keys):
    return f'[[pin]]\npattern = "{pattern}"\n' + "".join(f'{k} = "{v}"\n' for k, v in keys.items())


DOWN, KV_B = "layers.1.experts.down", "layers.1.attention.kv_b"
ALL = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ3_XXS")
ALL += ("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")


def test_of_several_patterns_one_has_to_match(spec, layouts):
    text = '[[pin]]\npattern = ["*.linear.*", "*.kv_b"]\nformat = "Q5_0"'
    found = formats(spec, layouts["safetensors"], text)
    assert {n for n, offered in found.items() if offered == ("Q5_0",)} == {
        n for n in found if n.endswith(".kv_b")
    }
    with pytest.raises(SpaceError, match=r"pin \['\*.linear.\*', '\*.conv.\*'\] matches no group"):
        formats(spec, layouts["gguf"], text.replace("*.kv_b", "*.conv.*"))


def test_without_limits(spec, layouts):
    found = formats(spec, layouts["safetensors"], "")
    assert found[DOWN] == ALL
    assert found[KV_B] == ("BF16", "Q8_0", "Q5_0", "IQ4_NL", "Q4_0")


@pytest.mark.parametrize(
    ("text", "name", "left"),
    [
        ('formats = ["IQ1_S", "Q4_K", "IQ4_NL"]', DOWN, ("Q4_K", "IQ1_S")),
        ('formats = ["IQ1_S", "Q4_K", "IQ4_NL"]', KV_B, ("IQ4_NL",)),
        (pin("*.experts.*", format="Q4_K"), DOWN, ("Q4_K",)),
        (pin("*.experts.*", format="Q2_K"), DOWN, ("Q2_K",)),  # stored, if not offered
        (pin("*.experts.*", format="Q4_K"), "layers.1.shared.down", ALL),
        (pin("layers.[12].*", minimum="Q5_K"), DOWN, ALL[:4]),
        (pin("*", minimum="Q4_K"), KV_B, ("BF16", "Q8_0", "Q5_0", "IQ4_NL", "Q4_0")),  # 4.5 bits
        (pin("*", minimum="IQ4_XS", maximum="Q5_K"), DOWN, ("Q5_K", "Q4_K", "IQ4_XS")),
        (pin("*", maximum="Q5_K") + pin("*.down", minimum="Q4_K"), DOWN, ("Q5_K", "Q4_K")),
        (pin("*", maximum="Q8_0") + pin("*.down", maximum="BF16"), DOWN, ALL[1:]),
        (pin("*", minimum="Q4_K") + pin("*.down", format="Q5_K"), DOWN, ("Q5_K",)),
        (
            pin("*.up", format="Q5_K") + pin("*.[gu]*", format="Q5_K"),
            "layers.1.shared.up",
            ("Q5_K",),
        ),
    ],
)
def test_narrowed(spec, layouts, text, name, left):
    assert formats(spec, layouts["safetensors"], text)[name] == left


def mixes(*pairs, heads=(20, 16, 12, 8, 4)):
    """`A*20+B`, `A*16+B`, ... of each pair."""
    return tuple(f"{a}*{n}+{b}" for a, b in pairs for n in heads)


LADDER = ("Q8_0", "Q6_K", "Q5_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XXS", "IQ1_S")


@pytest.mark.parametrize(
    ("text", "name", "mixed"),
    [
        ("", DOWN, mixes(*itertools.pairwise(LADDER))),
        ("", "layers.1.shared.down", ()),
        ("", KV_B, ()),
        ("[experts]\nmixes = false", DOWN, ()),
        ("[experts]\nmixes = true", DOWN, mixes(*itertools.pairwise(LADDER))),
        ('formats = ["IQ1_S", "Q8_0", "IQ4_NL", "IQ2_XXS"]', DOWN,
         mixes(("Q8_0", "IQ2_XXS"), ("IQ2_XXS", "IQ1_S"))),
        ('formats = ["IQ1_M", "Q4_K", "IQ4_NL"]', DOWN, ()),
        (pin("*.experts.*", format="IQ2_XXS"), DOWN, ()),
        (pin("*.experts.*", minimum="IQ3_S", maximum="Q5_K"), DOWN,
         mixes(("Q5_K", "IQ4_XS"), ("IQ4_XS", "IQ3_S"))),
        (pin("*.experts.*", minimum="IQ2_XS", maximum="IQ2_S"), DOWN, ()),
        # a head of as many as are ever retained would be the plain format
        ("[experts]\nmaximum = 12\n" + pin("*.experts.*", minimum="Q6_K"), DOWN,
         mixes(("Q8_0", "Q6_K"), heads=(8, 4))),
    ],
)  # fmt: skip
def test_mixes(spec, layouts, text, name, mixed):
    found = formats(spec, layouts["safetensors"], text, mixes=True)[name]
    assert sorted(v for v in found if "+" in v) == sorted(mixed)


def test_llama_cpp_is_offered_no_mixes(spec, layouts):
    for text in ("", "[experts]\nmixes = true"):
        found = formats(spec, layouts["gguf"], text, mixes=True)
        assert not any("+" in v for names in found.values() for v in names)


@pytest.mark.parametrize(("n_experts", "heads"), [(2, (1,)), (4, (1, 2, 3)), (8, (1, 3, 4, 5, 7))])
def test_heads_of_few_experts(layouts, n_experts, heads):
    layout, one_used = layouts["safetensors"], SearchSpace(schema=1, experts_used=[1])
    few = {n: replace(g, shape=(n_experts, *g.shape[1:])) if ".experts." in n else g
           for n, g in layout.groups.items()}  # fmt: skip
    inventory = replace(
        layout.inventory, config={**layout.inventory.config, "n_routed_experts": n_experts}
    )
    space = bind(one_used, replace(layout, groups=few, inventory=inventory), None)
    assert {v for v in space.formats[DOWN] if v.startswith("IQ2_XXS*")} == {
        f"IQ2_XXS*{n}+IQ1_S" for n in heads
    }


def test_formats_and_mixes_are_in_order_of_bytes(spaces):
    space = spaces["safetensors"]
    for name, values in space.formats.items():
        sizes = [Costs(space, Budget(1, "weights")).group(name, v, 24) for v in values]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(values)) == len(values)
        assert not any("+" in v for v in (values[0], values[-1]))
        if ".experts." in name:
            assert len(values) == 13 + 8 * 5


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (pin("*.expert.*", format="Q4_K"), r"pin '\*.expert.\*' matches no group; .*embedding"),
        (
            pin("*", format="Q4_K"),
            "Q4_K cannot store layers.0.attention.kv_b .rows of 128.; offered",
        ),
        ('formats = ["Q4_K"]', "no format left for layers.0.attention.kv_b .rows of 128."),
        (pin("*", minimum="Q5_K", maximum="Q4_K"), "no format left for embedding"),
        (pin("*", minimum="Q4_K") + pin("*.experts.down", format="IQ2_S"), "left for layers.1.exp"),
        (pin("*.q_a", format="Q4_K") + pin("*", format="Q8_0"), "no format left for .*q_a"),
        (pin("*", minimum="Q4_K") + pin("*", maximum="IQ2_S"), "no format left for embedding"),
        ("experts_used = [0]", "experts_used has 0: needed a whole number, 1 or more"),
        ("experts_used = [2, 5]", r"experts_used \(2, 5\): needed 1..4"),
        ("[experts]\nminimum = 25", "minimum 25: the checkpoint has 24 per layer"),
        ("[experts]\nminimum = 13\nmaximum = 12", "minimum 13 .* is above maximum 12"),
        ("[experts]\nmaximum = 3", "minimum 6 .* is above maximum 3"),
        ("[experts]\nmaximum = -1", "maximum = -1: needed a whole number, 1 or more"),
        (
            "[experts]\nsaliency = 'luck'",
            'saliency = "luck": needed one of "fisher", "reap", "norm"',
        ),
        ("[experts.protected]\n0 = [1]", r"protected 0 = \[1\]: MoE layers are \(1, 2, 3, 4, 5\)"),
        ("[experts.protected]\n1 = [24]", r"protected 1 = \[24\]: .* experts 0..23"),
        ("[experts.protected]\n1 = [-1]", r"protected 1 = \[-1\]"),
        ("[experts]\nmaximum = 6\n[experts.protected]\n1 = [0,1,2,3,4,5,6]", "protected 7"),
    ],
)
def test_nothing_left(spec, layouts, profiles, text, match):
    with pytest.raises(SpaceError, match=match):
        bind(spec(text), layouts["safetensors"], profiles["safetensors"].saliency)


def test_importance_of_an_untied_embedding(spec, tmp_path, make):
    wide = {"hidden_size": 256}
    folder = make.zeros(tmp_path / "wide", tensors=make.tensors(**wide), **wide)
    layout = SAFETENSORS.layout(read_inventory(folder))
    with pytest.raises(SpaceError, match="IQ1_S cannot store embedding"):
        formats(spec, layout, pin("embedding", format="IQ1_S"))
    assert formats(spec, layout, "")["embedding"][-1] == "IQ1_M"
    assert formats(spec, layout, "")["head"][-1] == "IQ1_S"


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("", range(6, 25)),
        ("[experts]\nminimum = 20", range(20, 25)),
        ("[experts]\nminimum = 1", range(4, 25)),  # as many as a token uses
        ("experts_used = [1, 2]\n[experts]\nminimum = 1", range(2, 25)),
        ("[experts]\nmaximum = 99", range(6, 25)),
        ("[experts]\nminimum = 7\nmaximum = 7", [7]),
        ("[experts.protected]\n1 = [0, 1, 2, 3, 4, 5, 6, 7]", range(8, 25)),
        ("[experts.protected]\n1 = [0, 0, 0, 0, 0, 0, 0, 0]", range(6, 25)),
    ],
)
def test_counts(spec, layouts, text, counts):
    assert bind(spec(text), layouts["safetensors"], None).counts == tuple(counts)


def test_tied(spec, layouts):
    same = "[experts]\nsame = true"
    assert bind(spec(), layouts["gguf"], None).tied
    assert not bind(spec(), layouts["safetensors"], None).tied
    assert list(bind(spec(same), layouts["safetensors"], None).count_params) == ["experts.all"]


# -- rankings


def test_rankings_follow_saliency_and_protection(spec, layouts, profiles):
    layout, saliency = layouts["safetensors"], profiles["safetensors"].saliency
    text = "[experts]\nsaliency = 'norm'\n[experts.protected]\n2 = [7, 3]"
    space = bind(spec(text), layout, saliency)
    for layer in layout.layers:
        scores = saliency["norm"][layer]
        best = sorted(range(24), key=lambda e: scores[e], reverse=True)
        first = sorted({7, 3}, key=best.index) if layer == 2 else []
        assert list(space.rankings[layer]) == first + [e for e in best if e not in first]
    assert {3, 7} <= set(space.retained(2, 6))
    assert bind(spec(), layout, None).rankings[1] == tuple(range(24))


@pytest.fixture(scope="module")
def grouped(reference):
    """The reference as if its router had 4 groups of 6, of which 2 are chosen."""
    config = {**reference.config, "n_group": 4, "topk_group": 2}
    return {n: t.layout(replace(reference, config=config)) for n, t in TARGETS.items()}


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_router_groups_stay_balanced(grouped, profiles, target):
    space = bind(SearchSpace(schema=1), grouped[target], profiles[target].saliency)
    assert space.counts == (8, 12, 16, 20, 24)  # at least two of each group
    for layer, count in itertools.product(grouped[target].layers, space.counts):
        kept = space.retained(layer, count)
        scores = profiles[target].saliency["fisher"][layer]
        for group in range(4):
            best = sorted(range(6 * group, 6 * group + 6), key=lambda e: -scores[e])
            assert {e for e in kept if e // 6 == group} == set(best[: count // 4])
    space.smallest.check(grouped[target])
    assert space.smallest.nbytes(grouped[target]).file > 0


def test_protected_experts_of_one_router_group(grouped, spec):
    space = bind(spec("[experts.protected]\n3 = [6, 7, 9]"), grouped["safetensors"], None)
    assert space.counts == (12, 16, 20, 24)
    assert all({6, 7, 9} <= set(space.retained(3, n)) for n in space.counts)


# -- params


def test_distributions(spaces, spec, layouts):
    for target, space in spaces.items():
        names = ["experts.all"] if target == "gguf" else [f"experts.{x}" for x in range(1, 6)]
        groups = [f"format.{g}" for g in space.layout.groups]
        assert list(space.distributions) == names + groups
        assert space.distributions[names[0]] == IntDistribution(6, 24)
    text = (
        'experts_used = [4, 1, 2, 2]\n[experts]\nminimum = 24\n[[pin]]\npattern="*"\nformat="Q8_0"'
    )
    space = bind(spec(text), layouts["gguf"], None)
    assert space.distributions == {"experts_used": CategoricalDistribution((1, 2, 4))}
    text = text.replace("[4, 1, 2, 2]", "[2, 4]")
    space = bind(spec(text), layouts["gguf"], None)
    assert space.distributions == {"experts_used": IntDistribution(2, 4, step=2)}
    space = bind(spec(text.replace("[2, 4]", "[4, 4]")), layouts["gguf"], None)
    assert space.distributions == {}
    assert space.allocation({}).experts_used == 4


def test_optuna_samples_what_the_space_holds(spec, layouts):
    for text in ("experts_used = [1, 2, 4]", "experts_used = [1, 4]", ""):
        space = bind(spec(text), layouts["gguf"], None)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(10):
            space.allocation(study.ask(space.distributions).params).check(layouts["gguf"])


quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.data_too_large])


@pytest.mark.parametrize("target", TARGET_NAMES)
@quick
@given(data=st.data())
def test_params_of_an_allocation_of_params(spaces, draw, target, data):
    space = spaces[target]
    params = draw(data, space)
    allocation = space.allocation(params)
    allocation.check(space.layout)
    searched = {n: v for n, v in params.items() if n in space.distributions}
    assert space.complete(searched) == params
    assert space.allocation(searched) == allocation
    found = space.params(allocation)
    assert found == searched | plain_of(space, params)
    assert space.allocation(found) == allocation
    assert space.params(space.allocation(found)) == found
    if target == "gguf":
        assert found == searched


def plain_of(space, params):
    """First formats of the mixes whose head holds all that the layer retains."""
    found = {}
    for name, value in params.items():
        if "*" in str(value):
            head, n, _ = re.split(r"[*+]", value)
            group = name.removeprefix("format.")
            if params[f"experts.{space.layout.groups[group].layer}"] <= int(n):
                found[name] = head
    return found


@quick
@given(data=st.data())
def test_parts_of_a_choice(spaces, draw, data):
    """The ranking's first experts in the first format; the allocation says the same."""
    space = spaces["safetensors"]
    params = draw(data, space)
    allocation = space.allocation(params)
    for group in space.layout.groups:
        value, layer = params[f"format.{group}"], space.layout.groups[group].layer
        count = params.get(f"experts.{layer}", 0) if ".experts." in group else 0
        found = space.parts(group, value, count)
        if ".experts." not in group:
            assert found == ((value, ()),)
            continue
        ranking = space.rankings[layer][:count]
        head, n, tail = re.split(r"[*+]", value) if "*" in value else (value, count, None)
        expected = [(head, ranking[: int(n)]), (tail, ranking[int(n) :])]
        assert found == tuple((f, tuple(sorted(e))) for f, e in expected if e)
        assert tuple((f.name, e) for f, e in allocation.parts(space.layout, group)) == found
        assert allocation.format_of[group].count("+") == len(found) - 1


def test_mixes_of_balanced_router_groups(grouped, profiles):
    layout = grouped["safetensors"]
    space = bind(SearchSpace(schema=1), layout, profiles["safetensors"].saliency)
    params = space.complete(space.params(space.largest))
    params |= dict.fromkeys((f"format.{g}" for g in space.routed_layer_of), "IQ2_XXS*12+IQ1_S")
    for count in space.counts:
        params |= dict.fromkeys(space.count_params, count)
        allocation = space.allocation(params)
        allocation.check(layout)
        assert allocation.format_of[DOWN].count("+") == (count > 12)
        for layer in layout.layers:
            assert allocation.retained_experts[layer] == space.retained(layer, count)


def test_allocations_in_other_parts_are_outside_the_space(spaces):
    space = spaces["safetensors"]
    whole = space.allocation(space.params(space.largest) | {f"format.{DOWN}": "IQ2_XXS*8+IQ1_S"})
    assert space.params(whole)[f"format.{DOWN}"] == "IQ2_XXS*8+IQ1_S"
    best, rest = (set(e) for _, e in space.parts(DOWN, "IQ2_XXS*8+IQ1_S", 24))
    worse = max(best, key=space.rankings[1].index), min(rest, key=space.rankings[1].index)
    swapped = sorted(best ^ set(worse)), sorted(rest ^ set(worse))
    few = sorted(best - {worse[0]}), sorted(rest | {worse[0]})
    for head, tail in (swapped, few):
        text = f"IQ2_XXS:{','.join(map(str, head))}+IQ1_S:{','.join(map(str, tail))}"
        odd = replace(whole, formats=tuple((whole.format_of | {DOWN: text}).items()))
        odd.check(space.layout)
        with pytest.raises(SpaceError):
            space.params(odd)
    three = "Q8_0:0+IQ2_XXS:1+IQ1_S:" + ",".join(map(str, range(2, 24)))
    odd = replace(whole, formats=tuple((whole.format_of | {DOWN: three}).items()))
    odd.check(space.layout)
    with pytest.raises(SpaceError, match=f"format.{DOWN} is 'Q8_0:0"):
        space.params(odd)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"experts.all": 5}, "param experts.all is 5, needed one of"),
        ({"experts.all": None}, "param experts.all is None"),
        ({"experts.1": 7}, "unknown param 'experts.1'"),
        ({"format.embedding": "Q4_0"}, "param format.embedding is 'Q4_0'"),
        ({"experts_used": 3}, "param experts_used is 3"),
    ],
)
def test_params_outside_the_space(spaces, change, match):
    space = spaces["gguf"]
    with pytest.raises(SpaceError, match=match):
        space.allocation(space.params(space.largest) | change)


def test_missing_params(spaces):
    with pytest.raises(SpaceError, match=r"param experts.all is None"):
        spaces["gguf"].allocation({})


def test_allocations_outside_the_space(spaces, tiny):
    space = spaces["gguf"]
    data = space.largest.to_json()
    worst = {x: sorted(r[-8:]) for x, r in space.rankings.items()}
    some = {x: list(range(8 if x == 3 else 7)) for x in worst}
    for change in (
        {"retained": worst},
        {"retained": some},
        {"retained": {}},
        {"formats": {}},
        {"formats": data["formats"] | {"extra": "Q4_K"}},
        {"kv_format": "q8_0"},
        {"target": "safetensors"},
    ):
        with pytest.raises(SpaceError):
            space.params(Allocation.from_json(data | change))
    other = bind(SearchSpace(schema=1), SAFETENSORS.layout(tiny), None)
    with pytest.raises(SpaceError):
        spaces["safetensors"].params(other.largest)


def test_smallest_is_smallest(spaces):
    for space in spaces.values():
        layout = space.layout
        small = space.smallest
        assert set(small.counts.values()) == {6}
        for name, group in layout.groups.items():
            stored = [FORMATS[f].nbytes(group.shape) for f in space.formats[name] if f in FORMATS]
            assert FORMATS[small.format_of[name]].nbytes(group.shape) == min(stored)
            assert FORMATS[space.largest.format_of[name]].nbytes(group.shape) == max(stored)
