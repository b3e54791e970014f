"""The command line: parses, runs a verb, and says in one line what is wrong."""

import argparse
import atexit
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from allocator.app.study_path import STUDY_FILE, study_path
from allocator.cli.parsers import parsers
from allocator.cli.verbs import VERBS, limit_optuna
from allocator.decision.allocation_path import no_file
from allocator.errors import AllocatorError, SpaceError
from allocator.files.loading import show_loading
from allocator.files.progress import show_progress

_LOGGING_LIBRARIES = ("TRANSFORMERS", "DATASETS", "HF_HUB")  # which read their level at import
_BY_NAME = ("finish", "score")  # which take a format's name in the place of an allocation file


def _check_study(args: argparse.Namespace) -> None:
    """Refuses a wrong path before anything is loaded; STUDY/allocations belongs to STUDY.

    Raises:
        AllocatorError: if there is no such allocation file or study folder.
    """
    if args.study is None:
        if not args.allocation.is_file():
            named = "; a format's name needs --study" if args.verb in _BY_NAME else ""
            raise no_file(args.allocation, named)
        args.study = Path(os.path.realpath(args.allocation)).parent.parent
        if not (args.study / STUDY_FILE).exists():
            raise SpaceError(f"{args.allocation}: lies in no study folder; name one by --study")
    study_path(args.study)


def _run(args: argparse.Namespace) -> None:
    if not args.json:
        VERBS[args.verb](args)
        return
    with redirect_stdout(StringIO()):
        result = VERBS[args.verb](args)

    from allocator.app.plain_values import plain

    print(json.dumps(plain(result), indent=1, ensure_ascii=False, allow_nan=False))


def _places(args: argparse.Namespace) -> list[str]:
    """Where a verb may write: the paths that it was given, the cache, and what prints."""
    given = (getattr(args, name, None) for name in ("out", "study"))
    return [*(str(place) for place in given if place is not None), "the cache", "standard output"]


def _open_streams() -> None:
    """Opens what the shell has closed, as by `>&-`: nobody reads it, and nothing fails."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; 0, or 2 after one line on stderr when the input is wrong."""
    _open_streams()
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()  # argparse ends the program itself
    except BrokenPipeError:  # as of `allocator front STUDY | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _main(argv: Sequence[str] | None) -> int:
    parser, _ = parsers()
    args = parser.parse_args(argv)
    show_progress(not args.quiet)
    show_loading("torch")  # seconds, wherever a verb comes to need it
    atexit.register(gc.freeze)  # looking for garbage in all of torch takes seconds, too
    if args.log_level is not None:
        _set_log_level(args.log_level)
    try:
        if "study" in args:
            _check_study(args)
            limit_optuna(args)
        _run(args)
    except BrokenPipeError:
        raise
    except AllocatorError as error:
        print(f"allocator {args.verb}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        places = [error.filename] if error.filename else _places(args)
        print(
            f"allocator {args.verb}: {' or '.join(places)}: {error.strerror or error}; needed a "
            "place that exists, may be written and has room",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"allocator {args.verb}: stopped; run the same command to resume", file=sys.stderr)
        return 130
    return 0


def _set_log_level(level: str) -> None:
    """Sets what our own loggers, and those of libraries that are loaded later, write to stderr."""
    logging.getLogger("allocator").setLevel(level.upper())
    os.environ |= {f"{library}_VERBOSITY": level for library in _LOGGING_LIBRARIES}
