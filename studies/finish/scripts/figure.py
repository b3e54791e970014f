"""Draws KL at equal bytes, of mixes, picks and finished picks, from summary.csv, over.csv and hull.csv.

    python studies/finish/scripts/figure.py docs/figures/finish.svg

Every point is a row of these files: held-out report documents of the reference model, target gguf. The
mixes' line ends where they do: below 2.09 bits llama.cpp's formats leave none but IQ1_S throughout.
"""

import sys
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parents[1]
COLORS = {"best mix of formats": "#8a8f98", "pick": "#3b6ea8", "pick, finished": "#2f7d4f"}


def series():
    summary = pd.read_csv(HERE / "summary.csv")
    summary["part"] = summary["part"].str.strip()
    rows = summary[
        (summary["model"] == "reference") & (summary["target"] == "gguf")
        & (summary["split"] == "report") & (summary["part"] == "all")
    ]  # fmt: skip
    over = pd.read_csv(HERE / "over.csv")
    over = over[
        (over["target"] == "gguf")
        & (over["split"] == "report")
        & ~over["pruned"]
        & (over["bits"] > 2.09)
    ]
    newest = rows.drop_duplicates("bits", keep="last").sort_values("bits")
    hull = over.drop_duplicates("bits", keep="last").sort_values("bits")
    yield "best mix of formats", hull["bits"], hull["hull"]
    yield "pick", newest["bits"], newest["unfinished"]
    yield "pick, finished", newest["bits"], newest["finished"]


def main(path):
    plt.rcParams["svg.hashsalt"] = "allocator"
    figure, axis = plt.subplots(figsize=(7.2, 3.6))
    for name, bits, kl in series():
        axis.plot(bits, kl, "o-", color=COLORS[name], label=name, linewidth=2, markersize=5)
    axis.set_yscale("log")
    axis.set_xlabel("effective bits per weight")
    axis.set_ylabel("KL to the original, nats per token")
    axis.set_xticks([1.75, 2, 2.25, 3, 4])
    axis.set_xticklabels(["1.75", "2", "2.25", "3", "4"])
    axis.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    axis.set_yticklabels(["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
