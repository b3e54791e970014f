"""What checking costs: shares of a search's and of materialize's seconds.

    python studies/faults/scripts/cost.py [STUDY] [--cache DIR] [--trials 8] [--rounds 9] [--formats ...]

Runs in one process, on a copy of the study's folder. Every function that checks is timed where it
is called: digests of slots when they are encoded and whenever they are read, looks at the files of
the checkpoint, and the second look at a written file. Seconds of a thread that checks while another
encodes count in full. The profile is made first, where the cache lacks it, and is not timed.

- search: a new study with a warm (small) profile (at most 3 % is wanted);
- materialize: the pick, as both containers, from an empty bank and from a full one (at most 10 %);
- the same with the checks left out, run in turn, as the ratio of medians.
"""

import argparse
import functools
import shutil
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import xxhash

from allocator import api
from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.inventory import Inventory
from allocator.codecs import entries
from allocator.export import checkpoint
from allocator.formats import offered
from allocator.targets import layout

ROOT = Path(__file__).parents[3]
spent: dict[str, float] = defaultdict(float)
inside = threading.local()


def timed(name, function):
    """Adds the seconds of outermost calls."""

    @functools.wraps(function)
    def call(*args, **options):
        if getattr(inside, "busy", False):
            return function(*args, **options)
        inside.busy, start = True, time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            spent[name] += time.perf_counter() - start
            inside.busy = False

    return call


class Hasher:
    """`xxhash.xxh3_128`, timed."""

    def __init__(self, **options):
        self._hasher = xxhash.xxh3_128(**options)
        self.update = timed("encoded slots", self._hasher.update)
        self.digest = timed("encoded slots", self._hasher.digest)


CHECKS = [
    (entries.Entry, "wrong_slots", "read slots"),
    (entries.SlotDigests, "match", "read slots"),
    (Inventory, "_check", "identities of files"),
    (Inventory, "check_unchanged", "identities of files"),
    (checkpoint, "_check_written", "written file"),
]


@contextmanager
def watching():
    """Times all checks within the block."""
    spent.clear()
    hashes = SimpleNamespace(xxh3_128=Hasher, xxh3_128_digest=xxhash.xxh3_128_digest)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(entries, "xxhash", hashes))
        for where, name, shown in CHECKS:
            function = timed(shown, getattr(where, name))
            stack.enter_context(mock.patch.object(where, name, function))
        yield


def present(entry, slots, data, digests):
    """`Entry.wrong_slots` without a look at the bytes."""
    return [s for s in slots if not digests[s].any()], []


@contextmanager
def unchecked():
    """Leaves out all that is read again for a check; digests are still taken."""
    with ExitStack() as stack:
        for where, name, instead in (
            (entries.Entry, "wrong_slots", present),
            (Inventory, "_check", lambda *args: None),
            (Inventory, "check_unchanged", lambda *args: None),
            (checkpoint, "_check_written", lambda *args: None),
        ):
            stack.enter_context(mock.patch.object(where, name, instead))
        yield


def copied(study, folder):
    """The study without its trials, its checkpoint and search spaces linked."""
    place = folder / "studies" / study.name
    shutil.copytree(study, place, ignore=shutil.ignore_patterns("model", "journal*", "out"))
    toml = place / "study.toml"  # a small profile will do, and a short pick makes no share smaller
    lines = [line for line in toml.read_text().splitlines() if "selection_documents" not in line]
    few = {"statistics": 8, "curvature": 2, "measured": 1, "selection": 16}
    at = lines.index("[calibration]") + 1
    lines[at:at] = [f"{what}_documents = {n}" for what, n in few.items()]
    toml.write_text("\n".join(lines) + "\n")
    (place / "model").symlink_to(study / "model")
    (folder / "search_spaces").symlink_to(ROOT / "search_spaces")
    return place


def row(what, seconds):
    total = sum(spent.values())
    return {
        "what": what,
        "seconds": seconds,
        "checking": total,
        "share, %": 100 * total / seconds,
    } | {f"{name}, %": 100 * part / seconds for name, part in spent.items()}


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def search(study, cache, trials):
    """A new study with a warm profile."""
    api.profile(study, cache=cache)
    with watching():
        return row(
            f"search, {trials} trials",
            seconds_of(lambda: api.search(study, cache=cache, trials=trials)),
        )


def materialize(study, container, folder, rounds):
    """The pick: from an empty bank, and then, in turn with and without checks, from a full one."""
    used, pick = folder / f"cache-{container}", study / "allocations/pick.json"
    StudyFolder(study, cache=used).inventory.digest  # the checkpoint's own is no part of it

    def write():
        shutil.rmtree(folder / container, ignore_errors=True)
        start = time.perf_counter()
        api.materialize(study, pick, folder / container, container=container, cache=used)
        return time.perf_counter() - start

    with watching():
        yield row(f"materialize {container}, empty bank", write())
    found, plain = [], []
    for _ in range(rounds):
        with watching():
            found.append(row(f"materialize {container}, full bank", write()))
        with unchecked():
            plain.append(write())
    middle = sorted(found, key=lambda r: r["share, %"])[rounds // 2]
    whole = statistics.median(r["seconds"] for r in found)
    yield middle | {"checked / unchecked": whole / statistics.median(plain)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=ROOT / "studies/reference")
    parser.add_argument("--cache", type=Path, help="with a profile; a temporary one by default")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--formats", nargs="+", help="that a search is offered (default: all)")
    args = parser.parse_args()
    rows = []

    def show(found):
        rows.append(found)
        print(
            ", ".join(f"{k}: {v if isinstance(v, str) else round(v, 4)}" for k, v in found.items()),
            flush=True,
        )

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        study, cache = copied(args.study.resolve(), folder), args.cache or folder / "cache"
        for container in ("gguf", "safetensors"):
            for found in materialize(study, container, folder, args.rounds):
                show(found)
        if args.formats:
            named = lambda *a, **k: tuple(f for f in offered(*a, **k) if f.name in args.formats)
            with mock.patch.object(layout, "offered", named):
                show(search(study, cache, args.trials))
        else:
            show(search(study, cache, args.trials))
    print(pd.DataFrame(rows).fillna(0).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
