"""What a trial records of its losses and sizes, and how it ends.

In: contenders that were scored. Out: user attributes of their trials, and verdicts. Invariant:
COMPLETE means scored on the full search split, a lost race is PRUNED without values, a non-finite
loss is FAIL with its reason.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import TrialState

from allocator.decision.allocation import Allocation
from allocator.decision.budget import Budget
from allocator.prediction.surrogate import Surrogate
from allocator.study.contenders import Contender
from allocator.study.outcomes import Verdict
from allocator.study.protocols import TrialScorer
from allocator.study.trials import LOSSES, RESULT
from allocator.targets.device_memory import Workload
from allocator.targets.layout import Layout


@dataclass(frozen=True)
class Recorder:
    """Records what was measured.

    Attributes:
        surrogate: for the predicted loss, and the space.
        budget: for a device's itemised memory.
        scorer: summarizes losses.
    """

    surrogate: Surrogate
    budget: Budget
    scorer: TrialScorer

    def record(self, contender: Contender, *, lost: bool) -> Verdict:
        """Writes losses and result into a trial that still runs; returns how it ends.

        Args:
            contender: scored.
            lost: whether it lost its race or its generation.

        Raises:
            UpdateFinishedTrialError: if another worker has closed the trial.
        """
        trial, size, space = contender.trial, contender.size, self.surrogate.space
        result = self.scorer.summary(contender.losses) | {
            "bytes": {"encoded": size.encoded, "kept": size.full_precision, "file": size.file},
            "effective_bits": size.encoded * 8 / space.layout.inventory.n_searched_weights,
            "predicted": self.surrogate.predict(contender.params),
            "repaired": contender.params != space.complete(trial.params),
        }
        if self.budget.workload is not None:
            result |= on_device(contender.allocation, space.layout, self.budget.workload)
        trial.set_user_attr(LOSSES, [float(v) for v in contender.losses.kl])
        trial.set_user_attr(RESULT, result)
        loss = float(result["loss"])
        if not math.isfinite(loss):
            trial.set_user_attr("reason", f"proxy loss is {loss}")
            return TrialState.FAIL.name, None
        if lost:
            return TrialState.PRUNED.name, None
        return TrialState.COMPLETE.name, [loss, contender.used]


def on_device(allocation: Allocation, layout: Layout, workload: Workload) -> dict[str, Any]:
    """Returns what a trial records of a device: memory, bytes read per token, and the speed."""
    read = allocation.token_bytes(layout, workload.context)
    return {
        "memory": asdict(allocation.device_memory(layout, workload)),
        "token_bytes": read,
        "tokens_per_second": workload.tokens_per_second(read),
    }
