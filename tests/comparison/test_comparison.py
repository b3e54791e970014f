"""Searchers side by side: tokens counted apart, runs resumed, figures recomputed by hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from allocator import api
from allocator.app.study_file import CompareSpec, LongRun
from allocator.checkpoint.reading import read_inventory
from allocator.comparison import bench as bench_module
from allocator.comparison import table as compare
from allocator.comparison.bench import Bench
from allocator.comparison.pool import estimate_runs, run_all
from allocator.comparison.runs import CompareRequest, Run, chosen_runs, planned, results
from allocator.decision.allocation import Allocation
from allocator.decision.front import Point, baseline_loss
from allocator.errors import AllocatorError, StudyError
from allocator.files.checksums import unseal
from allocator.scoring import documents as calibration
from allocator.study.intervals import ratio_interval
from allocator.targets import TARGETS

SECTION = """
[compare]
samplers = ["auto", "knapsack", "evolution", "random"]
weights = [{weights}]
seeds = {{ safetensors = 1 }}
tokens = {tokens}
report_documents = 3
"""
TOKENS = 6000


@pytest.fixture(scope="module")
def folder(fresh_study, checkpoints, tmp_path_factory):
    """A study with a `[compare]` section."""
    folder = tmp_path_factory.mktemp("compare") / "study"
    shutil.copytree(fresh_study, folder)
    text = (folder / "study.toml").read_text()
    weights = int(text.split("weights = ")[1].split()[0])
    (folder / "study.toml").write_text(text + SECTION.format(weights=weights, tokens=TOKENS))
    return folder


@pytest.fixture(scope="module")
def finished(folder, study_cache):
    """The same after all runs, in this process."""
    for run in planned(Bench(folder, "safetensors", cache=study_cache).spec):
        Bench(folder, run.target, cache=study_cache).run(run)
    return folder


def test_plan_begins_with_first_seeds():
    spec = CompareSpec(
        samplers=["auto", "random"],
        weights=[5, 3],
        seeds={"safetensors": 2, "gguf": 1},
        tokens=7,
        long=[LongRun("random", "safetensors", [3], 70)],
    )
    runs = planned(spec)
    first = [Run(t, w, s, 0, 7) for t in spec.seeds for w in (5, 3) for s in spec.samplers]
    assert runs[:8] == first
    assert runs[8] == Run("safetensors", 3, "random", 0, 70)
    assert runs[9:] == [replace(r, seed=1) for r in first[:4]]
    assert len({r.name for r in runs}) == len(runs)


def test_every_run_keeps_to_its_tokens(finished, study_cache):
    found = results(finished)
    assert {r.sampler for r in found} == {"auto", "knapsack", "evolution", "random"}
    study_folder = Bench(finished, "safetensors", cache=study_cache).study_folder
    base = sum(study_folder.profile.forward_tokens.values()) + 6 * 32
    for run in found:
        assert run.base_tokens == base
        journal = finished / "runs" / f"{_name(run)}" / "journal"
        spent = base + _tokens(journal)
        picked = run.forward_tokens - spent  # finalists and the original on 4 documents of 32
        assert picked in (2 * 128, 3 * 128, 4 * 128, 5 * 128)
        assert run.forward_tokens <= TOKENS
        assert run.trials["COMPLETE"] + run.trials["PRUNED"] > 1
        assert run.course[0].tokens == base + 6 * 32
        tokens = [p.tokens for p in run.course]
        assert tokens == sorted(tokens)
        assert tokens[-1] == run.forward_tokens
    assert len({json.dumps(r.knapsack, sort_keys=True) for r in found}) == 1


def _name(run):
    return f"{run.target}-{run.weights}-{run.sampler}-{run.seed}-{run.tokens}"


def _tokens(journal):
    """Tokens of scored trials and of looks, read from the journal's lines."""
    total = 0
    for line in journal.read_text().splitlines():
        row = json.loads(line)
        total += row.get("user_attr", {}).get("result", {}).get("tokens", 0)
        total += row.get("system_attr", {}).get("auto:forward_tokens", 0)
    return total


def test_auto_looks_and_others_do_not(finished):
    journals = {r.sampler: finished / "runs" / _name(r) / "journal" for r in results(finished)}
    looked = {name for name, path in journals.items() if "auto:forward_tokens" in path.read_text()}
    assert looked == {"auto"}


def test_table_is_what_one_computes_by_hand(finished, study_cache):
    frame = compare.table(CompareRequest(finished, cache=study_cache))
    by_hand = frame["sampler"].str.startswith("hand rule")
    assert (len(frame), by_hand.sum()) == (7, 3)
    assert frame[by_hand]["bits"].is_monotonic_decreasing
    bench = Bench(finished, "safetensors", cache=study_cache)
    for run in results(finished):
        row = frame[frame["sampler"] == run.sampler].iloc[0]
        pick, alone = (Allocation.from_json(a) for a in (run.pick, run.knapsack))
        documents = bench.study_folder.calibration.report[:3]
        scorer = bench.study_folder.scorers.on(documents)
        kl, other = (scorer.score(a).kl for a in (pick, alone))
        assert row["documents"] == len(documents) == 3
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-6)
        assert row["/knapsack"] == pytest.approx(kl.mean() / other.mean(), rel=1e-6)
        assert row["low"] <= row["/knapsack"] <= row["high"]
    summary = compare.summary(frame)
    assert len(summary) == 7
    assert summary["count"].eq(1).all()


def test_a_finished_run_is_not_run_again(finished, study_cache):
    def written():
        return {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*")}

    before = written()
    for run in planned(Bench(finished, "safetensors", cache=study_cache).spec):
        Bench(finished, run.target, cache=study_cache).run(run)
    assert written() == before
    assert list(run_all(CompareRequest(finished, cache=study_cache), [])) == []


@pytest.mark.parametrize("sampler", ["auto", "evolution"])
def test_a_stopped_run_continues_as_if_undisturbed(
    folder, finished, study_cache, tmp_path, monkeypatch, sampler
):
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    bench = Bench(copy, "safetensors", cache=study_cache)
    run = next(r for r in planned(bench.spec) if r.sampler == sampler)
    scorer = bench.study_folder.scorers.trials
    score, calls = scorer.score, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(scorer, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        bench.run(run)
    assert not (copy / "runs" / f"{run.name}.json").exists()
    Bench(copy, "safetensors", cache=study_cache).run(run)
    one, other = (results(f) for f in (copy, finished))
    (again,) = one
    before = next(r for r in other if r.sampler == sampler)
    assert again.pick == before.pick
    assert [p.search for p in again.course] == [p.search for p in before.course]


def test_processes_write_the_same(folder, finished, study_cache, tmp_path, every_step):
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    runs = chosen_runs(copy, samplers=["knapsack"])
    request = CompareRequest(copy, cache=study_cache, workers=2, progress=True)
    assert list(run_all(request, runs)) == runs
    short = compare.write_results(request)
    for shown in ("comparing: 1/1 runs", "baselines on report: ", "held-out figures: 1/1 runs"):
        assert shown in every_step.getvalue()
    assert [n for n in short["sampler"] if not n.startswith("hand rule")] == ["knapsack"]
    (run,) = results(copy)
    assert run.pick == next(r for r in results(finished) if r.sampler == "knapsack").pick
    assert {p.name for p in copy.iterdir()} >= {"compare.csv", "summary.csv", "compare.png"}
    assert len(pd.read_csv(copy / "compare.csv")) == 1 + 3


def test_runs_of_other_inputs_are_not_mixed(finished, study_cache, tmp_path):
    copy = tmp_path / "study"
    shutil.copytree(finished, copy)
    text = (copy / "study.toml").read_text()
    (copy / "study.toml").write_text(text.replace("search_documents = 6", "search_documents = 5"))
    with pytest.raises(StudyError, match=r"\.json: made with another search split than .* move"):
        compare.table(CompareRequest(copy, cache=study_cache))


def test_estimate_counts_what_is_missing(folder, finished, study_cache):
    runs = chosen_runs(folder)
    request = CompareRequest(finished, cache=study_cache, workers=2)
    found = estimate_runs(replace(request, baselines="none"), runs)
    assert (found.runs, found.finished, found.tokens, found.seconds) == ((), 4, 0, 0)
    assert (found.baselines, found.baseline_tokens) == (0, 0)
    more = [replace(r, seed=9) for r in runs]
    found = estimate_runs(request, more)
    base = results(finished)[0].base_tokens
    assert found.tokens == 4 * (TOKENS - base)
    assert found.seconds > 0


def test_baselines_are_priced_before_and_left_out_on_request(finished, study_cache, monkeypatch):
    request = CompareRequest(finished, cache=study_cache)
    frame, plain = compare.table(request), compare.table(replace(request, baselines="none"))
    assert plain["/baseline"].isna().all()
    assert set(plain["sampler"]) == {"auto", "knapsack", "evolution", "random"}
    shared = [c for c in plain.columns if c != "/baseline"]
    alike = frame[frame["sampler"].isin(plain["sampler"])]
    pd.testing.assert_frame_equal(alike[shared], plain[shared], check_dtype=False)
    with pytest.raises(StudyError, match="baselines 'all': needed near or none"):
        replace(request, baselines="all")

    bench = Bench(finished, "safetensors", cache=study_cache)
    (weights,), layout = bench.spec.weights, bench.study_folder.layout
    assert bench.baseline_costs([weights]) == (0, 0)  # the table has scored them all
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "digest", None)
        assert bench.baseline_costs([weights]) == (0, 0)  # no document is read for every baseline
    hand = {a.digest: a.nbytes(layout).encoded for _, a in bench._by_hand()}
    beside = {
        a.digest
        for _, a in bench.study_folder.baselines(pruned=True, skilled=True)
        for size in (weights, *hand.values())
        if 0.6 < a.nbytes(layout).encoded / size < 1.6
    }
    assert len(beside) > 3
    monkeypatch.setattr(bench_module, "_SCREEN_DOCUMENTS", 2)
    assert bench.baseline_costs([weights]) == (len(beside), 2 * 32 * len(beside))
    monkeypatch.setattr(Bench, "_path", lambda *_: Path("nowhere"))
    tokens = 32 * (2 * len(beside) + 3 * len(beside | set(hand)))
    assert bench.baseline_costs([weights]) == (len(beside | set(hand)), tokens)


def test_baseline_is_the_hull_at_these_bytes(finished, study_cache):
    bench = Bench(finished, "safetensors", cache=study_cache)
    (weights,) = bench.spec.weights
    layout = bench.study_folder.layout
    points = [
        Point(name, a.nbytes(layout).encoded, float(bench.kl("report", a).mean()))
        for name, a in bench.study_folder.baselines(pruned=True)
    ]
    found = bench.baseline("report", weights)
    assert found == pytest.approx(baseline_loss(points, weights), rel=0.02)
    assert found >= baseline_loss(points, weights) * (1 - 1e-9)


def test_interval_holds_the_ratio():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        b = rng.lognormal(0, 0.5, 40)
        a = 0.9 * b * np.exp(0.1 * rng.standard_normal(40) - 0.005)
        low, high = ratio_interval(a, b, seed=seed, n=400)
        hits += low <= 0.9 <= high
    assert hits >= 50


def test_bad_input(fresh_study, folder, tmp_path):
    with pytest.raises(StudyError, match=r"no \[compare\] section; add one, docs/comparing.md"):
        chosen_runs(fresh_study)
    with pytest.raises(StudyError, match=r"--sampler luck: not under .* which has auto, k"):
        chosen_runs(folder, samplers=["auto", "luck"])
    with pytest.raises(StudyError, match="--weights 7: not under"):
        chosen_runs(folder, weights=[7])
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    text = (copy / "study.toml").read_text()
    for old, new, match in (
        ('"random"]', '"luck"]', 'samplers has "luck": needed one'),
        ("safetensors = 1", "onnx = 1", "onnx"),
        ("safetensors = 1", "safetensors = 0", "seeds.safetensors = 0: needed"),
        (f"tokens = {TOKENS}", "tokens = 0", "tokens = 0: needed"),
        ("report_documents = 3", "report_documents = 0", "report_documents = 0: needed"),
        ('"random"]', '"auto"]', "plans .* twice"),
        ('samplers = ["auto", "knapsack", "evolution", "random"]', "samplers = []", "is empty"),
        ("safetensors = 1", "", "seeds is empty"),
        ("report_documents", "references.knapsack = 'a'\nreport_documents", "rename it"),
        ("report_documents", "references.a = '{seed}'\nreport_documents", "'{seed}'; only"),
    ):
        (copy / "study.toml").write_text(text.replace(old, new))
        with pytest.raises(AllocatorError, match=match):
            chosen_runs(copy)
    (copy / "study.toml").write_text(text)
    (copy / "runs").mkdir()
    (copy / "runs" / "broken.json").write_text("{}")
    with pytest.raises(StudyError, match=r"broken.json: not the file of a .*move it away"):
        results(copy)


def test_too_few_tokens_are_refused(folder, study_cache, tmp_path):
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    text = (copy / "study.toml").read_text().replace(f"tokens = {TOKENS}", "tokens = 100")
    (copy / "study.toml").write_text(text)
    run = chosen_runs(copy)[0]
    with pytest.raises(StudyError, match=r"100 forward tokens; the .* take [\d,]+: raise tokens"):
        Bench(copy, "safetensors", cache=study_cache).run(run)
    assert not Path(copy / "runs" / f"{run.name}.json").exists()


def test_layout_of_the_target_is_used(folder, study_cache):
    bench = Bench(folder, "safetensors", cache=study_cache)
    inventory = read_inventory(folder / bench.study_folder.spec.checkpoint)
    assert (
        bench.study_folder.layout.groups.keys()
        == TARGETS["safetensors"].layout(inventory).groups.keys()
    )


def test_inputs_are_looked_at_before_the_first_run(folder, study_cache, checkpoints, tmp_path):
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    text = (copy / "study.toml").read_text()
    weights = int(text.split("weights = ")[1].split()[0])
    calibration = copy / text.split('documents = "')[1].split('"')[0]
    (tmp_path / "foreign.json").write_text("{}")
    other = tmp_path / "other.json"

    def check(match, *, old="report_documents", new="report_documents", heldout=None):
        (copy / "study.toml").write_text(text.replace(old, new))
        with pytest.raises(AllocatorError, match=match):
            api.estimate_compare(copy, text=heldout, cache=study_cache, threads=1)
        assert not (copy / "runs").exists()

    check("under the floor", old=f"weights = [{weights}]", new="weights = [1000]")
    check("raise tokens under", old=f"tokens = {TOKENS}", new="tokens = 100")
    check("report_documents = 99", old="report_documents = 3", new="report_documents = 99")
    check("reference 'a': .*missing.json", new="references.a = 'missing.json'\nreport_documents")
    check("reference 'a': ", new=f"references.a = '{tmp_path}/foreign.json'\nreport_documents")
    check("missing.jsonl", heldout=tmp_path / "missing.jsonl")
    check("shares a document with search or selection", heldout=calibration)
    # of another checkpoint with the same shapes
    pick = api.search(copy, trials=1, cache=study_cache, threads=1).pick
    record = unseal(pick.read_bytes())
    other.write_text(json.dumps(record | {"checkpoint": "0" * 64}))
    check("reference 'a': .*is for checkpoint", new=f"references.a = '{other}'\nreport_documents")


def test_a_reference_without_its_importance_stops_before_the_first_run(
    folder, study_cache, tmp_path
):
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    text = (copy / "study.toml").read_text().replace('target = "gguf"', 'target = "safetensors"')
    (copy / "study.toml").write_text(text)
    pick = api.search(copy, trials=1, cache=study_cache, threads=1).pick
    record = unseal(pick.read_bytes()) | {"importance": "0" * 64}
    (copy / "odd.json").write_text(json.dumps(record))
    named = "references.a = 'odd.json'\nreport_documents"
    (copy / "study.toml").write_text(text.replace("report_documents", named))
    runs = run_all(
        CompareRequest(copy, cache=study_cache),
        chosen_runs(copy),
        processes=lambda n: pytest.fail("a run began"),
    )
    with pytest.raises(AllocatorError, match="importance 000000000000 is neither in"):
        next(runs)


def test_budgets_without_a_baseline_leave_it_empty(folder, finished, study_cache, tmp_path):
    copy = tmp_path / "study"
    shutil.copytree(finished, copy)
    bench = Bench(copy, "safetensors", cache=study_cache)
    assert np.isnan(bench.baseline("report", 1))
    assert np.isnan(bench.baseline("report", 10**9))
    frame = compare.table(CompareRequest(copy, cache=study_cache))
    assert frame["/baseline"].notna().any()
    assert all(np.isnan(ratio_interval(np.ones(3), np.zeros(3))))


def test_damaged_runs_are_named(finished, study_cache, tmp_path):
    copy = tmp_path / "study"
    shutil.copytree(finished, copy)
    path = next((copy / "runs").glob("*.json"))
    whole = unseal(path.read_bytes())
    for change, match in (
        ({"course": []}, "not the file"),
        ({"schema": 2}, "not the file"),
        ({"spent": {}}, "not the file"),
        ({"pick": whole["pick"] | {"formats": {"odd": "Q8_0"}}}, "not in both"),
        ({"lock": {}}, "made with another"),
        ({"lock": whole["lock"] | {"selection split": ""}}, "another selection split"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(StudyError, match=f"{path.name}: .*{match}.*restore it"):
            compare.table(CompareRequest(copy, cache=study_cache))


QUICK = ("knapsack", "evolution", "random")  # in order; without gradients
COMPARE = """
import signal
import sys
from pathlib import Path
from allocator.comparison.pool import run_all
from allocator.comparison.runs import CompareRequest, chosen_runs
folder, cache, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    request = CompareRequest(folder, cache=cache, workers=workers)
    for run in run_all(request, chosen_runs(folder, samplers=sys.argv[4:])):
        print(run.name, flush=True)
"""


@pytest.fixture
def comparing(folder, finished, study_cache, tmp_path):
    """A comparison of its own process; `finished` so that profile and weights are cached."""
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    script = tmp_path / "comparing.py"
    script.write_text(COMPARE)

    def start():
        arguments = [sys.executable, str(script), str(copy), str(study_cache), "1", *QUICK]
        return copy, subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def _children(pid):
    """Worker processes of a comparison."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(c) for c in found if "spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes().decode()
    ]


def _until(condition, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("waited too long")


def _gone(pids):
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return all(not s.exists() or s.read_text().rsplit(")")[1].split()[0] == "Z" for s in states)


def _killed(process):
    """Kills a comparison that has workers, which end too."""
    workers = _children(process.pid)
    assert workers
    process.kill()
    process.communicate()
    _until(lambda: _gone(workers))


def test_one_comparison_at_a_time_and_workers_end_with_it_even_as_they_start(
    comparing, study_cache
):
    copy, process = comparing()
    _until(lambda: _children(process.pid))
    with pytest.raises(StudyError, match=rf"is being searched by pid {process.pid}.*wait for it"):
        list(run_all(CompareRequest(copy, cache=study_cache), chosen_runs(copy)))
    _killed(process)


def test_an_interrupt_stops_all_runs_at_once(comparing, study_cache):
    copy, process = comparing()
    process.stdout.readline()  # the first is finished
    workers = _children(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    _until(lambda: _gone(workers))
    n_finished = len(results(copy))
    assert 0 < n_finished < 3
    runs = chosen_runs(copy, samplers=QUICK)
    made = list(run_all(CompareRequest(copy, cache=study_cache), runs))
    assert len(made) == 3 - n_finished
    assert len(results(copy)) == 3


def test_a_killed_worker_is_one_clear_line(comparing):
    _, process = comparing()
    _until(lambda: _children(process.pid))
    for worker in _children(process.pid):
        os.kill(worker, signal.SIGKILL)
    _, error = process.communicate()
    assert "a worker was killed, most likely for want of memory" in error


def test_baselines_of_the_plot_are_those_of_the_table():
    """Runs of one budget give one line: their loss over its ratio to the baseline."""
    row = {"target": "gguf", "bits": 2.25, "split": "report", "kl": 0.3, "/baseline": 0.5}
    rows = [row, row | {"kl": 0.6, "/baseline": 1.0}, row | {"split": "text", "kl": 9.0},
            row | {"bits": 3.0, "/baseline": np.nan}]  # fmt: skip
    known = compare.best_baselines(pd.DataFrame(rows), {9: 2.25004, 12: 3.0})
    assert known == {("gguf", 9): pytest.approx(0.6)}
