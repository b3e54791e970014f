"""What a pass over the layers has come to, on disk: one that was killed goes on at its layer.

In: a folder, and the documents of the pass by batch. Out: their values, layer by layer. Invariant:
a file is there whole or not at all, and comes back bit for bit or counts
as none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from allocator.files.checksums import load_arrays, save_arrays
from allocator.scoring.documents import Document

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
        of: what the files belong to, beyond their names.
    """

    folder: Path
    chosen: Sequence[Sequence[Document]]
    width: int
    device: torch.device
    of: str = ""

    def save(self, what: str, layer: int, values: Batches) -> None:
        """Writes values by batch, `(documents, length, width)`: whole, or not at all."""
        flat = torch.cat([batch.flatten(0, 1) for batch in values]).cpu().numpy()
        save_arrays(self._path(what, layer), {what: flat}, self.of)

    def load(self, what: str, layer: int) -> Batches | None:
        """Reads what `save` wrote, by batch; None if the file is missing or damaged."""
        arrays = load_arrays(self._path(what, layer), self.of)
        if arrays is None:
            return None
        flat = torch.from_numpy(arrays[what]).to(self.device)
        shapes = [(len(batch), len(batch[0].ids)) for batch in self.chosen]
        pieces = torch.split(flat, [n * length for n, length in shapes])
        return [p.view(*shape, -1) for p, shape in zip(pieces, shapes, strict=True)]

    def drop(self, what: str, layer: int) -> None:
        """Removes the file."""
        self._path(what, layer).unlink(missing_ok=True)

    def _path(self, what: str, layer: int) -> Path:
        return self.folder / f"{what}-{layer}.safetensors"
