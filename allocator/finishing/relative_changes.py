"""Block scales, norms and routers as functions of one vector of relative changes.

In: the tensors of a file to write. Out: the same tensors under a vector of changes, in the same
formats and sizes; and the loss's gradient by that vector, from the gradients of a model's weights.

A change `r` of a block's scale `d` makes it `d (1 + r)`, rounded to float16. One of a value of a
norm, or of a router's row, adds `r` times the root mean square of the norm's factors, or of the
row, rounded to the checkpoint's dtype, so that a file of either container holds the very value.
Invariant: a vector of zeros gives the very bytes that came in.

Decoded weights are linear in the scales of their block, `w = sum of d_j A_j`, so the gradient by a
relative change is the sum over the block of `G d_j A_j`, where `G` is the gradient of `w`. Rounding
is taken as if it were the identity.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from allocator.checkpoint.tensors import Floats
from allocator.codecs import Bytes, codec_of
from allocator.export.stored import StoredTensor, StoredWeights
from allocator.export.tensors import TensorSource
from allocator.families import Dimensions, Role
from allocator.formats import Format
from allocator.scoring.swap_model import expert_form, parameter_name, view_of
from allocator.targets import FullPrecision, Group, Layout
from allocator.targets.layout import part_names

SCALES, NORMS, ROUTERS = "scales", "norms", "routers"
KINDS = (SCALES, NORMS, ROUTERS)
"""What can be tuned."""
EVERY = -1
"""Stands for all layers, and what is outside of them."""

_LARGEST = float(np.finfo(np.float16).max)
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Tunable(Protocol):
    """A tensor of the file that depends on changes."""

    @property
    def name(self) -> str:
        """Of the tensor, by the layout's names."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""

    @property
    def n(self) -> int:
        """Changes that the tensor depends on."""

    @property
    def is_expert(self) -> bool:
        """Whether it is of routed experts."""

    def parameter_in(self, model: Any) -> str:
        """Returns the name of the model's parameter that the tensor is a part of."""

    def stored(self, changes: Floats) -> StoredTensor:
        """Returns the tensor under changes, `(n,)`."""

    def gradient(self, model: "_Model", changes: Floats) -> Floats:
        """Returns the gradient by the changes, `(n,)`, where the model holds `stored(changes)`."""


@dataclass(frozen=True, eq=False)
class _Fixed:
    """A tensor that has nothing to tune."""

    name: str
    tensor: StoredTensor
    kind: str = ""


class _Model:
    """Parameters of a model, their gradients, and views of groups in both."""

    def __init__(self, model: Any, dimensions: Dimensions) -> None:
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self._model, self._dimensions = model, dimensions

    def gradient(self, name: str) -> torch.Tensor:
        """Returns the gradient of a parameter in its shape `(...)`; zeros where none arrived."""
        parameter = self._parameters[name]
        gradient: torch.Tensor | None = parameter.grad
        return torch.zeros_like(parameter) if gradient is None else gradient

    def value(self, name: str) -> torch.Tensor:
        """Returns a parameter, `(...)`, without its history."""
        value: torch.Tensor = self._parameters[name].detach()
        return value

    def of_group(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a group's values and their gradients, `(..., rows, in_features)` both."""
        form = expert_form(self._model, group.layer)
        values = view_of(self.value, self._dimensions, group, form)
        return values, view_of(self.gradient, self._dimensions, group, form)


@dataclass(frozen=True, eq=False)
class _Scales:
    """The float16 scales of an encoded part, `(..., blocks, scales per block)`.

    Attributes:
        name: of the part.
        group: that it is a part of.
        fmt: of the part.
        places: of its experts among those that the group's layer retains; None for other groups.
        data: the bytes that came in, `(..., bytes per row)`.
        scales: of these, float32.
    """

    name: str
    group: Group
    fmt: Format
    places: list[int] | None
    data: Bytes
    scales: Floats
    kind: str = SCALES

    @property
    def n(self) -> int:
        return self.scales.size

    @property
    def is_expert(self) -> bool:
        return self.places is not None

    def parameter_in(self, model: Any) -> str:
        return parameter_name(self.group, expert_form(model, self.group.layer))

    def of_expert(self, place: int) -> "tuple[_Scales, slice] | None":
        """Returns the scales of one expert, and where they are in the vector of changes.

        Args:
            place: of the expert among those that its layer retains.

        Returns:
            None if the part has another experts' scales.
        """
        if self.places is None or place not in self.places:
            return None
        at = self.places.index(place)
        own = slice(at, at + 1)
        n = self.n // len(self.places)
        one = replace(self, places=None, data=self.data[own], scales=self.scales[own])
        return one, slice(at * n, (at + 1) * n)

    def _encoded(self, changes: Floats, *, without_last: bool = False) -> Bytes:
        scales = self.scales * (1 + changes.reshape(self.scales.shape))
        halves = np.clip(scales, -_LARGEST, _LARGEST).astype(np.float16)
        if without_last:
            halves[..., -1] = 0
        return codec_of(self.fmt).with_scales(self.data, self.fmt, halves)

    def stored(self, changes: Floats) -> StoredTensor:
        return StoredTensor(self._encoded(changes), self.fmt.name)

    def gradient(self, model: _Model, changes: Floats) -> Floats:
        weights, gradients = model.of_group(self.group)
        if self.places is not None:
            places = torch.tensor(self.places).to(weights.device)
            weights, gradients = weights[places], gradients[places]
        return self.gradient_of(weights, gradients, changes)

    def gradient_of(
        self, weights: torch.Tensor, gradients: torch.Tensor, changes: Floats
    ) -> Floats:
        """Returns the gradient by the changes, `(n,)`, from that of the weights.

        Args:
            weights: decoded under the changes, `(..., rows, in_features)`.
            gradients: of these.
            changes: `(n,)`.
        """
        terms = [weights]
        if self.scales.shape[-1] == 2:
            first = codec_of(self.fmt).decode(self._encoded(changes, without_last=True), self.fmt)
            on_device = torch.from_numpy(first).to(weights.device)
            terms = [on_device, weights - on_device]
        blocks = (*weights.shape[:-1], -1, self.fmt.block)
        sums = [(gradients * term).reshape(blocks).sum(-1).cpu() for term in terms]
        by_scale: Floats = torch.stack(sums, -1).reshape(-1).numpy()
        # the terms are proportional to the changed scales, the changes to the ones before
        by_scale /= 1 + changes
        return by_scale


@dataclass(frozen=True, eq=False)
class _Values:
    """A norm, `(width,)`, or a router's rows, `(retained, hidden)`.

    Attributes:
        name: of the tensor in the checkpoint, and of the model's parameter.
        kind: norms or routers.
        dtype: in which the target stores it.
        exact_in: the checkpoint's dtype, in which every value is exact.
        values: that came in, float32.
        units: root mean square of the norm's factors or of each row, `(1,)` or `(retained, 1)`.
    """

    name: str
    kind: str
    dtype: str
    exact_in: str
    values: torch.Tensor
    units: torch.Tensor

    @property
    def n(self) -> int:
        return self.values.numel()

    @property
    def is_expert(self) -> bool:
        return False

    def parameter_in(self, model: Any) -> str:
        return self.name

    def stored(self, changes: Floats) -> StoredTensor:
        moved = self.values + self.units * torch.from_numpy(changes).view(self.values.shape)
        nearest = moved.to(_DTYPES[self.exact_in]).to(_DTYPES[self.dtype])
        return StoredTensor(nearest.view(torch.uint8).numpy(), self.dtype)

    def gradient(self, model: _Model, changes: Floats) -> Floats:
        gradient: Floats = (model.gradient(self.name).cpu() * self.units).reshape(-1).numpy()
        return gradient


class RelativeChanges:
    """The tensors of a file under a vector of changes.

    Args:
        source: the tensors that came in.
        kinds: of `KINDS`, those that change.
        layer: whose tensors are taken, and no others; `EVERY` for all of the file.

    Attributes:
        n: length of the vector.
        places: in the vector, by tensor.
        slices: places in the vector, by kind.
    """

    def __init__(
        self,
        source: TensorSource,
        kinds: frozenset[str] = frozenset(KINDS),
        layer: int | None = EVERY,
    ) -> None:
        self.layout: Layout = source.layout
        self._allocation = source.allocation
        self._fixed: dict[str, StoredTensor] = {}
        self._tunable: list[_Tunable] = []
        for tensor in sorted(
            (*_encoded(source, layer), *_full_precision(source, layer)), key=_place
        ):
            if isinstance(tensor, _Fixed):
                self._fixed[tensor.name] = tensor.tensor
            elif tensor.kind in kinds:
                self._tunable.append(tensor)
            else:
                self._fixed[tensor.name] = tensor.stored(np.zeros(tensor.n, np.float32))
        ends = np.cumsum([0, *(t.n for t in self._tunable)]).tolist()
        self.n: int = ends[-1]
        spans = zip(self._tunable, ends, ends[1:], strict=False)
        self.places = {t.name: slice(begin, end) for t, begin, end in spans}
        self._by_group: dict[str, list[tuple[_Scales, int]]] = {}
        for tunable in self._tunable:
            if isinstance(tunable, _Scales):
                of_group = self._by_group.setdefault(tunable.group.name, [])
                of_group.append((tunable, self.places[tunable.name].start))
        counts = [sum(t.n for t in self._tunable if t.kind == kind) for kind in KINDS]
        ends = np.cumsum([0, *counts]).tolist()
        self.slices = {k: slice(*ends[i : i + 2]) for i, k in enumerate(KINDS)}

    def parameters(self, model: Any) -> frozenset[str]:
        """Returns the names of a model's parameters whose gradients are needed."""
        return frozenset(t.parameter_in(model) for t in self._tunable)

    def tensors(self, changes: Floats) -> dict[str, StoredTensor]:
        """Returns all tensors of the file under changes, `(n,)`, by the layout's names."""
        return self._fixed | {t.name: t.stored(part) for t, part in self._parts(changes)}

    def weights(self, changes: Floats, digest: str) -> StoredWeights:
        """Returns what a candidate brings along under changes, `(n,)`; `digest` names them."""
        return StoredWeights(self.layout, self._allocation, self.tensors(changes), digest)

    def gradient(self, model: Any, changes: Floats, *, experts: bool = True) -> Floats:
        """Returns the loss's gradient by the changes, `(n,)`, from the gradients of parameters.

        Args:
            model: holds the weights under these changes; its parameters have gradients.
            changes: `(n,)`.
            experts: routed experts are among these parameters, else their gradients are zero.
        """
        gradients = _Model(model, self.layout.inventory.dimensions)
        parts = [
            np.zeros(t.n, np.float32)
            if t.is_expert and not experts
            else t.gradient(gradients, part)
            for t, part in self._parts(changes)
        ]
        return np.concatenate(parts, dtype=np.float32)

    def add_expert(
        self,
        gradient: Floats,
        group: Group,
        place: int,
        weights: torch.Tensor,
        gradients: torch.Tensor,
        changes: Floats,
    ) -> None:
        """Adds what one routed expert's matrix contributes to a gradient by the changes, `(n,)`.

        Args:
            gradient: that is added to, `(n,)`.
            group: the expert's projection.
            place: of the expert among those that its layer retains.
            weights: decoded under the changes, `(out, in)`.
            gradients: of these.
            changes: `(n,)`.
        """
        for scales, first in self._by_group.get(group.name, ()):
            if (scales_of_expert := scales.of_expert(place)) is None:
                continue
            one, own = scales_of_expert
            here = slice(first + own.start, first + own.stop)
            gradient[here] += one.gradient_of(weights[None], gradients[None], changes[here])

    def _parts(self, changes: Floats) -> Iterator[tuple[_Tunable, Floats]]:
        for tunable in self._tunable:
            yield tunable, changes[self.places[tunable.name]]


def _place(tensor: _Tunable | _Fixed) -> int:
    return KINDS.index(tensor.kind) if tensor.kind else -1


def _encoded(source: TensorSource, layer: int | None) -> Iterator[_Scales | _Fixed]:
    """The parts of groups."""
    layout, allocation = source.layout, source.allocation
    for group in layout.groups.values():
        if layer not in (EVERY, group.layer):
            continue
        parts = allocation.parts(layout, group.name)
        retained = group.experts(allocation.retained_experts)
        names = part_names(group.name, parts)
        for number, (name, (fmt, experts)) in enumerate(zip(names, parts, strict=True)):
            data = source.encoded(group.name, number)
            scales = codec_of(fmt).scales(data, fmt)
            if scales is None:
                yield _Fixed(name, StoredTensor(data, fmt.name))
                continue
            places = [retained.index(e) for e in experts] if group.role.is_expert else None
            floats = scales.astype(np.float32)
            yield _Scales(name, group, fmt, places, data, floats)


def _full_precision(source: TensorSource, layer: int | None) -> Iterator[_Values | _Fixed]:
    layout = source.layout
    for tensor in layout.full_precision:
        if layer not in (EVERY, tensor.layer):
            continue
        values = torch.from_numpy(np.array(source.full_precision(tensor), np.float32))
        kind = {Role.NORM: NORMS, Role.ROUTER: ROUTERS}.get(tensor.role)
        units = _factors(layout, tensor, values).square().mean(-1, keepdim=True).sqrt()
        exact_in = layout.inventory.tensors[tensor.source].dtype
        known = _Values(tensor.source, kind or "", tensor.dtype, exact_in, values, units)
        if kind is None:
            yield _Fixed(tensor.source, known.stored(np.zeros(known.n, np.float32)))
        else:
            yield known


def _factors(layout: Layout, tensor: FullPrecision, values: torch.Tensor) -> torch.Tensor:
    """What a model multiplies by, `(...)`; of norms that add one to their values, these sums."""
    match = layout.inventory.family.match(tensor.source)
    return values + 1 if match is not None and match[0].adds_one else values
