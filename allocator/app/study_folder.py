"""A study folder, opened: the inputs of every stage, each made when it is first needed.

In: a folder with `study.toml`. Out: inventory, layout, calibration, profile, space, surrogate,
encodings, scorers, and the Optuna study. Invariant: what a study computes depends on its files
alone; the cache (profiles, encoded weights) only saves time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import optuna

from allocator.app.allocation_files import read_encoded
from allocator.app.cache import check_cache, default_cache, encodings_cap
from allocator.app.calibration import Calibration
from allocator.app.request import Launch, SearchRequest
from allocator.app.resources import Resources, StudyOptions
from allocator.app.study_file import BudgetSpec, StudySpec, chosen_budget
from allocator.app.study_path import study_path
from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.padding import padded
from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import Floats
from allocator.checkpoint.tokenizer import has_tokenizer
from allocator.codecs.encodings import Encodings, open_encodings
from allocator.decision.allocation import Allocation
from allocator.decision.baselines import baselines
from allocator.decision.budget import Budget
from allocator.decision.costs import check_budget
from allocator.decision.search_space import SearchSpace, bind
from allocator.decision.space import Space
from allocator.files.progress import show_progress, waiting
from allocator.files.shipped import SEARCH_SPACES, named_file
from allocator.prediction.profile import Profile
from allocator.prediction.surrogate import Surrogate, from_profile
from allocator.samplers import GradientStep, Problem, check_sampler, check_seed, make_sampler
from allocator.scoring.documents import digest
from allocator.study.optuna_study import open_study
from allocator.study.protocols import StudySampler
from allocator.study.stop_rule import StopRule
from allocator.study.storages import journal_path, open_storage, reaching
from allocator.targets import Layout, target_named

if TYPE_CHECKING:  # these load torch: whatever is refused is refused before that
    from allocator.app.importance import StudyEncodings
    from allocator.app.scorers import StudyScorers
    from allocator.profiling.imatrix import GivenImportance
    from allocator.profiling.profiler import Profiler


class StudyFolder:
    """Opens a study folder, see the module.

    Args:
        folder: of the study.
        options: what may be used of the machine (see `Resources`), and `target`, which replaces
            study.toml's.

    Raises:
        TypeError: if a keyword is unknown.
        AllocatorError: if the folder, its study.toml, the cache or the torch device is unusable.
    """

    def __init__(self, folder: str | Path, **options: Unpack[StudyOptions]) -> None:
        self.resources = Resources.of(options)
        self.path = study_path(folder)
        self.spec = StudySpec.read(self.path)
        self.target = options.get("target") or self.spec.target
        self.cache = self.resources.cache or default_cache()
        check_cache(self.cache)
        self.encodings_cap = encodings_cap()
        self.threads = self.resources.threads or len(os.sched_getaffinity(0))
        self.progress = self.resources.progress
        show_progress(self.progress)
        self.torch_device = self.resources.torch_device
        if self.torch_device != "cpu":
            from allocator.scoring.swap_model import check_device

            check_device(self.torch_device)

    # -- what is given

    @cached_property
    def inventory(self) -> Inventory:
        """The checkpoint."""
        with waiting("reading the checkpoint's headers"):
            inventory = read_inventory(
                self.path / self.spec.checkpoint, digests=self.cache / "digests"
            )
        if self.spec.expert_width is not None:
            inventory = padded(inventory, self.spec.expert_width)
        return replace(inventory, without_tokenizer=self.spec.tokenizer == "none")

    @cached_property
    def layout(self) -> Layout:
        """The target bound to the checkpoint, whose tokenizer it can express."""
        target = target_named(self.target)
        layout = target.layout(self.inventory)
        target.check_tokenizer(self.inventory)
        return layout

    @cached_property
    def search_space(self) -> SearchSpace:
        """The search-space file; everything is offered where study.toml names none."""
        if not self.spec.space:
            return SearchSpace(schema=1)
        file = named_file(self.spec.space, kind=SEARCH_SPACES, relative_to=self.path)
        return SearchSpace.read(file)

    def budget(self, asked: BudgetSpec | None = None) -> Budget:
        """Returns the limits that are asked for, else study.toml's, checked against the floor."""
        budget = chosen_budget(self.spec.budget, self.path, asked, inventory=self.inventory)
        check_budget(self.unranked_space, budget)
        return budget

    @cached_property
    def calibration(self) -> Calibration:
        """The documents of every stage."""
        return Calibration(self.path, self.spec.calibration, self.inventory)

    @cached_property
    def given_importance(self) -> GivenImportance | None:
        """Importance from study.toml's `imatrix`, held against the checkpoint; None without."""
        if self.spec.calibration.imatrix is None:
            return None

        from allocator.profiling.imatrix import given_importance

        return given_importance(self.path / self.spec.calibration.imatrix, self.layout)

    @property
    def importance_notes(self) -> tuple[str, ...]:
        """Lines on what of study.toml's `imatrix` was taken otherwise, or was not there."""
        return () if self.given_importance is None else self.given_importance.notes

    # -- profile

    @cached_property
    def profiler(self) -> Profiler:
        """Builds or continues this study's profile."""
        layout, documents = self.layout, tuple(self.calibration.statistics_documents)
        saliency = self.search_space.experts.saliency  # read, and refused, before torch is loaded
        given = self.given_importance
        _use_threads(self.threads)
        streamed = self.spec.streamed

        from allocator.profiling.in_memory_profiler import InMemoryProfiler
        from allocator.profiling.inputs import ProfileInputs
        from allocator.profiling.streamed_profiler import StreamedProfiler

        inputs = ProfileInputs(
            layout=layout,
            documents=documents,
            n_measured=self.calibration.n_measured,
            n_curvature=self.calibration.n_curvature,
            saliency=saliency,
            sampled_rows=None if streamed is None else streamed.rows,
            given_importance=None if given is None else given.vectors,
        )

        make = InMemoryProfiler if streamed is None else StreamedProfiler
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
        return from_profile(self.profile, self.space, self.profiler.setting_losses(self.space))

    # -- encoded weights and scores

    @cached_property
    def encodings(self) -> StudyEncodings:
        """Encoded weights, by the importance vectors behind them."""
        from allocator.app.importance import StudyEncodings

        return StudyEncodings(
            self.path / "allocations", own=lambda: self.profiler.encodings, under=self._encodings
        )

    def _encodings(self, importance: dict[str, Floats]) -> Encodings:
        _use_threads(self.threads)
        cap = self.encodings_cap
        return open_encodings(
            self.cache, self.layout, importance, threads=self.threads, cap_bytes=cap
        )

    @property
    def finished_folder(self) -> Path:
        """The folder of the cache that finishing works in."""
        return self.cache / "finish"

    @cached_property
    def scorers(self) -> StudyScorers:
        """What allocations are scored in, by stage."""
        from allocator.app.scorers import StudyScorers

        return StudyScorers(
            self.calibration,
            self.encodings,
            lambda: self.profiler,
            self.layout,
            streamed=self.spec.streamed,
            torch_device=self.torch_device,
            threads=self.threads,
            progress=self.progress,
        )

    # -- allocations

    def baselines(
        self, *, pruned: bool = False, skilled: bool = False
    ) -> list[tuple[str, Allocation]]:
        """Lists the baselines of the checkpoint: uniform formats and role mixes.

        Args:
            pruned: as of `allocator.decision.baselines.baselines`.
            skilled: as there.
        """
        rankings = self.space.rankings
        return list(baselines(self.layout, rankings, pruned=pruned, skilled=skilled))

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
        return read_encoded(Path(path), self.layout, base=base)

    # -- study

    @property
    def base_tokens(self) -> int:
        """Forward tokens before the first trial: the profile, and the original on the split."""
        settings = self.profiler.setting_tokens(self.unranked_space)
        return sum(self.profiler.forward_tokens.values()) + settings + self.scorers.trials.n_tokens

    def launch(self, request: SearchRequest | None = None) -> Launch:
        """Returns what a request comes to here; reads what a search needs and is cheap to read.

        Args:
            request: of this folder; by default everything is study.toml's.

        Raises:
            AllocatorError: one line on whatever is wrong; one per file that is missing.
        """
        asked = request or SearchRequest(self.path)
        self.spec.check_files(self.path)
        budget = self.budget(asked.budget)
        _ = self.calibration.splits, self.given_importance
        sampler = asked.sampler or self.spec.sampler
        seed = self.spec.seed if asked.seed is None else asked.seed
        check_sampler(sampler)
        check_seed(seed)
        asked.check()
        stop = StopRule(trials=self.spec.trials) if asked.stop.is_unlimited else asked.stop
        return Launch(budget, sampler, seed, asked.storage, stop)

    def lock(self, launch: Launch) -> dict[str, Any]:
        """Returns the resolved inputs of a study, known before anything is measured.

        A study with other ones is another study.
        """
        space = self.unranked_space
        choices = json.dumps({k: list(v) for k, v in space.choices.items()}, sort_keys=True)
        protected = json.dumps(sorted(self.search_space.experts.protected.items()))
        streamed = self.spec.streamed
        together: dict[str, Any] = {} if streamed is None else {"candidates": streamed.candidates}
        stored = target_named(self.target).stores_tokenizer
        if stored and self.spec.tokenizer == "none" and has_tokenizer(self.inventory):
            together["tokenizer"] = "none"  # files of other sizes
        if self.given_importance is not None:
            together["imatrix"] = self.given_importance.sha256
        return together | {
            "checkpoint": self.inventory.digest,
            "target": self.target,
            **launch.budget.lock,
            "sampler": launch.sampler,
            "seed": launch.seed,
            "space": hashlib.sha256((choices + protected).encode()).hexdigest(),
            "search split": digest(self.calibration.trial_documents),
            "rungs": list(self.spec.calibration.rungs),
            "profile": self.profiler.inputs.digest,
        }

    def study(self, launch: Launch) -> optuna.Study:
        """Creates or re-opens the Optuna study of this folder; a changed one is refused.

        Nothing is measured for it; it has no sampler of ours yet.
        """
        storage = open_storage(launch.storage, self.path)
        return open_study(storage, self.study_name(launch.storage), self.lock(launch))

    def searched(self, storage: str | None) -> optuna.Study | None:
        """Opens the Optuna study of this folder for reading; None if there is none yet.

        Args:
            storage: as of `search`.

        Raises:
            StudyError: if the storage cannot be reached.
        """
        path = journal_path(storage, self.path)
        if path is not None and not path.exists():
            return None
        try:
            with reaching(storage):
                return optuna.load_study(
                    study_name=self.study_name(storage), storage=open_storage(storage, self.path)
                )
        except KeyError:
            return None

    def sampler(
        self, launch: Launch, *, on_trial: Callable[[int], None] | None = None
    ) -> StudySampler:
        """Makes the sampler of a launch; needs the profile.

        Args:
            launch: of this folder.
            on_trial: called with a trial's id before anything is proposed for it.
        """
        gradient = self.gradient_step()
        problem = Problem(self.surrogate, launch.budget, gradient=gradient)
        return make_sampler(launch.sampler, problem, seed=launch.seed, on_trial=on_trial)

    def gradient_step(self) -> GradientStep | None:
        """Returns how a gradient is taken; None where the model does not fit in memory twice."""
        profiler = self.profiler

        from allocator.profiling.in_memory_profiler import InMemoryProfiler

        if not isinstance(profiler, InMemoryProfiler):
            return None
        local_prices, scorer = profiler.local_prices, self.scorers.gradients
        return GradientStep(
            lambda allocation, part: local_prices(allocation, scorer, part=part),
            profiler.gradient_tokens(scorer),
        )

    def study_name(self, storage: str | None) -> str:
        """Returns the study's name in its storage; in one of several studies, the folder's name.

        The folder's own journal has one study, whose name stays the same when the folder moves.
        """
        return "study" if storage is None else self.path.resolve().name


def _use_threads(n: int) -> None:
    import torch

    torch.set_num_threads(n)
