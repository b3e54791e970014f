"""How the offspring of a generation are narrowed down before the full search split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from allocator.errors import StudyError


@dataclass(frozen=True)
class Selection:
    """How the offspring of a generation are narrowed down before the full search split.

    Attributes:
        n_offspring: trials of a generation.
        steps: `(documents, survivors)`: after `documents` documents, the best `survivors` are
            scored further; the documents ascend, the survivors do not.
    """

    n_offspring: int
    steps: tuple[tuple[int, int], ...]

    @classmethod
    def over(cls, n_documents: int) -> "Selection":
        """Returns the default: 16 on an eighth of the split, 4 on three eighths, 1 on all of it."""
        wanted = ((n_documents // 8, 4), (3 * n_documents // 8, 1))
        steps = {max(d, 1): survivors for d, survivors in wanted if max(d, 1) < n_documents}
        return cls(16, tuple(steps.items()))

    def check(self, n_documents: int) -> None:
        """Raises:
        StudyError: if this is no narrowing down to a split of `n_documents`.
        """
        documents = [0, *(d for d, _ in self.steps), n_documents]
        survivors = [self.n_offspring, *(s for _, s in self.steps), 1]
        if not _ascend(documents, least=1) or not _ascend(survivors[::-1], least=0):
            raise StudyError(
                f"selection of {self.n_offspring} offspring in steps {self.steps}: needed "
                f"documents that ascend below {n_documents}, survivors that do not ascend"
            )

    def tokens(self, tokens_before: Callable[[int], int], n_documents: int) -> int:
        """Returns the most forward tokens that a generation takes.

        Args:
            tokens_before: tokens of the first documents, by their number.
            n_documents: of the full search split.
        """
        ends = [0, *(d for d, _ in self.steps), n_documents]
        survivors = [self.n_offspring, *(s for _, s in self.steps)]
        spans = (b - a for a, b in pairwise(map(tokens_before, ends)))
        return sum(n * s for n, s in zip(spans, survivors, strict=True))


def _ascend(values: Sequence[int], *, least: int) -> bool:
    return all(b - a >= least for a, b in pairwise(values))
