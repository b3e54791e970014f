"""Seconds of a search, by activity."""

import time

SPENT_ON = ("scoring", "gradient", "sampler", "storage")


class Clock:
    """Adds the time since the last lap to a total.

    Args:
        totals: seconds by name, which laps add to.
    """

    def __init__(self, totals: dict[str, float]) -> None:
        self._totals = totals
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Adds the seconds since the last lap, or since the clock was made, to a total."""
        now = time.perf_counter()
        self._totals[name] += now - self._last
        self._last = now
