"""Our safetensors files: written tensor by tensor, and read back.

In: a source of tensors, or a file. Out: a file that any safetensors reader opens; its tensors.
Invariant: the file's size is the allocation's.
"""

import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from allocator.errors import VerifyError
from allocator.export.stored import StoredTensor
from allocator.export.tensors import TensorSource
from allocator.files.progress import BYTES, step
from allocator.targets import target_named
from allocator.targets.safetensors import entries, header

_ENCODED = "U8"


def write_safetensors(path: Path, source: TensorSource) -> None:
    """Writes the file; one tensor in memory at a time."""
    layout, allocation = source.layout, source.allocation
    rows = entries(layout, retained=allocation.retained_experts, formats=allocation.format_of)
    total = allocation.nbytes(layout, target_named("safetensors")).tensors
    with open(path, "wb") as file, step("writing", total, unit=BYTES) as shown:
        file.write(header(rows))
        for name in layout.groups:
            for part in range(len(allocation.parts(layout, name))):
                shown.update(file.write(np.ascontiguousarray(source.encoded(name, part)).data))
        for tensor in layout.full_precision:
            shown.update(file.write(source.full_precision_raw(tensor).data))
        file.flush()
        os.fsync(file.fileno())


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Reads every tensor by its name in the file: flat bytes, and the dtype of those not encoded.

    Raises:
        VerifyError: if the file cannot be opened.
    """
    stored = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                dtype = file.get_slice(name).get_dtype()
                data = file.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy()
                stored[name] = StoredTensor(data, None if dtype == _ENCODED else dtype)
    except (OSError, SafetensorError) as error:
        raise VerifyError(
            f"{path.parent}: cannot be opened ({error}); materialize it again"
        ) from None
    return stored
