"""The joint search against one of the weights alone, at the same bytes of the whole device.

    python studies/device/scripts/joint.py --out DIR

At every total, and at the first once more under a limit on what a token reads: the space of
`search_spaces/whole-device.toml`; then weights alone, with keys and values in F16, the original's
experts used and the micro-batch that the joint search took. Both are searched with the same trials,
picked on the selection split, and scored on held-out documents of the report split. What was
finished is in `joint.json` and is not run again.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from allocator import api
from allocator.app.study_file import DeviceBudgetSpec
from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation_record import AllocationRecord
from allocator.scoring.scorer import mean

HERE = Path(__file__).resolve().parents[1]
TOTALS = (43_250_000, 41_400_000)  # weights alone: about 2.25 and 1.75 effective bits
BANDWIDTH = 20_000_000_000
READ_SHARE = 0.85  # of what the weights-only pick reads, under the limit
REPORT = 96
RESAMPLES = 2000


def folder_of(out, name, space):
    """A copy of the study with another space."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.toml").write_text(space)
    lines = []
    for line in (HERE / "study.toml").read_text().splitlines():
        key, _, value = line.partition(" = ")
        if key in ("checkpoint", "documents", "splits", "report"):
            line = f'{key} = "{(HERE / value.strip(chr(34))).resolve()}"'
        lines.append('space = "space.toml"' if key == "space" else line)
    (folder / "study.toml").write_text("\n".join(lines) + "\n")
    return folder


def search(out, name, space, device, trials, threads):
    folder = folder_of(out, name, space)
    found = api.search(folder, device=device, trials=trials, threads=threads)
    record = AllocationRecord.read(found.pick)
    study_folder = StudyFolder(folder, threads=threads)
    documents = study_folder.calibration.report[:REPORT]
    scorer = study_folder.scorers.on(documents)
    allocation = record.decision
    kl = scorer.score(allocation).kl
    weights = [len(d.ids) for d in documents]
    memory = {k: v for k, v in record.bytes.items() if k.startswith("device_")}
    return {
        "search": record.loss["search"],
        "selection": record.loss["selection"],
        "report": mean(kl, documents),
        "bits": round(record.effective_bits, 3),
        "experts": next(iter(allocation.counts.values())),
        **allocation.runtime_settings._asdict(),
        "token_bytes": allocation.token_bytes(study_folder.layout, device.context or 256),
        "memory": memory,
        "kl": [float(v) for v in kl],
        "tokens": weights,
        "trials": found.trials,
    }


def interval(one, other):
    """Median and 95 % of the ratio of token-weighted means, documents resampled in pairs."""
    rng = np.random.default_rng(0)
    a, b, w = (np.array(v) for v in (one["kl"], other["kl"], one["tokens"]))
    picks = rng.integers(len(w), size=(RESAMPLES, len(w)))
    ratios = (a[picks] * w[picks]).sum(1) / (b[picks] * w[picks]).sum(1)
    return np.quantile(ratios, [0.025, 0.975])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    path = HERE / "joint.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    joint_space = (HERE.parents[1] / "search_spaces" / "whole-device.toml").read_text()

    def run(name, space, device):
        if name not in results:
            results[name] = search(args.out, name, space, device, args.trials, args.threads)
            path.write_text(json.dumps(results, indent=1) + "\n")
        return results[name]

    print("| total | limit | joint: KL, bits, decisions | weights alone | ratio (95 %) |")
    print("|---|---|---|---|---|")
    for total in TOTALS:
        limit = None
        for kind in ("", "-speed") if total == TOTALS[0] else ("",):
            device = DeviceBudgetSpec(
                memory=total, context=256, sequences=8, bandwidth=BANDWIDTH,
                min_tokens_per_second=limit,
            )  # fmt: skip
            joint = run(f"{total}-joint{kind}", joint_space, device)
            batch = joint["micro_batch"]
            alone = run(
                f"{total}-weights{kind}",
                f"schema = 1\nmicro_batch = [{batch}]\n",
                device,
            )
            low, high = interval(joint, alone)
            told = f"{joint['experts_used']} used, {joint['kv_format']}, micro-batch {batch}"
            print(
                f"| {total:,} | {'' if limit is None else f'{limit:.0f} tokens/s'} "
                f"| {joint['report']:.4f}, {joint['bits']}, {joint['experts']} experts, {told} "
                f"| {alone['report']:.4f}, {alone['bits']}, {alone['experts']} experts "
                f"| {joint['report'] / alone['report']:.3f} ({low:.3f}-{high:.3f}) |",
                flush=True,
            )
            limit = BANDWIDTH / (READ_SHARE * alone["token_bytes"])


if __name__ == "__main__":
    main()
