"""Hidden states at layer boundaries: a candidate begins in the first layer where it is a new one.

In: what candidates decide, layer by layer, and what entered their layers. Out: for a batch of
documents, the deepest layer that somebody has come to by the same decisions, and what entered it
then. Invariant: these are the very floats of that computation, over the same batch; a loss does not
depend on what is kept.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch

from allocator.families import Role
from allocator.proxy.weights import Candidate
from allocator.targets import Layout

Key = tuple[str, tuple[int, ...]]


class Choices:
    """What candidates decide, by layer; None stands for the embedding.

    Args:
        layout: the groups.
    """

    def __init__(self, layout: Layout) -> None:
        self._names: dict[int | None, list[str]] = {}
        for name, group in layout.groups.items():
            self._names.setdefault(group.layer, []).append(name)
        self._layers = (None, *range(layout.inventory.n_layers))

    def of(self, layer: int | None, candidate: Candidate) -> Any:
        """What a candidate decides in a layer; equals compute alike."""
        if layer is None:
            return candidate.format_of[str(Role.EMBEDDING)]
        formats = tuple(candidate.format_of[name] for name in self._names[layer])
        told = candidate.experts_used, candidate.kv_format
        return formats, candidate.retained_experts.get(layer), told

    def before(self, candidate: Candidate) -> list[str]:
        """By layer, a digest of all that is decided before it."""
        digest, found = sha256(), []
        for layer in self._layers:
            digest.update(repr(self.of(layer, candidate)).encode())
            found.append(digest.hexdigest())
        return found[:-1]


class Boundaries:
    """What entered layers, kept by what was decided before them; the last used, up to a size.

    Args:
        cap_bytes: of all states.
    """

    def __init__(self, cap_bytes: float) -> None:
        self._cap, self._held_bytes = cap_bytes, 0
        self._states: OrderedDict[Key, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def deepest(self, before: Sequence[str], batches: Sequence[Sequence[int]]) -> int:
        """The last layer whose states are kept for all batches; 0 if there is none."""
        with self._lock:
            for layer in reversed(range(len(before))):
                if all((before[layer], tuple(batch)) in self._states for batch in batches):
                    return layer
        return 0

    def get(self, before: str, batch: Sequence[int]) -> torch.Tensor | None:
        """What entered a layer, `(documents, length, hidden)`, while it is kept."""
        with self._lock:
            if (key := (before, tuple(batch))) not in self._states:
                return None
            self._states.move_to_end(key)
            return self._states[key]

    def keep(self, before: str, batch: Sequence[int], states: torch.Tensor) -> None:
        """Takes in states that nobody changes any more; the ones unused for longest go."""
        key = before, tuple(batch)
        with self._lock:
            if key in self._states or states.nbytes > self._cap:
                return
            self._states[key] = states
            self._held_bytes += states.nbytes
            while self._held_bytes > self._cap:
                self._held_bytes -= self._states.popitem(last=False)[1].nbytes


class Entering(threading.local):
    """What entered the layers of a model in this thread's last forward pass."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    @contextmanager
    def noting(self, model: Any) -> Iterator[None]:
        """While forward passes of several threads run; each begins by emptying `states`."""

        def note(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            self.states.append(args[0].clone())

        handles = [layer.register_forward_pre_hook(note) for layer in model.model.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def starting_at(model: Any, layer: int) -> Iterator[None]:
    """The model without the layers before `layer`; it then takes their output as embeddings."""
    whole = model.model.layers
    model.model.layers = whole[layer:]
    try:
        yield
    finally:
        model.model.layers = whole
