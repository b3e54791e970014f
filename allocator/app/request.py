"""What a user asks of a search, and the settings that follow for a study folder.

In: the words of a command line or a notebook. Out: frozen values that travel whole, to worker
processes too.
"""

from dataclasses import dataclass, field
from pathlib import Path

from allocator.app.resources import Resources
from allocator.app.study_file import BudgetSpec
from allocator.decision.budget import Budget
from allocator.study.leases import LEASE_SECONDS
from allocator.study.stop_rule import NO_LIMIT, StopRule
from allocator.units import check_duration, check_whole

_MOST_WORKERS = 1024
_LEAST_LEASE_SECONDS = 0.1


@dataclass(frozen=True)
class SearchRequest:
    """A search as it is asked for; what is None or empty here, study.toml says.

    Attributes:
        study: the study's folder.
        budget: the limits in bytes.
        stop: when to stop.
        sampler: name of the sampler.
        seed: of the study.
        storage: a database URL, `grpc://HOST:PORT` or `journal:PATH`; None for a journal in the
            study's folder.
        join: works beside a search that runs on this machine.
        workers: processes that search side by side.
        target: name of the target.
        lease_seconds: a worker that is silent for longer counts as dead; others make its trials.
        resources: what the search may use of the machine.
    """

    study: Path
    budget: BudgetSpec = field(default_factory=BudgetSpec)
    stop: StopRule = NO_LIMIT
    sampler: str | None = None
    seed: int | None = None
    storage: str | None = None
    join: bool = False
    workers: int = 1
    target: str | None = None
    lease_seconds: float = LEASE_SECONDS
    resources: Resources = field(default_factory=Resources)

    def check(self) -> None:
        """Raises:
        AllocatorError: if a limit, the number of workers or the lease is out of its range.
        """
        self.stop.check()
        check_whole("workers", self.workers, 1, _MOST_WORKERS)
        check_duration("lease_seconds", self.lease_seconds, least=_LEAST_LEASE_SECONDS)


@dataclass(frozen=True)
class Launch:
    """A search request with the gaps filled in from study.toml.

    Attributes:
        budget: the hard limit.
        sampler: name of the sampler.
        seed: of the study.
        storage: as of `SearchRequest`.
        stop: when to stop.
    """

    budget: Budget
    sampler: str
    seed: int
    storage: str | None = None
    stop: StopRule = NO_LIMIT
