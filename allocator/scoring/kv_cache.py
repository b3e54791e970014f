"""Keys and values as the runtime keeps them: encoded when written, decoded when read.

In: a `kv_format` of target gguf. Out: what stands in a transformers model where it has its cache.
Invariant: attention sees what llama.cpp's attention reads from its cache. A row of grouped-query
attention is all heads of a token; a row of multi-head latent attention is the latent, from which
keys and values are computed, and then the key's part with a position.

llama.cpp encodes rotated heads where it can (`gguf_memory.rotation`): blocks of a head are
multiplied by a normalised Hadamard matrix, queries are rotated alike, so what attention computes is
that of rows decoded and rotated back.

F16 is taken as exact: on the reference model its rounding costs less than 1e-6 nats per token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from allocator.codecs import ggml
from allocator.formats import format_named
from allocator.targets.gguf.memory import kv_parts, rotation

_FORMATS = {"q8_0": "Q8_0", "q4_0": "Q4_0"}


def hadamard(n: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix of order `n`, a power of two, divided by `sqrt(n)`; symmetric."""
    found: torch.Tensor = torch.ones(1, 1)
    while len(found) < n:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found * float(n**-0.5)


def _rotated(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    return (rows.reshape(*rows.shape[:-1], -1, len(rotation)) @ rotation).flatten(-2)


class KeysValues:
    """Stands where a transformers model has its cache, and keeps nothing.

    Args:
        config: the checkpoint's.
        kv_format: of keys and values.
    """

    def __init__(self, config: Mapping[str, Any], kv_format: str) -> None:
        self.kv_format = kv_format
        self._keys, self._values = kv_parts(kv_format)
        self._config = config
        self._latent = "kv_lora_rank" in config
        orders = (
            rotation(self._keys, _head_size(config), values=False),
            rotation(self._values, _head_size(config), values=True),
        )
        self._rotations = [hadamard(n) if n and not self._latent else None for n in orders]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a cache would give back, of one layer's `(documents, heads, tokens, head size)`.

        Of latent attention `keys` are the latents and `values` the keys with a position, one head.
        """
        if not self._latent:
            return (
                _kept(keys, self._keys, self._rotations[0]),
                _kept(values, self._values, self._rotations[1]),
            )
        latent, placed = keys, values
        apart = self._config.get("rope_interleave", True)  # transformers pulls the pairs apart
        half = placed.shape[-1] // 2
        if apart:
            placed = placed.reshape(*placed.shape[:-1], 2, half).transpose(-1, -2).flatten(-2)
        row = _kept(torch.cat([latent, placed], -1), self._keys, None)
        latent, placed = row[..., : latent.shape[-1]], row[..., latent.shape[-1] :]
        if apart:
            placed = placed.reshape(*placed.shape[:-1], half, 2).transpose(-1, -2).flatten(-2)
        return latent, placed

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


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def keys_values(config: Mapping[str, Any], kv_format: str) -> KeysValues | None:
    """What `attach` takes; None for `f16`, as which models compute already."""
    return None if kv_parts(kv_format) == ("f16", "f16") else KeysValues(config, kv_format)


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
        rotation = rotation.to(rows.device)
        turned = _rotated(turned, rotation)
    fmt = format_named(_FORMATS[name])
    flat = np.ascontiguousarray(turned.cpu().numpy(), dtype=np.float32).reshape(
        -1, turned.shape[-1]
    )
    found = torch.from_numpy(ggml.decode(ggml.encode(flat, fmt), fmt)).to(rows.device)
    found = found.view(turned.shape)
    if rotation is not None:
        found = _rotated(found, rotation)
    return rows + (found - rows.detach()) if rows.requires_grad else found
