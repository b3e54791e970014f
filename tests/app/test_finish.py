"""Finishing whole: a record with less loss at the same bytes; stopped anywhere, the same bytes."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open

from allocator import api
from allocator.app import finish_stage
from allocator.app.resources import Resources
from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord, finished_name, note_digests
from allocator.errors import SpaceError, StudyError, VerifyError
from allocator.export.manifest import file_digest
from allocator.finishing import finish as stage
from allocator.finishing.artifact import read_artifact
from allocator.finishing.codes import Chosen, choose
from allocator.finishing.recipe import CODES, PARTS
from allocator.finishing.tuning import TuningSettings
from allocator.targets.layout import part_names

TOKENS = 256


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    """Tuning takes several steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "TuningSettings", partial(TuningSettings, batch_tokens=64))
        yield


@pytest.fixture(scope="module")
def base(small_steps, finished_study, tmp_path_factory):
    """A study, its cache, the result of finishing Q4_0 there, and estimates; read only."""
    folder = tmp_path_factory.mktemp("finish")
    study = Path(shutil.copytree(finished_study, folder / "study"))
    estimates = []
    result = api.finish(
        study, "Q4_0", tokens=TOKENS, cache=folder / "cache", threads=1,
        on_estimate=estimates.append,
    )  # fmt: skip
    return study, folder / "cache", result, estimates


@pytest.fixture
def fresh(base, finished_study, study_cache, tmp_path):
    """A study with a record `low` that nothing finished, and options without finished weights."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for folder in study_cache.iterdir():
        if folder.name != "finish":
            (cache / folder.name).symlink_to(folder)
    study = Path(shutil.copytree(finished_study, tmp_path / "study"))
    plain = AllocationRecord.read(base[2].record).unfinished
    (study / "allocations/low.json").write_bytes(plain.to_bytes())
    return study, {"cache": cache, "threads": 1}


def test_a_given_rate_takes_larger_steps(base, tmp_path):
    """Few steps of a random model gain more at a rate far above that of the rule."""
    study, cache, result, _ = base
    copied = Path(shutil.copytree(study, tmp_path / "study"))
    recipe = msgspec.structs.replace(finish_stage.recipe_of(tokens=TOKENS), rate=0.007)
    done = finish_stage.finish(
        finish_stage.FinishRequest(
            copied, Path("Q4_0"), recipe=recipe, out="quick", resources=Resources(cache, 1)
        )
    )
    assert done.before == result.before
    assert done.recipe.rate == 0.007
    assert done.after["selection"] < 0.9 * done.before["selection"]


def test_less_loss_at_the_same_bytes(base, tmp_path):
    study, cache, result, estimates = base
    options = {"cache": cache, "threads": 1}
    record = AllocationRecord.read(study / "allocations/Q4_0.json")
    assert result.record == study / "allocations/Q4_0.json"
    assert result.artifact == study / "allocations" / finished_name(record.weights_digest)
    assert result.artifact.is_file()
    plain = tmp_path / "plain.json"
    plain.write_bytes(record.unfinished.to_bytes())
    assert api.score(study, plain, **options)["loss"] == record.finished.before["search"]
    assert record.finished.after["selection"] < 0.95 * record.loss["selection"]
    finished = api.materialize(study, result.record, tmp_path / "finished", **options)
    plain = api.materialize(study, result.record, tmp_path / "plain", unfinished=True, **options)
    assert finished.manifest.file_bytes == plain.manifest.file_bytes
    loss = api.verify(study, finished.folder, tolerance=10.0, **options).loss
    assert loss == pytest.approx(record.finished.after["search"], abs=1e-6)
    both = api.materialize(
        study, result.record, tmp_path / "both", container="safetensors", **options
    )
    assert api.verify(study, both.folder, **options).loss == pytest.approx(loss, abs=1e-6)
    assert estimates[0].moments_tokens == estimates[0].tuning_tokens == TOKENS
    assert estimates[0].total_seconds > 0
    assert not estimates[0].ready


def test_norms_routers_scales_and_codes_have_changed(base):
    """In the formats that can be finished, and in their sizes."""
    study, cache, result, _ = base
    folder = StudyFolder(study, cache=cache, threads=1)
    record = AllocationRecord.read(result.record)
    artifact = read_artifact(result.artifact, record.weights_digest)
    encodings, allocation = folder.encodings.of(record.importance), record.decision
    changed = set()
    for name in folder.layout.groups:
        stored = allocation.parts(folder.layout, name)
        for part, (fmt, experts) in zip(part_names(name, stored), stored, strict=True):
            plain = encodings.encoded(name, fmt.name, experts or None)
            codes = artifact.codes(
                part, partial(encodings.encoded, name, fmt.name, experts or None)
            )
            if codes is not None:
                assert codes.shape == plain.shape
                assert (codes != plain).any()
                changed.add(name)
    formats = {allocation.format_of[name] for name in changed}
    unchanged = {allocation.format_of[n] for n in folder.layout.groups if n not in changed}
    assert len(changed) > len(folder.layout.groups) / 2
    assert unchanged - formats <= {"BF16", "F16", "F32"}
    values = [t for t in folder.layout.full_precision if artifact.values(t.source) is not None]
    assert {str(t.role) for t in values} == {"norm", "router"}


def test_again_there_is_nothing_to_compute(base, monkeypatch):
    study, cache, result, _ = base

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(stage.Finisher, "_finish", fail)
    options = {"tokens": TOKENS, "cache": cache, "threads": 1}
    assert api.estimate_finish(study, result.record, **options).ready
    assert api.finish(study, result.record, **options) == result


def test_without_the_file_it_is_finished_anew_to_the_same_bytes(base, fresh, tmp_path):
    result = base[2]
    study, options = fresh
    path = Path(shutil.copy(result.record, study / "allocations"))
    made = api.materialize(base[0], result.record, tmp_path / "made", cache=base[1], threads=1)
    note_digests(path, AllocationRecord.read(path), {"gguf": made.manifest.sha256_of_weights})
    rebuilt = api.reproduce(path, tmp_path / "anew", **options)
    shutil.copy(result.artifact, study / "allocations")
    again = api.reproduce(path, tmp_path / "again", **options)
    assert [w.manifest for w in (*rebuilt, *again)] == [made.manifest] * 2


def test_other_bytes_of_the_same_recipe_are_said_with_both_losses(base, fresh, tmp_path):
    study, options = fresh
    record = AllocationRecord.read(base[2].record)
    other = msgspec.structs.replace(record.finished, after={"search": 0.123456})
    path = study / "allocations/low.json"
    noted = msgspec.structs.replace(
        record.finished_with("f" * 64, other), sha256={"gguf": "0" * 64}
    )
    path.write_bytes(noted.to_bytes())
    options["cache"] = base[1]  # which has the weights
    with pytest.raises(VerifyError, match="same recipe, other bytes") as caught:
        api.reproduce(path, tmp_path / "out", **options)
    said = str(caught.value)
    assert "\n" not in said
    assert f"{record.finished.after['search']:.6f} here and 0.123456 recorded" in said


KILLED = """
import os, signal, sys
from functools import partial
from pathlib import Path
from allocator import api
from allocator.finishing import finish, tuning

where, after, study, cache = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
module = finish if where == "codes" else tuning
calls, original = [], module.save_arrays

def dying(*args):
    calls.append(args)
    if len(calls) > after:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

module.save_arrays = dying
finish.TuningSettings = partial(tuning.TuningSettings, batch_tokens=64)
api.finish(study, study / "allocations/low.json", tokens=int(sys.argv[5]), cache=cache, threads=1)
"""


@pytest.mark.parametrize(("where", "after"), [("codes", 3), ("tuning", 1)])
def test_a_killed_run_resumes_to_equal_bytes(base, fresh, monkeypatch, where, after):
    study, options = fresh
    words = [where, after, study, options["cache"], TOKENS]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], check=False)
    assert done.returncode == -signal.SIGKILL
    path = study / "allocations/low.json"
    assert AllocationRecord.read(path).finished is None
    chosen = []

    def counted(*args, **keywords):
        chosen.append(args)
        return choose(*args, **keywords)

    monkeypatch.setattr(stage, "choose", counted)
    score, scored = stage.Finisher._loss, []

    def noted(self, split, candidate):
        scored.append(candidate)
        return score(self, split, candidate)

    monkeypatch.setattr(stage.Finisher, "_loss", noted)
    result = api.finish(study, path, tokens=TOKENS, **options)
    assert not any(isinstance(candidate, Allocation) for candidate in scored)  # the losses before
    n_parts = len(list((options["cache"] / "finish").glob("*/codes-*")))
    assert len(chosen) == (n_parts - after if where == "codes" else 0)
    assert result.weights == base[2].weights


def test_memory_for_one_expert_and_one_part_gives_the_same(base, fresh, monkeypatch):
    study, options = fresh
    experts = []

    def counted(weights, *args, **keywords):
        experts.append(len(weights))
        return choose(weights, *args, **keywords)

    monkeypatch.setattr(stage, "choose", counted)
    monkeypatch.setattr(stage, "_WEIGHTS", 1)
    monkeypatch.setattr(stage, "_RECENT", 1)
    result = api.finish(study, study / "allocations/low.json", tokens=TOKENS, **options)
    assert set(experts) == {1}
    assert result.weights == base[2].weights


def test_two_processes_at_once_give_one_result(base, fresh):
    study, options = fresh
    words = ["codes", 10**6, study, options["cache"], TOKENS]
    both = [subprocess.Popen([sys.executable, "-c", KILLED, *map(str, words)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    record = AllocationRecord.read(study / "allocations/low.json")
    assert record.weights_digest == base[2].weights


def test_a_time_limit_ends_tuning_which_is_recorded_and_reproduced(base, fresh, tmp_path):
    study, options = fresh
    path = study / "allocations/low.json"
    result = api.finish(study, path, tokens=TOKENS, seconds=0, **options)
    assert result.recipe.stopped_steps == 1
    record = AllocationRecord.read(path)
    assert record.finished.recipe["stopped_steps"] == 1
    assert record.weights_digest != base[2].weights
    api.materialize(study, path, tmp_path / "made", record=True, **options)
    result.artifact.unlink()
    shutil.rmtree(options["cache"] / "finish")
    api.reproduce(path, tmp_path / "out", **options)
    assert (options["cache"] / "finish" / result.artifact.name).is_file()
    more = api.finish(study, path, tokens=TOKENS, **options)  # goes on where time was up
    assert more.weights == base[2].weights


def test_without_tuning_norms_and_routers_stay(base, fresh):
    study, options = fresh
    path = study / "allocations/low.json"
    result = api.finish(study, path, tokens=TOKENS, tuning=False, **options)
    assert result.recipe.parts == (CODES,)
    assert base[2].recipe.parts == PARTS
    with safe_open(result.artifact, framework="np") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"codes"}  # noqa: SIM118
    assert result.after["selection"] < result.before["selection"]


def test_what_loses_more_on_the_selection_split_is_not_taken(fresh, monkeypatch, tmp_path):
    study, options = fresh
    path = study / "allocations/low.json"

    def worse(weights, data, *_, **__):
        return Chosen(torch.zeros_like(data), torch.zeros(len(data)), torch.zeros(len(data)))

    monkeypatch.setattr(stage, "choose", worse)
    result = api.finish(study, path, tokens=TOKENS, tuning=False, **options)
    assert result.after == result.before
    folders = [
        api.materialize(study, path, tmp_path / name, unfinished=name == "plain", **options).folder
        for name in ("finished", "plain")
    ]
    one, other = (file_digest(folder / "model.gguf") for folder in folders)
    assert one == other


def test_a_format_a_recipe_and_a_plain_allocation_get_records(fresh, tmp_path):
    study, options = fresh
    options |= {"tokens": TOKENS, "tuning": False}
    named = api.finish(study, "Q4_0", **options)
    assert named.record == study / "allocations/Q4_0.json"
    record = AllocationRecord.read(named.record)
    assert (record.name, record.kind) == ("Q4_0", "Q4_0")
    assert set(record.decision.format_of.values()) == {"Q4_0"}
    assert record.loss == record.finished.before
    layout = StudyFolder(study, cache=options["cache"]).layout
    assert record.bytes["file"] == record.decision.nbytes(layout).file

    recipe = tmp_path / "mine.txt"
    recipe.write_text("ffn_down_exps=q5_0\n")
    mixed = api.finish(study, recipe, base="Q4_0", **options)
    assert mixed.record == study / "allocations/mine.json"
    formats = AllocationRecord.read(mixed.record).decision.format_of
    assert {formats[n] for n in formats if n.endswith("experts.down")} == {"Q5_0"}
    assert {formats[n] for n in formats if not n.endswith("experts.down")} == {"Q4_0"}

    plain = tmp_path / "allocation.json"
    plain.write_text(json.dumps(record.decision.to_json()))
    again = api.finish(study, plain, out="again", **options)
    assert again.weights == named.weights
    assert AllocationRecord.read(study / "allocations/again.json").digest == record.digest

    other = api.finish(study, "Q4_0/Q5_0", **options)
    assert other.record.name == "Q4_0-Q5_0.json"
    table = api.evaluate(study, documents=2, cache=options["cache"], threads=1)
    assert {"* Q4_0", "* Q4_0, unfinished"} <= set(table["name"])
    with pytest.raises(SpaceError, match="holds another allocation"):
        api.finish(study, "Q5_0", out="Q4_0", **options)


def test_what_cannot_be_is_one_line(fresh):
    study, options = fresh
    pick = study / "allocations/low.json"
    for given, changes, said in (
        ("Q9_9", {}, "no such allocation file"),
        (pick, {"base": "Q4_0"}, "tensor-type files"),
        (pick, {"out": "../x"}, "file name"),
        (pick, {"tokens": 0}, "moments_tokens"),
    ):
        with pytest.raises((SpaceError, StudyError), match=said) as caught:
            api.finish(study, given, **changes, **options)
        assert "\n" not in str(caught.value)
    assert not (options["cache"] / "finish").exists()


def test_a_record_that_changed_meanwhile_is_left(fresh, monkeypatch):
    study, options = fresh
    path = study / "allocations/low.json"
    other = AllocationRecord.read(study / "allocations/knapsack.json")
    changed = msgspec.structs.replace(other, digest="0" * 64).to_bytes()
    original = stage.Finisher.finish

    def finish(self):
        artifact = original(self)
        path.write_bytes(changed)
        return artifact

    monkeypatch.setattr(stage.Finisher, "finish", finish)
    with pytest.raises(StudyError, match="changed while it was finished"):
        api.finish(study, path, tokens=TOKENS, tuning=False, **options)
    assert path.read_bytes() == changed
