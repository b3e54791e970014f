"""Files of finished weights: read back exactly, named by content, and no damage passes."""

import json
import struct
import zlib
from functools import partial

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from allocator.decision.allocation_record import Finishing
from allocator.errors import CheckpointError, SpaceError
from allocator.finishing.artifact import Description, read_artifact, write_artifact
from allocator.finishing.recipe import PARTS, Recipe, inputs_digest
from allocator.finishing.tensors import raw_of

FINISHING = Finishing(
    recipe=Recipe().to_json(), inputs="i" * 64, before={"search": 0.2}, after={"search": 0.1}
)
DESCRIPTION = Description(
    allocation="a" * 64, checkpoint="c" * 64, importance="0" * 64, codec="x 1", finishing=FINISHING,
    tensors={},
)  # fmt: skip


def content(seed=0):
    rng = np.random.default_rng(seed)
    codes = {"b": rng.integers(0, 256, (2, 3, 10), np.uint8), "a": np.zeros((4, 7), np.uint8)}
    values = {"norm": rng.standard_normal(5, np.float32), "gate": np.ones((3, 2), np.float32)}
    return codes, values


def plain(name):
    """The codec's bytes."""
    codes, _ = content()
    return codes.get(name, codes["a"]) ^ np.uint8(name == "b")


def write(folder, description, codes, values):
    return write_artifact(folder, description, codes, values, plain)


def codes_in(artifact, name):
    return artifact.codes(name, partial(plain, name))


@pytest.fixture
def artifact(tmp_path):
    return write(tmp_path, DESCRIPTION, *content())


def test_it_comes_back_and_another_library_reads_it(artifact):
    codes, values = content()
    again = read_artifact(artifact.path, artifact.weights)
    assert artifact.path.name == f"finished-{artifact.weights[:12]}.safetensors"
    stored = load_file(artifact.path)
    for name, tensor in codes.items():
        changes = zlib.decompress(stored.pop(f"codes.{name}").tobytes())
        again_from_library = np.frombuffer(changes, np.uint8).reshape(tensor.shape) ^ plain(name)
        for one in (codes_in(again, name), codes_in(again, name), again_from_library):
            assert one.shape == tensor.shape
            assert np.array_equal(one, tensor)
    for name, tensor in values.items():
        for one in (again.values(name), stored.pop(f"values.{name}")):
            assert (one.dtype, one.shape) == (tensor.dtype, tensor.shape)
            assert np.array_equal(one, tensor)
    assert not stored
    assert codes_in(again, "norm") is None
    assert again.values("a") is None
    assert again.holds("b", codes["b"].reshape(-1)) is True
    assert again.holds("b", codes["b"] ^ 1) is False
    assert again.holds("c", codes["b"]) is None


def test_its_digest_is_of_the_weights_and_not_of_the_recipe(artifact, tmp_path):
    codes, values = content()
    digests = {artifact.weights}
    other = msgspec.structs.replace(FINISHING, recipe=Recipe(seed=7).to_json(), after={})
    described = msgspec.structs.replace(DESCRIPTION, finishing=other)
    assert write(tmp_path / "2", described, codes, values).weights in digests
    for changed in (
        {**codes, "a": codes["a"] + 1}, {**codes, "c": codes["a"] + 1}, {"b": codes["b"]}
    ):  # fmt: skip
        digests.add(write(tmp_path / "2", DESCRIPTION, changed, values).weights)
    digests.add(write(tmp_path / "2", DESCRIPTION, codes, {}).weights)
    for name in ("allocation", "checkpoint", "importance"):
        described = msgspec.structs.replace(DESCRIPTION, **{name: "f" * 64})
        digests.add(write(tmp_path / "2", described, codes, values).weights)
    assert len(digests) == 8


def test_no_flipped_bit_passes(artifact):
    whole = artifact.path.read_bytes()
    codes, values, n_refused = *content(), 0
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        artifact.path.write_bytes(data)
        said = []
        try:
            again = read_artifact(artifact.path, artifact.weights)
            read = [codes_in(again, n) for n in codes] + [again.values(n) for n in values]
        except CheckpointError as error:
            said = [str(error)]
        if said:
            n_refused += 1
            assert "\n" not in said[0]
            assert "allocator finish" in said[0]
            continue
        for tensor, expected in zip(read, [*codes.values(), *values.values()], strict=True):
            assert np.array_equal(tensor, expected), at  # what differs is space
    assert n_refused > 0.99 * len(whole)


def test_a_truncated_or_foreign_file_is_refused(artifact, tmp_path):
    whole = artifact.path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + n])
    header["codes.a"]["data_offsets"] = [0, 1 << 40]
    text = json.dumps(header).encode()
    wrong = {
        "cut": whole[:-1], "longer": whole + b"x", "empty": b"",
        "offsets": struct.pack("<Q", len(text)) + text + whole[8 + n :],
        "length": struct.pack("<Q", 1 << 60) + whole[8:],
    }  # fmt: skip
    for name, data in wrong.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="no finished weights"):
            read_artifact(path, artifact.weights)
    artifact.path.write_bytes(whole)
    again = read_artifact(artifact.path, artifact.weights)
    for wrong in (lambda: plain("b") ^ 1, lambda: plain("b")[:1], lambda: np.tile(plain("b"), 2)):
        with pytest.raises(CheckpointError, match=r"b comes to other bytes, .* x 1 made"):
            again.codes("b", wrong)
    with pytest.raises(CheckpointError, match="it holds weights"):
        read_artifact(artifact.path, "f" * 64)
    with pytest.raises(CheckpointError, match="no finished weights"):
        read_artifact(tmp_path / "nowhere", artifact.weights)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_are_stored_as_torch_stores_them(dtype):
    values = np.random.default_rng(0).standard_normal((64, 9), np.float32) * 3
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    stored = torch.from_numpy(values).to(kind)
    nearest = stored.float().numpy()
    expected = stored.view(torch.uint8).numpy()
    assert np.array_equal(raw_of(nearest, dtype), expected)
    assert np.array_equal(
        raw_of(nearest[:, 0].copy(), dtype).reshape(-1),
        stored[:, 0].clone().view(torch.uint8).numpy(),
    )


def test_a_recipe_comes_back_and_a_wrong_one_is_refused():
    recipe = Recipe(rate=1e-3, parts=PARTS[:2], stopped_steps=4)
    plain = json.loads(json.dumps(recipe.to_json()))
    assert Recipe.of(plain, "pick.json") == recipe
    for wrong in (
        {"tokens": 1},
        {"parts": ["bias"]},
        {"rounds": 0},
        {"gain": -0.1},
        {"gain": 1.1},
        {"method": 0},
        {"streamed": True},
        {"parts": []},
    ):
        with pytest.raises(SpaceError, match=r"pick.json: recipe") as caught:
            Recipe.of({**plain, **wrong}, "pick.json")
        assert "\n" not in str(caught.value)


def test_every_input_names_another_result():
    digests = {inputs_digest(Recipe(), allocation="a", codec="x")}
    digests.add(inputs_digest(Recipe(), allocation="b", codec="x"))
    digests.add(inputs_digest(Recipe(), allocation="a", codec="y"))
    others = {
        "moments_tokens": 1, "tuning_tokens": 1, "fisher": False, "damping": 0.5, "rounds": 3,
        "shrink_tokens": 1, "rate": 1.0, "seed": 1, "parts": PARTS[:1],
        "stopped_steps": 5, "gain": 0.5, "method": 3, "streamed": True,
    }  # fmt: skip
    assert set(others) == set(Recipe.__struct_fields__)
    for name, value in others.items():
        digests.add(inputs_digest(Recipe(**{name: value}), allocation="a", codec="x"))
    assert len(digests) == 3 + len(others)
    assert Recipe().codes_alone == Recipe(tuning_tokens=0, rate=1.0).codes_alone
