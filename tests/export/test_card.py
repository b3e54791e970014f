"""The model card of a written directory, read as the hub reads it."""

import json
import re
import shutil

import pytest
import yaml

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord, Finishing, recorded_bytes
from allocator.errors import VerifyError
from allocator.export.card import CARD
from allocator.export.checkpoint import materialize
from allocator.export.manifest import Manifest, file_digest
from allocator.export.tensors import EncodedTensors
from allocator.export.verification import verify
from allocator.targets import TARGETS

ODD = 'a|b`c<script>\n---\n# *x*: "y" [z](http://q) \x1b[31m'


@pytest.fixture
def made(checkpoints, tmp_path):
    """`made(target, head, **changes)`: a written directory, its layout and its record."""

    def get(target, head="", **changes):
        path = shutil.copytree(checkpoints["qwen3"], tmp_path / "secret place" / target)
        (path / "README.md").write_text(head)
        layout = TARGETS[target].layout(read_inventory(path))
        formats = {g: "Q8_0" if "experts" in g else "BF16" for g in layout.groups}
        allocation = Allocation.of(
            target=target, retained=dict.fromkeys(layout.layers, (0, 3, 5)), formats=formats,
            experts_used=2,
        )  # fmt: skip
        size = allocation.nbytes(layout)
        record = AllocationRecord(**{
            "name": "pick", "kind": "proposal", "allocation": allocation.to_json(),
            "digest": allocation.digest, "checkpoint": layout.inventory.digest,
            "importance": "1" * 64, "codec": "ggml 0",
            "bytes": {"budget": 7} | recorded_bytes(size),
            "effective_bits": 3.21, "loss": {"search": 0.125, "selection": 0.25}, **changes,
        })  # fmt: skip
        source = EncodedTensors(Encodings(tmp_path / "bank", layout, {}), allocation)
        write = {"container": target, "importance": record.importance, "record": record}
        return materialize(source, tmp_path / "out", **write), layout, size, source, write

    return get


def parted(folder):
    """The head as data, and the rest."""
    text = (folder / CARD).read_text()
    _, head, body = re.split(r"^---$", text, maxsplit=2, flags=re.M)
    return yaml.safe_load(head), body


@pytest.mark.parametrize("target", ["gguf", "safetensors"])
def test_a_card_has_the_bytes_and_figures_of_its_record(made, target, tmp_path):
    written, _, size, *_ = made(target)
    head, body = parted(written.folder)
    assert head["library_name"] == {"gguf": "gguf", "safetensors": "transformers"}[target]
    assert not {"license", "base_model"} & set(head)  # nothing names one
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in body.splitlines()
        if "|" in line
    ]
    encoded = [
        int(row[-2].replace(",", ""))
        for row in rows
        if len(row) in (4, 5) and re.fullmatch(r"[\d,]+", row[-2])
    ]
    assert sum(encoded) == 2 * size.encoded  # by role, and by layer once more
    assert f"{size.file:,} B" in body
    assert f"{size.file:,} B" == f"{(written.folder / written.manifest.file).stat().st_size:,} B"
    assert next(r for r in rows if r[0] == "search")[:2] == ["search", "0.12500"]
    assert file_digest(written.folder / written.manifest.file) in body
    assert "3 of 8 experts" in body
    assert f"--container {target}" in body
    assert "secret" not in body
    assert str(tmp_path) not in body


def test_a_card_of_shards_names_their_index_and_size(made, tmp_path):
    one, _, _, source, write = made("safetensors")
    written = materialize(source, tmp_path / "shards", **write, shard_bytes=50_000)
    body = parted(written.folder)[1]
    assert "`model.safetensors.index.json` and its files" in body
    assert f"{written.manifest.file_bytes:,} B" in body
    assert "OUT --shard-size 50000 --container safetensors" in body
    assert one.manifest.sha256_of_weights in body


def test_names_from_elsewhere_are_escaped(made):
    head = f"---\nlicense: other\nlicense_name: {json.dumps(ODD)}\n---\n"
    written, *_ = made("safetensors", head, name=ODD, loss={ODD: 0.5})
    head, body = parted(written.folder)
    assert head["license"] == "other"
    assert "\n" not in head["license_name"]
    assert "\x1b" not in body
    assert "<script>" not in re.sub(r"^```.*?^```$", "", body, flags=re.M | re.S)
    assert not [line for line in body.splitlines() if line in ("---", '# *x*: "y"')]
    row = next(line for line in body.splitlines() if "0.50000" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_finished_losses_stand_beside_the_unfinished(made):
    finished = Finishing({}, "i", {"search": 0.125}, {"search": 0.0625})
    written, *_ = made("safetensors", weights="2" * 64, finishing=finished)
    body = parted(written.folder)[1]
    assert "0.06250" not in body  # the weights that were written are not the finished ones
    assert "--unfinished" in body


def test_the_licence_and_its_file_come_from_the_checkpoint(made, checkpoints, tmp_path):
    path = shutil.copytree(checkpoints["qwen3"], tmp_path / "hub/models--Owner--Name/snapshots/1")
    (path / "LICENSE.txt").write_text("Be kind.")
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Name")
    layout = TARGETS["safetensors"].layout(read_inventory(path))
    _, _, _, source, write = made("safetensors")
    source = EncodedTensors(Encodings(tmp_path / "bank2", layout, {}), source.allocation)
    written = materialize(source, tmp_path / "other", **write)
    head, _ = parted(written.folder)
    assert (head["license"], head["base_model"]) == ("apache-2.0", "Owner/Name")
    assert (written.folder / "LICENSE.txt").read_text() == "Be kind."


def test_a_card_may_be_edited_and_no_other_file(made):
    written, _, _, source, write = made("safetensors")
    folder, before = written.folder, Manifest.read(written.folder)
    assert CARD not in before.sha256
    (folder / CARD).write_text("mine")
    again = materialize(source, folder, **write)  # takes its place
    assert again.manifest == before
    assert (folder / CARD).read_text() != "mine"
    (folder / "NOTES.md").write_text("mine")
    with pytest.raises(VerifyError, match="holds something else"):
        materialize(source, folder, **write)
    with pytest.raises(VerifyError, match=r"NOTES\.md: not in the manifest"):
        verify(folder, lambda _: source, None)
