"""Re-opens a written checkpoint in its runtime and holds it against its allocation.

In: a directory written by `materialize`, the encodings that it was written of, and a scorer. Out:
a `Verification`.
Invariant: every check compares the file with something else: the digests in the manifest, those of
the bytes that ggml encoded from the source, gguf-py's independent decoding, transformers or
llama.cpp. No byte of a cache stands for an encoding: what is cached is held against its digests
first, and encoded again where it differs; with `encode` everything is, without the cache.

A model that does not fit in memory is verified layer by layer (`StreamedScorer`); what stands for
transformers is then the same pass over the weights that the file holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from allocator.checkpoint.inventory import read_json
from allocator.codecs.encodings import Encodings
from allocator.codecs.ggml import Floats, decode
from allocator.decision.allocation import KV_FORMAT, Allocation
from allocator.decision.pricing import FileBytes
from allocator.errors import VerifyError
from allocator.export.checkpoint import FILE, MANIFEST, Manifest, file_digest, files_in
from allocator.export.gguf.exact import (
    EXACT_TOLERANCE,
    Exact,
    compare_exactly,
    kl_divergence,
)
from allocator.export.gguf.files import read_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.export.safetensors.loading import load
from allocator.export.tensors import EncodedTensors
from allocator.formats import Format, format_named
from allocator.scoring.candidates import Weights
from allocator.scoring.scorer import mean
from allocator.scoring.streamed import AnyScorer, StreamedModel, StreamedScorer
from allocator.scoring.swap_model import device_of
from allocator.targets import Layout, target_named
from allocator.targets.gguf.metadata import yarn_betas
from allocator.targets.safetensors import tensor_names

SAFETENSORS_TOLERANCE = 1e-5
"""Difference of the re-opened safetensors checkpoint's proxy loss, nats per token."""
LLAMACPP_TOLERANCE = 5e-3
"""KL(torch || llama.cpp), nats per token: llama.cpp quantizes activations, torch does not."""

TOLERANCE = {"gguf": LLAMACPP_TOLERANCE, "safetensors": SAFETENSORS_TOLERANCE}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Verification:
    """What was found equal, and how far the runtime's outputs are off.

    Attributes:
        folder: the checkpoint.
        container: `gguf` or `safetensors`.
        file_bytes: size of the file, as predicted.
        tensor_bytes: of its tensors, as predicted.
        n_tensors: compared byte by byte and decoded by a second implementation.
        loss: proxy loss of the candidate in torch, on the scorer's documents.
        runtime_loss: proxy loss of the re-opened checkpoint in its runtime.
        divergence: |difference| for safetensors, KL(torch || llama.cpp) for gguf.
        exact: the comparison without rounding, where `divergence` is beyond what is usual.
    """

    folder: Path
    container: str
    file_bytes: int
    tensor_bytes: int
    n_tensors: int
    loss: float
    runtime_loss: float
    divergence: float
    exact: Exact | None = None


def verify(
    folder: Path,
    encodings: Encodings,
    scorer: AnyScorer,
    *,
    tolerance: float | None = None,
    encode: bool = False,
    progress: bool = False,
) -> Verification:
    """Checks a written checkpoint.

    Args:
        folder: the directory.
        encodings: of the checkpoint that it was made from, with the same importance.
        scorer: documents to score in torch and in the runtime.
        tolerance: how far the runtime may be off, nats per token; its container's by default.
            In llama.cpp it is for rounding of activations alone: what is off in exact arithmetic
            too is refused.
        encode: encodes every group anew, whatever is cached.
        progress: shows a bar while llama.cpp runs.

    Raises:
        VerifyError: at the first thing that is not as it should be.
    """
    check_tolerance(tolerance)
    manifest = Manifest.read(folder)
    _check_digests(folder, manifest)
    allocation = Allocation.from_json(read_json(folder / "allocation.json"))
    if manifest.checkpoint != encodings.layout.inventory.digest:
        raise VerifyError(
            f"{folder}: made from checkpoint {manifest.checkpoint[:12]}, this one is "
            f"{encodings.layout.inventory.digest[:12]}; verify against its own source"
        )
    allocation.check(encodings.layout)
    if allocation.digest != manifest.allocation:
        raise VerifyError(
            f"{folder}: allocation.json is {allocation.digest[:12]}, the manifest says "
            f"{manifest.allocation[:12]}; materialize it again"
        )
    size = allocation.nbytes(encodings.layout, target_named(manifest.container))
    _check_sizes(folder, manifest, size)
    found = dict(_tensors(folder, manifest, encodings))
    nbytes = sum(data.nbytes for data, _ in found.values())
    file_bytes = (folder / manifest.file).stat().st_size
    if (nbytes, file_bytes) != (size.tensors, size.file):
        raise VerifyError(
            f"{folder}: {nbytes} tensor bytes in a file of {file_bytes}, "
            f"predicted {size.tensors} in {size.file}"
        )
    _check_weights(folder, manifest, EncodedTensors(encodings, allocation, encode=encode), found)
    stored = _Stored(encodings.layout, allocation, found)
    loss, runtime_loss, divergence = _run(folder, manifest, stored, scorer, progress)
    limit = TOLERANCE[manifest.container] if tolerance is None else tolerance
    exact = None
    if manifest.container == "safetensors":
        _check_transformers(folder, divergence, limit)
    elif not divergence <= min(limit, LLAMACPP_TOLERANCE):  # a tolerance never hides semantics
        exact = compare_exactly(
            folder / manifest.file,
            encodings.layout,
            allocation,
            stored,
            scorer.documents,
            device=_device_of(scorer),
            progress=progress,
        )
        _check_llama_cpp(folder, divergence, limit, exact)
    return Verification(
        folder,
        manifest.container,
        size.file,
        size.tensors,
        len(found),
        loss,
        runtime_loss,
        divergence,
        exact,
    )


def check_tolerance(tolerance: float | None) -> None:
    """Raises:
    VerifyError: if it is no number of nats.
    """
    if tolerance is not None and not tolerance >= 0:
        raise VerifyError(f"tolerance {tolerance}: needed nats per token, 0 or more")


def _check_transformers(folder: Path, found: float, limit: float) -> None:
    if not found <= limit:
        raise VerifyError(
            f"{folder}: all tensors are equal, but its runtime is off by {found:.2e} nats per "
            f"token, at most {limit:.0e} allowed; transformers rounds no activations, so it "
            "computes something else: install the transformers of constraints.txt, or report it"
        )


def _check_llama_cpp(folder: Path, found: float, limit: float, exact: Exact) -> None:
    """Raises:
    VerifyError: if llama.cpp computes something else, or rounds more than is allowed.
    """
    off = f"{folder}: all tensors are equal, but its runtime is off by {found:.2e} nats per token"
    if not exact.divergence <= EXACT_TOLERANCE:
        raise VerifyError(
            f"{off}, and in exact arithmetic{exact.part} still by {exact.divergence:.2e} (at most "
            f"{EXACT_TOLERANCE:.0e}): llama.cpp computes another function of these weights, which "
            "no --tolerance allows; materialize it again, or use target safetensors and report it "
            "with its config.json"
        )
    if not found <= limit:
        raise VerifyError(
            f"{off}, at most {limit:.0e} allowed; that is rounding of activations, in exact "
            f"arithmetic{exact.part} it agrees to {exact.divergence:.0e}: allow it with "
            f"--tolerance {1.1 * found:.1e}"
        )


def _check_digests(folder: Path, manifest: Manifest) -> None:
    if odd := {*files_in(folder)} - {*manifest.sha256, MANIFEST}:
        raise VerifyError(
            f"{folder / min(odd)}: not in the manifest; move it away, or materialize it again"
        )
    for name, digest in manifest.sha256.items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            raise VerifyError(
                f"{path}: missing or changed since it was written; materialize it again"
            )


def _check_sizes(folder: Path, manifest: Manifest, size: FileBytes) -> None:
    told = (manifest.file_bytes, manifest.tensor_bytes, manifest.overhead_bytes)
    if told != (size.file, size.tensors, size.overhead):
        raise VerifyError(
            f"{folder}: the manifest says {told[0]} bytes = {told[1]} of tensors + {told[2]}, the "
            f"allocation takes {size.file} = {size.tensors} + {size.overhead}; materialize it again"
        )


def _tensors(
    folder: Path, manifest: Manifest, encodings: Encodings
) -> Iterator[tuple[str, tuple[Bytes, str]]]:
    """Stored tensors by the name in the layout: bytes, and format or dtype."""
    if manifest.container == "gguf":
        stored = read_gguf(folder / manifest.file)
        names = {g.stored_as: g.name for g in encodings.layout.groups.values()}
        names |= {k.stored_as: k.source for k in encodings.layout.full_precision}
        for name, (fmt, _, data) in stored.items():
            yield names.get(name, name), (data, fmt)
        return
    try:
        with safe_open(folder / FILE["safetensors"], framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name).contiguous()
                yield name, (tensor.view(-1).view(_uint8()).numpy(), str(tensor.dtype))
    except (OSError, SafetensorError) as error:
        raise VerifyError(f"{folder}: cannot be opened ({error}); materialize it again") from None


def _uint8() -> Any:
    import torch

    return torch.uint8


def _check_weights(
    folder: Path,
    manifest: Manifest,
    source: EncodedTensors,
    found: dict[str, tuple[Bytes, str]],
) -> None:
    layout = source.layout
    parts = {group: source.allocation.parts(layout, group) for group in layout.groups}
    names = {group: tensor_names(group, held) for group, held in parts.items()}
    expected = {*chain.from_iterable(names.values()), *(k.source for k in layout.full_precision)}
    if set(found) != expected:
        odd = min(set(found) ^ expected)
        raise VerifyError(f"{folder}: tensor {odd} is not in both file and allocation")
    for group, held in parts.items():
        for part, (name, (fmt, _)) in enumerate(zip(names[group], held, strict=True)):
            stored, stored_as = found[name]
            if manifest.container == "gguf" and stored_as != fmt.name:
                raise VerifyError(
                    f"{folder}: {name} is stored as {stored_as}, allocated {fmt.name}"
                )
            if not source.matches(group, part, stored):
                raise VerifyError(
                    f"{folder}: {name} holds other bytes than its {fmt.name} encoding"
                )
            shape = source.shape(group, part)
            _check_decoding(f"{folder}: {name}", fmt, stored.reshape(shape)[..., :1, :])
    for kept in layout.full_precision:
        raw = (
            source.full_precision(kept)
            if manifest.container == "gguf"
            else source.full_precision_raw(kept)
        )
        if found[kept.source][0].tobytes() != raw.tobytes():
            raise VerifyError(f"{folder}: {kept.source} holds other bytes than the checkpoint")


def _check_decoding(where: str, fmt: Format, encoded: Bytes) -> None:
    """Holds our decoding of some rows against gguf-py's."""
    encoded = np.ascontiguousarray(encoded)
    second = dequantize(encoded, GGMLQuantizationType(fmt.ggml_type))
    if not np.array_equal(second.reshape(-1), decode(encoded, fmt).reshape(-1)):
        raise VerifyError(f"{where} decodes differently in gguf-py; update the wheels")


class _Stored:
    """A file's encoded weights, in the place of encodings.

    Args:
        layout: of the allocation.
        allocation: what the file holds.
        found: its tensors.
    """

    def __init__(
        self, layout: Layout, allocation: Allocation, found: Mapping[str, tuple[Bytes, str]]
    ) -> None:
        self.layout = layout
        self.allocation = allocation
        self._found = found

    def has(self, name: str, fmt: str, expert: int | None = None) -> bool:
        """All that the allocation asks for."""
        return True

    def put(self, name: str, fmt: str, expert: int | None, weights: Floats) -> None:
        """Never asked for."""
        raise AssertionError(f"{name} in {fmt} is in the file")

    def encoded(self, name: str, fmt: str, experts: Sequence[int] | None = None) -> Bytes:
        """A group in its format, `(..., rows, bytes per row)`; of a projection, these experts."""
        parts = self.allocation.parts(self.layout, name)
        stored_as = tensor_names(name, parts)
        at, (known, held) = next((i, p) for i, p in enumerate(parts) if p[0].name == fmt)
        *rows, width = self.layout.groups[name].shape
        shape = (len(held), *rows[1:]) if held else tuple(rows)
        data = self._found[stored_as[at]][0].reshape(*shape, known.nbytes((1, width)))
        return data if experts is None else data[[held.index(e) for e in experts]]

    def decoded(self, name: str, fmt: str, experts: Sequence[int] | None = None) -> Floats:
        """The same, decoded."""
        return decode(np.ascontiguousarray(self.encoded(name, fmt, experts)), format_named(fmt))

    def release(self) -> None:
        """There is nothing to let go of."""


def _run(
    folder: Path, manifest: Manifest, stored: _Stored, scorer: AnyScorer, progress: bool
) -> tuple[float, float, float]:
    """Loss in torch, loss in the runtime, and how far the runtime is off."""
    losses = scorer.score(stored.allocation)
    loss = mean(losses.kl, scorer.documents)
    if manifest.container == "safetensors":
        if isinstance(scorer, StreamedScorer):
            weights = Weights(stored.layout, lambda: stored)
            model = StreamedModel(stored.layout, weights, device=_device_of(scorer))
            again = StreamedScorer(model, scorer.documents).score(stored.allocation)
        else:
            again = scorer.score_model(load(folder))
        runtime_loss = mean(again.kl, scorer.documents)
        return loss, runtime_loss, abs(runtime_loss - loss)
    divergence, runtime = [], []
    longest = max(len(d.ids) for d in scorer.documents)
    told = stored.allocation.kv_format
    kv_format = None if told == KV_FORMAT else told  # else llama.cpp's own defaults
    with LlamaCpp(
        folder / manifest.file,
        context=longest,
        exact=False,
        kv_format=kv_format,
        yarn_betas=yarn_betas(stored.layout.inventory),
    ) as llama:
        shown = tqdm(scorer.documents, desc="llama.cpp", unit="doc", disable=not progress)
        for index, document in enumerate(shown):
            logits = llama.logits(document.ids)
            runtime.append(scorer.score_logits(index, logits)[0])
            divergence.append(kl_divergence(scorer.candidate_logits(index), logits))
    return (
        loss,
        mean(np.array(runtime), scorer.documents),
        mean(np.array(divergence), scorer.documents),
    )


def _device_of(scorer: AnyScorer) -> str:
    """Where it computes, as torch names it."""
    if isinstance(scorer, StreamedScorer):
        return str(scorer.model.device)
    return str(device_of(scorer.swap.model))
