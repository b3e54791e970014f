"""The KL of anybody's GGUF of a model, beside a study's pick.

In: a study folder, and a GGUF file. Out: a table, by domain. Invariants: both files are run by the
same llama.cpp, so that its rounding is in both figures; documents are held-out ones, of the report
split or else of the selection split.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from allocator.app.study_folder import StudyFolder
from allocator.errors import CalibrationError
from allocator.export.gguf.apart import LlamaProcess
from allocator.export.gguf.foreign import ForeignGguf, check_gguf
from allocator.files.progress import stepping
from allocator.scoring.candidates import Candidate
from allocator.scoring.documents import Document
from allocator.scoring.scorer import by_domain, losses_of, mean
from allocator.targets.gguf.metadata import yarn_betas

_DOCUMENTS = 48
"""Documents that are scored, unless asked otherwise."""


def score_gguf(
    study_folder: StudyFolder,
    file: Path,
    pick: Callable[[Path], Path] | None,
    *,
    documents: int | None = None,
) -> pd.DataFrame:
    """Scores a file, and the pick if there is one.

    Args:
        study_folder: of target gguf.
        file: a GGUF of the study's model.
        pick: writes the pick's GGUF in a folder, and returns its path.
        documents: that are scored; up to 48 by default.

    Returns:
        A row per file: bytes, effective bits, KL in nats per token, of each domain too;
        `attrs["split"]` and `attrs["notes"]` say of which documents, and what to know of the file.

    Raises:
        AllocatorError: one line on whatever is wrong with the file.
    """
    checked = check_gguf(file, study_folder.layout)
    calibration = study_folder.calibration
    split = "report" if study_folder.spec.calibration.has_report else "selection"
    available: Sequence[Document] = calibration.report if split == "report" else []
    available = available or calibration.selection
    n = min(_DOCUMENTS, len(available)) if documents is None else documents
    if not 0 < n <= len(available):
        raise CalibrationError(f"{n} documents: needed 1..{len(available)}, the {split} split")
    chosen = available[:n]
    scorer = study_folder.scorers.on(chosen)
    scorer.score(Candidate.original(study_folder.layout))

    def row(name: str, of: ForeignGguf) -> dict[str, Any]:
        shown = stepping(chosen, name, unit="documents", shown=study_folder.progress)
        with LlamaProcess(
            of.path,
            context=max(len(d.ids) for d in chosen),
            threads=study_folder.threads,
            yarn_betas=yarn_betas(study_folder.inventory),
        ) as llama:
            rows = [scorer.score_logits(i, llama.logits(d.ids)) for i, d in enumerate(shown)]
        kl = losses_of(rows).kl
        weights = study_folder.inventory.n_searched_weights
        domains = by_domain(np.asarray(kl), chosen)
        return {
            "file": name,
            "bytes": of.file_bytes,
            "bits": of.encoded_bytes * 8 / weights,
            "experts": of.n_experts,
            "kl": mean(kl, chosen),
        } | ({f"kl {domain}": value for domain, value in domains.items()} if any(domains) else {})

    rows = [row(file.name, checked)]
    if pick is not None:
        with tempfile.TemporaryDirectory(dir=study_folder.cache, prefix="pick-") as folder:
            rows.append(row("pick", check_gguf(pick(Path(folder)), study_folder.layout)))
    table = pd.DataFrame(rows)
    table.attrs["split"] = f"{n} documents of the {split} split"
    table.attrs["notes"] = tuple(f"{file.name}: {note}" for note in checked.notes)
    return table
