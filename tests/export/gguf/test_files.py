"""Written GGUF files against gguf-py's reader and the disk; llama-quantize's type files."""

import contextlib
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation import Allocation
from allocator.errors import FormatError, SpaceError, VerifyError
from allocator.export.gguf.files import read_gguf, write_gguf
from allocator.export.gguf.recipes import parse_tensor_type_file, tensor_type_file
from allocator.formats import FORMATS
from allocator.targets import GGUF

REFERENCE = Path(__file__).parents[3] / "studies/reference/model"
LAYOUT = GGUF.layout(read_inventory(REFERENCE))


class Noise:
    """A source of random bytes of the right shapes; remembers what it gave."""

    def __init__(self, allocation, fail_at=None):
        self.allocation, self.fail_at = allocation, fail_at
        self.given = {}
        self.rng = np.random.default_rng(0)

    def encoded(self, name):
        if name == self.fail_at:
            raise OSError("the disk is gone")
        group = LAYOUT.groups[name]
        shape = group.shape_with(self.allocation.counts.get(group.layer, 0))
        row_bytes = FORMATS[self.allocation.format_of[name]].nbytes((1, shape[-1]))
        data = self.rng.integers(0, 256, (*shape[:-1], row_bytes), dtype=np.uint8)
        return self.given.setdefault(group.stored_as, data)

    def full_precision(self, kept):
        shape = kept.shape_with(self.allocation.counts.get(kept.layer, 0))
        data = self.rng.normal(size=shape).astype(np.float32)
        return self.given.setdefault(kept.stored_as, data)


def allocation(formats="Q8_0", *, n_experts=24, experts_used=4):
    if isinstance(formats, str):
        formats = dict.fromkeys(LAYOUT.groups, formats)
    return Allocation.of(
        target="gguf",
        retained=dict.fromkeys(LAYOUT.layers, tuple(range(n_experts))),
        formats=formats,
        experts_used=experts_used,
    )


def mixed(seed, **counts):
    rng = np.random.default_rng(seed)
    return allocation(
        {name: str(rng.choice([f.name for f in g.offered()])) for name, g in LAYOUT.groups.items()},
        **counts,
    )


def write(path, chosen):
    source = Noise(chosen)
    write_gguf(path, LAYOUT, chosen, source)
    return source


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), n_experts=st.integers(4, 24), experts_used=st.integers(1, 4))
def test_predicted_bytes_are_the_bytes_on_disk(tmp_path_factory, seed, n_experts, experts_used):
    path = tmp_path_factory.mktemp("size") / "model.gguf"
    chosen = mixed(seed, n_experts=n_experts, experts_used=experts_used)
    write(path, chosen)
    size = chosen.nbytes(LAYOUT)
    assert path.stat().st_size == size.file
    reader = GGUFReader(path)
    assert sum(t.n_bytes for t in reader.tensors) == size.tensors


def test_gguf_py_reads_back_what_was_written(tmp_path):
    chosen = mixed(0, n_experts=7, experts_used=2)
    path = tmp_path / "model.gguf"
    source = write(path, chosen)
    reader = GGUFReader(path)
    assert reader.get_field("deepseek2.expert_count").contents() == 7
    assert reader.get_field("deepseek2.expert_used_count").contents() == 2
    found = {t.name: t for t in reader.tensors}
    assert set(found) == set(source.given)
    for name, group in LAYOUT.groups.items():
        tensor = found[group.stored_as]
        assert tensor.tensor_type == GGMLQuantizationType[chosen.format_of[name]]
        n_experts = 7 if group.role.is_expert else None
        assert tuple(tensor.shape.tolist())[::-1] == group.shape_with(n_experts)
    for name, data in source.given.items():
        np.testing.assert_array_equal(found[name].data.view(np.uint8), data.view(np.uint8))


def test_our_reader_agrees_with_gguf_pys(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, mixed(1, n_experts=9))
    found = read_gguf(path)
    tensors = GGUFReader(path).tensors
    assert list(found) == [t.name for t in tensors]
    for tensor in tensors:
        name, shape, data = found[tensor.name]
        assert name == tensor.tensor_type.name
        assert shape == tuple(tensor.shape.tolist())[::-1]
        assert not data.flags.writeable
        assert data.shape[:-1] == shape[:-1]
        np.testing.assert_array_equal(data, tensor.data.view(np.uint8))


def test_same_allocation_same_bytes(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, mixed(2))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("old")
    chosen = allocation()
    with pytest.raises(OSError, match="disk"):
        write_gguf(path, LAYOUT, chosen, Noise(chosen, fail_at="layers.3.experts.down"))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_an_allocation_of_another_layout_is_refused(tmp_path):
    chosen = allocation()
    other = Allocation.of(
        target="gguf",
        retained=chosen.retained_experts,
        formats={"embedding": "Q8_0"},
        experts_used=4,
    )
    with pytest.raises(SpaceError):
        write_gguf(tmp_path / "model.gguf", LAYOUT, other, Noise(chosen))
    assert os.listdir(tmp_path) == []


# -- damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    write(path, allocation("Q4_0", n_experts=4))
    return path.read_bytes()


def header_end(data):
    return data.index(b"blk.5.exp_probs_b.bias")


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(VerifyError) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("n", [0, 3, 20, 100, 5000, 200_000, -1, -32, -1_000_000])
def test_truncated_files_are_refused(whole, tmp_path, n):
    refused(tmp_path / "cut.gguf", whole[:n])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(VerifyError):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("what", "offset", "value"),
    [
        ("magic", 0, struct.pack("<I", 1)),
        ("version", 4, struct.pack("<I", 2)),
        ("tensors", 8, struct.pack("<Q", 2**62)),
        ("fewer tensors", 8, struct.pack("<Q", 3)),
        ("pairs", 16, struct.pack("<Q", 2**62)),
        ("key length", 24, struct.pack("<Q", 2**63)),
    ],
)
def test_damaged_headers_are_refused(whole, tmp_path, what, offset, value):
    damaged = bytearray(whole)
    damaged[offset : offset + len(value)] = value
    refused(tmp_path / f"{what}.gguf", bytes(damaged))


def test_a_huge_array_does_not_hang(whole, tmp_path):
    damaged = bytearray(whole)
    at = damaged.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 4 + 4
    damaged[at : at + 8] = struct.pack("<Q", 2**60)
    refused(tmp_path / "damaged.gguf", bytes(damaged))


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(whole, tmp_path_factory, at, value):
    damaged = bytearray(whole)
    damaged[at % header_end(whole)] = value
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(damaged)
    with contextlib.suppress(VerifyError):
        read_gguf(path)


# -- llama-quantize's tensor type files


@given(seed=st.integers(0, 1000))
def test_type_file_and_its_inverse(seed):
    chosen = mixed(seed)
    text = tensor_type_file(LAYOUT, chosen)
    assert parse_tensor_type_file(text, LAYOUT) == chosen.format_of
    assert parse_tensor_type_file("\n".join(reversed(text.split())), LAYOUT) == chosen.format_of


def test_type_file_lines():
    lines = tensor_type_file(LAYOUT, allocation("IQ1_M")).splitlines()
    assert r"^blk\.1\.ffn_down_exps\.weight$=iq1_m" in lines
    assert r"^token_embd\.weight$=iq1_m" in lines


def test_hand_written_type_file():
    text = "blk.1.ffn_down_exps=Q6_K  ffn_.*_exps=iq2_xs\n\nattn_k_b=q8_0\nffn_=q4_K\n"
    found = parse_tensor_type_file(text, LAYOUT)
    assert found["layers.1.experts.down"] == "Q6_K"  # the first match wins
    assert found["layers.2.experts.down"] == "IQ2_XS"
    assert found["layers.3.attention.k_b"] == "Q8_0"
    assert found["layers.0.mlp.gate"] == "Q4_K"
    assert "embedding" not in found
    assert "layers.3.attention.o" not in found


@pytest.mark.parametrize(
    ("text", "line"),
    [("ffn_=q4_k\nffn_=q9_z", 2), ("\n\n=q4_k", 3), ("ffn_up", 1), ("ffn_=", 1), ("ffn_(=q4_k", 1)],
)
def test_bad_type_files_name_the_line(text, line):
    with pytest.raises(FormatError, match=f"line {line}: ") as caught:
        parse_tensor_type_file(text, LAYOUT)
    assert "\n" not in str(caught.value)


def test_type_files_take_types_of_ggml_alone(monkeypatch):
    other = replace(FORMATS["Q8_0"], name="Q9_Z", codec="mine")
    monkeypatch.setitem(FORMATS, "Q9_Z", other)
    with pytest.raises(FormatError, match="line 1: 'ffn_=q9_z'"):
        parse_tensor_type_file("ffn_=q9_z", LAYOUT)
