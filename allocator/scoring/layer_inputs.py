"""Cached inputs of layers: a candidate's forward pass begins at the first layer that is a new one.

In: what candidates decide, layer by layer, what entered their layers, and their losses. Out: for a
span of documents, the deepest cached layer that the best candidate of the span reached by the same
decisions, and what entered the layer then. Invariant: these are the very floats of that
computation, over the same batches; a loss does not depend on what is cached.

Cached is one candidate per span, the one of least loss: later candidates change some of its layers.
Where all its layers are too many bytes, every second layer is cached, or every third, and so on.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch

from allocator.families import Role
from allocator.scoring.candidates import Candidate
from allocator.targets import Layout

Batch = tuple[int, ...]
"""Documents of a forward pass."""
Span = tuple[Batch, ...]
"""Batches that are scored together."""


class LayerDecisions:
    """What candidates decide, by layer; layer None stands for the embedding.

    Args:
        layout: the groups.
    """

    def __init__(self, layout: Layout) -> None:
        self._names: dict[int | None, list[str]] = {}
        for name, group in layout.groups.items():
            self._names.setdefault(group.layer, []).append(name)
        self._layers = (None, *range(layout.inventory.n_layers))

    def of(self, layer: int | None, candidate: Candidate) -> Any:
        """Returns what a candidate decides in a layer; equals compute alike."""
        if layer is None:
            return candidate.format_of[str(Role.EMBEDDING)], candidate.weights_digest
        formats = tuple(candidate.format_of[name] for name in self._names[layer])
        settings = candidate.experts_used, candidate.kv_format, candidate.weights_digest
        return formats, candidate.retained_experts.get(layer), settings

    def before(self, candidate: Candidate) -> list[str]:
        """Returns by layer a digest of all that is decided before it."""
        digest, digests = sha256(), []
        for layer in self._layers:
            digest.update(repr(self.of(layer, candidate)).encode())
            digests.append(digest.hexdigest())
        return digests[:-1]


@dataclass(frozen=True)
class _Cached:
    """What entered the layers of a candidate, by cached layer and batch."""

    loss: float
    before: Sequence[str]
    states: Mapping[int, Mapping[Batch, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for by_batch in self.states.values() for x in by_batch.values())


class LayerInputCache:
    """What entered the layers of the best candidates so far.

    Args:
        cap_bytes: limit of all states.
    """

    def __init__(self, cap_bytes: float) -> None:
        self._cap = cap_bytes
        self._best: dict[Span, _Cached] = {}

    def first(self, span: Span, before: Sequence[str]) -> int:
        """Returns the deepest cached layer that a candidate may begin with; 0 where none is.

        Args:
            span: all batches.
            before: the candidate's decisions, see `LayerDecisions.before`.
        """
        best = self._best.get(span)
        cached = () if best is None else best.states
        return max((i for i in cached if best and best.before[i] == before[i]), default=0)

    def inputs(self, span: Span, layer: int) -> Mapping[Batch, torch.Tensor]:
        """Returns what entered a layer, by batch, `(documents, length, hidden)` each."""
        return self._best[span].states[layer]

    def offer(
        self,
        span: Span,
        loss: float,
        before: Sequence[str],
        states: Mapping[int, Mapping[Batch, torch.Tensor]],
    ) -> None:
        """Caches a candidate if it is the best on these documents.

        Args:
            span: all batches.
            loss: of the candidate; not a number where it broke.
            before: its decisions, see `LayerDecisions.before`.
            states: what entered the layers that it ran, `(documents, length, hidden)` by layer and
                batch; the cache takes them over.
        """
        known = self._best.get(span)
        if not loss < (math.inf if known is None else known.loss):
            return
        shared = {} if known is None else known.states
        whole = {**{i: x for i, x in shared.items() if i < min(states)}, **states}
        offered = _Cached(loss, before, whole)
        others = sum(best.nbytes for key, best in self._best.items() if key != span)
        every = 1
        while others + offered.nbytes > self._cap and len(offered.states) > 1:
            every += 1
            offered = replace(offered, states={i: x for i, x in whole.items() if i % every == 0})
        if others + offered.nbytes <= self._cap:
            self._best[span] = offered


class LayerInputRecorder(threading.local):
    """What entered the layers of a model in this thread's last forward pass.

    Attributes:
        states: by layer from the first recorded one on, `(documents, length, hidden)`; a forward
            pass begins by emptying it.
    """

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    @contextmanager
    def recording(self, model: Any, first: int = 0) -> Iterator[None]:
        """Records while the block runs; forward passes may run in several threads.

        Args:
            model: of transformers.
            first: the layer to begin with.
        """

        def record(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            self.states.append(args[0].clone())

        handles = [layer.register_forward_pre_hook(record) for layer in model.model.layers[first:]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
