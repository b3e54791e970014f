"""Finished weights: written, verified and scored as what they are, told from the plain ones."""

from functools import partial

import numpy as np
import pytest

from allocator.decision.allocation_record import Finishing
from allocator.errors import CheckpointError, VerifyError
from allocator.export.runtimes import runtime_named
from allocator.export.tensors import EncodedTensors
from allocator.export.verification import verify
from allocator.finishing.artifact import Description, write_artifact
from allocator.finishing.tensors import FinishedTensors
from allocator.targets.layout import part_names

CASES = [("deepseek", "gguf", "gguf"), ("qwen3", "gguf", "safetensors"),
         ("deepseek", "safetensors", "safetensors")]  # fmt: skip


def make_artifact(made, allocation, folder, changes):
    description = Description(
        allocation.digest, made.layout.inventory.digest, "i" * 64, "x",
        Finishing({}, "", {}, {}), {},
    )  # fmt: skip
    plain = EncodedTensors(made.encodings, allocation)
    numbers = {
        part: (name, number)
        for name in made.layout.groups
        for number, part in enumerate(part_names(name, allocation.parts(made.layout, name)))
    }
    return write_artifact(folder, description, *changes, lambda n: plain.encoded(*numbers[n]))


@pytest.mark.parametrize(("name", "target", "container"), CASES)
def test_they_are_written_verified_and_scored(
    case, finish_by_hand, tmp_path, name, target, container
):
    made = case(name, target)
    allocation = made.allocation(formats=("BF16", "Q8_0") if target == "gguf" else ("Q8_0", "Q4_0"))
    codes, values = finish_by_hand(made.encodings, allocation)
    artifact = make_artifact(made, allocation, tmp_path, (codes, values))

    def finished(encodings, chosen):
        return FinishedTensors(EncodedTensors(encodings, chosen), artifact)

    plain = made.write(tmp_path / "plain", container, allocation)
    written = made.write(tmp_path / "finished", container, allocation, source=finished)
    assert written.manifest.weights_digest == artifact.weights
    assert written.manifest.file_bytes == plain.manifest.file_bytes
    runtime = runtime_named(container)
    before, after = (
        runtime.read(folder / runtime.file_name, made.layout)
        for folder in (plain.folder, written.folder)
    )
    for group in made.layout.groups:
        for part in part_names(group, allocation.parts(made.layout, group)):
            expected = codes[part].tobytes() if part in codes else before[part].data.tobytes()
            assert after[part].data.tobytes() == expected
    changed = {n for n in after if after[n].data.tobytes() != before[n].data.tobytes()}
    assert changed == {*codes, *values}

    limit = 0.05 if container == "gguf" else None  # random weights flip their routing
    opened = partial(finished, made.encodings)
    verified = verify(written.folder, opened, made.scorer, tolerance=limit)
    assert abs(verified.loss - verify(
        plain.folder, partial(EncodedTensors, made.encodings), made.scorer, tolerance=limit
    ).loss) > 1e-4  # fmt: skip
    for folder, source in (
        (plain.folder, opened),
        (written.folder, partial(EncodedTensors, made.encodings)),
    ):
        with pytest.raises(VerifyError, match="made of weights"):
            verify(folder, source, made.scorer)


def _given(source, *_):
    return source


def test_weights_of_another_shape_are_refused(case, finish_by_hand, tmp_path):
    made = case("qwen3", "gguf")
    allocation = made.allocation()
    codes, values = finish_by_hand(made.encodings, allocation)
    cut = {name: value[:-1] for name, value in values.items()}
    artifact = make_artifact(made, allocation, tmp_path, (codes, cut))
    source = FinishedTensors(EncodedTensors(made.encodings, allocation), artifact)
    with pytest.raises(CheckpointError, match="its allocation needs"):
        made.write(tmp_path / "out", "gguf", source=partial(_given, source))


def test_a_candidate_decodes_the_bytes_of_the_file(case, finish_by_hand, tmp_path):
    """Expert by expert too, as a streamed pass asks for them."""
    made = case("deepseek", "safetensors")
    allocation = made.allocation()
    codes, values = finish_by_hand(made.encodings, allocation)
    artifact = make_artifact(made, allocation, tmp_path, (codes, values))
    weights = FinishedTensors(
        EncodedTensors(made.encodings, allocation), artifact
    ).candidate.weights
    for name in made.layout.groups:
        for fmt, experts in allocation.parts(made.layout, name):
            whole = weights.decoded(name, fmt.name, experts or None)
            for row, expert in enumerate(experts):
                assert np.array_equal(weights.decoded(name, fmt.name, (expert,))[0], whole[row])
            part = name if name in codes else f"{name}.{fmt.name}"
            if part in codes:
                assert np.array_equal(weights.encoded(name, fmt.name, experts or None), codes[part])
            else:
                assert np.array_equal(
                    whole, made.encodings.decoded(name, fmt.name, experts or None)
                )
