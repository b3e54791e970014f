"""Notebooks run from top to bottom in a fresh kernel, and are committed without outputs."""

import json
import shutil
import warnings
from pathlib import Path

import pytest

from allocator.files.checksums import unseal

with warnings.catch_warnings():  # the Jupyter packages' own deprecations, at import
    warnings.simplefilter("ignore", DeprecationWarning)
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REFERENCE = ROOT / "studies/reference"
SECONDS = 300  # reproduce, where nothing is encoded yet and no sha256 is recorded


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Executes a notebook in `tmp_path/notebooks`, its Jupyter state in `tmp_path` too."""
    for name in ("DATA_DIR", "RUNTIME_DIR", "CONFIG_DIR", "PATH"):
        monkeypatch.setenv(f"JUPYTER_{name}", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    # tqdm, without ipywidgets; nothing else may be said on stderr
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.delenv("ALLOCATOR_STUDY", raising=False)
    place = tmp_path / "notebooks"
    place.mkdir()
    (tmp_path / "studies").symlink_to(ROOT / "studies")

    def execute(path):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(place)}},
        ).execute()
        assert not list(place.iterdir())
        return [output for cell in notebook.cells for output in cell.get("outputs", ())]

    return execute


def printed(outputs):
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def figures(outputs):
    return sum("image/png" in o.get("data", {}) for o in outputs)


def complaints(outputs):
    return [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_there_are_notebooks():
    assert {p.name for p in NOTEBOOKS} >= {"pareto_front.ipynb", "reproduce.ipynb"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_committed_stripped(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    assert cells
    assert all(not c.outputs and c.execution_count is None for c in cells)
    assert all(c.cell_type == "code" or not c.get("attachments") for c in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_on_the_reference(path, run):
    before = {p: p.stat().st_mtime_ns for p in REFERENCE.glob("allocations/*")}
    outputs = run(path)
    assert complaints(outputs) == []
    assert {p: p.stat().st_mtime_ns for p in REFERENCE.glob("allocations/*")} == before
    if path.stem == "pareto_front":
        assert figures(outputs) == 3
    if path.stem == "reproduce":
        assert "digests equal: True" in printed(outputs)
        assert "predicted equals written: True" in printed(outputs)


def test_front_of_another_study_without_baselines(run, monkeypatch, tmp_path):
    """From the committed answer alone: no checkpoint, no study.toml."""
    study = tmp_path / "another"
    (study / "allocations").mkdir(parents=True)
    for name in ("front.json", "allocations/pick.json", "allocations/knapsack.json"):
        shutil.copy(REFERENCE / name, study / name)
    monkeypatch.setenv("ALLOCATOR_STUDY", str(study))
    outputs = run(ROOT / "notebooks/pareto_front.ipynb")
    assert complaints(outputs) == []
    assert printed(outputs).startswith("another: ")
    assert figures(outputs) == 3


def test_a_changed_digest_fails_the_notebook(run, monkeypatch, tmp_path):
    """The comparison is a real one: a recorded sha256 of other bytes stops it."""
    study = tmp_path / "edited"
    study.mkdir()
    for path in REFERENCE.iterdir():
        if path.name in ("model", "generated", "splits.json"):
            (study / path.name).symlink_to(path)
    text = (REFERENCE / "study.toml").read_text()
    (study / "study.toml").write_text(
        text.replace("../../search_spaces", str(ROOT / "search_spaces"))
    )
    shutil.copytree(REFERENCE / "allocations", study / "allocations")
    pick = study / "allocations/pick.json"
    pick.write_text(json.dumps(unseal(pick.read_bytes()) | {"sha256": {"gguf": "0" * 64}}))
    monkeypatch.setenv("ALLOCATOR_STUDY", str(study))
    with pytest.raises(CellExecutionError, match="VerifyError"):
        run(ROOT / "notebooks/reproduce.ipynb")
