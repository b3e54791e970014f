"""Names of parameters and typed keys: each gives the other back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.decision.parameters import SETTINGS, ExpertsOf, FormatOf, SettingOf, parse
from allocator.errors import SpaceError

KEYS = st.one_of(
    st.builds(FormatOf, st.text()),
    st.builds(ExpertsOf, st.none() | st.integers(0, 10**9 - 1)),
    st.sampled_from(SETTINGS),
)


@given(key=KEYS)
def test_the_name_of_a_key_is_parsed_to_the_key(key):
    assert parse(key.name) == key
    assert hash(parse(key.name)) == hash(key)


@given(name=st.text() | st.sampled_from(["experts.", "format.", "experts_"]).flatmap(
    lambda head: st.text("0123456789.abcdefl").map(head.__add__)))  # fmt: skip
def test_what_is_parsed_has_that_name(name):
    try:
        key = parse(name)
    except SpaceError:
        return
    assert key.name == name


def test_keys_of_a_study():
    assert parse("format.layers.3.experts.down") == FormatOf("layers.3.experts.down")
    assert parse("experts.12") == ExpertsOf(12)
    assert parse("experts.all") == ExpertsOf(None)
    assert [parse(n) for n in ("experts_used", "kv_format", "micro_batch")] == list(SETTINGS)


@pytest.mark.parametrize(
    "name", ["", "experts", "experts.", "experts.-1", "experts.01", "experts.²", "formats.x", "kv"]
)
def test_other_names_are_refused(name):
    with pytest.raises(SpaceError, match=r"unknown param .*; known: experts\.\*, format\.\*, exp"):
        parse(name)


def test_spaces_list_values_largest_first_but_for_experts(spaces):
    for space in spaces.values():
        keys = [parse(name) for name in space.choices]
        assert [key.name for key in keys] == list(space.choices)
        ascending = {k for k in keys if not k.largest_first}
        assert ascending == {k for k in keys if isinstance(k, ExpertsOf)} | {
            SettingOf("experts_used")
        }
