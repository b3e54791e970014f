"""A journal survives being cut at any byte, and kill -9 while it is written.

The yardstick is Optuna's own journal, opened without our lock or repairs.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState, create_trial

from allocator.errors import StudyError
from allocator.study.folder_lock import search_lock
from allocator.study.journal import mend_journal, open_journal, remove_stale_lock
from allocator.study.storages import mend_storage, open_storage, reaching

FORMATS = CategoricalDistribution(["Q8_0", "Q4_K", "IQ2_XXS"])


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    """The bytes of a journal that Optuna alone wrote: asked, told, failed and added trials."""
    path = tmp_path_factory.mktemp("written") / "journal"
    study = optuna.create_study(
        study_name="s", storage=stock(path), directions=["minimize", "minimize"]
    )
    for n in range(3):
        trial = study.ask({"format.0": FORMATS})
        trial.set_user_attr("digest", f"sha256:{n}")
        study.tell(trial, [float(n), 0.5])
    study.tell(study.ask(), state=TrialState.FAIL)
    study.add_trial(added(7.0))
    trial = study.ask({"format.0": FORMATS})
    study.tell(trial, [8.0, 0.1])
    return path.read_bytes()


def stock(path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def added(value):
    return create_trial(
        params={"format.0": "Q4_K"},
        distributions={"format.0": FORMATS},
        values=[value, 1.0],
        user_attrs={"note": "é"},
    )


def finished(store) -> dict[int, optuna.trial.FrozenTrial]:
    trials = optuna.load_study(study_name="s", storage=store).trials
    return {trial.number: trial for trial in trials if trial.state.is_finished()}


def n_finished(data: bytes) -> int:
    """Trials that the whole lines of `data` finish: a state set to, or created as, not RUNNING."""
    lines = [json.loads(line) for line in data.splitlines(keepends=True) if line[-1:] == b"\n"]
    return sum(record["op_code"] in (4, 6) and record.get("state", 0) > 0 for record in lines)


def last_two_records(data: bytes) -> range:
    lines = data.splitlines(keepends=True)
    return range(len(data) - len(lines[-1]) - len(lines[-2]), len(data) + 1)


def in_memory(monkeypatch):
    """Hundreds of cuts: the order of bytes is what is tested here, not the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.mark.parametrize(
    ("ends_in", "repaired_by"),
    [("told trial", "append"), ("added trial", "start")],
)
def test_cut_at_every_byte(written, tmp_path, monkeypatch, ends_in, repaired_by):
    in_memory(monkeypatch)
    if ends_in == "added trial":
        end = written.index(b"\n", written.index(b'"values":[7.0')) + 1
        written = written[:end]
    whole_path = tmp_path / "whole"
    whole_path.write_bytes(written)
    before = finished(stock(whole_path))
    for cut in last_two_records(written):
        folder = tmp_path / str(cut)
        folder.mkdir()
        path = folder / "journal"
        path.write_bytes(written[:cut])
        start_of_last_line = written.rfind(b"\n", 0, cut) + 1
        torn = written[start_of_last_line:cut]
        lacks_newline_only = written[cut : cut + 1] == b"\n"

        if repaired_by == "start":
            shown = mend_journal(path)
            assert (shown is None) == (not torn)
            assert mend_journal(path) is None
        study = optuna.load_study(study_name="s", storage=open_storage(None, folder))
        study.add_trial(added(9.0))

        after = finished(stock(path))
        survivors = {n: t for n, t in after.items() if t.values != [9.0, 1.0]}
        expected = dict(list(before.items())[: len(survivors)])
        assert survivors == expected
        assert len(survivors) == n_finished(written[: cut + lacks_newline_only])
        assert len(after) == len(survivors) + 1
        assert finished(open_storage(None, folder)) == after
        kept = [p.read_bytes() for p in folder.glob("journal.torn-*")]
        assert kept == ([torn] if torn and not lacks_newline_only else [])
        assert path.read_bytes().startswith(written[: cut if lacks_newline_only else 0])


def test_tails_are_numbered(written, tmp_path):
    path = tmp_path / "journal"
    for tail in (b'{"op_', b'{"op_code":5,"x', b"\0\0\0", b"[1, 2]\n", b"\n", b"\xff\xfe\n"):
        path.write_bytes(written + tail)
        assert "torn" in mend_journal(path)
        assert path.read_bytes() == written
    kept = [(tmp_path / f"journal.torn-{n}").read_bytes() for n in range(1, 7)]
    assert kept == [b'{"op_', b'{"op_code":5,"x', b"\0\0\0", b"[1, 2]\n", b"\n", b"\xff\xfe\n"]


def test_tail_is_on_the_disk_before_the_cut(written, tmp_path, monkeypatch):
    """Dies at every system call of a repair in turn: the journal or the copy has the tail."""
    in_memory(monkeypatch)
    path = tmp_path / "journal"
    calls = ["fsync", "rename", "open"]

    class KillError(Exception):
        pass

    def dying(real, countdown):
        def call(*args, **kwargs):
            countdown[0] -= 1
            if countdown[0] < 0:
                raise KillError
            return real(*args, **kwargs)

        return call

    for allowed in range(10):
        for old in tmp_path.iterdir():
            old.unlink()
        path.write_bytes(written + b'{"op_code":6,')
        countdown = [allowed]
        with monkeypatch.context() as patched:
            for name in calls:
                patched.setattr(os, name, dying(getattr(os, name), countdown))
            try:
                mend_journal(path)
                break
            except KillError:
                pass
        kept = [p.read_bytes() for p in tmp_path.glob("journal.torn-[0-9]*")]
        assert path.read_bytes() == written + b'{"op_code":6,' or kept == [b'{"op_code":6,']
        mend_journal(path)
        assert path.read_bytes() == written
    assert allowed > 3  # the countdown did reach into the repair


def test_long_last_record(written, tmp_path):
    long = b'{"op_code":8,"worker_id":"w","trial_id":5,"user_attr":{"x":"' + b"a" * 300_000
    path = tmp_path / "journal"
    path.write_bytes(written + long + b'"}}')
    assert "newline" in mend_journal(path)
    path.write_bytes(path.read_bytes() + long)
    assert f"{len(long)} bytes" in mend_journal(path)
    assert path.read_bytes() == written + long + b'"}}\n'


def n_read():
    """Bytes that this process has read from anywhere."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_repair_reads_only_the_tail(written, tmp_path, monkeypatch):
    in_memory(monkeypatch)
    path = tmp_path / "journal"
    path.write_bytes(written * 1000 + b'{"op_')
    before = n_read()
    assert mend_journal(path)
    assert n_read() - before < path.stat().st_size / 5


def test_nothing_to_repair(written, tmp_path):
    path = tmp_path / "journal"
    assert mend_journal(path) is None
    assert not path.exists()
    path.touch()
    assert mend_journal(path) is None
    path.write_bytes(written)
    assert mend_journal(path) is None
    assert list(tmp_path.iterdir()) == [path]


def test_damage_in_the_middle_is_an_error(written, tmp_path):
    lines = written.splitlines(keepends=True)
    path = tmp_path / "journal"
    for damaged in (b'{"op_code":5,"wor\n', b"\n", b"17\n", b'{"op_code":5{"op_code":5}\n'):
        data = b"".join([*lines[:4], damaged, *lines[4:]])
        path.write_bytes(data)
        with pytest.raises(StudyError, match=r"journal: line 5 is no record") as error:
            open_storage(None, tmp_path)
        assert "\n" not in str(error.value)
        assert path.read_bytes() == data


def test_damage_before_a_torn_line_is_an_error(written, tmp_path):
    path = tmp_path / "journal"
    data = written + b'{"op_code":5,"wo\n{"op_co'
    path.write_bytes(data)
    n_lines = written.count(b"\n")
    with pytest.raises(StudyError, match=rf"line {n_lines + 1} is no record"):
        mend_journal(path)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_record_is_an_error(written, tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(written + b'{"op_code":99,"worker_id":"w"}\n')
    with pytest.raises(StudyError, match="cannot replay"):
        open_storage(None, tmp_path)


def open_and_append(spec, folder):
    optuna.create_study(storage=open_storage(spec, folder))


def test_foreign_file_is_never_cut(tmp_path):
    for content in (b"weights without a newline", b"SQLite format 3\0\n", b'{"a": 1'):
        path = tmp_path / "foreign"
        path.write_bytes(content)
        with pytest.raises(StudyError, match="not an Optuna journal"):
            mend_journal(path)
        with pytest.raises(StudyError, match="not an Optuna journal"):
            open_and_append(f"journal:{path}", tmp_path)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]  # Optuna's lock was given back


def test_specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optuna.create_study(study_name="s", storage=open_storage(None, Path("."))).add_trial(
        create_trial(value=1.0)
    )
    assert len(finished(stock(tmp_path / "journal"))) == 1
    assert len(finished(open_storage("journal:journal", tmp_path / "elsewhere"))) == 1
    sqlite = open_storage(f"sqlite:///{tmp_path}/trials.db", tmp_path)
    assert isinstance(sqlite, RDBStorage)
    assert sqlite.heartbeat_interval is None
    optuna.create_study(study_name="s", storage=sqlite).add_trial(create_trial(value=1.0))
    again = open_storage(f"sqlite:///{tmp_path}/trials.db", tmp_path)
    assert len(finished(again)) == 1
    assert mend_storage("sqlite:///trials.db", tmp_path) == []
    for store in (sqlite, again):
        store.remove_session()
        store.engine.dispose()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("trials.db", "needed journal:PATH or a database URL"),
        ("", "needed journal:PATH or a database URL"),
        ("journal:", "needed journal:PATH or a database URL"),
        ("journal:{tmp}/missing/journal", "needed an existing folder"),
        ("journal:{tmp}", "needed a folder and files"),
        ("sqlite:///{tmp}/missing/trials.db", "unable to open database file"),
        ("nosuchdb://host/x", "nosuchdb"),
        ("postgresql+nosuch://me:secret@127.0.0.1:1/x", r"me:\*\*\*@127"),
        ("sqlite:///{tmp}/text", "not a database"),
    ],
)
def test_bad_specs(tmp_path, spec, message):
    (tmp_path / "text").write_text("x" * 4096)
    with pytest.raises(StudyError, match=message) as error:
        open_storage(spec.format(tmp=tmp_path), tmp_path)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


# --- locks of dead processes ------------------------------------------------------------------

WRITE = """
import os, signal, sys
import optuna
from pathlib import Path
from allocator.study.folder_lock import search_lock
from allocator.study.storages import open_storage
folder = Path(sys.argv[1])
os.chdir(folder.parent)
with search_lock(Path(folder.name)) as lock:
    lock.ready()
    store = open_storage(None, Path(folder.name))
    optuna.create_study(study_name="s", storage=store)
    os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
    optuna.create_study(study_name="t", storage=store)
"""


def kill_while_it_writes(folder):
    done = subprocess.run([sys.executable, "-c", WRITE, str(folder)])
    assert done.returncode == -signal.SIGKILL


def test_killed_while_it_wrote(tmp_path):
    """kill -9 within an append leaves Optuna's lock file; it neither blocks nor dangles."""
    (tmp_path / "study").mkdir()
    kill_while_it_writes(tmp_path / "study")
    path = tmp_path / "study" / "journal"
    optuna_lock = tmp_path / "study" / "journal.lock"
    assert os.path.lexists(optuna_lock)
    assert optuna_lock.exists(), "a dangling link makes Optuna spin for ever"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with search_lock(path.parent) as lock:
        assert lock.exclusive_start
        shown = mend_storage(None, path.parent)
    assert ["removed" in shown[0], "torn" in shown[1]] == [True, True]
    begin = time.monotonic()
    study = optuna.load_study(study_name="s", storage=open_storage(None, path.parent))
    study.add_trial(create_trial(value=1.0))
    assert time.monotonic() - begin < 5  # Optuna alone waits 30 s
    assert not os.path.lexists(optuna_lock)
    assert remove_stale_lock(path) is None


def test_killed_while_it_wrote_beside_a_living_search(tmp_path):
    """Its lock goes with the next append, and what it tore is cut: nobody waits."""
    (tmp_path / "study").mkdir()
    path = tmp_path / "study" / "journal"
    living = open_storage(None, path.parent)
    kill_while_it_writes(path.parent)
    assert os.path.lexists(tmp_path / "study" / "journal.lock")
    path.write_bytes(path.read_bytes()[:-4])
    begin = time.monotonic()
    optuna.load_study(study_name="s", storage=living).add_trial(create_trial(value=1.0))
    assert time.monotonic() - begin < 5  # Optuna alone waits 30 s
    assert not os.path.lexists(tmp_path / "study" / "journal.lock")
    assert len(finished(stock(path))) == 1


def test_a_lock_of_stock_optuna_is_waited_for(tmp_path):
    path = tmp_path / "journal"
    study = optuna.create_study(storage=open_storage(None, tmp_path))
    other = JournalFileSymlinkLock(str(path))
    other.acquire()
    begin = time.monotonic()
    timer = threading.Timer(0.5, other.release)
    timer.start()
    study.add_trial(create_trial(value=1.0))
    timer.join()
    assert time.monotonic() - begin >= 0.5


def test_a_lock_that_stock_optuna_left_is_broken(tmp_path):
    path = tmp_path / "journal"
    study = optuna.create_study(storage=open_journal(path, grace_seconds=3))
    JournalFileSymlinkLock(str(path)).acquire()  # and dies
    for n in range(3):
        study.add_trial(create_trial(value=float(n)))
    assert not os.path.lexists(tmp_path / "journal.lock")
    assert len(study.trials) == 3


def test_disk_full_beside_a_living_search(written, tmp_path):
    """A torn record that appears while the storage is open is repaired by the next append."""
    path = tmp_path / "journal"
    path.write_bytes(written)
    study = optuna.load_study(study_name="s", storage=open_storage(None, tmp_path))
    n_before = len(study.trials)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    assert len(study.trials) == n_before
    study.add_trial(added(9.0))
    study.add_trial(added(10.0))
    assert len(finished(stock(path))) == n_before + 2
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize(
    "spec",
    [
        "grpc://",
        "grpc://host",
        "grpc://host:",
        "grpc://:13000",
        "grpc://host:99999999",
        "grpc://host:²",
    ],
)
def test_a_proxy_needs_host_and_port(tmp_path, spec):
    with pytest.raises(StudyError, match=r"needed grpc://HOST:PORT"):
        open_storage(spec, tmp_path)


def test_a_proxy_that_does_not_answer_is_one_line(tmp_path):
    pytest.importorskip("grpc")
    with pytest.raises(StudyError, match=r"localhost:9: .*run_grpc_proxy_server") as caught:
        open_storage("grpc://localhost:9", tmp_path, answer_seconds=0.2)
    assert "\n" not in str(caught.value)


def test_a_proxy_that_dies_is_one_line(grpc_server, opened):
    spec, server = grpc_server
    study = optuna.create_study(storage=opened(spec), study_name="s")
    study.add_trial(create_trial(value=1.0))
    server.kill()
    server.wait()
    with pytest.raises(StudyError, match="finished trials are kept") as caught, reaching(spec):
        study.add_trial(create_trial(value=2.0))
    assert "\n" not in str(caught.value)
