"""A runtime's contract: which tensors are encoded, in which groups and layouts, at what file cost.

In: an inventory. Out: a `Layout`: the groups (one format each) and the full-precision tensors, with
their names, shapes and bytes in the target's file. Invariant: the layout lists
every tensor of the file, so sizes predicted from it are the sizes written.
"""

from allocator.errors import TargetError
from allocator.targets.base import Target
from allocator.targets.gguf.contract import GGUF
from allocator.targets.layout import CacheRows, FullPrecision, Group, Layout
from allocator.targets.safetensors import SAFETENSORS

TARGETS: dict[str, Target] = {}
"""By name; see `register_target`."""

__all__ = [
    "GGUF",
    "SAFETENSORS",
    "TARGETS",
    "CacheRows",
    "FullPrecision",
    "Group",
    "Layout",
    "Target",
    "register_target",
    "target_named",
]


def register_target(target: Target) -> None:
    """Makes a target known by its name: in study.toml, in allocations, on the command line.

    Raises:
        TargetError: if another one has that name.
    """
    if TARGETS.setdefault(target.name, target) is not target:
        raise TargetError(f"target {target.name!r} is registered already; choose another name")


def target_named(name: str) -> Target:
    """Returns the target of that name.

    Raises:
        TargetError: if there is none.
    """
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]


for _target in (GGUF, SAFETENSORS):
    register_target(_target)
