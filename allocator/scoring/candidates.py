"""A candidate's weights, group by group, with no model in memory.

In: a layout, and where encoded weights come from (encodings, or a written file). Out: values of any
group or routed expert, as a candidate has them, float32. Invariants: an original is read at most
once between two calls of `forget`, however many candidates ask for it or lack a format; what they
lack is encoded from it. The next expert is read ahead by a thread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import torch

from allocator.checkpoint.tensors import Floats, read_rows, read_tensor
from allocator.codecs import ggml
from allocator.codecs.ggml import Bytes
from allocator.decision.allocation import KV_FORMAT, Allocation
from allocator.formats import format_named, parts
from allocator.targets import Group, Layout
from allocator.targets.group_weights import group_weights

_WHOLE_BYTES = 512 << 20  # a smaller embedding or head is read once for all candidates


@dataclass(frozen=True)
class Candidate:
    """What is computed.

    Attributes:
        format_of: format or parts by group; None for the original's weights.
        retained_experts: by MoE layer.
        experts_used: routed experts per token.
        kv_format: of keys and values.
    """

    format_of: Mapping[str, str | None]
    retained_experts: Mapping[int, tuple[int, ...]]
    experts_used: int
    kv_format: str = KV_FORMAT

    @classmethod
    def of(cls, allocation: Allocation) -> "Candidate":
        """What an allocation's file computes."""
        return cls(
            allocation.format_of,
            allocation.retained_experts,
            allocation.experts_used,
            allocation.kv_format,
        )

    @classmethod
    def original(cls, layout: Layout) -> "Candidate":
        """The checkpoint itself."""
        everyone = tuple(range(layout.inventory.n_experts))
        return cls(
            dict.fromkeys(layout.groups),
            dict.fromkeys(layout.layers, everyone),
            layout.inventory.experts_used,
        )


class Encoded(Protocol):
    """Where encoded weights come from; see `Encodings`."""

    def has(self, name: str, fmt: str, expert: int | None = None) -> bool:
        """Whether an expert of a routed projection, or another group, is there."""

    def put(self, name: str, fmt: str, expert: int | None, weights: Floats) -> None:
        """Takes in weights that are not there."""

    def encoded(self, name: str, fmt: str, experts: Sequence[int] | None = None) -> Bytes:
        """Bytes of a group in a format; of a routed projection, of these experts."""

    def decoded(self, name: str, fmt: str, experts: Sequence[int] | None = None) -> Floats:
        """The same, decoded."""

    def release(self) -> None:
        """Lets go of what was asked for so far."""


class Weights:
    """Values of groups, as candidates have them.

    Args:
        layout: the groups.
        encodings: opens the encoded weights when they are needed for the first time; what they
            lack is encoded from the original that is in memory.
    """

    def __init__(self, layout: Layout, encodings: Callable[[], Encoded]) -> None:
        self.layout = layout
        self._open = encodings
        self._held: dict[tuple[str, int | None], Floats] = {}
        self._coming: dict[tuple[str, int | None], Future[Floats]] = {}
        self._reader = ThreadPoolExecutor(1)

    @cached_property
    def _encodings(self) -> Encoded:
        return self._open()

    def of(self, candidate: Candidate, group: Group, expert: int | None = None) -> Floats:
        """A group, or one routed expert of it, float32; the original stays until `forget`."""
        fmt = self.format_of(candidate, group, expert)
        if fmt is None:
            return self._original(group, expert)
        if not self._encodings.has(group.name, fmt, expert):
            self._encodings.put(group.name, fmt, expert, self._original(group, expert))
        if expert is None:
            return self._encodings.decoded(group.name, fmt)
        values: Floats = self._encodings.decoded(group.name, fmt, (expert,))[0]
        return values

    def chunks(
        self, candidate: Candidate, group: Group, step: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the embedding or the head, `step` rows at a time: the first row, and their values.

        Encoded ones are asked for, and so checked, once for all rows.
        """
        fmt, whole = candidate.format_of[group.name], 4 * prod(group.shape) <= _WHOLE_BYTES
        if fmt is not None and whole and not self._encodings.has(group.name, fmt):
            self._encodings.put(group.name, fmt, None, self._original(group, None))
        encoded = None if fmt is None else self._encodings.encoded(group.name, fmt)
        for start in range(0, group.shape[0], step):
            stop = min(start + step, group.shape[0])
            if encoded is not None and fmt is not None:
                values = ggml.decode(encoded[start:stop], format_named(fmt))
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
        """Experts one by one; the next one's originals are read meanwhile, if they are needed."""
        for expert, following in zip(experts, [*experts[1:], None], strict=True):
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

    def release(self) -> None:
        """Lets go of the encodings' entries used so far, see `Encodings.release`."""
        if "_encodings" in vars(self):
            self._encodings.release()

    def _asks(self, candidate: Candidate, group: Group, expert: int | None) -> bool:
        if expert not in candidate.retained_experts[group.layer or 0]:
            return False
        fmt = self.format_of(candidate, group, expert)
        return fmt is None or not self._encodings.has(group.name, fmt, expert)

    def format_of(self, candidate: Candidate, group: Group, expert: int | None) -> str | None:
        """The format of a group, or of one routed expert of it; None for the original's weights."""
        text = candidate.format_of[group.name]
        if expert is None or text is None:
            return text
        found = parts(text, candidate.retained_experts[group.layer or 0])
        return next(fmt.name for fmt, experts in found if expert in experts)

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
