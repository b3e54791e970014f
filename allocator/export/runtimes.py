"""Every runtime, by the name of its target: the one list of what can be written and verified.

In: a name. Out: its `Runtime`. Invariant: a target of the same name is in `allocator.targets`.
"""

from allocator.errors import TargetError
from allocator.export.base import Runtime
from allocator.export.gguf.runtime import GGUF_RUNTIME
from allocator.export.safetensors.runtime import SAFETENSORS_RUNTIME
from allocator.targets import target_named

RUNTIMES: dict[str, Runtime] = {}
"""By name; see `register_runtime`."""


def register_runtime(runtime: Runtime) -> None:
    """Makes a runtime known by the name of its target, which is registered before.

    Raises:
        TargetError: if there is no such target, or it has another runtime.
    """
    if target_named(runtime.name) is not runtime.target:
        raise TargetError(f"runtime {runtime.name!r}: another target has that name")
    if RUNTIMES.setdefault(runtime.name, runtime) is not runtime:
        raise TargetError(f"runtime {runtime.name!r} is registered already; choose another name")


def runtime_named(name: str) -> Runtime:
    """Returns the runtime of the target of that name.

    Raises:
        TargetError: if there is none.
    """
    if name not in RUNTIMES:
        raise TargetError(f"unknown container {name!r}; known: {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


for _runtime in (GGUF_RUNTIME, SAFETENSORS_RUNTIME):
    register_runtime(_runtime)
