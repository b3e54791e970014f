"""What a search needs of its scorer and of its sampler.

In: allocations, and an Optuna study. Out: losses per document, and proposals. Invariant: a search
calls nothing of either that is not declared here.
"""

from abc import ABC
from collections.abc import Sequence
from typing import Any, Protocol

from optuna.samplers import BaseSampler
from optuna.study import Study

from allocator.decision.allocation import Allocation
from allocator.study.generations import Selection


class Losses(Protocol):
    """Losses of one allocation per document, in the order of the documents; nats per token."""

    @property
    def kl(self) -> Any:
        """KL(original || candidate), `(documents,)`."""

    def __add__(self, other: Any) -> Any: ...


class TrialScorer(Protocol):
    """Measures allocations on the documents of the search split."""

    @property
    def n_documents(self) -> int:
        """Documents of the full search split."""

    @property
    def side_by_side(self) -> int:
        """Allocations that one pass scores; 1 where they are scored one after the other."""

    def tokens(self, stop: int, /) -> int:
        """Returns the number of tokens of the first `stop` documents."""

    def score_many(
        self, allocations: Sequence[Allocation], start: int, stop: int, /
    ) -> Sequence[Any]:
        """Returns `Losses` on documents `start:stop`, one for each allocation, in their order.

        Args:
            allocations: at most `side_by_side`.
            start: first document.
            stop: the document after the last.
        """

    def summary(self, losses: Any, /) -> dict[str, Any]:
        """Returns means of losses that began at document 0: `loss`, `tokens`, `top1`, ..."""


class StudySampler(BaseSampler, ABC):
    """An Optuna sampler that also says what a search plans and accounts with.

    What is here holds for a sampler that costs no forward tokens and proposes trial by trial.

    Attributes:
        sampling_seconds: what the last proposal took, its gradient step excluded.
        gradient_seconds: what the gradient step before the last proposal took.
    """

    sampling_seconds: float = 0.0
    gradient_seconds: float = 0.0

    def selection(self, n_documents: int) -> Selection | None:
        """Returns how generations are selected on a split of `n_documents`; None without them."""
        return None

    def next_tokens(self, study: Study, n: int) -> int:
        """Returns the most forward tokens that the next `n` proposals themselves take."""
        return 0
