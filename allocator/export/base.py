"""The interface of a runtime, which writes, reads, runs and compares the files of one target.

In: a source of tensors, or a written file. Out: a file of the predicted bytes and what lies beside
it; tensors read back; a loss of the file in the runtime itself. Invariant: what a runtime cannot
express it refuses before it writes, and before it loads torch. The runtimes are listed in
`allocator.export.runtimes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from allocator.checkpoint.inventory import Inventory
from allocator.codecs import Bytes
from allocator.decision.allocation import Allocation
from allocator.errors import SpaceError, TargetError, VerifyError
from allocator.targets import FullPrecision, Layout, Target

if TYPE_CHECKING:  # these load torch: whatever is refused is refused before that
    from allocator.export.stored import StoredTensor, StoredWeights
    from allocator.export.tensors import TensorSource
    from allocator.scoring.streamed_scorer import AnyScorer


@dataclass(frozen=True)
class Exact:
    """A comparison of torch and a runtime where neither of them rounds.

    Attributes:
        divergence: KL(torch || runtime), nats per token.
        n_layers: compared, from the first on.
        of_layers: that the model has.
    """

    divergence: float
    n_layers: int
    of_layers: int

    @property
    def part(self) -> str:
        """For messages: which layers, where it is not the whole model."""
        if self.n_layers == self.of_layers:
            return ""
        return f" (first {self.n_layers} of {self.of_layers} layers)"


@dataclass(frozen=True)
class Comparison:
    """How a written file computes in its runtime.

    Attributes:
        loss: proxy loss there, nats per token.
        divergence: how far the runtime is off torch, nats per token; see `Runtime.divergence_name`.
        exact: the comparison without rounding, where there had to be one.
    """

    loss: float
    divergence: float
    exact: Exact | None = None


class Runtime(ABC):
    """What writes, opens and runs a target's files.

    Attributes:
        target: its contract.
        file_name: of the weights' file in a written directory; of the index where it has shards.
        earlier_names: of that file in directories of earlier versions.
        tolerance: how far the runtime may be off torch by default, nats per token.
        program: what runs the file, for messages.
        divergence_name: what `Comparison.divergence` is, for messages.
        options_file: in a written directory, what the program must be told; empty if never.
        tells_rounding: beyond its tolerance it compares without rounding too, so that a larger
            tolerance allows rounding alone.
        library: that opens the directory, as the Hugging Face hub names it; empty if none.
        index_name: `file_name` where the weights are in shards; empty if they never are.
    """

    target: Target
    file_name: str
    tolerance: float
    program: str
    divergence_name: str
    options_file: str = ""
    tells_rounding: bool = False
    library: str = ""
    earlier_names: tuple[str, ...] = ()
    index_name: str = ""

    @property
    def name(self) -> str:
        """The target's, which on the command line is the container."""
        return self.target.name

    def can_write(self, allocation: Allocation) -> bool:
        """Says whether an allocation, of whatever target, can be written as this container."""
        return allocation.target == self.name

    def check_can_write(self, allocation: Allocation) -> None:
        """Refuses an allocation whose target stores other tensors.

        Raises:
            TargetError: if `can_write` says no.
        """
        if not self.can_write(allocation):
            raise TargetError(
                f"an allocation for target {allocation.target!r} cannot be written as {self.name}: "
                f'{self.program} stores other tensors; search with target = "{self.name}"'
            )

    def in_shards(self, layout: Layout, allocation: Allocation, shard_bytes: int) -> Runtime:
        """Returns the runtime with a target that cuts the weights of an allocation into shards.

        Args:
            layout: of the allocation.
            allocation: formats and retained experts.
            shard_bytes: the most bytes of tensors in a file; where all fit, there are no shards.

        Raises:
            TargetError: if the runtime opens one file alone.
        """
        raise TargetError(
            f"shards of {shard_bytes:,} bytes: {self.program} opens {self.file_name} alone; needed "
            "container safetensors, or no shard size"
        )

    def weights_names(self, source: TensorSource) -> tuple[str, ...]:
        """Returns the names of all files of the weights, the index included."""
        return (self.file_name,)

    def places(self, source: TensorSource) -> Iterator[tuple[str, int]]:
        """Yields where every part of every group begins, in order: file name and offset."""
        start = source.allocation.nbytes(source.layout, self.target).header
        for name in source.layout.groups:
            for part in range(len(source.allocation.parts(source.layout, name))):
                yield self.file_name, start
                start += self.target.padded(prod(source.shape(name, part)))

    def one_file_digest(self, folder: Path) -> str | None:
        """Returns the sha256 of one file with the tensors of a written directory's shards.

        None where the weights are in one file.
        """
        return None

    @abstractmethod
    def write(self, folder: Path, source: TensorSource, workload: Mapping[str, int]) -> str:
        """Writes the weights' file into a directory, and what the runtime needs beside it.

        Args:
            folder: an empty directory.
            source: the tensors, in an allocation that `can_write`.
            workload: `context` and `sequences`, where a whole device was budgeted; else empty.

        Returns:
            What the program must be told when it runs the file, as on its command line.

        Raises:
            TargetError: if the runtime cannot express the checkpoint.
        """

    def usage(self, inventory: Inventory, options: str) -> list[str]:
        """Returns lines of Markdown that say how to run a written directory.

        Args:
            inventory: the checkpoint that it was made of.
            options: what the program must be told, as `write` returned it.
        """
        return [f"Runs with {self.program}."]

    @abstractmethod
    def read(self, path: Path, layout: Layout) -> dict[str, StoredTensor]:
        """Reads every tensor of a file, without trust.

        Args:
            path: the weights' file.
            layout: of its allocation.

        Returns:
            Tensors by the layout's names: a group's, or a part's (`part_names`), and of
            full-precision tensors the checkpoint's. A tensor that the layout does not know has its
            name in the file.

        Raises:
            VerifyError: if the file is missing, truncated or damaged.
        """

    def in_order(self, data: Bytes, layout: Layout, name: str) -> Bytes:
        """Returns a group's bytes of a file, `(..., rows, bytes per row)`, in the source's order.

        Args:
            data: of the group or one of its parts, as the file has its rows.
            layout: of the allocation.
            name: the group's.
        """
        return data

    @abstractmethod
    def full_precision_bytes(self, source: TensorSource, tensor: FullPrecision) -> Bytes:
        """Returns the bytes of a full-precision tensor as a written file has them.

        Returns:
            `(..., bytes per row)`; `(bytes,)` of a norm or bias.
        """

    @abstractmethod
    def compare(
        self,
        path: Path,
        stored: StoredWeights,
        scorer: AnyScorer,
        *,
        loss: float,
        tolerance: float,
        progress: bool = False,
    ) -> Comparison:
        """Runs a written file on a scorer's documents, and judges how far off it is.

        Args:
            path: the weights' file, its tensors known to be right.
            stored: its weights.
            scorer: scored the candidate that the file holds last.
            loss: proxy loss of that candidate, nats per token.
            tolerance: how far the runtime may be off, nats per token.
            progress: shows a bar.

        Raises:
            VerifyError: if the runtime is further off, or does not run the file.
        """

    def read_recipe(self, text: str, layout: Layout) -> dict[str, str]:
        """Reads a recipe in the runtime's own form: formats by group; groups may be absent.

        Args:
            text: of the recipe.
            layout: of this target.

        Raises:
            SpaceError: if the runtime has no such form.
            FormatError: if an entry is malformed, or names an unknown format.
        """
        raise SpaceError(
            f"target {self.name} has no recipes of its own, such as llama-quantize's tensor-type "
            "files for target gguf; needed an allocation file, in JSON"
        )


def check_tolerance(tolerance: float | None) -> None:
    """Checks a tolerance.

    Raises:
        VerifyError: if it is no number of nats.
    """
    if tolerance is not None and not tolerance >= 0:
        raise VerifyError(f"tolerance {tolerance}: needed nats per token, 0 or more")
