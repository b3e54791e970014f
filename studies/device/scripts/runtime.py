"""Tokens per second and resident memory in llama.cpp, against what is predicted from shapes.

    python studies/device/scripts/runtime.py --out DIR

On a random checkpoint of DeepSeek-V3's widths whose files are far larger than any cache
(`studies/scale/scripts/build_checkpoint.py`: 3 layers, 16 experts). Every allocation is written as
GGUF, loaded in a process of its own, filled to its context, and decodes token by token. Predicted
are the bytes that a token reads over the bandwidth measured here, and the device's memory. Run it
on a quiet machine; what was finished is in `runtime.json` and is not run again. Needs 12 GB of disk.
"""

import argparse
import json
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1]
BUILD = HERE.parents[1] / "studies/scale/scripts/build_checkpoint.py"
CONTEXT, MICRO_BATCH = 256, 64
N_TOKENS = 24
CASES = {  # formats of routed experts and of the rest, retained, used, keys and values
    "Q8_0": ("Q8_0", "Q8_0", 16, 8, "f16"),
    "Q8_0, 4 used": ("Q8_0", "Q8_0", 16, 4, "f16"),
    "Q8_0, 2 used, q8_0": ("Q8_0", "Q8_0", 16, 2, "q8_0"),
    "Q8_0, 8 retained": ("Q8_0", "Q8_0", 8, 8, "f16"),
    "Q6_K": ("Q6_K", "Q6_K", 16, 8, "f16"),
    "Q4_0": ("Q4_0", "Q4_0", 16, 8, "f16"),
    "Q3_K / Q8_0": ("Q3_K", "Q8_0", 16, 8, "f16"),
}


def resident():
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {r[0][:-1]: int(r[1]) * 1024 for r in rows if r[-1] == "kB"}


def measure(path, case, threads):
    """In a process of its own; prints its result as the last line."""
    from allocator.export.gguf.llamacpp import LlamaCpp, library

    library()
    before = resident()["VmRSS"]
    _, _, _, _, kv_format = CASES[case]
    with LlamaCpp(
        path, context=CONTEXT, threads=threads, exact=False, kv_format=kv_format,
        micro_batch=MICRO_BATCH, repack=False,
    ) as llama:  # fmt: skip
        rng = np.random.default_rng(0)
        prompt = rng.integers(llama.n_vocab, size=CONTEXT - N_TOKENS).tolist()
        llama._clear()
        llama.decode(prompt, 0)
        seconds = []
        for i in range(N_TOKENS):
            began = time.perf_counter()
            llama.decode([int(rng.integers(llama.n_vocab))], len(prompt) + i)
            llama._row(0)
            seconds.append(time.perf_counter() - began)
        grown = resident()["VmRSS"] - before
        found = llama.buffers()
    print(json.dumps({
        "seconds_per_token": float(np.median(seconds)),
        "grown": grown,
        "reported": {
            "weights": found.weights, "kv_cache": found.kv_cache, "compute": found.compute,
        },
    }))  # fmt: skip


def bandwidth(threads):
    """Bytes per second that a sum over 1 GiB reads; the best of five."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(1 << 28)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - began))
    return best


def allocation_of(layout, case):
    from dataclasses import replace

    from allocator.decision.baselines import mixed

    experts, rest, retained, used, kv_format = CASES[case]
    rankings = dict.fromkeys(layout.layers, tuple(range(layout.inventory.n_experts)))
    found = mixed(layout, rankings, experts=experts, rest=rest, count=retained)
    return replace(found, experts_used=used, kv_format=kv_format, micro_batch=MICRO_BATCH)


def table(results):
    rate = results["bandwidth"]
    rows = {n: r for n, r in results.items() if n != "bandwidth"}
    lines = [
        f"bandwidth {rate / 1e9:.1f} GB/s",
        "",
        "| allocation | read per token, MB | predicted | measured tokens/s | measured / predicted "
        "| memory predicted, MB | grown / predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    predicted, measured = [], []
    for name, row in rows.items():
        predicted.append(rate / row["token_bytes"])
        measured.append(1 / row["seconds_per_token"])
        lines.append(
            f"| {name} | {row['token_bytes'] / 1e6:.0f} | {predicted[-1]:.1f} "
            f"| {measured[-1]:.2f} | {measured[-1] / predicted[-1]:.2f} "
            f"| {row['memory'] / 1e6:.0f} | {row['grown'] / row['memory']:.3f} |"
        )
    ranks = [np.argsort(np.argsort(v)) for v in (predicted, measured)]
    factors = np.array(measured) / predicted
    lines += [
        "",
        f"rank correlation {np.corrcoef(*ranks)[0, 1]:.3f}; measured / predicted: median "
        f"{np.median(factors):.2f}, {factors.min():.2f} to {factors.max():.2f}",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(Path(args.measure[0]), args.measure[1], args.threads)

    from allocator.checkpoint.reading import read_inventory
    from allocator.codecs.encodings import Encodings
    from allocator.export.checkpoint import materialize
    from allocator.export.tensors import EncodedTensors
    from allocator.profiling.statistics import importance_digest
    from allocator.targets import GGUF
    from allocator.targets.device_memory import Workload

    path = HERE / "runtime.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    args.out.mkdir(parents=True, exist_ok=True)
    if missing := [c for c in CASES if c not in results]:
        runpy.run_path(str(BUILD))["build"](args.out / "checkpoint", layers=3, experts=16, fp8=True)
        layout = GGUF.layout(read_inventory(args.out / "checkpoint"))
        encodings = Encodings(args.out / "bank", layout, {}, threads=args.threads)
    for case in missing:
        print(time.strftime("%H:%M:%S"), case, flush=True)
        allocation, folder = allocation_of(layout, case), args.out / "gguf"
        shutil.rmtree(folder, ignore_errors=True)
        written = materialize(
            EncodedTensors(encodings, allocation),
            folder,
            container="gguf",
            importance=importance_digest({}),
        )
        command = [sys.executable, __file__, "--out", str(args.out), "--threads", str(args.threads)]
        file = written.folder / written.manifest.file
        done = subprocess.run(
            [*command, "--measure", str(file), case], stdout=subprocess.PIPE, text=True, check=True
        )
        memory = allocation.device_memory(layout, Workload(CONTEXT, 1))
        results[case] = json.loads(done.stdout.splitlines()[-1]) | {
            "token_bytes": allocation.token_bytes(layout, CONTEXT),
            "memory": memory.total,
        }
        results["bandwidth"] = max(results.get("bandwidth", 0.0), bandwidth(args.threads))
        path.write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(args.out / "gguf", ignore_errors=True)
    print(table(results))


if __name__ == "__main__":
    main()
