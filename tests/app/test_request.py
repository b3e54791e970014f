"""Numbers that a verb is asked with: one line for what no machine or sampler takes."""

import re
import shutil

import pytest

from allocator import api
from allocator.app.request import SearchRequest
from allocator.app.study_file import StudySpec
from allocator.app.study_folder import StudyFolder
from allocator.cli import main
from allocator.decision.budget import Budget
from allocator.errors import AllocatorError, StudyError
from allocator.samplers import SAMPLERS, check_seed
from allocator.samplers.problem import Problem
from allocator.study.stop_rule import StopRule


@pytest.mark.parametrize("threads", [0, -1, 2.5, "2", True, 1025, 100_000])
def test_threads_that_no_machine_has_are_refused(fresh_study, threads):
    """Torch raises on some and crashes the process on others; 0 was taken for all cores."""
    with pytest.raises(AllocatorError, match=f"threads {re.escape(repr(threads))}: needed a whole"):
        api.profile(fresh_study, threads=threads)


def test_a_cache_may_be_named_by_text(fresh_study, tmp_path):
    assert StudyFolder(fresh_study, cache=str(tmp_path)).cache == tmp_path


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_largest_seed_is_one_that_every_sampler_takes(surrogates, name):
    most = 2**32 - 1
    check_seed(most)
    SAMPLERS[name](Problem(surrogates["gguf"], Budget(1, "file"), population=4), most)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": 2**32}, "seed 4294967296: needed a whole number from 0"),
        ({"seed": 1.5}, "seed 1.5: needed a whole"),
        ({"stop": StopRule(trials=1.5)}, "trials 1.5: needed a whole"),
        ({"stop": StopRule(trials="8")}, "trials '8': needed a whole"),
        ({"stop": StopRule(tokens=0)}, "tokens 0: needed a whole"),
        ({"stop": StopRule(seconds=-1)}, "seconds -1: needed a number of seconds, 0 or more"),
        ({"stop": StopRule(seconds=float("nan"))}, "seconds nan: needed a number"),
        ({"workers": 0}, "workers 0: needed a whole"),
        ({"workers": 5000}, "workers 5000: needed a whole"),
        ({"lease_seconds": 0}, "lease_seconds 0: needed a number of seconds, 0.1 or more"),
    ],
    ids=str,
)
def test_a_request_out_of_range_is_refused_before_anything_is_measured(
    fresh_study, study_cache, wrong, message
):
    folder = StudyFolder(fresh_study, cache=study_cache)
    with pytest.raises(AllocatorError, match=message):
        folder.launch(SearchRequest(fresh_study, **wrong))


@pytest.fixture
def study(fresh_study, tmp_path):
    """A study folder of the test's own."""
    return shutil.copytree(fresh_study, tmp_path / "study")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--storage", "memory"], "storage: got 'memory', needed journal:PATH"),
        (["--storage", "journal:/nowhere/trials"], "needed an existing folder, /nowhere is none"),
        (["--storage", "grpc://server"], "storage grpc://server: needed grpc://HOST:PORT"),
        (["--tokens", "10"], "10 forward tokens; the profile, the original, one trial"),
    ],
    ids=str,
)
def test_a_dry_run_refuses_what_its_search_would(study, study_cache, flags, said, capsys):
    for dry in (["--dry-run"], []):
        arguments = ["search", str(study), *dry, *flags, "--quiet", "--threads", "1"]
        assert main([*arguments, "--cache", str(study_cache)]) == 2
        assert said in capsys.readouterr().err


def test_a_dry_run_reads_the_report_split(study, study_cache):
    (study / "report.jsonl").write_bytes((study / "documents.jsonl").read_bytes())
    with pytest.raises(AllocatorError, match=r"report\.jsonl: shares a document with search"):
        api.estimate(study, cache=study_cache, threads=1)
    (study / "report.jsonl").unlink()
    with pytest.raises(
        AllocatorError, match=r'study\.toml: \[calibration\] report = "report.jsonl": no such'
    ):
        api.estimate(study, cache=study_cache, threads=1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "trials = 8",
            f"trials = {10**19}",
            "trials = 10000000000000000000: needed a whole number from 1",
        ),
        (
            "trials = 8",
            f"trials = {2**31}",
            "trials = 2147483648: needed a whole number from 1 to 2,147,483,647",
        ),
        ("[2, 4, 40]", "[4, 2]", r"rungs = \[4, 2\]: needed rising numbers, .*: \[2, 4\]"),
        ("[2, 4, 40]", "[2, 2, 4]", r"rungs = \[2, 2, 4\]: needed rising numbers, .*: \[2, 4\]"),
    ],
)
def test_numbers_of_study_toml_out_of_range_are_refused(study, old, new, said):
    path = study / "study.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(StudyError, match=rf"study\.toml: .*{said}"):
        StudySpec.read(study)
