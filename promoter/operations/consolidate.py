"""Consolidate: the deltas that snapshots left behind are merged, while the guest writes.

By default into the lowest layer that nobody else reads through, by one commit for the whole
range, so that each cluster is copied once whatever the number of layers; or, ``beside``, into a
new disk, by a mirror, above the layers that are shared. Here it is planned; `move.decide`
and `moving` do it, as they do a promotion.

Source: US 10956041 B2: the target is a disk of the chain, the delta is copied to it in a single
iteration; QAPI ``block-commit``, libvirt's ``virDomainBlockCommit``.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from promoter.chain import BackingChain, Disk, Image
from promoter.errors import Refused
from promoter.guests.base import Guest, GuestView
from promoter.operations.leases import registered
from promoter.operations.move import Choices, DiskIntent, Kind, Old, Way
from promoter.operations.plan import (
    Plan,
    choose_layout,
    choose_names,
    file_of,
    full_size,
    make_plan,
    options_for,
    stamps,
)
from promoter.operations.preflight import (
    check_chain,
    check_idle,
    check_in_place,
    check_local,
    check_names,
    check_pause,
    check_start,
)
from promoter.operations.snapshot import DELTA
from promoter.storage.files import file_id, stamp
from promoter.storage.names import SPARE, Names, boot_name, merged_name
from promoter.storage.seed import Geometry, SeedMethod
from promoter.storage.siblings import Siblings, find_siblings


async def plan(guest: Guest, identity: str, choices: Choices, state: Path) -> Plan:
    """Plan a consolidation. Raises `Refused` with the reason, or `Unreachable`."""
    return await make_plan(guest, identity, Kind.CONSOLIDATE, choices, state, _check, _plan_disk)


def _check(view: GuestView, disks: list[Disk], choices: Choices) -> None:
    layered = [disk for disk in disks if len(disk.chain) > 1]
    if choices.target and len(layered) > 1:
        raise Refused(
            "--target names one file, but several disks would be consolidated",
            "Name one disk, or give --target-dir.",
        )
    if layered:
        check_start(view)


async def _plan_disk(
    guest: Guest, view: GuestView, disk: Disk, choices: Choices, identity: str, index: int
) -> DiskIntent | None:
    """Plan one disk; None when there is nothing to merge."""
    if len(disk.chain) == 1:
        return None
    check_idle(disk)
    check_local(disk)
    await check_chain(guest, disk)
    assert guest.pid, "its files were checked to be here"
    listed = await asyncio.to_thread(registered, view.disks)
    siblings = await asyncio.to_thread(find_siblings, view.disks, guest.pid, choices.scan, listed)
    into = _into(disk, choices, siblings)
    if into is None:
        return None
    top = _position(disk, choices.top, "top") if choices.top else 0
    if top >= into:
        raise Refused(
            f"{disk.name}: the top, {file_of(disk.chain.images[top])}, is not above the base,"
            f" {file_of(disk.chain.images[into])}",
            "See its layers: promoter chain",
        )
    _check_contents(disk, disk.chain.images[top : into + 1])
    if choices.beside:
        if choices.old is Old.DELETE:
            _check_unread(disk, disk.chain.images[: into + 1], siblings)
        return await _beside(view, disk, choices, identity, index, into)
    _check_target(disk, disk.chain.images[into], siblings)
    if top:
        _check_flushed(disk, disk.chain.images[into])
    else:
        _check_switchover(view, disk)
    return _commit(disk, choices, identity, index, top, into)


def _into(disk: Disk, choices: Choices, siblings: Siblings) -> int | None:
    """Which layer is merged into, None if there is none that only this guest reads.

    The lowest layer of all may be the base of clones that cannot be seen from here. It is taken
    only if it is named, or if promoter itself has frozen it: then it was this guest's disk.
    """
    if choices.base:
        return _position(disk, choices.base, "base")
    own = [i for i, image in enumerate(disk.chain) if i and not siblings.of(disk, image)]
    lowest = len(disk.chain) - 1
    return max((i for i in own if i < lowest or _is_frozen(disk, i)), default=None)


def _is_frozen(disk: Disk, layer: int) -> bool:
    """Was it the guest's active layer until promoter took a snapshot?"""
    file, above = (file_of(disk.chain.images[i]) for i in (layer, layer - 1))
    return bool(SPARE.fullmatch(file.name) or DELTA.search(above.stem))


def _position(disk: Disk, names: tuple[str, ...], what: str) -> int:
    """The layer that has one of the names: its file, that file's name, or its node-name."""
    for index, image in enumerate(disk.chain):
        file = file_of(image)
        if {image.node, file.name} & {*names} or file in map(Path.absolute, map(Path, names)):
            return index
    layers = ", ".join(file_of(image).name for image in disk.chain)
    raise Refused(
        f"{disk.name}: {what} {' or '.join(names)} is not in its chain",
        f"Its layers are: {layers}.",
    )


def _check_contents(disk: Disk, layers: tuple[Image, ...]) -> None:
    for image in layers:
        if image.snapshots:
            raise Refused(
                f"{disk.name}: {image.file} holds internal snapshots: {', '.join(image.snapshots)}",
                "They would not be of its contents any more. Delete them first (qemu-img"
                " snapshot -d, delvm).",
            )
        if image.encrypted:
            raise Refused(
                f"{disk.name}: {image.file} is encrypted",
                "Its data could come to lie in clear text. Promote it: --lose encryption",
            )


def _check_unread(disk: Disk, layers: tuple[Image, ...], siblings: Siblings) -> None:
    for image in layers:
        if others := siblings.of(disk, image):
            raise Refused(
                f"{disk.name}: {image.file} is read by others too: {'; '.join(map(str, others))}",
                "It cannot be deleted: leave out --old delete.",
            )


def _check_target(disk: Disk, target: Image, siblings: Siblings) -> None:
    file = file_of(target)
    if others := siblings.of(disk, target):
        raise Refused(
            f"{disk.name}: {file} is read by others too: {'; '.join(map(str, others))}",
            "Writing to it would corrupt them. Merge into a layer above it (--base), or onto a"
            " new disk (--beside).",
        )
    if target.virtual_size > disk.chain.active.virtual_size:
        raise Refused(
            f"{disk.name}: {file} is larger than the disk",
            "The guest would see its disk grow. Use --beside, or resize the disk first.",
        )


def _check_flushed(disk: Disk, target: Image) -> None:
    """Will what is merged below the active layer be on stable storage?

    QEMU flushes it only as it makes the target read-only again.
    """
    if target.writable:
        raise Refused(
            f"{disk.name}: QEMU has {target.file} open for writing, and would not flush what is"
            " merged into it: a crash could lose it",
            "Use --beside, or boot the guest with read-only=on for its backing layers.",
        )


def _check_switchover(view: GuestView, disk: Disk) -> None:
    check_pause(view)
    if disk.node != disk.chain.active.node:
        raise Refused(
            f"{disk.name}: a throttle filter lies above its image, which the commit would remove",
            "Use --beside, or throttle with -drive or the device instead.",
        )


def _commit(
    disk: Disk, choices: Choices, identity: str, index: int, top: int, into: int
) -> DiskIntent:
    target = disk.chain.images[into]
    names = _names(disk, identity, file_of(target), below=bool(top))
    if not (top or disk.libvirt):
        check_in_place(disk, target.format)
        _check_place(disk, names)
    check_names(names)
    return DiskIntent(
        mark=f"promoter-{identity}-{index}",
        index=index,
        key=disk.key,
        name=disk.name,
        root=disk.node,
        chain=disk.chain,
        below=stamps(disk.chain),
        options=disk.options,
        names=names,
        seeded=stamp(file_of(target)),
        method=SeedMethod.NONE,
        geometry=Geometry(target.format),
        required=sum(image.allocated for image in disk.chain.images[top:into]),
        way=Way.COMMIT_BELOW if top else Way.COMMIT,
        top=top,
        into=into,
    )


def _check_place(disk: Disk, names: Names) -> None:
    """Can the target take the path by a link?"""
    if names.target.is_symlink() or names.target.resolve().parent != names.path.resolve().parent:
        raise Refused(
            f"{disk.name}: {names.target} is not in the directory of {names.path}, whose name it"
            " would take",
            "Use --beside.",
        )


def _names(disk: Disk, identity: str, target: Path, *, below: bool) -> Names:
    path = boot_name(file_of(disk.chain.active))
    overlay = file_id(path)
    assert overlay, f"{path}: checked to be there"
    return Names(
        old=overlay,
        path=path,
        target=target,
        aside=path if below else merged_name(path, identity),
        prepared=path.with_name(f"{path.name}.next-{identity}"),
        in_place=not (below or disk.libvirt),
        defined=disk.libvirt is not None,
    )


async def _beside(
    view: GuestView, disk: Disk, choices: Choices, identity: str, index: int, into: int
) -> DiskIntent:
    names = choose_names(disk, choices, identity)
    layout = choose_layout(disk.chain, choices)
    merged = BackingChain(disk.chain.images[: into + 1])
    return DiskIntent(
        mark=f"promoter-{identity}-{index}",
        index=index,
        key=disk.key,
        name=disk.name,
        root=disk.node,
        chain=disk.chain,
        below=stamps(disk.chain),
        options=options_for(disk, view),
        names=names,
        method=SeedMethod.CONVERT if into else SeedMethod.NONE,
        geometry=layout,
        required=min(sum(image.allocated for image in merged), await full_size(disk.chain, layout)),
        kept=len(disk.chain) - into - 1,
    )
