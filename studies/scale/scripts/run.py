"""Profiles, scores and materializes checkpoints that are larger than memory; says what it took.

    nohup python studies/scale/scripts/run.py --out DIR > run.log &

For a checkpoint in BF16 and one in FP8: built (see `build_checkpoint.py`), profiled from sampled rows,
four candidates scored in one pass, the last of them written as GGUF and opened again. Every stage is a
process of its own; a finished one is in `results.json` and is not run again. `--small` is a trial of
minutes on 2 GB each, whose results go to DIR. Needs some 60 GB of disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
KINDS = {
    "bf16": {"layers": 5, "experts": 64},
    "fp8": {"layers": 3, "experts": 16, "fp8": True},
}
SMALL = {
    "bf16": {"layers": 3, "experts": 4, "experts_used": 2, "dense_width": 9216},
    "fp8": {"layers": 3, "experts": 4, "experts_used": 2, "dense_width": 9216, "fp8": True},
}
STAGES = ("build", "profile", "score", "materialize")
MOST_RESIDENT = 6e9
MOST_READ = 1.1


# -- what a stage's process takes


def status():
    """Bytes by name, of /proc/self/status."""
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {row[0][:-1]: int(row[1]) * 1024 for row in rows if row[-1] == "kB"}


class Meter:
    """Peaks of memory; bytes read from the checkpoint by pass; seconds by what was done."""

    def __init__(self):
        self.anonymous, self.read = 0, defaultdict(int)
        self.where = "other"
        self.seconds, self.weights = defaultdict(float), defaultdict(int)
        self.began = time.perf_counter()
        self.pass_seconds = {}
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self):
        while True:
            self.anonymous = max(self.anonymous, status()["RssAnon"])
            time.sleep(0.02)

    @contextmanager
    def one_pass(self, name):
        n, began = sum(k.startswith(name) for k in self.pass_seconds), time.perf_counter()
        before, self.where = self.where, name if not n else f"{name} {n + 1}"
        try:
            yield
        finally:
            self.pass_seconds[self.where] = time.perf_counter() - began
            self.where = before

    def count(self, module, name, label, *, weights=None):
        """Adds up what calls of a function take; of several threads, together."""
        inner = getattr(module, name)

        def counted(*args, **options):
            began = time.perf_counter()
            found = inner(*args, **options)
            what = label if weights is None else f"{label} {weights(*args)[0]}"
            self.seconds[what] += time.perf_counter() - began
            if weights is not None:
                self.weights[what] += int(weights(*args)[1])
            return found

        setattr(module, name, counted)

    def install(self):
        """Counts what this process reads, encodes and decodes."""
        from allocator.checkpoint import tensors as source
        from allocator.checkpoint.inventory import Inventory
        from allocator.codecs.ggml import GGML
        from allocator.profiling import streamed_profiler as streamed
        from allocator.scoring.streamed_scorer import StreamedScorer

        read_raw, chunks = source.read_raw, Inventory._chunks
        collect, measure, score = (
            streamed.collect_streamed, streamed.measure_streamed, StreamedScorer._pass,
        )  # fmt: skip

        def counted_raw(inventory, info):
            self.read[self.where] += info.nbytes
            return read_raw(inventory, info)

        def counted_chunks(inventory, stored):
            self.read["digests"] += stored.nbytes
            began = time.perf_counter()
            yield from chunks(inventory, stored)
            self.pass_seconds["digests"] = (
                self.pass_seconds.get("digests", 0) + time.perf_counter() - began
            )

        def within(name, function):
            def passed(*args, **options):
                with self.one_pass(name):
                    return function(*args, **options)

            return passed

        source.read_raw = counted_raw
        Inventory._chunks = counted_chunks
        streamed.collect_streamed = within("statistics", collect)
        streamed.measure_streamed = within("curvature, there and back", measure)
        StreamedScorer._pass = within("candidates", score)
        self.count(source, "_read", "read")
        self.count(GGML, "encode", "encode", weights=lambda w, f, *_: (f.name, w.size))
        self.count(GGML, "decode", "decode")

    def found(self):
        return {
            "seconds": round(time.perf_counter() - self.began, 1),
            "VmHWM": status()["VmHWM"],
            "RssAnon": self.anonymous,
            "read": dict(self.read),
            "pass_seconds": {k: round(v, 1) for k, v in self.pass_seconds.items()},
            "inside_seconds": {k: round(v, 1) for k, v in self.seconds.items()},
            "encoded_weights": dict(self.weights),
        }


# -- the stages


def workspace_of(out, kind):
    from allocator.app.study_folder import StudyFolder

    return StudyFolder(out / f"study-{kind}", cache=out / "cache", threads=2)


def candidates_of(study_folder):
    """Four that have no format in common: every matrix in one, as llama-quantize would store it."""
    from allocator.decision.baselines import mixed

    layout = study_folder.layout
    n_experts = layout.inventory.n_experts
    everyone = dict.fromkeys(layout.layers, tuple(range(n_experts)))
    return {
        fmt: mixed(layout, everyone, experts=fmt, rest=fmt, count=n_experts)
        for fmt in ("Q6_K", "Q2_K", "IQ1_S", "Q3_K")
    }


def build(out, kind, dimensions):
    import importlib.util

    path = Path(__file__).with_name("build_checkpoint.py")
    spec = importlib.util.spec_from_file_location("build_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    total = module.build(out / kind, **dimensions)
    folder = out / f"study-{kind}"
    folder.mkdir(exist_ok=True)
    text = (HERE / "study.toml").read_text().splitlines()
    text = [f'checkpoint = "{out / kind}"' if x.startswith("checkpoint") else x for x in text]
    (folder / "study.toml").write_text("\n".join(text) + "\n")
    shutil.copyfile(HERE / "documents.jsonl", folder / "documents.jsonl")
    return {"bytes": total, "files": len(list((out / kind).glob("*.safetensors")))}


def profile(out, kind, dimensions):
    found = workspace_of(out, kind).profile
    return {
        "changes": len(found.measured) + sum(map(len, found.pruned.values())),
        "unreached": len(found.unreached),
        "tokens": found.n_tokens,
    }


def score(out, kind, dimensions):
    study_folder = workspace_of(out, kind)
    candidates = candidates_of(study_folder)
    losses = study_folder.scorers.trials.score_many(list(candidates.values()))
    rows = {}
    for (name, allocation), found in zip(candidates.items(), losses, strict=True):
        size = allocation.nbytes(study_folder.layout)
        bits = size.encoded * 8 / study_folder.inventory.n_searched_weights
        kl = study_folder.scorers.trials.summary(found)["loss"]
        rows[name] = {"bits": round(bits, 3), "bytes": size.file, "kl": kl}
    return {"candidates": rows, "tokens": study_folder.scorers.trials.n_tokens}


def materialize(out, kind, dimensions):
    from allocator.export.checkpoint import materialize as write
    from allocator.export.gguf.files import read_gguf
    from allocator.export.tensors import EncodedTensors
    from allocator.profiling.statistics import importance_digest

    study_folder = workspace_of(out, kind)
    allocation = list(candidates_of(study_folder).values())[-1]
    profiler = study_folder.profiler
    written = write(
        EncodedTensors(profiler.encodings, allocation), out / f"gguf-{kind}", container="gguf",
        importance=importance_digest(profiler.statistics.importance),
    )  # fmt: skip
    tensors = read_gguf(written.folder / written.manifest.file)
    return {"bytes": written.manifest.file_bytes, "tensors": len(tensors)}


def stage(out, kind, name, dimensions):
    """In a process of its own; prints its result as the last line."""
    meter = Meter()
    if name != "build":
        meter.install()
    found = globals()[name](out, kind, dimensions)
    print(json.dumps(meter.found() | {"result": found}))


# -- all of them


def checkpoint_bytes(out, kind):
    return sum(p.stat().st_size for p in (out / kind).glob("*.safetensors"))


def table(results, sizes):
    lines = [
        "| checkpoint | stage | VmHWM, GB | RssAnon, GB | seconds | bytes read / checkpoint, by pass |",
        "|---|---|---|---|---|---|",
    ]
    worst_read, worst_resident = 0.0, 0
    for key, row in results.items():
        kind, name = key.split()
        shares = {k: v / sizes[kind] for k, v in row["read"].items() if v > 1e-3 * sizes[kind]}
        there_and_back = {k: v / (2 if "back" in k else 1) for k, v in shares.items()}
        worst_read = max([worst_read, *there_and_back.values()])
        if name != "build":
            worst_resident = max(worst_resident, row["VmHWM"])
        read = ", ".join(f"{k} {v:.3f}" for k, v in shares.items()) or "0"
        lines.append(
            f"| {kind} | {name} | {row['VmHWM'] / 1e9:.2f} | {row['RssAnon'] / 1e9:.2f} | "
            f"{row['seconds']:.0f} | {read} |"
        )
    total = sum(row["seconds"] for row in results.values())
    lines += [
        "",
        f"peak resident memory {worst_resident / 1e9:.2f} GB: "
        f"{'holds' if worst_resident <= MOST_RESIDENT else 'MISSES'} (at most {MOST_RESIDENT / 1e9:g})",
        f"most read in one pass {worst_read:.3f} of the checkpoint: "
        f"{'holds' if worst_read <= MOST_READ else 'MISSES'} (at most {MOST_READ})",
        f"all stages {total / 60:.1f} minutes: {'holds' if total <= 7200 else 'MISSES'} (at most 120)",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--stage", nargs=2, metavar=("KIND", "STAGE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    dimensions = SMALL if args.small else KINDS
    out = args.out.resolve() / "small" if args.small else args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.stage:
        kind, name = args.stage
        return stage(out, kind, name, dimensions[kind])
    path = (out if args.small else HERE) / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for kind in args.kinds:
        for name in STAGES:
            if f"{kind} {name}" in results:
                continue
            print(time.strftime("%H:%M:%S"), kind, name, flush=True)
            command = [sys.executable, __file__, "--out", str(args.out), "--stage", kind, name]
            done = subprocess.run(
                command + ["--small"] * args.small, stdout=subprocess.PIPE, text=True, check=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            results = json.loads(path.read_text()) if path.exists() else {}  # others may run beside
            results[f"{kind} {name}"] = json.loads(done.stdout.splitlines()[-1])
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps(results[f"{kind} {name}"]), flush=True)
    print(table(results, {kind: checkpoint_bytes(out, kind) for kind in KINDS}))


if __name__ == "__main__":
    main()
