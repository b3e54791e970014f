"""Seconds that `auto` takes for a proposal, by its number: they must not grow with the trials.

    python studies/benchmark/scripts/sampler.py [--trials 100]

A search of the reference checkpoint, whose headers alone are read, under random prices and losses by a
formula; the gradient step of every fifth proposal costs nothing. Prints the sampler's mean milliseconds
over tenths of the study, and their ratio to the first tenth. No model is run.
"""

import argparse
from pathlib import Path

import numpy as np
from optuna.storages import InMemoryStorage

from allocator.checkpoint.reading import read_inventory
from allocator.decision.budget import Budget
from allocator.decision.search_space import SearchSpace, bind
from allocator.formats import format_named, parts
from allocator.prediction.profile import Change, Profile, bundle_of
from allocator.prediction.surrogate import LocalPrices, from_profile
from allocator.samplers import GradientStep, Problem, make_sampler
from allocator.study.initial_trials import first_trials
from allocator.study.optuna_study import open_study
from allocator.study.search import Search
from allocator.targets import GGUF

REFERENCE = Path(__file__).parents[2] / "reference/model"


class Prices:
    """Random prices of every format: falling with bits, one value per expert."""

    def __init__(self, layout, rng):
        self.layout, self.rng = layout, rng
        self.curvature = {}
        for name, group in layout.groups.items():
            n_values = group.shape[0] if group.role.is_expert else 1
            scale = np.exp(rng.normal()) * rng.dirichlet(np.full(n_values, 5.0))
            self.curvature[name] = {
                f.name: (scale * 4**-f.bits * rng.uniform(0.8, 1.25, n_values)).tolist()
                for f in group.offered()
            }

    def profile(self):
        n = self.layout.inventory.n_experts
        changes = {}
        for group in self.layout.groups.values():
            changes.setdefault(bundle_of(group), {})[group.name] = group.offered()[-1].name
        smooth = {
            b: sum(sum(self.curvature[g][f]) for g, f in c.items()) for b, c in changes.items()
        }
        return Profile(
            checkpoint="", calibration="", target=self.layout.target, importance="", n_tokens=1,
            measured_tokens=1, curvature_tokens=1, forward_tokens={"statistics": 1}, unreached=[],
            saliency={"fisher": {x: self.rng.uniform(size=n).tolist() for x in self.layout.layers}},
            counts={x: [1] * n for x in self.layout.layers}, curvature=self.curvature,
            measured=[Change(b, c, smooth[b] * 1.1) for b, c in changes.items()],
            pruned={x: {n // 2: 0.1, n // 3: 0.3} for x in self.layout.layers},
            saliency_method="fisher",
        )  # fmt: skip

    def around(self, allocation, part):
        """What a gradient would say: these prices with noise, and moves from the allocation."""
        moves = {}
        for name, row in self.curvature.items():
            group = self.layout.groups[name]
            experts = group.experts(allocation.retained_experts)
            now = np.zeros(len(next(iter(row.values()))))
            for fmt, stored in parts(allocation.format_of[name], experts):
                now[list(stored) or [0]] = np.array(row[fmt.name])[list(stored) or [0]]
            retained = np.isin(np.arange(len(now)), list(experts) or [0])
            noise = self.rng.uniform(0.9, 1.1)
            moves[name] = {
                f: ((np.array(v) - now) * retained * noise).tolist() for f, v in row.items()
            }
        return LocalPrices(self.curvature, moves, 1)


class Formula:
    """Losses of 12 documents, by the bits of every group."""

    n_documents, side_by_side = 12, 1

    def tokens(self, stop):
        return stop

    def score_many(self, allocations, start, stop):
        return [
            Losses(self.loss(a) * (1 + 0.1 * np.sin(np.arange(start, stop)))) for a in allocations
        ]

    def loss(self, allocation):
        bits = [
            np.mean([4.0 ** -format_named(p.partition(":")[0]).bits for p in text.split("+")])
            for _, text in allocation.formats
        ]
        return float(np.sum(bits)) * (1 + sum(1 / n for n in allocation.counts.values()))

    def summary(self, losses):
        return {"loss": float(losses.kl.mean()), "tokens": len(losses.kl)}


class Losses:
    def __init__(self, kl):
        self.kl = kl

    def __add__(self, other):
        return Losses(np.concatenate([self.kl, other.kl]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    args = parser.parse_args()
    layout = GGUF.layout(read_inventory(REFERENCE))
    prices = Prices(layout, np.random.default_rng(0))
    profile = prices.profile()
    space = bind(SearchSpace(schema=1), layout, profile.saliency)
    surrogate = from_profile(profile, space)
    budget = Budget(8_234_496, "weights")
    known = {}

    def take(allocation, part):
        key = allocation.digest, part
        if key not in known:
            known[key] = prices.around(allocation, part)
        return known[key]

    problem = Problem(surrogate, budget, gradient=GradientStep(take, 1))
    search = Search(
        study=open_study(InMemoryStorage(), "sampler", {"seed": 0}),
        sampler=make_sampler("auto", problem, seed=0),
        surrogate=surrogate,
        budget=budget,
        scorer=Formula(),
        queue=first_trials(surrogate, budget, [], n_knapsack=1),
    )
    seconds = []
    for _ in range(args.trials):
        before = search.seconds["sampler"]
        search.step()
        seconds.append(search.seconds["sampler"] - before)
    tenths = [1000 * t.mean() for t in np.array_split(np.array(seconds), 10)]
    print("tenth of the study, milliseconds per proposal, over the first tenth")
    for i, ms in enumerate(tenths, 1):
        print(f"{i:5d} {ms:12.1f} {ms / tenths[0]:12.2f}")


if __name__ == "__main__":
    main()
