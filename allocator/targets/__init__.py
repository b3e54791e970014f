"""A runtime's contract: which tensors are encoded, in which groups and layouts, at what file cost.

In: an inventory. Out: a `Layout`: the groups (one format each) and the tensors kept in full
precision, with their names, shapes and bytes in the target's file. Invariant: the layout lists
every tensor of the file, so sizes predicted from it are the sizes written.
"""

from allocator.errors import TargetError
from allocator.targets.gguf.contract import GGUF
from allocator.targets.layout import FullPrecision, Group, Layout, Target
from allocator.targets.safetensors import SAFETENSORS

TARGETS: dict[str, Target] = {target.name: target for target in (GGUF, SAFETENSORS)}

__all__ = [
    "GGUF",
    "SAFETENSORS",
    "TARGETS",
    "FullPrecision",
    "Group",
    "Layout",
    "Target",
    "target_named",
]


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        TargetError: if there is none.
    """
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]
