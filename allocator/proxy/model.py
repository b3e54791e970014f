"""A transformers model whose weights can be exchanged group by group.

In: an inventory. Out: `SwapModel`, the architecture in float32 with the original's weights, into
which retained experts and decoded groups are put. Invariant (scored as deployed): a removed expert
is gone from the router before top-k, gates are renormalised by the architecture's own router code,
and the weights are the decoded ones of the file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.codecs.source import Floats, group_weights, read_tensor
from allocator.errors import CheckpointError
from allocator.families import Role
from allocator.inventory import Inventory
from allocator.proxy.experts import use_sorted_experts
from allocator.targets import Group, Kept, Layout


def skeleton(path: Path) -> Any:
    """The architecture of a checkpoint in float32, parameters on the meta device, buffers real.

    Raises:
        CheckpointError: if transformers does not accept its config.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: transformers refuses its config.json: {error}") from None
    model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


def moe_block(model: Any, layer: int) -> Any:
    """The routed block of a layer."""
    return model.model.layers[layer].mlp


def resize_experts(model: Any, layer: int, n_experts: int) -> None:
    """Gives a layer's router and experts room for `n_experts`; their values are undefined then."""
    block = moe_block(model, layer)
    gate, experts = block.gate, block.experts
    gate.num_experts = experts.num_experts = n_experts
    for module, name in (
        (gate, "weight"),
        (gate, "e_score_correction_bias"),
        (experts, "gate_up_proj"),
        (experts, "down_proj"),
    ):
        old = getattr(module, name, None)
        if old is None:
            continue
        new = torch.empty((n_experts, *old.shape[1:]), dtype=torch.float32)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(new, requires_grad=False))
        else:
            module.register_buffer(name, new)


def set_experts_used(model: Any, layers: tuple[int, ...], experts_used: int) -> None:
    """Routed experts per token, in every MoE layer."""
    for layer in layers:
        moe_block(model, layer).gate.top_k = experts_used


def parameter_of(model: Any, name: str) -> torch.Tensor:
    """A parameter or buffer by its dotted name, with memory of its own."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    tensor: torch.Tensor = getattr(module, attribute)
    if tensor.is_meta:
        tensor = nn.Parameter(torch.empty(tensor.shape, dtype=torch.float32), requires_grad=False)
        setattr(module, attribute, tensor)
        if name == "model.embed_tokens.weight" and model.config.tie_word_embeddings:
            model.lm_head.weight = tensor
    return tensor


def destination(model: Any, layout: Layout, group: Group) -> torch.Tensor:
    """A view of the model's memory with the group's shape; writing into it installs the group."""
    if group.role.is_expert:
        experts = f"model.layers.{group.layer}.mlp.experts"
        if group.role is Role.EXPERT_DOWN:
            return parameter_of(model, f"{experts}.down_proj")
        fused = parameter_of(model, f"{experts}.gate_up_proj")
        half = fused.shape[1] // 2
        return fused[:, :half] if group.role is Role.EXPERT_GATE else fused[:, half:]
    weight = parameter_of(model, group.sources[0])
    if group.role in (Role.K_B, Role.V_B):
        config = layout.inventory.config
        heads, nope = int(config["num_attention_heads"]), int(config["qk_nope_head_dim"])
        halves = weight.view(heads, -1, weight.shape[-1])
        return halves[:, :nope].transpose(1, 2) if group.role is Role.K_B else halves[:, nope:]
    return weight


def install(model: Any, layout: Layout, group: Group, values: Floats) -> None:
    """Puts a group's values, `group.shape_with(retained)`, into the model."""
    view = destination(model, layout, group)
    assert view.shape == values.shape, (group.name, view.shape, values.shape)
    view.copy_(torch.from_numpy(values))


def install_kept(model: Any, kept: Kept, values: Floats, experts: tuple[int, ...] | None) -> None:
    """Puts a norm, or the retained rows of a router, into the model."""
    rows = values[list(experts)] if kept.role.is_router and experts is not None else values
    parameter_of(model, kept.source).copy_(torch.from_numpy(np.ascontiguousarray(rows)))


class SwapModel:
    """The original, with exchangeable parts.

    Attributes:
        model: the transformers model, float32.
        state: what each group holds now: `(format, retained experts)`; None for the original.
    """

    def __init__(self, layout: Layout, decoded: Callable[[str, str, tuple[int, ...] | None], Floats]) -> None:
        """Loads the original.

        Args:
            layout: groups of the target.
            decoded: group name, format, experts to decoded values.
        """
        self.layout = layout
        self.inventory: Inventory = layout.inventory
        self._decoded = decoded
        self.model = skeleton(self.inventory.path)
        use_sorted_experts(self.model, self.inventory.moe_layers)
        self.retained: dict[int, tuple[int, ...]] = {}
        self.state: dict[str, tuple[str, tuple[int, ...] | None] | None] = {}
        self._kept = {k.source: read_tensor(self.inventory, k.source) for k in layout.kept}
        self._all = tuple(range(self.inventory.n_experts))
        for kept in layout.kept:
            if not kept.role.is_router:
                install_kept(self.model, kept, self._kept[kept.source], None)
        self.reset()
        self._check_complete()

    def reset(self) -> None:
        """The original's weights, all experts, its own number of experts used."""
        self.put(
            formats=dict.fromkeys(self.layout.groups),
            retained=dict.fromkeys(self.layout.layers, self._all),
            experts_used=self.inventory.experts_used,
        )

    def put(
        self,
        *,
        formats: dict[str, str | None],
        retained: dict[int, tuple[int, ...]],
        experts_used: int,
    ) -> None:
        """Makes the model the candidate; decodes only what changes.

        Args:
            formats: format by group, None for the original's own weights; all groups.
            retained: experts by MoE layer; all layers.
            experts_used: routed experts per token.
        """
        for layer, experts in retained.items():
            if self.retained.get(layer) != experts:
                self._retain(layer, experts)
        for name, fmt in formats.items():
            group = self.layout.groups[name]
            experts = retained[group.layer] if group.role.is_expert and group.layer is not None else None
            wanted = (fmt or "", experts)
            if self.state.get(name) == wanted:
                continue
            if fmt is None:
                values = group_weights(self.layout, group)
                values = values if experts is None else values[list(experts)]
            else:
                values = self._decoded(name, fmt, experts)
            install(self.model, self.layout, group, values)
            self.state[name] = wanted
        set_experts_used(self.model, self.layout.layers, experts_used)

    def _retain(self, layer: int, experts: tuple[int, ...]) -> None:
        resize_experts(self.model, layer, len(experts))
        for kept in self.layout.kept:
            if kept.role.is_router and kept.layer == layer:
                install_kept(self.model, kept, self._kept[kept.source], experts)
        for name, group in self.layout.groups.items():
            if group.role.is_expert and group.layer == layer:
                self.state.pop(name, None)
        self.retained[layer] = experts

    def _check_complete(self) -> None:
        empty = [name for name, p in self.model.named_parameters() if p.is_meta]
        if empty:
            raise CheckpointError(f"{self.inventory.path}: no tensor for {empty[0]} in the checkpoint")
