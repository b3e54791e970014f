"""Keys and values as the runtime keeps them: encoded when written, decoded when read.

In: a `kv_format` of target gguf. Out: what stands in a transformers model where it has its cache.
Invariant: attention sees what llama.cpp's attention reads from its cache. A row of grouped-query
attention is all heads of a token; a row of multi-head latent attention is the rotated key and then
the latent, from which both keys and values are computed.

llama.cpp encodes rotated rows where it can (`rotation`): blocks of a head are multiplied by a
normalised Hadamard matrix, queries are rotated alike, so what attention computes is that of rows
decoded and rotated back.

F16 is taken as exact: on the reference model its rounding costs less than 1e-6 nats per token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from allocator.codecs import ggml
from allocator.formats import format_named
from allocator.inventory import Inventory
from allocator.targets.gguf_memory import kv_parts

_FORMATS = {"q8_0": "Q8_0", "q4_0": "Q4_0"}


def hadamard(n: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix of order `n`, a power of two, divided by `sqrt(n)`; symmetric."""
    found: torch.Tensor = torch.ones(1, 1)
    while len(found) < n:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found * float(n**-0.5)


def _rotated(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    return (rows.reshape(*rows.shape[:-1], -1, len(rotation)) @ rotation).flatten(-2)


def rotation(inventory: Inventory, kv_format: str) -> tuple[int | None, int | None]:
    """Orders of the Hadamard matrices that keys and values are multiplied by; None where none is.

    Encoded heads of a multiple of 64 are rotated: keys by the largest power of two that divides the
    head, values by 64 (llama.cpp's `llama-kv-cache.cpp`).
    """
    config = inventory.config
    if inventory.family.model_type == "deepseek_v3":
        return None, None
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    if head % 64:
        return None, None
    keys, values = kv_parts(kv_format)
    return (None if keys == "f16" else head & -head), (None if values == "f16" else 64)


class KeysValues:
    """Stands where a transformers model has its cache, and keeps nothing.

    Args:
        inventory: the checkpoint.
        kv_format: of keys and values.
    """

    def __init__(self, inventory: Inventory, kv_format: str) -> None:
        self.kv_format = kv_format
        self._keys, self._values = kv_parts(kv_format)
        self._config: Mapping[str, Any] = inventory.config
        self._latent = inventory.family.model_type == "deepseek_v3"
        found = rotation(inventory, kv_format)
        self._rotations = [None if n is None else hadamard(n) for n in found]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a cache would give back, of one layer's `(documents, heads, tokens, head size)`.

        Of latent attention `keys` are the latents and `values` the rotated keys, of one head each.
        """
        if not self._latent:
            return (
                _kept(keys, self._keys, self._rotations[0]),
                _kept(values, self._values, self._rotations[1]),
            )
        latent, rotated = keys, values
        half = rotated.shape[-1] // 2
        if self._config.get("rope_interleave", True):  # transformers has pulled the pairs apart
            rotated = rotated.view(*rotated.shape[:-1], 2, half).transpose(-1, -2).flatten(-2)
        row = _kept(torch.cat([rotated, latent], -1), self._keys, self._rotations[0])
        rotated, latent = row[..., : 2 * half], row[..., 2 * half :]
        if self._config.get("rope_interleave", True):
            rotated = rotated.reshape(*rotated.shape[:-1], half, 2).transpose(-1, -2).flatten(-2)
        return latent, rotated

    # -- what a model asks of a cache that has seen nothing

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No earlier tokens."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """No earlier tokens."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As many keys as queries, none earlier."""
        return query_length, 0


def keys_values(inventory: Inventory, kv_format: str) -> KeysValues | None:
    """What `attach` takes; None for `f16`, as which models compute already."""
    return None if kv_parts(kv_format) == ("f16", "f16") else KeysValues(inventory, kv_format)


def attach(model: Any, held: Callable[[], KeysValues | None]) -> None:
    """Makes a model's forward passes use what `held` gives at their time."""

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": held()}

    model.model.register_forward_pre_hook(hook, with_kwargs=True)


def _kept(rows: torch.Tensor, name: str, rotation: torch.Tensor | None) -> torch.Tensor:
    """Rows after encoding and decoding; gradients pass as if nothing had happened."""
    if name == "f16":
        return rows
    turned = rows.detach()
    if rotation is not None:
        turned = _rotated(turned, rotation)
    fmt = format_named(_FORMATS[name])
    flat = np.ascontiguousarray(turned.numpy(), dtype=np.float32).reshape(-1, turned.shape[-1])
    found = torch.from_numpy(ggml.decode(ggml.encode(flat, fmt), fmt)).view(turned.shape)
    if rotation is not None:
        found = _rotated(found, rotation)
    return rows + (found - rows.detach()) if rows.requires_grad else found
