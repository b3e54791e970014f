"""Per-layer checkpoints of a streamed pass; an interrupted pass resumes at the layer it reached.

In: a folder, and the documents of the pass by batch. Out: their values, layer by layer. Invariant:
a file is read bit for bit as it was written, or counts as missing.
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
class LayerCheckpoints:
    """The files of one pass, see the module.

    Attributes:
        folder: an existing one, of this pass alone.
        documents: of the pass, by batch.
        device: torch's, where values are wanted.
        of: what the files belong to, beyond their names.
    """

    folder: Path
    documents: Sequence[Sequence[Document]]
    device: torch.device
    of: str = ""

    def save(self, what: str, layer: int, values: Batches) -> None:
        """Writes the values before a layer, whole or not at all.

        Args:
            what: names the values, e.g. `states`.
            layer: that they enter.
            values: by batch, `(documents, length, hidden)` each.
        """
        flat = torch.cat([batch.flatten(0, 1) for batch in values]).cpu().numpy()
        save_arrays(self._path(what, layer), {what: flat}, self.of)

    def load(self, what: str, layer: int) -> Batches | None:
        """Reads the values before a layer, `(documents, length, hidden)` by batch.

        Returns:
            None if the file is missing or damaged.
        """
        arrays = load_arrays(self._path(what, layer), self.of)
        if arrays is None:
            return None
        flat = torch.from_numpy(arrays[what]).to(self.device)
        shapes = [(len(batch), len(batch[0].ids)) for batch in self.documents]
        pieces = torch.split(flat, [n * length for n, length in shapes])
        return [p.view(*shape, -1) for p, shape in zip(pieces, shapes, strict=True)]

    def remove(self, what: str, layer: int) -> None:
        """Removes the file of a layer, if there is one."""
        self._path(what, layer).unlink(missing_ok=True)

    def _path(self, what: str, layer: int) -> Path:
        return self.folder / f"{what}-{layer}.safetensors"
