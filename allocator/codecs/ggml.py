"""ggml's own quantizers, from the shared object in the xllamacpp wheel.

In: float32 rows and, where the format wants it, an importance vector per input channel. Out: the
bytes that ggml writes; and back. Invariant: block sizes of the format table are held against the
library before it encodes, because it truncates silently.

`ggml_quantize_chunk` and `to_float` release the GIL here (ctypes), so threads encode in parallel.
"""

import ctypes
import importlib.util
import os
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from allocator.codecs.base import Bytes, Codec, Floats, Halves
from allocator.codecs.ggml_blocks.scales import read_scales, write_scales
from allocator.errors import FormatError
from allocator.formats import Format
from allocator.formats.ggml import CODEC, FORMATS, TYPES

if TYPE_CHECKING:  # torch loads with it
    from allocator.codecs.blocks import BlockFormat

_WEIGHTS_PER_SECOND = {
    "BF16": 4e8, "Q8_0": 3.2e8, "Q6_K": 2.1e7, "Q5_K": 5.5e6, "Q4_K": 6.2e6, "Q3_K": 1.7e7,
    "Q2_K": 5.7e6, "Q5_0": 2.5e7, "Q4_0": 2.4e7, "Q5_1": 5.5e6, "Q4_1": 5.3e6, "IQ4_NL": 1.9e6,
    "IQ4_XS": 2.0e6, "IQ3_S": 2.4e6, "IQ3_XXS": 1.8e6, "IQ2_S": 3.5e6, "IQ2_XS": 1.0e6,
    "IQ2_XXS": 1.9e6, "IQ1_M": 4.7e6, "IQ1_S": 4.3e6,
}  # fmt: skip
"""One core, with importance: measured on normal rows of 2048 (those with a block of 32, of
7168)."""
_TYPICAL_PER_SECOND = 4e6  # the median of them
_PREPARATION_SECONDS = {
    "IQ3_S": 0.1, "IQ3_XXS": 0.1, "IQ2_S": 3.2, "IQ2_XS": 1.5, "IQ2_XXS": 0.6, "IQ1_M": 6.7,
}  # fmt: skip
"""One core; IQ1_S has the tables of IQ1_M."""
_PACKAGE = "xllamacpp"

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):  # ggml.h: struct ggml_type_traits
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """Loads ggml and llama.cpp, once per process.

    Raises:
        FormatError: if the wheel is not installed.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    spec = importlib.util.find_spec(_PACKAGE)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    objects = sorted(folder.glob("xllamacpp*.so")) if folder else []
    if not objects:
        raise FormatError("ggml is not installed: pip install xllamacpp")
    lib = ctypes.CDLL(str(objects[0]))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    lib.ggml_quantize_init.argtypes = (ctypes.c_int,)
    lib.ggml_quantize_init.restype = None
    return lib


@cache
def _traits(fmt: Format) -> _TypeTraits:
    traits: _TypeTraits = library().ggml_get_type_traits(TYPES[fmt.name]).contents
    # the format table against the library that will write the bytes
    if (traits.blck_size, traits.type_size) != (fmt.block, fmt.block_bytes):
        raise FormatError(
            f"{fmt.name}: this ggml stores {traits.blck_size} weights in {traits.type_size} bytes, "
            f"needed {fmt.block} in {fmt.block_bytes}; install the xllamacpp of constraints.txt"
        )
    return traits


@cache
def _prepared(fmt: Format) -> int:
    """Returns ggml's number of the format, whose tables are there."""
    _traits(fmt)
    library().ggml_quantize_init(TYPES[fmt.name])
    return TYPES[fmt.name]


class GgmlCodec(Codec):
    """The formats of llama.cpp."""

    name = CODEC
    package = _PACKAGE
    formats = tuple(FORMATS.values())

    @cached_property
    def version(self) -> str:
        """Version of the wheel."""
        return version(_PACKAGE)

    def encode_rows(
        self, weights: Floats, fmt: Format, importance: Floats | None, *, out: Bytes
    ) -> None:
        """Encodes `rows x in_features` by `ggml_quantize_chunk`."""
        if fmt.name == "F32":  # ggml has no quantizer for it
            out[...] = weights.view(np.uint8)
            return
        rows, width = weights.shape
        library().ggml_quantize_chunk(
            _prepared(fmt),
            weights.ctypes.data,
            out.ctypes.data,
            0,
            rows,
            width,
            None if importance is None else importance.ctypes.data,
        )

    def decode_rows(self, data: Bytes, fmt: Format, *, out: Floats) -> None:
        """Decodes `rows x bytes per row` by ggml's `to_float` of the format."""
        if fmt.name == "F32":
            out[...] = data.view(np.float32)
            return
        _TO_FLOAT(_traits(fmt).to_float)(data.ctypes.data, out.ctypes.data, out.size)

    def prepare(self, fmt: Format) -> None:
        """Builds the format's tables: seconds for the IQ1 and IQ2 types."""
        _prepared(fmt)

    def preparation_seconds(self, fmt: Format) -> float:
        """Returns what was measured."""
        return _PREPARATION_SECONDS.get(fmt.name, 0.0)

    def weights_per_second(self, fmt: Format) -> float:
        """Returns what was measured; the median where a format was not."""
        return _WEIGHTS_PER_SECOND.get(fmt.name, _TYPICAL_PER_SECOND)

    def scales(self, data: Bytes, fmt: Format) -> Halves | None:
        """Returns `d`, or `d` and `dmin`, of each block; None for MXFP4, BF16, F16 and F32."""
        return read_scales(data, fmt)

    def replace_scales(self, data: Bytes, fmt: Format, scales: Halves) -> Bytes:
        """Writes `d`, or `d` and `dmin`, into each block."""
        return write_scales(data, fmt, scales)

    def block_format(self, fmt: Format) -> "BlockFormat | None":
        """Returns what a format's bytes are made of; None for the float types and MXFP4."""
        from allocator.codecs.ggml_blocks.registry import block_format

        return block_format(fmt)

    def second_opinion(self, data: Bytes, fmt: Format) -> Floats | None:
        """Decodes `rows x bytes per row` with gguf-py, which computes in numpy."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        decoded: Floats = dequantize(data, GGMLQuantizationType(TYPES[fmt.name]))
        return decoded


GGML = GgmlCodec()
