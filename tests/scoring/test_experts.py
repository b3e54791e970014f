"""Sorted experts against transformers' own eager experts."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from allocator.scoring.experts import routed_experts, use_observer, use_sorted_experts

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
