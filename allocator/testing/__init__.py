"""Conformance cases that codecs, families, runtimes and samplers of one's own inherit.

In: nothing. Out: modules of pytest cases. Invariant: a failing case shows the values that it
compared, also in a test outside of this repository.
"""

import pytest

pytest.register_assert_rewrite(
    *(f"{__name__}.{module}" for module in ("codecs", "families", "runtimes", "samplers"))
)
