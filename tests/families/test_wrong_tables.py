"""A wrong table of a family fails the cases that we ship, in the case that is meant for it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from allocator.errors import VerifyError
from allocator.families import Family, Role, family_of, registry
from allocator.families.gguf import Pair
from allocator.testing.family_runs import SMALL, FamilyRuns, random_checkpoint

MIXTRAL = SMALL | {"model_type": "mixtral", "num_local_experts": 8}
GLM = SMALL | {
    "model_type": "glm4_moe", "first_k_dense_replace": 1, "moe_intermediate_size": 96,
    "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.5, "norm_topk_prob": True, "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
GPT_OSS = SMALL | {  # as wide as its experts, as released
    "model_type": "gpt_oss", "intermediate_size": 64, "num_local_experts": 8, "sliding_window": 16,
}  # fmt: skip
LITE = SMALL | {
    "model_type": "glm4_moe_lite", "moe_intermediate_size": 96, "n_routed_experts": 8,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8,
    "norm_topk_prob": True, "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_nextn_predict_layers": 0, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip


MIXED = SMALL | {
    "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 32, "num_experts": 8,
    "shared_expert_intermediate_size": 32, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
}  # fmt: skip


def without(family: Family, key: str, value: object = None) -> Family:
    """The family whose files do not say one thing, or say it wrongly."""
    gguf = family.for_gguf()
    hyperparameters = gguf.hyperparameters

    def pairs(facts) -> Iterator[Pair]:
        for name, own in hyperparameters(facts):
            if name != key:
                yield name, own
            elif value is not None:
                yield name, value

    return replace(family, gguf=replace(gguf, hyperparameters=pairs))


def swapped(family: Family) -> Family:
    """The family that takes gate for up, and up for gate, on disk."""
    names = {Role.EXPERT_GATE: ".w3.", Role.EXPERT_UP: ".w1."}

    def rule(rule):
        if rule.role not in names:
            return rule
        before = {Role.EXPERT_GATE: ".w1.", Role.EXPERT_UP: ".w3."}[rule.role]
        (alias,) = rule.aliases
        return replace(rule, aliases=(alias.replace(before, names[rule.role]),))

    return replace(family, rules=tuple(map(rule, family.rules)))


def alternating(family: Family) -> Family:
    """The family that takes gate and up for rows in turns."""
    return replace(family, stacks=tuple(replace(s, alternating=True) for s in family.stacks))


def not_transposed(family: Family) -> Family:
    """The family that takes a square stack for one that is not transposed."""
    return replace(family, stacks=tuple(replace(s, transposed=False) for s in family.stacks))


def one_after_the_other(family: Family) -> Family:
    """The family that takes gate and up for one after the other."""
    return replace(family, stacks=tuple(replace(s, alternating=False) for s in family.stacks))


def untransformed(family: Family) -> Family:
    """The family whose norms do not add one."""

    def rule(rule):
        return replace(rule, adds_one=False) if rule.role is Role.NORM else rule

    return replace(family, rules=tuple(map(rule, family.rules)))


class Runs(FamilyRuns):
    rounding = 1e-4


RUNS = Runs()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Checkpoints of configs, each made once, and which runs passed with the right tables."""
    made, passed = {}, set()

    def case_of(config):
        kind = config["model_type"]
        if kind not in made:
            made[kind] = random_checkpoint(config, tmp_path_factory.mktemp(kind))
        return made[kind]

    return case_of, passed


@pytest.mark.parametrize(
    ("config", "wrong", "case_of"),
    [
        (GLM, lambda f: without(f, "expert_weights_norm", value=False), "llama_cpp"),
        (GLM, lambda f: without(f, "expert_weights_scale"), "llama_cpp"),
        (GLM, lambda f: without(f, "rope.dimension_count"), "llama_cpp"),
        (LITE, lambda f: without(f, "expert_gating_func"), "llama_cpp"),
        (MIXTRAL, lambda f: replace(f, gguf=replace(f.gguf, row_orders={})), "llama_cpp"),
        (MIXTRAL, swapped, "in_memory"),
        (MIXTRAL, alternating, "stacked"),
        (GPT_OSS, not_transposed, "in_memory"),
        (GPT_OSS, one_after_the_other, "in_memory"),
        (MIXED, lambda f: without(f, "full_attention_interval", value=3), "llama_cpp"),
        (MIXED, lambda f: replace(f, gguf=replace(f.gguf, column_orders={})), "llama_cpp"),
        (MIXED, untransformed, "llama_cpp"),
    ],
    ids=[
        "normalization", "scale", "rotation", "gating", "row order", "gate and up", "alternating",
        "transposed", "not alternating", "order of layer types", "column order", "values",
    ],
)  # fmt: skip
def test_a_wrong_table_fails(config, wrong, case_of, cases, tmp_path, monkeypatch):
    made, passed = cases
    case = made(config)
    run = {
        "llama_cpp": lambda: RUNS.test_llama_cpp_computes_the_same(case, tmp_path, pruned=False),
        "in_memory": lambda: RUNS.test_in_memory_is_transformers(case),
        "stacked": lambda: RUNS.test_stacked_experts_are_the_same(case, tmp_path, transposed=False),
    }[case_of]
    right = family_of(config)
    if (right.model_type, case_of) not in passed:
        run()
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        passed.add((right.model_type, case_of))
    monkeypatch.setitem(registry._FAMILIES, right.model_type, wrong(right))
    with pytest.raises((AssertionError, VerifyError)):  # llama.cpp does not load some at all
        run()


def test_no_part_of_a_table_is_without_effect():
    """What moves places is of an encoded role, once; what changes values is of others."""
    family = family_of(MIXED)
    gguf = family.gguf
    order = gguf.column_orders[Role.LINEAR_OUT]
    with pytest.raises(AssertionError, match="qwen35moe"):
        replace(gguf, row_orders={Role.LINEAR_OUT: order})
    with pytest.raises(AssertionError, match="qwen3_5_moe_text"):
        replace(family, gguf=replace(gguf, row_orders={Role.NORM: order}))
    changed = {r.role: r.transforms for r in family.rules}[Role.LINEAR_AB]
    rules = tuple(replace(r, transforms=changed) if r.role is Role.Q else r for r in family.rules)
    with pytest.raises(AssertionError, match="qwen3_5_moe_text"):
        replace(family, rules=rules)
