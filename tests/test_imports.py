"""Imports point inward, torch stays at the rim, and the studies' scripts find what they import."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "allocator"
PACKAGES = [  # innermost first: a module may import from its own package or from an earlier one
    "errors",
    "units",
    "files",
    "formats",
    "families",
    "checkpoint",
    "targets",
    "decision",
    "prediction",
    "study",
    "samplers",
    "codecs",  # torch may be loaded from here on
    "scoring",
    "profiling",
    "export",
    "finishing",
    "app",
    "evaluation",
    "comparison",
    "reporting",
    "testing",
    "transformers",
    "api",
    "pipeline",
    "cli",
    "references",
    "__main__",
    "__init__",
]
PLACE_OF = {name: number for number, name in enumerate(PACKAGES)}
LIGHT = PACKAGES[: PLACE_OF["codecs"]]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imported(path):
    """Top-level names under `allocator` that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("allocator."):
                yield name.split(".")[1]


def test_every_module_is_in_a_package():
    assert {name.split(".")[0] for name in MODULES} <= set(PLACE_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_inward(module):
    place = PLACE_OF[module.split(".")[0]]
    outward = {n for n in imported(MODULES[module]) if PLACE_OF.get(n, 0) > place}
    assert not outward


SCRIPTS = sorted((ROOT.parent / "studies").glob("*/scripts/*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parts[-3]}/{path.name}")
def test_a_studys_script_finds_what_it_imports(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("allocator"):
            module = importlib.import_module(node.module)
            missing = [a.name for a in node.names if not hasattr(module, a.name)]
            for name in missing:  # modules that nobody has imported yet, or nothing
                importlib.import_module(f"{node.module}.{name}")


def loads(code):
    """Which of the heavy packages are loaded after `code` in a fresh interpreter."""
    code += "\nimport sys; print(*({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_import_is_light():
    assert loads("import allocator") == []


def test_what_is_inside_of_codecs_never_loads_torch():
    light = [f"allocator.{name}" for name in MODULES if name.split(".")[0] in LIGHT]
    assert len(light) > 40
    assert loads(f"import {', '.join(light)}") == []
