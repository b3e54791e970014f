"""Device presets, and what is refused of them."""

import pytest

from allocator.app.device_presets import read_device_preset
from allocator.app.study_file import DeviceBudgetSpec
from allocator.errors import SpaceError

GOOD = {"schema": 1, "name": "A", "memory": "8GB", "bandwidth": "50GB", "source": "https://a"}


def write(path, **changes):
    rows = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in rows.items()))
    return path


def test_a_preset_is_a_budget(tmp_path):
    path = write(tmp_path / "a.toml")
    assert read_device_preset(path).name == "A"
    budget = DeviceBudgetSpec(preset="a.toml", reserve="1GB").budget(tmp_path)
    assert (budget.nbytes, budget.bounds) == (8 * 10**9, "device")
    assert (budget.workload.bandwidth, budget.workload.reserve) == (50 * 10**9, 10**9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": "8GB"}, "weight"),
        ({"source": None}, "source"),
        ({"schema": 2}, "schema 2, needed 1"),
        ({"memory": "8 potatoes"}, "8 potatoes"),
        ({"bandwidth": "0GB"}, "needed a size above 0"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(SpaceError, match=message) as caught:
        read_device_preset(write(tmp_path / "a.toml", **changes))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
