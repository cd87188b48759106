"""QEMU's block jobs: their states, progress and what it says about the rest.

Source: QAPI ``JobStatus``, ``query-jobs`` and ``query-block-jobs``. A job is
ready when its status says so, never because its offset has reached its
length: both move, and both are 0 at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class JobStatus(Enum):
    """The states of QEMU's job state machine, by their QAPI names."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


READY = frozenset({JobStatus.READY, JobStatus.STANDBY})
PAUSED = frozenset({JobStatus.PAUSED, JobStatus.STANDBY})
DRAINED = frozenset({JobStatus.WAITING, JobStatus.PENDING})
ENDED = frozenset({JobStatus.CONCLUDED, JobStatus.NULL})


@dataclass(frozen=True)
class BlockJob:
    """One job as ``query-jobs`` shows it; progress is in arbitrary units.

    ``full``: it stands still since its target's storage is full.
    """

    id: str
    type: str
    status: JobStatus
    done: int = 0
    total: int = 0
    error: str | None = None
    full: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a phase is, in bytes, ``elapsed`` seconds after it began.

    ``dirtied`` is what the guest writes meanwhile that is to be copied again, and ``limit`` what
    its writes are slowed to, in bytes per second; None where that does not matter.
    """

    done: int
    total: int
    elapsed: float
    dirtied: float | None = None
    limit: int | None = None

    @property
    def rate(self) -> float:
        """Bytes per second so far."""
        return self.done / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds to go at this rate, or None while nothing has moved."""
        return max(0, self.total - self.done) / self.rate if self.rate else None
