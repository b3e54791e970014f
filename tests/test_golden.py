"""Files of earlier forms are opened by the code of today; see golden/README.md."""

import json
import shutil
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from allocator.app.study_folder import StudyFolder
from allocator.app.tables import front_table
from allocator.comparison.bench import Bench
from allocator.comparison.runs import results
from allocator.decision.allocation_record import AllocationRecord
from allocator.export.manifest import Manifest
from allocator.prediction.profile import Profile
from allocator.study.storages import open_storage
from allocator.study.trials import RESULT, allocation_of

GOLDEN = Path(__file__).parent / "golden"
SETS = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and p.name.isdecimal())
sys.path.insert(0, str(GOLDEN))
import make  # noqa: E402


@pytest.fixture(params=SETS)
def golden(request):
    """The folder of a set; read only."""
    return GOLDEN / request.param


@pytest.fixture
def study_folder(golden, tmp_path):
    """Its study, on the checkpoint that it was searched on."""
    make.write_checkpoint(tmp_path / "checkpoint")
    folder = make.write_study(tmp_path / "study")
    shutil.copytree(golden / "study", folder, dirs_exist_ok=True)
    return StudyFolder(folder, cache=tmp_path / "cache", threads=1)


def test_a_journal_resumes_with_its_trials(golden, study_folder):
    """Against front.json, by its text; under the lock of today's inputs."""
    front = json.loads((golden / "study/front.json").read_text())
    study = study_folder.study(study_folder.launch())
    shown = {t["trial"]: t for t in front["trials"]}
    trials = [t for t in study.get_trials() if RESULT in t.user_attrs]
    assert [t.number for t in trials] == sorted(shown)
    for trial in trials:
        row = shown[trial.number]
        assert trial.state.name == row["state"]
        assert trial.user_attrs[RESULT]["loss"] == row["loss"]
        size = allocation_of(trial).nbytes(study_folder.layout)
        assert (size.encoded, size.file) == (row["bytes"], row["file_bytes"])
    study.set_user_attr("resumed", True)  # appended to, then opened anew
    again = optuna.load_study(study_name="study", storage=open_storage(None, study_folder.path))
    assert again.user_attrs["resumed"]
    assert len(again.trials) == len(study.trials)


def test_stock_optuna_reads_a_journal(golden, tmp_path):
    path = shutil.copy(golden / "study/journal", tmp_path)
    stock = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.load_study(study_name="study", storage=stock)
    ours = optuna.load_study(study_name="study", storage=open_storage(None, tmp_path))
    assert len(study.trials) == 8
    assert study.trials == ours.trials


def test_records_decide_what_they_decided(golden, study_folder):
    manifest = Manifest.read(golden / "manifest")
    for name in ("pick", "knapsack"):
        record = AllocationRecord.read(golden / f"study/allocations/{name}.json")
        assert record.checkpoint == study_folder.inventory.digest
        assert record.decision.nbytes(study_folder.layout).encoded == record.bytes["encoded"]
        encodings = study_folder.encodings.of(record.importance)
        assert encodings.layout.inventory.digest == manifest.checkpoint
    pick = AllocationRecord.read(golden / "study/allocations/pick.json")
    assert (manifest.allocation, manifest.importance) == (pick.digest, pick.importance)
    assert manifest.sha256[manifest.file] == pick.sha256["gguf"]
    plain = json.loads((golden / "manifest/allocation.json").read_text())
    assert plain == pick.allocation


def test_a_profile_a_front_and_runs_read(golden, study_folder):
    record = AllocationRecord.read(golden / "study/allocations/pick.json")
    inputs = study_folder.profiler.inputs.digest
    profile = Profile.read(golden / "profile.json", inputs)
    assert (profile.checkpoint, profile.importance) == (record.checkpoint, record.importance)
    assert len(front_table(golden / "study")) == 8
    (run,) = results(golden / "study")
    pick, _ = Bench(study_folder.path, "gguf", cache=study_folder.cache).check(run)
    assert pick.nbytes(study_folder.layout).encoded <= run.weights
