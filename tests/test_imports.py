"""Imports point inward, and torch stays at the rim."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "allocator"
RINGS = [  # a module may import from its own ring or from an earlier one
    {"errors", "units", "files", "checked", "digests", "memory"},
    {"inventory", "tokenizer", "planned", "families", "foreign", "formats", "targets"},
    {"allocation", "records", "diff"},
    {
        "space",
        "search_space",
        "repair",
        "front",
        "surrogate",
        "priors",
        "plan",
        "knapsack",
        "nested",
        "posterior",
        "profile",
        "baselines",
    },
    {
        "samplers",
        "study",
        "storage",
        "journal",
        "search_lock",
        "leases",
        "specification",
        "devices",
        "tables",
        "trials",
        "closing",
        "first_trials",
    },
    {"codecs", "calibration", "proxy", "materialize", "evaluate"},  # torch lives only here
    {"workspace", "report", "estimate", "launch", "workers", "compare", "api"},
    {"cli", "__main__", "__init__"},
]
RING_OF = {name: number for number, ring in enumerate(RINGS) for name in ring}
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


def test_every_module_has_a_ring():
    assert {name.split(".")[0] for name in MODULES} <= set(RING_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_inward(module):
    ring = RING_OF[module.split(".")[0]]
    outward = {n for n in imported(MODULES[module]) if RING_OF.get(n, 0) > ring}
    assert not outward


def loads(code):
    """Which of the heavy packages are loaded after `code` in a fresh interpreter."""
    code += "\nimport sys; print(*({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_import_is_light():
    assert loads("import allocator") == []


def test_rings_0_to_4_never_load_torch():
    light = [f"allocator.{name}" for name in MODULES if RING_OF[name.split(".")[0]] <= 4]
    assert len(light) > 15
    assert loads(f"import {', '.join(light)}") == []
