"""`held-out.json`: the held-out figures that were measured of a study, document by document.

In: what `evaluate` measures. Out: one sealed JSON file in the study folder, which reports and
notebooks read; torch is never loaded. Invariant: rows of one split are of the same documents in the
same order, so rows can be compared pair by pair; figures of another checkpoint are never mixed in.
"""

import logging
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from allocator.errors import StudyError, reason
from allocator.files.atomic import write_whole
from allocator.files.checksums import seal, unseal

HELD_OUT = "held-out.json"
_DIGITS = 6  # of a document's figures

_log = logging.getLogger(__name__)


class HeldOutRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The figures of one allocation, or of the original.

    Attributes:
        name: of the allocation file, or of the baseline, e.g. `IQ2_XXS / Q4_K`.
        kind: `original`, `baseline` or `allocation`.
        allocation: digest of the decision; empty for the original.
        weights: digest of finished weights; empty where the weights are as their codecs encode
            them.
        bits: effective bits per searched weight.
        bytes: of the searched matrices.
        experts: retained experts per MoE layer, with spaces between.
        kl: mean KL, nats per token.
        perplexity: of all predicted tokens.
        top1: share of positions where original and candidate have the same most likely token.
        kl_of: KL by document, nats per token.
        nll_of: negative log-likelihood by document, nats per token.
        top1_of: `top1` by document.
        file_bytes: of the whole file; None for the original.
    """

    name: str
    kind: str
    allocation: str
    weights: str
    bits: float
    bytes: int
    experts: str
    kl: float
    perplexity: float
    top1: float
    kl_of: list[float]
    nll_of: list[float]
    top1_of: list[float]
    file_bytes: int | None = None


class HeldOutSplit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows that were measured on the same documents.

    Attributes:
        split: `report`, or the name of the text file.
        documents: digest of the documents.
        tokens: by document.
        domains: by document; empty where it is unknown.
        rows: in the order in which they were first measured.
    """

    split: str
    documents: str
    tokens: list[int]
    domains: list[str]
    rows: list[HeldOutRow]

    def of(self, allocation: str, weights: str) -> HeldOutRow | None:
        """Returns the row of an allocation with these weights; None if it was not measured.

        Args:
            allocation: digest of the decision.
            weights: digest of finished weights; empty for plain ones.
        """
        mine = [r for r in self.rows if (r.allocation, r.weights) == (allocation, weights)]
        return next((r for r in mine if r.kind == "allocation"), mine[0] if mine else None)

    @property
    def original(self) -> HeldOutRow | None:
        """The row of the original; None if it was not measured."""
        return next((row for row in self.rows if row.kind == "original"), None)

    @property
    def baselines(self) -> list[HeldOutRow]:
        """The rows of baselines, smallest first."""
        rows = (row for row in self.rows if row.kind == "baseline")
        return sorted(rows, key=lambda row: (row.bytes, row.name))


class HeldOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file.

    Attributes:
        checkpoint: digest of the original.
        target: of the study.
        splits: by name and documents.
        schema: of the file.
    """

    checkpoint: str
    target: str
    splits: list[HeldOutSplit]
    schema: int = 1

    @classmethod
    def read(cls, folder: Path) -> "HeldOut | None":
        """Reads the file of a study folder; returns None where there is none.

        Raises:
            StudyError: if it is damaged, or of another form.
        """
        path = folder / HELD_OUT
        try:
            held_out = msgspec.convert(unseal(path.read_bytes(), required=True), cls)
            held_out._check()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise StudyError(
                f"{path}: no held-out figures ({reason(error)}); remove it, and measure them "
                "again: `allocator evaluate`"
            ) from None
        return held_out

    def _check(self) -> None:
        """Raises:
        ValueError: if a row has another number of documents than its split.
        """
        if self.schema != 1:
            raise ValueError(f"schema {self.schema}, needed 1")
        for split in self.splits:
            n = len(split.tokens)
            for row in split.rows:
                if {len(row.kl_of), len(row.nll_of), len(row.top1_of)} != {n}:
                    raise ValueError(f"{row.name}: needed figures of {n} documents")

    @property
    def longest(self) -> list[HeldOutSplit]:
        """Of every split name the one with the most documents."""
        ordered = sorted(self.splits, key=lambda s: len(s.tokens))
        return list({s.split: s for s in ordered}.values())

    def with_row(self, empty: HeldOutSplit, row: HeldOutRow) -> "HeldOut":
        """Returns this with a row measured, which replaces an earlier one of its name and kind.

        Args:
            empty: the split, without rows; an earlier one of the same documents is added to.
            row: of that split.
        """
        key = (empty.split, empty.documents)
        known = next((s for s in self.splits if (s.split, s.documents) == key), empty)
        rows = [r for r in known.rows if (r.kind, r.name) != (row.kind, row.name)]
        others = [s for s in self.splits if (s.split, s.documents) != key]
        splits = [*others, msgspec.structs.replace(known, rows=[*rows, row])]
        splits.sort(key=lambda s: (s.split, len(s.tokens), s.documents))
        return msgspec.structs.replace(self, splits=splits)


def keep_row(
    folder: Path, checkpoint: str, target: str, empty: HeldOutSplit, row: HeldOutRow
) -> None:
    """Adds a row to the file of a study folder; a folder that cannot be written is left alone.

    A file that is damaged, or of another checkpoint or target, is written anew.

    Args:
        folder: of the study.
        checkpoint: digest of the original.
        target: of the study.
        empty: the split, without rows.
        row: of that split.
    """
    try:
        held_out = HeldOut.read(folder)
    except StudyError as error:
        _log.warning("%s; written anew", error)
        held_out = None
    if held_out is None or (held_out.checkpoint, held_out.target) != (checkpoint, target):
        held_out = HeldOut(checkpoint, target, [])
    try:
        write_whole(folder / HELD_OUT, seal(held_out.with_row(empty, row)))
    except OSError as error:
        _log.warning("%s: not written (%s)", folder / HELD_OUT, reason(error))


def rounded(values: npt.NDArray[np.float64]) -> list[float]:
    """Returns figures of documents, `(documents,)`, with few digits."""
    return [float(f"{value:.{_DIGITS}g}") for value in values]
