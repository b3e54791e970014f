"""KL(original || candidate) of what a model holds, and its gradient by some parameters.

In: a `SwapModel`, documents. Out: nats per token on some of them, and gradients in the parameters.
Invariant: the candidate is computed as `Scorer` computes it, up to the order of sums; parameters
need no gradient afterwards, and hold none.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from allocator.errors import AllocatorError
from allocator.profiling.products import divergence
from allocator.scoring.documents import Document, batches
from allocator.scoring.experts import use_sorted_experts, use_watcher
from allocator.scoring.model_ends import head
from allocator.scoring.scorer import Scorer
from allocator.scoring.side_by_side import affordable_threads, side_by_side
from allocator.scoring.swap_model import SwapModel, device_of, free_on, token_ids
from allocator.units import show_bytes

T = TypeVar("T")
_PASS_TOKENS = 1024
"""Tokens of a forward and backward pass; passes of one batch add up."""


class KlGradient:
    """Gradients of the proxy loss on some documents.

    Args:
        swap: the model.
        documents: whose numbers `at` takes.
        parameters: names of those whose gradients are wanted.
        threads: passes that run at once, as many as memory allows; sums do not depend on it.

    Raises:
        AllocatorError: if the gradients do not fit into the memory that is free.
    """

    def __init__(
        self,
        swap: SwapModel,
        documents: Sequence[Document],
        parameters: Collection[str],
        *,
        threads: int = 1,
    ) -> None:
        self._swap = swap
        self._documents = documents
        self._names = frozenset(parameters)
        self._scorer = Scorer(swap, documents, cache_bytes=0, layer_input_bytes=0, threads=threads)
        gradient_bytes = 4 * sum(p.numel() for p in self._parameters)
        _check_memory(swap, 2 * gradient_bytes)
        self._threads = affordable_threads(swap.model, threads, gradient_bytes)
        self._scorer.ensure_reference(len(documents))  # else the original would take the
        # candidate's place between a forward and its backward

    @property
    def _parameters(self) -> list[Any]:
        """The model's parameters are other ones after experts were retained."""
        return [p for name, p in self._swap.model.named_parameters() if name in self._names]

    def at(self, chosen: Sequence[int], use: Callable[[], T]) -> tuple[float, T]:
        """Computes the loss of what the model holds on some documents, and its gradients.

        Args:
            chosen: numbers of documents.
            use: called while the parameters have their gradients.

        Returns:
            The loss, nats per token, and what `use` returned.
        """
        documents = [self._documents[i] for i in chosen]
        n_tokens, total = sum(len(d.ids) for d in documents), 0.0
        with self._differentiable() as (model, parameters):

            @torch.inference_mode(False)
            @torch.enable_grad()
            def run(batch: list[int]) -> tuple[float, Sequence[torch.Tensor | None]]:
                ids = token_ids(model, [documents[i] for i in batch])
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
                log_probs = torch.log_softmax(head(model, hidden), -1)
                losses = [
                    divergence(self._scorer.reference(chosen[i]), own)
                    for i, own in zip(batch, log_probs, strict=True)
                ]
                loss = torch.stack(losses).sum() / n_tokens
                return float(loss.detach()), torch.autograd.grad(
                    loss, parameters, allow_unused=True
                )

            passes = list(batches(documents, 0, len(documents), n_tokens=_PASS_TOKENS))
            for loss, gradients in side_by_side(run, passes, self._threads):
                total += loss
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None and parameter.grad is None:
                        parameter.grad = gradient
                    elif gradient is not None:
                        parameter.grad += gradient
            return total, use()

    @contextmanager
    def _differentiable(self) -> Iterator[tuple[Any, list[Any]]]:
        model, layers = self._swap.model, self._swap.layout.layers
        for layer in layers:
            use_watcher(model, layer, lambda *_: None)
        parameters = self._parameters
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield model, parameters
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            use_sorted_experts(model, layers)


def _check_memory(swap: SwapModel, needed: int) -> None:
    """Checks that the gradients of a pass, and their sum, fit into memory: `needed` bytes.

    Raises:
        AllocatorError: if they are larger than what the device has free.
    """
    free = free_on(device_of(swap.model))
    if needed > free:
        raise AllocatorError(
            f"{swap.inventory.path}: tuning needs {show_bytes(needed)} for gradients in float32, "
            f"{show_bytes(int(free))} of memory are free; finish without tuning, or with norms and "
            "routers alone"
        )
