"""Holds a torch device against the cores: the same study on both, seconds and losses side by side.

    python studies/device/scripts/torch_device.py --out DIR [--devices cpu cuda] [--trials 8]

For each of two checkpoints (the reference model, and a random one of DeepSeek-V3's form) and
each device, with a cache of its own: `search` of some trials, its seconds by what they were spent on;
then, of one fixed allocation, `score` with nothing left to encode. Losses on the devices differ by
rounding alone: the table says by how much. Everything goes through the command line, in processes of
their own. Finished rows are in DIR/rows.jsonl; running again measures the missing ones.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "studies/reference"
BUILD = ROOT / "studies/scale/scripts/build_checkpoint.py"
RANDOM = {
    "--layers": 2, "--experts": 16, "--experts-used": 4, "--heads": 16, "--hidden": 2048,
    "--width": 768, "--dense-width": 4096, "--vocabulary": 4096,
}  # fmt: skip


def allocator(*arguments, cache):
    """Runs a verb; seconds, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "allocator.cli", *map(str, arguments), "--quiet"],
        env={**os.environ, "ALLOCATOR_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return time.perf_counter() - began, done.stdout


def reference_study(folder, trials):
    """The committed question, with fewer documents and trials."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", "generated", "splits.json"):
        if not (folder / name).exists():
            (folder / name).symlink_to(REFERENCE / name)
    text = (REFERENCE / "study.toml").read_text()
    text = text.replace("../../search_spaces", str(ROOT / "search_spaces"))
    text = re.sub(r"trials = \d+", f"trials = {trials}", text)
    (folder / "study.toml").write_text(text)


def random_study(folder, trials, *, streamed):
    """A random checkpoint of about 140 million weights; documents of random ids."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder.parent / "random-model"
    shape = [str(x) for pair in RANDOM.items() for x in pair]
    subprocess.run([sys.executable, BUILD, "--out", model, *shape], check=True)
    rng = np.random.default_rng(0)
    documents = rng.integers(0, RANDOM["--vocabulary"], (48, 256)).tolist()
    lines = [json.dumps({"ids": ids, "domain": "random"}) + "\n" for ids in documents]
    (folder / "documents.jsonl").write_text("".join(lines))
    (folder / "study.toml").write_text(
        f'schema = 1\ncheckpoint = "{model}"\ntarget = "gguf"\ntokenizer = "none"\n'
        f'sampler = "{"knapsack" if streamed else "auto"}"\ntrials = {trials}\n'
        'space = "space.toml"\n[budget]\nweights = "180MiB"\n[calibration]\n'
        'documents = "documents.jsonl"\nstatistics_documents = 16\nsearch_documents = 16\n'
        "selection_documents = 8\nmeasured_documents = 4\ncurvature_documents = 8\n"
        + ("[streamed]\ncandidates = 4\n" if streamed else "")
    )
    # formats that encode fast: what is compared is the forward and backward passes
    (folder / "space.toml").write_text(
        'schema = 1\nformats = ["Q8_0", "Q6_K", "Q3_K", "Q2_K"]\n[experts]\nmixes = false\n'
    )


def measured(folder, fixed, device, cache):
    """A row: seconds of a search by part, and of scoring one recorded allocation; its loss."""
    wall, text = allocator("search", folder, "--torch-device", device, cache=cache)
    parts = dict(re.findall(r"(scoring|gradient|sampler|storage) ([0-9.]+)", text))
    allocator("score", fixed, "--study", folder, "--torch-device", device, cache=cache)  # encodes
    again, text = allocator(
        "score", fixed, "--study", folder, "--torch-device", device, cache=cache
    )
    loss = float(re.search(r"^loss +(\S+)", text, re.M)[1])
    return {"search": wall, **{k: float(v) for k, v in parts.items()}, "score": again, "loss": loss}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"])
    parser.add_argument("--studies", nargs="+", default=["reference", "random", "streamed"])
    parser.add_argument("--trials", type=int, default=8)
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for study in given.studies:
        for device in given.devices:
            if any((r["study"], r["device"]) == (study, device) for r in rows):
                continue
            folder = out / f"{study}-{device.replace(':', '_')}"
            if study == "reference":
                reference_study(folder, given.trials)
            else:
                random_study(folder, given.trials, streamed=study == "streamed")
            # one record, with the importance beside it: the same encoded bytes on every device
            home = REFERENCE if study == "reference" else out / f"{study}-{given.devices[0]}"
            fixed = home / "allocations/pick.json"
            row = measured(folder, fixed, device, out / f"cache-{folder.name}")
            rows.append({"study": study, "device": device, **row})
            with open(path, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print("| study | device | search, s | scoring | gradient | score again, s | loss |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['study']} | {r['device']} | {r['search']:.1f} | {r.get('scoring', 0):.1f} | "
            f"{r.get('gradient', 0):.1f} | {r['score']:.1f} | {r['loss']:.9f} |"
        )


if __name__ == "__main__":
    main()
