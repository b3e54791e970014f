"""How the code is built stays as studies/structure counts it: docstrings, and who knows what."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "studies/structure/scripts/count.py"
ODD = '''"""Odd."""

from allocator.codecs import Floats


def scaled(rows: Floats, config: dict[str, float], **options: Any) -> Floats:
    """The rows, times what config.json says."""
    return rows * config["rope_theta"]
'''


def counted(root):
    """Every figure of a checkout, by its title; the first number of each."""
    done = subprocess.run(
        [sys.executable, SCRIPT, root, "--json"], capture_output=True, text=True, check=True
    )
    return {t: int(re.match(r"\d+", value)[0]) for t, value in json.loads(done.stdout).items()}


VERBS = "public functions whose docstring begins with a verb"
SHAPES = "public functions of arrays whose docstring has shapes"
MOST = {
    "files outside families/ that read config keys or test model types": 0,
    "files outside codecs/, formats/ and the gguf runtime that name ggml": 0,
    "container tests outside the runtimes' folders": 0,
    "signatures with **name: Any": 1,  # what transformers hands to a cache
    "files with private names of Optuna": 1,
    "circles of packages": 0,
}


@pytest.fixture(scope="module")
def figures():
    return counted(ROOT)


def test_docstrings_begin_with_verbs_and_say_shapes(figures):
    assert figures[VERBS] >= 90  # percent
    assert figures[SHAPES] >= 80


@pytest.mark.parametrize("title", MOST)
def test_what_one_place_knows_is_known_there_alone(figures, title):
    assert figures[title] <= MOST[title]


def test_an_odd_module_is_counted(tmp_path):
    for name, text in (("__init__", ""), ("odd/__init__", ""), ("odd/scaling", ODD)):
        path = tmp_path / "allocator" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    configs = tmp_path / "tests/data/configs"
    configs.mkdir(parents=True)
    (configs / "model.json").write_text('{"rope_theta": 1e4}')
    (tmp_path / "tests/test_imports.py").write_text('RINGS = ["odd"]\n')
    odd = counted(tmp_path)
    assert (odd[VERBS], odd[SHAPES]) == (0, 0)
    assert odd["files outside families/ that read config keys or test model types"] == 1
    assert odd["signatures with **name: Any"] == 1
