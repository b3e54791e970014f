"""Optuna's own samplers, by their names here.

In: a problem and a seed. Out: the sampler as Optuna ships it. Its proposals may exceed the budget;
a search makes them feasible before it scores them.
"""

import optuna.samplers
from optuna.samplers import RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from allocator.samplers.problem import Problem


class NSGAIISampler(optuna.samplers.NSGAIISampler):
    """NSGA-II whose generations count enqueued trials, too.

    Optuna gives a trial its generation while it samples, and a trial that is enqueued with all its
    params is not sampled. The class has Optuna's name, because Optuna stores generations under the
    name of the class.
    """

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Gives an enqueued trial its generation."""
        super().before_trial(study, trial)
        if "fixed_params" in trial.system_attrs:
            self.get_trial_generation(study, trial)


def random(problem: Problem, seed: int) -> RandomSampler:
    """Returns uniform random search."""
    return RandomSampler(seed=seed)


def tpe(problem: Problem, seed: int) -> TPESampler:
    """Returns the tree-structured Parzen estimator."""
    return TPESampler(seed=seed)


def nsga2(problem: Problem, seed: int) -> NSGAIISampler:
    """Returns NSGA-II with generations of `problem.population` trials."""
    return NSGAIISampler(seed=seed, population_size=problem.population)
