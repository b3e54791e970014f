"""Our safetensors files: written tensor by tensor, and read back.

In: a source of tensors, or files. Out: a file, or shards with an index, that any safetensors reader
opens; their tensors. Invariant: the size of all is the allocation's.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from allocator.codecs import Bytes
from allocator.errors import CheckpointError, VerifyError
from allocator.export.safetensors.directory import FILE_NAME, weights_paths
from allocator.export.stored import StoredTensor
from allocator.export.tensors import TensorSource
from allocator.files.progress import BYTES, step
from allocator.targets.safetensors import INDEX_NAME, Entry, Shard, header, index, nbytes

_ENCODED = "U8"


def write_safetensors(
    folder: Path, source: TensorSource, rows: Sequence[Entry], shards: Sequence[Shard]
) -> None:
    """Writes the file, or the shards and their index; one tensor in memory at a time.

    Args:
        folder: where.
        source: the tensors.
        rows: of the one file with all of them.
        shards: that they are cut into; none for one file.
    """
    total, tensors = sum(map(nbytes, rows)), _tensors(source)
    one_file = hashlib.sha256(header(rows))
    with step("writing", total, unit=BYTES) as shown:
        for shard in shards or [Shard(FILE_NAME, tuple(rows))]:
            with open(folder / shard.name, "wb") as file:
                file.write(header(shard.rows))
                for data in islice(tensors, len(shard.rows)):
                    shown.update(file.write(data.data))
                    if shards:
                        one_file.update(data.data)
                file.flush()
                os.fsync(file.fileno())
    if shards:
        (folder / INDEX_NAME).write_bytes(index(shards, one_file.hexdigest()))


def _tensors(source: TensorSource) -> Iterator[Bytes]:
    for name in source.layout.groups:
        for part in range(len(source.allocation.parts(source.layout, name))):
            yield np.ascontiguousarray(source.encoded(name, part))
    for tensor in source.layout.full_precision:
        yield source.full_precision_raw(tensor)


def read_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """Reads every tensor by its name in the file: flat bytes, and the dtype of those not encoded.

    Raises:
        VerifyError: if a file cannot be opened.
    """
    stored = {}
    try:
        for path in weights_paths(folder):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    dtype = file.get_slice(name).get_dtype()
                    data = file.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy()
                    stored[name] = StoredTensor(data, None if dtype == _ENCODED else dtype)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise VerifyError(f"{folder}: cannot be opened ({error}); materialize it again") from None
    return stored
