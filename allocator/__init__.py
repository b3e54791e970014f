"""moe-allocator: fit a Mixture-of-Experts model into a memory budget, changing it least.

In: nothing. Out: the verbs of the command line as functions (`allocator.search`, ...), and the few
classes that their arguments and results are made of. Invariant: a name is loaded when it is first
used, so `import allocator` loads nothing but Python's own modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allocator import api
    from allocator.api import (
        compare,
        diff,
        estimate,
        evaluate,
        explain,
        finish,
        front,
        imatrix,
        init,
        inspect,
        materialize,
        plan,
        profile,
        report,
        reproduce,
        score,
        score_gguf,
        search,
        verify,
    )
    from allocator.app.study_file import (
        BudgetSpec,
        CalibrationSpec,
        DeviceBudgetSpec,
        StreamedSpec,
        StudySpec,
    )
    from allocator.app.study_folder import StudyFolder
    from allocator.decision.allocation import Allocation
    from allocator.decision.allocation_record import AllocationRecord
    from allocator.errors import AllocatorError
    from allocator.export.safetensors.loading import load
    from allocator.pipeline.quantize import quantize
    from allocator.study.trials import allocation_of

__version__ = "0.1.0"
__all__ = [
    "Allocation",
    "AllocationRecord",
    "AllocatorError",
    "BudgetSpec",
    "CalibrationSpec",
    "DeviceBudgetSpec",
    "StreamedSpec",
    "StudyFolder",
    "StudySpec",
    "__version__",
    "allocation_of",
    "api",
    "compare",
    "diff",
    "estimate",
    "evaluate",
    "explain",
    "finish",
    "front",
    "imatrix",
    "init",
    "inspect",
    "load",
    "materialize",
    "plan",
    "profile",
    "quantize",
    "report",
    "reproduce",
    "score",
    "score_gguf",
    "search",
    "verify",
]
_ELSEWHERE = {  # the other names are of `allocator.api`
    "Allocation": "allocator.decision.allocation",
    "AllocationRecord": "allocator.decision.allocation_record",
    "AllocatorError": "allocator.errors",
    "BudgetSpec": "allocator.app.study_file",
    "CalibrationSpec": "allocator.app.study_file",
    "DeviceBudgetSpec": "allocator.app.study_file",
    "StreamedSpec": "allocator.app.study_file",
    "StudyFolder": "allocator.app.study_folder",
    "StudySpec": "allocator.app.study_file",
    "allocation_of": "allocator.study.trials",
    "load": "allocator.export.safetensors.loading",
    "quantize": "allocator.pipeline.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_ELSEWHERE.get(name, "allocator.api"))
    value = module if name == "api" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
