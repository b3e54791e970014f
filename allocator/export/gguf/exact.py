"""Compares llama.cpp with torch on a written file where neither of them rounds.

In: a GGUF file, and the weights that it holds. Out: KL(torch || llama.cpp) in exact mode on the
decoded weights. Invariant: llama.cpp reads the metadata of the file itself, byte by byte; only the
tensors are others: decoded to F32, so that no kernel rounds activations to 8 bits.

What is left is float32 sums in another order, or another function of the weights. Where the whole
model is too large, the layers from some layer on are zeros, as they are stored: a layer of zeros
adds nothing to the hidden states. torch then runs the layers before it alone.

The decoded file never has a name: the disk is free again when the process ends, however it ends.
"""

import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from allocator.codecs import codec_of
from allocator.decision.allocation import DEFAULT_KV_FORMAT
from allocator.errors import VerifyError
from allocator.export.base import Exact
from allocator.export.gguf.files import Tensors, metadata_end, read_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.export.stored import StoredWeights
from allocator.files.machine import free_memory
from allocator.files.progress import stepping
from allocator.formats import FORMATS
from allocator.formats.ggml import TYPES
from allocator.scoring.candidates import Candidate, Weights
from allocator.scoring.documents import Document
from allocator.scoring.streamed_model import States, StreamedModel

EXACT_TOLERANCE = 1e-5
"""KL(torch || llama.cpp) in exact mode, nats per token; above it llama.cpp computes something else.

Random models of both families of 2 to 5 layers gave 4e-13 to 3e-12, the reference model 1.3e-12;
wrong metadata 2e-4 to 0.3. The room between is for routers' ties that float32 breaks otherwise.
"""

N_TOKENS = 4096
"""Of the documents that are compared exactly."""
_PIECE = 64 << 20
_F32 = FORMATS["F32"]


def compare_exactly(
    path: Path,
    stored: StoredWeights,
    documents: Sequence[Document],
    *,
    n_tokens: int = N_TOKENS,
    device: str = "cpu",
    memory: float | None = None,
    progress: bool = False,
) -> Exact:
    """Compares torch and llama.cpp on a file's decoded weights, keys and values in F32.

    Args:
        path: the file.
        stored: its weights.
        documents: the longest of them are compared.
        n_tokens: that are compared at most, or one document.
        device: torch's.
        memory: bytes that decoded weights may take; as many layers are compared as that allows, at
            least through the first one with experts. A quarter of what is free by default.
        progress: shows a bar while llama.cpp runs.

    Raises:
        VerifyError: if there is no room for the decoded file, or llama.cpp does not run it.
    """
    tensors, layout = read_gguf(path), stored.layout
    of_layers = layout.inventory.n_layers
    sizes = [_decoded_bytes(tensors, n) for n in range(of_layers + 1)]
    limit = free_memory() / 4 if memory is None else memory
    fitting = [n for n in range(of_layers + 1) if sizes[n] <= limit]
    n_layers = max([layout.layers[0] + 1, *fitting])
    chosen = _longest(documents, n_tokens)
    model = StreamedModel(layout, Weights(layout, lambda: stored), device=device)
    candidate = replace(stored.candidate, kv_format=DEFAULT_KV_FORMAT)
    values, weights = [], []
    with (
        _unnamed(path, sizes[n_layers]) as file,
        LlamaCpp(
            write_decoded(file, path, tensors, n_layers),
            context=max(len(d.ids) for d in chosen),
            threads=torch.get_num_threads(),
        ) as llama,
    ):
        expected = _torch_logits(model, candidate, chosen, n_layers)
        shown = stepping(chosen, "llama.cpp, exact", unit="documents", shown=progress)
        for document, logits in zip(shown, expected, strict=True):
            values.append(kl_divergence(logits, llama.logits(document.ids)))
            weights.append(len(document.ids))
    return Exact(float(np.average(values, weights=weights)), n_layers, of_layers)


def kl_divergence(torch_logits: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]) -> float:
    """Returns the mean KL(torch || runtime) over positions, nats per token.

    Args:
        torch_logits: `(tokens, vocabulary)`.
        logits: the runtime's, of the same shape.
    """
    p, q = (x.astype(np.float64) for x in (torch_logits, logits))
    p -= np.logaddexp.reduce(p, axis=-1, keepdims=True)
    q -= np.logaddexp.reduce(q, axis=-1, keepdims=True)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _longest(documents: Sequence[Document], n_tokens: int) -> list[Document]:
    """Long ones show positions that short ones do not have."""
    chosen: list[Document] = []
    for document in sorted(documents, key=lambda d: -len(d.ids)):
        if chosen and sum(len(d.ids) for d in (*chosen, document)) > n_tokens:
            break
        chosen.append(document)
    return chosen


@torch.no_grad()
def _torch_logits(
    model: StreamedModel, candidate: Candidate, documents: Sequence[Document], n_layers: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Logits `(tokens, vocabulary)` of the first layers, by document."""
    states = [States(candidate, [0], model.embed([[d] for d in documents], candidate))]
    for layer in range(n_layers):
        model.run(layer, states)
    for hidden in states[0].hidden:
        yield model.logits(hidden[0], candidate).cpu().numpy()


# -- the decoded file


def _is_decoded(name: str, n_layers: int) -> bool:
    layer = re.match(r"blk\.(\d+)\.", name)
    return layer is None or int(layer[1]) < n_layers


def _decoded_bytes(tensors: Tensors, n_layers: int) -> int:
    """Bytes that a file takes on the disk; layers of zeros take none."""
    return sum(4 * prod(t[1]) for name, t in tensors.items() if _is_decoded(name, n_layers))


@contextmanager
def _unnamed(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """A temporary file without a name, near `path` or else where temporary files are.

    Raises:
        VerifyError: if neither place has room.
    """
    places = dict.fromkeys((path.absolute().parent.parent, Path(tempfile.gettempdir())))
    for place in places:
        try:
            if shutil.disk_usage(place).free < nbytes * 1.01 + (16 << 20):
                continue
            file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 - closed below
        except OSError:  # may not be written
            continue
        with file:
            yield file
            return
    raise VerifyError(
        f"{path}: llama.cpp is off, and no place for its decoded weights, which would tell whether "
        f"that is rounding: {nbytes:,} bytes needed in {' or '.join(map(str, places))}; free some"
    )


def write_decoded(file: BinaryIO, path: Path, tensors: Tensors, n_layers: int) -> Path:
    """Writes the file at `path` with the tensors of the first layers in F32, the others zero bytes.

    Args:
        file: open for writing.
        path: of the GGUF file.
        tensors: of that file.
        n_layers: whose tensors are decoded.

    Returns:
        A path under which this process can open it.
    """
    start, alignment = metadata_end(path)
    with path.open("rb") as source:
        file.write(source.read(start))
    rows = {
        name: (_F32 if _is_decoded(name, n_layers) else FORMATS[fmt], shape)
        for name, (fmt, shape, _) in tensors.items()
    }
    offset = 0
    for name, (fmt, shape) in rows.items():
        text = name.encode()
        file.write(struct.pack("<Q", len(text)) + text + struct.pack("<I", len(shape)))
        file.write(struct.pack(f"<{len(shape)}Q", *shape[::-1]))
        file.write(struct.pack("<IQ", TYPES[fmt.name], offset))
        offset += -(-fmt.nbytes(shape) // alignment) * alignment
    begin = -(-file.tell() // alignment) * alignment
    file.truncate(begin + offset)
    at = begin
    for name, (fmt, shape) in stepping(rows.items(), "decoding to F32", unit="tensors", brief=True):
        if _is_decoded(name, n_layers):
            file.seek(at)
            stored = FORMATS[tensors[name][0]]
            flat = tensors[name][2].reshape(-1, tensors[name][2].shape[-1])
            step = max(1, _PIECE // (4 * shape[-1]))
            for i in range(0, len(flat), step):
                file.write(codec_of(stored).decode(flat[i : i + step], stored).data)
        at += -(-fmt.nbytes(shape) // alignment) * alignment
    file.flush()
    return Path(f"/proc/self/fd/{file.fileno()}")
