"""A study of ours in optuna-dashboard, while its search goes on."""

import json
import os
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from allocator.study.stop_rule import StopRule

pytestmark = pytest.mark.slow

SPECS = {"journal": ("journal:{}/trials", "{}/trials"), "sqlite": ("sqlite:///{}/trials.db",) * 2}


@pytest.fixture
def dashboard(package):
    """`dashboard(storage)`: a function that gets a path of its HTTP API."""
    served = []

    def open_dashboard(storage):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folders = [str(package(name)) for name in ("optuna-dashboard", "bottle")]
        inherited = os.environ.get("PYTHONPATH", "")
        served.append(
            subprocess.Popen(
                [sys.executable, "-m", "optuna_dashboard._cli", storage, "--quiet",
                 "--server", "wsgiref", "--host", "127.0.0.1", "--port", str(port)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([*folders, inherited])},
            )
        )  # fmt: skip

        def get(path):
            with urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=60) as answer:
                return json.load(answer)

        for _ in range(240):
            try:
                get("studies")
                return get
            except URLError:
                assert served[-1].poll() is None
                time.sleep(0.25)
        raise AssertionError("the dashboard does not answer")

    yield open_dashboard
    for server in served:
        server.terminate()
        server.wait()


def shown(trial):
    """What the dashboard is to say of a trial."""
    return {
        "number": trial.number,
        "state": trial.state.name.capitalize(),
        "params": {name: str(value) for name, value in trial.params.items()},
        "values": trial.values,
        "reports": sorted(trial.intermediate_values.items()),
    }


def said(trial):
    """What the dashboard says of it."""
    return {
        "number": trial["number"],
        "state": trial["state"],
        "params": {p["name"]: p["param_external_value"] for p in trial["params"]},
        "values": trial.get("values"),
        "reports": [(v["step"], v["value"]) for v in trial["intermediate_values"]],
    }


@pytest.mark.parametrize("kind", SPECS)
def test_the_dashboard_shows_a_study_as_it_is(formula, opened, dashboard, tmp_path, kind):
    spec, storage = (text.format(tmp_path) for text in SPECS[kind])
    search = formula.search(opened(spec), "evolution", n_knapsack=1)
    search.run(StopRule(trials=1))
    get = dashboard(storage)
    (listed,) = get("studies")["study_summaries"]
    study_id = listed["study_id"]
    assert listed["study_name"] == "formula"
    assert len(get(f"studies/{study_id}")["trials"]) == 1
    search.run(StopRule(trials=20))
    ours = search.study.get_trials()
    assert {t.state.name for t in ours} == {"COMPLETE", "PRUNED"}
    for _ in range(60):
        study = get(f"studies/{study_id}?after=0")
        if len(study["trials"]) == len(ours) and study["trials"][-1]["state"] != "Running":
            break
        time.sleep(0.5)  # it looks at the storage now and then
    assert study["directions"] == ["minimize", "minimize"]
    assert study["objective_names"] == ["proxy_loss", "bytes"]
    assert study["has_intermediate_values"]
    assert list(map(said, study["trials"])) == list(map(shown, ours))
    front = {t["number"] for t in study["best_trials"]}
    assert front == {t.number for t in search.study.best_trials}
