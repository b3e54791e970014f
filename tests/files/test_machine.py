"""What is free on this machine."""

import shutil
from types import SimpleNamespace

from allocator.files.machine import free_disk


def test_free_disk_is_that_of_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    asked = []
    usage = lambda place: asked.append(place) or SimpleNamespace(free=7)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    (tmp_path / "a").mkdir()
    assert free_disk(tmp_path / "a/b/c") == 7
    monkeypatch.chdir(tmp_path)
    assert free_disk(tmp_path.__class__("not/there")) == 7
    assert asked == [tmp_path / "a", tmp_path]
