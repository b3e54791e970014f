"""Intervals and distances, compared with plain sums and with what they must come to."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from allocator.app.held_out_file import HeldOutRow, HeldOutSplit
from allocator.reporting import intervals, svg, text


def row(name, nbytes, kl_of, kind="baseline"):
    n = len(kl_of)
    return HeldOutRow(
        name=name, kind=kind, allocation=name, weights="", bits=2.0, bytes=nbytes, experts="",
        kl=float(np.mean(kl_of)), perplexity=1.0, top1=1.0, kl_of=list(kl_of),
        nll_of=[math.log(7.0)] * n, top1_of=[0.25] * n,
    )  # fmt: skip


def split(rows, tokens=(8, 8, 16, 8)):
    return HeldOutSplit("report", "d", list(tokens), ["a", "a", "b", "b"], rows)


KL = (0.1, 0.2, 0.4, 0.3)


def test_means_are_weighted_by_tokens():
    measured = split([row("one", 10, KL)])
    figure = intervals.kl(measured, measured.rows[0])
    assert figure.value == pytest.approx((8 * 0.1 + 8 * 0.2 + 16 * 0.4 + 8 * 0.3) / 40)
    assert min(KL) < figure.low < figure.value < figure.high < max(KL)
    assert intervals.kl(measured, measured.rows[0], "b").value == pytest.approx(
        (16 * 0.4 + 8 * 0.3) / 24
    )
    original = replace(row("original", 90, [0.0] * 4, "original"), nll_of=[math.log(5.0)] * 4)
    both = split([measured.rows[0], original])
    ratio = intervals.perplexity(both, both.rows[0])
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([7 / 5] * 3)
    assert intervals.top1(measured, measured.rows[0]).high == pytest.approx(0.25)


def test_distance():
    own = row("own", 20, [0.5 * x for x in KL], "allocation")
    exact = intervals.distance(split([row("same", 20, KL), own]), own)
    assert (exact.against, exact.same_size) == (("same",), True)
    # the same ratio in every document: an interval of no width
    assert [exact.ratio.value, exact.ratio.low, exact.ratio.high] == pytest.approx([0.5] * 3)
    rows = [row("low", 10, [4 * x for x in KL]), row("high", 30, KL), own]
    between = intervals.distance(split(rows), own)
    assert between.against == ("low", "high")
    assert between.ratio.value == pytest.approx(0.5 / 2)
    smaller = intervals.distance(split([row("low", 10, KL), own]), own)
    assert (smaller.against, smaller.same_size) == (("low",), False)
    assert intervals.distance(split([row("high", 30, KL), own]), own) is None
    assert intervals.distance(split([own]), own) is None


@given(
    st.floats(1e-6, 1e6), st.floats(1.001, 1e6), st.booleans()
)  # fmt: skip
def test_ticks_are_on_the_scale(low, factor, log):
    scale = svg.Scale.over([low, low * factor], 50, 400, log=log)
    assert 2 <= len(scale.ticks) <= 12
    at = [scale(t) for t in scale.ticks]
    assert at == sorted(at)
    assert at[0] >= 50 - 1e-6
    assert at[-1] <= 400 + 1e-6
    assert [float(svg.number(x)) for x in at] == pytest.approx(at, abs=0.051)


def test_numbers_as_they_are_written():
    assert [text.size(n) for n in (12, 2048, 8_234_496, 5 * 2**30, 123 * 2**30)] == [
        "12 B", "2.00 KiB", "7.85 MiB", "5.00 GiB", "123 GiB",
    ]  # fmt: skip
    assert [text.loss(x) for x in (0.0664512, 1.25, 0.000123456, 2e-6, 0.0, math.nan)] == [
        "0.06645", "1.250", "0.0001235", "2.00e-06", "0", "no number",
    ]  # fmt: skip
    assert svg.tick_text(0.001) == "0.001"
    assert svg.tick_text(1e-5) == "10⁻⁵"
    assert svg.tick_text(3e7) == "3·10⁷"
