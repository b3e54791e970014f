"""Curvature and slope against plain autograd on transformers' own models, and against the KL."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.families import Role
from allocator.files.checksums import load_arrays
from allocator.profiling import sums_checkpoint
from allocator.profiling.curvature import measure
from allocator.profiling.sums_checkpoint import SumsCheckpoint
from allocator.scoring.documents import Document
from allocator.scoring.experts import differentiable_experts, routed_experts
from allocator.scoring.scorer import Scorer
from allocator.scoring.swap_model import SwapModel, destination, install
from allocator.targets import TARGETS
from allocator.targets.group_weights import group_weights

torch.set_num_threads(1)
LENGTHS = (17, 17, 9, 21, 21, 21)  # batches of one length: 3, or 4 of at most 50 tokens
CASES = [("deepseek", "gguf"), ("deepseek", "safetensors"), ("qwen3", "gguf"),
         ("qwen3_tied", "safetensors")]  # fmt: skip


@pytest.fixture(scope="module")
def case(checkpoints, make_documents, tmp_path_factory):
    """`case(name, target)`: swap model, layout, documents, scorer; each loaded once."""
    made = {}

    def get(name, target="gguf"):
        if (name, target) not in made:
            layout = TARGETS[target].layout(read_inventory(checkpoints[name]))
            encodings = Encodings(tmp_path_factory.mktemp("bank"), layout, {})
            swap = SwapModel(layout, encodings.decoded)
            documents = make_documents(LENGTHS)
            made[name, target] = SimpleNamespace(
                path=checkpoints[name], layout=layout, swap=swap, documents=documents,
                scorer=Scorer(swap, documents, layer_input_bytes=0),
                encodings=encodings,  # changed by hand
            )  # fmt: skip
        made[name, target].swap.reset()
        return made[name, target]

    return get


def candidate(layout, n_experts=6):
    """Everything in a small format; of the deepseek one, expert 5 of layer 1 is never reached."""
    return Allocation.of(
        target=layout.target,
        retained=dict.fromkeys(layout.layers, tuple(range(8 - n_experts, 8))),
        formats=dict.fromkeys(layout.groups, "Q4_0"),
        experts_used=2,
    )


def held_of(swap, group):
    """What the model holds of a group."""
    return destination(swap.model, swap.inventory.dimensions, group).detach().clone().numpy()


def random_change(values, seed=0, scale=0.05):
    rng = np.random.default_rng(seed)
    return (scale * values.std() * rng.standard_normal(values.shape)).astype(np.float32)


# -- the experts


def expert_inputs(n_tokens, k, chosen, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pick = torch.rand(n_tokens, len(chosen), generator=generator).argsort(1)[:, :k]
    gates = torch.rand(n_tokens, k, generator=generator)
    return torch.randn(n_tokens, 64, generator=generator), torch.tensor(chosen)[pick], gates


@pytest.mark.parametrize("name", ["deepseek", "qwen3"])
@pytest.mark.parametrize(
    ("n_tokens", "k", "chosen"), [(33, 2, range(8)), (20, 2, (1, 6)), (1, 2, range(8))]
)
def test_differentiable_experts_are_the_routed_ones(case, name, n_tokens, k, chosen):
    experts = case(name).swap.model.model.layers[1].mlp.experts
    hidden, index, gates = expert_inputs(n_tokens, k, tuple(chosen))
    seen = []
    found = differentiable_experts(
        experts, hidden, index, gates, watch=lambda *call: seen.append(call)
    )
    expected = routed_experts(experts, hidden, index, gates)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    reached = sorted(set(index.flatten().tolist()))
    assert [(e, kind) for e, kind, _, _ in seen] == [
        (e, kind) for e in reached for kind in ("first", "down")
    ]
    for e, kind, x, y in seen:
        weight = (experts.gate_up_proj if kind == "first" else experts.down_proj)[e]
        assert len(x) == int((index == e).sum())
        torch.testing.assert_close(y, x @ weight.T)


# -- curvature against loops over tokens


class Naive:
    """Inputs and output gradients of every product, from transformers' model and plain autograd.

    Experts run token by token. Labels are drawn batch by batch, as `batches` says, from `seed`.
    """

    def __init__(self, path, batches, seed):
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.found = {}
        self.lookups = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self.linear(name))
            if name.endswith("mlp.experts"):
                module.forward = self.experts(module, int(name.split(".")[2]))
        self.model.model.embed_tokens.register_forward_hook(self.embedding)
        generator = torch.Generator().manual_seed(seed)
        for batch in batches:
            ids = torch.tensor([d.ids for d in batch])
            logits = self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            p = torch.softmax(logits.detach(), -1)
            labels = torch.multinomial(p, 1, generator=generator)[:, 0]
            nn.functional.cross_entropy(logits, labels, reduction="sum").backward()

    def keep(self, name, x, y):
        y.retain_grad()
        self.found.setdefault(name, []).append((x.detach(), y))

    def linear(self, name):
        def hook(module, args, output):
            self.keep(name, args[0], output)

        return hook

    def embedding(self, module, args, output):
        output.retain_grad()
        self.lookups.append((args[0], output))

    def experts(self, module, layer):
        def forward(hidden, index, gates):
            rows = []
            for x, chosen, weights in zip(hidden, index.tolist(), gates, strict=True):
                total = torch.zeros_like(x)
                for e, g in zip(chosen, weights, strict=True):
                    both = module.gate_up_proj[e] @ x
                    self.keep((layer, "gate_up", e), x, both)
                    gate, up = both.chunk(2)
                    inner = nn.functional.silu(gate) * up
                    out = module.down_proj[e] @ inner
                    self.keep((layer, "down", e), inner, out)
                    total = total + g * out
                rows.append(total)
            return torch.stack(rows)

        return forward

    def rows(self, name):
        """Inputs `(tokens, in)` and output gradients `(tokens, out)` of one product."""
        pairs = self.found.get(name, [])
        if not pairs:
            return None
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in pairs])
        g = torch.cat([y.grad.reshape(-1, y.shape[-1]) for _, y in pairs])
        return x.double(), g.double()

    def price(self, rows, change, chosen=slice(None)):
        """1/2 sum over rows r of share_r D_r A D_r, `change` being of the `chosen` rows."""
        if rows is None:
            return 0.0
        x, g = rows
        total = (g**2).sum()
        a = sum(float((gt**2).sum()) * torch.outer(xt, xt) for xt, gt in zip(x, g, strict=True))
        share = ((g**2).sum(0) / total)[chosen]
        d = torch.from_numpy(change).double()
        return 0.5 * sum(float(s * (row @ a @ row)) for s, row in zip(share, d, strict=True) if s)

    def looked_up(self, change):
        """1/2 sum over tokens of (g . D of that token)^2."""
        d, total = torch.from_numpy(change).double(), 0.0
        for ids, output in self.lookups:
            for i, g in zip(ids.flatten(), output.grad.flatten(0, 1).double(), strict=True):
                total += float(g @ d[i]) ** 2
        return 0.5 * total

    def of_group(self, layout, group, change):
        """One value per expert, else one value, as `Curvature.price` of the original."""
        if group.role.is_expert:
            kind = "down" if group.role is Role.EXPERT_DOWN else "gate_up"
            found = []
            for e in range(8):
                rows = self.rows((group.layer, kind, e))
                if rows is not None and kind == "gate_up":
                    half = rows[1].shape[1] // 2
                    first = group.role is Role.EXPERT_GATE
                    rows = rows[0], rows[1][:, :half] if first else rows[1][:, half:]
                found.append(self.price(rows, change[e]))
            return found
        if group.role in (Role.K_B, Role.V_B):
            rows = self.rows(f"model.layers.{group.layer}.self_attn.kv_b_proj")
            total = 0.0  # rows of kv_b: per head 32 of k_b (stored transposed), then 32 of v_b
            for head in range(4):
                first = group.role is Role.K_B
                start = head * 64 + (0 if first else 32)
                part = change[head].T if first else change[head]
                total += self.price(rows, np.ascontiguousarray(part), slice(start, start + 32))
            return [total]
        if group.role is Role.EMBEDDING:
            tied = layout.inventory.tied_embeddings
            head = self.price(self.rows("lm_head"), change) if tied else 0.0
            return [head + self.looked_up(change)]
        return [self.price(self.rows(group.sources[0].removesuffix(".weight")), change)]


def in_batches(documents, n_tokens):
    """Runs of equal length, at most so many tokens each."""
    found = []
    for d in documents:
        fits = found and len(found[-1][0].ids) == len(d.ids)
        if fits and (len(found[-1]) + 1) * len(d.ids) <= n_tokens:
            found[-1].append(d)
        else:
            found.append([d])
    return found


@pytest.mark.parametrize(("name", "target"), CASES)
def test_prices_are_those_of_plain_autograd(case, name, target):
    the = case(name, target)
    with the.swap.original():
        found = measure(the.swap, the.documents, seed=3, batch_tokens=50)
    naive = Naive(the.path, in_batches(the.documents, 50), seed=3)
    assert len(in_batches(the.documents, 50)) == 4
    assert found.n_tokens == sum(LENGTHS)
    roles = set()
    for seed, group in enumerate(the.layout.groups.values()):
        change = random_change(group_weights(the.layout, group), seed)
        experts = range(8) if group.role.is_expert else ()
        expected = np.array(naive.of_group(the.layout, group, change)) / sum(LENGTHS)
        np.testing.assert_allclose(
            found.price(group, change, experts), expected, rtol=2e-3, err_msg=group.name
        )
        assert expected.sum() > 0
        roles.add(group.role)
    assert {Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN, Role.EMBEDDING} <= roles
    assert ({Role.K_B, Role.V_B} <= roles) == ((name, target) == ("deepseek", "gguf"))
    assert (Role.HEAD in roles) == (name != "qwen3_tied")


def test_an_unreached_expert_costs_nothing(case):
    the = case("deepseek")
    with the.swap.original():
        found = measure(the.swap, the.documents)
    for kind in ("gate", "up", "down"):
        group = the.layout.groups[f"layers.1.experts.{kind}"]
        prices = found.price(group, random_change(group_weights(the.layout, group)), range(8))
        assert prices[5] == 0.0
        assert sum(p > 0 for p in prices) > 4


def test_a_candidates_experts_are_counted_in_its_order(case):
    """Expert i of the price is the i-th that is retained, and sees what the candidate computes."""
    the = case("qwen3")
    the.swap.put_allocation(candidate(the.layout))
    found = measure(the.swap, the.documents, seed=1)
    model = candidate_model(the)
    model.save_pretrained(the.encodings.folder / "candidate")
    naive = Naive(the.encodings.folder / "candidate", in_batches(the.documents, 2048), seed=1)
    group = the.layout.groups["layers.1.experts.down"]
    change = random_change(held_of(the.swap, group))
    prices = found.price(group, change, range(2, 8))
    for e, price in enumerate(prices):
        expected = naive.price(naive.rows((1, "down", e)), change[e]) / sum(LENGTHS)
        assert price == pytest.approx(expected, rel=2e-3)
    assert min(prices) > 0


# -- the slope


def candidate_model(the):
    """A transformers model that holds what the swap model holds."""
    config = AutoConfig.from_pretrained(the.path)
    n = len(next(iter(the.swap.retained.values())))
    config.update({"num_experts": n, "n_routed_experts": n})
    config.tie_word_embeddings = the.layout.inventory.tied_embeddings
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.load_state_dict(the.swap.model.state_dict())
    return model


def measured_slope(the, **options):
    the.scorer.ensure_reference(len(the.documents))
    the.swap.put_allocation(candidate(the.layout))
    return measure(the.swap, the.documents, reference=the.scorer.reference, **options)


@pytest.mark.parametrize(("name", "target"), CASES)
def test_the_slope_is_plain_autograds(case, name, target):
    the = case(name, target)
    found = measured_slope(the)
    candidate_ = candidate_model(the)
    original = AutoModelForCausalLM.from_pretrained(the.path, dtype=torch.float32).eval()
    for d in the.documents:
        ids = torch.tensor([d.ids])
        with torch.no_grad():
            p = original(ids).logits[0].log_softmax(-1)
        q = candidate_(ids).logits[0].log_softmax(-1)
        nn.functional.kl_div(q, p, reduction="sum", log_target=True).backward()
    gradients = {n: p.grad.double() for n, p in candidate_.named_parameters()}
    for seed, group in enumerate(the.layout.groups.values()):
        held = held_of(the.swap, group)
        change = random_change(held, seed)
        before = {n: p.clone() for n, p in the.swap.model.named_parameters()}
        install(the.swap.model, the.layout.inventory.dimensions, group, held + change)
        parts = {
            n: gradients[n] * (p - before[n]).double()
            for n, p in the.swap.model.named_parameters()
            if not torch.equal(p, before[n])
        }
        install(the.swap.model, the.layout.inventory.dimensions, group, held)
        assert len(parts) == 1
        (products,) = parts.values()
        expected = products.flatten(1).sum(1) if group.role.is_expert else products.sum()[None]
        n = sum(LENGTHS)
        np.testing.assert_allclose(
            found.slope(group, change), expected / n, rtol=2e-3, atol=1e-6, err_msg=group.name
        )


def loss_and_routing(the):
    """The measured KL, nats per token, and every expert that a token was sent to."""
    chosen = []
    handles = [
        the.swap.model.model.layers[x].mlp.experts.register_forward_pre_hook(
            lambda module, args: chosen.append(args[1].sort(1).values.clone())
        )
        for x in the.layout.layers
    ]
    kl = the.scorer.score_installed().kl
    for handle in handles:
        handle.remove()
    return float(kl @ np.array(LENGTHS)) / sum(LENGTHS), torch.cat(chosen)


@pytest.mark.parametrize(("name", "target"), [CASES[0], CASES[3]])
def test_the_slope_is_what_the_loss_does(case, name, target):
    """Central differences of the scorer's KL, along steps that send no token elsewhere."""
    the = case(name, target)
    found = measured_slope(the)
    dimensions, checked = the.layout.inventory.dimensions, 0
    _, routing = loss_and_routing(the)
    for group in the.layout.groups.values():
        held = held_of(the.swap, group)
        change = random_change(held, seed=1, scale=1e-3)
        losses = []
        for sign in (1, -1):
            install(the.swap.model, dimensions, group, held + np.float32(sign) * change)
            loss, there = loss_and_routing(the)
            if torch.equal(there, routing):
                losses.append(loss)
        install(the.swap.model, dimensions, group, held)
        if len(losses) == 2:
            slope = sum(found.slope(group, change))
            difference = (losses[0] - losses[1]) / 2
            assert slope == pytest.approx(difference, rel=0.02, abs=2e-8), group.name
            checked += 1
    assert checked > len(the.layout.groups) / 2


# -- against the loss itself


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("deepseek", ("head", "embedding", "layers.0.mlp.down", "layers.0.mlp.gate",
                      "layers.1.attention.o", "layers.2.shared.up")),
        ("qwen3_tied", ("embedding", "layers.0.attention.q", "layers.1.attention.o")),
    ],
)  # fmt: skip
def test_a_small_change_loses_its_price(case, name, groups):
    """While no token goes elsewhere, and on the mean over labels and changes.

    Not for every matrix: tokens are taken to be independent, and what an attention averages over
    tokens is not (a random model's value projections lose twice their price).
    """
    the = case(name)
    the.scorer.ensure_reference(len(the.documents))
    _, routing = loss_and_routing(the)
    found = [measure(the.swap, the.documents, seed=seed) for seed in range(6)]
    for name_ in groups:
        group = the.layout.groups[name_]
        held, losses, prices = held_of(the.swap, group), [], []
        for seed in range(4):
            change = random_change(held, seed, scale=1e-3)
            install(the.swap.model, the.layout.inventory.dimensions, group, held + change)
            loss, there = loss_and_routing(the)
            install(the.swap.model, the.layout.inventory.dimensions, group, held)
            if torch.equal(there, routing):
                losses.append(loss)
                prices += [c.price(group, change, ())[0] for c in found]
        assert len(losses) >= 2
        assert np.mean(prices) == pytest.approx(np.mean(losses), rel=0.2), name_


# -- what it leaves, and what it does not depend on


def snapshot(model):
    return {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}


@torch.inference_mode()
def logits(model, document):
    return model(torch.tensor([document.ids]), use_cache=False).logits


def check_untouched(swap, before, expected, document):
    for name, value in snapshot(swap.model).items():
        assert torch.equal(value, before[name]), name
    assert all(not p.requires_grad and p.grad is None for p in swap.model.parameters())
    for module in swap.model.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    for layer in swap.layout.layers:
        assert swap.model.model.layers[layer].mlp.experts.forward.func is routed_experts
    assert torch.equal(logits(swap.model, document), expected)


@pytest.mark.parametrize("slope", [False, True])
def test_the_model_is_left_as_it_was(case, slope):
    the = case("deepseek")
    the.scorer.ensure_reference(len(the.documents))
    the.swap.put_allocation(candidate(the.layout))
    state, before = dict(the.swap.state), snapshot(the.swap.model)
    expected = logits(the.swap.model, the.documents[0])
    calls = []

    def reference(index):
        calls.append(index)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return the.scorer.reference(index)

    if slope:
        with pytest.raises(KeyboardInterrupt):
            measure(the.swap, the.documents, reference=reference)
    else:
        bad = Document((0, 5, 100_000), "d")
        with pytest.raises(IndexError):
            measure(the.swap, (*the.documents, bad))
    check_untouched(the.swap, before, expected, the.documents[0])
    with torch.inference_mode():  # as callers may be in
        measure(the.swap, the.documents, reference=the.scorer.reference if slope else None)
    check_untouched(the.swap, before, expected, the.documents[0])
    assert the.swap.state == state


def some_prices(the, found):
    """Prices, and slopes if there are any, of one change of every group."""
    rows = {}
    for seed, group in enumerate(the.layout.groups.values()):
        change = random_change(held_of(the.swap, group), seed)
        experts = range(len(change)) if group.role.is_expert else ()
        rows[group.name] = np.array(found.price(group, change, experts)).sum()
        if found.has_slopes:
            rows[group.name, "slope"] = np.array(found.slope(group, change)).sum()
    return rows


def test_batches_do_not_matter_given_the_labels(case, monkeypatch):
    """Labels are drawn batch by batch, so other batches draw other ones; the rest is the same."""
    the = case("deepseek")
    drawn = some_prices(the, measured_slope(the, batch_tokens=1))
    again = some_prices(the, measured_slope(the, batch_tokens=1))
    other = some_prices(the, measured_slope(the, batch_tokens=1, seed=1))
    assert again == drawn
    assert other["head"] != drawn["head"]
    slopes = {name: value for name, value in drawn.items() if isinstance(name, tuple)}
    for name, value in slopes.items():
        assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda p, n, generator: p.argmin(-1, keepdim=True))
        one, *others = (
            some_prices(the, measured_slope(the, batch_tokens=n)) for n in (1, 40, 10_000)
        )
    for found in others:
        for name, value in one.items():
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-7), name


@pytest.fixture
def every_batch(monkeypatch):
    """Sums are saved after every batch."""
    monkeypatch.setattr(sums_checkpoint, "LEAST_SECONDS", 0)
    monkeypatch.setattr(sums_checkpoint, "_SHARE", 0)


@pytest.mark.parametrize(("which", "slope", "threads"), [(0, False, 1), (0, True, 2), (3, True, 1)])
def test_a_pass_that_was_stopped_goes_on_to_the_same_bits(
    case, every_batch, tmp_path, which, slope, threads
):
    """Stopped after every batch but the last, one stop after another."""
    the = case(*CASES[which])
    the.scorer.ensure_reference(len(the.documents))
    the.swap.put_allocation(candidate(the.layout))
    ran = []

    def reference(index):
        ran.append(index)
        return the.scorer.reference(index)

    options = {"batch_tokens": 20, "threads": threads} | ({"reference": reference} if slope else {})
    whole = measure(the.swap, the.documents, **options).state()
    n_batches, checkpoint = 6, SumsCheckpoint(tmp_path / "sums.safetensors", "these")
    save, ran[:] = checkpoint.save_if_due, []
    for stop in range(1, n_batches):
        calls = []

        def stopping(sums, calls=calls):
            save(sums)
            calls.append(0)
            raise KeyboardInterrupt

        checkpoint.save_if_due = stopping
        with pytest.raises(KeyboardInterrupt):
            measure(the.swap, the.documents, checkpoint=checkpoint, **options)
        assert load_arrays(checkpoint.path, "these")["done"].tolist() == [stop, stop]
    checkpoint.save_if_due, ran[:] = save, []
    resumed = measure(the.swap, the.documents, checkpoint=checkpoint, **options).state()
    assert len(ran) == slope  # of the last batch alone
    assert set(resumed) == set(whole)
    for key, values in whole.items():
        assert torch.equal(resumed[key], values), key
    (tmp_path / "sums.safetensors.77.part").touch()  # of a save that was killed
    checkpoint.remove()
    assert not list(tmp_path.iterdir())


def test_sums_of_something_else_or_damaged_ones_are_measured_anew(case, every_batch, tmp_path):
    the = case("qwen3")
    whole = measure(the.swap, the.documents).state()
    path = tmp_path / "sums.safetensors"
    measure(the.swap, the.documents, seed=1, checkpoint=SumsCheckpoint(path, "other"))
    measured = measure(the.swap, the.documents, checkpoint=SumsCheckpoint(path, "these")).state()
    assert all(torch.equal(measured[key], values) for key, values in whole.items())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert SumsCheckpoint(path, "these").load(torch.device("cpu")) is None


def test_sums_are_saved_now_and_then_and_only_where_there_is_room(monkeypatch, tmp_path):
    """A save that took a second is repeated after twenty; the clock is moved by hand."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sums_checkpoint.time, "monotonic", lambda: clock.now)
    checkpoint = SumsCheckpoint(tmp_path / "sums.safetensors")
    saved = []

    def sums():
        saved.append(clock.now)
        clock.now += 1.0
        return {"x": torch.ones(3)}

    for second in (1, 9, 10, 20, 29, 31, 40, 52, 60):
        clock.now = max(clock.now, float(second))
        checkpoint.save_if_due(sums)
    assert saved == [10, 31, 52]
    checkpoint.remove()
    monkeypatch.setattr(sums_checkpoint, "free_disk", lambda path: 29)
    clock.now = 100.0
    checkpoint.save_if_due(sums)
    assert saved[-1] == 100
    assert not checkpoint.path.exists()


def test_the_slope_does_not_change_the_prices(case):
    """Its pass is not listened to."""
    the = case("qwen3")
    both = some_prices(the, measured_slope(the))
    alone = some_prices(the, measure(the.swap, the.documents))
    for name, value in alone.items():
        assert both[name] == pytest.approx(value, rel=1e-5), name
