"""Files that hold a decision: allocation records, and llama-quantize's tensor-type files.

In: a path and the layout that the decision is about. Out: an `Allocation` that fits the layout, and
the importance that a record was encoded with. Invariant: a record of another checkpoint is refused.
"""

from pathlib import Path

from allocator.checkpoint.inventory import Inventory
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_path import no_file
from allocator.decision.allocation_record import read_allocation
from allocator.decision.baselines import mixed
from allocator.errors import CheckpointError, SpaceError
from allocator.export.runtimes import runtime_named
from allocator.formats import FORMATS, fallback
from allocator.targets import Layout


def read_encoded(
    path: Path, layout: Layout, *, base: str | None = None
) -> tuple[Allocation, str | None]:
    """Reads an allocation file, or a llama-quantize `--tensor-type-file` over a base format.

    Args:
        path: JSON, or text with `pattern=type` entries (all experts retained); or where no such
            file exists, a format for all groups (`Q2_K`), or one for routed experts and one for the
            rest (`Q2_K/Q6_K`), with llama-quantize's fallbacks.
        layout: of the checkpoint that the file must be about.
        base: format of the tensors that no entry names, with llama-quantize's fallbacks.

    Returns:
        The decision, and the digest of the importance vectors that a record was encoded with;
        None where the file is no record.

    Raises:
        SpaceError: if the file is neither, or does not fit the checkpoint.
        CheckpointError: if the file records another checkpoint.
    """
    importance = None
    if is_named(path) and base is None:
        allocation = _named(path, layout)
        allocation.check(layout)
        return allocation, None
    if not path.is_file():
        raise no_file(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".json" and not text.lstrip().startswith("{"):
        allocation = _from_recipe(text, layout, base)
    elif base is not None:
        raise SpaceError(f"{path}: --base is for tensor-type files; an allocation names all")
    else:
        allocation, record = read_allocation(path)
        if record is not None:
            check_same_checkpoint(record.checkpoint, layout.inventory)
            importance = record.importance
    allocation.check(layout)
    return allocation, importance


def is_named(path: Path) -> bool:
    """Tells whether a path is no file, but one or two names of formats: `Q2_K`, `Q2_K/Q6_K`."""
    names = _names(path)
    return not path.exists() and len(names) <= 2 and all(name in FORMATS for name in names)


def _names(path: Path) -> list[str]:
    return [name.strip() for name in str(path).split("/")]


def _named(path: Path, layout: Layout) -> Allocation:
    experts, rest = (*_names(path), _names(path)[0])[:2]
    n_experts = layout.inventory.n_experts
    rankings = dict.fromkeys(layout.layers, tuple(range(n_experts)))
    return mixed(layout, rankings, experts=experts, rest=rest, count=n_experts)


def _from_recipe(text: str, layout: Layout, base: str | None) -> Allocation:
    """An allocation of all experts, from a text in the form of the target's own runtime."""
    named = runtime_named(layout.target).read_recipe(text, layout)
    missing = [g for g in layout.groups if g not in named]
    if missing and base is None:
        raise SpaceError(
            f"the tensor-type file names no type for {len(missing)} groups (first: "
            f"{missing[0]}); give llama-quantize's base type with --base"
        )
    whole = _named(Path(base or "Q8_0"), layout)
    chosen = {g: fallback(f, layout.groups[g].shape).name for g, f in named.items()}
    return Allocation.of(
        target=layout.target,
        retained=whole.retained_experts,
        formats=whole.format_of | chosen,
        experts_used=layout.inventory.experts_used,
    )


def check_same_checkpoint(digest: str, inventory: Inventory) -> None:
    """Refuses an allocation that was made for another checkpoint.

    Args:
        digest: of the checkpoint that the allocation was made for.
        inventory: the checkpoint at hand.

    Raises:
        CheckpointError: if the two differ.
    """
    if digest != inventory.digest:
        raise CheckpointError(
            f"the allocation is for checkpoint {digest[:12]}…, {inventory.path} is "
            f"{inventory.digest[:12]}…; use the checkpoint that it was searched on"
        )
