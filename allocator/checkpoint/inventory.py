"""Everything a checkpoint holds, from safetensors headers and `config.json` alone.

In: a directory. Out: an `Inventory` of `TensorInfo`s. Invariant: no weight is read, so a terabyte
takes seconds; every header length and offset is checked against its file before it is used
(https://github.com/huggingface/safetensors#format); every tensor has a role, every FP8 matrix its
scales and every scale its matrix, and the experts of every MoE layer are complete and of one shape.

A file that changes after its header was read is refused: weights are read through
`Inventory.reading` alone, which checks the file before and after. So everything that is made from
an inventory's weights, a cache entry, a loss or a checkpoint, belongs to `Inventory.digest`.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from allocator.checkpoint.gguf.reader import Pair
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
from allocator.errors import CheckpointError, reason
from allocator.families import (
    BLOCKS_SUFFIX,
    EXPONENTS_SUFFIX,
    SCALE_SUFFIX,
    Config,
    Dimensions,
    Family,
    Joined,
    ModelFacts,
    Role,
    Router,
    Stack,
    family_of,
)
from allocator.families.config import (
    check_fp8,
    quantization_method,
    weight_block,
)
from allocator.files.digests import Digests, Identity

FP8 = "F8_E4M3"
MXFP4 = "MXFP4"
"""Of experts in blocks of 4-bit floats with an exponent each, as gpt-oss is released."""
MXFP4_BLOCK = 32
"""Values of a row of MXFP4 that share an exponent."""
FLOATS = ("F32", "F16", "BF16")
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, FP8: 1}
_STORED_BYTES = DTYPE_BYTES | {
    "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Of every dtype whose place in a file is known; only those of `DTYPE_BYTES` are read."""
_PLACE_BYTES = DTYPE_BYTES | {MXFP4: 1, "U8": 1}
"""Bytes of what a `Part` counts: a value, two values of MXFP4, or their exponent."""
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_CHANGED = (
    "changed or replaced since it was opened, needed one checkpoint throughout; when nobody "
    "writes it any more, run the same command again"
)


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows, or columns, of a stored matrix another matrix is.

    The stored one is `(rows, columns)`, and its bytes begin at the offset.

    Attributes:
        shape: of the stored one.
        first: its first row, or column, that is one of the other's.
        step: from one to the next.
        count: of them.
        of_columns: it has columns of the stored one.
        transposed: these are its rows.
    """

    shape: tuple[int, int]
    first: int
    step: int
    count: int
    of_columns: bool = False
    transposed: bool = False

    def of(self, whole: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Returns the matrix, in one piece of memory, of a stored one, `shape`."""
        lines = whole.T if self.of_columns else whole
        chosen = lines[self.first :: self.step][: self.count]
        return np.ascontiguousarray(chosen if self.transposed or not self.of_columns else chosen.T)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file; `offset` counts from the file's start.

    Attributes:
        part: of a stored matrix, where it is no run of bytes; `nbytes` are its own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    nbytes: int
    part: Part | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Rearranged:
    """How a matrix is made of stored ones that have its weights in another order.

    Attributes:
        stored: these, each with its own shape.
        make: returns the matrix, `(rows, in_features)`, of their weights, whatever the type.
    """

    stored: tuple[Stored, ...]
    make: Callable[[Sequence[npt.NDArray[Any]]], npt.NDArray[Any]]

    @property
    def has_raw(self) -> bool:
        """Whether the matrix can be made of stored bytes, and not of decoded values alone."""
        dtypes = {place.dtype for place in self.stored}
        return len(dtypes) == 1 and dtypes <= DTYPE_BYTES.keys()


@dataclass(frozen=True, slots=True)
class TensorInfo(Stored):
    """One tensor of a checkpoint.

    Attributes:
        role: what it does.
        layer: its layer, if it has one.
        expert: its expert, if it has one.
        scale: of an FP8 matrix, one F32, F16 or BF16 factor per block, `(ceil(out / rows),
            ceil(in / columns))` for the `(rows, columns)` of `Inventory.scale_block`; of one in
            MXFP4 an exponent of two per 32 columns; None for every other dtype.
        unpadded: of a matrix that is wider here than in its file, the shape there.
        made: of other stored matrices, where it is none itself; `nbytes` are theirs.
    """

    role: Role
    layer: int | None
    expert: int | None
    scale: Stored | None = None
    made: Rearranged | None = None
    unpadded: tuple[int, ...] | None = None

    @property
    def as_stored(self) -> "TensorInfo":
        """The same without padding."""
        return self if self.unpadded is None else replace(self, shape=self.unpadded, unpadded=None)

    @property
    def total_bytes(self) -> int:
        """Its bytes with those of its scale."""
        return self.nbytes + (0 if self.scale is None else self.scale.nbytes)


@dataclass(frozen=True, eq=False)
class GgufModel:
    """What the files of a GGUF model say beside their tensors.

    Attributes:
        path: of the first file.
        pairs: of that file, by key, in its order.
        family: whose files have such pairs.
        config: that such pairs are written of.
        files: as they were when they were opened.
    """

    path: Path
    pairs: Mapping[str, Pair]
    family: Family
    config: Config
    files: Mapping[str, Identity]

    @cached_property
    def values(self) -> dict[str, Any]:
        """Values of the pairs by key."""
        return {key: pair.value for key, pair in self.pairs.items()}


@dataclass(frozen=True)
class Inventory:
    """Everything that a checkpoint holds.

    Attributes:
        path: the checkpoint's directory, or the first file of a GGUF model.
        config: its `config.json`, or what the pairs of a GGUF model say in its place.
        family: its architecture.
        tensors: by name, in the order of the files; scales are part of their tensors.
        files: `config.json` and the files with weights, as they were when they were opened.
        digests: remembers those of tensors, if given.
        computed: stored buffers that the architecture computes itself; no part of anything here.
        ignored: stored tensors of other parts of the model; no part of anything here.
        without_tokenizer: whether a file of it is to read token ids alone.
        gguf: what its files say besides, if they are GGUF.
    """

    path: Path
    config: Config
    family: Family
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Identity] = field(default_factory=dict, compare=False, repr=False)
    digests: Digests | None = field(default=None, compare=False, repr=False)
    computed: tuple[Stored, ...] = ()
    ignored: tuple[Stored, ...] = ()
    without_tokenizer: bool = False
    gguf: GgufModel | None = field(default=None, compare=False, repr=False)

    @property
    def folder(self) -> Path:
        """The directory of its files."""
        return self.path if self.gguf is None else self.path.parent

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Lines on the tensors and claims of the checkpoint that are left out."""
        lines = []
        if widened := next((t for t in self.tensors.values() if t.unpadded is not None), None):
            lines.append(
                f"padded with zeros: {widened.name} of {widened.unpadded} and its like to "
                f"{widened.shape}; effective bits count the checkpoint's own weights"
            )
        if self.gguf is not None:
            lines.append(f"a GGUF model, read as {self.family.model_type}")
        nextn = [t for t in self.tensors.values() if t.role is Role.NEXTN]
        for what, tensors in (
            ("buffers that the model computes itself", self.computed),
            ("tensors of other parts of the model", self.ignored),
            ("tensors of multi-token prediction", nextn),
        ):
            if tensors and tensors[0].file:  # planned ones lie in no file
                nbytes = sum(
                    t.total_bytes if isinstance(t, TensorInfo) else t.nbytes for t in tensors
                )
                lines.append(
                    f"left out: {len(tensors)} {what}, {nbytes:,} bytes, e.g. {tensors[0].name}"
                )
        method = quantization_method(self.config)
        if method and all(t.dtype in FLOATS for t in self.tensors.values()) and self._is_read:
            lines.append(
                f"left out: config.json says quant_method {method!r}, but no tensor is quantized"
            )
        return tuple(lines)

    @property
    def _is_read(self) -> bool:
        """Whether it has files."""
        return any(t.file for t in self.tensors.values())

    @cached_property
    def dimensions(self) -> Dimensions:
        """Sizes of the model, as its `config.json` has them."""
        return self.family.dimensions(self.config)

    @cached_property
    def router(self) -> Router:
        """How a token's experts are chosen."""
        return self.family.router(self.config)

    @cached_property
    def facts(self) -> ModelFacts:
        """What the description of the model in a runtime's file is made from."""
        vocabulary = self.of_role(Role.EMBEDDING)[0].shape[0]
        return self.family.facts(self.config, vocabulary=vocabulary, moe_layers=self.moe_layers)

    @cached_property
    def n_layers(self) -> int:
        """Decoder layers, the multi-token-prediction ones not counted."""
        return self.family.n_layers(self.config)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that route."""
        routers = (t.layer for t in self.tensors.values() if t.role is Role.ROUTER)
        return tuple(sorted(layer for layer in routers if layer is not None))

    @cached_property
    def n_experts(self) -> int:
        """Routed experts per MoE layer."""
        return self.family.n_experts(self.config)

    @cached_property
    def experts_used(self) -> int:
        """Routed experts that a token passes through."""
        return self.family.experts_used(self.config)

    @cached_property
    def expert_groups(self) -> int:
        """Groups that the router first chooses among; 1 where it has none."""
        return self.router.groups

    def least_experts(self, used: int) -> int:
        """Returns the fewest experts per layer from which the router can choose `used`."""
        return self.router.least_experts(used)

    @cached_property
    def tied_embeddings(self) -> bool:
        """Whether the head is the embedding."""
        return not any(t.role is Role.HEAD for t in self.tensors.values())

    @cached_property
    def n_searched_weights(self) -> int:
        """Weights of all matrices whose format is searched; effective bits count over these."""
        encoded = (t.as_stored for t in self.tensors.values() if t.role.is_encoded)
        return sum(prod(tensor.shape) for tensor in encoded)

    @cached_property
    def scale_block(self) -> tuple[int, int]:
        """Rows and columns of an FP8 matrix that share one factor; needs a checkpoint with FP8."""
        return weight_block(self.config)

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
        """Returns the sha256 of dtype, shape and bytes of a tensor, and of its scale, if any."""
        info = self.tensors[name]
        if info.unpadded is not None:
            inside = self._stored_digest(info.as_stored)
            return hashlib.sha256(f"{inside} in {info.shape}\n".encode()).hexdigest()
        return self._stored_digest(info)

    def _stored_digest(self, info: TensorInfo) -> str:
        if self.digests is None:
            return self.compute_digest(info)
        if info.made is not None:
            stored = list(info.made.stored)
        else:
            stored = [info] if info.scale is None else [info, info.scale]
        part = " ".join(f"{s.name} {s.dtype} {s.shape} at {s.offset}" for s in stored)
        if info.dtype == FP8:
            part += f" in blocks of {self.scale_block}"
        if info.made is not None:
            part += f" as {info.name} {info.shape}"
        files = {self.folder / s.file: self.files[s.file] for s in stored}
        return self.digests.of(files, part, lambda: self.compute_digest(info))

    def compute_digest(self, info: TensorInfo) -> str:
        """Reads a tensor, and its scale, for the digest that `tensor_digest` remembers."""
        digest = hashlib.sha256(f"{info.dtype} {info.shape}\n".encode())
        for chunk in self._chunks(info):
            digest.update(chunk)
        if (scale := info.scale) is not None:
            block = self.scale_block if info.dtype == FP8 else (1, MXFP4_BLOCK)
            digest.update(f"{scale.dtype} {scale.shape} {block}\n".encode())
            for chunk in self._chunks(scale):
                digest.update(chunk)
        return digest.hexdigest()

    def read_raw(self, info: Stored) -> npt.NDArray[np.uint8]:
        """Reads the bytes of one tensor in the order of its rows, `(nbytes,)`.

        Raises:
            CheckpointError: if the file ends before it, or changed since its header was read.
        """
        if isinstance(info, TensorInfo) and info.made is not None:
            assert info.made.has_raw, info.name
            unit = f"u{DTYPE_BYTES[info.dtype]}"
            pieces = [self.read_raw(s).view(unit).reshape(s.shape) for s in info.made.stored]
            return np.ascontiguousarray(info.made.make(pieces)).reshape(-1).view(np.uint8)
        part = info.part
        nbytes = info.nbytes if part is None else prod(part.shape) * _PLACE_BYTES[info.dtype]
        with self.reading(info.file) as file:
            data = np.fromfile(file, np.uint8, count=nbytes, offset=info.offset)
        if data.size != nbytes:
            raise CheckpointError(f"{info.file}: ends inside {info.name}; fetch the file again")
        if part is None:
            return data
        whole = data.view(f"V{_PLACE_BYTES[info.dtype]}").reshape(part.shape)
        return part.of(whole).reshape(-1).view(np.uint8)

    def _chunks(self, stored: Stored) -> Iterator[bytes | memoryview]:
        made = stored.made if isinstance(stored, TensorInfo) else None
        if stored.part is not None or (made is not None and made.has_raw):
            yield self.read_raw(stored).data
            return
        if made is not None:
            for place in made.stored:
                yield f"{place.dtype} {place.shape}\n".encode()
                yield from self._chunks(place)
            return
        with self.reading(stored.file) as file:
            file.seek(stored.offset)
            n_left = stored.nbytes
            while n_left:
                chunk = file.read(min(n_left, 1 << 24))
                if not chunk:
                    raise CheckpointError(
                        f"{stored.file}: ends inside {stored.name}; fetch the file again"
                    )
                yield chunk
                n_left -= len(chunk)

    @contextmanager
    def reading(self, file: str) -> Iterator[BinaryIO]:
        """Opens a file for the block, if it is the file that was opened first.

        The handle is checked, not the name: a replacement may be put in place and taken away
        again between two checks.

        Raises:
            CheckpointError: if another file is there, or this one changed, when the block begins
                or ends.
        """
        try:
            handle = open(self.folder / file, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder / file}: {_CHANGED}") from None
        with handle:
            self._check(file, os.fstat(handle.fileno()))
            yield handle
            self._check(file, os.fstat(handle.fileno()))

    def check_unchanged(self) -> None:
        """Checks that the checkpoint's files are those that were opened.

        Raises:
            CheckpointError: if `config.json` or a file with weights is another one by now.
        """
        for file in self.files:
            try:
                self._check(file, (self.folder / file).stat())
            except FileNotFoundError:
                raise CheckpointError(f"{self.folder / file}: {_CHANGED}") from None

    def _check(self, file: str, stat: os.stat_result) -> None:
        if Identity.of(stat) != self.files[file]:
            raise CheckpointError(f"{self.folder / file}: {_CHANGED}")

    def of_role(self, role: Role, layer: int | None = None) -> list[TensorInfo]:
        """Returns the tensors of a role, outside of the layers or of one, in expert order."""
        return self._by_role.get((role, layer), [])

    @cached_property
    def _by_role(self) -> dict[tuple[Role, int | None], list[TensorInfo]]:
        by_role: dict[tuple[Role, int | None], list[TensorInfo]] = {}
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.expert or 0, t.name)):
            by_role.setdefault((tensor.role, tensor.layer), []).append(tensor)
        return by_role


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


def _files(path: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """Safetensors files and, if sharded, the index: tensor name to file."""
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
    files, weight_map = _files(path)
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


def _check_experts(inventory: Inventory) -> None:
    if not inventory.moe_layers:
        raise CheckpointError(
            f"{inventory.path}: no router; needed a Mixture-of-Experts checkpoint"
        )
    n = inventory.n_experts
    for layer in inventory.moe_layers:
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            if role not in inventory.family.roles:  # e.g. experts without gate
                continue
            matrices = inventory.of_role(role, layer)
            whole = len(matrices) == n and all(t.expert == i for i, t in enumerate(matrices))
            if not whole or len({t.shape for t in matrices}) != 1:
                raise CheckpointError(
                    f"{inventory.path}: layer {layer} has {len(matrices)} {role} tensors, "
                    f"needed experts 0..{n - 1} of one shape as config.json says"
                )

        for role in (role for role in Role if role.is_router):
            for tensor in inventory.of_role(role, layer):
                if tensor.shape[0] != n:
                    raise CheckpointError(
                        f"{inventory.path}: {tensor.name} has shape {tensor.shape}, "
                        f"needed {n} rows as config.json says"
                    )


def _check_layer(inventory: Inventory, layer: int, parts: frozenset[str]) -> None:
    if parts not in inventory.family.layers:
        nearest = min(inventory.family.layers, key=lambda whole: len(whole ^ parts))
        lacks, odd = sorted(nearest - parts), sorted(parts - nearest)
        raise CheckpointError(
            f"{inventory.path}: layer {layer} lacks {', '.join(lacks) or 'nothing'}"
            f"{' and has ' + ', '.join(odd) if odd else ''}; the checkpoint is not whole"
        )


def _check_outside(inventory: Inventory, names: frozenset[str]) -> None:
    """The tensors outside of the layers are there."""
    tied = inventory.family.tied(inventory.family.text_config(inventory.config))
    for rule in inventory.family.rules:
        may_lack = rule.has_layer or (rule.role is Role.HEAD and tied)
        if not may_lack and rule.part not in names:
            raise CheckpointError(
                f"{inventory.path}: {rule.pattern} is missing; the checkpoint is not whole"
            )


def check_whole(inventory: Inventory, parts: Mapping[int | None, set[str]]) -> None:
    """Checks that a checkpoint lacks no tensor.

    Args:
        inventory: the checkpoint.
        parts: what its tensors are called within their layers, by layer.

    Raises:
        CheckpointError: if it does.
    """
    _check_outside(inventory, frozenset(parts.get(None, ())))
    for layer in range(inventory.n_layers):
        _check_layer(inventory, layer, frozenset(parts.get(layer, ())))
    _check_experts(inventory)


def read_inventory(path: str | Path, *, digests: Path | None = None) -> Inventory:
    """Reads headers and `config.json` of the checkpoint in `path`; no weights.

    Args:
        path: of the checkpoint: a directory, or the file of a GGUF model.
        digests: a folder in which digests of tensors are remembered between processes.

    Raises:
        CheckpointError: if it is missing, truncated, damaged, or of an unknown architecture.
    """
    from allocator.checkpoint.gguf.model import (
        gguf_files,
        read_gguf_inventory,
    )  # which imports this

    path = Path(path)
    if files := gguf_files(path):
        return read_gguf_inventory(files, digests=digests)
    if not (path / "config.json").is_file():
        raise CheckpointError(no_directory(path))
    opened = {"config.json": Identity.of((path / "config.json").stat())}
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}/config.json: needed an object")
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
