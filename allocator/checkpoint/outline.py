"""The inventory of a checkpoint that nobody has fetched: from `config.json` alone, by shapes.

In: a `config.json` of a registered family, read or planned. Out: the `Inventory` that
`read_inventory` makes of such a checkpoint in bfloat16, without files; the experts of one whose
`quant_method` is mxfp4 are in MXFP4. Invariant: names and shapes come from the family's table, so a
config that asks for tensors without a rule is an error.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from allocator.checkpoint.gguf.model import gguf_files, read_model
from allocator.checkpoint.inventory import MXFP4, Inventory, TensorInfo
from allocator.checkpoint.refusals import no_directory
from allocator.checkpoint.safetensors import read_json
from allocator.errors import CheckpointError
from allocator.families import Config, Family, Role, planned_family_of
from allocator.families.config import encoding
from allocator.formats import FORMATS


def planned_inventory(config: Path | Config) -> Inventory:
    """Lists what a checkpoint with this `config.json` holds; files and offsets say nothing.

    Args:
        config: the file, the directory that it lies in, or its content; or a GGUF model, whose
            pairs say the same.

    Raises:
        CheckpointError: if it is missing, of an unknown architecture, or lacks or contradicts what
            shapes are made of.
    """
    where, content = _read(config)
    family = planned_family_of(content, str(where))
    family.check(content, str(where))
    layers = range(family.n_layers(content))
    tensors = {
        info.name: info
        for info in (
            *_tensors(family, content, None),
            *chain.from_iterable(_tensors(family, content, n) for n in layers),
            *_nextn(family, content),
        )
    }
    inventory = Inventory(where.parent, content, family, tensors)
    if not inventory.moe_layers:
        raise CheckpointError(
            f"{where}: no layer routes to experts; needed a MoE model's config.json"
        )
    return inventory


def _read(config: Path | Config) -> tuple[Path, Config]:
    """The file, and its content."""
    if not isinstance(config, Path):
        return Path("config.json"), config
    if not (config / "config.json").is_file() and (files := gguf_files(config)):
        model, _ = read_model(files)
        return model.path, model.config
    path = config / "config.json" if config.is_dir() else config
    if not path.is_file() or path.suffix == ".safetensors":
        raise CheckpointError(no_directory(config))
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: needed an object, as in a checkpoint's config.json")
    return path, content


def _tensors(family: Family, config: Config, layer: int | None) -> Iterator[TensorInfo]:
    """Those of a layer, or outside of the layers."""
    # transformers converts experts alone
    routed = MXFP4 if encoding(config).get("quant_method") == "mxfp4" else "BF16"
    for rule, shape in family.shapes(config, layer).items():
        for expert in range(family.n_experts(config)) if rule.has_expert else (None,):
            name = rule.pattern.format(layer=layer, expert=expert)
            dtype = routed if rule.has_expert else "BF16"
            yield _info(name, shape, rule.role, layer, expert, dtype)


def _nextn(family: Family, config: Config) -> Iterator[TensorInfo]:
    """Layers like the others, with an embedding, a head and a projection of their own."""
    first = family.n_layers(config)
    for layer in range(first, first + (family.n_nextn(config) or 0)):
        for name, shape in family.nextn_shapes(config).items():
            prefix = family.layer_prefix.format(layer=layer)
            yield _info(prefix + name, shape, Role.NEXTN, layer)
        for t in _tensors(family, config, layer):
            yield _info(t.name, t.shape, Role.NEXTN, layer, t.expert, t.dtype)


def _info(
    name: str,
    shape: tuple[int, ...],
    role: Role,
    layer: int | None,
    expert: int | None = None,
    dtype: str = "BF16",
) -> TensorInfo:
    nbytes = FORMATS[dtype].nbytes(shape)
    return TensorInfo(name, shape, dtype, "", 0, nbytes, role, layer, expert)
