"""Bytes and durations as people write them, and checks of plain numbers."""

import math
import re
from fractions import Fraction
from operator import index
from typing import SupportsIndex

from allocator.errors import AllocatorError

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SECONDS = {"": 1, "S": 1, "SEC": 1, "MIN": 60, "H": 3600}


_MOST_CHARACTERS = 64


def _parse(text: str, units: dict[str, int], what: str, example: str) -> int:
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units or len(text) > _MOST_CHARACTERS:
        shown = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
        raise AllocatorError(f"{shown!r}: needed a {what} such as {example}")
    return round(Fraction(match[1].replace("_", "")) * units[match[2].upper()])


def parse_bytes(text: str | int) -> int:
    """Parses a size: `12MiB`, `1.5GB` or a plain integer, to bytes.

    Raises:
        AllocatorError: if the text is no size.
    """
    if isinstance(text, int):
        return text
    return _parse(text, _BYTES, "size", "12MiB, 1.5GB or 8234496")


def parse_seconds(text: str) -> int:
    """Parses a duration, `30min`, `2h` or `90s`, to seconds.

    Raises:
        AllocatorError: if the text is no duration.
    """
    return _parse(text, _SECONDS, "duration", "30min, 2h or 90s")


def check_whole(what: str, value: object, least: int, most: int) -> None:
    """Raises:
    AllocatorError: if the value is no whole number from `least` to `most`.
    """
    number = None if isinstance(value, bool) or not isinstance(value, SupportsIndex) else value
    if number is None or not least <= index(number) <= most:
        raise AllocatorError(f"{what} {value!r}: needed a whole number from {least} to {most:,}")


def check_duration(what: str, value: object, *, least: float = 0.0) -> None:
    """Raises:
    AllocatorError: if the value is no finite number of seconds, `least` or more.
    """
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < least:
        raise AllocatorError(f"{what} {value!r}: needed a number of seconds, {least:g} or more")


def show_bytes(nbytes: int) -> str:
    """Formats a size for reading, exact count first: `8,234,496 B (7.85 MiB)`."""
    short = show_size(nbytes)
    return short if short.endswith(" B") else f"{nbytes:,} B ({short})"


def show_size(nbytes: int) -> str:
    """Formats a size in three or more digits: `7.85 MiB`."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{nbytes:,} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def least_size(nbytes: int) -> str:
    """Formats a size as `parse_bytes` reads it, rounded up to hundredths of a unit: `7.86MiB`."""
    for unit in ("GIB", "MIB", "KIB"):
        if nbytes >= _BYTES[unit]:
            whole, hundredths = divmod(-(-nbytes * 100 // _BYTES[unit]), 100)
            return f"{whole}.{hundredths:02}{unit.replace('I', 'i')}"
    return f"{nbytes}B"


def show_seconds(seconds: float) -> str:
    """Formats a duration in two units at most: `1 h 30 min`, `4 min`, `12 s`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
