"""Lets transformers' `from_pretrained` open what `materialize --container safetensors` writes.

    import allocator.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("out/pick-safetensors")

In: nothing but the import, which registers a quantizer with transformers. Out: models of
`allocator.load` in the place of the ones that transformers would fill with weights, with the
config, the generation config and the name that transformers gave these. Invariant: transformers
reads no weights and makes none up; a folder that is damaged, or of a newer schema, is refused in
one line.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from allocator.errors import AllocatorError, CheckpointError, VerifyError
from allocator.export.safetensors.directory import (
    FILE_NAME,
    WEIGHTS_KEY,
    described_allocation,
    weights_paths,
)
from allocator.export.safetensors.loading import load, opened
from allocator.families.config import OWN_METHOD
from allocator.targets.safetensors import INDEX_NAME

if not hasattr(HfQuantizer, "update_attn_implementation"):
    raise ImportError(
        "allocator.transformers needs a newer transformers, one that lets a quantizer change a "
        "model's config: install the version of constraints.txt, or open the folder with "
        "allocator.load"
    )


@register_quantization_config(OWN_METHOD)
class AllocatorConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of the encoding: the allocation.

    Attributes:
        quant_method: our name.
        schema: of this description.
        allocation: as in `allocation.json`.
    """

    def __init__(self, schema: object = None, allocation: object = None, **_: object) -> None:
        self.quant_method = OWN_METHOD
        self.schema = schema
        self.allocation = allocation


@register_quantizer(OWN_METHOD)
class AllocatorQuantizer(HfQuantizer):  # type: ignore[misc]
    """Opens a written folder in the course of `from_pretrained`; see the module."""

    requires_calibration = True

    def __init__(self, quantization_config: AllocatorConfig, **kwargs: object) -> None:
        super().__init__(quantization_config, **kwargs)
        self._attention: str | None = None
        self._folder = Path()

    def update_device_map(self, device_map: Any) -> Any:
        """Returns the whole model on the CPU.

        Raises:
            AllocatorError: if something else was asked for.
        """
        places = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
        if {str(place) for place in places} <= {"cpu", "auto"}:
            return {"": "cpu"}
        raise AllocatorError(
            f"device_map {device_map!r}: weights are decoded on the CPU, layer by layer; needed "
            '"cpu", or leave it out'
        )

    def update_attn_implementation(self, config: Any) -> Any:
        """Returns the config with what transformers asks it for before it finds the weights."""
        self._attention = getattr(config, "_attn_implementation_internal", None)
        if hasattr(config, WEIGHTS_KEY):  # which says what to import, and is no name of a file
            delattr(config, WEIGHTS_KEY)
        config.dtype = torch.float32  # unless asked otherwise: losses were measured so
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: object
    ) -> None:
        """Checks the folder, and takes all parameters from the model: there are none to fill.

        Raises:
            AllocatorError: if the folder is damaged, or of a newer schema.
        """
        if not checkpoint_files:
            raise CheckpointError(
                "a state_dict in the place of files: needed the folder that `allocator "
                "materialize` wrote"
            )
        self._folder = Path(checkpoint_files[0]).parent
        paths = weights_paths(self._folder)
        if {Path(file).name for file in checkpoint_files} != {path.name for path in paths}:
            raise CheckpointError(
                f"{self._folder}: weights in {Path(checkpoint_files[0]).name}, needed "
                f"{FILE_NAME}, or shards and their index, alone; materialize it again"
            )
        described_allocation(self._folder)
        for path in paths:
            with opened(path):
                pass
        model._modules.clear()
        model._keys_to_ignore_on_load_unexpected = {"."}
        model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **_: object) -> None:
        """Makes the model the one that `allocator.load` opens.

        Raises:
            AllocatorError: if the folder is damaged, or its model is of another class.
        """
        ours = load(self._folder, dtype=model.config.dtype)
        if type(ours) is not type(model):
            raise VerifyError(
                f"{self._folder}: opened as {type(model).__name__}, needed {type(ours).__name__}: "
                f"use {type(ours).__name__}.from_pretrained, or allocator.load"
            )
        ours.config.name_or_path = model.config.name_or_path
        ours.config.quantization_config = self.quantization_config
        if self._attention is not None:
            ours.set_attn_implementation(self._attention)
        for own in ("config", "_modules", "_parameters", "_buffers"):
            setattr(model, own, getattr(ours, own))
        model.save_pretrained = MethodType(_save, model)
        model.eval()

    def is_serializable(self) -> bool:
        """Returns True: the files are copied."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: the weights are codes."""
        return False


def _save(model: Any, save_directory: str | Path, **options: object) -> None:
    """Copies the files that the model was opened from: weights and config, byte by byte.

    The generation config is the model's own.

    Args:
        model: as `from_pretrained` opened it.
        save_directory: is made.
        options: of `PreTrainedModel.save_pretrained`; `max_shard_size` changes nothing.

    Raises:
        AllocatorError: if other weights, or an upload, are asked for.
    """
    if not options.get("is_main_process", True):
        return
    for name in ("state_dict", "push_to_hub", "variant"):
        if options.get(name):
            raise AllocatorError(
                f"save_pretrained({name}=...): the encoded files are copied as they are; leave "
                f"{name} out (model.push_to_hub uploads them)"
            )
    source, place = Path(model.hf_quantizer._folder), Path(save_directory)
    place.mkdir(parents=True, exist_ok=True)
    files = [path.name for path in weights_paths(source)]
    for name in (*files, *([INDEX_NAME] if len(files) > 1 else ()), "config.json"):
        if not (place / name).exists() or not (place / name).samefile(source / name):
            shutil.copyfile(source / name, place / name)
    model.generation_config.save_pretrained(place)
