"""Names of an Optuna study's parameters, and the decision that each stands for.

In: a name, as in `trial.params`. Out: a typed key, and its name. Invariant: for every key
`parse(key.name) == key`, and for every name that `parse` takes `parse(name).name == name`.

The names are `format.<group>`, `experts.<layer>` (or `experts.all` where every layer retains as
many), `experts_used`, `kv_format` and `micro_batch`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from allocator.errors import SpaceError

Params = dict[str, Any]
"""Values by name of parameter, as Optuna has them."""
Loss = Callable[[str, Any], float]
"""Predicted loss of one value of a parameter, by name; nats per token."""

_FORMAT, _EXPERTS, _ALL = "format.", "experts.", "all"


@dataclass(frozen=True, slots=True)
class FormatOf:
    """The format, or mix of formats, that a group is stored in."""

    group: str

    @property
    def name(self) -> str:
        """Its name in a study."""
        return _FORMAT + self.group

    @property
    def largest_first(self) -> bool:
        """Whether a space lists its values by descending bytes."""
        return True


@dataclass(frozen=True, slots=True)
class ExpertsOf:
    """How many experts a layer retains; of all layers together where `layer` is None."""

    layer: int | None

    @property
    def name(self) -> str:
        """Its name in a study."""
        return _EXPERTS + (_ALL if self.layer is None else str(self.layer))

    @property
    def largest_first(self) -> bool:
        """Whether a space lists its values by descending bytes."""
        return False


@dataclass(frozen=True, slots=True)
class SettingOf:
    """A setting of the runtime, under the name that it has in a study."""

    name: str

    @property
    def largest_first(self) -> bool:
        """Whether a space lists its values by descending bytes."""
        return self != EXPERTS_USED


EXPERTS_USED = SettingOf("experts_used")
"""Routed experts per token."""
KV_FORMAT = SettingOf("kv_format")
"""The format of keys and values."""
MICRO_BATCH = SettingOf("micro_batch")
"""Tokens that the runtime computes at once."""
SETTINGS = (EXPERTS_USED, KV_FORMAT, MICRO_BATCH)

Parameter = FormatOf | ExpertsOf | SettingOf

KNOWN = f"{_EXPERTS}*, {_FORMAT}*, " + ", ".join(setting.name for setting in SETTINGS)
"""Every form of name, for messages."""


@cache
def parse(name: str) -> Parameter:
    """Returns the decision that a name stands for.

    Raises:
        SpaceError: if the name has none of the forms of this module.
    """
    if name.startswith(_FORMAT):
        return FormatOf(name.removeprefix(_FORMAT))
    if name.startswith(_EXPERTS):
        layer = name.removeprefix(_EXPERTS)
        if layer == _ALL:
            return ExpertsOf(None)
        if re.fullmatch("0|[1-9][0-9]{0,8}", layer):
            return ExpertsOf(int(layer))
    for setting in SETTINGS:
        if setting.name == name:
            return setting
    raise SpaceError(f"unknown param {name!r}; known: {KNOWN}")


def largest_first(name: str) -> bool:
    """Returns whether a space lists the values of a parameter by descending bytes."""
    return parse(name).largest_first


def is_setting(name: str) -> bool:
    """Returns whether a parameter is a setting of the runtime; the others decide weights."""
    return isinstance(parse(name), SettingOf)
