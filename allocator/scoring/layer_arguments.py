"""One layer of a model on its own, given what the model itself gives that layer.

In: a transformers model. Out: calls of single layers, and passes that begin at a later layer.
Invariant: masks, positions and whatever else a layer takes beside its hidden states are what the
model's own loop over its layers passes to that very layer. Which kind of attention a layer has is
known to that loop by the layer's place; a model with fewer layers would count from another place.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_CACHE_BYTES = 64 << 20
"""Of recorded arguments, mostly masks: `documents x length x length` each."""

Arguments = tuple[tuple[object, ...], dict[str, object]]
"""What a layer is called with after its hidden states."""
Key = tuple[int, int, Any]
"""Documents, length, and the cache that the arguments name."""


class LayerArguments:
    """Runs single layers of a model; from any thread.

    Arguments are recorded once per shape of a batch, and cached.

    Args:
        model: of transformers; its layers may be on the meta device while none of them runs.
        cache_bytes: limit of cached arguments; those of the latest shape are always cached.
    """

    def __init__(self, model: Any, *, cache_bytes: int = _CACHE_BYTES) -> None:
        self._model = model
        self._limit = cache_bytes
        self._known: dict[Key, list[Arguments]] = {}
        self._lock = threading.Lock()

    def run(self, layer: int, hidden: torch.Tensor, cache: object = None) -> torch.Tensor:
        """Returns a layer's output for `(documents, length, hidden)`, in the same shape.

        Args:
            layer: its place in the model.
            hidden: what enters it.
            cache: what stands in for the cache of keys and values, as the model now has it.
        """
        args, kwargs = self._of((*hidden.shape[:2], cache), hidden)[layer]
        output: torch.Tensor = self._model.model.layers[layer](hidden, *args, **kwargs)
        return output

    @property
    def cached_bytes(self) -> int:
        """Bytes of cached arguments."""
        return sum(map(_nbytes, self._known.values()))

    def _of(self, key: Key, hidden: torch.Tensor) -> list[Arguments]:
        with self._lock:
            known = self._known.pop(key, None)
            if known is None:
                # no inference mode: layers with gradients multiply by these too
                with torch.inference_mode(False), torch.no_grad():
                    # values do not matter, so one stands for all
                    embedded = hidden.new_zeros(()).expand(hidden.shape)
                    known = record_arguments(self._model, embedded)[1]
            self._known[key] = known  # the latest comes last
            while len(self._known) > 1 and self.cached_bytes > self._limit:
                self._known.pop(next(iter(self._known)))
            return known


def record_arguments(model: Any, embedded: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
    """Runs a model up to its layers, which compute nothing; other threads may run it meanwhile.

    Args:
        model: of transformers.
        embedded: what its embedding gives, `(documents, length, hidden)`.

    Returns:
        What enters the first layer, in the same shape, and every layer's further arguments.
    """
    layers, caller = list(model.model.layers), threading.get_ident()
    entered: list[torch.Tensor] = []
    recorded: list[Arguments] = []

    def recorder(usual: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *args: object, **kwargs: object) -> Any:
            if threading.get_ident() != caller:
                return usual(hidden, *args, **kwargs)
            entered.append(hidden)
            recorded.append((args, kwargs))
            if len(recorded) == len(layers):
                raise _Recorded
            return hidden

        return forward

    with _forwards(layers, [recorder(layer.forward) for layer in layers]):
        try:
            model.model(inputs_embeds=embedded, use_cache=False)
        except _Recorded:
            return entered[0], recorded
    raise AssertionError(f"{type(model.model).__name__} has layers that it does not run")


class _Recorded(Exception):
    """Ends a pass when the last layer's arguments are known: nothing after it is of interest."""


class LaterStart(threading.local):
    """Passes of a model that begin at a later layer; several threads may run some at once.

    Attributes:
        state: what enters that layer in this thread's next pass, `(documents, length, hidden)`.
    """

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None

    @contextmanager
    def at(self, model: Any, layer: int) -> Iterator[None]:
        """Lets the layers before `layer` compute nothing while the block runs."""
        skipped = list(model.model.layers[:layer])
        with _forwards(skipped, [lambda *_, **__: self.state] * layer):
            yield


@contextmanager
def _forwards(modules: Sequence[Any], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Gives modules other forwards while the block runs."""
    before = [vars(module).get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _nbytes(recorded: Sequence[Arguments]) -> int:
    """Bytes of all tensors, one that several layers get counted once."""
    tensors = [leaf for leaf in tree_leaves(list(recorded)) if isinstance(leaf, torch.Tensor)]
    return sum({id(x): x.nbytes for x in tensors}.values())
