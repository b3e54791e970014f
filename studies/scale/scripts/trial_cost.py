"""What a trial costs, in plain forward passes of the same model in the same process.

    python studies/scale/scripts/trial_cost.py [STUDY] [--trials 100] [--threads N] [--csv FILE]

Runs the study's default search on a copy of its folder, trial by trial. A plain forward is stock
transformers, float32, logits of every position, the search split in the same batches; it is timed
between trials, all along, and its median counts. Printed, medians over trials:

- seconds of scoring per forward token actually run, over those of a plain forward (at most 1.1 is
  wanted);
- seconds per proposed candidate, over a plain forward of the full search split (at most .6): of
  scoring alone, and of everything (gradients, sampler and storage too).
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import optuna
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from allocator.app.search_setup import prepare
from allocator.app.study_folder import StudyFolder
from allocator.scoring.documents import batches
from allocator.study.stop_rule import StopRule
from allocator.study.trials import GRADIENT_TOKENS, RESULT

EVERY = 10
"""Trials from one plain forward to the next."""


class Plain:
    """Stock transformers on the documents of a scorer."""

    def __init__(self, path, documents, n_tokens):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        chosen = batches(documents, 0, len(documents), n_tokens=n_tokens)
        self.ids = [torch.tensor([documents[i].ids for i in batch]) for batch in chosen]
        self.seconds = []

    @torch.inference_mode()
    def run(self):
        began = time.perf_counter()
        for ids in self.ids:
            self.model(input_ids=ids, use_cache=False)
        self.seconds.append(time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=Path("studies/reference"))
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as place:
        # where the paths of study.toml lead to the same files
        root = given.study.resolve().parents[1]
        Path(place, "search_spaces").symlink_to(root / "search_spaces")
        folder = Path(place, "studies", given.study.name)
        ignored = shutil.ignore_patterns("journal*", "out", "search.*", "model", "generated")
        shutil.copytree(given.study, folder, ignore=ignored)
        for name in ("model", "generated"):
            if (given.study / name).exists():
                (folder / name).symlink_to((given.study / name).resolve())
        frame, plain, scorer = measured(folder, given)
    if given.csv:
        frame.to_csv(given.csv, index=False)
    report(frame, plain, scorer)


def measured(folder, given):
    """One row per trial; the plain forwards beside them."""
    study_folder = StudyFolder(folder, threads=given.threads)
    launch = study_folder.launch()
    search = prepare(study_folder, launch, study_folder.study(launch))
    scorer = study_folder.scorers.trials
    scorer.ensure_reference(scorer.n_documents)  # no trial's; the profile has encoded everything
    plain = Plain(study_folder.inventory.path, scorer.documents, scorer.batch_tokens)
    for _ in range(3):
        plain.run()
    rows, began, before = [], time.perf_counter(), dict(search.seconds)

    def note(trial):
        nonlocal began, before
        tokens = trial.user_attrs[RESULT]["tokens"]
        spent = {what: s - before[what] for what, s in search.seconds.items()}
        row = {"trial": trial.number, "state": trial.state.name, "tokens": tokens, **spent}
        row["looked"] = trial.system_attrs.get(GRADIENT_TOKENS, 0)
        rows.append(row | {"seconds": time.perf_counter() - began})
        if trial.number % EVERY == 0:
            plain.run()
        began, before = time.perf_counter(), dict(search.seconds)

    search.run(StopRule(trials=given.trials), on_trial=note)
    return pd.DataFrame(rows), plain, scorer


def report(frame, plain, scorer):
    whole = pd.Series(plain.seconds).median()
    per_token = whole / scorer.n_tokens
    print(f"{torch.get_num_threads()} threads, {scorer.n_documents} documents, ", end="")
    print(
        f"{scorer.n_tokens:,} tokens; plain forward {whole:.2f} s, median of {len(plain.seconds)}"
    )
    print(f"(least {min(plain.seconds):.2f}, most {max(plain.seconds):.2f})")
    print(
        f"{len(frame)} trials: "
        + ", ".join(f"{n} {s}" for s, n in frame["state"].value_counts().items())
    )
    ratios = {
        "scoring per token run / plain": frame["scoring"] / frame["tokens"] / per_token,
        "scoring per candidate / plain forward of the split": frame["scoring"] / whole,
        "all seconds per candidate / plain forward of the split": frame["seconds"] / whole,
    }
    for name, values in ratios.items():
        low, middle, high = values.quantile([0.05, 0.5, 0.95])
        print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f}), mean {values.mean():.3f}")


if __name__ == "__main__":
    main()
