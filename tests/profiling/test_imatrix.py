"""An imatrix held against a checkpoint: what is taken, what is measured, what is refused."""

import re
from dataclasses import replace

import gguf
import numpy as np
import pytest

from allocator.checkpoint.padding import padded
from allocator.checkpoint.reading import read_inventory
from allocator.errors import CalibrationError
from allocator.export.gguf.imatrix import write_imatrix
from allocator.families import Role
from allocator.profiling.imatrix import _translated, given_importance
from allocator.targets import GGUF, SAFETENSORS

SUMS, COUNTS = ".in_sum2", ".counts"


def write_gguf(path, tensors):
    """As llama-imatrix does, by gguf-py: sums and counts by name."""
    writer = gguf.GGUFWriter(path, "none")
    for name, (sums, counts) in tensors.items():
        writer.add_tensor(f"{name}{SUMS}", np.asarray(sums, np.float32))
        writer.add_tensor(f"{name}{COUNTS}", np.asarray(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def collected(layout, seed=0):
    """What llama-imatrix collects by default, routers among it: by name, sums and counts."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for group in layout.groups.values():
        if group.layer is None:
            continue
        n = group.shape[0] if len(group.shape) == 3 else 1
        counts = rng.integers(1, 99, n if group.role.is_expert else 1)
        sums = rng.exponential(size=(n, group.shape[-1]))
        tensors[group.stored_as] = sums.reshape(len(counts), -1), counts
    for tensor in layout.full_precision:
        if tensor.role.has_row_per_expert and len(tensor.shape) == 2:
            tensors[tensor.stored_as] = rng.exponential(size=(1, tensor.shape[1])), [5]
    return tensors


@pytest.fixture(scope="module")
def layouts(checkpoints):
    return {name: GGUF.layout(read_inventory(checkpoints[name])) for name in ("deepseek", "qwen3")}


@pytest.fixture
def layout(layouts):
    return layouts["qwen3"]


def test_what_llama_imatrix_leaves_out_is_measured(layout, tmp_path):
    tensors = collected(layout)
    given = given_importance(write_gguf(tmp_path / "i.gguf", tensors), layout)
    measured = {n for n, g in layout.groups.items() if g.importance and n not in given.vectors}
    assert measured == {"head"}
    said = "\n".join(given.notes)
    assert "measured by the calibration pass" in said
    assert "head" in said
    assert re.search("2 entries stay in full precision.*ffn_gate_inp", said)
    down = layout.groups["layers.1.experts.down"]
    sums, counts = tensors[down.stored_as]
    np.testing.assert_allclose(given.vectors[down.name], sums / counts[:, None], rtol=1e-6)


def test_experts_that_no_token_reached_have_the_mean_of_their_layer(layout, tmp_path):
    tensors = collected(layout)
    name = "blk.0.ffn_up_exps.weight"
    sums, counts = tensors[name]
    counts[[2, 5]] = 0
    sums[[2, 5]] = 0
    given = given_importance(write_gguf(tmp_path / "i.gguf", tensors), layout)
    vectors = given.vectors["layers.0.experts.up"]
    for expert in (2, 5):
        np.testing.assert_allclose(vectors[expert], sums.sum(0) / counts.sum(), rtol=1e-6)
    assert any(f"{name} expert 2, {name} expert 5" in note for note in given.notes)


def test_the_binary_form_says_so_with_ones(layout, tmp_path):
    """llama-imatrix writes ones in place of what no token reached."""
    vectors = given_importance(write_gguf(tmp_path / "i.gguf", collected(layout)), layout).vectors
    changed = {name: v.copy() for name, v in vectors.items()}
    changed["layers.0.experts.up"][2] = 1
    write_imatrix(
        tmp_path / "i.dat", layout, changed, retained=dict.fromkeys(layout.layers, range(8)),
        experts_used=2, n_tokens=64, dataset="",
    )  # fmt: skip
    given = given_importance(tmp_path / "i.dat", layout)
    others = np.delete(vectors["layers.0.experts.up"], 2, 0)
    np.testing.assert_allclose(given.vectors["layers.0.experts.up"][2], others.mean(0), rtol=1e-6)
    assert any("expert 2" in note for note in given.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("blk.1.attn_k.weight"), "no entry for 1 of .*blk.1.attn_k.weight"),
        (lambda t: t.update({"blk.0.attn_qkv.weight": (np.ones((1, 64)), [1])}),
         "1 entries are of no matrix.*attn_qkv"),
        (lambda t: t.update({"blk.0.attn_q.weight": (np.ones((1, 32)), [1])}), "32 values"),
        (lambda t: t.update({"blk.0.ffn_up_exps.weight": (np.ones((4, 64)), [1] * 4)}),
         "4 counts and 256 values, this checkpoint's has 8 matrices of 64"),
        (lambda t: t.update({"blk.0.attn_q.weight": (np.ones((1, 64)), [0])}), "no token reached"),
        (lambda t: t.update({"blk.0.ffn_up_exps.weight": (np.ones((8, 64)), [0] * 8)}),
         "no token reached"),
    ],
)  # fmt: skip
def test_another_model_is_refused(layout, tmp_path, change, said):
    tensors = collected(layout)
    change(tensors)
    with pytest.raises(CalibrationError, match=said) as error:
        given_importance(write_gguf(tmp_path / "i.gguf", tensors), layout)
    assert "\n" not in str(error.value)


def test_gate_and_up_of_one_tensor_read_the_same(layout, tmp_path):
    tensors = collected(layout)
    both = tensors.pop("blk.0.ffn_up_exps.weight")
    del tensors["blk.0.ffn_gate_exps.weight"]
    tensors["blk.0.ffn_gate_up_exps.weight"] = both
    vectors = given_importance(write_gguf(tmp_path / "i.gguf", tensors), layout).vectors
    for name in ("layers.0.experts.gate", "layers.0.experts.up"):
        np.testing.assert_allclose(vectors[name], both[0] / both[1][:, None], rtol=1e-6)


def test_latent_attention_has_vectors_by_head_or_is_measured(layouts, tmp_path):
    layout = layouts["deepseek"]
    tensors = collected(layout)
    heads = layout.inventory.dimensions.heads
    given = given_importance(write_gguf(tmp_path / "a.gguf", tensors), layout)
    for half in ("k_b", "v_b"):
        (name,) = (n for n in given.vectors if n.startswith("layers.0.") and n.endswith(half))
        assert given.vectors[name].shape == (heads, layout.groups[name].shape[-1])
    older = {n: v for n, v in tensors.items() if "attn_k_b" not in n and "attn_v_b" not in n}
    older["blk.0.attn_kv_b.weight"] = np.ones((1, 256)), [3]
    given = given_importance(write_gguf(tmp_path / "b.gguf", older), layout)
    assert not any(n.endswith(("k_b", "v_b")) for n in given.vectors)
    assert any("in two halves" in note for note in given.notes)


def test_another_target_has_the_same_vectors(checkpoints, layout, tmp_path):
    path = write_gguf(tmp_path / "i.gguf", collected(layout))
    other = SAFETENSORS.layout(read_inventory(checkpoints["qwen3"]))
    vectors, others = (given_importance(path, x).vectors for x in (layout, other))
    assert set(others) == set(vectors)
    for name, vector in vectors.items():
        np.testing.assert_array_equal(others[name], vector)


def test_columns_are_put_in_the_order_of_another_target(checkpoints, layout, tmp_path):
    """As of families whose file has columns in another order than the checkpoint."""
    path = write_gguf(tmp_path / "i.gguf", collected(layout))
    order = tuple(np.random.default_rng(0).permutation(64).tolist())
    name = "layers.0.experts.up"
    moved = replace(
        layout,
        groups={n: replace(g, columns=order) if n == name else g for n, g in layout.groups.items()},
    )
    vectors = given_importance(path, layout).vectors
    own = _translated(vectors, moved, layout)[name]
    np.testing.assert_array_equal(own[:, list(order)], vectors[name])


def test_vectors_of_padded_experts_are_padded(checkpoints, layout, tmp_path):
    path = write_gguf(tmp_path / "i.gguf", collected(layout))
    wider = GGUF.layout(padded(read_inventory(checkpoints["qwen3"]), 64))
    given, narrow = given_importance(path, wider), given_importance(path, layout)
    vectors = given.vectors["layers.0.experts.down"]
    assert vectors.shape == (8, 64)
    np.testing.assert_array_equal(vectors[:, :32], narrow.vectors["layers.0.experts.down"])
    assert (vectors[:, 32:] < vectors[:, :32].min()).all()
    assert (vectors > 0).all()
    assert any("padded with zeros" in note for note in given.notes)
    assert wider.groups["layers.0.experts.down"].role is Role.EXPERT_DOWN
