"""The switchover: the one action inside which nothing waits on anything slow.

Plain QEMU's PENDING (``auto-finalize=false``) is the instant: the guest's I/O
is drained, the target is flushed, both disks hold the same bytes and nothing is
decided yet. Inside it one rename per disk is the commit record, then
``job-finalize``. Before the first rename any failure cancels every disk; after
it none goes back, except a disk whose job could not be finalized: the guest
still writes to the old overlay then, so its path is the old overlay again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress

from promoter.blockjob import DRAINED, READY, BlockJob, JobStatus
from promoter.errors import JobFailed, NoSpace, PromoterError
from promoter.guests.base import CommandFailed, Guest, PlainGuest
from promoter.operations import guard
from promoter.operations.guarding import Pulse, guarded
from promoter.operations.move import DiskIntent
from promoter.operations.start import LOOK_EVERY

LONGEST_WAIT = 60.0


class TooSlow(JobFailed):
    """What was left to copy did not fit into the pause; nothing has changed."""


async def switch_over(guest: PlainGuest, disks: Sequence[DiskIntent], lock_fd: int) -> None:
    """Move every ready disk to its target. All jobs have ended when this returns. ``lock_fd`` is
    the operation's lock.

    Raises `JobFailed` when disks were put back; `ConnectionLost` when the guest went away.
    """
    async with guarded(guest, _switches(disks), lock_fd=lock_fd) as alive:
        await _switch_over(guest, disks, alive)


async def switch_over_standing(
    guest: PlainGuest,
    disks: Sequence[DiskIntent],
    lock_fd: int,
    *,
    pause: float | None = None,
    before_it_goes_on: Callable[[], Awaitable[None]] | None = None,
) -> float:
    """The same while the guest's CPUs stand still; for how many seconds. It needs that for jobs
    that copy behind the guest's writes, and for what is to be done ``before_it_goes_on``.

    Raises `TooSlow` when what is left is not copied within ``pause`` seconds.
    """
    async with guarded(guest, _switches(disks), standing=True, lock_fd=lock_fd) as alive:
        began = time.monotonic()
        await guest.stop()
        try:
            if pause is not None:
                await settle(guest, [disk.job for disk in disks], pause, alive.beat)
            await _switch_over(guest, disks, alive)
            if before_it_goes_on:
                alive.beat()
                await before_it_goes_on()
        finally:
            await guest.cont()
        return time.monotonic() - began


async def settle(
    guest: Guest, jobs: Iterable[str], pause: float, tick: Callable[[], None] = lambda: None
) -> None:
    """Wait until all is copied in a guest that stands still. No event tells.

    Raises `TooSlow` after ``pause`` seconds.
    """
    try:
        async with asyncio.timeout(pause):
            for job in jobs:
                while _lags(await guest.job(job)):
                    tick()
                    await asyncio.sleep(LOOK_EVERY)
    except TimeoutError:
        raise TooSlow(f"what is left to copy takes more than {pause:g} s") from None


def _lags(job: BlockJob | None) -> bool:
    return job is not None and job.status in READY and job.done < job.total


def _switches(disks: Sequence[DiskIntent]) -> tuple[guard.Switch, ...]:
    return tuple(guard.Switch(disk.job, disk.names) for disk in disks)


async def _switch_over(guest: PlainGuest, disks: Sequence[DiskIntent], alive: Pulse) -> None:
    try:
        async with asyncio.timeout(LONGEST_WAIT):
            await _drain(guest, disks, alive)
        await commit(guest, disks[0])
    except BaseException as error:  # a cancellation too: no guest is left drained
        await _put_back(guest, disks)
        if isinstance(error, TimeoutError):
            raise JobFailed(f"{guest.name}: no switchover in {LONGEST_WAIT:.0f} s") from error
        raise
    await commit_all(guest, disks[1:])


async def commit_all(guest: PlainGuest, disks: Sequence[DiskIntent]) -> None:
    """Commit drained disks after the first: one that fails keeps no other from its switch."""
    failures = []
    for disk in disks:
        try:
            await commit(guest, disk)
        except JobFailed as error:
            failures.append(error.message)
    if failures:
        raise JobFailed("; ".join(failures))


async def commit(guest: PlainGuest, disk: DiskIntent) -> None:
    """Give a drained disk its new name and let QEMU switch it.

    Raises `JobFailed` after putting the disk back when either fails.
    """
    try:
        if disk.names.is_old():
            disk.names.commit()
        else:
            disk.names.settle()
    except OSError as error:
        await guest.cancel(disk.job)
        raise JobFailed(f"{disk.name} was put back: its name cannot change: {error}") from error
    with suppress(CommandFailed):  # the guard was faster: the job's own state tells
        await guest.finalize(disk.job)
    job = await guest.wait_for(disk.job, (), lambda _: None)
    if job is not None and job.error:
        disk.names.put_back()
        raise JobFailed(f"{disk.name} could not be switched: {job.error}")


async def _drain(guest: PlainGuest, disks: Sequence[DiskIntent], alive: Pulse) -> None:
    for disk in disks:
        try:
            await guest.complete(disk.job)
        except CommandFailed as error:  # it failed while it was ready: the job says why
            job = await guest.wait_for(disk.job, tuple(JobStatus), alive.beat)
            raise _not_switched(disk, job) from error
    for disk in disks:
        job = await guest.wait_for(disk.job, DRAINED, alive.beat)
        if job is None or job.status not in DRAINED:
            raise _not_switched(disk, job)


def _not_switched(disk: DiskIntent, job: BlockJob | None) -> PromoterError:
    why = job.error if job and job.error else "its mirror ended"
    kind = NoSpace if "No space left" in why else JobFailed
    return kind(f"{disk.name} did not switch: {why}")


async def _put_back(guest: PlainGuest, disks: Sequence[DiskIntent]) -> None:
    for disk in disks:
        disk.names.revoke()
        with suppress(PromoterError):  # ended already, or the guest is gone
            await guest.cancel(disk.job)


def pause_seconds(guest: PlainGuest, disk: DiskIntent) -> float | None:
    """How long the guest's I/O stood still, by QEMU's own event timestamps."""
    drained = guest.transition_time(disk.job, JobStatus.WAITING)
    flowing = guest.transition_time(disk.job, JobStatus.CONCLUDED)
    return None if drained is None or flowing is None else flowing - drained
