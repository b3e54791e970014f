"""Names of transformers and llama.cpp, against the checkpoints and tables that those write."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.errors import CheckpointError
from allocator.families import (
    Role,
    Support,
    families,
    family_of,
    planned_family_of,
    registry,
)

DEEPSEEK_V3, QWEN3_MOE = families(Support.READ)[:2]


@pytest.mark.parametrize("family", families(), ids=lambda f: f.model_type)
@given(layer=st.integers(0, 999_999), expert=st.integers(0, 999_999))
def test_a_pattern_matches_what_it_makes(family, layer, expert):
    for rule in family.rules:
        name = rule.pattern.format(layer=layer, expert=expert)
        expected = tuple(
            n if f"{{{k}}}" in rule.pattern else None
            for k, n in (("layer", layer), ("expert", expert))
        )
        assert family.match(name) == (rule, *expected)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.01.mlp.gate.weight",  # would be a second tensor of layer 1
        "model.layers.٣.mlp.gate.weight",
        f"model.layers.{'9' * 5000}.mlp.gate.weight",
        "model.layers.-1.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight.scale",
        "xmodel.layers.1.mlp.gate.weight",
        "modelxlayers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight\n",
    ],
)
def test_foreign_names_match_nothing(name):
    assert DEEPSEEK_V3.match(name) is None
    assert QWEN3_MOE.match(name) is None


def test_roles():
    assert [r for r in Role if r.is_expert] == ["experts.gate", "experts.up", "experts.down"]
    routers = ["router", "router_bias", "experts.bias", "experts.scale"]
    assert [r for r in Role if r.has_row_per_expert] == routers
    kept = [r for r in Role if not r.is_encoded]
    names = (
        "norm router router_bias shared.router linear.ab linear.state ssm.state conv.kernel "
        "bias experts.bias experts.scale layer.scale nextn"
    )
    assert kept == names.split()


def test_family_of():
    assert family_of({"model_type": "qwen3_moe"}) is QWEN3_MOE
    for config in ({}, {"model_type": "llama"}, {"model_type": None}):
        with pytest.raises(CheckpointError, match="supported: deepseek_v3, qwen3_moe, "):
            family_of(config)
    with pytest.raises(CheckpointError, match="not supported yet"):
        family_of({"model_type": ["qwen3_moe"]})


def test_planned_families_are_for_planning_alone(monkeypatch):
    family = replace(QWEN3_MOE, model_type="mine", support=Support.PLANNED)
    with pytest.raises(CheckpointError, match=r"supported: .*, qwen3_moe[a-z0-9_, ]*$"):
        planned_family_of({"model_type": "mine"})
    monkeypatch.setitem(registry._FAMILIES, "mine", family)
    assert families(Support.PLANNED) == (family,)
    assert planned_family_of({"model_type": "mine"}) is family
    with pytest.raises(
        CheckpointError, match="sizes alone are known: `allocator plan` works with it"
    ):
        family_of({"model_type": "mine"})
    with pytest.raises(CheckpointError, match=r"supported: .*; planned .*: mine"):
        planned_family_of({"model_type": "llama"})


def test_number_of_experts():
    assert QWEN3_MOE.n_experts_key({"num_local_experts": 8}) == "num_local_experts"
    assert DEEPSEEK_V3.n_experts_key({"n_routed_experts": 8}) == "n_routed_experts"
    with pytest.raises(CheckpointError, match="no num_experts or num_local_experts"):
        QWEN3_MOE.n_experts_key({})


def test_gguf_name_of_a_role():
    assert DEEPSEEK_V3.gguf_name(Role.EXPERT_DOWN, 3) == "blk.3.ffn_down_exps.weight"
    assert DEEPSEEK_V3.gguf_name(Role.K_B, 0) == "blk.0.attn_k_b.weight"
    assert QWEN3_MOE.gguf_name(Role.EMBEDDING, None) == "token_embd.weight"


@pytest.mark.parametrize("method", ["noaux_tc", None])
def test_a_choice_of_experts_that_transformers_does_not_know_is_refused(method):
    config = {
        "model_type": "deepseek_v2", "n_routed_experts": 8, "num_experts_per_tok": 2,
        "topk_method": method,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"topk_method is .*, needed greedy or group_limited"):
        family_of(config).router(config)
