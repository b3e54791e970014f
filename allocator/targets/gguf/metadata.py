"""Every key and value of a GGUF file, so that stock llama.cpp computes as the checkpoint does.

In: an inventory and the two expert counts. Out: `Field`s in file order, and their exact bytes.
Invariant: a config or tokenizer that llama.cpp would silently compute in another way is an error,
and the bytes do not depend on the expert counts.

What an architecture says of itself is its family's (`allocator.families.gguf`). Sources: gguf-py's
`constants.Keys`; the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from gguf import GGML_QUANT_VERSION, GGUFValueType

from allocator.checkpoint.inventory import Inventory
from allocator.families.gguf import Value
from allocator.targets.gguf.fields import (
    Field,
    array_field,
    bool_field,
    float_field,
    metadata_bytes,
    string_field,
    uint_field,
)
from allocator.targets.gguf.general import general_name, sampling
from allocator.targets.gguf.tokenizer import tokenizer

__all__ = ["Field", "metadata", "metadata_bytes", "tokenizer"]


def metadata(inventory: Inventory, *, n_experts: int, experts_used: int) -> list[Field]:
    """Returns every key/value pair of the file, `general.architecture` first.

    There is no `general.file_type`: a mix has none, and without the key llama.cpp names the most
    frequent tensor type. No value depends on where the checkpoint lies: same weights, same bytes.

    Args:
        inventory: the checkpoint.
        n_experts: routed experts that every MoE layer retains.
        experts_used: routed experts per token.

    Raises:
        CheckpointError: if `config.json` or the tokenizer lacks or contradicts what is needed.
        TargetError: if llama.cpp cannot express the model, its tokenizer or these counts.
    """
    return [
        string_field("general.architecture", inventory.family.for_gguf().architecture),
        string_field("general.type", "model"),
        string_field("general.name", general_name(inventory)),
        *sampling(inventory),
        uint_field("general.quantization_version", GGML_QUANT_VERSION),
        *hyperparameters(inventory, n_experts=n_experts, experts_used=experts_used),
        *tokenizer(inventory),
    ]


def hyperparameters(inventory: Inventory, *, n_experts: int, experts_used: int) -> list[Field]:
    """Lists the pairs that say how the model is computed; reads no file beside config.json.

    Raises:
        CheckpointError: if `config.json` lacks or contradicts what is needed.
        TargetError: if llama.cpp computes the model in another way, or not with these counts.
    """
    pairs = inventory.family.for_gguf().pairs(
        inventory.facts, n_experts=n_experts, experts_used=experts_used
    )
    return [_field(key, value) for key, value in pairs]


def _field(key: str, value: Value) -> Field:
    """A pair, as the type of its value says."""
    if isinstance(value, bool):
        return bool_field(key, value)
    if isinstance(value, tuple):
        return array_field(key, value, GGUFValueType.INT32)
    if isinstance(value, int):
        return uint_field(key, value)
    return float_field(key, value) if isinstance(value, float) else string_field(key, value)


def yarn_betas(inventory: Inventory) -> tuple[float, float] | None:
    """Returns `beta_fast` and `beta_slow` that llama.cpp must be told; None for its own.

    Most of its loaders do not read them from the file.
    """
    family = inventory.family
    return family.for_gguf().yarn_betas(family.text_config(inventory.config))
