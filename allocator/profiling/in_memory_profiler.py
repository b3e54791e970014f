"""The profile of a checkpoint that fits in memory, and gradient steps around candidates.

In: what `Profiler` takes. Out: the profile, and `LocalPrices` of any candidate, cached by content.
Invariant: prices are of all rows of every matrix.
"""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from math import prod
from pathlib import Path

import msgspec

from allocator.checkpoint.tensors import Floats
from allocator.decision.allocation import Allocation
from allocator.files.progress import step, stepping
from allocator.prediction.surrogate import LocalPrices
from allocator.profiling.curvature import FORWARDS_WITH_SLOPE, Curvature, measure
from allocator.profiling.profiler import CURVATURE, Losses, Profiler, nearest_format
from allocator.profiling.statistics import Statistics, collect
from allocator.profiling.sums_checkpoint import SumsCheckpoint
from allocator.scoring import documents as calibration
from allocator.scoring.candidates import Candidate
from allocator.scoring.scorer import Scorer, mean
from allocator.scoring.swap_model import SwapModel, destination
from allocator.targets import Group
from allocator.targets.group_weights import group_weights

_GRADIENT_STEP_FORWARDS = FORWARDS_WITH_SLOPE + 1  # and the original's own forward

_GRADIENTS = "gradients"
"""Folder of the checkpoints of gradient steps."""


class _LocalPricesFile(msgspec.Struct, forbid_unknown_fields=True):
    """`around-*.json`."""

    curvature: Losses
    moves: Losses


class InMemoryProfiler(Profiler):
    """Builds a profile with the model in memory, see the module."""

    @cached_property
    def model(self) -> SwapModel:
        """The model that candidates are put into; encodings are opened when one needs them."""
        return SwapModel(self.layout, self._decoded, device=self.torch_device)

    def _decoded(self, name: str, fmt: str, experts: tuple[int, ...] | None) -> Floats:
        self.encodings.release()  # the model has a copy of what it asked for before
        return self.encodings.decoded(name, fmt, experts)

    def measure_statistics(self) -> Statistics:
        """Runs the original over the calibration documents."""
        documents = self.inputs.documents
        return collect(
            self.model.model, self.layout, documents, threads=self.threads, progress=self.progress
        )

    def measure_curvature(self) -> Losses:
        """Prices every offered format of every group, all its rows."""
        with self.model.original():
            curvature = measure(
                self.model, self.inputs.curvature_documents,
                threads=self.threads, checkpoint=self._checkpoint(CURVATURE, "sums"),
            )  # fmt: skip
        _ = self.encodings  # its importance takes a pass of the same model
        n_weights = sum(len(g.offered()) * prod(g.shape) for g in self.layout.groups.values())
        prices: Losses = {}
        with step("encoding", n_weights, unit="weights", shown=self.progress) as shown:
            for group in self.layout.groups.values():
                weights = group_weights(self.layout, group)
                experts = range(len(weights)) if group.role.is_expert else ()
                row = prices[group.name] = {}
                self.encodings.release()
                for fmt in group.offered():
                    shown.note(f"{group.name} in {fmt.name}")
                    decoded = self.encodings.decoded(group.name, fmt.name)
                    row[fmt.name] = curvature.price(group, decoded - weights, experts)
                    shown.update(weights.size)
        return prices

    def measure_losses(self, candidates: Iterable[Candidate]) -> Iterator[float]:
        """Yields the loss of each candidate; layers before its change are not computed again."""
        scorer = Scorer(
            self.model, self.inputs.measured_documents, threads=self.threads,
            layer_input_bytes=math.inf, from_original=True,
        )  # fmt: skip
        scorer.ensure_reference(len(scorer.documents))
        for candidate in candidates:
            scorer.swap.put(candidate)
            yield mean(scorer.score_installed().kl, scorer.documents)

    def anchor(self, group: Group, bits: float) -> str:
        """Returns the nearest offered format."""
        return nearest_format(group.offered(), bits)

    def local_prices(self, allocation: Allocation, scorer: Scorer, *, part: int) -> LocalPrices:
        """Measures what a gradient says around a candidate, or reads it from the cache.

        Curvature of experts that the candidate does not retain is the original's, scaled as their
        layer's retained ones are.

        Args:
            allocation: the candidate.
            scorer: of search documents, which are taken `n_curvature` at a time.
            part: which of these.
        """
        n = min(self.inputs.n_curvature, scorer.n_documents)
        start = part % max(scorer.n_documents // n, 1) * n
        documents = scorer.documents[start : start + n]
        name = f"around-{allocation.digest[:32]}-{calibration.digest(documents)[:16]}.json"
        prices = self.files.read(name, _LocalPricesFile)
        if prices is None:
            scorer.ensure_reference(start + n)
            self.model.put_allocation(allocation)
            checkpoint = self._checkpoint(_GRADIENTS, Path(name).stem)
            curvature = measure(
                self.model, documents, reference=lambda i: scorer.reference(start + i),
                threads=self.threads, checkpoint=checkpoint,
            )  # fmt: skip
            prices = self._price_around(allocation, curvature)
            self.files.write(name, prices)
            checkpoint.remove()
        n_tokens = sum(len(d.ids) for d in documents)
        return LocalPrices(prices.curvature, prices.moves, _GRADIENT_STEP_FORWARDS * n_tokens)

    def _checkpoint(self, stage: str, name: str) -> SumsCheckpoint:
        path = self.files.scratch(stage) / f"{name}.safetensors"
        return SumsCheckpoint(path, self.files.digest)

    def gradient_tokens(self, scorer: Scorer) -> int:
        """Returns the most forward tokens that `local_prices` costs."""
        n = min(self.inputs.n_curvature, scorer.n_documents)
        sizes = [len(d.ids) for d in scorer.documents]
        starts = range(0, scorer.n_documents - n + 1, n)
        return _GRADIENT_STEP_FORWARDS * max(sum(sizes[i : i + n]) for i in starts)

    def _price_around(self, allocation: Allocation, measured: Curvature) -> _LocalPricesFile:
        """Prices of every offered format, as a change of the original and as a step from there."""
        curvature: Losses = {}
        moves: Losses = {}
        dimensions = self.layout.inventory.dimensions
        for name, group in stepping(
            self.layout.groups.items(), "prices around a candidate", unit="matrices", brief=True
        ):
            experts = allocation.retained_experts[group.layer or 0] if group.role.is_expert else ()
            weights = group_weights(self.layout, group)
            weights = weights[list(experts)] if experts else weights
            present = destination(self.model.model, dimensions, group).cpu().numpy()
            tangent = measured.tangent(group, present - weights, experts)
            curvature[name], moves[name] = {}, {}
            self.encodings.release()
            for fmt in group.offered():
                change = self.encodings.decoded(name, fmt.name, experts or None) - weights
                prices = measured.price(group, change, experts)
                steps = tangent.steps(change, prices)
                if experts:
                    prices = _completed(self.curvature[name][fmt.name], prices, experts)
                    step_of = dict(zip(experts, steps, strict=True))
                    steps = [step_of.get(e, 0.0) for e in range(len(prices))]
                curvature[name][fmt.name], moves[name][fmt.name] = prices, steps
        return _LocalPricesFile(curvature, moves)


def _completed(
    original: list[float], retained: list[float], experts: tuple[int, ...]
) -> list[float]:
    """One value per expert: the retained ones' own, the others' scaled as these."""
    before = sum(original[e] for e in experts)
    factor = sum(retained) / before if before > 0 else 1.0
    values = [value * factor for value in original]
    for expert, value in zip(experts, retained, strict=True):
        values[expert] = value
    return values
