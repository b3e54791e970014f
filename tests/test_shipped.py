"""Every data file that the repository ships loads, and belongs to what is beside it."""

import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from allocator.app.device_presets import read_device_preset
from allocator.app.study_file import StudySpec
from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation_record import AllocationRecord
from allocator.decision.search_space import SearchSpace
from allocator.profiling.statistics import importance_digest
from allocator.targets import TARGETS
from allocator.units import parse_bytes

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "studies/reference"
RECORDS = sorted([*REFERENCE.glob("allocations/*.json"), *REFERENCE.glob("budgets/*.json")])
DEVICES = sorted(ROOT.glob("search_spaces/devices/*"))
IMPORTANCE = sorted(REFERENCE.glob("*/importance-*.safetensors"))


@pytest.fixture(scope="module")
def reference_layouts():
    inventory = read_inventory(REFERENCE / "model")
    return {name: target.layout(inventory) for name, target in TARGETS.items()}


@pytest.mark.parametrize("path", sorted(ROOT.glob("search_spaces/*.toml")), ids=lambda p: p.name)
def test_search_spaces(path):
    assert SearchSpace.read(path).schema == 1


@pytest.mark.parametrize("path", DEVICES, ids=lambda p: p.name)
def test_devices(path):
    device = read_device_preset(path)
    assert "https://" in device.source
    assert 8e9 <= parse_bytes(device.memory) <= 2e11
    assert 1e10 <= parse_bytes(device.bandwidth) <= 2e12


@pytest.mark.parametrize("path", sorted(ROOT.glob("studies/*/study.toml")), ids=lambda p: str(p))
def test_studies(path):
    spec = StudySpec.read(path.parent)
    named = (spec.checkpoint, spec.space, spec.calibration.documents, spec.calibration.report)
    for name in named:
        assert not name or (path.parent / name).exists()


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_allocations(path, reference_layouts):
    record = AllocationRecord.read(path)
    layout = reference_layouts[record.decision.target]
    record.decision.check(layout)
    assert record.checkpoint == layout.inventory.digest
    size = record.decision.nbytes(layout)
    assert (record.bytes["encoded"], record.bytes["file"]) == (size.encoded, size.file)
    assert size.encoded <= record.bytes["budget"]
    assert any(p.stem == f"importance-{record.importance[:12]}" for p in IMPORTANCE)


@pytest.mark.parametrize("path", IMPORTANCE, ids=lambda p: p.name)
def test_importance(path):
    assert path.stem == f"importance-{importance_digest(load_file(path))[:12]}"


def test_something_is_shipped():
    assert len(RECORDS) >= 22
    assert len(IMPORTANCE) == 3
    assert len(DEVICES) >= 6


def test_the_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    named = set(re.findall(r"docs/[\w.-]+\.md", text))
    assert named == {str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=str)
def test_pages_name_files_that_exist(page):
    """Paths of the repository in backquotes, and pictures."""
    text = page.read_text()
    paths = re.findall(
        r"`((?:allocator|docs|studies|search_spaces|tests|notebooks)/[\w./-]+)`", text
    )
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    known = [ROOT / p for p in paths if not p.startswith("studies/quickstart")]
    assert [p for p in (*known, *(page.parent / p for p in pictures)) if not p.exists()] == []
