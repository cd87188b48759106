"""Starting a mirror, also on a QEMU that may lose guest writes while it does.

There a write during the job's first scan of the image may never be marked for
copying. So the guest's CPUs stand still until the scan is over. The guard
holds that pause too: it cancels the job first, then continues the guest, so a
job in a guest that runs has always been started safely.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from promoter.blockjob import JobStatus
from promoter.errors import JobFailed, PromoterError
from promoter.guests.base import Guest, PlainGuest, Start
from promoter.operations.guarding import guarded

LONGEST_SCAN = 10.0
LOOK_EVERY = 0.002
STARTING = frozenset({JobStatus.CREATED, JobStatus.RUNNING})


async def start_standing(guest: PlainGuest, spec: Start, *, running: bool) -> float | None:
    """Start a mirror while the guest stands still; for how many seconds we had stopped it.

    A guest that is not ``running`` stands still already.

    Raises `JobFailed`, with the job cancelled and the guest as it was, when somebody else
    continues the guest or the scan takes more than 10 s.
    """
    if not running:
        await start(guest, spec)
        return None
    async with guarded(guest, starting=spec.job) as alive:
        beating = asyncio.create_task(alive.keep_beating(), name="pulse")
        began = time.monotonic()
        await guest.stop()
        try:
            await start(guest, spec)
        finally:
            await guest.cont()
            beating.cancel()
        return time.monotonic() - began


async def start(guest: Guest, spec: Start) -> None:
    """Start a mirror in a guest that stands still. Raises as `start_standing`."""
    await guest.begin(spec)
    try:
        async with asyncio.timeout(LONGEST_SCAN):
            await scanned(guest, spec.job)
        stood = await guest.status() != "running"
    except BaseException as error:  # a cancellation too: no job is left in a guest that stands
        await _cancel(guest, spec)
        if isinstance(error, TimeoutError):
            raise JobFailed(f"the mirror did not start in {LONGEST_SCAN:.0f} s") from error
        raise
    if not stood:
        await _cancel(guest, spec)
        raise JobFailed("the guest was continued while its mirror started")


async def _cancel(guest: Guest, spec: Start) -> None:
    with suppress(PromoterError):  # it has failed, or the guest is gone
        await guest.cancel(spec.job)


async def scanned(guest: Guest, job: str) -> None:
    """Return when a mirror's first scan is over, or the job. No event tells."""
    while await _scans(guest, job):  # noqa: ASYNC110 - QEMU has no event for it
        await asyncio.sleep(LOOK_EVERY)


async def _scans(guest: Guest, job: str) -> bool:
    now = await guest.job(job)
    return now is not None and now.status in STARTING and not now.total
