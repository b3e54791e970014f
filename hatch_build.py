"""Puts search spaces and notebooks into a wheel; an editable install finds them in the clone."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShippedData(BuildHookInterface):
    """Where folders of the repository lie inside the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the folders, unless the build is an editable one."""
        if version == "standard":
            for folder in ("search_spaces", "notebooks"):
                build_data["force_include"][folder] = f"allocator/{folder}"
