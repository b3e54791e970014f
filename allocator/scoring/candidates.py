"""A candidate's weights, group by group, with no model in memory.

In: a layout, and where encoded weights come from (encodings, or a written file). Out: values of any
group, routed expert or full-precision tensor, as a candidate has them, float32. Invariants: an
original is read at most once between two calls of `forget`, however many candidates ask for it or
lack a format; what they lack is encoded from it. The next expert is read ahead by a thread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import numpy as np
import torch

from allocator.checkpoint.tensors import Floats, read_rows, read_tensor
from allocator.codecs import Bytes, codec_of
from allocator.decision.allocation import DEFAULT_KV_FORMAT, Allocation
from allocator.files.progress import stepping
from allocator.formats import format_named, parts
from allocator.targets import FullPrecision, Group, Layout
from allocator.targets.group_weights import group_weights

_WHOLE_BYTES = 512 << 20  # a smaller embedding or head is read once for all candidates


class EncodedWeights(Protocol):
    """Where encoded weights come from; see `Encodings`."""

    def has(self, name: str, fmt: str, expert: int | None = None) -> bool:
        """Says whether an expert of a routed projection, or another group, is encoded already."""

    def put(self, name: str, fmt: str, expert: int | None, weights: Floats) -> None:
        """Encodes weights that are not encoded yet: `(out, in)`, or the group's shape."""

    def encoded(self, name: str, fmt: str, experts: Sequence[int] | None = None) -> Bytes:
        """Returns a group in a format, `(..., rows, bytes per row)`; of a projection, `experts`."""

    def decoded(self, name: str, fmt: str, experts: Sequence[int] | None = None) -> Floats:
        """Returns the same decoded, `(..., rows, in)`, float32."""

    def release(self) -> None:
        """Lets entries that were asked for so far leave a cache."""


class CandidateWeights(EncodedWeights, Protocol):
    """Weights that a candidate brings along: codes of its own, norms, routers.

    They take the place of the encodings of a model's layout, and of the checkpoint's full-precision
    tensors. Where a candidate has the original's weights in a group, no source is asked.
    """

    @property
    def digest(self) -> str:
        """Names the weights: equal digests mean equal weights in every format that both have."""

    def full_precision(self, tensor: FullPrecision, experts: Sequence[int] | None) -> Floats:
        """Returns a norm, `(width,)`, or a router's rows, `(experts, hidden)`; float32."""


@dataclass(frozen=True)
class Candidate:
    """What is computed.

    Attributes:
        format_of: format or parts by group; None for the original's weights.
        retained_experts: by MoE layer.
        experts_used: routed experts per token.
        kv_format: of keys and values.
        weights: that it brings along; None for the encodings of the model that it is put into, and
            for the checkpoint's full-precision tensors.
    """

    format_of: Mapping[str, str | None]
    retained_experts: Mapping[int, tuple[int, ...]]
    experts_used: int
    kv_format: str = DEFAULT_KV_FORMAT
    weights: CandidateWeights | None = None

    @classmethod
    def of(cls, allocation: Allocation, weights: CandidateWeights | None = None) -> "Candidate":
        """Returns what an allocation's file computes, with these weights in it."""
        return cls(
            allocation.format_of,
            allocation.retained_experts,
            allocation.experts_used,
            allocation.kv_format,
            weights,
        )

    @property
    def weights_digest(self) -> str:
        """Names the weights that it brings along; empty if there are none."""
        return "" if self.weights is None else self.weights.digest

    @classmethod
    def original(cls, layout: Layout) -> "Candidate":
        """Returns the checkpoint itself."""
        everyone = tuple(range(layout.inventory.n_experts))
        return cls(
            dict.fromkeys(layout.groups),
            dict.fromkeys(layout.layers, everyone),
            layout.inventory.experts_used,
        )


class Weights:
    """Values of groups and full-precision tensors, as candidates have them.

    Args:
        layout: the groups.
        encodings: opens the encoded weights when they are needed for the first time; what they
            lack is encoded from the original that is in memory.
    """

    def __init__(self, layout: Layout, encodings: Callable[[], EncodedWeights]) -> None:
        self.layout = layout
        self._open = encodings
        self._held: dict[tuple[str, int | None], Floats] = {}
        self._full_precision: dict[str, Floats] = {}
        self._coming: dict[tuple[str, int | None], Future[Floats]] = {}
        self._reader = ThreadPoolExecutor(1)

    @cached_property
    def _encodings(self) -> EncodedWeights:
        return self._open()

    def _encoded_of(self, candidate: Candidate) -> EncodedWeights:
        return self._encodings if candidate.weights is None else candidate.weights

    def of(self, candidate: Candidate, group: Group, expert: int | None = None) -> Floats:
        """Returns a group, `group.shape`, or one routed expert of it, `(out, in)`, float32.

        The original stays in memory until `forget`.
        """
        fmt = self.format_of(candidate, group, expert)
        if fmt is None:
            return self._original(group, expert)
        encoded = self._encoded_of(candidate)
        if not encoded.has(group.name, fmt, expert):
            encoded.put(group.name, fmt, expert, self._original(group, expert))
        if expert is None:
            return encoded.decoded(group.name, fmt)
        values: Floats = encoded.decoded(group.name, fmt, (expert,))[0]
        return values

    def full_precision(self, candidate: Candidate, tensor: FullPrecision) -> Floats:
        """Returns a norm, `(width,)`, or a router's retained rows, `(retained, hidden)`; float32.

        The original stays in memory until `forget`.
        """
        experts = retained_rows(tensor, candidate.retained_experts)
        if candidate.weights is not None:
            return candidate.weights.full_precision(tensor, experts)
        if tensor.source not in self._full_precision:
            values = read_tensor(self.layout.inventory, tensor.source)
            self._full_precision[tensor.source] = values
        return rows_of(self._full_precision[tensor.source], experts)

    def chunks(
        self, candidate: Candidate, group: Group, step: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the embedding or the head, `step` rows at a time.

        An encoded group is read, and so checked, once for all rows.

        Yields:
            The first row's number, and the values, `(rows, hidden)`, float32.
        """
        fmt, whole = candidate.format_of[group.name], 4 * prod(group.shape) <= _WHOLE_BYTES
        encoded = None
        if fmt is not None:
            source = self._encoded_of(candidate)
            if whole and not source.has(group.name, fmt):
                source.put(group.name, fmt, None, self._original(group, None))
            encoded = source.encoded(group.name, fmt)
        for start in range(0, group.shape[0], step):
            stop = min(start + step, group.shape[0])
            if encoded is not None and fmt is not None:
                known = format_named(fmt)
                values = codec_of(known).decode(encoded[start:stop], known)
            elif whole:
                values = self._original(group, None)[start:stop]
            else:
                values = read_rows(self.layout.inventory, group.sources[0], start, stop)
            yield start, torch.from_numpy(values)

    def in_turn(
        self,
        experts: Sequence[int],
        groups: Sequence[Group],
        candidates: Sequence[Candidate],
    ) -> Iterator[int]:
        """Yields experts one by one; reads the next one's originals meanwhile, where needed.

        A layer of a large checkpoint takes minutes: its experts are shown as a step of their own.
        """
        pairs = list(zip(experts, [*experts[1:], None], strict=True))
        name = f"layer {groups[0].layer}" if groups else "a layer"
        for expert, following in stepping(pairs, name, unit="experts", brief=True):
            for group in groups if following is not None else ():
                key = group.name, following
                if any(self._asks(c, group, following) for c in candidates):
                    self._coming[key] = self._reader.submit(self._read, group, following)
            yield expert
            for group in groups:
                self._held.pop((group.name, expert), None)
                # read ahead for somebody whom no token reached
                self._coming.pop((group.name, expert), None)

    def forget(self) -> None:
        """Frees the originals that are in memory."""
        self._held.clear()
        self._full_precision.clear()

    def release(self) -> None:
        """Lets the encodings' entries used so far leave their cache, see `Encodings.release`."""
        if "_encodings" in vars(self):
            self._encodings.release()

    def _asks(self, candidate: Candidate, group: Group, expert: int | None) -> bool:
        if expert not in candidate.retained_experts[group.layer or 0]:
            return False
        fmt = self.format_of(candidate, group, expert)
        return fmt is None or not self._encoded_of(candidate).has(group.name, fmt, expert)

    def format_of(self, candidate: Candidate, group: Group, expert: int | None) -> str | None:
        """Returns the format of a group, or of one routed expert of it; None for the original's."""
        text = candidate.format_of[group.name]
        if expert is None or text is None:
            return text
        stored = parts(text, candidate.retained_experts[group.layer or 0])
        return next(fmt.name for fmt, experts in stored if expert in experts)

    def _original(self, group: Group, expert: int | None) -> Floats:
        key = group.name, expert
        if key not in self._held:
            coming = self._coming.pop(key, None)
            self._held[key] = self._read(group, expert) if coming is None else coming.result()
        return self._held[key]

    def _read(self, group: Group, expert: int | None) -> Floats:
        if expert is None:
            return group_weights(self.layout, group)
        return read_tensor(self.layout.inventory, group.sources[expert])


def retained_rows(
    tensor: FullPrecision, retained: Mapping[int, tuple[int, ...]]
) -> tuple[int, ...] | None:
    """Returns which rows of a tensor a candidate has: of a router its retained experts, else None.

    Args:
        tensor: of a layout.
        retained: experts by MoE layer.
    """
    return (
        retained[tensor.layer]
        if tensor.role.has_row_per_expert and tensor.layer is not None
        else None
    )


def rows_of(values: Floats, experts: Sequence[int] | None) -> Floats:
    """Returns some rows of `(experts, ...)` in one piece of memory; all of them for None."""
    return np.ascontiguousarray(values if experts is None else values[list(experts)])
