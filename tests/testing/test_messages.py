"""A conformance case that fails says what to change, also in a test outside of this repository."""

from dataclasses import replace

import pytest

from allocator.codecs.ggml import GGML
from allocator.formats import Importance, format_named
from allocator.testing import codecs, families, runtimes, samplers

Q8_0 = format_named("Q8_0")  # which rounds: importance changes nothing


@pytest.mark.parametrize("module", [codecs, families, runtimes, samplers])
def test_failing_cases_show_what_they_compared(module):
    """Against pytest's loader: without it, an `assert` in an installed module shows no values."""
    assert type(module.__spec__.loader).__name__ == "AssertionRewritingHook"


def test_the_measured_error_is_named():
    wrong = replace(Q8_0, gaussian_error=1.0)
    with pytest.raises(AssertionError, match=r"Q8_0: gaussian_error is 2\.\d+e-05 as measured, 1 "):
        codecs.CodecConformance().test_the_error_on_normal_weights(GGML, wrong)


def test_importance_that_changes_nothing_is_named():
    wrong = replace(Q8_0, importance=Importance.USED)
    with pytest.raises(AssertionError, match=r"Q8_0: .*Importance\.IGNORED"):
        codecs.CodecConformance().test_importance_does_what_the_format_says(GGML, wrong)
