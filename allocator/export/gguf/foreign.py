"""A GGUF file of anybody's, held against a checkpoint before llama.cpp sees it.

In: the path of a file or of a part of a split model, and a layout of target gguf. Out: its sizes.
Invariants: every length of every header is checked against its file; the file has the checkpoint's
architecture, vocabulary and tensors. Its weights may be any, of fewer experts too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from allocator.checkpoint.gguf.model import check_parts, gguf_files
from allocator.checkpoint.gguf.reader import Entry, Header, read_header
from allocator.checkpoint.tokenizer import has_tokenizer
from allocator.errors import VerifyError
from allocator.targets import Layout
from allocator.targets.gguf.metadata import hyperparameters, tokenizer

_TOKENS = "tokenizer.ggml.tokens"
_MOST_LISTED = 3


@dataclass(frozen=True)
class ForeignGguf:
    """A file that was checked.

    Attributes:
        path: of the file, or of the first part.
        file_bytes: of all parts.
        encoded_bytes: of the matrices whose format a search chooses.
        n_experts: that every layer has.
        notes: lines on pairs that say something else than the checkpoint.
    """

    path: Path
    file_bytes: int
    encoded_bytes: int
    n_experts: int
    notes: tuple[str, ...]


def check_gguf(path: Path, layout: Layout) -> ForeignGguf:
    """Reads the headers of a file, or of all parts of a split model.

    Args:
        path: of the file, or of any part.
        layout: of target gguf.

    Raises:
        VerifyError: if it is damaged, or of another model or vocabulary.
        CheckpointError: if parts are missing, or are not what their names say.
    """
    files = gguf_files(path) or (path,)
    headers = [read_header(file, error=VerifyError) for file in files]
    check_parts(headers)
    pairs = headers[0].pairs
    architecture = layout.inventory.family.for_gguf().architecture
    found = pairs["general.architecture"].value if "general.architecture" in pairs else None
    if found != architecture:
        kind = "a file that names no architecture" if found is None else f"a file of {found!r}"
        raise VerifyError(
            f"{path}: {kind}, needed {architecture!r}, the study's model; name a GGUF of this model"
        )
    n_experts = _n_experts(headers[0], architecture, layout)
    entries = {entry.name: entry for header in headers for entry in header.entries}
    _check_tensors(path, entries, layout, n_experts)
    _check_vocabulary(path, headers[0], layout)
    encoded = [entries[g.stored_as] for g in layout.groups.values() if g.stored_as in entries]
    return ForeignGguf(
        files[0],
        sum(file.stat().st_size for file in files),
        sum(entry.nbytes for entry in encoded),
        n_experts,
        _differences(headers[0], layout, n_experts),
    )


def _n_experts(header: Header, architecture: str, layout: Layout) -> int:
    pair = header.pairs.get(f"{architecture}.expert_count")
    n = None if pair is None else pair.value
    if type(n) is not int or not 1 <= n <= layout.inventory.n_experts:
        raise VerifyError(
            f"{header.path}: {n} experts, this model has {layout.inventory.n_experts}; name a GGUF "
            "of this model"
        )
    return n


def _check_tensors(
    path: Path, entries: Mapping[str, Entry], layout: Layout, n_experts: int
) -> None:
    needed = {g.stored_as: g.shape_with(n_experts) for g in layout.groups.values()}
    needed |= {t.stored_as: t.stored_shape_with(n_experts) for t in layout.full_precision}
    for entry in entries.values():
        if entry.format is None:
            raise VerifyError(
                f"{path}: {entry.name} is of ggml type {entry.kind}, whose size is not known here, "
                "so it is not checked; name a file without it"
            )
    for name, shape in needed.items():
        have = entries.get(name)
        if have is None or [n for n in have.shape if n > 1] != [n for n in shape if n > 1]:
            got = "is missing" if have is None else f"has shape {have.shape}"
            raise VerifyError(
                f"{path}: {name} {got}, needed {shape}; it is of another model, or made by a "
                "converter that names tensors otherwise"
            )


def _check_vocabulary(path: Path, header: Header, layout: Layout) -> None:
    """Token ids mean the same in both; how text is cut does not matter, because ids are scored."""
    inventory = layout.inventory
    if inventory.without_tokenizer or not has_tokenizer(inventory) or _TOKENS not in header.pairs:
        return
    (own,) = (field.value for field in tokenizer(inventory) if field.key == _TOKENS)
    theirs = header.pairs[_TOKENS].value
    assert isinstance(own, tuple)
    if not isinstance(theirs, tuple):
        raise VerifyError(f"{path}: {_TOKENS} is no list; fetch the file again")
    if len(own) != len(theirs):
        raise VerifyError(
            f"{path}: {len(theirs)} tokens, this model's vocabulary has {len(own)}; name a GGUF "
            "with this tokenizer"
        )
    other = [i for i, pair in enumerate(zip(own, theirs, strict=True)) if pair[0] != pair[1]]
    if other:
        i = other[0]
        raise VerifyError(
            f"{path}: {len(other)} tokens are others than this model's (first: {i} is "
            f"{theirs[i]!r}, needed {own[i]!r}); name a GGUF with this tokenizer"
        )


def _differences(header: Header, layout: Layout, n_experts: int) -> tuple[str, ...]:
    inventory = layout.inventory
    fields = hyperparameters(
        inventory, n_experts=inventory.n_experts, experts_used=inventory.experts_used
    )
    different = []
    for field in fields:
        if field.key.endswith(".expert_count") or field.key not in header.pairs:
            continue
        theirs = header.pairs[field.key].value
        same = theirs == field.value
        if isinstance(field.value, float) and isinstance(theirs, float):
            same = abs(theirs - field.value) <= 1e-6 * abs(field.value)
        if not same:
            different.append(f"{field.key} = {theirs}, this model's is {field.value}")
    more = len(different) - _MOST_LISTED
    rest = (f"and {more} more pairs differ",) if more > 0 else ()
    return (*different[:_MOST_LISTED], *rest)
