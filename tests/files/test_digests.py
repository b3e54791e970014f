"""Digests that are remembered: taken once per file, and never for a file that changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.reading import read_inventory
from allocator.errors import CheckpointError
from allocator.files import digests as digests_module
from allocator.files.digests import Digests, Identity

LONG_AGO = time.time_ns() - 10**12


@pytest.fixture
def folder(tmp_path, checkpoints):
    """A checkpoint that was written a while ago."""
    path = shutil.copytree(checkpoints["deepseek"], tmp_path / "checkpoint")
    settle(path)
    return path


def settle(path, at=LONG_AGO):
    for file in path.iterdir():
        os.utime(file, ns=(at, at))


@pytest.fixture
def read(monkeypatch):
    """Names of tensors that are read for their digest."""
    names, plain = [], Inventory.compute_digest

    def counting(inventory, info):
        names.append(info.name)
        return plain(inventory, info)

    monkeypatch.setattr(Inventory, "compute_digest", counting)
    return names


def opened(folder):
    return read_inventory(folder, digests=folder.parent / "digests")


def opened_as(inventory, remembered):
    """An inventory with nothing read yet."""
    return replace(inventory, digests=Digests(remembered))


def records(folder):
    return sorted((folder.parent / "digests").iterdir())


def test_a_checkpoint_is_read_once_for_all(folder, read):
    expected = read_inventory(folder).digest
    n = len(read)
    assert opened(folder).digest == expected
    assert sorted(read[n:]) == sorted(opened(folder).tensors)
    read.clear()
    again = opened(folder)
    assert again.digest == expected
    assert read == []
    (record,) = records(folder)
    data = json.loads(record.read_text())
    assert str(folder.resolve() / "model.safetensors") in data["file"]
    assert len(data["digests"]) == len(again.tensors)


def test_another_path_to_the_same_file_is_the_same(folder, read, tmp_path):
    expected = opened(folder).digest
    read.clear()
    (tmp_path / "link").symlink_to(folder)
    assert opened(tmp_path / "link").digest == expected
    assert read == []


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def flip(folder, **times):
    """Changes one byte of a tensor in place."""
    time.sleep(0.03)  # the clock of a file system ticks every few milliseconds
    info = read_inventory(folder).tensors[NAME]
    with open(folder / info.file, "r+b") as file:
        file.seek(info.offset)
        byte = file.read(1)
        file.seek(info.offset)
        file.write(bytes([byte[0] ^ 1]))
    settle(folder, **times)


@pytest.mark.parametrize("times", [{}, {"at": LONG_AGO + 1}], ids=["mtime restored", "touched"])
def test_a_changed_file_gets_no_old_digest(folder, read, times):
    """Also where whoever changed it put back its time: the inode's own tells."""
    before = opened(folder)
    known = {name: before.tensor_digest(name) for name in before.tensors}
    assert before.digest
    read.clear()
    flip(folder, **times)
    after = opened(folder)
    found = {name: after.tensor_digest(name) for name in after.tensors}
    assert {name for name in known if found[name] != known[name]} == {NAME}
    with pytest.raises(CheckpointError, match="changed or replaced since it was opened"):
        opened_as(before, folder.parent / "others").tensor_digest(NAME)  # nothing known of it
    assert opened(folder).digest != before.digest
    assert opened(folder).digest == read_inventory(folder).digest


def test_a_replaced_file_gets_no_old_digest(folder):
    before = opened(folder).digest
    other = shutil.copytree(folder, folder.parent / "other")
    flip(other)
    os.replace(other / "model.safetensors", folder / "model.safetensors")  # same size and time
    assert opened(folder).digest != before
    assert opened(folder).digest == read_inventory(folder).digest


def test_the_place_within_the_file_belongs_to_it(folder, as_they_are):
    """An inventory that is older than its file asks for other bytes of it."""
    old = opened(folder)
    info = old.tensors[NAME]
    data = (folder / info.file).read_bytes()
    length = int.from_bytes(data[:8], "little")
    moved = (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8
    (folder / info.file).write_bytes(moved + data[8 + length :])
    settle(folder)
    with pytest.raises(CheckpointError, match="changed or replaced"):
        old.tensor_digest(NAME)
    wrong = as_they_are(old).tensor_digest(NAME)
    old.digests.save()
    new = opened(folder)
    assert new.tensor_digest(NAME) != wrong
    assert new.tensor_digest(NAME) == read_inventory(folder).tensor_digest(NAME)


def test_a_file_that_may_still_change_is_not_remembered(folder, read):
    settle(folder, at=time.time_ns())
    assert opened(folder).digest
    n = len(read)
    assert opened(folder).digest
    assert len(read) == 2 * n
    assert not (folder.parent / "digests").exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(folder, monkeypatch):
    plain = Inventory.reading

    @contextmanager
    def slow(inventory, file):
        with plain(inventory, file) as handle:
            yield handle
            flip(folder)

    with monkeypatch.context() as patch:
        patch.setattr(Inventory, "reading", slow)
        for _ in range(2):
            inventory = opened(folder)
            with pytest.raises(CheckpointError, match="changed or replaced"):
                inventory.tensor_digest(NAME)
            inventory.digests.save()
    assert not (folder.parent / "digests").exists()
    assert opened(folder).tensor_digest(NAME) == read_inventory(folder).tensor_digest(NAME)


def test_a_file_that_ends_early_still_raises(folder, as_they_are):
    inventory = opened(folder)
    info = max(inventory.tensors.values(), key=lambda t: t.offset)
    assert inventory.digest
    os.truncate(folder / info.file, info.offset + 1)
    settle(folder)
    with pytest.raises(CheckpointError, match="changed or replaced"):
        opened_as(inventory, folder.parent / "others").tensor_digest(info.name)
    with pytest.raises(CheckpointError, match=f"ends inside {info.name}"):
        as_they_are(inventory).tensor_digest(info.name)


def test_scales_in_another_shard_count(tmp_path, make_checkpoint, fp8, read):
    source = make_checkpoint(tmp_path / "source", "deepseek", dtype="bfloat16")
    fp8.write(source, tmp_path / "fp8")
    settle(tmp_path / "fp8")
    before = opened(tmp_path / "fp8")
    known = before.tensor_digest(NAME)
    assert before.digest == read_inventory(tmp_path / "fp8").digest
    read.clear()
    assert opened(tmp_path / "fp8").digest == before.digest
    assert read == []
    scale = before.tensors[NAME].scale
    assert scale.file != before.tensors[NAME].file
    with open(tmp_path / "fp8" / scale.file, "r+b") as file:
        file.seek(scale.offset)
        file.write(b"\1")
    os.utime(tmp_path / "fp8" / scale.file, ns=(LONG_AGO, LONG_AGO + 1))
    after = opened(tmp_path / "fp8")
    assert after.tensor_digest(NAME) != known
    assert after.digest == read_inventory(tmp_path / "fp8").digest != before.digest


KILLED = """
import os, signal, sys
from pathlib import Path
from allocator.files import digests
from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.reading import read_inventory
digests._SAVE_SECONDS = 0
left, plain = 80, Inventory.compute_digest
def dying(inventory, info):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(inventory, info)
Inventory.compute_digest = dying
read_inventory(Path(sys.argv[1]), digests=Path(sys.argv[2])).digest
"""


def test_a_kill_keeps_what_was_digested(folder, read):
    command = [sys.executable, "-c", KILLED, folder, folder.parent / "digests"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    inventory = opened(folder)
    expected = read_inventory(folder).digest
    read.clear()
    assert inventory.digest == expected
    assert len(read) == len(inventory.tensors) - 79
    assert len(records(folder)) == 1


def test_processes_keep_each_others(folder, read):
    one, two = opened(folder), opened(folder)
    half = len(one.tensors) // 2
    for inventory, names in ((one, list(one.tensors)[:half]), (two, list(one.tensors)[half:])):
        for name in names:
            inventory.tensor_digest(name)
    one.digests.save()
    two.digests.save()
    read.clear()
    assert opened(folder).digest == read_inventory(folder).digest
    assert len(read) == len(one.tensors)  # by the second alone


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b'{"file": "another", "digests": {"x": "y"}}'])
def test_unreadable_records_are_taken_anew(folder, read, junk):
    expected = opened(folder).digest
    (record,) = records(folder)
    whole = record.read_bytes()
    record.write_bytes(junk)
    read.clear()
    assert opened(folder).digest == expected
    assert len(read) == len(read_inventory(folder).tensors)
    assert record.read_bytes() == whole


def test_where_nothing_can_be_written_nothing_fails(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    inventory = read_inventory(folder, digests=tmp_path / "file" / "digests")
    assert inventory.digest == read_inventory(folder).digest


def test_it_is_saved_once_in_a_while(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    settle(tmp_path)
    files = {file: Identity.of(file.stat())}
    clock = [100.0]
    monkeypatch.setattr(digests_module.time, "monotonic", lambda: clock[0])
    found = Digests(tmp_path / "digests")
    for step in range(5):
        clock[0] += 0.4
        assert found.of(files, f"part {step}", lambda step=step: f"{step}") == f"{step}"
    (record,) = (tmp_path / "digests").iterdir()
    assert list(json.loads(record.read_text())["digests"]) == ["part 0", "part 1", "part 2"]
