"""Sizes and durations against exact rational arithmetic."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.errors import AllocatorError
from allocator.units import least_size, parse_bytes, parse_seconds, show_bytes

UNITS = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
UNITS |= {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("12MiB", 12 << 20),
        ("1.5GB", 1_500_000_000),
        ("8234496", 8234496),
        (" 2 gib ", 2 << 30),
        (77, 77),
        ("1_000kb", 10**6),
        ("0", 0),
        ("4503599627370496.5B", 4503599627370496),
    ],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@given(st.integers(0, 10**18), st.integers(0, 999), st.sampled_from(sorted(UNITS)))
def test_sizes_are_exact(whole, thousandths, unit):
    exact = (whole + Fraction(thousandths, 1000)) * UNITS[unit]
    assert abs(parse_bytes(f"{whole}.{thousandths:03}{unit}") - exact) <= Fraction(1, 2)


@given(st.integers(0, 10**18), st.sampled_from(sorted(UNITS)))
def test_whole_sizes_are_exact(whole, unit):
    assert parse_bytes(f"{whole}{unit}") == whole * UNITS[unit]


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1GB", "1 GB 2", "1.GB", "12QB", "nan", "1e9", "٣GB", "0x10", "1,5GB", "5min"],
)
def test_no_sizes(text):
    with pytest.raises(AllocatorError, match=r"needed a size such as 12MiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 5000 + ".5GiB", "x" * 5000])
def test_endless_sizes_are_one_short_line(text):
    with pytest.raises(AllocatorError, match=r"needed a size such as 12MiB") as caught:
        parse_bytes(text)
    assert len(str(caught.value)) < 160


@given(st.integers(1, 1 << 45))
def test_a_least_size_is_read_as_no_less_and_hardly_more(nbytes):
    read = parse_bytes(least_size(nbytes))
    assert nbytes <= read <= nbytes * 1.01


@pytest.mark.parametrize(
    ("text", "seconds"), [("30min", 1800), ("2h", 7200), ("90s", 90), ("0.5h", 1800), ("15", 15)]
)
def test_durations(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1d", "-5s", "3MB"])
def test_no_durations(text):
    with pytest.raises(AllocatorError, match="needed a duration such as 30min"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1,024 B (1.00 KiB)"),
        (8234496, "8,234,496 B (7.85 MiB)"),
        (5 << 40, "5,497,558,138,880 B (5.00 TiB)"),
    ],
)
def test_shown(nbytes, text):
    assert show_bytes(nbytes) == text
