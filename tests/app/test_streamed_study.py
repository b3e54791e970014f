"""A study with `[streamed]`: every verb, with no model in memory."""

import json
import shutil
from functools import partial

import msgspec
import pytest
import torch

from allocator import api
from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import CheckpointError, StudyError, VerifyError
from allocator.finishing import finish
from allocator.finishing.recipe import CODES, PARTS
from allocator.scoring import swap_model as model
from allocator.study.trials import RESULT, allocation_of

torch.set_num_threads(1)


def refuse(*_):
    raise AssertionError("a model in memory")


@pytest.fixture(scope="module", params=["gguf", "safetensors"])
def searched(request, checkpoints, write_study, tmp_path_factory):
    """A finished streamed study, its result and options."""
    folder = write_study(tmp_path_factory.mktemp("streamed") / "study", checkpoints["qwen3"])
    toml = folder / "study.toml"
    text = toml.read_text().replace('target = "gguf"', f'target = "{request.param}"')
    toml.write_text(text + "\n[streamed]\ncandidates = 3\nrows = 0.5\n")
    options = {"cache": tmp_path_factory.mktemp("cache"), "threads": 1}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model.SwapModel, "__init__", refuse)
        return folder, api.search(folder, **options), options


@pytest.fixture
def study(searched, tmp_path, monkeypatch):
    """A copy of it, and its options."""
    folder, _, options = searched
    monkeypatch.setattr(model.SwapModel, "__init__", refuse)
    return shutil.copytree(folder, tmp_path / "study"), options


def in_memory(folder, options):
    """The same study with the model in memory, and the streamed one's importance."""
    toml = folder / "study.toml"
    toml.write_text(toml.read_text().partition("\n[streamed]")[0])
    return StudyFolder(folder, **options)


def test_trials_have_the_loss_of_the_model_in_memory(searched, tmp_path):
    folder, result, options = searched
    study_folder = in_memory(shutil.copytree(folder, tmp_path / "study"), options)
    importance = AllocationRecord.read(result.pick).importance
    scorer = study_folder.scorers.on(
        study_folder.scorers.trials.documents,
        model=study_folder.scorers.model_with(study_folder.encodings.of(importance)),
    )
    trials = result.study.get_trials()
    assert len(trials) >= 8
    whole = [t for t in trials if t.state.name == "COMPLETE"]
    assert len(whole) > 2
    for trial in whole:
        again = scorer.summary(scorer.score(allocation_of(trial)))
        known = trial.user_attrs[RESULT]
        assert known["loss"] == pytest.approx(again["loss"], abs=1e-6)
        assert known["perplexity"] == pytest.approx(again["perplexity"], rel=1e-6)


def test_what_is_written_is_verified_layer_by_layer(study, tmp_path):
    folder, options = study
    pick = folder / "allocations" / "pick.json"
    target = AllocationRecord.read(pick).decision.target
    for container in dict.fromkeys((target, "safetensors")):
        written = api.materialize(
            folder, pick, tmp_path / container, container=container, **options
        )
        found = api.verify(folder, written.folder, tolerance=0.1, **options)
        known = AllocationRecord.read(pick).loss["search"]
        assert found.loss == pytest.approx(known, abs=1e-6)
        off = 0.1 if container == "gguf" else 1e-5
        assert found.runtime_loss == pytest.approx(known, abs=off)
        assert found.n_tensors > 10


def test_a_file_whose_weights_are_others_computes_another_loss(study, tmp_path, monkeypatch):
    from allocator.export.stored import StoredWeights

    folder, options = study
    pick = folder / "allocations" / "pick.json"
    written = api.materialize(folder, pick, tmp_path / "out", container="safetensors", **options)
    plain = StoredWeights.decoded
    monkeypatch.setattr(StoredWeights, "decoded", lambda *a: plain(*a) * 1.05)
    with pytest.raises(VerifyError, match="its runtime is off"):
        api.verify(folder, written.folder, **options)


def test_held_out_figures_and_estimates(study):
    folder, options = study
    table = api.evaluate(folder, documents=2, **options)
    original = table[table["name"] == "original"].iloc[0]
    assert original["kl"] == pytest.approx(0, abs=1e-6)
    assert (table[table["name"] != "original"]["kl"] > 1e-4).all()
    plan = api.estimate(folder, **options)
    assert plan.profile_ready
    assert 0 < plan.seconds_per_full_trial < plan.total_seconds
    with pytest.raises(StudyError, match="leave --tasks out"):
        api.evaluate(folder, documents=2, tasks=True, **options)


def test_another_number_of_candidates_is_another_study(study):
    folder, options = study
    toml = folder / "study.toml"
    toml.write_text(toml.read_text().replace("candidates = 3", "candidates = 2"))
    with pytest.raises(StudyError, match="candidates = 3, now it is 2"):
        api.search(folder, **options)


@pytest.mark.parametrize(
    "wrong", ["candidates = 0", "candidates = 1000000", "rows = 0.0", "rows = 1.5"]
)
def test_wrong_settings_are_refused(fresh_study, tmp_path, wrong):
    folder = shutil.copytree(fresh_study, tmp_path / "study")
    with (folder / "study.toml").open("a") as file:
        file.write(f"\n[streamed]\n{wrong}\n")
    with pytest.raises(StudyError, match=r"\[streamed\] (candidates|rows) = .*: needed"):
        StudyFolder(folder)


def test_a_model_that_does_not_fit_in_memory_names_the_way_out(
    checkpoints, monkeypatch, fresh_study, study_cache
):
    inventory = read_inventory(checkpoints["qwen3"])
    needed = 4 * sum(t.total_bytes // 4 for t in inventory.tensors.values())
    monkeypatch.setattr(model, "free_memory", lambda: needed - 1)
    with pytest.raises(CheckpointError, match=r"\[streamed\]"):
        _ = StudyFolder(fresh_study, cache=study_cache).scorers.model
    assert model.free_memory() < needed


def test_a_missing_tensor_is_said_before_the_pass(
    checkpoints, change_checkpoint, write_study, tmp_path
):
    path = change_checkpoint(checkpoints["qwen3"])
    index = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**index, "attention_bias": True}))
    folder = write_study(tmp_path / "study", path)
    with (folder / "study.toml").open("a") as file:
        file.write("\n[streamed]\n")
    with pytest.raises(CheckpointError, match=r"no model\.layers\.0\.self_attn"):
        api.profile(folder, cache=tmp_path / "cache", threads=1)


def _narrow_experts(tensors):
    for name in list(tensors):
        if ".experts." in name:
            axis = 1 if "down_proj" in name else 0
            tensors[name] = tensors[name].narrow(axis, 0, tensors[name].shape[axis] // 2)


def _one_nan(tensors):
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 5] = float("nan")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("edit", "said"),
    [(_narrow_experts, r"experts\.\w+ has shape"), (_one_nan, r"experts\.2\.up_proj.* a NaN")],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    checkpoints, change_checkpoint, write_study, tmp_path, edit, said, streamed
):
    path = change_checkpoint(checkpoints["qwen3"], edit)
    folder = write_study(tmp_path / "study", path)
    if streamed:
        with (folder / "study.toml").open("a") as file:
            file.write("\n[streamed]\n")
    with pytest.raises(CheckpointError, match=said):
        api.profile(folder, cache=tmp_path / "cache", threads=1)


def test_weights_are_finished_layer_by_layer(study, tmp_path, monkeypatch):
    folder, options = study
    pick = folder / "allocations" / "pick.json"
    result = api.finish(folder, pick, tokens=256, out="low", **options)
    streamed = api.finish(folder, "Q4_0", tokens=256, **options)
    assert result.recipe == streamed.recipe
    assert result.record == folder / "allocations/low.json"
    assert (streamed.recipe.streamed, streamed.recipe.parts) == (True, PARTS)
    codes = api.finish(folder, "Q4_0", tokens=256, tuning=False, out="codes", **options)
    assert codes.recipe.parts == (CODES,)
    assert streamed.after["selection"] < codes.after["selection"]
    assert streamed.after["selection"] < 0.95 * streamed.before["selection"]
    written = api.materialize(folder, streamed.record, tmp_path / "out", **options)
    found = api.verify(folder, written.folder, tolerance=10.0, **options)
    assert found.loss == pytest.approx(streamed.after["search"], abs=1e-6)

    shutil.rmtree(options["cache"] / "finish")
    by_expert = partial(finish.second_moments_streamed, memory_bytes=1)
    monkeypatch.setattr(finish, "second_moments_streamed", by_expert)
    again = api.finish(folder, "Q4_0", tokens=256, out="again", **options)
    assert again.weights == streamed.weights

    path = streamed.record
    noted = msgspec.structs.replace(AllocationRecord.read(path), sha256={"gguf": "0" * 64})
    path.write_bytes(noted.to_bytes())
    in_memory(folder, options)
    streamed.artifact.unlink()
    shutil.rmtree(options["cache"] / "finish")
    with pytest.raises(StudyError, match="layer by layer"):
        api.reproduce(path, tmp_path / "again", **options)
