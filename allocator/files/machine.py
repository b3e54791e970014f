"""What this machine has."""

import math
import os
import shutil
from pathlib import Path


def free_memory() -> float:
    """Returns the bytes of memory that are free; infinite where the machine does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return math.inf


def load_per_core() -> float:
    """Returns the processes that ran or waited in the last minute, per core."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def existing(path: Path) -> Path:
    """Returns a path, absolute, or the nearest folder above it that exists."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def free_disk(path: Path) -> int:
    """Returns the bytes that are free on the disk of a path, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free
