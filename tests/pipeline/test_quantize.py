"""One command from a model to a verified checkpoint, held against the verbs that it is made of."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from allocator import api
from allocator.app.resources import Resources
from allocator.app.study_file import StudySpec
from allocator.checkpoint.reading import read_inventory
from allocator.cli import main
from allocator.errors import AllocatorError, BudgetError, OutputError, StudyError
from allocator.pipeline import estimate
from allocator.pipeline import quantize as pipeline
from allocator.pipeline.quantize import RESULT, QuantizeRequest, plan_of, run

BITS, TRIALS = 5.0, 3


@pytest.fixture(scope="module")
def done(checkpoints, fresh_study, study_cache, tmp_path_factory):
    """A request, its stages in order, and what came out; read only."""
    out = tmp_path_factory.mktemp("quantize") / "study"
    values = {
        "bits": BITS, "tokenizer": "none", "trials": TRIALS,
        "calibration": fresh_study / "documents.jsonl", "report": fresh_study / "report.jsonl",
    }  # fmt: skip
    resources = Resources(cache=study_cache, threads=1)
    request = QuantizeRequest(checkpoints["qwen3"], values, out=out, resources=resources)
    stages = []
    result = run(request, on_stage=stages.append)
    return request, stages, result


def test_all_stages_leave_a_verified_file(done):
    request, stages, result = done
    assert stages == ["profile", "search", "finish", "materialize", "verify"]
    file = request.out / result.checkpoint / result.file
    weights = read_inventory(request.model).n_searched_weights
    manifest = json.loads((file.parent / "manifest.json").read_bytes())
    assert file.stat().st_size == result.file_bytes == manifest["file_bytes"]
    assert manifest["sha256"][result.file] == result.sha256
    assert 0 < result.bits <= BITS
    assert result.bits * weights / 8 <= int(BITS * weights / 8)
    assert result.finished["selection"] <= result.loss["selection"]
    assert api.verify(request.out, file.parent, cache=request.resources.cache, threads=1)


def test_the_verbs_alone_come_to_the_same_bytes(done, tmp_path):
    request, _, result = done
    study = tmp_path / "study"
    api.init(request.model, study, **request.values)
    options = {"cache": request.resources.cache, "threads": 1}
    pick = api.search(study, **options).pick
    api.finish(study, pick, **options)
    written = api.materialize(study, pick, tmp_path / "pick", **options)
    assert written.manifest.sha256[result.file] == result.sha256


def test_the_same_call_runs_no_stage_again(done):
    request, _, result = done
    stages = []
    assert run(request, on_stage=stages.append) == result
    assert not stages


def test_what_was_lost_is_made_again(done, tmp_path):
    request, _, result = done
    study = Path(shutil.copytree(request.out, tmp_path / "study"))
    (study / result.checkpoint / result.file).unlink()
    (study / RESULT).write_bytes(b"{")  # damaged
    stages = []
    again = run(replace(request, out=study), on_stage=stages.append)
    assert again == result
    assert stages[0] == "profile"
    assert (study / result.checkpoint / result.file).is_file()
    assert run(replace(request, out=study), on_stage=stages.append) == result
    assert stages.count("profile") == 1


def with_values(request, **changes):
    return replace(request, values={**request.values, **changes})


@pytest.mark.parametrize(
    ("changes", "values", "says"),
    [
        ({}, {"bits": None}, "needed a limit"),
        ({}, {"budget": "1MiB"}, "--bits: needed alone"),
        ({}, {"bits": 0.0}, "above 0 and up to 32"),
        ({}, {"bits": 4.0}, "study.toml: budget is weights = "),
        ({}, {"seed": 3}, "study.toml: seed is 0, asked for 3"),
        ({}, {"target": "tflite"}, "tflite"),
        ({"model": "no/such/model/here"}, {}, "no such model"),
        ({"seconds": -1.0}, {}, "needed a number of seconds"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(done, changes, values, says):
    request, _, _ = done
    before = {p: p.stat().st_mtime_ns for p in request.out.rglob("*")}
    with pytest.raises(AllocatorError, match=r"^[^\n]*$") as refused:
        run(replace(with_values(request, **values), **changes))
    assert says in str(refused.value)
    assert {p: p.stat().st_mtime_ns for p in request.out.rglob("*")} == before


def test_another_request_of_the_same_study_is_answered_anew(done, tmp_path):
    """Unfinished weights, then a changed study.toml: neither gets the earlier file."""
    request, _, result = done
    study = Path(shutil.copytree(request.out, tmp_path / "study"))
    stages = []
    plain = run(replace(request, out=study, finish=False), on_stage=stages.append)
    assert stages == ["profile", "search", "materialize", "verify"]
    assert plain.finished is None
    assert plain.sha256 != result.sha256
    text = (study / "study.toml").read_text()
    assert "window = 256" in text  # which nobody asked for, so it may be changed
    text = text.replace("window = 256", "window = 512")
    (study / "study.toml").write_text(text.replace(f"trials = {TRIALS}", f"trials = {TRIALS + 1}"))
    more = replace(with_values(request, trials=TRIALS + 1), out=study)
    run(more, on_stage=stages.append)
    assert stages.count("search") == 2
    trials = api.front(study, cache=request.resources.cache, threads=1)
    assert len(trials)


def test_a_limit_is_compared_as_bytes(done):
    request, _, result = done
    values = {n: v for n, v in request.values.items() if n != "bits"}
    nbytes = StudySpec.read(request.out).budget.weights
    assert run(replace(request, values={**values, "weights_budget": f"{nbytes}B"})) == result


def test_a_refusal_names_the_option_and_leaves_nothing(done, tmp_path):
    wrong = replace(with_values(done[0], target="tflite"), out=tmp_path / "asked")
    with pytest.raises(AllocatorError, match=r'^--target "tflite": needed one of'):
        run(wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_faulty_text_is_named_as_it_was_given(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/bad.jsonl").write_text("no JSON\n")
    wrong = replace(with_values(done[0], calibration="texts/bad.jsonl"), out=tmp_path / "study")
    with pytest.raises(AllocatorError, match=r"^texts/bad\.jsonl:1: no JSON"):
        run(wrong)


def test_a_budget_below_the_floor_leaves_no_folder(done, tmp_path):
    small = replace(with_values(done[0], bits=0.5), out=tmp_path / "study")
    with pytest.raises(AllocatorError, match="under the floor"):
        run(small)
    assert not small.out.exists()


def test_time_for_less_than_the_profile_is_refused_at_once(done, tmp_path, monkeypatch):
    short = replace(done[0], seconds=4.0, out=tmp_path / "study")
    road = replace(plan_of(done[0]).road, seconds={"profile": 5.0, "search": 1.0})
    monkeypatch.setattr(pipeline, "estimate_road", lambda *_: road)
    with pytest.raises(StudyError, match="4 s, and the profile alone takes about 5 s"):
        run(short)
    assert not short.out.exists()


def test_a_time_that_is_over_leaves_one_trial_and_all_stages_follow(done, tmp_path):
    request = replace(done[0], seconds=1.0, finish=False, out=tmp_path / "study")
    stages = []
    result = run(request, on_stage=stages.append)
    assert stages == ["profile", "search", "materialize", "verify"]
    assert result.finished is None


def test_the_plan_writes_nothing_and_names_what_it_takes(done, tmp_path):
    plan = plan_of(replace(done[0], out=tmp_path / "study", finish=False))
    assert not plan.study.exists()
    assert list(plan.road.seconds) == ["profile", "search", "materialize", "verify"]
    assert plan.road.total_seconds > 0
    weights = sum(t.total_bytes for t in plan.inventory.tensors.values()) // 2  # bfloat16
    assert plan.road.memory_bytes == 8 * weights
    for load, said in ((0.5, False), (4.0, True)):
        notes = replace(plan.road, load=load).notes
        assert any(f"busy ({load} processes per core)" in note for note in notes) == said


def test_the_command_says_what_it_will_do_and_what_came_out(done, capsys, monkeypatch):
    request, _, result = done
    arguments = [
        "quantize", str(request.model), "--bits", "5", "--tokenizer", "none", "--trials", "3",
        "--calibration", str(request.values["calibration"]),
        "--report", str(request.values["report"]),
        "--out", str(request.out), "--cache", str(request.resources.cache), "--threads", "1",
        "--quiet",
    ]  # fmt: skip
    assert main([*arguments, "--dry-run"]) == 0
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert not re.search(r"\d\n +(s|min|h)\b", out)  # no number without its unit
    for path in (request.model, request.out):  # which are as long as they are
        out = out.replace(str(path), "PATH")
    assert max(map(len, out.splitlines())) <= 80
    for said in ("takes    up to", "memory", "disk", "the same command resumes", result.file):
        assert said in out
    assert main([*arguments, "--seed", "3"]) == 2
    assert "seed is 0, asked for 3" in capsys.readouterr().err


def test_a_budget_that_holds_the_model_is_refused_before_anything_is_timed(
    done, tmp_path, monkeypatch
):
    request = replace(with_values(done[0], bits=16.0), out=tmp_path / "study")
    api.init(request.model, tmp_path / "made", **request.values)
    monkeypatch.setattr(estimate, "estimate_in", None)
    for study in (request.out, tmp_path / "made"):
        with pytest.raises(
            BudgetError, match=r"nothing needs to be compressed.*convert_hf_to_gguf"
        ):
            run(replace(request, out=study))
    assert not request.out.exists()
    (tmp_path / "space.toml").write_text('schema = 1\nformats = ["Q8_0", "Q4_0"]\n')
    restricted = with_values(request, bits=8.5, space=tmp_path / "space.toml")
    made = api.init(request.model, request.out, **restricted.values)
    assert made.notes == ("the budget holds every tensor in its largest format that is offered",)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("theirs", r"no study.toml, and other files \(notes.txt\)"),
        ("theirs/notes.txt", "notes.txt is no folder"),
        ("theirs/notes.txt/below", "notes.txt is no folder"),
        ("model", "a model; name another folder"),
        ("/proc/x/deep", r"nothing can be made in /proc \("),
    ],
)
def test_a_place_where_no_study_can_be_made_is_refused_first(
    done, tmp_path, monkeypatch, place, says
):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes.txt").write_text("kept")
    (tmp_path / "model").symlink_to(done[0].model)
    monkeypatch.setattr(pipeline, "model_path", None)  # which may fetch
    with pytest.raises((OutputError, StudyError), match=f"{tmp_path / place}: .*{says}"):
        run(replace(done[0], out=tmp_path / place))
    assert (tmp_path / "theirs/notes.txt").read_text() == "kept"
