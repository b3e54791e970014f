"""A model whose matrices are those of a target's file, where these are other ones than its own.

In: a transformers model and the groups of a layout. Out: the same model, computing the same, with a
parameter for each group. Invariant: rows of outputs and columns of inputs meet the values that they
met before, so that importance, second moments, gradients and encoding see a group as the file has
it, and nothing else knows of the order.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from allocator.targets import Group


class Pieces(nn.Module):
    """A linear map whose rows lie in several matrices.

    Args:
        whole: the map; only its sizes are read.
        rows: of the whole's, by piece, each once.
        device: torch's, of the numbers of rows; the matrices are on the meta device.
    """

    places: torch.Tensor

    def __init__(
        self, whole: nn.Linear, rows: Mapping[str, Sequence[int]], device: torch.device
    ) -> None:
        super().__init__()
        for name, own in rows.items():
            piece = nn.Linear(whole.in_features, len(own), bias=False, device="meta")
            self.add_module(name, piece.requires_grad_(False))
        numbers = torch.tensor([row for own in rows.values() for row in own])
        self.register_buffer("places", numbers.argsort().to(device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the products in the whole's order, `(..., rows)`."""
        products = [piece(x) for piece in self.children()]
        return torch.cat(products, -1).index_select(-1, self.places)


def matrix_name(group: Group) -> str:
    """Names the parameter of an arranged model that a group, of no routed experts, is or is in."""
    if group.rows is None:
        return group.sources[0]
    whole = group.sources[0].removesuffix(".weight")
    return f"{whole}.{str(group.role).rpartition('.')[2]}.weight"


def arrange(model: Any, groups: Iterable[Group], device: torch.device) -> None:
    """Gives a model the matrices of these groups, on the meta device where they are new.

    Args:
        model: of transformers, without weights.
        groups: of a layout, the others may be missing.
        device: torch's, that the model will compute on.
    """
    wholes: dict[str, dict[str, Sequence[int]]] = {}
    for group in groups:
        name = group.sources[0].removesuffix(".weight")
        if group.rows is not None:
            piece = matrix_name(group).split(".")[-2]
            wholes.setdefault(name, {})[piece] = group.rows
        if group.columns is not None:
            places = torch.tensor(group.columns).to(device)
            model.get_submodule(name).register_forward_pre_hook(_Reorder(places))
    for name, rows in wholes.items():
        parent, _, attribute = name.rpartition(".")
        pieces = Pieces(model.get_submodule(name), rows, device)
        setattr(model.get_submodule(parent), attribute, pieces.eval())


class _Reorder:
    """Puts what a matrix multiplies, `(..., in)`, in the order of its columns."""

    def __init__(self, places: torch.Tensor) -> None:
        self._places = places

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return args[0].index_select(-1, self._places)
