"""Writes a study's importance vectors for llama-quantize.

In: a study folder opened for target gguf, and an allocation file if there is one. Out: the file for
`--imatrix`, and the allocation's formats for `--tensor-type-file`. Invariant: of an allocation, the
vectors are those that its weights are encoded with, of the experts that it retains.
"""

from pathlib import Path

from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import read_allocation
from allocator.export.gguf.imatrix import write_imatrix
from allocator.export.gguf.recipes import tensor_type_file
from allocator.export.gguf.runtime import GGUF_RUNTIME
from allocator.files.atomic import write_whole


def write(study_folder: StudyFolder, out: Path, allocation: Path | None) -> tuple[Path, ...]:
    """Writes the files.

    Args:
        study_folder: of target gguf.
        out: file of the vectors.
        allocation: whose vectors and formats are written; the study's own vectors by default.

    Returns:
        Paths of the files.

    Raises:
        TargetError: if the allocation is of another target.
    """
    layout, calibration = study_folder.layout, study_folder.calibration
    inventory = layout.inventory
    decision, digest = None, None
    if allocation is not None:
        decision, digest = _read(study_folder, allocation)
    every = tuple(range(inventory.n_experts))
    if digest is None:
        vectors = study_folder.profiler.statistics.importance
    else:
        vectors = dict(study_folder.encodings.of(digest, beside=allocation).importance)
    write_imatrix(
        out,
        layout,
        vectors,
        retained=decision.retained_experts if decision else dict.fromkeys(layout.layers, every),
        experts_used=inventory.experts_used,
        n_tokens=sum(len(d.ids) for d in calibration.statistics_documents),
        dataset=calibration.name,
    )
    if decision is None:
        return (out,)
    types = out.with_suffix(".tensor-types.txt")
    write_whole(types, tensor_type_file(layout, decision).encode())
    return out, types


def _read(study_folder: StudyFolder, path: Path) -> tuple[Allocation, str | None]:
    if path.suffix == ".json":
        GGUF_RUNTIME.check_can_write(read_allocation(path)[0])
    return study_folder.read_encoded(path)
