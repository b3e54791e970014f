"""The table of bytes against ggml's library and gguf-py; fallbacks against what was measured."""

import ctypes

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from allocator.codecs.ggml import library
from allocator.errors import FormatError
from allocator.formats import FORMATS, OFFERED, fallback, format_named, offered

SHAPES = st.lists(st.integers(1, 5), max_size=3).flatmap(
    lambda outer: st.integers(1, 1100).map(lambda n: (*outer, n))
)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_table_is_that_of_the_library(fmt):
    traits = library().ggml_get_type_traits(fmt.ggml_type).contents
    assert (traits.blck_size, traits.type_size) == (fmt.block, fmt.block_bytes)
    assert traits.type_name.decode().upper() == fmt.name.upper()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_table_is_that_of_gguf_py(fmt):
    kind = GGMLQuantizationType(fmt.ggml_type)
    assert kind.name == fmt.name
    assert GGML_QUANT_SIZES[kind] == (fmt.block, fmt.block_bytes)


def test_importance_is_needed_where_the_library_says_so():
    needs = library().ggml_quantize_requires_imatrix
    needs.restype = ctypes.c_bool
    for fmt in FORMATS.values():
        assert needs(fmt.ggml_type) == fmt.needs_importance, fmt.name


@given(st.sampled_from(sorted(FORMATS)), SHAPES)
def test_bytes_of_a_shape(name, shape):
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    n = 1
    for size in shape[:-1]:
        n *= size
    if shape[-1] % block:
        with pytest.raises(FormatError, match=f"{name}: in_features {shape[-1]} is not a multiple"):
            FORMATS[name].nbytes(shape)
    else:
        assert FORMATS[name].nbytes(shape) == n * (shape[-1] // block) * block_bytes


@given(SHAPES, st.booleans())
def test_offered_store_as_named_and_descend(shape, importance):
    found = offered(shape, importance=importance)
    sizes = [f.nbytes(shape) for f in found]
    assert found
    assert sizes == sorted(sizes, reverse=True)
    assert all(f.name in OFFERED for f in found)
    assert importance or not any(f.needs_importance for f in found)


FALLBACK = {  # evidence.md: llama-quantize's own, for rows of 32 that are not rows of 256
    **dict.fromkeys(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"], "IQ4_NL"),
    **dict.fromkeys(["IQ3_XXS", "IQ3_S", "IQ4_XS"], "IQ4_NL"),
    **dict.fromkeys(["Q2_K", "Q3_K"], "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_fallback(name):
    small = FALLBACK.get(name, name)
    assert fallback(name, (3, 512)).name == name
    assert fallback(name, (3, 1408 + 32)).name == small
    assert fallback(name, (3, 40)).name == (name if FORMATS[name].block == 1 else "F16")


def test_unknown_names():
    for ask in (format_named, lambda name: fallback(name, (2, 256))):
        with pytest.raises(FormatError, match="unknown format 'Q4_K_M'; known: F32"):
            ask("Q4_K_M")


def test_effective_bits():
    assert FORMATS["Q4_K"].bits == 4.5
    assert FORMATS["IQ1_S"].bits == 1.5625
