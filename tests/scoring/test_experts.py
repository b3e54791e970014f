"""Sorted experts against transformers' own eager experts."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from allocator.errors import CheckpointError
from allocator.families import Role
from allocator.scoring.experts import (
    ExpertCode,
    ExpertForm,
    differentiable_experts,
    routed_experts,
    use_observer,
    use_sorted_experts,
)
from allocator.scoring.streamed_model import Routing, add_expert
from allocator.scoring.swap_model import parameter_name, resize_experts, view_of

torch.set_num_threads(1)


@pytest.fixture(params=["deepseek", "qwen3"])
def model(request, checkpoints):
    config = AutoConfig.from_pretrained(checkpoints[request.param])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model


def inputs(n_tokens, k, chosen=range(8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    pick = torch.rand(n_tokens, len(chosen), generator=generator).argsort(1)[:, :k]
    index = torch.tensor(list(chosen))[pick]
    gates = torch.rand(n_tokens, k, generator=generator)
    return torch.randn(n_tokens, 64, generator=generator), index, gates


@pytest.mark.parametrize(
    ("n_tokens", "k", "chosen"),
    [(33, 2, range(8)), (33, 1, range(8)), (1, 2, range(8)), (20, 2, (1, 6)), (9, 8, range(8))],
)
@torch.inference_mode()
def test_equals_transformers_eager_experts(model, n_tokens, k, chosen):
    experts = model.model.layers[1].mlp.experts
    for p in experts.parameters():
        p.copy_(torch.randn(p.shape) / 8)
    hidden, index, gates = inputs(n_tokens, k, tuple(chosen))
    expected = experts(hidden, index, gates)
    before = hidden.clone(), gates.clone()
    found = routed_experts(experts, hidden, index, gates)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(hidden, before[0])
    assert torch.equal(gates, before[1])


@torch.inference_mode()
def test_the_model_runs_them_and_an_observer_changes_nothing(model):
    ids = torch.randint(512, (2, 19), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    seen = []
    layers = tuple(range(model.config.num_hidden_layers))[1:]
    use_sorted_experts(model, layers)
    plain = model(ids).logits
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    use_observer(model, 1, lambda expert, *values: seen.append((expert, *map(len, values))))
    assert torch.equal(model(ids).logits, plain)
    assert sum(n for _, n, *_ in seen) == 2 * 19 * 2
    assert [expert for expert, *_ in seen] == sorted({expert for expert, *_ in seen})
    seen.clear()
    use_observer(model, 1, None)
    model(ids)
    assert not seen


# -- experts that are stored, or computed, in another way


def experts_of(model):
    """The last layer's, by the class that transformers marks."""
    return [m for m in model.modules() if hasattr(m, "is_transposed")][-1]


WIDTHS = {"gpt_oss": 48, "nemotron_h": 24, "deepseek_v4": 48, "gemma4_text": 24}
SPECIAL = sorted(WIDTHS)


@pytest.mark.parametrize("name", SPECIAL)
def test_the_form_is_what_the_parameters_shapes_say(tiny, name):
    experts = experts_of(tiny(name))
    form = ExpertForm.of(experts)
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    width, hidden = WIDTHS[name], 16 if name == "nemotron_h" else 32
    first, down = form.stacked(experts)
    assert first.shape == (8, (2 if form.gated else 1) * width, hidden)
    assert down.shape == (8, hidden, width)
    assert form.gated == ("gate_up_proj" in shapes)
    assert form.biased == ("down_proj_bias" in shapes)
    assert (shapes["down_proj"] == (8, width, hidden)) == form.transposed
    assert form.interleaved == (name == "gpt_oss")


def asked(experts, n_tokens=33):
    generator = torch.Generator().manual_seed(1)
    hidden = ExpertForm.of(experts).stacked(experts)[1].shape[1]
    _, index, gates = inputs(n_tokens, 2)
    return 2 * torch.randn(n_tokens, hidden, generator=generator), index, gates


@pytest.mark.parametrize("name", SPECIAL)
def test_special_experts_equal_those_of_transformers(tiny, name):
    experts = experts_of(tiny(name))
    hidden, index, gates = asked(experts)
    expected = experts(hidden, index, gates)
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(
        routed_experts(experts, hidden, index, gates), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", SPECIAL)
def test_special_experts_have_the_gradients_of_transformers(tiny, name):
    experts = experts_of(tiny(name))
    hidden, index, gates = asked(experts)
    leaves = [hidden.requires_grad_(), gates.requires_grad_(), *experts.parameters()]
    experts.requires_grad_(True)
    products = []
    try:
        output = differentiable_experts(
            experts, hidden, index, gates, watch=lambda *values: products.append(values)
        )
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        found = torch.autograd.grad((output * weights).sum(), leaves)
        expected = torch.autograd.grad((experts(hidden, index, gates) * weights).sum(), leaves)
    finally:
        experts.requires_grad_(False)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    form = ExpertForm.of(experts)
    for expert, kind, x, product in products:
        stacked, bias = (
            each[kind == "down"] for each in (form.stacked(experts), form.biases(experts))
        )
        expected = x @ stacked[expert].T + (0 if bias is None else bias[expert])
        torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("name", SPECIAL)
def test_special_experts_one_by_one_equal_those_of_transformers(tiny, name):
    """From matrices of gate, up and down apart, as a checkpoint that is streamed has them."""
    experts = experts_of(tiny(name))
    hidden, index, gates = asked(experts)
    form = ExpertForm.of(experts)
    first, down = form.stacked(experts)
    halves = [half.transpose(1, 2) for half in form.halves(first.transpose(1, 2))]
    routing = Routing([(hidden, index, gates)], range(8), form.biases(experts))
    for expert in sorted(routing.reached):
        weights = [stacked[expert].contiguous() for stacked in (*halves, down)]
        add_expert([routing], expert, weights, ExpertCode(experts), None)
    output = torch.zeros(1, *hidden.shape)
    routing.add_to([output])
    torch.testing.assert_close(output[0], experts(hidden, index, gates), rtol=1e-5, atol=1e-5)


def test_retained_experts_have_their_own_biases(tiny):
    experts = experts_of(tiny("gpt_oss"))
    retained = [1, 4, 6]
    hidden, _, gates = asked(experts)
    index = torch.randint(3, gates.shape, generator=torch.Generator().manual_seed(0))
    expected = experts(hidden, torch.tensor(retained)[index], gates)
    form = ExpertForm.of(experts)
    biases = tuple(bias[retained] for bias in form.biases(experts))
    routing = Routing([(hidden, index, gates)], retained, biases)
    first, down = form.stacked(experts)
    for expert in sorted(routing.reached):
        weights = [*(first[expert][start::2] for start in (0, 1)), down[expert]]
        add_expert([routing], expert, weights, ExpertCode(experts), None)
    output = torch.zeros(1, *hidden.shape)
    routing.add_to([output])
    torch.testing.assert_close(output[0], expected, rtol=1e-5, atol=1e-5)


def test_groups_of_gate_and_up_are_views_of_what_is_interleaved_and_transposed(tiny):
    experts = experts_of(tiny("gpt_oss"))
    form = ExpertForm.of(experts)
    expected = {
        Role.EXPERT_GATE: experts.gate_up_proj[..., ::2].transpose(1, 2),
        Role.EXPERT_UP: experts.gate_up_proj[..., 1::2].transpose(1, 2),
        Role.EXPERT_DOWN: experts.down_proj.transpose(1, 2),
    }
    names = dict.fromkeys(expected, "gate_up_proj") | {Role.EXPERT_DOWN: "down_proj"}
    for role, values in expected.items():
        group = SimpleNamespace(role=role, layer=2, name=str(role))
        parameter = getattr(experts, names[role]).clone()
        view = view_of({parameter_name(group, form): parameter}.__getitem__, None, group, form)
        assert torch.equal(view, values)
        view.zero_()  # in the parameter itself
        assert float(parameter.abs().sum()) == pytest.approx(
            float(getattr(experts, names[role]).abs().sum() - values.abs().sum()), rel=1e-5
        )


def test_biases_are_resized_with_their_experts():
    model, layer = torch.nn.Module(), torch.nn.Module()
    model.model = torch.nn.Module()
    layer.mlp = torch.nn.Module()
    layer.mlp.gate = torch.nn.Module()
    layer.mlp.experts = torch.nn.Module()
    for name, shape in {"gate_up_proj": (8, 4, 6), "gate_up_proj_bias": (8, 6)}.items():
        layer.mlp.experts.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    model.model.layers = torch.nn.ModuleList([layer])
    resize_experts(model, 0, 5)
    assert layer.mlp.experts.gate_up_proj_bias.shape == (5, 6)
    assert layer.mlp.experts.gate_up_proj.shape == (5, 4, 6)


def test_what_no_attribute_is_about_is_refused():
    with pytest.raises(CheckpointError, match="a norm after each expert"):
        ExpertForm.of(SimpleNamespace(has_post_expert_norm=True))
