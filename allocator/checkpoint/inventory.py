"""Everything a checkpoint holds, whatever its files are.

In: what the headers of files say. Out: an `Inventory` of `TensorInfo`s. Invariant: no weight is
read to make one, so a terabyte takes seconds; every tensor has a role, and the experts of every MoE
layer are complete and of one shape.

A file that changes after its header was read is refused: weights are read through
`Inventory.reading` alone, which checks the file before and after. So everything that is made from
an inventory's weights, a cache entry, a loss or a checkpoint, belongs to `Inventory.digest`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from allocator.checkpoint.gguf.reader import Pair
from allocator.errors import CheckpointError
from allocator.families import (
    Config,
    Dimensions,
    Family,
    ModelFacts,
    Role,
    Router,
)
from allocator.families.config import (
    quantization_method,
    weight_block,
)
from allocator.files.digests import Digests, Identity
from allocator.files.progress import BYTES, step

FP8 = "F8_E4M3"
MXFP4 = "MXFP4"
"""Of experts in blocks of 4-bit floats with an exponent each, as gpt-oss is released."""
MXFP4_BLOCK = 32
"""Values of a row of MXFP4 that share an exponent."""
FLOATS = ("F32", "F16", "BF16")
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, FP8: 1}
_PLACE_BYTES = DTYPE_BYTES | {MXFP4: 1, "U8": 1}
"""Bytes of what a `Part` counts: a value, two values of MXFP4, or their exponent."""
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
        places: names which weights go where; other places have another name, so that what is made
            of the same weights alike is equal.
        columns: of the matrix, as the only stored one has them; None where rows stay whole.
    """

    stored: tuple[Stored, ...]
    make: Callable[[Sequence[npt.NDArray[Any]]], npt.NDArray[Any]] = field(compare=False)
    places: str
    columns: tuple[int, ...] | None = None

    @property
    def has_raw(self) -> bool:
        """Whether the matrix can be made of stored bytes, and not of decoded values alone."""
        dtypes = {place.dtype for place in self.stored}
        return len(dtypes) == 1 and dtypes <= _PLACE_BYTES.keys()


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
        made: names of tensors that are made of the config alone.
        files: as they were when they were opened.
    """

    path: Path
    pairs: Mapping[str, Pair]
    family: Family
    config: Config
    made: frozenset[str]
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

    @property
    def float32_bytes(self) -> int:
        """Bytes of the model in memory: all weights as float32, multi-token prediction left out."""
        tensors = (tensor for tensor in self.tensors.values() if tensor.role != "nextn")
        return 4 * sum(prod(tensor.shape) for tensor in tensors)

    @cached_property
    def n_computed_weights(self) -> int:
        """The same weights with the zeros of padded experts, which take time and memory as well."""
        return sum(prod(t.shape) for t in self.tensors.values() if t.role.is_encoded)

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
        nbytes = sum(info.total_bytes for info in self.tensors.values())
        with step("hashing the checkpoint", nbytes, unit=BYTES, brief=True) as shown:
            for name in sorted(self.tensors):
                total.update(f"{name} {self.tensor_digest(name)}\n".encode())
                shown.update(self.tensors[name].total_bytes)
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
            part += f" as {info.name} {info.shape} {info.made.places}"
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
            unit = f"u{_PLACE_BYTES[info.dtype]}"
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
            yield f"{made.places}\n".encode()
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

        for role in (role for role in Role if role.has_row_per_expert):
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
