"""A study's calibration text: which documents each stage reads.

In: the `[calibration]` section of study.toml, the files that it names, and the checkpoint's
tokenizer. Out: documents by split and by stage, interleaved over their domains. Invariant: search,
selection and report share no document.
"""

import json
from functools import cached_property
from pathlib import Path

from allocator.app.study_file import CalibrationSpec
from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.tokenizer import read_tokenizer
from allocator.errors import CalibrationError, reason
from allocator.scoring.documents import (
    Document,
    every_third,
    interleaved,
    read_documents,
    read_records,
    read_windows,
)

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
        path = self._study / self._spec.documents
        documents = self.read(path)
        if self._spec.splits is None:
            parts = every_third(documents)
        else:
            indices = _read_splits(self._study / self._spec.splits, len(documents))
            parts = [documents[i] for i in indices[0]], [documents[i] for i in indices[1]]
        search, selection = map(interleaved, parts)
        if not search or not selection:
            raise CalibrationError(
                f"{path}: {len(documents)} documents leave {len(search)} for search and "
                f"{len(selection)} for selection; add documents, or name a splits file"
            )
        if {d.ids for d in search} & {d.ids for d in selection}:
            raise CalibrationError(
                f"{path}: search and selection share a document; splits must be disjoint"
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
            CalibrationError: if study.toml names none, or it shares a document with another split.
        """
        if self._spec.report is None:
            raise CalibrationError(
                f"{self._study}/study.toml: no report under [calibration]; add it"
            )
        path = self._study / self._spec.report
        documents = interleaved(self.read(path))
        used = {d.ids for split in self.splits for d in split}
        if any(d.ids in used for d in documents):
            raise CalibrationError(f"{path}: shares a document with search or selection")
        return documents

    def read(self, path: Path) -> list[Document]:
        """Reads the documents of a file with `ids`, or the windows of a file with `text`.

        Raises:
            CalibrationError: if the file has no documents, or text and no tokenizer.
        """
        first = next(read_records(path), None)
        if first is None:
            raise CalibrationError(f"{path}: no documents")
        if "ids" in first:
            return read_documents(path, vocab_size=self._inventory.dimensions.vocabulary)
        tokenizer = read_tokenizer(self._inventory)
        if tokenizer is None:
            raise CalibrationError(
                f"{path}: holds text, and {self._inventory.path} no tokenizer; give records with "
                "ids, or put its tokenizer.json there"
            )
        return read_windows(path, tokenizer, window=self._spec.window)

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
