"""Trials per minute of 1, 2 and 4 worker processes on one study, and a kill -9 of one of them.

    python studies/scale/scripts/workers.py STUDY STORAGE [--trials 48] [--workers 1 2 4]

STORAGE is a database URL (`postgresql+psycopg://user@/name?host=/socket/folder`) or `journal:PATH`.
Build the profile first (`allocator profile STUDY`); the first search also fills the cache of encoded
weights, so `--workers 1 1 2 4` compares with a warm one. The study is searched in throw-away folders
beside it, under their own names; nothing of it is touched. The rate is over the time from the first
trial's start to the last one's end, so loading the model does not count. Every search has the same
sampler, seed and trials; the kill is of a worker of the last and widest search, in mid-trial.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import optuna

from allocator.study.leases import LEASE
from allocator.study.storages import open_storage
from allocator.study.trials import PROPOSAL, allocation_of, not_abandoned

OWN = {"allocations", "front.json", "out", "runs"}  # what a search writes


def beside(study: Path) -> Path:
    """A folder of links to what a study reads."""
    folder = Path(tempfile.mkdtemp(prefix=f"{study.name}-", dir=study.parent))
    for path in study.iterdir():
        if path.name not in OWN and not path.name.startswith(("journal", "search.")):
            (folder / path.name).symlink_to(path)
    return folder


def search(study: Path, storage: str, workers: int, trials: int, sampler: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "allocator",
            "search",
            study,
            "--storage",
            storage,
            "--workers",
            str(workers),
            "--trials",
            str(trials),
            "--sampler",
            sampler,
            "--quiet",
        ],
        stdout=subprocess.DEVNULL,
    )


def trials_of(study: Path, storage: str) -> list:
    try:
        return not_abandoned(
            optuna.load_study(study_name=study.name, storage=open_storage(storage, study))
        )
    except KeyError:
        return []


def per_minute(trials: list) -> float:
    seconds = max(t.datetime_complete for t in trials) - min(t.datetime_start for t in trials)
    return 60 * len(trials) / seconds.total_seconds()


def kill_one(study: Path, storage: str, running: subprocess.Popen) -> int:
    """Kills a worker that has a trial in hand; its pid."""
    while running.poll() is None:
        for trial in trials_of(study, storage):
            if not trial.state.is_finished() and LEASE in trial.user_attrs:
                pid = trial.user_attrs[LEASE]["owner"]["pid"]
                if pid != running.pid:
                    os.kill(pid, signal.SIGKILL)
                    return pid
        time.sleep(0.05)
    raise SystemExit("the search ended before a worker could be killed; give more --trials")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("storage")
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sampler", default="knapsack")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rates: dict[int, float] = {}
    folders, started = [], []
    try:
        for workers in args.workers:
            folders.append(beside(args.study.resolve()))
            started.append(search(folders[-1], args.storage, workers, args.trials, args.sampler))
            if started[-1].wait():
                raise SystemExit(started[-1].returncode)
            rates[workers] = per_minute(trials_of(folders[-1], args.storage))
            ratio = rates[workers] / rates[args.workers[0]]
            print(
                f"{workers} workers: {rates[workers]:.1f} trials a minute, {ratio:.2f} x",
                flush=True,
            )
        folders.append(beside(args.study.resolve()))
        running = search(
            folders[-1], args.storage, max(*args.workers, 2), args.trials, args.sampler
        )
        pid = kill_one(folders[-1], args.storage, running)
        if running.wait():
            raise SystemExit(running.returncode)
        trials = trials_of(folders[-1], args.storage)
        numbers = Counter(t.system_attrs[PROPOSAL] for t in trials)
        digests = Counter(allocation_of(t).digest for t in trials)
        print(
            f"killed worker {pid}: of {args.trials} proposals "
            f"{args.trials - len(numbers)} lost, {len(trials) - len(numbers)} doubled; "
            f"{len(trials) - len(digests)} allocations repeated by the sampler"
        )
    finally:
        for process in started:
            process.terminate()  # its workers end with it
            process.wait()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
