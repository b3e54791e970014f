"""Every verb of the library on a tiny study: what it returns, writes, and leaves alone."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from optuna.storages import InMemoryStorage
from safetensors.numpy import load_file, save_file

from allocator import api
from allocator.app import estimate
from allocator.app.explanation import explanation
from allocator.app.held_out_file import HeldOut
from allocator.app.importance import StudyEncodings
from allocator.app.pick import N_FINALISTS, finalists_of
from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.reading import read_inventory
from allocator.cli import main
from allocator.codecs import encodings as encodings
from allocator.codecs.encodings import Encodings
from allocator.codecs.ggml import GGML
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord
from allocator.decision.search_space import SearchSpace, bind
from allocator.errors import (
    AllocatorError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    SpaceError,
    StudyError,
    VerifyError,
)
from allocator.export.checkpoint import materialize
from allocator.export.manifest import Manifest, file_digest
from allocator.export.runtimes import runtime_named
from allocator.files.checksums import unseal
from allocator.formats import FORMATS, offered
from allocator.profiling.profiler import Profiler
from allocator.profiling.statistics import importance_digest
from allocator.samplers.auto import ROUND
from allocator.scoring.scorer import Scorer
from allocator.study.stop_rule import StopRule
from allocator.study.trials import allocation_of, complete_trials
from allocator.targets import GGUF
from allocator.targets.group_weights import group_weights

encode = GGML.encode

torch.set_num_threads(1)
ROUNDING = 1e-7
"""Nats: a trial is scored in other batches than a score, which processors round otherwise."""


@pytest.fixture(scope="module")
def options(study_cache):
    return {"cache": study_cache, "threads": 1}


@pytest.fixture
def study(finished_study, tmp_path):
    """A copy of the finished study."""
    return shutil.copytree(finished_study, tmp_path / "study")


@pytest.fixture
def fresh(fresh_study, tmp_path):
    return shutil.copytree(fresh_study, tmp_path / "study")


def state(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(study, **options):
    return json.loads((study / "front.json").read_text())["trials"]


def test_inspect_lists_every_searched_weight(checkpoints):
    for target in ("gguf", "safetensors"):
        table = api.inspect(checkpoints["deepseek"], target=target)
        assert len(table) == len(set(table["group"]))
        assert set(" ".join(table["formats"]).split()) <= set(FORMATS)
    from safetensors.torch import load_file

    tensors = load_file(checkpoints["deepseek"] / "model.safetensors")
    matrices = [
        t.numel() for n, t in tensors.items() if t.dim() > 1 and not n.endswith("mlp.gate.weight")
    ]
    assert table["weights"].sum() == sum(matrices)


def test_search_leaves_a_study_that_keeps_its_promises(study, options):
    result = api.search(study, **options)
    study_folder = StudyFolder(study, **options)
    limit = study_folder.budget()
    trials = result.study.get_trials()
    assert len(trials) == 8
    assert sum(result.trials.values()) == 8
    for trial in trials:
        size = allocation_of(trial).nbytes(study_folder.layout)
        assert size.encoded <= limit.nbytes
        assert trial.constraints["budget"] == size.encoded - limit.nbytes
    done = complete_trials(result.study)
    best = done[0]
    losses = study_folder.scorers.trials.score(allocation_of(best))
    assert np.mean(losses.kl) == pytest.approx(best.values[0], rel=1e-6, abs=ROUNDING)
    record = AllocationRecord.read(result.pick)
    assert record.decision.digest in {allocation_of(t).digest for t in done}
    assert record.checkpoint == study_folder.inventory.digest
    assert record.bytes["budget"] == limit.nbytes
    assert record.bytes["encoded"] == record.decision.nbytes(study_folder.layout).encoded
    assert AllocationRecord.read(result.knapsack).kind == "knapsack"
    selection = {
        a.digest: np.mean(study_folder.scorers.selection.score(a).kl)
        for a in (allocation_of(t) for t in done[:3])
    }
    assert record.loss["selection"] <= min(selection.values()) + 1e-6


def test_the_same_search_again_does_nothing(study, options):
    before = state(study)
    api.search(study, **options)
    after = state(study)
    assert {n for n in before if before[n] != after[n]} <= {"search.lock"}
    assert set(after) == set(before)


def test_a_longer_search_continues_as_an_undisturbed_one(study, fresh_study, tmp_path, options):
    api.search(study, trials=11, **options)
    whole = shutil.copytree(fresh_study, tmp_path / "whole/study")
    api.search(whole, trials=11, **options)
    assert [r["loss"] for r in rows(study)] == [r["loss"] for r in rows(whole)]
    assert (study / "allocations/pick.json").read_bytes() == (
        whole / "allocations/pick.json"
    ).read_bytes()


def test_estimate_writes_nothing_and_brackets_the_budget(fresh, options):
    before = state(fresh)
    found = api.estimate(fresh, **options)
    assert state(fresh) == before
    assert found.floor < found.budget.nbytes < found.ceiling
    assert found.total_seconds > 0
    study_folder = StudyFolder(fresh, **options)
    assert found.floor == study_folder.unranked_space.smallest.nbytes(study_folder.layout).encoded


def test_estimate_prices_every_pass(fresh, finished_study, options, tmp_path, monkeypatch):
    """At a second per token, and nothing for encoding: tokens by hand, changes from the profile."""
    monkeypatch.setattr(GGML, "weights_per_second", lambda fmt: math.inf)
    monkeypatch.setattr(GGML, "preparation_seconds", lambda fmt: 0.0)
    monkeypatch.setattr(estimate, "_PRICE_WEIGHTS_PER_SECOND", math.inf)
    monkeypatch.setattr(estimate, "seconds_per_token", lambda *_, **__: 1.0)
    ready = api.estimate(fresh, **options)
    assert ready.profile_ready
    assert ready.profile_seconds == 0
    searched, scored, measured = 8 * 32, 6 * 32, 3 * 32
    assert ready.seconds_per_full_trial == scored
    # one look a round; two forward and two backward passes of what is scored
    looks = -(-8 // ROUND) * 6 * scored
    assert ready.total_seconds == 8 * scored + looks
    assert api.estimate(fresh, sampler="knapsack", **options).total_seconds == 8 * scored
    assert (ready.limit, api.estimate(fresh, trials=2, **options).limit) == ("trials", "trials")

    # other limits replace study.toml's trials; of several, the first that is reached counts
    timed = api.estimate(fresh, seconds=50.0, **options)
    assert (timed.limit, timed.total_seconds) == ("seconds", 50)
    profiled = StudyFolder(fresh, **options).profiler.folder / "profile.json"
    before = sum(json.loads(profiled.read_text())["forward_tokens"].values()) + scored  # original
    picked = (3 + 2) * 4 * 32  # finalists, knapsack and original on the selection split
    counted = api.estimate(fresh, tokens=before + picked + 7 * scored, **options)
    assert (counted.limit, counted.total_seconds) == ("tokens", 7 * scored)
    both = api.estimate(fresh, tokens=10**9, trials=8, sampler="knapsack", **options)
    assert (both.limit, both.total_seconds) == ("trials", 8 * scored)

    cold = api.estimate(fresh, **(options | {"cache": tmp_path / "cold"}))
    folder = StudyFolder(finished_study, **options).profiler.folder
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    # of two layers, a change in the second one, or of the head, runs the second one
    late = ("layers.1", "head")
    depths = [0.5 if line["change"].startswith(late) else 1.0 for line in lines]
    statistics, curvature, original = 1.5 * searched, 3 * searched, measured
    assert not cold.profile_ready
    assert cold.profile_seconds == statistics + curvature + original + measured * sum(depths)
    assert cold.total_seconds == cold.profile_seconds + ready.total_seconds


@pytest.mark.parametrize("kind", ["file", "weights"])
def test_a_budget_under_the_floor_names_both_numbers(fresh, options, kind):
    before = state(fresh)
    study_folder = StudyFolder(fresh, **options)
    size = study_folder.unranked_space.smallest.nbytes(study_folder.layout)
    floor = size.file if kind == "file" else size.encoded
    budget = {"file": "budget", "weights": "weights_budget"}[kind]
    for verb in (api.search, api.estimate):
        with pytest.raises(BudgetError, match=f"{floor - 1:,} bytes.*{floor:,}") as caught:
            verb(fresh, **{budget: str(floor - 1)}, **options)
        assert "\n" not in str(caught.value)
    assert state(fresh) == before
    api.search(fresh, **{budget: str(floor)}, trials=2, **options)


def test_front_is_the_non_dominated_trials(study, options):
    table = api.front(study, **options)
    done = [r for r in rows(study) if r["state"] == "COMPLETE"]
    expected = [
        r["trial"] for r in done
        if not any(
            (o["bytes"] <= r["bytes"] and o["loss"] < r["loss"])
            or (o["bytes"] < r["bytes"] and o["loss"] <= r["loss"])
            for o in done
        )
    ]  # fmt: skip
    assert set(table["trial"]) <= set(expected)
    assert set(zip(table["bytes"], table["loss"], strict=True)) == {
        (r["bytes"], r["loss"]) for r in done if r["trial"] in expected
    }
    assert table["bytes"].is_monotonic_increasing
    assert table["loss"].is_monotonic_decreasing


@pytest.mark.parametrize("target", ["onnx", "safetensors"])
def test_the_front_of_another_target_is_refused(study, options, target):
    before = state(study)
    with pytest.raises(StudyError, match=f"searched for target 'gguf', asked for '{target}'"):
        api.front(study, target=target, **options)
    assert state(study) == before
    assert len(api.front(study, target="gguf", **options))


def test_front_without_a_study_is_refused(fresh, options):
    before = state(fresh)
    with pytest.raises(StudyError, match="no study yet"):
        api.front(fresh, **options)
    assert state(fresh) == before


def test_the_front_of_a_study_that_was_stopped_before_its_first_trial(fresh, options):
    storage = f"sqlite:///{fresh}/study.db"
    optuna.create_study(study_name=fresh.name, storage=storage, directions=["minimize"] * 2)
    with pytest.raises(StudyError, match="no trial is finished yet"):
        api.front(fresh, storage=storage, **options)


def test_finalists_are_different_allocations(formula):
    search = formula.search(InMemoryStorage(), "random", rungs=())
    search.run(StopRule(trials=6))
    once = [t.number for t in complete_trials(search.study)]
    for _ in range(4):
        search.study.enqueue_trial(search.study.get_trials()[once[0]].params)
        search.step()
    finalists, alone = finalists_of(search)
    assert [t.number for t in finalists[:N_FINALISTS]] == once[:N_FINALISTS]
    assert alone is not None
    assert alone.number == 0


def test_explain_is_the_surrogate_and_the_allocations_bytes(study, options):
    pick = study / "allocations/pick.json"
    table = api.explain(study, pick, **options).set_index("decision")
    study_folder = StudyFolder(study, **options)
    decision, layout = AllocationRecord.read(pick).decision, study_folder.layout
    assert len(table) == len(layout.groups) + 1  # and the retained count
    params = study_folder.space.params(decision)
    whole = study_folder.space.complete(params)
    predicted = study_folder.surrogate.predict(whole)
    jumps = predicted - study_folder.surrogate.losses(whole).sum()
    assert jumps > 0
    assert table["predicted_loss"].sum() == pytest.approx(predicted - jumps / 2, rel=1e-9)
    steps = 0
    for name, row in table.iterrows():
        for side in ("up", "down"):
            if row[side] is None or row[side] != row[side]:
                continue
            value = int(row[side]) if name.startswith("experts") else row[side]
            moved = study_folder.space.allocation({**whole, name: value})
            nbytes = moved.nbytes(layout).encoded - decision.nbytes(layout).encoded
            assert row[f"{side}_bytes"] == nbytes
            loss = study_folder.surrogate.predict({**whole, name: value}) - predicted
            assert row[f"{side}_loss"] == pytest.approx(loss, abs=1e-9)
            assert (nbytes >= 0) if side == "up" else (nbytes <= 0)
            steps += 1
    assert steps > len(table) / 2


def test_explain_steps_over_mixes_by_bytes(layouts):
    """Neighbours at the layer's own count; a mix that stores nothing else there is no step."""
    layout = layouts["safetensors"]
    space = bind(SearchSpace(schema=1), layout, None)
    group = "layers.1.experts.down"
    decision = space.allocation(
        space.params(space.smallest) | {"experts.1": 10, f"format.{group}": "IQ2_XXS*8+IQ1_S"}
    )
    losses = SimpleNamespace(
        loss_at=lambda params: lambda name, value: 0.0, predict=lambda params: 0.0
    )
    table = explanation(decision, space, losses).set_index("decision")
    row = table.loc[f"format.{group}"]
    assert row["value"] == "IQ2_XXS*8+IQ1_S"
    # of 10 experts, matrices of 256 rows of 66 and 50 bytes
    assert row["bytes"] == 256 * (8 * 66 + 2 * 50)
    assert (row["down"], row["down_bytes"]) == ("IQ2_XXS*4+IQ1_S", -256 * 4 * 16)
    assert (row["up"], row["up_bytes"]) == ("IQ2_XXS", 256 * 2 * 16)
    assert table.loc["format.layers.2.experts.down", "up"] == "IQ1_M"  # of 6 experts
    assert table.loc["experts.1", "value"] == 10


def test_score_is_the_trials_loss(study, options):
    pick = study / "allocations/pick.json"
    record = AllocationRecord.read(pick)
    found = api.score(study, pick, **options)
    assert found["loss"] == pytest.approx(record.loss["search"], rel=1e-6, abs=ROUNDING)
    assert found["bytes"]["encoded"] == record.bytes["encoded"]
    plain = study / "plain.json"
    plain.write_text(json.dumps(record.allocation))
    assert api.score(study, plain, **options)["loss"] == found["loss"]


def test_score_of_a_type_file_is_that_of_its_allocation(study, options):
    study_folder = StudyFolder(study, **options)
    path = study / "types.txt"
    path.write_text("ffn_down_exps=q5_0\nattn_q=q4_0\n")
    with pytest.raises(SpaceError, match="--base"):
        api.score(study, path, **options)
    found = api.score(study, path, base="Q8_0", **options)
    formats = {
        g: "Q5_0" if g.endswith("experts.down") else "Q4_0" if g.endswith("attention.q") else "Q8_0"
        for g in study_folder.layout.groups
    }
    expected = Allocation.of(
        target="gguf", retained=dict.fromkeys(study_folder.layout.layers, tuple(range(8))),
        formats=formats, experts_used=2,
    )  # fmt: skip
    assert found["digest"] == expected.digest
    assert 0 < found["loss"] < 1


def test_an_edited_record_is_refused(study, options):
    pick = study / "allocations/pick.json"
    data = unseal(pick.read_bytes())
    data["allocation"]["formats"]["embedding"] = "BF16"
    pick.write_text(json.dumps(data))
    with pytest.raises(SpaceError, match="edited by hand"):
        api.score(study, pick, **options)
    with pytest.raises(SpaceError, match="edited by hand"):
        api.materialize(study, pick, study / "out", **options)
    assert not (study / "out").exists()


def test_a_record_is_scored_with_the_importance_it_was_encoded_with(study, options):
    """As after a search on a processor that rounds otherwise; far enough to tell them apart."""
    pick = study / "allocations/pick.json"
    ours = api.score(study, pick, **options)
    study_folder = StudyFolder(study, **options)
    vectors = study_folder.profiler.statistics.importance
    other = {name: v[..., ::-1].copy() for name, v in vectors.items()}
    digest = importance_digest(other)
    save_file(other, study_folder.encodings.path(digest))
    data = unseal(pick.read_bytes())
    foreign = pick.with_name("foreign.json")
    foreign.write_text(json.dumps(data | {"importance": digest}))
    found = api.score(study, foreign, **options)
    decision = AllocationRecord.read(foreign).decision
    encodings = Encodings(study_folder.cache / "bank", study_folder.layout, other)
    documents = study_folder.scorers.trials.documents
    model = study_folder.scorers.model_with(encodings)
    by_hand = study_folder.scorers.on(documents, model=model).score(decision)
    assert found["loss"] == pytest.approx(np.mean(by_hand.kl), rel=1e-9)
    assert found["loss"] != ours["loss"]
    assert api.score(study, pick, **options)["loss"] == ours["loss"]
    table = api.evaluate(study, [pick, foreign], documents=2, **options).set_index("name")
    assert table.loc["* foreign", "kl"] != table.loc["* pick", "kl"]
    assert len(api.explain(study, foreign, **options))


def test_a_record_without_its_importance_is_not_scored_with_ours(study, options):
    pick = study / "allocations/pick.json"
    data = unseal(pick.read_bytes())
    pick.write_text(json.dumps(data | {"importance": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"importance 000000000000 is neither in .* restore"):
        api.score(study, pick, **options)
    with pytest.raises(CheckpointError, match="importance 000000000000 is neither in"):
        api.evaluate(study, [pick], documents=2, **options)
    pick.write_text(json.dumps(data | {"checkpoint": "0" * 64}))
    with pytest.raises(CheckpointError, match="is for checkpoint 000000000000"):
        api.score(study, pick, **options)


def test_a_record_cannot_name_places(study, options, tmp_path):
    pick = study / "allocations/pick.json"
    api.materialize(study, pick, tmp_path / "made", record=True, **options)
    data = unseal(pick.read_bytes())
    pick.write_text(json.dumps(data | {"name": "../../evil"}))
    (made,) = api.reproduce(pick, tmp_path / "deep" / "er", **options)
    assert made.folder.parent == tmp_path / "deep" / "er"
    pick.write_text(json.dumps(data | {"importance": "../../x"}))
    with pytest.raises(SpaceError, match="is no sha256"):
        api.reproduce(pick, tmp_path / "out", **options)


def test_a_moved_study_goes_on(study, options, tmp_path):
    moved = study.rename(tmp_path / "moved")
    before = (moved / "front.json").read_bytes()
    api.search(moved, **options)
    assert (moved / "front.json").read_bytes() == before


@pytest.mark.parametrize("n", [-1, 0, 10_000])
def test_odd_numbers_of_documents_are_refused(study, options, n):
    with pytest.raises(CalibrationError, match="documents"):
        api.evaluate(study, documents=n, **options)


def test_materialize_verify_reproduce(study, options, tmp_path, monkeypatch):
    pick = study / "allocations/pick.json"
    made = {
        c: api.materialize(study, pick, tmp_path / c, container=c, record=True, **options)
        for c in ("gguf", "safetensors")
    }
    recorded = AllocationRecord.read(pick).sha256
    for container, done in made.items():
        assert recorded[container] == file_digest(done.folder / done.manifest.file)
        found = api.verify(study, done.folder, documents=3, encode=True, **options)
        assert found.file_bytes == (done.folder / done.manifest.file).stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr("allocator.targets.safetensors.SHARD_BYTES", 100_000)
        cut = api.materialize(
            study, pick, tmp_path / "cut", container="safetensors", record=True, **options
        )
        assert "model-00002-of-" in " ".join(cut.manifest.sha256)
        assert cut.manifest.size_of_weights(cut.folder) == cut.manifest.file_bytes
        (again,) = api.reproduce(pick, tmp_path / "cut", containers=["safetensors"], **options)
        assert again.manifest == cut.manifest
        layout, record = StudyFolder(study, **options).layout, AllocationRecord.read(pick)
        asked = {"none": None, "1MB": 1_000_000, None: 100_000}
        runtime = runtime_named("safetensors")
        assert {a: api._shard_bytes(a, runtime, layout, record) for a in asked} == asked
        for spare, expected in ((0, 100_000), (-1, None)):
            limits = {"budget": cut.manifest.file_bytes + spare}
            tight = msgspec.structs.replace(record, bytes={**record.bytes, **limits})
            assert api._shard_bytes(None, runtime, layout, tight) == expected
            if expected:  # shards of that size are on the disk, see above
                assert api._shard_bytes("100kB", runtime, layout, tight) == expected
        with pytest.raises(
            BudgetError, match=f"{cut.manifest.file_bytes:,} bytes with the headers"
        ):
            api._shard_bytes("100kB", runtime, layout, tight)
        assert api._shard_bytes("none", runtime, layout, tight) is None
    assert AllocationRecord.read(pick).sha256 == recorded  # of the same tensors in one file
    whole = api.verify(study, made["safetensors"].folder, **options)
    assert whole.loss == pytest.approx(AllocationRecord.read(pick).loss["search"], abs=1e-6)
    for name in ("one", "two"):
        again = api.reproduce(pick, tmp_path / name, **options)
        assert {w.manifest.container: w.manifest.sha256[w.manifest.file] for w in again} == recorded
    elsewhere = {**options, "cache": tmp_path / "empty_cache"}
    again = api.reproduce(pick, tmp_path / "three", **elsewhere)  # nothing but the committed files
    assert [w.manifest for w in again] == [made[w.manifest.container].manifest for w in again]


@pytest.fixture
def search_meanwhile(study, options, monkeypatch):
    """A search of the study runs to its end after `materialize` wrote, before it records."""
    ran = []

    def writing(*args, **kwargs):
        written = materialize(*args, **kwargs)
        ran.append(api.search(study, **options))
        return written

    monkeypatch.setattr("allocator.export.checkpoint.materialize", writing)
    return ran


def test_a_pick_of_a_search_that_ends_meanwhile_stays(
    study, options, tmp_path, capsys, search_meanwhile
):
    """Nothing is recorded, and one line says so."""
    path = study / "allocations/pick.json"
    new = AllocationRecord.read(path)
    done = api.search(study, **options)
    found = [allocation_of(t) for t in complete_trials(done.study)]
    other = next(a for a in found if a.digest != new.digest)
    old = msgspec.structs.replace(new, allocation=other.to_json(), digest=other.digest)
    path.write_bytes(old.to_bytes())
    command = ["materialize", path, tmp_path / "out", "--record", "--quiet"]
    command += ["--cache", options["cache"], "--threads", "1"]
    assert main([str(word) for word in command]) == 2
    assert len(search_meanwhile) == 1
    shown = capsys.readouterr().err.splitlines()
    (line,) = [text for text in shown if "changed while" in text]
    assert line.startswith(f"allocator materialize: {path}: changed while its checkpoint")
    assert "Traceback" not in "".join(shown)
    assert AllocationRecord.read(path) == new
    assert new.sha256 == {}
    assert Manifest.read(tmp_path / "out").allocation == old.digest


def test_a_search_that_leaves_the_pick_does_not_hinder_the_record(
    study, options, tmp_path, search_meanwhile
):
    path = study / "allocations/pick.json"
    made = api.materialize(study, path, tmp_path / "out", record=True, **options)
    assert len(search_meanwhile) == 1
    digest = file_digest(made.folder / made.manifest.file)
    assert AllocationRecord.read(path).sha256 == {"gguf": digest}


def test_a_shard_that_is_replaced_during_a_search(study, study_cache, tmp_path, monkeypatch):
    """It is refused, leaves nothing behind, and with the old shard the search goes on."""
    toml = study / "study.toml"
    checkpoint = tmp_path / "checkpoint"
    text = toml.read_text()
    shutil.copytree(re.search('checkpoint = "(.*)"', text)[1], checkpoint)
    toml.write_text(re.sub('checkpoint = ".*"', f'checkpoint = "{checkpoint}"', text))
    cache = tmp_path / "cache"
    shutil.copytree(study_cache / "profiles", cache / "profiles")  # but nothing encoded
    shard, old = checkpoint / "model.safetensors", tmp_path / "old"
    options = {"cache": cache, "threads": 1, "trials": 10}
    read, replaced = encodings.read_rows, []

    def reading(*args):
        if not replaced:
            shard.rename(old)
            data = bytearray(old.read_bytes())
            data[-2] ^= 1
            shard.write_bytes(data)
            replaced.append(True)
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(encodings, "read_rows", reading)
        with pytest.raises(CheckpointError, match=f"{shard}: changed or replaced") as caught:
            api.search(study, **options)
    assert "\n" not in str(caught.value)
    assert not any(np.fromfile(entry, np.uint8).any() for entry in (cache / "bank").iterdir())
    with pytest.raises(StudyError, match="checkpoint"):  # another study by now
        api.search(study, **options)
    os.replace(old, shard)
    assert api.search(study, **options).trials["COMPLETE"] > 1
    inventory = read_inventory(checkpoint)
    weights = GGUF.layout(inventory)
    importance = load_file(next((study / "allocations").glob("importance-*")))
    held = encodings.Encodings(cache / "bank", weights, importance)
    name = "layers.0.experts.down"
    there = [f.name for f in weights.groups[name].offered() if held.has(name, f.name, 0)]
    assert there
    for fmt in there:
        group = group_weights(weights, weights.groups[name])
        expected = encode(group, FORMATS[fmt], importance.get(name))
        experts = [e for e in range(8) if held.has(name, fmt, e)]
        np.testing.assert_array_equal(held.encoded(name, fmt, experts), expected[experts])


def test_a_search_that_mixes_formats_is_written_and_verified(
    make_checkpoint, write_study, tmp_path, monkeypatch
):
    """Of a safetensors study: what a trial scored in parts, its file computes."""
    quick = ("Q8_0", "Q6_K", "Q5_K", "IQ4_XS", "Q5_0", "Q4_0")  # to encode
    monkeypatch.setattr(
        "allocator.targets.layout.offered",
        lambda *a, **k: tuple(f for f in offered(*a, **k) if f.name in quick),
    )
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 1}
    path = make_checkpoint(tmp_path / "wide", "qwen3", dtype="bfloat16", **wide)
    study = write_study(tmp_path / "study", path)
    toml = study / "study.toml"
    toml.write_text(toml.read_text().replace('target = "gguf"', 'target = "safetensors"'))
    options = {"cache": tmp_path / "cache", "threads": 1}
    result = api.search(study, trials=5, **options)
    record = AllocationRecord.read(result.knapsack)
    in_parts = [text for _, text in record.decision.formats if "+" in text]
    assert in_parts
    made = api.materialize(study, result.knapsack, tmp_path / "made", **options)
    assert made.manifest.file_bytes == record.bytes["file"]
    found = api.verify(study, made.folder, **options)
    assert found.loss == pytest.approx(record.loss["search"], abs=1e-6)
    explained = api.explain(study, result.knapsack, **options)
    assert explained["value"].astype(str).str.contains(r"\*").sum() == len(in_parts)


def test_reproduce_notices_other_bytes(study, options, tmp_path):
    pick = study / "allocations/pick.json"
    data = unseal(pick.read_bytes())
    data["sha256"] = {"gguf": "0" * 64}
    pick.write_text(json.dumps(data))
    with pytest.raises(VerifyError, match="records 000000000000"):
        api.reproduce(pick, tmp_path / "out", **options)


def test_reproduce_without_a_recorded_sha256_is_no_success(study, options, tmp_path, monkeypatch):
    """Of any container: nothing is built that could not be compared."""
    pick = study / "allocations/pick.json"
    data = unseal(pick.read_bytes())
    monkeypatch.setattr(api, "materialize", None)
    for recorded, asked, named in (({}, (), "gguf"), ({"gguf": "0" * 64}, ["safetensors"], "safe")):
        pick.write_text(json.dumps(data | {"sha256": recorded}))
        with pytest.raises(
            VerifyError, match=f"no sha256 of {named}.*was compared; .*OUT --record"
        ):
            api.reproduce(pick, tmp_path / "out", containers=asked, **options)
    assert not (tmp_path / "out").exists()


def test_reproduce_refuses_another_checkpoint(study, options, tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "twin", "qwen3", seed=5, dtype="bfloat16")
    toml = study / "study.toml"
    text = toml.read_text()
    start = text.index('checkpoint = "')
    end = text.index("\n", start)
    toml.write_text(text[:start] + f'checkpoint = "{tmp_path / "twin"}"' + text[end:])
    before = state(study)
    with pytest.raises(CheckpointError, match="is for checkpoint"):
        api.reproduce(study / "allocations/pick.json", tmp_path / "out", **options)
    assert state(study) == before
    assert not (tmp_path / "out").exists()


def test_evaluate_puts_everything_in_one_table(study, options):
    table = api.evaluate(study, documents=3, domains=True, **options)
    assert (table["split"] == "report").all()
    assert table["bytes"].is_monotonic_increasing
    named = table.set_index("name")
    assert named.loc["original", "kl"] == pytest.approx(0, abs=1e-6)
    assert {"* pick", "* knapsack"} <= set(named.index)
    study_folder = StudyFolder(study, **options)
    held_out = {d.ids for d in study_folder.calibration.report}
    assert not held_out & {d.ids for s in study_folder.calibration.splits for d in s}
    record = AllocationRecord.read(study / "allocations/pick.json")
    assert named.loc["* pick", "bytes"] == record.bytes["encoded"]
    assert named.loc["* pick", "kl"] > 0
    (kept,) = HeldOut.read(study).splits  # what a report reads: the same figures, by document
    assert (kept.split, len(kept.tokens)) == ("report", 3)
    figures = {row.name: row for row in kept.rows}
    assert figures.keys() == {name.removeprefix("* ") for name in named.index}
    assert figures["pick"].allocation == record.digest
    for name, row in figures.items():
        known = named.loc[name if row.kind != "allocation" else f"* {name}"]
        assert (row.kl, row.perplexity, row.top1) == (
            known["kl"],
            known["perplexity"],
            known["top1"],
        )
        by_hand = np.average(row.kl_of, weights=kept.tokens)
        assert row.kl == pytest.approx(by_hand, rel=1e-4, abs=1e-6)


def test_baselines_stand_beside_an_allocation_by_their_bytes(study, options):
    pick = study / "allocations/pick.json"
    rows = {
        which: api.evaluate(study, [pick], documents=2, baselines=which, **options)
        for which in ("near", "all", "none")
    }
    assert set(rows["none"]["name"]) == {"original", "* pick"}
    nbytes = AllocationRecord.read(pick).bytes["encoded"]
    others = rows["all"][~rows["all"]["name"].isin(["original", "* pick"])]
    near = set(others[(others["bytes"] / nbytes).between(0.9, 1.1)]["name"])
    below = others[others["bytes"] <= nbytes]["bytes"].max()
    above = others[others["bytes"] >= nbytes]["bytes"].min()
    shown = rows["near"].set_index("name")["bytes"]
    assert near <= set(shown.index)
    assert {below, above} - {float("nan")} <= set(shown)
    assert len(shown) < len(rows["all"])
    with pytest.raises(StudyError, match="'some': needed one of near, all, none"):
        api.evaluate(study, [pick], baselines="some", **options)


def test_a_trial_of_a_search_that_died_is_in_no_table(study, options):
    opened = api.search(study, **options).study
    before = len(api.trials_table(opened))
    attributes = opened.trials[0].user_attrs
    trial = opened.ask()  # killed between its last attribute and its end
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    result = api.search(study, trials=9, **options)
    assert any("proposing them again" in line for line in result.messages)
    assert len(result.study.trials) == 10
    assert len(api.trials_table(result.study)) == before + 1


# -- what cannot work is refused before anything is measured


@pytest.fixture
def never(monkeypatch):
    """No forward pass may begin."""

    def begun(*_, **__):
        raise AssertionError("a forward pass began")

    for name in ("_losses", "ensure_reference", "candidate_logits"):
        monkeypatch.setattr(Scorer, name, begun)
    monkeypatch.setattr(Profiler, "statistics", property(begun))


@pytest.fixture
def with_tokenizer(study):
    """Gives a copy of the study's checkpoint the tokenizer of the reference model."""

    def give(n_vocab=512, **changes):
        toml = study / "study.toml"
        source = re.search('checkpoint = "(.*)"', toml.read_text())[1]
        shutil.copytree(source, study / "model")
        reference = Path(__file__).parents[1] / "studies/reference/model"
        shutil.copy(reference / "tokenizer_config.json", study / "model")
        raw = json.loads((reference / "tokenizer.json").read_text())
        known = raw["model"]
        known["vocab"] = {t: i for t, i in known["vocab"].items() if i < n_vocab}
        pairs = [m.split(" ") if isinstance(m, str) else m for m in known["merges"]]
        known["merges"] = [m for m in pairs if "".join(m) in known["vocab"]]
        (study / "model/tokenizer.json").write_text(json.dumps(raw))
        config = json.loads((study / "model/config.json").read_text()) | changes
        (study / "model/config.json").write_text(json.dumps(config))
        text = toml.read_text().replace(source, "model").replace('tokenizer = "none"\n', "")
        toml.write_text(text)
        return study

    return give


def test_tasks_without_a_tokenizer_are_refused_first(study, options, never):
    with pytest.raises(CalibrationError, match=r"no tokenizer\.json, which --tasks needs"):
        api.evaluate(study, documents=2, tasks=True, **options)


@pytest.mark.parametrize(
    ("lengths", "changes", "match"),
    [
        ([32] * 8, {}, "has 32 ids, needed 97"),
        ([120] * 2, {}, "different continuations, needed 4"),
        ([120] * 8, {"max_position_embeddings": 40}, "tokens, the window 40"),
    ],
    ids=["documents too short", "too few", "window too short"],
)
def test_tasks_that_do_not_fit_are_refused_first(
    with_tokenizer, options, never, make_documents, lengths, changes, match
):
    study = with_tokenizer(**changes)
    lines = [json.dumps({"ids": d.ids}) for d in make_documents(lengths, seed=3)]
    (study / "report.jsonl").write_text("\n".join(lines))
    plain = study / "plain.json"  # names no checkpoint
    decision = json.loads((study / "allocations/pick.json").read_text())["allocation"]
    plain.write_text(json.dumps(decision))
    with pytest.raises(CalibrationError, match=match):
        api.evaluate(study, [plain], documents="all", tasks=True, **options)


def test_a_broken_tokenizer_is_refused_first(with_tokenizer, options, never):
    study = with_tokenizer()
    (study / "model/tokenizer.json").write_text("{}")
    with pytest.raises(AllocatorError, match="tokenizer") as said:
        api.evaluate(study, documents=2, tasks=True, **options)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("damage", ["no json", "another layout", "missing"])
def test_a_wrong_allocation_is_refused_first(study, options, never, damage):
    """The second of two, whose first is good."""
    pick, odd = study / "allocations/pick.json", study / "odd.json"
    decision = json.loads(pick.read_text())["allocation"]
    if damage == "no json":
        odd.write_text("{")
    elif damage == "another layout":
        del decision["formats"]["embedding"]
        odd.write_text(json.dumps(decision))
    with pytest.raises(SpaceError):
        api.evaluate(study, [pick, odd], documents=2, **options)


def test_a_tokenizer_of_another_checkpoint_is_refused_first(with_tokenizer, options, never):
    study = with_tokenizer(n_vocab=600)
    with pytest.raises(CheckpointError, match="this tokenizer belongs to another checkpoint"):
        api.evaluate(study, documents=2, **options)


def test_verify_refuses_first(study, options, never, tmp_path, monkeypatch):
    pick = study / "allocations/pick.json"
    importance = AllocationRecord.read(pick).importance
    monkeypatch.setattr(StudyEncodings, "of", lambda *_: pytest.fail("encoded weights"))
    digest = StudyFolder(study, **options).inventory.digest
    named = dict.fromkeys(("model.gguf", "allocation.json"), "0")
    manifest = Manifest("gguf", "a", digest, importance, "model.gguf", 1, 1, 0, named)
    (tmp_path / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    for told, match in (
        ({"tolerance": -1.0}, "0 or more"),
        ({"documents": 99}, "99 documents: needed 1..8"),
    ):
        with pytest.raises(AllocatorError, match=match):
            api.verify(study, tmp_path, **told, **options)
    (study / "allocations/odd.json").write_text("{")
    with pytest.raises(SpaceError, match=r"odd\.json: no allocation file"):
        api.verify(study, tmp_path, **options)


def test_rows_are_given_as_they_are_measured(study, options, monkeypatch):
    whole = api.evaluate(study, documents=2, **options)
    plain, calls = Scorer.score, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise StudyError("no more")
        return plain(*args)

    monkeypatch.setattr(Scorer, "score", failing)
    tables = []
    with pytest.raises(StudyError, match="no more"):
        api.evaluate(study, documents=2, on_table=tables.append, **options)
    assert [len(t) for t in tables] == [1, 2, 3, 4]
    kept = whole[whole["name"].isin(tables[-1]["name"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(tables[-1], kept)


def test_files_of_one_name_have_rows_of_their_own(study, options):
    other = study / "other/pick.json"
    other.parent.mkdir()
    shutil.copy(study / "allocations/knapsack.json", other)
    table = api.evaluate(study, [study / "allocations/pick.json", other], documents=2, **options)
    chosen = table[table["name"].str.startswith("*")].set_index("name")["bytes"]
    for path in (study / "allocations/pick.json", other):
        assert chosen[f"* {path}"] == AllocationRecord.read(path).bytes["encoded"]


def test_tasks_add_figures_row_by_row(with_tokenizer, options, make_documents, monkeypatch):
    """A failure leaves the rows before it; lm-eval's own figures are held in tests/evaluate."""
    study = with_tokenizer(max_position_embeddings=512)
    documents = [json.dumps({"ids": d.ids}) for d in make_documents([100] * 8, seed=3)]
    (study / "report.jsonl").write_text("\n".join(documents))
    plain = study / "plain.json"
    decision = json.loads((study / "allocations/pick.json").read_text())["allocation"]
    plain.write_text(json.dumps(decision))
    calls, tables = [], []

    def three(model, tokenizer, folder, names):
        calls.append(1)
        if len(calls) == 3:
            raise VerifyError("no more")
        figures = {"acc": 0.5, "token_perplexity": float(len(calls))}
        return {name: figures for name in names}

    at = "allocator.evaluation.lm_eval_tasks"
    monkeypatch.setattr(f"{at}.run_tasks", three)
    monkeypatch.setattr("allocator.evaluation.held_out.check_named", lambda names: None)
    monkeypatch.setattr(f"{at}.load_named", lambda names: names)
    monkeypatch.setattr(f"{at}.run_named", lambda _m, _t, names, limit: {names[0]: limit / 3})
    with pytest.raises(VerifyError, match="no more"):
        api.evaluate(
            study, [plain], documents="all", baselines="all", on_table=tables.append,
            tasks=["report_perplexity", "mine"], limit=2, **options,
        )  # fmt: skip
    assert tables[-1]["mine"].dropna().tolist() == [0.6667, 0.6667]
    assert "acc" not in tables[-1]
    figures = tables[-1]["lm_eval_perplexity"].dropna().tolist()
    assert sorted(figures) == [1.0, 2.0]
    assert len(tables[-1]) == len(tables) - 2 > 20
    assert tables[-1]["kl"].notna().all()
