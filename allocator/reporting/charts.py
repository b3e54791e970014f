"""The drawings of a report, each of one question.

In: what `facts` read. Out: SVG and HTML. Invariant: a chart has at least one point; whatever is
not measured is not drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from allocator.app.held_out_file import HeldOutRow, HeldOutSplit
from allocator.app.tables import OUTSIDE, allocation_grid, grid_bits
from allocator.decision.allocation import Allocation
from allocator.decision.front import Point, lower_hull
from allocator.formats import format_named, formats_in
from allocator.formats.parts import in_parts
from allocator.prediction.profile import Profile
from allocator.reporting import intervals, svg, text
from allocator.reporting.intervals import Figure

LOSS = "KL, nats per token"
AXES = {"kl": LOSS, "perplexity": "perplexity over the original's", "top1": "same top token, share"}
"""Held-out figures by their names, with the texts of their axes."""
LOOKS = {
    "baseline": ("triangle", "base", "baseline"),
    "knapsack": ("diamond", "knap", "knapsack"),
    "proposal": ("circle", "prop", "proposal of the sampler"),
}
_BITS_STEPS = (1.9, 2.2, 2.55, 3.2, 4.0, 5.0, 6.0, 8.0)
_ROUTED_STEPS = (0.1, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
_HALF = (440.0, 320.0)
_MOST_CELLS = 4096
"""Cells of a map that each have a text of their own on hover."""


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """Returns what marks mean: shape, classes, name."""
    items = []
    for shape, kind, name in entries:
        drawn = svg.line(0, 8, 16, 8, kind) if shape == "line" else svg.mark(shape, 8, 8, kind, 5)
        icon = f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{drawn}</svg>'
        items.append(f"<li>{icon}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


# -- held-out figures


@dataclass(frozen=True, slots=True)
class Own:
    """A held-out row of the reported allocation.

    Attributes:
        row: measured.
        finished: whether its weights are.
        name: as the page calls it.
    """

    row: HeldOutRow
    finished: bool
    name: str

    @property
    def kind(self) -> str:
        """CSS classes of its mark."""
        return "pick" if self.finished else "pick hollow"


def against_baselines(
    split: HeldOutSplit, own: Sequence[Own], axis: str, *, large: bool = True
) -> str:
    """Draws a held-out figure of the allocation and of baselines over effective bits.

    Args:
        split: measured.
        own: rows of the allocation.
        axis: of `AXES`; `perplexity` needs the row of the original.
        large: names points; else the drawing is a small one.
    """
    figure_of = {"kl": intervals.kl, "perplexity": intervals.perplexity, "top1": intervals.top1}
    y_name = AXES[axis]
    figures = {id(r): figure_of[axis](split, r) for r in (*split.baselines, *(o.row for o in own))}
    is_log = axis == "kl" and all(f.value > 0 for f in figures.values())
    levels = [1.0] if axis == "perplexity" else []
    ys = [v for f in figures.values() for v in (f.value, *_ends(f, is_log))]
    plot = svg.Plot.of(
        [r.bits for r in (*split.baselines, *(o.row for o in own))],
        [*ys, *levels],
        names=("effective bits per weight", y_name),
        size=(880.0, 400.0) if large else (430.0, 280.0),
        log=(False, is_log),
    )
    for level in levels:
        plot.add(
            svg.line(plot.LEFT, plot.y(level), plot.width - plot.RIGHT, plot.y(level), "level")
        )
        plot.add(svg.label("original", plot.LEFT + 4, plot.y(level) - 4, kind="name"))
    hull = lower_hull([Point(r.name, r.bytes, r.kl) for r in split.baselines if r.kl > 0])
    on_hull = {p.name for p in hull}
    if axis == "kl":
        bits = {r.name: r.bits for r in split.baselines}
        plot.path([(bits[p.name], p.loss) for p in hull], "hull")
    for row in split.baselines:
        f = figures[id(row)]
        plot.interval(row.bits, f.low, f.high, "base")
        plot.mark(
            "triangle", row.bits, f.value, "base", 4.0, _held_out_title(row.name, row, f, axis)
        )
    for mine in own:
        f = figures[id(mine.row)]
        plot.interval(mine.row.bits, f.low, f.high, "pick")
        title = _held_out_title(mine.name, mine.row, f, axis)
        plot.mark("star", mine.row.bits, f.value, mine.kind, 6.0, title)
    if large:
        for mine in own:
            plot.name(mine.name, mine.row.bits, figures[id(mine.row)].value)
        for row in sorted(split.baselines, key=lambda r: (r.name not in on_hull, r.bytes, r.name)):
            plot.name(row.name, row.bits, figures[id(row)].value)
    return plot.drawn(f"{y_name} over effective bits on the {split.split} split")


def _ends(figure: Figure, is_log: bool) -> tuple[float, ...]:
    return tuple(v for v in (figure.low, figure.high) if v > 0 or not is_log)


def _held_out_title(name: str, row: HeldOutRow, figure: Figure, axis: str) -> str:
    shown = text.loss(figure.value) if axis == "kl" else f"{figure.value:.4g}"
    ends = text.within(figure, None if axis == "kl" else 3)
    return f"{name}: {shown} {ends}, {row.bits:.3f} bits, {text.size(row.bytes)}"


def domains(rows: Sequence[tuple[str, str, str, Mapping[str, Figure]]], title: str) -> str:
    """Draws KL by domain, a row a domain, with intervals where there are some.

    Args:
        rows: shape, classes, name and figures by domain, the most important last.
        title: for readers who do not see it.
    """
    names = sorted({d for *_, figures in rows for d in figures})
    widest = min(180.0, 14 + 7.2 * max(len(n or "no domain") for n in names))
    height = 34.0 * len(names) + 46
    values = [v for *_, figures in rows for f in figures.values() for v in (f.value, f.high)]
    scale = svg.Scale.over(values, widest, 420.0, zero=True)
    parts = []
    for tick in scale.ticks:
        parts.append(svg.line(scale(tick), 4, scale(tick), height - 36, "grid"))
        parts.append(
            svg.label(svg.tick_text(tick), scale(tick), height - 22, kind="tick", anchor="middle")
        )
    for i, name in enumerate(names):
        y = 22 + 34.0 * i
        parts.append(svg.label(name or "no domain", widest - 8, y + 4, kind="tick", anchor="end"))
        for j, (shape, kind, what, figures) in enumerate(rows):
            if name not in figures:
                continue
            f, at = figures[name], y + 7.0 * (j - (len(rows) - 1) / 2)
            low, high = max(f.low, 0.0), f.high
            if high > low:
                parts.append(svg.line(scale(low), at, scale(high), at, f"whisker {kind}"))
            shown = f"{what}, {name or 'no domain'}: {text.loss(f.value)}"
            shown += f" {text.within(f)}" if high > low else ""
            parts.append(svg.mark(shape, scale(f.value), at, kind, 4.0, shown))
    parts.append(svg.label(LOSS, (widest + 420) / 2, height - 6, kind="axis", anchor="middle"))
    return svg.drawing(parts, 430, height, title)


# -- the search


def front(trials: pd.DataFrame, pick: tuple[float, float] | None) -> str:
    """Draws every scored trial, and the front as stairs.

    Args:
        trials: columns as of `front_table`.
        pick: bits, and loss on the search split, of the reported allocation.
    """
    rows = [r for r in trials.to_dict("records") if r["loss"] > 0 and math.isfinite(r["loss"])]
    on_device = "memory_bytes" in trials and bool(trials["memory_bytes"].notna().any())

    def x_of(row: Mapping[str, Any]) -> float:
        return float(row["memory_bytes"]) / 2**20 if on_device else float(row["effective_bits"])

    x_name = "memory on the device, MiB" if on_device else "effective bits per weight"
    shown = [] if pick is None or on_device or not pick[1] > 0 else [pick]
    plot = svg.Plot.of(
        [*map(x_of, rows), *(p[0] for p in shown)],
        [*(r["loss"] for r in rows), *(p[1] for p in shown)],
        names=(x_name, LOSS),
        size=_HALF,
    )
    steps = sorted((x_of(r), r["loss"]) for r in rows if r["on_front"])
    plot.path(steps, "front", steps=True)
    for row in sorted(rows, key=lambda r: (r["complete"], r["series"] != "proposal", r["trial"])):
        shape, kind, _ = LOOKS[row["series"]]
        look = kind if row["complete"] else f"{kind} hollow"
        at = 4.5 if row["complete"] else 3.5
        plot.mark(shape, x_of(row), row["loss"], look, at, _trial_title(row))
    for bits, value in shown:
        plot.mark("star", bits, value, "pick", 6.5, f"the pick: {text.loss(value)}")
        plot.name("the pick", bits, value)
    for row in rows:
        if row["series"] == "baseline" and row["complete"]:
            plot.name(str(row["kind"]), x_of(row), row["loss"])
    return plot.drawn("every scored trial, loss on the search split over size")


def course(trials: pd.DataFrame) -> str:
    """Draws the loss of every scored trial in the order of the search, and the least so far."""
    rows = [r for r in trials.to_dict("records") if r["loss"] > 0 and math.isfinite(r["loss"])]
    rows.sort(key=lambda r: r["trial"])
    plot = svg.Plot.of(
        [r["trial"] for r in rows],
        [r["loss"] for r in rows],
        names=("trial", LOSS),
        size=_HALF,
    )
    best: list[tuple[float, float]] = []
    for row in rows:
        if row["complete"]:
            best.append((row["trial"], min(row["loss"], best[-1][1] if best else math.inf)))
    plot.path([*best, (rows[-1]["trial"], best[-1][1])] if best else [], "front", steps=True)
    for row in rows:
        shape, kind, _ = LOOKS[row["series"]]
        look = kind if row["complete"] else f"{kind} hollow"
        at = 4.5 if row["complete"] else 3.5
        plot.mark(shape, row["trial"], row["loss"], look, at, _trial_title(row))
    return plot.drawn("loss of every scored trial on the search split, in order")


def _trial_title(row: Mapping[str, Any]) -> str:
    lost = "" if row["complete"] else f", lost its race after {row['tokens']:,} tokens"
    return (
        f"trial {row['trial']}, {row['kind']}: {text.loss(row['loss'])}{lost}, "
        f"{row['effective_bits']:.3f} bits, {text.size(row['bytes'])}, "
        f"experts {_short_counts(row['experts'])}"
    )


def _short_counts(counts: str) -> str:
    numbers = counts.split()
    if len(set(numbers)) == 1:
        return f"{numbers[0]} in every layer"
    return f"{min(map(int, numbers))} to {max(map(int, numbers))}"


def predicted(trials: pd.DataFrame) -> str:
    """Draws measured over predicted loss of COMPLETE trials."""
    rows = [r for r in trials.to_dict("records") if is_comparable(r)]
    values = [v for r in rows for v in (r["predicted"], r["loss"])]
    scale_x = svg.Scale.over(values, svg.Plot.LEFT, 430 - svg.Plot.RIGHT, log=True)
    scale_y = svg.Scale.over(values, 330 - svg.Plot.BOTTOM, svg.Plot.TOP, log=True)
    plot = svg.Plot(scale_x, scale_y, "predicted KL, nats per token", f"measured {LOSS}", 430, 330)
    plot.path([(scale_x.low, scale_y.low), (scale_x.high, scale_y.high)], "hull")
    for row in rows:
        shape, kind, _ = LOOKS[row["series"]]
        title = (
            f"trial {row['trial']}, {row['kind']}: predicted {text.loss(row['predicted'])}, "
            f"measured {text.loss(row['loss'])}"
        )
        plot.mark(shape, row["predicted"], row["loss"], kind, 4.0, title)
    return plot.drawn("measured over predicted loss on the search split")


def is_comparable(row: Mapping[str, Any]) -> bool:
    """Tells whether a trial was scored in full, at positive losses."""
    ends = (row["predicted"], row["loss"])
    return bool(row["complete"]) and all(v is not None and math.isfinite(v) and v > 0 for v in ends)


# -- the allocation


def bits_map(decision: Allocation) -> str:
    """Draws effective bits, `layers x tensors`; the last row has the tensors outside the layers."""
    grid = allocation_grid(decision)
    bits = grid_bits(grid)
    inside = [c for c in grid.columns if (grid.loc[grid.index != OUTSIDE, c] != "").any()]
    inside.sort(key=_column_order)
    outside = [c for c in grid.columns if c not in inside]
    layers = [row for row in grid.index if row != OUTSIDE]
    small = len(layers) > 16
    high, wide, left, top = (13.0 if small else 22.0), 58.0, 44.0, 72.0
    parts = []
    for j, column in enumerate(inside):
        x, y = left + wide * (j + 0.5) - 4, top - 6
        parts.append(
            f'<text class="tick" transform="translate({svg.number(x)},{svg.number(y)}) '
            f'rotate(-32)">{escape(column)}</text>'
        )
    for i, layer in enumerate(layers):
        y = top + high * i
        if not small or i % 5 == 0 or i == len(layers) - 1:
            parts.append(svg.label(layer, left - 6, y + high / 2 + 4, kind="tick", anchor="end"))
        for j, column in enumerate(inside):
            if not grid.at[layer, column]:
                continue
            value = float(bits.at[layer, column])
            name = f"layer {layer}, {column}: {grid.at[layer, column]}, {value:.2f} bits"
            parts.append(_cell(left + wide * j, y, wide, high, value, name, small=small))
    y = top + high * len(layers) + (18 if outside else 0)
    x = left
    for column in outside:
        value = float(bits.at[OUTSIDE, column])
        name = f"{column}: {grid.at[OUTSIDE, column]}, {value:.2f} bits"
        parts.append(_cell(x, y, wide, 22.0, value, name))
        parts.append(svg.label(column, x + wide + 6, y + 15, kind="tick"))
        x += wide + 20 + 6.5 * len(column)
    width = max(left + wide * len(inside) + 56, x)
    height = y + (26 if outside else 4)
    drawn = svg.drawing(parts, width, height, "effective bits per weight, layers by tensors")
    widths = f"min-width:{min(width, 900) * 0.72:.0f}px;max-width:{width * 1.1:.0f}px"
    return f'<div class="wide"><div style="{widths}">{drawn}</div></div>'


def _column_order(name: str) -> tuple[int, str]:
    order = ("attention", "linear", "ssm", "conv", "mlp", "shared", "latent", "experts")
    stem = name.partition(".")[0]
    return (order.index(stem) if stem in order else len(order), name)


def _cell(
    x: float, y: float, wide: float, high: float, bits: float, title: str, *, small: bool = False
) -> str:
    level = sum(bits >= step for step in _BITS_STEPS)
    cell = svg.rectangle(x + 0.5, y + 0.5, wide - 1, high - 1, f"h{level}", title)
    where = y + high / 2 + (3.4 if small else 4)
    size = " small" if small else ""
    return cell + svg.label(
        f"{bits:.2f}", x + wide / 2, where, kind=f"on{level}{size}", anchor="middle"
    )


def bits_key() -> str:
    """Returns what the colours of `bits_map` mean."""
    edges = [f"under {_BITS_STEPS[0]:g}"]
    edges += [f"{a:g}–{b:g}" for a, b in pairwise(_BITS_STEPS)]
    edges.append(f"{_BITS_STEPS[-1]:g} and more")
    return _key([(f"h{i}", name) for i, name in enumerate(edges)])


def routed_key() -> str:
    """Returns what the colours of `routed_map` mean."""
    names = [f"under {_ROUTED_STEPS[0]:g}"]
    names += [f"{a:g}–{b:g}" for a, b in pairwise(_ROUTED_STEPS)]
    names.append(f"{_ROUTED_STEPS[-1]:g} and more")
    return _key([(f"r{i}", name) for i, name in enumerate(names)])


def _key(entries: Sequence[tuple[str, str]]) -> str:
    box = '<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{}</svg>{}'
    items = (box.format(svg.rectangle(1, 1, 14, 14, kind), escape(name)) for kind, name in entries)
    return f'<ul class="legend">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def routed_map(decision: Allocation, n_experts: int, counts: Mapping[int, Sequence[int]]) -> str:
    """Draws how often each expert was routed, a row a layer, the most routed first.

    Experts that are not retained are small squares.

    Args:
        decision: says which experts stay.
        n_experts: routed experts per layer.
        counts: tokens routed to each expert, by layer.
    """
    layers = [x for x in decision.retained_experts if x in counts]
    small = len(layers) > 16
    high, left, wide = (11.0 if small else 18.0), 44.0, 700.0 / n_experts
    titled = len(layers) * n_experts <= _MOST_CELLS
    parts = []
    paths: dict[str, list[str]] = {}
    for i, layer in enumerate(layers):
        y, tokens = 18 + high * i, np.asarray(counts[layer], np.float64)
        total, retained = tokens.sum(), set(decision.retained_experts[layer])
        mean = total / n_experts
        if not small or i % 5 == 0 or i == len(layers) - 1:
            parts.append(
                svg.label(str(layer), left - 6, y + high / 2 + 4, kind="tick", anchor="end")
            )
        order = sorted(range(n_experts), key=lambda e: (-counts[layer][e], e))
        for j, expert in enumerate(order):
            relative = tokens[expert] / mean if mean else 0.0
            level = sum(relative >= step for step in _ROUTED_STEPS)
            x, w, h, inset = left + wide * j, wide * 0.94, high - 1, 0.0
            if expert not in retained:
                inset = min(w, h) * 0.3
            box = (x + (w - min(w, h)) / 2 * (inset > 0) + inset, y + inset)
            size = (min(w, h) - 2 * inset, h - 2 * inset) if inset else (w, h)
            if titled:
                fate = "retained" if expert in retained else "removed"
                name = (
                    f"layer {layer}, expert {expert}: {fate}, {counts[layer][expert]:,} tokens, "
                    f"{relative:.2f} of the mean"
                )
                parts.append(svg.rectangle(*box, *size, f"r{level}", name))
            else:
                a, b, c, d = map(svg.number, (*box, *size))
                paths.setdefault(f"r{level}", []).append(f"M{a} {b}h{c}v{d}h-{c}z")
        kept = tokens[sorted(retained)].sum() / total if total else 0.0
        if not small or i % 5 == 0 or i == len(layers) - 1:
            shown = f"{len(retained)} of {n_experts}, {kept:.0%} of routings"
            parts.append(svg.label(shown, left + 708, y + high / 2 + 4, kind="tick"))
    parts += [f'<path class="{kind}" d="{"".join(d)}"/>' for kind, d in sorted(paths.items())]
    parts.append(svg.label("layer", left - 6, 11, kind="tick", anchor="end"))
    parts.append(svg.label("most routed", left, 11, kind="tick"))
    parts.append(svg.label("least routed", left + 700, 11, kind="tick", anchor="end"))
    drawn = svg.drawing(
        parts, 930, 22 + high * len(layers), "how often each expert was routed, by layer"
    )
    return f'<div class="wide"><div style="min-width:640px">{drawn}</div></div>'


# -- prices of the profile


@dataclass(frozen=True, slots=True)
class RolePrices:
    """What a role loses in each format, all else original.

    Attributes:
        role: its name.
        points: bits, predicted loss and name of every format, by bits.
        chosen: bits and predicted loss in the reported allocation; None without one.
    """

    role: str
    points: tuple[tuple[float, float, str], ...]
    chosen: tuple[float, float] | None


def role_prices(profile: Profile, decision: Allocation | None) -> list[RolePrices]:
    """Returns predicted losses by role and format, the role that loses most first."""
    groups: dict[str, list[str]] = {}
    for name in profile.curvature:
        role = name.split(".", 2)[2] if name.startswith("layers.") else name
        groups.setdefault(role, []).append(name)
    rows = []
    for role, names in groups.items():
        formats = set.intersection(*(set(profile.curvature[n]) for n in names))
        points = sorted(
            (format_named(f).bits, sum(sum(profile.curvature[n][f]) for n in names), f)
            for f in formats
        )
        chosen = None if decision is None else _chosen(profile, decision, names)
        rows.append(RolePrices(role, tuple(points), chosen))
    return sorted(rows, key=lambda r: (-max((p[1] for p in r.points), default=0.0), r.role))


def _chosen(
    profile: Profile, decision: Allocation, names: Sequence[str]
) -> tuple[float, float] | None:
    """Bits and predicted loss of groups as an allocation stores them."""
    bits, weights, loss = 0.0, 0, 0.0
    for name in names:
        value, prices = decision.format_of.get(name), profile.curvature[name]
        if value is None or any(f.name not in prices for f in formats_in(value)):
            return None
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        width = max(len(v) for v in prices.values())
        retained = decision.retained_experts.get(layer, ()) if width > 1 else ()
        for fmt, experts in _stored(value, retained):
            chosen = [prices[fmt][e] for e in experts] if experts else prices[fmt]
            n = len(experts) or 1
            bits, weights, loss = bits + format_named(fmt).bits * n, weights + n, loss + sum(chosen)
    return bits / weights, loss


def _stored(value: str, retained: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    if not in_parts(value):
        return [(value, tuple(retained))]
    pieces = [piece.partition(":") for piece in value.split("+")]
    return [(name, tuple(map(int, experts.split(",")))) for name, _, experts in pieces]


def prices(rows: Sequence[RolePrices]) -> str:
    """Draws predicted loss over bits, a small plot for each role on the same axes."""
    positive = [p[1] for r in rows for p in r.points if p[1] > 0]
    floor = max(positive) * 1e-5  # below it, nobody sees a difference
    xs = [p[0] for r in rows for p in r.points if p[1] > floor] or [1.0, 16.0]
    ys = [v for v in positive if v > floor]
    plots = []
    for row in rows:
        shown = [(b, v, f) for b, v, f in row.points if v > floor]
        if not shown:
            continue
        width, height = 250.0, 170.0
        x = svg.Scale.over(xs, 44, width - 8)
        y = svg.Scale.over(ys, height - 30, 22, log=True)
        plot = svg.Plot(x, y, "", "", width, height)
        plot.BOTTOM, plot.LEFT, plot.RIGHT = 30.0, 44.0, 8.0
        hull = {p.name for p in lower_hull([Point(f, round(b * 1e6), v) for b, v, f in shown])}
        plot.path([(b, v) for b, v, f in shown if f in hull], "front")
        for bits, value, fmt in shown:
            title = f"{row.role} in {fmt}: {text.loss(value)} predicted, {bits:.2f} bits"
            plot.mark("circle", bits, value, "prop", 2.4, title)
        if row.chosen is not None and row.chosen[1] > floor and x.low <= row.chosen[0] <= x.high:
            bits, value = row.chosen
            title = f"{row.role} in this allocation: {text.loss(value)} predicted, {bits:.2f} bits"
            plot.mark("star", bits, min(max(value, y.low), y.high), "pick", 5.0, title)
        plot.add(svg.label(row.role, 46, 13, kind="axis"))
        plots.append(plot.drawn(f"predicted loss of {row.role} over bits"))
    return f'<div class="multiples">{"".join(plots)}</div>'
