"""`held-out.json`: what is kept of several evaluations, and what is refused."""

import pytest
from msgspec.structs import replace

from allocator.app.held_out_file import HELD_OUT, HeldOut, HeldOutRow, HeldOutSplit, keep_row
from allocator.errors import StudyError
from allocator.files.checksums import seal

EMPTY = HeldOutSplit("report", "digest", [4, 4], ["", ""], [])


def row(name, kl=0.5, kind="baseline", weights=""):
    return HeldOutRow(
        name=name, kind=kind, allocation=f"of {name}", weights=weights, bits=2.0, bytes=8,
        experts="", kl=kl, perplexity=2.0, top1=0.5, kl_of=[kl, kl], nll_of=[1.0, 1.0],
        top1_of=[0.5, 0.5],
    )  # fmt: skip


def test_rows_of_the_same_documents_come_together(tmp_path):
    assert HeldOut.read(tmp_path) is None
    keep_row(tmp_path, "c", "gguf", EMPTY, row("b"))
    keep_row(tmp_path, "c", "gguf", EMPTY, row("a"))
    keep_row(tmp_path, "c", "gguf", EMPTY, row("b", 0.25))
    other = replace(EMPTY, documents="other")
    keep_row(tmp_path, "c", "gguf", other, row("pick", kind="allocation", weights="w"))
    splits = HeldOut.read(tmp_path).splits
    assert [[r.name for r in s.rows] for s in splits] == [["a", "b"], ["pick"]]
    assert splits[0].of("of b", "").kl == 0.25
    assert splits[1].of("of pick", "") is None
    assert splits[1].of("of pick", "w").kind == "allocation"
    keep_row(tmp_path, "another", "gguf", EMPTY, row("a"))
    assert [len(s.rows) for s in HeldOut.read(tmp_path).splits] == [1]


def test_a_damaged_file_is_refused_and_written_anew(tmp_path, caplog):
    path = tmp_path / HELD_OUT
    short = replace(row("a"), kl_of=[0.5])
    for content in (b"{", seal(HeldOut("c", "gguf", [replace(EMPTY, rows=[short])]))):
        path.write_bytes(content)
        with pytest.raises(StudyError, match=r"no held-out figures.*allocator evaluate"):
            HeldOut.read(tmp_path)
    keep_row(tmp_path, "c", "gguf", EMPTY, row("a"))
    assert "written anew" in caplog.text
    assert HeldOut.read(tmp_path).splits[0].rows == [row("a")]


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path, caplog):
    keep_row(tmp_path / "file/study", "c", "gguf", EMPTY, row("a"))
    (tmp_path / "other").write_text("")
    keep_row(tmp_path / "other", "c", "gguf", EMPTY, row("a"))
    assert "not written" in caplog.text
