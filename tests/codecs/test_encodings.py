"""The encodings: what is encoded once, what is encoded anew, and what a crash leaves."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_rows
from allocator.codecs import encodings as bank_module
from allocator.codecs.encodings import Encodings
from allocator.codecs.ggml import GGML
from allocator.errors import AllocatorError, CheckpointError, FormatError
from allocator.formats import FORMATS
from allocator.targets import GGUF, SAFETENSORS
from allocator.targets.group_weights import group_weights

decode, encode = GGML.decode, GGML.encode
UP, K_B, V_B = "layers.1.experts.up", "layers.1.attention.k_b", "layers.1.attention.v_b"
UP_2 = "layers.2.experts.up"
EXPERT = str(64 * 64 * 4)  # bytes of float32
DIGEST = 16  # bytes


@pytest.fixture
def layout(checkpoints):
    return GGUF.layout(read_inventory(checkpoints["deepseek"]))


def importance(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {UP: (8, 64), V_B: (256,), K_B: (4, 32), "embedding": (64,), "head": (64,)}
    return {n: rng.lognormal(sigma=2, size=s).astype(np.float32) for n, s in shapes.items()}


def reference(layout, name, fmt):
    """The whole group, encoded at once by the library."""
    weighted = importance().get(name) if layout.groups[name].importance else None
    return encode(group_weights(layout, layout.groups[name]), FORMATS[fmt], weighted)


def entries(folder):
    return sorted(folder.glob("*.checked"))


@pytest.fixture
def seen(monkeypatch):
    """`read` and `encoded`: matrices, by name and by shape, as they are read and encoded."""
    made = SimpleNamespace(read=[], encoded=[])

    def reading(inventory, name, start, stop):
        made.read.append(name)
        return read_rows(inventory, name, start, stop)

    def encoding(weights, *args, **options):
        made.encoded.append(weights.shape)
        return encode(weights, *args, **options)

    monkeypatch.setattr(bank_module, "read_rows", reading)
    monkeypatch.setattr(GGML, "encode", encoding)
    return made


def up(expert):
    return f"model.layers.1.mlp.experts.{expert}.up_proj.weight"


# -- what an entry holds


def test_an_entry_is_encoded_once(tmp_path, layout, seen):
    first = np.array(Encodings(tmp_path, layout, importance()).encoded(UP, "Q4_0"))
    (entry,) = entries(tmp_path)
    before = seen.encoded.copy()
    again = Encodings(tmp_path, layout, importance()).encoded(UP, "Q4_0")
    np.testing.assert_array_equal(first, again)
    assert not again.flags.writeable
    assert entries(tmp_path) == [entry]
    assert seen.encoded == before


@pytest.mark.parametrize("name", [UP, K_B, V_B, "head", "embedding", "layers.1.attention.o"])
@pytest.mark.parametrize("at_once", [1, 3 * 64 * 64 * 4, 1 << 26])
def test_entries_are_the_codecs_bytes(tmp_path, layout, name, at_once):
    """However little is encoded at once: rows, some experts, everything."""
    encodings = Encodings(tmp_path, layout, importance(), threads=2, piece_bytes=at_once)
    expected = reference(layout, name, "IQ4_NL")
    np.testing.assert_array_equal(encodings.encoded(name, "IQ4_NL"), expected)
    decoded = encodings.decoded(name, "IQ4_NL")
    np.testing.assert_array_equal(decoded, decode(expected, FORMATS["IQ4_NL"]))
    assert decoded.shape == layout.groups[name].shape


def test_every_part_of_the_key_makes_another_entry(tmp_path, layout):
    Encodings(tmp_path, layout, importance()).encoded(UP, "Q4_0")
    other = Encodings(tmp_path, layout, importance(1)).encoded(UP, "Q4_0")
    assert len(entries(tmp_path)) == 2
    expected = encode(group_weights(layout, layout.groups[UP]), FORMATS["Q4_0"], importance(1)[UP])
    np.testing.assert_array_equal(other, expected)
    Encodings(tmp_path, layout, {}).encoded(UP, "Q4_0")
    assert len(entries(tmp_path)) == 3
    Encodings(tmp_path, layout, {}).encoded(UP, "Q5_0")
    assert len(entries(tmp_path)) == 4
    Encodings(tmp_path, layout, {}).encoded(UP_2, "Q5_0")
    assert len(entries(tmp_path)) == 5


def test_importance_of_a_group_that_has_none_is_left_out(tmp_path, layout):
    encodings = Encodings(tmp_path, layout, importance())
    assert not layout.groups["embedding"].importance  # looked up, not multiplied: the head is apart
    assert encodings.group_importance("embedding") is None
    encodings.encoded("embedding", "Q4_0")
    Encodings(tmp_path, layout, {}).encoded("embedding", "Q4_0")
    assert len(entries(tmp_path)) == 1


def test_missing_importance_raises_and_leaves_no_slot(tmp_path, layout):
    encodings = Encodings(tmp_path, layout, {})
    for _ in range(2):
        with pytest.raises(FormatError, match="needs an importance"):
            encodings.encoded(V_B, "IQ2_XXS")
        with pytest.raises(FormatError, match="needs an importance"):
            encodings.put(V_B, "IQ2_XXS", None, group_weights(layout, layout.groups[V_B]))
    assert not encodings.has(V_B, "IQ2_XXS")


def test_entries_of_the_earlier_kind_are_never_read(tmp_path, layout):
    encodings = Encodings(tmp_path, layout, importance())
    encodings.encoded(UP, "Q4_0")
    (entry,) = entries(tmp_path)
    for suffix in (".bin", ".slots"):
        entry.rename(entry.with_suffix(suffix))
        assert not encodings.has(UP, "Q4_0")
        entry = entry.with_suffix(suffix)


# -- slots


def test_only_slots_that_are_asked_for_are_read_and_encoded(tmp_path, layout, seen):
    encodings, whole = (
        Encodings(tmp_path, layout, importance()),
        reference(layout, UP, "Q5_0"),
    )
    seen.encoded.clear()
    found = encodings.encoded(UP, "Q5_0", (1, 4, 6))
    np.testing.assert_array_equal(found, whole[[1, 4, 6]])
    assert not found.flags.writeable
    assert seen.read == [up(1), up(4), up(6)]
    assert [encodings.has(UP, "Q5_0", e) for e in range(8)] == [e in (1, 4, 6) for e in range(8)]
    encodings.encoded(UP, "Q5_0", (4, 1))
    assert len(seen.read) == 3
    found = encodings.decoded(UP, "Q5_0", (6, 2, 1))
    np.testing.assert_array_equal(found, decode(whole[[6, 2, 1]], FORMATS["Q5_0"]))
    assert seen.read[3:] == [up(2)]
    np.testing.assert_array_equal(encodings.encoded(UP, "Q5_0"), whole)
    assert sorted(seen.read) == [up(e) for e in range(8)]
    assert sum(shape[0] for shape in seen.encoded) == 8


@pytest.mark.parametrize("experts", [(0,), (2, 3, 4), (4, 3), (0, 0), (), tuple(range(8))])
def test_experts_come_in_the_order_asked_for(tmp_path, layout, seen, experts):
    encodings, whole = (
        Encodings(tmp_path, layout, importance()),
        reference(layout, UP, "Q8_0"),
    )
    for _ in range(2):
        found = encodings.encoded(UP, "Q8_0", experts)
        np.testing.assert_array_equal(found, whole[list(experts)])
        assert not found.flags.writeable
    assert sorted(seen.read) == [up(e) for e in sorted(set(experts))]
    assert [encodings.has(UP, "Q8_0", e) for e in range(8)] == [e in experts for e in range(8)]


@pytest.mark.parametrize("per_piece", [1, 2, 8])
def test_few_experts_are_in_memory_at_a_time(tmp_path, layout, seen, per_piece):
    piece_bytes = per_piece * 64 * 64 * 4
    Encodings(tmp_path, layout, importance(), piece_bytes=piece_bytes).encoded(UP, "Q5_0", range(8))
    assert seen.encoded == [(per_piece, 64, 64)] * (8 // per_piece)


def test_wide_matrices_take_little_memory(tmp_path, make):
    config = {"vocab_size": 1 << 16, "hidden_size": 1 << 10}
    folder = make.zeros(tmp_path / "wide", tensors=make.tensors(**config), **config)
    layout = SAFETENSORS.layout(read_inventory(folder))
    encodings = Encodings(tmp_path / "bank", layout, {})
    tracemalloc.start()
    encodings.encoded("head", "Q8_0")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # float32, the next piece's with its bfloat16, and encoded three times; as a whole 458
    assert peak < 4 * bank_module.PIECE_BYTES


def test_given_weights_are_encoded_where_they_are_missing(tmp_path, layout, seen):
    encodings = Encodings(tmp_path, layout, importance())
    weights = group_weights(layout, layout.groups[UP])
    encodings.put(UP, "Q5_0", 6, weights[6])
    assert [encodings.has(UP, "Q5_0", e) for e in range(8)] == [e == 6 for e in range(8)]
    encodings.put(UP, "Q5_0", 6, weights[6])
    assert seen.encoded == [(64, 64)]
    for name in (K_B, "head"):
        encodings.put(name, "Q5_0", None, group_weights(layout, layout.groups[name]))
        assert encodings.has(name, "Q5_0")
    for name in (UP, K_B, "head"):
        np.testing.assert_array_equal(
            encodings.encoded(name, "Q5_0"), reference(layout, name, "Q5_0")
        )
    assert seen.read == [up(e) for e in range(8) if e != 6]


def test_a_slot_without_a_digest_is_encoded_again(tmp_path, layout, seen, caplog):
    encodings, whole = (
        Encodings(tmp_path, layout, importance()),
        reference(layout, UP, "Q4_0"),
    )
    encodings.encoded(UP, "Q4_0")
    (entry,) = entries(tmp_path)
    with open(entry, "r+b") as file:
        file.seek(2 * whole[0].nbytes)
        file.write(b"x" * whole[0].nbytes)
        file.seek(8 * whole[0].nbytes + 2 * DIGEST)
        file.write(bytes(DIGEST))
    seen.read.clear()
    np.testing.assert_array_equal(encodings.encoded(UP, "Q4_0"), whole)
    assert seen.read == [up(2)]
    assert not caplog.records  # a kill leaves as much


# -- damage

SLOT = 64 * 64 // 32 * 18  # bytes of an expert in Q4_0
DAMAGE = {  # where a bit is flipped, and whose slot is encoded again
    "first byte of a wanted slot": (SLOT, 1),
    "last byte of a wanted slot": (7 * SLOT - 1, 6),
    "within a wanted slot": (4 * SLOT + 1000, 4),
    "a slot that nobody wants": (3 * SLOT + 7, 3),
    "the digest of a wanted slot": (8 * SLOT + 4 * DIGEST + 9, 4),
    "the digest of another": (8 * SLOT + 7 * DIGEST, 7),
}


def flip(path, at, bit=3):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def directly(layout, by_safetensors, name, fmt):
    """A group as ggml encodes what the safetensors package reads."""
    group = layout.groups[name]
    weighted = importance().get(name) if group.importance else None
    return encode(by_safetensors(layout.inventory.path, group), FORMATS[fmt], weighted)


@pytest.mark.parametrize("place", DAMAGE)
def test_a_flipped_bit_is_never_given(tmp_path, layout, by_safetensors, seen, caplog, place):
    at, slot = DAMAGE[place]
    whole = directly(layout, by_safetensors, UP, "Q4_0")
    Encodings(tmp_path, layout, importance()).encoded(UP, "Q4_0")
    (entry,) = entries(tmp_path)
    flip(entry, at)
    damaged = [slot]
    for experts in ((1, 4, 6), None):
        seen.read.clear()
        caplog.clear()
        found = Encodings(tmp_path, layout, importance()).encoded(UP, "Q4_0", experts)
        np.testing.assert_array_equal(found, whole if experts is None else whole[list(experts)])
        mended = [e for e in damaged if experts is None or e in experts]
        assert seen.read == [up(e) for e in mended]
        told = [record.getMessage() for record in caplog.records]
        where = f"{entry}: damaged encoding of {UP} in Q4_0 (slots {slot} of 8); encoded again"
        assert told == [where for _ in mended]
        damaged = [e for e in damaged if e not in mended]
    assert not damaged
    caplog.clear()
    decoded = Encodings(tmp_path, layout, importance()).decoded(UP, "Q4_0")
    np.testing.assert_array_equal(decoded, decode(whole, FORMATS["Q4_0"]))
    assert not caplog.records


@pytest.mark.parametrize("fmt", ["Q8_0", "IQ4_NL", "BF16"])
@pytest.mark.parametrize("name", ["head", K_B, "layers.1.attention.o", UP_2])
def test_random_bits_of_random_groups(tmp_path, layout, by_safetensors, caplog, name, fmt):
    rng = np.random.default_rng(len(name))
    expected = reference(layout, name, fmt)
    if name != K_B:  # it is cut from another
        np.testing.assert_array_equal(expected, directly(layout, by_safetensors, name, fmt))
    encodings = Encodings(tmp_path, layout, importance())
    encodings.encoded(name, fmt)
    (entry,) = entries(tmp_path)
    for at in rng.integers(entry.stat().st_size, size=10):
        caplog.clear()
        flip(entry, int(at), int(rng.integers(8)))
        np.testing.assert_array_equal(encodings.encoded(name, fmt), expected)
        (record,) = caplog.records
        assert "encoded again" in record.getMessage()


@pytest.mark.parametrize("size", [1, 100, 3 * SLOT + 5, 8 * SLOT + 3 * DIGEST - 1, 200_000])
def test_an_entry_of_another_size_is_built_again(
    tmp_path, layout, by_safetensors, seen, caplog, size
):
    encodings, whole = (
        Encodings(tmp_path, layout, importance()),
        reference(layout, UP, "Q4_0"),
    )
    encodings.encoded(UP, "Q4_0")
    (entry,) = entries(tmp_path)
    rightly = entry.stat().st_size
    os.truncate(entry, size)
    assert not encodings.has(UP, "Q4_0", 1)
    seen.read.clear()
    np.testing.assert_array_equal(encodings.encoded(UP, "Q4_0"), whole)
    np.testing.assert_array_equal(whole, directly(layout, by_safetensors, UP, "Q4_0"))
    assert f"({size} bytes instead of {rightly}); encoded again" in caplog.records[0].getMessage()
    assert entry.stat().st_size == rightly
    kept = range(8) if size > rightly else range(2) if size > 8 * SLOT else ()
    assert seen.read == [up(e) for e in range(8) if e not in kept]


def test_an_entry_in_the_place_of_another_is_not_taken(tmp_path, layout, by_safetensors, caplog):
    """Of the same shape and format, with digests that are right where it came from."""
    encodings = Encodings(tmp_path, layout, {})
    encodings.encoded(UP, "Q8_0")
    (one,) = entries(tmp_path)
    encodings.encoded(UP_2, "Q8_0")
    (two,) = set(entries(tmp_path)) - {one}
    two.write_bytes(one.read_bytes())
    expected = encode(by_safetensors(layout.inventory.path, layout.groups[UP_2]), FORMATS["Q8_0"])
    np.testing.assert_array_equal(encodings.encoded(UP_2, "Q8_0"), expected)
    assert len(caplog.records) == 1


def test_slots_that_were_exchanged_are_not_taken(tmp_path, layout, by_safetensors):
    encodings, whole = Encodings(tmp_path, layout, importance()), None
    encodings.encoded(UP, "Q4_0")
    (entry,) = entries(tmp_path)
    data = bytearray(entry.read_bytes())
    for size, start in ((SLOT, 0), (DIGEST, 8 * SLOT)):
        a, b = (slice(start + n * size, start + (n + 1) * size) for n in (2, 5))
        data[a], data[b] = data[b], data[a]
    entry.write_bytes(data)
    whole = directly(layout, by_safetensors, UP, "Q4_0")
    np.testing.assert_array_equal(encodings.encoded(UP, "Q4_0", (2, 5)), whole[[2, 5]])


def test_what_somebody_holds_is_mended_for_them_too(tmp_path, layout):
    """A group stays mapped for as long as it is used; another process may see the damage first."""
    encodings, whole = (
        Encodings(tmp_path, layout, importance()),
        reference(layout, UP, "Q4_0"),
    )
    held = encodings.encoded(UP, "Q4_0")
    (entry,) = entries(tmp_path)
    flip(entry, 4 * SLOT + 1)
    assert not np.array_equal(held, whole)
    Encodings(tmp_path, layout, importance()).encoded(UP, "Q4_0")
    np.testing.assert_array_equal(held, whole)


def test_given_weights_do_not_hide_damage(tmp_path, layout, caplog):
    encodings, whole = (
        Encodings(tmp_path, layout, importance()),
        reference(layout, UP, "Q4_0"),
    )
    weights = group_weights(layout, layout.groups[UP])
    encodings.put(UP, "Q4_0", 6, weights[6])
    (entry,) = entries(tmp_path)
    flip(entry, 6 * SLOT + 99)
    encodings.put(UP, "Q4_0", 6, weights[6])
    np.testing.assert_array_equal(encodings.encoded(UP, "Q4_0", (6,))[0], whole[6])
    assert len(caplog.records) == 1


def test_a_disk_that_gives_back_other_bytes_is_refused(tmp_path, layout, monkeypatch):
    def wrong(handle, data, offset, write=os.pwrite):
        changed = bytearray(data)
        changed[len(data) // 2] ^= len(data) > DIGEST
        return write(handle, changed, offset)

    encodings = Encodings(tmp_path, layout, importance())
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", wrong)
        with pytest.raises(AllocatorError, match="other than they were written") as caught:
            encodings.encoded(UP, "Q4_0")
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(encodings.encoded(UP, "Q4_0"), reference(layout, UP, "Q4_0"))


@pytest.mark.parametrize("experts", [None, (2, 3), (5, 1, 2)])
def test_bytes_that_are_elsewhere_are_recognised(tmp_path, layout, experts):
    encodings, whole = (
        Encodings(tmp_path, layout, importance()),
        reference(layout, UP, "Q4_0"),
    )
    data, digests = encodings.given(UP, "Q4_0", experts)
    elsewhere = np.array(data)
    np.testing.assert_array_equal(elsewhere, whole if experts is None else whole[list(experts)])
    assert digests.match(elsewhere)
    assert digests.match(elsewhere.reshape(-1))
    assert not digests.match(elsewhere.reshape(-1)[:-1])
    assert not digests.match(elsewhere[::-1])
    for at in (0, elsewhere.size // 2, elsewhere.size - 1):
        elsewhere.reshape(-1)[at] ^= 1
        assert not digests.match(elsewhere)
        elsewhere.reshape(-1)[at] ^= 1


# -- checkpoints that change


@pytest.fixture
def shards(tmp_path, checkpoints):
    """A checkpoint, and a file with other weights for it."""
    path = shutil.copytree(checkpoints["deepseek"], tmp_path / "checkpoint")
    info = read_inventory(path).tensors[up(5)]
    other = shutil.copyfile(path / info.file, tmp_path / "other")
    flip(other, info.offset + 2)
    time.sleep(0.03)  # the clock of a file system ticks every few milliseconds
    return path, other, path / info.file


def opened(path, folder, **options):
    layout = GGUF.layout(read_inventory(path))
    return Encodings(folder, layout, {}, **options), layout


def plainly(path, by_safetensors):
    group = GGUF.layout(read_inventory(path)).groups[UP]
    return encode(by_safetensors(path, group), FORMATS["Q8_0"])


def test_a_shard_that_was_replaced_is_not_encoded(tmp_path, shards, by_safetensors):
    path, other, shard = shards
    encodings, _ = opened(path, tmp_path / "bank")
    before = plainly(path, by_safetensors)
    encodings.encoded(UP, "Q8_0", (0, 1))
    os.replace(other, shard)
    with pytest.raises(CheckpointError, match=f"{shard}: changed or replaced") as caught:
        encodings.encoded(UP, "Q8_0")
    assert "\n" not in str(caught.value)
    assert [encodings.has(UP, "Q8_0", e) for e in range(8)] == [True] * 2 + [False] * 6
    np.testing.assert_array_equal(
        encodings.encoded(UP, "Q8_0", (0, 1)), before[:2]
    )  # encoded from it
    again, _ = opened(path, tmp_path / "bank")
    after = plainly(path, by_safetensors)
    np.testing.assert_array_equal(again.encoded(UP, "Q8_0"), after)
    assert not np.array_equal(after, before)
    assert len(entries(tmp_path / "bank")) == 2


@pytest.mark.parametrize("reads", [1, 4, 6])
def test_a_shard_that_is_replaced_during_a_fill(
    tmp_path, shards, by_safetensors, monkeypatch, reads
):
    """What was encoded before is of the old weights; nothing is under their digest but these."""
    path, other, shard = shards
    encodings, _ = opened(path, tmp_path / "bank", piece_bytes=int(EXPERT))
    before, left = plainly(path, by_safetensors), [reads]

    def reading(*args):
        left[0] -= 1
        if not left[0]:
            os.replace(other, shard)
        return read_rows(*args)

    with monkeypatch.context() as patch:
        patch.setattr(bank_module, "read_rows", reading)
        with pytest.raises(CheckpointError, match="changed or replaced"):
            encodings.encoded(UP, "Q8_0")
    there = [e for e in range(8) if encodings.has(UP, "Q8_0", e)]
    assert set(there) <= set(range(reads - 1))
    np.testing.assert_array_equal(encodings.encoded(UP, "Q8_0", there), before[there])
    again, _ = opened(path, tmp_path / "bank")
    np.testing.assert_array_equal(again.encoded(UP, "Q8_0"), plainly(path, by_safetensors))


# -- kills, other processes, full disks


def test_what_is_empty_is_filled(tmp_path, layout):
    """A kill between making a file and giving it its size."""
    encodings = Encodings(tmp_path, layout, importance())
    encodings.encoded(UP, "Q4_0")
    (entry,) = entries(tmp_path)
    entry.write_bytes(b"")
    assert not encodings.has(UP, "Q4_0", 1)
    np.testing.assert_array_equal(encodings.encoded(UP, "Q4_0"), reference(layout, UP, "Q4_0"))


DIE = """
import os, signal, sys
from pathlib import Path
from allocator.codecs import encodings as module
from allocator.checkpoint.reading import read_inventory
from allocator.targets import GGUF
layout = GGUF.layout(read_inventory(Path(sys.argv[1])))
piece_bytes, left = int(sys.argv[4]), int(sys.argv[3])
def dying(handle, data, offset, write=os.pwrite):
    global left
    left -= 1
    if left:
        return write(handle, data, offset)
    write(handle, data[: len(data) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)
os.pwrite = dying
encodings = module.Encodings(Path(sys.argv[2]), layout, {}, piece_bytes=piece_bytes)
encodings.encoded(sys.argv[5], "Q8_0")
"""


@pytest.mark.parametrize(("write", "done"), [(1, 0), (2, 0), (5, 2), (6, 2), (16, 7)])
def test_a_kill_leaves_slots_whole_or_absent(tmp_path, layout, checkpoints, seen, write, done):
    """One expert at a time: every other write is a slot's digest, half of which is damage."""
    command = [sys.executable, "-c", DIE, checkpoints["deepseek"], tmp_path]
    killed = subprocess.run([*command, str(write), EXPERT, UP])
    assert killed.returncode == -signal.SIGKILL
    encodings = Encodings(tmp_path, layout, {})
    if write == 1:
        killed = subprocess.run([*command, str(write), EXPERT, UP])  # and dies once more
    torn = [write % 2 == 0]  # something is there, until it is looked at
    held = [*[True] * done, *torn, *[False] * (7 - done)]
    assert [encodings.has(UP, "Q8_0", e) for e in range(8)] == held
    expected = encode(group_weights(layout, layout.groups[UP]), FORMATS["Q8_0"])
    np.testing.assert_array_equal(encodings.encoded(UP, "Q8_0"), expected)
    assert seen.read == [up(e) for e in range(done, 8)]


def test_a_kill_between_rows_leaves_the_matrix_absent(tmp_path, layout, checkpoints):
    rows = str(64 * 4 * 128)  # 128 of 512
    command = [sys.executable, "-c", DIE, checkpoints["deepseek"], tmp_path, "3", rows, "head"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    encodings = Encodings(tmp_path, layout, {})
    assert not encodings.has("head", "Q8_0")
    expected = encode(group_weights(layout, layout.groups["head"]), FORMATS["Q8_0"])
    np.testing.assert_array_equal(encodings.encoded("head", "Q8_0"), expected)


WRITE = """
import sys
from pathlib import Path
from allocator.codecs import encodings as module
from allocator.checkpoint.reading import read_inventory
from allocator.targets import GGUF
layout = GGUF.layout(read_inventory(Path(sys.argv[1])))
options = {"cap_bytes": int(sys.argv[3]), "piece_bytes": 64 * 64 * 4}
bank = module.Encodings(Path(sys.argv[2]), layout, {}, **options)
for name, group in layout.groups.items():
    for experts in ((1, 2, 5), None) if group.role.is_expert else (None,):
        bank.release()
        found, again = (bank.encoded(name, "Q8_0", experts).tobytes() for _ in range(2))
        assert found == again
"""


@pytest.mark.parametrize("cap", [1 << 40, 20_000])
def test_two_processes_share_a_folder(tmp_path, layout, checkpoints, cap):
    """With the small cap each removes what the other is writing and reading.

    What both find first is damaged: both encode it again.
    """
    Encodings(tmp_path, layout, {}).encoded(UP, "Q8_0")
    flip(entries(tmp_path)[0], 12_345)
    command = [sys.executable, "-c", WRITE, str(checkpoints["deepseek"]), str(tmp_path), str(cap)]
    running = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    left = entries(tmp_path)
    assert len(left) == len(list(tmp_path.iterdir()))
    assert len(left) == len(layout.groups) if cap > 1e9 else 0 < len(left) < len(layout.groups)
    encodings = Encodings(tmp_path, layout, {})
    for name, group in layout.groups.items():
        expected = encode(group_weights(layout, group), FORMATS["Q8_0"])
        np.testing.assert_array_equal(encodings.encoded(name, "Q8_0"), expected)


def test_an_entry_may_be_removed_at_any_time(tmp_path, layout, monkeypatch):
    encodings, whole = (
        Encodings(tmp_path, layout, importance()),
        reference(layout, UP, "Q4_0"),
    )
    some = encodings.encoded(UP, "Q4_0", (2, 3))
    entries(tmp_path)[0].unlink()
    np.testing.assert_array_equal(some, whole[2:4])  # still mapped
    assert not encodings.has(UP, "Q4_0", 2)
    sync = os.fdatasync

    def removing(handle):
        entries(tmp_path)[0].unlink()
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", removing)
        np.testing.assert_array_equal(encodings.encoded(UP, "Q4_0"), whole)
    assert not entries(tmp_path)
    np.testing.assert_array_equal(encodings.encoded(UP, "Q4_0"), whole)
    assert entries(tmp_path)


def no_room(handle, data, offset, write=os.pwrite):
    write(handle, data[: len(data) // 2], offset)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nearly_full(handle):
    return SimpleNamespace(f_bavail=4096, f_frsize=4096)


@pytest.mark.parametrize(
    ("name", "patch"), [("pwrite", no_room), ("fstatvfs", nearly_full)], ids=lambda x: str(x)[:12]
)
def test_a_full_disk_is_one_line_and_nothing_is_half_there(
    tmp_path, layout, monkeypatch, name, patch
):
    encodings = Encodings(tmp_path, layout, importance())
    encodings.encoded(UP, "Q4_0", (3,))
    weights = group_weights(layout, layout.groups[UP])
    with monkeypatch.context() as patched:
        patched.setattr(os, name, patch)
        with pytest.raises(AllocatorError, match=r"(No space|free, needed).*BANK_CAP") as caught:
            encodings.encoded(UP, "Q4_0")
        with pytest.raises(AllocatorError, match="free some disk"):
            encodings.put(UP, "Q4_0", 5, weights[5])
        encodings.encoded(UP, "Q4_0", (3,))  # is there
    assert "\n" not in str(caught.value)
    assert [encodings.has(UP, "Q4_0", e) for e in range(8)] == [e == 3 for e in range(8)]
    np.testing.assert_array_equal(encodings.encoded(UP, "Q4_0"), reference(layout, UP, "Q4_0"))


def test_a_bank_that_cannot_be_written_is_read(tmp_path, layout, monkeypatch):
    Encodings(tmp_path, layout, importance()).encoded(UP, "Q4_0")

    def refused(*args, **options):
        raise PermissionError("not yours")

    opened = os.open
    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(os, "open", lambda p, f, m: refused() if f & os.O_RDWR else opened(p, f, m))
    encodings = Encodings(tmp_path, layout, importance())
    np.testing.assert_array_equal(encodings.encoded(UP, "Q4_0"), reference(layout, UP, "Q4_0"))


# -- the cap


def occupied(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def age(folder, encodings, name, fmt, seconds):
    path = encodings.path_of(name, fmt)
    os.utime(path, (os.path.getatime(path), os.path.getmtime(path) - seconds))


def held(encodings, *wanted):
    return [encodings.has(*one) for one in wanted]


def test_beyond_the_cap_what_was_used_longest_ago_is_removed(tmp_path, layout, caplog):
    formats = [("head", f) for f in ("BF16", "Q8_0", "Q5_0", "Q4_0")]
    free = Encodings(tmp_path, layout, {})
    for number, one in enumerate(formats[:3]):
        free.encoded(*one)
        age(tmp_path, free, *one, seconds=100 - number)
    Encodings(tmp_path, layout, {}).encoded(*formats[0])  # used again, by whomever
    (tmp_path / "old.bin").write_bytes(b"x" * 50_000)
    os.utime(tmp_path / "old.bin", (0, 0))
    (tmp_path / "notes.txt").write_bytes(b"x" * 5_000)
    os.utime(tmp_path / "notes.txt", (0, 0))
    limit = occupied(tmp_path) - (tmp_path / "old.bin").stat().st_blocks * 512
    encodings = Encodings(tmp_path, layout, {}, cap_bytes=limit)
    encodings.release()
    assert held(encodings, *formats) == [True, True, True, False]
    assert not (tmp_path / "old.bin").exists()
    encodings.encoded(*formats[3])
    assert held(encodings, *formats) == [True, False, True, True]
    assert occupied(tmp_path) <= limit
    assert (tmp_path / "notes.txt").exists()  # nobody's entry
    assert not caplog.records


def test_what_is_in_use_is_kept_until_it_is_released(tmp_path, layout, caplog):
    fmts = ("Q8_0", "Q5_0", "Q4_0")
    encodings = Encodings(tmp_path, layout, {}, cap_bytes=40_000)  # one and a half
    with caplog.at_level(logging.WARNING):
        for fmt in fmts:
            encodings.encoded("head", fmt)
    assert [encodings.has("head", f) for f in fmts] == [True] * 3
    (record,) = caplog.records  # once
    assert "more than the cap of 40,000" in record.getMessage()
    assert occupied(tmp_path) > 40_000
    encodings.release()
    assert [encodings.has("head", f) for f in fmts] == [False, False, True]
    assert occupied(tmp_path) <= 40_000
    expected = encode(group_weights(layout, layout.groups["head"]), FORMATS["Q8_0"])
    np.testing.assert_array_equal(encodings.encoded("head", "Q8_0"), expected)


def test_given_and_read_entries_count_as_used(tmp_path, layout):
    encodings = Encodings(tmp_path, layout, {}, cap_bytes=30_000)
    encodings.put("head", "Q4_0", None, group_weights(layout, layout.groups["head"]))
    encodings.encoded("embedding", "Q4_0")
    encodings.encoded(UP, "Q4_0")
    assert occupied(tmp_path) > 30_000
    assert held(encodings, ("head", "Q4_0"), ("embedding", "Q4_0"), (UP, "Q4_0", 7)) == [True] * 3


def test_what_others_write_is_noticed(tmp_path, layout):
    encodings = Encodings(tmp_path, layout, {}, cap_bytes=100_000)
    encodings.encoded("head", "Q4_0")
    encodings.release()
    other = Encodings(tmp_path, layout, {})
    for fmt in ("BF16", "Q8_0"):
        other.encoded("head", fmt)
    assert occupied(tmp_path) > 110_000
    encodings.encoded("embedding", "Q4_0")
    assert occupied(tmp_path) <= 100_000


def test_slots_that_are_absent_occupy_nothing(tmp_path, layout):
    encodings, names = Encodings(tmp_path, layout, {}, cap_bytes=65_536), (UP, UP_2)
    for name in names:
        encodings.encoded(name, "BF16", (7,))
    assert sum(entry.stat().st_size for entry in entries(tmp_path)) == 2 * 8 * (
        64 * 64 * 2 + DIGEST
    )
    assert occupied(tmp_path) < 32_768
    encodings.release()
    assert held(encodings, *((name, "BF16", 7) for name in names)) == [True, True]


def test_without_a_cap_nothing_is_removed(tmp_path, layout):
    encodings = Encodings(tmp_path, layout, {})
    for name in layout.groups:
        encodings.encoded(name, "Q8_0")
        encodings.release()
    assert len(entries(tmp_path)) == len(layout.groups)
