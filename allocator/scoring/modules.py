"""Where a model has its routed experts, their router and its last norm.

In: a transformers model. Out: its modules, and their names. Invariant: places are read off the
model, so no family names them: `experts` is what every architecture of transformers calls a
layer's routed experts, in whatever block they lie, and the router lies beside them. What is called
otherwise than here is an error.
"""

from collections.abc import Iterator
from typing import Any

from allocator.errors import CheckpointError

_EXPERTS = "experts"
_ROUTERS = ("gate", "router")
_OF_EXPERTS = ("weight", "bias", "per_expert_scale")
"""Parameters of a router, or of a module in it, that have a row per expert."""
SELECTION_BIASES = ("e_score_correction_bias", "expert_bias")
"""Tensors of a router, or of the block around it, with a value per expert, some in one row."""


def experts_path(model: Any, layer: int) -> str | None:
    """Returns the name in the model of a layer's routed experts; None if the layer has none."""
    for path, _ in model.model.layers[layer].named_modules():
        if path.rpartition(".")[2] == _EXPERTS:
            return f"model.layers.{layer}.{path}"
    return None


def experts_of(model: Any, layer: int) -> Any:
    """Returns the routed experts of a layer that has some."""
    return model.get_submodule(_known_path(model, layer))


def block_path(model: Any, layer: int) -> str:
    """Returns the name in the model of what holds a layer's routed experts and their router."""
    return _known_path(model, layer).rpartition(".")[0]


def _known_path(model: Any, layer: int) -> str:
    path = experts_path(model, layer)
    assert path is not None, f"layer {layer} of {type(model).__name__} has no routed experts"
    return path


def router_path(model: Any, layer: int) -> str:
    """Returns the name in the model of the router of a layer's experts.

    Raises:
        CheckpointError: if it has another name than is known.
    """
    path = block_path(model, layer)
    block = model.get_submodule(path)
    for name in _ROUTERS:
        if hasattr(block, name):
            return f"{path}.{name}"
    raise CheckpointError(
        f"{type(block).__name__} has experts, but no {' or '.join(_ROUTERS)}; this architecture is "
        "not supported"
    )


def expert_rows(model: Any, layer: int) -> Iterator[tuple[str, Any, str]]:
    """Yields what the choice of a layer's experts has a row per expert of.

    Yields:
        A tensor's name in the model, the module that has it, and its name there.
    """
    router = router_path(model, layer)
    for path, module in model.get_submodule(router).named_modules(prefix=router):
        for name in (*_OF_EXPERTS, *SELECTION_BIASES):
            if getattr(module, name, None) is not None:
                yield f"{path}.{name}", module, name
    path = block_path(model, layer)
    block = model.get_submodule(path)
    for name in SELECTION_BIASES:
        if getattr(block, name, None) is not None:
            yield f"{path}.{name}", block, name


def routing_modules(model: Any, layer: int) -> Iterator[Any]:
    """Yields the modules that choose a layer's experts: block, router, and the router's parts."""
    yield model.get_submodule(block_path(model, layer))
    yield from model.get_submodule(router_path(model, layer)).modules()


def last_norm(model: Any) -> Any:
    """Returns the norm between a model's last layer and its head."""
    return next(
        module
        for name, module in reversed(list(model.model.named_children()))
        if name == "norm" or name.endswith(("_norm", "norm_f"))
    )
