"""`search --workers` and `--join`: real processes on a real study, killed and stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from allocator import api
from allocator.app.search_stage import close_dead
from allocator.app.study_folder import StudyFolder
from allocator.errors import StudyError
from allocator.study.leases import LEASE
from allocator.study.storages import reaching
from allocator.study.trials import PROPOSAL, allocation_of, forward_tokens, not_abandoned

BRIEF = (
    "import signal, sys; from functools import partial; from allocator import api;"
    "api.search = partial(api.search, lease_seconds=3.0);"
    "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a background job ignores it
    "from allocator.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture
def fresh(fresh_study, finished_study, tmp_path):
    """A study whose profile is there."""
    return shutil.copytree(fresh_study, tmp_path / "study")


@pytest.fixture
def search(fresh, study_cache):
    """`search(...)`: the CLI in a process, which ends with the test."""
    started = []

    def start(*options):
        process = subprocess.Popen(
            [sys.executable, "-c", BRIEF, "search", fresh, "--cache", study_cache,
             "--threads", "2", "--sampler", "random", "--quiet", *map(str, options)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def trials(fresh, opened):
    """`trials(spec)`: of the study in a storage, none before there is one."""
    storages = {}

    def read(spec):
        if spec is None and not (fresh / "journal").exists():
            return []
        if spec not in storages:
            storages[spec] = opened(spec, fresh)
        try:
            name = "study" if spec is None else fresh.name
            return optuna.load_study(study_name=name, storage=storages[spec]).get_trials()
        except KeyError:
            return []

    return read


def kept(found):
    return [t for t in found if not (t.state is TrialState.FAIL and "abandoned" in t.user_attrs)]


def check(found, n):
    """Exactly `n` proposals, none lost, none made twice."""
    assert all(t.state.is_finished() for t in found)
    assert sorted(t.system_attrs[PROPOSAL] for t in kept(found)) == list(range(n))
    assert len({allocation_of(t).digest for t in kept(found)}) == n


def wait_for(true, *processes, seconds=90):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes), processes[0].communicate()
        time.sleep(0.02)
    return found


def at_work(found):
    """Pids of the workers that have a trial in hand."""
    running = (t for t in found if t.state is TrialState.RUNNING and LEASE in t.user_attrs)
    return {t.user_attrs[LEASE]["owner"]["pid"] for t in running}


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow  # tests/study/test_leases.py has its parts
def test_three_join_on_postgresql_and_one_is_killed(search, trials, postgresql):
    options = ("--join", "--storage", postgresql, "--trials", 24)
    workers = [search(*options) for _ in range(3)]
    victim = workers[1]
    wait_for(lambda: victim.pid in at_work(trials(postgresql)), victim)
    victim.kill()
    for worker in (workers[0], workers[2]):
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        assert "pick:" in out
    check(trials(postgresql), 24)
    owners = {t.user_attrs[LEASE]["owner"]["pid"] for t in kept(trials(postgresql))}
    assert {workers[0].pid, workers[2].pid} <= owners


def test_workers_go_on_when_one_is_killed(search, trials, fresh):
    parent = search("--workers", 2, "--trials", 24)
    victim = min(wait_for(lambda: at_work(trials(None)), parent))
    os.kill(victim, signal.SIGKILL)
    out, err = parent.communicate(timeout=120)
    assert parent.returncode == 0, err
    assert f"worker {victim} was killed (signal 9)" in out
    check(trials(None), 24)
    assert sum(map(int, re.findall(r"(\d+) (?:COMPLETE|PRUNED|FAIL)", out))) == 24
    assert len(json.loads((fresh / "front.json").read_text())["trials"]) == 24
    assert (fresh / "allocations/pick.json").exists()
    owners = {t.user_attrs[LEASE]["owner"]["pid"] for t in kept(trials(None))}
    assert not owners & {parent.pid}  # which only watched


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_workers_end_with_their_parent(search, trials, fresh, study_cache, how):
    parent = search("--workers", 2, "--trials", 5000)
    workers = wait_for(lambda: (w := at_work(trials(None))) and len(w) == 2 and w, parent)
    parent.send_signal(how)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == (130 if how is signal.SIGINT else -how)
    assert len(err.splitlines()) == (how is signal.SIGINT)
    wait_for(lambda: not any(map(is_alive, workers)), seconds=20)
    done = sum(t.state.is_finished() for t in trials(None))
    options = {"sampler": "random", "cache": study_cache, "threads": 1}
    result = api.search(fresh, trials=done + 3, **options)
    died = any("of a search that died; proposing them again" in m for m in result.messages)
    assert died == (how is signal.SIGKILL)  # a Ctrl-C closes them at once
    check(trials(None), done + 3)


@pytest.mark.slow  # its line is that of a lost database below, its end that of a killed worker
def test_a_failing_worker_stops_the_search_with_its_line(search, trials, postgresql):
    """The database goes away under all of them."""
    import psycopg

    parent = search("--workers", 2, "--trials", 5000, "--storage", postgresql)
    workers = wait_for(lambda: (w := at_work(trials(postgresql))) and len(w) == 2 and w, parent)
    host = postgresql.partition("host=")[2]
    name = re.search(r"/(\w+)\?", postgresql)[1]
    with psycopg.connect(host=host, user="postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 2, out + err
    assert err.splitlines()[-1].startswith("allocator search: storage postgresql+psycopg://")
    assert "Traceback" not in err
    wait_for(lambda: not any(map(is_alive, workers)), seconds=20)


@pytest.mark.slow
def test_a_proxy_that_dies_stops_the_search_with_its_line(search, trials, grpc_server):
    spec, server = grpc_server
    parent = search("--workers", 2, "--trials", 5000, "--storage", spec)
    workers = wait_for(lambda: (w := at_work(trials(spec))) and len(w) == 2 and w, parent)
    server.kill()
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 2, out + err
    assert err.splitlines()[-1].startswith(f"allocator search: storage {spec}: ")
    assert "Traceback" not in err
    wait_for(lambda: not any(map(is_alive, workers)), seconds=20)


def test_a_lost_database_is_one_line_without_its_password(tmp_path):
    from optuna.exceptions import StorageInternalError

    url = "postgresql+psycopg://me:secret@host/db"
    line = r"me:\*\*\*@host/db: server closed"
    with pytest.raises(StudyError, match=line) as caught, reaching(url):
        raise StorageInternalError("commit") from OSError("server closed\nmore")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.slow  # tests/study/test_leases.py has it, of processes that score a formula
def test_tokens_hold_for_workers(fresh, study_cache, shared):
    options = {"cache": study_cache, "threads": 2}
    study_folder = StudyFolder(fresh, **options)
    given = study_folder.base_tokens + 6 * study_folder.scorers.trials.n_tokens
    given += 5 * study_folder.scorers.selection.n_tokens  # the pick
    result = api.search(
        fresh, sampler="random", tokens=given, workers=2, storage=shared("sqlite"), **options
    )
    spent = sum(map(forward_tokens, not_abandoned(result.study)))
    one_trial = study_folder.scorers.trials.n_tokens
    assert 5 * one_trial < spent <= 6 * one_trial


def test_a_shared_storage_keeps_trials_of_living_workers_elsewhere(fresh, study_cache, tmp_path):
    """An exclusive start on this machine says nothing of other machines."""
    spec = f"journal:{tmp_path}/shared"
    options = {"cache": study_cache, "threads": 1, "storage": spec, "sampler": "random"}
    study = api.search(fresh, trials=3, **options).study
    elsewhere, here = study.ask(), study.ask()
    for trial, host in ((elsewhere, "elsewhere"), (here, os.uname().nodename)):
        owner = {"host": host, "folder": str(fresh.resolve()), "pid": 1, "token": ""}
        trial.set_user_attr(LEASE, {"owner": owner, "seconds": 3600.0, "renewal": 1})
    assert close_dead(study, spec, fresh) == 1
    states = [t.state for t in study.get_trials()[-2:]]
    assert states == [TrialState.RUNNING, TrialState.FAIL]
    assert close_dead(study, None, fresh) == 1


BUILD = """
import sys
from pathlib import Path
from allocator.profiling.profiler import Profiler
from allocator.app.study_folder import StudyFolder
build, built = Profiler.build, []
Profiler.build = lambda self: built.append(0) or build(self)
print("ready", flush=True)
sys.stdin.readline()
StudyFolder(Path(sys.argv[1]), cache=Path(sys.argv[2]), threads=1).profile
print(len(built), flush=True)
"""


def test_of_two_processes_one_builds_the_profile(fresh_study, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, fresh_study, tmp_path / "cache"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [p.stdout.readline() for p in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sorted(p.communicate(timeout=120)[0] for p in processes) == ["0\n", "1\n"]
