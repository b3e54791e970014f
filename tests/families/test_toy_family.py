"""A family from one file: own names, own keys of config.json, experts stacked, a router of its own.

It stands for what somebody adds. Nothing else in the project knows of it.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import save_file

from allocator.checkpoint.outline import planned_inventory
from allocator.checkpoint.reading import read_inventory
from allocator.cli import main
from allocator.decision.search_space import SearchSpace, bind
from allocator.errors import CheckpointError, TargetError
from allocator.families import (
    Family,
    Keys,
    Role,
    Rule,
    Stack,
    families,
    family_of,
    register_family,
    unregister_family,
)
from allocator.targets import GGUF, SAFETENSORS
from allocator.targets.group_weights import group_digest, group_weights
from allocator.testing.families import FamilyConformance

L = "net.blocks.{layer}."
GATE, UP, DOWN = (L + f"routes.{{expert}}.{name}" for name in ("a", "b", "c"))
_ATTENTION = {
    Role.Q: ("query", "queries x hidden"),
    Role.K: ("key", "keys x hidden"),
    Role.V: ("value", "keys x hidden"),
    Role.O: ("mix", "hidden x attended"),
}
RULES = (
    Rule("net.words", Role.EMBEDDING, "vocabulary x hidden", aliases=("words",)),
    Rule("net.out", Role.HEAD, "vocabulary x hidden"),
    Rule("net.last", Role.NORM, "hidden"),
    Rule(L + "before", Role.NORM, "hidden"),
    *(Rule(L + name, role, shape) for role, (name, shape) in _ATTENTION.items()),
    Rule(L + "choose", Role.ROUTER, "experts x hidden"),
    Rule(GATE, Role.EXPERT_GATE, "expert_width x hidden"),
    Rule(UP, Role.EXPERT_UP, "expert_width x hidden"),
    Rule(DOWN, Role.EXPERT_DOWN, "hidden x expert_width"),
)
LAYER = frozenset(rule.part for rule in RULES if rule.has_layer)
TOY = Family(
    model_type="toy",
    models="none",
    rules=RULES,
    keys=Keys(
        experts=("n_routes",), layers="depth", hidden="width", vocabulary="n_words",
        experts_used="routes_per_word", expert_width="route_width", heads="n_heads",
        kv_heads="n_key_heads", head="head_width", scale="gain", groups="halls",
        groups_used="halls_used",
    ),
    layer_parts=lambda config, layer: LAYER,
    layers=(LAYER,),
    scoring=lambda config: ("tanh", config["balance"]),
    no_gguf="llama.cpp has no router by hyperbolic tangents",
    stacks=(
        Stack(L + "routes.ab", (Role.EXPERT_GATE, Role.EXPERT_UP)),
        Stack(L + "routes.c", (Role.EXPERT_DOWN,)),
    ),
    ignored=(r"eyes\..*",),
    computed=(r"net\.angles",),
    text_key="speech",
    layer_prefix=L,
    scales_gates=True,
)  # fmt: skip
SPEECH = {
    "depth": 2, "width": 64, "n_words": 48, "n_routes": 4, "routes_per_word": 2, "route_width": 32,
    "n_heads": 2, "n_key_heads": 1, "head_width": 32, "gain": 1.5, "balance": False,
}  # fmt: skip
CONFIG = {"model_type": "toy", "speech": SPEECH, "eyes": {"depth": 9}}


@pytest.fixture(autouse=True, scope="module")
def registered():
    register_family(TOY)
    yield
    unregister_family("toy")


class TestToy(FamilyConformance):
    family = TOY
    config = CONFIG
    in_transformers = False


def random_tensors():
    """Every tensor of the model, one per expert."""
    rng = np.random.default_rng(0)
    shapes = {t.name: t.shape for t in planned_inventory(CONFIG).tensors.values()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def stacked(tensors):
    """The same with the experts of a layer in two tensors, and what else such files hold."""
    made = dict(tensors)
    for layer in range(2):
        take = partial(
            lambda layer, pattern, e: made.pop(pattern.format(layer=layer, expert=e)), layer
        )
        both = [np.concatenate([take(GATE, e), take(UP, e)]) for e in range(4)]
        made[f"net.blocks.{layer}.routes.ab"] = np.stack(both)
        made[f"net.blocks.{layer}.routes.c"] = np.stack([take(DOWN, e) for e in range(4)])
    made["words"] = made.pop("net.words")
    return made | {"eyes.lens": np.ones((3, 3), np.float32), "net.angles": np.ones(4, np.float32)}


def write(folder, tensors, config=CONFIG):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tensors(registered):
    return random_tensors()


@pytest.fixture(scope="module")
def whole(tensors, tmp_path_factory):
    return write(tmp_path_factory.mktemp("toy") / "stacked", stacked(tensors))


def test_stacked_experts_are_the_single_ones(whole, tensors, tmp_path):
    by_one = SAFETENSORS.layout(read_inventory(write(tmp_path / "single", tensors)))
    layout = SAFETENSORS.layout(read_inventory(whole))
    assert list(layout.groups) == list(by_one.groups)
    for name, group in layout.groups.items():
        assert group_digest(layout, group) == group_digest(by_one, by_one.groups[name])
        sources = [tensors.get(s, tensors["net.words"]) for s in group.sources]
        expected = np.stack(sources) if group.role.is_expert else sources[0]
        np.testing.assert_array_equal(group_weights(layout, group), expected)


def test_other_parts_are_left_out_and_listed(whole):
    inventory = read_inventory(whole)
    assert [s.name for s in inventory.ignored] == ["eyes.lens"]
    assert [s.name for s in inventory.computed] == ["net.angles"]
    assert any("tensors of other parts of the model, 36 bytes" in n for n in inventory.notes)


def test_sizes_and_router(whole):
    inventory = read_inventory(whole)
    assert (inventory.n_layers, inventory.n_experts, inventory.experts_used) == (2, 4, 2)
    router = inventory.router
    assert (router.scoring, router.normalizes, router.scale) == ("tanh", False, 1.5)
    assert inventory.least_experts(2) == 2


def test_bytes_are_priced(whole):
    layout = SAFETENSORS.layout(read_inventory(whole))
    space = bind(SearchSpace(schema=1), layout, None)
    weights = sum(np.prod(group.shape) for group in layout.groups.values())
    assert space.largest.nbytes(layout).encoded == 2 * weights  # all in BF16
    assert space.smallest.nbytes(layout).encoded < 2 * weights / 3


def test_target_gguf_refuses_it_by_name(whole, capsys):
    with pytest.raises(TargetError, match=r"toy: llama.cpp has no router by hyperbolic tangents"):
        GGUF.layout(read_inventory(whole))
    assert main(["inspect", str(whole), "--target", "gguf"]) == 2
    assert "no router by hyperbolic tangents" in capsys.readouterr().err
    assert main(["inspect", str(whole), "--target", "safetensors"]) == 0
    assert "eyes.lens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("net.blocks.1.choose"), "layer 1 lacks choose"),
        (lambda t: t.pop("net.last"), r"net\.last is missing"),
        (lambda t: t.update({"net.blocks.0.routes.c": np.ones((4, 64), np.float32)}), "has shape"),
        (
            lambda t: t.update({"ears.drum": np.ones(3, np.float32)}),
            "ears.drum is no tensor",
        ),
    ],
)
def test_what_is_not_whole_is_refused(tensors, tmp_path, change, message):
    made = stacked(tensors)
    change(made)
    with pytest.raises(CheckpointError, match=message):
        read_inventory(write(tmp_path / "odd", made))


def test_a_name_is_registered_once():
    assert family_of(CONFIG) is TOY
    register_family(TOY)  # again: nothing happens
    assert families().count(TOY) == 1
    with pytest.raises(ValueError, match="another family"):
        register_family(replace(TOY, no_gguf="another"))
