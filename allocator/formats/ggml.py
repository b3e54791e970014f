"""ggml's formats: block layouts of `ggml-common.h`, and which of them a search considers.

In: a shape. Out: formats. Invariant: each row of the table spells out the sum of a block's bytes;
tests hold the table against the library that writes the bytes.
"""

from allocator.formats.base import Format, Importance

CODEC = "ggml"
_REQUIRED, _IGNORED = Importance.REQUIRED, Importance.IGNORED

_ROWS: dict[str, tuple[int, int, int, float, Importance] | tuple[int, int, int, float]] = {
    # ggml's number, weights in a block, their bytes, Gaussian error
    "F32": (0, 1, 4, 0.0, _IGNORED),
    "F16": (1, 1, 2, 0.0, _IGNORED),
    "BF16": (30, 1, 2, 0.0, _IGNORED),
    "Q8_0": (8, 32, 2 + 32, 2.87e-5, _IGNORED),  # f16 scale + 8-bit weights
    "Q6_K": (14, 256, 128 + 64 + 16 + 2, 3.00e-4),  # low 4 bits + high 2 bits + scales + f16
    "Q5_K": (13, 256, 4 + 12 + 32 + 128, 1.26e-3),  # 2 f16 + 6-bit scales + high bit + low 4 bits
    "Q4_K": (12, 256, 4 + 12 + 128, 5.04e-3),  # 2 f16 + 6-bit scales + 4-bit weights
    "Q3_K": (11, 256, 32 + 64 + 12 + 2, 2.09e-2),  # high bit + low 2 bits + 6-bit scales + f16
    "Q2_K": (10, 256, 16 + 64 + 4, 7.21e-2),  # 4-bit scales and minima + 2-bit weights + 2 f16
    "Q5_1": (7, 32, 4 + 4 + 16, 1.15e-3),  # f16 scale and minimum + high bits + low 4 bits
    "Q5_0": (6, 32, 2 + 4 + 16, 1.64e-3),  # f16 scale + high bits + low 4 bits
    "Q4_1": (3, 32, 4 + 16, 4.91e-3),  # f16 scale and minimum + 4-bit weights
    "Q4_0": (2, 32, 2 + 16, 6.68e-3),  # f16 scale + 4-bit weights
    "IQ4_NL": (20, 32, 2 + 16, 5.62e-3),  # f16 scale + 4-bit codes
    "MXFP4": (39, 32, 1 + 16, 1.32e-2, _IGNORED),  # exponent of the scale + 4-bit floats
    "IQ4_XS": (23, 256, 2 + 2 + 4 + 128, 5.73e-3),  # f16 + high and low scale bits + 4-bit codes
    "IQ3_S": (21, 256, 2 + 64 + 8 + 32 + 4, 1.89e-2),  # f16 + codes + high bits + signs + scales
    "IQ3_XXS": (18, 256, 2 + 96, 3.32e-2),  # f16 + codes, signs and scales
    "IQ2_S": (22, 256, 2 + 64 + 8 + 8, 6.22e-2),  # f16 + codes and signs + high bits + scales
    "IQ2_XS": (17, 256, 2 + 64 + 8, 9.00e-2, _REQUIRED),  # f16 + codes + scales
    "IQ2_XXS": (16, 256, 2 + 64, 1.18e-1, _REQUIRED),  # f16 + codes, signs, scales
    "IQ1_M": (29, 256, 32 + 16 + 8, 2.05e-1),  # codes + high bits and shifts + scales
    "IQ1_S": (19, 256, 2 + 32 + 16, 2.36e-1, _REQUIRED),  # f16 + codes + high bits
}
"""Gaussian errors are those of ggml's own codecs on 64 rows of 2048 normal bfloat16 weights (so
that 16 bits lose nothing), the same importance everywhere (tests/codecs/test_ggml.py)."""

FORMATS = {
    name: Format(name, block, block_bytes, CODEC, *others)
    for name, (_, block, block_bytes, *others) in _ROWS.items()
}
TYPES = {name: row[0] for name, row in _ROWS.items()}
"""ggml's number (`ggml_type`) of each format, by name."""

_SUPERBLOCK = (  # offered for rows of whole 256-blocks
    "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ3_XXS",
    "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
_SMALL_BLOCK = ("BF16", "Q8_0", "Q5_0", "IQ4_NL", "Q4_0")  # for the other rows of 32-blocks
OFFERED = tuple(dict.fromkeys(_SUPERBLOCK + _SMALL_BLOCK))
"""Names of all formats that a search considers for some shape."""


def offered(shape: tuple[int, ...]) -> tuple[Format, ...]:
    """Returns the formats that a search considers for rows of `shape` = `(..., in_features)`.

    The types left out are dominated at equal bytes on this kind of row; only baselines use them.
    """
    return tuple(FORMATS[n] for n in (_SUPERBLOCK if shape[-1] % 256 == 0 else _SMALL_BLOCK))


_FALLBACK = (  # llama-quantize's replacement for rows that are not whole 256-blocks
    (("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    (("Q2_K", "Q3_K"), "Q4_0"),
    (("Q4_K",), "Q5_0"),
    (("Q5_K",), "Q5_1"),
    (("Q6_K",), "Q8_0"),
)


def replacement(fmt: Format, shape: tuple[int, ...]) -> Format:
    """Returns the format that llama-quantize stores when `fmt` cannot store rows of `shape`."""
    replaced = FORMATS[next((to for names, to in _FALLBACK if fmt.name in names), "F16")]
    return replaced if replaced.stores(shape) else FORMATS["F16"]
