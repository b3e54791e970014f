"""A runtime's contract, as far as it is known without running anything: `Target`.

In: an inventory. Out: its layout in the runtime's file, the bytes of header and device memory, and
what the runtime cannot express (`TargetError`). Invariant: no weight is read.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from allocator.checkpoint.inventory import Inventory
from allocator.errors import TargetError
from allocator.families import Config, Dimensions, Family
from allocator.targets.device_memory import DeviceMemory, RuntimeSettings, Workload
from allocator.targets.layout import CacheRows, FullPrecision, Group, Layout


class Target(ABC):
    """What every runtime's contract answers.

    A target's file is its header, then tensor data: groups in the layout's order, part by part,
    then full-precision tensors, each padded to the alignment.

    Attributes:
        name: as in study.toml.
        one_expert_count: the runtime knows one retained count for all layers.
        mixes_experts: the experts of one projection may be stored in several formats (parts).
        alignment: tensor data in its file starts at multiples of this many bytes.
        stores_tokenizer: its file has the tokenizer in it, unless the checkpoint is read without.
        predicts_memory: `device_memory` and `kv_bytes` answer.
        codecs: those whose formats its file can hold; None for all.
    """

    name: str
    one_expert_count: bool
    mixes_experts: bool
    alignment: int
    stores_tokenizer: bool = False
    predicts_memory: bool = False
    codecs: tuple[str, ...] | None = None

    @abstractmethod
    def layout(self, inventory: Inventory) -> Layout:
        """Returns the groups and full-precision tensors of a checkpoint in this target.

        Raises:
            TargetError: if the runtime would not compute the model rightly.
        """

    def arranged(self, group: Group, family: Family, dimensions: Dimensions) -> Group:
        """Returns a group with the rows and columns of its source that this target gives it.

        Args:
            group: of one matrix, or of a part of one.
            family: of the checkpoint.
            dimensions: of the checkpoint.
        """
        return group

    @abstractmethod
    def header_bytes(
        self,
        layout: Layout,
        *,
        retained: Mapping[int, tuple[int, ...]],
        formats: Mapping[str, str],
        experts_used: int,
    ) -> int:
        """Returns the bytes before the tensor data, alignment included.

        Args:
            layout: the tensors, in this or (for a container) another target's layout.
            retained: experts by MoE layer.
            formats: format or parts by group.
            experts_used: routed experts per token.
        """

    def computed(self, family: Family, config: Config) -> Config | None:
        """Returns a config by which transformers computes as the runtime does.

        Args:
            family: of the checkpoint.
            config: the checkpoint's.

        Returns:
            That of a language model; None where the checkpoint's own says it.
        """
        return None

    def parts_overhead(self, group: Group, names: Sequence[str]) -> int:
        """Bounds the bytes that the header grows by when a group is in parts of these formats."""
        assert self.mixes_experts, f"{self.name}: {group.name} in parts {names}"
        return 0

    def full_precision_bytes(self, layout: Layout, tensor: FullPrecision, n_experts: int) -> int:
        """Returns the bytes of a full-precision tensor in this target's file.

        Args:
            layout: the tensors, in this or (for a container) another target's layout.
            tensor: one of them.
            n_experts: that its layer retains.
        """
        return tensor.nbytes(n_experts)

    def check_tokenizer(self, inventory: Inventory) -> None:
        """Checks that a file can read text, where the target stores a tokenizer.

        Raises:
            CheckpointError: if the checkpoint has no tokenizer, or one that contradicts it.
            TargetError: if the runtime cannot express it.
        """
        assert not self.stores_tokenizer, f"{self.name} stores tokenizers, and checks none"

    def check_kv_format(self, inventory: Inventory, kv_format: str) -> None:
        """Checks how keys and values are stored.

        Raises:
            TargetError: if the runtime does not store them so.
        """
        if kv_format != "f16":
            raise TargetError(
                f"kv_format {kv_format!r} with target {self.name}: it is chosen for llama.cpp's "
                "cache; needed 'f16', or target gguf"
            )

    def cache_rows(self, kv_format: str, head_size: int) -> tuple[CacheRows, CacheRows]:
        """Returns how the runtime's cache stores keys, and how values.

        Args:
            kv_format: one that `check_kv_format` takes.
            head_size: width of a head.
        """
        return CacheRows(), CacheRows()

    def check_micro_batch(self, micro_batch: int) -> None:
        """Checks the tokens computed at once.

        Raises:
            TargetError: if the runtime cannot be told so.
        """
        raise TargetError(
            f"micro_batch {micro_batch}: our loader of target {self.name} knows none; leave it "
            "out, or use target gguf"
        )

    def kv_bytes(self, inventory: Inventory, kv_format: str, context: int) -> int:
        """Returns the bytes of keys and values that decoding a token reads of a full context.

        Raises:
            TargetError: if nothing is known of the runtime.
        """
        raise TargetError(self._unknown_memory)

    def device_memory(
        self,
        inventory: Inventory,
        workload: Workload,
        settings: RuntimeSettings,
        *,
        weights: int,
        n_experts: int,
    ) -> DeviceMemory:
        """Returns what the runtime occupies, itemised.

        Args:
            inventory: the checkpoint.
            workload: what runs.
            settings: that the runtime runs with.
            weights: bytes of tensor data.
            n_experts: the most that a layer retains.

        Raises:
            TargetError: if nothing is known of the runtime.
        """
        raise TargetError(self._unknown_memory)

    @property
    def _unknown_memory(self) -> str:
        return (
            f"target {self.name}: our loader decodes weights to float32, so its memory is not "
            "budgeted; use target gguf"
        )

    def padded(self, nbytes: int) -> int:
        """Returns the bytes that tensor data of `nbytes` occupies in the file."""
        return -(-nbytes // self.alignment) * self.alignment
