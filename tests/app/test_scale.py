"""The study of scale: its synthetic checkpoints, and one that does not fit under a memory limit."""

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_tensor
from allocator.targets import TARGETS

torch.set_num_threads(1)
SCRIPTS = Path(__file__).parents[2] / "studies/scale/scripts"
TINY = {
    "layers": 3, "experts": 4, "experts_used": 2, "heads": 2, "hidden": 256, "width": 64,
    "dense_width": 160, "vocabulary": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def build():
    return runpy.run_path(str(SCRIPTS / "build_checkpoint.py"))["build"]


@pytest.fixture(scope="module")
def tiny(build, tmp_path_factory):
    """Folders of a checkpoint in BF16 and one in FP8, in many shards."""
    folder = tmp_path_factory.mktemp("scale")
    for kind in ("bf16", "fp8"):
        build(folder / kind, fp8=kind == "fp8", shard_bytes=1 << 18, **TINY)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_transformers_computes_with_a_built_checkpoint(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny / "bf16", dtype=torch.float32)
    ids = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = model(input_ids=ids, output_hidden_states=True)
    assert all(0.3 < float(h.std()) < 10 for h in found.hidden_states)
    assert 1 < float(found.logits.std()) < 10


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_the_inventory_and_both_targets_read_it(tiny, kind):
    inventory = read_inventory(tiny / kind)
    for target in TARGETS.values():
        assert len(target.layout(inventory).groups) > 20
    assert (inventory.n_layers, inventory.n_experts, inventory.moe_layers) == (3, 4, (1, 2))
    dtypes = {t.dtype for t in inventory.tensors.values()}
    assert dtypes == {"BF16", "F32"} | ({"F8_E4M3"} if kind == "fp8" else set())
    assert len(list((tiny / kind).glob("*.safetensors"))) > 5
    deviations = {
        name: read_tensor(inventory, name).std() * tensor.shape[1] ** 0.5
        for name, tensor in inventory.tensors.items()
        if name.endswith("_proj.weight")
    }
    assert all(0.5 < found < 1.6 for found in deviations.values())


def test_fp8_is_what_the_format_says(tiny):
    inventory = read_inventory(tiny / "fp8")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    info = inventory.tensors[name]
    raw = np.fromfile(tiny / "fp8" / info.file, np.uint8, info.nbytes, offset=info.offset)
    with safe_open(tiny / "fp8" / info.scale.file, "np") as file:
        scale = file.get_tensor(f"{name}_scale_inv")
    assert scale.shape == (2, 1)
    codes = torch.from_numpy(raw).view(torch.float8_e4m3fn).float().numpy().reshape(256, 64)
    expected = codes * scale.repeat(128, 0)
    np.testing.assert_array_equal(read_tensor(inventory, name), expected)


def test_the_same_seed_gives_the_same_files_also_after_a_kill(build, tiny, tmp_path):
    shards = sorted((tiny / "fp8").glob("*.safetensors"))
    (tmp_path / "again").mkdir()
    for shard in shards[::2]:  # the others were not written yet
        (tmp_path / "again" / shard.name).write_bytes(shard.read_bytes())
    build(tmp_path / "again", fp8=True, shard_bytes=1 << 18, **TINY)
    assert contents(tmp_path / "again") == contents(tiny / "fp8")
    build(tmp_path / "other", fp8=True, shard_bytes=1 << 18, seed=1, **TINY)
    assert contents(tmp_path / "other") != contents(tiny / "fp8")
    with pytest.raises(SystemExit, match="other dimensions"):
        build(tmp_path / "other", **TINY)


# -- the check of a GPU


MOMENTS = [
    f"second moments, {kind}, layers.1.{group}"
    for kind in ("plain", "Fisher")
    for group in ("attention.o", "experts.gate", "experts.down")
]
COMPARED = [
    "losses", "losses, streamed", "gradient by changes", *MOMENTS, "codes, IQ2_XXS", "codes, Q4_K",
]  # fmt: skip
OVER = {
    "plain forward": "cpu",
    "loss": "cpu",
    "codes, IQ2_XXS": "cpu",
    "codes, Q4_K": "cpu",
    "scoring a candidate, one projection changed": "plain forward",
    "scoring a candidate, nothing changed": "plain forward",
    "second moments, plain": "plain forward",
    "second moments, Fisher": "plain forward",
    "tuning step": "plain forward",
    "streamed pass": "plain forward",
    **{f"{name}: difference": "cpu" for name in COMPARED},
    **{
        f"peak memory, {stage}": "weights in float32"
        for stage in ("plain", "scored", "moments", "step", "streamed", "codes")
    },
}


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return runpy.run_path(str(SCRIPTS / "gpu.py"))["main"]


def test_the_gpu_check_on_the_cpu_differs_from_the_cpu_in_nothing(check, tmp_path):
    assert check(["--device", "cpu", "--size", "tiny", "--csv", str(tmp_path / "gpu.csv")]) == 0
    with open(tmp_path / "gpu.csv", newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert {what: row["versus"] for what, row in rows.items()} == OVER
    plain = float(rows["plain forward"]["value"])
    for what, row in rows.items():
        value, ratio = float(row["value"]), float(row["ratio"])
        assert row["device"] == "cpu"
        if what.endswith("difference"):
            assert (value, ratio) == (0, 0), what
        else:
            assert 0 < value < np.inf, what
            assert 0 < ratio < np.inf, what
        if row["versus"] == "plain forward":
            assert ratio == pytest.approx(value / plain), what
    assert float(rows["loss"]["ratio"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_the_gpu_check_without_a_gpu_is_one_line(check, capsys):
    assert check(["--device", "cuda"]) == 2
    assert re.fullmatch(r"torch device 'cuda': [^\n]+\n", capsys.readouterr().err)


# -- 2 GB under a limit of 1 GB

LIMIT = 1 << 30
LARGE = {  # 1.03e9 weights
    "layers": 3, "experts": 80, "experts_used": 8, "heads": 8, "hidden": 2048, "width": 1024,
    "dense_width": 4096, "vocabulary": 4096,
}  # fmt: skip

CHILD = """
import os, resource, sys
from pathlib import Path
import allocator.evaluation.held_out, transformers  # all that is imported later
from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation import Allocation
from allocator.profiling.statistics import importance_digest
from allocator.formats import fallback
from allocator.export.checkpoint import materialize
from allocator.export.tensors import EncodedTensors
from allocator.scoring.swap_model import SwapModel

what, folder, group, limit = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
if group:
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
else:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + limit
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
workspace = StudyFolder(folder / "study", cache=folder / "cache", threads=2)
layout = workspace.layout
if what == "whole":
    SwapModel(layout, None)
    sys.exit("it fits")
allocations = [
    Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, tuple(range(layout.inventory.n_experts))),
        formats={name: fallback(fmt, g.shape).name for name, g in layout.groups.items()},
        experts_used=layout.inventory.experts_used,
    )
    for fmt in ("Q3_K", "Q6_K")
]
profile = workspace.profile
losses = workspace.scorers.trials.score_many(allocations)
written = materialize(
    EncodedTensors(workspace.profiler.encodings, allocations[0]), folder / "written",
    container="gguf",
    importance=importance_digest(workspace.profiler.statistics.importance),
)
print(len(profile.measured), *(found.kl.mean() for found in losses), written.manifest.file_bytes)
print(*(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


@pytest.fixture
def cgroup():
    """A folder in which a memory limit holds; "" where none may be made."""
    own = re.search(r"^\d+:memory:(.*)$", Path("/proc/self/cgroup").read_text(), re.M)
    folder = Path(f"/sys/fs/cgroup/memory{own[1] if own else ''}", f"allocator-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError:
        yield ""
        return
    yield str(folder)
    folder.rmdir()


@pytest.fixture(scope="module")
def large(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    assert build(folder / "checkpoint", **LARGE) > 2e9
    (folder / "study").mkdir()
    text = (SCRIPTS.parent / "study.toml").read_text()
    (folder / "study/study.toml").write_text(
        re.sub("^checkpoint = .*$", 'checkpoint = "../checkpoint"', text, flags=re.M)
    )
    rng = np.random.default_rng(0)
    records = [{"ids": rng.integers(0, 4096, 64).tolist()} for _ in range(12)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "study/documents.jsonl").write_text(lines)
    return folder


def under_the_limit(what, folder, cgroup):
    print(f"{LIMIT:,} bytes: {'a cgroup' if cgroup else 'RLIMIT_AS, after the imports'}")
    command = [sys.executable, "-c", CHILD, what, str(folder), cgroup, str(LIMIT)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_checkpoint_of_twice_the_memory(large, cgroup):
    done = under_the_limit("streamed", large, cgroup)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    n_measured, *losses, nbytes = map(float, done.stdout.splitlines()[0].split())
    print(done.stdout)
    assert n_measured > 5
    assert losses[0] > losses[1] > 0
    assert (large / "written/model.gguf").stat().st_size == nbytes


@pytest.mark.slow
def test_under_the_limit_the_whole_model_does_not_load(large, cgroup):
    done = under_the_limit("whole", large, cgroup)
    assert "it fits" not in done.stderr
    assert done.returncode != 0
    assert done.returncode == -9 or re.search("MemoryError|can't allocate memory", done.stderr)
