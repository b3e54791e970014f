"""How fast a checkpoint is written, over ggml's own quantizer on the same cores and tensors.

    python studies/scale/scripts/encoding.py --out DIR [--experts 64] [--rounds 2]

Written: `materialize` to GGUF from an empty encodings: reading, encoding, the encodings' files and the file
itself, synced, with its sha256. Raw: `ggml_quantize_chunk` on the same float32 weights, in memory
already, over the same threads; what builds ggml's tables is in neither. Seconds of the clock, and of the
processors (these other jobs of the machine hardly change). Two allocations: the committed
one of studies/reference (2.25 effective bits), and Q2_K for a checkpoint with one MoE layer of
`--experts` experts of DeepSeek-V3's shapes. Both are timed in turn, `--rounds` times.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_tensor
from allocator.codecs.encodings import Encodings
from allocator.codecs.ggml import GGML, library
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord
from allocator.export.checkpoint import materialize
from allocator.export.tensors import EncodedTensors
from allocator.formats import fallback
from allocator.formats.ggml import TYPES
from allocator.targets import GGUF
from allocator.targets.group_weights import group_weights

HERE = Path(__file__).resolve().parents[1]
REFERENCE = HERE.parent / "reference"
THREADS = len(os.sched_getaffinity(0))


def reference(out):
    """Layout, allocation and importance of the committed allocation."""
    study_folder = StudyFolder(REFERENCE, cache=out / "cache")
    path = REFERENCE / "allocations/pick.json"
    record = AllocationRecord.read(path)
    importance = study_folder.encodings.of(record.importance).importance
    return study_folder.layout, record.decision, importance


def large(out, experts):
    """The same in Q2_K for a checkpoint with one MoE layer, with random importance."""
    folder = out / f"one-layer-{experts}"
    script = Path(__file__).with_name("build_checkpoint.py")
    sizes = ["--layers", "2", "--experts", str(experts), "--dense-width", "2048"]
    command = [sys.executable, str(script), "--out", str(folder), *sizes]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    layout = GGUF.layout(read_inventory(folder, digests=out / "cache" / "digests"))
    everyone = tuple(range(experts))
    allocation = Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, everyone),
        formats={n: fallback("Q2_K", g.shape).name for n, g in layout.groups.items()},
        experts_used=layout.inventory.experts_used,
    )
    rng = np.random.default_rng(0)
    importance = {
        name: rng.lognormal(size=(*group.shape[: group.role.is_expert], group.shape[-1])).astype(
            np.float32
        )
        for name, group in layout.groups.items()
        if group.importance
    }
    return layout, allocation, importance


def matrices(layout, allocation):
    """Yields `(name, place, format, float32 weights)`: an expert at a time, where groups have some."""
    for name, group in layout.groups.items():
        for fmt, experts in allocation.parts(layout, name):
            for expert in experts:
                yield name, expert, fmt, read_tensor(layout.inventory, group.sources[expert])
            if not experts:
                yield name, None, fmt, group_weights(layout, group)


def raw_seconds(layout, allocation, importance):
    """Of `ggml_quantize_chunk` alone: clock and processors."""
    total = np.zeros(2)
    with ThreadPoolExecutor(THREADS) as pool:
        for name, expert, fmt, weights in matrices(layout, allocation):
            GGML.prepare(fmt)
            given = importance.get(name) if layout.groups[name].importance else None
            if given is not None:
                given = given if expert is None or given.ndim == 1 else given[expert]
                given = np.broadcast_to(given, (*weights.shape[:-2], weights.shape[-1]))
                given = np.ascontiguousarray(given).reshape(-1, weights.shape[-1])
            flat = weights.reshape(-1, *weights.shape[-2:])
            out = np.zeros((*flat.shape[:2], fmt.nbytes((1, flat.shape[-1]))), np.uint8)
            step = -(-flat.shape[1] // THREADS) if len(flat) < THREADS else flat.shape[1]
            pieces = [(m, i) for m in range(len(flat)) for i in range(0, flat.shape[1], step)]

            def work(piece, flat=flat, out=out, given=given, fmt=fmt, step=step):
                matrix, start = piece
                rows = flat[matrix, start : start + step]
                library().ggml_quantize_chunk(
                    TYPES[fmt.name],
                    rows.ctypes.data,
                    out[matrix, start:].ctypes.data,
                    0,
                    len(rows),
                    flat.shape[-1],
                    None if given is None else given[matrix].ctypes.data,
                )

            began = now()
            list(pool.map(work, pieces))
            total += now() - began
    return total


def now():
    return np.array([time.perf_counter(), time.process_time()])


def written_seconds(layout, allocation, importance, out):
    """Of `materialize`, from an empty encodings: clock and processors."""
    for name in ("encoding-bank", "encoding-written"):
        shutil.rmtree(out / name, ignore_errors=True)
    encodings = Encodings(out / "encoding-bank", layout, importance, threads=THREADS)
    began = now()
    source = EncodedTensors(encodings, allocation)
    materialize(source, out / "encoding-written", container="gguf", importance="0" * 64)
    return now() - began


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    out = args.out.resolve()
    (out / "cache").mkdir(parents=True, exist_ok=True)
    found = {}
    for what, made in (
        ("reference, 2.25 effective bits", reference(out)),
        (f"Q2_K, one layer of {args.experts} experts", large(out, args.experts)),
    ):
        layout, allocation, importance = made
        _ = layout.inventory.digest  # a search has it
        stored = (fmt for g in layout.groups for fmt, _ in allocation.parts(layout, g))
        for fmt in set(stored):
            GGML.prepare(fmt)
        counts = allocation.counts
        weights = sum(
            int(np.prod(g.shape_with(counts.get(g.layer, 0)))) for g in layout.groups.values()
        )
        rows = []
        for _ in range(args.rounds):
            raw = raw_seconds(layout, allocation, importance)
            rows.append((raw, written_seconds(layout, allocation, importance, out)))
        raw, written = (np.array(x) for x in zip(*rows, strict=True))
        found[what] = {"weights": weights, "threads": THREADS} | {
            name: {
                "raw_seconds": raw[:, i].round(2).tolist(),
                "written_seconds": written[:, i].round(2).tolist(),
                "throughput_over_raw": round(float(raw[:, i].min() / written[:, i].min()), 3),
            }
            for i, name in enumerate(("clock", "processors"))
        }
        print(what, json.dumps(found[what]), flush=True)
        for name in ("encoding-bank", "encoding-written"):
            shutil.rmtree(out / name)
    (HERE / "encoding.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
