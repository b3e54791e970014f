"""What a long computation is doing now, on stderr: a count, the time so far, and the time to go.

In: steps that open, advance and close, one inside another. Out: on a terminal one line that is
written over, and a brief step is in it after half a second; on a pipe a line where a step has taken
two seconds, a line every ten seconds after that, and a line where it ends; a brief step inside
another is in the lines of that one. Invariants: a step that advances slowly shows its time, which a
thread rewrites; the time to go follows from the work done in this run; where progress is not shown,
nothing is written and no thread runs.

    with step("calibration", total=96, unit="documents") as shown:
        for document in documents:
            ...
            shown.update()

writes `calibration: 12/96 documents, 8 s, 56 s to go`.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Self, TextIO, TypeVar

from allocator.units import show_seconds, show_size

BYTES = "bytes"
"""A unit that is shown as a size."""
_SOON_SECONDS, _TICK_SECONDS, _DRAW_SECONDS = 0.5, 0.5, 0.1  # on a terminal, whose line goes away
_FIRST_SECONDS, _LINE_SECONDS = 2.0, 10.0

T = TypeVar("T")


class Step:
    """One step that is shown; make it with `step`.

    Args:
        display: where it is shown; None shows nothing.
        name: what is done, or waited for.
        total: of the count, if known.
        initial: of the total, done before.
        unit: what is counted, in the plural; `BYTES` for a size.
        brief: shown only where it takes long, and leaves no line on a terminal.
    """

    def __init__(
        self,
        display: "Display | None",
        name: str,
        total: int | None,
        *,
        initial: int,
        unit: str,
        brief: bool,
    ) -> None:
        self._display, self._name, self._total = display, name, total
        self._n = self._initial = initial
        self._unit, self._note = unit, ""
        self.brief = brief
        self.was_shown = self.was_announced = False
        self.began = self._advanced = 0.0 if display is None else display.clock()
        if display is not None:
            display.open(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Adds to the count."""
        self._n += n
        if self._display is not None:
            self._advanced = self._display.clock()
            self._display.changed()

    def announce(self) -> None:
        """Shows the step now, by its name, however brief it will be."""
        if self._display is not None:
            self.was_announced = True
            self._display.announce(self._name)

    def note(self, text: str) -> None:
        """Puts a few words behind the count."""
        self._note = text

    def close(self) -> None:
        """Ends the step; a second call does nothing."""
        display, self._display = self._display, None
        if display is not None:
            display.close(self)

    def text(self, now: float) -> str:
        """Returns the step in a line, at a time of the display's clock."""
        parts = [] if self._total is None and not self._n else [self._count()]
        parts += [self._note] if self._note else []
        parts.append(show_seconds(now - self.began))
        to_go = self._seconds_to_go(now)
        if to_go is not None:
            parts.append(f"{show_seconds(to_go)} to go")
        return f"{self._name}: {', '.join(parts)}"

    def _count(self) -> str:
        show = show_size if self._unit == BYTES else "{:,}".format
        total = "" if self._total is None else f"/{show(self._total)}"
        return f"{show(self._n)}{total} {'' if self._unit == BYTES else self._unit}".rstrip()

    def _seconds_to_go(self, now: float) -> float | None:
        """None where the total is unknown or reached, or nothing was done in this run."""
        done = self._n - self._initial
        if self._total is None or done <= 0 or self._n >= self._total:
            return None
        each = (self._advanced - self.began) / done
        missing = self._total - self._n
        # what is under way takes at least as long as it has taken
        return max(missing * each - (now - self._advanced), (missing - 1) * each)


class Display:
    """Where steps are shown.

    Args:
        stream: to write to; stderr, as it is then, by default.
        clock: seconds.
        ticks: rewrites what is shown from a thread, twice a second.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        ticks: bool = True,
    ) -> None:
        self.clock = clock
        self._given, self._ticks = stream, ticks
        self._lock = threading.RLock()
        self._steps: list[Step] = []
        self._written = -_LINE_SECONDS
        self._drawn = ""
        self._is_open = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, step: Step) -> None:
        """Begins to show a step, inside of those that are open."""
        with self._lock:
            if not self._steps:
                self._written = self.clock()
            self._steps.append(step)
            self._is_open.set()
            if self._ticks and self._thread is None:
                self._thread = threading.Thread(target=self._tick, daemon=True)
                self._thread.start()

    def close(self, step: Step) -> None:
        """Ends a step with a last line."""
        with self._lock:
            self._steps.remove(step)
            if not self._steps:
                self._is_open.clear()
            text = step.text(self.clock())
            if self._is_terminal:
                self._erase()
                if not step.brief:
                    self._write(text + "\n")
            elif not step.brief or (step.was_shown and not self._steps):
                self._write(text + "\n")

    def changed(self) -> None:
        """Shows the open steps anew, if it is time to."""
        with self._lock:
            now = self.clock()
            least = _SOON_SECONDS if self._is_terminal else _FIRST_SECONDS
            shown = [s for s in self._steps if not s.brief or now - s.began >= least]
            if not shown:
                return
            line = " > ".join(s.text(now) for s in shown)
            if self._is_terminal:
                if now - self._written >= _DRAW_SECONDS:
                    self._written = now
                    self._draw(line)
                return
            is_new = any(
                not (s.was_shown or s.was_announced) and now - s.began >= _FIRST_SECONDS
                for s in shown
                if not s.brief or s is self._steps[0]
            )
            if is_new or now - self._written >= _LINE_SECONDS:
                self._written = now
                for step in shown:
                    step.was_shown = True
                self._write(line + "\n")

    def announce(self, name: str) -> None:
        """Shows the name of a step that was opened."""
        with self._lock:
            if self._is_terminal:
                self._draw(name)
            else:
                self._write(name + "\n")

    def say(self, text: str) -> None:
        """Writes lines beside what is shown."""
        with self._lock:
            self._erase()
            self._write(text + "\n")

    @property
    def _stream(self) -> TextIO:
        return self._given or sys.stderr

    @property
    def _is_terminal(self) -> bool:
        return self._stream.isatty()

    def _draw(self, line: str) -> None:
        width = 80
        with suppress(OSError, ValueError):
            width = os.get_terminal_size(self._stream.fileno()).columns or width
        if len(line) >= width:
            line = "…" + line[-(width - 2) :]
        self._write("\r" + line + " " * (len(self._drawn) - len(line)))
        self._drawn = line

    def _erase(self) -> None:
        if self._drawn:
            self._write("\r" + " " * len(self._drawn) + "\r")
            self._drawn = ""

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads it any more: the work goes on
            self._stream.write(text)
            self._stream.flush()

    def _tick(self) -> None:
        while True:
            self._is_open.wait()
            time.sleep(_TICK_SECONDS)
            self.changed()


_display: Display | None = None
_standard = Display()


def show_progress(shown: bool | Display) -> None:
    """Shows the steps of this process from here on, or hides them, as at first."""
    global _display
    if isinstance(shown, Display):
        _display = shown
    elif not shown:
        _display = None
    elif _display is None:
        _display = _standard


def step(
    name: str,
    total: int | None = None,
    *,
    initial: int = 0,
    unit: str = "",
    brief: bool = False,
    shown: bool | None = None,
) -> Step:
    """Opens a step, see `Step`.

    Args:
        name: as there, like the others.
        total: of the count, if known.
        initial: of the total, done before.
        unit: what is counted, in the plural.
        brief: shown only where it takes long.
        shown: whether it is; by default where the process shows progress.
    """
    display = _display if shown is None else (_display or _standard) if shown else None
    return Step(display, name, total, initial=initial, unit=unit, brief=brief)


def waiting(name: str) -> Step:
    """Opens a step without a count, shown where it takes long."""
    return step(name, brief=True)


def stepping(
    items: Collection[T],
    name: str,
    *,
    total: int | None = None,
    initial: int = 0,
    unit: str = "",
    brief: bool = False,
    shown: bool | None = None,
) -> Iterator[T]:
    """Yields items, and shows a step that counts them.

    Args:
        items: what is counted.
        name: of the step.
        total: of the count; the number of items and of those before, by default.
        initial: items done before.
        unit: what the items are, in the plural.
        brief: as of `step`.
        shown: as of `step`.
    """
    total = initial + len(items) if total is None else total
    with step(name, total, initial=initial, unit=unit, brief=brief, shown=shown) as counted:
        for item in items:
            yield item
            counted.update()


def say(text: str) -> None:
    """Writes lines on stderr beside the steps, where the process shows progress."""
    if _display is not None:
        _display.say(text)
