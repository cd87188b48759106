"""The proof that a move asked for: its disks' verdicts, and the end of their views."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from promoter.operations import verify
from promoter.operations.course import Course
from promoter.operations.move import DiskIntent, Failure, Verdict
from promoter.storage.pace import Pace


async def verify_disk(course: Course, index: int, disk: DiskIntent) -> None:
    """Prove that the old chain and the new disk are the same, or say why not."""
    if course.intent.failure is Failure.CANCELLED:
        verdict = Verdict(unproven="it was cancelled")
    elif not course.seen.alive:
        verdict = Verdict(unproven=verify.GONE)
    else:
        pace = course.paces[disk.node] = Pace(course.intent.choices.speed)
        report = partial(course.tell, disk.name, "verify")
        verdict = await verify.verify(course.alive, disk, pace, report)
    course.save(course.intent.with_disk(index, replace(disk, verdict=verdict)))
    if all(other.verdict for other in course.intent.disks if other.viewed):
        await end_views(course)


async def end_views(course: Course) -> None:
    for disk in course.intent.disks if course.intent.choices.verify and course.seen.alive else ():
        await verify.end(course.alive, disk)
