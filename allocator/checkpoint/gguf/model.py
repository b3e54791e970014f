"""A GGUF file in floats or Q8_0 as a checkpoint, whole or in parts.

In: the path of a file, of one of its parts, or of a directory with one model. Out: the `Inventory`
of the checkpoint that it was made of, under the names that transformers has. Invariant: as of
`allocator.checkpoint.inventory`; what a GGUF has in another order is put back when it is read, so
that equal weights have equal digests whichever file they are in.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from allocator.checkpoint.gguf.reader import MAGIC, Entry, Header, read_header
from allocator.checkpoint.halves import join_kv_b
from allocator.checkpoint.inventory import (
    FLOATS,
    MXFP4,
    MXFP4_BLOCK,
    GgufModel,
    Inventory,
    Rearranged,
    Stored,
    TensorInfo,
    check_whole,
)
from allocator.errors import CheckpointError
from allocator.families import Dimensions, Role, Rule, Transform
from allocator.families.gguf import GATE_UP
from allocator.families.gguf_source import family_of_gguf
from allocator.files.digests import Digests, Identity

_Array = npt.NDArray[Any]
READ = (*FLOATS, "Q8_0")
"""Formats in which a GGUF is taken as an original."""
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_LAYER = re.compile(r"^blk\.(0|[1-9][0-9]{0,5})\.")
_WAY_OUT = (
    "needed a file in BF16, F16, F32 or Q8_0, e.g. the one that this was made from, or the "
    "directory of the original"
)


def gguf_files(path: Path) -> tuple[Path, ...]:
    """Returns the files of the GGUF model that a path names, in order; none if it names none.

    A directory with safetensors is a checkpoint of these, whatever lies beside.

    Raises:
        CheckpointError: if it names a directory with several models, or one whose parts are not
            all there.
    """
    if path.is_file():
        return _parts(path) if _is_gguf(path) else ()
    if not path.is_dir() or any(path.glob("*.safetensors*")):
        return ()
    models = {_stem(file): file for file in sorted(path.glob("*.gguf"), reverse=True)}
    if len(models) > 1:
        names = ", ".join(sorted(file.name for file in models.values()))
        raise CheckpointError(f"{path}: {len(models)} GGUF models ({names}); name the file of one")
    return _parts(*models.values()) if models else ()


def _is_gguf(path: Path) -> bool:
    if path.suffix == ".gguf":
        return True
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _stem(path: Path) -> str:
    part = _PART.fullmatch(path.name)
    return part[1] if part else path.name


def _parts(path: Path) -> tuple[Path, ...]:
    part = _PART.fullmatch(path.name)
    if part is None:
        return (path,)
    paths = [
        path.with_name(f"{part[1]}-{n:05}-of-{part[3]}.gguf") for n in range(1, int(part[3]) + 1)
    ]
    if missing := [p.name for p in paths if not p.is_file()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(paths)} parts are missing, e.g. {missing[0]}; fetch "
            "them beside the others"
        )
    return tuple(paths)


def read_model(files: Sequence[Path]) -> tuple[GgufModel, list[tuple[str, Entry]]]:
    """Reads the headers of a model's files; no weights.

    Args:
        files: in order.

    Returns:
        What they say of the model, and their tensors with the names of their files.

    Raises:
        CheckpointError: if one is truncated, damaged, of another model, or of low-bit weights.
    """
    opened = {file.name: Identity.of(file.stat()) for file in files}
    headers = [read_header(file) for file in files]
    check_parts(headers)
    entries = [(header.path.name, e) for header in headers for e in header.entries]
    twice = len(entries) - len({entry.name for _, entry in entries})
    if twice:
        raise CheckpointError(f"{files[0]}: {twice} tensors are there twice; fetch it again")
    shapes = {entry.name: entry.shape for _, entry in entries}
    pairs = headers[0].pairs
    values = {key: pair.value for key, pair in pairs.items()}
    places = {entry.name: (header.path, entry) for header in headers for entry in header.entries}

    def read(name: str) -> tuple[float, ...]:
        if name not in places:
            raise CheckpointError(f"no {name}; {_WAY_OUT}")
        path, entry = places[name]
        if _stored(path.name, entry).dtype != "F32" or len(entry.shape) > 1:
            raise CheckpointError(f"{name} of shape {entry.shape} is no vector in F32; {_WAY_OUT}")
        return tuple(np.fromfile(path, "<f4", entry.shape[0], offset=entry.offset).tolist())

    family, facts = family_of_gguf(values, shapes, str(files[0]), read)
    made = frozenset(tensor.name for tensor in family.for_gguf().made(facts))
    return GgufModel(files[0], pairs, family, facts.config, made, opened), entries


def check_parts(headers: Sequence[Header]) -> None:
    """Checks that files are the parts of a model that their names say.

    Raises:
        CheckpointError: if one says otherwise.
    """
    for number, header in enumerate(headers):
        _check_part(header, number, len(headers))


def _check_part(header: Header, number: int, n_parts: int) -> None:
    """A file is the part of a model that its name says."""
    pairs = header.pairs
    stored = tuple(pairs[key].value if key in pairs else default for key, default in _SPLIT.items())
    if stored != ((number, n_parts) if n_parts > 1 else (stored[0], 1)):
        raise CheckpointError(
            f"{header.path}: part {stored[0] + 1} of {stored[1]} as it says, {number + 1} of "
            f"{n_parts} by name; fetch it again under its own name"
        )


_SPLIT = {"split.no": 0, "split.count": 1}


def read_gguf_inventory(files: Sequence[Path], *, digests: Path | None = None) -> Inventory:
    """Reads headers of a GGUF model; no weights.

    Args:
        files: of the model, in order.
        digests: a folder in which digests of tensors are remembered between processes.

    Raises:
        CheckpointError: if it is damaged, of low-bit weights, or of an architecture that is not
            read from such a file.
    """
    model, entries = read_model(files)
    family, config = model.family, model.config
    n_layers = family.n_layers(config)
    ignored = [_stored(*place) for place in entries if _layer(place[1]) >= n_layers]
    made = [_stored(*place) for place in entries if place[1].name in model.made]
    kept = [
        place
        for place in entries
        if _layer(place[1]) < n_layers and place[1].name not in model.made
    ]
    tensors: dict[str, TensorInfo] = {}
    parts: dict[int | None, set[str]] = defaultdict(set)
    for tensor, part in _tensors(model, kept):
        if tensor.name in tensors:
            raise CheckpointError(
                f"{model.path}: {tensor.name} is there twice, under several names; fetch it again"
            )
        tensors[tensor.name] = tensor
        parts[tensor.layer].add(part)
    inventory = Inventory(
        model.path,
        config,
        family,
        tensors,
        model.files,
        None if digests is None else Digests(digests),
        computed=tuple(made),
        ignored=tuple(ignored),
        gguf=model,
    )
    check_whole(inventory, parts)
    return inventory


def _layer(entry: Entry) -> int:
    match = _LAYER.match(entry.name)
    return -1 if match is None else int(match[1])


def _stored(file: str, entry: Entry) -> Stored:
    dtype = f"ggml type {entry.kind}" if entry.format is None else entry.format.name
    return Stored(entry.name, entry.shape, dtype, file, entry.offset, entry.nbytes)


def _tensors(
    model: GgufModel, entries: Sequence[tuple[str, Entry]]
) -> Iterator[tuple[TensorInfo, str]]:
    """Yields every tensor of the checkpoint, and what it is called within its layer."""
    family, config = model.family, model.config
    rules = {rule.gguf: rule for rule in family.rules if rule.gguf is not None}
    parts = {part.name: part for part in family.for_gguf().parts}
    roles = (Role.EXPERT_GATE, Role.EXPERT_UP)
    both = [family.rule_of(role) for role in roles] if family.roles.issuperset(roles) else []
    in_mxfp4 = {family.rule_of(r) for stack in family.stacks if stack.in_mxfp4 for r in stack.roles}
    asked = {n: family.shapes(config, n) for n in (None, *range(family.n_layers(config)))}
    waiting: dict[tuple[Role, int], dict[Role, Stored]] = defaultdict(dict)
    for file, entry in entries:
        number = _layer(entry)
        layer = None if number < 0 else number
        name = _LAYER.sub("blk.{layer}.", entry.name)
        own_rules = both if name == GATE_UP else [rules[name]] if name in rules else []
        if not own_rules and name not in parts:
            raise CheckpointError(
                f"{model.path}: {entry.name} is no tensor of {family.model_type} in a GGUF file; "
                "use the original"
            )
        stored = _stored(file, entry)
        is_read = stored.dtype in READ or (
            stored.dtype == MXFP4 and bool(own_rules) and in_mxfp4.issuperset(own_rules)
        )
        if not is_read:
            raise CheckpointError(
                f"{model.path}: {entry.name} is stored in {stored.dtype}, low-bit already; "
                f"{_WAY_OUT}"
            )
        if name in parts:
            part = parts[name]
            assert layer is not None
            waiting[part.of, layer][part.role] = stored
            continue
        for number, rule in enumerate(own_rules):
            if rule not in asked[layer]:
                raise CheckpointError(
                    f"{model.path}: {entry.name} is there, which a {family.model_type} of its "
                    "pairs does not have; fetch it again"
                )
            rows = (len(own_rules), number)
            yield from _of_rule(model, rule, asked[layer][rule], stored, layer, rows)
    for (role, layer), of_role in waiting.items():
        if any(piece.of is role for piece in family.for_gguf().pieces):
            yield _of_pieces(model, role, layer, of_role)
        else:
            yield _joined(model, role, layer, of_role)


def _of_rule(
    model: GgufModel,
    rule: Rule,
    shape: tuple[int, ...],
    stored: Stored,
    layer: int | None,
    rows: tuple[int, int],
) -> Iterator[tuple[TensorInfo, str]]:
    """Yields the tensors of a checkpoint that one of a file holds.

    Args:
        model: of the file.
        rule: of the tensors.
        shape: of each.
        stored: all of them, in the file.
        layer: theirs, if they have one.
        rows: of how many kinds each expert has rows in the file, and which of these are meant.
    """
    family, (n_kinds, kind) = model.family, rows
    n_experts = family.n_experts(model.config) if rule.has_expert else 1
    needed = family.gguf_shape(model.config, rule) or shape
    if rule.has_expert:
        needed = (n_experts, n_kinds * shape[0], *shape[1:])
    if [n for n in stored.shape if n > 1] != [n for n in needed if n > 1]:
        raise CheckpointError(
            f"{model.path}: {stored.name} has shape {stored.shape}, needed {needed} as its pairs "
            "say; fetch it again"
        )
    if stored.dtype not in FLOATS and not rule.role.is_encoded:
        raise CheckpointError(
            f"{model.path}: {stored.name} ({rule.role}) is stored in {stored.dtype}, needed F32, "
            f"F16 or BF16; {_WAY_OUT}"
        )
    if stored.dtype != "F32" and not all(transform.moves for transform in rule.in_gguf):
        raise CheckpointError(
            f"{model.path}: {stored.name} is stored in {stored.dtype}, needed F32; {_WAY_OUT}"
        )
    made_of = _made_of(model, rule)
    nbytes = stored.nbytes // n_experts // n_kinds
    for expert in range(n_experts):
        offset = stored.offset + (expert * n_kinds + kind) * nbytes
        own = replace(stored, shape=shape, offset=offset, nbytes=nbytes)
        tensor = TensorInfo(
            rule.pattern.format(layer=layer, expert=expert),
            shape,
            own.dtype,
            own.file,
            own.offset,
            nbytes,
            rule.role,
            layer,
            expert if rule.has_expert else None,
            made=None if made_of is None else made_of(own),
        )
        yield (_in_mxfp4(tensor) if tensor.dtype == MXFP4 else tensor), rule.part


_EXPONENT, _CODES = 1, MXFP4_BLOCK // 2
"""Bytes of a block of MXFP4 in a file."""


def _in_mxfp4(tensor: TensorInfo) -> TensorInfo:
    """A matrix in MXFP4 with codes and exponents apart, as transformers has them."""
    rows, columns = tensor.shape
    blocks = columns // MXFP4_BLOCK
    whole = (rows, blocks, _EXPONENT + _CODES)
    place = Stored(tensor.name, whole, "U8", tensor.file, tensor.offset, tensor.nbytes)
    exponents = replace(
        tensor,
        name=f"exponents of {tensor.name}",
        shape=(rows, blocks),
        dtype="U8",
        nbytes=rows * blocks * _EXPONENT,
        made=Rearranged((place,), lambda stored: stored[0][..., 0], "exponents"),
    )
    codes = Rearranged((place,), _neighbours_paired, "codes, neighbours paired")
    return replace(tensor, nbytes=rows * blocks * _CODES, scale=exponents, made=codes)


def _neighbours_paired(stored: Sequence[_Array]) -> _Array:
    """Codes as transformers has them, `(rows, blocks, 16)`, of blocks `(rows, blocks, 17)`.

    A byte of a file has codes `i` and `i + 16` of a block, one of transformers codes `2i` and
    `2i + 1`; the first is in the lower four bits of either.
    """
    pairs = stored[0][..., _EXPONENT:]
    codes = np.concatenate([pairs & 15, pairs >> 4], -1)
    paired: _Array = codes[..., ::2] | codes[..., 1::2] << 4
    return paired


def _made_of(model: GgufModel, rule: Rule) -> Callable[[Stored], Rearranged] | None:
    """How a checkpoint's tensor is made of a file's; None where it is the same."""
    gguf, dimensions = model.family.for_gguf(), model.family.dimensions(model.config)
    if rule.role in gguf.row_orders:
        return partial(_in_rows, gguf.row_orders[rule.role](dimensions))
    if rule.role in gguf.column_orders:
        return partial(_in_columns, gguf.column_orders[rule.role](dimensions))
    if rule.in_gguf:
        names = "; ".join(transform.name for transform in rule.in_gguf)
        make = partial(_untransformed, rule.in_gguf, dimensions)
        return lambda own: Rearranged((own,), make, names)
    return None


def _in_rows(order: Sequence[int], *stored: Stored) -> Rearranged:
    """A matrix of the rows of stored ones, one after the other, in an order."""
    numbers = np.array(order)

    def make(rows: Sequence[_Array]) -> _Array:
        return _in_order(numbers, rows[0] if len(rows) == 1 else np.concatenate(rows))

    return Rearranged(stored, make, f"rows {_digest(order)}")


def _in_columns(order: Sequence[int], stored: Stored) -> Rearranged:
    """A matrix of the columns of a stored one in an order."""
    numbers = np.array(order)

    def make(own: Sequence[_Array]) -> _Array:
        return _in_order(numbers, own[0].T).T

    return Rearranged((stored,), make, f"columns {_digest(order)}", tuple(order))


def _digest(order: Sequence[int]) -> str:
    return hashlib.sha256(np.array(order, "<i8").tobytes()).hexdigest()


def _untransformed(
    transforms: Sequence[Transform], dimensions: Dimensions, stored: Sequence[_Array]
) -> _Array:
    """A tensor, `(...)`, from a file's; of raw 32 bits these are the values."""
    (values,) = stored
    own = values.view(np.float32) if values.dtype.itemsize == 4 else values
    for transform in reversed(transforms):
        own = transform.from_file(own, dimensions)
    return own.view(values.dtype)


def _in_order(order: npt.NDArray[np.int64], rows: _Array) -> _Array:
    """A matrix, `(rows, in_features)`, from its rows as a file has them."""
    ordered = np.empty_like(rows)
    ordered[order] = rows
    return ordered


def _joined(
    model: GgufModel, role: Role, layer: int, stored: Mapping[Role, Stored]
) -> tuple[TensorInfo, str]:
    """The tensor that a file holds in two halves."""
    family = model.family
    rule = family.rule_of(role)
    shape = family.shape(model.config, rule)
    latent = family.dimensions(model.config).latent
    assert latent is not None
    heads = family.dimensions(model.config).heads
    needed = {
        Role.K_B: (heads, latent.rank, latent.nope),
        Role.V_B: (heads, latent.value, latent.rank),
    }
    for half in family.for_gguf().halves:
        own = stored.get(half.role)
        if own is None or own.shape != needed[half.role]:
            got = "is missing" if own is None else f"has shape {own.shape}"
            raise CheckpointError(
                f"{model.path}: {half.name.format(layer=layer)} {got}, needed "
                f"{needed[half.role]} as its pairs say; fetch it again"
            )
    halves = (stored[Role.K_B], stored[Role.V_B])
    dtypes = sorted({half.dtype for half in halves}, key=READ.index)
    tensor = TensorInfo(
        rule.pattern.format(layer=layer),
        shape,
        dtypes[0],
        halves[0].file,
        halves[0].offset,
        sum(half.nbytes for half in halves),
        role,
        layer,
        None,
        made=Rearranged(halves, _join, "halves, one after the other in each head"),
    )
    return tensor, rule.part


def _of_pieces(
    model: GgufModel, role: Role, layer: int, stored: Mapping[Role, Stored]
) -> tuple[TensorInfo, str]:
    """The tensor whose rows a file holds in several."""
    family = model.family
    rule, dimensions = family.rule_of(role), family.dimensions(model.config)
    shape = family.shape(model.config, rule)
    places: list[Stored] = []
    rows: list[int] = []
    for piece in (piece for piece in family.for_gguf().pieces if piece.of is role):
        own, numbers = stored.get(piece.role), piece.rows(dimensions)
        needed = (len(numbers), shape[1])
        if own is None or own.shape != needed:
            got = "is missing" if own is None else f"has shape {own.shape}"
            raise CheckpointError(
                f"{model.path}: {piece.name.format(layer=layer)} {got}, needed {needed} as its "
                "pairs say; fetch it again"
            )
        places.append(own)
        rows += numbers
    tensor = TensorInfo(
        rule.pattern.format(layer=layer),
        shape,
        min((place.dtype for place in places), key=READ.index),
        places[0].file,
        places[0].offset,
        sum(place.nbytes for place in places),
        role,
        layer,
        None,
        made=_in_rows(rows, *places),
    )
    return tensor, rule.part


def _join(halves: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return join_kv_b(*halves)
