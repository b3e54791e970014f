"""The routed experts' forward: tokens sorted by expert, one matrix product per projection.

Computes what transformers' `eager` experts compute (a test holds both against each other). Sorting
replaces the scatter-add over tokens, which dominates the eager forward, and makes the sum over a
token's experts run in a fixed order.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Gets expert, inputs `(n, hidden)`, inner `(n, width)`, outputs `(n, hidden)`, gates `(n,)`."""


def routed_experts(
    experts: Any,
    hidden: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
    *,
    observe: Observer | None = None,
) -> torch.Tensor:
    """Sums gate x output over each token's experts.

    Args:
        experts: has `gate_up_proj` `(E, 2 width, hidden)` and `down_proj` `(E, hidden, width)`.
        hidden: `(tokens, hidden)`.
        index: `(tokens, k)` chosen experts.
        gates: `(tokens, k)`.
        observe: called once per expert that got tokens, outputs before the gate.

    Returns:
        `(tokens, hidden)`.
    """
    n_tokens, k = index.shape
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(experts.down_proj)).tolist()
    inputs = hidden[order // k]
    sorted_gates = gates.reshape(-1)[order].to(hidden.dtype)
    outputs = torch.empty_like(inputs)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        rows = slice(start, start + count)
        start += count
        gate, up = (inputs[rows] @ experts.gate_up_proj[expert].T).chunk(2, -1)
        inner = experts.act_fn(gate).mul_(up)
        torch.mm(inner, experts.down_proj[expert].T, out=outputs[rows])
        if observe is not None:
            observe(expert, inputs[rows], inner, outputs[rows], sorted_gates[rows])
    outputs.mul_(sorted_gates[:, None])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return outputs[inverse].view(n_tokens, k, -1).sum(1)


def use_sorted_experts(model: Any, layers: tuple[int, ...]) -> None:
    """Lets the MoE layers of a transformers model run `routed_experts`."""
    for layer in layers:
        experts = model.model.layers[layer].mlp.experts
        experts.forward = partial(routed_experts, experts)


def use_observer(model: Any, layer: int, observe: Observer | None) -> None:
    """Watches one layer's experts; None stops it."""
    experts = model.model.layers[layer].mlp.experts
    experts.forward = partial(routed_experts, experts, observe=observe)


Watcher = Callable[[int, str, torch.Tensor, torch.Tensor], None]
"""Gets expert, `gate_up` or `down`, that product's input `(n, in)` and its output `(n, out)`."""


def differentiable_experts(
    experts: Any,
    hidden: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
    *,
    watch: Watcher,
) -> torch.Tensor:
    """Computes what `routed_experts` does without writing in place, so that gradients flow.

    Args:
        experts: as of `routed_experts`.
        hidden: `(tokens, hidden)`.
        index: `(tokens, k)` chosen experts.
        gates: `(tokens, k)`.
        watch: called twice per expert that got tokens.

    Returns:
        `(tokens, hidden)`.
    """
    n_tokens, k = index.shape
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(experts.down_proj)).tolist()
    outputs = []
    sorted_inputs: Any = hidden[order // k]
    # unbound at once: the gradient of one indexed expert is as large as that of all
    gate_up, down = experts.gate_up_proj.unbind(), experts.down_proj.unbind()
    for expert, inputs in enumerate(sorted_inputs.split(counts)):
        if not len(inputs):
            continue
        both = inputs @ gate_up[expert].T
        watch(expert, "gate_up", inputs, both)
        gate, up = both.chunk(2, -1)
        inner = experts.act_fn(gate) * up
        outputs.append(inner @ down[expert].T)
        watch(expert, "down", inner, outputs[-1])
    weighted = torch.cat(outputs) * gates.reshape(-1)[order].to(hidden.dtype)[:, None]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return weighted[inverse].view(n_tokens, k, -1).sum(1)


def use_watcher(model: Any, layer: int, watch: Watcher) -> None:
    """Lets one layer's experts run `differentiable_experts`; `use_sorted_experts` ends it."""
    experts = model.model.layers[layer].mlp.experts
    experts.forward = partial(differentiable_experts, experts, watch=watch)
