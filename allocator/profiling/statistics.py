"""One pass of the original over calibration documents: importance, routing, saliency.

In: a model with the original's weights and documents. Out: `Statistics`. Invariant: every group
that multiplies something gets an importance vector with no zero rows: the mean square of each input
channel over the tokens that reached it (llama.cpp's importance matrix), per expert for experts;
an expert that no token reached gets the mean of its layer and is counted.

Saliency `reap` is the mean over routed tokens of gate x output norm, gates renormalised (REAP,
arXiv 2510.13999, eq. 9); `norm` leaves the gate out; `frequency` counts tokens; `gate` sums gates
(the seed paper's code).
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allocator.checkpoint.tensors import Floats
from allocator.decision.search_space import OBSERVED
from allocator.families import Role
from allocator.files.checksums import load_arrays, save_arrays
from allocator.files.progress import step, stepping
from allocator.profiling.products import query_module
from allocator.scoring.arranged import matrix_name
from allocator.scoring.documents import Document, batches
from allocator.scoring.experts import Observer, use_observer, use_sorted_experts
from allocator.scoring.layer_checkpoints import LayerCheckpoints
from allocator.scoring.side_by_side import affordable_threads, side_by_side
from allocator.scoring.streamed_model import States, StreamedModel
from allocator.scoring.swap_model import token_ids
from allocator.targets import Group, Layout


@dataclass(frozen=True)
class Statistics:
    """Importance, saliency and routing of one pass.

    Attributes:
        importance: per group, float32 `(in,)`, `(heads, in)` or `(experts, in)`.
        saliency: per method and MoE layer, one value per expert; experts of high saliency stay.
        counts: tokens routed to each expert, per MoE layer.
        n_tokens: tokens of the pass.
        unreached: `(layer, expert)` that no token reached.
    """

    importance: dict[str, Floats]
    saliency: dict[str, dict[int, list[float]]]
    counts: dict[int, list[int]]
    n_tokens: int
    unreached: list[tuple[int, int]]


def importance_digest(importance: Mapping[str, Floats]) -> str:
    """Computes the sha256 that names importance vectors, `(..., in_features)`, by content."""
    total = sha256()
    for name in sorted(importance):
        total.update(f"{name} {importance[name].shape}\n".encode() + importance[name].tobytes())
    return total.hexdigest()


class _MeanSquare:
    """Mean of squares per channel, `(in,)` or `(heads, in)`, over tokens."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.n = 0

    def add(self, values: torch.Tensor, by_head: bool = False) -> None:
        rows = values if by_head else values.reshape(-1, values.shape[-1])
        self.total = self.total + rows.double().square().sum(0)
        self.n += len(rows)

    def merge(self, other: "_MeanSquare") -> None:
        """Adds the sums of other tokens."""
        self.total = self.total + other.total
        self.n += other.n

    def mean(self) -> Floats:
        assert isinstance(self.total, torch.Tensor)
        return (self.total / self.n).float().cpu().numpy()


class _Experts:
    """Sums of one MoE layer, per expert."""

    def __init__(self, n_experts: int, inputs: int, width: int) -> None:
        self.counts = np.zeros(n_experts, np.int64)
        self.inputs = torch.zeros(n_experts, inputs, dtype=torch.float64)
        self.inner = torch.zeros(n_experts, width, dtype=torch.float64)
        self.norms, self.gates, self.products = (np.zeros(n_experts) for _ in range(3))

    def observe(
        self,
        e: int,
        inputs: torch.Tensor,
        inner: torch.Tensor,
        outputs: torch.Tensor,
        gates: torch.Tensor,
    ) -> None:
        norms = outputs.norm(dim=-1).double()
        self.counts[e] += len(gates)
        self.inputs[e] += inputs.double().square().sum(0).cpu()
        self.inner[e] += inner.double().square().sum(0).cpu()
        self.norms[e] += float(norms.sum())
        self.gates[e] += float(gates.double().sum())
        self.products[e] += float((norms * gates).sum())

    def merge(self, other: "_Experts") -> None:
        """Adds the sums of other tokens."""
        for name, values in vars(other).items():
            mine = getattr(self, name)
            mine += values

    def saliency(self, method: str) -> list[float]:
        reached = np.maximum(self.counts, 1)
        values = {
            "reap": self.products / reached,
            "norm": self.norms / reached,
            "frequency": self.counts,
            "gate": self.gates,
        }[method]
        return [float(v) for v in values]

    def importance(self, sums: torch.Tensor) -> Floats:
        reached = self.counts > 0
        means = sums.numpy() / np.maximum(self.counts, 1)[:, None]
        means[~reached] = sums.numpy().sum(0) / max(1, self.counts.sum())
        return np.asarray(means, np.float32)


TakeInputs = Callable[[str, torch.Tensor], None]
"""Gets a group's name and its inputs `(..., in)`; of a group per head `(tokens, heads, in)`."""


def watch_inputs(
    model: Any, layout: Layout, groups: Iterable[Group], take: TakeInputs
) -> list[Any]:
    """Adds hooks that see the inputs of groups that are no routed experts; returns their handles.

    An embedding that is only looked up has none.
    """
    heads, latent = layout.inventory.dimensions.heads, layout.inventory.dimensions.latent
    handles = []

    def on_input(name: str) -> Callable[..., None]:
        return lambda module, args: take(name, args[0])

    def on_q(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            assert latent is not None, name
            by_head = output.reshape(-1, heads, output.shape[-1] // heads)
            take(name, by_head[..., : latent.nope])

        return hook

    for group in groups:
        if group.role.is_expert or not group.importance:
            continue
        if group.role is Role.K_B:  # multiplies the query's part without rotation
            q = query_module(model, layout, group.layer)
            handles.append(q.register_forward_hook(on_q(group.name)))
        else:
            module = _reader(model, group)
            handles.append(module.register_forward_pre_hook(on_input(group.name)))
    return handles


def _reader(model: Any, group: Group) -> Any:
    """The module that multiplies its input by the group."""
    if group.role in (Role.EMBEDDING, Role.HEAD):
        return model.lm_head
    return model.get_submodule(matrix_name(group).removesuffix(".weight"))


def _watch(
    model: Any, layout: Layout, current: Callable[[], Mapping[str, _MeanSquare]]
) -> list[Any]:
    """Hooks that feed the current sums of every group that has some."""

    def take(name: str, x: torch.Tensor) -> None:
        current()[name].add(x, layout.groups[name].role is Role.K_B)

    return watch_inputs(model, layout, [layout.groups[name] for name in _sums_of(layout)], take)


def _sums_of(layout: Layout) -> dict[str, _MeanSquare]:
    """Empty sums of every group that is no routed expert and has importance."""
    groups = (g for g in layout.groups.values() if not g.role.is_expert and g.importance)
    return {group.name: _MeanSquare() for group in groups}


def collect(
    model: Any,
    layout: Layout,
    documents: Sequence[Document],
    *,
    batch_tokens: int = 4096,
    threads: int = 1,
    progress: bool = False,
) -> Statistics:
    """Runs the original over `documents`.

    Args:
        model: a transformers model with the original's weights and experts.
        layout: whose groups get importance.
        documents: tokens to run.
        batch_tokens: tokens per forward pass.
        threads: passes that run at once; sums do not depend on it.
        progress: shows a bar.
    """
    sums, experts = _sums_of(layout), _of_layers(layout)
    of_thread = threading.local()  # the sums of its batch

    def observer(layer: int) -> Observer:
        return lambda *args: of_thread.experts[layer].observe(*args)

    @torch.inference_mode()
    def run(batch: list[int]) -> tuple[dict[str, _MeanSquare], dict[int, _Experts]]:
        of_thread.sums, of_thread.experts = _sums_of(layout), _of_layers(layout)
        ids = token_ids(model, [documents[i] for i in batch])
        model(input_ids=ids, use_cache=False)
        return of_thread.sums, of_thread.experts

    handles = _watch(model, layout, lambda: of_thread.sums)
    for layer in experts:
        use_observer(model, layer, observer(layer))
    chosen = list(batches(documents, 0, len(documents), n_tokens=batch_tokens))
    try:
        passes = side_by_side(run, chosen, affordable_threads(model, threads))
        with step("calibration", len(documents), unit="documents", shown=progress) as bar:
            for batch, (of_batch, experts_of_batch) in zip(chosen, passes, strict=True):
                for name, total in of_batch.items():
                    sums[name].merge(total)
                for layer, layer_sums in experts_of_batch.items():
                    experts[layer].merge(layer_sums)
                bar.update(len(batch))
    finally:
        for handle in handles:
            handle.remove()
        use_sorted_experts(model, layout.layers)
    return _summary(layout, sums, experts, sum(len(d.ids) for d in documents))


@torch.no_grad()  # not inference mode, as in `StreamedScorer`
def collect_streamed(
    streamed: StreamedModel,
    documents: Sequence[Document],
    *,
    scratch: Path,
    of: str = "",
    batch_tokens: int = 2048,
    progress: bool = False,
) -> Statistics:
    """Measures what `collect` does, in one pass over a checkpoint that need not fit in memory.

    Args:
        streamed: of the layout whose groups get importance.
        documents: tokens to run.
        scratch: an existing folder, for a layer's states and the sums so far; a stopped pass over
            the same documents resumes from there.
        of: what the files there belong to.
        batch_tokens: tokens per forward pass of a layer.
        progress: shows a bar over layers.
    """
    layout = streamed.layout
    sums, experts = _sums_of(layout), _of_layers(layout)
    n_layers = layout.inventory.n_layers
    checkpoints = streamed.layer_checkpoints(scratch, documents, batch_tokens, of)
    states = streamed.begin(checkpoints.documents)
    unwanted = _sums_of(layout)  # of products that are computed again
    handles = _watch(streamed.model, layout, lambda: unwanted if streamed.asking else sums)
    try:
        layers_sums = [_layer_sums(layout, i, sums, experts, scratch, of) for i in range(n_layers)]
        first = _resume(checkpoints, states, layers_sums)
        layers = stepping(
            range(first, n_layers), "calibration", initial=first, unit="layers", shown=progress
        )
        for layer in layers:
            observe = experts[layer].observe if layer in experts else None
            streamed.run(layer, [states], observe=observe)
            layers_sums[layer].save()
            checkpoints.save("states", layer + 1, states.hidden)
            checkpoints.remove("states", layer)
    finally:
        for handle in handles:
            handle.remove()
    for hidden in states.hidden:
        sums[streamed.output.name].add(streamed.normed(hidden))
    return _summary(layout, sums, experts, sum(len(d.ids) for d in documents))


@dataclass(frozen=True)
class _LayerSums:
    """The sums of one layer, and their file."""

    path: Path
    of: str
    products: Mapping[str, _MeanSquare]
    experts: _Experts | None

    def save(self) -> None:
        arrays: dict[str, Any] = {}
        for name, sums in self.products.items():
            arrays[name] = torch.as_tensor(sums.total).cpu().numpy()
            arrays[f"n {name}"] = np.array(sums.n)
        if self.experts is not None:
            arrays |= {name: np.asarray(values) for name, values in vars(self.experts).items()}
        save_arrays(self.path, arrays, self.of)

    def read(self) -> dict[str, Any] | None:
        """Reads the sums; returns None if the file is missing or damaged."""
        return load_arrays(self.path, self.of)

    def take(self, arrays: dict[str, Any]) -> None:
        """Takes over the sums that `read` returned."""
        for name, sums in self.products.items():
            sums.total, sums.n = torch.from_numpy(arrays[name]), int(arrays[f"n {name}"])
        for name, values in () if self.experts is None else vars(self.experts).items():
            torch.as_tensor(values)[:] = torch.from_numpy(arrays[name])


def _layer_sums(
    layout: Layout,
    layer: int,
    sums: Mapping[str, _MeanSquare],
    experts: Mapping[int, _Experts],
    folder: Path,
    of: str,
) -> _LayerSums:
    mine = {name: s for name, s in sums.items() if layout.groups[name].layer == layer}
    return _LayerSums(folder / f"sums-{layer}.safetensors", of, mine, experts.get(layer))


def _resume(
    checkpoints: LayerCheckpoints, states: States, layers_sums: Sequence[_LayerSums]
) -> int:
    """Loads what a stopped pass reached; the layer to resume at, 0 where anything is missing."""
    for first in range(len(layers_sums), 0, -1):
        if (hidden := checkpoints.load("states", first)) is None:
            continue
        arrays = [layer.read() for layer in layers_sums[:first]]
        whole = [values for values in arrays if values is not None]
        if len(whole) < first:
            return 0
        for layer, values in zip(layers_sums, whole, strict=False):
            layer.take(values)
        states.hidden = hidden
        return first
    return 0


def _of_layers(layout: Layout) -> dict[int, _Experts]:
    inventory = layout.inventory
    return {
        layer: _Experts(
            inventory.n_experts,
            inventory.of_role(Role.EXPERT_UP, layer)[0].shape[-1],
            inventory.of_role(Role.EXPERT_DOWN, layer)[0].shape[-1],
        )
        for layer in layout.layers
    }


def _summary(
    layout: Layout, sums: dict[str, _MeanSquare], experts: dict[int, _Experts], n_tokens: int
) -> Statistics:
    importance = {name: total.mean() for name, total in sums.items()}
    for group in layout.groups.values():
        if group.role.is_expert and group.layer is not None:
            layer = experts[group.layer]
            sums_of = layer.inner if group.role is Role.EXPERT_DOWN else layer.inputs
            importance[group.name] = layer.importance(sums_of)
    return Statistics(
        importance={name: np.maximum(v, v.mean() * 1e-6 + 1e-30) for name, v in importance.items()},
        saliency={
            method: {layer: e.saliency(method) for layer, e in experts.items()}
            for method in OBSERVED
        },
        counts={layer: [int(n) for n in e.counts] for layer, e in experts.items()},
        n_tokens=n_tokens,
        unreached=[
            (layer, int(i)) for layer, e in experts.items() for i in np.flatnonzero(e.counts == 0)
        ],
    )
