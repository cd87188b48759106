"""How a move ended: what became of each disk, or the error that says why not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from promoter.blockjob import BlockJob
from promoter.errors import Cancelled, JobFailed, NoSpace, PromoterError, Refused, Unreachable
from promoter.operations.move import DiskIntent, Failure, Kind, Move, Way
from promoter.storage.seed import SeedMethod


@dataclass
class DiskReport:
    """What happened to one disk. Bytes and seconds; None for what is not known.

    ``old`` is the old overlay, ``kept`` are all the files that the new chain does not need.
    ``spare`` is a second name of the new disk: the one its QEMU remembers. It goes when
    that QEMU is gone. ``frozen_s``: for how long the guest's file systems were frozen.
    ``verified_bytes`` were proven to be the same on both disks; ``unverified`` says why not, if
    that was asked for.
    """

    disk: str
    source: Path
    target: Path
    way: Way
    seed: SeedMethod | None
    seeded_bytes: int | None = None
    mirrored_bytes: int | None = None
    duration_s: float | None = None
    switchover_s: float | None = None
    start_pause_s: float | None = None
    frozen_s: float | None = None
    verified: bool = False
    verified_bytes: int | None = None
    unverified: str | None = None
    old: Path | None = None
    kept: tuple[Path, ...] = ()
    node: str | None = None
    spare: Path | None = None


def job_failure(disk: DiskIntent, job: BlockJob) -> tuple[Failure, str]:
    """Why a mirror ended without a switchover."""
    why = job.error or "somebody ended it before the switchover"
    return (
        Failure.NO_SPACE if "No space left" in why else Failure.JOB_FAILED,
        f"{disk.name}: the {disk.way} to {disk.names.target} failed: {why}",
    )


def error_of(intent: Move) -> PromoterError:
    """The error of what was put back: the guest is on its untouched old chain."""
    chain = "new disk" if intent.kind is Kind.UNDO else "old chain"
    unchanged = f"The guest is unchanged on its {chain}."
    if left := [str(disk.names.target) for disk in intent.disks if disk.left]:
        unchanged += f" Half-made on its host, if it is there: {', '.join(left)}."
    match intent.failure:
        case None:
            return Unreachable(
                f"{intent.guest} went away before the switchover",
                f"Its disks are the untouched old chain. Start it and {intent.kind} again.",
            )
        case Failure.CANCELLED:
            return Cancelled(f"{intent.kind} {intent.id} was cancelled", unchanged)
        case Failure.NO_SPACE:
            return NoSpace(
                intent.reason, f"{unchanged} Make room, then: promoter job resume {intent.id}"
            )
        case Failure.REFUSED:
            return Refused(intent.reason, unchanged)
        case Failure.JOB_FAILED:
            return JobFailed(intent.reason, unchanged)
