"""What lies in a written directory beside the weights: config.json and the tokenizer's files.

In: the layout and an allocation, or a directory. Out: files that transformers reads; the allocation
of a directory. Invariant: no weights are read, and torch is not loaded.
"""

import json
import shutil
from pathlib import Path

from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.safetensors import read_json, weights_files
from allocator.checkpoint.tokenizer import Tokenizer, carried_files, read_tokenizer
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError, SpaceError, VerifyError
from allocator.families.config import OWN_METHOD, encoding, quantization_method, with_encoding
from allocator.targets import Layout
from allocator.targets.safetensors import INDEX_NAME

FILE_NAME = "model.safetensors"
EARLIER_NAME = "encoded.safetensors"
"""Of the weights' file in directories of earlier versions."""
SCHEMA = 1
"""Of what config.json says of the encoding."""
WEIGHTS_KEY = "transformers_weights"
"""The key of config.json under which transformers looks for another name of the weights' file."""
_REFUSAL = (
    "these weights are encoded by moe-allocator: run `import allocator.transformers` before "
    "from_pretrained"
)
"""No name of a file, so transformers says it and stops. It would skip an unknown quantization
method with a warning, and then run on random weights."""


def write_config(place: Path, layout: Layout, allocation: Allocation) -> None:
    """Writes config.json with the allocation, and copies what a runtime needs beside it."""
    inventory = layout.inventory
    described = {"schema": SCHEMA, "allocation": allocation.to_json()}
    config = with_encoding(inventory.config, OWN_METHOD, described)
    config[WEIGHTS_KEY] = _REFUSAL
    for key, inner in config.items():  # transformers may open the language model alone
        if isinstance(inner, dict) and key == "text_config":
            config[key] = {**inner, WEIGHTS_KEY: _REFUSAL}
    (place / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tokenizer(place, inventory)


def write_tokenizer(place: Path, inventory: Inventory) -> None:
    """Writes the files of a checkpoint's tokenizer, as it has them or as they are made of it."""
    for name in carried_files(inventory.path):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(inventory.path / name, place / name)
    if (made := _converted_tokenizer(inventory)) is not None:
        (place / "tokenizer.json").write_text(made.text, encoding="utf-8")
        if inventory.gguf is not None:
            text = json.dumps(made.config, indent=2, ensure_ascii=False)
            (place / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def weights_paths(folder: Path) -> list[Path]:
    """Returns the files of a directory's weights, in their order; one that is missing, too.

    Raises:
        CheckpointError: if the index of shards is damaged, or a shard is missing.
    """
    if (folder / INDEX_NAME).is_file():
        return [folder / name for name in weights_files(folder)[0]]
    earlier = folder / EARLIER_NAME
    return [earlier if earlier.is_file() else folder / FILE_NAME]


def described_allocation(folder: Path) -> Allocation:
    """Reads the allocation in a directory's config.json.

    Raises:
        CheckpointError: if there is no readable config.json.
        VerifyError: if another program wrote it.
        SpaceError: if the allocation is malformed.
    """
    config = read_json(folder / "config.json")
    if (method := quantization_method(config)) != OWN_METHOD:
        raise VerifyError(
            f"{folder}: config.json has quant_method {method!r}, needed {OWN_METHOD!r}; open "
            "other checkpoints with transformers"
        )
    if (schema := encoding(config).get("schema", 1)) != SCHEMA:  # earlier versions said none
        raise VerifyError(
            f"{folder}: config.json says schema {schema} of its encoding, needed {SCHEMA}; open it "
            "with the allocator that wrote it, or materialize it again"
        )
    try:
        return Allocation.from_json(encoding(config).get("allocation"))
    except SpaceError as error:
        raise SpaceError(f"{folder}/config.json: {error}; materialize it again") from None


def _converted_tokenizer(inventory: Inventory) -> Tokenizer | None:
    """The tokenizer that the checkpoint has no files of, if it can be made of what it has."""
    try:
        tokenizer = read_tokenizer(inventory)
    except CheckpointError:  # then the checkpoint's own files are all there is
        return None
    return None if tokenizer is None or not tokenizer.converted else tokenizer
