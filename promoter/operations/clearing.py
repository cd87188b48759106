"""What a move removes: of a disk that stays on its old chain, or of one that has switched."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from promoter.operations import proving
from promoter.operations.course import Course
from promoter.operations.leftovers import call_merged, delete_old, remove_spares
from promoter.operations.move import DiskIntent, Old, Way
from promoter.storage import seed
from promoter.storage.files import file_id, sync


def discard(course: Course, disk: DiskIntent) -> None:
    """Remove what was made for a disk that stays on its old chain."""
    disk.names.withdraw()
    if disk.commits:
        return
    seed.discard(disk.part)
    if disk.seeded and file_id(disk.names.target) == disk.seeded.id:
        disk.names.target.unlink()
    sync(disk.names.target.parent)


async def discard_remote(course: Course, index: int, disk: DiskIntent) -> None:
    removed = await course.domain.delete_volume(disk.names.target)
    course.save(course.intent.with_disk(index, replace(disk, made=False, left=not removed)))


async def tidy(course: Course) -> None:
    """After the switch: close the old nodes, remove the names that were only on the way."""
    await proving.end_views(course)
    for disk in course.intent.disks:
        if course.guest and not course.intent.domain:
            await _drop_old_nodes(course, disk)
        view = await course.alive.look() if course.guest and disk.names.in_place else None
        if disk.way is not Way.COMMIT_BELOW:
            disk.names.tidy()
        if not (disk.commits or disk.names.remote):
            seed.discard(disk.part)
        remove_spares(disk.names, view)
        await asyncio.to_thread(call_merged, disk)
        if course.intent.choices.old is Old.DELETE and _is_proven(course, disk):
            await asyncio.to_thread(delete_old, disk)
        await asyncio.to_thread(course.leases.take_off_readers, disk)
        report = course.report(disk)
        report.duration_s = time.monotonic() - course.began
    course.save(replace(course.intent, tidied=True))


def _is_proven(course: Course, disk: DiskIntent) -> bool:
    """Is all the proof there that was asked for?"""
    proven = disk.verdict is not None and disk.verdict.same is not None
    return proven or not course.intent.choices.verify


async def _drop_old_nodes(course: Course, disk: DiskIntent) -> None:
    view = await course.alive.look()
    found = view.disk(disk.key)
    if found and any(image.node == disk.node for image in found.chain):
        for node in (n for image in disk.gone for n in (image.node, image.file_node) if n):
            await course.plain.drop(node)
