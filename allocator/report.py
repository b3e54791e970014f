"""Held-out figures: KL and perplexity of the original, of baselines, and of found allocations.

In: a study and allocation files. Out: one table. Invariant: every figure is on documents that
neither search nor selection has seen, or on a text file that the caller names; the column `split`
says which.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from allocator.allocation import Allocation
from allocator.calibration.documents import Document, interleaved
from allocator.errors import CalibrationError, StudyError
from allocator.proxy.scorer import DocumentLosses, by_domain, mean, perplexity
from allocator.proxy.stream import AnyScorer
from allocator.workspace import Workspace

N_DOCUMENTS = 48


def evaluate(
    study: str | Path,
    allocations: Sequence[str | Path] | None = None,
    *,
    documents: int | Literal["all"] | None = None,
    text: str | Path | None = None,
    pruned: bool = False,
    tasks: bool = False,
    domains: bool = False,
    **options: Any,
) -> pd.DataFrame:
    """KL, perplexity and top-1 agreement on held-out documents, smallest first.

    Args:
        study: its folder.
        allocations: files; all of `allocations/*.json` by default.
        documents: how many, taken from the domains in turn; up to 48 by default.
        text: JSON lines to evaluate on instead of the report split.
        pruned: baselines also with one smaller retained count in every layer.
        tasks: lm-eval's two tasks for the original, the baselines nearest in size, the allocations.
        domains: columns of KL and perplexity per domain.
        options: of `Workspace`.
    """
    workspace = Workspace(study, **options)
    if tasks and workspace.spec.streamed is not None:
        raise StudyError(
            f"{workspace.folder}: --tasks needs the model in memory, study.toml has [streamed]; "
            "leave --tasks out"
        )
    held_out = _documents(workspace, documents, text)
    scorer = workspace.scorer_on(held_out)
    rows = workspace.baselines(pruned=pruned)
    found, scorers = _allocations(workspace, scorer, allocations)
    table = [_original(workspace, scorer)]
    shown = tqdm(rows + found, desc="evaluate", disable=not workspace.progress)
    measured = _each(rows + found, [*(scorer for _ in rows), *scorers])
    for (name, allocation), losses in zip(shown, measured, strict=True):
        table.append(_row(workspace, scorer.documents, name, allocation, losses, domains=domains))
    frame = pd.DataFrame(table).sort_values("bytes", kind="stable", ignore_index=True)
    frame["split"] = str(text or "report")
    frame["documents"] = len(held_out)
    if tasks:
        _add_tasks(workspace, frame, dict(found), held_out)
    return frame


def _documents(
    workspace: Workspace, n: int | Literal["all"] | None, text: str | Path | None
) -> list[Document]:
    found = workspace.report if text is None else interleaved(workspace.read_documents(Path(text)))
    if n is None or n == "all":
        return found[: N_DOCUMENTS if n is None else None]
    if not 0 < n <= len(found):
        raise CalibrationError(f"{n} documents asked for, needed 1..{len(found)}, or --all")
    return found[:n]


def _allocations(
    workspace: Workspace, scorer: AnyScorer, paths: Sequence[str | Path] | None
) -> tuple[list[tuple[str, Allocation]], list[AnyScorer]]:
    """Allocation files by name, and what scores each as it was encoded."""
    chosen = [Path(p) for p in paths or sorted((workspace.folder / "allocations").glob("*.json"))]
    encoded = [workspace.read_encoded(p) for p in chosen]
    scorers: dict[str | None, AnyScorer] = {None: scorer, workspace.profile.importance: scorer}
    for path, (_, importance) in zip(chosen, encoded, strict=True):
        if importance not in scorers:
            scorers[importance] = workspace.scorer_with(importance, scorer.documents, beside=path)
    rows = [(f"* {p.stem}", decision) for p, (decision, _) in zip(chosen, encoded, strict=True)]
    return rows, [scorers[importance] for _, importance in encoded]


def _each(
    rows: Sequence[tuple[str, Allocation]], scorers: Sequence[AnyScorer]
) -> Iterator[DocumentLosses]:
    """Yields the losses of each allocation; neighbours with one scorer share its passes."""
    paired = zip(rows, scorers, strict=True)
    for _, group in groupby(paired, key=lambda pair: id(pair[1])):
        together = list(group)
        yield from together[0][1].each([decision for (_, decision), _ in together])


def _original(workspace: Workspace, scorer: AnyScorer) -> dict[str, Any]:
    weights = workspace.inventory.n_searched_weights
    losses = scorer.score_original()
    stored = sum(t.total_bytes for t in workspace.inventory.tensors.values() if t.role.is_encoded)
    return {
        "name": "original",
        "bits": stored * 8 / weights,
        "bytes": stored,
        "kl": mean(losses.kl, scorer.documents),
        "perplexity": perplexity(losses.nll, scorer.documents),
        "top1": mean(losses.top1, scorer.documents),
    }


def _row(
    workspace: Workspace,
    documents: Sequence[Document],
    name: str,
    allocation: Allocation,
    losses: DocumentLosses,
    *,
    domains: bool,
) -> dict[str, Any]:
    size = allocation.nbytes(workspace.layout)
    row: dict[str, Any] = {
        "name": name,
        "bits": size.encoded * 8 / workspace.inventory.n_searched_weights,
        "bytes": size.encoded,
        "file_bytes": size.file,
        "kl": mean(losses.kl, documents),
        "perplexity": perplexity(losses.nll, documents),
        "top1": mean(losses.top1, documents),
        "experts": " ".join(str(n) for n in allocation.counts.values()),
    }
    if domains:
        row |= {f"kl_{d}": v for d, v in by_domain(losses.kl, documents).items()}
        nll = by_domain(losses.nll, documents)
        row |= {f"perplexity_{d}": math.exp(v) for d, v in nll.items()}
    return row


def _add_tasks(
    workspace: Workspace,
    frame: pd.DataFrame,
    found: dict[str, Allocation],
    documents: Sequence[Document],
) -> None:
    """Adds lm-eval's figures for the original, the found ones and their neighbours in size."""
    from transformers import AutoTokenizer

    from allocator.evaluate.tasks import run_tasks, write_tasks

    if not (workspace.inventory.path / "tokenizer.json").is_file():
        raise CalibrationError(
            f"{workspace.inventory.path}: no tokenizer.json, which --tasks needs"
        )
    tokenizer = AutoTokenizer.from_pretrained(workspace.inventory.path)
    folder = workspace.cache / "lm-eval"
    folder.mkdir(parents=True, exist_ok=True)
    names = write_tasks(documents, tokenizer, folder)
    swap = workspace.profiler.swap
    known = dict(workspace.baselines()) | found
    chosen = {"original", *found} | _neighbours(frame, found)
    frame["acc"] = np.nan
    frame["lm_eval_perplexity"] = np.nan
    for at, row in tqdm(
        frame.iterrows(), desc="lm-eval", total=len(frame), disable=not workspace.progress
    ):
        if row["name"] not in chosen:
            continue
        if row["name"] == "original":
            swap.reset()
        else:
            swap.put_allocation(known[row["name"]])
        results = run_tasks(swap.model, tokenizer, folder, names)
        frame.loc[at, "acc"] = results["report_continuation"]["acc"]
        frame.loc[at, "lm_eval_perplexity"] = results["report_perplexity"]["token_perplexity"]


def _neighbours(frame: pd.DataFrame, found: dict[str, Allocation]) -> set[str]:
    """The unpruned baselines just below and above each found allocation."""
    plain = frame[
        ~frame["name"].isin([*found, "original"]) & ~frame["name"].str.contains("experts")
    ]
    names: set[str] = set()
    for size in frame[frame["name"].isin(found)]["bytes"]:
        names |= set(plain[plain["bytes"] <= size]["name"].tail(1))
        names |= set(plain[plain["bytes"] >= size]["name"].head(1))
    return names
