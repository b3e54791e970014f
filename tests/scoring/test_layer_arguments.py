"""Layers that run on their own against transformers' own loop over them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from allocator.scoring.layer_arguments import LaterStart, LayerArguments, record_arguments

torch.set_num_threads(1)
FAMILIES = [
    "qwen3_next",
    "gpt_oss",
    "afmoe",
    "laguna",
    "gemma4_text",
    "nemotron_h",
    "granitemoehybrid",
    "cohere2_moe",
]


def ids(n_documents=2, length=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 96, (n_documents, length), generator=generator)


def run(model, tokens):
    """What enters the layers and then the last norm, and what the norm gives."""
    states = []
    hooks = [
        layer.register_forward_hook(lambda _, args, output: states.extend([args[0], output]))
        for layer in model.model.layers
    ]
    last = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [*states[::2], states[-1]], last


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_layers_one_by_one_compute_what_the_model_does(tiny, name):
    model = tiny(name)
    layers = LayerArguments(model)
    for shape in [(2, 13), (1, 9)]:
        states, _ = run(model, ids(*shape))
        for layer in range(3):
            assert torch.equal(layers.run(layer, states[layer]), states[layer + 1]), layer


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("first", [1, 2])
@torch.inference_mode()
def test_a_pass_that_begins_later_gives_the_same(tiny, name, first):
    model, start = tiny(name), LaterStart()
    chosen = [ids(seed=seed) for seed in range(4)]
    expected = [run(model, tokens) for tokens in chosen]

    @torch.inference_mode()
    def later(number):
        start.state = expected[number][0][first]
        # the tokens are others: nothing but what enters the layer may matter
        return model.model(input_ids=ids(seed=9), use_cache=False).last_hidden_state

    with start.at(model, first), ThreadPoolExecutor(2) as pool:
        for output, (_, last) in zip(pool.map(later, range(4)), expected, strict=True):
            assert torch.equal(output, last)
    assert torch.equal(run(model, chosen[0])[1], expected[0][1])


def test_another_thread_runs_the_model_while_arguments_are_recorded(tiny):
    model, tokens = tiny("gpt_oss"), ids()
    expected = run(model, tokens)[1]
    passes = []

    def meanwhile(*_):
        hook.remove()
        with ThreadPoolExecutor(1) as pool:
            passes.append(pool.submit(lambda: model.model(tokens, use_cache=False)).result())

    hook = model.model.layers[1].register_forward_pre_hook(meanwhile)
    embedded = model.model.embed_tokens(tokens)
    entered, recorded = record_arguments(model, embedded)
    assert torch.equal(passes[0].last_hidden_state, expected)
    assert torch.equal(entered, embedded)
    assert len(recorded) == 3


def test_gradients_go_through_layers_whose_arguments_were_recorded_without(tiny):
    model = tiny("qwen3_next")
    layers = LayerArguments(model)
    states = run(model, ids())[0]
    with torch.inference_mode():
        layers.run(1, states[1])
    leaf = states[1].clone().requires_grad_()
    layers.run(1, leaf).sum().backward()
    assert float(leaf.grad.abs().max()) > 0


def test_masks_of_many_shapes_do_not_pile_up(tiny):
    model = tiny("gpt_oss")
    layers = LayerArguments(model, cache_bytes=20_000)
    for length in range(3, 60):
        hidden = torch.zeros(2, length, 32)
        expected = LayerArguments(model).run(0, hidden)
        assert torch.equal(layers.run(0, hidden), expected)
        one = LayerArguments(model)
        one.run(0, hidden)
        assert layers.cached_bytes <= max(20_000, one.cached_bytes)
    assert layers.cached_bytes >= 2 * 2 * 59 * 59 * 4  # both masks of the last shape
