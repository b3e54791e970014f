"""KL(original || candidate), per document, in nats per token.

In: a `SwapModel` and documents. Out: `DocumentLosses` of any allocation on any slice of them.
Invariant: over all positions and the full vocabulary, in float32, the same for any number of
threads; the mean over a slice equals the token-weighted mean of its documents.

The original runs once: its final hidden states are kept (tokens x hidden), its log-probabilities
too while they fit in `cache_bytes`; beyond that the head runs again for them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from allocator.decision.allocation import Allocation
from allocator.files.progress import step
from allocator.scoring.candidates import Candidate
from allocator.scoring.documents import Document, batches
from allocator.scoring.layer_arguments import LaterStart
from allocator.scoring.layer_inputs import (
    LayerDecisions,
    LayerInputCache,
    LayerInputRecorder,
)
from allocator.scoring.model_ends import head
from allocator.scoring.side_by_side import affordable_threads, side_by_side
from allocator.scoring.swap_model import SwapModel, token_ids

Array = npt.NDArray[np.float64]
Row = tuple[float, float, float, float]
CACHE_BYTES = 2 << 30
"""Of the original's log-probabilities that a scorer keeps, unless it is told otherwise."""
_ROWS = 32  # of logits, compared at a time: they stay in the processor's cache


@dataclass(frozen=True)
class DocumentLosses:
    """One value per document, means over its positions.

    Attributes:
        kl: KL(original || candidate), nats per token.
        top1: share of positions where both have the same most likely token.
        overlap: 1 - total variation of the two distributions.
        nll: negative log-likelihood of the next token under the candidate, nats per token.
    """

    kl: Array
    top1: Array
    overlap: Array
    nll: Array

    def __add__(self, other: "DocumentLosses") -> "DocumentLosses":
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return DocumentLosses(*(np.concatenate(pair) for pair in pairs))


class Documents:
    """Fixed documents, and what losses on the first of them come to.

    Args:
        documents: in this order.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = tuple(documents)

    @property
    def n_documents(self) -> int:
        """How many documents there are."""
        return len(self.documents)

    def summary(self, losses: DocumentLosses) -> dict[str, Any]:
        """Averages losses that began at document 0 to plain values, for trial attributes."""
        scored = self.documents[: len(losses.kl)]
        return {
            "loss": mean(losses.kl, scored),
            "tokens": sum(len(d.ids) for d in scored),
            "kl_by_domain": by_domain(losses.kl, scored),
            "top1": mean(losses.top1, scored),
            "overlap": mean(losses.overlap, scored),
            "perplexity": perplexity(losses.nll, scored),
        }

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents."""
        return self.tokens(self.n_documents)

    def tokens(self, stop: int) -> int:
        """Counts the tokens of the first `stop` documents."""
        return sum(len(d.ids) for d in self.documents[:stop])


class Scorer(Documents):
    """Scores allocations on fixed documents.

    Args:
        swap: the model; several scorers may share one.
        documents: what is scored, in this order.
        batch_tokens: tokens per forward pass.
        cache_bytes: memory for the original's log-probabilities.
        layer_input_bytes: memory for what entered layers before, see `LayerInputCache`.
        from_original: candidates are changes of the original, so its states are kept; else those
            of the best candidate are.
        threads: batches that run at once, each on one core; results do not depend on it. A GPU
            runs them one by one.
        progress: shows a bar with this text over documents.

    Attributes:
        threads: batches that do run at once.
    """

    def __init__(
        self,
        swap: SwapModel,
        documents: Sequence[Document],
        *,
        batch_tokens: int = 2048,
        cache_bytes: int = CACHE_BYTES,
        layer_input_bytes: float = 256 << 20,
        from_original: bool = False,
        threads: int = 1,
        progress: str | None = None,
    ) -> None:
        super().__init__(documents)
        self.threads = affordable_threads(swap.model, threads)
        self._progress = progress
        self.swap = swap
        self.batch_tokens = batch_tokens
        self._cache_bytes = cache_bytes
        self._hidden: dict[int, torch.Tensor] = {}
        self._log_probs: dict[int, torch.Tensor] = {}
        self._head: torch.Tensor | None = None
        self._top1: dict[int, torch.Tensor] = {}
        self._decisions = LayerDecisions(swap.layout)
        self._layer_inputs = LayerInputCache(layer_input_bytes)
        self._from_original = from_original

    @torch.inference_mode()
    def score(
        self, candidate: Allocation | Candidate, start: int = 0, stop: int | None = None
    ) -> DocumentLosses:
        """Returns losses of an allocation, or another candidate, on `documents[start:stop]`."""
        stop = len(self.documents) if stop is None else stop
        self.ensure_reference(stop)
        self.swap.put(candidate if isinstance(candidate, Candidate) else Candidate.of(candidate))
        return self.score_installed(start, stop)

    @property
    def side_by_side(self) -> int:
        """Allocations that one pass scores."""
        return 1

    def score_many(
        self, allocations: Sequence[Allocation], start: int = 0, stop: int | None = None
    ) -> list[DocumentLosses]:
        """Returns losses on `documents[start:stop]`, of one allocation after the other."""
        return [self.score(allocation, start, stop) for allocation in allocations]

    def each(self, allocations: Iterable[Allocation | Candidate]) -> Iterator[DocumentLosses]:
        """Yields losses of allocations on all documents, one after the other."""
        return map(self.score, allocations)

    def score_original(self) -> DocumentLosses:
        """Returns losses of the original: no divergence, its own likelihoods."""
        self.ensure_reference(len(self.documents))
        self.swap.reset()
        return self.score_installed()

    @torch.inference_mode()
    def score_installed(self, start: int = 0, stop: int | None = None) -> DocumentLosses:
        """Returns losses of what the model holds now; begins in the first layer that is new.

        Weights that were not put there by `SwapModel.put` are not known to be new.
        """
        stop = len(self.documents) if stop is None else stop
        self.ensure_reference(stop)
        chosen = list(self._batches(start, stop))
        with self._forward(chosen, record=not self._from_original) as passed:
            losses = self._losses(self.swap.model, passed.states, chosen, self.threads)
        if not self._from_original:
            passed.offer(float(losses.kl.sum()))
        return losses

    @torch.inference_mode()
    def score_model(self, model: Any, start: int = 0, stop: int | None = None) -> DocumentLosses:
        """Returns losses of any model with this vocabulary, e.g. a re-opened checkpoint."""
        stop = len(self.documents) if stop is None else stop
        self.ensure_reference(stop)

        def states_of(batch: list[int]) -> torch.Tensor:
            return _final_states(model, [self.documents[i] for i in batch])

        # it may decode its weights inside the forward: one batch at a time
        return self._losses(model, states_of, list(self._batches(start, stop)), 1)

    @contextmanager
    def _forward(self, chosen: Sequence[list[int]], *, record: bool) -> Iterator["_ForwardPasses"]:
        """Forward passes of what the model holds; `record` what enters its layers."""
        before = self._decisions.before(self.swap.candidate)
        passed = _ForwardPasses(self.swap.model, self.documents, self._layer_inputs, chosen, before)
        model, first = self.swap.model, passed.first
        recording = passed.recorder.recording(model, first) if record else nullcontext()
        with passed.start.at(model, first), recording:
            yield passed

    def _losses(
        self,
        model: Any,
        states_of: Callable[[list[int]], torch.Tensor],
        batches: list[list[int]],
        threads: int,
    ) -> DocumentLosses:
        """Losses of a model whose last layer gives these states, by batch."""

        @torch.inference_mode()  # it is a thread's own
        def work(batch: list[int]) -> list[Row]:
            pairs = zip(batch, states_of(batch), strict=True)
            return [self._compare(i, head(model, states)) for i, states in pairs]

        rows: list[Row] = []
        with step(
            self._progress or "scoring", sum(map(len, batches)), unit="documents", brief=True
        ) as bar:
            for document_rows in side_by_side(work, batches, threads):
                rows += document_rows
                bar.update(len(document_rows))
        return losses_of(rows)

    @torch.inference_mode()
    def score_logits(self, index: int, logits: npt.NDArray[np.float32]) -> Row:
        """Compares another runtime's logits of one document, `(tokens, vocabulary)`."""
        self.ensure_reference(index + 1)
        return self._compare(index, torch.from_numpy(logits))

    @torch.inference_mode()
    def candidate_logits(self, index: int) -> npt.NDArray[np.float32]:
        """Returns logits `(tokens, vocabulary)` of what the model holds now, on one document."""
        model = self.swap.model
        logits = head(model, _final_states(model, [self.documents[index]])[0])
        return logits.cpu().numpy()

    @property
    def cached_bytes(self) -> int:
        """Bytes of the original's log-probabilities that are cached."""
        return sum(log_probs.nbytes for log_probs in self._log_probs.values())

    @torch.inference_mode()
    def ensure_reference(self, stop: int) -> None:
        """Runs the original on the documents before `stop` that it has not seen.

        What the model holds meanwhile is put back. The batches do not depend on what was asked
        for before, because sums over other batches differ in the last bit.
        """
        if all(i in self._hidden for i in range(stop)):
            return
        with self.swap.original() as model:
            if self._head is None:
                self._head = model.lm_head.weight.clone()
            missing = [b for b in self._all() if b[0] < stop and b[0] not in self._hidden]

            with self._forward(missing, record=self._from_original) as passed:
                states_of = torch.inference_mode()(lambda b: passed.states(b).clone())
                hidden = side_by_side(states_of, missing, self.threads)
                n_documents = sum(map(len, missing))
                with step("the original", n_documents, unit="documents", brief=True) as shown:
                    for batch, states in zip(missing, hidden, strict=True):
                        self._hidden.update(zip(batch, states, strict=True))
                        shown.update(len(batch))
            if self._from_original:
                passed.offer(0.0)

    @torch.inference_mode()
    def reference(self, index: int) -> torch.Tensor:
        """Returns the original's log-probabilities on one document, `(tokens, vocabulary)`."""
        self.ensure_reference(index + 1)
        return self._reference(index)

    def _reference(self, index: int) -> torch.Tensor:
        if index in self._log_probs:
            return self._log_probs[index]
        assert self._head is not None
        original = self._head
        logits = head(self.swap.model, self._hidden[index], lambda states: states @ original.T)
        log_probs = torch.log_softmax(logits, -1)
        if log_probs.nbytes <= self._cache_bytes:
            self._cache_bytes -= log_probs.nbytes
            self._log_probs[index] = log_probs
        return log_probs

    def _compare(self, index: int, logits: torch.Tensor) -> Row:
        p_log = self._reference(index)
        if index not in self._top1:
            self._top1[index] = p_log.argmax(-1)
        logits = logits.to(p_log.device)
        return compare(p_log, self._top1[index], logits, self.documents[index].ids)

    def _batches(self, start: int, stop: int) -> Iterator[list[int]]:
        return batches(self.documents, start, stop, n_tokens=self.batch_tokens)

    def _all(self) -> list[list[int]]:
        return list(self._batches(0, len(self.documents)))


class _ForwardPasses:
    """Passes of a model over batches, from the first layer that is a new one.

    Attributes:
        first: that layer; before it the model is what the cache knows.
        start: where it begins.
        recorder: of what entered its layers.
    """

    def __init__(
        self,
        model: Any,
        documents: Sequence[Document],
        cache: LayerInputCache,
        chosen: Sequence[list[int]],
        before: list[str],
    ) -> None:
        self._model, self._documents, self._layer_inputs = model, documents, cache
        self._span, self._before = tuple(map(tuple, chosen)), before
        self.first = cache.first(self._span, before)
        self._begin = cache.inputs(self._span, self.first) if self.first else {}
        self.start, self.recorder = LaterStart(), LayerInputRecorder()
        self._entered: dict[int, dict[tuple[int, ...], torch.Tensor]] = {
            layer: {} for layer in range(self.first, len(before))
        }

    def states(self, batch: list[int]) -> torch.Tensor:
        """Computes the last layer's output `(documents, length, hidden)`; from any thread."""
        self.recorder.states = []
        self.start.state = self._begin.get(tuple(batch))
        output = _final_states(self._model, [self._documents[i] for i in batch])
        for layer, entered in enumerate(self.recorder.states, self.first):
            self._entered[layer][tuple(batch)] = entered
        return output

    def offer(self, loss: float) -> None:
        """Lets later candidates begin with this one's layers, if it is the best."""
        self._layer_inputs.offer(self._span, loss, self._before, self._entered)


def compare(
    p_log: torch.Tensor, top1: torch.Tensor, logits: torch.Tensor, ids: Sequence[int]
) -> Row:
    """Computes KL, top-1 agreement, overlap and nll, means over the positions of a document.

    Args:
        p_log: the original's log-probabilities, `(tokens, vocabulary)`.
        top1: their greatest, `(tokens,)`.
        logits: the candidate's, `(tokens, vocabulary)`.
        ids: the tokens.
    """
    following = torch.tensor(ids[1:]).to(logits.device)
    values: list[list[torch.Tensor]] = [[], [], [], []]
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        predicted = following[rows]
        values[1].append(logits[rows].argmax(-1) == top1[rows])
        q_log = torch.log_softmax(logits[rows], -1)
        values[3].append(-q_log[: len(predicted)].gather(1, predicted[:, None])[:, 0])
        p = p_log[rows].exp()
        values[0].append(torch.linalg.vecdot(p, p_log[rows] - q_log))
        values[2].append(1 - 0.5 * p.sub_(q_log.exp_()).abs_().sum(-1).double())
    kl, agreed, overlap, nll = (float(torch.cat(v).double().mean()) for v in values)
    return kl, agreed, overlap, nll


def losses_of(rows: Sequence[Row]) -> DocumentLosses:
    """Gathers what `compare` returned for each document."""
    return DocumentLosses(*np.array(rows, np.float64).reshape(-1, 4).T)


def _final_states(model: Any, documents: Sequence[Document]) -> torch.Tensor:
    ids = token_ids(model, documents)
    hidden: torch.Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def mean(values: Array, documents: Sequence[Document]) -> float:
    """Averages per-document values, `(documents,)`, weighted by tokens."""
    weights = np.array([len(d.ids) for d in documents], np.float64)
    return float(np.average(values, weights=weights))


def by_domain(values: Array, documents: Sequence[Document]) -> dict[str, float]:
    """Averages per-document values, `(documents,)`, by domain, weighted by tokens."""
    domains = sorted({d.domain for d in documents})
    return {
        domain: mean(
            values[[d.domain == domain for d in documents]],
            [d for d in documents if d.domain == domain],
        )
        for domain in domains
    }


def perplexity(nll: Array, documents: Sequence[Document]) -> float:
    """Returns exp of the mean negative log-likelihood of all predicted tokens.

    Args:
        nll: nats per token, `(documents,)`.
        documents: of the values, in the same order.
    """
    n_predicted = np.array([len(d.ids) - 1 for d in documents], np.float64)
    return math.exp(float(np.average(nll, weights=n_predicted)))
