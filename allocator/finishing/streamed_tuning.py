"""Tuning end to end of a model that need not fit in memory: few long steps, each layer by layer.

In: the tensors of a file to write, search documents, a `StreamedScorer` of selection ones. Out:
the same tensors with other scales, norms and routers, read layer by layer, and what they lose.
Invariants: no tensor changes its format or size; every loss is that of the weights which a runtime
would decode from a file written then; the loss on the checked documents is never above the one
before. In memory are the states of one step's documents as they enter a layer, and their gradients
(tokens x hidden each), one layer's encoded tensors, once more under every changes that are
computed, and one routed expert at a time.

A step runs its share of the search documents once forwards, layer by layer, and takes the gradient
of KL(original || candidate) once backwards. It moves every change against the mean of its gradient
over chunks of some documents, divided by the root mean square: a change whose gradient all chunks
agree on moves by the rate, one that is noise hardly moves. The step is checked at the rate and at
half of it; the better one is taken if it loses less than the weights before, and gives the rate of
the next step.

The checkpoint is read a few times in all, not for every 2,048 tokens as `tuning` would. States,
gradients and changes are on disk by layer: an interrupted run resumes at the layer it reached, and
ends in the same bytes as one that was not interrupted.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import numpy as np
import torch

from allocator.checkpoint.tensors import Floats
from allocator.errors import CheckpointError
from allocator.export.stored import StoredTensor, StoredWeights
from allocator.export.tensors import TensorSource
from allocator.files.checksums import load_arrays, read_checked, save_arrays, write_checked
from allocator.files.progress import Step, step
from allocator.finishing.layer_gradient import head_gradient, layer_gradient
from allocator.finishing.relative_changes import NORMS, RelativeChanges
from allocator.finishing.tuning import Check, Tuned, TuningSettings, checked_steps
from allocator.scoring.candidates import Candidate
from allocator.scoring.documents import Document, batches
from allocator.scoring.layer_checkpoints import Batches, LayerCheckpoints
from allocator.scoring.scorer import mean
from allocator.scoring.streamed_scorer import StreamedScorer
from allocator.targets.layout import part_names

LONG_STEPS = 4
"""Steps of a run; each takes the gradient of its share of the tokens."""
_LEAST_CHUNKS = 7
"""Of a step, where there are documents: of fewer, a direction is mostly noise."""
PASS_TOKENS = 1024
"""Tokens that go through a layer's attention, or the head, at once."""
_MOST = 0.75  # change: no scale changes its sign, and none is lost
_RATE_OF_LOSS, _LARGEST_RATE = 0.011, 0.02  # 2.9e-3 at a loss of .071 (studies/finish/NOTES.md)
TRIED = 1.0, 0.5
"""Shares of the rate that a step is checked at."""
_EPSILON = 1e-12
_STATE = "tuning.json"
_T = TypeVar("_T")

Vectors = Callable[[int | None], Floats | None]
"""Changes by layer, `(n,)`; None for zeros. Layer None is what is outside of the layers."""


def rate_for(loss: float) -> float:
    """Returns the rate to start with, from the loss before: nats per token."""
    return min(_LARGEST_RATE, _RATE_OF_LOSS * math.sqrt(loss))


class _State(msgspec.Struct, forbid_unknown_fields=True):
    """`tuning.json`: where a run is.

    Attributes:
        steps: made.
        rate: of the next one.
        at: step after which the present changes were taken; 0 for no changes.
        checks: of the steps that were taken, and of the start.
    """

    steps: int
    rate: float
    at: int
    checks: list[Check]

    @property
    def least(self) -> float:
        return self.checks[-1].loss


class _OneLayer(Generic[_T]):
    """What belongs to a layer, in memory until that of another layer is asked for."""

    def __init__(self) -> None:
        self._layer: int | None = None
        self._values: list[_T] = []

    def of(self, layer: int | None, make: Callable[[], _T]) -> _T:
        """Returns what belongs to a layer, made if it is not in memory."""
        if not self._values or self._layer != layer:
            self._values.clear()  # not in memory beside the next
            self._values.append(make())
            self._layer = layer
        return self._values[0]


class _Layers:
    """The tensors of a file, as functions of changes; those of one layer are in memory."""

    def __init__(self, source: TensorSource, kinds: frozenset[str]) -> None:
        self.source, self._kinds = source, kinds
        layout, allocation = source.layout, source.allocation
        self.layer_of: dict[str, int | None] = {}
        for name, group in layout.groups.items():
            parts = part_names(name, allocation.parts(layout, name))
            self.layer_of |= dict.fromkeys(parts, group.layer)
        self.layer_of |= {tensor.source: tensor.layer for tensor in layout.full_precision}
        self._one_layer = _OneLayer[RelativeChanges]()

    def changes(self, layer: int | None) -> RelativeChanges:
        """Returns the changes of a layer; of what is outside of the layers, those of norms."""
        kinds = self._kinds if layer is not None else self._kinds & {NORMS}
        return self._one_layer.of(layer, lambda: RelativeChanges(self.source, kinds, layer))


class _Changed(Mapping[str, StoredTensor]):
    """The tensors under some changes, by the layout's names; those of one layer are in memory."""

    def __init__(self, layers: _Layers, vectors: Vectors, named: str) -> None:
        self.digest = hashlib.sha256(named.encode()).hexdigest()
        self._layers, self._vectors = layers, vectors
        self._one_layer = _OneLayer[dict[str, StoredTensor]]()

    @property
    def candidate(self) -> Candidate:
        """What a model computes with these weights."""
        source = self._layers.source
        return StoredWeights(source.layout, source.allocation, self, self.digest).candidate

    def vector(self, layer: int | None) -> Floats:
        """Returns the changes of a layer, `(n,)`."""
        known = self._vectors(layer)
        return np.zeros(self._layers.changes(layer).n, np.float32) if known is None else known

    def __getitem__(self, name: str) -> StoredTensor:
        layer = self._layers.layer_of[name]
        changes = self._layers.changes
        tensors = self._one_layer.of(layer, lambda: changes(layer).tensors(self.vector(layer)))
        return tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers.layer_of)

    def __len__(self) -> int:
        return len(self._layers.layer_of)


def tune_streamed(
    source: TensorSource,
    documents: Sequence[Document],
    selection: StreamedScorer,
    settings: TuningSettings | None = None,
    *,
    folder: Path,
    of: str,
    progress: bool = False,
    stop: Callable[[int], bool] | None = None,
) -> Tuned:
    """Tunes scales, norms and routers, in `LONG_STEPS` steps.

    Args:
        source: the tensors to start from.
        documents: of the search split, for the steps.
        selection: scores the selection split, for the checks; its model computes the steps too.
        settings: how; the defaults if None. `batch_tokens` are those of a chunk, at most.
        folder: where states, gradients and changes are kept, for this run and one that resumes.
        of: what the files there belong to: names everything that the result depends on.
        progress: shows a bar over the layers of all steps, forwards and backwards.
        stop: told the steps made so far, after each; says whether to stop there.

    Raises:
        CalibrationError: if there are no documents for a step.
    """
    settings = settings or TuningSettings()
    n_tokens = min(settings.tokens, sum(len(d.ids) for d in documents))
    of_chunk = min(settings.batch_tokens, max(1, n_tokens // (LONG_STEPS * _LEAST_CHUNKS)))
    settings = replace(settings, batch_tokens=of_chunk)
    steps = checked_steps(documents, selection.n_documents, settings)
    chunks = [[documents[i] for i in chunk] for chunk in steps]
    run = _Run(source, selection, settings, folder, of)
    return run.run(long_steps(chunks), progress, stop or (lambda _: False))


def long_steps(chunks: Sequence[list[Document]]) -> list[list[list[Document]]]:
    """Returns the chunks of each step, in order; fewer than `LONG_STEPS` of few chunks."""
    n = min(LONG_STEPS, max(1, len(chunks) // _LEAST_CHUNKS))
    ends = [round(len(chunks) * (i + 1) / n) for i in range(n)]
    return [list(chunks[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


class _Run:
    """One run; all that a later process needs is in its folder."""

    def __init__(
        self,
        source: TensorSource,
        selection: StreamedScorer,
        settings: TuningSettings,
        folder: Path,
        of: str,
    ) -> None:
        self._scorer, self._streamed = selection, selection.model
        self._settings, self._folder, self._of = settings, folder, of
        self._layers = _Layers(source, frozenset(settings.kinds))
        self._n_layers = self._streamed.inventory.n_layers

    def run(
        self, steps: list[list[list[Document]]], progress: bool, stop: Callable[[int], bool]
    ) -> Tuned:
        """Makes the steps that are left, until told to stop."""
        state = self._begin()
        stopped = None
        total, n_passes = len(steps), 2 * self._n_layers
        with step(
            "tuning", total * n_passes, initial=state.steps * n_passes, unit="layers",
            shown=progress,
        ) as bar:  # fmt: skip
            while state.steps < total:
                if state.steps and stop(state.steps):
                    stopped = state.steps
                    break
                bar.note(f"step {state.steps + 1} of {total}, selection {state.least:.4f}")
                state = self._step(state, steps[state.steps], bar)
        changed = self._changed(state)
        return Tuned(
            changed, changed.digest, state.checks[0].loss, state.least, tuple(state.checks), stopped
        )

    def _begin(self) -> _State:
        """Returns where an earlier run was, or the start, scored."""
        known = read_checked(self._folder / _STATE, _State, self._of)
        if known is not None:
            return known
        state = _State(0, 0.0, 0, [])
        (loss,) = self._losses([self._changed(state)])
        given = self._settings.rate
        state = _State(0, rate_for(loss) if given is None else given, 0, [Check(0, loss, 0.0)])
        write_checked(self._folder / _STATE, state, self._of)
        return state

    def _step(self, state: _State, chunks: list[list[Document]], bar: Step) -> _State:
        """Makes one step, and notes where the run is then."""
        place = self._folder / f"step-{state.steps}"
        place.mkdir(exist_ok=True)
        self._directions(self._changed(state), place, chunks, bar)
        tried = [self._moved(state, place, share * state.rate) for share in TRIED]
        losses = self._losses(tried)
        best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
        rate, made = state.rate * TRIED[best], state.steps + 1
        if losses[best] < state.least:
            for layer in self._each_layer:
                self._save(self._folder, f"changes-{made}", layer, tried[best].vector(layer))
            state = _State(made, rate, made, [*state.checks, Check(made, losses[best], rate)])
        else:
            state = _State(made, rate / 2, state.at, state.checks)
        write_checked(self._folder / _STATE, state, self._of)
        for path in self._folder.glob("changes-*"):
            if not path.name.startswith(f"changes-{state.at}-"):
                path.unlink()
        for done in self._folder.glob("step-*"):
            shutil.rmtree(done)
        return state

    # -- changes

    @property
    def _each_layer(self) -> tuple[int | None, ...]:
        return (*range(self._n_layers), None)

    def _changed(self, state: _State) -> _Changed:
        """Returns the tensors under the present changes."""
        at = state.at

        def vectors(layer: int | None) -> Floats | None:
            return self._load(self._folder, f"changes-{at}", layer) if at else None

        return _Changed(self._layers, vectors, f"{self._of} {at}")

    def _moved(self, state: _State, place: Path, rate: float) -> _Changed:
        """Returns the tensors after a step at a rate."""
        present = self._changed(state)

        def vectors(layer: int | None) -> Floats:
            direction = self._load(place, "direction", layer)
            moved = present.vector(layer) - np.float32(rate) * direction
            return np.clip(moved, -_MOST, _MOST)

        return _Changed(self._layers, vectors, f"{present.digest} {rate}")

    def _save(self, place: Path, what: str, layer: int | None, values: Floats) -> None:
        save_arrays(place / _name(what, layer), {"changes": values}, self._of)

    def _load(self, place: Path, what: str, layer: int | None) -> Floats:
        arrays = load_arrays(place / _name(what, layer), self._of)
        if arrays is None:
            raise CheckpointError(
                f"{place / _name(what, layer)}: damaged or removed meanwhile; remove "
                f"{self._folder}, and finish again"
            )
        values: Floats = arrays["changes"]
        return values

    def _losses(self, tried: Sequence[_Changed]) -> list[float]:
        """Returns the loss of each on the checked documents, nats per token."""
        n = min(self._settings.check_documents, self._scorer.n_documents)
        found = self._scorer.score_many([changed.candidate for changed in tried], 0, n)
        return [mean(losses.kl, self._scorer.documents[:n]) for losses in found]

    # -- gradients

    def _directions(
        self, present: _Changed, place: Path, chunks: list[list[Document]], bar: Step
    ) -> None:
        """Writes the direction of every layer's changes, from the last layer to the first."""
        chosen: list[list[Document]] = []
        places: list[slice] = []  # batches of each chunk
        for chunk in chunks:
            first = len(chosen)
            passes = batches(chunk, 0, len(chunk), n_tokens=PASS_TOKENS)
            chosen += [[chunk[i] for i in batch] for batch in passes]
            places.append(slice(first, len(chosen)))
        checkpoints = LayerCheckpoints(place, chosen, self._streamed.device, self._of)
        gradients, reached = None, 0
        for reached in range(self._n_layers + 1):
            if (gradients := checkpoints.load("gradients", reached)) is not None:
                break
        if gradients is None:
            gradients = self._of_head(present, place, checkpoints, places, bar)
        else:
            bar.update(2 * self._n_layers - reached)
        for layer in reversed(range(reached)):
            before = self._before(layer, present, checkpoints)
            direction = _Direction()
            changes, vector = self._layers.changes(layer), present.vector(layer)
            inputs: Batches = []
            for here in places:
                of_changes, of_inputs = layer_gradient(
                    self._streamed, layer, changes, vector, present.candidate,
                    before[here], gradients[here],
                )  # fmt: skip
                direction.add(of_changes)
                inputs += of_inputs
            gradients = inputs
            self._save(place, "direction", layer, direction.value)
            if layer:
                checkpoints.save("gradients", layer, gradients)
            bar.update()

    def _of_head(
        self,
        present: _Changed,
        place: Path,
        checkpoints: LayerCheckpoints,
        places: list[slice],
        bar: Step,
    ) -> Batches:
        """Runs the step's documents forwards; gradients of what the last layer gives, by batch."""
        n = self._n_layers
        with torch.no_grad():
            self._streamed.states_before(n, checkpoints, "original", forget=True)
            for layer in range(1, n + 1):
                self._before(layer, present, checkpoints)
                bar.update()
        original = checkpoints.load("original", n)
        final = self._before(n, present, checkpoints)
        assert original is not None
        gradients: Batches = []
        direction = _Direction()
        changes, vector = self._layers.changes(None), present.vector(None)
        for here in places:
            of_changes, of_final = head_gradient(
                self._streamed, changes, vector, present.candidate, original[here], final[here]
            )
            direction.add(of_changes)
            gradients += of_final
        self._save(place, "direction", None, direction.value)
        checkpoints.save("gradients", n, gradients)
        return gradients

    @torch.no_grad()
    def _before(self, layer: int, present: _Changed, checkpoints: LayerCheckpoints) -> Batches:
        """Returns what enters a layer of the candidate, `(documents, length, hidden)` by batch."""
        return self._streamed.states_before(layer, checkpoints, "states", present.candidate)


class _Direction:
    """The mean of gradients, `(n,)`, over their root mean square."""

    def __init__(self) -> None:
        self._gradients = 0
        self._mean = self._square = np.zeros(0, np.float32)

    def add(self, gradient: Floats) -> None:
        """Adds the gradient of one chunk, `(n,)`."""
        if not self._gradients:
            self._mean, self._square = np.zeros((2, len(gradient)), np.float32)
        self._gradients += 1
        self._mean += gradient
        self._square += np.square(gradient)

    @property
    def value(self) -> Floats:
        """The direction, `(n,)`, -1 to 1."""
        root = np.sqrt(self._square / np.float32(self._gradients)) + np.float32(_EPSILON)
        direction: Floats = self._mean / np.float32(self._gradients) / root
        return direction


def _name(what: str, layer: int | None) -> str:
    return f"{what}-{'outside' if layer is None else layer}.safetensors"
