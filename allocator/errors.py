"""Everything the library raises for a user's input; each message says what is wrong and a way out.

A message is one line; on a TOML file that has several faults, it is one line per fault.
"""


class AllocatorError(Exception):
    """Base of all errors that a user can mend; the CLI prints it and exits with 2."""


class CheckpointError(AllocatorError):
    """A checkpoint is missing, damaged, foreign, or not the one that was expected."""


class FormatError(AllocatorError):
    """A format is unknown, or cannot store a tensor of this shape as named."""


class TargetError(AllocatorError):
    """A target's runtime cannot express a choice."""


class SpaceError(AllocatorError):
    """A search space, pin or proposal does not fit the grammar or the checkpoint."""


class BudgetError(AllocatorError):
    """A budget or limit that no allocation of the space can meet."""


class CalibrationError(AllocatorError):
    """A calibration file cannot be read or does not hold what the study needs."""


class StudyError(AllocatorError):
    """A study, its lock or its storage does not allow what was asked."""


class OutputError(AllocatorError):
    """A file or folder cannot be written where it was asked for."""


class VerifyError(AllocatorError):
    """A written checkpoint is not what its allocation says."""


def reason(error: Exception) -> str:
    """Returns why a file could not be read, without Python's names and numbers of errors."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r}"
    return first_line(error)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message; without a message, the name of its class."""
    return (str(error).splitlines() or [type(error).__name__])[0]
