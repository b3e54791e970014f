"""The finishing stage: from an allocation's plain weights to a file of finished ones.

In: the plain weights, calibration documents, a model of the original, a recipe. Out: an artifact
(`artifact`) with the losses before and after. The codes of every group are chosen anew against the
second moments of its inputs, group by group; then norms, routers and block scales are tuned end to
end; then both are scored. Invariants: no tensor changes its format or size; the loss on the
selection documents is never above the one before; a run that was killed resumes, and ends in the
same bytes as one that was not; of two processes with the same inputs one works, the other waits.

Folder of a run, named by the digest of its inputs: `codes-*`, one file per group or part of one,
written whole; `before.json`, the losses before; the state of tuning; `result.json`. Codes lie in a
folder of their own inputs, so that runs with other settings of tuning share them.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import torch

from allocator.checkpoint.tensors import Floats, floats_of, read_tensor
from allocator.codecs import Bytes, codec_of, identity_of
from allocator.codecs.blocks import BlockFormat
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import Finishing, finished_name
from allocator.errors import CheckpointError
from allocator.export.stored import StoredTensor
from allocator.export.tensors import TensorSource
from allocator.files.atomic import locked
from allocator.files.checksums import load_arrays, read_checked, save_arrays, write_checked
from allocator.files.progress import step, waiting
from allocator.finishing.artifact import Artifact, Description, read_artifact, write_artifact
from allocator.finishing.codes import choose, with_gain
from allocator.finishing.recipe import CODES, Recipe, inputs_digest
from allocator.finishing.streamed_tuning import tune_streamed
from allocator.finishing.tensors import FinishedTensors
from allocator.finishing.tuning import TuningSettings, tune
from allocator.formats import Format
from allocator.profiling.second_moments import (
    Smoothing,
    second_moments,
    second_moments_streamed,
)
from allocator.scoring.candidates import Candidate
from allocator.scoring.documents import Document, digest
from allocator.scoring.scorer import Scorer, mean
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import AnyScorer
from allocator.scoring.swap_model import SwapModel, device_of
from allocator.targets import Group, Layout
from allocator.targets.group_weights import group_weights
from allocator.targets.layout import part_names

BEFORE, RESULT = "before.json", "result.json"
_WEIGHTS = 1 << 27
"""Weights of a projection's experts that are in memory at once, in float32; one expert at least."""
_RECENT = 6
"""Parts whose codes are in memory: a layer's projections in two formats each, expert by expert."""
_SEARCH, _SELECTION = "search", "selection"


@dataclass(frozen=True)
class FinishDocuments:
    """What weights are finished on.

    Attributes:
        search: for second moments and tuning steps.
        scored: of these, those that trials are scored on.
        selection: for the checks of tuning, and for what is accepted.
    """

    search: Sequence[Document]
    scored: Sequence[Document]
    selection: Sequence[Document]

    @property
    def digest(self) -> str:
        """Names them."""
        return " ".join(digest(part) for part in (self.search, self.scored, self.selection))


def first_tokens(documents: Sequence[Document], n_tokens: int) -> list[Document]:
    """Returns the first documents with at most so many tokens in all, one at least."""
    chosen: list[Document] = []
    for document in documents:
        n_tokens -= len(document.ids)
        if chosen and n_tokens < 0:
            break
        chosen.append(document)
    return chosen


class _Result(msgspec.Struct, forbid_unknown_fields=True):
    """`result.json`."""

    weights: str


class _Before(msgspec.Struct, forbid_unknown_fields=True):
    """`before.json`: proxy loss per split of the plain weights, nats per token."""

    losses: dict[str, float]


@dataclass(frozen=True)
class Part:
    """A group, or one of its parts, whose codes can be chosen anew.

    Attributes:
        group: the group.
        number: which of its parts.
        name: of the part.
        fmt: of the part.
        experts: that the part stores; `()` where the group has none.
        block_format: of the format.
    """

    group: Group
    number: int
    name: str
    fmt: Format
    experts: tuple[int, ...]
    block_format: BlockFormat

    @property
    def n_weights(self) -> int:
        """Weights that it stores."""
        rows = self.group.shape_with(len(self.experts)) if self.experts else self.group.shape
        return int(np.prod(rows))


def original_with(allocation: Allocation, layout: Layout) -> Candidate:
    """Returns the original with an allocation's retained experts, which moments are measured in."""
    return replace(
        Candidate.original(layout),
        retained_experts=allocation.retained_experts,
        experts_used=allocation.experts_used,
    )


def parts_of(source: TensorSource) -> list[Part]:
    """Lists the parts of an allocation whose codes can be chosen anew, in file order."""
    parts = []
    for name, group in source.layout.groups.items():
        stored = source.allocation.parts(source.layout, name)
        names = part_names(name, stored)
        for number, (fmt, experts) in enumerate(stored):
            block_format = codec_of(fmt).block_format(fmt)
            if block_format is not None:
                parts.append(Part(group, number, names[number], fmt, experts, block_format))
    return parts


class Finisher:
    """Finishes the weights of one allocation, see the module.

    Args:
        plain: the allocation's weights as its codecs encode them.
        importance: digest of the importance vectors that they are encoded with.
        recipe: how.
        documents: what on.
        scorer: makes a scorer of documents, whose model encodes as `plain` does; called when
            something needs to be computed.
        folder: of the cache, for what a resumed run takes up, and for the artifact.
        progress: shows bars.
        until: `time.monotonic()` at which tuning stops; None for no limit.
    """

    def __init__(
        self,
        plain: TensorSource,
        importance: str,
        recipe: Recipe,
        documents: FinishDocuments,
        scorer: Callable[[Sequence[Document]], AnyScorer],
        folder: Path,
        *,
        progress: bool = False,
        until: float | None = None,
    ) -> None:
        recipe.check()
        self.plain = plain
        self.importance = importance
        self.recipe = recipe
        self.documents = documents
        self.folder = folder
        self.scorer = scorer
        self.progress = progress
        self._until = until

    @cached_property
    def codec(self) -> str:
        """The identity of what encodes the plain weights."""
        return identity_of(self.plain.allocation.stored_formats)

    def inputs(self, recipe: Recipe) -> str:
        """Returns the digest of everything that a recipe's weights depend on."""
        return inputs_digest(
            recipe,
            allocation=self.plain.allocation.digest,
            checkpoint=self.plain.layout.inventory.digest,
            importance=self.importance,
            codec=self.codec,
            documents=self.documents.digest,
        )

    @cached_property
    def model(self) -> SwapModel | StreamedModel:
        """The model that candidates are put into."""
        scorer = self._scorers[_SELECTION]
        return scorer.swap if isinstance(scorer, Scorer) else scorer.model

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        model = self.model
        return device_of(model.model) if isinstance(model, SwapModel) else model.device

    @property
    def threads(self) -> int:
        """Passes of the model that run at once."""
        scorer = self._scorers[_SELECTION]
        return scorer.threads if isinstance(scorer, Scorer) else 1

    def known(self) -> Artifact | None:
        """Returns what an earlier run with the same inputs gave; None if there is nothing."""
        run = self._run_folder(self.recipe)
        result = read_checked(run / RESULT, _Result, run.name)
        if result is None:
            return None
        path = self.folder / finished_name(result.weights)
        try:
            return read_artifact(path, result.weights)
        except CheckpointError:
            return None

    def finish(self) -> Artifact:
        """Finishes the weights, or reads what an earlier run gave.

        Raises:
            AllocatorError: if memory or disk do not suffice, or the checkpoint changed.
        """
        run = self._run_folder(self.recipe)
        run.mkdir(parents=True, exist_ok=True)
        with locked(run / "running"):
            known = self.known()
            if known is not None:
                return known
            artifact = self._finish(run)
            recipe = Recipe.of(artifact.description.finishing.recipe, str(artifact.path))
            done = self._run_folder(recipe)
            done.mkdir(exist_ok=True)
            write_checked(done / RESULT, _Result(artifact.weights), done.name)
        return artifact

    def _run_folder(self, recipe: Recipe) -> Path:
        return self.folder / self.inputs(recipe)[:32]

    def _before(self, run: Path) -> dict[str, float]:
        """Proxy loss per split of the plain weights; a resumed run reads them."""
        known = read_checked(run / BEFORE, _Before, run.name)
        if known is None:
            known = _Before(
                {split: self._loss(split, self.plain.allocation) for split in self._scorers}
            )
            write_checked(run / BEFORE, known, run.name)
        return known.losses

    def _finish(self, run: Path) -> Artifact:
        changed, recipe = _PLAIN, self.recipe
        before = self._before(run)
        least = before[_SELECTION]
        for stage in (self._chosen, self._tuned):
            attempt, recipe = stage(changed, recipe, run)
            if attempt is changed:
                continue
            loss = self._loss(_SELECTION, FinishedTensors(self.plain, attempt).candidate)
            if loss <= least:
                changed, least = attempt, loss
        after = before
        if changed is not _PLAIN:
            candidate = FinishedTensors(self.plain, changed).candidate
            after = {_SEARCH: self._loss(_SEARCH, candidate), _SELECTION: least}
        description = Description(
            allocation=self.plain.allocation.digest,
            checkpoint=self.plain.layout.inventory.digest,
            importance=self.importance,
            codec=self.codec,
            finishing=Finishing(recipe.to_json(), self.inputs(recipe), before, after),
            tensors={},
        )
        self.plain.layout.inventory.check_unchanged()
        numbers = {
            part: (name, number)
            for name in self.plain.layout.groups
            for number, part in enumerate(self._names(name))
        }
        return write_artifact(
            self.folder, description, changed.codes_of, changed.values_of,
            plain=lambda part: self.plain.encoded(*numbers[part]),
        )  # fmt: skip

    def _names(self, group: str) -> tuple[str, ...]:
        return part_names(group, self.plain.allocation.parts(self.plain.layout, group))

    @cached_property
    def _scorers(self) -> dict[str, AnyScorer]:
        parts = {_SEARCH: self.documents.scored, _SELECTION: self.documents.selection}
        return {split: self.scorer(documents) for split, documents in parts.items()}

    def _loss(self, split: str, candidate: Allocation | Candidate) -> float:
        """Proxy loss on a split, nats per token."""
        scorer = self._scorers[split]
        with waiting(f"loss on the {split} split"):
            return mean(scorer.score(candidate).kl, scorer.documents)

    # -- codes

    def _chosen(self, changed: "_Changed", recipe: Recipe, run: Path) -> tuple["_Changed", Recipe]:
        """Chooses the codes of every part, or reads those that an earlier run has chosen."""
        if CODES not in recipe.parts:
            return changed, recipe
        folder = self._run_folder(recipe.codes_alone)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "choosing"):
            codes = self._codes(folder)
        named = inputs_digest(recipe.codes_alone, inputs=folder.name)
        return (_Changed(codes, {}, named) if codes else changed), recipe

    def missing(self) -> list[Part]:
        """Lists the parts whose codes no earlier run has chosen."""
        if CODES not in self.recipe.parts:
            return []
        folder = self._run_folder(self.recipe.codes_alone)
        return [p for p in parts_of(self.plain) if not _codes_path(folder, p).exists()]

    def _codes(self, folder: Path) -> "_ChosenCodes":
        """Chooses the codes that the folder lacks; returns those that differ from the codec's."""
        missing: dict[str, list[Part]] = {}
        known: dict[str, bool] = {}  # whether its codes differ
        parts = parts_of(self.plain)
        for part in parts:
            arrays = load_arrays(_codes_path(folder, part), folder.name)
            if arrays is None:
                missing.setdefault(part.group.name, []).append(part)
            else:
                known[part.name] = self._differs(part, arrays["data"])
        with step(
            "codes",
            sum(p.n_weights for p in parts),
            initial=sum(p.n_weights for p in parts if p.name in known),
            unit="weights",
            shown=self.progress,
        ) as bar:
            for part, data in self._choose(missing, folder):
                known[part.name] = self._differs(part, data)
                save_arrays(_codes_path(folder, part), {"data": data}, folder.name)
                bar.update(part.n_weights)
        return _ChosenCodes({p.name: _codes_path(folder, p) for p in parts if known[p.name]})

    def _differs(self, part: Part, data: Bytes) -> bool:
        return not np.array_equal(data, self.plain.encoded(part.group.name, part.number))

    def _choose(
        self, missing: Mapping[str, list[Part]], folder: Path
    ) -> Iterator[tuple[Part, Bytes]]:
        """Yields the codes of parts, group by group, as second moments come."""
        if not missing:
            return
        retained_experts = self.plain.allocation.retained_experts
        encoded: dict[str, Bytes] = {}  # of groups whose experts have not all come
        for group, places, moments in self._moments(missing, folder):
            retained = group.experts(retained_experts)
            experts = [retained[place] for place in places]
            if not places or places[0] == 0:
                for part in missing[group.name]:
                    encoded[part.name] = np.array(self.plain.encoded(group.name, part.number))
            for part in missing[group.name]:
                data = encoded[part.name]
                if not group.role.is_expert:
                    own = group_weights(self.plain.layout, group)
                    data[...] = self._chosen_codes(part, own, data, moments)
                    del own
                    continue
                mine = [i for i, expert in enumerate(experts) if expert in part.experts]
                n_at_once = max(1, _WEIGHTS // int(np.prod(group.shape[1:])))
                for first in range(0, len(mine), n_at_once):
                    some = mine[first : first + n_at_once]
                    rows = [part.experts.index(experts[i]) for i in some]
                    own = self._experts(group, [experts[i] for i in some])
                    h = moments[torch.tensor(some).to(moments.device)]
                    data[rows] = self._chosen_codes(part, own, data[rows], h)
                    del own, h  # not in memory beside the next ones
            if not places or places[-1] == len(retained) - 1:
                for part in missing[group.name]:
                    yield part, encoded.pop(part.name)
            del moments

    def _experts(self, group: Group, experts: Sequence[int]) -> Floats:
        """Weights of some experts, `(experts, out, in)`."""
        inventory = self.plain.layout.inventory
        weights = np.empty((len(experts), *group.shape[1:]), np.float32)
        for place, expert in enumerate(experts):
            weights[place] = read_tensor(inventory, group.sources[expert])
        return weights

    def _moments(
        self, missing: Mapping[str, list[Part]], folder: Path
    ) -> Iterator[tuple[Group, tuple[int, ...], torch.Tensor]]:
        """Yields second moments of groups; of a routed projection, of retained experts by place."""
        layout, allocation, recipe = self.plain.layout, self.plain.allocation, self.recipe
        candidate = original_with(allocation, layout)
        documents = first_tokens(self.documents.search, recipe.moments_tokens)
        groups = [layout.groups[name] for name in missing]
        smoothing = Smoothing(recipe.shrink_tokens, recipe.damping)
        if isinstance(self.model, StreamedModel):
            yield from second_moments_streamed(
                self.model, documents, groups, candidate,
                smoothing=smoothing, scratch=folder, of=folder.name, progress=self.progress,
            )  # fmt: skip
            return
        self.model.put(candidate)
        measured = second_moments(
            self.model, documents, groups,
            fisher=recipe.fisher, smoothing=smoothing, seed=recipe.seed,
            threads=self.threads, progress=self.progress,
        )  # fmt: skip
        for group, moments in measured:
            yield group, tuple(range(len(group.experts(allocation.retained_experts)))), moments

    def _chosen_codes(
        self, part: Part, weights: Floats, encoded: Bytes, moments: torch.Tensor
    ) -> Bytes:
        apart = weights.ndim == 3
        values, data = (torch.from_numpy(x).to(moments.device) for x in (weights, encoded))
        matrices = values if apart else values[None]
        h, form = moments if apart else moments[None], part.block_format
        with torch.inference_mode():
            chosen = choose(
                matrices, data if apart else data[None], form, h, rounds=self.recipe.rounds
            )
            scaled = with_gain(matrices, chosen.data, form, h, self.recipe.gain)
        finished: Bytes = scaled.reshape(data.shape).cpu().numpy()
        return finished

    # -- tuning

    def _tuned(self, changed: "_Changed", recipe: Recipe, run: Path) -> tuple["_Changed", Recipe]:
        """Tunes norms, routers and scales; the recipe says after which step a time limit struck."""
        if not recipe.tunes:
            return changed, recipe
        settings = TuningSettings(
            tokens=recipe.tuning_tokens,
            rate=recipe.rate,
            kinds=tuple(kind for kind in recipe.parts if kind != CODES),
            seed=recipe.seed,
        )
        selection, source = self._scorers[_SELECTION], FinishedTensors(self.plain, changed)
        if isinstance(selection, Scorer):
            tuned = tune(
                source, self.documents.search, selection, settings,
                folder=run, progress=self.progress, stop=self._stops,
            )  # fmt: skip
        else:
            tuned = tune_streamed(
                source, self.documents.search, selection, settings,
                folder=run, of=run.name, progress=self.progress, stop=self._stops,
            )  # fmt: skip
        if tuned.stopped is not None:
            recipe = msgspec.structs.replace(recipe, stopped_steps=tuned.stopped)
        codes = _TunedCodes(
            tuned.tensors,
            [
                part
                for name in self.plain.layout.groups
                for number, part in enumerate(self._names(name))
                if not np.array_equal(tuned.tensors[part].data, self.plain.encoded(name, number))
            ],
        )
        return _Changed(codes, self._values(tuned.tensors), tuned.digest), recipe

    def _stops(self, steps: int) -> bool:
        limit = self.recipe.stopped_steps
        if limit is not None:
            return steps >= limit
        return self._until is not None and time.monotonic() > self._until

    def _values(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Floats]:
        """Norms and routers that tuning changed, by tensor, exact in the checkpoint's dtype."""
        values = {}
        for tensor in self.plain.layout.full_precision:
            stored, before = tensors[tensor.source], self.plain.full_precision(tensor)
            assert stored.format is not None, tensor.source
            raw = np.ascontiguousarray(stored.data).reshape(-1).view(np.uint8)
            values_now = floats_of(raw, stored.format).reshape(before.shape)
            if not np.array_equal(values_now, before):
                values[tensor.source] = values_now
        return values


class _ChosenCodes(Mapping[str, Bytes]):
    """Codes by part, `(..., rows, bytes per row)`, on disk; in memory are those used last.

    Args:
        paths: of the files, by part, in one folder.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths
        self._recent: OrderedDict[str, Bytes] = OrderedDict()

    def __getitem__(self, name: str) -> Bytes:
        path = self._paths[name]
        if name not in self._recent:
            arrays = load_arrays(path, path.parent.name)
            if arrays is None:
                raise CheckpointError(f"{path}: damaged or removed meanwhile; finish again")
            data = arrays["data"]
            data.flags.writeable = False
            self._recent[name] = data
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(name)
        return self._recent[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class _TunedCodes(Mapping[str, Bytes]):
    """Codes by part, `(..., rows, bytes per row)`, as tuning has left them.

    Args:
        tensors: all of the file.
        names: of the parts whose codes are others than the codec's.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], names: Sequence[str]) -> None:
        self._tensors, self._names = tensors, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Bytes:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name].data

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class _Changed:
    """Finished bytes and values in memory, see `Changes`.

    Attributes:
        codes_of: bytes by part, `(..., rows, bytes per row)`.
        values_of: by tensor, `(width,)` or `(retained, hidden)`, float32.
        weights: names them within this process.
    """

    codes_of: Mapping[str, Bytes]
    values_of: Mapping[str, Floats]
    weights: str

    def codes(self, name: str, plain: Callable[[], Bytes]) -> Bytes | None:
        """Returns bytes of a part, `(..., rows, bytes per row)`; None if they are the codec's."""
        return self.codes_of.get(name)

    def values(self, source: str) -> Floats | None:
        """Returns a norm, `(width,)`, or a router's rows; None if they are the checkpoint's."""
        return self.values_of.get(source)

    def holds(self, name: str, stored: Bytes) -> bool | None:
        """Tells whether stored bytes are a part's; None if these are the codec's."""
        known = self.codes_of.get(name)
        return None if known is None else known.tobytes() == stored.tobytes()


_PLAIN = _Changed({}, {}, "plain")


def _codes_path(folder: Path, part: Part) -> Path:
    return folder / f"codes-{part.name}.safetensors"
