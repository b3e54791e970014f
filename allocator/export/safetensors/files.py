"""Our safetensors files: written tensor by tensor, read back, and the config.json beside them.

In: a source of tensors, or a file. Out: a file that any safetensors reader opens; its tensors.
Invariant: the file's size is the allocation's.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.tokenizer import carried_files, read_tokenizer
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError, VerifyError
from allocator.export.stored import StoredTensor
from allocator.export.tensors import TensorSource
from allocator.families.config import with_encoding
from allocator.targets import Layout
from allocator.targets.safetensors import entries, header

FILE_NAME = "encoded.safetensors"
"""Not `model.safetensors`: stock transformers skips an unknown quantization method with a warning,
and would then run on random weights; without that file it refuses the directory."""
QUANT_METHOD = "moe-allocator"
_ENCODED = "U8"


def write_safetensors(path: Path, source: TensorSource) -> None:
    """Writes the file; one tensor in memory at a time."""
    layout, allocation = source.layout, source.allocation
    rows = entries(layout, retained=allocation.retained_experts, formats=allocation.format_of)
    with open(path, "wb") as file:
        file.write(header(rows))
        for name in layout.groups:
            for part in range(len(allocation.parts(layout, name))):
                file.write(np.ascontiguousarray(source.encoded(name, part)).data)
        for tensor in layout.full_precision:
            file.write(source.full_precision_raw(tensor).data)
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


def write_config(place: Path, layout: Layout, allocation: Allocation) -> None:
    """Writes config.json with the allocation, and copies what a runtime needs beside it."""
    inventory = layout.inventory
    described = {"quant_method": QUANT_METHOD, "allocation": allocation.to_json()}
    config = with_encoding(inventory.config, described)
    (place / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in carried_files(inventory.path):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(inventory.path / name, place / name)
    if (made := _converted_tokenizer(inventory)) is not None:
        (place / "tokenizer.json").write_text(made, encoding="utf-8")


def _converted_tokenizer(inventory: Inventory) -> str | None:
    """The tokenizer.json that the checkpoint lacks, if its other files can be converted."""
    try:
        tokenizer = read_tokenizer(inventory)
    except CheckpointError:  # then the checkpoint's own files are all there is
        return None
    return None if tokenizer is None or not tokenizer.converted else tokenizer.text
