"""Opens a written safetensors checkpoint as a transformers model.

In: a directory written by `materialize`. Out: the transformers model. Invariant: the encoded bytes
stay encoded in memory; each decoder layer (and the embedding, the last norm, the head) is decoded
when its forward begins and dropped when it ends, so resident tensor bytes are at most the file's
plus the largest decoded layer. `dense=True` decodes everything once instead.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from allocator.checkpoint.safetensors import read_json
from allocator.codecs import codec_of
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError
from allocator.export.safetensors.directory import described_allocation, weights_paths
from allocator.families import Dimensions, Family, Place, Role, family_of
from allocator.formats import Format
from allocator.formats import parts as parts_of
from allocator.scoring.arranged import arrange
from allocator.scoring.kv_cache import attach_to_caches, keys_values
from allocator.scoring.swap_model import (
    destination,
    device_of,
    expert_form,
    parameter_name,
    resize_experts,
    set_experts_used,
    skeleton,
)
from allocator.targets import Group, target_named
from allocator.targets.layout import part_names


@dataclass
class _Part:
    """What one module needs while its forward runs.

    Attributes:
        groups: encoded: the group, its format, its bytes, and which of the layer's retained experts
            they are (None: all, or no experts).
        full_precision: stored tensors by parameter name.
        places: stored tensors that are parts of a parameter, each with its name and which part.
        templates: of the parameters that are filled, by name: shape and dtype, no memory.
    """

    groups: list[tuple[Group, Format, torch.Tensor, list[int] | None]] = field(default_factory=list)
    full_precision: dict[str, torch.Tensor] = field(default_factory=dict)
    places: list[tuple[str, Place, torch.Tensor]] = field(default_factory=list)
    templates: dict[str, torch.Tensor] = field(default_factory=dict)


def load(path: str | Path, *, dense: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Loads the model of a written safetensors checkpoint for inference.

    Args:
        path: the directory.
        dense: decode all weights once; faster, and as large as the model was.
        dtype: that the model computes in; losses were measured in float32.

    Raises:
        VerifyError: if the directory was not written by `materialize`.
        CheckpointError: if its file is damaged or does not fill the model.
    """
    folder = Path(path)
    config = read_json(folder / "config.json")
    allocation = described_allocation(folder)
    target = target_named(allocation.target)
    model = skeleton(folder, target.computed(family_of(config), config) or config, dtype=dtype)
    layers = tuple(allocation.counts)
    for layer, count in allocation.counts.items():
        resize_experts(model, layer, count)
    set_experts_used(model, family_of(config), layers, allocation.experts_used)
    dimensions = family_of(config).dimensions(config)
    stored = keys_values(target, dimensions, allocation.kv_format)
    if stored is not None:
        attach_to_caches(model, stored)
    encoded = _stored(family_of(config), allocation, dimensions)
    arrange(model, [group for group, *_ in encoded.values()], device_of(model))
    try:
        parts = _parts(folder, family_of(config), encoded, model)
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: a tensor that the model of its config.json has not ({error}); "
            "materialize the checkpoint again"
        ) from None
    _check_complete(folder, model, parts)
    for module_name, part in parts.items():
        module = model.get_submodule(module_name)
        if dense:
            _fill(model, dimensions, part)
        else:
            _empty(model, part)
            module.register_forward_pre_hook(lambda *_, part=part: _fill(model, dimensions, part))
            module.register_forward_hook(lambda *_, part=part: _empty(model, part))
    if dense and model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _parts(
    folder: Path,
    family: Family,
    stored: Mapping[str, tuple[Group, Format, list[int] | None]],
    model: Any,
) -> dict[str, _Part]:
    """Every stored tensor, by the module that needs it."""
    parts: dict[str, _Part] = {}
    for name, data in _tensors(folder):
        if name not in stored:
            part = parts.setdefault(_module_of(name), _Part())
            parameter, place = family.place_in_model(name)
            part.templates[parameter] = _template(model, parameter)
            if place == (...,):
                part.full_precision[name] = data
                part.templates[name] = _template(model, parameter, data.shape)
            else:
                part.places.append((parameter, place, data))
            continue
        group, fmt, places = stored[name]
        if places is not None and data.shape[:1] != (len(places),):
            raise ValueError(f"{name} of shape {tuple(data.shape)}, {len(places)} experts")
        for module in _modules_of(group, tied=bool(model.config.tie_word_embeddings)):
            part = parts.setdefault(module, _Part())
            target = group if module != "lm_head" else _as_head(group)
            part.groups.append((target, fmt, data, places))
            for parameter in _parameters_of(model, target):
                part.templates[parameter] = _template(model, parameter)
    return parts


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a directory's files, by its name in the file."""
    for path in weights_paths(folder):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name)


def _stored(
    family: Family, allocation: Allocation, dimensions: Dimensions
) -> dict[str, tuple[Group, Format, list[int] | None]]:
    """What each encoded tensor of the file holds, by its name."""
    stored: dict[str, tuple[Group, Format, list[int] | None]] = {}
    target = target_named(allocation.target)
    for group_name, text in allocation.formats:
        group = target.arranged(_group(family, group_name), family, dimensions)
        retained = group.experts(allocation.retained_experts)
        in_file = parts_of(text, retained)
        for name, (fmt, experts) in zip(part_names(group_name, in_file), in_file, strict=True):
            places = [retained.index(e) for e in experts] if len(in_file) > 1 else None
            stored[name] = group, fmt, places
    return stored


def opened(path: Path) -> Any:
    """Opens a safetensors file.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be opened ({error}); materialize it again") from None


def _group(family: Family, name: str) -> Group:
    """The group that a stored name means; its shape is the stored tensor's business."""
    layer = int(name.split(".")[1]) if name.startswith("layers.") else None
    role = Role(name if layer is None else name.split(".", 2)[2])
    return Group(name, role, layer, (), (family.source_name(role, layer),), name)


def _as_head(group: Group) -> Group:
    return Group(group.name, Role.HEAD, None, (), ("lm_head.weight",), group.stored_as)


def _modules_of(group: Group, *, tied: bool) -> tuple[str, ...]:
    if group.role is Role.EMBEDDING:
        own = group.sources[0].removesuffix(".weight")
        return (own, "lm_head") if tied else (own,)
    return ("lm_head",) if group.role is Role.HEAD else (f"model.layers.{group.layer}",)


def _module_of(name: str) -> str:
    """The module that is decoded as a whole around a full-precision tensor."""
    pieces = name.split(".")
    return ".".join(pieces[:3]) if pieces[1] == "layers" else name.rpartition(".")[0]


def _parameters_of(model: Any, group: Group) -> tuple[str, ...]:
    return (parameter_name(group, expert_form(model, group.layer)),)


def _parameter(model: Any, name: str) -> torch.Tensor:
    module, _, attribute = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(module), attribute)
    return tensor


def _template(model: Any, name: str, shape: torch.Size | None = None) -> torch.Tensor:
    parameter = _parameter(model, name)
    return torch.empty(
        parameter.shape if shape is None else shape, dtype=parameter.dtype, device="meta"
    )


def _set(model: Any, name: str, values: torch.Tensor) -> None:
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    if attribute in module._buffers:
        module._buffers[attribute] = values
    else:
        module._parameters[attribute] = nn.Parameter(values, requires_grad=False)


def _fill(model: Any, dimensions: Dimensions, part: _Part) -> None:
    with torch.no_grad():
        for name, template in part.templates.items():
            stored = part.full_precision.get(name)
            if stored is None:
                _set(model, name, torch.empty_like(template, device="cpu"))
            else:
                _set(model, name, stored.to(template.dtype))
        for name, place, stored in part.places:
            _parameter(model, name)[place] = stored
        for group, fmt, data, places in part.groups:
            view = destination(model, dimensions, group)
            _decode_into(view if places is None else [view[i] for i in places], fmt, data)


def _empty(model: Any, part: _Part) -> None:
    for name, template in part.templates.items():
        stored = part.full_precision.get(name)
        if stored is None or stored.dtype != template.dtype:  # those are the file's own memory
            _set(model, name, torch.empty(0, dtype=template.dtype))


def _decode_into(view: torch.Tensor | list[torch.Tensor], fmt: Format, data: torch.Tensor) -> None:
    """Decodes without a second copy where the destination's rows lie together."""
    codec = codec_of(fmt)
    if isinstance(view, torch.Tensor) and view.dtype != torch.float32 and view.dim() < 3:
        view.copy_(torch.from_numpy(codec.decode(data.numpy(), fmt)))
    elif view[0].dtype != torch.float32:
        for matrix, encoded in zip(view, data, strict=True):
            matrix.copy_(torch.from_numpy(codec.decode(encoded.numpy(), fmt)))
    elif isinstance(view, torch.Tensor) and view.is_contiguous():
        codec.decode(data.numpy(), fmt, out=view.numpy())
    elif isinstance(view, list) or (view.dim() == 3 and view[0].is_contiguous()):
        for matrix, encoded in zip(view, data, strict=True):
            codec.decode(encoded.numpy(), fmt, out=matrix.numpy())
    else:
        view.copy_(torch.from_numpy(codec.decode(data.numpy(), fmt)))


def _check_complete(folder: Path, model: Any, parts: dict[str, _Part]) -> None:
    """The file holds as many weights of every parameter as the model has."""
    stored: Counter[str] = Counter()
    for part in parts.values():
        stored.update({name: tensor.numel() for name, tensor in part.full_precision.items()})
        for name, _, tensor in part.places:
            stored[name] += tensor.numel()
        for group, fmt, data, _ in part.groups:
            for name in _parameters_of(model, group):
                stored[name] += data.numel() // fmt.block_bytes * fmt.block
    for name, tensor in model.state_dict().items():
        if stored[name] != tensor.numel():
            raise CheckpointError(
                f"{folder}: {stored[name]} weights of {name}, its config.json needs "
                f"{tensor.numel()}; materialize the checkpoint again"
            )
