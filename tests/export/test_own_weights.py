"""Weights of one's own, a changed norm and router: written, named, verified, told from others."""

import json
from functools import partial

import numpy as np
import pytest

from allocator.errors import VerifyError
from allocator.export.checkpoint import materialize
from allocator.export.manifest import Manifest
from allocator.export.runtimes import runtime_named
from allocator.export.tensors import EncodedTensors
from allocator.export.verification import verify
from allocator.families import Role
from allocator.scoring.candidates import Candidate, rows_of

CASES = [("deepseek", "gguf"), ("qwen3", "safetensors")]


class Tuned(EncodedTensors):
    """The codecs' bytes; the last norm doubled, and half of every router."""

    digest = "t" * 64

    def __init__(self, encodings, allocation, **options):
        super().__init__(encodings, allocation, **options)
        self.candidate = Candidate.of(allocation, _Scored(self, encodings))

    def full_precision(self, tensor):
        return super().full_precision(tensor) * factor_of(tensor)

    def full_precision_raw(self, tensor):
        dtype = self.layout.inventory.tensors[tensor.source].dtype
        values = self.full_precision(tensor)
        if dtype == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).view(np.uint8)


class _Scored:
    """The same for a model."""

    def __init__(self, source, encodings):
        self.digest = source.digest
        self._source = source
        self.has, self.put = encodings.has, encodings.put
        self.encoded, self.decoded = encodings.encoded, encodings.decoded
        self.release = encodings.release

    def full_precision(self, tensor, experts):
        if experts is not None:
            retained = self._source.allocation.retained_experts[tensor.layer]
            experts = [retained.index(e) for e in experts]
        return rows_of(self._source.full_precision(tensor), experts)


def factor_of(tensor):
    if tensor.role is Role.ROUTER:
        return np.float32(0.5)
    return np.float32(2 if tensor.role is Role.NORM and tensor.layer is None else 1)


@pytest.mark.parametrize(("name", "target"), CASES)
def test_they_are_written_named_and_verified(case, tmp_path, name, target):
    made = case(name, target)
    formats = ("BF16",) if target == "gguf" else ("Q8_0", "Q4_0")
    chosen = made.allocation(formats=formats)
    plain = made.write(tmp_path / "plain", target, chosen)
    tuned = made.write(tmp_path / "tuned", target, chosen, source=Tuned)
    assert tuned.manifest.weights_digest == Tuned.digest
    assert Manifest.read(tuned.folder) == tuned.manifest
    assert plain.manifest.weights_digest == ""
    assert "weights" not in json.loads((plain.folder / "manifest.json").read_text())
    assert tuned.manifest.file_bytes == plain.manifest.file_bytes
    check_differences(made, plain.folder, tuned.folder, target)
    limit = 0.05 if target == "gguf" else None  # random weights flip their routing
    sources = {kind: partial(kind, made.encodings) for kind in (EncodedTensors, Tuned)}
    verified = verify(tuned.folder, sources[Tuned], made.scorer, tolerance=limit)
    before = verify(plain.folder, sources[EncodedTensors], made.scorer, tolerance=limit)
    assert abs(verified.loss - before.loss) > 1e-3
    assert verify(tuned.folder, sources[Tuned], made.scorer, tolerance=limit) == verified
    for folder, kind in ((tuned.folder, EncodedTensors), (plain.folder, Tuned)):
        with pytest.raises(VerifyError, match=r"made of weights .*, held against weights") as said:
            verify(folder, sources[kind], made.scorer)
        assert "\n" not in str(said.value)


def check_differences(made, plain, tuned, target):
    """The files differ in what was changed, and nowhere else."""
    runtime = runtime_named(target)
    before, after = (
        runtime.read(folder / runtime.file_name, made.layout) for folder in (plain, tuned)
    )
    changed = {t.source for t in made.layout.full_precision if factor_of(t) != 1}
    assert changed
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.data.tobytes() == after[name].data.tobytes()) == (name not in changed)


@pytest.mark.parametrize(("name", "target"), CASES)
def test_a_directory_of_other_weights_is_not_replaced(case, tmp_path, name, target):
    made = case(name, target)
    chosen, options = made.allocation(), {"container": target, "importance": "i" * 64}
    materialize(Tuned(made.encodings, chosen), tmp_path / "out", **options)
    with pytest.raises(VerifyError, match="holds something else"):
        materialize(EncodedTensors(made.encodings, chosen), tmp_path / "out", **options)
    materialize(Tuned(made.encodings, chosen), tmp_path / "out", **options)


@pytest.mark.parametrize(("name", "target"), CASES)
def test_a_norm_of_somebody_else_is_found(case, tmp_path, name, target):
    """The manifest names the weights; the file has another norm."""
    made = case(name, target)
    chosen = made.allocation(formats=("Q8_0",))

    class Other(Tuned):
        def full_precision(self, tensor):
            return super().full_precision(tensor) * np.float32(1 + (tensor.role is Role.NORM))

    done = made.write(tmp_path / "out", target, chosen, source=Other)
    with pytest.raises(VerifyError, match=r"norm.* holds other bytes than its source"):
        verify(done.folder, partial(Tuned, made.encodings), made.scorer)
