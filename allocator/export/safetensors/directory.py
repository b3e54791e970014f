"""What lies in a written directory beside the weights: config.json and the tokenizer's files.

In: the layout and an allocation, or a directory. Out: files that transformers reads; the allocation
of a directory. Invariant: no weights are read, and torch is not loaded.
"""

import json
import shutil
from pathlib import Path

from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.safetensors import read_json
from allocator.checkpoint.tokenizer import Tokenizer, carried_files, read_tokenizer
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError, VerifyError
from allocator.families.config import encoding, quantization_method, with_encoding
from allocator.targets import Layout

FILE_NAME = "encoded.safetensors"
"""Not `model.safetensors`: stock transformers skips an unknown quantization method with a warning,
and would then run on random weights; without that file it refuses the directory."""
QUANT_METHOD = "moe-allocator"
"""Names us in config.json, as other quantizers name themselves."""


def write_config(place: Path, layout: Layout, allocation: Allocation) -> None:
    """Writes config.json with the allocation, and copies what a runtime needs beside it."""
    inventory = layout.inventory
    config = with_encoding(inventory.config, QUANT_METHOD, {"allocation": allocation.to_json()})
    (place / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in carried_files(inventory.path):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(inventory.path / name, place / name)
    if (made := _converted_tokenizer(inventory)) is not None:
        (place / "tokenizer.json").write_text(made.text, encoding="utf-8")
        if inventory.gguf is not None:
            text = json.dumps(made.config, indent=2, ensure_ascii=False)
            (place / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def described_allocation(folder: Path) -> Allocation:
    """Reads the allocation in a directory's config.json.

    Raises:
        CheckpointError: if there is no readable config.json.
        VerifyError: if another program wrote it.
        SpaceError: if the allocation is malformed.
    """
    config = read_json(folder / "config.json")
    if (method := quantization_method(config)) != QUANT_METHOD:
        raise VerifyError(
            f"{folder}: config.json has quant_method {method!r}, needed {QUANT_METHOD!r}; open "
            "other checkpoints with transformers"
        )
    return Allocation.from_json(encoding(config).get("allocation"))


def _converted_tokenizer(inventory: Inventory) -> Tokenizer | None:
    """The tokenizer that the checkpoint has no files of, if it can be made of what it has."""
    try:
        tokenizer = read_tokenizer(inventory)
    except CheckpointError:  # then the checkpoint's own files are all there is
        return None
    return None if tokenizer is None or not tokenizer.converted else tokenizer
