"""Block formats against the codec's own bytes and its decoder."""

import numpy as np
import pytest
import torch

from allocator.codecs.ggml import GGML
from allocator.formats.ggml import FORMATS

FORMS = {name: GGML.block_format(fmt) for name, fmt in FORMATS.items()}
KNOWN = [name for name, form in FORMS.items() if form is not None]


def encoded(name, *, rows=7, seed=0):
    """Weights of several sizes and a row of zeros."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(2, rows, 1024)) * rng.lognormal(sigma=2, size=(2, rows, 1))
    weights[0, 0] = 0
    importance = rng.lognormal(size=(2, 1024)).astype(np.float32)
    return GGML.encode(weights.astype(np.float32), FORMATS[name], importance)


def arbitrary(name, *, seed=0):
    """Bytes that no encoder wrote; scales are finite."""
    rng = np.random.default_rng(seed)
    fmt = FORMATS[name]
    data = rng.integers(0, 256, (3, 5, 2 * fmt.block_bytes), np.uint8)
    scales = rng.normal(size=GGML.scales(data, fmt).shape).astype(np.float16)
    return torch.from_numpy(GGML.with_scales(data, fmt, scales)), torch.from_numpy(scales)


@pytest.mark.parametrize("name", KNOWN)
def test_packing_what_was_unpacked_gives_the_same_bytes(name):
    for data in (torch.from_numpy(encoded(name)), arbitrary(name)[0]):
        packed = FORMS[name].pack(FORMS[name].unpack(data))
        assert packed.dtype == torch.uint8
        assert torch.equal(packed, data)


@pytest.mark.parametrize("name", KNOWN)
def test_values_are_those_of_the_codec(name):
    for data in (encoded(name), arbitrary(name)[0].numpy()):
        values = FORMS[name].values(torch.from_numpy(data))
        assert values.dtype == torch.float32
        np.testing.assert_array_equal(values.numpy(), GGML.decode(data, FORMATS[name]))


@pytest.mark.parametrize("name", KNOWN)
def test_scales_are_read_as_they_were_written(name):
    data, scales = arbitrary(name)
    assert torch.equal(FORMS[name].unpack(data).scales, scales)


@pytest.mark.parametrize("name", KNOWN)
def test_values_are_proportional_to_their_scales(name):
    form = FORMS[name]
    data, scales = arbitrary(name)
    for i in range(scales.shape[-1]):
        twice = scales.clone()
        twice[..., i] *= 2
        other = GGML.with_scales(data.numpy(), FORMATS[name], twice.numpy())
        grown = torch.from_numpy(GGML.decode(other, FORMATS[name]))
        part = form.parts(form.unpack(data))[i]
        torch.testing.assert_close(grown - form.values(data), part, rtol=1e-4, atol=1e-3)
