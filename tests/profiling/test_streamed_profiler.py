"""The streamed profile against the one that is measured with the model in memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.ggml import GGML
from allocator.profiling.in_memory_profiler import InMemoryProfiler
from allocator.profiling.inputs import ProfileInputs
from allocator.profiling.statistics import importance_digest
from allocator.profiling.streamed_profiler import StreamedProfiler
from allocator.scoring.documents import Document
from allocator.scoring.layer_checkpoints import LayerCheckpoints
from allocator.scoring.streamed_model import StreamedModel
from allocator.targets import target_named

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[("deepseek", "gguf"), ("qwen3_tied", "safetensors")])
def inputs(request, checkpoints):
    kind, target = request.param
    rng = np.random.default_rng(0)
    documents = tuple(Document(tuple(rng.integers(0, 512, 24).tolist()), "all") for _ in range(6))
    return ProfileInputs(
        layout=target_named(target).layout(read_inventory(checkpoints[kind])),
        documents=documents,
        n_measured=4,
        n_curvature=5,
        saliency="fisher",
    )


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    return InMemoryProfiler(inputs, tmp_path_factory.mktemp("whole"))


def test_all_rows_give_the_same_profile(inputs, whole, tmp_path):
    streamed = StreamedProfiler(replace(inputs, sampled_rows=1.0), tmp_path)
    assert streamed.folder.name != whole.folder.name
    # the same importance to the last bit, so that the same weights are encoded
    streamed.statistics.importance.update(whole.statistics.importance)
    one, other = streamed.profile(), whole.profile()
    assert importance_digest(streamed.statistics.importance) == other.importance
    for name, row in other.curvature.items():
        for fmt, values in row.items():
            np.testing.assert_allclose(
                one.curvature[name][fmt], values, rtol=5e-3, atol=1e-9, err_msg=f"{name} {fmt}"
            )
    assert [c.formats for c in one.measured] == [c.formats for c in other.measured]
    for a, b in zip(one.measured, other.measured, strict=True):
        assert a.kl == pytest.approx(b.kl, abs=2e-6)
    for layer, row in other.pruned.items():
        for count, kl in row.items():
            assert one.pruned[layer][count] == pytest.approx(kl, abs=2e-6)
    assert one.forward_tokens == other.forward_tokens
    assert one.counts == other.counts


class WithFewRows(StreamedProfiler):
    """Samples matrices that are too small to be sampled otherwise."""

    least_rows = 1


def test_sampled_rows_are_close_and_cheaper(inputs, whole, tmp_path, monkeypatch):
    encoded = []
    encode = GGML.encode
    monkeypatch.setattr(
        GGML, "encode", lambda w, *a, **k: encoded.append(w.size) or encode(w, *a, **k)
    )
    quarter = replace(inputs, sampled_rows=0.25)
    sampled = WithFewRows(quarter, tmp_path)
    prices = sampled.curvature
    total = sum(np.prod(g.shape) * len(g.offered()) for g in inputs.layout.groups.values())
    looked_up = len({i for d in inputs.documents[:5] for i in d.ids})
    embedding = inputs.layout.groups["embedding"]
    most = 0.3 * total + looked_up * embedding.shape[1] * len(embedding.offered())
    assert sum(encoded) < most
    logs = [
        np.log(sum(prices[g][f]) / sum(values))
        for g, row in whole.curvature.items()
        for f, values in row.items()
        if sum(values) > 0
    ]
    assert abs(np.mean(logs)) < 0.1
    assert np.std(logs) < 0.4
    again = WithFewRows(quarter, tmp_path / "again").curvature
    assert again == prices


def test_a_stopped_curvature_is_the_undisturbed_one(inputs, tmp_path, monkeypatch):
    inputs = replace(inputs, sampled_rows=0.5)
    whole = StreamedProfiler(inputs, tmp_path / "whole")
    stopped = StreamedProfiler(inputs, tmp_path / "stopped")
    _ = stopped.statistics
    plain, calls = GGML.encode, []

    def encode(*args, **options):
        calls.append(args)
        if len(calls) == 150:
            raise KeyboardInterrupt
        return plain(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(GGML, "encode", encode)
        with pytest.raises(KeyboardInterrupt):
            _ = stopped.curvature
    again = StreamedProfiler(inputs, tmp_path / "stopped")
    assert again.curvature == whole.curvature
    assert not (again.folder / "curvature").exists()


def stopped_at(layer, ran):
    """`StreamedModel.run` that notes layers, and is stopped in this one for the first time."""
    plain = StreamedModel.run

    def run(self, at, *args, **options):
        ran.append(at)
        if at == layer and ran.count(at) == 1:
            raise KeyboardInterrupt
        plain(self, at, *args, **options)

    return run


@pytest.mark.parametrize("layer", [0, 1])
def test_stopped_statistics_are_the_undisturbed_ones(inputs, tmp_path, monkeypatch, layer):
    whole = StreamedProfiler(inputs, tmp_path / "whole").statistics
    ran = []
    monkeypatch.setattr(StreamedModel, "run", stopped_at(layer, ran))
    with pytest.raises(KeyboardInterrupt):
        _ = StreamedProfiler(inputs, tmp_path / "stopped").statistics
    again = StreamedProfiler(inputs, tmp_path / "stopped")
    assert importance_digest(again.statistics.importance) == importance_digest(whole.importance)
    assert again.statistics.saliency == whole.saliency
    assert again.statistics.counts == whole.counts
    assert ran == [*range(layer + 1), *range(layer, inputs.layout.inventory.n_layers)]
    assert not (again.folder / "statistics").exists()


def stopped_behind(layer, monkeypatch, profiler):
    """A curvature pass that is stopped as soon as it is behind a layer."""
    plain = LayerCheckpoints.save

    def save(self, what, at, values):
        plain(self, what, at, values)
        if (what, at) == ("gradients", layer):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LayerCheckpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            _ = profiler.curvature
    return profiler.folder / "curvature"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """The lowest bit of a byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "prices.jsonl").unlink(),
        lambda folder: cut(folder / "prices.jsonl"),
        lambda folder: (folder / "settled.json").unlink(),
        lambda folder: flip(folder / "prices.jsonl"),
        lambda folder: flip(folder / "settled.json"),
        lambda folder: cut(folder / "gradients-1.safetensors"),
        lambda folder: flip(folder / "gradients-1.safetensors"),
        lambda folder: cut(folder / "states-1.safetensors"),
        lambda folder: flip(folder / "states-1.safetensors"),
    ],
    ids=[
        "no prices",
        "half of the prices",
        "not settled",
        "price",
        "settled",
        "cut",
        "gradient",
        "half of the states",
        "state",
    ],
)
def test_what_a_stopped_curvature_has_lost_is_made_again(inputs, tmp_path, monkeypatch, damage):
    inputs = replace(inputs, sampled_rows=0.5)
    whole = StreamedProfiler(inputs, tmp_path / "whole").curvature
    damage(stopped_behind(1, monkeypatch, StreamedProfiler(inputs, tmp_path / "stopped")))
    again = StreamedProfiler(inputs, tmp_path / "stopped").curvature
    assert again == whole


@pytest.mark.parametrize("damage", [cut, lambda path: path.unlink(), flip])
def test_damaged_sums_are_made_again(inputs, tmp_path, monkeypatch, caplog, damage):
    whole = StreamedProfiler(inputs, tmp_path / "whole").statistics
    monkeypatch.setattr(StreamedModel, "run", stopped_at(1, []))
    with pytest.raises(KeyboardInterrupt):
        _ = StreamedProfiler(inputs, tmp_path).statistics
    again = StreamedProfiler(inputs, tmp_path)
    path = again.folder / "statistics" / "sums-0.safetensors"
    damage(path)
    there = path.exists()
    found = again.statistics
    assert importance_digest(found.importance) == importance_digest(whole.importance)
    assert (found.saliency, found.counts) == (whole.saliency, whole.counts)
    lines = [r.getMessage() for r in caplog.records if "sums-0" in r.getMessage()]
    assert len(lines) == there
    assert all("damaged" in line and "\n" not in line for line in lines)
