"""Weights cut into shards, against the same weights in one file and transformers' own reader."""

import hashlib
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils.hub import get_checkpoint_shard_files

import allocator.transformers  # noqa: F401 - registers the quantizer
from allocator.errors import AllocatorError, TargetError, VerifyError
from allocator.export.manifest import Manifest, file_digest
from allocator.export.safetensors.directory import FILE_NAME
from allocator.export.safetensors.loading import load
from allocator.export.safetensors.runtime import SAFETENSORS_RUNTIME
from allocator.export.tensors import EncodedTensors
from allocator.export.verification import verify
from allocator.targets.safetensors import INDEX_NAME, cut

SHARD_BYTES = 100_000
CASES = [("deepseek", "gguf"), ("qwen3", "safetensors")]
IDS = torch.tensor([[0, 17, 301, 44, 5, 123, 9, 77]])


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def both(request, case, written, tmp_path_factory):
    """What it was made of, the directory in shards, and the one in one file; read only."""
    made = case(*request.param)
    folder = tmp_path_factory.mktemp("shards") / "out"
    shards = made.write(folder, "safetensors", shard_bytes=SHARD_BYTES)
    return made, shards, written(*request.param, "safetensors")


def tensors(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_file_takes_what_fits_and_a_larger_tensor_is_alone():
    rows = [(str(n), "U8", (n,)) for n in (3, 4, 5, 99, 1, 1, 10, 2)]
    shards = cut(rows, 10)
    assert [[n for _, _, (n,) in s.rows] for s in shards] == [[3, 4], [5], [99], [1, 1], [10], [2]]
    assert [s.name for s in shards][-1] == "model-00006-of-00006.safetensors"
    assert [r for s in shards for r in s.rows] == rows


def test_shards_hold_the_one_files_tensors_at_the_predicted_bytes(both):
    made, shards, one = both
    folder, manifest = shards.folder, shards.manifest
    files, _ = get_checkpoint_shard_files(str(folder), str(folder / INDEX_NAME))
    names = sorted({file.rpartition("/")[2] for file in files})
    assert len(names) > 3
    assert names[-1] == f"model-{len(names):05d}-of-{len(names):05d}.safetensors"
    assert not (folder / FILE_NAME).exists()
    index = json.loads((folder / INDEX_NAME).read_text())
    expected, found = tensors(one.folder / FILE_NAME), {}
    for name in names:
        stored = tensors(folder / name)
        sizes = [t.nbytes for t in stored.values()]
        assert sum(sizes) <= SHARD_BYTES or len(sizes) == 1
        assert {n for n, file in index["weight_map"].items() if file == name} == set(stored)
        assert not set(found) & set(stored)
        found |= stored
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    total = sum(t.nbytes for t in expected.values())
    assert index["metadata"]["total_size"] == total == manifest.tensor_bytes
    sizes = [(folder / name).stat().st_size for name in (*names, INDEX_NAME)]
    runtime = SAFETENSORS_RUNTIME.in_shards(made.layout, made.allocation(), SHARD_BYTES)
    size = made.allocation().nbytes(made.layout, runtime.target)
    assert manifest.file_bytes == size.file == sum(sizes) == total + size.overhead
    assert manifest.overhead_bytes > one.manifest.overhead_bytes
    assert set(manifest.sha256) >= {*names, INDEX_NAME}
    assert Manifest.read(folder) == manifest


def test_the_digest_for_records_is_that_of_one_file(both):
    _, shards, one = both
    expected = hashlib.sha256((one.folder / FILE_NAME).read_bytes()).hexdigest()
    assert shards.manifest.sha256_of_weights == one.manifest.sha256_of_weights == expected
    assert one.manifest.shown_sha256 == f"sha256 {expected}"
    of_index = file_digest(shards.folder / INDEX_NAME)
    assert f"sha256 {of_index} of the index " in shards.manifest.shown_sha256
    assert f" {expected} of one file " in shards.manifest.shown_sha256


def test_sha256sum_checks_a_directory_as_the_docs_say(both, tmp_path):
    """With the lines of docs/reproducing.md; a byte that changed is found."""
    page = (Path(__file__).parents[3] / "docs/reproducing.md").read_text()
    command = re.search(r"    (python3 -c .*\| sha256sum -c)\n", page)[1]
    folder = shutil.copytree(both[1].folder, tmp_path / "copy")
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{INDEX_NAME}: OK" in done.stdout
    assert done.stdout.count(": OK") == len(both[1].manifest.sha256)
    with next(folder.glob("model-00002-of-*")).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xa5")
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("FAILED")) == (1, 1)


@torch.inference_mode()
def test_transformers_and_our_loader_open_them(both, tmp_path):
    _, shards, one = both
    expected = load(one.folder)(IDS).logits
    assert torch.equal(load(shards.folder)(IDS).logits, expected)
    model = AutoModelForCausalLM.from_pretrained(shards.folder)
    assert torch.equal(model(IDS).logits, expected)
    model.save_pretrained(tmp_path / "again")
    for name in (n for n in shards.manifest.sha256 if n.startswith("model")):
        assert file_digest(tmp_path / "again" / name) == shards.manifest.sha256[name]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, expected)


def test_they_are_verified_and_what_changed_is_found(both, tmp_path):
    made, shards, _ = both
    of = partial(EncodedTensors, made.encodings)
    found = verify(shards.folder, of, made.scorer)
    assert found.file_bytes == shards.manifest.file_bytes
    assert found.divergence <= 1e-5
    folder = shutil.copytree(shards.folder, tmp_path / "copy")
    names = sorted(n for n in shards.manifest.sha256 if n.startswith("model-"))
    (folder / names[1]).unlink()
    with pytest.raises(VerifyError, match=f"{names[1]}: missing or changed"):
        verify(folder, of, made.scorer)
    for opener in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises((AllocatorError, OSError), match=names[1]):
            opener(folder)


def test_a_size_that_takes_all_changes_no_byte(both, tmp_path):
    made, shards, one = both
    whole = made.write(tmp_path / "out", "safetensors", shard_bytes=shards.manifest.tensor_bytes)
    for name in (*one.manifest.sha256, "manifest.json"):
        assert (whole.folder / name).read_bytes() == (one.folder / name).read_bytes()


def test_shards_take_the_place_of_one_file_and_a_failure_leaves_it(both, tmp_path):
    made, _, one = both
    folder = shutil.copytree(one.folder, tmp_path / "out")

    class Failing(EncodedTensors):
        def encoded(self, name, part=0):
            if name.startswith("layers.1."):
                raise KeyboardInterrupt
            return super().encoded(name, part)

    with pytest.raises(KeyboardInterrupt):
        made.write(folder, "safetensors", source=Failing, shard_bytes=SHARD_BYTES)
    assert Manifest.read(folder) == one.manifest
    assert (folder / FILE_NAME).is_file()
    made.write(folder, "safetensors", shard_bytes=SHARD_BYTES)
    assert (folder / INDEX_NAME).is_file()
    assert not (folder / FILE_NAME).exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("container", "size", "match"),
    [("gguf", 1000, "1,000 bytes: llama.cpp opens model.gguf alone"),
     ("safetensors", 0, "0 bytes: needed at least 1, e.g. 5GB")],
)  # fmt: skip
def test_what_no_runtime_opens_is_refused(case, tmp_path, container, size, match):
    made = case("deepseek", "gguf")
    with pytest.raises(TargetError, match=match):
        made.write(tmp_path / "out", container, shard_bytes=size)
    assert not (tmp_path / "out").exists()
