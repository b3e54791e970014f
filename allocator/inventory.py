"""Everything a checkpoint holds, from safetensors headers and `config.json` alone.

In: a directory. Out: an `Inventory` of `TensorInfo`s. Invariant: no weight is read, so a terabyte
takes seconds; every header length and offset is checked against its file before it is used
(https://github.com/huggingface/safetensors#format); every tensor has a role, every FP8 matrix its
scales and every scale its matrix, and the experts of every MoE layer are complete and of one shape.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from allocator.digests import Digests
from allocator.errors import CheckpointError
from allocator.families import SCALE_SUFFIX, Family, Role, family_of

FP8 = "F8_E4M3"
MXFP4 = "MXFP4"  # of planned tensors alone: no checkpoint with it is read
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, FP8: 1}
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
        scale: of an FP8 matrix, one F32 factor per block, `(ceil(out / rows), ceil(in / columns))`
            for the `(rows, columns)` of `Inventory.scale_block`; None for every other dtype.
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
        digests: remembers those of tensors, if given.
        without_tokenizer: whether a file of it is to read token ids alone.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, TensorInfo]
    digests: Digests | None = field(default=None, compare=False, repr=False)
    without_tokenizer: bool = False

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
        return int(self.config.get("n_group") or 1)

    def least_experts(self, used: int) -> int:
        """The fewest experts per layer from which the router can choose `used`.

        A router with groups rates each by its two best experts, and then chooses experts from the
        `topk_group` best groups.
        """
        if not self.config.get("n_group"):
            return used
        return self.expert_groups * max(2, -(-used // int(self.config.get("topk_group") or 1)))

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
        files = [self.path / s.file for s in stored]
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
        with open(self.path / stored.file, "rb") as file:
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
        width = DTYPE_BYTES.get(dtype)
        if width is None:
            raise CheckpointError(
                f"{path}: {name} is stored as {dtype}, needed one of {', '.join(DTYPE_BYTES)}; "
                "convert the checkpoint to bfloat16 first"
            )
        if start != end or any(n < 1 for n in shape) or stop - start != prod(shape) * width:
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
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; needed a checkpoint directory") from None
    except (OSError, ValueError, RecursionError) as error:
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
            if not (path / file).is_file():
                raise CheckpointError(f"{path}: shard {file} of the index is missing; fetch it")
        weight_map = {name: str(file) for name, file in weight_map.items()}
        return sorted(set(weight_map.values())), weight_map
    if (path / "model.safetensors").is_file():
        return ["model.safetensors"], None
    raise CheckpointError(
        f"{path}: neither model.safetensors nor model.safetensors.index.json; "
        "needed a directory with a safetensors checkpoint"
    )


def _stored(path: Path) -> dict[str, Stored]:
    """Everything that the files hold, by name, in their order."""
    files, weight_map = _files(path)
    found: dict[str, Stored] = {}
    for file in files:
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


def _tensors(
    path: Path, family: Family, n_layers: int, n_nextn: int
) -> Iterator[tuple[TensorInfo, str]]:
    """Yields every tensor, and what it is called within its layer."""
    stored = _stored(path)
    for name, place in stored.items():
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
            raise CheckpointError(
                f"{path}: {name} is no tensor of {family.model_type} with {n_layers} layers "
                f"and {n_nextn} for multi-token prediction; "
                "is this checkpoint already quantized, or of another architecture?"
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
            f"{where} is stored as {FP8} without its {tensor.name}{SCALE_SUFFIX}, one F32 factor "
            "per block; the checkpoint is not whole: fetch it again"
        )
    if inventory.config.get("quantization_config") is None:
        raise CheckpointError(
            f"{where} is stored as {FP8}, but config.json has no quantization_config, needed its "
            "weight_block_size; fetch config.json from the place of the weights"
        )
    blocks = zip(tensor.shape, inventory.scale_block, strict=False)  # nextn: of any dimensions
    needed = tuple(-(-size // block) for size, block in blocks)
    if (tensor.scale.dtype, tensor.scale.shape) != ("F32", needed):
        raise CheckpointError(
            f"{inventory.path}: {tensor.scale.name} is {tensor.scale.dtype} of shape "
            f"{tensor.scale.shape}, needed F32 of shape {needed}: a factor for every block of "
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
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; needed a checkpoint directory")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}/config.json: needed an object")
    family = family_of(config)
    check_config(path, config, family)
    _check_quantization(path, config.get("quantization_config"))
    n_layers = int(config["num_hidden_layers"])
    n_nextn = config.get("num_nextn_predict_layers")
    n_nextn = family.n_nextn_layers if n_nextn is None else int(n_nextn)
    tensors: dict[str, TensorInfo] = {}
    parts: dict[int | None, set[str]] = {}
    for tensor, part in _tensors(path, family, n_layers, n_nextn):
        tensors[tensor.name] = tensor
        parts.setdefault(tensor.layer, set()).add(part)
    remembered = None if digests is None else Digests(digests)
    inventory = Inventory(path, config, family, tensors, remembered)
    for tensor in tensors.values():
        if tensor.dtype == FP8:
            _check_fp8(inventory, tensor)
    _check_names(inventory, ("model.embed_tokens.weight", "model.norm.weight"))
    if not config.get("tie_word_embeddings", False):
        _check_names(inventory, ("lm_head.weight",))
    for layer in range(n_layers):
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
    groups = check("n_group", 1) if config.get("n_group") is not None else 1
    chosen = check("topk_group", 1) if groups > 1 else 1
    if config["num_experts_per_tok"] > n_experts or n_experts % groups or chosen > groups:
        raise CheckpointError(
            f"{path}/config.json: {config['num_experts_per_tok']} of {n_experts} experts used, in "
            f"{chosen} of {groups} groups; needed at most all, in equal groups"
        )


def _check_quantization(path: Path, quantization: Any) -> None:
    """What config.json says of quantized weights is either nothing, or FP8 in blocks."""
    if quantization is None:
        return
    found = quantization if isinstance(quantization, dict) else {}
    if found.get("quant_method") != "fp8":
        raise CheckpointError(
            f"{path}/config.json: quant_method is {found.get('quant_method')!r}, needed 'fp8' or "
            "no quantization_config at all; convert the checkpoint to bfloat16 first"
        )
    block = found.get("weight_block_size")
    if not isinstance(block, list) or [type(n) is int and n >= 1 for n in block] != [True, True]:
        raise CheckpointError(
            f"{path}/config.json: weight_block_size is {block!r}, needed two numbers from 1, as in "
            "[128, 128]; convert a checkpoint with other scales to bfloat16 first"
        )
