"""The routed experts' forward: tokens sorted by expert, one matrix product per projection.

Computes what transformers' `eager` experts compute (a test holds both against each other). Sorting
replaces the scatter-add over tokens, which dominates the eager forward, and makes the sum over a
token's experts run in a fixed order.

How experts store their matrices, and what they compute between the first product and `down`, their
module says itself: transformers marks every module of experts with attributes for its own kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from allocator.errors import CheckpointError
from allocator.scoring.modules import experts_of

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Gets expert, inputs `(n, in)`, inner `(n, width)`, outputs `(n, in)`, gates `(n,)`."""


@dataclass(frozen=True)
class ExpertForm:
    """How a module of transformers stores its experts; by default gate above up.

    Attributes:
        gated: experts have the matrices gate and up in `gate_up_proj`, else up alone in `up_proj`.
        transposed: matrices are `(in, out)`.
        interleaved: outputs of gate and up alternate, instead of all of gate before all of up.
        biased: every product has a bias, `(experts, out)`.
        path: the module's name in its model.
    """

    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    path: str = ""

    @classmethod
    def of(cls, experts: Any, path: str = "") -> "ExpertForm":
        """Reads the form of a module of routed experts.

        Args:
            experts: of transformers.
            path: its name in its model.

        Raises:
            CheckpointError: if the module computes something that none of the attributes is about.
        """
        if getattr(experts, "has_post_expert_norm", False):
            raise CheckpointError(
                f"{type(experts).__name__} has a norm after each expert, needed one of gate, up "
                "and down alone; this architecture is not supported"
            )
        return cls(
            gated=getattr(experts, "has_gate", True),
            transposed=getattr(experts, "is_transposed", False),
            interleaved=not getattr(experts, "is_concatenated", True),
            biased=getattr(experts, "has_bias", False),
            path=path,
        )

    @property
    def first(self) -> str:
        """The stacked parameter that multiplies what enters the experts."""
        return "gate_up_proj" if self.gated else "up_proj"

    def matrices(self, stacked: torch.Tensor) -> torch.Tensor:
        """Returns a view `(..., out, in)` of matrices as they are stored."""
        return stacked.transpose(-1, -2) if self.transposed else stacked

    def stacked(self, experts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the first matrices and `down` of a module, `(experts, out, in)` each."""
        return self.matrices(getattr(experts, self.first)), self.matrices(experts.down_proj)

    def biases(self, experts: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the biases of the first product and of `down`, `(experts, out)` each, if any."""
        if not self.biased:
            return None, None
        return getattr(experts, f"{self.first}_bias"), experts.down_proj_bias

    def halves(self, joined: torch.Tensor) -> Sequence[torch.Tensor]:
        """Returns views of gate and up `(..., out)`, or of up alone, in `(..., 2 out)`."""
        if not self.gated:
            return [joined]
        if self.interleaved:
            return joined[..., ::2], joined[..., 1::2]
        return joined.chunk(2, -1)

    def joined(self, halves: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns `(..., 2 out)` of gate and up `(..., out)`, or up alone: undoes `halves`."""
        if len(halves) == 1:
            return halves[0]
        both = tuple(halves)
        return torch.stack(both, -1).flatten(-2) if self.interleaved else torch.cat(both, -1)


class ExpertCode:
    """What experts compute between their first product and `down`: their module's own code.

    Args:
        experts: a module of transformers.

    Attributes:
        form: how it stores matrices and biases.
    """

    def __init__(self, experts: Any) -> None:
        self.form = ExpertForm.of(experts)
        own = getattr(experts, "_apply_gate", None)
        # the usual one, which transformers adds to classes without any, has another name
        has_own = self.form.gated and own is not None and own.__name__ == "_apply_gate"
        self._own_gate: Callable[[torch.Tensor], torch.Tensor] | None = own if has_own else None
        self._act = getattr(experts, "act_fn", None)

    def inner(self, joined: torch.Tensor) -> torch.Tensor:
        """Returns what `down` multiplies, `(n, width)`, from the first product, `(n, 2 width)`.

        Args:
            joined: as the module stores its outputs, `(n, 2 width)`; without a gate, `(n, width)`.
        """
        if self._own_gate is not None:
            return self._own_gate(joined)
        return self._usual(self.form.halves(joined))

    def inner_of_halves(self, halves: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns what `down` multiplies, `(n, width)`, from the products of gate and up.

        Args:
            halves: products of gate and up, or of up alone, `(n, width)` each, biases included.
        """
        if self._own_gate is not None:
            return self._own_gate(self.form.joined(halves))
        return self._usual(halves)

    def _usual(self, halves: Sequence[torch.Tensor]) -> torch.Tensor:
        assert self._act is not None
        inner: torch.Tensor = self._act(halves[0])
        for up in halves[1:]:
            inner = inner * up if inner.requires_grad or up.requires_grad else inner.mul_(up)
        return inner


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
        experts: a module of transformers; `ExpertForm` says how it stores matrices.
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
    code = ExpertCode(experts)
    first, down = code.form.stacked(experts)
    first_bias, down_bias = code.form.biases(experts)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        rows = slice(start, start + count)
        start += count
        joined = inputs[rows] @ first[expert].T
        if first_bias is not None:
            joined += first_bias[expert]
        inner = code.inner(joined)
        torch.mm(inner, down[expert].T, out=outputs[rows])
        if down_bias is not None:
            outputs[rows] += down_bias[expert]
        if observe is not None:
            observe(expert, inputs[rows], inner, outputs[rows], sorted_gates[rows])
    outputs.mul_(sorted_gates[:, None])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return outputs[inverse].view(n_tokens, k, -1).sum(1)


def use_sorted_experts(model: Any, layers: tuple[int, ...]) -> None:
    """Lets the MoE layers of a transformers model run `routed_experts`."""
    for layer in layers:
        experts = experts_of(model, layer)
        experts.forward = partial(routed_experts, experts)


def use_observer(model: Any, layer: int, observe: Observer | None) -> None:
    """Watches one layer's experts; None stops it."""
    experts = experts_of(model, layer)
    experts.forward = partial(routed_experts, experts, observe=observe)


Watcher = Callable[[int, str, torch.Tensor, torch.Tensor], None]
"""Gets expert, `first` or `down`, that product's input `(n, in)` and its output `(n, out)`.

The output of the first product is of gate and up, as the module stores them."""


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
    code = ExpertCode(experts)
    first, down = (stacked.unbind() for stacked in code.form.stacked(experts))
    first_bias, down_bias = code.form.biases(experts)
    for expert, inputs in enumerate(sorted_inputs.split(counts)):
        if not len(inputs):
            continue
        joined = inputs @ first[expert].T
        joined = joined if first_bias is None else joined + first_bias[expert]
        watch(expert, "first", inputs, joined)
        inner = code.inner(joined)
        output = inner @ down[expert].T
        outputs.append(output if down_bias is None else output + down_bias[expert])
        watch(expert, "down", inner, outputs[-1])
    weighted = torch.cat(outputs) * gates.reshape(-1)[order].to(hidden.dtype)[:, None]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return weighted[inverse].view(n_tokens, k, -1).sum(1)


def use_watcher(model: Any, layer: int, watch: Watcher) -> None:
    """Lets one layer's experts run `differentiable_experts`; `use_sorted_experts` ends it."""
    experts = experts_of(model, layer)
    experts.forward = partial(differentiable_experts, experts, watch=watch)
