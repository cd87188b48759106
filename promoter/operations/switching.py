"""The instants at which a move's guest stands still, and what its next boot opens."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from promoter.guests.base import DefinedDisk
from promoter.operations import switchover as instant
from promoter.operations import verify
from promoter.operations.course import Course
from promoter.operations.move import CopyMode, DiskIntent, Job, Way
from promoter.operations.quiesce import NotQuiesced
from promoter.operations.specs import definitions, snapshot_spec
from promoter.operations.suspended import Work, define, go_on
from promoter.storage.files import sync

MOST_PAUSES = 10


async def switch_over(course: Course) -> None:
    """Move all disks whose copies are ready to their targets."""
    ready = course.with_job(Job.READY)
    for disk in ready:
        if job := await course.alive.job(disk.job):
            course.report(disk).mirrored_bytes = job.done
        is_file = not disk.names.remote and disk.names.target.is_file()
        if is_file:  # QEMU flushes it while the guest stands still
            await asyncio.to_thread(sync, disk.names.target)
    await _switch_over(course, ready)


async def _switch_over(course: Course, ready: list[DiskIntent]) -> None:
    background = course.intent.choices.copy_mode is CopyMode.BACKGROUND
    running = await course.alive.status() == "running"
    if ready[0].way is Way.MIRROR and not course.intent.domain:
        for disk in ready if background else ():
            await course.plain.write_blocking(disk.node)
        if not (course.intent.choices.verify and running):
            await instant.switch_over(course.plain, ready, course.lock_fd)
            return
        await verify.prepare(course.plain, ready)
    follows = any(map(course.intent.follows, ready))
    longest = course.intent.choices.max_pause if follows and running else None
    if longest is not None:
        await course.slowing.approach(course.alive, ready, longest)
    course.save(replace(course.intent, stopped=running))
    try:
        pause = await _standing(course, ready, longest)
    except instant.TooSlow:
        course.paused_in_vain += 1
        if course.paused_in_vain == MOST_PAUSES:
            raise
    else:
        for disk in ready:
            course.report(disk).switchover_s = pause
    course.save(replace(course.intent, stopped=False))


async def _standing(course: Course, ready: list[DiskIntent], longest: float | None) -> float | None:
    if domain := course.intent.domain:
        running = course.intent.stopped
        work = Work(domain, running, pivot=definitions(ready), settle=longest)
        if course.intent.choices.verify:
            scratch = {disk.name: verify.view_of(disk).scratch for disk in ready}
            work = replace(work, view=scratch)
        done = await course.while_suspended(work)
        if course.intent.choices.verify:
            _note_views(course, ready, done.unviewed)
        return done.pause
    if longest is not None:
        how = (course.plain, ready, course.lock_fd)
        return await instant.switch_over_standing(*how, pause=longest)
    if ready[0].way is Way.MIRROR:
        return await _viewed(course, ready)
    await instant.switch_over(course.plain, ready, course.lock_fd)
    return None


async def _viewed(course: Course, ready: list[DiskIntent]) -> float:
    """Switch over, and take views of the new disks before the guest goes on."""
    why_not = ""

    async def take() -> None:
        nonlocal why_not
        why_not = await verify.take(course.plain, ready)

    how = (course.plain, ready, course.lock_fd)
    pause = await instant.switch_over_standing(*how, before_it_goes_on=take)
    _note_views(course, ready, why_not)
    return pause


def _note_views(course: Course, ready: list[DiskIntent], why_not: str) -> None:
    disks = [verify.taken(d, why_not) if d in ready else d for d in course.intent.disks]
    course.save(replace(course.intent, disks=tuple(disks)))


async def snapshot(course: Course) -> None:
    """Put all the disks' overlays above them in one short pause."""
    left = [(i, d) for i, (d, s) in enumerate(course.pairs()) if not s.switched]
    disks = [course.with_its_nodes(*each) for each in left]
    running = await course.alive.status() == "running"
    quiesce = course.intent.choices.quiesce
    frozen = course.alive.pid if quiesce else None
    course.save(replace(course.intent, stopped=running, frozen=frozen))
    names = tuple(disk.names for disk in disks)
    specs = tuple(map(snapshot_spec, disks))
    work = Work(course.intent.address, running, snapshots=specs, names=names, quiesce=quiesce)
    try:
        done = await course.while_suspended(work)
    except NotQuiesced:
        course.save(replace(course.intent, stopped=False, frozen=None))
        raise
    course.save(replace(course.intent, stopped=False, frozen=None))
    for disk in disks:
        report = course.report(disk)
        report.switchover_s, report.frozen_s = done.pause, done.frozen


async def name(course: Course, disk: DiskIntent, file: Path | None) -> None:
    """Have the next boot open the disk's old file or its new one."""
    assert file
    new = file == disk.names.target
    if new and disk.way is Way.SNAPSHOT:
        await _go_on(course)
        return
    if course.intent.domain:
        form = disk.geometry.format if new else disk.chain.active.format
        await define(course.domain, {disk.name: DefinedDisk(file, form)})
    elif new:
        disk.names.commit()
    else:
        disk.names.put_back()


async def continue_guest(course: Course) -> None:
    """Continue a guest that was left stopped, once no mirror of ours is starting in it, and
    thaw its file systems.
    """
    await _go_on(course)
    course.save(replace(course.intent, stopped=False, frozen=None))


async def _go_on(course: Course) -> None:
    disks = course.intent.disks
    snapshots = [disk for disk in disks if disk.way is Way.SNAPSHOT]
    await go_on(
        course.alive,
        definitions(disks),
        [snapshot_spec(disk) for disk in snapshots],
        [disk.names for disk in snapshots],
        proceed=course.intent.stopped,
        frozen=course.intent.frozen is not None and course.intent.frozen == course.alive.pid,
    )
