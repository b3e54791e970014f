"""When a search stops: a number of trials, a time, or a number of forward tokens."""

import math
import time
from dataclasses import dataclass, replace

from allocator.units import check_duration, check_whole

_MOST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class StopRule:
    """Limits of a search, which stops at the first one that it reaches.

    Attributes:
        trials: proposals in the study in total; None for no limit.
        seconds: time from `started`; None for no limit.
        tokens: forward tokens in the study in total, profile included; None for no limit.
        deadline: when `seconds` are over, by this machine's monotonic clock; `started` sets it.
    """

    trials: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    deadline: float | None = None

    def check(self) -> None:
        """Raises:
        AllocatorError: if a limit is no number that a search can reach.
        """
        for name, limit in (("trials", self.trials), ("tokens", self.tokens)):
            if limit is not None:
                check_whole(name, limit, 1, _MOST)
        if self.seconds is not None:
            check_duration("seconds", self.seconds)

    @property
    def is_unlimited(self) -> bool:
        """Whether no limit is set."""
        return self.trials is None and self.seconds is None and self.tokens is None

    def started(self) -> "StopRule":
        """Returns the rule with a deadline; a rule that has one stays as it is."""
        if self.seconds is None or self.deadline is not None:
            return self
        return replace(self, deadline=time.monotonic() + self.seconds)

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= (math.inf if self.deadline is None else self.deadline)


NO_LIMIT = StopRule()
