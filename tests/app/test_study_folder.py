"""What a study folder is opened with."""

import json
import os
import shutil
import time

import pytest

from allocator.app.study_folder import StudyFolder
from allocator.errors import AllocatorError


@pytest.fixture
def study(finished_study, tmp_path):
    return shutil.copytree(finished_study, tmp_path / "study")


def test_the_cap_of_the_bank_is_taken_from_the_environment(study, study_cache, monkeypatch):
    def caps():
        study_folder = StudyFolder(study, cache=study_cache)
        record = json.loads((study / "allocations/pick.json").read_text())
        committed = study_folder.encodings.of(record["importance"])
        return study_folder.profiler.encodings.cap_bytes, committed.cap_bytes

    monkeypatch.delenv("ALLOCATOR_BANK_CAP", raising=False)
    assert caps() == (None, None)
    monkeypatch.setenv("ALLOCATOR_BANK_CAP", "50GiB")
    assert caps() == (50 << 30,) * 2
    monkeypatch.setenv("ALLOCATOR_BANK_CAP", "plenty")
    with pytest.raises(AllocatorError, match=r"\$ALLOCATOR_BANK_CAP: .*'plenty'.*12MiB"):
        StudyFolder(study, cache=study_cache)


def test_digests_are_remembered_in_the_cache(study, tmp_path, monkeypatch):
    first = StudyFolder(study, cache=tmp_path / "cache").inventory
    long_ago = time.time_ns() - 10**12
    copied = shutil.copytree(first.path, tmp_path / "checkpoint")
    for file in copied.iterdir():
        os.utime(file, ns=(long_ago, long_ago))
    text = (study / "study.toml").read_text()
    line = next(x for x in text.splitlines() if x.startswith("checkpoint"))
    (study / "study.toml").write_text(text.replace(line, f'checkpoint = "{copied}"'))
    expected = StudyFolder(study, cache=tmp_path / "cache").inventory.digest
    assert expected == first.digest
    monkeypatch.setattr(type(first), "compute_digest", lambda *a: pytest.fail("read again"))
    assert StudyFolder(study, cache=tmp_path / "cache").inventory.digest == expected
