"""Tables as text of 80 columns, with the words that need it explained below.

In: a pandas table. Out: text. Invariants: no value is cut, and none is shown as NaN; the text is
the same on a terminal and on a pipe, except for bold headers; rich is loaded when a table is made.
"""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from allocator.units import show_size

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 80
_GAP = 2
_TEXT_WIDTH = 28
"""Characters of a cell with several words, where a table is too wide; a longer word stays whole."""


class Column(NamedTuple):
    """How a column is shown.

    Attributes:
        label: of the header.
        show: `size` (bytes), `+size` (with a sign), or a format specification of Python.
        meaning: a line below the table; empty where the label is plain.
    """

    label: str
    show: str = ""
    meaning: str = ""


_KL = "KL(original || allocation), nats per token; 0 is the original itself"
_BITS = "effective bits: bytes of the searched matrices over all their weights"
_MATRICES = "bytes of the matrices whose format is searched"
COLUMNS = {
    "group": Column("group", "", "tensors that share one format"),
    "weights": Column("weights", ","),
    "formats": Column("formats", "", "offered, largest first"),
    "floor": Column("floor", "size", "every group in its smallest format"),
    "ceiling": Column("ceiling", "size", "every group in its largest format"),
    "kind": Column("kind", "", "where the trial comes from, or the baseline that it is"),
    "bytes": Column("matrices", "size", _MATRICES),
    "file_bytes": Column("file", "size"),
    "effective_bits": Column("bits", ".3f", _BITS),
    "bits": Column("bits", ".3f", _BITS),
    "loss": Column("loss", ".5f", f"{_KL}; search split"),
    "predicted": Column("predicted", ".5f", "the loss that the profile predicted"),
    "top1": Column("top-1", ".4f", "share of tokens whose likeliest next token is the original's"),
    "experts": Column("experts", "", "retained per layer; one number where all layers retain it"),
    "memory_bytes": Column("memory", "size", "everything on the device"),
    "token_bytes": Column("per token", "size", "bytes that decoding one token reads"),
    "tokens_per_second": Column("tokens/s", ".1f", "most that the bandwidth allows"),
    "predicted_loss": Column("loss", ".6f", "predicted share of this decision, nats per token"),
    "up": Column("up", "", "the next larger choice, and what it would change"),
    "up_bytes": Column("up, size", "+size"),
    "up_loss": Column("up, loss", "+.6f"),
    "down": Column("down", "", "the next smaller choice, and what it would change"),
    "down_bytes": Column("down, size", "+size"),
    "down_loss": Column("down, loss", "+.6f"),
    "kl": Column("KL", ".5f", _KL),
    "perplexity": Column("perplexity", ".3f"),
    "acc": Column("accuracy", ".3f", "lm-eval, continuations of held-out documents"),
    "lm_eval_perplexity": Column("lm-eval", ".2f", "lm-eval's perplexity of a token"),
    "weights_bytes": Column("weights", "size"),
    "kv_cache": Column("KV cache", "size", "keys and values at full context"),
    "compute": Column("compute", "size", "buffers of the runtime"),
    "overhead": Column("overhead", "size", "of the runtime's process"),
    "reserve": Column("reserve", "size"),
    "total": Column("total", "size"),
    "spare": Column("spare", "+size", "bytes that the device has left"),
    "expected_loss": Column("loss", ".4f", "expected, nats per token; empty where unknown"),
    "tokens": Column("tokens", ",", "forward tokens of a run"),
    "median": Column("median", ".5f", "KL(original || pick), nats per token, over the seeds"),
    "min": Column("min", ".5f"),
    "max": Column("max", ".5f"),
    "count": Column("seeds", ","),
    "low": Column("low", ".3f", "95 % interval of /knapsack, from low to high"),
    "high": Column("high", ".3f"),
    "/baseline": Column("/baseline", ".3f", "KL over that of uniform formats and role mixes"),
    "/knapsack": Column("/knapsack", ".3f", "KL over that of the first trial, the knapsack alone"),
}  # fmt: skip
"""Columns of all tables, by name; others have their name as the label."""
_PREFIXES = {"kl": ".5f", "perplexity": ".3f", "/": ".3f"}
"""Formats of columns that are named after a domain or a reference."""


@dataclass(frozen=True)
class _Cells:
    """A column as text; `width` is in characters of a terminal."""

    label: str
    cells: tuple[str, ...]
    meaning: str
    right: bool
    width: int

    @property
    def is_constant(self) -> bool:
        return len(self.cells) > 1 and len(set(self.cells)) == 1


def table_text(
    table: "pd.DataFrame",
    *,
    keys: int = 1,
    exact: bool = False,
    meanings: bool = True,
    bold: bool = False,
) -> str:
    """Returns a table as text of at most 80 columns, unless a word alone is longer.

    Columns without any value are left out. A table that is too wide is printed in parts that begin
    with the same columns; where even these leave no room, every row becomes a list.

    Args:
        table: rows.
        keys: leading columns that say what a row is of.
        exact: sizes as bytes in full.
        meanings: lines below that explain columns.
        bold: headers in bold, for a terminal.
    """
    columns = [_cells(name, table[name].tolist(), exact) for name in table.columns]
    shown = [c for i, c in enumerate(columns) if i < keys or any(c.cells)]
    constant: list[_Cells] = []
    if _total(shown) > WIDTH:
        constant = [c for c in shown[keys:] if c.is_constant]
        shown = [c for c in shown if c not in constant]
    parts = [_grid(part, bold) for part in _parts(shown, keys)] if len(table) else []
    if None in parts:
        parts = [_lists(shown)]
    texts = [part for part in parts if part is not None]
    below = []
    if constant:
        values = ", ".join(f"{c.label} {c.cells[0]}" for c in constant)
        below.append(_filled("in every row: ", values))
    if meanings:
        known = {c.label: c.meaning for c in (*shown, *constant) if c.meaning}
        width = max(map(len, known), default=0) + _GAP
        below += [_filled(f"{label:{width}}", text) for label, text in known.items()]
    return "\n\n".join((*texts, *(["\n".join(below)] if below else [])))


def _filled(label: str, text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _cells(name: str, values: Sequence[Any], exact: bool) -> _Cells:
    from rich.cells import cell_len

    column = COLUMNS.get(name, Column(name, next(_prefixed(name), "")))
    cells = tuple(_cell(name, v, column.show, exact) for v in values)
    width = max(map(cell_len, (column.label, *cells)))
    numeric = all(isinstance(v, int | float) for v in values if not _is_missing(v))
    return _Cells(column.label, cells, column.meaning, numeric, width)


def _prefixed(name: str) -> Iterator[str]:
    return (show for prefix, show in _PREFIXES.items() if name.startswith(prefix))


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _cell(name: str, value: Any, show: str, exact: bool) -> str:
    if _is_missing(value):
        return ""
    if name == "experts" and isinstance(value, str) and len(set(value.split())) == 1:
        return value.split()[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if show in ("size", "+size"):
        nbytes = round(value)
        text = f"{nbytes:,}" if exact else show_size(nbytes)
        return f"+{text}" if show == "+size" and nbytes >= 0 else text
    if not show:
        show = ".4g" if isinstance(value, float) and not value.is_integer() else ",.0f"
    return format(value, show)


def _total(columns: Sequence[_Cells]) -> int:
    return sum(c.width for c in columns) + _GAP * (len(columns) - 1)


def _parts(columns: list[_Cells], keys: int) -> list[list[_Cells]]:
    """The columns of each part; a part begins with the keys."""
    if _total(columns) <= WIDTH:
        return [columns]
    narrow = [replace(c, width=_wrapped_width(c)) for c in columns]
    first, parts = narrow[:keys], [narrow[:keys]]
    for column in narrow[keys:]:
        if _total([*parts[-1], column]) > WIDTH and len(parts[-1]) > keys:
            parts.append(list(first))
        parts[-1].append(column)
    by_label = {c.label: c for c in columns}
    return [_widened(part, by_label) for part in parts]


def _wrapped_width(column: _Cells) -> int:
    from rich.cells import cell_len

    words = [word for text in (column.label, *column.cells) for word in text.split()]
    return min(column.width, max(_TEXT_WIDTH, *map(cell_len, words)))


def _widened(part: list[_Cells], natural: dict[str, _Cells]) -> list[_Cells]:
    """A part whose wrapped columns take what room is free, from the first on."""
    widened: list[_Cells] = []
    free = WIDTH - _total(part)
    for column in part:
        more = max(0, min(free, natural[column.label].width - column.width))
        widened.append(replace(column, width=column.width + more))
        free -= more
    return widened


def _grid(columns: list[_Cells], bold: bool) -> str | None:
    """The part as text; None if it does not fit."""
    if _total(columns) > WIDTH:
        return None

    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for c in columns:
        grid.add_column(
            Text(c.label), width=c.width, justify="right" if c.right else "left", overflow="fold"
        )
    for row in zip(*(c.cells for c in columns), strict=True):
        grid.add_row(*map(Text, row))
    out = StringIO()
    Console(file=out, width=WIDTH + _GAP, force_terminal=bold, no_color=True).print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _lists(columns: list[_Cells]) -> str:
    """A list per row, for keys that leave no room."""
    width = max(len(c.label) for c in columns) + _GAP
    rows = zip(*(c.cells for c in columns), strict=True)
    return "\n\n".join(
        "\n".join(
            _filled(f"{c.label:{width}}", cell)
            for c, cell in zip(columns, row, strict=True)
            if cell
        )
        for row in rows
    )
