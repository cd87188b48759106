"""The plan: what a promotion will do and what it costs, or why not (`preflight`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from promoter.chain import BackingChain, Disk, DiskOptions, FileStamp, Image
from promoter.errors import Refused
from promoter.guests.base import Domain, Guest, GuestView
from promoter.guests.bugs import loses_writes_at_start, unmaps_wrongly
from promoter.operations.preflight import (
    check_chain,
    check_clone,
    check_copy,
    check_device,
    check_directory,
    check_domain,
    check_guest,
    check_in_place,
    check_names,
    check_raw,
    check_space,
    check_start,
    check_targets,
    check_throttles,
    is_encrypted,
    is_local,
    select_disks,
)
from promoter.operations.promotion import Choices, DiskIntent, DomainAddress, Kind, Promotion, Way
from promoter.storage import images
from promoter.storage.files import file_id, free_bytes, stamp
from promoter.storage.names import Names, boot_name
from promoter.storage.seed import (
    LEAST_EXTENDED,
    Geometry,
    Preallocation,
    SeedMethod,
    can_merge,
    can_reflink,
    copies_only_data,
)

DEFAULT_CLUSTER = 64 * 1024
PlanDisk = Callable[[Guest, GuestView, Disk, Choices, str, int], Awaitable[DiskIntent | None]]


@dataclass(frozen=True)
class Plan:
    """What would be done; ``nothing_to_do`` names disks that are full clones already.

    ``free`` has the free bytes at each disk's target.
    """

    promotion: Promotion
    free: tuple[int, ...]
    nothing_to_do: tuple[str, ...]
    warnings: tuple[str, ...]


async def plan(guest: Guest, identity: str, choices: Choices) -> Plan:
    """Plan a promotion. Raises `Refused` with the reason, or `Unreachable`."""
    return await make_plan(guest, identity, Kind.PROMOTE, choices, _check, plan_disk)


async def make_plan(
    guest: Guest,
    identity: str,
    kind: Kind,
    choices: Choices,
    check: Callable[[GuestView, list[Disk], Choices], None],
    plan_one: PlanDisk,
) -> Plan:
    """Plan an operation: ``check`` the guest, then ``plan_one`` disk after the other."""
    view = await guest.look()
    check_guest(view, guest.name)
    disks = select_disks(view, choices.disks)
    check(view, disks, choices)
    intents: list[DiskIntent] = []
    for disk in disks:
        intent = await plan_one(guest, view, disk, choices, identity, len(intents))
        intents += [intent] if intent else []
    if intents and isinstance(guest, Domain):
        await check_domain(guest, view)
    check_targets(intents)
    check_space(intents)
    address = DomainAddress(guest.uri, guest.uuid) if isinstance(guest, Domain) else None
    changed = {intent.key for intent in intents}
    return Plan(
        Promotion(identity, guest.name, choices, tuple(intents), domain=address, kind=kind),
        free=tuple(free_bytes(intent.names.target.parent) for intent in intents),
        nothing_to_do=tuple(disk.name for disk in disks if disk.key not in changed),
        warnings=(
            *_bugs(view, [disk for disk in disks if disk.key in changed]),
            *(warning for intent in intents for warning in _warnings(intent)),
        ),
    )


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
    copy = await guest.copy(disk.name) if choices.adopt and isinstance(guest, Domain) else None
    if copy:
        check_copy(disk, copy, view)
        choices = replace(choices, target=copy.file, format=copy.format, seed=SeedMethod.NONE)
    check_clone(disk, choices.lose, adopted=copy is not None)
    await check_chain(guest, disk)
    names = choose_names(disk, choices, identity, adopted=copy is not None)
    geometry = choose_layout(disk.chain, choices)
    below = disk.chain.below
    if why := _why_no_seed(disk):
        method = _no_seed(choices, why)
    else:
        method, geometry = await asyncio.to_thread(_method, below, choices, geometry, names.target)
    full = 0 if copy else await full_size(disk.chain, geometry)
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
        method=method,
        geometry=geometry,
        required=_new_size(disk.chain, full) if method is SeedMethod.REFLINK else full,
    )


async def full_size(chain: BackingChain, geometry: Geometry) -> int:
    """The most bytes that the new disk can take at first."""
    whole = chain.active.virtual_size
    allocated = geometry.preallocation in (Preallocation.FALLOC, Preallocation.FULL)
    if is_encrypted(chain) or not is_local(chain):  # only QEMU can read it
        return whole
    measured = await images.measure(chain.images, geometry.format, geometry.options)
    return max(measured, whole) if allocated else measured


def _new_size(chain: BackingChain, full: int) -> int:
    """What is left of the full size when the lowest layer is shared and the rest written to it."""
    *upper, base = chain
    return max(full - base.allocated, sum(image.allocated for image in upper))


def options_for(disk: Disk, view: GuestView) -> DiskOptions:
    """The new disk's: as the old one's, but nothing that this QEMU does wrong meanwhile."""
    if disk.options.detect_zeroes == "unmap" and unmaps_wrongly(view.version):
        return replace(disk.options, detect_zeroes="on")
    return disk.options


def choose_names(disk: Disk, choices: Choices, identity: str, *, adopted: bool = False) -> Names:
    old = boot_name(file_of(disk.chain.active).resolve())
    elsewhere = choices.target or choices.target_dir
    in_place = not (elsewhere or disk.libvirt)
    is_device = old.is_block_device()
    if is_device:
        check_device(disk, bool(elsewhere))
    if choices.target:
        target = choices.target.absolute()
    elif choices.target_dir:
        target = choices.target_dir.absolute() / old.name
    elif disk.libvirt:
        target = old.with_name(f"{old.stem}.promoted-{identity}.{choices.format}")
    else:
        check_in_place(disk, choices.format)
        target = old.with_name(f"{old.name}.new-{identity}")
    overlay = file_id(old)
    assert overlay, f"{old}: checked to be there"
    for directory in {target.parent} if is_device else {old.parent, target.parent}:
        check_directory(directory)
    if os.path.lexists(target) and not adopted:
        same = target.exists() and stamp(target) == stamp(old)
        why = "is the disk itself" if same else "exists"
        raise Refused(f"target {target} {why}", "Choose another --target, or move it away.")
    names = Names(
        old=overlay,
        path=old,
        target=target,
        aside=old if is_device else old.with_name(f"{old.name}.aside-{identity}"),
        prepared=old.with_name(f"{old.name}.next-{identity}"),
        in_place=in_place,
        defined=disk.libvirt is not None,
        stays=is_device,
    )
    check_names(names, target.with_name(f"{target.name}.part-{identity}.delta"))
    return names


def choose_layout(chain: BackingChain, choices: Choices) -> Geometry:
    active = chain.active
    extended = active.extended_l2 if choices.extended_l2 is None else choices.extended_l2
    cluster = choices.cluster_size or active.cluster_size or DEFAULT_CLUSTER
    if extended and not choices.cluster_size:
        cluster = max(cluster, LEAST_EXTENDED)
    return Geometry(choices.format, cluster, extended, choices.preallocation)


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


def _bugs(view: GuestView, disks: list[Disk]) -> Iterator[str]:
    version = ".".join(map(str, view.version))
    if loses_writes_at_start(view.version) and view.status == "running":
        yield (
            f"QEMU {version} can lose writes while a mirror starts:"
            " the guest will stand still for each start, as a rule for milliseconds"
        )
    for disk in disks:
        if options_for(disk, view) != disk.options:
            yield (
                f"{disk.name}: QEMU {version} can lose writes with detect-zeroes=unmap:"
                " the new disk has detect-zeroes=on until the guest's next boot"
            )


def _warnings(intent: DiskIntent) -> list[str]:
    warnings = []
    if intent.way in (Way.SNAPSHOT, Way.COMMIT_BELOW):
        return []
    if bitmaps := {name for image in intent.chain for name in image.bitmaps}:
        known = f"{intent.name}: dirty bitmaps ({', '.join(sorted(bitmaps))})"
        warnings.append(
            f"{known} go to the new disk: incremental backups go on"
            if intent.names.defined and intent.geometry.format == "qcow2"
            else f"{known} stay behind: the next incremental backup must be a full one"
        )
    if is_encrypted(intent.chain):
        warnings.append(f"{intent.name}: the new disk is in clear text")
    if snapshots := intent.chain.active.snapshots:
        warnings.append(
            f"{intent.name}: internal snapshots stay in the old overlay: {', '.join(snapshots)}"
        )
    if intent.options.discard == "unmap":
        warnings.append(
            f"{intent.name}: QEMU drops the guest's discards while it mirrors:"
            " run fstrim in the guest afterwards"
        )
    if intent.method is SeedMethod.REFLINK:
        warnings.append(
            f"{intent.name}: the new disk shares its extents with the base;"
            " writing to them later takes space that is not reserved now"
        )
    return warnings


def file_of(image: Image) -> Path:
    assert image.file, f"{image.node}: checked to be a local file"
    return image.file


def same_files(intent: DiskIntent, disk: Disk) -> bool:
    """Is the chain still the one that was planned and seeded: files, order, contents, size?

    A commit's own job writes to what lies below, and QEMU's locks keep others from it.
    """
    active = stamp(file_of(disk.chain.active))
    below = stamps(disk.chain)
    return (
        (active and active.id) == intent.names.old
        and disk.chain.active.virtual_size == intent.virtual_size
        and [file.id for file in below] == [file.id for file in intent.below]
        and (intent.commits or below == intent.below)
    )


def stamps(chain: BackingChain) -> tuple[FileStamp, ...]:
    """The files under the active layer; one that is missing makes the tuple shorter."""
    files = (file for image in chain.below for file in image.files)
    return tuple(found for file in files if (found := stamp(file)))
