"""What a change of weights costs to second order: the Fisher information around a candidate.

In: a `SwapModel` that holds a candidate, and documents. Out: `Curvature`, which prices any change
of any group's weights. Invariant: one forward and one backward pass (a second one for `slope`),
whatever is priced afterwards.

Around the original, KL(original || candidate) is half the changes' quadratic form in the Fisher
information (Amari, "Natural Gradient Works Efficiently in Learning", 1998, eq. 2.7). With labels
drawn from the model's own distribution, a product `y = W x` whose output has the gradient `g`
contributes, for a change `D` of `W` and with independent tokens and rows,

    1/2 sum over tokens, rows r of (g_r)^2 (D_r x)^2  =  1/2 sum over r of share_r D_r A D_r,
    A = sum over tokens of |g|^2 x x^T,   share_r = sum of g_r^2 / sum of |g|^2,

the factored form of Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored
Approximate Curvature" (2015) with the weight |g|^2 kept inside the input factor (GuidedQuant, arXiv
2505.07004, eq. 6). It sees no router that changes its choice: see
`allocator.prediction.surrogate` for that part.

Away from the original the proxy loss also has a slope, and a change of a candidate's weights by `D`
costs `<slope, D>` beside the quadratic form: what `D` has in common with the errors that are there
already.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from allocator.checkpoint.tensors import Floats, Ints
from allocator.families import Role
from allocator.files.progress import step
from allocator.profiling.products import (
    Calls,
    Labels,
    Product,
    divergence,
    run_backward,
    watch_experts,
    watch_products,
)
from allocator.profiling.sums_checkpoint import SumsCheckpoint
from allocator.scoring.documents import Document
from allocator.scoring.experts import ExpertForm, use_sorted_experts
from allocator.scoring.side_by_side import affordable_threads
from allocator.scoring.swap_model import SwapModel, device_of, expert_form, view_of
from allocator.targets import Group, Layout

FORWARDS, FORWARDS_WITH_SLOPE = 3, 5
"""Forward tokens that a token costs: one forward, and two for every backward."""


class Tangent:
    """Prices of steps from weights that a model has to other weights.

    With the form `q`, the slope `s` and `h` the model's weights less the original, weights `e` off
    the original cost `q(e - h) + <s, e - h>` from there: `q(e)`, and a term linear in `e`. So a
    format needs one product with the form, for both prices.

    Args:
        current: `h`, `(experts, out, in)`, or `(1, ...)` where there is one price.
        linear: factor of `e`, in the shape of `current`.
        constant: one per price.
    """

    def __init__(self, current: torch.Tensor, linear: torch.Tensor, constant: list[float]) -> None:
        self._current, self._linear, self._constant = current, linear, constant

    def steps(self, change: Floats, prices: Sequence[float]) -> list[float]:
        """Returns nats per token of a step to other weights, one value per price.

        Args:
            change: the other weights less the original, `(experts, out, in)` as `current`.
            prices: what `Curvature.price` says of them.
        """
        values = torch.from_numpy(np.ascontiguousarray(change)).to(self._current.device)
        values = values.view_as(self._current)
        stays = [torch.equal(a, b) for a, b in zip(values, self._current, strict=True)]
        rows = zip(stays, prices, _inner(values, self._linear), self._constant, strict=True)
        return [0.0 if stay else q + product + c for stay, q, product, c in rows]


def _inner(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Sums of products over all axes but the first."""
    return [float(x) for x in (a * b).flatten(1).sum(1, dtype=torch.float64)]


class Curvature:
    """Prices changes of weights around what `measure` saw.

    Args:
        layout: the groups.
        n_tokens: of the documents.
        forms: by MoE layer, how parameters whose slopes are taken hold its routed experts.

    Attributes:
        n_tokens: tokens it was measured on.
    """

    def __init__(
        self,
        layout: Layout,
        n_tokens: int,
        forms: Mapping[int | None, ExpertForm] = MappingProxyType({}),
    ) -> None:
        self._layout = layout
        self._forms = forms
        self.n_tokens = n_tokens
        self._products: dict[tuple[str, int], Product] = {}
        self._slopes: dict[str, torch.Tensor] = {}
        self._looked_up: list[tuple[torch.Tensor, torch.Tensor]] = []

    def product(self, name: str, expert: int = 0) -> Product:
        """Returns the sums of one matrix, empty ones at first."""
        return self._products.setdefault((name, expert), Product())

    def take(self, name: str, expert: int, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds inputs `(tokens, in)` and gradients `(tokens, out)` of a product."""
        self.product(name, expert).add(x, gradient)

    def add_lookup(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds looked-up embedding rows, and the gradients of their values.

        Args:
            ids: `(documents, length)`.
            gradient: `(documents, length, hidden)`.
        """
        flat = ids.reshape(-1).cpu()
        self._looked_up.append((flat, gradient.reshape(len(flat), -1)))

    @property
    def has_slopes(self) -> bool:
        """Whether gradients were taken, so that `slope` and `tangent` answer."""
        return bool(self._slopes)

    def add_slopes(self, gradients: Mapping[str, torch.Tensor | None]) -> None:
        """Adds gradients of the proxy loss by parameters, by name; None for one without any."""
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            if name in self._slopes:
                self._slopes[name] += gradient
            else:
                self._slopes[name] = gradient

    def state(self) -> dict[str, torch.Tensor]:
        """Returns all sums, by names with slashes: what `restore` takes."""
        state = {f"slope/{name}": slope for name, slope in self._slopes.items()}
        for n, (ids, gradient) in enumerate(self._looked_up):
            state |= {f"ids/{n}": ids, f"gradient/{n}": gradient}
        for (name, expert), product in self._products.items():
            if isinstance(product.rows, torch.Tensor):
                where = f"{name}/{expert}"
                state |= {f"inputs/{where}/{k}": x for k, x in product.inputs.state().items()}
                state[f"rows/{where}"] = product.rows
                state[f"tokens/{where}"] = torch.tensor([product.inputs.n_tokens])
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes sums that `state` returned, on the model's device, in the place of its own."""
        by_kind: dict[str, dict[str, torch.Tensor]] = {}
        for key, values in state.items():
            kind, _, rest = key.partition("/")
            by_kind.setdefault(kind, {})[rest] = values
        self._slopes = by_kind.get("slope", {})
        ids, gradients = by_kind.get("ids", {}), by_kind.get("gradient", {})
        self._looked_up = [(ids[f"{n}"].cpu(), gradients[f"{n}"]) for n in range(len(ids))]
        inputs: dict[str, dict[str, torch.Tensor]] = {}
        for key, values in by_kind.get("inputs", {}).items():
            where, _, part = key.rpartition("/")
            inputs.setdefault(where, {})[part] = values
        self._products = {}
        for where, rows in by_kind.get("rows", {}).items():
            name, _, expert = where.rpartition("/")
            product = self.product(name, int(expert))
            product.rows = rows
            product.inputs.restore(inputs[where], int(by_kind["tokens"][where]))

    def price_sample(self, group: Group, change: Floats, rows: Ints, expert: int = 0) -> float:
        """Prices a change of a group, or of one of its experts, from some rows: nats per token.

        The price of the rows is divided by their share of all rows' squared gradients.

        Args:
            group: of the layout.
            change: new less original weights of those rows, `(rows, in)`; of heads where a group
                has heads.
            rows: ascending; of an embedding, all that were looked up must be among them.
            expert: its place among those that the model retained.
        """
        values, chosen = torch.from_numpy(np.ascontiguousarray(change)), torch.from_numpy(rows)
        if group.role in (Role.K_B, Role.V_B):
            return self._half(group, values, chosen) / self.n_tokens
        product = self.product(group.name, expert)
        price = product.price(values, chosen) / product.covered(chosen)
        if group.role is Role.EMBEDDING:
            price += self._lookups(values, chosen)
        return price / self.n_tokens

    def _lookups(self, values: torch.Tensor, rows: torch.Tensor) -> float:
        squares = (
            (gradient * values[torch.searchsorted(rows, ids)].to(gradient.device))
            .sum(-1)
            .square()
            .sum()
            for ids, gradient in self._looked_up
        )
        return 0.5 * float(sum(squares))

    @property
    def looked_up(self) -> Ints:
        """Embedding rows that were looked up, ascending, `(rows,)`."""
        return np.unique(np.concatenate([ids.numpy() for ids, _ in self._looked_up]))

    def drop(self, name: str, expert: int = 0) -> None:
        """Frees the sums of one matrix."""
        self._products.pop((name, expert), None)

    def price(self, group: Group, change: Floats, experts: Sequence[int]) -> list[float]:
        """Prices a change of a group, nats per token.

        Args:
            group: of the layout.
            change: new less original weights, in the group's shape, `(..., out, in)`; of routed
                experts, `experts`.
            experts: that the model retained when this was measured, in order.

        Returns:
            One value per routed expert, else one value.
        """
        values = torch.from_numpy(np.ascontiguousarray(change))
        if group.role.is_expert:
            prices = [self.product(group.name, i).price(values[i]) for i in range(len(experts))]
        elif group.role in (Role.K_B, Role.V_B):
            prices = [self._half(group, values)]
        else:
            prices = [self.product(group.name).price(values)]
            if group.role is Role.EMBEDDING:
                prices[0] += self._lookups(values, torch.arange(len(values)))
        return [value / self.n_tokens for value in prices]

    def tangent(self, group: Group, current: Floats, experts: Sequence[int]) -> Tangent:
        """Prices steps from the model's weights to formats.

        Args:
            group: of the layout.
            current: the model's weights less the original, in the group's shape,
                `(..., out, in)`; of routed experts, `experts`.
            experts: that the model retained when this was measured, in order.
        """
        values = torch.from_numpy(np.ascontiguousarray(current))
        slope = self._slope_of(group)
        values, apart = values.to(slope.device), len(experts) or 1
        linear = slope - self._times(group, values, experts)
        shape = (apart, -1, values.shape[-1])
        linear, values = (linear / self.n_tokens).reshape(shape), values.reshape(shape)
        slopes = _inner(values, slope.reshape(shape) / self.n_tokens)
        there = self.price(group, current, experts)
        return Tangent(values, linear, [q - s for q, s in zip(there, slopes, strict=True)])

    def _times(self, group: Group, values: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
        """The gradient of the sum over tokens of what `price` says, in the shape of `values`."""
        if group.role.is_expert:
            rows = [self.product(group.name, i).times(values[i]) for i in range(len(experts))]
            return torch.stack(rows)
        if group.role in (Role.K_B, Role.V_B):
            change, chosen, product = self._rows_of_half(group, values)
            gradients = product.times(change.reshape(-1, change.shape[-1]), chosen).view(
                change.shape
            )
            return gradients.transpose(1, 2) if group.role is Role.K_B else gradients
        gradients = self.product(group.name).times(values)
        if group.role is Role.EMBEDDING:
            for ids, gradient in self._looked_up:
                there = ids.to(gradient.device)
                sums = (gradient * values[there]).sum(-1, keepdim=True)
                gradients.index_add_(0, there, sums * gradient)
        return gradients

    def slope(self, group: Group, change: Floats) -> list[float]:
        """Returns first-order nats per token of a change of the model's weights, as `price`.

        Args:
            group: of the layout.
            change: new less current weights, in the shape of the model's, `(..., out, in)`.
        """
        slopes = self._slope_of(group)
        products = slopes * torch.from_numpy(np.ascontiguousarray(change)).to(slopes.device)
        values = products.flatten(1).sum(1) if group.role.is_expert else products.sum()[None]
        return [float(v) / self.n_tokens for v in values]

    def _slope_of(self, group: Group) -> torch.Tensor:
        """The gradient of the proxy loss by a group, in the group's shape."""
        dimensions = self._layout.inventory.dimensions
        form = self._forms.get(group.layer, ExpertForm())
        return view_of(self._slopes.__getitem__, dimensions, group, form)

    def _half(self, group: Group, values: torch.Tensor, heads: torch.Tensor | None = None) -> float:
        """`k_b` and `v_b` are rows of `kv_b`; `k_b` is stored transposed.

        From some `heads` it is scaled up to all by their share of the half's squared gradients.
        """
        change, rows, product = self._rows_of_half(group, values)
        chosen = rows if heads is None else rows.view(-1, change.shape[1])[heads].reshape(-1)
        price = product.price(change.reshape(-1, change.shape[-1]), chosen)
        if heads is None:
            return price
        return price * product.covered(rows) / product.covered(chosen)

    def _rows_of_half(
        self, group: Group, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Product]:
        """A change by head, `(heads, rows, in)`, which rows of the whole all heads have, and it."""
        latent, heads = (
            self._layout.inventory.dimensions.latent,
            self._layout.inventory.dimensions.heads,
        )
        assert latent is not None, group.name
        nope = latent.nope
        rows = torch.arange(heads * (nope + latent.value)).view(heads, -1)
        first = group.role is Role.K_B
        rows = rows[:, :nope] if first else rows[:, nope:]
        change = values.transpose(1, 2) if first else values
        return change, rows.reshape(-1), self.product(f"layers.{group.layer}.{Role.KV_B}")


def measure(
    swap: SwapModel,
    documents: Sequence[Document],
    *,
    reference: Callable[[int], torch.Tensor] | None = None,
    seed: int = 0,
    batch_tokens: int = 1024,
    threads: int = 1,
    checkpoint: SumsCheckpoint | None = None,
) -> Curvature:
    """Runs one forward and one or two backward passes over `documents` of what the model holds now.

    Args:
        swap: holds the candidate; it is left as it was.
        documents: tokens to run.
        reference: index of a document to the original's log-probabilities `(tokens, vocabulary)`,
            without running the model; given, the slope of the proxy loss is measured too.
        seed: of the labels drawn from the model.
        batch_tokens: tokens per pass.
        threads: passes that run at once, as many as memory allows; sums do not depend on it.
        checkpoint: of the sums of earlier batches, which a run that was stopped continues with.
    """
    layout, model = swap.layout, swap.model
    n_tokens = sum(len(d.ids) for d in documents)
    forms: dict[int | None, ExpertForm] = {i: expert_form(model, i) for i in layout.layers}
    curvature = Curvature(layout, n_tokens, forms)
    labels, n_before = Labels(seed), 0
    if checkpoint is not None and (state := checkpoint.load(device_of(model))) is not None:
        n_earlier, n_before = state.pop("done").tolist()
        labels = Labels(seed, n_earlier, state.pop("generator").cpu())
        curvature.restore(state)
    n_batches, n_documents = labels.n_done, n_before
    calls = Calls()
    take = calls.later(curvature.take)
    groups = [g for g in layout.groups.values() if not g.role.is_expert]
    handles = watch_products(model, layout, groups, take)
    for layer in layout.layers:
        watch_experts(model, layer, take)
    parameters = dict(model.named_parameters()) if reference is not None else {}

    def slopes(batch: list[int], log_probs: torch.Tensor) -> Any:
        assert reference is not None
        pairs = zip(batch, log_probs, strict=True)
        loss: Any = sum(divergence(reference(i), own) for i, own in pairs)
        return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    def each(batch: list[int], ids: torch.Tensor, gradient: torch.Tensor, slopes: Any) -> None:
        nonlocal n_batches, n_documents
        curvature.add_lookup(ids, gradient)
        curvature.add_slopes(dict(zip(parameters, slopes or (), strict=True)))
        shown.update(len(batch))
        n_batches, n_documents = n_batches + 1, n_documents + len(batch)
        if checkpoint is not None:
            checkpoint.save_if_due(sums)

    def sums() -> dict[str, torch.Tensor]:
        done = torch.tensor([n_batches, n_documents])
        generator = labels.state_after(n_batches - 1)
        return {**curvature.state(), "done": done, "generator": generator}

    gradient_bytes = sum(p.nbytes for p in parameters.values())
    shown = step(
        "curvature" if reference is None else "gradient step",
        len(documents),
        initial=n_before,
        unit="documents",
        brief=reference is not None,
    )
    try:
        model.requires_grad_(reference is not None)
        with shown:
            run_backward(
                model, documents, calls, each,
                also=None if reference is None else slopes,
                seed=seed,
                batch_tokens=batch_tokens,
                threads=affordable_threads(model, threads, gradient_bytes),
                labels=labels,
            )  # fmt: skip
    finally:
        model.requires_grad_(False)
        for handle in handles:
            handle.remove()
        use_sorted_experts(model, layout.layers)
    return curvature
