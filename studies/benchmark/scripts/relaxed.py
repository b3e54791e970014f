"""Gradient search on the relaxed assignment, as a control: RCO's idea at equal forward tokens.

    python studies/benchmark/scripts/relaxed.py [--text FILE]

Every group has a probability per choice (formats and mixes), its weights are the mean over them, and
the expected bytes are the budget's exactly: a step goes along the tangent of that surface (Adam on
logits) and is moved back onto it. A temperature falls until the probabilities are nearly a choice. Counts
are those of the knapsack alone (RCO searches bits and pruning in separate runs), which is also where
the logits start. Four times on the way the logits are rounded exactly (a knapsack over their logarithms)
and scored as trials of the other searchers are: on the search documents; the pick is made on the
selection documents. A step is one forward and one backward pass over 8 documents: three forward
tokens a token. Everything counts towards the tokens of `[compare]`. Prints and writes relaxed.csv.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from allocator.app.pick import pick_tokens
from allocator.comparison.bench import Bench
from allocator.comparison.runs import compare_spec
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.mixes import split
from allocator.prediction.knapsack import Options, solve
from allocator.prediction.solver import solve as solve_surrogate
from allocator.scoring.documents import batches
from allocator.scoring.experts import use_sorted_experts, use_watcher
from allocator.scoring.scorer import mean
from allocator.scoring.swap_model import destination, expert_form, view_of

HERE = Path(__file__).resolve().parent.parent
BATCH, CHECKS, COLDEST, SPREAD = 8, 4, 0.1, 0.3


class Relaxed:
    """Weights that are means over choices, at the counts of a start.

    Attributes:
        logits: by group, one per choice.
        nbytes: by group, bytes of every choice.
    """

    def __init__(self, bench, start, budget):
        self.study_folder = study_folder = bench.study_folder
        self.space, self.swap = study_folder.space, study_folder.profiler.model
        self.start = start
        costs = Costs(self.space, budget)
        counts = self.space.layer_counts(start)
        self.retained = self.space.allocation(start).retained_experts
        self.room = (
            budget.nbytes - costs.constant - sum(costs.layer(x, n) for x, n in counts.items())
        )
        self.nbytes, self.logits, self.decoded, self.stores = {}, {}, {}, {}
        for group, names in self.space.formats.items():
            layer = self.space.layer_of[group]
            expert = self.space.layout.groups[group].role.is_expert
            n = counts[layer] if expert else 0
            sizes = np.array([costs.group(group, v, n) for v in names], float)
            chosen = names.index(start[self.space.format_params[group]])
            near = np.exp(-8 * np.abs(np.log(sizes / sizes[chosen])))
            near[chosen] = 0.0
            odds = SPREAD * near / near.sum()
            odds[chosen] = 1 - SPREAD
            self.nbytes[group], self.logits[group] = sizes, np.log(np.maximum(odds, 1e-9))
            held = self.retained[layer] if expert else None
            formats = sorted({f for v in names for f, _ in split(v, max(n, 1))})
            self.decoded[group] = torch.from_numpy(
                np.stack([study_folder.profiler.encodings.decoded(group, f, held) for f in formats])
            )
            # choices x formats x experts: 1 where a choice stores an expert so
            stores = np.zeros((len(names), len(formats), n or 1))
            ranked = [self.space.rankings[layer].index(e) for e in held] if expert else [0]
            order = np.argsort(ranked)
            for i, value in enumerate(names):
                first = 0
                for fmt, k in split(value, n or 1):
                    stores[i, formats.index(fmt), order[first : first + k]] = 1
                    first += k
            self.stores[group] = stores

    def odds(self, temperature):
        """Softmax of logits, moved along the bytes until their mean is the budget."""

        def at(price):
            found = {}
            for group, logits in self.logits.items():
                z = logits / temperature - price * self.nbytes[group] / self.room
                z = np.exp(z - z.max())
                found[group] = z / z.sum()
            return found, sum(float(p @ self.nbytes[g]) for g, p in found.items())

        low, high = -1e6, 1e6
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle)[1] > self.room else (low, middle)
        for group, logits in self.logits.items():  # the retraction
            self.logits[group] = logits - high * temperature * self.nbytes[group] / self.room
        return at(high)[0]

    def install(self, odds):
        """Puts the mean weights into the model."""
        dimensions = self.space.layout.inventory.dimensions
        with torch.no_grad():
            for group, p in odds.items():
                share = torch.from_numpy(np.einsum("c,cfe->fe", p, self.stores[group])).float()
                values = self.decoded[group]
                expert = self.space.layout.groups[group].role.is_expert
                shaped = (
                    share.view(*share.shape, 1, 1)
                    if expert
                    else share.view(-1, *[1] * (values.ndim - 1))
                )
                destination(self.swap.model, dimensions, self.space.layout.groups[group]).copy_(
                    (shaped * values).sum(0)
                )
                self.swap.state.pop(group, None)  # it holds no format

    def slopes(self, gradients):
        """Derivative of the loss by the odds of every choice."""
        layout, found = self.space.layout, {}
        for name, values in self.decoded.items():
            group = layout.groups[name]
            form = expert_form(self.swap.model, group.layer)
            gradient = view_of(gradients.__getitem__, layout.inventory.dimensions, group, form)
            product = gradient * values  # formats x (experts x) out x in
            expert = group.role.is_expert
            per = product.flatten(2).sum(-1) if expert else product.flatten(1).sum(-1, keepdim=True)
            found[name] = np.einsum("cfe,fe->c", self.stores[name], per.double().numpy())
        return found

    def rounded(self):
        """Params of the greatest product of odds within the bytes."""
        groups = list(self.logits)
        classes = [Options(self.nbytes[g].astype(np.int64), -self.logits[g]) for g in groups]
        found = solve(classes, self.room)
        chosen = zip(groups, found.choice, strict=True)
        return self.start | {
            self.space.format_params[g]: self.space.formats[g][i] for g, i in chosen
        }


def gradients(relaxed, scorer, start):
    """Of the proxy loss, nats per token, by every parameter, over one batch."""
    model, layers = relaxed.swap.model, relaxed.space.layout.layers
    for layer in layers:
        use_watcher(model, layer, lambda *_: None)
    parameters = dict(model.named_parameters())
    n_tokens = sum(len(d.ids) for d in scorer.documents[start : start + BATCH])
    model.requires_grad_(True)
    try:
        for batch in batches(scorer.documents, start, start + BATCH, n_tokens=1024):
            with torch.inference_mode(False), torch.enable_grad():
                ids = torch.tensor([scorer.documents[i].ids for i in batch])
                log_probs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits, -1)
                fixed = torch.stack([scorer.reference(i) for i in batch])
                loss = (fixed.exp() * (fixed - log_probs)).sum()
                (loss / n_tokens).backward()
        return {k: v.grad.clone() for k, v in parameters.items() if v.grad is not None}
    finally:
        model.zero_grad()
        model.requires_grad_(False)
        use_sorted_experts(model, layers)


def search(bench, weights, tokens, rate):
    """Params of the roundings with their loss on the search documents, and the tokens spent."""
    study_folder = bench.study_folder
    budget = Budget(weights, "weights")
    start = solve_surrogate(study_folder.surrogate, budget)
    scorer, looked = study_folder.scorers.trials, study_folder.scorers.gradients
    looked.ensure_reference(looked.n_documents)
    scorer.ensure_reference(scorer.n_documents)

    def scored(params):
        kl = scorer.score(study_folder.space.allocation(params)).kl
        return float(mean(kl, scorer.documents)), params

    found = [scored(start)]
    spent = study_folder.base_tokens + scorer.n_tokens + pick_tokens(study_folder)
    step_tokens = 3 * max(
        sum(len(d.ids) for d in looked.documents[i : i + BATCH])
        for i in range(0, looked.n_documents - BATCH + 1, BATCH)
    )
    n_steps = (tokens - spent - CHECKS * scorer.n_tokens) // step_tokens
    relaxed = Relaxed(bench, start, budget)
    first = {g: np.zeros_like(v) for g, v in relaxed.logits.items()}
    second = {g: np.zeros_like(v) for g, v in relaxed.logits.items()}
    checks = {round(n_steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    for step in range(1, n_steps + 1):
        temperature = COLDEST ** ((step - 1) / max(n_steps - 1, 1))
        odds = relaxed.odds(temperature)
        study_folder.profiler.model.put_allocation(study_folder.space.allocation(start))
        relaxed.install(odds)
        at = (step - 1) * BATCH % (looked.n_documents // BATCH * BATCH)
        slopes = relaxed.slopes(gradients(relaxed, looked, at))
        # by logits, then without what would change the bytes
        by = {g: p * (slopes[g] - p @ slopes[g]) / temperature for g, p in odds.items()}
        normal = {
            g: p * (relaxed.nbytes[g] - p @ relaxed.nbytes[g]) / relaxed.room
            for g, p in odds.items()
        }
        along = sum(float(by[g] @ normal[g]) for g in by) / sum(
            float(v @ v) for v in normal.values()
        )
        for g in by:
            tangent = by[g] - along * normal[g]
            first[g] = 0.9 * first[g] + 0.1 * tangent
            second[g] = 0.99 * second[g] + 0.01 * tangent**2
            scale = np.sqrt(second[g] / (1 - 0.99**step)) + 1e-12
            relaxed.logits[g] = relaxed.logits[g] - rate * first[g] / (1 - 0.9**step) / scale
        spent += step_tokens
        if step in checks:
            relaxed.odds(temperature)
            found.append(scored(relaxed.rounded()))
            spent += scorer.n_tokens
            moved = sum(found[-1][1][k] != start[k] for k in start)
            print(
                f"  step {step}: {found[-1][0]:.5f} on search documents (start {found[0][0]:.5f}), {moved} moved",
                flush=True,
            )
    return found, spent


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rate", type=float, default=0.03, help="of Adam, on the logits")
    args = parser.parse_args()
    bench = Bench(HERE, "safetensors", text=args.text, threads=torch.get_num_threads())
    spec = compare_spec(HERE)
    path = HERE / "relaxed.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    for weights in spec.budgets:
        if any((r["weights"], r["rate"]) == (weights, args.rate) for r in rows):
            continue
        found, spent = search(bench, weights, spec.tokens, args.rate)
        finalists = [bench.study_folder.space.allocation(p) for _, p in found]
        alone = finalists[0]
        pick = min(finalists, key=lambda a: bench.loss("selection", a))
        row = {"weights": weights, "rate": args.rate, "spent": spent, "is_start": pick == alone}
        last = min(zip(found[1:], finalists[1:], strict=True), key=lambda x: x[0][0])[1]
        for split_name in bench.splits:
            kl = bench.kl(split_name, alone).mean()
            row |= {
                split_name: bench.kl(split_name, pick).mean(),
                f"{split_name} / knapsack": bench.kl(split_name, pick).mean() / kl,
                f"{split_name}, best rounding / knapsack": bench.kl(split_name, last).mean() / kl,
            }
        rows.append(row)
        print({k: round(float(v), 5) for k, v in row.items()}, flush=True)
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
