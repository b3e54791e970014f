"""A transformers model whose weights can be exchanged group by group.

In: an inventory. Out: `SwapModel`, the architecture in float32 with the original's weights, into
which retained experts, decoded groups, norms and routers are put. Invariant (scored as deployed): a
removed expert is gone from the router before top-k, gates are renormalised by the architecture's
own router code, and the weights are the decoded ones of the file.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.tensors import Floats, read_tensor
from allocator.decision.allocation import DEFAULT_KV_FORMAT, Allocation
from allocator.errors import AllocatorError, CheckpointError, first_line
from allocator.families import Config, Dimensions, Family, Role, family_of
from allocator.families.config import plain_skeleton
from allocator.files.machine import free_memory
from allocator.files.progress import stepping, waiting
from allocator.formats import parts
from allocator.scoring.arranged import arrange, matrix_name
from allocator.scoring.candidates import Candidate, CandidateWeights, retained_rows, rows_of
from allocator.scoring.documents import Document
from allocator.scoring.experts import ExpertForm, use_sorted_experts
from allocator.scoring.kv_cache import KeysValues, attach, keys_values
from allocator.scoring.model_ends import check_head
from allocator.scoring.modules import (
    SELECTION_BIASES,
    expert_rows,
    experts_of,
    experts_path,
    router_path,
    routing_modules,
)
from allocator.targets import FullPrecision, Group, Layout, target_named
from allocator.targets.group_weights import group_weights
from allocator.units import show_bytes


def skeleton(
    path: Path, config: Config, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Builds a checkpoint's architecture, parameters on the meta device, buffers real.

    How the checkpoint's weights are encoded is no matter of the model: what is put in is decoded.

    Args:
        path: of the checkpoint, for messages.
        config: of the model.
        device: torch's, where buffers are, and parameters will be.
        dtype: that the model computes in; what transformers never rounds stays in float32.

    Raises:
        CheckpointError: if transformers does not accept its config.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        named, settings = family_of(config).settings(config)
        built = AutoConfig.for_model(named, **settings)
        plain_skeleton(built)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                built, dtype=dtype, attn_implementation="eager"
            )
    except (
        OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())  # some are of several lines
        raise CheckpointError(f"{path}: transformers refuses its config.json: {reason}") from None
    model.set_experts_implementation("eager")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if dtype != torch.float32:
        _keep_float32(model)
    return model.eval().requires_grad_(False)


def _keep_float32(model: Any) -> None:
    """Gives the parameters that transformers never rounds their float32 again."""
    unrounded = tuple(model._keep_in_fp32_modules_strict or ())
    for name, module in model.named_modules():
        for own, tensor in [*module.named_parameters(recurse=False)]:
            if any(part in f"{name}.{own}" for part in unrounded):
                setattr(module, own, nn.Parameter(tensor.float(), requires_grad=False))
        for own, tensor in [*module.named_buffers(recurse=False)]:
            if any(part in f"{name}.{own}" for part in unrounded):
                setattr(module, own, tensor.float())


_REASON = 120  # characters: torch lists all that it knows


def check_device(name: str) -> None:
    """Checks that torch computes on a device.

    Raises:
        AllocatorError: if torch cannot compute there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            float(torch.ones(1, device=name) + 1)
    except Exception as error:  # whatever a backend raises
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        reason = first_line(error)[:_REASON]
        raise AllocatorError(
            f"torch device {name!r}: {reason} (torch {torch.__version__} is built for {built}); "
            "needed cpu, or a device of this machine that this torch knows, e.g. cuda"
        ) from None


def device_of(model: Any) -> torch.device:
    """Returns where a model computes; buffers are never on the meta device, but some have none."""
    tensors = chain(model.buffers(), model.parameters())
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))


def token_ids(model: Any, documents: Sequence[Document]) -> torch.Tensor:
    """Returns ids of documents of one length, `(documents, length)`, where a model computes."""
    return torch.tensor([d.ids for d in documents]).to(device_of(model))


def resize_experts(model: Any, layer: int, n_experts: int) -> None:
    """Gives a layer's router and experts room for `n_experts`; their values are undefined then."""
    resize_router(model, layer, n_experts)
    experts = experts_of(model, layer)
    experts.num_experts = n_experts
    names = tuple(name for name, _ in experts.named_parameters(recurse=False))
    _resize(experts, names, n_experts, device_of(model))


def resize_router(model: Any, layer: int, n_experts: int) -> None:
    """Gives a layer's router room for `n_experts`; its values are undefined then."""
    for module in routing_modules(model, layer):
        if hasattr(module, "num_experts"):
            module.num_experts = n_experts
    for _, module, name in list(expert_rows(model, layer)):
        _resize(module, (name,), n_experts, device_of(model))


def resize_biases(model: Any, layer: int, n_experts: int) -> None:
    """Gives the biases of a layer's experts room for `n_experts`; they are undefined then."""
    experts = experts_of(model, layer)
    form = ExpertForm.of(experts)
    if form.biased:
        names = (f"{form.first}_bias", "down_proj_bias")
        _resize(experts, names, n_experts, device_of(model))


def _resize(module: Any, names: tuple[str, ...], n_experts: int, device: torch.device) -> None:
    for name in names:
        old = getattr(module, name, None)
        if old is None:
            continue
        one_row = name in SELECTION_BIASES and old.dim() == 2  # and a column per expert
        shape = (1, n_experts) if one_row else (n_experts, *old.shape[1:])
        new = _memory(shape, device, old.dtype)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(new, requires_grad=False))
        else:
            module.register_buffer(name, new)


def empty(module: nn.Module) -> None:
    """Frees the memory of a module's parameters: they are on the meta device again."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def set_experts_used(
    model: Any, family: Family, layers: tuple[int, ...], experts_used: int
) -> None:
    """Sets the routed experts per token, in every MoE layer.

    Raises:
        CheckpointError: if nothing in a layer is known to say how many.
    """
    for layer in layers:
        if family.router_reads_config:
            _set_in_config(model, family.keys.experts_used, layer, experts_used)
            continue
        known = [m for m in routing_modules(model, layer) if hasattr(m, "top_k")]
        for module in known:
            module.top_k = experts_used
        if not known:
            raise _does_not_say(model, layer, "top_k")


def _set_in_config(model: Any, key: str, layer: int, experts_used: int) -> None:
    router = model.get_submodule(router_path(model, layer))
    own = getattr(getattr(router, "config", None), key, None)
    if own is None:
        raise _does_not_say(model, layer, f"config.{key}")
    if own != experts_used:
        router.config = copy.copy(router.config)  # which all layers share
        setattr(router.config, key, experts_used)


def _does_not_say(model: Any, layer: int, attribute: str) -> CheckpointError:
    router = type(model.get_submodule(router_path(model, layer))).__name__
    return CheckpointError(
        f"{router} has no {attribute}, needed what says how many experts a token uses; this "
        "architecture is not supported"
    )


def _memory(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    with torch.inference_mode(False):  # else nothing could be put in outside of inference mode
        return torch.empty(shape, dtype=dtype, device=device)


def parameter_of(model: Any, name: str) -> torch.Tensor:
    """Returns a parameter or buffer by its dotted name, with memory of its own.

    A matrix is `(rows, in_features)`, the fused experts of a layer `(experts, rows, in_features)`.

    Raises:
        CheckpointError: if the architecture has no parameter of that name.
    """
    tensor = _existing(model, name)
    if tensor.is_meta:
        module_name, _, attribute = name.rpartition(".")
        memory = _memory(tuple(tensor.shape), device_of(model))
        tensor = nn.Parameter(memory, requires_grad=False)
        setattr(model.get_submodule(module_name), attribute, tensor)
        if name == "model.embed_tokens.weight" and model.config.tie_word_embeddings:
            model.lm_head.weight = tensor
    return tensor


def destination(model: Any, dimensions: Dimensions, group: Group) -> torch.Tensor:
    """Returns a view of a group's memory in the model, `group.shape_with(retained)`.

    Returns:
        `(retained, rows, in_features)` of routed experts, else `(..., rows, in_features)`.
    """
    return view_of(
        lambda name: parameter_of(model, name), dimensions, group, expert_form(model, group.layer)
    )


def expert_form(model: Any, layer: int | None) -> ExpertForm:
    """Returns how a layer's routed experts are stored; the usual form of layers without any."""
    path = None if layer is None else experts_path(model, layer)
    return ExpertForm() if path is None else ExpertForm.of(model.get_submodule(path), path)


def parameter_name(group: Group, form: ExpertForm) -> str:
    """Names the model's parameter that holds a group; gate and up experts share one.

    Args:
        group: of the layout.
        form: of the routed experts of the group's layer.
    """
    if not group.role.is_expert:
        return matrix_name(group)
    return f"{form.path}.{'down_proj' if group.role is Role.EXPERT_DOWN else form.first}"


def view_of(
    tensor_of: Callable[[str], torch.Tensor],
    dimensions: Dimensions,
    group: Group,
    form: ExpertForm,
) -> torch.Tensor:
    """Returns a view of a group in a parameter, or in another tensor of the parameter's shape.

    Args:
        tensor_of: by the parameter's name.
        dimensions: the checkpoint's.
        group: whose values are wanted.
        form: of the routed experts of the group's layer.

    Returns:
        `(retained, rows, in_features)` of routed experts, else `(..., rows, in_features)`.
    """
    weight = tensor_of(parameter_name(group, form))
    if group.role.is_expert:
        matrices = form.matrices(weight)
        if group.role is Role.EXPERT_DOWN:
            return matrices
        by_output = form.halves(matrices.transpose(1, 2))
        return by_output[0 if group.role is Role.EXPERT_GATE else -1].transpose(1, 2)
    if group.role in (Role.K_B, Role.V_B):
        assert dimensions.latent is not None, group.name
        nope = dimensions.latent.nope
        halves = weight.view(dimensions.heads, -1, weight.shape[-1])
        return halves[:, :nope].transpose(1, 2) if group.role is Role.K_B else halves[:, nope:]
    return weight


def install(model: Any, dimensions: Dimensions, group: Group, values: Floats) -> None:
    """Puts a group's values into the model.

    The values have the shape `group.shape_with(retained)`: `(retained, rows, in_features)` of
    routed experts, else `(..., rows, in_features)`.

    Raises:
        CheckpointError: if the architecture has another shape there.
    """
    _fill(destination(model, dimensions, group), values, group.name)


def place(model: Any, group: Group, values: Floats) -> None:
    """Makes a matrix's values, `(rows, in_features)`, a parameter of the model without a copy.

    Raises:
        CheckpointError: if the architecture has another shape there.
    """
    name = matrix_name(group)
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    _check_shape(tuple(getattr(module, attribute).shape), values.shape, group.name)
    moved = torch.from_numpy(values).to(device_of(model))
    setattr(module, attribute, nn.Parameter(moved, requires_grad=False))


def install_experts(
    model: Any, dimensions: Dimensions, group: Group, values: Floats, places: Sequence[int]
) -> None:
    """Puts some experts of a routed projection into the model.

    Args:
        model: of transformers.
        dimensions: the checkpoint's.
        group: the projection.
        values: one matrix per expert, `(places, out_features, in_features)`.
        places: position of each expert among the retained experts of its layer.
    """
    view = destination(model, dimensions, group)
    for place, matrix in zip(places, values, strict=True):
        _fill(view[place], matrix, group.name)


def install_full_precision(
    model: Any, family: Family, tensor: FullPrecision, values: Floats
) -> None:
    """Puts a norm, `(width,)`, or a router's retained rows, `(retained, hidden)`, into the model.

    Raises:
        CheckpointError: if the architecture has another shape there.
    """
    parameter, place = family.place_in_model(tensor.source)
    _fill(parameter_of(model, parameter)[place], values, tensor.source)


def _fill(tensor: torch.Tensor, values: Floats, name: str) -> None:
    _check_shape(tuple(tensor.shape), values.shape, name)
    tensor.copy_(torch.from_numpy(values))


def _check_shape(known: tuple[int, ...], stored: tuple[int, ...], name: str) -> None:
    if known != stored:
        raise CheckpointError(
            f"{name} has shape {stored} in the checkpoint, but {known} in the model of its "
            "config.json; fetch both from one place"
        )


def check_names(model: Any, layout: Layout) -> None:
    """Holds a checkpoint's tensors against the architecture of its config.json.

    Raises:
        CheckpointError: if a layer is of another kind there, or a tensor is missing, or of another
            shape.
    """
    where = layout.inventory.path
    stored = {tensor.source for tensor in layout.full_precision}
    stored |= {name for group in layout.groups.values() for name in group.sources}
    stored |= {matrix_name(g) for g in layout.groups.values() if not g.role.is_expert}
    if layout.inventory.tied_embeddings:
        stored.add("lm_head.weight")
    wanted = [name for name, _ in model.named_parameters()]
    for layer in layout.inventory.moe_layers:
        path = experts_path(model, layer)
        if path is None:
            router = layout.inventory.family.source_name(Role.ROUTER, layer)
            raise CheckpointError(
                f"{where}: {router} is in the checkpoint, but config.json makes layer {layer} "
                "dense; fetch both from one place"
            )
        # the checkpoint has them one by one, as the inventory has seen
        experts = model.get_submodule(path)
        stored |= {f"{path}.{name}" for name, _ in experts.named_parameters()}
        # selection biases are buffers
        wanted += [name for name, *_ in expert_rows(model, layer)]
    for name in wanted:
        if name not in stored:
            raise CheckpointError(
                f"{where}: no {name} in the checkpoint, which the model of its config.json has; "
                "fetch both again, from one place"
            )
    for group in layout.groups.values():
        try:
            view = view_of(
                lambda name: _existing(model, name), layout.inventory.dimensions, group,
                expert_form(model, group.layer),
            )  # fmt: skip
            shape = tuple(view.shape)
        except RuntimeError:  # of another size altogether
            shape = tuple(_existing(model, matrix_name(group)).shape)
        _check_shape(shape, group.shape, f"{where}: {group.name}")
    for tensor in layout.full_precision:
        parameter, place_in_it = layout.inventory.family.place_in_model(tensor.source)
        shape = tuple(_existing(model, parameter)[place_in_it].shape)
        _check_shape(shape, tensor.shape, f"{where}: {tensor.source}")


def _existing(model: Any, name: str) -> torch.Tensor:
    """A parameter or buffer, on the meta device or not.

    Raises:
        CheckpointError: if the architecture has no parameter of that name.
    """
    module_name, _, attribute = name.rpartition(".")
    try:
        tensor: torch.Tensor = getattr(model.get_submodule(module_name), attribute)
    except AttributeError:
        raise CheckpointError(
            f"{name} is in the checkpoint, but not in the model of its config.json; "
            "fetch both from one place"
        ) from None
    return tensor


def _check_memory(inventory: Inventory, device: str) -> None:
    """Raises:
    CheckpointError: if the model is larger than the memory that the device has free.
    """
    needed, free = inventory.float32_bytes, free_on(torch.device(device))
    if needed > free:
        raise CheckpointError(
            f"{inventory.path}: {show_bytes(needed)} in float32, {show_bytes(int(free))} of memory "
            "are free; add a section [streamed] to study.toml: it is read layer by layer then"
        )


def free_on(device: torch.device) -> float:
    """Returns the bytes of a device's memory that are free, torch's own unused ones included."""
    if device.type != "cuda":
        return free_memory()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class SwapModel:
    """The original, with exchangeable parts.

    Attributes:
        model: the transformers model, float32.
        retained: experts by MoE layer that it holds now.
        experts_used: routed experts per token now.
        kv_format: of keys and values now.
        weights: that the candidate in it brought along, if any.
        state: what each group holds now: `(format or parts, retained experts, digest of the weights
            that were brought along)`; "" for the original's.
    """

    def __init__(
        self,
        layout: Layout,
        decoded: Callable[[str, str, tuple[int, ...] | None], Floats],
        *,
        device: str = "cpu",
    ) -> None:
        """Loads the original.

        Args:
            layout: groups of the target.
            decoded: group name, format, experts to decoded values.
            device: torch's, that holds the model.
        """
        self.layout = layout
        self.inventory: Inventory = layout.inventory
        self._decoded = decoded
        _check_memory(self.inventory, device)
        with waiting("loading the model"):
            self._load(device)

    def _load(self, device: str) -> None:
        layout = self.layout
        self.model = skeleton(self.inventory.path, layout.computed or self.inventory.config, device)
        arrange(self.model, layout.groups.values(), torch.device(device))
        self.inventory.check_unchanged()
        if not self.inventory.tied_embeddings:  # the head of the checkpoint, whatever config says
            self.model.config.tie_word_embeddings = False
        check_names(self.model, layout)
        use_sorted_experts(self.model, self.inventory.moe_layers)
        self.retained: dict[int, tuple[int, ...]] = {}
        self.experts_used = self.inventory.experts_used
        self.kv_format = DEFAULT_KV_FORMAT
        self._keys_values: KeysValues | None = None
        attach(self.model, lambda: self._keys_values)
        self.weights: CandidateWeights | None = None
        self.state: dict[str, tuple[str, tuple[int, ...] | None, str]] = {}
        self._full_precision_of: dict[str, str] = {}  # digest of the weights it is of, by tensor
        self._originals = {
            k.source: read_tensor(self.inventory, k.source) for k in layout.full_precision
        }
        self.reset()
        check_head(self.model, torch.tensor([[0, 1]]).to(device_of(self.model)))

    @property
    def candidate(self) -> Candidate:
        """The candidate that it computes now."""
        formats = {name: fmt or None for name, (fmt, *_) in self.state.items()}
        return Candidate(
            formats, dict(self.retained), self.experts_used, self.kv_format, self.weights
        )

    def reset(self) -> None:
        """Puts the original in: all experts, its own number of experts used, exact keys."""
        self.put(Candidate.original(self.layout))

    @contextmanager
    def original(self) -> Iterator[Any]:
        """Yields the model as the original; what it held before is put back afterwards."""
        before = self.candidate
        self.reset()
        try:
            yield self.model
        finally:
            self.put(before)

    def put_allocation(self, allocation: Allocation) -> None:
        """Makes the model what an allocation's file computes."""
        self.put(Candidate.of(allocation))

    def put(self, candidate: Candidate) -> None:
        """Makes the model the candidate; decodes only what changes."""
        retained = candidate.retained_experts
        for layer, experts in retained.items():
            if self.retained.get(layer) != experts:
                self._retain(layer, experts)
        self._put_full_precision(candidate)
        own = candidate.weights
        decoded = self._decoded if own is None else own.decoded
        for name, fmt in stepping(
            candidate.format_of.items(), "weights", unit="matrices", brief=True
        ):
            group = self.layout.groups[name]
            group_experts = group.experts(retained) or None
            wanted = (fmt or "", group_experts, candidate.weights_digest if fmt else "")
            if self.state.get(name) == wanted:
                continue
            # nothing is known if what follows fails
            before, _, digest = self.state.pop(name, ("", None, ""))
            if fmt is None:
                values = group_weights(self.layout, group)
                values = values if group_experts is None else values[list(group_experts)]
                install(self.model, self.inventory.dimensions, group, values)
            elif group_experts is None:
                values = decoded(name, fmt, None)
                install(self.model, self.inventory.dimensions, group, values)
            else:
                before = before if digest == candidate.weights_digest else ""
                self._put_experts(group, before, fmt, group_experts, decoded)
            self.state[name] = wanted
        self.weights = own
        self.experts_used = candidate.experts_used
        set_experts_used(self.model, self.inventory.family, self.layout.layers, self.experts_used)
        if candidate.kv_format != self.kv_format:
            self._keys_values = keys_values(
                target_named(self.layout.target), self.inventory.dimensions, candidate.kv_format
            )
            self.kv_format = candidate.kv_format

    def _put_full_precision(self, candidate: Candidate) -> None:
        """Installs norms and routers that come from other weights than those in the model."""
        own, wanted = candidate.weights, candidate.weights_digest
        for tensor in self.layout.full_precision:
            if self._full_precision_of.get(tensor.source) == wanted:
                continue
            self._full_precision_of.pop(tensor.source, None)  # unknown if what follows fails
            rows = retained_rows(tensor, candidate.retained_experts)
            if own is None:
                values = rows_of(self._originals[tensor.source], rows)
            else:
                values = own.full_precision(tensor, rows)
            install_full_precision(self.model, self.inventory.family, tensor, values)
            self._full_precision_of[tensor.source] = wanted

    def _put_experts(
        self,
        group: Group,
        before: str,
        text: str,
        retained: tuple[int, ...],
        decoded: Callable[[str, str, tuple[int, ...] | None], Floats],
    ) -> None:
        """Decodes the experts of a projection that are not in the model in their format already."""
        known = (
            {e: fmt for fmt, experts in parts(before, retained) for e in experts} if before else {}
        )
        for fmt, experts in parts(text, retained):
            new = tuple(e for e in experts if known.get(e) != fmt)
            if new:
                values = decoded(group.name, fmt.name, new)
                places = [retained.index(e) for e in new]
                install_experts(self.model, self.inventory.dimensions, group, values, places)

    def _retain(self, layer: int, experts: tuple[int, ...]) -> None:
        self.retained.pop(layer, None)  # nothing is known if what follows fails
        for name, group in self.layout.groups.items():
            if group.role.is_expert and group.layer == layer:
                self.state.pop(name, None)
        for tensor in self.layout.full_precision:
            if tensor.role.has_row_per_expert and tensor.layer == layer:
                self._full_precision_of.pop(tensor.source, None)
        resize_experts(self.model, layer, len(experts))
        self.retained[layer] = experts
