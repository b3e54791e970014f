"""Resources of the machine that a stage may use: cores, a cache folder, and a torch device.

In: keywords of a public verb. Out: one frozen value that travels whole, to worker processes too.
Invariant: an unknown keyword is refused by its name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from allocator.units import check_whole

_MOST_THREADS = 1024


class ResourceOptions(TypedDict, total=False):
    """Keywords that every verb with a study takes.

    Attributes:
        cache: folder for profiles and encoded weights; `$ALLOCATOR_CACHE` by default.
        threads: cores for torch and for encoding; all by default.
        progress: shows what takes long, on stderr.
        torch_device: where forward passes run, e.g. `cuda`; `cpu` by default.
    """

    cache: str | Path | None
    threads: int | None
    progress: bool
    torch_device: str


class StudyOptions(ResourceOptions, total=False):
    """Keywords of a verb that opens a study folder.

    Attributes:
        target: name of the target; replaces study.toml's.
    """

    target: str | None


@dataclass(frozen=True, slots=True)
class Resources:
    """What a stage may use of the machine.

    Attributes:
        cache: folder for profiles and encoded weights; None for `$ALLOCATOR_CACHE`.
        threads: cores for torch and for encoding; None for all.
        progress: shows what takes long, on stderr.
        torch_device: where forward passes run, e.g. `cuda`; encoding runs on cores.
    """

    cache: Path | None = None
    threads: int | None = None
    progress: bool = False
    torch_device: str = "cpu"

    @classmethod
    def of(cls, options: ResourceOptions | StudyOptions) -> "Resources":
        """Returns the resources among the keywords of a verb.

        Raises:
            TypeError: if a keyword is unknown.
            AllocatorError: if the number of threads is none that a machine has.
        """
        known = StudyOptions.__annotations__
        for name in options:
            if name not in known:
                raise TypeError(
                    f"unknown keyword {name!r}; beside a verb's own, the known ones are "
                    f"{', '.join(sorted(known))}"
                )
        cache, threads = options.get("cache"), options.get("threads")
        if threads is not None:
            check_threads(threads)
        return cls(
            cache=None if cache is None else Path(cache),
            threads=threads,
            progress=options.get("progress", False),
            torch_device=options.get("torch_device", "cpu"),
        )

    @property
    def options(self) -> ResourceOptions:
        """The same as keywords."""
        return {
            "cache": self.cache,
            "threads": self.threads,
            "progress": self.progress,
            "torch_device": self.torch_device,
        }


def check_threads(threads: int) -> None:
    """Raises:
    AllocatorError: if the number of threads is none that a machine has; torch would crash.
    """
    check_whole("threads", threads, 1, _MOST_THREADS)
