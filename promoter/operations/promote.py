"""Promote: a running linked clone becomes a full clone. Here it is planned.

How the second base disk is seeded depends on what lies below the active layer: shared (reflink),
copied, converted, or left to the mirror where only the guest's QEMU can read it.

Source: US 10585690 B2, claims 1 to 7; `promoter.operations.moving` does it.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from promoter.chain import BackingChain, Disk, Image
from promoter.errors import Refused
from promoter.guests.base import Domain, Guest, GuestView
from promoter.operations.move import Choices, DiskIntent, Kind
from promoter.operations.plan import (
    Plan,
    choose_layout,
    choose_names,
    file_of,
    full_size,
    make_plan,
    name_remote,
    options_for,
    stamps,
)
from promoter.operations.preflight import (
    check_chain,
    check_clone,
    check_copy,
    check_definition,
    check_raw,
    check_remote,
    check_remote_target,
    check_start,
    check_throttles,
    is_encrypted,
    is_local,
    remote,
)
from promoter.storage.names import Names
from promoter.storage.seed import (
    Geometry,
    Preallocation,
    SeedMethod,
    can_merge,
    can_reflink,
    copies_only_data,
)


async def plan(guest: Guest, identity: str, choices: Choices, state: Path) -> Plan:
    """Plan a promotion. Raises `Refused` with the reason, or `Unreachable`."""
    return await make_plan(guest, identity, Kind.PROMOTE, choices, state, _check, plan_disk)


def _check(view: GuestView, disks: list[Disk], choices: Choices) -> None:
    linked = [disk for disk in disks if len(disk.chain) > 1]
    if choices.target and len(linked) > 1:
        raise Refused(
            "--target names one file, but several disks would be promoted",
            "Name one disk, or give --target-dir.",
        )
    check_throttles(view, linked)
    if linked:
        check_start(view)
    if choices.format == "raw":
        check_raw(view, linked)


async def plan_disk(
    guest: Guest, view: GuestView, disk: Disk, choices: Choices, identity: str, index: int
) -> DiskIntent | None:
    """Plan one disk, None for a full clone. Raises `Refused` with the reason."""
    if len(disk.chain) == 1:
        return None
    domain = remote(guest)
    if domain:
        check_remote(domain, disk, choices)
    copy = await guest.copy(disk.name) if choices.adopt and isinstance(guest, Domain) else None
    if copy:
        check_copy(disk, copy, view)
        choices = replace(choices, target=copy.file, format=copy.format, seed=SeedMethod.NONE)
    check_clone(disk, choices.lose, adopted=copy is not None)
    if domain:
        check_definition(disk)
        names = name_remote(disk, choices, identity)
        await check_remote_target(domain, disk, names.target)
    else:
        await check_chain(guest, disk)
        names = choose_names(disk, choices, identity, adopted=copy is not None)
    geometry = choose_layout(disk.chain, choices)
    below = disk.chain.below
    if names.remote:
        method = SeedMethod.NONE
    elif why := _why_no_seed(disk):
        method = _no_seed(choices, why)
    else:
        method, geometry = await asyncio.to_thread(_method, below, choices, geometry, names.target)
    full = 0 if copy else await _full_size(disk, geometry, names)
    return DiskIntent(
        mark=f"promoter-{identity}-{index}",
        index=index,
        key=disk.key,
        name=disk.name,
        root=disk.node,
        chain=disk.chain,
        below=() if names.remote else stamps(disk.chain),
        options=options_for(disk, view),
        names=names,
        method=method,
        geometry=geometry,
        required=_new_size(disk.chain, full) if method is SeedMethod.REFLINK else full,
    )


async def _full_size(disk: Disk, geometry: Geometry, names: Names) -> int:
    if names.remote:
        return disk.chain.active.virtual_size
    return await full_size(disk.chain, geometry)


def _new_size(chain: BackingChain, full: int) -> int:
    """What is left of the full size when the lowest layer is shared and the rest written to it."""
    *upper, base = chain
    return max(full - base.allocated, sum(image.allocated for image in upper))


def _why_no_seed(disk: Disk) -> str:
    """Why everything must be copied by the mirror, if it must."""
    below = disk.chain.below
    if not is_local(below):
        return "only the guest's QEMU can read a layer below that is not a local file"
    if is_encrypted(below):
        return "only the guest's QEMU has the key of an encrypted layer below"
    if disk.libvirt and any(image.bitmaps for image in below):
        return "libvirt keeps dirty bitmaps of layers below only when it copies those too"
    return ""


def _no_seed(choices: Choices, why: str) -> SeedMethod:
    if choices.seed not in (None, SeedMethod.NONE):
        raise Refused(why, "Use --seed none.")
    return SeedMethod.NONE


def _method(
    below: tuple[Image, ...], choices: Choices, geometry: Geometry, target: Path
) -> tuple[SeedMethod, Geometry]:
    """How to seed, and the geometry that comes of it: a copied file keeps its own."""
    base = below[-1]
    copied = replace(
        geometry,
        cluster_size=base.cluster_size or geometry.cluster_size,
        extended_l2=base.extended_l2,
    )
    fits = copies_only_data(base, geometry) and _fits(copied, choices)
    copyable = fits and len(below) == 1
    reflinks = fits and can_merge(below) and can_reflink(file_of(base), target.parent)
    merged = sum(image.allocated for image in below[:-1])
    match choices.seed:
        case SeedMethod.REFLINK if not reflinks:
            raise Refused(
                f"{base.file} cannot be reflinked to {target.parent}",
                "That needs XFS or btrfs, and layers that hold nothing but data. Use --seed auto.",
            )
        case SeedMethod.COPY if not copyable:
            raise Refused(
                f"a copy of {base.file} would not be the image that is wanted",
                "It would not hold just the guest's data, or have another layout. Use --seed auto.",
            )
        case SeedMethod.REFLINK | SeedMethod.COPY as asked:
            return asked, copied
        case None if reflinks and merged <= base.allocated:
            return SeedMethod.REFLINK, copied
        case None:
            return SeedMethod.CONVERT, geometry
        case asked:
            return asked, geometry


def _fits(copied: Geometry, choices: Choices) -> bool:
    """Has a copy the layout that was asked for, if one was?"""
    return (
        choices.cluster_size in (None, copied.cluster_size)
        and choices.extended_l2 in (None, copied.extended_l2)
        and choices.preallocation is Preallocation.OFF
    )
