"""Records under two processes, and damaged ones."""

import multiprocessing
from contextlib import suppress

import msgspec
import pytest

from allocator.decision.allocation_record import (
    AllocationRecord,
    Finishing,
    changing,
    note_digests,
)
from allocator.errors import SpaceError, StudyError
from allocator.files.atomic import write_whole

RECORD = AllocationRecord(
    name="pick", kind="knapsack", allocation={}, digest="d", checkpoint="c", importance="0" * 64,
    codec="x", bytes={}, effective_bits=2.0, loss={"search": 0.5},
)  # fmt: skip


def pick_anew(path, held, go):
    """A search that ends: it holds the lock while the other wants it."""
    with changing(path):
        held.set()
        go.wait(0.5)
        write_whole(path, msgspec.structs.replace(RECORD, digest="new").to_bytes())


def test_a_search_that_ends_meanwhile_keeps_its_pick(tmp_path):
    path = tmp_path / "pick.json"
    path.write_bytes(RECORD.to_bytes())
    context = multiprocessing.get_context("spawn")
    held, go = context.Event(), context.Event()
    other = context.Process(target=pick_anew, args=(path, held, go))
    other.start()
    assert held.wait(60)
    with pytest.raises(StudyError, match=r"changed while.*materialize it again") as caught:
        note_digests(path, RECORD, {"gguf": "0"})
    other.join()
    assert "\n" not in str(caught.value)
    found = AllocationRecord.read(path)
    assert (found.digest, found.sha256) == ("new", {})


def test_digests_of_two_containers_are_both_kept(tmp_path):
    path = tmp_path / "pick.json"
    path.write_bytes(RECORD.to_bytes())
    for container in ("gguf", "safetensors"):
        note_digests(path, RECORD, {container: container})
    found = AllocationRecord.read(path).sha256
    assert found == {"gguf": "gguf", "safetensors": "safetensors"}


def test_no_flipped_bit_passes(tmp_path):
    path = tmp_path / "pick.json"
    whole = RECORD.to_bytes()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1
        path.write_bytes(data)
        with suppress(SpaceError):
            assert AllocationRecord.read(path) == RECORD


FINISHING = Finishing(recipe={}, inputs="i", before={"search": 0.5}, after={"search": 0.25})


def test_digests_of_written_files_stay_with_their_weights(tmp_path):
    plain = msgspec.structs.replace(RECORD, sha256={"gguf": "plain"})
    finished = plain.finished_with("a" * 64, FINISHING)
    assert finished.sha256 == {}
    assert finished.finished.unfinished_sha256 == {"gguf": "plain"}
    assert (finished.losses, finished.loss) == ({"search": 0.25}, {"search": 0.5})
    assert finished.unfinished == plain

    path = tmp_path / "pick.json"
    path.write_bytes(finished.to_bytes())
    note_digests(path, finished, {"gguf": "finished"})
    note_digests(path, finished, {"safetensors": "plain too"}, unfinished=True)
    known = AllocationRecord.read(path)
    assert known.sha256 == {"gguf": "finished"}
    both = {"gguf": "plain", "safetensors": "plain too"}
    assert known.unfinished.sha256 == both

    again, other = (known.finished_with(letter * 64, FINISHING) for letter in "ab")
    assert again == known
    assert (other.sha256, other.unfinished.sha256) == ({}, both)
    for changed in (other, plain):
        path.write_bytes(changed.to_bytes())
        with pytest.raises(StudyError, match="changed while"):
            note_digests(path, finished, {"gguf": "0"})
