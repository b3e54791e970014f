"""Which importance vectors weights are encoded with: a study's own, or committed ones.

In: the digest of importance vectors, as an allocation record carries it. Out: encoded weights under
these vectors. Invariant: vectors from a file are the ones that the file is named for. Another
processor rounds a calibration pass otherwise, so a record that was made there can be rebuilt only
from the vectors committed beside it.
"""

from collections.abc import Callable
from pathlib import Path

from allocator.checkpoint.tensors import Floats
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation_record import importance_name, read_importance
from allocator.errors import CheckpointError
from allocator.profiling.statistics import importance_digest


class StudyEncodings:
    """Opens encoded weights by the importance vectors behind them.

    Args:
        folder: where the study commits allocations and their importance vectors.
        own: opens the encodings under what the study's calibration gives.
        under: opens the encodings under given vectors.
    """

    def __init__(
        self,
        folder: Path,
        own: Callable[[], Encodings],
        under: Callable[[dict[str, Floats]], Encodings],
    ) -> None:
        self._folder = folder
        self._own = own
        self._under = under

    def path(self, importance: str) -> Path:
        """Returns where the study commits the vectors with this digest."""
        return self._folder / importance_name(importance)

    def of(self, importance: str, *, beside: Path | None = None) -> Encodings:
        """Opens the encodings under the vectors with this digest.

        Args:
            importance: digest of the vectors.
            beside: an allocation file, whose folder may hold the vectors too.

        Raises:
            CheckpointError: if neither a committed file nor the study's calibration gives them.
        """
        path = self.path(importance)
        if beside is not None and not path.is_file():
            path = beside.parent / path.name
        if path.is_file():
            vectors = read_importance(path)
            if importance_digest(vectors) != importance:
                raise CheckpointError(
                    f"{path}: not the importance it is named for; restore the file"
                )
            return self._under(vectors)
        own = self._own()
        if importance_digest(own.importance) != importance:
            raise CheckpointError(
                f"importance {importance[:12]} is neither in {path} nor what this study's "
                "calibration gives here; restore the file"
            )
        return own
