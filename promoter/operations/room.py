"""Waiting for room where a target's file system is full, while the guest goes on.

A seed that found none is removed, and begun again when what it needs is free. A mirror stands
still in QEMU (``on-target-error=enospc``), which remembers meanwhile what the guest writes; it
is told to try again when there is more room than there was, and now and then in any case: of a
thin volume nobody can see that. Nothing tells of free space, so it is looked for.

libvirt's copies know no such waiting: they fail.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from promoter.blockjob import Progress
from promoter.guests.base import PlainGuest
from promoter.operations.move import DiskIntent
from promoter.storage.files import free_bytes

LOOK_EVERY = 0.5
MORE = 4 << 20  # bytes, for another try
RETRY_EVERY = 30.0
PHASE = "waiting for room"

Tell = Callable[[Progress], None]


async def wait_for_room(directory: Path, needed: int, tell: Tell) -> None:
    """Return when ``needed`` bytes are free. ``tell`` gets how many are."""
    while (free := free_bytes(directory)) < needed:
        tell(Progress(free, needed, 0))
        await asyncio.sleep(LOOK_EVERY)


class Relief:
    """The mirrors of one operation, as far as they stand still for want of room."""

    def __init__(self, guest: PlainGuest, tell: Callable[[str, str, Progress], None]) -> None:
        self._guest, self._tell = guest, tell
        self._stuck: dict[str, tuple[int, float]] = {}

    async def keep_relieving(self, disks: Iterable[DiskIntent], going: asyncio.Event) -> None:
        """Have them go on when there is room; not while the operation is paused."""
        mirrors = list(disks)
        while mirrors:
            await asyncio.sleep(LOOK_EVERY)
            await going.wait()
            for disk in mirrors:
                await self._relieve(disk)

    async def _relieve(self, disk: DiskIntent) -> None:
        job = await self._guest.job(disk.job)
        if job is None or not job.full:
            self._stuck.pop(disk.job, None)
            return
        free = free_bytes(disk.names.target.parent)
        before, since = self._stuck.setdefault(disk.job, (free, time.monotonic()))
        if free >= before + MORE or time.monotonic() > since + RETRY_EVERY:
            del self._stuck[disk.job]
            await self._guest.retry(disk.job)
        else:
            self._tell(disk.name, PHASE, Progress(free, before + MORE, 0))
