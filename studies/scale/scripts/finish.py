"""Finishes weights of a checkpoint layer by layer: kills it twice, compares bytes, measures a layer.

    nohup python studies/scale/scripts/finish.py --out DIR > finish.log &

The FP8 checkpoint of `run.py` (2.30 GB). Two allocations. In the small one every layer retains 2 of 16
experts and uses both; codes are chosen anew in the groups of `CHOSEN`, so that it takes minutes; all
other groups are BF16, which has no codes. The whole one retains all 16 and uses 8, routed experts in
Q2_K, all else in Q4_K. Stages, each in processes of its own:

- `prepare`: statistics, and the plain weights encoded;
- `undisturbed`: finished without a stop;
- `killed`: the same in an empty folder, killed with -9 when a third and two thirds of its groups are
  done and the next is being chosen, then run to its end; both files of finished weights must be equal;
- `matrices`: codes of some rows of each width of matrix, in the second moments of its inputs, and
  from the seconds of these what the whole of both checkpoints would take;
- `whole`, with --whole: the whole allocation, killed as above;
- `rechosen`: the codes of one group of each layer removed, those being chosen at the kills among
  them, and chosen again without a stop; the same file and losses must come of it.

`--tuning` measures the other half: a checkpoint of its own (`TUNED`), every matrix in Q2_K or Q4_K, whose scales, norms
and routers are tuned, and whose codes stay. `scored` runs the losses alone, for the memory that they take; `tuned`
tunes without a stop; `tuned, killed` is killed with -9 on its way forwards and on its way back.

A finished stage is in `finish.json`, or `tuning.json`, and is not run again. `--small` is a trial of minutes, whose
results go to DIR.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import msgspec
from build_checkpoint import config_of, tensors_of
from run import HERE, KINDS, MOST_RESIDENT, Meter, build, status

SMALL = {
    "layers": 3, "experts": 4, "experts_used": 2, "heads": 2, "hidden": 1024, "width": 512,
    "dense_width": 2048, "vocabulary": 8192, "fp8": True,
}  # fmt: skip
TUNED = {
    "layers": 3, "experts": 16, "experts_used": 4, "heads": 8, "hidden": 2048, "width": 1024,
    "dense_width": 4096, "vocabulary": 8192, "fp8": True,
}  # fmt: skip
CHOSEN = {  # the others have no codes
    "layers.0.attention.kv_a": "IQ2_XXS",
    "layers.1.experts.down": "IQ2_XXS",
    "layers.2.attention.kv_a": "Q4_K",
    "layers.2.experts.down": "Q2_K",
    **{f"layers.{i}.attention.v_b": "Q4_K" for i in range(3)},
}
RETAINED = 2
MATRICES = {  # rows whose codes are chosen: as many as are chosen at once
    "layers.0.attention.q_b": 682,
    "layers.0.attention.o": 256,
    "layers.0.mlp.down": 56,
    "layers.1.experts.gate": 146,
    "layers.1.experts.down": 512,
}
FORMAT = "IQ2_XXS"


def study_of(out):
    from allocator.app.study_folder import StudyFolder

    return StudyFolder(out / "study-fp8", cache=out / "cache", threads=1)


def allocation_of(layout, *, whole):
    from allocator.decision.allocation import Allocation
    from allocator.formats import fallback

    if whole:
        formats = {n: "Q2_K" if g.role.is_expert else "Q4_K" for n, g in layout.groups.items()}
        retained, used = layout.inventory.n_experts, layout.inventory.experts_used
    else:
        formats = dict.fromkeys(layout.groups, "BF16") | CHOSEN
        retained = used = RETAINED
    return Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, tuple(range(retained))),
        formats={n: fallback(f, layout.groups[n].shape).name for n, f in formats.items()},
        experts_used=used,
    )


def finisher_of(out, *, whole=False, tuning=False):
    from allocator.export.tensors import EncodedTensors
    from allocator.finishing.finish import FinishDocuments, Finisher
    from allocator.finishing.recipe import CODES, PARTS, Recipe
    from allocator.profiling.statistics import importance_digest

    study_folder = study_of(out)
    profiler, texts = study_folder.profiler, study_folder.calibration
    scorers = study_folder.scorers
    if tuning:
        settings = {"parts": tuple(part for part in PARTS if part != CODES), "rate": 5e-4}
    else:
        settings = {"parts": (CODES,), "tuning_tokens": 0}
    return Finisher(
        EncodedTensors(profiler.encodings, allocation_of(study_folder.layout, whole=whole)),
        importance_digest(profiler.statistics.importance),
        msgspec.structs.replace(Recipe(), **settings).layer_by_layer,
        FinishDocuments(texts.search, texts.trial_documents, texts.selection_documents),
        lambda chosen: scorers.on(chosen, model=scorers.model),
        study_folder.finished_folder,
    )


def prepare(out, *, whole=False):
    from allocator.finishing.finish import parts_of

    source = finisher_of(out, whole=whole).plain
    n = sum(
        source.encoded(name, part).size
        for name in source.layout.groups
        for part in range(len(source.allocation.parts(source.layout, name)))
    )
    return {"encoded_bytes": n, "groups": len(parts_of(source))}


def scored(out):
    """The losses before alone."""
    finisher = finisher_of(out, whole=True, tuning=True)
    folder = out / "scored"
    folder.mkdir(exist_ok=True)
    return finisher._before(folder)


def finish(out, *, whole=False, tuning=False):
    from allocator.finishing.finish import parts_of

    finisher = finisher_of(out, whole=whole, tuning=tuning)
    artifact = finisher.finish()
    of = artifact.description.finishing
    return {
        "sha256": digest_of([artifact.path]),
        "codes sha256": digest_of(finisher.folder.glob("*/codes-*")),  # kept or not
        "bytes": artifact.path.stat().st_size,
        "weights": sum(part.n_weights for part in parts_of(finisher.plain)),
        "before": of.before,
        "after": of.after,
    }


def digest_of(paths):
    """Of names and bytes."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def matrices(out):
    """Processor seconds per matrix and per weight, by width; and the peak of memory so far."""
    import numpy as np
    import torch

    from allocator.checkpoint.tensors import read_tensor
    from allocator.codecs import codec_of
    from allocator.finishing import codes
    from allocator.formats import format_named
    from allocator.profiling.second_moments import second_moments_streamed

    study_folder, fmt = study_of(out), format_named(FORMAT)
    form, layout = codec_of(fmt).block_format(fmt), study_folder.layout
    codec_of(fmt).prepare(fmt)
    once, compensated = [], codes.compensated

    def timed(*args):
        began = time.process_time()
        result = compensated(*args)
        once.append(time.process_time() - began)
        return result

    codes.compensated = timed
    groups = [layout.groups[name] for name in MATRICES]
    scratch = out / "matrices"
    scratch.mkdir(exist_ok=True)
    rows, experts = {}, set()
    for group, _, moments in second_moments_streamed(
        study_folder.scorers.model, study_folder.calibration.search, groups, scratch=scratch
    ):
        if group.name in experts:
            continue
        experts.add(group.name)
        h = moments[:1] if moments.ndim == 3 else moments[None]
        n, width = MATRICES[group.name], group.shape[-1]
        whole = read_tensor(layout.inventory, group.sources[0])  # as finishing has it in memory
        weights = whole[None, :n]
        importance = np.ascontiguousarray(h.diagonal(dim1=-2, dim2=-1).numpy())
        data = torch.from_numpy(codec_of(fmt).encode(weights, fmt, importance))
        began = time.process_time()
        with torch.inference_mode():
            chosen = codes.choose(torch.from_numpy(weights), data, form, h)
        seconds = time.process_time() - began
        rows[group.name] = {
            "width": width,
            "seconds per matrix": round(once[-1], 2),
            "weights per second": round(weights.size / (seconds - once[-1])),
            "quadratic": round(float(chosen.after / chosen.before), 3),
            "VmHWM": status()["VmHWM"],
        }
        print(group.name, rows[group.name], file=sys.stderr, flush=True)
    shutil.rmtree(scratch)
    return rows


def projected(rows, dimensions):
    """Hours of one core for the codes of all matrices of a checkpoint, from those of each width."""
    by_width = {row["width"]: row for row in rows.values()}
    seconds = weights = 0
    for name, (_, shape) in tensors_of(config_of(**dimensions)).items():
        if len(shape) < 2 or "scale_inv" in name or ".mlp.gate." in name or "embed" in name:
            continue
        width = min((w for w in by_width if w >= shape[1]), default=max(by_width))
        n = shape[0] * shape[1]
        seconds += by_width[width]["seconds per matrix"] + n / by_width[width]["weights per second"]
        weights += n
    return {"weights": weights, "hours of one core": round(seconds / 3600, 2)}


STAGES = {
    "prepare": prepare,
    "finish": finish,
    "matrices": matrices,
    "prepare whole": partial(prepare, whole=True),
    "whole": partial(finish, whole=True),
    "scored": scored,
    "tuned": partial(finish, whole=True, tuning=True),
}


def stage(out, name):
    """In a process of its own; prints its result as the last line."""
    meter = Meter()
    meter.install()
    found = STAGES[name](out)
    row = meter.found() | {"processor_seconds": round(time.process_time(), 1), "result": found}
    print(json.dumps(row), flush=True)


# -- all of them


class Child:
    """A stage's process, watched: the most memory that it was seen with."""

    def __init__(self, given, name):
        command = [sys.executable, __file__, "--out", str(given.out), "--stage", name]
        self.process = subprocess.Popen(
            command + ["--small"] * given.small + ["--tuning"] * given.tuning, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.resident = 0
        self.began = time.perf_counter()

    def look(self):
        """Waits a moment; whether the process is running."""
        time.sleep(0.2)
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text()
            resident = int(text.partition("VmHWM:")[2].split()[0]) * 1024
            self.resident = max(self.resident, resident)
        except (OSError, IndexError):
            pass
        return self.process.poll() is None

    def result(self):
        while self.look():
            pass
        if self.process.returncode:
            raise SystemExit(f"ended with {self.process.returncode}")
        return json.loads(self.process.stdout.read().splitlines()[-1])

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return {
            "seconds": round(time.perf_counter() - self.began, 1),
            "VmHWM": self.resident,
        }


def run_killed(given, finished, n_groups, name):
    """Kills two processes while they choose codes, then lets a third one end."""
    killed = []
    for share in (1 / 3, 2 / 3):
        child = Child(given, name)
        while child.look() and len(list(finished.glob("*/codes-*"))) < share * n_groups:
            pass
        for _ in range(25):  # into the next group
            child.look()
        if child.process.poll() is not None:
            raise SystemExit("it ended before it was killed")
        row = child.kill()
        killed.append(row | {"groups done": len(list(finished.glob("*/codes-*")))})
        print("killed", killed[-1], flush=True)
    return Child(given, name).result() | {"killed": killed}


def run_rechosen(given, finished, n_groups):
    """Removes some groups' codes and the run's end, and runs it again without a stop."""
    chosen = sorted(finished.glob("*/codes-*"), key=lambda path: path.stat().st_mtime_ns)
    removed = [chosen[round(share * n_groups)] for share in (0, 1 / 3, 2 / 3)] + [chosen[-1]]
    for path in [*removed, *finished.glob("*/result.json")]:
        path.unlink()
    return Child(given, "whole").result() | {"removed": [path.stem for path in removed]}


def run_tuned_killed(given, finished):
    """Kills two processes while they tune, then lets a third one end."""
    killed = []
    for pattern in ("*/step-0/states-2.*", "*/step-0/direction-1.*"):
        child = Child(given, "tuned")
        while child.look() and not list(finished.glob(pattern)):
            pass
        if child.process.poll() is not None:
            raise SystemExit("it ended before it was killed")
        killed.append(child.kill())
        print("killed", killed[-1], flush=True)
    return Child(given, "tuned").result() | {"killed": killed}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--whole", action="store_true", help="the whole allocation alone: an hour")
    parser.add_argument("--tuning", action="store_true", help="tuning alone: minutes")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    aside = "tuning" if given.tuning else "small-finish" if given.small else ""
    out = given.out.resolve() / aside
    if given.stage:
        return stage(out, given.stage)
    out.mkdir(parents=True, exist_ok=True)
    dimensions = TUNED if given.tuning else SMALL if given.small else KINDS["fp8"]
    build(out, "fp8", dimensions)
    finished, aside = out / "cache/finish", out / "undisturbed"
    path = (out if given.small else HERE) / ("tuning.json" if given.tuning else "finish.json")
    results = json.loads(path.read_text()) if path.exists() else {}

    def note(name, found):
        results[name] = found
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(time.strftime("%H:%M:%S"), name, json.dumps(found), flush=True)

    if given.tuning:
        return tuning(given, finished, results, note)
    if given.whole:
        return whole(given, finished, results, note)
    if "prepare" not in results:
        note("prepare", Child(given, "prepare").result())
    if "undisturbed" not in results:
        note("undisturbed", Child(given, "finish").result())
        shutil.rmtree(aside, ignore_errors=True)
        finished.rename(aside)
    if "matrices" not in results:
        note("matrices", Child(given, "matrices").result())
        rows = results["matrices"]["result"]
        note("projected", {kind: projected(rows, KINDS[kind]) for kind in KINDS})
    if "killed" not in results:
        note("killed", run_killed(given, finished, len(CHOSEN), "finish"))
    report(results, "undisturbed", "killed")


def whole(given, finished, results, note):
    """The stages of the whole allocation."""
    if "prepare whole" not in results:
        shutil.rmtree(finished, ignore_errors=True)  # of the small one
        note("prepare whole", Child(given, "prepare whole").result())
    n_groups = results["prepare whole"]["result"]["groups"]
    if "whole" not in results:
        note("whole", run_killed(given, finished, n_groups, "whole"))
    if "rechosen" not in results:
        note("rechosen", run_rechosen(given, finished, n_groups))
    report(results, "whole", "rechosen")


def tuning(given, finished, results, note):
    """The stages of tuning."""
    for name in ("prepare whole", "scored", "tuned"):
        if name not in results:
            note(name, Child(given, name).result())
    if "tuned, killed" not in results:
        shutil.rmtree(finished)
        note("tuned, killed", run_tuned_killed(given, finished))
    report(results, "tuned", "tuned, killed")


def report(results, one, other):
    """Prints whether two runs gave the same, and the most memory of all stages."""
    same = results[one]["result"] == results[other]["result"]  # losses too
    peak = max(row["VmHWM"] for row in results.values() if "VmHWM" in row)
    holds = "holds" if peak < MOST_RESIDENT else "MISSES"
    print(f"equal weights, codes and losses: {'holds' if same else 'MISSES'}")
    print(f"peak resident memory {peak / 1e9:.2f} GB: {holds} (at most {MOST_RESIDENT / 1e9:g})")


if __name__ == "__main__":
    main()
