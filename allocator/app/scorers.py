"""The models that a study scores its allocations with, and the documents of each.

In: a study's calibration, its profiler and its encodings. Out: a scorer per stage, in memory or
layer by layer. Invariant: an allocation record is scored with weights encoded under the importance
that the record names, so its loss comes out again, bit for bit.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from allocator.app.calibration import Calibration
from allocator.app.importance import StudyEncodings
from allocator.app.study_file import StreamedSpec
from allocator.codecs.encodings import Encodings
from allocator.profiling.profiler import Profiler
from allocator.profiling.statistics import importance_digest
from allocator.scoring.candidates import Weights
from allocator.scoring.documents import Document
from allocator.scoring.scorer import Scorer
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import AnyScorer, StreamedScorer
from allocator.scoring.swap_model import SwapModel
from allocator.targets import Layout


class StudyScorers:
    """Makes the scorers of one study; those of a stage are made once.

    Args:
        calibration: whose documents are scored.
        encodings: by importance.
        profiler: opens the study's profiler, whose model the study's own encodings are scored in.
        layout: of the checkpoint.
        streamed: how the checkpoint is read where it does not fit in memory.
        torch_device: where forward passes run.
        threads: batches that run at once.
        progress: shows bars over documents.
    """

    def __init__(
        self,
        calibration: Calibration,
        encodings: StudyEncodings,
        profiler: Callable[[], Profiler],
        layout: Layout,
        *,
        streamed: StreamedSpec | None,
        torch_device: str,
        threads: int,
        progress: bool,
    ) -> None:
        self._calibration = calibration
        self._encodings = encodings
        self._profiler = profiler
        self._layout = layout
        self._streamed = streamed
        self._torch_device = torch_device
        self._threads = threads
        self._progress = progress
        self._models: dict[str, SwapModel | StreamedModel] = {}  # by importance

    @cached_property
    def trials(self) -> AnyScorer:
        """Scores trials, on search documents."""
        return self.on(self._calibration.trial_documents)

    @cached_property
    def gradients(self) -> Scorer:
        """Has the documents that gradients are taken on; its model is the trials' own."""
        model = self.model
        assert isinstance(model, SwapModel)  # a gradient step needs the model in memory
        documents = self._calibration.gradient_documents
        # each gradient step takes other documents: a cache of distributions would gain nothing
        return Scorer(model, documents, cache_bytes=0, threads=self._threads)

    @cached_property
    def selection(self) -> AnyScorer:
        """Scores finalists, on selection documents."""
        return self.on(self._calibration.selection_documents, progress="selection")

    @property
    def model(self) -> SwapModel | StreamedModel:
        """The model that the study's own encodings are scored in."""
        return self._profiler().model

    def model_with(self, encodings: Encodings) -> SwapModel | StreamedModel:
        """Makes a model of its own for other encoded weights."""
        if self._streamed is None:
            return SwapModel(self._layout, encodings.decoded, device=self._torch_device)
        weights = Weights(self._layout, lambda: encodings)
        return StreamedModel(self._layout, weights, device=self._torch_device)

    def on(
        self,
        documents: Sequence[Document],
        *,
        model: SwapModel | StreamedModel | None = None,
        progress: str | None = None,
    ) -> AnyScorer:
        """Makes a scorer of these documents.

        Args:
            documents: what is scored.
            model: the study's own by default.
            progress: text of a bar over documents, where progress is shown.
        """
        model = model or self.model
        if isinstance(model, StreamedModel):
            assert self._streamed is not None
            return StreamedScorer(model, documents, side_by_side=self._streamed.candidates)
        shown = progress if self._progress else None
        return Scorer(model, documents, threads=self._threads, progress=shown)

    def encoded_with(
        self, importance: str | None, documents: Sequence[Document], *, beside: Path | None = None
    ) -> AnyScorer:
        """Makes a scorer of weights that are encoded with some importance vectors.

        Vectors other than the study's own get a model of their own.

        Args:
            importance: digest of the vectors; None for the study's own.
            documents: what is scored.
            beside: an allocation file, whose folder may hold the vectors too.

        Raises:
            CheckpointError: if neither a committed file nor the study's calibration gives them.
        """
        own = importance_digest(self._profiler().statistics.importance)
        if importance is None or importance == own:
            return self.on(documents)
        if importance not in self._models:
            encodings = self._encodings.of(importance, beside=beside)
            self._models[importance] = self.model_with(encodings)
        return self.on(documents, model=self._models[importance])
