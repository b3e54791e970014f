"""The curvature around the original, layer by layer: the checkpoint need not fit in memory.

In: a `StreamedModel` and documents. Out: for every group, and every routed expert that a token
reached, a `Curvature` that prices it at the moment it is known. Invariant: what
`curvature.measure` sees around the original, up to the order of float32 sums. The layers are read
twice: forwards, when the states before each go to disk (tokens x hidden a layer), and backwards,
when the gradients there do. So a killed pass resumes at the layer it reached.

Backwards, a layer runs in the steps in which it runs forwards (see `streamed_model`), the other way
round. First the gradient of its routed experts' sum: where the layer adds the sum, it is that of
its output; else the layer's own module runs with the sum. Then expert by expert: gradients of
inputs and gates, over all tokens. Then the rest, batch by batch: the layer's own module runs again
with gradients on, and the gradients of its output and of what its routed experts were asked for go
through it together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allocator.families import Role
from allocator.files.progress import step
from allocator.profiling.curvature import Curvature
from allocator.profiling.products import drawn, product_name, watch_products
from allocator.scoring.candidates import Candidate
from allocator.scoring.documents import Document
from allocator.scoring.experts import ExpertCode
from allocator.scoring.layer_checkpoints import Batches
from allocator.scoring.modules import experts_of, last_norm
from allocator.scoring.streamed_model import Routing, States, StreamedModel
from allocator.targets import Group

Take = Callable[[Group, int | None, Curvature], None]
"""Gets a group, its expert (None where it has none), and what prices it, which is then freed."""
TakeProduct = Callable[[Group, int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Gets a projection, an expert, its matrix `(out, in)`, inputs `(n, in)`, and the gradient of the
products with these, `(n, out)`."""


def measure_streamed(
    streamed: StreamedModel,
    documents: Sequence[Document],
    take: Take,
    settle: Callable[[], None] = lambda: None,
    *,
    scratch: Path,
    of: str = "",
    seed: int = 0,
    batch_tokens: int = 1024,
    progress: bool = False,
) -> None:
    """Runs one forward and one backward pass over the original.

    Args:
        streamed: of the layout.
        documents: tokens to run.
        take: called for groups from the head to the first layer, then for the embedding; a resumed
            pass calls it for the groups of the layer it had reached and of those that follow.
        settle: called when a layer's groups are taken, before the pass
            notes that the layer is finished.
        scratch: an existing folder, for the states and gradients of these documents.
        of: what the files there belong to.
        seed: of the labels drawn from the model.
        batch_tokens: tokens per pass of a layer.
        progress: shows a bar over layers.
    """
    n_tokens = sum(len(d.ids) for d in documents)
    passed = _Pass(streamed, Curvature(streamed.layout, n_tokens), take)
    n_layers = streamed.inventory.n_layers
    checkpoints = streamed.layer_checkpoints(scratch, documents, batch_tokens, of)
    counted = step("curvature", 2 * n_layers, unit="layers", shown=progress)
    with torch.inference_mode(False), torch.no_grad(), counted as bar:
        for last in range(n_layers + 1):
            if (known := checkpoints.load("gradients", last)) is not None:
                break
        if known is None:
            known = passed.head(streamed.states_before(n_layers, checkpoints), seed)
            settle()
            checkpoints.save("gradients", n_layers, known)
        elif streamed.inventory.tied_embeddings:  # its product is priced at the end, with lookups
            passed.head(streamed.states_before(n_layers, checkpoints), seed)
        gradients = known
        bar.update(2 * n_layers - last)
        for layer in reversed(range(last)):
            gradients = passed.layer(layer, streamed.states_before(layer, checkpoints), gradients)
            settle()
            checkpoints.save("gradients", layer, gradients)
            bar.update()
    passed.embedding(checkpoints.documents, gradients)


def head_of(
    streamed: StreamedModel, final: torch.Tensor, candidate: Candidate
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the last norm and the head.

    Args:
        streamed: of the layout.
        final: the last layer's output, `(tokens, hidden)`.
        candidate: whose norm and head they are.

    Returns:
        Logits `(tokens, vocabulary)`, with gradients by the products; what the head multiplies,
        `(tokens, hidden)`, with gradients by `final` and the norm; the head's products.
    """
    asked: list[torch.Tensor] = []

    def multiply(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            products = streamed.products(x, candidate)
        asked.extend((x, products.requires_grad_()))
        return products

    streamed.install_last_norm(candidate)
    with torch.enable_grad():
        normed = last_norm(streamed.model)(final)
        logits = streamed.around_head(normed, multiply)
    x, products = asked
    return logits, x, products


def through_layer(
    streamed: StreamedModel,
    layer: int,
    candidate: Candidate,
    before: Batches,
    after: Batches,
    take: TakeProduct,
    parameters: Sequence[Any] = (),
) -> Batches:
    """Takes a gradient backwards through an installed layer.

    Args:
        streamed: holds the layer.
        layer: its place.
        candidate: who is installed.
        before: what enters the layer, `(documents, length, hidden)` by batch.
        after: gradients of what leaves it, in the same shapes.
        take: gets every product of every routed expert that a token reached.
        parameters: of the layer; their gradients are added to what their `grad` holds.

    Returns:
        Gradients of what enters, as `before`.
    """
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    sums: Sequence[torch.Tensor | None] = [None] * len(before)
    if layer in streamed.layout.layers:
        asked, sums = _through_routed(streamed, layer, candidate, before, after, take)
    inputs: Batches = []
    for i, (hidden, gradient) in enumerate(zip(before, after, strict=True)):
        leaf = hidden.requires_grad_()
        with torch.enable_grad():
            outputs, through = [streamed.forward(layer, leaf, sums[i])], [gradient]
        for x, _, gates in streamed.taken():
            outputs += [x, gates]
            through += asked[i]
        of_input, *others = torch.autograd.grad(
            outputs, [leaf, *parameters], through, allow_unused=bool(parameters)
        )
        hidden.requires_grad_(False)
        inputs.append(of_input)
        add_gradients(parameters, others)
    return inputs


def add_gradients(parameters: Sequence[Any], gradients: Sequence[torch.Tensor | None]) -> None:
    """Adds gradients to what parameters hold, each of the parameter's shape `(...)`, or None."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad += gradient


def _through_routed(
    streamed: StreamedModel,
    layer: int,
    candidate: Candidate,
    before: Batches,
    after: Batches,
    take: TakeProduct,
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Sequence[torch.Tensor | None]]:
    """Gradients of what the routed experts were asked for: by batch, of inputs and gates.

    The second result are the sums that the layer needs to run, by batch.
    """
    adds = streamed.adds(layer, before[0])
    for hidden in before:
        streamed.ask(layer, hidden)
    routed, biases = streamed.taken(), streamed.biases(layer)
    sums: Sequence[torch.Tensor | None] = [None] * len(before)
    if adds:
        routing = Routing(routed, candidate.retained_experts[layer], biases)
        output = torch.cat([g.flatten(0, 1) for g in after])
    else:
        state = States(candidate, [0], before, routed, biases)
        (routing,) = streamed.run_experts(layer, [state])
        sums = routing.sums()
        output = torch.cat(
            [_of_sum(streamed, layer, *each) for each in zip(before, sums, after, strict=True)]
        )
    return through_experts(streamed, layer, candidate, routing, output, take), sums


def _of_sum(
    streamed: StreamedModel,
    layer: int,
    hidden: torch.Tensor,
    experts_sum: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """The gradient of a batch's sum of experts, `(tokens, hidden)`."""
    leaf = experts_sum.clone().requires_grad_()
    with torch.enable_grad():
        output = streamed.forward(layer, hidden, leaf)
    streamed.taken()
    (of_sum,) = torch.autograd.grad(output, leaf, gradient)
    return of_sum


def through_experts(
    streamed: StreamedModel,
    layer: int,
    candidate: Candidate,
    routing: Routing,
    output: torch.Tensor,
    take: TakeProduct,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Takes a gradient backwards through the routed experts of a layer, expert by expert.

    Args:
        streamed: holds the layer.
        layer: its place.
        candidate: whose experts they are.
        routing: of what the experts were asked for.
        output: gradient of what the experts give, `(tokens, hidden)`.
        take: gets every product of every expert that a token reached.

    Returns:
        Gradients of what the experts were asked for, by batch: of inputs `(tokens, hidden)`, and
        of gates `(tokens, k)`.
    """
    groups = streamed.projections(layer)
    code = ExpertCode(experts_of(streamed.model, layer))
    of_inputs, of_gates = torch.zeros_like(routing.inputs), torch.zeros_like(routing.gates)
    for expert in streamed.weights.in_turn(sorted(routing.reached), groups, [candidate]):
        *matrices, down = weights = [streamed.expert(candidate, g, expert) for g in groups]
        places, tokens = routing.places(expert)
        x = routing.inputs[tokens]
        products = routing.products(expert, x, matrices, code.form)
        products = [product.requires_grad_() for product in products]
        with torch.enable_grad():
            inner = code.inner_of_halves(products)
        mine = output[tokens]
        outputs = routing.outputs(expert, inner.detach(), down)
        of_gates[places] = (mine * outputs).sum(-1)
        mine = mine * routing.gates[places, None]
        of_products = torch.autograd.grad(inner, products, mine @ down)
        back = [g @ matrix for g, matrix in zip(of_products, matrices, strict=True)]
        of_inputs.index_add_(0, tokens, sum(back[1:], back[0]))
        multiplied = (*(x for _ in matrices), inner.detach())
        for product in zip(groups, weights, multiplied, (*of_products, mine), strict=True):
            group, matrix, values, gradient = product
            take(group, expert, matrix, values, gradient)
    return routing.by_batch(of_inputs, of_gates)


@contextmanager
def _watched(
    streamed: StreamedModel, groups: Sequence[Group], curvature: Curvature
) -> Iterator[None]:
    handles = watch_products(streamed.model, streamed.layout, groups, curvature.take)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Pass:
    """One backward pass, from the head to the embedding."""

    streamed: StreamedModel
    curvature: Curvature
    take: Take

    def head(self, final: Batches, seed: int) -> Batches:
        """Returns gradients of the last layer's output, `(documents, length, hidden)` by batch.

        They are of the log-likelihood of drawn labels.
        """
        streamed, group = self.streamed, self.streamed.output
        product = self.curvature.product(group.name)
        generator = torch.Generator().manual_seed(seed)
        gradients = []
        for hidden in final:
            leaf = hidden.flatten(0, 1).requires_grad_()
            logits, x, products = head_of(streamed, leaf, streamed.original)
            probabilities = torch.softmax(logits.detach(), -1)
            labels = drawn(probabilities, generator)
            ones = torch.ones(len(labels), 1, device=labels.device)
            gradient = probabilities.neg_().scatter_add_(1, labels, ones)
            (gradient,) = torch.autograd.grad(logits, products, gradient)
            product.add(x.detach(), gradient)
            (mine,) = torch.autograd.grad(
                x, leaf, streamed.through_head(gradient, streamed.original)
            )
            gradients.append(mine.view(hidden.shape))
        if group.role is not Role.EMBEDDING:  # a tied one is also looked up
            self.take(group, None, self.curvature)
            self.curvature.drop(group.name)
        return gradients

    def layer(self, layer: int, before: Batches, gradients: Batches) -> Batches:
        """Returns gradients of a layer's input from those of its output, by batch."""
        streamed, curvature = self.streamed, self.curvature

        def take(
            group: Group, expert: int, _: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor
        ) -> None:
            curvature.product(group.name, expert).add(x, gradient)
            self.take(group, expert, curvature)
            curvature.drop(group.name, expert)

        streamed.install(layer, streamed.original)
        groups = [g for g in streamed.groups(layer) if not g.role.is_expert]
        with _watched(streamed, groups, curvature):
            inputs = through_layer(streamed, layer, streamed.original, before, gradients, take)
        for group in groups:
            self.take(group, None, curvature)
        for group in groups:
            curvature.drop(product_name(group))
        streamed.leave(layer)
        return inputs

    def embedding(self, chosen: Sequence[Sequence[Document]], gradients: Batches) -> None:
        """Takes the embedding, from the gradients of the first layer's input by batch."""
        of_rows = self.streamed.through_embedding(chosen, gradients)
        for batch, gradient in zip(chosen, of_rows, strict=True):
            self.curvature.add_lookup(torch.tensor([d.ids for d in batch]), gradient)
        self.take(self.streamed.layout.groups[str(Role.EMBEDDING)], None, self.curvature)
