"""Layers in two steps against transformers' own layers."""

import pytest
import torch

from allocator.scoring.experts import ExpertForm, routed_experts
from allocator.scoring.layer_arguments import LayerArguments
from allocator.scoring.split_layers import SplitLayers
from allocator.scoring.streamed_model import Routing

torch.set_num_threads(1)
ADDS = {
    "mixtral": True,
    "qwen3_next": True,
    "gpt_oss": True,
    "afmoe": False,  # a norm follows
    "laguna": False,  # a factor
    "gemma4_text": False,  # two norms, and a factor of the layer
    "nemotron_h": False,  # a projection
    "cohere2_moe": True,
}


@pytest.fixture(params=ADDS)
def name(request):
    return request.param


@pytest.fixture
def split(tiny, name):
    """The layers of a tiny model in two steps, their experts, and inputs and outputs as a whole."""
    model = tiny(name)
    blocks = {
        layer: [m for m in module.modules() if hasattr(m, "is_transposed")]
        for layer, module in enumerate(model.model.layers)
    }
    experts = {layer: found[0] for layer, found in blocks.items() if found}
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(2, 13, 32, generator=generator)
    whole = LayerArguments(model)
    outputs = [whole.run(layer, hidden) for layer in range(3)]
    before = {layer: module.forward for layer, module in experts.items()}
    yield SplitLayers(model, experts), experts, hidden, outputs
    for layer, forward in before.items():
        experts[layer].forward = forward


def test_what_a_layer_adds_is_known(split, name):
    layers, experts, hidden, _ = split
    for layer in range(3):
        assert layers.adds(layer, hidden) == (layer not in experts or ADDS[name])
    assert experts
    assert layers.taken() == []


@torch.no_grad()
def test_both_steps_give_the_layer(split, name):
    layers, experts, hidden, outputs = split
    for layer, expected in enumerate(outputs):
        if layer not in experts:
            assert torch.equal(layers.run(layer, hidden), expected)
            continue
        layers.ask(layer, hidden)
        (routed,) = layers.taken()
        experts_sum = routed_experts(experts[layer], *routed)
        output = layers.run(layer, hidden, experts_sum)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        added = layers.run(layer, hidden)
        assert len(layers.taken()) == 2  # of both runs
        if experts_sum.shape[-1] == 32:
            added = added + experts_sum.view_as(hidden)
            assert torch.allclose(added, expected, rtol=1e-5, atol=1e-5) == ADDS[name]


def test_sums_are_by_batch(split):
    layers, experts, hidden, _ = split
    layer = max(experts)
    batches = [hidden, hidden[:1, :5]]
    for batch in batches:
        layers.ask(layer, batch)
    routed = layers.taken()
    routing = Routing(routed, range(8), ExpertForm.of(experts[layer]).biases(experts[layer]))
    tokens = torch.arange(2 * 13 + 5)
    values = torch.randn(len(tokens), routed[0][0].shape[-1])
    routing.add(tokens, values)
    parts = routing.sums()
    assert [len(part) for part in parts] == [26, 5]
    assert torch.equal(torch.cat(list(parts)), values)


def test_what_runs_for_nobody_is_marked(split, tiny, name):
    """While a layer is asked or tried, hooks are told so."""
    layers, experts, hidden, _ = split
    layer, seen = max(experts), []
    watched = [m for m in tiny(name).model.layers[layer].modules() if type(m) is torch.nn.Linear]

    def see(module, *_):
        if not layers.asking:
            seen.append(module)

    hooks = [module.register_forward_hook(see) for module in watched]
    layers.adds(layer, hidden)
    layers.ask(layer, hidden)
    assert seen == []
    ((asked, *_),) = layers.taken()
    layers.run(layer, hidden, torch.ones_like(asked))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(watched)
    assert set(seen) == set(watched)
