"""What every family that is read must compute, as test cases that a family's test class inherits.

In: the class attribute `config`, of a small model with every kind of layer. Out: tests for pytest.
Invariant: what the project computes and writes is compared with a model that transformers builds,
saves and loads, and with stock llama.cpp, never with itself.

    class TestMine(FamilyRuns):
        config = {"model_type": "mine", ...}
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_rows, read_tensor
from allocator.codecs import Bytes, Floats, codec_of
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError
from allocator.export.gguf.exact import kl_divergence
from allocator.export.gguf.files import write_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.export.gguf.runtime import GGUF_RUNTIME
from allocator.formats import format_named
from allocator.scoring.candidates import Candidate, Weights
from allocator.scoring.documents import Document
from allocator.scoring.streamed_model import States, StreamedModel
from allocator.scoring.swap_model import SwapModel, expert_form, view_of
from allocator.targets import GGUF, SAFETENSORS, FullPrecision, Group, Layout
from allocator.targets.group_weights import group_digest

EXACT = 1e-8
"""Most KL(transformers || llama.cpp) of a file in F32 in exact arithmetic, nats per token."""
_TOKENS, _DOCUMENTS = 40, 2

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": False, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
"""Sizes that a small `config.json` has in most families."""


@dataclass(frozen=True)
class FamilyCase:
    """A random checkpoint of a family, as transformers saves and loads it.

    Attributes:
        path: of the checkpoint.
        model: of transformers, float32.
        ids: token ids of documents.
    """

    path: Path
    model: Any
    ids: list[list[int]]

    @property
    def logits(self) -> list[torch.Tensor]:
        """Logits `(tokens, vocabulary)` by document, of the model as it is now."""
        with torch.no_grad():
            return [self.model(torch.tensor([ids])).logits[0] for ids in self.ids]


def random_checkpoint(config: Mapping[str, Any], folder: Path, seed: int = 0) -> FamilyCase:
    """Saves a random model of a config whose weights are large enough that every tensor matters.

    Args:
        config: a `config.json`.
        folder: an empty one.
        seed: of weights and documents.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(dict(config)))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            randomize(name, parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [torch.randint(vocabulary, (_TOKENS,)).tolist() for _ in range(_DOCUMENTS)]
    return FamilyCase(folder, loaded.eval(), ids)


def stack_experts(case: FamilyCase, folder: Path, *, transposed: bool) -> None:
    """Writes a checkpoint with the experts of a layer in one tensor, as in transformers' model.

    Args:
        case: whose model has them.
        folder: an empty one.
        transposed: `(experts, in, out)`.
    """
    from safetensors.torch import load_file, save_file

    (folder / "config.json").write_bytes((case.path / "config.json").read_bytes())
    family = read_inventory(case.path).family
    (stored,) = case.path.glob("*.safetensors")
    tensors = {}
    for name, tensor in load_file(stored).items():
        match = family.match(name)
        if match is None or not match[0].has_expert:
            tensors[name] = tensor
    for name, parameter in case.model.named_parameters():
        if family.match_stack(name):
            values = parameter.detach().to(torch.bfloat16)
            tensors[name] = (values.transpose(1, 2) if transposed else values).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def randomize(name: str, tensor: torch.Tensor) -> None:
    """Fills a parameter or buffer of a random model; buffers that a model computes stay."""
    if "correction_bias" in name or "expert_bias" in name:
        tensor.copy_(torch.randn_like(tensor) * 0.1)
    elif name.endswith("layer_scalar"):
        tensor.add_(torch.randn_like(tensor) * 0.1)
    elif isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1:
        tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
    elif isinstance(tensor, torch.nn.Parameter):
        tensor.add_(torch.randn_like(tensor) * 0.1)  # around what an untrained model has


class FamilyRuns:
    """Tests of one family; see the module.

    Attributes:
        config: a small `config.json`, of three layers and eight experts.
        retained: experts that a pruned model keeps, in every MoE layer.
        with_gguf: whether stock llama.cpp computes such a model.
        renamed: `model_type` of the checkpoint's config, where transformers does not know it.
        rounding: most that logits differ which are sums in another order.
    """

    config: dict[str, Any]
    retained = (0, 1, 3, 4, 5, 7)
    with_gguf = True
    renamed: str | None = None
    rounding = 2e-5

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tmp_path_factory: pytest.TempPathFactory) -> FamilyCase:
        """The checkpoint; tests that change its model put it back."""
        case = random_checkpoint(cls.config, tmp_path_factory.mktemp("family"))
        if cls.renamed is not None:
            path = case.path / "config.json"
            own = {"model_type": cls.renamed, "auto_map": {"AutoConfig": "configuration.Own"}}
            path.write_text(json.dumps(json.loads(path.read_text()) | own))
        return case

    def test_every_tensor_is_read(self, case: FamilyCase) -> None:
        """All parameters that transformers loads are in the inventory, by count of weights."""
        inventory = read_inventory(case.path)
        searched = sum(p.numel() for p in case.model.parameters())
        saved = case.model.state_dict()
        buffers = sum(b.numel() for n, b in case.model.named_buffers() if n in saved)
        stored = sum(int(np.prod(t.shape)) for t in inventory.tensors.values())
        assert stored == searched + buffers

    @pytest.mark.parametrize("transposed", [False, True])
    def test_stacked_experts_are_the_same(
        self, case: FamilyCase, tmp_path: Path, transposed: bool
    ) -> None:
        """Experts of a layer in one tensor, as it is or transposed, are the experts one by one."""
        inventory = read_inventory(case.path)
        stack_experts(case, tmp_path, transposed=transposed)
        stacked = read_inventory(tmp_path)
        assert set(stacked.tensors) == set(inventory.tensors)
        for name, tensor in inventory.tensors.items():
            assert stacked.tensor_digest(name) == inventory.tensor_digest(name)
            if tensor.role.is_expert:
                rows = read_rows(stacked, name, 1, 3)
                np.testing.assert_array_equal(rows, read_tensor(inventory, name)[1:3])

    def test_in_memory_is_transformers(self, case: FamilyCase) -> None:
        """The model with exchangeable parts computes what transformers does."""
        for layout in self._layouts(case):
            swap = SwapModel(layout, lambda *_: pytest.fail("nothing is encoded"))
            for ids, logits in zip(case.ids, case.logits, strict=True):
                with torch.no_grad():
                    own = swap.model(torch.tensor([ids])).logits[0]
                torch.testing.assert_close(own, logits, rtol=0, atol=self.rounding)

    def test_streamed_is_transformers(self, case: FamilyCase) -> None:
        """A model that runs layer by layer computes what transformers does."""
        for layout in self._layouts(case):
            own = self._streamed(layout, Candidate.original(layout), case.ids)
            for values, logits in zip(own, case.logits, strict=True):
                torch.testing.assert_close(values, logits, rtol=0, atol=self.rounding)

    def test_pruned_is_pruned_by_hand(self, case: FamilyCase) -> None:
        """Experts that are not retained are gone before the choice, in memory and streamed."""
        layout = SAFETENSORS.layout(read_inventory(case.path))
        pruned = replace(
            Candidate.original(layout),
            retained_experts=dict.fromkeys(layout.layers, self.retained),
        )
        swap = SwapModel(layout, lambda *_: pytest.fail("nothing is encoded"))
        swap.put(pruned)
        streamed = self._streamed(layout, pruned, case.ids)
        with removed(case.model, layout, self.retained):
            wanted = case.logits
        assert not torch.allclose(wanted[0], case.logits[0], atol=1e-3)
        for ids, logits, other in zip(case.ids, wanted, streamed, strict=True):
            with torch.no_grad():
                own = swap.model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(own, logits, rtol=0, atol=self.rounding)
            torch.testing.assert_close(other, logits, rtol=0, atol=self.rounding)

    @pytest.mark.parametrize("pruned", [False, True])
    def test_llama_cpp_computes_the_same(
        self, case: FamilyCase, tmp_path: Path, pruned: bool
    ) -> None:
        """A file in F32 is computed by stock llama.cpp as transformers computes the checkpoint."""
        if not self.with_gguf:
            pytest.skip("stock llama.cpp computes no such model")
        layout = GGUF.layout(read_inventory(case.path))
        everyone = tuple(range(layout.inventory.n_experts))
        retained = self.retained if pruned else everyone
        allocation = _everything(layout, retained, "F32")
        path = tmp_path / "model.gguf"
        with removed(case.model, layout, retained), self.rounds_as_llama_cpp(case.model):
            source = _OfModel(case.model, layout)
            write_gguf(path, layout, allocation, source)
            wanted = case.logits
            read = GGUF_RUNTIME.read(path, layout)
            for name in layout.groups:
                np.testing.assert_array_equal(read[name].data, source.encoded(name))
        assert path.stat().st_size == allocation.nbytes(layout).file
        with LlamaCpp(path, context=64, threads=1) as runtime:
            losses = [
                kl_divergence(logits.numpy(), runtime.logits(ids))
                for ids, logits in zip(case.ids, wanted, strict=True)
            ]
        assert np.mean(losses) <= EXACT

    def test_a_gguf_file_is_the_checkpoint(self, case: FamilyCase, tmp_path: Path) -> None:
        """A file in bfloat16, read in place of the checkpoint, has its digests and its logits."""
        if not self.with_gguf:
            pytest.skip("stock llama.cpp computes no such model")
        layout = GGUF.layout(read_inventory(case.path))
        everyone = tuple(range(layout.inventory.n_experts))
        allocation = _everything(layout, everyone, "BF16")
        path = tmp_path / "model.gguf"
        with removed(case.model, layout, everyone):
            write_gguf(path, layout, allocation, _OfModel(case.model, layout, "BF16"))
        if layout.inventory.family.for_gguf().source is None:
            with pytest.raises(CheckpointError, match="is not read as a checkpoint yet"):
                read_inventory(path)
            return
        again = GGUF.layout(read_inventory(path))
        assert again.inventory == read_inventory(path)
        assert list(again.groups) == list(layout.groups)
        for name, group in layout.groups.items():
            assert group_digest(again, again.groups[name]) == group_digest(layout, group)
        swap = SwapModel(again, lambda *_: pytest.fail("nothing is encoded"))
        for ids, logits in zip(case.ids, case.logits, strict=True):
            with torch.no_grad():
                own = swap.model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(own, logits, rtol=0, atol=self.rounding)

    @contextmanager
    def rounds_as_llama_cpp(self, model: Any) -> Iterator[None]:
        """Lets a model of transformers round where llama.cpp does in exact arithmetic, too."""
        yield

    def _layouts(self, case: FamilyCase) -> Iterator[Layout]:
        """The checkpoint's own, and llama.cpp's where it has rows or columns in other places."""
        inventory = read_inventory(case.path)
        yield SAFETENSORS.layout(inventory)
        if self.with_gguf:
            layout = GGUF.layout(inventory)
            if any(group.is_rearranged for group in layout.groups.values()):
                yield layout

    def _streamed(
        self, layout: Layout, candidate: Candidate, documents: list[list[int]]
    ) -> Iterator[torch.Tensor]:
        """Yields logits `(tokens, vocabulary)` by document."""
        model = StreamedModel(layout, Weights(layout, lambda: pytest.fail("nothing is encoded")))
        batches = [[Document(tuple(ids), "")] for ids in documents]
        with torch.no_grad():
            states = [States(candidate, [0], model.embed(batches, candidate))]
            for layer in range(layout.inventory.n_layers):
                model.run(layer, states)
            for hidden in states[0].hidden:
                yield model.logits(hidden[0], candidate)


@contextmanager
def removed(model: Any, layout: Layout, retained: tuple[int, ...]) -> Iterator[None]:
    """Removes experts from a model of transformers by hand, as if it had been trained without them.

    Args:
        model: of transformers; it is as before after the block.
        layout: says which layers route.
        retained: experts that stay, in every one of them.
    """
    n, index = layout.inventory.n_experts, torch.tensor(retained)
    modules = [m for layer in layout.layers for m in model.model.layers[layer].modules()]
    of_experts = [m for m in modules if getattr(m, "num_experts", None) == n]
    routers = [m for m in modules if type(m).__name__.endswith("Router")]
    inside = {part for module in (*of_experts, *routers) for part in module.modules()}
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for module in modules:
        for values in (module._parameters, module._buffers):
            for name, tensor in values.items():
                of_router = module in inside and tensor is not None and len(tensor) == n
                of_all = "correction_bias" in name or name == "expert_bias"
                if module in of_experts or of_router or of_all:
                    before.append((values, name, tensor))
                    one_row = tensor.dim() == 2 and len(tensor) == 1
                    kept = tensor.data[:, index] if one_row else tensor.data[index]
                    values[name] = (
                        torch.nn.Parameter(kept) if values is module._parameters else kept
                    )
    for module in of_experts:
        module.num_experts = len(index)
    try:
        yield
    finally:
        for values, name, tensor in before:
            values[name] = tensor
        for module in of_experts:
            module.num_experts = n


def _everything(layout: Layout, retained: tuple[int, ...], fmt: str) -> Allocation:
    return Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, retained),
        formats=dict.fromkeys(layout.groups, fmt),
        experts_used=layout.inventory.experts_used,
    )


class _OfModel:
    """Tensors of a file from a model of transformers, and not from what the project has read."""

    def __init__(self, model: Any, layout: Layout, fmt: str = "F32") -> None:
        self._model, self._state = model, model.state_dict()
        self._layout = layout
        self._format = format_named(fmt)

    def encoded(self, name: str) -> Bytes:
        """Returns a group in the format: `(..., rows, bytes per row)`."""
        group: Group = self._layout.groups[name]
        if group.is_rearranged:
            return self._rearranged(group)
        dimensions = self._layout.inventory.dimensions
        form = expert_form(self._model, group.layer)
        values = view_of(self._state.__getitem__, dimensions, group, form)
        return codec_of(self._format).encode(values.float().contiguous().numpy(), self._format)

    def _rearranged(self, group: Group) -> Bytes:
        """A group whose rows or columns lie otherwise in its source."""
        values = self._state[group.sources[0]].float().numpy()
        if group.rows is not None:
            values = values[np.array(group.rows)]
        if group.columns is not None:
            values = values[:, np.array(group.columns)]
        return codec_of(self._format).encode(np.ascontiguousarray(values), self._format)

    def full_precision(self, tensor: FullPrecision) -> Floats:
        """Returns a norm, a bias or a router."""
        parameter, place = self._layout.inventory.family.place_in_model(tensor.source)
        values: Floats = self._state[parameter][place].float().contiguous().numpy()
        return values
