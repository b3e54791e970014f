"""Proposals of a search whose scoring has not ended.

In: feasible allocations of trials that run. Out: their losses, on a growing prefix of the search
split. Invariant: contenders that are scored together have seen the same documents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import Trial

from allocator.decision.allocation import Allocation
from allocator.decision.parameters import Params
from allocator.decision.pricing import FileBytes
from allocator.study.protocols import TrialScorer


@dataclass(eq=False)
class Contender:
    """A proposal while it is scored.

    Attributes:
        trial: that proposes.
        is_queued: whether the trial was enqueued rather than sampled.
        kind: which first trial this is, or `proposal`; None for a first trial that another worker
            makes, too.
        params: complete and feasible.
        allocation: of `params`.
        size: the file's bytes, itemised.
        used: bytes as the budget counts them.
        losses: from document 0 on; None before the first.
    """

    trial: Trial
    is_queued: bool
    kind: str | None
    params: Params
    allocation: Allocation
    size: FileBytes
    used: int
    losses: Any = None

    @property
    def is_finite(self) -> bool:
        """Whether every loss so far is a number."""
        return bool(np.isfinite(self.losses.kl).all())


class ContenderScorer:
    """Scores contenders; an allocation that was scored on the same documents is looked up.

    Args:
        scorer: measures allocations; equal allocations have equal losses.
    """

    def __init__(self, scorer: TrialScorer) -> None:
        self._scorer = scorer
        self._known: dict[tuple[str, int, int], Any] = {}

    def score(self, contenders: Sequence[Contender], stop: int) -> None:
        """Scores what contenders lack of the first `stop` documents, of each the same."""
        if not contenders:
            return
        start = 0 if contenders[0].losses is None else len(contenders[0].losses.kl)
        new = [c for c in contenders if self._key(c, start, stop) not in self._known]
        for together in _chunks(new, self._scorer.side_by_side):
            more = self._scorer.score_many([c.allocation for c in together], start, stop)
            for contender, losses in zip(together, more, strict=True):
                self._known[self._key(contender, start, stop)] = losses
        for contender in contenders:
            losses, before = self._known[self._key(contender, start, stop)], contender.losses
            contender.losses = losses if before is None else before + losses

    @staticmethod
    def _key(contender: Contender, start: int, stop: int) -> tuple[str, int, int]:
        return contender.allocation.digest, start, stop


def _chunks(contenders: Sequence[Contender], size: int) -> Iterator[Sequence[Contender]]:
    for start in range(0, len(contenders), size):
        yield contenders[start : start + size]
