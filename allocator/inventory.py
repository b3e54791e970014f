"""Everything a checkpoint holds, from safetensors headers and `config.json` alone.

In: a directory. Out: an `Inventory` of `TensorInfo`s. Invariant: no weight is read, so a terabyte
takes seconds; every header length and offset is checked against its file before it is used
(https://github.com/huggingface/safetensors#format); every tensor has a role, and the experts of
every MoE layer are complete and of one shape.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from allocator.errors import CheckpointError
from allocator.families import Family, Role, family_of

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint; `offset` counts from the start of its file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    layer: int | None
    expert: int | None
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Inventory:
    """What `read_inventory` found.

    Attributes:
        path: the checkpoint's directory.
        config: its `config.json`.
        family: its architecture.
        tensors: by name, in the order of the files.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, TensorInfo]

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

    @cached_property
    def tied_embeddings(self) -> bool:
        """Whether the head is the embedding."""
        return not any(t.role is Role.HEAD for t in self.tensors.values())

    @cached_property
    def n_searched_weights(self) -> int:
        """Weights of all matrices whose format is searched; effective bits count over these."""
        return sum(prod(t.shape) for t in self.tensors.values() if t.role.is_encoded)

    @cached_property
    def digest(self) -> str:
        """sha256 over `config.json` and every tensor's name, dtype, shape and bytes.

        Reads the whole checkpoint once: seconds per gigabyte.
        """
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            total.update(f"{name} {self.tensor_digest(name)}\n".encode())
        return total.hexdigest()

    def tensor_digest(self, name: str) -> str:
        """sha256 of one tensor's dtype, shape and bytes."""
        info = self.tensors[name]
        digest = hashlib.sha256(f"{info.dtype} {info.shape}\n".encode())
        with open(self.path / info.file, "rb") as file:
            file.seek(info.offset)
            left = info.nbytes
            while left:
                chunk = file.read(min(left, 1 << 24))
                if not chunk:
                    raise CheckpointError(f"{info.file}: ends inside {name}; fetch the file again")
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()

    def of_role(self, role: Role, layer: int | None = None) -> list[TensorInfo]:
        """Tensors of a role (of a layer), in expert order."""
        return self._by_role.get((role, layer), [])

    @cached_property
    def _by_role(self) -> dict[tuple[Role, int | None], list[TensorInfo]]:
        found: dict[tuple[Role, int | None], list[TensorInfo]] = {}
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.expert or 0, t.name)):
            found.setdefault((tensor.role, tensor.layer), []).append(tensor)
        return found


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
            header = json.loads(file.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            rows = [
                (
                    str(name),
                    str(e["dtype"]),
                    tuple(int(n) for n in e["shape"]),
                    *(int(n) for n in e["data_offsets"]),
                )
                for name, e in entries.items()
            ]
            rows.sort(key=lambda row: row[3])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: unreadable safetensors header ({error!r}); fetch the file again"
            ) from None
    end = 0
    for name, dtype, shape, start, stop in rows:
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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch the file again") from None


def _files(path: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """Safetensors files and, if sharded, the index: tensor name to file."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: no weight_map; fetch the file again")
        for file in set(weight_map.values()):
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index}: {file!r} is no file name inside the checkpoint")
            if not (path / file).is_file():
                raise CheckpointError(f"{path}: shard {file} of the index is missing; fetch it")
        return sorted(set(weight_map.values())), weight_map
    if (path / "model.safetensors").is_file():
        return ["model.safetensors"], None
    raise CheckpointError(
        f"{path}: neither model.safetensors nor model.safetensors.index.json; "
        "needed a directory with a safetensors checkpoint"
    )


def _tensors(path: Path, family: Family, n_layers: int) -> Iterator[TensorInfo]:
    files, weight_map = _files(path)
    seen: dict[str, str] = {}
    for file in files:
        for name, dtype, shape, offset, nbytes in read_header(path / file):
            if name in seen or (weight_map is not None and weight_map.get(name) != file):
                where = seen.get(name) or (weight_map or {}).get(name, "nowhere")
                raise CheckpointError(f"{path}: {name} is in {file} and, by index, in {where}")
            seen[name] = file
            found = family.match(name)
            if found is None:
                layer = next((int(p) for p in name.split(".") if p.isdigit()), -1)
                if layer < n_layers:
                    raise CheckpointError(
                        f"{path}: {name} is no tensor of {family.model_type}; "
                        "is this checkpoint already quantized, or of another architecture?"
                    )
                yield TensorInfo(name, shape, dtype, Role.NEXTN, layer, None, file, offset, nbytes)
                continue
            rule, number, expert = found
            role = Role.NEXTN if number is not None and number >= n_layers else rule.role
            yield TensorInfo(name, shape, dtype, role, number, expert, file, offset, nbytes)
    if missing := set(weight_map or ()) - set(seen):
        raise CheckpointError(f"{path}: {min(missing)} is in the index but in no shard; fetch it")


def _check_experts(inventory: Inventory) -> None:
    if not inventory.moe_layers:
        raise CheckpointError(f"{inventory.path}: no router; needed a Mixture-of-Experts checkpoint")
    n = inventory.n_experts
    for layer in inventory.moe_layers:
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            found = inventory.of_role(role, layer)
            if [t.expert for t in found] != list(range(n)) or len({t.shape for t in found}) != 1:
                raise CheckpointError(
                    f"{inventory.path}: layer {layer} has {len(found)} {role} tensors, "
                    f"needed experts 0..{n - 1} of one shape as config.json says"
                )


def _check_names(inventory: Inventory, names: Iterable[str]) -> None:
    for name in names:
        if name not in inventory.tensors:
            raise CheckpointError(f"{inventory.path}: {name} is missing; the checkpoint is not whole")


def read_inventory(path: str | Path) -> Inventory:
    """Reads headers and `config.json` of the checkpoint in `path`; no weights.

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
    family.n_experts_key(config)
    for key in ("num_hidden_layers", "num_experts_per_tok", "hidden_size", "vocab_size"):
        if not isinstance(config.get(key), int):
            raise CheckpointError(f"{path}/config.json: {key} is {config.get(key)!r}, needed a number")
    found = {t.name: t for t in _tensors(path, family, int(config["num_hidden_layers"]))}
    inventory = Inventory(path=path, config=config, family=family, tensors=found)
    _check_experts(inventory)
    _check_names(inventory, ("model.embed_tokens.weight", "model.norm.weight"))
    for layer in range(inventory.n_layers):
        _check_names(
            inventory,
            (f"model.layers.{layer}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")),
        )
    return inventory
