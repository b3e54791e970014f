"""How far chosen codes lower the quadratic, and how fast, over ggml's own encoder in the same run.

    python studies/finish/scripts/speed.py [--documents 24] [--experts 4] [--formats IQ2_XXS ...]
                                           [--rounds 1] [--not-ahead] [--damping .01]
                                           [--pseudo-tokens 256]

For the experts of three groups of the reference model: the quadratic after over before, in the
moments that codes were chosen in (train) and in those of documents that were not used (held out).
Weights per second of one core, processor time: ggml's encoder with importance, and ours; ggml's
tables are built before.
"""

import argparse
import time
from pathlib import Path

import torch

from allocator.app.study_folder import StudyFolder
from allocator.codecs.ggml import GGML
from allocator.finishing.codes import choose, quadratic
from allocator.formats import FORMATS
from allocator.profiling.second_moments import Smoothing, second_moments
from allocator.scoring.swap_model import SwapModel
from allocator.targets.group_weights import group_weights

REFERENCE = Path(__file__).resolve().parents[2] / "reference"
GROUPS = ("layers.1.experts.gate", "layers.5.experts.up", "layers.3.experts.down")
GRIDS = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
SCALARS = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL", "Q8_0")


def no_formats(name, fmt, *args):
    raise AssertionError("the model stays as it was released")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--formats", nargs="+", default=[*GRIDS, *SCALARS])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--not-ahead", action="store_true")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--pseudo-tokens", type=float, default=256.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    study_folder = StudyFolder(REFERENCE)
    layout, documents = study_folder.layout, study_folder.calibration.search
    swap = SwapModel(layout, no_formats)
    groups = [layout.groups[name] for name in GROUPS]
    smoothing = Smoothing(pseudo_tokens=args.pseudo_tokens, damping=args.damping)
    splits = documents[: args.documents], documents[args.documents : 2 * args.documents]
    moments, held_out = (
        {
            group.name: h[: args.experts].clone()
            for group, h in second_moments(swap, part, groups, smoothing=smoothed)
        }
        for part, smoothed in zip(splits, (smoothing, Smoothing(1.0, 1e-6)), strict=True)
    )
    weights = {
        group.name: torch.from_numpy(group_weights(layout, group)[: args.experts])
        for group in groups
    }
    print("format   ", *(f"{name[7:]:>22s}" for name in GROUPS), "   ggml M/s  own M/s  own/ggml")
    for name in args.formats:
        fmt = FORMATS[name]
        form = GGML.block_format(fmt)
        assert form is not None
        GGML.prepare(fmt)
        warm = GROUPS[0]
        encoded = GGML.encode(
            weights[warm][:1, :8].numpy(), fmt, moments[warm][:1].diagonal(0, 1, 2).numpy()
        )
        choose(weights[warm][:1, :8], torch.from_numpy(encoded), form, moments[warm][:1])
        cells, seconds, n = [], [0.0, 0.0], 0
        for group in GROUPS:
            w, h = weights[group], moments[group]
            began = time.process_time()
            data = torch.from_numpy(GGML.encode(w.numpy(), fmt, h.diagonal(0, 1, 2).numpy()))
            encoded_at = time.process_time()
            chosen = choose(w, data, form, h, rounds=args.rounds, ahead=not args.not_ahead)
            seconds[0] += encoded_at - began
            seconds[1] += time.process_time() - encoded_at
            n += w.numel()
            before, after = (
                float(quadratic(w, form.values(d), held_out[group]).sum())
                for d in (data, chosen.data)
            )
            train = float(chosen.after.sum() / chosen.before.sum())
            cells.append(f"{train:.3f} held out {after / before:.3f}")
        ggml, own = (n / s / 1e6 for s in seconds)
        print(
            f"{name:9s}",
            *(f"{c:>22s}" for c in cells),
            f"{ggml:10.2f} {own:8.2f} {own / ggml:9.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
