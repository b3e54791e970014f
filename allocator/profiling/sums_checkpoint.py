"""A checkpoint of sums over batches; a pass that was stopped continues after the batch it reached.

In: all sums after a batch, by name. Out: the same tensors, bit for bit, in another process.
Invariants: saving takes a twentieth of the time at most; a file that is missing or damaged, or for
which memory or disk lack room, costs the batches and nothing else.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

import torch
from safetensors import SafetensorError

from allocator.errors import first_line
from allocator.files.checksums import load_arrays, save_arrays
from allocator.files.machine import free_disk, free_memory
from allocator.files.progress import waiting

Sums = dict[str, torch.Tensor]
"""Tensors by name, `(...,)` each."""
LEAST_SECONDS = 10.0
"""Between two saves."""
_SHARE = 20
_BYTES_PER_SECOND = 200e6  # of the first save, whose time is not known yet
_ROOM = 2.5  # files are put together in memory before they are written

_log = logging.getLogger(__name__)


@dataclass
class SumsCheckpoint:
    """The file of one pass.

    Attributes:
        path: of the file, in an existing folder.
        of: what the sums belong to, beyond the name of the file.
    """

    path: Path
    of: str = ""
    _saved: float = field(default_factory=lambda: time.monotonic())
    _cost: float | None = None

    def load(self, device: torch.device) -> Sums | None:
        """Reads the sums; returns None if there are none, or the file is damaged.

        Args:
            device: torch's, where they are wanted.
        """
        arrays = load_arrays(self.path, self.of)
        if arrays is None:
            return None
        # copies, whose memory is aligned as torch's own: else matrix products may round otherwise
        return {name: torch.tensor(array, device=device) for name, array in arrays.items()}

    def save_if_due(self, sums: Callable[[], Sums]) -> None:
        """Writes the sums, whole or not at all, if the last save is long enough ago.

        Args:
            sums: returns them; no other thread may add to them meanwhile.
        """
        began = time.monotonic()
        since = began - self._saved
        if since < max(LEAST_SECONDS, _SHARE * (self._cost or 0)):
            return
        state = sums()
        nbytes = sum(x.nbytes for x in state.values())
        if self._cost is None and since < _SHARE * nbytes / _BYTES_PER_SECOND:
            return
        if min(free_disk(self.path), free_memory()) > _ROOM * nbytes:
            try:
                with waiting("saving sums of gradients"):
                    arrays = {name: x.detach().cpu().numpy() for name, x in state.items()}
                    save_arrays(self.path, arrays, self.of)
            except (OSError, SafetensorError) as error:
                _log.warning(
                    "%s: not written (%s); a stop costs more", self.path, first_line(error)
                )
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def remove(self) -> None:
        """Removes the file, if there is one, and what was left of a save that was killed."""
        for path in (self.path, *self.path.parent.glob(f"{escape(self.path.name)}.*.part")):
            path.unlink(missing_ok=True)
