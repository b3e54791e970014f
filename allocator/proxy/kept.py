"""What a pass over the layers has come to, on disk: one that was killed goes on at its layer.

In: a folder, and the documents of the pass by batch. Out: their values, layer by layer. Invariant:
a file is there whole or not at all, and comes back bit for bit.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from allocator.calibration.documents import Document

Batches = list[torch.Tensor]
"""`(documents, length, hidden)` each."""


@dataclass(frozen=True)
class LayerFiles:
    """See the module.

    Attributes:
        folder: an existing one, of this pass alone.
        chosen: documents by batch.
        width: of their states.
        device: torch's, where values are wanted.
    """

    folder: Path
    chosen: Sequence[Sequence[Document]]
    width: int
    device: torch.device

    def has(self, what: str, layer: int) -> bool:
        """Whether these values are there, whole; a damaged file counts as none."""
        path = self._path(what, layer)
        if not path.exists():
            return False
        try:
            shape = np.load(path, mmap_mode="r").shape
        except (ValueError, EOFError):
            return False
        return bool(shape == (sum(len(d.ids) for batch in self.chosen for d in batch), self.width))

    def last(self, what: str, n_layers: int) -> int:
        """The last layer whose values are there; 0 if none are."""
        return max((i for i in range(n_layers + 1) if self.has(what, i)), default=0)

    def save(self, what: str, layer: int, values: Batches) -> None:
        """Whole, or not at all."""
        path = self._path(what, layer)
        part = path.with_name(f"{path.stem}.part.npy")
        with part.open("wb") as file:
            np.save(file, torch.cat([batch.flatten(0, 1) for batch in values]).cpu().numpy())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def load(self, what: str, layer: int) -> Batches:
        """By batch."""
        flat = torch.from_numpy(np.load(self._path(what, layer))).to(self.device)
        shapes = [(len(batch), len(batch[0].ids)) for batch in self.chosen]
        pieces = torch.split(flat, [n * length for n, length in shapes])
        return [p.view(*shape, -1) for p, shape in zip(pieces, shapes, strict=True)]

    def drop(self, what: str, layer: int) -> None:
        """Frees their room."""
        self._path(what, layer).unlink(missing_ok=True)

    def _path(self, what: str, layer: int) -> Path:
        return self.folder / f"{what}-{layer}.npy"
