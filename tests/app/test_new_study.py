"""`allocator init`: a study that a search takes as it is, in files that have every key."""

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from allocator import api
from allocator.app import new_study
from allocator.app.study_file import BudgetSpec, DeviceBudgetSpec, StreamedSpec, StudySpec
from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.reading import read_inventory
from allocator.cli import main
from allocator.decision.search_space import Pin, SearchSpace
from allocator.errors import AllocatorError, CheckpointError, StudyError
from allocator.files.toml_files import faults_of
from allocator.files.toml_template import template

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.parent for path in ROOT.glob("studies/*/study.toml"))
SPACES = sorted(ROOT.glob("search_spaces/*.toml"))
LEAST = {
    StudySpec: {
        "schema": 1,
        "checkpoint": "m",
        "target": "gguf",
        "calibration": {"documents": "c"},
    },
    SearchSpace: {"schema": 1},
}


def value_of(text, kind):
    data = tomllib.loads(text)
    assert not faults_of(data, kind)
    return msgspec.convert(data, kind, str_keys=True)


@pytest.mark.parametrize("path", [*STUDIES, *SPACES], ids=lambda p: p.name)
def test_a_written_file_is_its_value(path):
    value = SearchSpace.read(path) if path.is_file() else StudySpec.read(path)
    assert value_of(template(value, title="A file."), type(value)) == value


def test_a_table_of_a_list_may_stand_several_times():
    space = SearchSpace(schema=1, pin=[Pin("*", minimum="Q4_K"), Pin("head", format="Q8_0")])
    assert value_of(template(space, title='Of "all".'), SearchSpace) == space


def switched_on(text):
    """Keys and headers without the `#` in front."""
    return re.sub(r"^#(?=\[|\w+ = )", "", text, flags=re.M)


def names(schema, definitions):
    """Every key below an object of a JSON schema that msgspec made, with its tables."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    for choice in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())):
        yield from names(choice, definitions)
    for name, inside in schema.get("properties", {}).items():
        yield name
        yield from (f"{name}.{deeper}" for deeper in names(inside, definitions))


def found(data, tables):
    """The same of a TOML file."""
    for name, value in data.items():
        yield name
        value = value[0] if isinstance(value, list) and name in tables else value
        if isinstance(value, dict) and name in tables:
            yield from (f"{name}.{deeper}" for deeper in found(value, tables))


@pytest.mark.parametrize("kind", [StudySpec, SearchSpace], ids=lambda kind: kind.__name__)
def test_every_key_is_in_the_file_and_its_example_is_valid(kind):
    """Keys are msgspec's own."""
    text = template(msgspec.convert(LEAST[kind], kind), title="A file.")
    data = tomllib.loads(switched_on(text))
    (top,), definitions = msgspec.json.schema_components([kind])
    tables = {"calibration", "budget", "device", "streamed", "compare", "long", "experts", "pin"}
    assert sorted(found(data, tables)) == sorted(names(top, definitions))
    if kind is StudySpec:
        del data["budget"]["file"], data["calibration"]["held_out"]  # one of two
    assert not faults_of(data, kind)


@pytest.fixture
def text(fresh_study):
    return fresh_study / "documents.jsonl"


def test_a_search_takes_a_new_study_as_it_is(checkpoints, text, study_cache, tmp_path, capsys):
    study = tmp_path / "deep" / "study"
    arguments = ["--calibration", text, "--tokenizer", "none", "--out", study, "--quiet"]
    assert main([str(a) for a in ("init", checkpoints["qwen3"], *arguments)]) == 0
    out = capsys.readouterr().out
    opened = StudyFolder(study, cache=study_cache, threads=1)
    assert f"budget   {opened.spec.budget.weights:,} B" in out  # above the floor, as launch says
    assert "no budget was given" in out
    assert opened.search_space == SearchSpace(schema=1)
    assert opened.launch().stop.trials == 100
    before = (study / "study.toml").read_bytes()
    with pytest.raises(StudyError, match=r"study\.toml: exists already, and is not overwritten"):
        api.init(checkpoints["qwen3"], study, calibration=text)
    assert (study / "study.toml").read_bytes() == before


def test_without_a_budget_it_is_three_bits_of_the_searched_weights(tmp_path):
    reference = ROOT / "studies/reference"
    calibration = reference / "generated/calibration.jsonl"
    made = api.init(reference / "model", tmp_path / "study", calibration=calibration)
    assert made.spec.budget == BudgetSpec(weights=29_278_208 * 3 // 8)


@pytest.mark.parametrize(("space", "written"), [("default", "default"), ("s.toml", "../s.toml")])
def test_paths_are_relative_to_the_study(checkpoints, text, tmp_path, monkeypatch, space, written):
    (tmp_path / "model").symlink_to(checkpoints["qwen3"])
    (tmp_path / "a.jsonl").write_bytes(text.read_bytes())
    SearchSpace(schema=1).write(tmp_path / "s.toml")
    monkeypatch.chdir(tmp_path)
    made = api.init("model", calibration=["a.jsonl"], tokenizer="none", space=space, seed=7)
    assert made.folder == Path(f"{checkpoints['qwen3'].name}-study")
    spec = StudySpec.read(made.folder)
    assert (spec, spec.seed) == (made.spec, 7)
    assert (spec.checkpoint, spec.space) == ("../model", written)
    assert spec.calibration.documents == "../a.jsonl"
    spec.check_files(made.folder)
    assert not (made.folder / "space.toml").exists()


def test_a_model_larger_than_memory_is_read_layer_by_layer(
    checkpoints, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(new_study, "free_memory", lambda: 1e6)
    made = api.init(checkpoints["qwen3"], tmp_path / "s", calibration=text, tokenizer="none")
    assert StudySpec.read(made.folder).streamed == StreamedSpec()
    assert "[streamed] reads it layer by layer" in made.notes[-1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"calibration": "no.jsonl", "trials": 0, "sampler": "luck", "expert_width": 0},
            [
                '--calibration "no.jsonl": no such file',
                "--trials 0: needed",
                '--sampler "luck": ',
                "--expert-width 0: ",
            ],
        ),
        ({"bits": 2.0, "budget": "1MiB"}, ["--bits: needed alone, without --budget"]),
        ({"bits": 40}, ["--bits 40: needed a number above 0 and up to 32"]),
        (
            {"budget": "1MiB", "weights_budget": "1MiB"},
            ["--weights-budget and --budget: needed one"],
        ),
        ({"budget": "much", "report": ["no.txt"]}, ['--budget "much": ', '--report "no.txt": ']),
        ({"device": DeviceBudgetSpec(preset="abacus", context=0)}, ["--device ", "--context 0: "]),
        ({"bits": 0.1}, ["under the floor"]),
        ({"device": DeviceBudgetSpec(memory="1GiB", context=129)}, ["has 128 positions"]),
        ({"space": "carefull"}, ['--space "carefull": no such file']),
    ],
    ids=str,
)
def test_wrong_values_are_told_at_once_and_nothing_is_written(
    checkpoints, text, tmp_path, values, said
):
    values = {"calibration": text, "tokenizer": "none"} | values
    with pytest.raises(AllocatorError) as caught:
        api.init(checkpoints["qwen3"], tmp_path / "study", **values)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(said)
    assert all(any(word in line for line in lines) for word in said)
    assert "study.toml: " not in str(caught.value)
    assert not (tmp_path / "study").exists()


def test_a_model_and_a_study_are_told_apart(checkpoints, fresh_study, capsys):
    model = checkpoints["qwen3"]
    assert main(["search", str(model)]) == 2
    assert f"a model, needed a study folder; `allocator init {model}`" in capsys.readouterr().err
    for refuse in (read_inventory, api.plan, api.init):
        with pytest.raises(CheckpointError, match="a study, needed a model"):
            refuse(fresh_study)
    with pytest.raises(StudyError, match=f"a file; name its folder, {fresh_study}"):
        StudyFolder(fresh_study / "study.toml")
