"""Second moments of what a model's matrices multiply: what a rounding error of weights costs.

In: a model, documents, groups of its layout. Out: for each group, H `(in, in)`, of routed experts
`(experts, in, in)`, of `k_b` and `v_b` `(heads, in, in)`, float32, on the model's torch device. An
error `e` of a row costs `e H e^T`, up to a factor that all rows share. Invariants: H is symmetric
and positive definite, a weighted mean per token that reached the matrix, and the same however many
passes a cap on memory makes of it.

*Plain* H is the mean of x x^T. *Fisher-weighted* H weighs every token with |g|^2, the squared
gradient of log p(drawn label) at the matrix's output: the input factor of `Curvature`, whose prices
are `1/2 sum over rows of share_r e_r H e_r^T`, per token that reached the matrix.

Groups that are more than one matrix times one input:

- Routed experts see few tokens each, so an expert's H is a mean over its tokens and
  `pseudo_tokens` tokens of its layer's H; an expert that no token reached has its layer's.
- `v_b` is the value half of `kv_b`: by head, the latents, weighted with the gradients of that
  head's values alone. All heads have the same plain H.
- `k_b` is the key half transposed: by head, it multiplies the query's part without rotation. The
  weight is the squared gradient of that product, the absorbed query, which
  `products.watch_absorbed_queries` derives exactly.
- An embedding is looked up: row r costs `sum over its tokens of (g e_r)^2`, and a tied one, as the
  head, `share_r e_r A e_r^T` too. So every row has an H_r of its own, and one H must stand for all.
  Errors that are chosen by H have the covariance `c_r det(H)^(1/in) H^-1`, with `c_r` the mean
  square of the row, which its block scales are proportional to. The summed price is then
  proportional to `tr(S H^-1) det(H)^(1/in)` with `S = sum over r of c_r H_r`, and by the
  inequality of means least for H proportional to S. Hence
  `H = (sum of c_r share_r) A + sum over tokens of c_id g g^T`.
  Plain H of a tied embedding is the head's; of an untied one, which multiplies nothing, the
  identity.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allocator.families import Role
from allocator.files.progress import Step, step, stepping
from allocator.profiling.products import (
    Calls,
    Product,
    SecondMoment,
    product_name,
    run_backward,
    watch_absorbed_queries,
    watch_experts,
    watch_products,
    weighted,
)
from allocator.profiling.statistics import watch_inputs
from allocator.scoring.candidates import Candidate
from allocator.scoring.documents import Document, batches
from allocator.scoring.experts import ExpertCode, use_observer, use_sorted_experts
from allocator.scoring.layer_checkpoints import LayerCheckpoints
from allocator.scoring.modules import experts_of
from allocator.scoring.split_layers import Routed
from allocator.scoring.streamed_model import NO_BIASES, Biases, Routing, States, StreamedModel
from allocator.scoring.swap_model import SwapModel, device_of, parameter_of, token_ids
from allocator.targets import Group, Layout

_FEW = 256
"""Tokens that are gathered before a product adds them to a sum: enough for a fast product."""

PASS_BYTES = 2 << 30
"""Of the sums of one pass with the model in memory, unless the caller says otherwise."""
STREAMED_BYTES = 512 << 20
"""The same layer by layer."""
_PER_HEAD = (Role.K_B, Role.V_B)


@dataclass(frozen=True)
class Smoothing:
    """What makes a mean over few tokens fit for use.

    Attributes:
        pseudo_tokens: tokens of its layer's H that are added to an expert's.
        damping: share of the mean of H's diagonal that is added to the diagonal.
    """

    pseudo_tokens: float = 256.0
    damping: float = 0.01


DEFAULT_SMOOTHING = Smoothing()


def second_moments(
    swap: SwapModel,
    documents: Sequence[Document],
    groups: Iterable[Group],
    *,
    fisher: bool = True,
    smoothing: Smoothing = DEFAULT_SMOOTHING,
    memory_bytes: float = PASS_BYTES,
    seed: int = 0,
    batch_tokens: int = 1024,
    threads: int = 1,
    progress: bool = False,
) -> Iterator[tuple[Group, torch.Tensor]]:
    """Measures second moments in what a model holds now, which may not change meanwhile.

    Args:
        swap: holds the candidate; routed experts are its retained ones, in order.
        documents: tokens to run.
        groups: of its layout, all or some.
        fisher: weighs tokens with squared gradients; needs a backward pass of the whole model.
        smoothing: of the means.
        memory_bytes: cap on what the sums of one pass take; groups beyond it are measured in
            further passes over the documents, one group at least in each.
        seed: of the labels drawn from the model.
        batch_tokens: tokens per forward pass.
        threads: passes with gradients that run at once; sums do not depend on it.
        progress: shows a bar over documents of all passes.

    Yields:
        Each group, in the order given, and its H, which is freed when the caller drops it. Groups
        that multiply one input may share one tensor: it is to be read alone.
    """
    passes = _passes(swap.retained, groups, fisher, memory_bytes)
    with step(
        "second moments", len(passes) * len(documents), unit="documents", shown=progress
    ) as bar:
        for chosen in passes:
            sums = _sums(swap.retained, chosen, fisher, swap.model)
            if fisher:
                _run_fisher(swap, documents, chosen, sums, seed, batch_tokens, threads, bar)
            else:
                _run_plain(swap, documents, chosen, sums, batch_tokens, bar)
            for group in chosen:
                yield group, sums.pop(group.name).mean(group, smoothing)


class _Sums:
    """The sums of one group, or of several that multiply one input.

    Args:
        n: experts, or heads, or 1.
        width: input channels.
        n_heads: heads that share the one sum.
        device: torch's.
    """

    def __init__(self, n: int, width: int, device: torch.device, n_heads: int = 0) -> None:
        with torch.inference_mode(False):
            self.stack = torch.zeros(n, width, width, device=device)
        self.each = [SecondMoment(total, min(_FEW, width)) for total in self.stack]
        self._n_heads = n_heads
        self._smooth: torch.Tensor | None = None

    def by_head(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Adds `(tokens, heads, in)`, weighted with `(tokens, heads)`."""
        for head, sums in enumerate(self.each):
            mine = x[:, head]
            sums.add(mine if weights is None else weighted(mine, weights[:, head]))

    def mean(self, group: Group, smoothing: Smoothing) -> torch.Tensor:
        """Returns H in the group's shape."""
        if self._smooth is None:
            for sums in self.each:
                sums.total()
            n_tokens = [sums.n_tokens for sums in self.each]
            with torch.inference_mode(False):
                if group.role.is_expert:
                    mean = self.stack.sum(0).div_(max(sum(n_tokens), 1))
                    shrink(self.stack, n_tokens, mean, smoothing.pseudo_tokens)
                else:
                    for h, n in zip(self.stack, n_tokens, strict=True):
                        h.div_(max(n, 1))
                damp(self.stack, smoothing.damping)
            self._smooth = self.stack
        if self._n_heads:
            return self._smooth.expand(self._n_heads, -1, -1)
        apart = group.role.is_expert or group.role in _PER_HEAD
        return self._smooth if apart else self._smooth[0]


class _RowSums(_Sums):
    """The sums of an embedding or head, whose rows have second moments of their own.

    Args:
        rows: mean square of each row, over the mean of all rows, `(rows,)`.
    """

    def __init__(self, width: int, device: torch.device, rows: torch.Tensor) -> None:
        super().__init__(1, width, device)
        self.rows = rows
        self.product = Product(self.each[0])
        with torch.inference_mode(False):
            self.looked_up = SecondMoment(torch.zeros_like(self.stack[0]), min(_FEW, width))

    def mean(self, group: Group, smoothing: Smoothing) -> torch.Tensor:
        """Returns H, `(in, in)`."""
        total = self.product.inputs.total()
        if isinstance(self.product.rows, torch.Tensor):
            total.mul_(float(self.product.shares @ self.rows.double()))
        total.add_(self.looked_up.total())
        self.each[0].n_tokens = self.looked_up.n_tokens
        return super().mean(group, smoothing)


def shrink(
    sums: torch.Tensor, n_tokens: Sequence[int], mean: torch.Tensor, pseudo_tokens: float
) -> None:
    """Makes the sums of a layer's experts means, in place, each shrunk to the mean of all.

    Args:
        sums: `(experts, in, in)`.
        n_tokens: tokens that reached each expert.
        mean: per token of the layer, `(in, in)`.
        pseudo_tokens: of the layer's mean that each expert gets in addition.
    """
    for h, n in zip(sums, n_tokens, strict=True):
        added = pseudo_tokens or float(n == 0)  # an expert without tokens has its layer's mean
        h.add_(mean, alpha=added).div_(n + added)


def damp(moments: torch.Tensor, damping: float) -> None:
    """Adds a share of a diagonal's mean to it, and makes each matrix symmetric, in place.

    Where nothing was measured, the identity is put.

    Args:
        moments: `(n, in, in)`.
        damping: the share.
    """
    for h in moments:
        h.add_(h.T.clone()).mul_(0.5)  # products are symmetric up to rounding
        scale = float(h.diagonal().mean())
        h.diagonal().add_(damping * scale if scale > 0 else 1.0)


def moments_bytes(n: int, width: int) -> int:
    """Returns the bytes that the sums of `n` matrices with `width` inputs take."""
    return 4 * n * width * (width + min(_FEW, width))


# -- which groups are measured together


_ONE_INPUT = {
    Role.EXPERT_GATE: "experts", Role.EXPERT_UP: "experts",
    Role.SHARED_GATE: "shared", Role.SHARED_UP: "shared", Role.LATENT_IN: "shared",
    Role.MLP_GATE: "mlp", Role.MLP_UP: "mlp",
    Role.Q: "attention", Role.K: "attention", Role.V: "attention",
    Role.Q_A: "attention", Role.KV_A: "attention",
    Role.ATTENTION_GATE: "attention",
    Role.LINEAR_QKVZ: "attention", Role.LINEAR_QKV: "attention", Role.LINEAR_Z: "attention",
}  # fmt: skip
"""Roles that multiply one input of a layer: their plain H is the same."""


def _site(group: Group, fisher: bool) -> str:
    """Names the input that a group multiplies, where others multiply it too."""
    if not fisher and group.role in _ONE_INPUT:
        return f"layers.{group.layer} {_ONE_INPUT[group.role]}"
    return group.name


Retained = Mapping[int, tuple[int, ...]]


def _count(retained: Retained, group: Group, fisher: bool) -> int:
    """Matrices in a group's sums."""
    if group.role.is_expert:
        return len(group.experts(retained))
    if group.role in _PER_HEAD:
        return group.shape[0] if fisher or group.role is Role.K_B else 1
    return 2 if fisher and group.role is Role.EMBEDDING else 1


def _passes(
    retained: Retained, groups: Iterable[Group], fisher: bool, memory_bytes: float
) -> list[list[Group]]:
    """Groups by pass, in order, as many as fit."""
    passes: list[list[Group]] = []
    free, sites = 0.0, set[str]()
    for group in groups:
        needed = moments_bytes(_count(retained, group, fisher), group.shape[-1])
        site = _site(group, fisher)
        if not passes or (needed > free and site not in sites):
            passes.append([])
            free, sites = memory_bytes, set()
        if site not in sites:
            free -= needed
        sites.add(site)
        passes[-1].append(group)
    return passes


def _sums(
    retained: Retained, groups: Sequence[Group], fisher: bool, model: Any
) -> dict[str, _Sums]:
    """Empty sums by group; those of one input are the same object."""
    device = device_of(model)
    sites: dict[str, _Sums] = {}
    for group in groups:
        site, width = _site(group, fisher), group.shape[-1]
        if site in sites:
            continue
        if fisher and group.role is Role.EMBEDDING:
            rows = parameter_of(model, group.sources[0]).detach().square().mean(-1)
            sites[site] = _RowSums(width, device, rows / rows.mean())
        else:
            shared = not fisher and group.role is Role.V_B
            n = _count(retained, group, fisher)
            sites[site] = _Sums(n, width, device, group.shape[0] if shared else 0)
    return {group.name: sites[_site(group, fisher)] for group in groups}


# -- passes


def _run_plain(
    swap: SwapModel,
    documents: Sequence[Document],
    groups: Sequence[Group],
    sums: dict[str, _Sums],
    batch_tokens: int,
    bar: Step,
) -> None:
    model, layout = swap.model, swap.layout
    handles = _watch_plain(model, layout, groups, sums)
    for layer, members in _experts_of(groups).items():
        use_observer(model, layer, _observer([(g.role, sums[g.name]) for g in members]))
    try:
        for batch in batches(documents, 0, len(documents), n_tokens=batch_tokens):
            with torch.inference_mode():
                # no head where nobody wants what it multiplies
                whole = any(g.layer is None for g in groups)
                ids = token_ids(model, [documents[i] for i in batch])
                (model if whole else model.model)(input_ids=ids, use_cache=False)
            bar.update(len(batch))
    finally:
        for handle in handles:
            handle.remove()
        use_sorted_experts(model, layout.layers)


def _watch_plain(
    model: Any,
    layout: Layout,
    groups: Sequence[Group],
    sums: Mapping[str, _Sums],
    wanted: Callable[[], bool] = lambda: True,
) -> list[Any]:
    """Hooks that feed the sums of groups that are no routed experts, each input once.

    Inputs are taken while they are `wanted`.
    """

    def take(name: str, x: torch.Tensor) -> None:
        if not wanted():
            return
        if layout.groups[name].role is Role.K_B:
            sums[name].by_head(x)
        else:
            sums[name].each[0].add(x.flatten(0, -2))

    one_each = {_site(group, False): group for group in groups}
    return watch_inputs(model, layout, one_each.values(), take)


def _observer(members: Sequence[tuple[Role, _Sums]]) -> Any:
    # gate and up may share their sums
    unique = {id(sums): (role is Role.EXPERT_DOWN, sums) for role, sums in members}

    def observe(expert: int, inputs: Any, inner: Any, outputs: Any, gates: Any) -> None:
        for is_down, sums in unique.values():
            sums.each[expert].add(inner if is_down else inputs)

    return observe


def _run_fisher(
    swap: SwapModel,
    documents: Sequence[Document],
    groups: Sequence[Group],
    sums: dict[str, _Sums],
    seed: int,
    batch_tokens: int,
    threads: int,
    bar: Step,
) -> None:
    model, layout, calls = swap.model, swap.layout, Calls()
    take = calls.later(_TakeFisher(layout, sums))
    matrices = [g for g in groups if not g.role.is_expert and g.role is not Role.K_B]
    handles = watch_products(model, layout, matrices, take)
    for group in groups:
        if group.role is Role.K_B:
            assert group.layer is not None
            by_head = calls.later(sums[group.name].by_head)
            handles += watch_absorbed_queries(model, layout, group.layer, by_head)
    for layer in layout.layers:
        watch_experts(model, layer, take)
    embedding = sums.get(str(Role.EMBEDDING))

    def each(batch: list[int], ids: torch.Tensor, gradient: torch.Tensor, _: None) -> None:
        if isinstance(embedding, _RowSums):
            weights = embedding.rows[ids.flatten()]
            embedding.looked_up.add(weighted(gradient.flatten(0, -2), weights))
        bar.update(len(batch))

    n_layers = layout.inventory.n_layers
    layers = [n_layers if g.layer is None else g.layer for g in groups]
    try:
        run_backward(
            model, documents, calls, each, seed=seed, batch_tokens=batch_tokens,
            first_layer=0 if embedding else min(layers), threads=threads,
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
        use_sorted_experts(model, layout.layers)


class _TakeFisher:
    """Adds what watched products give to the sums of the groups that are wanted."""

    def __init__(self, layout: Layout, sums: dict[str, _Sums]) -> None:
        self._sums = sums
        self._latent, self._heads = (
            layout.inventory.dimensions.latent,
            layout.inventory.dimensions.heads,
        )
        self._halves = {
            product_name(layout.groups[name]): sums[name]
            for name in sums
            if layout.groups[name].role is Role.V_B
        }

    def __call__(self, name: str, expert: int, x: torch.Tensor, gradient: torch.Tensor) -> None:
        if name in self._halves:
            assert self._latent is not None
            values = gradient.view(len(gradient), self._heads, -1)[..., self._latent.nope :]
            by_head = x[:, None].expand(-1, self._heads, -1)
            self._halves[name].by_head(by_head, values.square().sum(-1))
        elif name in self._sums:
            sums = self._sums[name]
            if isinstance(sums, _RowSums):
                sums.product.add(x, gradient)
            else:
                sums.each[expert].add(weighted(x, gradient.square().sum(-1)))


def _experts_of(groups: Sequence[Group]) -> dict[int, list[Group]]:
    by_layer: dict[int, list[Group]] = {}
    for group in groups:
        if group.role.is_expert and group.layer is not None:
            by_layer.setdefault(group.layer, []).append(group)
    return by_layer


# -- layer by layer


def second_moments_streamed(
    streamed: StreamedModel,
    documents: Sequence[Document],
    groups: Iterable[Group],
    candidate: Candidate | None = None,
    *,
    original_inputs: bool = False,
    smoothing: Smoothing = DEFAULT_SMOOTHING,
    memory_bytes: float = STREAMED_BYTES,
    scratch: Path,
    of: str = "",
    batch_tokens: int = 2048,
    progress: bool = False,
) -> Iterator[tuple[Group, tuple[int, ...], torch.Tensor]]:
    """Measures plain second moments layer by layer; neither model nor moments need fit in memory.

    A layer runs on with the candidate's weights as they are when the caller asks for what follows:
    one that has put finished weights of the layer into the candidate's own gets the moments of
    what these compute from the next layer on.

    Args:
        streamed: of the layout.
        documents: tokens to run.
        groups: of its layout, all or some: those that a stopped caller still lacks.
        candidate: whose retained experts are wanted; the original by default.
        original_inputs: takes what the original multiplies; by default it is what the candidate
            does, from states that its layers upstream have changed.
        smoothing: of the means.
        memory_bytes: cap on what sums take at a time; what is beyond it comes from further passes
            over a layer, one matrix at least in each. A layer's mean of experts is in addition.
        scratch: an existing folder, for the states of these documents; a stopped pass resumes there
            at the layer that the first of `groups` is in. Its states are removed when a group of
            the next layer is asked for.
        of: what the files there belong to.
        batch_tokens: tokens per forward pass of a layer.
        progress: shows a bar over layers.

    Yields:
        A group, and H. Groups come layer by layer, then those outside of the layers; each once,
        with no experts, but a routed projection some experts at a time: which ones, as places
        among the retained, and H of those, `(experts, in, in)`. Groups that multiply one input may
        share one tensor: it is to be read alone.
    """
    target = candidate or streamed.original
    run = _Stream(
        streamed, streamed.original if original_inputs else target, target.retained_experts,
        smoothing, memory_bytes,
    )  # fmt: skip
    by_layer: dict[int | None, list[Group]] = {}
    for group in groups:
        by_layer.setdefault(group.layer, []).append(group)
    outside = by_layer.pop(None, [])
    inside = sorted(layer for layer in by_layer if layer is not None)
    head = [group for group in outside if group.importance]
    last = streamed.inventory.n_layers if head else max(inside, default=-1) + 1
    first = inside[0] if inside else last
    if last:
        checkpoints = streamed.layer_checkpoints(scratch, documents, batch_tokens, of)
        reached, states = run.resume(checkpoints, first)
        for layer in stepping(
            range(reached, last), "second moments", initial=reached, unit="layers", shown=progress
        ):
            yield from run.layer(layer, by_layer.get(layer, []), states)
            if head or layer + 1 < last:
                run.advance(checkpoints, layer, states)
        yield from run.outside(head, states)
    for group in outside:
        if not group.importance:  # multiplies nothing: the identity, as nothing is added
            sums = _sums(run.retained, [group], False, streamed.model)
            yield group, (), sums.pop(group.name).mean(group, smoothing)


@dataclass(frozen=True)
class _Stream:
    """A pass over the layers of what `candidate` computes."""

    streamed: StreamedModel
    candidate: Candidate
    retained: Retained
    smoothing: Smoothing
    memory_bytes: float

    @torch.no_grad()
    def resume(self, checkpoints: LayerCheckpoints, layer: int) -> tuple[int, States]:
        """Returns the last layer up to `layer` whose states are known, and these."""
        for known in range(layer, 0, -1):
            if (hidden := checkpoints.load("states", known)) is not None:
                return known, States(self.candidate, [0], hidden)
        embedded = self.streamed.embed(checkpoints.documents, self.candidate)
        self.streamed.weights.forget()
        return 0, States(self.candidate, [0], embedded)

    @torch.no_grad()
    def advance(self, checkpoints: LayerCheckpoints, layer: int, states: States) -> None:
        """Runs a layer."""
        self.streamed.run(layer, [states])
        checkpoints.save("states", layer + 1, states.hidden)
        checkpoints.remove("states", layer)

    def layer(
        self, layer: int, groups: Sequence[Group], states: States
    ) -> Iterator[tuple[Group, tuple[int, ...], torch.Tensor]]:
        """Yields the moments of a layer's groups."""
        dense = [group for group in groups if not group.role.is_expert]
        for chosen in _passes(self.retained, dense, False, self.memory_bytes):
            sums = _sums(self.retained, chosen, False, self.streamed.model)
            self._forward(layer, chosen, sums, states)
            for group in chosen:
                yield group, (), sums.pop(group.name).mean(group, self.smoothing)
        experts = [group for group in groups if group.role.is_expert]
        if not experts:
            return
        routed, biases = self._forward(layer, [], {}, states)
        routing = Routing(routed, self.candidate.retained_experts[layer], biases)
        for downs in (False, True):
            chosen = [g for g in experts if (g.role is Role.EXPERT_DOWN) is downs]
            if chosen:
                yield from self._experts(layer, chosen, routing)

    def outside(
        self, groups: Sequence[Group], states: States
    ) -> Iterator[tuple[Group, tuple[int, ...], torch.Tensor]]:
        """Yields the moments of the head, from the last layer's output."""
        for group in groups:
            sums = _sums(self.retained, [group], False, self.streamed.model)
            self._head(sums[group.name], states)
            yield group, (), sums.pop(group.name).mean(group, self.smoothing)

    @torch.no_grad()
    def _head(self, sums: _Sums, states: States) -> None:
        for hidden in states.hidden:
            sums.each[0].add(self.streamed.normed(hidden, self.candidate).flatten(0, -2))

    @torch.no_grad()
    def _forward(
        self, layer: int, groups: Sequence[Group], sums: Mapping[str, _Sums], states: States
    ) -> tuple[list[Routed], Biases]:
        """Runs a layer but its routed experts, watched; returns what these were asked for.

        Their biases are returned too.
        """
        streamed = self.streamed
        handles = _watch_plain(
            streamed.model, streamed.layout, groups, sums, lambda: not streamed.asking
        )
        try:
            streamed.install(layer, self.candidate)
            if groups and not streamed.adds(layer, states.hidden[0]):  # some may follow the experts
                streamed.run(layer, [States(self.candidate, [0], list(states.hidden))])
                return [], NO_BIASES
            for hidden in states.hidden:
                if groups:
                    streamed.forward(layer, hidden)
                else:
                    streamed.ask(layer, hidden)
        finally:
            for handle in handles:
                handle.remove()
        biases = streamed.biases(layer)
        streamed.leave(layer)
        return streamed.taken(), biases

    def _experts(
        self, layer: int, groups: Sequence[Group], routing: Routing
    ) -> Iterator[tuple[Group, tuple[int, ...], torch.Tensor]]:
        """Yields the moments of projections that multiply one input, some experts at a time."""
        is_down, width = groups[0].role is Role.EXPERT_DOWN, groups[0].shape[-1]
        retained = self.retained[layer]
        mean = self._mean(layer, is_down, width, routing)
        step = max(1, int(self.memory_bytes // moments_bytes(1, width)))
        for start in range(0, len(retained), step):
            places = tuple(range(start, min(start + step, len(retained))))
            h = self._stack(layer, is_down, [retained[i] for i in places], routing, mean)
            for group in groups:
                yield group, places, h
            del h  # not in memory beside the next ones

    @torch.no_grad()
    def _mean(self, layer: int, is_down: bool, width: int, routing: Routing) -> torch.Tensor:
        """The layer's mean over the tokens of the wanted experts, `(in, in)`."""
        total = SecondMoment(torch.zeros(width, width, device=self.streamed.device), width)
        if not is_down and self.retained is self.candidate.retained_experts:
            total.add(routing.inputs)  # every token reaches equally many
        else:
            for _, x in self._inputs(layer, is_down, self.retained[layer], routing):
                total.add(x)
        return total.total().div_(max(total.n_tokens, 1))

    @torch.no_grad()
    def _stack(
        self,
        layer: int,
        is_down: bool,
        experts: Sequence[int],
        routing: Routing,
        mean: torch.Tensor,
    ) -> torch.Tensor:
        """H of some experts, `(experts, in, in)`."""
        sums = _Sums(len(experts), len(mean), self.streamed.device)
        for expert, x in self._inputs(layer, is_down, experts, routing):
            sums.each[experts.index(expert)].add(x)
        for each in sums.each:
            each.total()
        n_tokens = [each.n_tokens for each in sums.each]
        shrink(sums.stack, n_tokens, mean, self.smoothing.pseudo_tokens)
        damp(sums.stack, self.smoothing.damping)
        return sums.stack

    def _inputs(
        self, layer: int, is_down: bool, experts: Sequence[int], routing: Routing
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields experts that tokens reached, and what their matrix multiplies, `(tokens, in)`."""
        streamed = self.streamed
        groups = streamed.projections(layer)[:-1] if is_down else []
        code = ExpertCode(experts_of(streamed.model, layer))
        reached = [expert for expert in experts if expert in routing.reached]
        if not reached:
            return
        for expert in streamed.weights.in_turn(reached, groups, [self.candidate]):
            _, tokens = routing.places(expert)
            x = routing.inputs[tokens]
            if is_down:
                matrices = [streamed.expert(self.candidate, group, expert) for group in groups]
                products = routing.products(expert, x, matrices, code.form)
                x = code.inner_of_halves(products)
            yield expert, x
