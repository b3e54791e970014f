"""llama.cpp in a process of its own, for files from unknown sources.

In: a GGUF file whose header was checked. Out: logits. Invariant: whatever llama.cpp makes of the
file, a failed assertion or a crash, the caller gets one line.

Started as a program, it reads documents from its input (a count and ids, 32 bits each) and writes
logits (two sizes, then float32); a refusal of llama.cpp's is a line on its error output.
"""

import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from allocator.errors import AllocatorError, VerifyError, first_line
from allocator.export.gguf.llamacpp import LlamaCpp

_CODE = "import sys; from allocator.export.gguf.apart import serve; serve(sys.argv[1:])"


class LlamaProcess:
    """A model loaded in llama.cpp in another process; a context manager, which ends the process.

    Args:
        path: the GGUF file, of a split model its first part.
        context: most tokens of a document.
        threads: to compute with.
        yarn_betas: as of `LlamaCpp`.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        threads: int = 2,
        yarn_betas: tuple[float, float] | None = None,
    ) -> None:
        self._path = path
        betas = () if yarn_betas is None else tuple(map(str, yarn_betas))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(path), str(context), str(threads), *betas],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Returns logits after every token of one document, `(tokens, vocabulary)`.

        Raises:
            VerifyError: if llama.cpp does not load the file, fails, or ends the process.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(struct.pack(f"<{len(ids) + 1}i", len(ids), *ids))
            self._process.stdin.flush()
            sizes = self._process.stdout.read(8)
            rows, width = struct.unpack("<ii", sizes)
            data = self._process.stdout.read(4 * rows * width)
            return np.frombuffer(data, np.float32).reshape(rows, width).copy()
        except (OSError, struct.error, ValueError):
            raise self._failure() from None

    def _failure(self) -> VerifyError:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = lines[-1] if lines else "no reason given"
        if status < 0:
            said = f"llama.cpp ended its process by signal {-status} ({said})"
        return VerifyError(said if str(self._path) in said else f"{self._path}: {said}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def serve(arguments: Sequence[str]) -> None:
    """Loads a file and answers with logits until the input ends.

    Args:
        arguments: path, context, threads, and YaRN's betas if any.
    """
    path, context, threads, *betas = arguments
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    try:
        with LlamaCpp(
            path,
            context=int(context),
            threads=int(threads),
            exact=False,
            yarn_betas=(float(betas[0]), float(betas[1])) if betas else None,
        ) as llama:
            while count := sys.stdin.buffer.read(4):
                (n,) = struct.unpack("<i", count)
                logits = llama.logits(struct.unpack(f"<{n}i", sys.stdin.buffer.read(4 * n)))
                out.write(struct.pack("<ii", *logits.shape))
                out.write(np.ascontiguousarray(logits, np.float32).tobytes())
                out.flush()
    except AllocatorError as error:
        sys.exit(first_line(error))
