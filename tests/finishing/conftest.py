"""What tests of tuning share."""

import pytest

from allocator.decision.allocation import Allocation
from allocator.families import Role


@pytest.fixture(scope="session")
def allocation_of():
    """`allocation_of(layout)`: an allocation with every kind of tensor that tuning meets."""
    return _allocation_of


def _allocation_of(layout):
    """Formats with one scale and with two, parts where the target has them, a lost expert."""
    formats = {}
    for name, group in layout.groups.items():
        wide = group.shape[-1] % 256 == 0
        formats[name] = "Q4_K" if wide else "Q4_1" if group.role is Role.O else "Q4_0"
        if group.role is Role.EXPERT_DOWN and layout.target == "safetensors":
            formats[name] = "Q5_1:1,3,5+Q4_0:2,4,6,7"  # expert 0 is not retained
        if group.role is Role.SHARED_UP:
            formats[name] = "BF16"  # no scales
    return Allocation.of(
        target=layout.target,
        retained=dict.fromkeys(layout.layers, tuple(range(1, layout.inventory.n_experts))),
        formats=formats,
        experts_used=layout.inventory.experts_used,
    )
