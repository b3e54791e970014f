"""Messages on files that cannot be read say why in words."""

import json
from types import SimpleNamespace

import pytest

from allocator import api
from allocator.app.calibration import Calibration
from allocator.app.study_file import CalibrationSpec
from allocator.app.tables import front_table
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import AllocatorError, reason
from allocator.export.manifest import Manifest
from allocator.prediction.profile import Profile


def splits(folder):
    """Splits of documents that are read, by a file that is not what it should be."""
    records = "".join(json.dumps({"ids": [1, n]}) + "\n" for n in range(6))
    (folder / "x").write_text(records)
    inventory = SimpleNamespace(dimensions=SimpleNamespace(vocabulary=9))
    return Calibration(folder, CalibrationSpec("x", splits="y"), inventory).splits


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: api.diff(folder / "one.json", folder / "other.json"),
        lambda folder: AllocationRecord.read(folder / "one.json"),
        Manifest.read,
        splits,
        front_table,
        lambda folder: Profile.read(folder / "profile.json"),
    ],
    ids=["diff", "record", "manifest", "splits", "front", "profile"],
)
def test_a_missing_file_is_said_in_words(tmp_path, read):
    with pytest.raises(AllocatorError, match=r"(?i)no such (allocation )?file") as caught:
        read(tmp_path)
    assert "Errno" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_key_is_said_in_words(tmp_path):
    (tmp_path / "y").write_text(json.dumps({"selection": [0]}))
    with pytest.raises(AllocatorError, match=r"lists search and selection \(no 'search'\)"):
        splits(tmp_path)


def test_an_error_without_words_keeps_its_name():
    assert reason(RecursionError()) == "RecursionError"
    assert reason(ValueError("first\nsecond")) == "first"
