"""moe-allocator: fit a Mixture-of-Experts model into a memory budget, changing it least.

The verbs are the functions of `allocator.api`; they and the names below are loaded when they are
first used, so `import allocator` is light.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "api": "allocator.api",
    "load": "allocator.export.safetensors.loading",
    "allocation_of": "allocator.study.trials",
    "Allocation": "allocator.decision.allocation",
    "AllocationRecord": "allocator.decision.allocation_record",
    "StudyFolder": "allocator.app.study_folder",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'allocator' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    found = module if name == "api" else getattr(module, name)
    globals()[name] = found
    return found
