"""KL(original || candidate), per document, in nats per token.

In: a `SwapModel` and documents. Out: `DocumentLosses` of any allocation on any slice of them.
Invariant: over all positions and the full vocabulary, in float32, deterministic for a given number
of threads; the mean over a slice equals the token-weighted mean of its documents.

The original runs once: its final hidden states are kept (tokens x hidden), its log-probabilities
too while they fit in `cache_bytes`; beyond that the head runs again for them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from allocator.allocation import Allocation
from allocator.calibration.documents import Document, batches
from allocator.proxy.model import SwapModel

Array = npt.NDArray[np.float64]


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


class Scorer:
    """Scores allocations on fixed documents.

    Args:
        swap: the model; several scorers may share one.
        documents: what is scored, in this order.
        batch_tokens: tokens per forward pass.
        cache_bytes: memory for the original's log-probabilities.
        progress: shows a bar with this text over documents.
    """

    def __init__(
        self,
        swap: SwapModel,
        documents: Sequence[Document],
        *,
        batch_tokens: int = 4096,
        cache_bytes: int = 2 << 30,
        progress: str | None = None,
    ) -> None:
        self._progress = progress
        self.swap = swap
        self.documents = tuple(documents)
        self.batch_tokens = batch_tokens
        self._cache_bytes = cache_bytes
        self._hidden: dict[int, torch.Tensor] = {}
        self._log_probs: dict[int, torch.Tensor] = {}
        self._head: torch.Tensor | None = None
        self._top1: dict[int, torch.Tensor] = {}
        self._boundaries: list[list[torch.Tensor]] = []

    @property
    def n_documents(self) -> int:
        """How many documents there are."""
        return len(self.documents)

    def summary(self, losses: DocumentLosses) -> dict[str, Any]:
        """Means of losses that began at document 0, as plain values for trial attributes."""
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
        return sum(len(d.ids) for d in self.documents)

    @torch.inference_mode()
    def score(
        self, allocation: Allocation, start: int = 0, stop: int | None = None
    ) -> DocumentLosses:
        """Losses of an allocation on `documents[start:stop]`."""
        stop = len(self.documents) if stop is None else stop
        self.ensure_reference(stop)
        self.swap.put(
            formats=dict(allocation.formats),
            retained=allocation.retained_experts,
            experts_used=allocation.experts_used,
        )
        return self.score_installed(start, stop)

    @torch.inference_mode()
    def score_installed(self, start: int = 0, stop: int | None = None) -> DocumentLosses:
        """Losses of what the model holds now."""
        return self.score_model(self.swap.model, start, stop)

    @torch.inference_mode()
    def score_model(self, model: Any, start: int = 0, stop: int | None = None) -> DocumentLosses:
        """Losses of any transformers model with this vocabulary, e.g. a re-opened checkpoint."""
        stop = len(self.documents) if stop is None else stop
        self.ensure_reference(stop)
        rows: list[tuple[float, float, float, float]] = []
        for batch in self._batches(start, stop, shown=True):
            hidden = _hidden_states(model, [self.documents[i] for i in batch])
            rows += [self._compare(i, model.lm_head(h)) for i, h in zip(batch, hidden, strict=True)]
        return DocumentLosses(*np.array(rows, np.float64).reshape(-1, 4).T)

    @torch.inference_mode()
    def score_from(self, layer: int) -> DocumentLosses:
        """Losses of what the model holds now, where everything before `layer` is the original's.

        Starts at the original's hidden states there, so it computes what `score_installed` does
        with that share of the layers; those states stay in memory: tokens x hidden per layer.
        """
        self._ensure_boundaries()
        rows: list[tuple[float, float, float, float]] = []
        for batch, states in zip(
            self._batches(0, len(self.documents)), self._boundaries, strict=True
        ):
            hidden = _rest_of(self.swap.model, states[layer], layer)
            heads = (self.swap.model.lm_head(h) for h in hidden)
            rows += [self._compare(i, logits) for i, logits in zip(batch, heads, strict=True)]
        return DocumentLosses(*np.array(rows, np.float64).reshape(-1, 4).T)

    def _ensure_boundaries(self) -> None:
        """Collects the original's hidden states before every layer, batch by batch."""
        self.ensure_reference(len(self.documents))
        if self._boundaries:
            return
        with self.swap.original() as model:
            for batch in self._batches(0, len(self.documents)):
                states: list[torch.Tensor] = []
                handles = [
                    block.register_forward_pre_hook(
                        lambda _, args, states=states: states.append(args[0].clone())
                    )
                    for block in model.model.layers
                ]
                _hidden_states(model, [self.documents[i] for i in batch])
                for handle in handles:
                    handle.remove()
                self._boundaries.append(states)

    @torch.inference_mode()
    def score_logits(
        self, index: int, logits: npt.NDArray[np.float32]
    ) -> tuple[float, float, float, float]:
        """KL, top-1, overlap and nll of one document from another runtime's logits."""
        self.ensure_reference(index + 1)
        return self._compare(index, torch.from_numpy(logits))

    @torch.inference_mode()
    def candidate_logits(self, index: int) -> npt.NDArray[np.float32]:
        """Logits `(tokens, vocabulary)` of what the model holds now, on one document."""
        model = self.swap.model
        logits: torch.Tensor = model.lm_head(_hidden_states(model, [self.documents[index]])[0])
        return logits.numpy()

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
            for batch in self._batches(0, len(self.documents)):
                if batch[0] >= stop or batch[0] in self._hidden:
                    continue
                hidden = _hidden_states(model, [self.documents[i] for i in batch])
                for i, state in zip(batch, hidden, strict=True):
                    self._hidden[i] = state.clone()

    def _reference(self, index: int) -> torch.Tensor:
        if index in self._log_probs:
            return self._log_probs[index]
        assert self._head is not None
        log_probs = torch.log_softmax(self._hidden[index] @ self._head.T, -1)
        if log_probs.nbytes <= self._cache_bytes:
            self._cache_bytes -= log_probs.nbytes
            self._log_probs[index] = log_probs
        return log_probs

    def _compare(self, index: int, logits: torch.Tensor) -> tuple[float, float, float, float]:
        p_log = self._reference(index)
        if index not in self._top1:
            self._top1[index] = p_log.argmax(-1)
        top1 = (logits.argmax(-1) == self._top1[index]).double().mean()
        q_log = torch.log_softmax(logits, -1)
        ids = torch.tensor(self.documents[index].ids[1:])
        nll = -q_log[:-1].gather(1, ids[:, None]).double().mean()
        p = p_log.exp()
        kl = torch.linalg.vecdot(p, p_log - q_log).double().mean()
        overlap = 1 - 0.5 * p.sub_(q_log.exp_()).abs_().sum(-1).double().mean()
        return float(kl), float(top1), float(overlap), float(nll)

    def _batches(self, start: int, stop: int, *, shown: bool = False) -> Iterator[list[int]]:
        bar = tqdm(
            total=stop - start,
            desc=self._progress,
            disable=not (shown and self._progress),
            leave=False,
        )
        for batch in batches(self.documents, start, stop, n_tokens=self.batch_tokens):
            yield batch
            bar.update(len(batch))
        bar.close()


def _hidden_states(model: Any, documents: Sequence[Document]) -> torch.Tensor:
    ids = torch.tensor([d.ids for d in documents])
    hidden: torch.Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _rest_of(model: Any, states: torch.Tensor, layer: int) -> torch.Tensor:
    """Final hidden states from the hidden states that enter `layer`."""
    whole = model.model.layers
    model.model.layers = whole[layer:]
    try:
        hidden: torch.Tensor = model.model(inputs_embeds=states, use_cache=False).last_hidden_state
    finally:
        model.model.layers = whole
    return hidden


def mean(values: Array, documents: Sequence[Document]) -> float:
    """Token-weighted mean of per-document values."""
    weights = np.array([len(d.ids) for d in documents], np.float64)
    return float(np.average(values, weights=weights))


def by_domain(values: Array, documents: Sequence[Document]) -> dict[str, float]:
    """Token-weighted mean per domain."""
    domains = sorted({d.domain for d in documents})
    return {
        domain: mean(
            values[[d.domain == domain for d in documents]],
            [d for d in documents if d.domain == domain],
        )
        for domain in domains
    }


def perplexity(nll: Array, documents: Sequence[Document]) -> float:
    """exp of the mean negative log-likelihood of all predicted tokens."""
    n_predicted = np.array([len(d.ids) - 1 for d in documents], np.float64)
    return math.exp(float(np.average(nll, weights=n_predicted)))
