"""The profile stage: its figures against independent ones, and that a stop costs one line."""

import dataclasses
import json
import re
import shutil
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.ggml import GGML
from allocator.decision.allocation import Allocation
from allocator.decision.search_space import SALIENCIES
from allocator.errors import AllocatorError
from allocator.files.checksums import load_arrays
from allocator.formats import FORMATS, offered
from allocator.prediction.profile import Change, Profile
from allocator.profiling import sums_checkpoint
from allocator.profiling.changes import CountChange
from allocator.profiling.curvature import measure
from allocator.profiling.in_memory_profiler import InMemoryProfiler as Profiler
from allocator.profiling.inputs import ProfileInputs
from allocator.profiling.statistics import collect
from allocator.profiling.sums_checkpoint import SumsCheckpoint
from allocator.scoring.candidates import Candidate
from allocator.scoring.scorer import Scorer
from allocator.scoring.swap_model import SwapModel, destination
from allocator.targets import GGUF, SAFETENSORS
from allocator.targets.group_weights import group_weights

decode, encode = GGML.decode, GGML.encode

torch.set_num_threads(1)
LENGTHS = (21, 21, 17, 17)
SLOW = ("IQ2_S", "IQ2_XS", "IQ1_M", "IQ1_S")  # ggml makes a table for each first: 22 s


@pytest.fixture(scope="module", autouse=True)
def _quick_formats():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "allocator.targets.layout.offered",
            lambda *a, **k: tuple(f for f in offered(*a, **k) if f.name not in SLOW),
        )
        yield


@pytest.fixture(scope="module")
def inputs(checkpoints, make_documents):
    return ProfileInputs(
        layout=GGUF.layout(read_inventory(checkpoints["deepseek"])),
        documents=make_documents(LENGTHS),
        n_measured=2,
        n_curvature=3,
        saliency="fisher",
    )


class Counter:
    """Tokens through each layer of a model, forward and backward."""

    def __init__(self, model):
        self.n_layers = len(model.model.layers)
        self.forward = self.backward = 0
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(self.count)  # a layer that is skipped runs none

    def count(self, mlp, args, output):
        n_tokens = output.shape[0] * output.shape[1]
        self.forward += n_tokens
        if output.requires_grad:
            output.register_hook(lambda gradient: self.back(n_tokens))

    def back(self, n_tokens):
        self.backward += n_tokens

    def take(self):
        """Both, in tokens through all layers, since the last time."""
        found = self.forward / self.n_layers, self.backward / self.n_layers
        self.forward = self.backward = 0
        return found


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory):
    """A whole profile, read only: its cache, and what every stage ran."""
    profiler = Profiler(inputs, tmp_path_factory.mktemp("cache"))
    counter, ran = Counter(profiler.model.model), {}
    for stage in ("statistics", "curvature"):
        getattr(profiler, stage)
        ran[stage] = counter.take()
    profiler.profile()
    ran["changes"] = counter.take()
    return SimpleNamespace(cache=profiler.cache, ran=ran)


@pytest.fixture(scope="module")
def finished(built):
    """The cache alone."""
    return built.cache


@pytest.fixture
def copied(inputs, finished, tmp_path):
    """A copy to damage, and the profile's folder in it."""
    shutil.copytree(finished, tmp_path / "cache")
    return tmp_path / "cache", Profiler(inputs, tmp_path / "cache").folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def nearest(group, bits):
    """By hand: of the formats offered, the one whose size is nearest."""
    return sorted(group.offered(), key=lambda f: (abs(f.bits - bits), f.name))[0].name


def test_every_change_is_measured(inputs, finished):
    profile = Profiler(inputs, finished).profile()
    groups = inputs.layout.groups
    bundles = {"embedding": ["embedding"], "head": ["head"]}
    for name in groups:
        if name.startswith("layers."):
            _, layer, kind, *_ = name.split(".")
            kind = "attention" if kind == "attention" else "mlp"
            bundles.setdefault(f"layers.{layer}.{kind}", []).append(name)
    assert len(bundles) == 2 + 3 * 2
    expected = {
        (bundle, tuple(sorted((g, nearest(groups[g], bits)) for g in names)))
        for bundle, names in bundles.items()
        for bits in (1.75, 3.0)
    }
    found = [(c.bundle, tuple(sorted(c.formats.items()))) for c in profile.measured]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert {layer: set(c) for layer, c in profile.pruned.items()} == {
        1: {7, 5, 4, 3, 2},
        2: {7, 5, 4, 3, 2},
    }
    assert profile.n_tokens == sum(LENGTHS)
    assert profile.measured_tokens == 42
    assert profile.curvature_tokens == 59
    assert set(profile.saliency) == set(SALIENCIES)
    assert profile.saliency_method == "fisher"
    assert (1, 5) in profile.unreached
    path = Profiler(inputs, finished).folder / "profile.json"
    assert Profile.read(path, inputs.digest) == profile


def test_curvature_is_of_every_offered_format_and_expert(inputs, finished):
    """Encoded here, and priced by a measurement of another model instance."""
    profiler = Profiler(inputs, finished)
    profile, importance = profiler.profile(), profiler.statistics.importance
    groups = inputs.layout.groups
    assert {n: set(row) for n, row in profile.curvature.items()} == {
        n: {f.name for f in g.offered()} for n, g in groups.items()
    }
    assert any("IQ2_XXS" in row for row in profile.curvature.values())
    swap = SwapModel(inputs.layout, profiler.encodings.decoded)
    found = measure(swap, inputs.documents[:3])
    for name, fmt in [
        ("layers.2.experts.down", "Q4_0"),
        ("layers.1.experts.up", "IQ4_NL"),
        ("layers.1.attention.k_b", "IQ4_NL"),
        ("layers.1.attention.v_b", "IQ2_XXS"),
        ("layers.0.mlp.up", "Q5_0"),
        ("embedding", "Q4_0"),
    ]:
        group = groups[name]
        weights = group_weights(inputs.layout, group)
        decoded = decode(encode(weights, FORMATS[fmt], importance.get(name)), FORMATS[fmt])
        experts = range(8) if group.role.is_expert else ()
        expected = found.price(group, decoded - weights, experts)
        assert len(expected) == (8 if experts else 1)
        assert profile.curvature[name][fmt] == pytest.approx(expected, rel=1e-5, abs=1e-15)
    reached = collect(swap.model, inputs.layout, inputs.documents[:3]).counts
    for name, row in profile.curvature.items():
        for fmt, values in row.items():
            counts = reached[groups[name].layer] if "experts" in name else [1]
            assert [v > 0 for v in values] == [n > 0 for n in counts], (name, fmt)


def test_fisher_saliency_is_the_loss_in_the_format_nearest_two_bits(inputs, finished):
    profile = Profiler(inputs, finished).profile()
    for layer in (1, 2):
        names = [f"layers.{layer}.experts.{kind}" for kind in ("gate", "up", "down")]
        formats = [nearest(inputs.layout.groups[n], 2.0625) for n in names]
        losses = [profile.curvature[n][f] for n, f in zip(names, formats, strict=True)]
        expected = [sum(values) for values in zip(*losses, strict=True)]
        assert profile.saliency["fisher"][layer] == pytest.approx(expected, rel=1e-12)
    assert profile.saliency["fisher"][1][5] == 0


def test_forward_tokens_are_what_ran(inputs, built):
    """A backward pass counts twice what its forward does."""
    profile, ran = Profiler(inputs, built.cache).profile(), built.ran
    assert ran["statistics"] == (profile.forward_tokens["statistics"], 0)
    forward, backward = ran["curvature"]
    assert forward == backward == profile.curvature_tokens
    assert profile.forward_tokens["curvature"] == forward + 2 * backward
    forward, backward = ran["changes"]
    counted = profile.forward_tokens["reference"] + profile.forward_tokens["changes"]
    assert counted == pytest.approx(forward, abs=0.5)
    assert backward == 0
    assert set(profile.forward_tokens) == {"statistics", "curvature", "reference", "changes"}


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
    swap = SwapModel(layout, profiler.encodings.decoded)
    everyone = dict.fromkeys(layout.layers, tuple(range(8)))
    path, few = layout.inventory.path, inputs.documents[:2]
    checked = {c.bundle: c for c in profile.measured}
    for name in ("embedding", "layers.1.attention", "layers.2.mlp"):
        change = checked[name]
        assert isinstance(change, Change)
        formats = dict.fromkeys(layout.groups) | change.formats
        swap.put(Candidate(format_of=formats, retained_experts=everyone, experts_used=2))
        expected = naive_kl(path, swap.model, few)
        assert change.kl == pytest.approx(expected, rel=1e-3, abs=1e-7), name
    best = np.argsort(np.negative(profile.saliency["fisher"][1]), kind="stable")[:4]
    swap.put(
        Candidate(
            format_of=dict.fromkeys(layout.groups),
            retained_experts={**everyone, 1: tuple(sorted(best.tolist()))},
            experts_used=2,
        )
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
def test_after_a_kill_the_profile_is_the_same(inputs, copied, share):
    cache, folder = copied
    expected = (folder / "profile.json").read_bytes()
    (folder / "profile.json").unlink()
    n_before = len(rows(folder / "losses.jsonl"))
    cut(folder / "losses.jsonl", share)
    kept = (folder / "losses.jsonl").read_bytes().rpartition(b"\n")[0]
    Profiler(inputs, cache).profile()
    assert (folder / "profile.json").read_bytes() == expected
    assert (folder / "losses.jsonl").read_bytes().startswith(kept)
    assert len(rows(folder / "losses.jsonl")) == n_before
    assert not list(folder.glob("*.part"))


def test_after_a_kill_at_any_line_only_the_rest_is_measured(inputs, copied):
    cache, folder = copied
    expected = (folder / "profile.json").read_bytes()
    lines = (folder / "losses.jsonl").read_bytes().splitlines(keepends=True)
    known = {row["change"]: row["kl"] for row in map(json.loads, lines)}
    measured = []

    class Recorded(Profiler):
        """Looks losses up by the name of the change, and measures none."""

        def candidate(self, change):
            measured.append(change.name)
            return change.name

        def measure_losses(self, candidates):
            return (known[name] for name in candidates)

    for n in range(len(lines)):
        (folder / "profile.json").unlink()
        (folder / "losses.jsonl").write_bytes(b"".join(lines[:n]) + lines[n][: n % 7])
        measured.clear()
        Recorded(inputs, cache).profile()
        assert measured == list(known)[n:]
        assert (folder / "profile.json").read_bytes() == expected


def test_a_kill_inside_the_passes(inputs, copied):
    cache, folder = copied
    expected = {p.name: p.read_bytes() for p in folder.iterdir()}
    for name in ("profile.json", "statistics.json", "curvature.json", "losses.jsonl"):
        (folder / name).unlink()
    (folder / "importance.safetensors.1.part").write_bytes(b"torn")
    (folder / "importance.safetensors").write_bytes(b"of another run")
    (folder / "curvature.json.1.part").write_bytes(b"{torn")
    Profiler(inputs, cache).profile()
    assert {n: (folder / n).read_bytes() for n in expected} == expected


def test_an_interrupt_keeps_what_was_measured(inputs, copied):
    cache, folder = copied
    expected = (folder / "profile.json").read_bytes()
    for name in ("profile.json", "losses.jsonl"):
        (folder / name).unlink()

    class Interrupted(Profiler):
        def measure_losses(self, candidates):
            for number, loss in enumerate(super().measure_losses(candidates), 1):
                if number == 5:
                    raise KeyboardInterrupt
                yield loss

    with pytest.raises(KeyboardInterrupt):
        Interrupted(inputs, cache).profile()
    assert len(rows(folder / "losses.jsonl")) == 4
    Profiler(inputs, cache).profile()
    assert (folder / "profile.json").read_bytes() == expected


def ran(*_, **__):
    pytest.fail("ran")


class ReadOnly(Profiler):
    """Reads, and measures nothing."""

    model = property(ran)
    build = measure_statistics = measure_curvature = measure_losses = ran


def test_a_finished_profile_is_only_read(inputs, finished):
    profiler = ReadOnly(inputs, finished)
    profiler.profile()
    assert profiler.statistics.n_tokens == sum(LENGTHS)
    assert profiler.curvature


def test_the_address_follows_every_input(
    inputs, checkpoints, change_checkpoint, make_documents, monkeypatch
):
    def edit(tensors):
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 5] += 1

    changed = read_inventory(change_checkpoint(checkpoints["deepseek"], edit))
    others = [
        dataclasses.replace(inputs, documents=make_documents(LENGTHS, seed=1)),
        dataclasses.replace(inputs, documents=inputs.documents[::-1]),
        dataclasses.replace(inputs, documents=inputs.documents[:3]),
        dataclasses.replace(inputs, n_measured=3),
        dataclasses.replace(inputs, n_curvature=2),
        dataclasses.replace(inputs, saliency="gate"),
        dataclasses.replace(inputs, layout=GGUF.layout(changed)),
        dataclasses.replace(inputs, layout=SAFETENSORS.layout(inputs.layout.inventory)),
        dataclasses.replace(inputs, anchor_bits=(2.0, 3.0)),
        dataclasses.replace(inputs, pruned_shares=(0.5,)),
    ]
    digests = {i.digest for i in (inputs, *others)}
    assert dataclasses.replace(inputs).digest == inputs.digest
    monkeypatch.setattr(GGML, "version", "another")
    digests.add(dataclasses.replace(inputs).digest)
    assert len(digests) == 1 + len(others) + 1


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
        layout=layout,
        documents=make_documents((9,)),
        n_measured=1,
        n_curvature=1,
        saliency="fisher",
    )
    profiler = Profiler(inputs, tmp_path / "cache")
    counts = {c.count for c in profiler.changes() if isinstance(c, CountChange)}
    assert counts == {12}  # six used of two chosen groups: three in each
    swap = SwapModel(layout, profiler.encodings.decoded)
    swap.put(
        Candidate(
            format_of=dict.fromkeys(layout.groups),
            retained_experts={
                layer: tuple(e for e in range(16) if e % 4 < 3) for layer in layout.layers
            },
            experts_used=6,
        )
    )
    with torch.inference_mode():
        assert swap.model(torch.tensor([[0, 1, 2]])).logits.isfinite().all()


@pytest.mark.parametrize("stage", ["curvature", "put", "around"])
def test_a_capped_bank_stays_small(inputs, near, finished, stage):
    """Of a group at a time, or of what the model asks for at a time; the results are the same."""
    capped = Profiler(inputs, near.profiler.cache, encodings_cap=1)
    whole, groups = Profiler(inputs, finished), list(inputs.layout.groups)
    left = 1
    if stage == "curvature":
        (capped.folder / "curvature.json").unlink()
        assert capped.curvature == whole.curvature
        left = len(inputs.layout.groups[groups[-1]].offered())
    elif stage == "put":
        capped.model.put_allocation(near.allocation)
    else:
        capped.local_prices(near.allocation, near.scorer, part=0)
        left = len(inputs.layout.groups[groups[-1]].offered())
    assert len(list((capped.cache / "bank").iterdir())) == left


# -- around a candidate


RETAINED = {1: (0, 2, 3, 5, 6, 7), 2: (1, 2, 3, 4, 5, 7)}


@pytest.fixture
def near(inputs, finished, make_documents, tmp_path):
    """A profiler in a copy of the cache, a candidate, and a scorer of six search documents."""
    profiler = Profiler(inputs, shutil.copytree(finished, tmp_path / "cache"))
    allocation = Allocation.of(
        target="gguf",
        retained=RETAINED,
        formats={g: "Q8_0" if "attention" in g else "Q4_0" for g in inputs.layout.groups},
        experts_used=2,
    )
    documents = make_documents((13, 13, 19, 11, 11, 17), seed=4)
    return SimpleNamespace(
        profiler=profiler, allocation=allocation, documents=documents,
        scorer=Scorer(profiler.model, documents),
    )  # fmt: skip


def test_around_is_the_curvature_and_the_slope_there(inputs, near):
    profiler, layout = near.profiler, inputs.layout
    found = profiler.local_prices(near.allocation, near.scorer, part=1)
    part = near.documents[3:]
    swap = SwapModel(layout, profiler.encodings.decoded)
    scorer = Scorer(swap, part)
    scorer.ensure_reference(3)
    swap.put_allocation(near.allocation)
    there = measure(swap, part, reference=scorer.reference)
    for name, fmt in [
        ("layers.1.experts.gate", "Q5_0"),
        ("layers.2.experts.down", "Q8_0"),
        ("layers.2.attention.v_b", "IQ2_XXS"),
        ("layers.0.mlp.down", "Q4_0"),
        ("embedding", "Q8_0"),
        ("head", "Q5_0"),
    ]:
        group = layout.groups[name]
        kept = RETAINED[group.layer] if group.role.is_expert else ()
        weights = group_weights(layout, group)
        weights = weights[list(kept)] if kept else weights
        held = destination(swap.model, layout.inventory.dimensions, group).numpy().copy()
        decoded = profiler.encodings.decoded(name, fmt, kept or None)
        curvature = there.price(group, decoded - weights, kept)
        step = np.add(there.price(group, decoded - held, kept), there.slope(group, decoded - held))
        assert len(found.curvature[name][fmt]) == len(found.moves[name][fmt])
        if not kept:
            assert found.curvature[name][fmt] == pytest.approx(curvature, rel=1e-4)
            assert found.moves[name][fmt] == pytest.approx(step, rel=1e-3, abs=1e-8)
            continue
        original = profiler.profile().curvature[name][fmt]
        factor = sum(curvature) / sum(original[e] for e in kept)
        for e in range(8):
            if e in kept:
                i = kept.index(e)
                assert found.curvature[name][fmt][e] == pytest.approx(curvature[i], rel=1e-4)
                assert found.moves[name][fmt][e] == pytest.approx(step[i], rel=1e-3, abs=1e-8)
            else:
                expected = original[e] * factor
                assert found.curvature[name][fmt][e] == pytest.approx(expected, rel=1e-4)
                assert found.moves[name][fmt][e] == 0


def test_around_covers_every_format_and_staying_costs_nothing(inputs, near):
    found = near.profiler.local_prices(near.allocation, near.scorer, part=0)
    for prices in (found.curvature, found.moves):
        assert {n: set(row) for n, row in prices.items()} == {
            n: {f.name for f in g.offered()} for n, g in inputs.layout.groups.items()
        }
    for name, fmt in near.allocation.formats:
        assert set(found.moves[name][fmt]) == {0.0}
        elsewhere = [row for other, row in found.moves[name].items() if other != fmt]
        assert elsewhere
        assert all(any(row) for row in elsewhere)


def test_around_counts_what_it_runs(near):
    """The original and the candidate forward, and two backward passes, each twice a forward."""
    counter, costs = Counter(near.profiler.model.model), []
    for part, n_tokens in enumerate((13 + 13 + 19, 11 + 11 + 17)):
        costs.append(
            near.profiler.local_prices(near.allocation, near.scorer, part=part).forward_tokens
        )
        forward, backward = counter.take()
        assert forward == backward == 2 * n_tokens
        assert costs[-1] == forward + 2 * backward
    assert near.profiler.gradient_tokens(near.scorer) == max(costs)


def test_around_is_kept_by_content(near):
    profiler = near.profiler
    first, second = (profiler.local_prices(near.allocation, near.scorer, part=i) for i in (0, 1))
    assert first.moves != second.moves
    assert first.curvature != second.curvature
    other = dataclasses.replace(near.allocation, experts_used=1)
    assert profiler.local_prices(other, near.scorer, part=0).moves != first.moves
    assert len(list(profiler.folder.glob("around-*.json"))) == 3
    few = Scorer(profiler.model, near.documents[:3])
    again = ReadOnly(profiler.inputs, profiler.cache)
    assert again.local_prices(near.allocation, near.scorer, part=0) == first
    assert again.local_prices(near.allocation, near.scorer, part=1) == second
    assert again.local_prices(near.allocation, near.scorer, part=2) == first
    assert again.local_prices(near.allocation, near.scorer, part=3) == second
    assert again.local_prices(near.allocation, few, part=7) == first


@pytest.mark.parametrize("stage", ["curvature", "around"])
def test_gradients_that_were_stopped_go_on(inputs, near, monkeypatch, stage):
    monkeypatch.setattr(sums_checkpoint, "LEAST_SECONDS", 0)
    monkeypatch.setattr(sums_checkpoint, "_SHARE", 0)
    if stage == "curvature":
        expected, name = near.profiler.curvature, "curvature.json"
    else:
        expected = near.profiler.local_prices(near.allocation, near.scorer, part=0)
        name = "around-*.json"
    next(near.profiler.folder.glob(name)).unlink()
    save, saved = SumsCheckpoint.save_if_due, []

    def stopping(checkpoint, sums):
        save(checkpoint, sums)
        saved.append(int(load_arrays(checkpoint.path, checkpoint.of)["done"][0]))
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(SumsCheckpoint, "save_if_due", stopping)

    def measured():
        profiler = Profiler(inputs, near.profiler.cache)
        if stage == "curvature":
            return profiler.curvature
        return profiler.local_prices(near.allocation, near.scorer, part=0)

    with pytest.raises(KeyboardInterrupt):
        measured()
    assert measured() == expected
    assert saved == list(range(1, 1 + len(saved)))  # no batch twice
    assert len(saved) > 1
    assert not list(near.profiler.folder.glob("*/*.safetensors"))


def test_around_takes_all_documents_where_there_are_few(near):
    few = Scorer(near.profiler.model, near.documents[:2])
    first = near.profiler.local_prices(near.allocation, few, part=0)
    assert first.forward_tokens == 6 * 26
    assert near.profiler.local_prices(near.allocation, few, part=1) == first


def test_around_leaves_the_model_fit_for_scoring(near):
    other = dataclasses.replace(near.allocation, retained=((1, (0, 1, 2, 3)), (2, (4, 5, 6, 7))))
    expected = {a: near.scorer.score(a).kl for a in (near.allocation, other)}
    near.scorer.score(other)
    near.profiler.local_prices(near.allocation, near.scorer, part=0)
    assert np.array_equal(near.scorer.score_installed().kl, expected[near.allocation])
    for allocation, kl in expected.items():
        assert np.array_equal(near.scorer.score(allocation).kl, kl)
    near.profiler.model.reset()
    assert near.scorer.score_installed().kl == pytest.approx(0, abs=1e-6)


def resealed(line, profiler, **changes):
    """A row with a checksum that holds, made by hand of what the module says it is over."""
    row = {k: v for k, v in json.loads(line).items() if k != "checksum"} | changes
    body = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    of = f"losses.jsonl {profiler.inputs.digest}\n"
    return json.dumps(row | {"checksum": sha256(of.encode() + body.encode()).hexdigest()[:32]})


def flipped(line):
    """One bit of a digit of the loss."""
    at = line.index('"kl":') + 9
    return line[:at] + chr(ord(line[at]) ^ 1) + line[at + 1 :]


DAMAGED_ROWS = {
    "another profile's": lambda line, p: resealed(line, of_another(p)),
    "of a change that is not asked for": lambda line, p: resealed(line, p, change="layers.9"),
    "a change that is no text": lambda line, p: resealed(line, p, change=[1]),
    "text for a loss": lambda line, p: resealed(line, p, kl="0.5"),
    "no loss": lambda line, p: resealed(line, p, kl=None),
    "nan": lambda line, p: re.sub('"kl":[^,]*', '"kl":NaN', line),
    "inf": lambda line, p: re.sub('"kl":[^,]*', '"kl":Infinity', line),
    "without a checksum": lambda line, p: re.sub(',"checksum":"[^"]*"', "", line),
    "a flipped bit": lambda line, p: flipped(line),
    "two rows in one": lambda line, p: line[:20] + line,
    "nesting": lambda line, p: "[" * 100_000,
    "bytes": lambda line, p: "\udcff\udcfe",
    "empty": lambda line, p: "",
}


def of_another(profiler):
    other = dataclasses.replace(profiler.inputs, n_measured=3)
    return SimpleNamespace(inputs=other)


@pytest.mark.parametrize("kind", DAMAGED_ROWS)
def test_a_row_that_cannot_be_used_is_measured_again(inputs, copied, caplog, kind):
    """One line says so; the profile is the undisturbed one, to the byte."""
    cache, folder = copied
    expected = (folder / "profile.json").read_bytes()
    (folder / "profile.json").unlink()
    measured = []

    class Watched(Profiler):
        def candidate(self, change):
            measured.append(change.name)
            return super().candidate(change)

    path, profiler = folder / "losses.jsonl", Watched(inputs, cache)
    lines = path.read_text().splitlines()
    name = json.loads(lines[4])["change"]
    lines[4] = DAMAGED_ROWS[kind](lines[4], profiler)
    path.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    profiler.profile()
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert "losses.jsonl, line 5: damaged (" in said[0]
    assert "measured again" in said[0]
    assert "\n" not in said[0]
    assert measured == [name]
    assert (folder / "profile.json").read_bytes() == expected
    assert len(rows(path)) == len(lines)
    caplog.clear()
    (folder / "profile.json").unlink()
    Watched(inputs, cache).profile()
    assert not caplog.records  # the damaged row is gone
    assert measured == [name]


def test_foreign_rows_beside_all_others_change_nothing(inputs, copied, caplog):
    """A torn last line included: of several damaged rows one line speaks."""
    cache, folder = copied
    expected = (folder / "profile.json").read_bytes()
    (folder / "profile.json").unlink()
    path, profiler = folder / "losses.jsonl", Profiler(inputs, cache)
    lines = path.read_text().splitlines()
    foreign = [resealed(lines[2], of_another(profiler), kl=9.0), '{"change":"x","kl":1}', "7"]
    path.write_text("\n".join([*lines[:3], *foreign, *lines[3:], lines[2][:31]]))
    profiler.profile()
    assert (folder / "profile.json").read_bytes() == expected
    (said,) = [r.getMessage() for r in caplog.records]
    assert "losses.jsonl, line 4, and 2 more: damaged (" in said
    assert path.read_text().splitlines() == lines
