"""How positions are rotated, as transformers reads `config.json`, and what llama.cpp can be told.

In: a `config.json`. Out: the rotation as a table, and its pairs of a GGUF file. Invariant: a
rotation that llama.cpp would compute in another way is an error.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from allocator.errors import CheckpointError, TargetError
from allocator.families.config import Config, number, whole

_BETAS, _OWN = ("beta_fast", "beta_slow"), (32.0, 1.0)  # llama.cpp's own values


def rope_parameters(config: Config) -> dict[str, Any]:
    """Reads how positions are rotated, from wherever `config.json` says so.

    Raises:
        CheckpointError: if it is no table.
        TargetError: if it differs between kinds of layers.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: rope_scaling is {rope!r}, needed a table")
    if kinds := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise TargetError(
            f"gguf: rope_parameters differ by kind of layer ({', '.join(kinds)}), which llama.cpp "
            "does not compute in this architecture; use target safetensors"
        )
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    longest = "max_position_embeddings"
    rope.setdefault(f"original_{longest}", config.get(longest))
    if f"original_{longest}" in config:
        rope[f"original_{longest}"] = config[f"original_{longest}"]
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    return rope


def rope_of_kind(config: Config, kind: str, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Reads how positions are rotated in layers of one kind, where kinds differ.

    Args:
        config: of the language model.
        kind: of `layer_types`.
        usual: transformers' own tables by kind, where a config has none.

    Raises:
        CheckpointError: if it is no table.
    """
    rope = (config.get("rope_parameters") or usual).get(kind)
    if not isinstance(rope, dict):
        raise CheckpointError(
            f"config.json: rope_parameters has {rope!r} for {kind}, needed a table"
        )
    return rope


def with_base(theta: float) -> Callable[[Config], Config]:
    """Returns what gives a config that has none the base by which positions are rotated.

    Args:
        theta: transformers' own in an architecture.
    """

    def named(config: Config) -> Config:
        keys = ("rope_theta", "rope_parameters", "rope_scaling")
        return config if any(config.get(k) for k in keys) else {**config, "rope_theta": theta}

    return named


def rotated_width(config: Config, head: int, share: float = 1.0) -> int:
    """Returns how much of a head is rotated.

    Args:
        config: of the language model.
        head: width of a head.
        share: that is rotated where `config` does not say.
    """
    if config.get("rotary_dim") is not None:
        return whole(config, "rotary_dim")
    rope = rope_parameters(config)
    if rope["partial_rotary_factor"] is not None:
        share = number(rope, "partial_rotary_factor")
    return int(head * share)


def yarn_betas(config: Config) -> tuple[float, float] | None:
    """Returns YaRN's `beta_fast` and `beta_slow`; None where llama.cpp's own are right."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "yarn":
        return None
    betas = tuple(
        number(rope, key) if rope.get(key) else own for key, own in zip(_BETAS, _OWN, strict=True)
    )
    return None if betas == _OWN else (betas[0], betas[1])


def rope_pairs(
    config: Config, architecture: str, *, divides_mscale: bool
) -> Iterator[tuple[str, float | int | str]]:
    """Yields the pairs of a GGUF file on rotation, without the architecture before their keys.

    Args:
        config: of the language model.
        architecture: llama.cpp's name, for messages.
        divides_mscale: whether llama.cpp takes YaRN's factor on logits from `mscale_all_dim`, as in
            deepseek2, and not from the factor of the context.

    Raises:
        CheckpointError: if a value is missing or no number.
        TargetError: if llama.cpp would rotate otherwise.
    """
    rope = rope_parameters(config)
    yield "rope.freq_base", number(rope, "rope_theta")
    if rope["rope_type"] == "default":
        return
    _check_yarn(rope, architecture, divides_mscale=divides_mscale)
    if divides_mscale:
        # the loader divides by 0.1 again (TAG_DEEPSEEK2_YARN_LOG_MUL_FIX)
        yield "rope.scaling.yarn_log_multiplier", 0.1 * number(rope, "mscale_all_dim")
    yield "rope.scaling.type", "yarn"
    yield "rope.scaling.factor", number(rope, "factor")
    original = whole(rope, "original_max_position_embeddings")
    yield "rope.scaling.original_context_length", original
    for key in _BETAS:
        if rope.get(key) is not None:
            yield f"rope.scaling.yarn_{key}", number(rope, key)


def _check_yarn(rope: Config, architecture: str, *, divides_mscale: bool) -> None:
    """Refuses what llama.cpp rotates otherwise, and cannot be told."""
    same = {
        "rope_type": rope["rope_type"] == "yarn",
        "truncate": rope.get("truncate", True) is True,
        "partial_rotary_factor": rope["partial_rotary_factor"] in (None, 1),
    }
    if other := next((key for key, is_same in same.items() if not is_same), None):
        raise TargetError(
            f"gguf: rope with {other} = {rope[other]!r} is not known to be computed by llama.cpp "
            "as by transformers; use target safetensors"
        )
    scale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    # llama.cpp assumes mscale == mscale_all_dim (or mscale = 1), as in every released model
    if divides_mscale and (not all_dim or scale != all_dim):
        raise TargetError(
            f"gguf: llama.cpp needs equal mscale and mscale_all_dim in {architecture}, config.json "
            f"has {scale!r} and {all_dim!r}; use target safetensors"
        )
    theirs, ours = _attention_factor(rope), 1.0
    if not divides_mscale:
        ours = 1 + 0.1 * math.log(number(rope, "factor"))
    if not math.isclose(theirs, ours, rel_tol=1e-6):
        raise TargetError(
            f"gguf: llama.cpp multiplies rotated queries and keys of {architecture} by {ours:.6g}, "
            f"attention_factor (or mscale) in config.json means {theirs:.6g}; use target "
            "safetensors"
        )


def _attention_factor(rope: Config) -> float:
    """What transformers multiplies cosines and sines by under YaRN."""
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    factor = number(rope, "factor")

    def scaled(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scaled(number(rope, "mscale")) / scaled(number(rope, "mscale_all_dim"))
    return scaled(1.0)
