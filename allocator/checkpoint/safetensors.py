"""A directory with safetensors as a checkpoint: what its headers and `config.json` say.

In: a directory. Out: its `Inventory`. Invariant: as of `allocator.checkpoint.inventory`; every
header length and offset is checked against its file before it is used
(https://github.com/huggingface/safetensors#format), and every FP8 matrix has its scales and every
scale its matrix.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from allocator.checkpoint.inventory import (
    DTYPE_BYTES,
    FLOATS,
    FP8,
    MXFP4,
    MXFP4_BLOCK,
    Inventory,
    Part,
    Stored,
    TensorInfo,
    check_whole,
)
from allocator.checkpoint.refusals import (
    FETCH_LFS,
    LFS_POINTER,
    ORIGINAL,
    already_quantized,
    missing_shards,
    no_directory,
    no_weights,
    quantized,
    stored_as,
    unknown_tensor,
)
from allocator.errors import CheckpointError, reason
from allocator.families import (
    BLOCKS_SUFFIX,
    EXPONENTS_SUFFIX,
    SCALE_SUFFIX,
    Config,
    Family,
    Joined,
    Role,
    Stack,
    family_of,
)
from allocator.families.config import OWN_METHOD, check_fp8, quantization_method
from allocator.files.digests import Digests, Identity

_STORED_BYTES = DTYPE_BYTES | {
    "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Of every dtype whose place in a file is known; only those of `DTYPE_BYTES` are read."""
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _entries(header: bytes) -> dict[str, _Entry]:
    raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    raw.pop("__metadata__", None)
    return {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}


def read_header(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Yields `(name, dtype, shape, offset, nbytes)` of a safetensors file, checked.

    Raises:
        CheckpointError: if the file is truncated or its header does not describe it.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix == LFS_POINTER[:8]:
            raise CheckpointError(f"{path}: {FETCH_LFS}")
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: header of {length} bytes in a file of {size}; "
                "the file is truncated or no safetensors file: fetch it again"
            )
        try:
            entries = _entries(file.read(length))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: unreadable safetensors header ({error!r}); fetch the file again"
            ) from None
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype, shape, (start, stop) = entry.dtype, entry.shape, entry.data_offsets
        width = _STORED_BYTES.get(dtype)
        if width is None:
            raise CheckpointError(f"{path}: {stored_as(name, dtype, DTYPE_BYTES)}")
        if start != end or any(n < 0 for n in shape) or stop - start != prod(shape) * width:
            raise CheckpointError(
                f"{path}: {name} has shape {shape} but bytes {start}..{stop} "
                f"(expected from {end}); the header is damaged: fetch the file again"
            )
        end = stop
        yield name, dtype, shape, 8 + length + start, stop - start
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: {size} bytes, its header needs {8 + length + end}; "
            "the file is truncated or has a tail: fetch it again"
        )


def read_json(path: Path) -> Any:
    """Reads a JSON file of a checkpoint.

    Raises:
        CheckpointError: if it is missing or no JSON.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; needed a checkpoint directory") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({reason(error)}); fetch the file again"
        ) from None
    if data.startswith(LFS_POINTER):
        raise CheckpointError(f"{path}: {FETCH_LFS}")
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({reason(error)}); fetch the file again"
        ) from None


def weights_files(path: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """Returns the names of safetensors files and, if sharded, the index: tensor name to file.

    Raises:
        CheckpointError: if there are none, or the index is damaged or names a file that is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: no weight_map; fetch the file again")
        for file in {str(file) for file in weight_map.values()}:
            if Path(file).name != file or len(file) > 255:
                raise CheckpointError(f"{index}: {file!r} is no file name inside the checkpoint")
        weight_map = {name: str(file) for name, file in weight_map.items()}
        files = sorted(set(weight_map.values()))
        if missing := [file for file in files if not (path / file).is_file()]:
            raise CheckpointError(missing_shards(path, missing, len(files)))
        return files, weight_map
    if (path / "model.safetensors").is_file():
        return ["model.safetensors"], None
    raise CheckpointError(no_weights(path))


def _stored(path: Path, opened: dict[str, Identity]) -> dict[str, Stored]:
    """Everything that the files hold, by name, in their order; fills `opened`."""
    files, weight_map = weights_files(path)
    stored: dict[str, Stored] = {}
    for file in files:
        opened[file] = Identity.of((path / file).stat())
        for name, dtype, shape, offset, nbytes in read_header(path / file):
            if name in stored or (weight_map is not None and weight_map.get(name) != file):
                where = stored[name].file if name in stored else (weight_map or {}).get(name)
                raise CheckpointError(
                    f"{path}: {name} is in {file} and, by index, in {where or 'nowhere'}"
                )
            stored[name] = Stored(name, shape, dtype, file, offset, nbytes)
    if missing := set(weight_map or ()) - set(stored):
        raise CheckpointError(f"{path}: {min(missing)} is in the index but in no shard; fetch it")
    return stored


def _is_scale(path: Path, name: str, stored: Mapping[str, Stored]) -> bool:
    """Whether a stored tensor is the scale of another, which must then be FP8."""
    if not name.endswith(SCALE_SUFFIX):
        return False
    owner = stored.get(name.removesuffix(SCALE_SUFFIX))
    if owner is None or owner.dtype != FP8:
        raise CheckpointError(
            f"{path}: {name} scales a weight that is "
            f"{'missing' if owner is None else f'stored as {owner.dtype}'}, needed one in {FP8}; "
            "the checkpoint is not whole: fetch it again"
        )
    return True


def _is_exponents(path: Path, family: Family, place: Stored, stored: Mapping[str, Stored]) -> bool:
    """Whether a stored tensor has the exponents of a stack in MXFP4, which must then be there."""
    if family.match_mxfp4(place.name, EXPONENTS_SUFFIX) is None:
        return False
    blocks = place.name.removesuffix(EXPONENTS_SUFFIX) + BLOCKS_SUFFIX
    if blocks not in stored:
        raise CheckpointError(
            f"{path}: {place.name} without {blocks}, whose exponents it has; the checkpoint is not "
            "whole: fetch it again"
        )
    return True


def _check_stored(
    path: Path, place: Stored, names: Iterable[str], config: Config, family: Family
) -> None:
    """A tensor has values, in a dtype that is read."""
    if 0 in place.shape:
        key = family.empty_part(config)
        none = "" if key is None else f"{key} is 0 in config.json, and "
        raise CheckpointError(
            f"{path}: {none}{place.name} has shape {place.shape}, so no values: a model with such "
            "a part is not supported"
        )
    in_mxfp4 = place.dtype == "U8" and family.match_mxfp4(place.name, BLOCKS_SUFFIX)
    if place.dtype not in DTYPE_BYTES and not in_mxfp4:
        why = quantized(names, quantization_method(config))
        raise CheckpointError(f"{path}: {why or stored_as(place.name, place.dtype, DTYPE_BYTES)}")


def _tensors(
    path: Path, config: Config, family: Family, stored: Mapping[str, Stored]
) -> Iterator[tuple[TensorInfo, str]]:
    """Yields every tensor, and what it is called within its layer."""
    n_layers, n_nextn = family.n_layers(config), family.n_nextn(config)
    n_nextn = family.n_nextn_layers if n_nextn is None else n_nextn
    for name, place in stored.items():
        if _is_exponents(path, family, place, stored):
            continue
        _check_stored(path, place, stored, config, family)
        if _is_scale(path, name, stored):
            continue
        if (stacked := family.match_stack(name)) and stacked[1] < n_layers:
            yield from _experts_of(path, config, family, place, *stacked)
            continue
        if (blocks := family.match_mxfp4(name, BLOCKS_SUFFIX)) and blocks[1] < n_layers:
            exponents = stored.get(name.removesuffix(BLOCKS_SUFFIX) + EXPONENTS_SUFFIX)
            yield from _mxfp4_experts_of(path, config, family, place, exponents, *blocks)
            continue
        if (joined := family.match_joined(name)) and joined[1] < n_layers:
            yield from _parts_of(path, config, family, place, *joined)
            continue
        match = family.match(name)
        layer = match[1] if match else family.foreign_layer(name)
        expert = match[2] if match else None
        part = match[0].part if match else name
        role = match[0].role if match else Role.NEXTN
        if layer is not None and layer >= n_layers:
            role, match = Role.NEXTN, None
        if match is None and (layer is None or not n_layers <= layer < n_layers + n_nextn):
            why = quantized(stored, quantization_method(config))
            raise CheckpointError(
                f"{path}: {why or unknown_tensor(name, family, n_layers, n_nextn)}"
            )
        if match is not None and match[0].in_one_row and place.shape[:1] == (1,):
            place = replace(place, shape=place.shape[1:])
        if match is not None and len(place.shape) != match[0].n_axes:
            raise CheckpointError(
                f"{path}: {name} ({role}) has shape {place.shape}; is this another architecture?"
            )
        at, scale = (place.file, place.offset, place.nbytes), stored.get(name + SCALE_SUFFIX)
        if match is not None:  # one name, whatever a checkpoint calls it
            name = match[0].pattern.format(layer=layer, expert=expert)
        yield TensorInfo(name, place.shape, place.dtype, *at, role, layer, expert, scale), part


def _experts_of(
    path: Path, config: Config, family: Family, place: Stored, stack: Stack, layer: int
) -> Iterator[tuple[TensorInfo, str]]:
    """Yields the matrices of experts that lie in one tensor, under the names of single ones."""
    n_parts = len(stack.roles)
    rows, columns = family.shape(config, family.rule_of(stack.roles[0]))
    plain, turned = (rows * n_parts, columns), (columns, rows * n_parts)
    if place.shape[1:] not in (plain, turned) or place.dtype == FP8:
        raise CheckpointError(
            f"{path}: {place.name} of {place.dtype} has shape {place.shape}, needed experts x "
            f"{plain[0]} x {plain[1]}, or x {turned[0]} x {turned[1]}, in floats"
        )
    transposed = stack.transposed if plain == turned else place.shape[1:] == turned
    n_experts = place.shape[0]
    nbytes = place.nbytes // n_experts // n_parts
    for expert in range(n_experts):
        for number, role in enumerate(stack.roles):
            rule = family.rule_of(role)
            name = rule.pattern.format(layer=layer, expert=expert)
            offset, part = place.offset + expert * n_parts * nbytes, None
            shape = (place.shape[1], place.shape[2])
            if stack.alternating:
                part = Part(shape, number, n_parts, rows, transposed, transposed)
            elif transposed:
                part = Part(shape, number * rows, 1, rows, transposed, transposed)
            else:
                offset += number * nbytes
            at = (place.file, offset, nbytes)
            yield (
                TensorInfo(name, (rows, columns), place.dtype, *at, role, layer, expert, part=part),
                rule.part,
            )


def _mxfp4_experts_of(
    path: Path,
    config: Config,
    family: Family,
    blocks: Stored,
    exponents: Stored | None,
    stack: Stack,
    layer: int,
) -> Iterator[tuple[TensorInfo, str]]:
    """Yields the matrices of experts that lie in MXFP4 in two tensors, as single ones.

    The blocks are `(experts, sum of rows, blocks, 16)`, never transposed: bytes of two values, the
    first in the lower four bits. The exponents are `(experts, sum of rows, blocks)`.
    """
    n_parts, n_experts = len(stack.roles), blocks.shape[0]
    rows, columns = family.shape(config, family.rule_of(stack.roles[0]))
    whole = (n_experts, rows * n_parts, columns // MXFP4_BLOCK)
    if exponents is None or columns % MXFP4_BLOCK or exponents.dtype != blocks.dtype:
        raise CheckpointError(
            f"{path}: {blocks.name} of {columns} columns without exponents in U8, one per "
            f"{MXFP4_BLOCK} of them; the checkpoint is not whole: fetch it again"
        )
    for place, shape in ((blocks, (*whole, MXFP4_BLOCK // 2)), (exponents, whole)):
        if place.shape != shape:
            raise CheckpointError(f"{path}: {place.name} has shape {place.shape}, needed {shape}")
    for expert in range(n_experts):
        for number, role in enumerate(stack.roles):
            rule = family.rule_of(role)
            name = rule.pattern.format(layer=layer, expert=expert)
            codes = _rows_of(blocks, stack, expert, number)
            scale = _rows_of(exponents, stack, expert, number)
            at = (codes.file, codes.offset, codes.nbytes)
            yield (
                TensorInfo(
                    name, (rows, columns), MXFP4, *at, role, layer, expert, scale, part=codes.part
                ),
                rule.part,
            )


def _rows_of(place: Stored, stack: Stack, expert: int, number: int) -> Stored:
    """Rows of one role in the bytes `(experts, sum of rows, ...)` of a stack."""
    n_parts = len(stack.roles)
    rows, nbytes = place.shape[1] // n_parts, place.nbytes // place.shape[0] // n_parts
    offset, part = place.offset + expert * n_parts * nbytes, None
    if stack.alternating:
        part = Part((rows * n_parts, nbytes // rows), number, n_parts, rows)
    else:
        offset += number * nbytes
    shape = (rows, *place.shape[2:])
    return replace(place, shape=shape, offset=offset, nbytes=nbytes, part=part)


def _parts_of(
    path: Path, config: Config, family: Family, place: Stored, joined: Joined, layer: int
) -> Iterator[tuple[TensorInfo, str]]:
    """Yields the tensors with a row per expert that lie in one, under names of their own."""
    n_parts = len(joined.parts)
    for number, pattern in enumerate(joined.parts):
        match = family.match(pattern.format(layer=layer))
        assert match is not None, pattern
        rule = match[0]
        rows, columns = family.shape(config, rule)
        if place.shape != (rows, columns * n_parts) or place.dtype == FP8:
            raise CheckpointError(
                f"{path}: {place.name} of {place.dtype} has shape {place.shape}, needed "
                f"{(rows, columns * n_parts)} in floats"
            )
        part = Part((rows, columns * n_parts), number, n_parts, columns, of_columns=True)
        at = (place.file, place.offset, place.nbytes // n_parts)
        name = rule.pattern.format(layer=layer)
        yield (
            TensorInfo(name, (rows, columns), place.dtype, *at, rule.role, layer, None, part=part),
            rule.part,
        )


def _check_fp8(inventory: Inventory, tensor: TensorInfo) -> None:
    """An FP8 tensor is a matrix that is encoded anew (or left out), and has its scale."""
    where = f"{inventory.path}: {tensor.name}"
    if not tensor.role.is_encoded and tensor.role is not Role.NEXTN:
        raise CheckpointError(
            f"{where} ({tensor.role}) is stored as {FP8}, but kept in full precision: needed F32, "
            "F16 or BF16; convert the checkpoint to bfloat16 first"
        )
    if tensor.scale is None:
        raise CheckpointError(
            f"{where} is stored as {FP8} without its {tensor.name}{SCALE_SUFFIX}, one factor "
            "per block; the checkpoint is not whole: fetch it again"
        )
    if quantization_method(inventory.config) is None:
        raise CheckpointError(
            f"{where} is stored as {FP8}, but config.json has no quantization_config, needed its "
            "weight_block_size; fetch config.json from the place of the weights"
        )
    blocks = zip(tensor.shape, inventory.scale_block, strict=False)  # nextn: of any dimensions
    needed = tuple(-(-size // block) for size, block in blocks)
    if tensor.scale.dtype not in FLOATS or tensor.scale.shape != needed:
        raise CheckpointError(
            f"{inventory.path}: {tensor.scale.name} is {tensor.scale.dtype} of shape "
            f"{tensor.scale.shape}, needed {' or '.join(FLOATS)} of shape {needed}: a factor for "
            "every block of "
            f"{inventory.scale_block} in {tensor.shape}; fetch both and config.json from one place"
        )


def read_safetensors_inventory(path: Path, *, digests: Path | None = None) -> Inventory:
    """Reads headers and `config.json` of the checkpoint in a directory; no weights.

    Args:
        path: of the directory.
        digests: a folder in which digests of tensors are remembered between processes.

    Raises:
        CheckpointError: if it is missing, truncated, damaged, or of an unknown architecture.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(no_directory(path))
    opened = {"config.json": Identity.of((path / "config.json").stat())}
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}/config.json: needed an object")
    if quantization_method(config) == OWN_METHOD:
        raise CheckpointError(already_quantized(path))
    family = family_of(config, f"{path}/config.json")
    family.check(config, f"{path}/config.json")
    stored = _stored(path, opened)
    computed = tuple(place for name, place in stored.items() if family.is_computed(name))
    ignored = tuple(place for name, place in stored.items() if family.is_ignored(name))
    for place in (*computed, *ignored):
        del stored[place.name]
    tensors: dict[str, TensorInfo] = {}
    parts: dict[int | None, set[str]] = {}
    for tensor, part in _tensors(path, config, family, stored):
        if tensor.name in tensors:
            raise CheckpointError(
                f"{path}: {tensor.name} is there twice, under several names; fetch it again"
            )
        tensors[tensor.name] = tensor
        parts.setdefault(tensor.layer, set()).add(part)
    remembered = None if digests is None else Digests(digests)
    inventory = Inventory(path, config, family, tensors, opened, remembered, computed, ignored)
    in_fp8 = [tensor for tensor in tensors.values() if tensor.dtype == FP8]
    if in_fp8:
        check_fp8(config, f"{path}/config.json", way_out=ORIGINAL)
    for tensor in in_fp8:
        _check_fp8(inventory, tensor)
    check_whole(inventory, parts)
    return inventory
