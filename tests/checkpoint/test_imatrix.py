"""Files of llama-imatrix, held against how llama-quantize reads them, and against damage."""

import struct

import gguf
import numpy as np
import pytest

from allocator.checkpoint.gguf.imatrix import read_imatrix
from allocator.errors import CalibrationError

NAMES = ("blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight")


def write_gguf(path, tensors):
    """As llama-imatrix does, by gguf-py: name to array."""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sums(rng, n_matrices=3, width=5):
    return rng.exponential(size=(n_matrices, width)).astype(np.float32)


def pairs(**changes):
    rng = np.random.default_rng(0)
    tensors = {
        f"{NAMES[0]}.in_sum2": sums(rng, 1),
        f"{NAMES[0]}.counts": np.array([[7]], np.float32),
        f"{NAMES[1]}.in_sum2": sums(rng),
        f"{NAMES[1]}.counts": np.array([[3], [0], [11]], np.float32),
    }
    return tensors | changes


TAIL = struct.pack("<ii3s", 4, 3, b"abc")


def binary(entries, tail=TAIL):
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts.append(struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values)))
        parts.append(np.asarray(values, "<f4").tobytes())
    return b"".join(parts) + tail


def test_means_are_those_of_llama_quantize(tmp_path):
    """The float32 quotient of sum and count, of each matrix (`load_imatrix` in quantize.cpp)."""
    tensors = pairs()
    read = read_imatrix(write_gguf(tmp_path / "a.gguf", tensors))
    assert set(read.tensors) == set(NAMES)
    means = read.tensors[NAMES[1]]
    whole = tensors[f"{NAMES[1]}.in_sum2"]
    for row, (total, count) in enumerate(zip(whole, (3, 0, 11), strict=True)):
        assert means.counts[row] == count
        if count:
            expected = [np.float32(x) / np.float32(count) for x in total]
            np.testing.assert_array_equal(means.values.reshape(3, 5)[row], expected)


@pytest.mark.parametrize("tail", [b"", TAIL[:4], TAIL])
def test_the_binary_form_is_read(tmp_path, tail):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(binary([(b"output.weight", 3, [3.0, 1.0])], tail))
    read = read_imatrix(path)
    assert read.is_binary
    np.testing.assert_array_equal(
        read.tensors["output.weight"].values, np.array([3, 1], np.float32) / np.float32(3)
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{NAMES[0]}.in_sum2": np.array([[1, np.nan]], np.float32)}, "not finite.*channel 1"),
        ({f"{NAMES[0]}.in_sum2": np.array([[1, -1]], np.float32)}, "negative"),
        ({f"{NAMES[0]}.counts": np.array([[-1]], np.float32)}, "no numbers of tokens"),
        ({f"{NAMES[0]}.counts": np.array([[np.inf]], np.float32)}, "no numbers of tokens"),
        ({f"{NAMES[0]}.counts": np.array([[1, 1]], np.float32)}, "5 sums for 2 counts"),
        ({f"{NAMES[0]}.counts": np.array([[7]], np.float16)}, "ggml type 1, needed F32"),
        ({"lone.weight.in_sum2": np.array([1], np.float32)}, "lone.weight has no .counts"),
    ],
)
def test_wrong_values_are_refused(tmp_path, changes, said):
    with pytest.raises(CalibrationError, match=said) as error:
        read_imatrix(write_gguf(tmp_path / "a.gguf", pairs(**changes)))
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    model = write_gguf(tmp_path / "model.gguf", {"a.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(CalibrationError, match="no importance matrix"):
        read_imatrix(model)
    with pytest.raises(CalibrationError, match="No such file"):
        read_imatrix(tmp_path / "absent")
    extra = write_gguf(tmp_path / "b.gguf", pairs(**{"x.in_sum": np.ones(2, np.float32)}))
    assert "1 of .in_sum" in read_imatrix(extra).notes[0]


@pytest.mark.parametrize("kind", ["gguf", "dat"])
def test_a_truncated_file_is_refused_at_every_length(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "gguf":
        whole = write_gguf(path, pairs()).read_bytes()
        lengths = range(4, len(whole) - 32, 41)
    else:
        whole = binary([(b"one", 2, [1.0, 2.0]), (b"two", 2, [3.0])])
        # ends that older versions have
        lengths = set(range(len(whole))) - {len(whole) - 7 - 4, len(whole) - 7}
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(CalibrationError) as error:
            read_imatrix(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (struct.pack("<i", 2**31 - 1) + bytes(60), "2147483647 entries"),
        (struct.pack("<i", -1) + bytes(60), "-1 entries"),
        (struct.pack("<ii", 1, 2**31 - 1) + bytes(60), "letters of a name"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 2**31 - 1) + bytes(60), "values of a"),
        (binary([(b"a", -1, [1.0])]), "-1 calls"),
        (binary([(b"a", 1, [1.0]), (b"a", 1, [1.0])]), "a a second time"),
        (binary([(b"\xff", 1, [1.0])]), "no text"),
        (binary([(b"a", 1, [1.0])], struct.pack("<ii", 1, -5)), "-5 letters"),
        (binary([(b"a", 1, [1.0])], struct.pack("<ii", 1, 0) + b"more"), "4 bytes after"),
    ],
)
def test_lying_lengths_are_refused(tmp_path, data, said):
    path = tmp_path / "a.dat"
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match=said):
        read_imatrix(path)
