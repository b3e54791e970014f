"""Held-out figures: KL and perplexity of the original, of baselines, and of allocation files.

In: a study and allocation files. Out: one table. Invariant: every figure is on documents that
neither search nor selection has seen, or on a text file that the caller names; the column `split`
says which. They are kept in the study folder's `held-out.json`, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

import numpy as np
import pandas as pd

from allocator.app.held_out_file import HeldOutRow, HeldOutSplit, keep_row, rounded
from allocator.app.resources import StudyOptions
from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.tokenizer import read_tokenizer
from allocator.decision.allocation import Allocation
from allocator.errors import CalibrationError, StudyError, first_line
from allocator.evaluation.lm_eval_tasks import OWN, check_named
from allocator.files.progress import stepping
from allocator.scoring.documents import Document, digest, interleaved

if TYPE_CHECKING:
    from allocator.scoring.candidates import Candidate
    from allocator.scoring.scorer import DocumentLosses
    from allocator.scoring.streamed_scorer import AnyScorer


N_DOCUMENTS = 48
"""Held-out documents, unless the caller says how many."""
NEAR = 0.1
"""A baseline is near an allocation if their encoded bytes differ by this share at most."""
Baselines = Literal["near", "all", "none"]
"""Which baselines stand beside the allocations."""


def evaluate(
    study: str | Path,
    allocations: Sequence[str | Path] | None = None,
    *,
    documents: int | Literal["all"] | None = None,
    text: str | Path | None = None,
    baselines: Baselines = "near",
    pruned: bool = False,
    tasks: bool | Sequence[str] = False,
    limit: int | None = None,
    domains: bool = False,
    on_table: Callable[[pd.DataFrame], None] | None = None,
    **options: Unpack[StudyOptions],
) -> pd.DataFrame:
    """Measures KL, perplexity and top-1 agreement on held-out documents, smallest first.

    Baselines are uniform formats, and role mixes that a skilled person would write.
    An allocation file that names finished weights has two rows: with them, and unfinished.
    Every row is kept in the study's `held-out.json`, for reports and notebooks.

    Args:
        study: its folder.
        allocations: files; all of `allocations/*.json` by default.
        documents: how many, taken from the domains in turn; up to 48 by default.
        text: JSON lines to evaluate on instead of the report split.
        baselines: `near`: those within a tenth of an allocation's bytes, and the next below and
            above it; `all`; `none`.
        pruned: baselines also with one smaller retained count in every layer.
        tasks: of lm-eval, for the original, the baselines nearest in size, the allocations: True
            for the two that are made of held-out documents, or names, also of lm-eval's own.
        limit: questions of each of lm-eval's own tasks; all by default.
        domains: columns of KL and perplexity per domain.
        on_table: called with the table so far whenever something was measured.
        options: as of `StudyOptions`.

    Raises:
        AllocatorError: one line on whatever is wrong, before anything is measured where it can be
            seen then.
    """
    names = OWN if tasks is True else [tasks] if isinstance(tasks, str) else tasks or ()
    check_named(names)
    study_folder = StudyFolder(study, **options)
    if tasks and study_folder.spec.streamed is not None:
        raise StudyError(
            f"{study_folder.path}: --tasks needs the model in memory, study.toml has [streamed]; "
            "leave --tasks out"
        )
    held_out = _documents(study_folder, documents, text)
    chosen = _chosen(study_folder, allocations)
    encoded = {name: study_folder.read_encoded(path) for name, path in chosen.items()}
    for allocation, _ in encoded.values():
        allocation.nbytes(study_folder.layout)  # which looks at the tokenizer too
    suite = _Tasks(study_folder, held_out, names, limit=limit) if names else None
    scorer = study_folder.scorers.on(held_out)
    from_files = _from_files(study_folder, scorer, encoded, chosen)
    decisions = [wanted.allocation for wanted in from_files.values()]
    plain = _beside(study_folder, decisions, baselines, pruned=pruned)
    rows = {name: _Wanted(allocation, allocation, scorer) for name, allocation in plain.items()}
    rows |= from_files
    table: list[dict[str, Any]] = []

    def measured(row: dict[str, Any]) -> pd.DataFrame:
        table.append(row)
        frame = pd.DataFrame(table).sort_values("bytes", kind="stable", ignore_index=True)
        frame["split"] = str(text or "report")
        frame["documents"] = len(held_out)
        if on_table is not None:
            on_table(frame)
        return frame

    kept = _Kept(study_folder, held_out, "report" if text is None else Path(text).name)
    losses = scorer.score_original()
    row = original_row(study_folder.inventory, held_out, losses)
    frame = measured(row)
    kept.add("original", row, losses)
    shown = stepping(rows.items(), "evaluate", unit="allocations", shown=study_folder.progress)
    for (name, wanted), its in zip(shown, _each(rows.values()), strict=True):
        row = _row(study_folder, scorer.documents, name, wanted.allocation, its, domains=domains)
        frame = measured(row)
        kept.add("baseline" if name in plain else "allocation", row, its, wanted)
    if suite is not None:
        for _ in suite.add(frame, rows, from_files):
            if on_table is not None:
                on_table(frame)
    return frame


def _beside(
    study_folder: StudyFolder, allocations: Iterable[Allocation], which: Baselines, *, pruned: bool
) -> dict[str, Allocation]:
    """The baselines that are measured beside allocations, by name."""
    if which not in get_args(Baselines):
        raise StudyError(f"baselines {which!r}: needed one of {', '.join(get_args(Baselines))}")
    if which == "none":
        return {}
    known = dict(study_folder.baselines(pruned=pruned, skilled=True))
    if which == "all":
        return known
    layout = study_folder.layout
    sizes = {name: a.nbytes(layout).encoded for name, a in known.items()}
    chosen: set[str] = set()
    for size in (a.nbytes(layout).encoded for a in allocations):
        chosen |= {name for name, n in sizes.items() if abs(n - size) <= NEAR * size}
        below = [name for name, n in sizes.items() if n <= size]
        above = [name for name, n in sizes.items() if n >= size]
        chosen |= {max(below, key=sizes.__getitem__)} if below else set()
        chosen |= {min(above, key=sizes.__getitem__)} if above else set()
    return {name: a for name, a in known.items() if name in chosen}


def _documents(
    study_folder: StudyFolder, n: int | Literal["all"] | None, text: str | Path | None
) -> list[Document]:
    held_out = (
        study_folder.calibration.report
        if text is None
        else interleaved(study_folder.calibration.read(Path(text)))
    )
    if n is None or n == "all":
        return held_out[: N_DOCUMENTS if n is None else None]
    if not 0 < n <= len(held_out):
        raise CalibrationError(f"{n} documents asked for, needed 1..{len(held_out)}, or --all")
    return held_out[:n]


def _chosen(study_folder: StudyFolder, paths: Sequence[str | Path] | None) -> dict[str, Path]:
    """Allocation files by the name of their row."""
    chosen = [Path(p) for p in paths or sorted((study_folder.path / "allocations").glob("*.json"))]
    stems = Counter(path.stem for path in chosen)
    return {f"* {p.stem if stems[p.stem] == 1 else p}": p for p in chosen}


@dataclass(frozen=True)
class _Wanted:
    """A row of the table.

    Attributes:
        allocation: of the row, whose bytes are shown.
        candidate: what is scored: the allocation, or its finished weights.
        scorer: whose model holds what the allocation is encoded with.
        weights: digest of finished weights; empty for plain ones.
    """

    allocation: Allocation
    candidate: Allocation | Candidate
    scorer: AnyScorer
    weights: str = ""


def _from_files(
    study_folder: StudyFolder,
    scorer: AnyScorer,
    encoded: Mapping[str, tuple[Allocation, str | None]],
    paths: Mapping[str, Path],
) -> dict[str, _Wanted]:
    """The rows of allocation files; where one names finished weights, two: with and without."""
    from allocator.app.record_weights import finished_candidate, record_of

    by_importance: dict[str | None, AnyScorer] = {
        None: scorer,
        study_folder.profile.importance: scorer,
    }
    rows: dict[str, _Wanted] = {}
    for name, (allocation, importance) in encoded.items():
        if importance not in by_importance:
            by_importance[importance] = study_folder.scorers.encoded_with(
                importance, scorer.documents, beside=paths[name]
            )
        plain = _Wanted(allocation, allocation, by_importance[importance])
        candidate = finished_candidate(study_folder, paths[name])
        if candidate is None:
            rows[name] = plain
        else:
            record = record_of(paths[name])
            assert record is not None  # which names the finished weights
            rows[name] = _Wanted(allocation, candidate, plain.scorer, record.weights_digest)
            rows[f"{name}, unfinished"] = plain
    return rows


def _each(rows: Iterable[_Wanted]) -> Iterator[DocumentLosses]:
    """Yields the losses of each row; neighbours with one scorer share its passes."""
    for _, group in groupby(rows, key=lambda row: id(row.scorer)):
        together = list(group)
        yield from together[0].scorer.each([row.candidate for row in together])


def original_row(
    inventory: Inventory, documents: Sequence[Document], losses: DocumentLosses
) -> dict[str, Any]:
    """Returns the table's row of the original: sizes of what is encoded, and what it scores.

    Args:
        inventory: the original.
        documents: that were scored.
        losses: of the original on them.
    """
    from allocator.scoring.scorer import mean, perplexity

    stored = sum(t.total_bytes for t in inventory.tensors.values() if t.role.is_encoded)
    return {
        "name": "original",
        "bits": stored * 8 / inventory.n_searched_weights,
        "bytes": stored,
        "kl": mean(losses.kl, documents),
        "perplexity": perplexity(losses.nll, documents),
        "top1": mean(losses.top1, documents),
    }


class _Kept:
    """What is kept in the study folder of the rows of one table.

    Args:
        study_folder: of the study.
        documents: that are scored.
        split: the name of the documents.
    """

    def __init__(
        self, study_folder: StudyFolder, documents: Sequence[Document], split: str
    ) -> None:
        self._study_folder = study_folder
        self._split = HeldOutSplit(
            split=split,
            documents=digest(documents),
            tokens=[len(d.ids) for d in documents],
            domains=[d.domain for d in documents],
            rows=[],
        )

    def add(
        self,
        kind: str,
        row: Mapping[str, Any],
        losses: DocumentLosses,
        wanted: _Wanted | None = None,
    ) -> None:
        """Keeps a row of the table.

        Args:
            kind: as of `HeldOutRow`.
            row: as the table has it.
            losses: behind it.
            wanted: what was scored; None for the original.
        """
        keep_row(
            self._study_folder.path,
            self._study_folder.inventory.digest,
            self._study_folder.target,
            self._split,
            HeldOutRow(
                name=str(row["name"]).removeprefix("* "),
                kind=kind,
                allocation="" if wanted is None else wanted.allocation.digest,
                weights="" if wanted is None else wanted.weights,
                bits=row["bits"],
                bytes=row["bytes"],
                experts=row.get("experts", ""),
                kl=row["kl"],
                perplexity=row["perplexity"],
                top1=row["top1"],
                kl_of=rounded(losses.kl),
                nll_of=rounded(losses.nll),
                top1_of=rounded(losses.top1),
                file_bytes=row.get("file_bytes"),
            ),
        )


def _row(
    study_folder: StudyFolder,
    documents: Sequence[Document],
    name: str,
    allocation: Allocation,
    losses: DocumentLosses,
    *,
    domains: bool,
) -> dict[str, Any]:
    from allocator.scoring.scorer import by_domain, mean, perplexity

    size = allocation.nbytes(study_folder.layout)
    row: dict[str, Any] = {
        "name": name,
        "bits": size.encoded * 8 / study_folder.inventory.n_searched_weights,
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


class _Tasks:
    """Tasks of lm-eval; what they cannot be run on is refused here.

    Args:
        study_folder: of the study.
        documents: held-out ones, for our own tasks.
        names: of our own tasks, and of lm-eval's.
        limit: questions of each of lm-eval's.

    Raises:
        CalibrationError: if there is no tokenizer, or a document is too short, or too long, or a
            task is unknown or cannot be fetched.
    """

    def __init__(
        self,
        study_folder: StudyFolder,
        documents: Sequence[Document],
        names: Sequence[str],
        *,
        limit: int | None,
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from allocator.evaluation.lm_eval_tasks import check_tasks, load_named, write_tasks
        from allocator.export.safetensors.directory import write_tokenizer

        inventory = study_folder.inventory
        path = inventory.path
        if inventory.gguf is not None:  # of its vocabulary; one that is not known is refused
            if read_tokenizer(inventory) is None:
                raise CalibrationError(f"{path}: no tokenizer, which --tasks needs")
            path = study_folder.cache / "lm-eval/tokenizer"
            path.mkdir(parents=True, exist_ok=True)
            write_tokenizer(path, inventory)
        if not (path / "tokenizer.json").is_file():
            raise CalibrationError(f"{path}: no tokenizer.json, which --tasks needs")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # of the tokenizers package too, which has no class of its own
            raise CalibrationError(
                f"{path}: transformers refuses its tokenizer ({first_line(error)}); fetch it again"
            ) from None
        self._study_folder = study_folder
        self._folder = study_folder.cache / "lm-eval"
        self._names = [name for name in names if name in OWN]
        named = [name for name in names if name not in OWN]
        self._named = load_named(named) if named else None
        self._limit = limit
        if not self._names:
            return
        write_tasks(documents, self._tokenizer, self._folder, self._names)
        if inventory.gguf is None:
            window = int(AutoConfig.from_pretrained(path).max_position_embeddings)
        else:
            window = int(inventory.config[inventory.family.keys.context])
        check_tasks(self._tokenizer, self._folder, self._names, window=window)

    def add(
        self,
        frame: pd.DataFrame,
        known: Mapping[str, _Wanted],
        from_files: Mapping[str, _Wanted],
    ) -> Iterator[None]:
        """Adds figures of the original, the allocation files and their neighbours, row by row.

        Args:
            frame: the table.
            known: all rows by name.
            from_files: those of files, whose models hold what the files were encoded with.
        """
        from allocator.evaluation.lm_eval_tasks import (
            CONTINUATION,
            PERPLEXITY,
            run_named,
            run_tasks,
        )
        from allocator.scoring.candidates import Candidate
        from allocator.scoring.scorer import Scorer
        from allocator.scoring.swap_model import SwapModel

        chosen = {"original", *from_files} | _neighbours(frame, from_files)
        figures = {
            CONTINUATION: ("acc", "acc"),
            PERPLEXITY: ("lm_eval_perplexity", "token_perplexity"),
        }
        for task in self._names:
            frame[figures[task][0]] = np.nan
        own, progress = self._study_folder.scorers.model, self._study_folder.progress
        rows = list(frame.loc[frame["name"].isin(chosen), "name"].items())
        for at, name in stepping(rows, "lm-eval", unit="allocations", shown=progress):
            scorer = from_files[name].scorer if name in from_files else None
            swap = scorer.swap if isinstance(scorer, Scorer) else own
            assert isinstance(swap, SwapModel)  # a streamed study was refused
            if name == "original":
                swap.reset()
            else:
                wanted = known[name].candidate
                swap.put(wanted if isinstance(wanted, Candidate) else Candidate.of(wanted))
            if self._names:
                results = run_tasks(swap.model, self._tokenizer, self._folder, self._names)
                for task, result in results.items():
                    column, metric = figures[task]
                    frame.loc[at, column] = result[metric]
            if self._named is not None:
                shown = run_named(swap.model, self._tokenizer, self._named, limit=self._limit)
                for column, figure in shown.items():
                    frame.loc[at, column] = round(figure, 4)
            yield


def _neighbours(frame: pd.DataFrame, from_files: Mapping[str, _Wanted]) -> set[str]:
    """The unpruned baselines just below and above each allocation file in bytes."""
    plain = frame[
        ~frame["name"].isin([*from_files, "original"]) & ~frame["name"].str.contains("experts")
    ]
    names: set[str] = set()
    for size in frame[frame["name"].isin(from_files)]["bytes"]:
        names |= set(plain[plain["bytes"] <= size]["name"].tail(1))
        names |= set(plain[plain["bytes"] >= size]["name"].head(1))
    return names
