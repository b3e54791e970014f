"""Every verb of the library on a tiny study: what it returns, writes, and leaves alone."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from optuna.storages import InMemoryStorage

from allocator import api, estimate
from allocator.allocation import Allocation
from allocator.checked import unseal
from allocator.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    SpaceError,
    StudyError,
    VerifyError,
)
from allocator.formats import FORMATS, offered
from allocator.launch import N_FINALISTS, finalists_of
from allocator.materialize.checkpoint import file_digest
from allocator.records import AllocationRecord
from allocator.samplers.auto import ROUND
from allocator.search_space import SearchSpace, bind
from allocator.trials import allocation_of, complete_trials
from allocator.workspace import Workspace

torch.set_num_threads(1)


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
    workspace = Workspace(study, **options)
    limit = workspace.budget()
    trials = result.study.get_trials()
    assert len(trials) == 8
    assert sum(result.trials.values()) == 8
    for trial in trials:
        size = allocation_of(trial).nbytes(workspace.layout)
        assert size.encoded <= limit.nbytes
        assert trial.constraints["budget"] == size.encoded - limit.nbytes
    done = complete_trials(result.study)
    best = done[0]
    losses = workspace.scorer.score(allocation_of(best))
    assert np.mean(losses.kl) == pytest.approx(best.values[0], rel=1e-6)
    record = AllocationRecord.read(result.pick)
    assert record.decision.digest in {allocation_of(t).digest for t in done}
    assert record.checkpoint == workspace.inventory.digest
    assert record.bytes["budget"] == limit.nbytes
    assert record.bytes["encoded"] == record.decision.nbytes(workspace.layout).encoded
    assert AllocationRecord.read(result.knapsack).kind == "knapsack"
    selection = {
        a.digest: np.mean(workspace.selection_scorer.score(a).kl)
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
    workspace = Workspace(fresh, **options)
    assert found.floor == workspace.unranked_space.smallest.nbytes(workspace.layout).encoded


def test_estimate_prices_every_pass(fresh, finished_study, options, tmp_path, monkeypatch):
    """At a second per token, and nothing for encoding: tokens by hand, changes from the profile."""
    for name in ("_ENCODE_WEIGHTS_PER_SECOND", "_PRICE_WEIGHTS_PER_SECOND"):
        monkeypatch.setattr(estimate, name, math.inf)
    monkeypatch.setattr(estimate, "_TABLES_SECONDS", 0.0)
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

    cold = api.estimate(fresh, **(options | {"cache": tmp_path / "cold"}))
    folder = Workspace(finished_study, **options).profiler.folder
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
    workspace = Workspace(fresh, **options)
    size = workspace.unranked_space.smallest.nbytes(workspace.layout)
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


def test_front_without_a_study_is_refused(fresh, options):
    before = state(fresh)
    with pytest.raises(StudyError, match="no study yet"):
        api.front(fresh, **options)
    assert state(fresh) == before


def test_finalists_are_different_allocations(formula):
    search = formula.search(InMemoryStorage(), "random", rungs=())
    search.run(n_trials=6)
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
    workspace = Workspace(study, **options)
    decision, layout = AllocationRecord.read(pick).decision, workspace.layout
    assert len(table) == len(layout.groups) + 1  # and the retained count
    params = workspace.space.params(decision)
    whole = workspace.space.complete(params)
    predicted = workspace.surrogate.predict(whole)
    jumps = predicted - workspace.surrogate.losses(whole).sum()
    assert jumps > 0
    assert table["predicted_loss"].sum() == pytest.approx(predicted - jumps / 2, rel=1e-9)
    steps = 0
    for name, row in table.iterrows():
        for side in ("up", "down"):
            if row[side] is None or row[side] != row[side]:
                continue
            value = int(row[side]) if name.startswith("experts") else row[side]
            moved = workspace.space.allocation({**whole, name: value})
            nbytes = moved.nbytes(layout).encoded - decision.nbytes(layout).encoded
            assert row[f"{side}_bytes"] == nbytes
            loss = workspace.surrogate.predict({**whole, name: value}) - predicted
            assert row[f"{side}_loss"] == pytest.approx(loss, abs=1e-9)
            assert (nbytes >= 0) if side == "up" else (nbytes <= 0)
            steps += 1
    assert steps > len(table) / 2


def test_explain_steps_over_mixes_by_bytes(layouts, monkeypatch):
    """Neighbours at the layer's own count; a mix that stores nothing else there is no step."""
    layout = layouts["safetensors"]
    space = bind(SearchSpace(schema=1), layout, None)
    group = "layers.1.experts.down"
    decision = space.allocation(
        space.params(space.smallest) | {"experts.1": 10, f"format.{group}": "IQ2_XXS*8+IQ1_S"}
    )
    loss = SimpleNamespace(
        around=lambda params: lambda name, value: 0.0, predict=lambda params: 0.0
    )
    spec = SimpleNamespace(budget=SimpleNamespace(device=None))
    stub = SimpleNamespace(
        space=space, surrogate=loss, read_allocation=lambda path: decision, spec=spec
    )
    monkeypatch.setattr(api, "Workspace", lambda folder: stub)
    table = api.explain("study", "allocation").set_index("decision")
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
    assert found["loss"] == pytest.approx(record.loss["search"], rel=1e-6)
    assert found["bytes"]["encoded"] == record.bytes["encoded"]
    plain = study / "plain.json"
    plain.write_text(json.dumps(record.allocation))
    assert api.score(study, plain, **options)["loss"] == found["loss"]


def test_score_of_a_type_file_is_that_of_its_allocation(study, options):
    workspace = Workspace(study, **options)
    path = study / "types.txt"
    path.write_text("ffn_down_exps=q5_0\nattn_q=q4_0\n")
    with pytest.raises(SpaceError, match="--base"):
        api.score(study, path, **options)
    found = api.score(study, path, base="Q8_0", **options)
    formats = {
        g: "Q5_0" if g.endswith("experts.down") else "Q4_0" if g.endswith("attention.q") else "Q8_0"
        for g in workspace.layout.groups
    }
    expected = Allocation.of(
        target="gguf", retained=dict.fromkeys(workspace.layout.layers, tuple(range(8))),
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


def test_a_record_with_other_importance_is_not_scored_with_ours(study, options):
    pick = study / "allocations/pick.json"
    data = unseal(pick.read_bytes())
    pick.write_text(json.dumps(data | {"importance": "0" * 64}))
    for verb in (api.score, api.explain):
        with pytest.raises(SpaceError, match="encoded with importance 000000000000"):
            verb(study, pick, **options)
    with pytest.raises(SpaceError, match="encoded with importance"):
        api.evaluate(study, [pick], documents=2, **options)
    pick.write_text(json.dumps(data | {"checkpoint": "0" * 64}))
    with pytest.raises(CheckpointError, match="is for checkpoint 000000000000"):
        api.score(study, pick, **options)


def test_a_record_cannot_name_places(study, options, tmp_path):
    pick = study / "allocations/pick.json"
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


def test_materialize_verify_reproduce(study, options, tmp_path):
    pick = study / "allocations/pick.json"
    made = {
        c: api.materialize(study, pick, tmp_path / c, container=c, record=True, **options)
        for c in ("gguf", "safetensors")
    }
    recorded = AllocationRecord.read(pick).sha256
    for container, done in made.items():
        assert recorded[container] == file_digest(done.folder / done.manifest.file)
        found = api.verify(study, done.folder, documents=3, **options)
        assert found.file_bytes == (done.folder / done.manifest.file).stat().st_size
    whole = api.verify(study, made["safetensors"].folder, **options)
    assert whole.loss == pytest.approx(AllocationRecord.read(pick).loss["search"], abs=1e-6)
    for name in ("one", "two"):
        again = api.reproduce(pick, tmp_path / name, **options)
        assert {w.manifest.container: w.manifest.sha256[w.manifest.file] for w in again} == recorded
    elsewhere = {**options, "cache": tmp_path / "empty_cache"}
    again = api.reproduce(pick, tmp_path / "three", **elsewhere)  # nothing but the committed files
    assert [w.manifest for w in again] == [made[w.manifest.container].manifest for w in again]


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
    workspace = Workspace(study, **options)
    held_out = {d.ids for d in workspace.report}
    assert not held_out & {d.ids for s in workspace.splits for d in s}
    record = AllocationRecord.read(study / "allocations/pick.json")
    assert named.loc["* pick", "bytes"] == record.bytes["encoded"]
    assert named.loc["* pick", "kl"] > 0


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
