"""`make quickstart` answers a committed question anew, and leaves the committed answer alone.

A study of two layers stands in for the reference study. Its committed answer is searched with this
processor's rounding, the quickstart runs with another: without vector instructions, and with the
code path of MKL that all processors share.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from allocator import api
from allocator.decision.allocation_record import AllocationRecord, finished_name

ROOT = Path(__file__).parents[1]
LIBRARIES = ("optuna", "pandas", "torch", "transformers.models.qwen3_moe.modeling_qwen3_moe")
OTHER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def make(target, folder, call, **variables):
    """Runs a target of the Makefile on the study in `folder`, its commands by `call`."""
    command = folder / "bin" / "allocator"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec {call} "$@"\n')
    command.chmod(0o755)
    chosen = {
        "BIN": command.parent,
        "STUDY": folder / "studies" / "committed",
        "RUN": folder / "studies" / "run",
        "QUESTION": "study.toml space.toml documents.jsonl report.jsonl",
    }
    words = [f"{name}={value}" for name, value in chosen.items()]
    environment = {**os.environ, **variables, "ALLOCATOR_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = str(ROOT)
    # -o: the environment is there already, and must not be made again
    return subprocess.run(
        ["make", "-C", ROOT, "-o", "install", target, *words],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def project(checkpoints, write_study, tmp_path_factory, forks):
    """A folder with a committed question and answer, before and after a quickstart."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("project")
    model = shutil.copytree(checkpoints["qwen3"], folder / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] *= 0.1  # so that llama.cpp's rounding is within verify's tolerance
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    study = write_study(folder / "studies" / "committed", model)
    torch.set_num_threads(1)
    options = {"cache": folder / "committed-cache", "threads": 1}
    api.search(study, **options)
    for container in ("gguf", "safetensors"):
        api.materialize(
            study, study / "allocations/pick.json", folder / container,
            container=container, record=True, **options,
        )  # fmt: skip
    for name in ("journal", "search.lock", "search.start"):
        (study / name).unlink()
    before = contents(study)
    address = forks.start(*LIBRARIES, PYTHONPATH=str(ROOT), **OTHER_PROCESSOR)
    call = f"{sys.executable} -S {forks.file} --at {address}"
    done = make("quickstart", folder, call, **OTHER_PROCESSOR)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, before, done


def test_no_committed_file_is_touched(project):
    folder, before, _ = project
    assert contents(folder / "studies" / "committed") == before


def test_the_committed_answer_is_rebuilt_on_another_processor(project):
    folder, _, _ = project
    record = AllocationRecord.read(folder / "studies/committed/allocations/pick.json")
    for container in ("gguf", "safetensors"):
        written = folder / "studies/run/out/committed" / f"pick-{container}"
        manifest = json.loads((written / "manifest.json").read_text())
        assert manifest["sha256"][manifest["file"]] == record.sha256[container]


def test_the_other_processor_rounds_otherwise_and_its_answer_is_whole(project):
    folder, _, _ = project
    answers = [folder / "studies" / name / "allocations" for name in ("committed", "run")]
    records = [AllocationRecord.read(answer / "pick.json") for answer in answers]
    for answer, record in zip(answers, records, strict=True):
        assert record.importance[:12] in {p.stem.split("-")[1] for p in answer.glob("importance*")}
        assert set(record.sha256) == {"gguf", "safetensors"}
    committed, run = (load_file(next(answer.glob("importance*"))) for answer in answers)
    assert set(committed) == set(run)
    assert any((committed[name] != run[name]).any() for name in run)
    assert max(abs(committed[name] / run[name] - 1).max() for name in run) < 1e-4


def test_the_pick_is_finished_and_its_files_hold_the_finished_weights(project):
    folder, _, done = project
    run = folder / "studies" / "run"
    record = AllocationRecord.read(run / "allocations/pick.json")
    assert record.finished.after["selection"] <= record.finished.before["selection"]
    assert (run / "allocations" / finished_name(record.weights_digest)).is_file()
    for container in ("gguf", "safetensors"):
        manifest = json.loads((run / "out" / f"pick-{container}" / "manifest.json").read_text())
        assert manifest["weights"] == record.weights_digest
        assert manifest["sha256"][manifest["file"]] == record.sha256[container]
    rows = re.findall(r"^ *(\* pick(?:, unfinished)?) +[0-9]", done.stdout, re.MULTILINE)
    assert set(rows) == {"* pick", "* pick, unfinished"}  # in every part of the table
    assert "<!doctype html>" in (run / "report.html").read_text().lower()


def test_one_line_compares_the_two_answers(project):
    _, _, done = project
    assert [line for line in done.stdout.splitlines() if "decisions differ" in line]


def test_the_run_folder_is_ignored_and_asks_the_committed_question():
    makefile = (ROOT / "Makefile").read_text()
    assert "RUN = studies/quickstart\n" in makefile
    assert "studies/quickstart/\n" in (ROOT / ".gitignore").read_text()
    asked = makefile.partition("QUESTION = ")[2].splitlines()[0].split()
    assert all((ROOT / "studies/reference" / name).exists() for name in asked)
