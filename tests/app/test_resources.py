"""Keywords of the verbs: what they come to, and what happens to a wrong one."""

from pathlib import Path

import pytest

from allocator import api
from allocator.app.resources import Resources
from allocator.app.study_folder import StudyFolder
from allocator.errors import AllocatorError
from allocator.study.stop_rule import StopRule

VERBS = {
    "search": (), "estimate": (), "profile": (), "front": (), "score": ("pick.json",),
    "explain": ("pick.json",), "materialize": ("pick.json", "out"), "verify": ("out",),
    "evaluate": (), "report": (),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_keyword_is_refused_by_name(fresh_study, verb):
    with pytest.raises(TypeError, match=r"unknown keyword 'thread'; .* threads") as caught:
        getattr(api, verb)(fresh_study, *VERBS[verb], thread=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", [api.plan, api.reproduce])
def test_a_wrong_keyword_is_refused_before_a_file_is_read(verb):
    with pytest.raises(TypeError, match="unknown keyword 'thread'"):
        verb("missing.json", thread=1)


def test_keywords_come_back(fresh_study, tmp_path):
    options = {"cache": tmp_path, "threads": 3, "progress": True, "torch_device": "cpu"}
    found = Resources.of(options)
    assert found == Resources(**options)
    assert found.options == options
    assert Resources.of({}).options == Resources().options
    study_folder = StudyFolder(fresh_study, target="safetensors", **options)
    assert (study_folder.cache, study_folder.threads) == (Path(tmp_path), 3)
    assert study_folder.layout.target == study_folder.target == "safetensors"


def test_a_launch_takes_the_gaps_from_the_study(fresh_study):
    study_folder = StudyFolder(fresh_study)
    launch = study_folder.launch()
    assert (launch.sampler, launch.seed, launch.stop) == ("auto", 0, StopRule(trials=8))
    assert launch.budget == study_folder.budget()


def test_a_stop_rule_counts_from_when_it_is_started():
    rule = StopRule(seconds=1000)
    assert not rule.is_late
    started = rule.started()
    assert started.started() is started
    assert not started.is_late
    assert StopRule(seconds=0).started().is_late
    assert not StopRule().started().is_late
    with pytest.raises(AllocatorError, match="trials 0: needed"):
        StopRule(trials=0).check()
