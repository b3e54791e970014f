"""What this machine has."""

import math
from pathlib import Path


def free_memory() -> float:
    """Returns the bytes of memory that are free; infinite where the machine does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return math.inf
