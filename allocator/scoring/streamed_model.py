"""A model that need not fit in memory: it runs layer by layer, several candidates side by side.

In: a layout, encoded weights, hidden states. Out: the states after each layer, and logits.
Invariants: what the whole model computes, up to the order of float32 sums; in one pass every matrix
of a layer is read from the checkpoint at most once, however many candidates there are. In memory
are hidden states (tokens x hidden of every different computation, twice while experts run), one
layer without its routed experts, and two routed experts (one is read ahead).

A layer runs in steps (see `split_layers`). First everything but its routed experts, batch by batch,
as the architecture's own module computes it; the experts' inputs and gates are recorded. Then
expert by expert, over all tokens of all candidates: its original weights are read once, encoded in
whatever formats the candidates lack, and each candidate adds what its own decoded weights give. An
expert that no token reaches is neither read nor encoded. Where more than an addition follows the
experts, the layer runs once more, given their sum.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from allocator.families import Role
from allocator.scoring.arranged import arrange
from allocator.scoring.candidates import Candidate, Weights
from allocator.scoring.documents import Document, batches
from allocator.scoring.experts import ExpertCode, ExpertForm, Observer
from allocator.scoring.kv_cache import KeysValues, attach, keys_values
from allocator.scoring.layer_checkpoints import Batches, LayerCheckpoints
from allocator.scoring.layer_inputs import LayerDecisions
from allocator.scoring.model_ends import (
    Multiply,
    entered,
    has_plain_embedding,
    has_plain_head,
    head,
)
from allocator.scoring.modules import experts_of, last_norm
from allocator.scoring.split_layers import Routed, SplitLayers
from allocator.scoring.swap_model import (
    check_names,
    empty,
    install,
    install_full_precision,
    place,
    resize_biases,
    resize_router,
    set_experts_used,
    skeleton,
)
from allocator.targets import FullPrecision, Group, Layout, target_named

_PROJECTIONS = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


Biases = tuple[torch.Tensor | None, torch.Tensor | None]
"""Of the retained experts' first products and of their `down`, `(retained, out)` each, if any."""
NO_BIASES: Biases = (None, None)


@dataclass(eq=False)
class States:
    """Hidden states that some candidates have in common so far.

    Attributes:
        candidate: one of them.
        members: whose they are.
        hidden: by batch, `(documents, length, hidden)`.
        routed: by batch, while a layer runs.
        biases: of its experts meanwhile.
    """

    candidate: Candidate
    members: list[int]
    hidden: list[torch.Tensor]
    routed: list[Routed] = field(default_factory=list)
    biases: Biases = NO_BIASES


class StreamedModel:
    """A transformers model with memory for one layer at a time.

    Args:
        layout: the groups.
        weights: where their values come from.
        device: torch's, that computes, and holds the layer and all states.
        rows_bytes: of the head, float32, decoded at a time.
    """

    def __init__(
        self,
        layout: Layout,
        weights: Weights,
        *,
        device: str = "cpu",
        rows_bytes: int = 128 << 20,
    ) -> None:
        self.layout = layout
        self.inventory = layout.inventory
        self.weights = weights
        self._rows_bytes = rows_bytes
        self.model = skeleton(self.inventory.path, layout.computed or self.inventory.config, device)
        arrange(self.model, layout.groups.values(), torch.device(device))
        self.inventory.check_unchanged()
        self.device = torch.device(device)
        check_names(self.model, layout)
        self.original = Candidate.original(layout)
        self.decisions = LayerDecisions(layout)
        self._keys_values: dict[str, KeysValues | None] = {}
        self._kept_as: KeysValues | None = None
        attach(self.model, lambda: self._kept_as)
        experts = {layer: experts_of(self.model, layer) for layer in layout.layers}
        self._split = SplitLayers(self.model, experts)
        some = torch.linspace(-1, 1, self.inventory.dimensions.hidden)[None].to(device)
        self._plain_head = has_plain_head(self.model, some)
        self._plain_embedding = has_plain_embedding(self.model, some)
        self._groups: dict[int | None, list[Group]] = {}
        for group in layout.groups.values():
            self._groups.setdefault(group.layer, []).append(group)
        self._full_precision: dict[int | None, list[FullPrecision]] = {}
        for tensor in layout.full_precision:
            self._full_precision.setdefault(tensor.layer, []).append(tensor)

    def layer_checkpoints(
        self, folder: Path, documents: Sequence[Document], batch_tokens: int, of: str = ""
    ) -> LayerCheckpoints:
        """Opens the checkpoints of a pass over these documents, which say its batches too.

        Args:
            folder: an existing one, of this pass alone.
            documents: of the pass.
            batch_tokens: tokens per batch.
            of: what its files belong to.
        """
        chosen = [
            [documents[i] for i in batch]
            for batch in batches(documents, 0, len(documents), n_tokens=batch_tokens)
        ]
        return LayerCheckpoints(folder, chosen, self.device, of)

    def begin(self, chosen: Sequence[Sequence[Document]]) -> States:
        """Returns the original's states before the first layer, for documents by batch."""
        return States(self.original, [0], self.embed(chosen, self.original))

    def states_before(
        self,
        layer: int,
        checkpoints: LayerCheckpoints,
        what: str = "states",
        candidate: Candidate | None = None,
        *,
        forget: bool = False,
    ) -> Batches:
        """Returns what enters a layer, from the nearest layer before it whose file is whole.

        Args:
            layer: that the states enter.
            checkpoints: of the pass; states of the layers in between are saved there.
            what: names the states there.
            candidate: whose embedding and layers compute them; the original's by default.
            forget: removes the states of a layer once those of the next are saved.

        Returns:
            By batch, `(documents, length, hidden)` each.
        """
        candidate = candidate or self.original
        first, hidden = layer, None
        while first and (hidden := checkpoints.load(what, first)) is None:
            first -= 1
        if hidden is None:
            hidden = self.embed(checkpoints.documents, candidate)
            self.weights.forget()
        for at in range(first, layer):
            self.run(at, [States(candidate, [0], hidden)])
            checkpoints.save(what, at + 1, hidden)
            if forget:
                checkpoints.remove(what, at)
        return hidden

    def embed(
        self, chosen: Sequence[Sequence[Document]], candidate: Candidate
    ) -> list[torch.Tensor]:
        """Returns what enters the first layer, by batch of documents of one length.

        Each is `(documents, length, hidden)`.
        """
        looked_up = self.look_up(chosen, candidate)
        return [entered(self.model, rows) for rows in looked_up]

    def through_embedding(
        self, chosen: Sequence[Sequence[Document]], gradients: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Returns gradients of the original's embedding rows, `(documents, length, hidden)` each.

        Args:
            chosen: documents by batch.
            gradients: of what enters the first layer, in the same shapes.
        """
        if self._plain_embedding:
            return list(gradients)
        of_rows: list[torch.Tensor] = []
        looked_up = self.look_up(chosen, self.original)
        for rows, gradient in zip(looked_up, gradients, strict=True):
            with torch.enable_grad():
                first = entered(self.model, rows.requires_grad_())
            of_rows += torch.autograd.grad(first, rows, gradient)
        return of_rows

    def look_up(
        self, chosen: Sequence[Sequence[Document]], candidate: Candidate
    ) -> list[torch.Tensor]:
        """Returns rows of the embedding by batch of documents, `(documents, length, hidden)`."""
        ids = [torch.tensor([d.ids for d in batch]) for batch in chosen]
        group = self.layout.groups[str(Role.EMBEDDING)]
        embeddings = [torch.empty(*batch.shape, group.shape[-1]) for batch in ids]
        for start, rows in self._chunks(group, candidate):
            for batch, values in zip(ids, embeddings, strict=True):
                here = (batch >= start) & (batch < start + len(rows))
                values[here] = rows[batch[here] - start]
        return [values.to(self.device) for values in embeddings]

    def normed(self, hidden: torch.Tensor, candidate: Candidate | None = None) -> torch.Tensor:
        """Returns what the head multiplies, `(tokens, hidden)`, from the last layer's output.

        Args:
            hidden: `(tokens, hidden)`.
            candidate: whose last norm it is; the original's by default.
        """
        self.install_last_norm(candidate or self.original)
        normed: torch.Tensor = last_norm(self.model)(hidden)
        return normed

    @torch.no_grad()
    def install_last_norm(self, candidate: Candidate) -> None:
        """Installs what is outside of the layers but embedding and head."""
        for tensor in self._full_precision[None]:
            values = self.weights.full_precision(candidate, tensor)
            install_full_precision(self.model, self.inventory.family, tensor, values)

    def logits(self, hidden: torch.Tensor, candidate: Candidate) -> torch.Tensor:
        """Returns logits `(tokens, vocabulary)` of the last layer's output `(tokens, hidden)`."""
        return self.head(self.normed(hidden, candidate), candidate)

    def all_logits(self, asked: Sequence[tuple[Candidate, torch.Tensor]]) -> list[torch.Tensor]:
        """Returns `logits` of several candidates' states; a head that some share is read once.

        Args:
            asked: candidates, each with the last layer's output `(tokens, hidden)`.

        Returns:
            `(tokens, vocabulary)` per candidate.
        """
        by_place: dict[int, torch.Tensor] = {}
        alike: dict[tuple[str | None, str], list[int]] = {}
        for i, (candidate, _) in enumerate(asked):
            head = candidate.format_of[self.output.name], candidate.weights_digest
            alike.setdefault(head, []).append(i)
        for places in alike.values():
            hidden = [asked[i][1] for i in places]
            logits = self.logits(torch.cat(hidden), asked[places[0]][0])
            by_place |= zip(places, torch.split(logits, [len(h) for h in hidden]), strict=True)
        return [by_place[i] for i in range(len(asked))]

    def head(self, normed: torch.Tensor, candidate: Candidate) -> torch.Tensor:
        """Returns logits `(tokens, vocabulary)` of what the last norm gives, `(tokens, hidden)`."""
        return self.around_head(normed, lambda x: self.products(x, candidate))

    def around_head(self, normed: torch.Tensor, multiply: Multiply) -> torch.Tensor:
        """Returns logits `(tokens, vocabulary)`, with gradients where these are on.

        Args:
            normed: what the last norm gives, `(tokens, hidden)`.
            multiply: what multiplies by the head.
        """
        if self._plain_head:  # without copies
            return multiply(normed)
        return head(self.model, normed, multiply)

    def products(self, x: torch.Tensor, candidate: Candidate) -> torch.Tensor:
        """Returns products `(tokens, vocabulary)` of the head with what it gets."""
        products = torch.empty(len(x), self.output.shape[0], device=self.device)
        for start, rows in self._chunks(self.output, candidate):
            torch.mm(x, rows.to(self.device).T, out=products[:, start : start + len(rows)])
        return products

    def through_head(self, gradient: torch.Tensor, candidate: Candidate) -> torch.Tensor:
        """Returns the gradient `(tokens, hidden)` of what a candidate's head multiplies.

        Args:
            gradient: of its products, `(tokens, vocabulary)`.
            candidate: whose head it is.
        """
        product = torch.zeros(len(gradient), self.output.shape[-1], device=self.device)
        for start, rows in self._chunks(self.output, candidate):
            product += gradient[:, start : start + len(rows)] @ rows.to(self.device)
        return product

    @property
    def output(self) -> Group:
        """The group that the head multiplies with."""
        role = Role.EMBEDDING if self.inventory.tied_embeddings else Role.HEAD
        return self.layout.groups[str(role)]

    def _chunks(self, group: Group, candidate: Candidate) -> Iterator[tuple[int, torch.Tensor]]:
        step = max(1, self._rows_bytes // (4 * group.shape[-1]))
        return self.weights.chunks(candidate, group, step)

    def run(self, layer: int, states: Sequence[States], *, observe: Observer | None = None) -> None:
        """Runs one layer, in place; `observe` sees its routed experts."""
        adds = True
        for state in states:
            self.install(layer, state.candidate)
            adds = self.adds(layer, state.hidden[0])
            for i, hidden in enumerate(state.hidden):
                if adds:
                    state.hidden[i] = self.forward(layer, hidden)
                else:
                    self.ask(layer, hidden)
            state.routed, state.biases = self.taken(), self.biases(layer)
        if adds:
            self.leave(layer)
        if layer in self.layout.layers:
            for state, routing in zip(
                states, self.run_experts(layer, states, observe), strict=True
            ):
                if adds:
                    routing.add_to(state.hidden)
                else:
                    self._run_on(layer, state, routing, again=len(states) > 1)
        if not adds:
            self.leave(layer)

    def _run_on(self, layer: int, state: States, routing: "Routing", *, again: bool) -> None:
        """Runs a layer with the sum of its routed experts; `again` where it holds another state."""
        if again:
            self.install(layer, state.candidate)
        for i, (hidden, experts_sum) in enumerate(zip(state.hidden, routing.sums(), strict=True)):
            state.hidden[i] = self.forward(layer, hidden, experts_sum)
        self.taken()

    def leave(self, layer: int) -> None:
        """Frees the memory of a layer."""
        self.weights.forget()
        empty(self.model.model.layers[layer])

    def install(self, layer: int, candidate: Candidate) -> None:
        """Installs everything of a layer but its routed experts."""
        if candidate.kv_format not in self._keys_values:
            target = target_named(self.layout.target)
            made = keys_values(target, self.inventory.dimensions, candidate.kv_format)
            self._keys_values[candidate.kv_format] = made
        self._kept_as = self._keys_values[candidate.kv_format]
        retained = candidate.retained_experts.get(layer)
        if retained is not None:
            resize_router(self.model, layer, len(retained))
            resize_biases(self.model, layer, len(retained))
            family = self.inventory.family
            set_experts_used(self.model, family, (layer,), candidate.experts_used)
        for group in self._groups[layer]:
            if not group.role.is_expert:
                values = self.weights.of(candidate, group)
                if group.role in (Role.K_B, Role.V_B):  # halves of one matrix
                    install(self.model, self.inventory.dimensions, group, values)
                else:
                    place(self.model, group, values)
        for tensor in self._full_precision[layer]:
            values = self.weights.full_precision(candidate, tensor)
            install_full_precision(self.model, self.inventory.family, tensor, values)

    def forward(
        self, layer: int, hidden: torch.Tensor, experts_sum: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs a layer on `(documents, length, hidden)`.

        Args:
            layer: an installed one.
            hidden: what enters it.
            experts_sum: what its routed experts give, `(tokens, hidden)`; zero by default.
        """
        return self._split.run(layer, hidden, experts_sum, self._kept_as)

    def ask(self, layer: int, hidden: torch.Tensor) -> None:
        """Runs a layer on `(documents, length, hidden)` up to its routed experts."""
        self._split.ask(layer, hidden, self._kept_as)

    def adds(self, layer: int, hidden: torch.Tensor) -> bool:
        """Returns whether an installed layer adds the sum of its routed experts to its output.

        Args:
            layer: an installed one.
            hidden: some states that enter it, `(documents, length, hidden)`.
        """
        return self._split.adds(layer, hidden, self._kept_as)

    @property
    def asking(self) -> bool:
        """Whether the running layer's products are no business of hooks, see `SplitLayers`."""
        return self._split.asking

    def taken(self) -> list[Routed]:
        """Returns what routed experts were asked for since the last call, by batch."""
        return self._split.taken()

    def run_experts(
        self, layer: int, states: Sequence[States], observe: Observer | None = None
    ) -> list["Routing"]:
        """Runs the routed experts of a layer, expert by expert, on what states ask for.

        Returns:
            What they give, one per state; the states ask for nothing then.
        """
        groups = self.projections(layer)
        code = ExpertCode(experts_of(self.model, layer))
        routings = []
        for state in states:
            retained = state.candidate.retained_experts[layer]
            routings.append(Routing(state.routed, retained, state.biases))
            state.routed, state.biases = [], NO_BIASES
        reached = sorted({e for routing in routings for e in routing.reached})
        candidates = [state.candidate for state in states]
        for expert in self.weights.in_turn(reached, groups, candidates):
            alike: dict[tuple[str | None, ...], list[int]] = {}
            for i, candidate in enumerate(candidates):
                if expert in routings[i].reached:
                    formats = tuple(self.weights.format_of(candidate, g, expert) for g in groups)
                    digests = any(formats) or routings[i].biased
                    own = candidate.weights_digest if digests else ""
                    alike.setdefault((*formats, own), []).append(i)
            for members in alike.values():
                weights = [self.expert(candidates[members[0]], g, expert) for g in groups]
                add_expert([routings[i] for i in members], expert, weights, code, observe)
        return routings

    def expert(self, candidate: Candidate, group: Group, expert: int) -> torch.Tensor:
        """Returns a routed expert's matrix, `(out, in)`, of a projection, on the torch device."""
        return torch.from_numpy(self.weights.of(candidate, group, expert)).to(self.device)

    def biases(self, layer: int) -> Biases:
        """Returns the biases of a layer's routed experts, as `install` has put them in."""
        if layer not in self.layout.layers:
            return NO_BIASES
        experts = experts_of(self.model, layer)
        return ExpertForm.of(experts).biases(experts)

    def groups(self, layer: int | None) -> list[Group]:
        """Returns the groups of a layer; of none: embedding and head."""
        return self._groups[layer]

    def projections(self, layer: int) -> list[Group]:
        """Returns the groups gate, up and down of a layer's routed experts; no gate if none is."""
        by_role = {g.role: g for g in self._groups[layer]}
        return [by_role[role] for role in _PROJECTIONS if role in by_role]


class Routing:
    """The routed experts of one layer, over all tokens of one computation.

    Args:
        routed: by batch.
        retained: the experts that routers chose among, in order.
        biases: of these experts.

    Attributes:
        inputs: of all tokens, `(tokens, hidden)`.
        gates: of all choices, `(tokens * k,)`.
        reached: experts that some token chose.
        biased: whether experts have biases.
    """

    def __init__(
        self, routed: Sequence[Routed], retained: Sequence[int], biases: Biases = NO_BIASES
    ) -> None:
        self.inputs, index, gates = (torch.cat(each) for each in zip(*routed, strict=True))
        self.gates = gates.reshape(-1)
        self._k = index.shape[-1]
        self._retained, self._biases = tuple(retained), biases
        self.biased = biases[1] is not None
        self._order = index.reshape(-1).argsort(stable=True)
        counts = index.reshape(-1).bincount(minlength=len(retained)).tolist()
        ends = np.cumsum(counts).tolist()
        self.reached = {
            expert: slice(end - count, end)
            for expert, count, end in zip(retained, counts, ends, strict=True)
            if count
        }
        self._sizes = [len(each) for each, *_ in routed]
        self._sum = torch.zeros_like(self.inputs)

    def places(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns where an expert is chosen: places in `gates`, and tokens; `(chosen,)` each."""
        places = self._order[self.reached[expert]]
        return places, places // self._k

    def products(
        self, expert: int, x: torch.Tensor, matrices: Sequence[torch.Tensor], form: ExpertForm
    ) -> list[torch.Tensor]:
        """Returns products of gate and up, or of up alone, `(n, width)` each, biases added.

        Args:
            expert: whose matrices these are.
            x: inputs `(n, hidden)`.
            matrices: gate and up, or up alone, `(width, hidden)` each.
            form: which of the biases are gate's.
        """
        products = [x @ matrix.T for matrix in matrices]
        if (stacked := self._biases[0]) is not None:
            halves = form.halves(stacked[self._retained.index(expert)])
            for product, bias in zip(products, halves, strict=True):
                product += bias
        return products

    def outputs(self, expert: int, inner: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Returns an expert's outputs `(n, hidden)`, bias added, before their gates.

        Args:
            expert: whose matrix this is.
            inner: what the matrix multiplies, `(n, width)`.
            down: `(hidden, width)`.
        """
        outputs = inner @ down.T
        if (stacked := self._biases[1]) is not None:
            outputs += stacked[self._retained.index(expert)]
        return outputs

    def add(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        """Adds values `(chosen, hidden)` to what the routed experts give to these tokens."""
        self._sum.index_add_(0, tokens, values)

    def sums(self) -> Sequence[torch.Tensor]:
        """Returns what the routed experts give, `(tokens, hidden)` by batch."""
        return torch.split(self._sum, self._sizes)

    def by_batch(
        self, of_inputs: torch.Tensor, of_gates: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Splits values of all inputs, `(tokens, hidden)`, and gates, `(tokens * k,)`, by batch.

        Those of gates become `(tokens, k)`.
        """
        inputs = torch.split(of_inputs, self._sizes)
        gates = torch.split(of_gates.view(-1, self._k), self._sizes)
        return list(zip(inputs, gates, strict=True))

    def add_to(self, batches: Sequence[torch.Tensor]) -> None:
        """Adds the sum to a layer's outputs, `(documents, length, hidden)` by batch."""
        for hidden, mine in zip(batches, by_batch(self._sum, batches), strict=True):
            hidden += mine


def add_expert(
    routings: Sequence[Routing],
    expert: int,
    weights: Sequence[torch.Tensor],
    code: ExpertCode,
    observe: Observer | None,
) -> None:
    """Adds what one expert gives to its tokens in several computations, times their gates.

    Args:
        routings: that reach the expert; its biases are those of all.
        expert: its index.
        weights: gate, up and down, or up and down, `(out, in)` each.
        code: the architecture's experts.
        observe: sees the expert; None for nobody.
    """
    *matrices, down = weights
    places = [routing.places(expert) for routing in routings]
    chosen = list(zip(routings, places, strict=True))
    x = torch.cat([routing.inputs[tokens] for routing, (_, tokens) in chosen])
    gates = torch.cat([routing.gates[place] for routing, (place, _) in chosen])
    inner = code.inner_of_halves(routings[0].products(expert, x, matrices, code.form))
    outputs = routings[0].outputs(expert, inner, down)
    if observe is not None:
        observe(expert, x, inner, outputs, gates)
    outputs.mul_(gates[:, None])
    parts = torch.split(outputs, [len(tokens) for _, tokens in places])
    for (routing, (_, tokens)), values in zip(chosen, parts, strict=True):
        routing.add(tokens, values)


def by_batch(flat: torch.Tensor, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Splits `(tokens, hidden)` into the shapes of `batches`, `(documents, length, hidden)`."""
    sizes = [hidden.shape[0] * hidden.shape[1] for hidden in batches]
    return [
        part.view(hidden.shape)
        for part, hidden in zip(torch.split(flat, sizes), batches, strict=True)
    ]
