"""What released checkpoints have and ours do not, from `inspect` to `verify` of the pick."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from allocator.checkpoint.reading import read_inventory
from allocator.cli import main
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import CheckpointError
from allocator.export.gguf import comparison
from allocator.scoring.swap_model import SwapModel, skeleton
from allocator.targets import GGUF, TARGETS

torch.set_num_threads(1)
YARN = {  # as Kimi-K2's
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
    "beta_fast": 1.0, "beta_slow": 1.0,
}  # fmt: skip
TOLD = "--yarn-beta-fast 1 --yarn-beta-slow 1"


@pytest.fixture
def run(study_cache, capsys):
    """Exit code 0 is asserted; stdout without its line breaks."""

    def call(verb, *arguments):
        options = ["--cache", study_cache, "--threads", 1, "--quiet"]
        capsys.readouterr()
        code = main([str(a) for a in (verb, *arguments, *options)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return " ".join(out.split())

    return call


@pytest.fixture
def study_of(write_study, tmp_path):
    """`study_of(checkpoint)`: a study of two formats, so that little is encoded."""

    def write(checkpoint, target="gguf"):
        folder = write_study(tmp_path / "study", checkpoint, share=0.3)
        (folder / "space.toml").write_text('schema = 1\nformats = ["Q8_0", "Q4_0", "IQ4_NL"]\n')
        text = (folder / "study.toml").read_text()
        (folder / "study.toml").write_text(text.replace('"gguf"', f'"{target}"'))
        return folder

    return write


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def resaved(folder, file, change):
    """One shard with its tensors changed; the index follows."""
    tensors = change(load_file(folder / file))
    save_file(tensors, folder / file)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, file)
    path.write_text(json.dumps(index))


def test_fp8_as_qwen_releases_it_with_all_experts_used_and_yarn_as_kimis(
    tmp_path, make_checkpoint, fp8, run, study_of, monkeypatch, capsys
):
    source = make_checkpoint(
        tmp_path / "source", "qwen3", dtype="bfloat16",
        num_experts=4, num_experts_per_tok=4, rope_parameters=YARN,
    )  # fmt: skip
    folder = tmp_path / "fp8"
    fp8.write(source, folder)
    resaved(
        folder, "model-00001-of-00002.safetensors",
        lambda scales: {n: s.bfloat16() for n, s in scales.items()},
    )  # fmt: skip
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.rand(8) for n in range(2)}
    resaved(folder, "model-00002-of-00002.safetensors", lambda weights: weights | buffers)
    dtypes = {t.scale.dtype for t in read_inventory(folder).tensors.values() if t.scale}
    assert dtypes == {"BF16"}

    for out in (run("inspect", folder, "--target", "gguf"), run("plan", folder)):
        assert f"note: llama.cpp must be told {TOLD}" in out
    assert "note: left out: 2 buffers that the model" in run("inspect", folder)
    study = study_of(folder)
    dry = run("search", study, "--dry-run")
    assert "retained experts 4..4" in dry
    assert f"note: llama.cpp must be told {TOLD}" in dry
    run("search", study, "--trials", 4)
    pick, out = study / "allocations/pick.json", tmp_path / "out"
    assert f"llama.cpp must be told {TOLD} (in llama-cpp" in run("materialize", pick, out)
    assert (out / "llama-cpp-options.txt").read_text() == TOLD + "\n"
    run("verify", out, "--study", study)  # llama.cpp computes what was scored
    monkeypatch.setattr(comparison, "yarn_betas", lambda inventory: None)
    assert main(["verify", str(out), "--study", str(study), "--quiet", "--threads", "1"]) == 2
    assert "its runtime is off by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("groups", "target"), [({"n_group": 4, "topk_group": 2}, "safetensors"), ({}, "gguf")]
)
def test_a_router_with_one_count_and_one_with_null_for_groups(
    tmp_path, make_checkpoint, run, study_of, groups, target
):
    used = {} if groups else {"num_experts_per_tok": 8}
    folder = make_checkpoint(
        tmp_path / "model", "deepseek", dtype="bfloat16",
        kv_lora_rank=64, num_hidden_layers=2, **groups, **used,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if not groups:
        edit(folder, n_group=None, topk_group=None)
    assert read_inventory(folder).expert_groups == groups.get("n_group", 1)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        ours = SwapModel(TARGETS[target].layout(read_inventory(folder)), None).model
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    study = study_of(folder, target)
    assert "retained experts 8..8" in run("search", study, "--dry-run")
    run("search", study, "--trials", 4)
    pick = study / "allocations/pick.json"
    assert set(AllocationRecord.read(pick).decision.counts.values()) == {8}
    run("explain", pick)
    run("materialize", pick, tmp_path / "out")
    tolerance = () if target == "safetensors" else ("--tolerance", 0.05)  # turned expert choices
    run("verify", tmp_path / "out", "--study", study, *tolerance)


@pytest.mark.parametrize("changes", [{"n_group": None}, {"n_group": 1, "topk_group": None}, {}])
def test_null_groups_are_no_groups(tmp_path, checkpoints, changes):
    for file in checkpoints["deepseek"].glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((checkpoints["deepseek"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    inventory = read_inventory(tmp_path)
    assert (inventory.expert_groups, inventory.router.groups_used) == (1, 1)
    assert inventory.least_experts(1) == 2  # transformers rates a group by its two best
    assert GGUF.layout(inventory).layers == (1, 2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob = True, config.json says False"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "'linear'",
        ),
    ],
)
def test_what_llama_cpp_lacks_is_said_before_a_profile(
    tmp_path, checkpoints, fresh_study, study_cache, capsys, changes, match
):
    model, study = tmp_path / "model", tmp_path / "study"
    shutil.copytree(checkpoints["qwen3"], model)
    edit(model, **changes)
    shutil.copytree(fresh_study, study)
    text = (study / "study.toml").read_text().replace(str(checkpoints["qwen3"]), str(model))
    (study / "study.toml").write_text(text)
    common = ["--quiet", "--cache", str(study_cache)]
    for arguments in (
        ["inspect", str(model), "--target", "gguf"],
        ["search", str(study), "--dry-run"],
    ):
        assert main([*arguments, *common]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"allocator {arguments[0]}: gguf: ")
        assert match in err
        assert err.count("\n") == 1
    assert main(["plan", str(model), *common]) == 0
    assert re.search(
        f"note: no figures for target gguf: gguf: .*{match}",
        " ".join(capsys.readouterr().out.split()),
    )


def test_a_config_that_transformers_refuses_is_one_line(tmp_path, checkpoints):
    config = json.loads((checkpoints["qwen3"] / "config.json").read_text())
    config |= {"rms_norm_eps": "1e-6"}
    with pytest.raises(CheckpointError, match=r"transformers refuses .*rms_norm_eps") as caught:
        skeleton(tmp_path, config)
    assert "\n" not in str(caught.value)


def test_a_device_is_no_budget_of_target_safetensors(
    fresh_study, study_cache, tmp_path, capsys, checkpoints
):
    text = (fresh_study / "study.toml").read_text().replace('"gguf"', '"safetensors"')
    for name in ("documents.jsonl", "report.jsonl", "space.toml"):
        (tmp_path / name).symlink_to(fresh_study / name)
    (tmp_path / "study.toml").write_text(text)
    arguments = ["search", str(tmp_path), "--dry-run", "--quiet", "--cache", str(study_cache)]
    assert main([*arguments, "--device-memory", "1GiB"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("allocator search: target safetensors: ")
    assert err.count("\n") == 1
