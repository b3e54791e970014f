"""A space with settings, and random params, for what is priced and made feasible."""

import pytest
from hypothesis import strategies as st

from allocator.decision.search_space import SearchSpace, bind


@pytest.fixture(scope="module")
def on_device(layouts, profiles):
    """A space whose settings may be chosen, too."""
    spec = SearchSpace(
        schema=1, experts_used=[2, 3, 4], kv_format=["f16", "q8_0"], micro_batch=[32, 512]
    )
    return bind(spec, layouts["gguf"], profiles["gguf"].saliency)


@pytest.fixture(scope="session")
def draw():
    """`draw(data, space)`: random complete params."""

    def drawn(data, space):
        return {n: data.draw(st.sampled_from(v), label=n) for n, v in space.choices.items()}

    return drawn
