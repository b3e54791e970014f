"""Device presets: how much memory a device has, and how many of its bytes are read in a second.

In: a TOML file (grammar: `docs/search-spaces.md`). Out: a frozen `DevicePreset`. Invariant: both
figures are sizes, and name where they were published.
"""

from pathlib import Path
from typing import Annotated

import msgspec

from allocator.errors import SpaceError
from allocator.files.keys import About
from allocator.files.toml_files import read_toml


class DevicePreset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device as it is sold."""

    schema: Annotated[int, About("Version of this grammar.", least=1, most=1, example=1)]
    name: Annotated[str, About("The product, as it is sold.", example="NVIDIA DGX Spark")]
    memory: Annotated[
        str,
        About(
            "All of the device's memory, as the vendor says it: GB are 10^9 bytes, GiB 2^30. What "
            "the system holds for itself is not subtracted: that is `reserve` of a study.",
            size=True,
            example="128GB",
        ),
    ]
    bandwidth: Annotated[
        str, About("Bytes read from that memory in a second.", size=True, example="273GB")
    ]
    source: Annotated[
        str, About("Where both figures were published.", example="https://vendor.example/device")
    ]
    note: Annotated[str, About("What else should be known.", example="unified memory")] = ""


def read_device_preset(path: Path) -> DevicePreset:
    """Reads a device preset.

    Raises:
        SpaceError: if the file is missing, has an unknown key, or a figure that is no size.
    """
    return read_toml(path, DevicePreset, SpaceError)
