"""What a search found, in a few figures: the pick, and its distance to the best baseline.

In: an Optuna study, and the trial of the pick. Out: an `Outcome`. Invariant: losses are on the
search split, where trials are scored, and are compared document by document; a baseline counts if
it is within the limits, which all COMPLETE trials are.
"""

import msgspec
import numpy as np
import optuna
from optuna.trial import FrozenTrial

from allocator.study.intervals import mean_interval, ratio_interval
from allocator.study.trials import KIND, LOSSES, RESULT, SEARCHED, complete_trials


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The pick of a search, on the search split; losses in nats per token.

    Attributes:
        loss: KL to the original.
        loss_interval: 95 %, over documents.
        selection: the loss on the selection split, which the pick was made on.
        bits: effective bits of the searched matrices.
        file_bytes: of the whole file.
        baseline: name of the baseline of least loss among the trials; None if none was finished.
        ratio: the pick's loss over the baseline's.
        ratio_interval: 95 %, paired by document.
    """

    loss: float
    loss_interval: tuple[float, float]
    selection: float
    bits: float
    file_bytes: int
    baseline: str | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None


def outcome_of(study: optuna.Study, pick: FrozenTrial, selection: float) -> Outcome:
    """Returns the figures of a pick.

    Args:
        study: the pick's.
        pick: its trial, COMPLETE.
        selection: its loss on the selection split.
    """
    losses, result = np.array(pick.user_attrs[LOSSES]), pick.user_attrs[RESULT]
    rivals = [t for t in complete_trials(study) if t.user_attrs[KIND] not in SEARCHED]
    best = rivals[0] if rivals else None  # the least loss comes first
    beside = np.zeros(0) if best is None else np.array(best.user_attrs[LOSSES])
    return Outcome(
        loss=float(pick.values[0]),
        loss_interval=mean_interval(losses),
        selection=selection,
        bits=float(result["effective_bits"]),
        file_bytes=int(result["bytes"]["file"]),
        baseline=None if best is None else str(best.user_attrs[KIND]),
        ratio=None if best is None or not best.values[0] else pick.values[0] / best.values[0],
        ratio_interval=None if best is None else ratio_interval(losses, beside),
    )
