"""The seeds of a move's disks: made outside the guest, side by side, at the wished pace."""

from __future__ import annotations

import asyncio
import errno
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import TypeVar

from promoter.blockjob import Progress
from promoter.chain import FileStamp
from promoter.errors import NoSpace
from promoter.guests.base import ConnectionLost
from promoter.operations import room
from promoter.operations.course import Course
from promoter.operations.move import DiskIntent, OnFull
from promoter.operations.specs import backing_of
from promoter.storage import seed
from promoter.storage.pace import Pace
from promoter.storage.seed import SeedSpec

T = TypeVar("T")


async def seed_all(course: Course, indices: list[int]) -> None:
    """Seed disks side by side, but in turn where they share a file system."""
    most = course.intent.choices.parallel
    gates = defaultdict[int | None, asyncio.Semaphore](lambda: asyncio.Semaphore(most or 1))

    async def seed_one(index: int) -> None:
        disk = course.intent.disks[index]
        directory = disk.names.target.parent
        async with gates[None if most else directory.stat().st_dev]:
            await _seed(course, index, disk)

    work = [asyncio.create_task(seed_one(i), name=f"seed {i}") for i in indices if i is not None]
    try:
        await asyncio.gather(*work)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


async def _seed(course: Course, index: int, disk: DiskIntent) -> None:
    loop = asyncio.get_running_loop()
    began = time.monotonic()

    def report(done: int, total: int) -> None:
        progress = Progress(done, total, time.monotonic() - began)
        loop.call_soon_threadsafe(course.tell, disk.name, "seed", progress)

    spec = SeedSpec(
        layers=disk.chain.images[1 : len(disk.chain) - disk.kept],
        part=disk.part,
        method=disk.method,
        geometry=disk.geometry,
        virtual_size=disk.virtual_size,
        like=disk.names.path,
        backing=backing_of(disk),
    )
    pace = course.paces[disk.node] = Pace(course.intent.choices.speed)
    if not course.going.is_set():
        pace.pause()
    made = await _while_alive(course, _make_seed(course, disk, spec, pace, report))
    course.report(disk).seeded_bytes = disk.part.stat().st_blocks * 512
    course.save(course.intent.with_disk(index, replace(disk, seeded=made)))
    seed.publish(disk.part, disk.names.target)


async def _make_seed(
    course: Course,
    disk: DiskIntent,
    spec: SeedSpec,
    pace: Pace,
    report: Callable[[int, int], None],
) -> FileStamp:
    """Make the seed, at the first try or, if that is wished, when there is room."""
    while True:
        try:
            return await seed.make_seed(spec, pace, report)
        except (NoSpace, OSError) as error:
            full = isinstance(error, NoSpace) or error.errno == errno.ENOSPC
            if not full or course.intent.choices.on_full is OnFull.FAIL:
                raise
        await asyncio.to_thread(seed.discard, spec.part)
        tell = partial(course.tell, disk.name, room.PHASE)
        await room.wait_for_room(spec.part.parent, disk.required, tell)


async def _while_alive(course: Course, work: Coroutine[None, None, T]) -> T:
    """Work outside the guest, given up when the guest goes away."""
    working = asyncio.create_task(work, name="outside the guest")
    gone = asyncio.create_task(course.alive.gone(), name="guest gone")
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ConnectionLost(f"{course.intent.guest}: the monitor closed")
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
