"""Leases: which worker has a trial, for several workers on one study in any storage.

In: the RUNNING trials of a study. Out: those whose worker is dead. A worker writes a lease into its
trials and renews it from a thread; a trial whose lease has expired is closed as abandoned, and its
proposal is made again by the worker that asks next. Invariants: clocks of two machines are never
compared; closing a trial is the claim, and the storage lets one process close it.

A lease has expired when the watcher, by its own monotonic clock, has seen it unchanged for the
seconds that the lease names; a RUNNING trial without a lease (its worker died before it wrote one)
likewise. A worker that was merely slow finds its trial closed when it tells, and drops the result.

Optuna's own heartbeat covers `study.optimize` on a database, neither ask and tell nor journals.
"""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from allocator.errors import first_line
from allocator.study.optuna_private import end_session, set_user_attr, trial_id

LEASE = "lease"
"""User attribute of a trial: `owner`, the `seconds` it is valid without a renewal, `renewal`
(counts up), and when it `expires` by the owner's wall clock, for people only."""
LEASE_SECONDS = 60.0
"""How long a lease is valid without a renewal, unless something else is asked for."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """A worker process: where it runs, on which study folder, and a token against reused pids."""

    host: str
    folder: str
    pid: int
    token: str

    @classmethod
    def here(cls, folder: Path) -> "Owner":
        """Returns the owner that this process is."""
        return cls(socket.gethostname(), str(folder.resolve()), os.getpid(), secrets.token_hex(4))

    @property
    def name(self) -> str:
        """Tells workers apart."""
        return f"{self.host}:{self.pid}:{self.token}"


def left_here(trials: Iterable[FrozenTrial], folder: Path, *, pid: int = 0) -> list[FrozenTrial]:
    """Returns the trials whose lease is of a worker of this host and study folder.

    Args:
        trials: RUNNING ones.
        folder: of the study.
        pid: of this process alone; of any by default.
    """
    wanted: dict[str, Any] = {"host": socket.gethostname(), "folder": str(folder.resolve())}
    if pid:
        wanted["pid"] = pid
    owners = ((t, t.user_attrs.get(LEASE, {}).get("owner", {})) for t in trials)
    return [t for t, owner in owners if wanted.items() <= owner.items()]


class Leases:
    """The leases of one worker, which renews its own in a thread and watches those of others.

        with Leases(study, folder) as leases:
            leases.take(id_)
            ...                  # score it
            leases.drop([id_])   # once it was told

    Args:
        study: the trials'.
        folder: of the study.
        seconds: how long a lease is valid; it is renewed at a third of this.
    """

    def __init__(self, study: Study, folder: Path, *, seconds: float = LEASE_SECONDS) -> None:
        self.owner = Owner.here(folder)
        self._study = study
        self._seconds = seconds
        self._renewals: dict[int, int] = {}  # trial id to renewals
        self._seen: dict[int, tuple[Any, float]] = {}  # trial id to a lease and since when
        self._changing = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def take(self, id_: int) -> None:
        """Writes a lease into the trial with this id and renews it from now on.

        Does nothing if this worker holds the trial's lease already.
        """
        with self._changing:
            if id_ in self._renewals:
                return
            self._renewals[id_] = 0
        self._write(id_, 0)

    def drop(self, ids: Iterable[int]) -> None:
        """Stops renewing the leases of these trials."""
        with self._changing:
            for id_ in ids:
                self._renewals.pop(id_, None)

    def others(self) -> list[FrozenTrial]:
        """Returns the RUNNING trials of other workers, dead ones included."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [t for t in running if trial_id(t) not in self._renewals]

    def expired(self) -> list[FrozenTrial]:
        """Returns those of `others` whose worker is dead.

        A lease counts from the call that first saw it, so call this often.
        """
        now, others = time.monotonic(), self.others()
        leases = {trial_id(t): t.user_attrs.get(LEASE) for t in others}
        self._seen = {
            i: self._seen[i] if i in self._seen and self._seen[i][0] == lease else (lease, now)
            for i, lease in leases.items()
        }
        return [t for t in others if now - self._seen[trial_id(t)][1] >= self._valid_seconds(t)]

    def _valid_seconds(self, trial: FrozenTrial) -> float:
        return float(trial.user_attrs.get(LEASE, {}).get("seconds", self._seconds))

    def _renew(self) -> None:
        while not self._stopped.wait(self._seconds / 3):
            with self._changing:
                self._renewals = {i: n + 1 for i, n in self._renewals.items()}
                renewals = list(self._renewals.items())
            for id_, renewal in renewals:
                try:
                    self._write(id_, renewal)
                except UpdateFinishedTrialError:
                    pass  # taken over, or just told: its worker finds out
                except Exception as error:  # whatever a storage raises: the next one may succeed
                    _log.warning("a lease could not be renewed: %s", first_line(error))
        end_session(self._study)

    def _write(self, id_: int, renewal: int) -> None:
        lease = {
            "owner": asdict(self.owner),
            "seconds": self._seconds,
            "renewal": renewal,
            "expires": f"{datetime.now(UTC) + timedelta(seconds=self._seconds):%FT%TZ}",
        }
        set_user_attr(self._study, id_, LEASE, lease)
