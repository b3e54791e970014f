"""Who searches a folder, with real processes."""

import signal
import subprocess
import sys
import time

import pytest

from allocator.errors import StudyError
from allocator.study.folder_lock import search_lock

SEARCH = """
import sys, time
from pathlib import Path
from allocator.errors import StudyError
from allocator.study.folder_lock import search_lock
folder, join, begin = Path(sys.argv[1]), sys.argv[2] == "join", float(sys.argv[3])
time.sleep(max(0, begin - time.time()))
try:
    with search_lock(folder, join=join) as lock:
        time.sleep(0.05)
        lock.ready()
        print("exclusive" if lock.exclusive_start else "joined", flush=True)
        sys.stdin.read()
except StudyError as error:
    print(error, flush=True)
"""


def python(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def stop(process, how=signal.SIGKILL):
    if how is not None:
        process.send_signal(how)
    process.communicate()


def test_kill_9_frees_the_folder(tmp_path):
    first = python(SEARCH, tmp_path, "alone", 0)
    assert first.stdout.readline() == "exclusive\n"
    with (
        pytest.raises(StudyError, match=rf"searched by pid {first.pid} since .*--join"),
        search_lock(tmp_path),
    ):
        pass
    stop(first)
    with search_lock(tmp_path) as lock:
        assert lock.exclusive_start


def test_join_and_the_last_one_leaves(tmp_path):
    first = python(SEARCH, tmp_path, "alone", 0)
    assert first.stdout.readline() == "exclusive\n"
    second = python(SEARCH, tmp_path, "join", 0)
    assert second.stdout.readline() == "joined\n"
    stop(first, None)  # ends of itself: stdin closes
    with (
        pytest.raises(StudyError, match=rf"pid {second.pid} since \S+; add"),
        search_lock(tmp_path),
    ):
        pass
    with search_lock(tmp_path, join=True) as lock:
        assert not lock.exclusive_start
    stop(second)
    with search_lock(tmp_path, join=True) as lock:
        assert lock.exclusive_start


@pytest.mark.parametrize("how", ["alone", "join"])
def test_starters_at_once(tmp_path, how):
    begin = time.time() + 1
    starters = [python(SEARCH, tmp_path, how, begin) for _ in range(3)]
    said = [starter.stdout.readline() for starter in starters]
    for starter in starters:
        stop(starter)
    assert said.count("exclusive\n") == 1
    others = [line for line in said if line != "exclusive\n"]
    assert all(line == "joined\n" if how == "join" else "--join" in line for line in others)


def test_nobody_joins_before_ready(tmp_path):
    with search_lock(tmp_path) as lock:
        for join in (False, True):
            with (
                pytest.raises(StudyError, match="has been starting"),
                search_lock(tmp_path, join=join, start_seconds=0.1),
            ):
                pass
        lock.ready()
        with search_lock(tmp_path, join=True) as second:
            assert not second.exclusive_start
    with search_lock(tmp_path) as lock:  # and a block that ends without `ready` frees both
        assert lock.exclusive_start
    with search_lock(tmp_path) as lock:
        assert lock.exclusive_start


def test_folder_must_exist(tmp_path):
    with pytest.raises(StudyError, match="No such file"), search_lock(tmp_path / "missing"):
        pass
