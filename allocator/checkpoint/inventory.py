"""Everything a checkpoint holds, from safetensors headers and `config.json` alone.

In: a directory. Out: an `Inventory` of `TensorInfo`s. Invariant: no weight is read, so a terabyte
takes seconds; every header length and offset is checked against its file before it is used
(https://github.com/huggingface/safetensors#format); every tensor has a role, every FP8 matrix its
scales and every scale its matrix, and the experts of every MoE layer are complete and of one shape.

A file that changes after its header was read is refused: weights come out of `Inventory.reading`
alone, which looks at the file before and after. So whatever was made of an inventory's weights, a
cache entry, a loss or a checkpoint, belongs to `Inventory.digest`.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from allocator.checkpoint.refusals import (
    FETCH_LFS,
    LFS_POINTER,
    ORIGINAL,
    missing_shards,
    no_directory,
    no_weights,
    quantized,
    stored_as,
    unknown_tensor,
)
from allocator.errors import CheckpointError
from allocator.families import COMPUTED, SCALE_SUFFIX, Family, Role, family_of
from allocator.files.digests import Digests, Identity

FP8 = "F8_E4M3"
MXFP4 = "MXFP4"  # of planned tensors alone: no checkpoint with it is read
FLOATS = ("F32", "F16", "BF16")
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, FP8: 1}
_STORED_BYTES = DTYPE_BYTES | {
    "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Of every dtype whose place in a file is known; only those of `DTYPE_BYTES` are read."""
_COUNTS = ("num_experts_per_tok", "hidden_size", "vocab_size")
_LISTED = ("num_hidden_layers",)
_WIDTHS = (
    "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace", "topk_group",
    "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
_MOST_WIDE = 1 << 28
_MOST_LISTED = 1 << 14  # layers, experts
_VECTORS = (Role.NORM, Role.ROUTER_BIAS)
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_CHANGED = (
    "changed or replaced since it was opened, needed one checkpoint throughout; when nobody "
    "writes it any more, run the same command again"
)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file; `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorInfo(Stored):
    """One tensor of a checkpoint.

    Attributes:
        role: what it does.
        layer: its layer, if it has one.
        expert: its expert, if it has one.
        scale: of an FP8 matrix, one F32, F16 or BF16 factor per block, `(ceil(out / rows),
            ceil(in / columns))` for the `(rows, columns)` of `Inventory.scale_block`; None for
            every other dtype.
    """

    role: Role
    layer: int | None
    expert: int | None
    scale: Stored | None = None

    @property
    def total_bytes(self) -> int:
        """Its bytes with those of its scale."""
        return self.nbytes + (0 if self.scale is None else self.scale.nbytes)


@dataclass(frozen=True)
class Inventory:
    """What `read_inventory` found.

    Attributes:
        path: the checkpoint's directory.
        config: its `config.json`.
        family: its architecture.
        tensors: by name, in the order of the files; scales are part of their tensors.
        files: `config.json` and the files with weights, as they were when they were opened.
        digests: remembers those of tensors, if given.
        computed: stored buffers that the architecture computes itself; no part of anything here.
        without_tokenizer: whether a file of it is to read token ids alone.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Identity] = field(default_factory=dict, compare=False, repr=False)
    digests: Digests | None = field(default=None, compare=False, repr=False)
    computed: tuple[Stored, ...] = ()
    without_tokenizer: bool = False

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What of the checkpoint is left out, a line each."""
        found = []
        nextn = [t for t in self.tensors.values() if t.role is Role.NEXTN]
        for what, left in (
            ("buffers that the model computes itself", self.computed),
            ("tensors of multi-token prediction", nextn),
        ):
            if left and left[0].file:  # planned ones lie in no file
                nbytes = sum(t.total_bytes if isinstance(t, TensorInfo) else t.nbytes for t in left)
                found.append(f"left out: {len(left)} {what}, {nbytes:,} bytes, e.g. {left[0].name}")
        method = _quant_method(self.config)
        if method and all(t.dtype in FLOATS for t in self.tensors.values()) and self._is_read:
            found.append(
                f"left out: config.json says quant_method {method!r}, but no tensor is quantized"
            )
        return tuple(found)

    @property
    def _is_read(self) -> bool:
        """Whether it has files."""
        return any(t.file for t in self.tensors.values())

    @cached_property
    def n_layers(self) -> int:
        """Decoder layers, the multi-token-prediction ones not counted."""
        return int(self.config["num_hidden_layers"])

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that route."""
        routers = (t.layer for t in self.tensors.values() if t.role is Role.ROUTER)
        return tuple(sorted(layer for layer in routers if layer is not None))

    @cached_property
    def n_experts(self) -> int:
        """Routed experts per MoE layer."""
        return int(self.config[self.family.n_experts_key(self.config)])

    @cached_property
    def experts_used(self) -> int:
        """Routed experts that a token passes through."""
        return int(self.config["num_experts_per_tok"])

    @cached_property
    def expert_groups(self) -> int:
        """Groups that the router first chooses among (`n_group`); 1 where it has none."""
        return _router_groups(self.config, self.family)[0]

    @cached_property
    def expert_groups_used(self) -> int:
        """Of those, how many a token's experts may come from (`topk_group`)."""
        return _router_groups(self.config, self.family)[1]

    def least_experts(self, used: int) -> int:
        """The fewest experts per layer from which the router can choose `used`.

        A router with groups rates each by its two best experts, and then chooses experts from the
        `topk_group` best groups.
        """
        if self.config.get("n_group") is None and self.family.router_groups == (1, 1):
            return used
        return self.expert_groups * max(2, -(-used // self.expert_groups_used))

    @cached_property
    def tied_embeddings(self) -> bool:
        """Whether the head is the embedding."""
        return not any(t.role is Role.HEAD for t in self.tensors.values())

    @cached_property
    def n_searched_weights(self) -> int:
        """Weights of all matrices whose format is searched; effective bits count over these."""
        return sum(prod(t.shape) for t in self.tensors.values() if t.role.is_encoded)

    @cached_property
    def scale_block(self) -> tuple[int, int]:
        """Rows and columns of an FP8 matrix that share one factor; needs a checkpoint with FP8."""
        rows, columns = self.config["quantization_config"]["weight_block_size"]
        return int(rows), int(columns)

    @cached_property
    def digest(self) -> str:
        """sha256 over `config.json` and every tensor's name, dtype, shape, bytes and scale.

        Reads the whole checkpoint once: seconds per gigabyte; with `digests`, once for all.
        """
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            total.update(f"{name} {self.tensor_digest(name)}\n".encode())
        if self.digests is not None:
            self.digests.save()
        return total.hexdigest()

    def tensor_digest(self, name: str) -> str:
        """sha256 of one tensor's dtype, shape and bytes; of FP8, also of its blocks and scale."""
        info = self.tensors[name]
        if self.digests is None:
            return self._digest(info)
        stored = [info] if info.scale is None else [info, info.scale]
        part = " ".join(f"{s.name} {s.dtype} {s.shape} at {s.offset}" for s in stored)
        if info.scale is not None:
            part += f" in blocks of {self.scale_block}"
        files = {self.path / s.file: self.files[s.file] for s in stored}
        return self.digests.of(files, part, lambda: self._digest(info))

    def _digest(self, info: TensorInfo) -> str:
        digest = hashlib.sha256(f"{info.dtype} {info.shape}\n".encode())
        for chunk in self._chunks(info):
            digest.update(chunk)
        if info.scale is not None:
            digest.update(f"{info.scale.dtype} {info.scale.shape} {self.scale_block}\n".encode())
            for chunk in self._chunks(info.scale):
                digest.update(chunk)
        return digest.hexdigest()

    def _chunks(self, stored: Stored) -> Iterator[bytes]:
        with self.reading(stored.file) as file:
            file.seek(stored.offset)
            left = stored.nbytes
            while left:
                chunk = file.read(min(left, 1 << 24))
                if not chunk:
                    raise CheckpointError(
                        f"{stored.file}: ends inside {stored.name}; fetch the file again"
                    )
                yield chunk
                left -= len(chunk)

    @contextmanager
    def reading(self, file: str) -> Iterator[BinaryIO]:
        """Opens a file for the block; what is read there is of the file as it was opened first.

        The handle is looked at, not the name: a replacement may be put in place and taken away
        again while nobody looks.

        Raises:
            CheckpointError: if another file is there, or this one changed, when the block begins
                or ends.
        """
        try:
            handle = open(self.path / file, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            raise CheckpointError(f"{self.path / file}: {_CHANGED}") from None
        with handle:
            self._check(file, os.fstat(handle.fileno()))
            yield handle
            self._check(file, os.fstat(handle.fileno()))

    def check_unchanged(self) -> None:
        """Raises:
        CheckpointError: if `config.json` or a file with weights is another one by now.
        """
        for file in self.files:
            try:
                self._check(file, (self.path / file).stat())
            except FileNotFoundError:
                raise CheckpointError(f"{self.path / file}: {_CHANGED}") from None

    def _check(self, file: str, stat: os.stat_result) -> None:
        if Identity.of(stat) != self.files[file]:
            raise CheckpointError(f"{self.path / file}: {_CHANGED}")

    def of_role(self, role: Role, layer: int | None = None) -> list[TensorInfo]:
        """Tensors of a role (of a layer), in expert order."""
        return self._by_role.get((role, layer), [])

    @cached_property
    def _by_role(self) -> dict[tuple[Role, int | None], list[TensorInfo]]:
        found: dict[tuple[Role, int | None], list[TensorInfo]] = {}
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.expert or 0, t.name)):
            found.setdefault((tensor.role, tensor.layer), []).append(tensor)
        return found


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
    """A JSON file of a checkpoint.

    Raises:
        CheckpointError: if it is missing or no JSON.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; needed a checkpoint directory") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch the file again") from None
    if data.startswith(LFS_POINTER):
        raise CheckpointError(f"{path}: {FETCH_LFS}")
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch the file again") from None


def _files(path: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """Safetensors files and, if sharded, the index: tensor name to file."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        found = read_json(index)
        weight_map = found.get("weight_map") if isinstance(found, dict) else None
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
    files, weight_map = _files(path)
    found: dict[str, Stored] = {}
    for file in files:
        opened[file] = Identity.of((path / file).stat())
        for name, dtype, shape, offset, nbytes in read_header(path / file):
            if name in found or (weight_map is not None and weight_map.get(name) != file):
                where = found[name].file if name in found else (weight_map or {}).get(name)
                raise CheckpointError(
                    f"{path}: {name} is in {file} and, by index, in {where or 'nowhere'}"
                )
            found[name] = Stored(name, shape, dtype, file, offset, nbytes)
    if missing := set(weight_map or ()) - set(found):
        raise CheckpointError(f"{path}: {min(missing)} is in the index but in no shard; fetch it")
    return found


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


def _check_stored(
    path: Path, place: Stored, names: Iterable[str], config: Mapping[str, Any]
) -> None:
    """A tensor has values, in a dtype that is read."""
    if 0 in place.shape:
        none = "n_shared_experts is 0 in config.json, and " * (config.get("n_shared_experts") == 0)
        raise CheckpointError(
            f"{path}: {none}{place.name} has shape {place.shape}, so no values: a model with such "
            "a part is not supported"
        )
    if place.dtype not in DTYPE_BYTES:
        why = quantized(names, _quant_method(config))
        raise CheckpointError(f"{path}: {why or stored_as(place.name, place.dtype, DTYPE_BYTES)}")


def _tensors(
    path: Path, config: Mapping[str, Any], family: Family, stored: Mapping[str, Stored]
) -> Iterator[tuple[TensorInfo, str]]:
    """Yields every tensor, and what it is called within its layer."""
    n_layers, n_nextn = int(config["num_hidden_layers"]), config.get("num_nextn_predict_layers")
    n_nextn = family.n_nextn_layers if n_nextn is None else int(n_nextn)
    for name, place in stored.items():
        _check_stored(path, place, stored, config)
        if _is_scale(path, name, stored):
            continue
        found = family.match(name)
        layer = found[1] if found else family.foreign_layer(name)
        expert = found[2] if found else None
        part = family.part(found[0]) if found else name
        role = found[0].role if found else Role.NEXTN
        if layer is not None and layer >= n_layers:
            role, found = Role.NEXTN, None
        if found is None and (layer is None or not n_layers <= layer < n_layers + n_nextn):
            why = quantized(stored, _quant_method(config))
            raise CheckpointError(
                f"{path}: {why or unknown_tensor(name, family, n_layers, n_nextn)}"
            )
        if role is not Role.NEXTN and len(place.shape) != (1 if role in _VECTORS else 2):
            raise CheckpointError(
                f"{path}: {name} ({role}) has shape {place.shape}; is this another architecture?"
            )
        at, scale = (place.file, place.offset, place.nbytes), stored.get(name + SCALE_SUFFIX)
        yield TensorInfo(name, place.shape, place.dtype, *at, role, layer, expert, scale), part


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
    if inventory.config.get("quantization_config") is None:
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


def _check_experts(inventory: Inventory) -> None:
    if not inventory.moe_layers:
        raise CheckpointError(
            f"{inventory.path}: no router; needed a Mixture-of-Experts checkpoint"
        )
    n = inventory.n_experts
    for layer in inventory.moe_layers:
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            found = inventory.of_role(role, layer)
            whole = len(found) == n and all(t.expert == i for i, t in enumerate(found))
            if not whole or len({t.shape for t in found}) != 1:
                raise CheckpointError(
                    f"{inventory.path}: layer {layer} has {len(found)} {role} tensors, "
                    f"needed experts 0..{n - 1} of one shape as config.json says"
                )

        for role in (Role.ROUTER, Role.ROUTER_BIAS):
            for tensor in inventory.of_role(role, layer):
                if tensor.shape[0] != n:
                    raise CheckpointError(
                        f"{inventory.path}: {tensor.name} has shape {tensor.shape}, "
                        f"needed {n} rows as config.json says"
                    )


def _check_layer(inventory: Inventory, layer: int, found: frozenset[str]) -> None:
    if found not in inventory.family.layers:
        nearest = min(inventory.family.layers, key=lambda whole: len(whole ^ found))
        lacks, odd = sorted(nearest - found), sorted(found - nearest)
        raise CheckpointError(
            f"{inventory.path}: layer {layer} lacks {', '.join(lacks) or 'nothing'}"
            f"{' and has ' + ', '.join(odd) if odd else ''}; the checkpoint is not whole"
        )


def _check_names(inventory: Inventory, names: Iterable[str]) -> None:
    for name in names:
        if name not in inventory.tensors:
            raise CheckpointError(
                f"{inventory.path}: {name} is missing; the checkpoint is not whole"
            )


def read_inventory(path: str | Path, *, digests: Path | None = None) -> Inventory:
    """Reads headers and `config.json` of the checkpoint in `path`; no weights.

    Args:
        path: of the checkpoint.
        digests: a folder in which digests of tensors are remembered between processes.

    Raises:
        CheckpointError: if it is missing, truncated, damaged, or of an unknown architecture.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(no_directory(path))
    opened = {"config.json": Identity.of((path / "config.json").stat())}
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}/config.json: needed an object")
    family = family_of(config)
    check_config(path, config, family)
    stored = _stored(path, opened)
    computed = tuple(place for name, place in stored.items() if COMPUTED.fullmatch(name))
    for place in computed:
        del stored[place.name]
    tensors: dict[str, TensorInfo] = {}
    parts: dict[int | None, set[str]] = {}
    for tensor, part in _tensors(path, config, family, stored):
        tensors[tensor.name] = tensor
        parts.setdefault(tensor.layer, set()).add(part)
    remembered = None if digests is None else Digests(digests)
    inventory = Inventory(path, config, family, tensors, opened, remembered, computed)
    in_fp8 = [tensor for tensor in tensors.values() if tensor.dtype == FP8]
    if in_fp8:
        _check_quantization(path, config.get("quantization_config"))
    for tensor in in_fp8:
        _check_fp8(inventory, tensor)
    _check_names(inventory, ("model.embed_tokens.weight", "model.norm.weight"))
    if not config.get("tie_word_embeddings", False):
        _check_names(inventory, ("lm_head.weight",))
    for layer in range(inventory.n_layers):
        _check_layer(inventory, layer, frozenset(parts.get(layer, ())))
    _check_experts(inventory)
    return inventory


def check_config(path: Path, config: Mapping[str, Any], family: Family) -> None:
    """Raises:
    CheckpointError: if counts of layers or experts are missing, or make no sense.
    """

    def check(key: str, least: int, most: int = _MOST_WIDE) -> int:
        value = config.get(key)
        if type(value) is not int or not least <= value <= most:
            raise CheckpointError(
                f"{path}/config.json: {key} is {value!r}, needed a number from {least} to {most}"
            )
        return value

    for key in _COUNTS:
        check(key, 1)
    for key in _LISTED:
        check(key, 1, _MOST_LISTED)
    for key in _WIDTHS:
        if config.get(key) is not None:
            check(key, 0)
    scale = config.get("routed_scaling_factor")
    if scale is not None and type(scale) not in (int, float):
        raise CheckpointError(
            f"{path}/config.json: routed_scaling_factor is {scale!r}, needed a number"
        )
    n_experts = check(family.n_experts_key(config), 1, _MOST_LISTED)
    if config.get("num_nextn_predict_layers") is not None:
        check("num_nextn_predict_layers", 0, _MOST_LISTED)
    for key in sorted(family.never_null & set(config)):
        if config[key] is None:
            raise CheckpointError(
                f"{path}/config.json: {key} is null, which transformers refuses; write its value "
                "(or leave it out, where transformers' default is meant)"
            )
    if config.get("n_group") is not None:
        check("n_group", 1)
    groups, chosen = _router_groups(config, family)
    if groups > 1 and "topk_group" in config:
        check("topk_group", 1)
    if config["num_experts_per_tok"] > n_experts or n_experts % groups or chosen > groups:
        raise CheckpointError(
            f"{path}/config.json: {config['num_experts_per_tok']} of {n_experts} experts used, in "
            f"{chosen} of {groups} groups; needed at most all, in equal groups"
        )


def _router_groups(config: Mapping[str, Any], family: Family) -> tuple[int, int]:
    """Groups of a router, and how many of them a token uses; null stands for no groups."""
    groups, used = family.router_groups
    groups = config.get("n_group", groups) or 1
    return (1, 1) if groups == 1 else (groups, config.get("topk_group", used))


def _quant_method(config: Mapping[str, Any]) -> str | None:
    """What config.json says of quantized weights; None if nothing."""
    found = config.get("quantization_config")
    if found is None:
        return None
    return str(found.get("quant_method") if isinstance(found, dict) else found)[:40]


def _check_quantization(path: Path, quantization: Any) -> None:
    """config.json says FP8 in blocks, or nothing (`_check_fp8` says what it needs then)."""
    if quantization is None:
        return
    found = quantization if isinstance(quantization, dict) else {}
    if found.get("quant_method") != "fp8":
        raise CheckpointError(
            f"{path}/config.json: quant_method is {found.get('quant_method')!r} of a checkpoint in "
            f"{FP8}, needed 'fp8'; {ORIGINAL}"
        )
    block = found.get("weight_block_size")
    if not isinstance(block, list) or [type(n) is int and n >= 1 for n in block] != [True, True]:
        raise CheckpointError(
            f"{path}/config.json: weight_block_size is {block!r}, needed two numbers from 1, as in "
            "[128, 128]; convert a checkpoint with other scales to bfloat16 first"
        )
