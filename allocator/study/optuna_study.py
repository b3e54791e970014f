"""The Optuna study of one set of inputs.

In: a storage, and the resolved inputs. Out: a study that records them. Invariant: a study is never
continued with other inputs than it was launched with.
"""

import warnings
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage

from allocator.errors import StudyError

LOCK = "lock"
"""User attribute of a study: the resolved inputs it was launched with."""


def open_study(storage: BaseStorage, name: str, lock: dict[str, Any]) -> optuna.Study:
    """Creates the study, or opens it if it was launched with the same inputs.

    Args:
        storage: Optuna's.
        name: of the study within the storage.
        lock: the resolved inputs; equal for every launch of one study.

    Raises:
        StudyError: if the study was launched with other inputs, naming the first that differs.
    """
    try:  # first: creating what exists adds a line to the journal
        study = optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
    known = study.user_attrs.get(LOCK)
    if known is None:
        if study.get_trials(deepcopy=False):
            raise StudyError(f"study {name!r} in this storage is not one of ours; use another name")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(["proxy_loss", "bytes"])
        study.set_user_attr(LOCK, lock)
        return study
    for key in lock:
        if known.get(key) != lock[key]:
            raise StudyError(
                f"study {name!r} was launched with {key} = {_short(known.get(key))}, now it is "
                f"{_short(lock[key])}; a changed study is a new one: "
                "use another folder or --storage"
            )
    return study


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
