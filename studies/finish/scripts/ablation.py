"""Finish an allocation by a recipe that the command line does not offer, for the ablation.

    python studies/finish/scripts/ablation.py STUDY RECORD OUT [--parts codes,norms] [--plain]
        [--gain SHARE] [--rate R] [--moments N] [--tuning N] [--seed N] [--target T] [--cache DIR] [--threads N]

Writes the record OUT.json beside RECORD, which `measure.py` scores.
"""

import argparse
from pathlib import Path

import msgspec

from allocator.app.finish_stage import FinishRequest, finish
from allocator.app.resources import Resources
from allocator.finishing.recipe import PARTS, Recipe


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("out")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--plain", action="store_true", help="without Fisher weights")
    parser.add_argument("--gain", type=float, default=Recipe().gain)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--moments", type=int)
    parser.add_argument("--tuning", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    changes = {"parts": tuple(args.parts.split(",")), "fisher": not args.plain}
    changes |= {"seed": args.seed, "gain": args.gain, "rate": args.rate}
    if args.moments is not None:
        changes["moments_tokens"] = args.moments
    if args.tuning is not None or args.parts == "codes":
        changes["tuning_tokens"] = args.tuning or 0
    recipe = msgspec.structs.replace(Recipe(), **changes)
    resources = Resources(cache=args.cache, threads=args.threads, progress=False)
    done = finish(
        FinishRequest(
            args.study, args.record, recipe=recipe, out=args.out, target=args.target,
            resources=resources,
        )
    )  # fmt: skip
    for split, loss in done.before.items():
        after = done.after[split]
        print(f"{args.out} {split}: {loss:.5f} to {after:.5f}, {after / loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
