"""Every key and value of a GGUF file, so that stock llama.cpp computes as the checkpoint does.

In: an inventory and the two expert counts. Out: `Field`s in file order, and their exact bytes.
Invariant: a config or tokenizer that llama.cpp would silently compute in another way is an error,
and the bytes do not depend on the expert counts.

Sources: llama.cpp's loaders of `deepseek2` and `qwen3moe`; gguf-py's `constants.Keys`; the GGUF
specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gguf import GGML_QUANT_VERSION

from allocator.checkpoint.inventory import Inventory
from allocator.errors import CheckpointError, TargetError
from allocator.targets.gguf.fields import (
    Field,
    bool_field,
    float_field,
    metadata_bytes,
    string_field,
    uint_field,
)
from allocator.targets.gguf.general import general_name, sampling
from allocator.targets.gguf.tokenizer import n_vocab, tokenizer

__all__ = ["Field", "metadata", "metadata_bytes", "tokenizer"]

_BETAS, _OWN = ("beta_fast", "beta_slow"), (32.0, 1.0)  # llama.cpp's own values
_SIGMOID = 2  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID


def metadata(inventory: Inventory, *, n_experts: int, experts_used: int) -> list[Field]:
    """Every key/value pair of the file, `general.architecture` first.

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
        string_field("general.architecture", inventory.family.gguf_architecture),
        string_field("general.type", "model"),
        string_field("general.name", general_name(inventory)),
        *sampling(inventory),
        uint_field("general.quantization_version", GGML_QUANT_VERSION),
        *hyperparameters(inventory, n_experts=n_experts, experts_used=experts_used),
        *tokenizer(inventory),
    ]


# -- hyperparameters


def hyperparameters(inventory: Inventory, *, n_experts: int, experts_used: int) -> list[Field]:
    """Lists the pairs that say how the model is computed; reads no file beside config.json.

    Raises:
        CheckpointError: if `config.json` lacks or contradicts what is needed.
        TargetError: if llama.cpp computes the model in another way, or not with these counts.
    """
    arch = inventory.family.gguf_architecture
    _check_router_groups(inventory, n_experts, experts_used)
    of_family = _deepseek2 if arch == "deepseek2" else _qwen3moe
    return [
        *_shared_hparams(inventory, arch),
        uint_field(f"{arch}.expert_count", n_experts),
        uint_field(f"{arch}.expert_used_count", experts_used),
        *of_family(inventory, arch),
        *_rope(inventory, arch),
    ]


def _check_router_groups(inventory: Inventory, n_experts: int, experts_used: int) -> None:
    groups = inventory.expert_groups
    if groups == 1:
        return
    size, chosen = n_experts // groups, inventory.expert_groups_used
    # a group is ranked by its two best experts, and only the chosen groups' experts are used
    if n_experts % groups or size < 2 or experts_used > size * chosen:
        raise TargetError(
            f"gguf: {experts_used} of {n_experts} retained experts in {groups} router groups "
            f"(n_group) of which {chosen} are chosen; retain a multiple of {groups}, at least two "
            f"per group and {experts_used} in the chosen ones"
        )


def _shared_hparams(inventory: Inventory, arch: str) -> Iterator[Field]:
    config = inventory.config
    yield uint_field(f"{arch}.vocab_size", n_vocab(inventory))
    yield uint_field(f"{arch}.block_count", inventory.n_layers)
    yield uint_field(f"{arch}.context_length", _int(config, "max_position_embeddings"))
    yield uint_field(f"{arch}.embedding_length", _int(config, "hidden_size"))
    yield uint_field(f"{arch}.feed_forward_length", _int(config, "intermediate_size"))
    yield uint_field(f"{arch}.expert_feed_forward_length", _int(config, "moe_intermediate_size"))
    yield uint_field(f"{arch}.attention.head_count", _int(config, "num_attention_heads"))
    yield float_field(
        f"{arch}.attention.layer_norm_rms_epsilon",
        _number({"rms_norm_eps": 1e-6, **config}, "rms_norm_eps"),
    )
    if config.get("hidden_act", "silu") != "silu":
        raise TargetError(
            f"gguf: llama.cpp computes {arch} with silu, config.json says hidden_act = "
            f"{config['hidden_act']!r}; use target safetensors"
        )


def _deepseek2(inventory: Inventory, arch: str) -> Iterator[Field]:
    config = inventory.config
    rank, rope = _int(config, "kv_lora_rank"), _int(config, "qk_rope_head_dim")
    nope, value = _int(config, "qk_nope_head_dim"), _int(config, "v_head_dim")
    if config.get("scoring_func") not in (None, "sigmoid"):
        raise TargetError(
            f"gguf: config.json says scoring_func = {config['scoring_func']!r}, which transformers "
            "computes as a sigmoid all the same; set it to 'sigmoid' if that is meant"
        )
    # multi-head latent attention runs as attention with one key/value head of rank + rope
    yield uint_field(f"{arch}.attention.head_count_kv", 1)
    yield uint_field(f"{arch}.attention.key_length", rank + rope)
    yield uint_field(f"{arch}.attention.value_length", rank)
    yield uint_field(f"{arch}.attention.key_length_mla", nope + rope)
    yield uint_field(f"{arch}.attention.value_length_mla", value)
    yield uint_field(f"{arch}.attention.kv_lora_rank", rank)
    if config.get("q_lora_rank") is not None:
        yield uint_field(f"{arch}.attention.q_lora_rank", _int(config, "q_lora_rank"))
    yield uint_field(f"{arch}.rope.dimension_count", rope)
    yield uint_field(f"{arch}.leading_dense_block_count", _leading_dense(inventory))
    yield uint_field(f"{arch}.expert_shared_count", _int(config, "n_shared_experts"))
    yield float_field(f"{arch}.expert_weights_scale", _number(config, "routed_scaling_factor"))
    yield bool_field(f"{arch}.expert_weights_norm", bool(config.get("norm_topk_prob", True)))
    yield uint_field(f"{arch}.expert_gating_func", _SIGMOID)
    if inventory.expert_groups > 1:
        yield uint_field(f"{arch}.expert_group_count", inventory.expert_groups)
        yield uint_field(f"{arch}.expert_group_used_count", inventory.expert_groups_used)


def _qwen3moe(inventory: Inventory, arch: str) -> Iterator[Field]:
    config = inventory.config
    for key, needed in (("norm_topk_prob", True), ("use_sliding_window", False)):
        if bool(config.get(key, False)) is not needed:
            raise TargetError(
                f"gguf: llama.cpp computes {arch} with {key} = {needed}, config.json says "
                f"{config.get(key)!r}; use target safetensors"
            )
    if _leading_dense(inventory):
        raise TargetError(
            f"gguf: llama.cpp needs experts in every layer of {arch}, some are dense; "
            "use target safetensors"
        )
    head = config.get("head_dim") or _int(config, "hidden_size") // _int(
        config, "num_attention_heads"
    )
    yield uint_field(f"{arch}.attention.head_count_kv", _int(config, "num_key_value_heads"))
    yield uint_field(f"{arch}.attention.key_length", head)
    yield uint_field(f"{arch}.attention.value_length", head)
    yield uint_field(f"{arch}.rope.dimension_count", head)


def _leading_dense(inventory: Inventory) -> int:
    first = inventory.moe_layers[0]
    if inventory.moe_layers != tuple(range(first, inventory.n_layers)):
        raise TargetError(
            f"gguf: llama.cpp needs experts in every layer from the first on that has them, got "
            f"layers {inventory.moe_layers} of {inventory.n_layers}; use target safetensors"
        )
    return first


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are rotated, from wherever `config.json` says so, as transformers takes it.

    Raises:
        CheckpointError: if it is no table.
        TargetError: if it differs between kinds of layers.
    """
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json: rope_scaling is {found!r}, needed a table")
    if kinds := [key for key, value in found.items() if isinstance(value, dict)]:
        raise TargetError(
            f"gguf: rope_parameters differ by kind of layer ({', '.join(kinds)}), which llama.cpp "
            "does not compute in this architecture; use target safetensors"
        )
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **found}
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    longest = "max_position_embeddings"
    rope.setdefault(f"original_{longest}", config.get(longest))
    if f"original_{longest}" in config:
        rope[f"original_{longest}"] = config[f"original_{longest}"]
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    return rope


def yarn_betas(inventory: Inventory) -> tuple[float, float] | None:
    """Returns `beta_fast` and `beta_slow` that llama.cpp must be told; None for its own.

    Its loaders of these architectures read neither from the file.
    """
    rope = rope_parameters(inventory.config)
    if rope["rope_type"] != "yarn":
        return None
    betas = tuple(
        _number(rope, key) if rope.get(key) else own for key, own in zip(_BETAS, _OWN, strict=True)
    )
    return None if betas == _OWN else (betas[0], betas[1])


def _rope(inventory: Inventory, arch: str) -> Iterator[Field]:
    rope = rope_parameters(inventory.config)
    yield float_field(f"{arch}.rope.freq_base", _number(rope, "rope_theta"))
    if rope["rope_type"] == "default":
        return
    _check_yarn(rope, arch)
    if arch == "deepseek2":
        # the loader divides by 0.1 again (TAG_DEEPSEEK2_YARN_LOG_MUL_FIX)
        yield float_field(
            f"{arch}.rope.scaling.yarn_log_multiplier", 0.1 * _number(rope, "mscale_all_dim")
        )
    yield string_field(f"{arch}.rope.scaling.type", "yarn")
    yield float_field(f"{arch}.rope.scaling.factor", _number(rope, "factor"))
    yield uint_field(
        f"{arch}.rope.scaling.original_context_length",
        _int(rope, "original_max_position_embeddings"),
    )
    for key in _BETAS:
        if rope.get(key) is not None:
            yield float_field(f"{arch}.rope.scaling.yarn_{key}", _number(rope, key))


def _check_yarn(rope: Mapping[str, Any], arch: str) -> None:
    """Refuses what llama.cpp rotates otherwise, and cannot be told."""
    odd = {
        "rope_type": rope["rope_type"] == "yarn",
        "truncate": rope.get("truncate", True) is True,
        "partial_rotary_factor": rope["partial_rotary_factor"] in (None, 1),
    }
    if found := next((key for key, fine in odd.items() if not fine), None):
        raise TargetError(
            f"gguf: rope with {found} = {rope[found]!r} is not known to be computed by llama.cpp "
            "as by transformers; use target safetensors"
        )
    scale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    # llama.cpp assumes mscale == mscale_all_dim (or mscale = 1), as in every released model
    if arch == "deepseek2" and (not all_dim or scale != all_dim):
        raise TargetError(
            f"gguf: llama.cpp needs equal mscale and mscale_all_dim in deepseek2, config.json "
            f"has {scale!r} and {all_dim!r}; use target safetensors"
        )
    theirs, ours = _attention_factor(rope), 1.0
    if arch != "deepseek2":
        ours = 1 + 0.1 * math.log(_number(rope, "factor"))
    if not math.isclose(theirs, ours, rel_tol=1e-6):
        raise TargetError(
            f"gguf: llama.cpp multiplies rotated queries and keys of {arch} by {ours:.6g}, "
            f"attention_factor (or mscale) in config.json means {theirs:.6g}; use target "
            "safetensors"
        )


def _attention_factor(rope: Mapping[str, Any]) -> float:
    """What transformers multiplies cosines and sines by under yarn."""
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    factor = _number(rope, "factor")

    def scaled(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scaled(_number(rope, "mscale")) / scaled(_number(rope, "mscale_all_dim"))
    return scaled(1.0)


# -- small parts


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a number")
    if key == "factor" and not value > 0:
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a positive number")
    return float(value)


def _int(config: Mapping[str, Any], key: str) -> int:
    value = _number(config, key)
    if value != int(value) or not 0 <= value < 2**32:
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a whole number")
    return int(value)
