"""What every family must do, as test cases that a family's own test class inherits.

In: the class attributes `family` and `config`. Out: tests for pytest. Invariant: names and shapes
are compared with what transformers builds and saves, names and keys of a GGUF file with gguf-py's
own tables, never with the family's table itself.

    class TestMine(FamilyConformance):
        family = MINE
        config = {"model_type": "mine", ...}
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

from allocator.checkpoint.outline import planned_inventory
from allocator.checkpoint.safetensors import read_header
from allocator.errors import CheckpointError, TargetError
from allocator.families import Family, Role, Support, family_of, planned_family_of
from allocator.targets import GGUF, SAFETENSORS

_LAYERS, _EXPERTS = (0, 7, 999_999), (0, 12, 999_999)


class FamilyConformance:
    """Tests of one family.

    Attributes:
        family: under test, registered.
        config: a small `config.json` of it, whose model has every kind of tensor that a config can
            ask for, without multi-token prediction.
        in_transformers: whether transformers builds its model.
        saved_as_read: whether transformers saves tensors under the names that are read, and not the
            experts of a layer in one; then only weights are counted.
        without_gguf_names: roles whose rules llama.cpp's architecture has no tensor for, since the
            rules are those of several architectures.
    """

    family: Family
    config: dict[str, Any]
    in_transformers = True
    saved_as_read = True
    without_gguf_names: tuple[Role, ...] = ()

    # -- names

    def test_is_registered(self) -> None:
        """Checks that `config.json` leads to the family; a planned family refuses checkpoints."""
        assert planned_family_of(self.config) is self.family
        if self.family.support is Support.READ:
            assert family_of(self.config) is self.family
        else:
            with pytest.raises(CheckpointError, match="whose sizes alone are known"):
                family_of(self.config)

    def test_names_round_trip(self) -> None:
        """Checks that every rule matches the names that it makes, and that no other rule does."""
        for rule in self.family.rules:
            for layer, expert in zip(_LAYERS, _EXPERTS, strict=True):
                for pattern in (rule.pattern, *rule.aliases):
                    name = pattern.format(layer=layer, expert=expert)
                    numbers = (
                        layer if rule.has_layer else None,
                        expert if rule.has_expert else None,
                    )
                    assert self.family.match(name) == (rule, *numbers)
                    assert [r for r in self.family.rules if r.match(name)] == [rule]
                    assert not self.family.is_ignored(name)
                    assert not self.family.is_computed(name)
                    for other in (f"{name}.scale", f"x{name}", f"{name}\n"):
                        assert self.family.match(other) is None

    def test_matrices_have_one_role_each(self) -> None:
        """Checks that an encoded role names one matrix of a layer, or one per expert."""
        encoded = [rule.role for rule in self.family.rules if rule.role.is_encoded]
        assert len(encoded) == len(set(encoded))
        assert {Role.EMBEDDING, Role.ROUTER} <= self.family.roles
        of_experts = {r.role for r in self.family.rules if r.has_expert}
        assert of_experts | {Role.EXPERT_GATE} == {r for r in Role if r.is_expert}

    def test_stacks_hold_roles_of_experts(self) -> None:
        """Checks that a tensor with the experts of a layer leads to rules of single experts."""
        for stack in self.family.stacks:
            name = stack.pattern.format(layer=3)
            assert self.family.match_stack(name) == (stack, 3)
            assert self.family.match(name) is None
            assert all(self.family.rule_of(role).has_expert for role in stack.roles)

    def test_layers_are_made_of_rules(self) -> None:
        """Checks that every layer of the config is one of the family's, made of its rules."""
        parts = {rule.part for rule in self.family.rules if rule.has_layer}
        assert all(layer <= parts for layer in self.family.layers)
        config = self.family.text_config(self.config)
        for layer in range(self.family.n_layers(self.config)):
            assert self.family.layer_parts(config, layer) in self.family.layers

    # -- the config

    def test_needed_keys_are_checked(self) -> None:
        """Checks that a config without a needed count or width is refused by the key's name."""
        keys = self.family.keys
        self.family.check(self.config, "config.json")
        for key in (keys.layers, keys.hidden, keys.vocabulary, keys.experts_used):
            for value in (None, 0, "4", True, 2**40):
                with pytest.raises(CheckpointError, match=key):
                    self.family.check(self.changed(key, value), "config.json")
        used = self.family.n_experts(self.config) + 1
        with pytest.raises(CheckpointError, match=f"{used} of .* experts used"):
            self.family.check(self.changed(keys.experts_used, used), "config.json")

    def test_dimensions_are_the_configs(self) -> None:
        """Sizes stand under the keys that the family names."""
        config, keys = self.family.text_config(self.config), self.family.keys
        dimensions = self.family.dimensions(self.config)
        assert dimensions.hidden == config[keys.hidden]
        assert dimensions.vocabulary == config[keys.vocabulary]
        assert dimensions.n_layers == self.family.n_layers(self.config) == config[keys.layers]
        assert dimensions.heads == config[keys.heads]
        assert dimensions.experts == config[self.family.n_experts_key(self.config)]
        assert (dimensions.latent is None) == (keys.latent is None)
        router = self.family.router(self.config)
        assert 1 <= router.groups_used <= router.groups
        used = self.family.experts_used(self.config)
        assert used <= router.least_experts(used) <= dimensions.experts

    def test_safetensors_lays_out_every_tensor(self) -> None:
        """Groups and full-precision tensors are all tensors that the config asks for."""
        inventory = planned_inventory(self.config)
        layout = SAFETENSORS.layout(inventory)
        sources = [name for group in layout.groups.values() for name in group.sources]
        sources += [tensor.source for tensor in layout.full_precision]
        assert sorted(sources) == sorted(inventory.tensors)
        weights = sum(prod(group.shape) for group in layout.groups.values())
        assert weights == inventory.n_searched_weights

    def test_shapes_are_those_of_transformers(self, tmp_path: Path) -> None:
        """Checks names and shapes against a model of the config that transformers saves."""
        if not self.in_transformers:
            pytest.skip("transformers has no such model")
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        (tmp_path / "config.json").write_text(json.dumps(self.config))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        shapes = {t.name: t.shape for t in planned_inventory(self.config).tensors.values()}
        if self.saved_as_read:
            model.to(torch.bfloat16).save_pretrained(tmp_path)
            header = read_header(next(_weights(tmp_path)))
            assert dict(self._read(name, shape) for name, _, shape, *_ in header) == shapes
        else:
            stored = set(model.state_dict(keep_vars=True).values())  # a tied head is one of them
            assert sum(t.numel() for t in stored) == sum(map(prod, shapes.values()))

    def _read(self, stored: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """What the family calls a tensor that is stored under this name, and in which shape."""
        match = self.family.match(stored)
        assert match is not None, stored
        rule, layer, expert = match
        name = rule.pattern.format(layer=layer, expert=expert)
        return name, shape[1:] if rule.in_one_row else shape

    # -- llama.cpp

    def test_gguf_or_a_reason(self) -> None:
        """Checks that target gguf lays the model out, or refuses it with the family's reason."""
        inventory = planned_inventory(self.config)
        if self.family.gguf is None:
            reason = f"{self.family.model_type}: {self.family.no_gguf}"
            with pytest.raises(TargetError, match=reason):
                GGUF.layout(inventory)
        else:
            layout = GGUF.layout(inventory)
            weights = sum(prod(group.shape) for group in layout.groups.values())
            assert weights == inventory.n_searched_weights

    def test_gguf_names_are_llama_cpps(self) -> None:
        """Checks that gguf-py lists every tensor's name for the architecture."""
        if self.family.gguf is None:
            pytest.skip("no file is written for llama.cpp")
        if self.family.gguf.architecture not in MODEL_ARCH_NAMES.values():
            pytest.skip("gguf-py does not know the architecture")
        known = MODEL_TENSORS[_architecture(self.family.gguf.architecture)]
        names = {TENSOR_NAMES[kind].replace("{bid}", "{layer}") for kind in known}
        rules = [r for r in self.family.rules if r.role not in self.without_gguf_names]
        for name in (*(r.gguf for r in rules), *(part.name for part in self.family.gguf.parts)):
            assert name is not None
            for ending in (".weight", ".bias", ".scale"):
                name = name.removesuffix(ending)
            assert name in names

    def test_gguf_keys_are_llama_cpps(self) -> None:
        """Checks keys against gguf-py's; a value that llama.cpp hard-codes otherwise is refused."""
        inventory = planned_inventory(self.config)
        part = self.family.gguf
        if part is None:
            pytest.skip("no file is written for llama.cpp")
        counts = {"n_experts": inventory.n_experts, "experts_used": inventory.experts_used}
        if part.hyperparameters is None:
            with pytest.raises(TargetError, match="is not known"):
                list(part.pairs(inventory.facts, **counts))
            return
        pairs = list(part.pairs(inventory.facts, **counts))
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys))
        assert set(keys) <= {key.replace("{arch}", part.architecture) for key in _known_keys()}
        assert all(type(value) in (bool, int, float, str, tuple) for _, value in pairs)
        for fixed in part.fixed:
            other: Any = "another" if isinstance(fixed.value, str) else not fixed.value
            if isinstance(fixed.value, float):
                other = fixed.value + 1
            changed = planned_inventory(self.changed(fixed.key, other))
            with pytest.raises(TargetError, match=fixed.key):
                list(part.pairs(changed.facts, **counts))

    def changed(self, key: str, value: Any) -> dict[str, Any]:
        """Returns the config with another value, in the language model's own config if nested."""
        inner = self.family.text_key
        if inner is None or inner not in self.config:
            return {**self.config, key: value}
        return {**self.config, inner: {**self.config[inner], key: value}}


def _weights(folder: Path) -> Any:
    return folder.glob("*.safetensors")


def _architecture(name: str) -> MODEL_ARCH:
    return next(arch for arch, known in MODEL_ARCH_NAMES.items() if known == name)


def _known_keys() -> set[str]:
    """Every key that gguf-py has a name for."""
    tables = [table for table in vars(gguf.Keys).values() if isinstance(table, type)]
    return {key for table in tables for key in vars(table).values() if isinstance(key, str)}
