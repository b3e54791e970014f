"""The journal's checksums and its lock, between real processes.

The yardsticks are Optuna's own journal on the same file, and a checksum made by hand.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from allocator.errors import StudyError
from allocator.study.storages import open_storage

QUIET = "optuna.logging.set_verbosity(optuna.logging.ERROR)"


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def stock(path):
    return JournalStorage(JournalFileBackend(str(path)))


def add(study, n):
    for i in range(n):
        trial = study.ask({"x": FloatDistribution(0, 1)})
        trial.set_user_attr("note", f"é {i}")
        study.tell(trial, i / 8)


@pytest.fixture
def ours(tmp_path):
    """A study of three trials in a journal of ours."""
    study = optuna.create_study(study_name="s", storage=open_storage(None, tmp_path))
    add(study, 3)
    return study


@pytest.fixture
def path(ours, tmp_path):
    """Its journal."""
    return tmp_path / "journal"


def by_hand(record):
    """The checksum of a record: sha256 of its other keys, sorted, without spaces."""
    others = {k: v for k, v in record.items() if k != "checksum"}
    body = json.dumps(others, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(b"\n" + body.encode()).hexdigest()[:32]


def change(path, number, old, new):
    """Replaces bytes in a line, numbered from 1; the length stays."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[number - 1].count(old) == 1
    assert len(old) == len(new)
    lines[number - 1] = lines[number - 1].replace(old, new)
    with path.open("r+b") as file:  # the same file, as a disk damages it
        file.write(b"".join(lines))


def line_with(path, text):
    """The number of the first line, from 1, that holds these bytes."""
    lines = path.read_bytes().splitlines()
    return next(n for n, line in enumerate(lines, start=1) if text in line)


def test_every_line_carries_its_checksum(path):
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(records) >= 1 + 3 * 3
    assert [r["checksum"] for r in records] == [by_hand(r) for r in records]


def test_stock_optuna_sees_the_same_trials_and_appends(ours, path):
    theirs = optuna.load_study(study_name="s", storage=stock(path))
    assert theirs.trials == ours.trials
    add(theirs, 1)
    trial = theirs.ask()
    trial.report(0.5, step=1)
    trial.storage.set_trial_system_attr(trial._trial_id, "y", 1)
    theirs.tell(trial, 0.5)
    theirs.set_user_attr("z", 2)
    theirs.add_trial(theirs.trials[0])  # whose record has all of a trial's keys
    assert b"checksum" not in path.read_bytes().splitlines()[-1]
    again = optuna.load_study(study_name="s", storage=open_storage(None, path.parent))
    assert len(ours.trials) == 6
    assert again.trials == ours.trials == theirs.trials
    add(again, 1)
    assert len(optuna.load_study(study_name="s", storage=stock(path)).trials) == 7


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"values":[0.125]', b'"values":[0.135]'),
        (b'"note":"\\u00e9 1"', b'"note":"\\u00e9 3"'),
        (b'"trial_id":1,"state":1', b'"trial_id":0,"state":1'),
    ],
)
def test_a_changed_value_is_refused_by_line_when_opened(path, old, new):
    number = line_with(path, old)
    change(path, number, old, new)
    data = path.read_bytes()
    with pytest.raises(StudyError, match=rf"journal: line {number} is no record \(its ch") as e:
        open_storage(None, path.parent)
    assert "\n" not in str(e.value)
    assert path.read_bytes() == data


def test_a_changed_value_is_refused_by_line_during_a_search(ours, path):
    """The line was appended by another process, and not read yet."""
    other = optuna.load_study(study_name="s", storage=open_storage(None, path.parent))
    n_before = len(path.read_bytes().splitlines())
    add(other, 1)
    number = line_with(path, b'"trial_id":3,"state":1')
    assert number > n_before
    change(path, number, b'"values":[0.0]', b'"values":[1.0]')
    for use in (lambda: ours.trials, lambda: add(ours, 1)):
        with pytest.raises(StudyError, match=rf"journal: line {number} is no record") as e:
            use()
        assert "\n" not in str(e.value)


def test_a_damaged_name_of_the_checksum_is_refused(path):
    number = line_with(path, b'"values":[0.125]')
    change(path, number, b'"checksum"', b'"checksul"')
    with pytest.raises(StudyError, match=rf"line {number} is no record \(no checksum.*checksul"):
        open_storage(None, path.parent)


def test_a_flipped_bit_never_shows_other_trials(ours, path):
    """Any bit of a line in the middle."""
    whole, wanted = path.read_bytes(), ours.trials
    start = whole.index(b"\n", len(whole) // 3) + 1
    stop = whole.index(b"\n", start)
    n_refused = 0
    for at in range(start, stop):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            again = optuna.load_study(study_name="s", storage=open_storage(None, path.parent))
            assert again.trials == wanted
        except StudyError as error:
            n_refused += f"line {whole[:start].count(10) + 1} is no record" in str(error)
    assert n_refused == stop - start


@pytest.mark.parametrize("how", ["deleted", "replaced"])
@pytest.mark.parametrize("use", ["read", "append"])
def test_a_journal_that_goes_during_a_search_is_one_line(ours, path, how, use):
    copy = path.read_bytes()
    path.unlink()
    if how == "replaced":
        path.with_name("new").write_bytes(copy)
        path.with_name("new").rename(path)
    with pytest.raises(StudyError, match=r"journal: removed or replaced while a search") as e:
        len(ours.trials) if use == "read" else add(ours, 1)
    assert "\n" not in str(e.value)
    if how == "deleted":
        assert not path.exists()
    else:
        assert path.read_bytes() == copy
        add(optuna.load_study(study_name="s", storage=open_storage(None, path.parent)), 1)


@pytest.mark.parametrize("use", ["read", "write"])
def test_a_journal_deleted_right_after_it_was_checked_is_refused(ours, path, monkeypatch, use):
    real = os.stat

    def deleting(name, *args, **kwargs):
        result = real(name, *args, **kwargs)
        if str(name) == str(path):
            path.unlink(missing_ok=True)
        return result

    monkeypatch.setattr(os, "stat", deleting)
    with pytest.raises(StudyError, match=r"journal: removed or replaced while a search"):
        len(ours.trials) if use == "read" else add(ours, 1)


def test_a_link_that_somebody_removed_is_no_error(ours, path, monkeypatch):
    """Removed between the append's begin and its end, every time."""
    lock, real = path.with_name("journal.lock"), os.fsync

    def removing(fd):
        lock.unlink(missing_ok=True)
        real(fd)

    monkeypatch.setattr(os, "fsync", removing)
    add(ours, 2)
    assert not os.path.lexists(lock)
    assert len(optuna.load_study(study_name="s", storage=stock(path)).trials) == 5


def test_a_link_that_another_made_meanwhile_stays(ours, path, monkeypatch):
    lock, real = path.with_name("journal.lock"), os.fsync

    def taking(fd):
        lock.unlink()
        lock.symlink_to("somebody")
        monkeypatch.setattr(os, "fsync", real)
        real(fd)

    monkeypatch.setattr(os, "fsync", taking)
    ours.set_user_attr("x", 1)
    assert os.readlink(lock) == "somebody"


# -- real processes

REMOVE = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
removed = 0
try:
    while True:
        try:
            os.unlink(sys.argv[1])
            removed += 1
        except FileNotFoundError:
            pass
        time.sleep(0.0003)
except KeyboardInterrupt:
    print(removed)
"""
APPEND = f"""
import sys
from pathlib import Path
import optuna
from allocator.study.storages import open_storage
{QUIET}
study = optuna.load_study(study_name="s", storage=open_storage(None, Path(sys.argv[1])))
for n in range(int(sys.argv[2])):
    study.add_trial(optuna.trial.create_trial(value=float(n)))
"""


@pytest.fixture
def process():
    """`process(code, *arguments)`: Python in a process that ends with the test."""
    started = []

    def start(*arguments):
        made = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(made)
        return made

    yield start
    for made in started:
        made.kill()
        made.communicate()


def stopped(remover):
    """How many links a remover has removed."""
    remover.send_signal(2)
    out, err = remover.communicate()
    assert not err
    return int(out)


def test_two_write_while_somebody_removes_the_link(ours, path, process):
    remover = process("-c", REMOVE, path.with_name("journal.lock"))
    writers = [process("-c", APPEND, path.parent, 150) for _ in range(2)]
    for writer in writers:
        _, err = writer.communicate()
        assert (writer.returncode, err) == (0, "")
    assert stopped(remover) > 0
    assert len(optuna.load_study(study_name="s", storage=stock(path)).trials) == 3 + 300
    assert not list(path.parent.glob("journal.torn-*"))


@pytest.mark.slow  # twelve processes that load torch
def test_two_searches_of_two_workers_and_a_remover(
    fresh_study, finished_study, study_cache, tmp_path, process
):
    """They start again and again on one folder; nobody ends in a traceback, no trial is lost."""
    folder = shutil.copytree(fresh_study, tmp_path / "study")
    remover = process("-c", REMOVE, folder / "journal.lock")
    for n_trials in (6, 12):
        searches = [
            process(
                "-m", "allocator", "search", folder, "--cache", study_cache, "--threads", 1,
                "--sampler", "random", "--quiet", "--join", "--workers", 2, "--trials", n_trials,
            )
            for _ in range(2)
        ]  # fmt: skip
        for search in searches:
            out, err = search.communicate(timeout=300)
            assert search.returncode == 0, err
            assert "Traceback" not in err
            assert "did not possess" not in err
            assert "pick:" in out
    assert stopped(remover) > 0
    trials = optuna.load_study(study_name="study", storage=stock(folder / "journal")).trials
    assert sum(t.state.is_finished() and "abandoned" not in t.user_attrs for t in trials) == 12


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_search_whose_journal_is_deleted_is_one_line(
    fresh_study, finished_study, study_cache, tmp_path, process, workers
):
    folder = shutil.copytree(fresh_study, tmp_path / "study")
    search = process(
        "-m", "allocator", "search", folder, "--cache", study_cache, "--threads", 1,
        "--sampler", "random", "--quiet", "--workers", workers, "--trials", 400,
    )  # fmt: skip
    path = folder / "journal"
    while not (path.exists() and path.read_bytes().count(b'"losses"') > 2):
        assert search.poll() is None, search.communicate()
        time.sleep(0.02)
    path.unlink()
    _, err = search.communicate(timeout=120)
    assert search.returncode == 2, err
    assert "Traceback" not in err
    assert "did not possess" not in err
    assert "removed or replaced while a search was using it" in err
