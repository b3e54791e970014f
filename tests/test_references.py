"""Schemas and references that ship: as made from the descriptions, and as the reader decides."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from allocator.cli.parsers import help_texts
from allocator.files.shipped import schema_file
from allocator.files.toml_files import faults_of
from allocator.references import KINDS

ROOT = Path(__file__).parents[1]
SHIPPED = {
    "study": sorted(ROOT.glob("studies/*/study.toml")),
    "search-space": sorted(ROOT.glob("search_spaces/*.toml")),
    "device": sorted(ROOT.glob("search_spaces/devices/*.toml")),
}
CODE = """
from pathlib import Path
from allocator.references import made_files
for path, text in made_files(Path.cwd()).items():
    if path.read_text() != text:
        print(path)
"""
LEAST = 'schema = 1\ncheckpoint = "m"\ntarget = "gguf"\n[calibration]\ndocuments = "a"\n'
WRONG = {  # what is put above, or below, a whole study.toml
    "colour = 1\n": "", "trials = 0\n": "", "trials = 2147483648\n": "", "trials = true\n": "",
    'seed = "0"\n': "", "seed = -1\n": "", 'sampler = "luck"\n': "", 'tokenizer = "mine"\n': "",
    "expert_width = 1.5\n": "", 'budget.file = "12 potatoes"\n': "", "budget.weights = 0\n": "",
    "budget = 3\n": "", "budget = {file = 1, weights = 1}\n": "", "streamed.rows = 0\n": "",
    "streamed.candidates = 257\n": "", "budget.device.min_tokens_per_second = 0\n": "",
    "    ": "report = 'r'\nheld_out = 0.1\n", "     ": "splits = 's'\nheld_out = 0.1\n",
    "": "rungs = [8, 8]\n", " ": "rungs = [0]\n", "  ": "window = 0\n", "   ": "texts = 1\n",
    "compare = {samplers = [], weights = [1], seeds = {gguf = 1}}\n": "",
    "compare = {samplers = ['auto'], weights = [1], seeds = {onnx = 1}}\n": "",
    "compare = {samplers = ['auto'], weights = [1], seeds = {gguf = 0}}\n": "",
    "compare = {samplers = ['auto'], weights = ['x'], seeds = {gguf = 1}}\n": "",
    "compare = {samplers = ['auto'], weights = [1]}\n": "",
}  # fmt: skip


def test_the_help_of_every_verb_fits_80_columns():
    page = (ROOT / "docs/cli.md").read_text()
    for command, text in help_texts().items():
        assert f"\n## {command}\n\n```text\nusage: {command} [-h]" in page
        assert max(map(len, text.splitlines())) <= 80, command


def schema(name):
    return jsonschema.Draft7Validator(json.loads(schema_file(name).read_text()))


def test_shipped_files_are_as_made():
    """In a process of its own, where no test has registered anything, on a wide terminal."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert not done.stdout, "run: python -m allocator.references"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_schema_takes_every_shipped_file(name):
    validator = schema(name)
    validator.check_schema(validator.schema)
    assert SHIPPED[name]
    for path in SHIPPED[name]:
        assert not list(validator.iter_errors(tomllib.loads(path.read_text()))), path


def test_the_schema_refuses_what_the_reader_refuses():
    validator = schema("study")
    assert validator.is_valid(tomllib.loads(LEAST))
    assert not faults_of(tomllib.loads(LEAST), KINDS["study"])
    for above, below in WRONG.items():
        data = tomllib.loads(above + LEAST + below)
        assert faults_of(data, KINDS["study"]), (above, below)
        assert not validator.is_valid(data), (above, below)
    for key in ("schema", "checkpoint", "target"):
        data = {k: v for k, v in tomllib.loads(LEAST).items() if k != key}
        assert faults_of(data, KINDS["study"])
        assert not validator.is_valid(data)
