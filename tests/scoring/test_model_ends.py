"""Embedding rows and logits against transformers' own models."""

import copy

import pytest
import torch
from torch import nn

from allocator.errors import CheckpointError
from allocator.profiling.products import Calls, drawn, run_backward
from allocator.scoring.documents import Document
from allocator.scoring.model_ends import (
    check_head,
    entered,
    has_plain_embedding,
    has_plain_head,
    head,
)

torch.set_num_threads(1)
PLAIN_HEAD = {
    "mixtral": True,
    "qwen3_next": True,
    "gpt_oss": True,
    "afmoe": True,
    "laguna": True,
    "nemotron_h": True,
    "gemma4_text": False,  # capped
    "granitemoehybrid": False,  # scaled
    "cohere2_moe": False,  # scaled
}
SOME, TOKENS = torch.linspace(-1, 1, 64).view(2, 32), torch.tensor([[1, 2]])
SCALED_EMBEDDING = {"gemma4_text", "granitemoehybrid", "afmoe"}


@pytest.fixture(params=PLAIN_HEAD)
def name(request):
    return request.param


@pytest.fixture
def ids():
    return torch.randint(1, 96, (2, 13), generator=torch.Generator().manual_seed(0))


def run(model, ids):
    """What enters the first layer, what the last norm gives, and logits."""
    states = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    last = model.model(input_ids=ids, use_cache=False).last_hidden_state
    hook.remove()
    return states[0], last, model(input_ids=ids, use_cache=False).logits


@torch.inference_mode()
def test_logits_are_those_of_the_model(tiny, name, ids):
    model = tiny(name)
    _, last, logits = run(model, ids)
    assert torch.equal(head(model, last), logits)
    assert torch.equal(head(model, last[1]), logits[1])
    weight = model.lm_head.weight
    elsewhere = head(model, last, lambda x: x @ weight.T)
    torch.testing.assert_close(elsewhere, logits)
    products = last @ weight.T
    assert torch.allclose(products, logits, atol=1e-4) == PLAIN_HEAD[name]
    assert has_plain_head(model, SOME) == PLAIN_HEAD[name]
    check_head(model, TOKENS)


@torch.inference_mode()
def test_rows_enter_the_first_layer_as_in_the_model(tiny, name, ids):
    model = tiny(name)
    first, _, _ = run(model, ids)
    rows = model.get_input_embeddings().weight[ids]
    assert torch.equal(entered(model, rows), first)
    assert torch.equal(rows, first) == (name not in SCALED_EMBEDDING)
    assert has_plain_embedding(model, SOME) == (name not in SCALED_EMBEDDING)


def test_neither_end_reads_a_parameter(tiny, name):
    model = copy.deepcopy(tiny(name))
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
    assert has_plain_head(model, SOME) == PLAIN_HEAD[name]
    assert has_plain_embedding(model, SOME) == (name not in SCALED_EMBEDDING)


@pytest.mark.parametrize("name", ["gemma4_text", "granitemoehybrid", "afmoe", "mixtral"])
def test_gradients_are_of_embedding_rows(tiny, name):
    """Of log p(drawn label), against autograd by the embedding as a whole."""
    model = copy.deepcopy(tiny(name))
    document = Document(tuple(range(1, 14)))  # each row once
    found = []
    run_backward(
        model, [document], Calls(), lambda batch, ids, gradient, _: found.append(gradient),
        seed=5, batch_tokens=40,
    )  # fmt: skip
    tokens = torch.tensor([document.ids])
    weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    own = model.lm_head.weight.detach().clone()
    model.get_input_embeddings().weight = weight
    model.lm_head.weight = nn.Parameter(own, requires_grad=False)  # a tied one is another product
    log_probs = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[0], -1)
    labels = drawn(log_probs.detach().exp(), torch.Generator().manual_seed(5))
    log_probs.gather(1, labels).sum().backward()
    torch.testing.assert_close(found[0][0], weight.grad[tokens[0]], rtol=1e-4, atol=1e-5)


def test_a_model_with_logits_of_another_kind_is_refused(tiny, monkeypatch):
    model = tiny("mixtral")
    usual = type(model).forward

    def of_two_layers(self, **given):
        output = usual(self, **given)
        hidden = self.model(**given).hidden_states  # of all layers, which nobody gives
        output.logits = output.logits + hidden[0]
        return output

    monkeypatch.setattr(type(model), "forward", of_two_layers)
    with pytest.raises(CheckpointError, match="logits are made of hidden states in a way"):
        has_plain_head(model, SOME)

    def of_positions(self, **given):
        output = usual(self, **given)
        output.logits = output.logits + (1 if "input_ids" in given else 0)
        return output

    monkeypatch.setattr(type(model), "forward", of_positions)
    with pytest.raises(CheckpointError, match="other values than those of the whole model"):
        check_head(model, TOKENS)
