"""A checkpoint, opened.

In: a path. Out: its `Inventory`. Invariant: of a directory with safetensors these are read,
whatever lies beside them.
"""

from pathlib import Path

from allocator.checkpoint.gguf.model import gguf_files, read_gguf_inventory
from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.safetensors import read_safetensors_inventory


def read_inventory(path: str | Path, *, digests: Path | None = None) -> Inventory:
    """Reads headers and `config.json` of a checkpoint; no weights.

    Args:
        path: of the checkpoint: a directory, or the file of a GGUF model.
        digests: a folder in which digests of tensors are remembered between processes.

    Raises:
        CheckpointError: if it is missing, truncated, damaged, or of an unknown architecture.
    """
    path = Path(path)
    if files := gguf_files(path):
        return read_gguf_inventory(files, digests=digests)
    return read_safetensors_inventory(path, digests=digests)
