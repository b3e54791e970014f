"""Layers of a model in two steps: everything but the routed experts, then with what these give.

In: a transformers model, and its modules of routed experts. Out: what experts are asked for, and
the outputs of layers for any sum of experts. Invariant: everything but the experts is the layer's
own code.

In most architectures the sum is added to the layer's output: then one run with a sum of zero is
enough, and the sum is added afterwards. In others a norm, a factor or a projection follows. Then
the layer runs twice, the first time up to its experts. Each layer is tried for that once.
"""

from collections.abc import Mapping
from typing import Any

import torch

from allocator.scoring.layer_arguments import LayerArguments

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Inputs of a batch's routed experts `(tokens, in)`; chosen experts and gates `(tokens, k)`."""
_SAMPLE = 8
"""Tokens of that trial."""
_ROUNDING = 1e-3
"""Of a sum that is added to states with far larger values in some channels, relative."""


class _Asked(Exception):
    """Ends a layer's run when its experts are asked: nothing after that is of interest."""


class SplitLayers:
    """Runs single layers of a model, whose routed experts run elsewhere; from one thread.

    Args:
        model: of transformers; the experts' forward is replaced for good.
        experts: by layer, the module of its routed experts.

    Attributes:
        asking: whether the running layer's products are no business of hooks, as they are computed
            again, or on other inputs.
    """

    def __init__(self, model: Any, experts: Mapping[int, Any]) -> None:
        self.asking = False
        self._arguments = LayerArguments(model)
        self._taken: list[Routed] = []
        self._sum: torch.Tensor | None = None
        self._adds = {
            layer: True for layer in range(len(model.model.layers)) if layer not in experts
        }
        for module in experts.values():
            module.forward = self._take

    def run(
        self,
        layer: int,
        hidden: torch.Tensor,
        experts_sum: torch.Tensor | None = None,
        cache: object = None,
    ) -> torch.Tensor:
        """Runs a layer on `(documents, length, hidden)`.

        Args:
            layer: its place in the model.
            hidden: what enters it.
            experts_sum: what its routed experts give, `(tokens, hidden)`; zero by default.
            cache: what stands in for the cache of keys and values, as the model now has it.
        """
        self._sum = experts_sum
        try:
            return self._arguments.run(layer, hidden, cache)
        finally:
            self._sum = None

    def ask(self, layer: int, hidden: torch.Tensor, cache: object = None) -> None:
        """Runs a layer on `(documents, length, hidden)` up to its routed experts."""
        self.asking = True
        try:
            self._arguments.run(layer, hidden, cache)
        except _Asked:
            return
        finally:
            self.asking = False

    def taken(self) -> list[Routed]:
        """Returns what routed experts were asked for since the last call, by run."""
        routed, self._taken = self._taken, []
        return routed

    @torch.no_grad()
    def adds(self, layer: int, hidden: torch.Tensor, cache: object = None) -> bool:
        """Returns whether a layer adds the sum of its routed experts to all else that it gives.

        A layer is tried once, when it has its weights.

        Args:
            layer: its place in the model.
            hidden: some states that enter it, `(documents, length, hidden)`.
            cache: as of `run`.
        """
        if layer not in self._adds:
            self._adds[layer] = self._try(layer, hidden[:1, :_SAMPLE].detach(), cache)
        return self._adds[layer]

    def _try(self, layer: int, hidden: torch.Tensor, cache: object) -> bool:
        before, self._taken = self._taken, []
        self.ask(layer, hidden, cache)
        (asked, *_), *_ = self.taken()
        without = self._unwatched(layer, hidden, torch.zeros_like(asked), cache)
        generator = torch.Generator().manual_seed(0)
        added = torch.randn(asked.shape, generator=generator).to(asked) * without.std()
        output = self._unwatched(layer, hidden, added, cache)
        self._taken = before
        if output.shape[-1] != added.shape[-1]:  # a projection follows
            return False
        off = (output - without).view_as(added) - added
        return bool(off.abs().max() <= _ROUNDING * added.abs().max())

    def _unwatched(
        self, layer: int, hidden: torch.Tensor, experts_sum: torch.Tensor, cache: object
    ) -> torch.Tensor:
        self.asking = True
        try:
            return self.run(layer, hidden, experts_sum, cache)
        finally:
            self.asking = False

    def _take(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        self._taken.append((hidden, index, gates))
        if self._sum is not None:
            return self._sum.clone()  # what follows may write in place
        if self.asking:
            raise _Asked
        return torch.zeros_like(hidden)
