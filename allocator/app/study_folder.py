"""A study folder, opened: every stage's inputs, each made when it is first needed.

In: a folder with `study.toml`. Out: inventory, layout, splits, profile, space, surrogate, scorers.
Invariant: the three splits are disjoint; what a study computes depends on its files alone, and the
cache (profiles, bank) only saves time.
"""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from allocator.app.study_file import DeviceBudgetSpec, StudySpec, chosen_budget
from allocator.checkpoint.inventory import Inventory, read_inventory
from allocator.checkpoint.tensors import Floats
from allocator.checkpoint.tokenizer import carried_files, read_tokenizer
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.decision.baselines import baselines, mixed
from allocator.decision.budget import Budget
from allocator.decision.records import importance_name, read_allocation
from allocator.decision.search_space import SearchSpace, bind
from allocator.decision.space import Space
from allocator.errors import (
    AllocatorError,
    CalibrationError,
    CheckpointError,
    SpaceError,
    StudyError,
    first_line,
)
from allocator.export.gguf.files import parse_tensor_type_file
from allocator.formats import fallback
from allocator.prediction.profile import Profile
from allocator.prediction.surrogate import Surrogate, from_profile
from allocator.profiling.profiler import ProfileInputs, Profiler, importance_digest
from allocator.profiling.streamed_profiler import StreamedProfiler
from allocator.samplers import check_sampler, make_sampler
from allocator.scoring import documents as calibration
from allocator.scoring.candidates import Weights
from allocator.scoring.documents import Document
from allocator.scoring.scorer import Scorer
from allocator.scoring.streamed import AnyScorer, StreamedModel, StreamedScorer
from allocator.scoring.swap_model import SwapModel, check_device
from allocator.study.search import open_study
from allocator.study.storages import open_storage
from allocator.targets import GGUF, Layout, target_named
from allocator.targets.gguf.tokenizer import check_tokenizer
from allocator.units import parse_bytes


def default_cache() -> Path:
    """`$ALLOCATOR_CACHE`, else `~/.cache/moe-allocator`."""
    return Path(os.environ.get("ALLOCATOR_CACHE") or Path.home() / ".cache" / "moe-allocator")


def encodings_cap() -> int | None:
    """Bytes of `$ALLOCATOR_BANK_CAP`; None where it is not set.

    Raises:
        AllocatorError: if it is no size.
    """
    text = os.environ.get("ALLOCATOR_BANK_CAP")
    try:
        return parse_bytes(text) if text else None
    except AllocatorError as error:
        raise AllocatorError(f"$ALLOCATOR_BANK_CAP: {error}") from None


class StudyFolder:
    """See the module.

    Args:
        folder: of the study.
        cache: where profiles and encoded weights are kept between studies.
        threads: for torch and for encoding; all cores by default.
        progress: shows bars for whatever takes longer than two seconds.
        target: instead of study.toml's.
        torch_device: where forward passes run, e.g. `cuda`; encoding is for the cores anyway.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        cache: Path | None = None,
        threads: int | None = None,
        progress: bool = False,
        target: str | None = None,
        torch_device: str = "cpu",
    ) -> None:
        self.path = Path(folder)
        if not self.path.is_dir():
            raise StudyError(f"{folder}: no such study folder; needed one with a study.toml")
        self.spec = StudySpec.read(self.path)
        self.target = target or self.spec.target
        self.cache = _checked_cache(cache or default_cache())
        self.encodings_cap = encodings_cap()
        self.threads = threads or len(os.sched_getaffinity(0))
        self.progress = progress
        self.torch_device = torch_device
        self._models: dict[str, SwapModel | StreamedModel] = {}  # by importance
        if torch_device != "cpu":
            check_device(torch_device)

    # -- what is given

    @cached_property
    def inventory(self) -> Inventory:
        """The checkpoint."""
        found = read_inventory(self.path / self.spec.checkpoint, digests=self.cache / "digests")
        return replace(found, without_tokenizer=self.spec.tokenizer == "none")

    @cached_property
    def layout(self) -> Layout:
        """The target bound to the checkpoint, whose tokenizer it can express."""
        layout = target_named(self.target).layout(self.inventory)
        if self.target == GGUF.name:
            check_tokenizer(self.inventory)
        return layout

    @cached_property
    def search_space(self) -> SearchSpace:
        """The search-space file; everything is offered where study.toml names none."""
        if not self.spec.space:
            return SearchSpace(schema=1)
        return SearchSpace.read(self.path / self.spec.space)

    def budget(
        self,
        *,
        file: str | None = None,
        weights: str | None = None,
        device: DeviceBudgetSpec | None = None,
    ) -> Budget:
        """The budget of a launch, checked against the floor."""
        budget = chosen_budget(
            self.spec.budget, self.path, file=file, weights=weights, device=device
        )
        self.unranked_space.check_budget(budget)
        return budget

    # -- calibration

    @cached_property
    def splits(self) -> tuple[list[Document], list[Document]]:
        """Search and selection documents, interleaved over domains."""
        spec = self.spec.calibration
        found = self.read_documents(self.path / spec.documents)
        if spec.splits is None:
            parts = calibration.every_third(found)
        else:
            indices = _read_splits(self.path / spec.splits, len(found))
            parts = [found[i] for i in indices[0]], [found[i] for i in indices[1]]
        search, selection = map(calibration.interleaved, parts)
        if not search or not selection:
            raise CalibrationError(
                f"{self.path / spec.documents}: {len(found)} documents leave {len(search)} for "
                f"search and {len(selection)} for selection; add documents, or name a splits file"
            )
        if {d.ids for d in search} & {d.ids for d in selection}:
            raise CalibrationError(
                f"{self.path / spec.documents}: search and selection share a document; "
                "splits must be disjoint"
            )
        for key, n, split in (
            ("statistics_documents", spec.statistics_documents, search),
            ("search_documents", spec.search_documents, search),
            ("measured_documents", spec.measured_documents, search),
            ("curvature_documents", spec.curvature_documents, search),
            ("selection_documents", spec.selection_documents, selection),
        ):
            if n is not None and n > len(split):
                raise CalibrationError(
                    f"{self.path}/study.toml: {key} = {n}, the split has {len(split)}"
                )
        return search, selection

    @cached_property
    def report(self) -> list[Document]:
        """Held-out documents, disjoint from both other splits, interleaved over domains."""
        if self.spec.calibration.report is None:
            raise CalibrationError(f"{self.path}/study.toml: no report under [calibration]; add it")
        path = self.path / self.spec.calibration.report
        found = calibration.interleaved(self.read_documents(path))
        used = {d.ids for split in self.splits for d in split}
        if any(d.ids in used for d in found):
            raise CalibrationError(f"{path}: shares a document with search or selection")
        return found

    def read_documents(self, path: Path) -> list[Document]:
        """Documents of a file with `ids`, or windows of a file with `text`."""
        first = next(calibration.read_records(path), None)
        if first is None:
            raise CalibrationError(f"{path}: no documents")
        if "ids" in first:
            return calibration.read_documents(
                path, vocab_size=int(self.inventory.config["vocab_size"])
            )
        tokenizer = read_tokenizer(self.inventory)
        if tokenizer is None:
            raise CalibrationError(
                f"{path}: holds text, and {self.inventory.path} no tokenizer; give records with "
                "ids, or put its tokenizer.json there"
            )
        return calibration.read_windows(path, tokenizer, window=self.spec.calibration.window)

    # -- profile

    @property
    def n_measured(self) -> int:
        """Documents behind each measured sensitivity."""
        return self.spec.calibration.measured_documents or min(8, len(self.splits[0]))

    @property
    def n_curvature(self) -> int:
        """Documents behind the curvature, of the original and of the incumbents."""
        return self.spec.calibration.curvature_documents or min(16, len(self.splits[0]))

    @cached_property
    def profiler(self) -> Profiler:
        """Builds or continues this study's profile."""
        _use_threads(self.threads)
        streamed = self.spec.streamed
        inputs = ProfileInputs(
            layout=self.layout,
            documents=tuple(self.splits[0][: self.spec.calibration.statistics_documents]),
            n_measured=self.n_measured,
            n_curvature=self.n_curvature,
            saliency=self.search_space.experts.saliency,
            sampled_rows=None if streamed is None else streamed.rows,
        )
        make = Profiler if streamed is None else StreamedProfiler
        return make(
            inputs,
            self.cache,
            threads=self.threads,
            progress=self.progress,
            encodings_cap=self.encodings_cap,
            torch_device=self.torch_device,
        )

    @cached_property
    def profile(self) -> Profile:
        """The measured profile."""
        return self.profiler.profile()

    @cached_property
    def unranked_space(self) -> Space:
        """The space for pricing, before any profile exists."""
        return bind(self.search_space, self.layout, None)

    @cached_property
    def space(self) -> Space:
        """The space, with the profile's ranking of experts."""
        return self.profiler.space(self.search_space)

    @cached_property
    def surrogate(self) -> Surrogate:
        """Predicted losses."""
        return from_profile(self.profile, self.space, self.profiler.settings(self.space))

    def encodings_for(self, importance: str, *, beside: Path | None = None) -> Encodings:
        """The encodings of the importance vectors with this digest.

        Args:
            importance: digest.
            beside: an allocation file; the vectors may be in its folder too.

        Raises:
            CheckpointError: if neither a committed file nor the study's calibration gives them.
        """
        path = self.importance_path(importance)
        if beside is not None and not path.is_file():
            path = beside.parent / path.name
        if path.is_file():
            vectors = _read_importance(path)
            if importance_digest(vectors) != importance:
                raise CheckpointError(
                    f"{path}: not the importance it is named for; restore the file"
                )
            _use_threads(self.threads)
            return Encodings(
                self.cache / "bank",
                self.layout,
                vectors,
                threads=self.threads,
                cap_bytes=self.encodings_cap,
            )
        if importance_digest(self.profiler.statistics.importance) != importance:
            raise CheckpointError(
                f"importance {importance[:12]} is neither in {path} nor what this study's "
                "calibration gives here; restore the file"
            )
        return self.profiler.encodings

    def importance_path(self, digest: str) -> Path:
        """Where a study commits the importance vectors of its allocations."""
        return self.path / "allocations" / importance_name(digest)

    # -- scoring

    @cached_property
    def model(self) -> SwapModel | StreamedModel:
        """What candidates are scored in."""
        profiler = self.profiler
        return profiler.streamed if isinstance(profiler, StreamedProfiler) else profiler.swap

    def model_with(self, encodings: Encodings) -> SwapModel | StreamedModel:
        """The same with other encoded weights."""
        if self.spec.streamed is None:
            return SwapModel(self.layout, encodings.decoded, device=self.torch_device)
        weights = Weights(self.layout, lambda: encodings)
        return StreamedModel(self.layout, weights, device=self.torch_device)

    def scorer_on(
        self,
        documents: Sequence[Document],
        *,
        model: SwapModel | StreamedModel | None = None,
        progress: str | None = None,
    ) -> AnyScorer:
        """Scores on these documents.

        Args:
            documents: what is scored.
            model: this study's by default.
            progress: text of a bar over documents, where progress is shown.
        """
        model = model or self.model
        if isinstance(model, StreamedModel):
            assert self.spec.streamed is not None
            return StreamedScorer(model, documents, side_by_side=self.spec.streamed.candidates)
        shown = progress if self.progress else None
        return Scorer(model, documents, threads=self.threads, progress=shown)

    def scorer_with(
        self, importance: str | None, documents: Sequence[Document], *, beside: Path | None = None
    ) -> AnyScorer:
        """Returns what scores, on these documents, weights encoded with some importance vectors.

        Another processor rounds a calibration pass otherwise: a record made there is scored with
        the vectors committed beside it, bit for bit, in a model of their own.

        Args:
            importance: digest of the vectors; None for this study's own.
            documents: what is scored.
            beside: an allocation file; the vectors may be in its folder too.

        Raises:
            CheckpointError: if neither a committed file nor the study's calibration gives them.
        """
        ours = importance_digest(self.profiler.statistics.importance)
        if importance is None or importance == ours:
            return self.scorer_on(documents)
        if importance not in self._models:
            self._models[importance] = self.model_with(
                self.encodings_for(importance, beside=beside)
            )
        return self.scorer_on(documents, model=self._models[importance])

    @cached_property
    def scorer(self) -> AnyScorer:
        """Scores on the search split."""
        return self.scorer_on(self.splits[0][: self.spec.calibration.search_documents])

    @cached_property
    def gradient_scorer(self) -> Scorer:
        """What gradients are taken on: search documents that trials are not scored on.

        Where too few are left, those that trials are scored on.
        """
        left = self.splits[0][len(self.scorer.documents) :]
        chosen = left if len(left) >= self.n_curvature else list(self.scorer.documents)
        # each look takes other documents: what the original said of them is not worth its memory
        return Scorer(self.profiler.swap, chosen, cache_bytes=0, threads=self.threads)

    @cached_property
    def selection_scorer(self) -> AnyScorer:
        """Scores on the selection split."""
        chosen = self.splits[1][: self.spec.calibration.selection_documents]
        return self.scorer_on(chosen, progress="selection")

    def baselines(self, *, pruned: bool = False) -> list[tuple[str, Allocation]]:
        """Uniform formats and role mixes."""
        return list(baselines(self.layout, self.space.rankings, pruned=pruned))

    def read_allocation(self, path: str | Path, *, base: str | None = None) -> Allocation:
        """Reads the decision of `read_encoded` alone.

        Raises:
            SpaceError: as `read_encoded`.
            CheckpointError: as `read_encoded`.
        """
        return self.read_encoded(path, base=base)[0]

    def read_encoded(
        self, path: str | Path, *, base: str | None = None
    ) -> tuple[Allocation, str | None]:
        """Reads an allocation file, or a llama-quantize `--tensor-type-file` over a base format.

        Args:
            path: JSON, or text with `pattern=type` entries (all experts retained).
            base: format of the tensors that no entry names, with llama-quantize's fallbacks.

        Returns:
            The decision, and the digest of the importance vectors that a record was encoded with;
            None where the file is no record: the study's own.

        Raises:
            SpaceError: if the file is neither, or does not fit the checkpoint.
            CheckpointError: if the file records another checkpoint.
        """
        importance = None
        path = Path(path)
        if not path.is_file():
            raise SpaceError(f"{path}: no such allocation file")
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix != ".json" and not text.lstrip().startswith("{"):
            allocation = self._from_tensor_types(text, base)
        elif base is not None:
            raise SpaceError(f"{path}: --base is for tensor-type files; an allocation names all")
        else:
            allocation, record = read_allocation(path)
            if record is not None:
                check_same_checkpoint(record.checkpoint, self.inventory)
                importance = record.importance
        allocation.check(self.layout)
        return allocation, importance

    def _from_tensor_types(self, text: str, base: str | None) -> Allocation:
        if self.target != "gguf":
            raise SpaceError(
                "a tensor-type file names gguf tensors; this study's target is not gguf"
            )
        named = parse_tensor_type_file(text, self.layout)
        missing = [g for g in self.layout.groups if g not in named]
        if missing and base is None:
            raise SpaceError(
                f"the tensor-type file names no type for {len(missing)} groups (first: "
                f"{missing[0]}); give llama-quantize's base type with --base"
            )
        n = self.inventory.n_experts
        rankings = dict.fromkeys(self.layout.layers, tuple(range(n)))
        whole = mixed(self.layout, rankings, experts=base or "Q8_0", rest=base or "Q8_0", count=n)
        chosen = {g: fallback(f, self.layout.groups[g].shape).name for g, f in named.items()}
        return Allocation.of(
            target=self.target,
            retained=whole.retained_experts,
            formats=whole.format_of | chosen,
            experts_used=self.inventory.experts_used,
        )

    # -- study

    @property
    def base_tokens(self) -> int:
        """Forward tokens before the first trial: the profile, and the original on the split."""
        settings = self.profiler.settings_tokens(self.unranked_space)
        return sum(self.profiler.forward_tokens.values()) + settings + self.scorer.n_tokens

    def check_launch(
        self, *, sampler: str | None, seed: int | None, trials: int | None = None
    ) -> None:
        """Reads what a search needs and what is cheap to read, before anything is written.

        Raises:
            AllocatorError: one line on whatever is wrong.
        """
        _ = self.splits
        name, chosen = self._sampler_and_seed(sampler, seed)
        check_sampler(name)
        if chosen < 0:
            raise StudyError(f"seed {chosen}: needed 0 or a positive number")
        if trials is not None and trials < 1:
            raise StudyError(f"{trials} trials: needed a positive number")

    def lock(self, budget: Budget, sampler: str, seed: int) -> dict[str, Any]:
        """The resolved inputs of a study, known before anything is measured.

        A study with other ones is another study.
        """
        space = self.unranked_space
        choices = json.dumps({k: list(v) for k, v in space.choices.items()}, sort_keys=True)
        protected = json.dumps(sorted(self.search_space.experts.protected.items()))
        scored = self.splits[0][: self.spec.calibration.search_documents]
        streamed = self.spec.streamed
        together: dict[str, Any] = {} if streamed is None else {"candidates": streamed.candidates}
        if self.target == GGUF.name and self.spec.tokenizer == "none" and self._has_tokenizer:
            together["tokenizer"] = "none"  # files of other sizes
        return together | {
            "checkpoint": self.inventory.digest,
            "target": self.target,
            **budget.lock,
            "sampler": sampler,
            "seed": seed,
            "space": hashlib.sha256((choices + protected).encode()).hexdigest(),
            "search split": calibration.digest(scored),
            "rungs": list(self.spec.calibration.rungs),
            "profile": self.profiler.inputs.digest,
        }

    @property
    def _has_tokenizer(self) -> bool:
        return any(p.name != "generation_config.json" for p in carried_files(self.inventory.path))

    def study(
        self,
        budget: Budget,
        *,
        storage: str | None = None,
        sampler: str | None = None,
        seed: int | None = None,
    ) -> optuna.Study:
        """The Optuna study of this folder, created or re-opened; a changed one is refused.

        Nothing is measured for it; it has no sampler of ours yet.
        """
        name, chosen = self._sampler_and_seed(sampler, seed)
        lock = self.lock(budget, name, chosen)
        return open_study(open_storage(storage, self.path), self.study_name(storage), lock)

    def sampler(
        self, budget: Budget, *, sampler: str | None = None, seed: int | None = None
    ) -> BaseSampler:
        """The sampler of a launch; needs the profile."""
        name, chosen = self._sampler_and_seed(sampler, seed)
        looking: dict[str, Any] = {}
        if self.spec.streamed is None:  # a gradient needs the model in memory, twice
            looking["local_prices"] = lru_cache(64)(
                lambda allocation, part: self.profiler.local_prices(
                    allocation, self.gradient_scorer, part=part
                )
            )
            looking["gradient_tokens"] = self.profiler.gradient_tokens(self.gradient_scorer)
        return make_sampler(name, seed=chosen, surrogate=self.surrogate, budget=budget, **looking)

    def _sampler_and_seed(self, sampler: str | None, seed: int | None) -> tuple[str, int]:
        return sampler or self.spec.sampler, self.spec.seed if seed is None else seed

    def study_name(self, storage: str | None) -> str:
        """The study's name in its storage: the folder's, where others may be beside it.

        The folder's own journal holds one study, which stays the same when the folder is moved.
        """
        return "study" if storage is None else self.path.resolve().name


def _use_threads(n: int) -> None:
    import torch

    torch.set_num_threads(n)


def _checked_cache(path: Path) -> Path:
    """Refuses a cache that can be no folder, which every file in it would be called damaged for."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: {error}; needed a folder for the cache") from None
    if not stat.S_ISDIR(mode):
        raise StudyError(f"{path}: no folder; needed one for the cache")
    return path


def _read_importance(path: Path) -> dict[str, Floats]:
    """Committed vectors, float32; their digest is still to be compared."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        vectors: dict[str, Floats] = load_file(path)
        if any(v.dtype != np.float32 for v in vectors.values()):
            raise ValueError("not all of it is float32")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({first_line(error)}); restore the file") from None
    return vectors


def _read_splits(path: Path, n: int) -> tuple[list[int], list[int]]:
    try:
        data = json.loads(path.read_text())
        search, selection = list(data["search"]), list(data["selection"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path}: needed JSON with lists search and selection ({error!r})"
        ) from None
    if not all(type(i) is int and 0 <= i < n for i in search + selection):
        raise CalibrationError(f"{path}: needed record indices from 0 to {n - 1}")
    if len(set(search)) < len(search) or len(set(selection)) < len(selection):
        raise CalibrationError(f"{path}: an index is named twice; each document counts once")
    if set(search) & set(selection) or not search or not selection:
        raise CalibrationError(f"{path}: search and selection must be disjoint and not empty")
    return search, selection


def check_same_checkpoint(wanted: str, inventory: Inventory) -> None:
    """Raises:
    CheckpointError: if an allocation was made for another checkpoint.
    """
    if wanted != inventory.digest:
        raise CheckpointError(
            f"the allocation is for checkpoint {wanted[:12]}…, {inventory.path} is "
            f"{inventory.digest[:12]}…; use the checkpoint that it was searched on"
        )
