"""Anybody's GGUF beside the pick: its KL, and what is refused before llama.cpp sees it."""

import gguf
import numpy as np
import pytest

from allocator import api
from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation import Allocation
from allocator.errors import AllocatorError, VerifyError
from allocator.export.gguf.apart import LlamaProcess
from allocator.export.gguf.exact import kl_divergence
from allocator.export.gguf.files import write_gguf
from allocator.export.gguf.foreign import check_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.targets import GGUF
from allocator.testing.tensors import CheckpointTensors


@pytest.fixture(scope="module")
def layout(finished_study, study_cache):
    return StudyFolder(finished_study, cache=study_cache).layout


def written(path, layout, fmt="Q8_0"):
    formats = dict.fromkeys(layout.groups, fmt)
    allocation = Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, tuple(range(layout.inventory.n_experts))),
        formats=formats,
        experts_used=layout.inventory.experts_used,
    )
    write_gguf(path, layout, allocation, CheckpointTensors(layout, formats))
    return path


def test_a_file_is_scored_beside_the_pick(finished_study, study_cache, layout, tmp_path):
    """The KL is that of llama.cpp's logits, computed once more without the scorer."""
    path = written(tmp_path / "theirs.gguf", layout)
    original = written(tmp_path / "original.gguf", layout, "F32")
    table = api.score_gguf(finished_study, path, documents=2, cache=study_cache, threads=2)
    assert list(table["file"]) == ["theirs.gguf", "pick"]
    assert table["bytes"][0] == path.stat().st_size
    assert 8 < table["bits"][0] < 9
    documents = StudyFolder(finished_study, cache=study_cache).calibration.report[:2]
    values = []
    with LlamaCpp(original, context=64) as exact, LlamaCpp(path, context=64, exact=False) as own:
        for document in documents:
            values.append(kl_divergence(exact.logits(document.ids), own.logits(document.ids)))
    assert table["kl"][0] == pytest.approx(np.mean(values), rel=0.02)
    domains = [c for c in table.columns if c.startswith("kl ")]
    assert np.isclose(table[domains].mean(axis=1), table["kl"]).all()  # as long as one another
    assert table["kl"][1] > table["kl"][0]
    assert table.attrs["split"] == "2 documents of the report split"


def test_other_files_are_refused(checkpoints, layout, tmp_path):
    path = written(tmp_path / "theirs.gguf", layout)
    data = path.read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[:-64])
    with pytest.raises(VerifyError, match="damaged"):
        check_gguf(tmp_path / "short.gguf", layout)
    other = GGUF.layout(read_inventory(checkpoints["deepseek"]))
    with pytest.raises(VerifyError, match="a file of 'qwen3moe', needed 'deepseek2'"):
        check_gguf(path, other)
    nameless = tmp_path / "nameless.gguf"
    nameless.write_bytes(data.replace(b"general.architecture", b"general.architectura", 1))
    with pytest.raises(VerifyError, match="names no architecture, needed 'qwen3moe'"):
        check_gguf(nameless, layout)
    part = tmp_path / "a-00001-of-00002.gguf"
    part.write_bytes(data)
    with pytest.raises(AllocatorError, match=r"1 of 2 parts are missing, e.g. a-00002-of-00002"):
        check_gguf(part, layout)
    wider = tmp_path / "wider.gguf"
    wider.write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(VerifyError, match=r"attn_q\.weight is missing"):
        check_gguf(wider, layout)


def test_a_split_model_is_read_from_any_part(layout, tmp_path):
    path = written(tmp_path / "whole.gguf", layout)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "split.gguf", "qwen3moe", split_max_tensors=9)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 1
    checked = check_gguf(parts[-1], layout)
    assert checked.path == parts[0]
    assert checked.encoded_bytes == check_gguf(path, layout).encoded_bytes
    ids = list(range(1, 20))
    with LlamaProcess(checked.path, context=32) as split, LlamaProcess(path, context=32) as whole:
        np.testing.assert_array_equal(split.logits(ids), whole.logits(ids))


def test_a_file_that_ends_llama_cpp_is_one_line(layout, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with LlamaProcess(path, context=8) as llama, pytest.raises(VerifyError) as error:
        llama.logits([1, 2])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    good = written(tmp_path / "good.gguf", layout)
    with LlamaProcess(good, context=8) as llama:
        llama.logits([1, 2])
        llama._process.kill()
        with pytest.raises(VerifyError, match="signal 9"):
            llama.logits([1, 2])
