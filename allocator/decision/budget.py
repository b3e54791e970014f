"""The hard limit in bytes: on a file, on the searched matrices, or on a device's memory.

In: the bytes of a checkpoint (`pricing.StoredBytes`). Out: which of these bytes count against the
limit, and how many are over. Invariant: a limit that sits beside another is as hard as that one.
"""

from dataclasses import dataclass
from typing import Literal

from allocator.decision.pricing import StoredBytes
from allocator.errors import BudgetError
from allocator.targets.device_memory import MOST_BYTES, DeviceMemory, Workload
from allocator.units import least_size

_WAYS_OUT = {
    "file": "needed --budget {size} or more ({bits:.2f} bits)",
    "weights": "needed --bits {bits:.2f} or more (--weights-budget {size})",
    "device": "needed --device-memory {size} or more ({bits:.2f} bits), a smaller --context, "
    "--sequences or --reserve, or smaller kv_format and micro_batch in the search space",
}


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on bytes.

    Attributes:
        nbytes: the limit.
        bounds: `file` (everything in the file), `weights` (the searched matrices alone, the
            measure of effective bits) or `device` (everything in memory).
        workload: what the device runs; with `device`.
        beside: a second limit, on the file or the weights, as hard; with `device`.
    """

    nbytes: int
    bounds: Literal["file", "weights", "device"]
    workload: Workload | None = None
    beside: "Budget | None" = None

    def __str__(self) -> str:
        return " and ".join(f"{limit.nbytes} ({limit.bounds})" for limit in self.limits)

    @property
    def limits(self) -> "tuple[Budget, ...]":
        """This limit, and the second one if there is one."""
        return (self,) if self.beside is None else (self, self.beside)

    @property
    def by_name(self) -> dict[str, int]:
        """The limits in bytes, as an allocation record names them."""
        second = {} if self.beside is None else {f"budget_{self.beside.bounds}": self.beside.nbytes}
        return {"budget": self.nbytes} | second

    @property
    def recorded_workload(self) -> dict[str, int]:
        """What the device runs, as an allocation record names it; empty without a device."""
        if self.workload is None:
            return {}
        return {n: getattr(self.workload, n) for n in ("context", "sequences", "reserve")}

    @property
    def lock(self) -> dict[str, object]:
        """Everything that makes another limit another study."""
        entries: dict[str, object] = {"budget": str(self)}
        if self.workload is not None:
            names = ("context", "sequences", "reserve", "bandwidth")
            entries |= {n: getattr(self.workload, n) for n in names}
            entries["bytes read per token"] = self.token_bytes
        return entries

    # -- which bytes count

    @property
    def counts_padding(self) -> bool:
        """Whether full-precision tensors and the padding of tensors count."""
        return self.bounds != "weights"

    @property
    def counts_header(self) -> bool:
        """Whether the header of the file counts."""
        return self.bounds == "file"

    @property
    def counts_runtime(self) -> bool:
        """Whether the runtime's own memory counts: keys and values, buffers, the process."""
        return self.bounds == "device"

    @property
    def token_bytes(self) -> int | None:
        """Bytes that a decoded token may read; None for no limit."""
        return None if self.workload is None else self.workload.token_bytes

    @property
    def context(self) -> int:
        """Tokens that a sequence holds on the device."""
        assert self.workload is not None
        return self.workload.context

    # -- a checkpoint under the limit

    def used(self, stored: StoredBytes) -> int:
        """Returns the bytes that count against this limit, the second one apart.

        Raises:
            TargetError: if this is a device's, and nothing is known of the runtime.
        """
        if self.counts_runtime:
            assert self.workload is not None
            return stored.device_memory(self.workload).total
        return stored.file.file if self.counts_header else stored.encoded

    def memory(self, stored: StoredBytes) -> DeviceMemory | None:
        """Returns the memory of the device, itemised; None where the limit is on no device."""
        return None if self.workload is None else stored.device_memory(self.workload)

    def excess(self, stored: StoredBytes) -> dict[str, int]:
        """Returns the bytes over every limit, negative where bytes are left.

        Returns:
            `budget`; `beside` with a second limit; `token_bytes` with a limit on reading.
        """
        names = ("budget", "beside")
        over = {
            name: limit.used(stored) - limit.nbytes
            for name, limit in zip(names, self.limits, strict=False)
        }
        if self.token_bytes is not None:
            over["token_bytes"] = stored.token_bytes(self.context) - self.token_bytes
        return over

    def admits(self, stored: StoredBytes) -> bool:
        """Returns whether a checkpoint is within every limit."""
        return all(over <= 0 for over in self.excess(stored).values())

    def itemised(self, stored: StoredBytes) -> str:
        """Returns what the bytes that count against this limit are made of, for a message."""
        if not self.counts_runtime:
            size = stored.file
            return (
                f"{size.encoded:,} encoded, {size.full_precision:,} routers and norms, "
                f"{size.overhead:,} file overhead"
            )
        assert self.workload is not None
        memory = stored.device_memory(self.workload)
        return (
            f"{memory.weights:,} weights, {memory.kv_cache:,} keys and values, {memory.compute:,} "
            f"compute buffers, {memory.overhead:,} overhead, {memory.reserve:,} reserve"
        )

    def ways_out(self, stored: StoredBytes) -> str:
        """Returns what is needed where not even the smallest checkpoint fits, for a message.

        Args:
            stored: the smallest checkpoint.
        """
        n_weights = stored.layout.inventory.n_searched_weights
        bits = -(-stored.encoded * 800 // n_weights) / 100  # rounded up
        needed = _WAYS_OUT[self.bounds].format(size=least_size(self.used(stored)), bits=bits)
        return f"{needed}; or lower [experts] minimum or loosen pins"

    def check_positive(self) -> None:
        """Checks that the limit is a positive number.

        Raises:
            BudgetError: if it is not.
        """
        if not 0 < self.nbytes <= MOST_BYTES:
            raise BudgetError(
                f"budget of {self.nbytes} bytes: needed a positive size to {MOST_BYTES}, e.g. 12MiB"
            )
