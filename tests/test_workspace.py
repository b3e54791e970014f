"""What a study folder is opened with."""

import json
import os
import shutil
import time

import pytest

from allocator.errors import AllocatorError
from allocator.workspace import Workspace


@pytest.fixture
def study(finished_study, tmp_path):
    return shutil.copytree(finished_study, tmp_path / "study")


def test_the_cap_of_the_bank_is_taken_from_the_environment(study, study_cache, monkeypatch):
    def caps():
        workspace = Workspace(study, cache=study_cache)
        record = json.loads((study / "allocations/pick.json").read_text())
        committed = workspace.bank_for(record["importance"])
        return workspace.profiler.bank._cap, committed._cap

    monkeypatch.delenv("ALLOCATOR_BANK_CAP", raising=False)
    assert caps() == (float("inf"),) * 2
    monkeypatch.setenv("ALLOCATOR_BANK_CAP", "50GiB")
    assert caps() == (50 << 30,) * 2
    monkeypatch.setenv("ALLOCATOR_BANK_CAP", "plenty")
    with pytest.raises(AllocatorError, match=r"\$ALLOCATOR_BANK_CAP: .*'plenty'.*12MiB"):
        Workspace(study, cache=study_cache)


def test_digests_are_remembered_in_the_cache(study, tmp_path, monkeypatch):
    first = Workspace(study, cache=tmp_path / "cache").inventory
    long_ago = time.time_ns() - 10**12
    copied = shutil.copytree(first.path, tmp_path / "checkpoint")
    for file in copied.iterdir():
        os.utime(file, ns=(long_ago, long_ago))
    text = (study / "study.toml").read_text()
    line = next(x for x in text.splitlines() if x.startswith("checkpoint"))
    (study / "study.toml").write_text(text.replace(line, f'checkpoint = "{copied}"'))
    expected = Workspace(study, cache=tmp_path / "cache").inventory.digest
    assert expected == first.digest
    monkeypatch.setattr(type(first), "_digest", lambda *a: pytest.fail("read again"))
    assert Workspace(study, cache=tmp_path / "cache").inventory.digest == expected
