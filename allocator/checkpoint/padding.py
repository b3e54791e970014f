"""A checkpoint whose experts are wider than its files have them, and which computes the same.

In: an inventory, and a width. Out: an inventory of that width. Invariant: every value of the files
is where it was, and all others are zeros. A neuron without weights in gate and up gives
`act(0) * 0 = 0` exactly, and `relu(0) = 0` in experts without gate, whatever the formats make of
its column in down: zeros are stored as zeros by every format.

Formats of few bits have blocks of 256 weights, and rows of down are as long as experts are wide.
No runtime pads rows, but all read the width of experts from metadata.
"""

from dataclasses import replace
from functools import cache

from allocator.checkpoint.inventory import Inventory, TensorInfo
from allocator.errors import CheckpointError
from allocator.families import Role, Rule

_WIDTHS = frozenset({"expert_width", "shared_width"})
"""Axes of `Rule.shape` that follow the width of experts, the second if no key says otherwise."""


def padded(inventory: Inventory, expert_width: int) -> Inventory:
    """Returns a checkpoint with experts of `expert_width` neurons; shared ones where they follow.

    Args:
        inventory: of the files.
        expert_width: of routed experts, at least as wide as they are.

    Raises:
        CheckpointError: if experts are wider, or have biases, or a matrix has another shape than
            `config.json` says.
    """
    family, old = inventory.family, inventory.config
    width = inventory.dimensions.expert_width
    if width is None or not width <= expert_width <= 2 * width:
        raise CheckpointError(
            f"{inventory.path}: experts are {width} wide, cannot be padded to {expert_width}; "
            "needed a width from theirs to twice as much, e.g. the next multiple of 256"
        )
    if width == expert_width:
        return inventory
    new = family.with_expert_width(old, expert_width)

    @cache
    def shapes(rule: Rule) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return family.shape(old, rule), family.shape(new, rule)

    def wider(tensor: TensorInfo) -> TensorInfo:
        match = None if tensor.role is Role.NEXTN else family.match(tensor.name)
        if match is None or not _WIDTHS & {*match[0].shape.split(" x ")}:
            return tensor
        before, after = shapes(match[0])
        if before == after:
            return tensor
        if not tensor.role.is_encoded or tensor.shape != before:
            raise CheckpointError(
                f"{inventory.path}: {tensor.name} ({tensor.role}) has shape {tensor.shape}, needed "
                f"a matrix of {before} for experts to be padded; leave expert_width out"
            )
        return replace(tensor, shape=after, unpadded=before)

    tensors = {name: wider(tensor) for name, tensor in inventory.tensors.items()}
    return replace(inventory, config=new, tensors=tensors)
