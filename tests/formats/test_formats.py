"""The table of bytes against ggml's library and gguf-py; fallbacks against what was measured."""

import ctypes

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from allocator.codecs.ggml import library
from allocator.errors import FormatError, SpaceError
from allocator.formats import (
    FORMATS,
    OFFERED,
    fallback,
    format_named,
    offered,
    parts,
    parts_text,
)
from allocator.formats.ggml import TYPES

SHAPES = st.lists(st.integers(1, 5), max_size=3).flatmap(
    lambda outer: st.integers(1, 1100).map(lambda n: (*outer, n))
)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_table_is_that_of_the_library(fmt):
    traits = library().ggml_get_type_traits(TYPES[fmt.name]).contents
    assert (traits.blck_size, traits.type_size) == (fmt.block, fmt.block_bytes)
    assert traits.type_name.decode().upper() == fmt.name.upper()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_table_is_that_of_gguf_py(fmt):
    kind = GGMLQuantizationType(TYPES[fmt.name])
    assert kind.name == fmt.name
    assert GGML_QUANT_SIZES[kind] == (fmt.block, fmt.block_bytes)


def test_importance_is_needed_where_the_library_says_so():
    needs = library().ggml_quantize_requires_imatrix
    needs.restype = ctypes.c_bool
    for fmt in FORMATS.values():
        assert needs(TYPES[fmt.name]) == fmt.needs_importance, fmt.name


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


@given(SHAPES, st.booleans(), st.sampled_from(sorted(FORMATS)))
def test_nothing_larger_than_what_is_exact(shape, importance, name):
    source = FORMATS[name]
    found = offered(shape, importance=importance or source.needs_importance, source=source)
    assert found[0] is source
    others = offered(shape, importance=importance or source.needs_importance)
    assert found[1:] == tuple(f for f in others if f.bits < source.bits)


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


# -- parts


@given(
    st.sets(st.integers(0, 400), min_size=1),
    st.lists(st.sampled_from(sorted(FORMATS)), min_size=1, max_size=3, unique=True),
    st.randoms(use_true_random=False),
)
def test_parts_round_trip(retained, names, rng):
    names = sorted(names, key=lambda n: (-FORMATS[n].bits, n))[: len(retained)]
    dealt = dict(zip(rng.sample(sorted(retained), len(names)), names, strict=True))  # one at least
    held = {n: sorted(e for e in retained if dealt.setdefault(e, names[0]) == n) for n in names}
    rows = tuple((n, tuple(experts)) for n, experts in held.items())
    text = parts_text(rows)
    found = parts(text, tuple(sorted(retained)))
    assert tuple((fmt.name, experts) for fmt, experts in found) == rows
    assert ("+" in text) == (len(names) > 1)
    assert all(fmt is FORMATS[fmt.name] for fmt, _ in found)


def test_parts_spelled_out():
    rows = (("IQ2_XXS", (0, 3, 5)), ("IQ1_S", (1, 2, 4)))
    assert parts_text(rows) == "IQ2_XXS:0,3,5+IQ1_S:1,2,4"
    assert parts("IQ1_S", (7, 9)) == ((FORMATS["IQ1_S"], (7, 9)),)
    assert parts("IQ1_S", ()) == ((FORMATS["IQ1_S"], ()),)


ODD_PARTS = {  # of experts 1, 2, 5
    "IQ2_XXS:1,2": "hold expert 5 0 times",
    "IQ2_XXS:1,2,5": "written as its plain name",
    "IQ2_XXS:1,2+IQ1_S:2,5": "hold expert 2 2 times",
    "IQ2_XXS:1,1,2+IQ1_S:5": "hold expert 1 2 times",
    "IQ2_XXS:1,2+IQ1_S:3,5": "holds expert 3, which its layer does not retain",
    "IQ1_S:1,2+IQ2_XXS:5": "by bits descending",
    "IQ2_XXS:2,1+IQ1_S:5": "experts ascending",
    "IQ2_XXS:01,2+IQ1_S:5": "experts ascending",
    "IQ2_XXS:1+IQ2_XXS:2,5": "each once",
    "Q4_0:1+IQ4_NL:2,5": "by bits descending",  # of the same bits: by name
    "IQ2_XXS:1,2+IQ1_S": "part 'IQ1_S': needed FORMAT:experts",
    "IQ2_XXS:1,2+IQ1_S:": "part 'IQ1_S:': needed FORMAT:experts",
    "IQ2_XXS:1,2++IQ1_S:5": "part '': needed",
    "IQ2_XXS:1, 2+IQ1_S:5": "part 'IQ2_XXS:1, 2': needed",
    "IQ2_XXS:-1,2+IQ1_S:5": "part 'IQ2_XXS:-1,2': needed",
    "IQ2_XXS*2+IQ1_S": r"part 'IQ2_XXS\*2': needed",
    "IQ2_XXS:1:2+IQ1_S:5": "part 'IQ2_XXS:1:2': needed",
    "IQ2_XXS:\u0661,2+IQ1_S:5": "needed FORMAT:experts",
    "IQ2_XXS:1,2+IQ1_S:5\n": "needed FORMAT:experts",
    f"IQ2_XXS:{'9' * 5000}+IQ1_S:5": "needed FORMAT:experts",
}


@pytest.mark.parametrize("text", ODD_PARTS, ids=lambda t: t[:24].encode("unicode_escape").decode())
def test_odd_parts_are_refused(text):
    with pytest.raises(SpaceError, match=ODD_PARTS[text]) as caught:
        parts(text, (1, 2, 5))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_parts_of_unknown_formats():
    for text in ("IQ2:1,2+IQ1_S:5", ":1,2+IQ1_S:5"):
        with pytest.raises(FormatError, match="unknown format"):
            parts(text, (1, 2, 5))
