"""What every runtime must do, as test cases that a runtime's own test class inherits.

In: a `RuntimeCase`, given by the fixture `case`. Out: tests for pytest. Invariant: they compare a
written file with what its target predicted and with what its source gave, never with itself.

    class TestMine(RuntimeConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def case(cls, ...):
            return RuntimeCase(MY_RUNTIME, source, scorer, foreign=another_targets_allocation)
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from allocator.decision.allocation import Allocation
from allocator.errors import AllocatorError, TargetError, VerifyError
from allocator.export.base import Runtime
from allocator.export.checkpoint import Written, materialize
from allocator.export.manifest import ALLOCATION, MANIFEST, Manifest, file_digest
from allocator.export.runtimes import runtime_named
from allocator.export.tensors import TensorSource
from allocator.export.verification import Verification, verify
from allocator.files.checksums import seal
from allocator.scoring.streamed_scorer import AnyScorer
from allocator.targets import target_named
from allocator.targets.layout import part_names

_IMPORTANCE = "0" * 64


@dataclass(frozen=True)
class RuntimeCase:
    """A runtime with something to write.

    Attributes:
        runtime: under test, registered.
        source: tensors of an allocation that the runtime can write.
        scorer: scores the allocation, on a few documents.
        foreign: an allocation of another target that the runtime cannot write; None if it writes
            every target's.
        tolerance: of the verification, nats per token; None for the runtime's own.
    """

    runtime: Runtime
    source: TensorSource
    scorer: AnyScorer
    foreign: Allocation | None = None
    tolerance: float | None = None


class RuntimeConformance:
    """Tests of one runtime; a class that inherits them gives the fixture `case`."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls) -> RuntimeCase:
        """Gives the runtime, and what it writes."""
        raise NotImplementedError("give a fixture `case`, see RuntimeCase")

    @pytest.fixture(scope="class")
    @classmethod
    def written(cls, case: RuntimeCase, tmp_path_factory: pytest.TempPathFactory) -> Written:
        """Gives a written directory, which tests only read."""
        return _write(case, tmp_path_factory.mktemp("runtime") / "written")

    def test_it_is_registered_with_its_target(self, case: RuntimeCase) -> None:
        """Looks the runtime and the target up by their name."""
        assert runtime_named(case.runtime.name) is case.runtime
        assert target_named(case.runtime.name) is case.runtime.target

    def test_written_bytes_are_those_predicted(self, case: RuntimeCase, written: Written) -> None:
        """Compares the file, its tensors and its overhead with what was predicted."""
        source, manifest = case.source, written.manifest
        size = source.allocation.nbytes(source.layout, case.runtime.target)
        assert (written.folder / case.runtime.file_name).stat().st_size == size.file
        assert (manifest.tensor_bytes, manifest.overhead_bytes) == (size.tensors, size.overhead)
        assert size.file == size.tensors + size.overhead

    def test_data_follow_the_header_in_the_layouts_order(
        self, case: RuntimeCase, written: Written
    ) -> None:
        """Compares the bytes at the predicted places with the source's, tensor by tensor."""
        data = np.fromfile(written.folder / case.runtime.file_name, np.uint8)
        end = 0
        for start, expected in _places(case):
            stored = data[start : start + expected.size]
            assert stored.tobytes() == expected.tobytes()
            end = start + expected.size
        assert case.runtime.target.padded(end) in (end, len(data))
        assert end <= len(data)

    def test_what_is_read_back_is_what_was_written(
        self, case: RuntimeCase, written: Written
    ) -> None:
        """Compares tensors by the layout's names, and formats where the file says one."""
        source, layout = case.source, case.source.layout
        tensors = case.runtime.read(written.folder / case.runtime.file_name, layout)
        names = [tensor.source for tensor in layout.full_precision]
        for group in layout.groups:
            stored = source.allocation.parts(layout, group)
            for part, name in enumerate(part_names(group, stored)):
                assert tensors[name].format in (None, stored[part][0].name)
                assert source.matches(group, part, tensors[name].data)
                names.append(name)
        assert tensors.keys() == {*names}
        for tensor in layout.full_precision:
            expected = case.runtime.full_precision_bytes(source, tensor)
            assert tensors[tensor.source].data.tobytes() == expected.tobytes()

    def test_two_writes_are_equal(
        self, case: RuntimeCase, written: Written, tmp_path: Path
    ) -> None:
        """Compares two directories byte for byte, manifests included."""
        again = _write(case, tmp_path / "again")
        assert again.manifest == written.manifest
        for name in (*again.manifest.sha256, MANIFEST):
            assert (again.folder / name).read_bytes() == (written.folder / name).read_bytes()

    def test_verification_passes(self, case: RuntimeCase, written: Written) -> None:
        """Runs the file, whose loss is the candidate's within the tolerance."""
        checked = _verify(case, written.folder)
        limit = case.runtime.tolerance if case.tolerance is None else case.tolerance
        assert checked.runtime is case.runtime
        assert 0 <= checked.divergence <= limit
        assert checked.file_bytes == written.manifest.file_bytes

    @pytest.mark.parametrize("place", ["first", "middle", "last"])
    def test_a_flipped_bit_is_refused(
        self, case: RuntimeCase, written: Written, tmp_path: Path, place: str
    ) -> None:
        """Checks that a tensor's damaged data is refused, even where the manifest agrees."""
        folder, file = _copy(written, tmp_path), tmp_path / "copy" / case.runtime.file_name
        places = list(_places(case))
        start, expected = places[{"first": 0, "middle": len(places) // 2, "last": -1}[place]]
        data = bytearray(file.read_bytes())
        data[start + expected.size // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(VerifyError, match="changed since it was written"):
            _verify(case, folder)
        _sign(folder, written.manifest)
        with pytest.raises(VerifyError, match="holds other bytes"):
            _verify(case, folder)

    def test_a_truncated_file_is_refused(
        self, case: RuntimeCase, written: Written, tmp_path: Path
    ) -> None:
        """Cuts the file off, and makes the manifest agree; expects one line."""
        folder, file = _copy(written, tmp_path), tmp_path / "copy" / case.runtime.file_name
        for size in (0, 7, file.stat().st_size // 2):
            os.truncate(file, size)
            _sign(folder, written.manifest)
            with pytest.raises(AllocatorError) as caught:
                _verify(case, folder)
            assert "\n" not in str(caught.value)
            file.write_bytes((written.folder / case.runtime.file_name).read_bytes())

    def test_what_it_cannot_express_is_refused(self, case: RuntimeCase, tmp_path: Path) -> None:
        """Asks for an allocation of another target; expects the name of the container."""
        if case.foreign is None:
            assert case.runtime.can_write(case.source.allocation)
            return
        assert not case.runtime.can_write(case.foreign)
        with pytest.raises(TargetError, match=f"cannot be written as {case.runtime.name}"):
            case.runtime.check_can_write(case.foreign)


def _write(case: RuntimeCase, folder: Path) -> Written:
    return materialize(case.source, folder, container=case.runtime.name, importance=_IMPORTANCE)


def _verify(case: RuntimeCase, folder: Path) -> Verification:
    return verify(folder, lambda _: case.source, case.scorer, tolerance=case.tolerance)


def _places(case: RuntimeCase) -> Iterator[tuple[int, np.ndarray]]:
    """Where each tensor begins in the file, by prediction, and its bytes."""
    source, target = case.source, case.runtime.target
    start = source.allocation.nbytes(source.layout, target).header
    for group in source.layout.groups:
        for part in range(len(source.allocation.parts(source.layout, group))):
            data = source.encoded(group, part)
            yield start, data
            start += target.padded(data.nbytes)
    for tensor in source.layout.full_precision:
        data = case.runtime.full_precision_bytes(source, tensor).reshape(-1)
        yield start, data
        start += target.padded(data.nbytes)


def _copy(written: Written, folder: Path) -> Path:
    copy = folder / "copy"
    for name in (*written.manifest.sha256, MANIFEST, ALLOCATION):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((written.folder / name).read_bytes())
    return copy


def _sign(folder: Path, manifest: Manifest) -> None:
    """Makes the manifest agree with what lies beside it."""
    digests = {name: file_digest(folder / name) for name in manifest.sha256}
    (folder / MANIFEST).write_bytes(seal(msgspec.structs.replace(manifest, sha256=digests)))
