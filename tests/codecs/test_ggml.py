"""The ggml codec against gguf-py's own decoder, and against what ggml does silently."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from allocator.codecs.ggml import GGML
from allocator.errors import FormatError
from allocator.formats import FORMATS, OFFERED

decode, encode = GGML.decode, GGML.encode

NEEDY = [f.name for f in FORMATS.values() if f.needs_importance]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lognormal(*shape, seed=1):
    return np.random.default_rng(seed).lognormal(sigma=2, size=shape).astype(np.float32)


def error(fmt, weights, importance=None):
    decoded = decode(encode(weights, FORMATS[fmt], importance), FORMATS[fmt])
    return float(np.square(decoded - weights).mean() ** 0.5)


@pytest.mark.parametrize("name", FORMATS)
def test_gguf_py_decodes_what_we_encode(name):
    weights = normal(2, 3, 512)
    data = encode(weights, FORMATS[name], np.ones(512, np.float32))
    assert data.nbytes == FORMATS[name].nbytes(weights.shape)
    theirs = dequantize(data.reshape(6, -1), GGMLQuantizationType[name]).reshape(weights.shape)
    ours = decode(data, FORMATS[name])
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert np.square(ours - weights).mean() < 0.36  # relative to 1; the worst known is 0.525²


def test_more_bits_lose_less():
    weights = normal(8, 512)
    formats = sorted((FORMATS[n] for n in OFFERED), key=lambda f: f.bits)
    errors = {f.name: error(f.name, weights, np.ones(512, np.float32)) for f in formats}
    for small in formats:
        for large in formats:
            if large.bits > small.bits * 1.15:
                assert errors[large.name] < errors[small.name], (small.name, large.name)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ3_XXS", "IQ1_S"])
@pytest.mark.parametrize("shape", [(5, 256), (3, 5, 256)])
def test_threads_do_not_change_the_bytes(name, shape):
    weights, importance = normal(*shape), lognormal(256)
    one = encode(weights, FORMATS[name], importance)
    two = encode(weights, FORMATS[name], importance, threads=2)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.block > 1])
def test_rows_that_are_no_whole_blocks_raise(name):
    width = FORMATS[name].block + FORMATS[name].block // 2
    with pytest.raises(FormatError, match=f"{name}.*{width}.*{FORMATS[name].block}"):
        encode(normal(2, width), FORMATS[name], np.ones(width, np.float32))


@pytest.mark.parametrize("name", NEEDY)
def test_missing_importance_raises_instead_of_aborting(name):
    with pytest.raises(FormatError, match=f"{name} needs an importance"):
        encode(normal(2, 256), FORMATS[name])


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS", "IQ4_NL"])
def test_each_expert_is_encoded_under_its_own_importance(name):
    weights, importance = normal(3, 4, 256), lognormal(3, 256)
    stacked = encode(weights, FORMATS[name], importance)
    for expert in range(3):
        alone = encode(weights[expert], FORMATS[name], importance[expert])
        np.testing.assert_array_equal(stacked[expert], alone)
    assert (stacked[1] != encode(weights[1], FORMATS[name], importance[0])).any()


@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "IQ2_XXS"])
def test_importance_lowers_the_weighted_error(name):
    weights, importance = normal(16, 256), lognormal(256)

    def weighted(vector):
        decoded = decode(encode(weights, FORMATS[name], vector), FORMATS[name])
        return float((np.square(decoded - weights) * importance).sum())

    assert weighted(importance) < 0.9 * weighted(np.ones(256, np.float32))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "IQ2_XS"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_raise(name, bad):
    weights = normal(2, 256)
    weights[1, 7] = bad
    with pytest.raises(FormatError, match="not finite"):
        encode(weights, FORMATS[name], np.ones(256, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1])
def test_importance_that_is_no_weight_raises(bad):
    importance = np.ones(256, np.float32)
    importance[3] = bad
    with pytest.raises(FormatError, match="importance must be"):
        encode(normal(2, 256), FORMATS["Q4_K"], importance)


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


def test_decode_into_given_memory():
    data = encode(normal(3, 4, 256), FORMATS["Q6_K"])
    out = np.full((2, 4, 256), np.nan, np.float32)
    decode(data[[2, 0]], FORMATS["Q6_K"], out=out)
    np.testing.assert_array_equal(out, decode(data, FORMATS["Q6_K"])[[2, 0]])


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_of_gaussian_errors(name):
    weights = torch.from_numpy(normal(64, 2048)).bfloat16().float().numpy()
    decoded = decode(encode(weights, FORMATS[name], np.ones(2048, np.float32)), FORMATS[name])
    found = np.square(decoded - weights).sum() / np.square(weights).sum()
    assert found == pytest.approx(FORMATS[name].gaussian_error, rel=0.02, abs=1e-8)
