"""Snapshot: all the disks of a guest freeze at one instant, and go on in overlays above.

The path that a plain guest's command line names leads to the overlay from then on, and the
frozen layer has a name that says when it was frozen: whoever boots the guest again opens what it
wrote last. A domain's overlay has the new name, and libvirt's definition names it.

Source: QAPI ``transaction`` of ``blockdev-snapshot``; libvirt's ``virDomainSnapshotCreateXML``.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from promoter.chain import Disk
from promoter.errors import Refused
from promoter.guests.base import Guest, GuestView
from promoter.operations import quiesce
from promoter.operations.move import Choices, DiskIntent, Kind, Way
from promoter.operations.plan import (
    Plan,
    choose_layout,
    file_of,
    make_plan,
    options_for,
    stamps,
)
from promoter.operations.preflight import (
    check_chain,
    check_directory,
    check_idle,
    check_in_place,
    check_local,
    check_names,
    check_pause,
)
from promoter.storage.files import file_id
from promoter.storage.names import Names, boot_name
from promoter.storage.seed import SeedMethod

ROOM = 1 << 20
"""Bytes that an empty overlay may take."""
DELTA = re.compile(r"\.delta-[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}$")


async def plan(guest: Guest, identity: str, choices: Choices, state: Path) -> Plan:
    """Plan a snapshot. Raises `Refused` with the reason, or `Unreachable`."""
    made = await make_plan(guest, identity, Kind.SNAPSHOT, choices, state, _check, _plan_disk)
    if choices.quiesce:
        await quiesce.check(guest)
    return made


def _check(view: GuestView, _disks: list[Disk], _choices: Choices) -> None:
    check_pause(view)


async def _plan_disk(
    guest: Guest, view: GuestView, disk: Disk, choices: Choices, identity: str, index: int
) -> DiskIntent:
    check_idle(disk)
    check_local(disk)
    await check_chain(guest, disk)
    if not disk.libvirt:
        check_in_place(disk, disk.chain.active.format)
    return DiskIntent(
        mark=f"promoter-{identity}-{index}",
        index=index,
        key=disk.key,
        name=disk.name,
        root=disk.node,
        chain=disk.chain,
        below=stamps(disk.chain),
        options=options_for(disk, view),
        names=_names(disk, identity),
        method=SeedMethod.NONE,
        geometry=choose_layout(disk.chain, choices),
        required=ROOM,
        way=Way.SNAPSHOT,
    )


def _names(disk: Disk, identity: str) -> Names:
    path = boot_name(file_of(disk.chain.active).resolve())
    frozen = file_id(path)
    assert frozen, f"{path}: checked to be there"
    check_directory(path.parent)
    now = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{identity}"
    names = Names(
        old=frozen,
        path=path,
        target=_overlay(path, now)
        if disk.libvirt
        else path.with_name(f"{path.name}.new-{identity}"),
        aside=path if disk.libvirt else path.with_name(f"{path.name}.snapshot-{now}"),
        prepared=path.with_name(f"{path.name}.next-{identity}"),
        in_place=disk.libvirt is None,
        defined=disk.libvirt is not None,
    )
    check_names(names)
    for name in {names.target, names.aside} - {path}:
        if name.exists():
            raise Refused(f"{name} exists", "Try again, or move it away.")
    return names


def _overlay(path: Path, now: str) -> Path:
    """A name that sorts by time behind the first layer's, whose name it begins with."""
    return path.with_name(f"{DELTA.sub('', path.stem)}.delta-{now}.qcow2")
