"""What a user of the package sees, and that nothing heavy is loaded before it is needed."""

import json
import re
import subprocess
import sys
from functools import partial

import pytest

import allocator
from allocator import api
from allocator.decision.allocation import Allocation
from allocator.files.checksums import seal, unseal

HEAVY = ("torch", "transformers", "lm_eval")
NOT_FOR_PATHS = (*HEAVY, "optuna", "pandas", "gguf", "tqdm")
VERBS = (
    "compare", "diff", "evaluate", "explain", "finish", "front", "imatrix", "init", "inspect",
    "materialize", "plan", "profile", "report", "reproduce", "score", "search", "verify",
)  # fmt: skip
ROADS = ("quantize",)  # made of verbs, and no function of `allocator.api`
CONFIG = "tests/data/configs/qwen3-30b-a3b.json"


def run_fresh(code):
    """Runs code in a fresh interpreter; returns its exit code, stdout and stderr."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def loading(code, run=run_fresh):
    """Runs code in another process; returns its lines, stderr's, and what it loaded."""
    status, out, err = run(code + "\nimport sys; print('loaded', *sorted(sys.modules))")
    assert status == 0, err
    *lines, loaded = out.splitlines()
    return lines, err.splitlines(), set(loaded.split()[1:])


def command(*arguments, run=run_fresh):
    """The command line in another process: exit code, lines, stderr's, and what it loaded."""
    words = [str(word) for word in arguments]
    code = f"""
from allocator.cli import main
try:
    code = main({words!r})
except SystemExit as ended:
    code = ended.code
print("code", code)"""
    lines, errors, loaded = loading(code, run)
    return int(lines[-1].split()[1]), lines[:-1], errors, loaded


@pytest.fixture(scope="module")
def run_light(forks):
    """Runs code where the libraries are loaded that a refusal may load."""
    return partial(forks.run, forks.start("msgspec", "optuna", "pandas"))


def test_importing_the_package_or_its_verbs_loads_no_library():
    for module in ("allocator", "allocator.api", "allocator.cli"):
        *_, loaded = loading(f"import {module}")
        assert not loaded & {*NOT_FOR_PATHS, "numpy", "msgspec"}


def test_every_public_name_is_listed_and_there():
    assert set(allocator.__all__) <= set(dir(allocator))
    assert set(api.__all__) <= set(dir(api))
    for name in allocator.__all__:
        assert getattr(allocator, name) is not None
    for name in VERBS:
        assert getattr(allocator, name) is getattr(api, name)
    for module in (allocator, api):
        with pytest.raises(AttributeError, match="no attribute 'serach'"):
            _ = module.serach


def test_api_lists_every_function_of_its_own():
    own = {n for n, v in vars(api).items() if getattr(v, "__module__", None) == api.__name__}
    assert {name for name in own if not name.startswith("_")} <= set(api.__all__)


def test_every_verb_of_the_command_line_is_a_function():
    done = subprocess.run(
        [sys.executable, "-m", "allocator", "--help"], capture_output=True, text=True, check=True
    )
    assert set(re.findall(r"^    ([a-z]+)\b", done.stdout, re.MULTILINE)) == {*VERBS, *ROADS}
    assert set(VERBS) < set(allocator.__all__)


@pytest.mark.parametrize("verb", ["", *VERBS, *ROADS])
def test_help_loads_no_library(verb):
    code, lines, errors, loaded = command(*verb.split(), "--help")
    assert (code, errors) == (0, [])
    assert lines[0].startswith(f"usage: allocator {verb}".rstrip())
    assert not loaded & {*NOT_FOR_PATHS, "numpy"}


WRONG = {
    "compare": ["nowhere"],
    "diff": ["nowhere.json", "nowhere.json"],
    "evaluate": ["nowhere"],
    "explain": ["nowhere.json"],
    "finish": ["nowhere.json"],
    "front": ["nowhere"],
    "imatrix": ["nowhere", "out.gguf"],
    "init": ["nowhere"],
    "inspect": ["nowhere"],
    "materialize": ["nowhere.json", "out"],
    "plan": ["nowhere"],
    "profile": ["nowhere"],
    "quantize": ["nowhere", "--bits", "3"],
    "report": ["nowhere"],
    "reproduce": ["nowhere.json"],
    "score": ["nowhere.json"],
    "search": ["nowhere"],
    "verify": ["nowhere", "--study", "nowhere"],
}


@pytest.mark.parametrize("verb", [*VERBS, *ROADS])
def test_a_wrong_path_is_refused_before_anything_heavy_is_loaded(verb):
    code, lines, errors, loaded = command(verb, *WRONG[verb])
    assert (code, lines) == (2, [])
    assert len(errors) == 1
    assert errors[0].startswith(f"allocator {verb}: nowhere")
    light = ("init", "plan", "diff")  # which parse what they are given by the tables behind it
    assert not loaded & set(HEAVY if verb in light else NOT_FOR_PATHS)


def test_inspect_plan_front_diff_and_report_never_load_torch(checkpoints, finished_study, tmp_path):
    pick = finished_study / "allocations/pick.json"
    for arguments in (
        ["inspect", checkpoints["qwen3"], "--target", "gguf"],
        ["plan", CONFIG, "--device-memory", "24GiB"],
        ["front", finished_study],
        ["report", finished_study, "--out", tmp_path / "report.html"],
        ["diff", pick, finished_study / "allocations/knapsack.json"],
    ):
        code, lines, _, loaded = command(*arguments)
        assert code == 0
        assert lines
        assert not loaded & set(HEAVY), arguments[0]


def changed(study, old, new):
    toml = study / "study.toml"
    text = toml.read_text()
    assert old in text
    toml.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("verb", "arguments", "old", "new", "said"),
    [
        ("search", [], "trials = 8", "trails = 8", "trails"),
        ("search", [], 'checkpoint = "', 'checkpoint = "/nowhere', "nowhere"),
        ("search", [], 'target = "gguf"', 'target = "onnx"', "onnx"),
        ("search", ["--sampler", "grid"], "", "", "grid"),
        ("search", ["--budget", "1KiB"], "", "", "under the floor"),
        ("search", ["--budget", "1KiB", "--dry-run"], "", "", "under the floor"),
        ("search", ["--seed", "-1"], "", "", "seed"),
        ("search", ["--storage", "memory"], "", "", "memory"),
        ("search", [], "documents.jsonl", "nothing.jsonl", "nothing.jsonl"),
        ("search", [], "search_documents = 6", "search_documents = 99", "99"),
        ("search", [], "space.toml", "nothing.toml", "nothing.toml"),
        ("profile", [], 'checkpoint = "', 'checkpoint = "/nowhere', "nowhere"),
        ("front", [], 'checkpoint = "', 'checkpoint = "', "no study yet"),
        ("evaluate", ["--documents", "99"], "", "", "99"),
        ("evaluate", ["--allocation", "nowhere.json"], "", "", "nowhere.json"),
        ("compare", [], "", "", "compare"),
    ],
)
def test_a_refusal_never_loads_torch(
    verb, arguments, old, new, said, fresh_study, study_cache, tmp_path, run_light
):
    study = tmp_path / "study"
    study.mkdir()
    for path in fresh_study.iterdir():
        if path.is_file():
            (study / path.name).write_bytes(path.read_bytes())
    if old:
        changed(study, old, new)
    code, _, errors, loaded = command(
        verb, study, *arguments, "--cache", study_cache, run=run_light
    )
    assert code == 2
    assert len(errors) == 1
    assert said in errors[0]
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("verb", ["explain", "finish", "score", "materialize", "reproduce"])
def test_a_wrong_allocation_never_loads_torch(verb, fresh_study, study_cache, tmp_path, run_light):
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps({"target": "gguf"}))
    out = [tmp_path / "out"] if verb == "materialize" else []
    code, _, errors, loaded = command(
        verb, path, *out, "--study", fresh_study, "--cache", study_cache, run=run_light
    )
    assert code == 2
    assert len(errors) == 1
    assert "allocation.json" in errors[0]
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("search", ["STUDY", "--dry-run"]),
        ("profile", ["STUDY"]),
        ("finish", ["PICK", "--dry-run"]),
        ("score", ["PICK"]),
        ("explain", ["PICK", "--json"]),
        ("materialize", ["PICK", "OUT"]),
        ("evaluate", ["STUDY"]),
        ("evaluate", ["STUDY", "--quiet"]),
    ],
)
def test_loading_torch_is_the_first_that_a_verb_says(
    verb, arguments, finished_study, study_cache, tmp_path, run_light
):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise KeyboardInterrupt")
    pick = finished_study / "allocations/pick.json"
    paths = {"STUDY": finished_study, "PICK": pick, "OUT": tmp_path / "out"}
    code, lines, errors, _ = command(
        verb, *(paths.get(word, word) for word in arguments), "--cache", study_cache,
        run=lambda code: run_light(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"),
    )  # fmt: skip
    assert (code, lines) == (130, [])
    assert errors[:-1] == ([] if "--quiet" in arguments else ["loading torch"])
    assert "stopped; run the same command to resume" in errors[-1]


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("materialize", ["PICK", "OUT", "--container", "onnx"], "unknown container 'onnx'"),
        ("materialize", ["SAFETENSORS", "OUT", "--container", "gguf"], "written as gguf"),
        ("materialize", ["PICK", "FULL"], "holds something else"),
        ("score", ["RECIPE"], "line 1"),
        ("verify", ["MANIFEST"], "container 'onnx'"),
        ("verify", ["WRITTEN", "--tolerance", "-1"], "tolerance -1"),
        ("verify", ["WRITTEN", "--documents", "999"], "999 documents"),
    ],
)
def test_a_file_that_no_runtime_takes_never_loads_torch(
    verb, arguments, said, finished_study, study_cache, tmp_path, run_light
):
    pick = finished_study / "allocations/pick.json"
    other = tmp_path / "safetensors.json"
    record = unseal(pick.read_bytes())
    changed = record["allocation"] | {"target": "safetensors"}
    digest = Allocation.from_json(changed).digest
    other.write_bytes(seal(record | {"allocation": changed, "digest": digest}))
    recipe = tmp_path / "tensor-types.txt"
    recipe.write_text("blk.0=q4_x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("something else")
    manifest = {
        "container": "gguf", "allocation": digest, "checkpoint": record["checkpoint"],
        "importance": digest,
        "file": "model.gguf", "file_bytes": 2, "tensor_bytes": 1, "overhead_bytes": 1,
        "sha256": {"model.gguf": digest, "allocation.json": digest}, "schema": 1,
    }  # fmt: skip
    for name, change in (("written", {}), ("manifest", {"container": "onnx"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(seal(manifest | change))
    paths = {
        "PICK": pick, "SAFETENSORS": other, "RECIPE": recipe, "OUT": tmp_path / "out",
        "FULL": tmp_path / "full",
        "MANIFEST": tmp_path / "manifest", "WRITTEN": tmp_path / "written",
    }  # fmt: skip
    words = [paths.get(word, word) for word in arguments]
    code, _, errors, loaded = command(
        verb, *words, "--study", finished_study, "--cache", study_cache, run=run_light
    )
    assert code == 2
    assert len(errors) == 1
    assert said in errors[0]
    assert not loaded & set(HEAVY)
