"""Verification: a mirror's old chain and its new disk are proven to show the same bytes.

As of the switchover's instant, and while the guest writes on: it stands still for the switchover,
and before it goes on a view of its new disk is taken (`promoter.guests.fleecing`; of a domain,
libvirt's backup in pull mode, which nobody else can have meanwhile). The old chain
does not change any more, so ``qemu-img compare`` of the two proves that the switchover lost and
damaged nothing. Until then the old chain is kept, and after a difference for good.

A view that was not taken in a guest that stood still proves nothing: then the verdict says why
there is none. What a kill leaves of a view is found by its names, and used or removed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from promoter.blockjob import Progress
from promoter.chain import Image
from promoter.errors import Different, PromoterError
from promoter.guests.base import CommandFailed, ConnectionLost, Domain, Guest, PlainGuest, ViewSpec
from promoter.operations.move import DiskIntent, Move, Verdict
from promoter.storage import images
from promoter.storage.images import Backing
from promoter.storage.pace import Pace

T = TypeVar("T")
NOT_TAKEN = "the guest did not stand still at the switchover, or promoter was interrupted in it"
MOST_TOLD = 20
GONE = "the guest went away before the comparison was done"


def view_of(disk: DiskIntent) -> ViewSpec:
    """What plain QEMU is told of a disk's view."""
    filtered = disk.root != disk.chain.active.node
    return ViewSpec(
        mark=disk.mark,
        device=disk.key if disk.key.startswith("/") else f"/machine/peripheral/{disk.key}",
        node=disk.root if filtered else disk.node,
        scratch=disk.part.with_name(f"{disk.part.name}.scratch"),
        layered=disk.kept > 0,
    )


async def prepare(guest: PlainGuest, disks: Sequence[DiskIntent]) -> None:
    """Have all that views need, before the guest stands still. Repeatable.

    Raises `CommandFailed` when this QEMU cannot.
    """
    with _listening() as (listening, _):
        await guest.try_to_serve(listening.fileno())
    for disk in disks:
        spec = view_of(disk)
        await guest.end_view(spec)
        spec.scratch.unlink(missing_ok=True)
        await images.create(spec.scratch, "qcow2", "compat=1.1", disk.virtual_size)
        _give(spec.scratch, disk.names.target)
        try:
            await guest.prepare_view(spec)
        finally:
            spec.scratch.unlink()  # QEMU has it open; a kill leaves nothing


def _give(file: Path, like: Path) -> None:
    """Who may open the new disk may open this one."""
    found = like.stat()
    with suppress(PermissionError):
        os.chown(file, found.st_uid, found.st_gid)
    file.chmod(found.st_mode & 0o777)


async def take(guest: PlainGuest, disks: Sequence[DiskIntent]) -> str:
    """Take the views of disks that have just switched; why that proves nothing, if it does not."""
    try:
        for disk in disks:
            await guest.take_view(view_of(disk))
    except CommandFailed as error:
        return error.message
    return "somebody continued the guest" if await guest.status() == "running" else ""


def taken(disk: DiskIntent, why_not: str) -> DiskIntent:
    """The disk after that."""
    if why_not:
        return replace(disk, verdict=Verdict(unproven=why_not))
    return replace(disk, viewed=True)


async def end(guest: Guest, disk: DiskIntent) -> None:
    """Leave nothing of the disk's view; a domain's are ended together."""
    if isinstance(guest, PlainGuest):
        await guest.end_view(view_of(disk))
    if isinstance(guest, Domain) and await guest.view(view_of(disk).scratch):
        await guest.end_view()


async def verify(
    guest: Guest, disk: DiskIntent, pace: Pace, report: Callable[[Progress], None]
) -> Verdict:
    """Compare; the verdict. Raises `ConnectionLost` when the guest goes away meanwhile."""
    if not disk.viewed:
        return Verdict(unproven=NOT_TAKEN)
    try:
        async with _shown(guest, disk) as view:
            if view is None:
                return Verdict(unproven=GONE)
            return await _compare(guest, disk, view, pace, report)
    except ConnectionLost:
        raise
    except PromoterError as error:
        return Verdict(unproven=error.message)


@asynccontextmanager
async def _shown(guest: Guest, disk: DiskIntent) -> AsyncIterator[tuple[str, str] | None]:
    """The disk's view, as qemu-img is told of it, and what of it is there only as long as the view
    has not ended; None when there is none.
    """
    spec = view_of(disk)
    if isinstance(guest, Domain):
        served = await guest.view(spec.scratch)
        yield (images.nbd(served, disk.name),) * 2 if served else None
    elif isinstance(guest, PlainGuest) and await guest.has_view(spec):
        with _listening() as (listening, path):
            await guest.show_view(spec, listening.fileno())
            yield images.nbd(path, spec.whole), images.nbd(path, spec.export)
    else:
        yield None


async def _compare(
    guest: Guest,
    disk: DiskIntent,
    view: tuple[str, str],
    pace: Pace,
    report: Callable[[Progress], None],
) -> Verdict:
    began = time.monotonic()

    def tell(percent: float) -> None:
        done = int(disk.virtual_size * percent / 100)
        report(Progress(done, disk.virtual_size, time.monotonic() - began))

    whole, sure = view
    found = await _while_there(guest, images.compare(old_chain(disk), whole, pace, tell))
    await _while_there(guest, images.read_a_little(sure))
    if not found:
        return Verdict(same=disk.virtual_size)
    return Verdict(difference=found + await _while_there(guest, _where(disk, whole, pace)))


async def _where(disk: DiskIntent, view: str, pace: Pace) -> str:
    """All the places where old chain and view differ, or why they are not known."""
    old = Backing(disk.names.aside, disk.chain.active.format)
    scratch = disk.part.with_name(f"{disk.part.name}.delta")
    try:
        places = await images.where_they_differ(old, view, disk.virtual_size, scratch, pace)
    except ConnectionLost:
        raise
    except PromoterError as error:
        return f" (where else is not known: {error.message})"
    total = sum(map(len, places))
    told = ", ".join(f"{place.start:#x} to {place.stop:#x}" for place in places[:MOST_TOLD])
    more = f" and {len(places) - MOST_TOLD} more" if len(places) > MOST_TOLD else ""
    return f" In all {total:,} bytes, by clusters: {told}{more}"


async def _while_there(guest: Guest, work: Coroutine[None, None, T]) -> T:
    """Given up when the guest goes away."""
    working = asyncio.create_task(work, name="compare")
    gone = asyncio.create_task(guest.gone(), name="guest gone")
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise ConnectionLost(f"{guest.name}: the monitor closed")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def old_chain(disk: DiskIntent) -> tuple[Image, ...]:
    """The layers that the disk had, by the names that they have since the switchover."""
    active, *below = disk.chain.images
    return (replace(active, file=disk.names.aside), *below)


def cost(disk: DiskIntent) -> int:
    """The bytes that a comparison reads at most: the old chain's, and as much of the new disk."""
    allocated = sum(image.allocated for image in disk.chain)
    return 2 * min(allocated, disk.virtual_size)


@contextmanager
def _listening() -> Iterator[tuple[socket.socket, Path]]:
    """A socket that only we can find. QEMU gets it opened, whoever it runs as."""
    with (
        tempfile.TemporaryDirectory(prefix="promoter-", dir="/tmp") as directory,
        socket.socket(socket.AF_UNIX) as listening,
    ):
        path = Path(directory) / "nbd"
        listening.bind(str(path))
        listening.listen(1)
        yield listening, path


def difference_of(intent: Move) -> Different | None:
    """The error of disks that are not what they were."""
    verdicts = [(disk, disk.verdict) for disk in intent.disks if disk.verdict]
    found = [(disk, verdict.difference) for disk, verdict in verdicts if verdict.difference]
    if not found:
        return None
    return Different(
        "; ".join(f"{disk.name}: verification: {difference}" for disk, difference in found),
        "The guest stays on its new disk, which has its writes since the switchover: "
        + ", ".join(f"{_new(disk)}; its old one as of then is {_old(disk)}" for disk, _ in found)
        + ". Nothing is removed. Save both before the guest is stopped.",
    )


def _new(disk: DiskIntent) -> Path:
    return disk.names.path if disk.names.in_place else disk.names.target


def _old(disk: DiskIntent) -> Path:
    return disk.names.aside
