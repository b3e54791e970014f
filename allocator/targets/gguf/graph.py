"""The graph that llama.cpp builds for a micro-batch, in shapes, and what ggml allocates for it.

In: operations on shapes, in llama.cpp's words. Out: the bytes of the compute buffer. Invariant: the
order of the nodes is that of `ggml_build_forward_expand` (depth first, operands left to right), and
memory is given out as by `ggml_gallocr_reserve` (ggml-alloc.c): inputs first; a result takes over
the memory of an operand that it alone still needs, where the operation may work in place; else it
goes into the smallest gap that holds it, or to the end; an operand is freed after its last use.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

ALIGNMENT = 32
"""Bytes: of tensors in a buffer of the CPU (ggml-backend.cpp, TENSOR_ALIGNMENT)."""


def padded(nbytes: int) -> int:
    """Returns the bytes that a tensor occupies in a buffer."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(eq=False, slots=True)
class Tensor:
    """A node or an input of a graph; weights and caches, allocated elsewhere, do not appear.

    Attributes:
        shape: as ggml has it, the fastest axis first.
        nbytes: in memory; 0 of a view.
        sources: operands, in ggml's order.
        view: the tensor in whose memory it lies; itself, if in memory that is not the graph's.
        in_place: its operation may overwrite an operand (ggml_op_can_inplace).
    """

    shape: tuple[int, ...]
    nbytes: int
    sources: tuple["Tensor", ...] = ()
    view: "Tensor | None" = None
    in_place: bool = False
    # the allocator's state
    children: int = 0
    views: int = 0
    offset: int | None = None


@dataclass
class Graph:
    """A graph under construction; every method returns the tensor that it makes."""

    inputs: list[Tensor] = field(default_factory=list)
    nodes: list[Tensor] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def input(self, *shape: int, width: int = 4) -> Tensor:
        """Makes an input `(*shape,)` that the host fills in; `width` bytes per value."""
        return Tensor(shape, prod(shape) * width)

    def op(self, shape: tuple[int, ...], *sources: Tensor, in_place: bool = False) -> Tensor:
        """Makes a result `(*shape,)` of 4 bytes per value: F32, or indices I32."""
        return Tensor(shape, prod(shape) * 4, sources, in_place=in_place)

    def view(self, source: Tensor, *shape: int) -> Tensor:
        """Makes a view `(*shape,)` of another tensor's memory, or of a part of the memory."""
        return Tensor(shape, 0, (source,), view=source.view or source)

    def store(self, *sources: Tensor, into: Tensor | None = None) -> Tensor:
        """Makes a `ggml_set_rows`: a view of the written tensor, or of a cache without `into`.

        The sources are `(width, ...)`; the result has no shape of its own.
        """
        tensor = Tensor((), 0, sources if into is None else (*sources, into), view=into)
        tensor.view = into or tensor
        return tensor

    def norm(self, x: Tensor) -> Tensor:
        """Makes a root-mean-square norm of `(width, ...)`, times the norm's weight `(width,)`."""
        return self.add(self.add(x))

    def add(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """Makes a sum, or another operation by values, in the shape `(*a.shape,)`.

        `b` is None where the second operand is a weight.
        """
        return self.op(a.shape, *(s for s in (a, b) if s is not None), in_place=True)

    def expand(self, *tensors: Tensor) -> None:
        """Adds tensors `(...,)` and their operands, as `ggml_build_forward_expand` does."""
        for tensor in tensors:
            if id(tensor) in self._seen:
                continue
            self._seen.add(id(tensor))
            self.expand(*tensor.sources)
            (self.nodes if tensor.sources else self.inputs).append(tensor)

    def nbytes(self) -> int:
        """Returns the bytes of the buffer that holds all of it; the graph is used up."""
        memory = _Memory()
        for tensor in self.inputs:
            tensor.offset = memory.take(tensor.nbytes)
        for node in self.nodes:
            if node.view is not None:
                node.view.views += 1
            for source in node.sources:
                source.children += 1
        for node in self.nodes:
            if node.view is None:
                _place(node, memory)
            for source in node.sources:
                source.children -= 1
                if source.children == source.views == 0:
                    _free(source, memory)
        return memory.size


def _place(node: Tensor, memory: "_Memory") -> None:
    for parent in node.sources if node.in_place else ():
        taken = parent.offset is not None and parent.shape == node.shape
        if taken and (parent.children, parent.views) == (1, 0):
            node.offset, parent.offset = parent.offset, None
            return
    node.offset = memory.take(node.nbytes)


def _free(tensor: Tensor, memory: "_Memory") -> None:
    if tensor.view is not None:
        tensor.view.views -= 1
        tensor, whole = tensor.view, tensor
        if tensor is whole or tensor.children or tensor.views:
            return
    if tensor.offset is not None:
        memory.give(tensor.offset, tensor.nbytes)
        tensor.offset = None


class _Memory:
    """`ggml_dyn_tallocr`: one buffer; its gaps, (offset, bytes) by offset; what follows is free."""

    def __init__(self) -> None:
        self.gaps: list[tuple[int, int]] = []
        self.end = self.size = 0

    def take(self, nbytes: int) -> int:
        nbytes = padded(nbytes)
        fitting = [(size, -at) for at, size in self.gaps if size >= nbytes]
        if not fitting:
            offset = self.end
            self.end += nbytes
            self.size = max(self.size, self.end)
            return offset
        size, at = min(fitting)  # of equal ones, the last
        self.gaps.remove((-at, size))
        self._insert([(-at + nbytes, size - nbytes)] if size > nbytes else [])
        return -at

    def give(self, offset: int, nbytes: int) -> None:
        self._insert([(offset, padded(nbytes))])

    def _insert(self, gaps: Iterable[tuple[int, int]]) -> None:
        merged: list[tuple[int, int]] = []
        for at, size in sorted([*self.gaps, *gaps]):
            if merged and sum(merged[-1]) == at:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((at, size))
        if merged and sum(merged[-1]) == self.end:
            self.end = merged.pop()[0]
        self.gaps = merged
