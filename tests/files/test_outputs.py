"""Outputs that can be written are let through, others refused, and nothing is left behind."""

from pathlib import Path

import pytest

from allocator.errors import OutputError
from allocator.files.outputs import check_output_file, check_output_folder


def test_what_can_be_written_is_let_through_and_nothing_is_made(tmp_path):
    (tmp_path / "there").write_text("")
    check_output_file("--csv", tmp_path / "there")
    check_output_file("--csv", tmp_path / "new/deep/rows.csv")
    check_output_folder("--out", tmp_path)
    check_output_folder("--out", tmp_path / "new/deep", whole=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("there/below", "/there is no folder"),
        ("loop/below", "/loop is no folder"),
        ("x" * 250, r"nothing can be made in .* \(File name too long\)"),
    ],
)
def test_what_cannot_be_written_is_named_as_it_was_given(tmp_path, name, says):
    (tmp_path / "there").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for check, option in ((check_output_file, "OUT"), (check_output_folder, "--out")):
        with pytest.raises(OutputError, match=f"^{option} {tmp_path}/{name}: .*{says}.*; name an"):
            check(option, tmp_path / name)


def test_a_device_is_not_renamed_over():
    with pytest.raises(OutputError, match="OUT /dev/null: no regular file"):
        check_output_file("OUT", Path("/dev/null"))
