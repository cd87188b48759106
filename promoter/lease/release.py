"""How an owner lets go of a disk in a running QEMU. Nothing here touches the lease.

After an error the guest may still have the disk, or lose it later: only `closed_in` and free
lock bytes say that it is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from promoter.chain import Disk
from promoter.errors import Refused
from promoter.guests.base import GuestView, NodeSpec
from promoter.guests.qmp import QmpGuest
from promoter.storage.files import stamp

IO_ERROR = "io-error"  # QAPI's RunState: stopped by werror or rerror


class DiskBusy(Refused):
    """A block job works on the disk."""


async def shut_down(monitor: Path) -> None:
    """Press the guest's power button."""
    guest = await QmpGuest.connect(monitor)
    try:
        await guest.power_down()
    finally:
        await guest.close()


async def detach(monitor: Path, file: Path) -> bool:
    """Take the disk out of the running guest, then close it; is it closed?

    virtio-scsi gives it up at once; virtio-blk when the guest agrees. Raises `DiskBusy` while a
    block job works on it.
    """
    guest = await QmpGuest.connect(monitor)
    try:
        view = await guest.look()
        for disk in (disk for disk in view.disks if _is_on(disk, file)):
            if disk.jobs:
                raise DiskBusy(f"job {', '.join(disk.jobs)} works on it", "Ask again later.")
            await guest.unplug(_device_path(disk))
            for node in _nodes(disk):
                await guest.drop(node)
        return closed_in(await guest.files(), file)
    finally:
        await guest.close()


@dataclass(frozen=True)
class Loan:
    """A disk that is lent out of a running guest: what its device has meanwhile, and how it is
    opened again. ``device`` is a QOM path, ``size`` is in bytes.
    """

    device: str
    placeholder: str
    size: int
    nodes: tuple[str, ...]
    disk: NodeSpec


async def lend(monitor: Path, file: Path, identity: str, begins: Callable[[Loan], None]) -> bool:
    """Close the disk behind its device, and have the guest wait when it touches it; is it closed?

    Raises `DiskBusy` while a block job works on it, and `Refused` where it could not be given
    back as it was, or where the guest would see an error. ``begins`` is told before anything is
    changed; from then on, whatever this raises, `take_back` puts things right.
    """
    guest = await QmpGuest.connect(monitor)
    try:
        loan = await _prepare(guest, file, identity)
        begins(loan)
        changing = asyncio.gather(  # in this order: QEMU takes one after the other
            guest.add_erring(loan.placeholder, loan.size),
            guest.put_behind(loan.device, loan.placeholder),
            *(guest.drop(node) for node in loan.nodes),
        )
        _, files = await asyncio.gather(changing, guest.files())
        return closed_in(files, file)
    finally:
        await guest.close()


async def _prepare(guest: QmpGuest, file: Path, identity: str) -> Loan:
    """How the disk is lent."""
    view = await guest.look()
    disks = [disk for disk in view.disks if _is_on(disk, file)]
    if len(disks) != 1:
        raise Refused(f"{len(disks)} devices of the guest have it", "A loan is out of one.")
    disk = disks[0]
    if disk.jobs:
        raise DiskBusy(f"job {', '.join(disk.jobs)} works on it", "Ask again later.")
    device = _device_path(disk)
    errors = await asyncio.gather(guest.get(device, "werror"), guest.get(device, "rerror"))
    if why := _not_lendable(view, disk, errors):
        raise Refused(f"it cannot be lent: {why}", "See docs/lease.md.")
    return _loan(device, disk, file, identity)


def _not_lendable(view: GuestView, disk: Disk, errors: Sequence[str]) -> str:
    """Why the disk cannot be lent, "" if it can."""
    active = disk.chain.active
    reasons = {
        "the guest would see an error: its device needs werror=stop,rerror=stop": (
            set(errors) != {"stop"}
        ),
        "the guest has iothreads": view.iothreads,
        "it is under a filter or throttled": disk.node != active.node or bool(disk.filters),
        "the guest's command line says what lies below it": disk.backing_given,
        "it is encrypted": active.encrypted,
        "its data are in another file": active.data_file is not None,
    }
    return next((why for why, holds in reasons.items() if holds), "")


def _loan(device: str, disk: Disk, file: Path, identity: str) -> Loan:
    active = disk.chain.active
    node = f"promoter-{identity}-lent" if active.node.startswith("#") else active.node
    spec = NodeSpec(
        node,
        file,
        active.format,
        replace(disk.options, discard=disk.options.discard or "ignore"),
        read_only=disk.read_only,
        by_header=True,
    )
    placeholder = f"promoter-{identity}-loan"
    return Loan(device, placeholder, active.virtual_size, tuple(_nodes(disk)), spec)


async def take_back(monitor: Path, loan: Loan) -> None:
    """Give the guest its disk again, and have it go on if it waits. Repeatable.

    Raises `Refused` when what came back is no disk of the same size.
    """
    guest = await QmpGuest.connect(monitor)
    try:
        view = await guest.look()
        if loan.disk.node not in view.nodes:
            await guest.attach(loan.disk)
        if (size := await guest.virtual_size(loan.disk.node)) != loan.size:
            await guest.detach(loan.disk.node)
            raise Refused(
                f"it came back with {size} bytes, lent were {loan.size}",
                "The guest waits for the disk that it lent: put that in its place.",
            )
        if any(_device_path(d) == loan.device and d.node != loan.disk.node for d in view.disks):
            await guest.put_behind(loan.device, loan.disk.node)
        await guest.drop(loan.placeholder)
        if await guest.status() == IO_ERROR:
            await guest.cont()
    finally:
        await guest.close()


def closed_in(files: Collection[str], file: Path) -> bool:
    """Is the file none of those that the guest has open, by any name?"""
    wanted = stamp(file)
    open_files = [stamp(Path(name)) for name in files]
    return not any(found and wanted and found.id == wanted.id for found in open_files)


def _is_on(disk: Disk, file: Path) -> bool:
    active, wanted = disk.chain.active.file, stamp(file)
    found = stamp(active) if active else None
    return bool(found and wanted and found.id == wanted.id)


def _device_path(disk: Disk) -> str:
    """``/machine/peripheral/vd0`` of ``/machine/peripheral/vd0/virtio-backend``, or of vd0."""
    if not disk.key.startswith("/"):
        return f"/machine/peripheral/{disk.key}"
    return "/".join(disk.key.split("/")[:4])


def _nodes(disk: Disk) -> list[str]:
    """The disk's own nodes, from the root down to its file; what lies below it is others'."""
    active = disk.chain.active
    names = [disk.node, *disk.filters, active.node, active.file_node]
    return list(dict.fromkeys(name for name in names if name))
