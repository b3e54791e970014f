"""The profile stage: its figures against independent ones, and that a stop costs one line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.calibration.profiler import ProfileInputs, Profiler
from allocator.codecs.ggml import decode, encode
from allocator.codecs.source import group_weights
from allocator.errors import AllocatorError
from allocator.formats import FORMATS
from allocator.inventory import read_inventory
from allocator.profile import Profile
from allocator.proxy.model import SwapModel
from allocator.targets import GGUF

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def inputs(checkpoints, make_documents):
    return ProfileInputs(
        layout=GGUF.layout(read_inventory(checkpoints["deepseek"])),
        documents=make_documents((21, 21, 21, 21)),
        n_measured=2,
        saliency="reap",
    )


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A cache with a whole profile; read only."""
    cache = tmp_path_factory.mktemp("cache")
    Profiler(inputs, cache).profile()
    return cache


@pytest.fixture
def copied(inputs, finished, tmp_path):
    """A copy to damage, and the profile's folder in it."""
    shutil.copytree(finished, tmp_path / "cache")
    return tmp_path / "cache", Profiler(inputs, tmp_path / "cache").folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_change_is_measured(inputs, finished):
    profiler = Profiler(inputs, finished)
    profile = profiler.profile()
    groups = inputs.layout.groups
    assert {n: set(e) for n, e in profile.errors.items()} == {
        n: {f.name for f in g.offered()} for n, g in groups.items()
    }
    assert any("IQ1_S" in e for e in profile.errors.values())
    assert set(profile.measured) == set(groups)
    assert {layer: set(c) for layer, c in profile.pruned.items()} == {
        1: {7, 5, 4, 3, 2},
        2: {7, 5, 4, 3, 2},
    }
    assert profile.n_tokens == 84
    assert profile.measured_tokens == 42
    assert (1, 5) in profile.unreached
    assert Profile.read(profiler.folder / "profile.json") == profile


def test_errors_are_weighted_squares(inputs, finished):
    profiler = Profiler(inputs, finished)
    profile, statistics = profiler.profile(), profiler.statistics
    for name, fmt in [
        ("layers.2.experts.down", "Q4_0"),
        ("layers.1.attention.k_b", "IQ4_NL"),
        ("layers.1.attention.v_b", "IQ2_XS"),
        ("layers.0.mlp.up", "Q5_0"),
        ("embedding", "Q4_0"),
    ]:
        group = inputs.layout.groups[name]
        weights, importance = group_weights(inputs.layout, group), statistics.importance.get(name)
        decoded = decode(encode(weights, FORMATS[fmt], importance), FORMATS[fmt])
        n_heads = weights.shape[0] if weights.ndim == 3 else 1
        energy = np.ones((n_heads, weights.shape[-1])) if importance is None else importance
        energy = np.broadcast_to(energy, (n_heads, weights.shape[-1])).astype(np.float64)
        if group.role.is_expert:
            energy = energy * np.maximum(statistics.counts[group.layer], 1)[:, None]
        lost = total = 0.0
        for head in range(n_heads):
            w, d = (x[head] if x.ndim == 3 else x for x in (weights, decoded))
            lost += sum(
                float(((d[i] - w[i]).astype(np.float64) ** 2) @ energy[head]) for i in range(len(w))
            )
            total += sum(
                float((w[i].astype(np.float64) ** 2) @ energy[head]) for i in range(len(w))
            )
        assert profile.errors[name][fmt] == pytest.approx(lost / total, rel=1e-5)


@torch.inference_mode()
def naive_kl(path, model, documents):
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    total, n = 0.0, 0
    for d in documents:
        ids = torch.tensor([d.ids])
        p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (original, model))
        total += float((p.exp() * (p - q)).sum())
        n += len(d.ids)
    return total / n


def test_losses_are_of_one_change_each(inputs, finished):
    profiler = Profiler(inputs, finished)
    profile, layout = profiler.profile(), inputs.layout
    swap = SwapModel(layout, profiler.bank.decoded)
    everyone = dict.fromkeys(layout.layers, tuple(range(8)))
    name = "layers.2.experts.down"
    (fmt, measured), *_ = profile.measured[name].items()
    swap.put(
        formats={n: fmt if n == name else None for n in layout.groups},
        retained=everyone,
        experts_used=2,
    )
    path, few = layout.inventory.path, inputs.documents[:2]
    assert measured == pytest.approx(naive_kl(path, swap.model, few), rel=1e-3, abs=1e-7)
    best = np.argsort(np.negative(profile.saliency["reap"][1]), kind="stable")[:4]
    swap.put(
        formats=dict.fromkeys(layout.groups),
        retained={**everyone, 1: tuple(sorted(best.tolist()))},
        experts_used=2,
    )
    assert profile.pruned[1][4] == pytest.approx(naive_kl(path, swap.model, few), rel=1e-3)
    assert profile.pruned[1][2] > profile.pruned[1][7] >= 0


def cut(path, share):
    """Ends a file somewhere inside a line, as a kill does."""
    data = path.read_bytes()
    at = max(1, int(len(data) * share))
    while data[at - 1] == 10:
        at -= 1
    path.write_bytes(data[:at])


@pytest.mark.parametrize("share", [0.0, 0.31, 0.98])
@pytest.mark.parametrize("file", ["losses.jsonl", "errors.jsonl"])
def test_after_a_kill_the_profile_is_the_same(inputs, finished, copied, file, share):
    cache, folder = copied
    expected = (folder / "profile.json").read_bytes()
    (folder / "profile.json").unlink()
    n_before = len(rows(folder / file))
    cut(folder / file, share)
    if file == "errors.jsonl":
        (folder / "losses.jsonl").unlink()
    kept = (folder / file).read_bytes().rpartition(b"\n")[0]
    Profiler(inputs, cache).profile()
    assert (folder / "profile.json").read_bytes() == expected
    assert (folder / file).read_bytes().startswith(kept)
    assert len(rows(folder / file)) == n_before
    assert not list(folder.glob("*.part"))


def test_a_kill_inside_the_statistics(inputs, copied):
    cache, folder = copied
    expected = {p.name: p.read_bytes() for p in folder.iterdir()}
    for name in ("profile.json", "statistics.json", "losses.jsonl", "errors.jsonl"):
        (folder / name).unlink()
    (folder / "importance.safetensors.1.part").write_bytes(b"torn")
    (folder / "importance.safetensors").write_bytes(b"of another run")
    Profiler(inputs, cache).profile()
    assert {n: (folder / n).read_bytes() for n in expected} == expected


def test_an_interrupt_keeps_what_was_measured(inputs, copied, monkeypatch):
    cache, folder = copied
    expected = (folder / "profile.json").read_bytes()
    for name in ("profile.json", "losses.jsonl"):
        (folder / name).unlink()
    measure, calls = Profiler._measure, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Profiler, "_measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Profiler(inputs, cache).profile()
    assert len(rows(folder / "losses.jsonl")) == 4
    Profiler(inputs, cache).profile()
    assert (folder / "profile.json").read_bytes() == expected


def test_a_finished_profile_is_only_read(inputs, finished, monkeypatch):
    monkeypatch.setattr(Profiler, "_build", lambda self: pytest.fail("built again"))
    monkeypatch.setattr(
        "allocator.calibration.profiler.collect", lambda *a, **k: pytest.fail("ran")
    )
    profiler = Profiler(inputs, finished)
    profiler.profile()
    assert profiler.statistics.n_tokens == 84


def test_the_address_follows_every_input(inputs, checkpoints, change_checkpoint, make_documents):
    def edit(tensors):
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 5] += 1

    changed = read_inventory(change_checkpoint(checkpoints["deepseek"], edit))
    others = [
        dataclasses.replace(inputs, documents=make_documents((21, 21, 21, 21), seed=1)),
        dataclasses.replace(inputs, documents=inputs.documents[::-1]),
        dataclasses.replace(inputs, documents=inputs.documents[:3]),
        dataclasses.replace(inputs, n_measured=3),
        dataclasses.replace(inputs, saliency="gate"),
        dataclasses.replace(inputs, layout=GGUF.layout(changed)),
    ]
    assert len({i.digest for i in (inputs, *others)}) == len(others) + 1
    assert dataclasses.replace(inputs).digest == inputs.digest


def test_an_unknown_saliency_raises(inputs, finished):
    profiler = Profiler(dataclasses.replace(inputs, saliency="luck"), finished)
    with pytest.raises(AllocatorError, match="saliency 'luck'"):
        profiler.profile()


def test_pruned_counts_suit_a_router_with_expert_groups(make_checkpoint, make_documents, tmp_path):
    """Every measured count must run: groups are ranked by two experts, and few may be chosen."""
    path = make_checkpoint(
        tmp_path / "x", "deepseek", n_group=4, topk_group=2, n_routed_experts=16,
        num_experts_per_tok=6,
    )  # fmt: skip
    layout = GGUF.layout(read_inventory(path))
    inputs = ProfileInputs(
        layout=layout, documents=make_documents((9,)), n_measured=1, saliency="reap"
    )
    profiler = Profiler(inputs, tmp_path / "cache")
    counts = {to for _, to in profiler.changes() if isinstance(to, int)}
    assert counts == {12}  # six used of two chosen groups: three in each
    swap = SwapModel(layout, profiler.bank.decoded)
    swap.put(
        formats=dict.fromkeys(layout.groups),
        retained={layer: tuple(e for e in range(16) if e % 4 < 3) for layer in layout.layers},
        experts_used=6,
    )
    with torch.inference_mode():
        assert swap.model(torch.tensor([[0, 1, 2]])).logits.isfinite().all()
