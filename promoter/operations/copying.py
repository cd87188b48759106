"""The block jobs of a move: started, waited for, helped along, cancelled and dismissed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from promoter.blockjob import ENDED, READY, BlockJob, Progress
from promoter.errors import JobFailed
from promoter.guests.base import CommandFailed, MirrorSpec, PlainGuest, Start
from promoter.guests.bugs import loses_writes_at_start
from promoter.operations import room
from promoter.operations.course import Course
from promoter.operations.move import Active, DiskIntent, Job, OnFull, Way
from promoter.operations.observation import observe
from promoter.operations.outcome import job_failure
from promoter.operations.preflight import check_start
from promoter.operations.specs import commit_spec, mirror_spec, target_node
from promoter.operations.start import start_standing
from promoter.operations.suspended import Work, Worker
from promoter.operations.switchover import pause_seconds
from promoter.storage import images

CANCELED = "Operation canceled"


async def start(course: Course, disk: DiskIntent) -> None:
    spec: Start
    if disk.commits:
        spec = commit_spec(disk, course.intent.choices.speed)
    else:
        spec = mirror_spec(disk, course.intent)
        if not course.intent.domain:
            spec = replace(spec, target_is_zero=await _is_blank(course, disk, spec))
            await course.plain.attach(target_node(disk))
    await _begin(course, disk, spec)


async def _is_blank(course: Course, disk: DiskIntent, spec: MirrorSpec) -> bool:
    """Was nothing written yet to the target, which the mirror is to fill?"""
    if spec.sync != "full" or disk.node in (await course.alive.look()).nodes:
        return False
    return await images.reads_as_zeros(disk.names.target, disk.geometry.format)


async def start_remote(course: Course, index: int, disk: DiskIntent) -> None:
    """Have libvirt make the target and copy to it; it leaves none where it refuses."""
    course.save(course.intent.with_disk(index, replace(disk, left=True)))
    try:
        await start(course, disk)
    except JobFailed:
        course.save(course.intent.with_disk(index, replace(disk, left=False)))
        raise


async def _begin(course: Course, disk: DiskIntent, spec: Start) -> None:
    if loses_writes_at_start(course.last_look.version):
        view = await course.alive.look()
        check_start(view)
        running = view.status == "running"
        course.save(replace(course.intent, stopped=running))
        if course.intent.domain:
            mirror, commit = (spec, None) if isinstance(spec, MirrorSpec) else (None, spec)
            work = Work(course.intent.domain, running, mirror, commit)
            pause = (await course.while_suspended(work)).pause
        else:
            pause = await start_standing(course.plain, spec, running=running)
        course.report(disk).start_pause_s = pause
        course.save(replace(course.intent, stopped=False))
    else:
        await course.alive.begin(spec)


async def await_ready(course: Course) -> None:
    began = time.monotonic()
    if course.intent.domain:
        course.worker = course.worker or await Worker.start()
    running = course.with_job(Job.RUNNING)
    if course.going.is_set():
        await _set_speeds(course, running)
    following = [disk for disk in running if course.intent.follows(disk)]
    keep_slowing = course.slowing.keep_slowing(course.alive, following)
    slowing = asyncio.create_task(keep_slowing, name="convergence")
    relieving = asyncio.create_task(_keep_relieving(course, running), name="room")
    try:
        for disk in running:

            def tick(job: BlockJob, disk: DiskIntent = disk) -> None:
                for helping in (slowing, relieving):
                    if helping.done():
                        helping.result()  # raises what went wrong with it
                _copied(course, disk, began, job)

            job = await _wait_until_ready(course, disk, tick)
            if job is None or job.status in ENDED:
                return
            tick(job)
    finally:
        slowing.cancel()
        relieving.cancel()
        await asyncio.gather(slowing, relieving, return_exceptions=True)


async def _set_speeds(course: Course, disks: list[DiskIntent]) -> None:
    """It may have been changed while nobody could tell the guest."""
    for disk in disks:
        with suppress(CommandFailed):  # it has just ended
            await course.alive.set_speed(disk.job, course.intent.choices.speed)


async def _wait_until_ready(
    course: Course, disk: DiskIntent, tick: Callable[[BlockJob], None]
) -> BlockJob | None:
    """QEMU says standby, as of one that is ready, of one that has no room, too."""
    while True:
        job = await course.alive.wait_for(disk.job, READY, tick)
        if job is None or not job.full:
            return job
        tick(job)
        await asyncio.sleep(room.LOOK_EVERY)


async def _keep_relieving(course: Course, running: list[DiskIntent]) -> None:
    if course.intent.choices.on_full is OnFull.WAIT and isinstance(course.guest, PlainGuest):
        mirrors = [disk for disk in running if disk.way is Way.MIRROR]
        relief = room.Relief(course.guest, course.tell)
        await relief.keep_relieving(mirrors, course.going)


def _copied(course: Course, disk: DiskIntent, began: float, job: BlockJob) -> None:
    progress = Progress(job.done, job.total, time.monotonic() - began)
    if course.intent.follows(disk):
        convergence = course.slowing.note(disk, job)
        progress = replace(progress, dirtied=convergence.dirty_rate, limit=convergence.limit)
    course.tell(disk.name, str(disk.way), progress)


async def cancel(course: Course, disk: DiskIntent) -> None:
    course.expected_cancels.add(disk.node)
    with suppress(CommandFailed):  # it ended by itself: the next look tells how
        await course.alive.cancel(disk.job)
    await course.alive.wait_for(disk.job, (), lambda _: None)


async def dismiss(course: Course, disk: DiskIntent) -> None:
    """Read how the job ended, then let QEMU forget it."""
    job = course.last_look.jobs.get(disk.job)
    seen = observe(disk, course.last_look)
    if seen.active is Active.NEW:
        if disk.way is Way.MIRROR and not (course.intent.domain or disk.viewed):
            course.report(disk).switchover_s = pause_seconds(course.plain, disk)
    elif job and not (job.error == CANCELED and disk.node in course.expected_cancels):
        course.fail(*job_failure(disk, job))
    course.expected_cancels.discard(disk.node)
    await course.alive.dismiss(disk.job)
