"""llama.cpp's imatrix in a study: importance in, importance out."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from allocator import api
from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.gguf.imatrix import read_imatrix
from allocator.decision.allocation_record import AllocationRecord, importance_name, read_importance
from allocator.errors import SpaceError, StudyError, TargetError
from allocator.export.gguf.files import read_gguf
from allocator.files.checksums import seal, unseal


@pytest.fixture
def study(finished_study, tmp_path):
    return shutil.copytree(finished_study, tmp_path / "study")


def use(study, name):
    path = study / "study.toml"
    path.write_text(path.read_text() + f'imatrix = "{name}"\n')


def test_a_study_takes_its_importance_from_an_imatrix(study, study_cache, tmp_path):
    own = StudyFolder(study, cache=study_cache)
    vectors = own.profiler.statistics.importance
    (out,) = api.imatrix(study, study / "own.gguf", cache=study_cache)
    use(study, "own.gguf")
    given = StudyFolder(study, cache=study_cache)
    assert given.profiler.inputs.digest != own.profiler.inputs.digest  # measured anew
    for name, vector in given.profiler.statistics.importance.items():
        np.testing.assert_array_equal(vector, vectors[name], name)
    # another file's values are taken, and the study is another one
    twice = {n: m.values * 2 for n, m in read_imatrix(out).tensors.items()}
    data = out.read_bytes()
    (study / "other.gguf").write_bytes(data)
    from gguf import GGUFReader

    for tensor in GGUFReader(study / "other.gguf", "r+").tensors:
        if tensor.name.endswith(".in_sum2"):
            tensor.data[:] *= 2
    text = (study / "study.toml").read_text()
    (study / "study.toml").write_text(text.replace("own.gguf", "other.gguf"))
    other = StudyFolder(study, cache=study_cache)
    for name, vector in other.profiler.statistics.importance.items():
        stored = twice[own.layout.groups[name].stored_as]
        np.testing.assert_array_equal(vector.ravel(), stored, name)
    lock = other.lock(other.launch())
    assert lock["imatrix"] == hashlib.sha256((study / "other.gguf").read_bytes()).hexdigest()
    with pytest.raises(StudyError, match="another folder or --storage"):
        api.search(study, cache=study_cache)


@pytest.mark.slow
def test_a_search_records_the_imatrix(fresh_study, study_cache, tmp_path):
    study = shutil.copytree(fresh_study, tmp_path / "study")
    api.imatrix(study, study / "i.dat", cache=study_cache)
    use(study, "i.dat")
    result = api.search(study, trials=1, cache=study_cache)
    record = AllocationRecord.read(result.pick)
    assert record.imatrix == hashlib.sha256((study / "i.dat").read_bytes()).hexdigest()
    (study / "i.dat").unlink()  # what is committed is enough
    rebuilt = api.materialize(study, result.pick, tmp_path / "out", cache=study_cache)
    assert rebuilt.manifest.importance == record.importance


def test_an_allocation_is_exported_with_its_experts_and_formats(study, study_cache, tmp_path):
    path = study / "allocations/pick.json"
    record = AllocationRecord.read(path)
    retained = record.decision.retained_experts
    files = api.imatrix(study, tmp_path / "pick.gguf", allocation=path, cache=study_cache)
    assert [file.name for file in files] == ["pick.gguf", "pick.tensor-types.txt"]
    committed = read_importance(path.parent / importance_name(record.importance))
    taken = read_imatrix(files[0]).tensors
    layout = StudyFolder(study, cache=study_cache).layout
    for name, vectors in committed.items():
        group = layout.groups[name]
        own = vectors[list(retained[group.layer])] if group.role.is_expert else vectors
        np.testing.assert_array_equal(taken[group.stored_as].values, own.ravel())
    written = api.materialize(study, path, tmp_path / "pick", cache=study_cache)
    assert files[1].read_text() == (written.folder / "tensor-types.txt").read_text()


def test_floats_of_the_retained_experts(study, study_cache, tmp_path):
    path = study / "allocations/pick.json"
    written = api.materialize(study, path, tmp_path / "floats", floats="BF16", cache=study_cache)
    tensors = read_gguf(written.folder / "model.gguf")
    assert {fmt for fmt, _, _ in tensors.values()} == {"BF16", "F32"}
    layout = StudyFolder(study, cache=study_cache).layout
    group = layout.groups["layers.1.experts.down"]
    experts = AllocationRecord.read(path).decision.retained_experts[1]
    from safetensors.torch import load_file

    (file,) = layout.inventory.path.glob("*.safetensors")
    weights = load_file(file)
    _, shape, data = tensors[group.stored_as]
    assert shape[0] == len(experts)
    for row, expert in enumerate(experts):
        source = weights[group.sources[expert]]
        assert data[row].tobytes() == source.view(dtype=__import__("torch").uint8).numpy().tobytes()
    api.verify(study, written.folder, documents=1, tolerance=1, cache=study_cache)
    for arguments in ({"floats": "Q8_0"}, {"floats": "BF16", "record": True}):
        with pytest.raises(SpaceError, match="BF16, F16, F32"):
            api.materialize(study, path, tmp_path / "other", **arguments, cache=study_cache)


def test_an_allocation_of_another_target_is_refused(study, study_cache, tmp_path):
    path = study / "allocations/pick.json"
    record = unseal(path.read_bytes())
    allocation = record["allocation"] | {"target": "safetensors"}
    from allocator.decision.allocation import Allocation

    digest = Allocation.from_json(allocation).digest
    path.write_bytes(seal(record | {"allocation": allocation, "digest": digest}))
    assert json.loads(path.read_bytes())["allocation"]["target"] == "safetensors"
    with pytest.raises(TargetError, match="cannot be written as gguf"):
        api.imatrix(study, tmp_path / "i.gguf", allocation=path, cache=study_cache)
