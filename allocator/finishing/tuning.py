"""Tuning of block scales, norms and routers end to end, against the original's distributions.

In: the tensors of a file to write, search documents for the steps, selection documents for the
checks. Out: the same tensors with other scales, norms and routers, and what they lose. Invariants:
no tensor changes its format or size; every step computes with the weights that the runtime would
decode from a file written then; the loss on the checked documents is never above the one before.

Each step lowers KL(original || candidate) on a batch by Adam (Kingma & Ba, 2015) over the vector of
`RelativeChanges`. Every few steps the selection documents are scored. A check above the least loss
so far puts that state back, and halves the rate. The state of least loss is the result, and the
start is one of these states.

The state is on disk every few steps, so that an interrupted run resumes, and ends in the same
bytes as one that was not interrupted.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from allocator.checkpoint.tensors import Floats
from allocator.errors import CalibrationError
from allocator.export.stored import StoredTensor
from allocator.export.tensors import TensorSource
from allocator.files.checksums import arrays_checksum, load_arrays, save_arrays
from allocator.files.progress import step
from allocator.finishing.kl_gradient import KlGradient
from allocator.finishing.relative_changes import KINDS, RelativeChanges
from allocator.scoring.documents import Document, digest
from allocator.scoring.scorer import Scorer, mean
from allocator.scoring.swap_model import SwapModel

STATE_NAME = "tuning.safetensors"
_SAVE_STEPS = 4
_MEAN_DECAY, _SQUARE_DECAY, _EPSILON = 0.9, 0.999, 1e-12  # Adam's beta1, beta2, epsilon
_MOST = 0.75  # change: no scale changes its sign, and none is lost
_RATE_OF_LOSS = 0.006  # 1.5e-3 at a loss of .067 (studies/finish/NOTES.md)
_LARGEST_RATE = 0.02


@dataclass(frozen=True, slots=True)
class TuningSettings:
    """How to tune.

    Attributes:
        tokens: of search documents, in whole documents; fewer if the documents have fewer.
        rate: relative change of a step; None derives it from the loss before.
        batch_tokens: search tokens of a step.
        checks: times that selection documents are scored.
        check_documents: of the selection documents, so many; the first.
        epochs: times that a search document may be used.
        warm_up: share of the steps in which the rate rises.
        final_rate: share of the rate in the last step; the rate falls linearly.
        kinds: of `KINDS`, what is tuned.
        seed: of the documents' order.
    """

    tokens: int = 61_440
    rate: float | None = None
    batch_tokens: int = 2048
    checks: int = 4
    check_documents: int = 64
    epochs: int = 1
    warm_up: float = 0.1
    final_rate: float = 0.1
    kinds: tuple[str, ...] = KINDS
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Check:
    """What the checked documents lost after a step.

    Attributes:
        step: steps before it.
        loss: nats per token.
        rate: of the steps before it.
    """

    step: int
    loss: float
    rate: float


@dataclass(frozen=True)
class Tuned:
    """What tuning gives.

    Attributes:
        tensors: all tensors of the file, by the layout's names.
        digest: of these.
        before: loss on the checked documents, nats per token.
        after: the same under these tensors.
        checks: in order.
        stopped: steps after which it was stopped; None if all steps were made.
    """

    tensors: Mapping[str, StoredTensor]
    digest: str
    before: float
    after: float
    checks: tuple[Check, ...]
    stopped: int | None = None


def tensors_digest(tensors: dict[str, StoredTensor]) -> str:
    """Returns a digest of tensors: of names, formats, shapes and bytes."""
    return arrays_checksum({f"{n} {t.format}": t.data for n, t in tensors.items()})


def rate_for(loss: float) -> float:
    """Returns the rate to start with, from the loss before: nats per token.

    Around the original, changes and their gradients shrink with the root of the loss; Adam's steps
    do not, so the rate must.
    """
    return min(_LARGEST_RATE, _RATE_OF_LOSS * math.sqrt(loss))


def steps_of(documents: Sequence[Document], settings: TuningSettings) -> list[list[int]]:
    """Returns the documents of each step, by number, in an order that the seed determines."""
    generator = np.random.default_rng(settings.seed)
    steps: list[list[int]] = []
    tokens, step_tokens = 0, settings.batch_tokens
    for _ in range(settings.epochs):
        for i in generator.permutation(len(documents)).tolist():
            length = len(documents[i].ids)
            if tokens + length > settings.tokens:
                return steps
            if step_tokens + length > settings.batch_tokens and step_tokens:
                steps.append([])
                step_tokens = 0
            steps[-1].append(i)
            step_tokens += length
            tokens += length
    return steps


def checked_steps(
    documents: Sequence[Document], n_selection: int, settings: TuningSettings
) -> list[list[int]]:
    """Returns what `steps_of` does.

    Args:
        documents: of the search split.
        n_selection: documents of the selection split.
        settings: of the tuning.

    Raises:
        CalibrationError: if there is no step, or no document to check one on.
    """
    steps = steps_of(documents, settings)
    if not steps or not n_selection:
        raise CalibrationError(
            f"tuning: {len(documents)} search and {n_selection} selection documents, "
            f"{settings.tokens:,} tokens; needed one document of each, and its tokens"
        )
    return steps


def tune(
    source: TensorSource,
    documents: Sequence[Document],
    selection: Scorer,
    settings: TuningSettings | None = None,
    *,
    folder: Path | None = None,
    progress: bool = False,
    stop: Callable[[int], bool] | None = None,
) -> Tuned:
    """Tunes scales, norms and routers; the model holds the result afterwards.

    Args:
        source: the tensors to start from.
        documents: of the search split, for the steps.
        selection: scores the selection split, for the checks; its model, of the source's layout,
            makes the steps too.
        settings: how; the defaults if None.
        folder: where the state is kept, for a run that resumes; nowhere if None.
        progress: shows a bar over steps.
        stop: told the steps made so far, after each; says whether to stop there. What was stopped
            ends as a run that is told to stop after the same step, and resumes as one that was
            killed.

    Raises:
        AllocatorError: if the gradients do not fit into memory.
        CalibrationError: if there are no documents for a step.
    """
    settings = settings or TuningSettings()
    steps = checked_steps(documents, selection.n_documents, settings)
    run = _Run(source, documents, selection, settings, steps, folder)
    run.resume()
    if stop is not None and 0 < run.state.step < len(steps) and stop(run.state.step):
        return run.stopped()
    with step("tuning", len(steps), initial=run.state.step, unit="steps", shown=progress) as bar:
        for loss in run.steps():
            bar.note(f"selection {loss:.4f}")
            bar.update()
            if stop is not None and run.state.step < len(steps) and stop(run.state.step):
                return run.stopped()
    return run.result()


@dataclass(slots=True)
class _State:
    """Where a run is.

    Attributes:
        changes: now, `(n,)`.
        mean: Adam's average of gradients, `(n,)`.
        square: Adam's average of their squares, `(n,)`.
        best: changes of least loss, `(n,)`.
        step: steps made.
        since: steps that the averages are of.
        rate: before warm-up and decay.
        checks: `(checks, 3)` floats, as of `Check`; the first is the start.
    """

    changes: Floats
    mean: Floats
    square: Floats
    best: Floats
    step: int = 0
    since: int = 0
    rate: float = 0.0
    checks: list[Check] = field(default_factory=list)

    @classmethod
    def zeros(cls, n: int) -> "_State":
        changes, mean, square, best = np.zeros((4, n), np.float32)
        return cls(changes, mean, square, best)

    @property
    def least(self) -> float:
        return min(check.loss for check in self.checks)

    def arrays(self) -> dict[str, Any]:
        rows = [(c.step, c.loss, c.rate) for c in self.checks]
        return {
            "changes": self.changes,
            "mean": self.mean,
            "square": self.square,
            "best": self.best,
            "counts": np.array([self.step, self.since]),
            "rate": np.array([self.rate]),
            "checks": np.array(rows, np.float64),
        }

    @classmethod
    def of(cls, arrays: dict[str, Any]) -> "_State":
        checks = [Check(int(step), float(loss), float(r)) for step, loss, r in arrays["checks"]]
        step, since = map(int, arrays["counts"])
        changes, mean, square, best = (arrays[n] for n in ("changes", "mean", "square", "best"))
        return cls(changes, mean, square, best, step, since, float(arrays["rate"][0]), checks)


class _Run:
    """One run of steps and checks; its state is all that a later process needs."""

    def __init__(
        self,
        source: TensorSource,
        documents: Sequence[Document],
        selection: Scorer,
        settings: TuningSettings,
        steps: list[list[int]],
        folder: Path | None,
    ) -> None:
        self._scorer = selection
        self._checked = selection.documents[: settings.check_documents]
        self._swap: SwapModel = selection.swap
        self._settings = settings
        self._changes = RelativeChanges(source, frozenset(settings.kinds))
        self.state = _State.zeros(self._changes.n)
        start = tensors_digest(self._changes.tensors(self.state.changes))
        inputs = [
            source.layout.inventory.digest,
            source.allocation.digest,
            start,
            digest(documents),
            digest(self._checked),
            repr(sorted(asdict(settings).items())),
        ]
        self._digest = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
        self._path = None if folder is None else folder / STATE_NAME
        self._steps = steps
        used = list(dict.fromkeys(i for step in steps for i in step))
        self._number = {i: number for number, i in enumerate(used)}
        used_documents = [documents[i] for i in used]
        self._gradient = KlGradient(
            self._swap,
            used_documents,
            self._changes.parameters(self._swap.model),
            threads=selection.threads,
        )

    def resume(self) -> None:
        """Takes up the state on disk, or scores the start."""
        arrays = None if self._path is None else load_arrays(self._path, self._digest)
        if arrays is not None:
            self.state = _State.of(arrays)
            return
        loss = self._score(self.state.changes)
        self.state.rate = rate_for(loss) if self._settings.rate is None else self._settings.rate
        self.state.checks.append(Check(0, loss, 0.0))
        self._save()

    def steps(self) -> Iterator[float]:
        """Makes the steps that are left; yields the least loss so far after each."""
        state, n = self.state, len(self._steps)
        at = {round(n * (i + 1) / self._settings.checks) for i in range(self._settings.checks)}
        while state.step < n:
            self._step()
            if state.step in at:
                self._check()
            if state.step in at or state.step % _SAVE_STEPS == 0:
                self._save()
            yield state.least

    def result(self) -> Tuned:
        """Puts the state of least loss into the model, and returns it."""
        state = self.state
        tensors = self._changes.tensors(state.best)
        self._put(state.best)
        return Tuned(
            tensors, tensors_digest(tensors), state.checks[0].loss, state.least, tuple(state.checks)
        )

    def stopped(self) -> Tuned:
        """Checks the present changes, and returns the state of least loss; the disk's stays."""
        if self.state.checks[-1].step < self.state.step:
            self._check()
        return replace(self.result(), stopped=self.state.step)

    def _step(self) -> None:
        state = self.state
        self._put(state.changes)
        chosen = [self._number[i] for i in self._steps[state.step]]
        _, gradient = self._gradient.at(
            chosen, lambda: self._changes.gradient(self._swap.model, state.changes)
        )
        state.step += 1
        state.since += 1
        _average(state.mean, gradient, _MEAN_DECAY)
        _average(state.square, np.square(gradient), _SQUARE_DECAY)
        mean_factor = 1 / (1 - _MEAN_DECAY**state.since)
        square_factor = 1 / (1 - _SQUARE_DECAY**state.since)
        direction = state.mean * np.float32(mean_factor)
        direction /= np.sqrt(state.square * np.float32(square_factor)) + np.float32(_EPSILON)
        moved = state.changes - np.float32(state.rate * self._share()) * direction
        state.changes = np.clip(moved, -_MOST, _MOST)

    def _share(self) -> float:
        """The share of the rate in this step: up, then down to the final one."""
        n, step = len(self._steps), self.state.step
        up = step / max(1.0, n * self._settings.warm_up)
        down = 1 - (1 - self._settings.final_rate) * (step - 1) / max(1, n - 1)
        return min(up, 1.0) * down

    def _check(self) -> None:
        state = self.state
        loss, least = self._score(state.changes), state.least
        state.checks.append(Check(state.step, loss, state.rate))
        if loss < least:
            state.best = state.changes.copy()
        else:
            state.changes, state.rate, state.since = state.best.copy(), state.rate / 2, 0
            state.mean, state.square = np.zeros_like(state.mean), np.zeros_like(state.square)

    def _put(self, changes: Floats) -> None:
        named = hashlib.sha256(self._digest.encode() + changes.tobytes()).hexdigest()
        self._swap.put(self._changes.weights(changes, named).candidate)

    def _score(self, changes: Floats) -> float:
        self._scorer.ensure_reference(len(self._checked))
        self._put(changes)
        return mean(self._scorer.score_installed(0, len(self._checked)).kl, self._checked)

    def _save(self) -> None:
        if self._path is not None:
            save_arrays(self._path, self.state.arrays(), self._digest)


def _average(average: Floats, value: Floats, decay: float) -> None:
    """Moves an exponential average towards a value, both `(n,)`."""
    average *= np.float32(decay)
    average += np.float32(1 - decay) * value
