"""Device presets: how much memory a device has, and how fast it is read.

In: a TOML file (grammar: `search_spaces/README.md`). Out: a frozen `Device`. Invariant: both
figures are sizes, and name where they were published.
"""

from pathlib import Path

import msgspec

from allocator.errors import AllocatorError, SpaceError
from allocator.files.atomic import read_toml
from allocator.units import parse_bytes


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device.

    Attributes:
        name: as it is sold.
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


def read_device(path: Path) -> Device:
    """A preset.

    Raises:
        SpaceError: if the file is missing, has an unknown key, or a figure that is no size.
    """
    device = read_toml(path, Device, SpaceError)
    if device.schema != 1:
        raise SpaceError(f"{path}: schema {device.schema}, needed 1; use a newer allocator")
    try:
        sizes = parse_bytes(device.memory), parse_bytes(device.bandwidth)
    except AllocatorError as error:
        raise SpaceError(f"{path}: {error}") from None
    if min(sizes) < 1:
        raise SpaceError(f"{path}: memory and bandwidth must be positive")
    return device
