"""Names of shipped files, and paths that a user gives in their place."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from allocator.errors import SpaceError
from allocator.files import shipped
from allocator.files.shipped import DEVICES, SEARCH_SPACES, named_file, shipped_folder

ROOT = Path(__file__).parents[2]


def test_a_name_is_a_shipped_file(tmp_path):
    known = named_file("geforce-rtx-4090", kind=DEVICES, relative_to=tmp_path)
    assert known == ROOT / "search_spaces/devices/geforce-rtx-4090.toml"
    assert named_file("careful", kind=SEARCH_SPACES, relative_to=tmp_path).stem == "careful"


def test_a_file_of_the_users_is_that_file(tmp_path):
    own = tmp_path / "careful"
    own.write_text("schema = 1\n")
    assert named_file("careful", kind=SEARCH_SPACES, relative_to=tmp_path) == own


@pytest.mark.parametrize("text", ["absent", "devices/absent.toml", "../careful", "careful.toml"])
def test_neither_is_refused_with_the_names(tmp_path, text):
    with pytest.raises(SpaceError, match="a name of careful, default, whole-device"):
        named_file(text, kind=SEARCH_SPACES, relative_to=tmp_path)


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    inside = tmp_path / "site-packages/allocator"
    (inside / "search_spaces").mkdir(parents=True)
    monkeypatch.setattr(shipped, "_PACKAGE", inside)
    assert shipped_folder("search_spaces") == inside / "search_spaces"


@pytest.mark.slow
def test_the_wheel_has_them(tmp_path):
    done = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(done, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("search_spaces", "notebooks"):
        wanted = {
            f"allocator/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.*") if p.is_file()
        }
        assert {n for n in wanted if "checkpoint" not in n} <= set(names)
