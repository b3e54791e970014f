"""The race of a proposal against finished trials.

In: contenders, and the losses of finished trials. Out: those that lost. Invariant: a contender that
did not lose was scored on the full search split, or has a loss that is no number.

A candidate is scored on a growing prefix of the search split. After each rung it is compared,
document by document, with every finished trial of at most its bytes (and a slack): where the mean
difference is above `z` standard errors, it has lost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from allocator.study.contenders import Contender

RACE_Z = 1.0
"""Near-ties are worth little: against 2.0, on 18 journals of the benchmark, an eighth fewer tokens
are scored (auto: 18 %), and the least search loss is .06 % higher, at most .9 %."""
RACE_SLACK = 1e-3
"""Rivals may be larger by this share: a thousandth of the bytes is worth well under a percent of
the loss, and proposals at one cap rarely have the same size to the byte."""

Rival = tuple[float, npt.NDArray[np.float64]]
"""Bytes of a finished trial, and its losses `(documents,)`."""


@dataclass(frozen=True)
class Race:
    """When a proposal is stopped.

    Attributes:
        rungs: documents after which a contender may lose, in any order.
        z: standard errors that the mean difference must exceed.
        slack: share of bytes that a rival may be larger by.
    """

    rungs: tuple[int, ...] = ()
    z: float = RACE_Z
    slack: float = RACE_SLACK

    def run(
        self,
        contenders: Sequence[Contender],
        rivals: Sequence[Rival],
        score: Callable[[Sequence[Contender], int], None],
        *,
        n_documents: int,
    ) -> list[Contender]:
        """Scores contenders rung by rung; returns those that lost.

        Args:
            contenders: not scored yet; they do not race each other.
            rivals: finished trials.
            score: scores contenders on all documents before one.
            n_documents: of the full search split.
        """
        racing, lost = list(contenders), []
        for stop in sorted({*(r for r in self.rungs if r < n_documents), n_documents}):
            score(racing, stop)
            racing = [c for c in racing if c.is_finite]
            if stop < n_documents:
                lost += [c for c in racing if self._has_lost(c, rivals, stop)]
                racing = [c for c in racing if c not in lost]
        return lost

    def _has_lost(self, contender: Contender, rivals: Sequence[Rival], stop: int) -> bool:
        most = contender.used * (1 + self.slack)
        kl = contender.losses.kl
        return any(n <= most and loses(kl, losses[:stop], z=self.z) for n, losses in rivals)


def loses(losses: npt.ArrayLike, rival: npt.ArrayLike, *, z: float = RACE_Z) -> bool:
    """Returns whether paired losses are worse by more than `z` standard errors.

    Args:
        losses: per document, `(documents,)`.
        rival: of the same documents.
        z: standard errors.
    """
    difference = np.asarray(losses) - np.asarray(rival)
    if len(difference) < 2:
        return False
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return bool(difference.mean() > z * error)
