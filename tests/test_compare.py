"""Searchers side by side: tokens counted apart, runs resumed, figures recomputed by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from allocator import compare
from allocator.allocation import Allocation
from allocator.compare import Bench, Run, chosen_runs, interval, planned, results, run_all
from allocator.errors import AllocatorError, StudyError
from allocator.front import Point, baseline_loss
from allocator.inventory import read_inventory
from allocator.specification import CompareSpec, LongRun
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
    workspace = Bench(finished, "safetensors", cache=study_cache).workspace
    base = sum(workspace.profile.forward_tokens.values()) + 6 * 32
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
    frame = compare.table(finished, text=None, cache=study_cache, threads=1)
    by_hand = frame["sampler"].str.startswith("hand rule")
    assert (len(frame), by_hand.sum()) == (7, 3)
    assert frame[by_hand]["bits"].is_monotonic_decreasing
    bench = Bench(finished, "safetensors", cache=study_cache)
    for run in results(finished):
        row = frame[frame["sampler"] == run.sampler].iloc[0]
        pick, alone = (Allocation.from_json(a) for a in (run.pick, run.knapsack))
        documents = bench.workspace.report[:3]
        kl, other = (bench._scorers["report"].score(a).kl for a in (pick, alone))
        assert row["documents"] == len(documents) == 3
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-6)
        assert row["/knapsack"] == pytest.approx(kl.mean() / other.mean(), rel=1e-6)
        assert row["low"] <= row["/knapsack"] <= row["high"]
    summary = compare.summary(frame)
    assert len(summary) == 7
    assert summary["count"].eq(1).all()


def test_a_finished_run_is_not_run_again(finished, study_cache, monkeypatch):
    monkeypatch.setattr(Bench, "_search", lambda *_: pytest.fail("searched again"))
    for run in planned(Bench(finished, "safetensors", cache=study_cache).spec):
        Bench(finished, run.target, cache=study_cache).run(run)
    assert list(run_all(finished, [], text=None, cache=study_cache, workers=1)) == []


@pytest.mark.parametrize("sampler", ["auto", "evolution"])
def test_a_stopped_run_continues_as_if_undisturbed(
    folder, finished, study_cache, tmp_path, monkeypatch, sampler
):
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    bench = Bench(copy, "safetensors", cache=study_cache)
    run = next(r for r in planned(bench.spec) if r.sampler == sampler)
    scorer = bench.workspace.scorer
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


def test_processes_write_the_same(folder, finished, study_cache, tmp_path):
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    runs = chosen_runs(copy, samplers=["knapsack"])
    assert list(run_all(copy, runs, text=None, cache=study_cache, workers=2)) == runs
    short = compare.write_results(copy, text=None, cache=study_cache, threads=1)
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
    with pytest.raises(StudyError, match=r"\.json: made with another search split than .* delete"):
        compare.table(copy, text=None, cache=study_cache, threads=1)


def test_estimate_counts_what_is_missing(folder, finished, study_cache):
    runs = chosen_runs(folder)
    found = compare.estimate(finished, runs, cache=study_cache, workers=2)
    assert (found.runs, found.finished, found.tokens) == ((), 4, 0)
    more = [replace(r, seed=9) for r in runs]
    found = compare.estimate(finished, more, cache=study_cache, workers=2)
    base = results(finished)[0].base_tokens
    assert found.tokens == 4 * (TOKENS - base)
    assert found.seconds > 0


def test_baseline_is_the_hull_at_these_bytes(finished, study_cache):
    bench = Bench(finished, "safetensors", cache=study_cache)
    (weights,) = bench.spec.weights
    layout = bench.workspace.layout
    points = [
        Point(name, a.nbytes(layout).encoded, float(bench.kl("report", a).mean()))
        for name, a in bench.workspace.baselines(pruned=True)
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
        low, high = interval(a, b, seed=seed, n=400)
        hits += low <= 0.9 <= high
    assert hits >= 50


def test_bad_input(fresh_study, folder, tmp_path):
    with pytest.raises(StudyError, match=r"no \[compare\] section; see studies/benchmark"):
        chosen_runs(fresh_study)
    with pytest.raises(StudyError, match="no run is left of auto, knapsack"):
        chosen_runs(folder, samplers=["luck"])
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    text = (copy / "study.toml").read_text()
    for old, new, match in (
        ('"random"]', '"luck"]', "unknown sampler 'luck'"),
        ("safetensors = 1", "onnx = 1", "onnx"),
        ("safetensors = 1", "safetensors = 0", "positive"),
        (f"tokens = {TOKENS}", "tokens = 0", "positive"),
    ):
        (copy / "study.toml").write_text(text.replace(old, new))
        with pytest.raises(AllocatorError, match=match):
            chosen_runs(copy)
    (copy / "study.toml").write_text(text)
    (copy / "runs").mkdir()
    (copy / "runs" / "broken.json").write_text("{}")
    with pytest.raises(StudyError, match=r"broken.json: no run .*delete it"):
        results(copy)


def test_too_few_tokens_are_refused(folder, study_cache, tmp_path):
    copy = tmp_path / "study"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    text = (copy / "study.toml").read_text().replace(f"tokens = {TOKENS}", "tokens = 100")
    (copy / "study.toml").write_text(text)
    run = chosen_runs(copy)[0]
    with pytest.raises(StudyError, match=r"100 forward tokens; the profile.* take [\d,]+"):
        Bench(copy, "safetensors", cache=study_cache).run(run)
    assert not Path(copy / "runs" / f"{run.name}.json").exists()


def test_layout_of_the_target_is_used(folder, study_cache):
    bench = Bench(folder, "safetensors", cache=study_cache)
    inventory = read_inventory(folder / bench.workspace.spec.checkpoint)
    assert (
        bench.workspace.layout.groups.keys()
        == TARGETS["safetensors"].layout(inventory).groups.keys()
    )
