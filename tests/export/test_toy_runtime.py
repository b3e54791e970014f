"""A runtime that is added in one file: searched for, written, verified, rebuilt."""

import json
import shutil

import numpy as np
import pytest

from allocator import api
from allocator.app.study_folder import StudyFolder
from allocator.errors import AllocatorError, SpaceError, VerifyError
from allocator.export.base import Comparison, Runtime
from allocator.export.runtimes import RUNTIMES, register_runtime
from allocator.export.stored import StoredTensor
from allocator.export.tensors import EncodedTensors
from allocator.scoring.scorer import Scorer, mean
from allocator.scoring.swap_model import SwapModel
from allocator.targets import TARGETS, FullPrecision, Layout, register_target
from allocator.targets.base import Target
from allocator.targets.layout import in_file_order, plain_groups
from allocator.testing.runtimes import RuntimeCase, RuntimeConformance

MAGIC = b"SHELF"


class ShelfTarget(Target):
    """A magic, a JSON index in whole blocks of 64 bytes, then tensors in whole blocks."""

    name = "shelf"
    one_expert_count = True
    mixes_experts = False
    alignment = 64

    def layout(self, inventory):
        kept = tuple(
            FullPrecision(t.name, t.name, t.role, t.layer, t.shape, "F32")
            for t in inventory.tensors.values()
            if not t.role.is_encoded
        )
        return Layout(self.name, inventory, in_file_order(plain_groups(inventory, {})), kept)

    def header_bytes(self, layout, *, retained, formats, experts_used):
        return len(header(layout, formats))


def header(layout, formats):
    index = {group: formats[group] for group in layout.groups}
    index |= {tensor.source: tensor.dtype for tensor in layout.full_precision}
    text = MAGIC + json.dumps(index).encode()
    return text + b" " * (-len(text) % 64)


class ShelfRuntime(Runtime):
    """Runs a file as a model with the file's own weights."""

    target = ShelfTarget()
    file_name = "model.shelf"
    tolerance = 1e-6
    program = "shelf"
    divergence_name = "difference"

    def write(self, folder, source, workload):
        layout = source.layout
        with open(folder / self.file_name, "wb") as file:
            file.write(header(layout, source.allocation.format_of))
            pieces = [source.encoded(group) for group in layout.groups]
            pieces += [source.full_precision(tensor) for tensor in layout.full_precision]
            for data in pieces:
                file.write(data.tobytes().ljust(self.target.padded(data.nbytes), b"\0"))
        return ""

    def read(self, path, layout):
        data = path.read_bytes()
        try:
            assert data[: len(MAGIC)] == MAGIC
            formats, end = json.JSONDecoder().raw_decode(data[len(MAGIC) :].decode("latin-1"))
        except (AssertionError, ValueError):
            raise VerifyError(f"{path}: no shelf; write it again") from None
        start = self.target.padded(len(MAGIC) + end)
        allocation = json.loads((path.parent / "allocation.json").read_text())
        retained = {int(layer): tuple(e) for layer, e in allocation["retained"].items()}
        tensors = {}
        for name, fmt in formats.items():
            nbytes = self._nbytes(layout, name, fmt, retained)
            stored = np.frombuffer(data[start : start + nbytes], np.uint8)
            tensors[name] = StoredTensor(stored, fmt)
            start += self.target.padded(nbytes)
        return tensors

    def _nbytes(self, layout, name, fmt, retained):
        from allocator.formats import format_named

        if name in layout.groups:
            group = layout.groups[name]
            return format_named(fmt).nbytes(group.shape_with(len(group.experts(retained))))
        tensor = next(t for t in layout.full_precision if t.source == name)
        return tensor.nbytes(len(retained.get(tensor.layer, ())))

    def full_precision_bytes(self, source, tensor):
        return source.full_precision(tensor).view(np.uint8)

    def compare(self, path, stored, scorer, *, loss, tolerance, progress=False):
        model = SwapModel(stored.layout, stored.decoded)
        found = mean(Scorer(model, scorer.documents).score(stored.candidate).kl, scorer.documents)
        if abs(found - loss) > tolerance:
            raise VerifyError(f"{path}: off by {abs(found - loss)}")
        return Comparison(found, abs(found - loss))

    def read_recipe(self, text, layout):
        return dict(line.split() for line in text.splitlines())


SHELF = ShelfRuntime()


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_target(SHELF.target)
    register_runtime(SHELF)
    yield
    del TARGETS[SHELF.name], RUNTIMES[SHELF.name]


class TestShelf(RuntimeConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, case, registered):
        other = case("qwen3", "safetensors")
        made = case("qwen3", SHELF.name)
        source = EncodedTensors(made.encodings, made.allocation())
        return RuntimeCase(SHELF, source, made.scorer, foreign=other.allocation())


def test_from_a_search_to_a_rebuilt_file(fresh_study, study_cache, tmp_path):
    study = shutil.copytree(fresh_study, tmp_path / "study")
    text = (study / "study.toml").read_text().replace('"gguf"', f'"{SHELF.name}"')
    (study / "study.toml").write_text(text)
    options = {"cache": study_cache, "threads": 1}
    assert len(api.inspect(StudyFolder(study).inventory.path, target=SHELF.name))
    found = api.search(study, trials=4, **options)
    made = api.materialize(study, found.pick, tmp_path / "out", record=True, **options)
    assert made.manifest.file == "model.shelf"
    checked = api.verify(study, made.folder, encode=True, **options)
    assert checked.runtime is SHELF
    assert checked.divergence <= SHELF.tolerance
    (again,) = api.reproduce(found.pick, tmp_path / "again", study=study, **options)
    assert again.manifest == made.manifest
    with pytest.raises(AllocatorError, match="cannot be written as gguf"):
        api.materialize(study, found.pick, tmp_path / "gguf", container="gguf", **options)
    as_safetensors = api.materialize(
        study, found.pick, tmp_path / "loadable", container="safetensors", **options
    )
    api.verify(study, as_safetensors.folder, **options)


def test_its_own_recipe_is_read(fresh_study, study_cache, tmp_path):
    study = shutil.copytree(fresh_study, tmp_path / "study")
    plain = (study / "study.toml").read_text()
    recipe = tmp_path / "recipe.txt"
    options = {"cache": study_cache, "threads": 1}
    (study / "study.toml").write_text(plain.replace('"gguf"', f'"{SHELF.name}"'))
    groups = StudyFolder(study, **options).layout.groups
    recipe.write_text("".join(f"{group} Q8_0\n" for group in groups))
    decision = StudyFolder(study, **options).read_allocation(recipe)
    assert set(decision.format_of.values()) == {"Q8_0"}
    (study / "study.toml").write_text(plain.replace('"gguf"', '"safetensors"'))
    with pytest.raises(SpaceError, match="no recipes of its own"):
        StudyFolder(study, **options).read_allocation(recipe)
