"""What every codec offers: encode and decode a storage format, row by row.

In: float32 weights and, where the format wants it, an importance vector per input channel. Out: the
format's bytes; and back. Invariant: weights and importance are checked here, so that no codec sees
rows of broken blocks or weights that are not finite. A row is encoded on its own: the same row
gives the same bytes however many rows are encoded at once, in whatever number of threads.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from allocator.errors import FormatError
from allocator.formats import Format

if TYPE_CHECKING:  # torch loads with it
    from allocator.codecs.blocks import BlockFormat

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Bytes = npt.NDArray[np.uint8]


class Codec(ABC):
    """Encodes and decodes some formats.

    A codec of one's own says its attributes, `encode_rows` and `decode_rows`; the rest has
    defaults. `allocator.testing.codecs.CodecConformance` are the tests that it should pass.

    Attributes:
        name: as in `Format.codec`.
        package: of what encodes, as its users know it.
        formats: all that it encodes.
    """

    name: str
    package: str
    formats: Collection[Format]

    @property
    @abstractmethod
    def version(self) -> str:
        """Version of the package; another one may encode the same weights to other bytes."""

    @property
    def identity(self) -> str:
        """What names the bytes: in every key of the cache, and in records of allocations."""
        return f"{self.package} {self.version}"

    @abstractmethod
    def encode_rows(
        self, weights: Floats, fmt: Format, importance: Floats | None, *, out: Bytes
    ) -> None:
        """Encodes some rows of one matrix.

        Called by several threads at once, after `prepare`.

        Args:
            weights: `rows x in_features`, contiguous, finite, whole blocks.
            fmt: the format.
            importance: `(in_features,)`, finite and not negative; never None where it is required.
            out: `rows x bytes per row`, contiguous, zeros.
        """

    @abstractmethod
    def decode_rows(self, data: Bytes, fmt: Format, *, out: Floats) -> None:
        """Decodes some rows.

        Args:
            data: `rows x bytes per row`, contiguous.
            fmt: the format.
            out: `rows x in_features`, contiguous.
        """

    def prepare(self, fmt: Format) -> None:  # noqa: B027 - most formats need nothing
        """Makes the tables that encoding the format needs, once per process."""

    def preparation_seconds(self, fmt: Format) -> float:
        """Returns about how long `prepare` takes."""
        return 0.0

    @abstractmethod
    def weights_per_second(self, fmt: Format) -> float:
        """Returns about how many weights one core encodes in a second, with importance."""

    def scales(self, data: Bytes, fmt: Format) -> Halves | None:
        """Returns the float16 scales, in which decoded weights are linear block by block.

        Args:
            data: `(..., bytes per row)`.
            fmt: one of `formats`.

        Returns:
            `(..., blocks, scales per block)`; None if the format has none, so that its bytes stay.
        """
        return None

    def with_scales(self, data: Bytes, fmt: Format, scales: Halves) -> Bytes:
        """Returns the same codes under other scales.

        Args:
            data: `(..., bytes per row)`.
            fmt: one of `formats`.
            scales: float16, finite, in the shape that `scales` returns.

        Returns:
            `(..., bytes per row)`, a copy.

        Raises:
            FormatError: if the format has no float16 scales, or other ones than given, or if the
                given ones are not finite.
        """
        stored = self.scales(data, fmt)
        if stored is None:
            raise FormatError(
                f"{fmt.name} has no float16 scales to change; its bytes can be written as they are"
            )
        if scales.dtype != np.float16 or scales.shape != stored.shape:
            raise FormatError(
                f"{fmt.name}: scales are {scales.dtype} of shape {scales.shape}, needed float16 of "
                f"shape {stored.shape}; give what `scales` returned, changed"
            )
        if not np.isfinite(scales).all():
            raise FormatError(
                f"{fmt.name}: scales are not finite; limit them to what float16 can hold"
            )
        return self.replace_scales(data, fmt, scales)

    def replace_scales(self, data: Bytes, fmt: Format, scales: Halves) -> Bytes:
        """Writes checked scales; for codecs that return some from `scales`.

        Args:
            data: `(..., bytes per row)`.
            fmt: a format with scales.
            scales: float16, finite, in the shape that `scales` returns.

        Returns:
            `(..., bytes per row)`, a copy.
        """
        raise NotImplementedError(f"{self.name} returns scales; it needs `replace_scales`")

    def block_format(self, fmt: Format) -> "BlockFormat | None":
        """Returns what a format's bytes are made of; None if its codes cannot be chosen anew."""
        return None

    def second_opinion(self, data: Bytes, fmt: Format) -> Floats | None:
        """Decodes rows by an implementation that shares no code with `decode`.

        Args:
            data: `rows x bytes per row`, contiguous.
            fmt: the format.

        Returns:
            `rows x in_features`; None if there is no other implementation.
        """
        return None

    def encode(
        self, weights: Floats, fmt: Format, importance: Floats | None = None, *, threads: int = 1
    ) -> Bytes:
        """Encodes matrices.

        Args:
            weights: `(..., rows, in_features)`.
            fmt: one of `formats`.
            importance: `(..., in_features)` with the leading axes of `weights` or none, not
                negative; what the format does with it says `Format.importance`.
            threads: rows are split over this many.

        Returns:
            `(..., rows, bytes per row)`.

        Raises:
            FormatError: if the rows are no whole blocks, weights or importance are not finite, or
                importance is missing where it is needed.
        """
        *outer, rows, width = weights.shape
        row_bytes = fmt.nbytes((1, width))
        if fmt.needs_importance and importance is None:
            raise FormatError(
                f"{fmt.name} needs an importance vector; profile the checkpoint first"
            )
        self.prepare(fmt)
        flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, rows, width)
        if not np.isfinite(flat).all():
            raise FormatError(f"{fmt.name}: weights are not finite; the checkpoint is damaged")
        channels = None
        if importance is not None:
            if not (np.isfinite(importance).all() and (importance >= 0).all()):
                raise FormatError(
                    f"{fmt.name}: importance must be finite and not negative; profile again"
                )
            channels = np.ascontiguousarray(
                np.broadcast_to(importance, (*outer, width)), dtype=np.float32
            ).reshape(-1, width)
        encoded = np.zeros((len(flat), rows, row_bytes), np.uint8)

        def work(piece: tuple[int, int, int]) -> None:
            matrix, start, stop = piece
            self.encode_rows(
                flat[matrix, start:stop],
                fmt,
                None if channels is None else channels[matrix],
                out=encoded[matrix, start:stop],
            )

        step = max(1, -(-rows // threads)) if len(flat) < threads else rows
        pieces = [
            (matrix, start, min(start + step, rows))
            for matrix in range(len(flat))
            for start in range(0, rows, step)
        ]
        if threads == 1 or len(pieces) == 1:
            for piece in pieces:
                work(piece)
        else:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(work, pieces):
                    pass
        return encoded.reshape(*outer, rows, row_bytes)

    def decode(self, data: Bytes, fmt: Format, *, out: Floats | None = None) -> Floats:
        """Decodes rows.

        Args:
            data: `(..., bytes per row)`.
            fmt: one of `formats`.
            out: float32 memory to decode into, contiguous, `(..., in_features)`.

        Returns:
            `(..., in_features)` float32.
        """
        *outer, row_bytes = data.shape
        width = row_bytes // fmt.block_bytes * fmt.block
        if out is None:
            out = np.empty((*outer, width), np.float32)
        assert out.shape == (*outer, width)
        assert out.flags.c_contiguous
        assert out.dtype == np.float32
        if out.size:
            rows = np.ascontiguousarray(data).reshape(-1, row_bytes)
            self.decode_rows(rows, fmt, out=out.reshape(-1, width))
        return out
