"""Importance vectors as a file that llama-quantize takes: `--imatrix`.

In: a layout of target gguf, vectors by group, and the tokens behind them. Out: a file as
llama-imatrix writes it, GGUF or the binary form before it. Invariant: what llama-quantize computes
from the file, sums over counts in float32, is the vectors, bit for bit.

Sums of squares over counts of tokens give a mean back only where the division is exact, so counts
are powers of two: next to the number of tokens, or to an even share of them for an expert.
llama-quantize would take ones for an expert whose count is 0, and not the vector that weights were
encoded with.
"""

import os
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from allocator.checkpoint.gguf.imatrix import COUNTS, SUMS
from allocator.checkpoint.tensors import Floats
from allocator.files.atomic import write_whole
from allocator.targets import Layout

_CHUNK = 512  # tokens, llama-imatrix's default: files say how many chunks they are of
BINARY = ".dat"
"""Suffix of files in the binary form; others are GGUF."""


def write_imatrix(
    path: Path,
    layout: Layout,
    importance: Mapping[str, Floats],
    *,
    retained: Mapping[int, Sequence[int]],
    experts_used: int,
    n_tokens: int,
    dataset: str,
) -> int:
    """Writes a file that llama-quantize takes, whole or not at all.

    Args:
        path: of the file; `.dat` gives the binary form.
        layout: of target gguf.
        importance: per group, `(in,)` or `(experts or heads, in)`.
        retained: experts of the GGUF that is to be quantized, by MoE layer.
        experts_used: routed experts per token.
        n_tokens: tokens behind the vectors.
        dataset: name of the text behind them.

    Returns:
        How many tensors it has.
    """
    n_routed = n_tokens * experts_used // layout.inventory.n_experts
    tensors: dict[str, tuple[Floats, list[int]]] = {}
    for group in layout.groups.values():
        if not group.importance or group.name not in importance:
            continue
        vectors = importance[group.name]
        numbers = [n_tokens]
        if group.role.is_expert:
            assert group.layer is not None
            experts = list(retained[group.layer])
            vectors = vectors[experts]
            numbers = [n_routed] * len(experts)
        outer = group.shape_with(len(vectors))[:-2]
        rows = np.broadcast_to(vectors, (*outer, group.shape[-1])).reshape(prod(outer), -1)
        tensors[group.stored_as] = rows, [_power_of_two(n) for n in numbers]
    write = _write_binary if path.suffix == BINARY else _write_gguf
    write(path, tensors, -(-n_tokens // _CHUNK), dataset)
    return len(tensors)


def _power_of_two(n: int) -> int:
    """The power of two next to a number of tokens, at least 1."""
    return 1 << max(round(float(np.log2(max(n, 1)))), 0)


def _write_gguf(
    path: Path, tensors: Mapping[str, tuple[Floats, list[int]]], n_chunks: int, dataset: str
) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(temporary, "")
    try:
        writer.kv_data[0].clear()  # no architecture, as llama-imatrix writes none
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", n_chunks)
        writer.add_uint32("imatrix.chunk_size", _CHUNK)
        for name, (rows, counts) in sorted(tensors.items()):
            numbers = np.array(counts, np.float32)[:, None]
            if len(numbers) == 1:  # one count for the heads of a matrix
                writer.add_tensor(f"{name}{SUMS}", (rows * numbers).reshape(1, -1))
            else:
                writer.add_tensor(f"{name}{SUMS}", rows * numbers)
            writer.add_tensor(f"{name}{COUNTS}", numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    except BaseException:
        writer.close()
        temporary.unlink(missing_ok=True)
        raise


def _write_binary(
    path: Path, tensors: Mapping[str, tuple[Floats, list[int]]], n_chunks: int, dataset: str
) -> None:
    """Values are means times a number of calls, which is 1: another one would have to be exact."""
    parts = [struct.pack("<i", len(tensors))]
    for name, (rows, _) in sorted(tensors.items()):
        text = name.encode()
        parts.append(struct.pack("<i", len(text)) + text + struct.pack("<ii", 1, rows.size))
        parts.append(np.ascontiguousarray(rows, "<f4").tobytes())
    text = dataset.encode()
    parts.append(struct.pack("<ii", n_chunks, len(text)) + text)
    write_whole(path, b"".join(parts))
