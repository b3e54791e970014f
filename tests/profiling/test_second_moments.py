"""Second moments against sums over tokens in transformers' own models, and against the curvature.

The sums are made from what hooks on transformers' modules see, token by token for experts; those of
`k_b` from an attention that is computed as llama.cpp does, with absorbed queries.
"""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.families import Role
from allocator.profiling.curvature import Curvature, measure
from allocator.profiling.second_moments import (
    Smoothing,
    moments_bytes,
    second_moments,
    second_moments_streamed,
)
from allocator.profiling.statistics import collect
from allocator.scoring.candidates import Candidate, Weights
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.swap_model import SwapModel, destination
from allocator.targets import TARGETS
from allocator.targets.group_weights import group_weights

torch.set_num_threads(1)
LENGTHS = (17, 17, 9, 21, 21, 21)  # batches of one length: 3, or 4 of at most 50 tokens
CASES = [("deepseek", "gguf"), ("deepseek", "safetensors"), ("qwen3", "gguf"),
         ("qwen3_tied", "safetensors")]  # fmt: skip
RAW = Smoothing(pseudo_tokens=0, damping=0)
N_TOKENS = sum(LENGTHS)


@pytest.fixture(scope="module")
def case(checkpoints, make_documents, tmp_path_factory):
    """`case(name, target)`: swap model, layout, documents; each loaded once."""
    made = {}

    def get(name, target="gguf"):
        if (name, target) not in made:
            layout = TARGETS[target].layout(read_inventory(checkpoints[name]))
            encodings = Encodings(tmp_path_factory.mktemp("bank"), layout, {})
            made[name, target] = SimpleNamespace(
                path=checkpoints[name], layout=layout, groups=list(layout.groups.values()),
                swap=SwapModel(layout, encodings.decoded), documents=make_documents(LENGTHS),
                encodings=encodings,
            )  # fmt: skip
        made[name, target].swap.reset()
        return made[name, target]

    return get


def moments_of(the, groups=None, **options):
    """H by group name."""
    options = {"smoothing": RAW, "seed": 3, "batch_tokens": 50, **options}
    chosen = the.groups if groups is None else groups
    return {g.name: h for g, h in second_moments(the.swap, the.documents, chosen, **options)}


def in_batches(documents, n_tokens=50):
    """Runs of equal length, at most so many tokens each."""
    runs = []
    for d in documents:
        fits = runs and len(runs[-1][0].ids) == len(d.ids)
        if fits and (len(runs[-1]) + 1) * len(d.ids) <= n_tokens:
            runs[-1].append(d)
        else:
            runs.append([d])
    return runs


class Naive:
    """Inputs of every product, and gradients of its outputs, per token."""

    def __init__(self, path, documents, seed):
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.pairs = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda m, args, y, name=name: self.keep(name, args[0], y)
                )
            if name.endswith("mlp.experts"):
                module.forward = self.experts(module, int(name.split(".")[2]))
            if name.endswith("self_attn") and hasattr(module, "kv_b_proj"):
                module.forward = self.absorbed(module, name)
        self.model.model.embed_tokens.register_forward_hook(
            lambda m, args, y: self.keep("rows", args[0][..., None], y)
        )
        generator = torch.Generator().manual_seed(seed)
        for batch in in_batches(documents):
            ids = torch.tensor([d.ids for d in batch])
            logits = self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            labels = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator)
            nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum").backward()

    def keep(self, name, x, y):
        y.retain_grad()
        self.pairs.setdefault(name, []).append((x.detach(), y))

    def experts(self, module, layer):
        def forward(hidden, index, gates):
            rows = []
            for x, chosen, weights in zip(hidden, index.tolist(), gates, strict=True):
                total = torch.zeros_like(x)
                for e, g in zip(chosen, weights, strict=True):
                    gate, up = (part @ x for part in module.gate_up_proj[e].chunk(2))
                    self.keep((layer, Role.EXPERT_GATE, e), x, gate)
                    self.keep((layer, Role.EXPERT_UP, e), x, up)
                    inner = nn.functional.silu(gate) * up
                    out = module.down_proj[e] @ inner
                    self.keep((layer, Role.EXPERT_DOWN, e), inner, out)
                    total = total + g * out
                rows.append(total)
            return torch.stack(rows)

        return forward

    def absorbed(self, module, name):
        """Latent attention with `k_b` times the query; documents, heads, queries, keys: d h t s."""

        def forward(hidden_states, position_embeddings, attention_mask, **_):
            nope, rank = module.qk_nope_head_dim, module.kv_lora_rank
            q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_states)))
            q = q.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            both = module.kv_a_proj_with_mqa(hidden_states)
            c = module.kv_a_layernorm(both[..., :rank])
            turned, k_turned = modeling_deepseek_v3.apply_rotary_pos_emb_interleave(
                q[..., nope:], both[:, None, :, rank:], *position_embeddings
            )
            kv_b = module.kv_b_proj.weight.view(module.num_heads, -1, rank)
            query = torch.einsum("hnr,dhtn->dhtr", kv_b[:, :nope], q[..., :nope])
            self.keep((name, "k_b"), q[..., :nope], query)
            value = torch.einsum("hvr,dsr->dhsv", kv_b[:, nope:], c)
            self.keep((name, "v_b"), c, value)
            scores = torch.einsum("dhtr,dsr->dhts", query, c)
            scores = scores + turned @ k_turned.transpose(-1, -2)
            n = scores.shape[-1]
            future = torch.ones(n, n, dtype=bool).triu(1)
            p = torch.softmax((scores * module.scaling).masked_fill(future, -torch.inf), -1)
            y = torch.einsum("dhts,dhsv->dthv", p, value).flatten(-2)
            return module.o_proj(y), p

        return forward

    def rows(self, name):
        """Inputs `(tokens, in)` and gradients of outputs `(tokens, out)` of one product."""
        pairs = self.pairs.get(name, [])
        if not pairs:
            return None
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in pairs])
        g = torch.cat([y.grad.reshape(-1, y.shape[-1]) for _, y in pairs])
        return x.double(), g.double()

    def mean(self, rows, fisher):
        """Mean over tokens of |g|^2 x x^T, or of x x^T."""
        x, g = rows
        weights = (g**2).sum(-1) if fisher else torch.ones(len(x))
        return sum(w * torch.outer(v, v) for w, v in zip(weights, x, strict=True)) / len(x)

    def heads(self, layer, half, fisher):
        """By head, the mean of `k_b` or `v_b`."""
        pairs = self.pairs[f"model.layers.{layer}.self_attn", half]
        means = []
        for head in range(4):
            x = torch.cat([(x if half == "v_b" else x[:, head]).flatten(0, 1) for x, _ in pairs])
            g = torch.cat([y.grad[:, head].flatten(0, 1) for _, y in pairs])
            means.append(self.mean((x.double(), g.double()), fisher))
        return torch.stack(means)

    def embedding(self, weight, *, tied, fisher):
        """Of rows with their own mean squares: as a head, and looked up."""
        width = weight.shape[1]
        if not fisher:
            return self.mean(self.rows("lm_head"), False) if tied else torch.eye(width).double()
        scale = (weight.double() ** 2).mean(1)
        scale = scale / scale.mean()
        total = torch.zeros(width, width, dtype=torch.float64)
        ids, g = self.rows("rows")
        for i, v in zip(ids[:, 0].long(), g, strict=True):
            total += scale[i] * torch.outer(v, v)
        if tied:
            x, g = self.rows("lm_head")
            share = (g**2).sum(0) / (g**2).sum()
            total += float(share @ scale) * len(x) * self.mean((x, g), True)
        return total / len(ids)

    def of_group(self, layout, group, weight, fisher):
        if group.role.is_expert:
            rows = [self.rows((group.layer, group.role, e)) for e in range(8)]
            means = [None if r is None else self.mean(r, fisher) for r in rows]
            n = [0 if r is None else len(r[0]) for r in rows]
            layer = sum(k * h for k, h in zip(n, means, strict=True) if k) / sum(n)
            return torch.stack([layer if h is None else h for h in means])
        if group.role in (Role.K_B, Role.V_B):
            return self.heads(group.layer, "k_b" if group.role is Role.K_B else "v_b", fisher)
        if group.role is Role.EMBEDDING:
            tied = layout.inventory.tied_embeddings
            return self.embedding(weight, tied=tied, fisher=fisher)
        if group.role is Role.KV_B:  # no product of absorbed attention has keys and values as rows
            return None if fisher else self.heads(group.layer, "v_b", False)[0]
        return self.mean(self.rows(group.sources[0].removesuffix(".weight")), fisher)


@pytest.fixture(scope="module")
def naive(case):
    made = {}

    def get(name):
        if name not in made:
            the = case(name)
            made[name] = Naive(the.path, the.documents, seed=3)
        return made[name]

    return get


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize(("name", "target"), CASES)
def test_moments_are_sums_over_tokens(case, naive, name, target, fisher):
    the = case(name, target)
    roles = set()
    for group, h in second_moments(
        the.swap, the.documents, the.groups,
        fisher=fisher, smoothing=RAW, seed=3, batch_tokens=50,
    ):  # fmt: skip
        weight = torch.from_numpy(group_weights(the.layout, group))
        expected = naive(name).of_group(the.layout, group, weight, fisher)
        if expected is None:
            continue
        assert h.shape == expected.shape, group.name
        assert h.shape[-1] == group.shape[-1]
        assert h.dtype == torch.float32
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(
            h.double(), expected, rtol=2e-3, atol=2e-4 * scale,
            msg=lambda text, group=group: f"{group.name}: {text}",
        )  # fmt: skip
        roles.add(group.role)
    assert {Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN, Role.EMBEDDING} <= roles
    assert ({Role.K_B, Role.V_B} <= roles) == ((name, target) == ("deepseek", "gguf"))


@pytest.mark.parametrize("name", ["deepseek", "qwen3", "qwen3_tied"])
def test_the_diagonal_of_plain_moments_is_the_importance(case, name):
    the = case(name)
    importance = collect(the.swap.model, the.layout, the.documents).importance
    compared = 0
    for group, h in moments_of(the, fisher=False).items():
        if group in importance:
            diagonal = h.diagonal(dim1=-2, dim2=-1).numpy()
            vectors = importance[group]
            if diagonal.ndim > vectors.ndim:  # of heads that multiply one input
                vectors = np.broadcast_to(vectors, diagonal.shape)
            np.testing.assert_allclose(diagonal, vectors, rtol=1e-4, atol=2e-6 * vectors.max())
            compared += 1
    assert compared == len(importance)


@pytest.mark.parametrize(("name", "target"), CASES)
def test_quadratic_forms_are_prices_of_the_curvature(case, name, target):
    """Where all rows change alike, or an embedding's by their mean squares, shares add up to 1."""
    the = case(name, target)
    curvature = measure(the.swap, the.documents, seed=3, batch_tokens=50)
    rng = np.random.default_rng(0)
    compared = set()
    for group, h in second_moments(
        the.swap, the.documents, the.groups, smoothing=RAW, seed=3, batch_tokens=50
    ):
        if group.role in (Role.K_B, Role.V_B):  # the curvature weighs both halves as one matrix
            continue
        weights = group_weights(the.layout, group)
        row = rng.standard_normal(weights.shape[-1]).astype(np.float32)
        change = np.ascontiguousarray(np.broadcast_to(row, weights.shape))
        if group.role is Role.EMBEDDING:
            squares = (weights**2).mean(1)
            change *= np.sqrt(squares / squares.mean())[:, None]
        experts = range(8) if group.role.is_expert else ()
        stack = h.double() if experts else h[None].double()
        forms = [float(0.5 * row.astype(float) @ one.numpy() @ row.astype(float)) for one in stack]
        prices = curvature.price(group, change, experts)
        for e, (form, price) in enumerate(zip(forms, prices, strict=True)):
            reached = N_TOKENS
            if experts:
                reached = curvature.product(group.name, e).inputs.n_tokens
            assert form * reached / N_TOKENS == pytest.approx(price, rel=2e-3), group.name
        compared.add(group.role)
    assert {Role.EXPERT_GATE, Role.EXPERT_DOWN, Role.EMBEDDING} <= compared


@pytest.mark.parametrize("fisher", [True, False])
def test_moments_are_symmetric_and_positive_definite_where_few_tokens_came(case, fisher):
    the = case("deepseek")
    for name, h in moments_of(the, fisher=fisher, smoothing=Smoothing(damping=0.01)).items():
        assert torch.equal(h, h.transpose(-1, -2)), name
        least = torch.linalg.eigvalsh(h.double()).amin(-1)
        mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
        assert (least > 0.009 * mean).all(), name


def test_smoothing_adds_tokens_of_the_layer_and_a_share_of_the_diagonal(case):
    the = case("deepseek")
    group = the.layout.groups["layers.1.experts.down"]
    raw = moments_of(the, [group])[group.name].double()
    smooth = moments_of(the, [group], smoothing=Smoothing(pseudo_tokens=7, damping=0.03))
    counts = torch.tensor(collect(the.swap.model, the.layout, the.documents).counts[1]).double()
    assert counts[5] == 0
    layer = (counts[:, None, None] * raw).sum(0) / counts.sum()
    for e in range(8):
        expected = (counts[e] * raw[e] + 7 * layer) / (counts[e] + 7)
        expected += 0.03 * torch.eye(len(layer)) * expected.trace() / len(layer)
        torch.testing.assert_close(
            smooth[group.name][e].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max())
        )


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("name", ["deepseek", "qwen3"])
def test_passes_and_order_change_nothing(case, name, fisher):
    the = case(name)
    once = moments_of(the, fisher=fisher, memory_bytes=1 << 40)
    assert list(once) == [g.name for g in the.groups]
    for memory in (0, 2 * max(moments_bytes(8, g.shape[-1]) for g in the.groups)):
        again = moments_of(the, fisher=fisher, memory_bytes=memory)
        assert list(again) == list(once)
        assert all(torch.equal(h, once[name]) for name, h in again.items())
    some = the.groups[::-3]
    alone = moments_of(the, some, fisher=fisher)
    assert list(alone) == [g.name for g in some]
    assert all(torch.equal(h, once[name]) for name, h in alone.items())


def test_a_candidates_experts_come_in_its_order(case):
    """As sums over what a candidate's own modules see."""
    the = case("qwen3")
    the.swap.put_allocation(
        Allocation.of(
            target="gguf",
            retained=dict.fromkeys(the.layout.layers, tuple(range(2, 8))),
            formats=dict.fromkeys(the.layout.groups, "Q4_0"),
            experts_used=2,
        )
    )
    names = ["layers.1.experts.gate", "layers.1.experts.down"]
    experts = the.swap.model.model.layers[1].mlp.experts
    routed, seen = experts.forward, {}

    def forward(hidden, index, gates):
        for x, chosen in zip(hidden, index.tolist(), strict=True):
            for e in chosen:
                seen.setdefault(e, []).append(x)
        return routed(hidden, index, gates)

    experts.forward = forward
    with torch.inference_mode():
        for d in the.documents:
            the.swap.model(input_ids=torch.tensor([d.ids]), use_cache=False)
    experts.forward = routed
    dimensions = the.layout.inventory.dimensions
    gate, up = (
        destination(the.swap.model, dimensions, the.layout.groups[f"layers.1.experts.{kind}"])
        for kind in ("gate", "up")
    )
    measured = moments_of(the, [the.layout.groups[name] for name in names], fisher=False)
    assert sorted(seen) == list(range(6))
    for e, rows in seen.items():
        x = torch.stack(rows).double()
        inner = nn.functional.silu(x @ gate[e].double().T) * (x @ up[e].double().T)
        for name, values in zip(names, (x, inner), strict=True):
            expected = values.T @ values / len(values)
            assert len(measured[name]) == 6
            torch.testing.assert_close(
                measured[name][e].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max())
            )


def rounded(weights, moments, steps):
    """Rows to multiples of their steps, errors fed forward by the Cholesky factor of H^-1."""
    factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    values, codes = weights.clone(), torch.zeros_like(weights)
    for i in range(weights.shape[1]):
        codes[:, i] = torch.round(values[:, i] / steps) * steps
        error = (values[:, i] - codes[:, i]) / factor[i, i]
        values[:, i:] -= error[:, None] * factor[i, i:]
    return codes


def test_the_embeddings_moments_give_the_least_summed_price(case, monkeypatch):
    """Rows of unlike sizes, each rounded with a step of its own size: prices of the curvature."""
    the = case("qwen3_tied", "safetensors")
    group = the.layout.groups["embedding"]
    embedding = the.swap.model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(5)
    before = embedding.detach().clone()
    lookups, add = [], Curvature.add_lookup

    def add_lookup(curvature, ids, gradient):
        lookups.append(gradient.flatten(0, -2).double())
        add(curvature, ids, gradient)

    monkeypatch.setattr(Curvature, "add_lookup", add_lookup)
    embedding.mul_(torch.exp(torch.randn(len(embedding), 1, generator=generator)))
    try:
        curvature = measure(the.swap, the.documents, seed=3)
        both = moments_of(the, [group], batch_tokens=1024)["embedding"].double()
        product = curvature.product("embedding")
        weights = embedding.detach().double()
        row = torch.randn(weights.shape[1], generator=generator).double()
        sizes = weights.square().mean(1) / weights.square().mean()
        alike = (sizes.sqrt()[:, None] * row).float().numpy()
        form = 0.5 * float(row @ both @ row)
        assert form == pytest.approx(curvature.price(group, alike, ())[0], rel=2e-3)
        head = product.inputs.total().double()
        looked_up = sum(g.T @ g for g in lookups)
        ways = {
            "both": both, "head": head, "looked up": looked_up, "rows alike": head + looked_up,
            "none": torch.eye(len(head)).double(),
        }  # fmt: skip
        prices = {}
        for name, h in ways.items():
            damped = h + 0.01 * h.trace() / len(h) * torch.eye(len(h))
            total = 0.0
            for step in (1.5, 1.7, 1.9, 2.1):
                steps = step * weights.square().mean(1).sqrt()
                change = (rounded(weights, damped, steps) - weights).float().numpy()
                total += curvature.price(group, change, ())[0]
            prices[name] = total
        assert prices["both"] == min(prices.values()), prices
        assert prices["both"] < 0.9 * prices["none"], prices
    finally:
        embedding.copy_(before)


# -- layer by layer


def pruned(layout):
    """Everything in a small format, without the first two experts."""
    return Allocation.of(
        target=layout.target,
        retained=dict.fromkeys(layout.layers, tuple(range(2, 8))),
        formats=dict.fromkeys(layout.groups, "Q4_0"),
        experts_used=2,
    )


def streamed_of(the):
    return StreamedModel(the.layout, Weights(the.layout, lambda: the.encodings))


def stream(the, scratch, groups=None, candidate=None, **options):
    """`(group name, places, H)`, as they come."""
    options = {"smoothing": RAW, "batch_tokens": 50, **options}
    for group, places, h in second_moments_streamed(
        options.pop("streamed", None) or streamed_of(the), the.documents,
        the.groups if groups is None else groups, candidate, scratch=scratch, **options,
    ):  # fmt: skip
        yield group.name, places, h


def gathered(parts):
    """H by group, from the experts of each."""
    groups = {}
    for name, places, h in parts:
        groups.setdefault(name, []).append((places, h.clone()))
    for name, rows in groups.items():
        if rows[0][0]:
            assert [i for places, _ in rows for i in places] == list(
                range(sum(map(len, dict(rows))))
            )
            groups[name] = torch.cat([h for _, h in rows])
        else:
            ((_, groups[name]),) = rows
    return groups


def assert_alike(streamed, whole):
    assert streamed.keys() == whole.keys()
    for name, h in whole.items():
        torch.testing.assert_close(
            streamed[name], h, rtol=1e-3, atol=1e-4 * float(h.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("memory_bytes", [0, 200_000, 1 << 30])
@pytest.mark.parametrize(("name", "target"), CASES)
def test_streamed_moments_are_those_in_memory(case, tmp_path, name, target, memory_bytes):
    the = case(name, target)
    smoothing = Smoothing(pseudo_tokens=5, damping=0.01)
    parts = stream(the, tmp_path, memory_bytes=memory_bytes, smoothing=smoothing)
    assert_alike(gathered(parts), moments_of(the, fisher=False, smoothing=smoothing))


@pytest.mark.parametrize("name", ["deepseek", "qwen3"])
def test_streamed_moments_of_a_candidate_are_of_its_own_inputs(case, tmp_path, name):
    the = case(name)
    the.swap.put_allocation(pruned(the.layout))
    candidate = Candidate.of(pruned(the.layout))
    assert_alike(gathered(stream(the, tmp_path, None, candidate)), moments_of(the, fisher=False))


@pytest.mark.parametrize("name", ["deepseek", "qwen3"])
def test_streamed_moments_of_original_inputs_are_those_of_retained_experts(case, tmp_path, name):
    the = case(name)
    whole = moments_of(the, fisher=False)
    candidate = Candidate.of(pruned(the.layout))
    streamed = gathered(stream(the, tmp_path, None, candidate, original_inputs=True))
    unreached = {"deepseek": {"layers.1"}, "qwen3": set()}[name]  # their layer's mean is of others
    for group, h in whole.items():
        if ".experts." in group:
            h = h[2:]
            if group.rpartition(".experts")[0] in unreached:
                assert torch.isfinite(streamed[group]).all()
                continue
        torch.testing.assert_close(streamed[group], h, rtol=1e-3, atol=1e-4 * float(h.abs().max()))


def test_a_stopped_stream_resumes_at_its_layer_to_equal_moments(case, tmp_path, monkeypatch):
    the = case("deepseek")
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()
    whole = gathered(stream(the, folders[0], memory_bytes=0))
    before, parts = {}, stream(the, folders[1], memory_bytes=0)
    for name, _, h in parts:
        if name == "layers.2.attention.o":
            break
        before.setdefault(name, []).append(h.clone())
    parts.close()
    streamed = streamed_of(the)
    monkeypatch.setattr(streamed, "embed", lambda *_: pytest.fail("states are known"))
    rest = [g for g in the.groups if g.name not in before]
    assert len(rest) > 3
    resumed = gathered(stream(the, folders[1], rest, memory_bytes=0, streamed=streamed))
    assert resumed.keys() == {g.name for g in rest}
    assert all(torch.equal(h, whole[name]) for name, h in resumed.items())
    for name, rows in before.items():
        assert torch.equal(torch.cat(rows).view(whole[name].shape), whole[name])


class Finishing:
    """Weights that a candidate brings along, some of which the test changes while a pass runs."""

    digest = "finishing"

    def __init__(self, the, candidate):
        self.encodings, self.finished = the.encodings, set()
        self.originals = Weights(the.layout, lambda: the.encodings)
        self.plain = candidate

    def has(self, name, fmt, expert=None):
        return True

    def put(self, *_):
        pytest.fail("has all")

    def encoded(self, name, fmt, experts=None):
        return self.encodings.encoded(name, fmt, experts)

    def decoded(self, name, fmt, experts=None):
        values = self.encodings.decoded(name, fmt, experts)
        return 1.5 * values if name in self.finished else values

    def full_precision(self, tensor, experts):
        return self.originals.full_precision(self.plain, tensor)

    def release(self):
        pass


def test_a_layer_runs_on_with_what_the_caller_has_finished(case, tmp_path):
    the = case("qwen3")
    plain = Candidate.of(pruned(the.layout))
    own = Finishing(the, plain)
    candidate = replace(plain, weights=own)
    layers = [[g for g in the.groups if g.layer == layer] for layer in (0, 1)]
    changed = {"layers.0.attention.v", "layers.0.experts.up"}
    the.swap.put(candidate)
    before = moments_of(the, fisher=False)
    rows = []
    for name, places, h in stream(the, tmp_path, layers[0] + layers[1], candidate):
        rows.append((name, places, h.clone()))
        own.finished |= changed & {name}
    after = Finishing(the, plain)
    after.finished, after.digest = changed, "finished"
    the.swap.put(replace(plain, weights=after))
    finished = moments_of(the, fisher=False)
    streamed = gathered(rows)
    of_layer = {layer: {g.name for g in layers[layer]} for layer in (0, 1)}
    dense = {name for name in of_layer[0] if "experts" not in name and "attention.o" not in name}
    assert_alike({n: streamed[n] for n in dense}, {n: before[n] for n in dense})
    assert_alike({n: streamed[n] for n in of_layer[1]}, {n: finished[n] for n in of_layer[1]})
    name = "layers.1.experts.gate"
    assert float((before[name] - finished[name]).norm() / finished[name].norm()) > 0.05


def test_one_matrix_is_in_memory_at_a_time(case, tmp_path):
    """What the caller has dropped is gone when it gets what follows."""
    the = case("qwen3")
    whole = second_moments(the.swap, the.documents, the.groups, memory_bytes=0)
    in_memory = ((group.name, (), h) for group, h in whole)
    for parts in (in_memory, stream(the, tmp_path, memory_bytes=0)):
        last, n = None, 0
        for _, _, h in parts:
            sums = h if h._base is None else h._base
            assert last is None or last() is None or last() is sums
            last, n = weakref.ref(sums), n + 1
            del h, sums
        assert n >= len(the.groups)
