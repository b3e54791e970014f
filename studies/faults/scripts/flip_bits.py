"""Flips bits in every kind of file of a cache and a study, and looks what the next command does.

    python studies/faults/scripts/flip_bits.py --flips 200 --seed 0

A study of two layers is searched, in memory and streamed, its pick is written and one run of a
comparison is made, once. Then, flip by flip: one bit of one file is turned, the command that reads the
file runs again, what it finds is compared with what the whole files give, and all files are put back.
Exits with 1 if a flip ended in another result without a word, or in a traceback.
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

sys.path.insert(0, str(Path(__file__).parents[3] / "tests/golden"))
import make

from allocator import api
from allocator.app.study_folder import StudyFolder
from allocator.app.tables import front_table
from allocator.checkpoint.reading import read_inventory
from allocator.comparison.bench import Bench
from allocator.comparison.runs import chosen_runs, results
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import AllocatorError
from allocator.scoring.layer_checkpoints import LayerCheckpoints

OUTCOMES = ("rebuilt", "refused", "harmless", "SILENT", "TRACEBACK")
TRIALS = 16
PROTECTED = ("checkpoint", "target", "weights", "search_documents", "rungs", "measured_documents")
"""Lines of study.toml that the study's lock holds."""


class Lines(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@dataclass(frozen=True)
class Kind:
    """Files that are read alike.

    Attributes:
        name: of the kind.
        files: there after `Faults.prepare`, and where a bit may be turned: a range of bytes.
        read: runs the command that reads them; returns what is compared.
    """

    name: str
    files: list[tuple[Path, int, int]]
    read: Callable[[], Any]


class Faults:
    """A prepared study.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root, root / "cache"
        self.study, self.streamed = root / "study", root / "streamed"
        self.out, self.lines = root / "out", Lines()
        self.options: dict[str, Any] = {"cache": self.cache, "threads": 1}

    # -- commands

    def search(self, folder: Path) -> Any:
        """A search's trials and allocations; of finished trials nothing is made again."""
        done = api.search(folder, trials=TRIALS, **self.options)
        self.lines.found += [m for m in done.messages if "no new trial" not in m]
        trials = [(t.params, t.values, t.state) for t in done.study.get_trials()]
        records = sorted((folder / "allocations").glob("*.json"))
        known = [AllocationRecord.read(p) for p in records]
        plain = {r.name: (r.allocation, r.loss, r.importance, r.bytes) for r in known}
        return trials, plain, front_table(folder).to_dict("records")

    def afresh(self, folder: Path) -> Any:
        """The same where only the cache is there, and the pick written."""
        self.forget(folder)
        found = self.search(folder)
        return found, self.write(folder)

    def remeasured(self, folder: Path) -> Any:
        """The same where the profile is built again from its stages."""
        for path in self.cache.glob("profiles/*/profile.json"):
            path.unlink()
        return self.afresh(folder)

    def forget(self, folder: Path) -> None:
        """Removes what a search leaves in its folder."""
        shutil.rmtree(folder / "allocations", ignore_errors=True)
        for name in ("journal", "front.json"):
            (folder / name).unlink(missing_ok=True)

    def write(self, folder: Path) -> Any:
        """Digests of the written pick."""
        place = self.root / "again"
        shutil.rmtree(place, ignore_errors=True)
        done = api.materialize(folder, folder / "allocations/pick.json", place, **self.options)
        return done.manifest.sha256

    def materialize(self) -> Any:
        """Of all records."""
        found = {}
        for path in sorted((self.study / "allocations").glob("*.json")):
            place = self.root / "again"
            shutil.rmtree(place, ignore_errors=True)
            done = api.materialize(self.study, path, place, **self.options)
            record = AllocationRecord.read(path)
            found[path.name] = done.manifest.sha256, record.sha256, record.loss, record.bytes
        return found

    def verify(self) -> Any:
        """What `verify` finds."""
        return api.verify(self.study, self.out, documents=2, tolerance=1.0, **self.options)

    def compare(self) -> Any:
        """Finished runs, and held-out losses."""
        bench = Bench(self.study, "gguf", cache=self.cache, threads=1)
        runs = results(self.study)
        return runs, [bench.kl("report", a).tolist() for r in runs for a in bench.check(r)]

    def front(self) -> Any:
        """The table of notebooks."""
        return front_table(self.study).to_dict("records")

    def digest(self) -> Any:
        """The checkpoint's."""
        return read_inventory(self.root / "checkpoint", digests=self.cache / "digests").digest

    def stage(self, stage: str) -> Any:
        """A streamed stage that was stopped, to its end."""
        profiler = StudyFolder(self.streamed, **self.options).profiler
        if stage == "statistics":
            found = profiler.statistics
            vectors = {name: v.tolist() for name, v in found.importance.items()}
            return vectors, found.saliency, found.counts
        return profiler.curvature

    # -- preparation

    def prepare(self) -> list[Kind]:
        """Runs everything once; the kinds of files there are."""
        make.write_checkpoint(self.root / "checkpoint")
        for folder in (self.study, self.streamed):
            make.write_study(folder)
        with (self.streamed / "study.toml").open("a") as file:
            file.write("\n[streamed]\ncandidates = 2\nrows = 0.5\n")
        for stage, (what, layer) in {
            "statistics": ("states", 1), "curvature": ("gradients", 1),
        }.items():  # fmt: skip
            with stopped_after(what, layer):
                try:
                    self.stage(stage)
                except KeyboardInterrupt:
                    pass
            self.keep(stage)
        for folder in (self.study, self.streamed):
            self.search(folder)
        api.materialize(
            self.study, self.study / "allocations/pick.json", self.out, record=True, **self.options
        )
        bench = Bench(self.study, "gguf", cache=self.cache, threads=1)
        for run in chosen_runs(self.study):
            bench.run(run)
        self.compare()
        self.verify()
        return self.kinds()

    def keep(self, stage: str) -> None:
        """Copies a stopped stage's files aside: a finished stage removes them."""
        folder = StudyFolder(self.streamed, **self.options).profiler.folder / stage
        shutil.copytree(folder, self.root / "stopped" / stage)

    def stopped(self, stage: str) -> Callable[[], Any]:
        """Puts a stopped stage back, then finishes it."""
        folder = StudyFolder(self.streamed, **self.options).profiler.folder
        left = {
            "statistics": ["statistics.json", "curvature.json"],
            "curvature": ["curvature.json"],
        }

        def read() -> Any:
            for name in (*left[stage], "profile.json"):
                (folder / name).unlink(missing_ok=True)
            shutil.copytree(self.root / "stopped" / stage, folder / stage)
            try:
                return self.stage(stage)
            finally:
                shutil.rmtree(folder / stage, ignore_errors=True)

        return read

    def kinds(self) -> list[Kind]:
        """All kinds of files, with where they may be damaged."""
        own = StudyFolder(self.study, **self.options).profiler.folder
        other = StudyFolder(self.streamed, **self.options).profiler.folder

        def whole(*paths: Path) -> list[tuple[Path, int, int]]:
            assert paths
            return [(p, 0, p.stat().st_size) for p in paths]

        def every(folder: Path, pattern: str) -> list[tuple[Path, int, int]]:
            return whole(*sorted(folder.glob(pattern)))

        def lines(path: Path, wanted: Callable[[bytes], bool]) -> list[tuple[Path, int, int]]:
            found, at = [], 0
            for line in path.read_bytes().splitlines(keepends=True):
                if wanted(line):
                    found.append((path, at, at + len(line)))
                at += len(line)
            return found

        searched = {
            bytes(str(list(d.ids)), "ascii") for d in StudyFolder(self.study).calibration.search
        }
        fresh, again = lambda: self.afresh(self.study), lambda: self.remeasured(self.study)
        streamed = lambda: self.remeasured(self.streamed)  # noqa: E731
        table = [
            ("cache: profile.json", whole(own / "profile.json"), fresh),
            ("cache: statistics.json", whole(own / "statistics.json"), fresh),
            ("cache: importance", whole(own / "importance.safetensors"), fresh),
            ("cache: curvature.json", whole(own / "curvature.json"), fresh),
            ("cache: losses.jsonl", whole(own / "losses.jsonl"), again),
            ("cache: around-*.json", every(own, "around-*.json"), fresh),
            ("cache: selection-*.json", every(own, "selection-*.json"), fresh),
            ("cache: streamed profile", every(other, "*.json*"), streamed),
            ("cache: digests", every(self.cache, "digests/*.json"), self.digest),
            ("cache: encoded weights", every(self.cache, "bank/*.checked"), fresh),
            ("cache: held-out losses", every(self.cache, "held-out/*"), self.compare),
            ("stopped: statistics", every(self.root, "stopped/statistics/*"),
             self.stopped("statistics")),
            ("stopped: curvature", every(self.root, "stopped/curvature/*"),
             self.stopped("curvature")),
            ("study: journal", whole(self.study / "journal"), lambda: self.search(self.study)),
            ("study: allocations", every(self.study, "allocations/*.json"), self.materialize),
            ("study: importance", every(self.study, "allocations/*.safetensors"),
             self.materialize),
            ("study: front.json", whole(self.study / "front.json"), self.front),
            ("study: runs", every(self.study, "runs/*.json"), self.compare),
            ("study: study.toml, what is locked",
             lines(self.study / "study.toml", lambda x: x.decode().startswith(PROTECTED)),
             lambda: self.search(self.study)),
            ("study: documents, search split",
             lines(self.study / "documents.jsonl", lambda x: any(i in x for i in searched)),
             lambda: self.search(self.study)),
            ("checkpoint: weights", every(self.root, "checkpoint/*.safetensors"),
             lambda: self.search(self.study)),
            ("written: manifest.json", whole(self.out / "manifest.json"), self.verify),
            ("written: allocation.json", whole(self.out / "allocation.json"), self.verify),
            ("written: weights", whole(self.out / "model.gguf"), self.verify),
        ]  # fmt: skip
        return [Kind(*row) for row in table]

    # -- flips

    def snapshot(self) -> dict[Path, bytes]:
        """All files."""
        return {p: p.read_bytes() for p in sorted(self.root.rglob("*")) if p.is_file()}

    def restore(self, whole: dict[Path, bytes]) -> None:
        """Puts all files back that are not as they were."""
        for path in [p for p in self.root.rglob("*") if p.is_file() and p not in whole]:
            path.unlink()
        for path, data in whole.items():
            if not path.exists() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def outcome(self, kind: Kind, flip: tuple[Path, int, int], wanted: Any) -> tuple[str, str]:
        """What a flipped bit leads to, and what was said."""
        path, at, bit = flip
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << bit
        path.write_bytes(data)
        self.lines.found.clear()
        try:
            found = kind.read()
        except AllocatorError as error:
            text = str(error)
            return ("TRACEBACK" if "\n" in text else "refused"), text
        except Exception:
            return "TRACEBACK", traceback.format_exc()
        said = "; ".join(self.lines.found)
        if same(found, wanted):
            return ("rebuilt" if said else "harmless"), said
        return ("refused" if said else "SILENT"), said or "another result"


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal; NaN is itself."""
    return repr(one) == repr(other)


@contextmanager
def stopped_after(what: str, layer: int) -> Iterator[None]:
    """A streamed pass that is killed once these values are on the disk."""
    plain = LayerCheckpoints.save

    def save(self: LayerCheckpoints, name: str, at: int, values: Any) -> None:
        plain(self, name, at, values)
        if (name, at) == (what, layer):
            raise KeyboardInterrupt

    LayerCheckpoints.save = save  # type: ignore[method-assign]
    try:
        yield
    finally:
        LayerCheckpoints.save = plain  # type: ignore[method-assign]


def run(
    n_flips: int, seed: int, *, only: tuple[str, ...] = (), verbose: bool = False
) -> dict[str, Counter[str]]:
    """Outcomes by kind, the flips spread evenly over kinds (`only` these, or all)."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng, table = random.Random(seed), {}
    log = logging.getLogger("allocator")
    with tempfile.TemporaryDirectory() as scratch:
        faults = Faults(Path(scratch))
        kinds = [k for k in faults.prepare() if not only or k.name in only]
        log.addHandler(faults.lines)
        log.propagate = False
        try:
            whole = faults.snapshot()
            for number, kind in enumerate(kinds):
                wanted = kind.read()
                faults.restore(whole)
                counts = table[kind.name] = Counter()
                for _ in range(n_flips // len(kinds) + (number < n_flips % len(kinds))):
                    path, start, stop = rng.choice(kind.files)
                    flip = path, rng.randrange(start, stop), rng.randrange(8)
                    name, said = faults.outcome(kind, flip, wanted)
                    faults.restore(whole)
                    counts[name] += 1
                    if verbose or name in ("SILENT", "TRACEBACK"):
                        print(f"{name}: {path.name}, byte {flip[1]}, bit {flip[2]}: {said}")
        finally:
            log.propagate = True
            log.removeHandler(faults.lines)
    return table


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    table = run(args.flips, args.seed, verbose=args.verbose)
    print(f"| kind | {' | '.join(OUTCOMES)} |\n|---|{'---|' * len(OUTCOMES)}")
    for name, counts in table.items():
        print(f"| {name} | {' | '.join(str(counts[o]) for o in OUTCOMES)} |")
    total = sum(table.values(), Counter())
    print(f"| all {sum(total.values())} | {' | '.join(str(total[o]) for o in OUTCOMES)} |")
    return int(bool(total["SILENT"] or total["TRACEBACK"]))


if __name__ == "__main__":
    sys.exit(main())
