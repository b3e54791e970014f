"""What a GGUF file says of the model as a whole: its name, and how its authors sample.

In: an inventory. Out: `Field`s. Invariant: nothing depends on where the checkpoint lies.
"""

from collections.abc import Iterator
from math import prod

from gguf import GGUFValueType

from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.safetensors import read_json
from allocator.errors import CheckpointError
from allocator.families import Role
from allocator.families.config import hub_name
from allocator.targets.gguf.fields import Field, carried_fields

_TEXT, _WHOLE, _REAL = GGUFValueType.STRING, GGUFValueType.INT32, GGUFValueType.FLOAT32
_SAMPLING = {  # key of generation_config.json: general.sampling.*, as llama.cpp's converter has it
    "sequence": ("sequence", _TEXT),
    "top_k": ("top_k", _WHOLE),
    "top_p": ("top_p", _REAL),
    "min_p": ("min_p", _REAL),
    "xtc_probability": ("xtc_probability", _REAL),
    "xtc_threshold": ("xtc_threshold", _REAL),
    "temperature": ("temp", _REAL),
    "penalty_last_n": ("penalty_last_n", _WHOLE),
    "penalty_repeat": ("penalty_repeat", _REAL),
    "mirostat": ("mirostat", _WHOLE),
    "mirostat_tau": ("mirostat_tau", _REAL),
    "mirostat_eta": ("mirostat_eta", _REAL),
}
_TYPES = {_TEXT: (str,), _WHOLE: (int,), _REAL: (int, float)}


def general_name(inventory: Inventory) -> str:
    """Names the model: by the hub id in config.json's `_name_or_path`, else by type and size.

    A GGUF model has a name already.

    llama.cpp's converter takes the directory's name too. Ours may not: whoever rebuilds a file from
    a checkpoint in another place must get the same bytes.
    """
    if inventory.gguf is not None and isinstance(
        name := inventory.gguf.values.get("general.name"), str
    ):
        return name
    if (name := hub_name(inventory.config)) is not None:
        return name
    counted = (t for t in inventory.tensors.values() if t.role is not Role.NEXTN)
    return f"{inventory.family.model_type} {short_count(sum(prod(t.shape) for t in counted))}"


def short_count(n: int) -> str:
    """Writes a count in three digits: `29.3M`, `671B`."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= unit:
            return f"{n / unit:.{max(0, 3 - len(str(int(n / unit))))}f}{name}"
    return str(n)


def sampling(inventory: Inventory) -> Iterator[Field]:
    """Yields what generation_config.json says of sampling, which llama.cpp's programs start from.

    Of a GGUF model: what its own file says.

    Raises:
        CheckpointError: if a value is of the wrong kind.
    """
    if inventory.gguf is not None:
        yield from carried_fields(inventory.gguf, "general.sampling.")
        return
    path = inventory.path / "generation_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: needed an object; fetch the file again")
    for key, (name, kind) in _SAMPLING.items():
        value = config.get(key)
        if value is None:
            continue
        if type(value) not in _TYPES[kind] or (kind is _WHOLE and not -(2**31) <= value < 2**31):
            raise CheckpointError(f"{path}: {key} is {value!r}; mend or remove it")
        yield Field(f"general.sampling.{name}", value, kind)
