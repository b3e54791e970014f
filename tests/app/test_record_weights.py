"""A record that names finished weights: written, verified, evaluated; others are as they were."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from allocator import api
from allocator.app.pick import _known
from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation_record import AllocationRecord, Finishing, finished_name
from allocator.errors import CheckpointError, SpaceError, VerifyError
from allocator.export.manifest import Manifest
from allocator.finishing.artifact import Description, write_artifact
from allocator.finishing.recipe import Recipe
from allocator.scoring.scorer import mean


@pytest.fixture
def study(finished_study, tmp_path):
    return Path(shutil.copytree(finished_study, tmp_path / "study"))


@pytest.fixture
def options(study_cache):
    return {"cache": study_cache, "threads": 1}


@pytest.fixture
def pick(study, options, finish_by_hand):
    """The study's pick, its record naming weights finished by hand; losses as scored in torch."""
    path = study / "allocations/pick.json"
    record = AllocationRecord.read(path)
    folder = StudyFolder(study, **options)
    encodings = folder.encodings.of(record.importance)
    finishing = Finishing(Recipe().to_json(), "i" * 64, record.loss, {})
    description = Description(
        record.digest, record.checkpoint, record.importance, record.codec, finishing, {}
    )
    changes = finish_by_hand(encodings, record.decision)
    formats = record.decision.format_of
    experts = {
        name: group.experts(record.decision.retained_experts) or None
        for name, group in folder.layout.groups.items()
    }
    artifact = write_artifact(
        path.parent, description, *changes,
        lambda name: encodings.encoded(name, formats[name], experts[name]),
    )  # fmt: skip
    path.write_bytes(record.finished_with(artifact.weights, finishing).to_bytes())
    scored = api.score(study, path, **options)
    assert abs(scored["loss"] - record.loss["search"]) > 1e-4
    after = {"search": scored["loss"], "selection": 0.5}
    finishing = msgspec.structs.replace(finishing, after=after)
    path.write_bytes(record.finished_with(artifact.weights, finishing).to_bytes())
    return path


def test_both_weights_are_written_told_apart_verified_and_rebuilt(study, pick, options, tmp_path):
    finished = api.materialize(study, pick, tmp_path / "finished", record=True, **options)
    plain = api.materialize(
        study, pick, tmp_path / "plain", record=True, unfinished=True, **options
    )
    both = api.materialize(
        study, pick, tmp_path / "both", container="safetensors", record=True, **options
    )
    record = AllocationRecord.read(pick)
    sha256 = [w.manifest.sha256[w.manifest.file] for w in (finished, plain, both)]
    assert record.sha256 == {"gguf": sha256[0], "safetensors": sha256[2]}
    assert record.finished.unfinished_sha256 == {"gguf": sha256[1]}
    assert record.unfinished.sha256 == {"gguf": sha256[1]}
    assert sha256[0] != sha256[1]
    assert finished.manifest.file_bytes == plain.manifest.file_bytes
    digests = [w.manifest.weights_digest for w in (finished, plain, both)]
    assert digests == [record.weights_digest, "", record.weights_digest]

    limit = 10.0  # random weights: llama.cpp's rounding flips their routing
    losses = {
        folder.name: api.verify(study, folder, tolerance=limit, **options).loss
        for folder in (finished.folder, plain.folder)
    }
    assert losses["finished"] == pytest.approx(record.finished.after["search"], abs=1e-6)
    assert losses["plain"] == pytest.approx(record.loss["search"], abs=1e-6)
    api.verify(study, both.folder, encode=True, **options)

    rebuilt = api.reproduce(pick, tmp_path / "again", **options)
    assert [w.manifest.sha256[w.manifest.file] for w in rebuilt] == [sha256[0], sha256[2]]


def test_a_loss_that_is_not_the_recorded_one_is_found(study, pick, options, tmp_path):
    written = api.materialize(study, pick, tmp_path / "out", container="safetensors", **options)
    record = AllocationRecord.read(pick)
    wrong = msgspec.structs.replace(record.finished, after={"search": 1.5})
    pick.write_bytes(msgspec.structs.replace(record, finishing=wrong).to_bytes())
    with pytest.raises(VerifyError, match=r"pick.json says 1\.500000"):
        api.verify(study, written.folder, **options)


def test_evaluate_and_explain_show_the_loss_before_and_after(study, pick, options):
    table = api.evaluate(study, [pick], documents=3, **options).set_index("name")
    record = AllocationRecord.read(pick)
    rows = [table.loc[name] for name in ("* pick", "* pick, unfinished")]
    assert rows[0]["bytes"] == rows[1]["bytes"] == record.bytes["encoded"]
    folder = StudyFolder(study, **options)
    scorer = folder.scorers.on(folder.calibration.report[:3])
    assert rows[1]["kl"] == mean(scorer.score(record.decision).kl, scorer.documents)
    assert abs(rows[0]["kl"] - rows[1]["kl"]) > 1e-4
    losses = api.explain(study, pick, **options).attrs["losses"]
    assert losses == [
        (split, record.loss[split], record.finished.after[split]) for split in record.loss
    ]
    plain = study / "allocations/knapsack.json"
    known = AllocationRecord.read(plain).loss.items()
    losses = api.explain(study, plain, **options).attrs["losses"]
    assert losses == [(split, loss, None) for split, loss in known]


def test_a_missing_or_damaged_file_is_one_line_with_the_way_out(study, pick, options, tmp_path):
    record = AllocationRecord.read(pick)
    path = pick.parent / finished_name(record.weights_digest)
    whole = path.read_bytes()
    for data in (whole[:-8], whole[:-8] + b"\1" * 8, None):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(CheckpointError, match="allocator finish") as caught:
            api.materialize(study, pick, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
        assert not (tmp_path / "out").exists()
        if data is None:
            break
    api.materialize(study, pick, tmp_path / "out", unfinished=True, **options)


def test_weights_of_another_allocation_are_refused(study, pick, options, tmp_path):
    record = AllocationRecord.read(pick)
    other = study / "allocations/knapsack.json"
    for part in ("digest", "importance"):
        foreign = AllocationRecord.read(other)
        if part == "importance":
            foreign = msgspec.structs.replace(record, importance="0" * 64)
        elif foreign.digest == record.digest:
            continue
        wrong = foreign.finished_with(record.weights_digest, record.finished)
        other.write_bytes(wrong.to_bytes())
        with pytest.raises(CheckpointError, match=r"of another (allocation|checkpoint)|neither"):
            api.materialize(study, other, tmp_path / "out", **options)


def test_a_search_that_ends_with_the_same_pick_keeps_its_finished_weights(study, pick, options):
    before = AllocationRecord.read(pick)
    api.search(study, **options)
    assert AllocationRecord.read(pick) == before
    plain = before.unfinished
    assert set(_known(pick, plain)) == {"sha256", "weights", "finishing"}
    assert _known(pick, msgspec.structs.replace(plain, digest="other")) == {}
    named = _known(pick, msgspec.structs.replace(plain, importance="f" * 64))
    assert named == {"sha256": before.finished.unfinished_sha256}


def test_a_record_without_finishing_has_no_such_key(finished_study):
    text = (finished_study / "allocations/pick.json").read_text()
    record = AllocationRecord.read(finished_study / "allocations/pick.json")
    assert not {"finishing", "weights"} & set(json.loads(text))
    assert record.unfinished == record
    assert record.losses == record.loss


def test_a_record_whose_weights_are_no_digest_is_refused(pick):
    record = AllocationRecord.read(pick)
    for changes in ({"weights": "../x"}, {"weights": msgspec.UNSET}):
        pick.write_bytes(msgspec.structs.replace(record, **changes).to_bytes())
        with pytest.raises(SpaceError, match="weights"):
            AllocationRecord.read(pick)


def test_the_manifest_says_which(study, pick, options, tmp_path):
    written = api.materialize(study, pick, tmp_path / "out", **options)
    plain = json.loads((written.folder / "manifest.json").read_text())
    assert plain["weights"] == AllocationRecord.read(pick).weights_digest
    assert Manifest.read(written.folder) == written.manifest
