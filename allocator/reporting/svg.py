"""Charts as text: axes, marks and labels of an SVG drawing, coloured by the page's CSS.

In: numbers and names. Out: SVG. Invariant: every name is escaped, every number finite, and the same
input gives the same text.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """Writes a coordinate: one decimal at most."""
    assert math.isfinite(value), value
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Scale:
    """Maps values to coordinates.

    Attributes:
        low: value at the start.
        high: value at the end.
        start: coordinate of `low`.
        end: coordinate of `high`.
        log: whether equal ratios have equal lengths.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls,
        values: Iterable[float],
        start: float,
        end: float,
        *,
        log: bool = False,
        margin: float = 0.06,
        zero: bool = False,
    ) -> "Scale":
        """Returns a scale that holds all values, with a margin on both sides.

        Args:
            values: at least one; positive if `log`.
            start: coordinate of the least one, margin aside.
            end: of the largest.
            log: see `Scale`.
            margin: share of the length.
            zero: begins at 0.
        """
        known = list(values)
        low, high = min(known), max(known)
        if zero:
            return cls(0.0, (high or 1.0) * (1 + margin), start, end)
        if log:
            a, b = math.log(low), math.log(high)
            extra = margin * max(b - a, 0.5)
            return cls(math.exp(a - extra), math.exp(b + extra), start, end, log=True)
        extra = margin * ((high - low) or abs(high) or 1.0)
        return cls(low - extra, high + extra, start, end)

    def __call__(self, value: float) -> float:
        """Returns the coordinate of a value."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values on the scale, three to eight of them."""
        return self._log_ticks() if self.log else _linear_ticks(self.low, self.high)

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            ticks = [d * 10.0**e for e in decades for d in digits]
            ticks = [t for t in ticks if self.low <= t <= self.high]
            if len(ticks) >= 3:
                return ticks
        return _linear_ticks(self.low, self.high)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(s for s in (unit, 2 * unit, 2.5 * unit, 5 * unit, 10 * unit) if s >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Writes the value of a tick in few characters."""
    if value and not 0.00099 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        shown = f"{float(mantissa):g}"
        power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
        return power if shown == "1" else f"{shown}·{power}"
    return f"{value:.6g}"


# -- marks

_STAR = [
    (math.sin(i * math.pi / 5) * r, -math.cos(i * math.pi / 5) * r)
    for i, r in enumerate((1.45, 0.6) * 5)
]
_SHAPES = {
    "diamond": [(0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)],
    "triangle": [(0.0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
    "square": [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
    "star": _STAR,
}


def mark(shape: str, x: float, y: float, kind: str, size: float = 4.0, title: str = "") -> str:
    """Returns a mark.

    Args:
        shape: `circle`, `diamond`, `triangle`, `square` or `star`.
        x: of its centre.
        y: of its centre.
        kind: CSS classes.
        size: half its width.
        title: what it is, shown on hover.
    """
    name = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        at = f'cx="{number(x)}" cy="{number(y)}" r="{number(size)}"'
        return f'<circle class="mark {kind}" {at}>{name}</circle>'
    points = " ".join(
        f"{number(x + dx * size)},{number(y + dy * size)}" for dx, dy in _SHAPES[shape]
    )
    return f'<polygon class="mark {kind}" points="{points}">{name}</polygon>'


def label(text: str, x: float, y: float, *, kind: str = "", anchor: str = "start") -> str:
    """Returns a line of text.

    Args:
        text: not escaped yet.
        x: of its anchor.
        y: of its base line.
        kind: CSS classes.
        anchor: `start`, `middle` or `end`.
    """
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{number(x)}" y="{number(y)}"{where}>{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Returns a straight line between two points."""
    at = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line class="{kind}" {at}/>'


def rectangle(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    """Returns a filled rectangle; `title` is shown on hover."""
    name = f"<title>{escape(title)}</title>" if title else ""
    at = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    return f'<rect class="{kind}" {at}>{name}</rect>' if name else f'<rect class="{kind}" {at}/>'


def drawing(parts: Iterable[str], width: float, height: float, title: str) -> str:
    """Returns a whole drawing.

    Args:
        parts: of it, in order.
        width: of its box.
        height: of its box.
        title: what it shows, for readers who do not see it.
    """
    size = f'viewBox="0 0 {number(width)} {number(height)}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"


# -- a plot with two axes


@dataclass
class Plot:
    """A plot with two axes; marks are added, then it is drawn.

    Attributes:
        x: the horizontal scale.
        y: the vertical scale.
        x_name: of the axis, with its unit.
        y_name: of the axis, with its unit.
        width: of the whole.
        height: of the whole.
        parts: what is drawn, in order.
    """

    x: Scale
    y: Scale
    x_name: str
    y_name: str
    width: float
    height: float
    parts: list[str] = field(default_factory=list)
    _boxes: list[tuple[float, float, float, float]] = field(default_factory=list)

    LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 22.0, 40.0

    @classmethod
    def of(
        cls,
        xs: Iterable[float],
        ys: Iterable[float],
        *,
        names: tuple[str, str],
        size: tuple[float, float] = (430.0, 300.0),
        log: tuple[bool, bool] = (False, True),
    ) -> "Plot":
        """Returns a plot that holds all values.

        Args:
            xs: values on the horizontal axis.
            ys: on the vertical one.
            names: of the axes.
            size: width and height.
            log: whether each axis is logarithmic.
        """
        width, height = size
        x = Scale.over(xs, cls.LEFT, width - cls.RIGHT, log=log[0])
        y = Scale.over(ys, height - cls.BOTTOM, cls.TOP, log=log[1], margin=0.08)
        return cls(x, y, *names, width, height)

    def add(self, *parts: str) -> None:
        """Adds parts of the drawing, over those before."""
        self.parts += parts

    def mark(
        self, shape: str, x: float, y: float, kind: str, size: float = 4.0, title: str = ""
    ) -> None:
        """Adds a mark at values of both axes; arguments as of `mark`."""
        at_x, at_y = self.x(x), self.y(y)
        self.add(mark(shape, at_x, at_y, kind, size, title))
        self._boxes.append((at_x - size, at_y - size, at_x + size, at_y + size))

    def interval(self, x: float, low: float, high: float, kind: str) -> None:
        """Adds a vertical interval, cut where the axis ends."""
        low, high = max(low, self.y.low), min(high, self.y.high)
        if high > low:
            self.add(line(self.x(x), self.y(low), self.x(x), self.y(high), f"whisker {kind}"))

    def path(
        self, points: Sequence[tuple[float, float]], kind: str, *, steps: bool = False
    ) -> None:
        """Adds a line through points, or the stairs that go down at each."""
        text, previous = "", None
        for x, y in points:
            if steps and previous is not None:
                text += f" L{number(self.x(x))} {number(self.y(previous))}"
            text += f"{' L' if text else 'M'}{number(self.x(x))} {number(self.y(y))}"
            previous = y
        if text:
            self.add(f'<path class="{kind}" d="{text}"/>')

    def name(self, text: str, x: float, y: float) -> None:
        """Adds a name beside a point where there is room for it; else none."""
        at_x, at_y, wide = self.x(x), self.y(y), 6.1 * len(text)
        for dx, dy, anchor in (
            (8, -6, "start"),
            (-8, -6, "end"),
            (8, 14, "start"),
            (-8, 14, "end"),
        ):
            left = at_x + dx if anchor == "start" else at_x + dx - wide
            box = (left, at_y + dy - 10, left + wide, at_y + dy + 2)
            inside = box[0] > self.LEFT and box[2] < self.width and box[1] > self.TOP
            if inside and not any(_overlap(box, other) for other in self._boxes):
                self._boxes.append(box)
                self.add(label(text, at_x + dx, at_y + dy, kind="name", anchor=anchor))
                return

    def drawn(self, title: str) -> str:
        """Returns the drawing, axes included."""
        bottom, right = self.height - self.BOTTOM, self.width - self.RIGHT
        axes = []
        for tick in self.x.ticks:
            at = self.x(tick)
            axes.append(line(at, self.TOP, at, bottom, "grid"))
            axes.append(label(tick_text(tick), at, bottom + 14, kind="tick", anchor="middle"))
        for tick in self.y.ticks:
            at = self.y(tick)
            axes.append(line(self.LEFT, at, right, at, "grid"))
            axes.append(label(tick_text(tick), self.LEFT - 5, at + 4, kind="tick", anchor="end"))
        axes.append(
            label(
                self.x_name, (self.LEFT + right) / 2, self.height - 6, kind="axis", anchor="middle"
            )
        )
        axes.append(label(self.y_name, 2, 11, kind="axis"))
        return drawing([*axes, *self.parts], self.width, self.height, title)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
