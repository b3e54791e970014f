"""Files of earlier forms are opened by the code of today; see golden/README.md."""

import json
import shutil
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from allocator.compare.bench import Bench
from allocator.compare.runs import results
from allocator.materialize.checkpoint import Manifest
from allocator.profile import Profile
from allocator.records import AllocationRecord
from allocator.storage import open_storage
from allocator.tables import front_table
from allocator.trials import RESULT, allocation_of
from allocator.workspace import Workspace

GOLDEN = Path(__file__).parent / "golden"
SETS = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and p.name.isdecimal())
sys.path.insert(0, str(GOLDEN))
import make  # noqa: E402


@pytest.fixture(params=SETS)
def golden(request):
    """The folder of a set; read only."""
    return GOLDEN / request.param


@pytest.fixture
def workspace(golden, tmp_path):
    """Its study, on the checkpoint that it was searched on."""
    make.write_checkpoint(tmp_path / "checkpoint")
    folder = make.write_study(tmp_path / "study")
    shutil.copytree(golden / "study", folder, dirs_exist_ok=True)
    return Workspace(folder, cache=tmp_path / "cache", threads=1)


def test_a_journal_resumes_with_its_trials(golden, workspace):
    """Against front.json, by its text; under the lock of today's inputs."""
    front = json.loads((golden / "study/front.json").read_text())
    study = workspace.study(workspace.budget())
    shown = {t["trial"]: t for t in front["trials"]}
    trials = [t for t in study.get_trials() if RESULT in t.user_attrs]
    assert [t.number for t in trials] == sorted(shown)
    for trial in trials:
        row = shown[trial.number]
        assert trial.state.name == row["state"]
        assert trial.user_attrs[RESULT]["loss"] == row["loss"]
        size = allocation_of(trial).nbytes(workspace.layout)
        assert (size.encoded, size.file) == (row["bytes"], row["file_bytes"])
    study.set_user_attr("resumed", True)  # appended to, then opened anew
    again = optuna.load_study(study_name="study", storage=open_storage(None, workspace.folder))
    assert again.user_attrs["resumed"]
    assert len(again.trials) == len(study.trials)


def test_stock_optuna_reads_a_journal(golden, tmp_path):
    path = shutil.copy(golden / "study/journal", tmp_path)
    stock = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.load_study(study_name="study", storage=stock)
    ours = optuna.load_study(study_name="study", storage=open_storage(None, tmp_path))
    assert len(study.trials) == 8
    assert study.trials == ours.trials


def test_records_decide_what_they_decided(golden, workspace):
    manifest = Manifest.read(golden / "manifest")
    for name in ("pick", "knapsack"):
        record = AllocationRecord.read(golden / f"study/allocations/{name}.json")
        assert record.checkpoint == workspace.inventory.digest
        assert record.decision.nbytes(workspace.layout).encoded == record.bytes["encoded"]
        bank = workspace.bank_for(record.importance)
        assert bank.layout.inventory.digest == manifest.checkpoint
    pick = AllocationRecord.read(golden / "study/allocations/pick.json")
    assert (manifest.allocation, manifest.importance) == (pick.digest, pick.importance)
    assert manifest.sha256[manifest.file] == pick.sha256["gguf"]
    plain = json.loads((golden / "manifest/allocation.json").read_text())
    assert plain == pick.allocation


def test_a_profile_a_front_and_runs_read(golden, workspace):
    record = AllocationRecord.read(golden / "study/allocations/pick.json")
    inputs = workspace.profiler.inputs.digest
    profile = Profile.read(golden / "profile.json", inputs)
    assert (profile.checkpoint, profile.importance) == (record.checkpoint, record.importance)
    assert len(front_table(golden / "study")) == 8
    (run,) = results(golden / "study")
    pick, _ = Bench(workspace.folder, "gguf", cache=workspace.cache).check(run)
    assert pick.nbytes(workspace.layout).encoded <= run.weights
