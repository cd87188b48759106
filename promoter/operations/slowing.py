"""Slowing a guest's writes for copies that do not gain on them, and undoing that.

A plain guest gets its own limits back from a guard when promoter dies meanwhile; a domain from
``promoter job resume``. Source: QAPI ``block_set_io_throttle``, ``virDomainSetBlockIoTune``.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack

from promoter.blockjob import READY, BlockJob, JobStatus
from promoter.chain import Disk
from promoter.errors import JobFailed
from promoter.guests.base import Guest, PlainGuest
from promoter.operations.convergence import Convergence
from promoter.operations.guarding import guarded
from promoter.operations.move import DiskIntent

LONGEST_APPROACH = 60.0
LOOK_EVERY, SLOW_EVERY = 0.05, 0.5

Limits = Mapping[str, Mapping[str, int]]


class Slowing:
    """The copies of one operation. ``limits`` are, by disk, the ones that are to come back;
    ``remember`` journals those of one more disk before it is slowed.
    """

    def __init__(
        self, limits: Callable[[], Limits], remember: Callable[[str, Mapping[str, int]], None]
    ) -> None:
        self._limits = limits
        self._remember = remember
        self._convergences = defaultdict[str, Convergence](Convergence)
        self._relief = AsyncExitStack()
        self._guarded: set[str] = set()

    def note(self, disk: DiskIntent, job: BlockJob) -> Convergence:
        """How a copy stands against the guest's writes, now that its job was looked at."""
        convergence = self._convergences[disk.job]
        convergence.add(time.monotonic(), job.done, job.total)
        return convergence

    async def approach(self, guest: Guest, disks: Sequence[DiskIntent], pause: float) -> None:
        """Wait until what is left to copy fits into a pause of so many seconds; slow the guest
        until it does. Raises `JobFailed` when it does not for a minute.
        """
        deadline = time.monotonic() + LONGEST_APPROACH
        for disk in disks:
            while not await self._fits(guest, disk, pause):
                if time.monotonic() > deadline:
                    raise JobFailed(
                        f"{disk.name}: the guest writes faster than can be copied for a pause of"
                        f" {pause:g} s",
                        "Try again when it writes less, give a longer --max-pause, or --beside.",
                    )
                await self._slow(guest, disk)
                await asyncio.sleep(LOOK_EVERY)

    async def keep_slowing(self, guest: Guest, disks: Sequence[DiskIntent]) -> None:
        """Slow the guest whenever one of the copies, until it is ready, does not gain on it."""
        while disks and await guest.status() == "running":
            await asyncio.sleep(SLOW_EVERY)
            for disk in disks:
                job = await guest.job(disk.job)
                if job and job.status is JobStatus.RUNNING:
                    self.note(disk, job)
                    await self._slow(guest, disk)

    async def undo(self, guest: Guest) -> None:
        """Give the disks their own limits back; then no guard has to."""
        if own := self._limits():
            view = await guest.look()
            for key, limits in own.items():
                if disk := view.disk(key):
                    await guest.limit(disk, limits)
        await self.leave()

    async def leave(self) -> None:
        """Dismiss the guards."""
        await self._relief.aclose()
        self._guarded.clear()

    async def _fits(self, guest: Guest, disk: DiskIntent, pause: float) -> bool:
        job = await guest.job(disk.job)
        return job is None or job.status not in READY or self.note(disk, job).fits(pause)

    async def _slow(self, guest: Guest, disk: DiskIntent) -> None:
        convergence = self._convergences[disk.job]
        if not convergence.tighten():
            return
        found = (await guest.look()).disk(disk.key)
        assert found, "its job runs"
        if disk.key not in self._limits():
            before = await guest.limits(found)
            self._remember(disk.key, before)
        if isinstance(guest, PlainGuest) and disk.key not in self._guarded:
            await self._guard(guest, found, self._limits()[disk.key])
        await guest.limit(found, self._limits()[disk.key], convergence.limit)

    async def _guard(self, guest: PlainGuest, disk: Disk, limits: Mapping[str, int]) -> None:
        own = guest.throttle(disk, limits)
        alive = await self._relief.enter_async_context(guarded(guest, limits=(own,)))
        beating = asyncio.create_task(alive.keep_beating(), name="pulse")
        self._relief.callback(beating.cancel)
        self._guarded.add(disk.key)
