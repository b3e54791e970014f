"""Scores of many candidates in one pass over a checkpoint that need not fit in memory.

In: a `StreamedModel` and documents. Out: `DocumentLosses` of any number of allocations. Invariants:
what `Scorer` computes, up to the order of float32 sums; candidates that agree up to a layer are one
computation up to there. In memory, beside the model's own, are the original's final hidden states
(tokens x hidden) and the logits of some documents.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from allocator.decision.allocation import Allocation
from allocator.files.progress import stepping
from allocator.scoring.candidates import Candidate
from allocator.scoring.documents import Document, batches
from allocator.scoring.scorer import DocumentLosses, Documents, Row, Scorer, compare, losses_of
from allocator.scoring.streamed_model import States, StreamedModel


class StreamedScorer(Documents):
    """Scores allocations on fixed documents, many in one pass.

    Args:
        model: several scorers may share one.
        documents: what is scored, in this order.
        side_by_side: candidates in one pass; more take further passes.
        batch_tokens: tokens per forward pass of a layer.
        logits_bytes: of all distributions of the documents that are compared at a time.
    """

    def __init__(
        self,
        model: StreamedModel,
        documents: Sequence[Document],
        *,
        side_by_side: int = 8,
        batch_tokens: int = 2048,
        logits_bytes: int = 512 << 20,
    ) -> None:
        super().__init__(documents)
        self.model = model
        self.side_by_side = side_by_side
        self.batch_tokens = batch_tokens
        self._logits_bytes = logits_bytes
        self._reference: dict[int, torch.Tensor] = {}
        self._last: tuple[Candidate, list[torch.Tensor]]

    def score(
        self, candidate: Allocation | Candidate, start: int = 0, stop: int | None = None
    ) -> DocumentLosses:
        """Returns losses of an allocation, or another candidate, on `documents[start:stop]`."""
        return self.score_many([candidate], start, stop)[0]

    def score_original(self) -> DocumentLosses:
        """Returns losses of the original: no divergence, its own likelihoods."""
        return self.score_many([self.model.original])[0]

    def score_many(
        self, candidates: Sequence[Allocation | Candidate], start: int = 0, stop: int | None = None
    ) -> list[DocumentLosses]:
        """Returns losses of candidates on `documents[start:stop]`, `side_by_side` in one pass.

        The original runs with them where it has not run on these documents before; its final
        hidden states are kept: tokens x hidden.
        """
        return list(self.each(candidates, start, stop))

    def each(
        self, candidates: Iterable[Allocation | Candidate], start: int = 0, stop: int | None = None
    ) -> Iterator[DocumentLosses]:
        """Yields losses of candidates on `documents[start:stop]`, pass by pass."""
        stop, remaining = len(self.documents) if stop is None else stop, iter(candidates)
        while together := list(islice(remaining, self.side_by_side)):
            yield from self._pass(together, start, stop)

    @torch.no_grad()  # not inference mode: gradients may be taken of what is put in memory here
    def _pass(
        self, candidates: Sequence[Allocation | Candidate], start: int, stop: int
    ) -> list[DocumentLosses]:
        self.model.weights.release()
        chosen = list(batches(self.documents, start, stop, n_tokens=self.batch_tokens))
        wanted = [c if isinstance(c, Candidate) else Candidate.of(c) for c in candidates]
        for candidate in wanted:
            if candidate.weights is not None:
                candidate.weights.release()
        known = all(i in self._reference for i in range(start, stop))
        if not known:
            wanted.append(self.model.original)
        final = self._final_states(wanted, chosen)
        if not known:
            for batch, hidden in zip(chosen, final.pop(), strict=True):
                self._reference.update(zip(batch, hidden, strict=True))
        self._last = wanted[len(candidates) - 1], [h for batch in final[-1] for h in batch]
        rows: list[list[Row]] = [[] for _ in candidates]
        for span in self._spans(start, stop, len(candidates) + 1):
            self._compare(span, start, wanted[: len(rows)], final, rows)
        return [losses_of(of_candidate) for of_candidate in rows]

    @torch.no_grad()
    def candidate_logits(self, index: int) -> npt.NDArray[np.float32]:
        """Returns logits `(tokens, vocabulary)` of the last candidate of a pass, on a document."""
        candidate, states = self._last
        logits = self.model.logits(states[index], candidate)
        values: npt.NDArray[np.float32] = logits.cpu().numpy()
        return values

    @torch.no_grad()
    def score_logits(self, index: int, logits: npt.NDArray[np.float32]) -> Row:
        """Compares a runtime's logits `(tokens, vocabulary)` of a document of the last pass."""
        states = self._reference[index]
        p_log = torch.log_softmax(self.model.logits(states, self.model.original), -1)
        candidate = torch.from_numpy(logits).to(p_log.device)
        return compare(p_log, p_log.argmax(-1), candidate, self.documents[index].ids)

    def _final_states(
        self, wanted: Sequence[Candidate], chosen: list[list[int]]
    ) -> list[list[torch.Tensor]]:
        """The last layer's output by batch, for every one of `wanted`."""
        states = self._split(None, [States(wanted[0], list(range(len(wanted))), [])], wanted)
        for state in states:
            state.hidden = self.model.embed(
                [[self.documents[i] for i in batch] for batch in chosen], state.candidate
            )
        self.model.weights.forget()
        layers = range(self.model.inventory.n_layers)
        for layer in stepping(layers, "scoring", unit="layers", brief=True):
            states = self._split(layer, states, wanted)
            self.model.run(layer, states)
        final: list[list[torch.Tensor]] = [[] for _ in wanted]
        for state in states:
            for member in state.members:
                final[member] = state.hidden
        return final

    def _split(
        self, layer: int | None, states: Sequence[States], wanted: Sequence[Candidate]
    ) -> list[States]:
        """Computations that are still the same through a layer stay together."""
        parted = []
        for state in states:
            members: dict[Any, list[int]] = {}
            for i in state.members:
                members.setdefault(self.model.decisions.of(layer, wanted[i]), []).append(i)
            parted += [States(wanted[m[0]], m, list(state.hidden)) for m in members.values()]
        return parted

    def _spans(self, start: int, stop: int, n: int) -> Iterator[range]:
        """Documents of which `n` distributions fit in memory at once; at least one."""
        vocabulary = self.model.inventory.dimensions.vocabulary
        most = max(1, self._logits_bytes // (4 * n * vocabulary))
        first = start
        while first < stop:
            last, n_tokens = first + 1, len(self.documents[first].ids)
            while last < stop and n_tokens + len(self.documents[last].ids) <= most:
                n_tokens += len(self.documents[last].ids)
                last += 1
            yield range(first, last)
            first = last

    def _compare(
        self,
        span: range,
        start: int,
        candidates: Sequence[Candidate],
        final: Sequence[Sequence[torch.Tensor]],
        rows: list[list[Row]],
    ) -> None:
        """Appends the rows of some documents."""
        lengths = [len(self.documents[i].ids) for i in span]
        asked = [(self.model.original, torch.cat([self._reference[i] for i in span]))]
        for candidate, hidden in zip(candidates, final, strict=True):
            flat = [states for batch in hidden for states in batch]
            asked.append((candidate, torch.cat([flat[i - start] for i in span])))
        reference, *others = self.model.all_logits(asked)
        original = torch.split(torch.log_softmax(reference, -1), lengths)
        tops = [log_probs.argmax(-1) for log_probs in original]
        for logits, document_rows in zip(others, rows, strict=True):
            document_rows += [
                compare(p_log, top1, q, self.documents[i].ids)
                for p_log, top1, q, i in zip(
                    original, tops, torch.split(logits, lengths), span, strict=True
                )
            ]


AnyScorer = Scorer | StreamedScorer
"""With the model in memory, or layer by layer."""
