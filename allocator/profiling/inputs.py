"""Everything that the measurements of a checkpoint depend on.

In: a checkpoint in a layout, calibration documents, and how much of both is measured. Out: frozen
`ProfileInputs`, whose digest names the profile. Invariant: what changes a profile changes its
digest.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from allocator.checkpoint.tensors import Floats
from allocator.codecs import versions_of
from allocator.profiling.statistics import importance_digest
from allocator.scoring import documents as calibration
from allocator.scoring.documents import Document
from allocator.targets import Layout

ANCHOR_BITS = (1.75, 3.0)
"""Each bundle's loss is measured with its groups in their formats nearest to these."""
PRUNED_SHARES = (5 / 6, 2 / 3, 1 / 2, 1 / 3, 1 / 4)
"""Each layer's loss is measured at these shares of its experts."""
FAST_WEIGHTS_PER_SECOND = 1e7
"""One core encodes as many in the formats that sampled rows are measured in."""


@dataclass(frozen=True)
class ProfileInputs:
    """Everything that the measurements of a checkpoint depend on.

    Attributes:
        layout: the target bound to the checkpoint.
        documents: the calibration documents for the statistics; the first ones are scored.
        n_measured: documents scored for each change.
        n_curvature: documents behind the curvature.
        saliency: the ranking that prune losses are measured with.
        sampled_rows: share of a matrix's rows that its prices are of; None for all, with the model
            in memory.
        anchor_bits: effective bits of the formats that bundles are measured in.
        pruned_shares: shares of a layer's experts that are retained where pruning is measured.
        given_importance: vectors by group that are not measured, see `profiling.imatrix`; None
            where all are.
    """

    layout: Layout
    documents: tuple[Document, ...]
    n_measured: int
    n_curvature: int
    saliency: str
    sampled_rows: float | None = None
    anchor_bits: tuple[float, ...] = ANCHOR_BITS
    pruned_shares: tuple[float, ...] = PRUNED_SHARES
    given_importance: Mapping[str, Floats] | None = None

    @cached_property
    def digest(self) -> str:
        """Names the profile."""
        parts = {
            "checkpoint": self.layout.inventory.digest,
            "target": self.layout.target,
            "documents": calibration.digest(self.documents),
            "n_measured": self.n_measured,
            "n_curvature": self.n_curvature,
            "saliency": self.saliency,
            "anchors": [self.anchor_bits, self.pruned_shares],
            **versions_of(f for g in self.layout.groups.values() for f in g.offered()),
            "schema": 2,
        }
        if self.sampled_rows is not None:
            parts["sampled_rows"] = self.sampled_rows
            parts["fast"] = FAST_WEIGHTS_PER_SECOND
        if self.given_importance is not None:
            parts["importance"] = importance_digest(self.given_importance)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def measured_documents(self) -> tuple[Document, ...]:
        """Documents scored for each change."""
        return self.documents[: self.n_measured]

    @property
    def curvature_documents(self) -> tuple[Document, ...]:
        """Documents behind the curvature."""
        return self.documents[: self.n_curvature]

    @property
    def n_tokens(self) -> int:
        """Tokens behind the statistics."""
        return _tokens(self.documents)

    @property
    def measured_tokens(self) -> int:
        """Tokens behind each measured change."""
        return _tokens(self.measured_documents)

    @property
    def curvature_tokens(self) -> int:
        """Tokens behind the curvature."""
        return _tokens(self.curvature_documents)


def _tokens(documents: tuple[Document, ...]) -> int:
    return sum(len(d.ids) for d in documents)
