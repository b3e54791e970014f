"""A study whose budget is a whole device: every verb, on a tiny model, in memory and streamed."""

import json
import shutil

import pytest
import torch

from allocator import api
from allocator.app.study_file import DeviceBudgetSpec
from allocator.app.study_folder import StudyFolder
from allocator.cli import main
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import BudgetError, StudyError
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.files.checksums import unseal
from allocator.study.trials import RESULT, allocation_of

torch.set_num_threads(1)
SPACE = """schema = 1
experts_used = [1, 2]
kv_format = ["f16", "q8_0", "q4_0"]
micro_batch = [64, 16]
"""
DEVICE = """[budget.device]
memory = {memory}
context = 512
sequences = 4
reserve = "1MiB"
bandwidth = "1GB"
"""


@pytest.fixture(scope="module")
def made(make_checkpoint, write_study, tmp_path_factory):
    """A study folder under a device's budget, never launched, and options."""
    root = tmp_path_factory.mktemp("device")
    checkpoint = make_checkpoint(
        root / "checkpoint", "qwen3", head_dim=32, max_position_embeddings=512
    )
    folder = write_study(root / "study", checkpoint)
    (folder / "space.toml").write_text(SPACE)
    toml = folder / "study.toml"
    head, _, tail = toml.read_text().partition("[budget]\n")
    tail = tail.partition("\n")[2]
    toml.write_text(head + DEVICE.format(memory=1 << 40) + tail)
    options = {"cache": root / "cache", "threads": 1}
    study_folder = StudyFolder(folder, **options)
    workload = study_folder.budget().workload
    low, high = (
        a.device_memory(study_folder.layout, workload).total
        for a in (study_folder.unranked_space.smallest, study_folder.unranked_space.largest)
    )
    toml.write_text(head + DEVICE.format(memory=low + (high - low) // 3) + tail)
    return folder, options


@pytest.fixture(scope="module")
def searched(made, tmp_path_factory):
    folder, options = made
    study = shutil.copytree(folder, tmp_path_factory.mktemp("searched") / "study")
    return study, api.search(study, **options), options


def test_what_trials_say_of_the_device(searched):
    folder, result, options = searched
    study_folder = StudyFolder(folder, **options)
    budget = study_folder.budget()
    trials = result.study.get_trials()
    assert len(trials) == 8
    for trial in trials:
        allocation, found = allocation_of(trial), trial.user_attrs[RESULT]
        memory = allocation.device_memory(study_folder.layout, budget.workload)
        assert sum(found["memory"].values()) == memory.total <= budget.nbytes
        assert found["token_bytes"] == allocation.token_bytes(study_folder.layout, 512)
        assert found["tokens_per_second"] == pytest.approx(1e9 / found["token_bytes"])
        if trial.values:
            assert trial.values[1] == memory.total
    record = AllocationRecord.read(result.pick)
    assert record.bytes["device_total"] <= record.bytes["budget"] == budget.nbytes
    assert record.bytes["device_kv_cache"] > 0


def test_the_front_is_in_three_axes(searched):
    folder, result, options = searched
    table = api.front(folder, **options)
    columns = ["memory_bytes", "token_bytes", "tokens_per_second", "experts_used", "kv_format"]
    assert set(columns) <= set(table)
    points = table[["memory_bytes", "loss", "token_bytes"]].to_numpy()
    done = [t for t in result.study.get_trials() if t.values]
    every = [(t.values[1], t.values[0], t.user_attrs[RESULT]["token_bytes"]) for t in done]
    for point in every:
        beaten = any(all(a <= b for a, b in zip(p, point, strict=True)) for p in points)
        assert beaten or list(point) in points.tolist()
    plain = json.loads((folder / "front.json").read_text())
    assert plain["front"][0]["micro_batch"] in (64, 16)


def test_settings_are_priced_and_explained(searched):
    folder, result, options = searched
    study_folder = StudyFolder(folder, **options)
    settings = study_folder.surrogate.setting_losses
    assert settings["experts_used"][2] == settings["kv_format"]["f16"] == 0
    assert settings["experts_used"][1] > 0.01
    assert 0 < settings["kv_format"]["q8_0"] < settings["kv_format"]["q4_0"]
    explained = api.explain(folder, result.pick, **options).set_index("decision")
    assert {"experts_used", "kv_format", "micro_batch"} <= set(explained.index)
    saved = explained.loc["micro_batch", "down_bytes"]
    assert saved < 0 or explained.loc["micro_batch", "value"] == 16


def test_it_is_written_with_what_llama_cpp_must_be_told(searched, tmp_path):
    folder, result, options = searched
    record = unseal(result.pick.read_bytes())
    record["allocation"] |= {"kv_format": "q8_0", "micro_batch": 16, "experts_used": 1}
    changed = AllocationRecord.read(result.pick).decision.from_json(record["allocation"])
    path = folder / "allocations" / "told.json"
    path.write_text(json.dumps(record | {"digest": changed.digest, "sha256": {}, "loss": {}}))
    written = api.materialize(folder, path, tmp_path / "out", **options)
    told = (tmp_path / "out" / "llama-cpp-options.txt").read_text()
    assert told == (
        "--cache-type-k q8_0 --cache-type-v q8_0 --flash-attn on --ubatch-size 16 "
        "--ctx-size 2048 --parallel 4 --no-repack\n"
    )
    found = api.verify(folder, tmp_path / "out", tolerance=1.0, **options)
    assert found.loss > 0.01
    study_folder = StudyFolder(folder, **options)
    memory = changed.device_memory(study_folder.layout, study_folder.budget().workload)
    with LlamaCpp(
        written.folder / written.manifest.file, context=512, sequences=4, kv_format="q8_0",
        micro_batch=16, repack=False, exact=False,
    ) as llama:  # fmt: skip
        held = llama.buffers()
    assert memory.kv_cache == held.kv_cache
    assert abs(memory.weights - held.weights) < 32
    logits = 4 * 4 * 512
    assert memory.compute == held.compute + logits
    path.unlink()


def test_stopped_and_resumed_is_undisturbed(made, searched, tmp_path):
    folder, options = made
    study = shutil.copytree(folder, tmp_path / "study")
    api.search(study, trials=3, **options)
    again = api.search(study, trials=8, **options).study.get_trials()
    for one, other in zip(again, searched[1].study.get_trials(), strict=True):
        assert allocation_of(one) == allocation_of(other)
        assert one.values == other.values


@pytest.mark.parametrize("sampler", ["auto", "tpe", "evolution", "nsga2"])
def test_a_limit_on_speed_is_held_by_every_sampler(made, searched, tmp_path, sampler):
    folder, options = made
    study = shutil.copytree(folder, tmp_path / "study")
    reads = [t.user_attrs[RESULT]["token_bytes"] for t in searched[1].study.get_trials()]
    limit = int(0.9 * min(reads))
    device = DeviceBudgetSpec(min_tokens_per_second=1e9 / limit)
    found = api.search(study, device=device, sampler=sampler, trials=6, **options)
    scored = [t for t in found.study.get_trials() if RESULT in t.user_attrs]
    assert len(scored) >= 6
    for trial in scored:
        assert trial.user_attrs[RESULT]["token_bytes"] <= limit
    with pytest.raises(StudyError, match="launched with bytes read per token = "):
        api.search(study, sampler=sampler, trials=7, **options)


def test_another_bandwidth_is_another_study(searched):
    """Or one front would show tokens per second of two devices."""
    folder, _, options = searched
    with pytest.raises(StudyError, match="launched with bandwidth = 1000000000, now it is 2000"):
        api.search(folder, device=DeviceBudgetSpec(bandwidth="2GB"), trials=9, **options)


def test_settings_are_explained_in_order_where_no_device_counts_them(searched, tmp_path):
    folder, result, options = searched
    study = shutil.copytree(folder, tmp_path / "study")
    toml = study / "study.toml"
    head, _, tail = toml.read_text().partition("[budget.device]")
    tail = tail[tail.index("[calibration]") :]
    toml.write_text(f'{head}[budget]\nfile = "1GiB"\n{tail}')
    record = unseal(result.pick.read_bytes())
    record["allocation"] |= {"kv_format": "q8_0", "micro_batch": 64, "experts_used": 1}
    plain = study / "plain.json"
    plain.write_text(json.dumps(record["allocation"]))
    explained = api.explain(study, plain, **options).set_index("decision")
    steps = explained.loc[["kv_format", "experts_used"], ["up", "down"]].to_numpy().tolist()
    assert steps == [["f16", "q4_0"], [2, None]]
    assert explained.loc["micro_batch", "down"] == 16


@pytest.mark.parametrize("sampler", ["auto", "tpe", "evolution", "nsga2"])
def test_a_limit_beside_the_device_is_held_by_every_sampler(made, searched, tmp_path, sampler):
    folder, options = made
    study = shutil.copytree(folder, tmp_path / "study")
    done = searched[1].study.get_trials()
    limit = int(0.9 * min(t.user_attrs[RESULT]["bytes"]["encoded"] for t in done))
    toml = study / "study.toml"
    told = f"[budget]\nweights = {limit}\n[budget.device]"
    toml.write_text(toml.read_text().replace("[budget.device]", told))
    found = api.search(study, sampler=sampler, trials=6, **options)
    study_folder = StudyFolder(study, **options)
    device = study_folder.budget()
    scored = [t for t in found.study.get_trials() if RESULT in t.user_attrs]
    assert len(scored) >= 6
    for trial in scored:
        size = allocation_of(trial).nbytes(study_folder.layout)
        over = sum(trial.user_attrs[RESULT]["memory"].values()) - device.nbytes
        assert trial.constraints == {"budget": over, "beside": size.encoded - limit}
        assert max(trial.constraints.values()) <= 0
    assert AllocationRecord.read(found.pick).bytes["budget_weights"] == limit
    with pytest.raises(StudyError, match="launched with budget = "):
        api.search(
            study, device=DeviceBudgetSpec(memory="1TiB"), sampler=sampler, trials=7, **options
        )


def test_streamed_prices_settings_alike(made, searched, tmp_path):
    folder, options = made
    study = shutil.copytree(folder, tmp_path / "study")
    with (study / "study.toml").open("a") as file:
        file.write("\n[streamed]\ncandidates = 3\nrows = 1.0\n")
    streamed = StudyFolder(study, **options)
    ours = streamed.profiler.setting_losses(streamed.space)
    theirs = StudyFolder(folder, **options).surrogate.setting_losses
    for name, losses in theirs.items():
        assert ours[name] == pytest.approx(losses, abs=1e-6)


def test_the_estimate_is_itemised(made):
    folder, options = made
    found = api.estimate(folder, device=DeviceBudgetSpec(memory="1GiB", sequences=1), **options)
    smallest, largest = found.memory
    assert found.budget.nbytes == 1 << 30
    assert smallest.total == found.floor < found.ceiling == largest.total
    assert smallest.reserve == largest.reserve == 1 << 20
    assert smallest.kv_cache < largest.kv_cache
    with pytest.raises(BudgetError, match="context 513: the model has 512 positions"):
        api.estimate(folder, device=DeviceBudgetSpec(context=513), **options)


def test_both_limits_are_shown(made, capsys):
    folder, options = made
    flags = ["--cache", str(options["cache"]), "--threads", "1", "--dry-run", "--quiet"]
    assert main(["search", str(folder), "--device-memory", "1GiB", "--budget", "9MiB", *flags]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    shown = [line for line in lines if line[0] in ("budget", "floor", "ceiling")]
    study_folder = StudyFolder(folder, **options)
    layout, space = study_folder.layout, study_folder.unranked_space
    assert [line[0] for line in shown] == ["budget", "floor", "ceiling"] * 2
    assert shown[0][-1].strip() == "1,073,741,824 B (1.00 GiB), bounds the device"
    assert shown[3][-1].strip() == "9,437,184 B (9.00 MiB), bounds the file"
    for line, end in zip(shown[4:], (space.smallest, space.largest), strict=True):
        assert line[-1].strip().startswith(f"{end.nbytes(layout).file:,} B")


def test_the_limits_of_a_search_are_shown(searched, capsys):
    folder, result, options = searched
    flags = ["--cache", str(options["cache"]), "--threads", "1", "--quiet"]
    assert main(["search", str(folder), *flags]) == 0
    assert f"budget   {result.budget.nbytes:,} B" in capsys.readouterr().out
