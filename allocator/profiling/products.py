"""Matrix products of a model, watched: inputs, and the gradients of outputs.

In: a transformers model, the groups whose products are watched, documents. Out: calls with the
inputs `x` of each product `y = W x` and the gradients `g` of its outputs, by token. Invariants: the
gradients are of log p(drawn label), summed over the tokens of a batch; labels depend on the seed,
the documents and `batch_tokens` alone, not on what is watched; calls come in the order of batches,
however many of these run at once.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from allocator.families import Role
from allocator.scoring.arranged import matrix_name
from allocator.scoring.documents import Document, batches
from allocator.scoring.experts import ExpertForm, use_watcher
from allocator.scoring.model_ends import embedded, head
from allocator.scoring.modules import experts_of, last_norm
from allocator.scoring.side_by_side import affordable_threads, side_by_side
from allocator.scoring.swap_model import token_ids
from allocator.targets import Group, Layout

Take = Callable[[str, int, torch.Tensor, torch.Tensor], None]
"""Gets a product's name, its expert (0 where it has none), inputs `(tokens, in)` and the gradients
`(tokens, out)` of their outputs."""


class SecondMoment:
    """The sum over tokens of x x^T, `(in, in)`; while tokens are few, `(tokens, in)`.

    Args:
        total: zeros `(in, in)` that the sum is added to; by default memory is taken when needed.
        few: tokens that are gathered before a product adds them to the sum; by default `in`.

    Attributes:
        n_tokens: tokens in the sum.
    """

    def __init__(self, total: torch.Tensor | None = None, few: int | None = None) -> None:
        self._few: list[torch.Tensor] = []
        self._n_few = 0
        self._at_least = few
        self._total = total
        self.n_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Adds inputs `(tokens, in)`, each times the root of its weight."""
        self.n_tokens += len(x)
        self._few.append(x)
        self._n_few += len(x)
        if self._n_few >= (self._at_least or x.shape[-1]):
            self._gather()
        elif x._is_view():  # of inputs of all experts, which it would keep in memory
            self._few[-1] = x.clone()

    def total(self) -> torch.Tensor:
        """Returns the sum, `(in, in)`.

        Raises:
            ValueError: if there is no token.
        """
        if self._few:
            self._gather()
        if self._total is None:
            raise ValueError("the sum of no tokens has no width")
        return self._total

    def forms(self, change: torch.Tensor) -> torch.Tensor:
        """Returns the quadratic form of each row of `change`, `(rows, in)`: `(rows,)`."""
        forms = torch.zeros(len(change), device=change.device)
        if self._total is not None:
            forms += ((change @ self._total) * change).sum(-1)
        for x in self._few:
            forms += (change @ x.T).square().sum(-1)
        return forms

    def times(self, change: torch.Tensor) -> torch.Tensor:
        """Returns the product of `change`, `(rows, in)`, with the sum, in the same shape."""
        product = torch.zeros_like(change)
        if self._total is not None:
            product += change @ self._total
        for x in self._few:
            product += change @ x.T @ x
        return product

    def state(self) -> dict[str, torch.Tensor]:
        """Returns all that is in it: `total`, `(in, in)`, and `few.<n>`, `(tokens, in)` each."""
        few = {f"few.{n}": x for n, x in enumerate(self._few)}
        return few if self._total is None else {"total": self._total, **few}

    def restore(self, state: Mapping[str, torch.Tensor], n_tokens: int) -> None:
        """Takes what `state` returned, and the number of tokens, in the place of its own."""
        self._total = state.get("total")
        self._few = [state[f"few.{n}"] for n in range(len(state) - (self._total is not None))]
        self._n_few, self.n_tokens = sum(map(len, self._few)), n_tokens

    def _gather(self) -> None:
        x = self._few[0] if len(self._few) == 1 else torch.cat(self._few)
        if self._total is None:
            self._total = x.T @ x
        else:
            self._total.addmm_(x.T, x)
        self._few, self._n_few = [], 0


class Product:
    """Sums over tokens of one matrix product: inputs weighted by |g|^2, and rows `(out,)`.

    Args:
        inputs: takes the weighted inputs.
    """

    def __init__(self, inputs: SecondMoment | None = None) -> None:
        self.inputs = inputs or SecondMoment()
        self.rows: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds inputs `(tokens, in)` and the gradients `(tokens, out)` of their outputs."""
        squares = gradient.square()
        self.rows = self.rows + squares.sum(0).double()
        self.inputs.add(weighted(x, squares.sum(-1)))

    def price(self, change: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> float:
        """Returns half the quadratic form of `change`, `(out, in)` or of `rows` only."""
        if not isinstance(self.rows, torch.Tensor):
            return 0.0  # no token reached it
        share = self.shares[rows].float()
        return 0.5 * float(share @ self.inputs.forms(change.to(share.device)))

    def times(self, change: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Returns the gradient of `price` by `change`, `(rows, in)`, in the same shape."""
        if not isinstance(self.rows, torch.Tensor):
            return torch.zeros_like(change)
        share = self.shares[rows].float()
        return self.inputs.times(change.to(share.device)).mul_(share[:, None])

    def covered(self, rows: torch.Tensor) -> float:
        """Returns the share of all squared gradients that `rows`, `(rows,)`, have, from 0 to 1."""
        if not isinstance(self.rows, torch.Tensor):
            return 1.0
        return float(self.shares[rows].sum()) or 1.0

    @property
    def shares(self) -> torch.Tensor:
        """Each row's share of all squared gradients, `(out,)`, float64."""
        assert isinstance(self.rows, torch.Tensor)
        return self.rows / self.rows.sum().clamp_min(1e-300)


def weighted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns inputs `(tokens, in)`, each times the root of its weight, `(tokens,)`."""
    return x * weights.sqrt()[:, None]


def product_name(group: Group) -> str:
    """Names the product that a group is priced by: `k_b` and `v_b` are halves of one product."""
    split = group.role in (Role.K_B, Role.V_B)
    return f"layers.{group.layer}.{Role.KV_B}" if split else group.name


def watch_products(model: Any, layout: Layout, groups: Iterable[Group], take: Take) -> list[Any]:
    """Adds hooks to the products of groups that are no routed experts; returns their handles."""
    modules = {}  # `kv_b` once, unsplit
    for group in groups:
        if group.role in (Role.EMBEDDING, Role.HEAD):
            if group.role is Role.HEAD or layout.inventory.tied_embeddings:
                modules[group.name] = model.lm_head
            continue
        name = matrix_name(group).removesuffix(".weight")
        modules[product_name(group)] = model.get_submodule(name)
    return [
        module.register_forward_hook(_on_output(take, name)) for name, module in modules.items()
    ]


def _on_output(take: Take, name: str) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        x = args[0].detach().flatten(0, -2)
        if output.requires_grad:
            output.register_hook(lambda gradient: take(name, 0, x, gradient.flatten(0, -2)))

    return hook


def watch_experts(model: Any, layer: int, take: Take) -> None:
    """Lets one layer's experts run differentiably, watched; `use_sorted_experts` ends it."""
    form = ExpertForm.of(experts_of(model, layer))
    roles = (Role.EXPERT_GATE, Role.EXPERT_UP) if form.gated else (Role.EXPERT_UP,)
    names = [f"layers.{layer}.{role}" for role in roles]

    def watch(expert: int, kind: str, x: torch.Tensor, output: Any) -> None:
        x = x.detach()
        if not output.requires_grad:
            return
        if kind == "down":
            down = f"layers.{layer}.{Role.EXPERT_DOWN}"
            output.register_hook(lambda gradient: take(down, expert, x, gradient))
            return

        def both(gradient: torch.Tensor) -> None:
            for name, of_half in zip(names, form.halves(gradient), strict=True):
                take(name, expert, x, of_half)

        output.register_hook(both)

    use_watcher(model, layer, watch)


def watch_absorbed_queries(
    model: Any, layout: Layout, layer: int, take: Callable[[torch.Tensor, torch.Tensor], None]
) -> list[Any]:
    """Adds hooks to a layer's latent attention that give what `k_b` multiplies; returns handles.

    A runtime with the layout `k_b` computes `a = k_b q` per head from the query's part without
    rotation, `(nope,)`, and scores `a . c` with each token's latent `c`, `(rank,)`. transformers
    computes the same scores from keys instead, so no module has the output `a`. Its gradient
    follows exactly from what modules give: that of the attention weights `p`, through the softmax
    to the scores, times scale and latents: `sum over tokens s of scale p_s (g_s - p . g) c_s`. The
    gradient of `q` alone is not enough: it is `k_b^T` times that of `a`, of fewer dimensions.

    Args:
        model: of transformers, with eager attention, which returns its weights.
        layout: of a family with latent attention.
        layer: whose attention is watched.
        take: gets queries `(tokens, heads, nope)`, and the squared norms `(tokens, heads)` of the
            gradients of what `k_b` makes of them.
    """
    latent, heads = layout.inventory.dimensions.latent, layout.inventory.dimensions.heads
    assert latent is not None
    attention = model.model.layers[layer].self_attn
    seen = threading.local()

    def on_query(module: Any, args: Any, output: Any) -> None:
        by_head = output.detach().reshape(-1, heads, output.shape[-1] // heads)
        seen.queries = by_head[..., : latent.nope]

    def on_latents(module: Any, args: Any) -> None:
        rows = args[0].detach()  # documents x 1 x length x rank
        seen.latents = rows.view(rows.shape[0], 1, -1, rows.shape[-1])

    def on_attention(module: Any, args: Any, outputs: Any) -> None:
        weights, queries, latents = outputs[1], seen.queries, seen.latents
        del seen.queries, seen.latents
        p = weights.detach()  # documents x heads x length x length

        def add(gradient: torch.Tensor) -> None:
            of_scores = p * (gradient - (p * gradient).sum(-1, keepdim=True))
            squares = (of_scores @ latents).square().sum(-1) * module.scaling**2
            take(queries, squares.transpose(1, 2).flatten(0, 1))

        if weights.requires_grad:
            weights.register_hook(add)

    return [
        query_module(model, layout, layer).register_forward_hook(on_query),
        attention.kv_b_proj.register_forward_pre_hook(on_latents),
        attention.register_forward_hook(on_attention),
    ]


def query_module(model: Any, layout: Layout, layer: int | None) -> Any:
    """Returns the module of latent attention whose output is the queries of all heads."""
    latent = layout.inventory.dimensions.latent
    attention = model.model.layers[layer].self_attn
    return attention.q_proj if latent is not None and latent.q_rank is None else attention.q_b_proj


class Calls:
    """Calls of hooks, kept by thread until the turn of the batch that they came from.

    Autograd goes back through a GPU's operations in a thread of its own. One batch runs at a time
    then, and calls from a thread that ran no batch are that one's.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._running: list[tuple[Callable[..., None], tuple[Any, ...]]] | None = None

    def later(self, take: Callable[..., None]) -> Callable[..., None]:
        """Returns what hooks call in place of `take`; outside of `kept` it does nothing."""

        def call(*args: Any) -> None:
            calls = getattr(self._of_thread, "calls", self._running)
            if calls is not None:
                calls.append((take, args))

        return call

    @contextmanager
    def kept(self) -> Iterator[list[tuple[Callable[..., None], tuple[Any, ...]]]]:
        """Keeps the calls of this thread in a list."""
        calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._of_thread.calls = self._running = calls
        try:
            yield calls
        finally:
            self._of_thread.calls = self._running = None


Each = Callable[[list[int], torch.Tensor, torch.Tensor, Any], None]
"""Gets the indices of a batch's documents, their ids `(documents, length)`, the gradients of the
values that the first layer differentiated got `(documents, length, hidden)`, of rows of the
embedding where all layers are, and what `also` returned."""
Also = Callable[[list[int], torch.Tensor], Any]
"""Gets the indices of a batch's documents, and log-probabilities `(documents, length, vocabulary)`
that can be differentiated, by parameters too."""


def run_backward(
    model: Any,
    documents: Sequence[Document],
    calls: Calls,
    each: Each,
    *,
    also: Also | None = None,
    seed: int,
    batch_tokens: int,
    first_layer: int = 0,
    threads: int = 1,
    labels: "Labels | None" = None,
) -> None:
    """Runs documents forwards, and backwards from log p(drawn label), batch by batch.

    Args:
        model: of transformers, whose experts are differentiable from `first_layer` on.
        documents: tokens to run.
        calls: of the hooks on products, which are made batch by batch, after the backward passes.
        each: called after a batch's calls.
        also: called within a batch's passes, from any thread, with no hook listening; needs 0 as
            the first layer.
        seed: of the labels drawn from the model.
        batch_tokens: tokens per pass.
        first_layer: the lowest layer that gradients go back through; the number of layers for that
            of the head alone.
        threads: batches that run at once.
        labels: of a run that continues, in the place of `seed`; drawn batches are not run again.
    """
    inner, of_thread = model.model, threading.local()
    chosen = list(batches(documents, 0, len(documents), n_tokens=batch_tokens))
    labels = labels or Labels(seed)

    def enter(module: Any, args: Any) -> Any:
        of_thread.entered = args[0].detach().requires_grad_()
        return (of_thread.entered, *args[1:])

    @torch.inference_mode(False)
    @torch.enable_grad()
    def run(number: int) -> tuple[Any, torch.Tensor, torch.Tensor, Any]:
        ids = token_ids(model, [documents[i] for i in chosen[number]])
        lookup = model.get_input_embeddings()
        rows = functional.embedding(ids, lookup.weight, lookup.padding_idx)
        if also is None:
            rows = rows.detach().clone().requires_grad_(not first_layer)
        with calls.kept() as kept, labels.turn(number) as draw:
            given = embedded(model, rows)
            hidden = inner(inputs_embeds=given, use_cache=False).last_hidden_state
            log_probs = torch.log_softmax(head(model, hidden), -1)
            flat = log_probs.flatten(0, 1)
            drawn_labels = draw(flat.detach().exp())
            leaf = of_thread.entered if first_layer else rows
            (gradient,) = torch.autograd.grad(
                flat.gather(1, drawn_labels).sum(), leaf, retain_graph=also is not None
            )
        result = None if also is None else also(chosen[number], log_probs)
        return kept, ids, gradient, result

    handles = []
    if first_layer:
        entry = last_norm(model) if first_layer == len(inner.layers) else inner.layers[first_layer]
        handles.append(entry.register_forward_pre_hook(enter))
    try:
        left = range(labels.n_done, len(chosen))
        passes = side_by_side(run, left, affordable_threads(model, threads))
        for number, (kept, ids, gradient, result) in zip(left, passes, strict=True):
            for take, args in kept:
                take(*args)
            each(chosen[number], ids, gradient, result)
    finally:
        for handle in handles:
            handle.remove()


class Labels:
    """Draws labels batch by batch from one generator, in order, from any thread.

    Args:
        seed: of the generator.
        n_done: batches that were drawn before.
        state: of the generator after these.

    Attributes:
        n_done: see above.
    """

    def __init__(self, seed: int, n_done: int = 0, state: torch.Tensor | None = None) -> None:
        self.n_done = n_done
        self._generator = torch.Generator().manual_seed(seed)
        if state is not None:
            self._generator.set_state(state)
        self._drawn: dict[int, threading.Event] = {}
        self._states: dict[int, torch.Tensor] = {}

    @contextmanager
    def turn(self, number: int) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Gives what draws labels `(tokens, 1)` of a batch from probabilities `(tokens, vocab)`.

        It waits for all batches before; a batch that ends without a draw lets the next one go on.
        """

        def draw(probabilities: torch.Tensor) -> torch.Tensor:
            if number > self.n_done:
                self._event(number - 1).wait()
            labels = drawn(probabilities, self._generator)
            self._states[number] = self._generator.get_state()
            self._event(number).set()
            return labels

        try:
            yield draw
        finally:
            self._event(number).set()

    def state_after(self, number: int) -> torch.Tensor:
        """Returns the generator's state after a batch of this run was drawn."""
        return self._states[number]

    def _event(self, number: int) -> threading.Event:
        return self._drawn.setdefault(number, threading.Event())


def divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Returns KL(original || candidate), summed over tokens, with its gradient by the candidate.

    Args:
        reference: the original's log-probabilities, `(tokens, vocabulary)`, made in inference mode.
        candidate: the candidate's, in the same shape.
    """
    fixed = reference.clone()
    return (fixed.exp() * (fixed - candidate)).sum()


def drawn(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws one label per row of `(tokens, vocabulary)`, `(tokens, 1)`, the same on any device."""
    labels = torch.multinomial(probabilities.cpu(), 1, generator=generator)
    return labels.to(probabilities.device)
