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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from allocator.families import Role
from allocator.files.progress import step
from allocator.profiling.curvature import Curvature
from allocator.profiling.products import drawn, product_name, watch_products
from allocator.scoring.documents import Document
from allocator.scoring.experts import ExpertCode
from allocator.scoring.layer_checkpoints import Batches, LayerCheckpoints
from allocator.scoring.modules import experts_of
from allocator.scoring.streamed_model import Routing, States, StreamedModel
from allocator.targets import Group

Take = Callable[[Group, int | None, Curvature], None]
"""Gets a group, its expert (None where it has none), and what prices it, which is then freed."""


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
            known = passed.head(_states(streamed, checkpoints, n_layers), seed)
            settle()
            checkpoints.save("gradients", n_layers, known)
        elif streamed.inventory.tied_embeddings:  # its product is priced at the end, with lookups
            passed.head(_states(streamed, checkpoints, n_layers), seed)
        gradients = known
        bar.update(2 * n_layers - last)
        for layer in reversed(range(last)):
            gradients = passed.layer(layer, _states(streamed, checkpoints, layer), gradients)
            settle()
            checkpoints.save("gradients", layer, gradients)
            bar.update()
    passed.embedding(checkpoints.documents, gradients)


def _states(streamed: StreamedModel, checkpoints: LayerCheckpoints, layer: int) -> Batches:
    """The original's states before a layer, from the nearest ones whose file is whole."""
    first, hidden = layer, None
    while first and (hidden := checkpoints.load("states", first)) is None:
        first -= 1
    if hidden is None:
        states = streamed.begin(checkpoints.documents)
    else:
        states = States(streamed.original, [0], hidden)
    for at in range(first, layer):
        streamed.run(at, [states])
        checkpoints.save("states", at + 1, states.hidden)
    return states.hidden


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
            logits, x, products = self._head_of(leaf)
            probabilities = torch.softmax(logits.detach(), -1)
            labels = drawn(probabilities, generator)
            ones = torch.ones(len(labels), 1, device=labels.device)
            gradient = probabilities.neg_().scatter_add_(1, labels, ones)
            (gradient,) = torch.autograd.grad(logits, products, gradient)
            product.add(x.detach(), gradient)
            (mine,) = torch.autograd.grad(x, leaf, streamed.through_head(gradient))
            gradients.append(mine.view(hidden.shape))
        if group.role is not Role.EMBEDDING:  # a tied one is also looked up
            self.take(group, None, self.curvature)
            self.curvature.drop(group.name)
        return gradients

    def _head_of(self, final: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of the last layer's output `(tokens, hidden)`, the head's inputs, its products.

        Logits have gradients by the products, and inputs by the output.
        """
        streamed = self.streamed
        asked: list[torch.Tensor] = []

        def multiply(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                products = streamed.products(x, streamed.original)
            asked.extend((x, products.requires_grad_()))
            return products

        with torch.enable_grad():
            logits = streamed.around_head(streamed.normed(final), multiply)
        x, products = asked
        return logits, x, products

    def layer(self, layer: int, before: Batches, gradients: Batches) -> Batches:
        """Returns gradients of a layer's input from those of its output, by batch."""
        streamed = self.streamed
        streamed.install(layer, streamed.original)
        asked: list[tuple[torch.Tensor, torch.Tensor]] = []
        sums: Sequence[torch.Tensor | None] = [None] * len(before)
        if layer in streamed.layout.layers:
            asked, sums = self._experts(layer, before, gradients)
        groups = [g for g in streamed.groups(layer) if not g.role.is_expert]
        handles = watch_products(streamed.model, streamed.layout, groups, self.curvature.take)
        inputs: Batches = []
        try:
            for i, (hidden, gradient) in enumerate(zip(before, gradients, strict=True)):
                leaf = hidden.requires_grad_()
                with torch.enable_grad():
                    outputs, through = [streamed.forward(layer, leaf, sums[i])], [gradient]
                    for x, _, gates in streamed.taken():
                        outputs += [x, gates]
                        through += asked[i]
                inputs += torch.autograd.grad(outputs, leaf, through)
        finally:
            for handle in handles:
                handle.remove()
        for group in groups:
            self.take(group, None, self.curvature)
        for group in groups:
            self.curvature.drop(product_name(group))
        streamed.leave(layer)
        return inputs

    def _experts(
        self, layer: int, before: Batches, gradients: Batches
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Sequence[torch.Tensor | None]]:
        """Gradients of what the routed experts were asked for: by batch, of inputs and gates.

        The second result are the sums that the layer needs to run, by batch.
        """
        streamed, curvature = self.streamed, self.curvature
        adds = streamed.adds(layer, before[0])
        for hidden in before:
            streamed.ask(layer, hidden)
        routed, biases = streamed.taken(), streamed.biases(layer)
        sums: Sequence[torch.Tensor | None] = [None] * len(before)
        if adds:
            routing = Routing(routed, range(streamed.inventory.n_experts), biases)
            output = torch.cat([g.flatten(0, 1) for g in gradients])
        else:
            state = States(streamed.original, [0], before, routed, biases)
            (routing,) = streamed.run_experts(layer, [state])
            sums = routing.sums()
            output = torch.cat(
                [self._of_sum(layer, *each) for each in zip(before, sums, gradients, strict=True)]
            )
        groups = streamed.projections(layer)
        code = ExpertCode(experts_of(streamed.model, layer))
        of_inputs, of_gates = torch.zeros_like(routing.inputs), torch.zeros_like(routing.gates)
        for expert in streamed.weights.in_turn(
            sorted(routing.reached), groups, [streamed.original]
        ):
            *matrices, down = (streamed.expert(streamed.original, g, expert) for g in groups)
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
            for group, values, gradient in zip(
                groups, multiplied, (*of_products, mine), strict=True
            ):
                curvature.product(group.name, expert).add(values, gradient)
                self.take(group, expert, curvature)
                curvature.drop(group.name, expert)
        sizes = [len(x) for x, _, _ in routed]
        k = routed[0][1].shape[-1]
        asked = zip(
            torch.split(of_inputs, sizes), torch.split(of_gates.view(-1, k), sizes), strict=True
        )
        return list(asked), sums

    def _of_sum(
        self, layer: int, hidden: torch.Tensor, experts_sum: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of a batch's sum of experts, `(tokens, hidden)`."""
        leaf = experts_sum.clone().requires_grad_()
        with torch.enable_grad():
            output = self.streamed.forward(layer, hidden, leaf)
        self.streamed.taken()
        (of_sum,) = torch.autograd.grad(output, leaf, gradient)
        return of_sum

    def embedding(self, chosen: Sequence[Sequence[Document]], gradients: Batches) -> None:
        """Takes the embedding, from the gradients of the first layer's input by batch."""
        of_rows = self.streamed.through_embedding(chosen, gradients)
        for batch, gradient in zip(chosen, of_rows, strict=True):
            self.curvature.add_lookup(torch.tensor([d.ids for d in batch]), gradient)
        self.take(self.streamed.layout.groups[str(Role.EMBEDDING)], None, self.curvature)
