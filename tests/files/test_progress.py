"""Progress, against a clock that the test moves."""

import importlib
import io
import sys

import pytest

from allocator.files.loading import show_loading
from allocator.files.progress import BYTES, Display, Step, show_progress, step, stepping, waiting


class Shown(io.StringIO):
    """A stream with a clock."""

    def __init__(self, terminal=False):
        super().__init__()
        self.now, self.terminal = 0.0, terminal

    def isatty(self):
        return self.terminal

    @property
    def lines(self):
        return self.getvalue().splitlines()


@pytest.fixture
def pipe():
    stream = Shown()
    stream.display = Display(stream, clock=lambda: stream.now, ticks=False)
    show_progress(stream.display)
    yield stream
    show_progress(False)


def test_hidden_steps_write_nothing(capfd):
    show_progress(False)  # whatever a test before this one has shown
    with step("search", 3), waiting("lock") as waits:
        waits.update()
    assert list(stepping([1, 2], "layers")) == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_a_step_that_stands_still_shows_a_line_after_two_seconds_and_then_every_ten(pipe):
    with step("curvature", 8, unit="documents"):
        for pipe.now in range(35):
            pipe.display.changed()
    assert [line.split(", ")[1] for line in pipe.lines] == ["2 s", "12 s", "22 s", "32 s", "34 s"]
    assert all(line.startswith("curvature: 0/8 documents, ") for line in pipe.lines)


def test_time_to_go_is_of_the_work_done_in_this_run(pipe):
    with step("measuring", 10, initial=4, unit="changes") as measuring:
        pipe.now = 6.0
        measuring.update(2)  # 3 s each
        assert measuring.text(6.0) == "measuring: 6/10 changes, 6 s, 12 s to go"
        assert measuring.text(8.0) == "measuring: 6/10 changes, 8 s, 10 s to go"
        assert measuring.text(60.0).endswith(", 9 s to go")  # the one under way is nearly done


def test_waits_are_shown_only_where_they_take_long(pipe):
    with step("search", 2, unit="trials"):
        with waiting("short"):
            pipe.now += 1.0
            pipe.display.changed()
        with waiting("another process measures"):
            for _ in range(4):
                pipe.now += 3.0
                pipe.display.changed()
    with waiting("nobody else"):
        pipe.now += 3.0
        pipe.display.changed()
    assert pipe.lines == [
        "search: 0/2 trials, 4 s > another process measures: 3 s",
        "search: 0/2 trials, 13 s",
        "nobody else: 3 s",
        "nobody else: 3 s",
    ]


def test_an_announced_wait_is_one_line_and_more_where_it_takes_long(pipe):
    for seconds in (5, 12):
        with waiting("loading torch") as loading:
            loading.announce()
            for _ in range(seconds):
                pipe.now += 1.0
                pipe.display.changed()
    assert pipe.lines == [
        "loading torch", "loading torch", "loading torch: 10 s", "loading torch: 12 s"
    ]  # fmt: skip


def test_a_brief_wait_is_on_a_terminal_after_half_a_second_or_once_announced_and_goes_away():
    stream = Shown(terminal=True)
    display = Display(stream, clock=lambda: stream.now, ticks=False)
    for seconds, announced in ((0.4, False), (0.6, False), (0.4, True)):
        wait = Step(display, "lock", None, initial=0, unit="", brief=True)
        if announced:
            wait.announce()
        stream.now += seconds
        display.changed()
        wait.close()
    assert stream.getvalue() == "\rlock: 1 s\r         \r" + "\rlock\r    \r"


def test_the_first_import_of_a_slow_library_is_shown_and_looking_for_it_is_not(
    pipe, tmp_path, monkeypatch
):
    (tmp_path / "slow_library").mkdir()
    (tmp_path / "slow_library/__init__.py").write_text("data = __spec__.loader.get_data(__file__)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    n_finders = len(sys.meta_path)
    for _ in range(2):
        show_loading("slow_library")
    assert len(sys.meta_path) == n_finders + 1
    assert importlib.util.find_spec("slow_library").origin.startswith(str(tmp_path))
    assert pipe.lines == []
    for _ in range(2):
        assert importlib.import_module("slow_library").data.startswith(b"data")
    del sys.modules["slow_library"]
    assert pipe.lines == ["loading slow_library"]


def test_a_terminal_has_one_line_that_is_written_over():
    stream = Shown(terminal=True)
    display = Display(stream, clock=lambda: stream.now, ticks=False)
    writing = Step(display, "writing", 4 << 30, initial=0, unit=BYTES, brief=False)
    for _ in range(3):
        stream.now += 5.0
        writing.update(1 << 30)
    writing.close()
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 5  # three times drawn, once erased
    assert stream.lines[-1].startswith("writing: 3.00 GiB/4.00 GiB, 15 s")
