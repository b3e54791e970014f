"""Numbers and names as a report writes them.

In: plain values. Out: short text, escaped where it says so. Invariant: a number that is not finite
is never written.
"""

import math
from html import escape

from allocator.reporting.intervals import Figure


def size(nbytes: int) -> str:
    """Writes bytes with a binary unit and three digits: `7.85 MiB`."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{nbytes} B"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"


def loss(value: float) -> str:
    """Writes nats per token with three or four digits, without a power of ten where it can."""
    if not math.isfinite(value):
        return "no number"
    if value == 0 or abs(value) < 1e-7:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:.{max(2, 3 - math.floor(math.log10(abs(value))))}f}"


def within(figure: Figure, digits: int | None = None) -> str:
    """Writes an interval: `[0.060, 0.071]`, as losses or with a number of digits."""
    ends = (figure.low, figure.high)
    low, high = (loss(v) if digits is None else f"{v:.{digits}f}" for v in ends)
    return f"[{low}, {high}]"


def count(n: int) -> str:
    """Writes a count with commas."""
    return f"{n:,}"


def plural(n: int, noun: str) -> str:
    """Writes a number of things: `1 trial`, `2 trials`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def code(text: str) -> str:
    """Returns HTML of a command, a name or a path."""
    return f"<code>{escape(text)}</code>"


def table(header: list[str], rows: list[list[str]], *, numbers: int | None = None) -> str:
    """Returns an HTML table in a box that scrolls sideways.

    Args:
        header: of the columns, as HTML.
        rows: of cells, as HTML.
        numbers: columns at the end that hold numbers, set to the right; by default all but the
            first.
    """
    n = len(header) - 1 if numbers is None else numbers
    first = len(header) - n

    def cells(values: list[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="n">{v}</{tag}>' if i >= first else f"<{tag}>{v}</{tag}>"
            for i, v in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def bar(share: float, kind: str = "") -> str:
    """Returns an HTML bar that fills a share of its cell."""
    width = max(0.0, min(1.0, share)) * 100
    return f'<span class="bar"><i class="{kind}" style="width:{width:.1f}%"></i></span>'
