"""Written directories: predicted bytes, the same bytes twice, whole or absent, and refusals."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from gguf import GGUFReader
from safetensors import safe_open

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.errors import CheckpointError, OutputError, SpaceError, TargetError, VerifyError
from allocator.export import checkpoint
from allocator.export.checkpoint import materialize
from allocator.export.manifest import Manifest
from allocator.export.runtimes import runtime_named
from allocator.export.tensors import EncodedTensors
from allocator.targets import TARGETS, target_named


def contents(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def tensor_bytes(path):
    if path.suffix == ".gguf":
        return {t.name: int(t.n_bytes) for t in GGUFReader(path).tensors}
    with safe_open(path, framework="pt") as file:  # numpy has no bfloat16
        return {k: file.get_tensor(k).nbytes for k in file.keys()}  # noqa: SIM118


def test_predicted_bytes_are_the_tensors_and_the_file(case, written, which):
    name, target, container = which
    made, done = case(name, target), written(*which)
    allocation = made.allocation()
    size = allocation.nbytes(made.layout, target_named(container))
    path = done.folder / runtime_named(container).file_name
    assert path.stat().st_size == size.file == done.manifest.file_bytes
    assert sum(tensor_bytes(path).values()) == size.tensors
    assert done.manifest.tensor_bytes == size.tensors
    assert done.manifest.overhead_bytes == size.overhead == size.file - size.tensors
    assert done.manifest.allocation == allocation.digest
    assert len(set(allocation.counts.values())) == (1 if target == "gguf" else 2)


def test_the_safetensors_library_reads_every_tensor(case, written, which):
    name, target, container = which
    if container == "gguf":
        pytest.skip("the other container")
    made, folder = case(name, target), written(*which).folder
    allocation = made.allocation()
    stored = {}  # group, format and experts by name in the file
    for group, text in allocation.formats:
        pieces = [piece.partition(":") for piece in text.split("+")]
        for fmt, _, experts in pieces:
            name = f"{group}.{fmt}" if len(pieces) > 1 else group
            stored[name] = group, fmt, [int(e) for e in experts.split(",") if e]
    assert (len(stored) > len(made.layout.groups)) == (target == "safetensors")
    with safe_open(folder / runtime_named(container).file_name, framework="pt") as file:
        names = set(file.keys())
        assert names == {*stored, *(k.source for k in made.layout.full_precision)}
        total = 0
        for tensor_name, (group, fmt, experts) in stored.items():
            tensor = file.get_tensor(tensor_name)
            kept = allocation.retained_experts[made.layout.groups[group].layer] if (
                ".experts." in group) else None  # fmt: skip
            whole = made.encodings.encoded(group, fmt)
            assert (
                tensor.numpy().tobytes()
                == (whole if kept is None else whole[experts or list(kept)]).tobytes()
            )
            total += tensor.nbytes
        for kept in made.layout.full_precision:
            tensor = file.get_tensor(kept.source)
            assert tuple(tensor.shape) == kept.shape_with(allocation.counts.get(kept.layer, 0))
            total += tensor.nbytes
    assert total == allocation.nbytes(made.layout, target_named(container)).tensors


def test_manifest_digests_are_the_files(written, which):
    done = written(*which)
    files = contents(done.folder)
    assert set(files) == {*done.manifest.sha256, "manifest.json"}
    for name, digest in done.manifest.sha256.items():
        assert hashlib.sha256(files[name]).hexdigest() == digest
    assert Manifest.read(done.folder) == done.manifest
    expected = {"allocation.json", runtime_named(done.manifest.container).file_name}
    assert expected <= set(files)


BESIDE = {
    "tokenizer.json": "{}", "tokenizer_config.json": "{}", "special_tokens_map.json": "{}",
    "added_tokens.json": "{}", "vocab.json": "{}", "merges.txt": "a b", "tokenizer.model": "x",
    "tiktoken.model": "x", "qwen.tiktoken": "x", "tokenization_own.py": "raise SystemExit",
    "chat_template.jinja": "c", "chat_template.json": "{}", "generation_config.json": "{}",
    "additional_chat_templates/rag.jinja": "r", "additional_chat_templates/tools.jinja": "t",
}  # fmt: skip


def test_what_a_runtime_needs_beside_the_weights_is_carried_over(case, tmp_path):
    made = case("qwen3", "safetensors")
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    others = {"README.md": "#", "optimizer.bin": "o", "additional_chat_templates/note.txt": "n"}
    for name, text in {**BESIDE, **others}.items():
        (source / name).write_text(text)
    for file in made.path.glob("*.safetensors"):
        (source / file.name).symlink_to(file)
    shutil.copy(made.path / "config.json", source)
    layout = target_named("safetensors").layout(read_inventory(source))
    encodings = Encodings(made.encodings_folder, layout, {})
    for _ in range(2):  # the second takes the place of the first
        done = materialize(
            EncodedTensors(encodings, made.allocation()),
            tmp_path / "out",
            container="safetensors",
            importance="i" * 64,
        )
    files = contents(done.folder)
    assert {n: files[n].decode() for n in BESIDE} == BESIDE
    ours = {"config.json", "allocation.json", "manifest.json", done.manifest.file}
    assert set(files) == {*BESIDE, *ours}
    assert set(done.manifest.sha256) == set(files) - {"manifest.json"}


def test_two_writes_are_equal(case, written, which, tmp_path):
    name, target, container = which
    again = case(name, target).write(tmp_path / "again", container)
    assert again.manifest == written(*which).manifest
    assert contents(again.folder) == contents(written(*which).folder)


def test_another_allocation_is_another_file(case, written, tmp_path):
    made = case("qwen3", "safetensors")
    other = made.write(tmp_path / "other", "safetensors", made.allocation(1))
    assert other.manifest.sha256 != written("qwen3", "safetensors", "safetensors").manifest.sha256


@pytest.mark.parametrize("target", ["gguf", "safetensors"])
@pytest.mark.parametrize("cap", [None, 1])
def test_only_what_is_stored_is_encoded(case, written, tmp_path, target, cap):
    """With a cap that fits nothing, only what is written at the moment stays in the encodings."""
    made = case("deepseek", target)
    allocation, folder = made.allocation(), tmp_path / "bank"
    encodings = Encodings(folder, made.layout, {}, cap_bytes=cap)
    source = EncodedTensors(encodings, allocation)
    again = materialize(source, tmp_path / "out", container=target, importance="i" * 64)
    assert again.manifest == written("deepseek", target, target).manifest
    if cap:
        assert len(list(folder.iterdir())) == 1
        return
    for name, group in made.layout.groups.items():
        for fmt, experts in allocation.parts(made.layout, name):
            stored = [e for e in range(8) if encodings.has(name, fmt.name, e)] if experts else ()
            assert tuple(stored) == experts
            assert encodings.has(name, fmt.name, experts[0] if experts else None)
            assert 0 < len(experts) < 8 or not group.role.is_expert


# -- whole or absent


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
@pytest.mark.parametrize("old", [False, True])
def test_an_error_half_way_leaves_what_was_there(case, tmp_path, container, old):
    made, folder = case("qwen3", "gguf"), tmp_path / "out"
    if old:
        made.write(folder, container)
    before = contents(folder) if old else None
    calls = []

    class Failing(EncodedTensors):
        def encoded(self, name, part=0):
            calls.append(name)
            if len(calls) == 5:
                raise OSError("the disk is gone")
            return super().encoded(name, part)

    with pytest.raises(OSError, match="gone"):
        made.write(folder, container, source=Failing)
    assert os.listdir(tmp_path) == (["out"] if old else [])
    if old:
        assert contents(folder) == before


_KILLED = """
import os, signal, sys
from pathlib import Path
from allocator.decision.allocation import Allocation
from allocator.codecs.encodings import Encodings
from allocator.checkpoint.reading import read_inventory
from allocator.export import checkpoint
from allocator.export.tensors import EncodedTensors
from allocator.targets import TARGETS
import json

path, bank, folder, container, allocation, where = sys.argv[1:]
calls = []

def dying(original):
    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5 or where != "encoded":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call

if where == "encoded":
    EncodedTensors.encoded = dying(EncodedTensors.encoded)
else:
    checkpoint.file_digest = dying(checkpoint.file_digest)
layout = TARGETS["gguf"].layout(read_inventory(path))
encodings = Encodings(Path(bank), layout, {})
checkpoint.materialize(
    EncodedTensors(encodings, Allocation.from_json(json.loads(allocation))), Path(folder),
    container=container, importance="i" * 64,
)
"""


@pytest.mark.parametrize(
    ("container", "where", "old"),
    [("gguf", "encoded", False), ("safetensors", "encoded", True), ("gguf", "digests", True)],
)
def test_kill_leaves_no_half_of_it_under_the_name(case, written, tmp_path, container, where, old):
    made, folder = case("qwen3", "gguf"), tmp_path / "out"
    if old:
        made.write(folder, container)
    whole = contents(written("qwen3", "gguf", container).folder)
    arguments = [str(made.path), str(made.encodings_folder), str(folder), container,
                 json.dumps(made.allocation().to_json()), where]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert folder.exists() == old
    if old:
        assert contents(folder) == whole
    made.write(folder, container)
    assert contents(folder) == whole


def test_a_kill_between_the_renames_leaves_whole_directories(case, written, tmp_path, monkeypatch):
    """The moment when the old one is aside and the new one is not yet in place."""
    made, folder = case("qwen3", "safetensors"), tmp_path / "out"
    made.write(folder, "safetensors")
    whole = contents(folder)
    moments = []
    original = Path.rename

    def rename(self, target):
        moments.append([contents(p) for p in tmp_path.iterdir() if p.is_dir()])
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", _logged(shutil.rmtree, moments, folder, whole))
    made.write(folder, "safetensors")
    assert len(moments) >= 2
    assert all(whole in moment for moment in moments)
    assert contents(folder) == whole
    assert os.listdir(tmp_path) == ["out"]


def _logged(original, moments, folder, whole):
    def rmtree(path, **options):
        if Path(path) == folder:
            pytest.fail("removes what lies under the name")
        return original(path, **options)

    return rmtree


# -- damage, and checkpoints that change


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_a_damaged_bank_writes_the_same_bytes(case, written, tmp_path, container, caplog):
    made = case("deepseek", "gguf")
    written("deepseek", "gguf", container)
    folder = shutil.copytree(made.encodings_folder, tmp_path / "bank")
    for entry in folder.iterdir():  # in the middle of some slot, whoever's it is
        for part in (3, 5, 7):
            flip(entry, entry.stat().st_size * part // 8)
    again = materialize(
        EncodedTensors(Encodings(folder, made.layout, {}), made.allocation()), tmp_path / "out",
        container=container, importance="i" * 64,
    )  # fmt: skip
    assert again.manifest == written("deepseek", "gguf", container).manifest
    assert len(caplog.records) >= len(made.layout.groups) - 1
    assert all("encoded again" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_a_bit_that_flips_on_the_way_to_the_file_is_found(case, tmp_path, monkeypatch, container):
    made, digest = case("qwen3", "gguf"), checkpoint.file_digest

    def flipping(path):
        if path.name == runtime_named(container).file_name:
            flip(path, path.stat().st_size // 2)
        return digest(path)

    monkeypatch.setattr(checkpoint, "file_digest", flipping)
    refuses(tmp_path, VerifyError, "comes back from the disk other than it was written",
            lambda: made.write(tmp_path / "out", container))  # fmt: skip


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_that_is_replaced_meanwhile_is_not_written(
    case, tmp_path, container, file, old
):
    made = case("qwen3", "gguf")
    path = shutil.copytree(made.path, tmp_path / "checkpoint")
    layout = TARGETS["gguf"].layout(read_inventory(path))
    folder, write = tmp_path / "out", {"container": container, "importance": "i" * 64}
    if old:
        encodings = Encodings(tmp_path / "bank", layout, {})
        materialize(EncodedTensors(encodings, made.allocation()), folder, **write)
    before = contents(folder) if old else None
    calls = []

    class Replacing(EncodedTensors):
        def encoded(self, name, part=0):
            calls.append(name)
            if len(calls) == 5:
                shutil.copyfile(path / file, tmp_path / "new")
                os.replace(tmp_path / "new", path / file)
            return super().encoded(name, part)

    encodings = Encodings(tmp_path / "bank", layout, {})
    with pytest.raises(CheckpointError, match=f"{file}: changed or replaced"):
        materialize(Replacing(encodings, made.allocation()), folder, **write)
    assert len(calls) >= 5
    assert not list(tmp_path.glob(".out*"))
    assert (contents(folder) if old else folder.exists()) == (before or False)
    encodings = Encodings(tmp_path / "bank", TARGETS["gguf"].layout(read_inventory(path)), {})
    again = materialize(  # the same weights, as it happens
        EncodedTensors(encodings, made.allocation()), folder, **write
    )
    assert again.manifest.checkpoint == made.layout.inventory.digest


# -- refusals


def refuses(tmp_path, error, match, write):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        write()
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_too_small_a_disk_is_refused(case, tmp_path, monkeypatch):
    made = case("qwen3", "gguf")
    size = made.allocation().nbytes(made.layout).file
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(size * 2, size, size - 1))
    needed = int(size * 1.01) + (16 << 20)
    refuses(tmp_path, VerifyError, f"{size - 1:,} bytes free, needed {needed:,}",
            lambda: made.write(tmp_path / "out", "gguf"))  # fmt: skip
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, size * 2 + (32 << 20)))
    made.write(tmp_path / "out", "gguf")


def test_a_directory_with_something_else_is_refused(case, tmp_path):
    made = case("qwen3", "gguf")
    (tmp_path / "empty").mkdir()
    made.write(tmp_path / "empty", "gguf")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/notes.txt").write_text("mine")
    made.write(tmp_path / "other", "gguf", made.allocation(1))
    made.write(tmp_path / "container", "safetensors")
    made.write(tmp_path / "more", "gguf")
    (tmp_path / "more/notes.txt").write_text("mine")
    for name in ("file", "notes", "other", "container", "more"):
        refuses(tmp_path, VerifyError, "holds something else",
                lambda name=name: made.write(tmp_path / name, "gguf"))  # fmt: skip
    assert (tmp_path / "more/notes.txt").read_text() == "mine"
    made.write(tmp_path / "empty", "gguf")  # its own is replaced


def test_missing_parents_are_made_but_not_in_the_place_of_a_file(case, tmp_path):
    made = case("qwen3", "gguf")
    (tmp_path / "file").write_text("mine")
    refuses(tmp_path, OutputError, "OUT .*/out: .*/file is no folder; name another place",
            lambda: made.write(tmp_path / "file/deep/out", "gguf"))  # fmt: skip
    made.write(tmp_path / "new/deep/out", "gguf")
    assert (tmp_path / "new/deep/out/manifest.json").is_file()


def test_a_safetensors_allocation_is_no_gguf(case, tmp_path):
    made = case("deepseek", "safetensors")
    refuses(tmp_path, TargetError, "cannot be written as gguf",
            lambda: made.write(tmp_path / "out", "gguf"))  # fmt: skip


def test_an_allocation_of_another_checkpoint_is_refused(case, tmp_path):
    made = case("deepseek", "gguf")
    other = case("qwen3", "gguf").allocation()
    refuses(tmp_path, SpaceError, "not in both allocation and checkpoint",
            lambda: made.write(tmp_path / "out", "gguf", other))  # fmt: skip
