"""Values of a `config.json`: checked numbers, and the keys that mean the same everywhere.

In: a `config.json` as a mapping. Out: numbers, and what the file says of encoded weights, special
tokens and the model's name. Invariant: a value of another kind than needed is an error that names
its key.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from allocator.errors import CheckpointError

Config = Mapping[str, Any]

MOST_WIDE = 1 << 28
"""Above every width and every count of tokens."""
MOST_LISTED = 1 << 14
"""Above every number of layers and of experts."""

ENCODING = "quantization_config"
"""The key under which transformers says how a checkpoint's weights are encoded."""
OWN_METHOD = "moe-allocator"
"""Names us as the quantizer of a checkpoint."""
SHARED_KEYS = (
    ENCODING, "tie_word_embeddings", "_name_or_path", "bos_token_id", "eos_token_id",
    "unk_token_id", "sep_token_id", "pad_token_id", "mask_token_id",
)  # fmt: skip
"""Keys that a model of text and more has beside its language model's own."""


def number(config: Config, key: str) -> float:
    """Reads a number.

    Raises:
        CheckpointError: if it is none, or of a factor: not positive.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a number")
    if key == "factor" and not value > 0:
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a positive number")
    return float(value)


def whole(config: Config, key: str) -> int:
    """Reads a whole number of 32 bits, which may be written as `4.0`.

    Raises:
        CheckpointError: if it is none.
    """
    value = number(config, key)
    if value != int(value) or not 0 <= value < 2**32:
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a whole number")
    return int(value)


def count(config: Config, key: str, least: int = 1, *, default: int | None = None) -> int:
    """Reads a count or width, `default` where the key is absent.

    Raises:
        CheckpointError: if it is no integer, or below `least`.
    """
    value = config.get(key, default)
    if type(value) is not int or value < least:
        raise CheckpointError(f"config.json: {key} is {value!r}, needed a number from {least}")
    return value


def optional(config: Config, key: str, least: int = 1) -> int | None:
    """Reads a count or width that may be absent, null or 0: None then.

    Raises:
        CheckpointError: if it is something else than a number from `least`.
    """
    return count(config, key, least) if config.get(key) else None


def quantization_method(config: Config) -> str | None:
    """Returns what `config.json` calls the encoding of its weights; None if it names none."""
    described = config.get(ENCODING)
    if described is None:
        return None
    return str(described.get("quant_method") if isinstance(described, dict) else described)[:40]


def check_fp8(config: Config, where: str, *, way_out: str) -> None:
    """Checks that `config.json` describes FP8 in blocks, or nothing.

    Args:
        config: of a checkpoint with FP8 matrices.
        where: the file, for messages.
        way_out: what to do where the weights are encoded otherwise.

    Raises:
        CheckpointError: if it describes other encodings, or blocks that are none.
    """
    if config.get(ENCODING) is None:
        return
    described = encoding(config)
    if described.get("quant_method") != "fp8":
        raise CheckpointError(
            f"{where}: quant_method is {described.get('quant_method')!r} of a checkpoint in "
            f"F8_E4M3, needed 'fp8'; {way_out}"
        )
    block = described.get("weight_block_size")
    if not isinstance(block, list) or [type(n) is int and n >= 1 for n in block] != [True, True]:
        raise CheckpointError(
            f"{where}: weight_block_size is {block!r}, needed two numbers from 1, as in "
            "[128, 128]; convert a checkpoint with other scales to bfloat16 first"
        )


def encoding(config: Config) -> Config:
    """Returns the table on how the weights are encoded; empty if there is none."""
    described = config.get(ENCODING)
    return described if isinstance(described, dict) else {}


def weight_block(config: Config) -> tuple[int, int]:
    """Returns the rows and columns that share a scale, of a checked config with FP8 in blocks."""
    rows, columns = config[ENCODING]["weight_block_size"]
    return int(rows), int(columns)


def with_encoding(config: Config, method: str, described: Config) -> dict[str, Any]:
    """Returns the config of the same model with its weights encoded by `method`, as `described`."""
    return {**config, ENCODING: {"quant_method": method, **described}}


def token_ids(config: Config, names: Iterable[str]) -> dict[str, int | None]:
    """Returns the id of each special token, e.g. `bos`; of several ids the first, else None."""
    return {name: _first(config.get(f"{name}_token_id")) for name in names}


def _first(value: Any) -> int | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int else None


def hub_id(config: Config) -> str | None:
    """Returns the model's id on the Hub, `OWNER/NAME`; None where it came from a folder."""
    path = config.get("_name_or_path")
    named = isinstance(path, str) and path.count("/") == 1 and path[0] not in "./"
    return str(path) if named else None


def hub_name(config: Config) -> str | None:
    """Returns the model's name on the Hub, without its owner; None where it came from a folder."""
    path = hub_id(config)
    return None if path is None else path.split("/")[1] or path


SLIDING, FULL = "sliding_attention", "full_attention"
"""Kinds of attention in `layer_types`, as transformers names them."""


def is_tied(config: Config) -> bool:
    """Returns whether the head is to be the embedding."""
    return bool(config.get("tie_word_embeddings", False))


def is_tied_by_default(config: Config) -> bool:
    """Returns whether the head is to be the embedding, as it is where `config` does not say."""
    return bool(config.get("tie_word_embeddings", True))


def plain_floats(value: Any) -> Any:
    """Returns a value of a config with floats for what transformers writes in place of them.

    JSON has no infinity: `{"__float__": "Infinity"}` stands for one.
    """
    if isinstance(value, dict):
        text = value.get("__float__")
        if isinstance(text, str) and len(value) == 1:
            return float(text)
        return {key: plain_floats(inner) for key, inner in value.items()}
    return [plain_floats(inner) for inner in value] if isinstance(value, list) else value


def plain_skeleton(settings: Any) -> None:
    """Changes transformers' own settings so that they build a model of plain floats.

    How the weights on disk are encoded is no matter of the model: what is put in is decoded.
    transformers computes groups of experts by numbers alone, where files say null for no groups.

    Args:
        settings: a `PretrainedConfig`, changed in place.
    """
    if hasattr(settings, ENCODING):
        delattr(settings, ENCODING)
    for key in ("n_group", "topk_group"):
        if getattr(settings, key, 1) is None:
            setattr(settings, key, 1)
