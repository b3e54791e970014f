"""A study's calibration text: which documents each stage reads.

In: the `[calibration]` section of study.toml, the files that it names or the default text, and the
checkpoint's tokenizer. Out: documents by split and by stage, interleaved over their domains.
Invariant: search, selection and report share no document.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from allocator.app.study_file import CalibrationSpec
from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.tokenizer import read_tokenizer
from allocator.errors import CalibrationError, reason
from allocator.files.progress import waiting
from allocator.scoring.documents import (
    Document,
    documents_of,
    every_third,
    interleaved,
    last_share,
    windows_of,
)
from allocator.scoring.records import DEFAULT_TEXT, Record, default_records, read_records

_MEASURED_DOCUMENTS = 8
"""Documents behind each measured change, unless study.toml says otherwise."""
_CURVATURE_DOCUMENTS = 16
"""Documents behind the curvature, unless study.toml says otherwise."""


class Calibration:
    """The documents of one study, read when a stage first needs them.

    Args:
        study: path of the study folder, which the paths of `spec` are relative to.
        spec: the `[calibration]` section.
        inventory: of the checkpoint, whose tokenizer encodes text.
    """

    def __init__(self, study: Path, spec: CalibrationSpec, inventory: Inventory) -> None:
        self._study = study
        self._spec = spec
        self._inventory = inventory

    @property
    def search(self) -> list[Document]:
        """The search split, which statistics, curvature, measured changes and trials read."""
        return self.splits[0]

    @property
    def selection(self) -> list[Document]:
        """The selection split, which the pick among finalists is made on."""
        return self.splits[1]

    @cached_property
    def splits(self) -> tuple[list[Document], list[Document]]:
        """The search and the selection split, which share no document.

        Raises:
            CalibrationError: if a split is empty, the two share a document, or a stage asks for
                more documents than its split has.
        """
        documents, name = self._divided[0], self._given.name
        if self._spec.splits is None:
            parts = every_third(documents)
        else:
            indices = _read_splits(self._study / self._spec.splits, len(documents))
            parts = [documents[i] for i in indices[0]], [documents[i] for i in indices[1]]
        search, selection = map(interleaved, parts)
        if not search or not selection:
            raise CalibrationError(
                f"{name}: one document of {len(documents[0].ids)} tokens, and search and selection "
                "need one each; add text, or set a smaller window under [calibration]"
            )
        if {d.ids for d in search} & {d.ids for d in selection}:
            raise CalibrationError(
                f"{name}: search and selection share a document; splits must be disjoint"
            )
        self._check_counts(len(search), len(selection))
        return search, selection

    def _check_counts(self, n_search: int, n_selection: int) -> None:
        spec = self._spec
        for key, n, available in (
            ("statistics_documents", spec.statistics_documents, n_search),
            ("search_documents", spec.search_documents, n_search),
            ("measured_documents", spec.measured_documents, n_search),
            ("curvature_documents", spec.curvature_documents, n_search),
            ("selection_documents", spec.selection_documents, n_selection),
        ):
            if n is not None and n > available:
                raise CalibrationError(
                    f"{self._study}/study.toml: {key} = {n}, the split has {available}"
                )

    @cached_property
    def report(self) -> list[Document]:
        """The held-out split, which published figures are on.

        Raises:
            CalibrationError: if there is none, or it shares a document with another split.
        """
        used = {d.ids for split in self.splits for d in split}
        if self._spec.report is None:
            held_out = [d for d in interleaved(self._divided[1]) if d.ids not in used]
            if not held_out:
                raise CalibrationError(
                    f"{self._study}/study.toml: no held-out text; name some with --text FILE, or "
                    "as report under [calibration]"
                )
            return held_out
        paths = self._paths(self._spec.report)
        documents = interleaved(self._read_all(paths).documents)
        if any(d.ids in used for d in documents):
            raise CalibrationError(f"{_named(paths)}: shares a document with search or selection")
        return documents

    def read(self, path: Path) -> list[Document]:
        """Reads a file: documents of records with `ids`, or windows of those with text.

        Raises:
            CalibrationError: if the file has no documents, or text and no tokenizer.
        """
        return self._cut(read_records(path), str(path)).documents

    @cached_property
    def _given(self) -> "_Cut":
        """Search and selection, in the order of the files."""
        if self._spec.documents is None:
            return self._cut(default_records(), DEFAULT_TEXT)
        return self._read_all(self._paths(self._spec.documents))

    @cached_property
    def _divided(self) -> tuple[list[Document], list[Document]]:
        """Documents for search and selection, and those that are held out."""
        documents, share = self._given.documents, self._spec.held_out
        return (documents, []) if share is None else last_share(documents, share)

    def _paths(self, names: str | tuple[str, ...]) -> list[Path]:
        paths = [self._study / name for name in ([names] if isinstance(names, str) else names)]
        if not paths:
            raise CalibrationError(
                f"{self._study}/study.toml: an empty list of files under [calibration]; name one, "
                "or leave the key out"
            )
        return paths

    def _read_all(self, paths: list[Path]) -> "_Cut":
        """Reads files one after the other; of several, records without a domain get the file's."""
        cuts = [self._cut(read_records(path), str(path)) for path in paths]
        if len(cuts) == 1:
            return cuts[0]
        documents = [
            document if document.domain else replace(document, domain=path.stem)
            for path, cut in zip(paths, cuts, strict=True)
            for document in cut.documents
        ]
        return _Cut(_named(paths), sum(cut.n_records for cut in cuts), documents)

    def _cut(self, given: Iterable[Record], name: str) -> "_Cut":
        with waiting(f"reading {name}"):
            records = list(given)
        if not records:
            raise CalibrationError(f"{name}: no documents; the file is empty")
        if "ids" in records[0].fields:
            vocabulary = self._inventory.dimensions.vocabulary
            return _Cut(name, len(records), documents_of(records, vocab_size=vocabulary))
        tokenizer = read_tokenizer(self._inventory)
        if tokenizer is None:
            raise CalibrationError(
                f"{name}: holds text, and {self._inventory.path} no tokenizer; give records with "
                "ids, or put its tokenizer.json there"
            )
        documents = windows_of(records, tokenizer, window=self._spec.window, name=name)
        return _Cut(name, len(records), documents)

    @property
    def name(self) -> str:
        """Names of the files of search and selection, or `default text`."""
        names = self._spec.documents
        if names is None:
            return "default text"
        return ", ".join(path.name for path in self._paths(names))

    @property
    def summary(self) -> str:
        """Records and splits, e.g. `96 records: 28 search + 14 selection windows of 256`."""
        search, selection = self.splits
        lengths = sorted({len(d.ids) for d in (*search, *selection)})
        what = "windows" if lengths == [self._spec.window] else "documents"
        tokens = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        given = self._given
        default = f"{self.name}, " if self._spec.documents is None else ""
        held_out = len(self._divided[1])
        return (
            f"{default}{given.n_records:,} record{'s' if given.n_records > 1 else ''}: "
            f"{len(search):,} search + {len(selection):,} selection"
            + (f" + {held_out:,} held-out" if held_out else "")
            + f" {what} of {tokens}"
        )

    @property
    def use(self) -> str:
        """How many of these the stages read, in one line."""
        return (
            f"the profile reads {len(self.statistics_documents):,} of them, a full trial "
            f"{len(self.trial_documents):,}, the pick {len(self.selection_documents):,}"
        )

    @property
    def statistics_documents(self) -> list[Document]:
        """Search documents behind importance and routing statistics."""
        return self.search[: self._spec.statistics_documents]

    @property
    def n_measured(self) -> int:
        """Documents behind each measured change."""
        return self._spec.measured_documents or min(_MEASURED_DOCUMENTS, len(self.search))

    @property
    def n_curvature(self) -> int:
        """Documents behind the curvature, of the original and of the incumbents."""
        return self._spec.curvature_documents or min(_CURVATURE_DOCUMENTS, len(self.search))

    @property
    def trial_documents(self) -> list[Document]:
        """Search documents that trials are scored on."""
        return self.search[: self._spec.search_documents]

    @property
    def gradient_documents(self) -> list[Document]:
        """Search documents that gradients are taken on.

        These are the ones that trials are not scored on, or where too few remain, the ones that
        trials are scored on.
        """
        scored = self.trial_documents
        remaining = self.search[len(scored) :]
        return remaining if len(remaining) >= self.n_curvature else scored

    @property
    def selection_documents(self) -> list[Document]:
        """Selection documents that the pick is made on."""
        return self.selection[: self._spec.selection_documents]


@dataclass(frozen=True, slots=True)
class _Cut:
    """What was read.

    Attributes:
        name: of the text in messages.
        n_records: before texts were cut in windows.
        documents: in the order of the records.
    """

    name: str
    n_records: int
    documents: list[Document]


def _named(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _read_splits(path: Path, n: int) -> tuple[list[int], list[int]]:
    """Indices of records, of `n`, by split."""
    try:
        data = json.loads(path.read_text())
        search, selection = list(data["search"]), list(data["selection"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path}: needed JSON with lists search and selection ({reason(error)})"
        ) from None
    if not all(type(i) is int and 0 <= i < n for i in search + selection):
        raise CalibrationError(f"{path}: needed record indices from 0 to {n - 1}")
    if len(set(search)) < len(search) or len(set(selection)) < len(selection):
        raise CalibrationError(f"{path}: an index is named twice; each document counts once")
    if set(search) & set(selection) or not search or not selection:
        raise CalibrationError(f"{path}: search and selection must be disjoint and not empty")
    return search, selection
