"""Re-opens a written checkpoint in its runtime and holds it against its allocation.

In: a directory written by `materialize`, the source that its tensors should come from, and a
scorer. Out: a `Verification`.
Invariant: every check compares the file with something else: the digests in the manifest, those of
the bytes that the codecs encoded from the source, a second implementation's decoding, the
runtime itself. No byte of a cache stands for an encoding: what is cached is held against its
digests first, and encoded again where it differs; a source that encodes anew does so without the
cache.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from msgspec import UnsetType

from allocator.checkpoint.safetensors import read_json
from allocator.codecs import Bytes, codec_of
from allocator.decision.allocation import Allocation
from allocator.decision.pricing import FileBytes
from allocator.errors import VerifyError
from allocator.export.base import Exact, Runtime, check_tolerance
from allocator.export.card import CARD
from allocator.export.manifest import ALLOCATION, MANIFEST, Manifest, file_digest, files_in
from allocator.export.runtimes import runtime_named
from allocator.export.stored import StoredTensor, StoredWeights
from allocator.export.tensors import TensorSource
from allocator.files.progress import stepping
from allocator.formats import Format
from allocator.scoring.scorer import mean
from allocator.scoring.streamed_scorer import AnyScorer
from allocator.targets.layout import part_names

LOSS_TOLERANCE = 1e-5
"""Difference of proxy losses that torch computes of equal weights, nats per token."""


@dataclass(frozen=True)
class Verification:
    """What was equal, and how far the runtime's outputs are off.

    Attributes:
        folder: the checkpoint.
        runtime: that ran it, of the target that names its container.
        file_bytes: size of the file, as predicted.
        tensor_bytes: of its tensors, as predicted.
        n_tensors: compared byte by byte and decoded by a second implementation.
        loss: proxy loss of the candidate in torch, on the scorer's documents.
        runtime_loss: proxy loss of the re-opened checkpoint in its runtime.
        divergence: how far the runtime is off, nats per token; see `Runtime.divergence_name`.
        exact: the comparison without rounding, where `divergence` is beyond what is usual.
    """

    folder: Path
    runtime: Runtime
    file_bytes: int
    tensor_bytes: int
    n_tensors: int
    loss: float
    runtime_loss: float
    divergence: float
    exact: Exact | None = None

    @property
    def container(self) -> str:
        """Name of the runtime's target."""
        return self.runtime.name


def verify(
    folder: Path,
    open_source: Callable[[Allocation], TensorSource],
    scorer: AnyScorer,
    *,
    tolerance: float | None = None,
    progress: bool = False,
) -> Verification:
    """Checks a written checkpoint.

    Args:
        folder: the directory.
        open_source: returns the tensors that a file of an allocation should have, e.g.
            `partial(EncodedTensors, encodings)`: of the checkpoint that the file was made from,
            with the same importance.
        scorer: documents to score in torch and in the runtime.
        tolerance: how far the runtime may be off, nats per token; its own by default. It is for
            rounding alone: a file that its runtime computes otherwise is refused.
        progress: shows a bar while a slow runtime runs.

    Raises:
        VerifyError: at the first thing that is not as it should be.
    """
    check_tolerance(tolerance)
    manifest = Manifest.read(folder)
    _check_digests(folder, manifest)
    allocation = Allocation.from_json(read_json(folder / ALLOCATION))
    source = open_source(allocation)
    _check_origin(folder, manifest, source)
    runtime, file = runtime_named(manifest.container), folder / manifest.file
    if not isinstance(manifest.shard_bytes, UnsetType):
        runtime = runtime.in_shards(source.layout, allocation, manifest.shard_bytes)
        if missing := set(runtime.weights_names(source)) - set(manifest.sha256):
            raise VerifyError(f"{folder / min(missing)}: not in the manifest; materialize it again")
    size = allocation.nbytes(source.layout, runtime.target)
    _check_sizes(folder, manifest, size)
    tensors = runtime.read(file, source.layout)
    nbytes = sum(tensor.data.nbytes for tensor in tensors.values())
    names = runtime.weights_names(source) if runtime.index_name == manifest.file else [file.name]
    file_bytes = sum((folder / name).stat().st_size for name in names)
    if (nbytes, file_bytes) != (size.tensors, size.file):
        raise VerifyError(
            f"{folder}: {nbytes} tensor bytes in a file of {file_bytes}, "
            f"predicted {size.tensors} in {size.file}"
        )
    check_weights(folder, runtime, source, tensors)
    loss = mean(scorer.score(source.candidate).kl, scorer.documents)
    compared = runtime.compare(
        file,
        StoredWeights(source.layout, allocation, tensors, manifest.sha256[manifest.file]),
        scorer,
        loss=loss,
        tolerance=runtime.tolerance if tolerance is None else tolerance,
        progress=progress,
    )
    return Verification(
        folder,
        runtime,
        size.file,
        size.tensors,
        len(tensors),
        loss,
        compared.loss,
        compared.divergence,
        compared.exact,
    )


def _check_digests(folder: Path, manifest: Manifest) -> None:
    if unknown := {*files_in(folder)} - {*manifest.sha256, MANIFEST, CARD}:
        raise VerifyError(
            f"{folder / min(unknown)}: not in the manifest; move it away, or materialize it again"
        )
    for name, digest in manifest.sha256.items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            raise VerifyError(
                f"{path}: missing or changed since it was written; materialize it again"
            )


def _check_origin(folder: Path, manifest: Manifest, source: TensorSource) -> None:
    """Raises:
    VerifyError: if the directory is of another checkpoint, allocation, or weights.
    """
    checkpoint = source.layout.inventory.digest
    if manifest.checkpoint != checkpoint:
        raise VerifyError(
            f"{folder}: made from checkpoint {manifest.checkpoint[:12]}, this one is "
            f"{checkpoint[:12]}; verify against its own source"
        )
    source.allocation.check(source.layout)
    if source.allocation.digest != manifest.allocation:
        raise VerifyError(
            f"{folder}: allocation.json is {source.allocation.digest[:12]}, the manifest says "
            f"{manifest.allocation[:12]}; materialize it again"
        )
    if source.digest != manifest.weights_digest:
        raise VerifyError(
            f"{folder}: made of {_weights(manifest.weights_digest)}, held against "
            f"{_weights(source.digest)}; verify against what it was made of"
        )


def _weights(digest: str) -> str:
    return f"weights {digest[:12]}" if digest else "weights as its codecs encode them"


def _check_sizes(folder: Path, manifest: Manifest, size: FileBytes) -> None:
    file, tensors, overhead = manifest.file_bytes, manifest.tensor_bytes, manifest.overhead_bytes
    if (file, tensors, overhead) != (size.file, size.tensors, size.overhead):
        raise VerifyError(
            f"{folder}: the manifest says {file} bytes = {tensors} of tensors + {overhead}, the "
            f"allocation takes {size.file} = {size.tensors} + {size.overhead}; materialize it again"
        )


def check_weights(
    folder: Path, runtime: Runtime, source: TensorSource, tensors: Mapping[str, StoredTensor]
) -> None:
    """Holds every tensor of a file against its source, and our decoding against a second one.

    Args:
        folder: for messages.
        runtime: that read the file.
        source: what the file should hold.
        tensors: of the file, see `Runtime.read`.

    Raises:
        VerifyError: if a tensor is missing, unknown, or other than the source's.
    """
    layout = source.layout
    parts = {group: source.allocation.parts(layout, group) for group in layout.groups}
    names = {group: part_names(group, stored) for group, stored in parts.items()}
    expected = {*chain.from_iterable(names.values()), *(t.source for t in layout.full_precision)}
    if set(tensors) != expected:
        name = min(set(tensors) ^ expected)
        raise VerifyError(f"{folder}: tensor {name} is not in both file and allocation")
    for group, stored in stepping(parts.items(), "comparing weights", unit="matrices"):
        for part, (name, (fmt, _)) in enumerate(zip(names[group], stored, strict=True)):
            tensor = tensors[name]
            if tensor.format not in (None, fmt.name):
                raise VerifyError(
                    f"{folder}: {name} is stored as {tensor.format}, allocated {fmt.name}"
                )
            if not source.matches(group, part, tensor.data):
                raise VerifyError(
                    f"{folder}: {name} holds other bytes than its {fmt.name} encoding"
                )
            shape = source.shape(group, part)
            _check_decoding(f"{folder}: {name}", fmt, tensor.data.reshape(shape)[..., :1, :])
    for unencoded in layout.full_precision:
        expected_bytes = runtime.full_precision_bytes(source, unencoded).tobytes()
        if tensors[unencoded.source].data.tobytes() != expected_bytes:
            raise VerifyError(f"{folder}: {unencoded.source} holds other bytes than its source")


def _check_decoding(where: str, fmt: Format, encoded: Bytes) -> None:
    """Holds a codec's decoding of some rows against a second implementation's, if there is one."""
    codec, rows = codec_of(fmt), np.ascontiguousarray(encoded).reshape(-1, encoded.shape[-1])
    second = codec.second_opinion(rows, fmt)
    if second is not None and not np.array_equal(second, codec.decode(rows, fmt)):
        raise VerifyError(
            f"{where} decodes differently in a second implementation; update the wheels"
        )
