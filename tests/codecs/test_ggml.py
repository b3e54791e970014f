"""The ggml codec against gguf-py's own decoder, and against what ggml does silently."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from allocator.codecs.ggml import GGML
from allocator.formats import FORMATS, OFFERED
from allocator.formats.ggml import FORMATS as GGML_FORMATS
from allocator.testing.codecs import CodecConformance

decode, encode = GGML.decode, GGML.encode


class TestConformance(CodecConformance):
    formats = tuple(GGML_FORMATS)

    @pytest.fixture(scope="class")
    @classmethod
    def codec(cls):
        return GGML


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lognormal(*shape, seed=1):
    return np.random.default_rng(seed).lognormal(sigma=2, size=shape).astype(np.float32)


def error(fmt, weights, importance=None):
    decoded = decode(encode(weights, FORMATS[fmt], importance), FORMATS[fmt])
    return float(np.square(decoded - weights).mean() ** 0.5)


def test_more_bits_lose_less():
    weights = normal(8, 512)
    formats = sorted((FORMATS[n] for n in OFFERED), key=lambda f: f.bits)
    errors = {f.name: error(f.name, weights, np.ones(512, np.float32)) for f in formats}
    for small in formats:
        for large in formats:
            if large.bits > small.bits * 1.15:
                assert errors[large.name] < errors[small.name], (small.name, large.name)


@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "IQ2_XXS"])
def test_importance_lowers_the_weighted_error(name):
    weights, importance = normal(16, 256), lognormal(256)

    def weighted(vector):
        decoded = decode(encode(weights, FORMATS[name], vector), FORMATS[name])
        return float((np.square(decoded - weights) * importance).sum())

    assert weighted(importance) < 0.9 * weighted(np.ones(256, np.float32))


def test_f32_and_f16_are_numpys():
    weights = normal(3, 64)
    np.testing.assert_array_equal(encode(weights, FORMATS["F32"]), weights.view(np.uint8))
    half = weights.astype(np.float16)
    np.testing.assert_array_equal(encode(weights, FORMATS["F16"]), half.view(np.uint8))
    np.testing.assert_array_equal(decode(half.view(np.uint8), FORMATS["F16"]), half)


def floats(limit):
    numbers = st.floats(-limit, limit, width=32, allow_subnormal=False)
    return arrays(np.float32, (2, 64), elements=numbers)


@settings(max_examples=60, deadline=None)
@given(floats(2.0**120))
def test_bf16_is_torchs_and_idempotent(weights):
    data = encode(weights, FORMATS["BF16"])
    decoded = decode(data, FORMATS["BF16"])
    np.testing.assert_array_equal(decoded, torch.from_numpy(weights).bfloat16().float().numpy())
    np.testing.assert_array_equal(encode(decoded, FORMATS["BF16"]), data)


@settings(max_examples=60, deadline=None)
@given(floats(2.0**20))
def test_q8_0_is_idempotent(weights):
    once = decode(encode(weights, FORMATS["Q8_0"]), FORMATS["Q8_0"])
    data = encode(once, FORMATS["Q8_0"])
    np.testing.assert_array_equal(decode(data, FORMATS["Q8_0"]), once)
