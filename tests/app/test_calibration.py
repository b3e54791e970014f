"""A study's text: several files, the default text, few windows, and what is said of it."""

import json
from pathlib import Path

import pytest

from allocator.app.calibration import Calibration
from allocator.app.study_file import CalibrationSpec
from allocator.checkpoint.reading import read_inventory
from allocator.errors import CalibrationError
from allocator.scoring.documents import Document, every_third, last_share

REFERENCE = Path(__file__).parents[2] / "studies/reference/model"


@pytest.fixture(scope="module")
def inventory():
    return read_inventory(REFERENCE)


def write(path, n, *, first=0):
    path.write_text("".join(json.dumps({"ids": [0, first + i]}) + "\n" for i in range(n)))


def test_without_documents_the_default_text_is_read(inventory, tmp_path):
    calibration = Calibration(tmp_path, CalibrationSpec(window=2048), inventory)
    search, selection = calibration.splits
    assert calibration.summary == (
        f"default text, 220 records: {len(search)} search + {len(selection)} selection windows "
        "of 2048"
    )
    assert len({d.domain for d in search}) == 10
    assert len(search) > 20
    assert len(selection) > 5
    assert {len(d.ids) for d in search + selection} == {2048}


def test_of_several_files_each_is_a_domain(inventory, tmp_path):
    write(tmp_path / "a.jsonl", 3)
    write(tmp_path / "b.jsonl", 6, first=10)
    spec = CalibrationSpec(("a.jsonl", "b.jsonl"), selection_documents=2)
    calibration = Calibration(tmp_path, spec, inventory)
    assert [d.domain for d in calibration.selection] == ["a", "b", "b"]
    assert [d.ids[1] for d in calibration.search] == [0, 10, 1, 11, 13, 14]
    assert calibration.summary == "9 records: 6 search + 3 selection documents of 2"
    assert calibration.use == "the profile reads 6 of them, a full trial 6, the pick 2"


def test_the_last_documents_of_each_domain_are_held_out(inventory, tmp_path):
    write(tmp_path / "a.jsonl", 8)
    write(tmp_path / "b.jsonl", 17, first=100)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"ids": [0, 3]}\n')  # a copy of what is searched is not held out
    spec = CalibrationSpec(("a.jsonl", "b.jsonl"), held_out=0.25)
    calibration = Calibration(tmp_path, spec, inventory)
    assert [d.ids[1] for d in calibration.report] == [7, 113, 114, 115, 116]
    used = [d.ids for split in calibration.splits for d in split]
    assert sorted(ids[1] for ids in used) == [*range(7), *range(100, 113)]
    assert calibration.summary == (
        "26 records: 14 search + 6 selection + 6 held-out documents of 2"
    )


@pytest.mark.parametrize(("n", "held"), [(2, []), (3, [2]), (9, [8]), (20, [18, 19])])
def test_of_domains_of_one_document_some_are_held_out(n, held):
    documents = [Document((0, i), domain=str(i)) for i in range(n)]
    others, last = last_share(documents, 1 / 8)
    assert [d.ids[1] for d in last] == held
    assert others == [d for d in documents if d not in last]


def test_without_held_out_text_the_way_to_it_is_named(inventory, tmp_path):
    write(tmp_path / "a.jsonl", 2)
    for spec in (CalibrationSpec("a.jsonl"), CalibrationSpec("a.jsonl", held_out=0.5)):
        with pytest.raises(CalibrationError, match=r"no held-out text; name some with --text FILE"):
            _ = Calibration(tmp_path, spec, inventory).report


@pytest.mark.parametrize(("n", "selection"), [(2, [1]), (3, [2]), (7, [2, 5])])
def test_domains_of_one_document_are_split_as_one(n, selection):
    documents = [Document((0, i), domain=str(i)) for i in range(n)]
    assert [d.ids[1] for d in every_third(documents)[1]] == selection
    assert sorted(d.ids[1] for part in every_third(documents) for d in part) == list(range(n))


def test_a_single_window_and_an_empty_list_are_refused(inventory, tmp_path):
    write(tmp_path / "a.jsonl", 1)
    with pytest.raises(CalibrationError, match=r"a\.jsonl: one document of 2 tokens, and search"):
        _ = Calibration(tmp_path, CalibrationSpec("a.jsonl"), inventory).splits
    with pytest.raises(CalibrationError, match="an empty list of files"):
        _ = Calibration(tmp_path, CalibrationSpec(()), inventory).splits
