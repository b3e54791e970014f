"""Device presets: how much memory a device has, and how many of its bytes are read in a second.

In: a TOML file (grammar: `search_spaces/README.md`). Out: a frozen `DevicePreset`. Invariant: both
figures are sizes, and name where they were published.
"""

from pathlib import Path

import msgspec

from allocator.errors import AllocatorError, SpaceError
from allocator.files.atomic import read_toml
from allocator.units import parse_bytes


class DevicePreset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device as it is sold.

    Attributes:
        name: of the product.
        memory: all of it, e.g. `128GiB`.
        bandwidth: bytes read from it in a second, e.g. `273GB`.
        source: where both figures were published.
        note: what else should be known.
    """

    schema: int
    name: str
    memory: str
    bandwidth: str
    source: str
    note: str = ""


def read_device_preset(path: Path) -> DevicePreset:
    """Reads a device preset.

    Raises:
        SpaceError: if the file is missing, has an unknown key, or a figure that is no size.
    """
    preset = read_toml(path, DevicePreset, SpaceError)
    if preset.schema != 1:
        raise SpaceError(f"{path}: schema {preset.schema}, needed 1; use a newer allocator")
    try:
        sizes = parse_bytes(preset.memory), parse_bytes(preset.bandwidth)
    except AllocatorError as error:
        raise SpaceError(f"{path}: {error}") from None
    if min(sizes) < 1:
        raise SpaceError(f"{path}: memory and bandwidth must be positive")
    return preset
