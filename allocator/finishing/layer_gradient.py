"""A gradient taken backwards through one layer of a streamed model, to the layer's changes.

In: a `StreamedModel`, the `RelativeChanges` of one layer's tensors, what enters the layer, and the
gradients of what leaves it. Out: the gradient by the changes, and by what enters. Invariants: what
autograd gives of the whole layer in memory, up to the order of float32 sums; in memory are the
layer without its routed experts, and one of these at a time. The same for what follows the last
layer, whose changes are those of its norm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from allocator.checkpoint.tensors import Floats
from allocator.finishing.relative_changes import RelativeChanges
from allocator.profiling.streamed_gradient import add_gradients, head_of, through_layer
from allocator.scoring.candidates import Candidate
from allocator.scoring.layer_checkpoints import Batches
from allocator.scoring.streamed_model import StreamedModel
from allocator.targets import Group


def layer_gradient(
    streamed: StreamedModel,
    layer: int,
    changes: RelativeChanges,
    vector: Floats,
    candidate: Candidate,
    before: Batches,
    after: Batches,
) -> tuple[Floats, Batches]:
    """Takes gradients of a loss through a layer.

    Args:
        streamed: of the layout.
        layer: its place.
        changes: of the layer's tensors.
        vector: the changes, `(n,)`.
        candidate: what the layer computes under these.
        before: what enters the layer, `(documents, length, hidden)` by batch.
        after: gradients of what leaves it, in the same shapes.

    Returns:
        The gradient by the changes, `(n,)`, and those of what enters, as `before`.
    """
    retained = candidate.retained_experts.get(layer, ())
    of_experts = np.zeros(changes.n, np.float32)

    def take(
        group: Group, expert: int, matrix: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        place = retained.index(expert)
        changes.add_expert(of_experts, group, place, matrix, gradient.T @ x, vector)

    with torch.inference_mode(False), torch.no_grad():
        streamed.install(layer, candidate)
        with _needing_gradients(streamed.model, changes) as parameters:
            inputs = through_layer(streamed, layer, candidate, before, after, take, parameters)
            of_changes = changes.gradient(streamed.model, vector, experts=False)
        streamed.leave(layer)
    return of_changes + of_experts, inputs


def head_gradient(
    streamed: StreamedModel,
    changes: RelativeChanges,
    vector: Floats,
    candidate: Candidate,
    original: Batches,
    final: Batches,
) -> tuple[Floats, Batches]:
    """Takes the gradient of KL(original || candidate) through the head and the last norm.

    Args:
        streamed: of the layout.
        changes: of the tensors outside of all layers; of these, of norms alone.
        vector: the changes, `(n,)`.
        candidate: whose norm and head they are.
        original: what the original's last layer gives, `(documents, length, hidden)` by batch.
        final: what the candidate's last layer gives.

    Returns:
        The gradients by the changes, `(n,)`, and by what the candidate's last layer gives, of the
        mean over tokens in nats.
    """
    n_tokens = sum(states[..., 0].numel() for states in final)
    gradients: Batches = []
    with torch.inference_mode(False), torch.no_grad():
        streamed.install_last_norm(candidate)
        with _needing_gradients(streamed.model, changes) as parameters:
            for states, wanted in zip(final, original, strict=True):
                reference = streamed.logits(wanted.flatten(0, 1), streamed.original)
                leaf = states.flatten(0, 1).requires_grad_()
                logits, x, products = head_of(streamed, leaf, candidate)
                off = torch.softmax(logits.detach(), -1).sub_(torch.softmax(reference, -1))
                (of_products,) = torch.autograd.grad(logits, products, off.div_(n_tokens))
                of_inputs = streamed.through_head(of_products, candidate)
                of_leaf, *others = torch.autograd.grad(
                    x, [leaf, *parameters], of_inputs, allow_unused=True
                )
                gradients.append(of_leaf.view(states.shape))
                add_gradients(parameters, others)
            return changes.gradient(streamed.model, vector), gradients


@contextmanager
def _needing_gradients(model: Any, changes: RelativeChanges) -> Iterator[list[Any]]:
    """Yields the parameters of an installed layer, but its routed experts', that changes are of."""
    known = dict(model.named_parameters())
    named = [known[name] for name in sorted(changes.parameters(model))]
    parameters = [parameter for parameter in named if not parameter.is_meta]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
