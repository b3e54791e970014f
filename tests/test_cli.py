"""The command line on a tiny study: every verb, bad input in one line, and kill -9."""

import csv
import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import optuna
import pytest
import torch

from allocator.app.calibration import Calibration
from allocator.app.study_folder import StudyFolder
from allocator.cli import main
from allocator.errors import StudyError
from allocator.export.manifest import file_digest
from allocator.files.checksums import unseal
from allocator.scoring.scorer import Scorer
from allocator.study.folder_lock import search_lock
from allocator.study.search import Search

torch.set_num_threads(1)


@pytest.fixture
def study(finished_study, tmp_path):
    return shutil.copytree(finished_study, tmp_path / "study")


@pytest.fixture
def fresh(fresh_study, tmp_path):
    return shutil.copytree(fresh_study, tmp_path / "study")


@pytest.fixture
def run(study_cache, capsys):
    """`run(verb, ...)`: exit code, stdout, stderr; one thread, no bars."""

    def call(verb, *arguments, quiet=True):
        options = ["--cache", study_cache, "--threads", 1, *(["--quiet"] if quiet else [])]
        capsys.readouterr()
        try:
            code = main([str(a) for a in (verb, *arguments, *options)])
        except SystemExit as ended:  # by argparse
            code = ended.code
        return code, *capsys.readouterr()

    return call


def good(done):
    code, out, err = done
    assert code == 0, err
    return out


def state(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def trials(study):
    """What the trials scored and found, without what a clock says."""
    rows = json.loads((study / "front.json").read_text())["trials"]
    return [{k: v for k, v in row.items() if k != "trial"} for row in rows]


# -- every verb


def test_inspect(run, checkpoints):
    out = good(run("inspect", checkpoints["qwen3"], "--target", "gguf"))
    assert "layers.1.experts.down" in out
    assert re.search(r"\d+ groups, [\d,]+ weights", out)


def check_profile_line(out, study, cache):
    """What is printed, against the stages' files and the study's documents."""
    folder = StudyFolder(study, cache=cache, threads=1).profiler.folder
    curvature = json.loads((folder / "curvature.json").read_text())["curvature"]
    changes = (folder / "losses.jsonl").read_text().splitlines()
    profile = json.loads((folder / "profile.json").read_text())
    numbers = [int(n.replace(",", "")) for n in re.findall(r"(?<!\w)[\d,]*\d(?!\w)", out)]
    # of 12 documents of 32 tokens, 8 are for search and 3 behind measured changes
    assert numbers[:5] == [len(curvature), len(changes), 3 * 32, 8 * 32, 8 * 32]
    assert numbers[-2:] == [len(profile["unreached"]), sum(profile["forward_tokens"].values())]


def test_from_a_fresh_study_to_a_reproduced_file(run, fresh, study_cache, tmp_path):
    before = state(fresh)
    out = good(run("search", fresh, "--dry-run"))
    assert re.search(r"floor +[\d,]+ B", out)
    assert "12 records: 8 search + 4 selection documents of 32\n" in out
    assert state(fresh) == before
    check_profile_line(good(run("profile", fresh)), fresh, study_cache)
    assert state(fresh) == before
    out = good(run("search", fresh, "--trials", 8))
    assert "text: 12 records: 8 search + 4 selection documents of 32\n" in out
    assert sum(map(int, re.findall(r"(\d+) (?:COMPLETE|PRUNED|FAIL)", out))) == 8
    first = trials(fresh)
    assert len(first) == 8
    answer = state(fresh / "allocations")
    good(run("search", fresh, "--trials", 8))
    assert trials(fresh) == first
    assert state(fresh / "allocations") == answer
    pick = fresh / "allocations/pick.json"

    out = good(run("front", fresh))
    assert "NaN" not in out
    assert str(json.loads((fresh / "front.json").read_text())["front"][0]["trial"]) in out
    out = good(run("explain", pick))
    assert "experts.all" in out
    score = good(run("score", pick))
    record = json.loads(pick.read_text())
    loss = record["loss"]["search"]
    assert float(re.search(r"loss +(\S+)", score)[1]) == pytest.approx(loss, abs=1e-6)
    assert record["digest"] in score
    assert max(map(len, score.splitlines())) <= 80
    types = tmp_path / "types.txt"
    types.write_text("ffn_down_exps=q4_0\n")
    out = good(run("score", types, "--study", fresh, "--base", "Q8_0"))
    assert float(re.search(r"loss +(\S+)", out)[1]) > 0
    assert "8.500 bits" in good(run("score", "Q8_0", "--study", fresh))

    for container in ("gguf", "safetensors"):
        folder = tmp_path / container
        out = good(run("materialize", pick, folder, "--container", container, "--record"))
        file = next(p for p in folder.iterdir() if p.suffix == f".{container}")
        assert f"{file.stat().st_size:,} bytes" in " ".join(out.split())
        digest = file_digest(file)
        assert digest in out
        assert json.loads(pick.read_text())["sha256"][container] == digest
        out = good(run("verify", folder, "--study", fresh, "--documents", 3, "--encode"))
        assert "as predicted" in " ".join(out.split())
    for name in ("one", "two"):
        out = good(run("reproduce", pick, "--out", tmp_path / name))
        for digest in json.loads(pick.read_text())["sha256"].values():
            assert digest in out

    table = tmp_path / "table.csv"
    out = good(run("evaluate", fresh, "--documents", 2, "--csv", table))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {"original", "* pick", "* knapsack"} <= {r["name"] for r in rows}
    assert {r["split"] for r in rows} == {"report"}
    assert all(len(line) <= 80 for line in out.splitlines())
    assert all(r["name"].split()[0] in out for r in rows)


def test_progress_goes_to_stderr_alone(run, fresh):
    code, out, err = run("search", fresh, "--trials", 3, quiet=False)
    assert code == 0
    assert re.search(r"search: .*3/3", err)
    assert "search:" not in out
    assert "\r" not in out
    assert run("search", fresh, "--trials", 4)[2] == ""


def test_a_search_in_a_pipe_names_every_stage(fresh, tmp_path, capsys):
    cache = tmp_path / "cache"
    arguments = ["search", str(fresh), "--trials", "2", "--cache", str(cache), "--threads", "1"]
    assert main(arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    ends = dict(line.split(" > ")[-1].split(": ", 1) for line in lines if ": " in line)
    (folder,) = (cache / "profiles").iterdir()
    changes = (folder / "losses.jsonl").read_text().splitlines()
    stages = {"statistics.json": "calibration", "curvature.json": "encoding"}
    stages |= {"losses.jsonl": "measuring"}
    assert {stages[p.name] for p in folder.iterdir() if p.name in stages} <= set(ends)
    assert ends["measuring"].startswith(f"{len(changes)}/{len(changes)} changes, ")
    assert ends["calibration"].startswith("8/8 documents, ")
    assert ends["curvature"].startswith("8/8 documents, ")
    assert ends["search"].startswith("2/2 trials, least loss ")


def test_an_interrupted_search_closes_its_trial_and_resumes(run, fresh, monkeypatch):
    score = Search._score

    def interrupted(self, contenders, stop):
        if self.n_proposals() == 2:
            raise KeyboardInterrupt
        score(self, contenders, stop)

    with monkeypatch.context() as patched:
        patched.setattr(Search, "_score", interrupted)
        code, _, err = run("search", fresh, "--trials", 3)
    assert (code, err) == (130, "allocator search: stopped; run the same command to resume\n")
    out = good(run("search", fresh, "--trials", 3))
    assert "died" not in out
    assert len(trials(fresh)) == 3


@pytest.mark.parametrize("sampler", ["auto", "knapsack"])
def test_a_search_ends_within_its_tokens(run, fresh, study_cache, sampler):
    base = StudyFolder(fresh, cache=study_cache, threads=1).base_tokens
    trial = 6 * 32
    look = 6 * trial
    tokens = base + 30 * trial
    good(run("search", fresh, "--tokens", tokens, "--sampler", sampler))
    spent = base + sum(t["tokens"] for t in trials(fresh))
    looks = re.findall(r'"auto:forward_tokens": ?(\d+)', (fresh / "journal").read_text())
    assert bool(looks) == (sampler == "auto")
    spent += sum(map(int, looks))
    assert len(trials(fresh)) > 3
    assert tokens - trial - look < spent <= tokens
    before = trials(fresh)
    good(run("search", fresh, "--tokens", tokens, "--sampler", sampler))
    assert trials(fresh) == before


def test_tokens_that_pay_for_no_trial_are_refused(run, fresh):
    before = sorted(fresh.iterdir())
    done = run("search", fresh, "--tokens", 100)
    refused(done, r"100 forward tokens; the profile.* one trial and the pick take [\d,]+: raise")
    assert sorted(fresh.iterdir()) == before
    least = int(re.search(r"take ([\d,]+)", done[2])[1].replace(",", ""))
    good(run("search", fresh, "--tokens", least))
    assert len(trials(fresh)) == 1
    assert "no new trial: 1 were made before" in run("search", fresh, "--tokens", least)[1]


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_controls_run(run, fresh, sampler):
    good(run("search", fresh, "--sampler", sampler, "--trials", 5, "--seed", 3))
    assert len(trials(fresh)) == 5


def test_storage_in_a_database(run, fresh, tmp_path):
    url = f"sqlite:///{tmp_path}/trials.db"
    good(run("search", fresh, "--trials", 4, "--storage", url))
    assert not (fresh / "journal").exists()
    rows = trials(fresh)
    good(run("search", fresh, "--trials", 4, "--storage", url))
    assert trials(fresh) == rows
    good(run("front", fresh, "--storage", url))


# -- bad input


def edit(path, old, new):
    text = path.read_text()
    assert re.search(old, text)
    path.write_text(re.sub(old, new, text, count=1))


def missing_checkpoint(study, other):
    edit(study / "study.toml", 'checkpoint = ".*"', 'checkpoint = "nowhere"')
    return "nowhere"


def unknown_key(study, other):
    edit(study / "study.toml", "trials = 8", "trials = 8\nsurprise = 1")
    return "surprise"


def no_toml(study, other):
    (study / "study.toml").write_text("schema = = 1")
    return "study.toml"


def no_study_file(study, other):
    (study / "study.toml").unlink()
    return "study.toml: no such file"


def unknown_format(study, other):
    (study / "space.toml").write_text('schema = 1\nformats = ["Q9_Z"]\n')
    return "Q9_Z"


def unknown_sampler(study, other):
    edit(study / "study.toml", "trials = 8", 'trials = 8\nsampler = "annealing"')
    return "annealing"


def missing_calibration(study, other):
    (study / "documents.jsonl").unlink()
    return "documents.jsonl"


def unreadable_calibration(study, other):
    with (study / "documents.jsonl").open("a") as file:
        file.write("{nothing\n")
    return "documents.jsonl:13"


def foreign_tokens(study, other):
    with (study / "documents.jsonl").open("a") as file:
        file.write('{"ids": [0, 5, 99999]}\n')
    return "documents.jsonl:13"


def too_few_documents(study, other):
    edit(study / "study.toml", "search_documents = 6", "search_documents = 600")
    return "600"


def under_the_floor(study, other):
    edit(study / "study.toml", "weights = .*", 'weights = "5KiB"')
    return r"5,120 bytes.*floor of \d+,\d+"


def no_budget(study, other):
    edit(study / "study.toml", "weights = .*", "")
    return "needed one budget"


def no_size(study, other):
    edit(study / "study.toml", "weights = .*", 'weights = "much"')
    return "much"


def another_checkpoint(study, other):
    edit(study / "study.toml", 'checkpoint = ".*"', f'checkpoint = "{other}"')
    return "launched with checkpoint"


def changed_rungs(study, other):
    edit(study / "study.toml", r"rungs = \[2", "rungs = [3")
    return "launched with rungs"


def nothing_to_select(study, other):
    lines = (study / "documents.jsonl").read_text().splitlines(keepends=True)
    (study / "documents.jsonl").write_text("".join(lines[:1]))
    return "search and selection need one each"


def an_index_twice(study, other):
    (study / "splits.json").write_text('{"search": [0, 0, 1, 2, 3, 4, 5], "selection": [7]}')
    edit(study / "study.toml", "search_documents", 'splits = "splits.json"\nsearch_documents')
    return "named twice"


def no_trials(study, other):
    edit(study / "study.toml", "trials = 8", "trials = 0")
    return "needed a whole number"


def no_search_documents(study, other):
    edit(study / "study.toml", "search_documents = 6", "search_documents = 0")
    return "needed a whole number"


def unknown_saliency(study, other):
    (study / "space.toml").write_text('schema = 1\n[experts]\nsaliency = "luck"\n')
    return "luck"


def damaged_journal(study, other):
    lines = (study / "journal").read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = b"{damaged\n"
    (study / "journal").write_bytes(b"".join(lines))
    return rf"journal: line {len(lines) // 2 + 1} is no record"


BAD = [
    missing_checkpoint, unknown_key, no_toml, no_study_file, unknown_format, unknown_sampler,
    missing_calibration, unreadable_calibration, foreign_tokens, too_few_documents,
    under_the_floor, no_budget, no_size, another_checkpoint, changed_rungs, damaged_journal,
    nothing_to_select, an_index_twice, no_trials, no_search_documents, unknown_saliency,
]  # fmt: skip


def refused(done, match):
    code, out, err = done
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("allocator ")
    assert re.search(match, err), err


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_bad_input_is_one_line_and_writes_nothing(run, study, make_checkpoint, tmp_path, spoil):
    other = tmp_path / "other"
    if spoil is another_checkpoint:
        make_checkpoint(other, "qwen3", seed=5, dtype="bfloat16")
    match = spoil(study, other)
    before = state(study)
    refused(run("search", study, "--trials", 9), match)
    after = state(study)
    # who searches is noted once a search has begun to open its storage
    assert {n for n in after if after[n] != before.get(n)} <= {"search.lock", "search.start"}
    assert set(before) <= set(after)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--budget", "1KiB"], r"1,024 bytes.*floor of \d"),
        (["--budget", "much"], "--budget: 'much': needed a size such as 12MiB"),
        (["--budget", "12"], "--budget: 12 bytes; needed a unit, e.g. 12GiB"),
        (["--seed", "-1"], "-1"),
        (["--seed", "9"], "launched with seed = 0, now it is 9"),
        (["--sampler", "annealing"], "annealing"),
        (["--weights-budget", "100KiB"], "launched with budget"),
        (["--budget", "1MiB", "--weights-budget", "1MiB"], "needed one budget"),
        (["--storage", "nonsense"], "nonsense"),
        (["--storage", "sqlite:////no/such/folder/t.db"], "sqlite"),
        (["--time", "soon"], "--time: 'soon': needed a duration such as 30min"),
    ],
)
def test_bad_options(run, study, arguments, match):
    before = state(study)
    refused(run("search", study, *arguments), match)
    after = state(study)
    assert {n for n in after if after[n] != before.get(n)} <= {"search.lock"}


def test_long_lines_of_a_search_are_wrapped(run, study, monkeypatch):
    words = "default text, 220 records: 219 search + 104 selection + 41 held-out windows of 256"
    monkeypatch.setattr(Calibration, "summary", property(lambda calibration: words))
    for options in ([], ["--dry-run"]):
        out = good(run("search", study, *options))
        assert all(len(line) <= 80 or str(study) in line for line in out.splitlines())
        assert words in " ".join(out.split())


def test_paths_that_lead_nowhere_are_one_line(run, study, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for verb in ("explain", "score", "materialize", "reproduce"):
        refused(run(verb, loop, *(["out"] if verb == "materialize" else [])), "loop")
    refused(run("search", study, "--device", loop), "loop")
    outside, none = tmp_path / "x.gguf", tmp_path / "none.json"
    outside.write_bytes(b"GGUF" + b"x" * 4000)
    refused(run("score", outside), "x.gguf: lies in no study folder; name one by --study")
    refused(run("report", study, "--allocation", none), "none.json: no such allocation file")
    recipe = outside.rename(tmp_path / "x.safetensors")
    code, out, error = run("score", recipe, "--study", study)
    refused((code, out, error), "x', needed regex=type")
    assert len(error) < 500
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    refused(run("evaluate", study, "--text", tmp_path / "deep.jsonl"), "deep.jsonl:1: no JSON")


@pytest.mark.parametrize("spoil", ["a file", "below a file", "a loop", "too long"])
def test_a_cache_that_can_be_no_folder_is_one_line(study, tmp_path, capsys, spoil):
    file, loop = tmp_path / "file", tmp_path / "loop"
    file.write_text("kept")
    loop.symlink_to(loop)
    cache = {"a file": file, "below a file": file / "cache", "a loop": loop / "cache"}
    place = cache.get(spoil, tmp_path / ("x" * 300))
    before = state(study)
    code = main(["search", str(study), "--dry-run", "--cache", str(place)])
    refused((code, *capsys.readouterr()), "needed (a folder|one) for the cache")
    assert state(study) == before
    assert file.read_text() == "kept"


def test_bad_paths(run, study, checkpoints, tmp_path):
    nowhere = tmp_path / "nowhere"
    pick = study / "allocations/pick.json"
    before = state(study)
    refused(run("inspect", nowhere), "nowhere")
    refused(run("inspect", checkpoints["qwen3"], "--target", "onnx"), "onnx")
    for verb in ("profile", "search", "front", "evaluate"):
        refused(run(verb, nowhere), "no such study folder")
    refused(run("score", nowhere, "--study", study), "no such allocation file")
    refused(run("explain", nowhere, "--study", study), "no such allocation file")
    refused(run("materialize", nowhere, tmp_path / "out", "--study", study), "nowhere")
    written, planned = tmp_path / "written", tmp_path / "first-8.json"
    planned.write_text(json.dumps(unseal(pick.read_bytes())["allocation"]))
    way_out = f"an allocation alone.*`allocator finish {planned} --study STUDY`"
    refused(run("materialize", planned, tmp_path / "out", "--study", study), way_out)
    for rest in ([], ["--study", study]):
        refused(run("score", study, *rest), f"a folder, .* {pick}")
    refused(run("diff", tmp_path, pick), "a folder, needed an allocation file")
    refused(run("materialize", tmp_path, written, "--study", study), "a folder, needed")
    written.mkdir()
    shutil.copy(planned, written / "allocation.json")
    refused(run("explain", written, "--study", study), "a folder, .*written/allocation.json")
    refused(run("materialize", pick, study / "study.toml/out"), "study.toml is no folder")
    refused(run("materialize", pick, study), "holds something else")
    refused(run("verify", nowhere, "--study", study), "manifest.json")
    refused(run("reproduce", nowhere, "--study", study), "nowhere")
    refused(run("evaluate", study, "--documents", 99), "99 documents asked for")
    assert state(study) == before


def test_reproduce_on_another_checkpoint(run, study, make_checkpoint, tmp_path):
    make_checkpoint(tmp_path / "other", "qwen3", seed=5, dtype="bfloat16")
    another_checkpoint(study, tmp_path / "other")
    before = state(study)
    pick = study / "allocations/pick.json"
    refused(run("reproduce", pick, "--out", tmp_path / "out"), "is for checkpoint")
    assert state(study) == before
    assert not (tmp_path / "out").exists()


def test_a_full_disk_names_the_places_that_were_given(run, study, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "report.html"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(run("report", study, "--out", out), f"report: {out}: No space left on device")
    assert not list(tmp_path.glob("report*"))
    monkeypatch.setattr("allocator.api.front", full)
    refused(run("front", study), f"{study} or the cache or standard output: No space left")


def test_a_reader_that_stops_ends_a_verb_in_silence(finished_study):
    pick, (read, write) = finished_study / "allocations/pick.json", os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "allocator", "diff", pick, pick]
    for unbuffered in ("", "1"):  # output meets the closed pipe at the end, and at once
        env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=env)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
    os.close(write)


@pytest.mark.parametrize(
    ("to", "code", "said"), [(">&-", 0, ""), (">/dev/full", 2, "standard output: No space left")]
)
def test_an_output_that_is_closed_or_full(finished_study, to, code, said):
    pick = finished_study / "allocations/pick.json"
    command = ["sh", "-c", f'"$@" {to}', "-", sys.executable, "-m", "allocator", "diff", pick, pick]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)


COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_shtab_allocator; printf '%s\n' "${COMPREPLY[@]}"
"""


def test_bash_completes_verbs_options_choices_and_files(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "my-moe.gguf").touch()
    for words, completed in {
        ("qu",): "quantize",
        ("evaluate", "study", "--base"): "--baselines",
        ("evaluate", "study", "--baselines", "n"): "near none",
        ("quantize", "my"): "my-moe.gguf",
        ("front", "study", "--log-level", "w"): "warning",
    }.items():
        command = ["bash", "-c", COMPLETE, "bash", script, "allocator", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.split() == completed.split(), (words, done.stderr)


def test_a_log_level_is_that_of_our_loggers_and_of_libraries(run, study, monkeypatch):
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
        monkeypatch.setenv(f"{library}_VERBOSITY", "unset")
    logger, optuna_before = logging.getLogger("allocator"), optuna.logging.get_verbosity()
    try:
        good(run("front", study, "--log-level", "error"))
        assert logger.level == optuna.logging.get_verbosity() == logging.ERROR
        assert os.environ["TRANSFORMERS_VERBOSITY"] == os.environ["HF_HUB_VERBOSITY"] == "error"
        assert (
            "--log-level: invalid choice: 'loud'" in run("front", study, "--log-level", "loud")[2]
        )
    finally:
        logger.setLevel(logging.NOTSET)
        optuna.logging.set_verbosity(optuna_before)


def test_a_second_search_on_a_living_study(run, study):
    with search_lock(study) as lock:
        lock.ready()
        before = state(study)
        refused(run("search", study, "--trials", 9), f"searched by pid {os.getpid()}.*--join")
        assert state(study) == before
        good(run("search", study, "--trials", 9, "--join"))
    assert len(trials(study)) == 9


def test_unknown_verbs_and_options_are_argparses(capsys):
    for arguments in ([], ["fly"], ["search"], ["search", "x", "--fast"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


# -- kill -9


def n_scored(study):
    journal = study / "journal"
    return journal.read_bytes().count(b'"losses"') if journal.exists() else 0


def test_killed_at_random_moments_is_undisturbed(run, fresh_study, study_cache, tmp_path):
    whole = shutil.copytree(fresh_study, tmp_path / "whole/study")
    good(run("search", whole, "--trials", 16))
    killed = shutil.copytree(fresh_study, tmp_path / "killed/study")
    command = [
        sys.executable, "-m", "allocator", "search", killed, "--trials", "16",
        "--cache", study_cache, "--threads", "1", "--quiet",
    ]  # fmt: skip
    rng = random.Random()
    for at in (2, 7):  # once so many trials were scored, and a moment later
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        while process.poll() is None and n_scored(killed) < at:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err.decode()
        assert n_scored(killed) < 16
    good(run("search", killed, "--trials", 16))
    assert trials(killed) == trials(whole)
    assert state(killed / "allocations") == state(whole / "allocations")


def test_rows_that_were_measured_are_shown_and_kept(run, study, tmp_path, monkeypatch):
    plain, calls, path = Scorer.score, [], tmp_path / "rows.csv"

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise StudyError("no more")
        return plain(*args)

    monkeypatch.setattr(Scorer, "score", failing)
    code, out, err = run("evaluate", study, "--documents", 2, "--csv", path)
    assert (code, err) == (2, "allocator evaluate: no more\n")
    with path.open() as file:
        kept = [row["name"] for row in csv.DictReader(file)]
    assert len(kept) == 3
    assert "original" in kept
    assert all(name.split()[0] in out for name in kept)


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--csv", ["evaluate", "STUDY", "--csv", "PLACE"]),
        ("--out", ["init", "MODEL", "--out", "PLACE"]),
        ("--out", ["plan", "MODEL", "--out", "PLACE", "--device-memory", "1GiB"]),
        ("--out", ["quantize", "MODEL", "--bits", "3", "--out", "PLACE"]),
        ("--out", ["report", "STUDY", "--out", "PLACE"]),
        ("--out", ["reproduce", "PICK", "--out", "PLACE"]),
        ("OUT", ["imatrix", "STUDY", "PLACE"]),
        ("OUT", ["materialize", "PICK", "PLACE"]),
    ],
)
def test_an_output_where_nothing_can_be_made_is_refused_first(
    run, study, checkpoints, monkeypatch, option, arguments
):
    pick = study / "allocations/pick.json"
    pick.write_text(json.dumps(unseal(pick.read_bytes()) | {"sha256": {"gguf": "0" * 64}}))
    for costly in ("calibration", "profiler", "scorers"):
        monkeypatch.setattr(StudyFolder, costly, None)
    monkeypatch.setattr("allocator.pipeline.quantize.model_path", None)  # which may fetch
    monkeypatch.setattr("allocator.app.planning.plan", None)
    place = "/proc/x/y"  # in which root can make nothing either
    given = {"STUDY": study, "MODEL": checkpoints["qwen3"], "PICK": pick, "PLACE": place}
    says = rf"{option} {place}: nothing can be made in /proc \(.*\); name another place"
    refused(run(*(given.get(a, a) for a in arguments)), says)
