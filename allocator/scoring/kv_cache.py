"""Keys and values as the runtime keeps them: encoded when written, decoded when read.

In: how a target's runtime stores them (`Target.cache_rows`). Out: a stand-in for the cache of a
transformers model. Invariant: attention sees what the runtime's attention reads from its cache. A
row of grouped-query attention is all heads of a token; a row of multi-head latent attention is the
latent, from which keys and values are computed, and then the key's part with a position.

A runtime may encode rotated heads (`CacheRows.rotation`): blocks of a head are multiplied by a
normalised Hadamard matrix, and queries are rotated alike, so attention computes the same as on rows
that are decoded and rotated back.

16-bit floats count as exact: on the reference model, their rounding costs less than 1e-6 nats per
token.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch

from allocator.codecs import codec_of
from allocator.families import Dimensions
from allocator.formats import Format
from allocator.targets import CacheRows, Target


def hadamard(n: int) -> torch.Tensor:
    """Returns Sylvester's Hadamard matrix, `n x n`, divided by `sqrt(n)`; symmetric.

    Args:
        n: its order, a power of two.
    """
    matrix: torch.Tensor = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * float(n**-0.5)


def _rotated(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    return (rows.reshape(*rows.shape[:-1], -1, len(rotation)) @ rotation).flatten(-2)


_Stored = tuple[Format | None, torch.Tensor | None]
"""A format, and the matrix that rotates heads before; None for neither."""


class KeysValues:
    """Stands in for the cache of a transformers model, and stores nothing.

    Args:
        dimensions: the checkpoint's.
        rows: how the runtime stores keys, and values, of heads of a width.
    """

    def __init__(
        self, dimensions: Dimensions, rows: Callable[[int], tuple[CacheRows, CacheRows]]
    ) -> None:
        self._rows = rows
        self._keys, _ = rows(dimensions.head)
        self._latent = dimensions.latent
        self._known: dict[int, list[_Stored]] = {}

    def _of_width(self, width: int) -> "list[_Stored]":
        """Formats of keys and of values, and what rotates heads of this width."""
        if width not in self._known:  # layers may have heads of several widths
            self._known[width] = [
                (rows.fmt, hadamard(rows.rotation) if rows.rotation else None)
                for rows in self._rows(width)
            ]
        return self._known[width]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values of one layer that a cache would give back.

        Args:
            keys: `documents x heads x tokens x head size`; of latent attention, the latents, with
                one head.
            values: of the same shape; of latent attention, the keys with a position, one head.
            layer_idx: the layer; transformers passes it.
        """
        if self._latent is None:
            of_keys, of_values = self._of_width(keys.shape[-1])
            return _stored(keys, *of_keys), _stored(values, *of_values)
        latent, placed = keys, values
        apart = self._latent.interleaved  # transformers pulls the pairs apart
        half = placed.shape[-1] // 2
        if apart:
            placed = placed.reshape(*placed.shape[:-1], 2, half).transpose(-1, -2).flatten(-2)
        row = _stored(torch.cat([latent, placed], -1), self._keys.fmt, None)
        latent, placed = row[..., : latent.shape[-1]], row[..., latent.shape[-1] :]
        if apart:
            placed = placed.reshape(*placed.shape[:-1], half, 2).transpose(-1, -2).flatten(-2)
        return latent, placed

    # -- what a model asks of an empty cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns 0: there are no earlier tokens."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Returns 0: there are no earlier tokens."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns the number of keys, which is that of queries, and the first one's place."""
        return query_length, 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Returns no tokens before a convolution: there are no earlier ones."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Returns no state of linear attention: there are no earlier tokens."""

    def update_conv_state(
        self, inputs: torch.Tensor, layer_idx: int, conv_kernel_size: int = 0
    ) -> torch.Tensor:
        """Returns a convolution's inputs, `documents x channels x tokens`, as they are."""
        return inputs

    def update_recurrent_state(self, state: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Returns a state of linear attention, `documents x heads x keys x values`, as it is."""
        return state


def keys_values(target: Target, dimensions: Dimensions, kv_format: str) -> KeysValues | None:
    """Builds what `attach` takes; None where the runtime stores 16-bit floats, which are exact.

    Args:
        target: whose runtime stores the keys and values.
        dimensions: the checkpoint's.
        kv_format: as in `RuntimeSettings`.
    """
    keys, values = target.cache_rows(kv_format, dimensions.head)
    if keys.fmt is values.fmt is None:
        return None
    return KeysValues(dimensions, partial(target.cache_rows, kv_format))


def attach(model: Any, current: Callable[[], KeysValues | None]) -> None:
    """Makes each forward pass of a model use what `current` returns when the pass begins."""

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": current()}

    model.model.register_forward_pre_hook(hook, with_kwargs=True)


def attach_to_caches(model: Any, stored: KeysValues) -> None:
    """Makes a model store keys and values so in whatever cache it is given, as `generate` does.

    Without a cache, each forward pass reads its own keys and values so.

    Args:
        model: of transformers.
        stored: how the runtime stores keys and values.
    """

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        from transformers import DynamicCache

        cache = kwargs.get("past_key_values")
        asked = kwargs.get("use_cache")
        if cache is None and (model.config.use_cache if asked is None else asked):
            cache = DynamicCache(config=model.config)
        if cache is None:
            cache = stored
        elif "update" not in vars(cache):  # of the class alone: not changed yet
            cache.update = MethodType(partial(_update, stored), cache)
        return args, {**kwargs, "past_key_values": cache}

    model.model.register_forward_pre_hook(hook, with_kwargs=True)


def _update(
    stored: KeysValues, cache: Any, keys: torch.Tensor, values: torch.Tensor, layer_idx: int,
    *args: object, **kwargs: object,
) -> Any:  # fmt: skip
    """Appends keys and values as the runtime stores them; see `KeysValues.update`."""
    read = stored.update(keys, values, layer_idx)
    return type(cache).update(cache, *read, layer_idx, *args, **kwargs)


def _stored(rows: torch.Tensor, fmt: Format | None, rotation: torch.Tensor | None) -> torch.Tensor:
    """Encodes and decodes rows `(..., width)`; gradients pass as if nothing had happened."""
    if fmt is None:
        return rows
    turned = rows.detach()
    if rotation is not None:
        rotation = rotation.to(rows.device)
        turned = _rotated(turned, rotation)
    flat = np.ascontiguousarray(turned.cpu().numpy(), dtype=np.float32).reshape(
        -1, turned.shape[-1]
    )
    codec = codec_of(fmt)
    read = torch.from_numpy(codec.decode(codec.encode(flat, fmt), fmt)).to(rows.device)
    read = read.view(turned.shape)
    if rotation is not None:
        read = _rotated(read, rotation)
    return rows + (read - rows.detach()) if rows.requires_grad else read
