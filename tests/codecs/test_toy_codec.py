"""A codec that is added in one file: searched with, written, verified, loaded afresh."""

import importlib.util
import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from allocator import api
from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.reading import read_inventory
from allocator.codecs.registry import CODECS, codec_of, identity_of, register_codec
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import FormatError, SpaceError, VerifyError
from allocator.export.safetensors.loading import load
from allocator.formats import FORMATS, Format, format_named, register_formats
from allocator.formats.registry import OFFERS
from allocator.targets import GGUF, SAFETENSORS
from allocator.testing.codecs import CodecConformance

FILE = Path(__file__).with_name("toy_codec.py")
NAMES = ("INT5_G16", "INT3_G16")
BLOCKS = {"INT5_G16": (16, 12), "INT3_G16": (16, 8), "Q8_0": (32, 34)}


@pytest.fixture(scope="module", autouse=True)
def toy():
    """The codec, registered while these tests run."""
    spec = importlib.util.spec_from_file_location("toy_codec", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.TOY
    del CODECS["toy"], OFFERS["toy"]
    for name in NAMES:
        del FORMATS[name]


class TestConformance(CodecConformance):
    formats = NAMES

    @pytest.fixture(scope="class")
    @classmethod
    def codec(cls, toy):
        return toy


# -- what is offered


def test_a_target_says_which_codecs_its_file_can_hold(checkpoints):
    inventory = read_inventory(checkpoints["qwen3"])
    for target, expected in ((GGUF, set()), (SAFETENSORS, {*NAMES})):
        for group in target.layout(inventory).groups.values():
            names = [fmt.name for fmt in group.offered()]
            assert {*names} & {*NAMES} == expected
            bits = [fmt.bits for fmt in group.offered()]
            assert bits == sorted(bits, reverse=True)


def test_an_allocation_for_gguf_cannot_hold_it(checkpoints):
    layout = GGUF.layout(read_inventory(checkpoints["qwen3"]))
    allocation = Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, tuple(range(layout.inventory.n_experts))),
        formats=dict.fromkeys(layout.groups, "INT3_G16"),
        experts_used=layout.inventory.experts_used,
    )
    with pytest.raises(SpaceError, match="a format of codec toy; files of target gguf hold") as e:
        allocation.check(layout)
    assert "\n" not in str(e.value)


def test_records_name_every_codec(toy):
    known = FORMATS["Q8_0"]
    assert identity_of([FORMATS["INT3_G16"]]) == "toy-codec 1"
    both = identity_of([FORMATS["INT3_G16"], known, FORMATS["INT5_G16"]])
    assert both == f"{codec_of(known).identity}, toy-codec 1"


# -- names that are taken


def test_registering_it_again_changes_nothing(toy):
    before = dict(FORMATS)
    register_codec(toy)
    assert before == FORMATS


def test_names_that_are_taken_are_refused(toy):
    other = type(toy)()
    other.version = "2"
    with pytest.raises(FormatError, match="'toy' is toy-codec 1 already; give toy-codec 2"):
        register_codec(other)
    with pytest.raises(FormatError, match="'Q8_0' of codec mine exists already in codec"):
        register_formats("mine", [Format("Q8_0", 8, 9, "mine", 0.1)])
    with pytest.raises(FormatError, match="format X names codec 'yours', registered by mine"):
        register_formats("mine", [Format("X", 8, 9, "yours", 0.1)])
    assert "X" not in FORMATS
    with pytest.raises(FormatError, match=r"X: no codec 'yours', known: .*toy; import the module"):
        codec_of(Format("X", 8, 9, "yours", 0.1))


# -- a whole study


@pytest.fixture(scope="module")
def searched(checkpoints, write_study, tmp_path_factory):
    """A study of target safetensors that may choose the toy's formats and one of the others."""
    folder = write_study(tmp_path_factory.mktemp("toy") / "study", checkpoints["qwen3"])
    text = (folder / "study.toml").read_text().replace('target = "gguf"', 'target = "safetensors"')
    (folder / "study.toml").write_text(text)
    layout = SAFETENSORS.layout(read_inventory(checkpoints["qwen3"]))
    plain = sum(FORMATS["INT3_G16"].nbytes(g.shape) for g in layout.groups.values())
    space = 'schema = 1\nformats = ["Q8_0", "INT5_G16", "INT3_G16"]\n'
    (folder / "space.toml").write_text(space)
    cache = tmp_path_factory.mktemp("toy-cache")
    options = {"cache": cache, "threads": 1}
    result = api.search(folder, budget=str(round(1.2 * plain)), **options)
    return folder, result, options


def test_a_search_finds_its_formats(searched):
    folder, result, options = searched
    record = AllocationRecord.read(result.pick)
    stored = {fmt.name for fmt in record.decision.stored_formats}
    assert stored & {*NAMES}
    assert "toy-codec 1" in record.codec
    layout = StudyFolder(folder, **options).layout
    encoded = 0
    for name, group in layout.groups.items():
        for fmt, experts in record.decision.parts(layout, name):
            block, block_bytes = BLOCKS[fmt.name]
            encoded += prod(group.shape_with(len(experts))) // block * block_bytes
    assert record.bytes["encoded"] == encoded


def python(code, *args):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(FILE.parent), *sys.path])},
    )


LOAD = """
import json, sys
import torch
import allocator
import toy_codec
from allocator.export.safetensors.loading import load
torch.set_num_threads(1)
with torch.no_grad():
    logits = load(sys.argv[1])(torch.arange(16)[None]).logits
print(json.dumps(logits[0, -1].tolist()))
"""


def test_it_is_written_verified_and_loaded_in_a_fresh_process(searched, tmp_path, monkeypatch):
    folder, result, options = searched
    written = api.materialize(folder, result.pick, tmp_path / "out", **options)
    found = api.verify(folder, tmp_path / "out", **options)
    assert found.divergence <= 1e-5
    assert found.file_bytes == (tmp_path / "out" / written.manifest.file).stat().st_size
    with torch.no_grad():
        expected = load(tmp_path / "out")(torch.arange(16)[None]).logits[0, -1]
    fresh = python(LOAD, tmp_path / "out")
    assert fresh.returncode == 0, fresh.stderr
    np.testing.assert_allclose(json.loads(fresh.stdout), expected.numpy(), atol=1e-5)
    for name in NAMES:
        monkeypatch.delitem(FORMATS, name)
    with pytest.raises(FormatError, match=r"unknown format 'INT.* the codec's module is imported"):
        load(tmp_path / "out")


def test_a_damaged_file_is_found(searched, tmp_path):
    folder, result, options = searched
    written = api.materialize(folder, result.pick, tmp_path / "out", **options)
    path = tmp_path / "out" / written.manifest.file
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerifyError, match="changed since it was written"):
        api.verify(folder, tmp_path / "out", **options)


def test_unknown_again_where_it_is_not_imported():
    code = "from allocator.formats import FORMATS; print('INT3_G16' in FORMATS)"
    assert python(code).stdout.strip() == "False"
    assert format_named("INT3_G16").codec == "toy"
