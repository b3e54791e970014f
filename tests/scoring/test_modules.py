"""Where experts, router and last norm are, in architectures that have them in other places."""

from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from allocator.errors import CheckpointError
from allocator.families import family_of
from allocator.scoring.modules import (
    block_path,
    expert_rows,
    experts_path,
    last_norm,
    router_path,
    routing_modules,
)
from allocator.scoring.swap_model import resize_experts, resize_router, set_experts_used

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 64, "num_experts": 8, "num_local_experts": 8,
    "moe_intermediate_size": 32, "intermediate_size": 48, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "num_dense_layers": 1,
    "first_k_dense_replace": 1, "n_routed_experts": 8,
}  # fmt: skip
PLACES = {  # block and router of layer 2, what has a row per expert, and the last norm
    "qwen3_moe": ("mlp", "gate", ("gate.weight",), "norm"),
    "gpt_oss": ("mlp", "router", ("router.weight", "router.bias"), "norm"),
    "lfm2_moe": ("feed_forward", "gate", ("gate.weight", "expert_bias"), "embedding_norm"),
    "afmoe": ("mlp", "router", ("router.gate.weight", "expert_bias"), "norm"),
    "minimax_m2": ("mlp", "gate", ("gate.weight", "e_score_correction_bias"), "norm"),
    "deepseek_v3": ("mlp", "gate", ("gate.weight", "gate.e_score_correction_bias"), "norm"),
}


def model_of(model_type):
    kinds = {"layer_types": ["conv", "full_attention", "conv"]} if model_type == "lfm2_moe" else {}
    config = AutoConfig.for_model(model_type, **SIZES, **kinds)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", PLACES)
def test_experts_their_router_and_the_last_norm(model_type):
    block, router, rows, norm = PLACES[model_type]
    model, layer = model_of(model_type), "model.layers.2"
    assert experts_path(model, 2) == f"{layer}.{block}.experts"
    assert block_path(model, 2) == f"{layer}.{block}"
    assert router_path(model, 2) == f"{layer}.{block}.{router}"
    assert [name for name, *_ in expert_rows(model, 2)] == [f"{layer}.{block}.{r}" for r in rows]
    assert last_norm(model) is getattr(model.model, norm)


@pytest.mark.parametrize("model_type", PLACES)
def test_a_resized_router_chooses_among_its_experts(model_type):
    model = model_of(model_type)
    resize_router(model, 2, 5)
    set_experts_used(model, family_of(model.config.to_dict()), (2,), 3)
    for _, module, name in expert_rows(model, 2):
        assert getattr(module, name).shape[0] == 5
        with torch.no_grad():
            getattr(module, name).normal_()
    block, chosen = model.get_submodule(block_path(model, 2)), []

    def experts(hidden, index, gates):
        chosen.append(index)
        return torch.zeros_like(hidden)

    model.get_submodule(experts_path(model, 2)).forward = experts
    if hasattr(block, "shared_experts"):
        block.shared_experts.forward = torch.zeros_like
    block(torch.randn(1, 4, 64))
    assert chosen[0].shape == (4, 3)
    assert int(chosen[0].max()) < 5


@pytest.mark.parametrize("model_type", ["lfm2_moe", "afmoe", "deepseek_v3"])
def test_dense_layers_have_none(model_type):
    assert experts_path(model_of(model_type), 0) is None


def test_what_routes_is_the_block_and_the_router():
    model = model_of("gpt_oss")
    block = model.model.layers[2].mlp
    assert list(routing_modules(model, 2)) == [block, block.router]


@pytest.mark.parametrize("model_type", [*PLACES, "ernie4_5_moe"])
def test_one_retained_expert_may_be_several_again(model_type):
    model = model_of(model_type)

    def shapes():
        rows = {name: getattr(module, own).shape for name, module, own in expert_rows(model, 2)}
        experts = model.get_submodule(experts_path(model, 2)).named_parameters()
        return rows | {name: tensor.shape for name, tensor in experts}

    before = shapes()
    n_experts = model.get_submodule(experts_path(model, 2)).num_experts
    for n in (1, n_experts):
        resize_experts(model, 2, n)
    assert shapes() == before


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_a_model_that_does_not_say_how_many_are_used_is_refused(model_type):
    model = model_of(model_type)
    for module in routing_modules(model, 2):
        if hasattr(module, "top_k"):
            del module.top_k
    with pytest.raises(CheckpointError, match=r"Router has no top_k, needed what says how many"):
        set_experts_used(model, family_of(model.config.to_dict()), (2,), 3)


def test_a_router_whose_config_does_not_say_is_refused():
    model = model_of("qwen3_moe")
    model.model.layers[2].mlp.gate.config = PretrainedConfig(num_experts_per_tok=4)
    family = replace(family_of(model.config.to_dict()), router_reads_config=True)
    set_experts_used(model, family, (2,), 3)
    assert model.model.layers[2].mlp.gate.config.num_experts_per_tok == 3
    other = replace(family, keys=replace(family.keys, experts_used="experts_chosen"))
    with pytest.raises(CheckpointError, match=r"Router has no config\.experts_chosen, needed"):
        set_experts_used(model, other, (2,), 3)


def test_a_router_of_another_name_is_refused():
    model = model_of("qwen3_moe")
    block = model.model.layers[2].mlp
    block.chooser = block.gate
    del block.gate
    with pytest.raises(CheckpointError, match="has experts, but no gate or router"):
        router_path(model, 2)
