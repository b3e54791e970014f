"""float16 scales of ggml's blocks, against what ggml encodes of doubled weights.

That weights are linear in the scales is tested for all formats by the codec's conformance.
"""

import numpy as np
import pytest

from allocator.codecs.ggml import GGML
from allocator.codecs.ggml_blocks.scales import scales_per_block
from allocator.formats.ggml import FORMATS

ONE = ("Q8_0", "Q6_K", "Q3_K", "Q5_0", "Q4_0", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS",
       "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")  # fmt: skip
TWO = ("Q5_K", "Q4_K", "Q2_K", "Q5_1", "Q4_1")


def encoded(name, scale=1.0):
    fmt = FORMATS[name]
    weights = np.random.default_rng(0).normal(size=(4, 3 * fmt.block)).astype(np.float32)
    return GGML.encode(weights * np.float32(scale), fmt, np.ones(3 * fmt.block, np.float32))


def test_every_format_is_named():
    none = {"MXFP4", "BF16", "F16", "F32"}
    assert {*ONE, *TWO} | none == {*FORMATS}
    for number, names in enumerate((none, ONE, TWO)):
        assert all(scales_per_block(FORMATS[name]) == number for name in names)


@pytest.mark.parametrize("name", ONE + TWO)
def test_doubled_weights_have_doubled_scales(name):
    fmt = FORMATS[name]
    once, twice = encoded(name), encoded(name, 2.0)
    scales, doubled = GGML.scales(once, fmt), GGML.scales(twice, fmt)
    np.testing.assert_array_equal(doubled, 2 * scales)
    np.testing.assert_array_equal(GGML.with_scales(once, fmt, doubled), twice)


@pytest.mark.parametrize("name", ONE + TWO)
def test_only_the_bits_of_scales_change(name):
    fmt = FORMATS[name]
    data = encoded(name)
    scales = GGML.scales(data, fmt)
    flipped = (scales.view(np.uint16) ^ 0x3FFF).view(np.float16)  # finite: two exponent bits stay
    other = GGML.with_scales(data, fmt, np.where(np.isfinite(flipped), flipped, 0))
    bits = np.unpackbits(data ^ other, axis=-1).reshape(-1, 8 * fmt.block_bytes).any(axis=0)
    assert bits.sum() <= 16 * scales.shape[-1]
    assert bits.sum() >= 14 * scales.shape[-1]


@pytest.mark.parametrize("name", ["MXFP4", "BF16", "F16", "F32"])
def test_formats_without_float16_scales_say_so(name):
    assert GGML.scales(encoded(name), FORMATS[name]) is None
    assert GGML.block_format(FORMATS[name]) is None


def test_the_caller_s_bytes_stay():
    data = encoded("IQ1_M")
    before = data.copy()
    scales = GGML.scales(data, FORMATS["IQ1_M"])
    GGML.with_scales(data, FORMATS["IQ1_M"], scales * np.float16(2))
    np.testing.assert_array_equal(data, before)
