"""Says that a library is loading, where its import takes seconds.

In: the name of a library, before anything imports it. Out: a step of `allocator.files.progress`,
from where the first import begins, wherever that is, to its end. Invariant: looking for the library
shows nothing, and neither does a library that is loaded already.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

from allocator.files.progress import waiting


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        with waiting(f"loading {self.name}") as loading:
            loading.announce()
            super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, library: str) -> None:
        self.library = library

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds the library as Python does, with a loader that shows a step."""
        if fullname != self.library:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def show_loading(library: str) -> None:
    """Shows the import of a library as a step, from here on; a second call does nothing.

    Args:
        library: a top-level package; one of Python source, or nothing is shown.
    """
    known = (f.library for f in sys.meta_path if isinstance(f, _Finder))
    if library not in known:
        sys.meta_path.insert(0, _Finder(library))
