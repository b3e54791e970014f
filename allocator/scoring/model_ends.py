"""The two ends of a model: what enters its first layer, and logits of what its last norm gives.

In: a transformers model; rows of its embedding, or hidden states. Out: what the model's own code
makes of them. Invariant: an embedding that is scaled, or logits that are capped or scaled, are so
by the architecture's code, and by no copy of it. Rows and products may come from elsewhere than
the model's parameters, which need not be in memory.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from allocator.errors import CheckpointError
from allocator.scoring.layer_arguments import record_arguments

Multiply = Callable[[torch.Tensor], torch.Tensor]
"""Gets what a head multiplies, `(tokens, hidden)`; returns products `(tokens, vocabulary)`."""
_LARGE = 100.0
"""Values of products that are tried: a cap on logits shows."""


def head(model: Any, hidden: torch.Tensor, multiply: Multiply | None = None) -> torch.Tensor:
    """Returns the logits `(..., vocabulary)` of hidden states; from any thread.

    Args:
        model: of transformers.
        hidden: what the model's last norm gives, `(..., hidden)`.
        multiply: what multiplies by the head; by default the model's own.
    """
    ends = copy.copy(model)  # shares all but the two modules
    ends._modules = dict(model.named_children())
    ends._modules[model.base_model_prefix] = _Given()
    ends._modules["lm_head"] = _Flat(model.lm_head if multiply is None else multiply)
    batch = hidden.reshape(1, -1, hidden.shape[-1])
    logits: torch.Tensor = type(model).forward(ends, inputs_embeds=batch, use_cache=False).logits
    return logits.view(*hidden.shape[:-1], -1)


class _Given(nn.Module):
    """Stands in for a model without its head, and gives back what enters it."""

    def forward(self, *, inputs_embeds: torch.Tensor, **_: object) -> "_Output":
        return _Output(inputs_embeds)


class _Output:
    """What a model without its head gives: hidden states, and nothing else that is asked for."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, place: int) -> torch.Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


class _Flat(nn.Module):
    """Multiplies one batch as rows.

    Args:
        multiply: see `Multiply`.
    """

    def __init__(self, multiply: Multiply) -> None:
        super().__init__()
        self._multiply = [multiply]  # in a list: a module would become a part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply[0](x[0])[None]


def embedded(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Returns what a model's embedding makes of its own rows, `(..., hidden)` both."""
    module = model.get_input_embeddings()
    if type(module) is nn.Embedding:
        return rows
    other = copy.copy(module)
    other._parameters, other.padding_idx = {}, None
    other.weight = rows.reshape(-1, rows.shape[-1])
    values: torch.Tensor = other.forward(torch.arange(len(other.weight)).to(rows.device))
    return values.view(rows.shape)


def entered(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Returns what enters a model's first layer, `(documents, length, hidden)`.

    Args:
        model: of transformers.
        rows: of its embedding, in the same shape.
    """
    return record_arguments(model, embedded(model, rows))[0]


@torch.no_grad()
def has_plain_embedding(model: Any, rows: torch.Tensor) -> bool:
    """Returns whether rows of the embedding enter the first layer as they are.

    No parameter is read.

    Args:
        model: of transformers.
        rows: any values, `(tokens, hidden)`.
    """
    return torch.equal(entered(model, rows[None])[0], rows)


@torch.no_grad()
def has_plain_head(model: Any, states: torch.Tensor) -> bool:
    """Returns whether logits are products with hidden states, both as they are.

    No parameter is read.

    Args:
        model: of transformers.
        states: any values, `(tokens, hidden)`.

    Raises:
        CheckpointError: if the architecture makes no logits of hidden states and a head.
    """
    generator, asked = torch.Generator().manual_seed(0), list[torch.Tensor]()
    products = torch.randn(len(states), len(model.lm_head.weight), generator=generator)
    products = _LARGE * products.to(states.device)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        return products.clone()

    try:
        logits = head(model, states, multiply)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _unknown(model, str(error)) from None
    if len(asked) != 1 or logits.shape != products.shape:
        raise _unknown(model, f"{len(asked)} products, logits of shape {tuple(logits.shape)}")
    return torch.equal(logits, products) and torch.equal(asked[0], states)


@torch.inference_mode()
def check_head(model: Any, ids: torch.Tensor) -> None:
    """Checks `head` on a model that is in memory.

    Args:
        model: of transformers.
        ids: a few tokens, `(documents, length)`.

    Raises:
        CheckpointError: if the model has other logits.
    """
    states: list[torch.Tensor] = []
    handle = model.model.register_forward_hook(
        lambda _, __, output: states.append(output.last_hidden_state)
    )
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if not torch.allclose(head(model, states[0]), logits, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise _unknown(model, "other values than those of the whole model")


def _unknown(model: Any, what: str) -> CheckpointError:
    return CheckpointError(
        f"{type(model).__name__}: logits are made of hidden states in a way that is not known "
        f"({what}); this architecture is not supported"
    )
