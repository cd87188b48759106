"""How an owner lets go of a disk in a running QEMU. Nothing here touches the lease.

After an error the guest may still have the disk, or lose it later: only `closed_in` and free
lock bytes say that it is closed.
"""

from __future__ import annotations

from pathlib import Path

from promoter.chain import Disk
from promoter.errors import Refused
from promoter.guests.base import GuestView
from promoter.guests.qmp import QmpGuest
from promoter.storage.files import stamp


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
        return closed_in(await guest.look(), file)
    finally:
        await guest.close()


def closed_in(view: GuestView, file: Path) -> bool:
    """Has no node of the guest the file open, by any name?"""
    wanted = stamp(file)
    open_files = [stamp(Path(name)) for name in view.files]
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
