"""Undo: disks that have switched go back to their old chains, with all that was written since.

Nobody may have the disks open: then what the new disk has and the old chain has not is found,
written into the old overlay, and compared, under QEMU's own lock on the new disk, so that no guest
writes to it meanwhile. Only then the next boot opens the old overlay again. The new disk is kept.

An undo that is killed is done again from its beginning: until its one rename, or libvirt's
definition, the new disk is the true one, and nothing has written to it.

Source: ``qemu-img rebase``, ``commit`` and ``compare``; ``virDomainDefineXML``.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from promoter.blockjob import Progress
from promoter.errors import JobFailed, Refused
from promoter.guests.base import Domain, Guest, GuestView
from promoter.lease.readers import lease_of
from promoter.operations.course import Course
from promoter.operations.leases import check_leases, is_listed
from promoter.operations.leftovers import is_named_as_backing, undone_file
from promoter.operations.move import Choices, DiskIntent, Kind, Move, Old, Verdict, Way
from promoter.operations.observation import observe
from promoter.operations.plan import Plan, stamps
from promoter.operations.preflight import check_managed_save, is_encrypted
from promoter.operations.switching import name
from promoter.operations.verify import cost, old_chain
from promoter.storage import images
from promoter.storage.files import (
    file_id,
    free_bytes,
    is_open,
    is_written,
    kept_from_writers,
    sync,
)
from promoter.storage.images import Backing
from promoter.storage.names import Named
from promoter.storage.pace import Pace


async def plan(guest: Guest | None, move: Move, identity: str, state: Path) -> Plan:
    """What going back costs, or why it is not to be had; ``guest`` is None if it is certainly off.

    ``move`` has ended. Raises `Refused` or `LeaseHeld`.
    """
    view = await guest.look() if guest else None
    disks = tuple(disk for disk in move.disks if _has_switched(disk, view))
    if disks and view is not None and view.runs:
        most = sum(map(cost, disks))
        raise Refused(
            f"{move.guest} runs: what it writes meanwhile would not be on the old chain",
            f"Going back compares up to {most:,} bytes, and copies what was written since the"
            f" switchover. Shut the guest down, then: promoter job undo {move.id}",
        )
    if disks and isinstance(guest, Domain):
        await check_managed_save(guest)
    for disk in disks:
        _check_old_chain(disk)
    await asyncio.to_thread(check_leases, disks, Old.ASIDE, os.getpid(), state)
    back = tuple(replace(disk, verdict=None) for disk in disks)
    return Plan(
        Move(identity, move.guest, Choices(), back, domain=move.domain, kind=Kind.UNDO),
        free=tuple(free_bytes(disk.names.aside.parent) for disk in disks),
        nothing_to_do=tuple(disk.name for disk in move.disks if disk not in disks),
        warnings=(),
    )


def _has_switched(disk: DiskIntent, view: GuestView | None) -> bool:
    """Is the disk on its new file? Raises `Refused` for one that nothing brings back."""
    merge = "What is merged cannot be taken apart; a backup can be restored."
    why, hint = {
        Way.COMMIT: ("its layers were merged into one that was there before", merge),
        Way.COMMIT_BELOW: ("its layers were merged into one that was there before", merge),
        Way.SNAPSHOT: ("it goes on in an overlay", "Merge that: promoter consolidate"),
    }.get(disk.way, ("", ""))
    if not why and (disk.names.remote or disk.names.stays):
        why = f"{disk.names.path} is a block device, or on another host"
        hint = "It is as it was at the switchover; what was written since is on the new disk only."
    if not why:
        named = observe(disk, view).named
        if named is not Named.UNKNOWN:
            return named is Named.NEW
        why = "its next boot opens neither the new nor the old disk"
        hint = "It has gone on since. See: promoter chain"
    raise Refused(f"{disk.name}: {why}", hint)


def _check_old_chain(disk: DiskIntent) -> None:
    """Is the old chain still the one that the disk had, and nobody else's?"""
    aside, new = disk.names.aside, _new_file(disk)
    why = ""
    if not new.exists():
        why = f"its new disk {new} is gone, and what was written since with it"
    elif file_id(aside) != disk.names.old:
        why = f"its old overlay {aside} is gone"
    elif stamps(disk.chain) != disk.below:
        why = "what lies below its old overlay has changed, or is gone"
    elif is_encrypted(disk.chain):
        why = "its old chain is encrypted"
    elif is_written(new):
        why = f"a guest has its new disk {new} open"
    elif is_open(aside):
        why = f"a process has its old overlay {aside} open"
    elif not disk.names.in_place and lease_of(disk.names.target):
        why = f"its lease has followed it to {disk.names.target}, and does not come back"
    elif is_named_as_backing(aside) or is_listed(aside, disk):
        why = f"another image reads through its old overlay {aside}"
    if why:
        raise Refused(f"{disk.name}: {why}", "It stays on its new disk; nothing was changed.")


def _new_file(disk: DiskIntent) -> Path:
    """The new disk, by the name that the next boot opens."""
    return disk.names.path if disk.names.in_place else disk.names.target


async def go_back(course: Course, index: int, disk: DiskIntent) -> None:
    """Bring the old chain up to date, and have the next boot open it.

    Raises `Refused` when somebody has the new disk, and `NoSpace` or `JobFailed` before anything
    has changed but the old overlay.
    """
    try:
        with kept_from_writers(_new_file(disk)):
            same = await _bring_up_to_date(course, disk)
            course.save(course.intent.with_disk(index, replace(disk, verdict=Verdict(same))))
            await asyncio.to_thread(course.leases.announce, disk, disk.names.old)
            _name_new(disk)
            disk.names.put_back()
            if course.intent.domain:
                await name(course, disk, disk.chain.active.file)
    except BlockingIOError as error:
        why = f"{disk.name}: somebody has {_new_file(disk)} open to write"
        raise Refused(why, "Shut the guest down.") from error


def _name_new(disk: DiskIntent) -> None:
    if disk.names.in_place:
        with suppress(FileExistsError):
            os.link(disk.names.path, undone_file(disk))
        sync(disk.names.path.parent)


async def tidy(course: Course) -> None:
    """Remove the names that were the old overlay's and the new disk's while it was away."""
    for disk in course.intent.disks:
        disk.names.withdraw()
        if disk.names.in_place:
            disk.names.target.unlink(missing_ok=True)
        await asyncio.to_thread(course.leases.put_on_readers, disk)
        course.report(disk).duration_s = time.monotonic() - course.began
    course.save(replace(course.intent, tidied=True))


async def _bring_up_to_date(course: Course, disk: DiskIntent) -> int:
    """Write into the old overlay where it differs from the new disk, and compare; the bytes that
    are the same.
    """
    active, aside, new = disk.chain.active, disk.names.aside, _new_file(disk)
    delta = disk.names.path.with_name(f"{disk.names.path.name}.part-{course.id}.delta")
    form = disk.geometry.format
    pace = course.paces[disk.node] = Pace(course.intent.choices.speed)
    found = await images.info(replace(active, file=new, format=form))
    size = int(found["virtual-size"])
    delta.unlink(missing_ok=True)
    try:
        await images.create(delta, "qcow2", "compat=1.1", size, Backing(new, form))
        tell = _teller(course, disk, "compare", size)
        await images.rebase(delta, Backing(aside, active.format), pace=pace, report=tell)
        copied = delta.stat().st_blocks * 512
        tell = _teller(course, disk, "copy back", copied)
        await images.commit(delta, aside, active.format, pace=pace, report=tell)
    finally:
        delta.unlink(missing_ok=True)
    await asyncio.to_thread(sync, aside)
    if different := await images.differ(old_chain(disk), new, form):
        raise JobFailed(f"{disk.name}: its old chain is not what {new} is: {different}")
    course.report(disk).mirrored_bytes = copied
    return size


def _teller(course: Course, disk: DiskIntent, phase: str, total: int) -> Callable[[float], None]:
    began = time.monotonic()

    def tell(percent: float) -> None:
        done = int(total * percent / 100)
        course.tell(disk.name, phase, Progress(done, total, time.monotonic() - began))

    return tell
