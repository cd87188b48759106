"""The plan: what will happen to a guest's disks and what it costs, or why not (`preflight`).

What the operations have in common; each has its own rules in its own module.
"""

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
from promoter.operations.leases import check_leases
from promoter.operations.move import Choices, DiskIntent, DomainAddress, Kind, Move, OnFull, Way
from promoter.operations.preflight import (
    check_device,
    check_directory,
    check_domain,
    check_guest,
    check_in_place,
    check_names,
    check_space,
    check_targets,
    check_verify,
    is_encrypted,
    is_local,
    select_disks,
)
from promoter.storage import images
from promoter.storage.files import file_id, free_bytes, stamp
from promoter.storage.names import Names, boot_name
from promoter.storage.seed import (
    LEAST_EXTENDED,
    Geometry,
    Preallocation,
    SeedMethod,
)

DEFAULT_CLUSTER = 64 * 1024
PlanDisk = Callable[[Guest, GuestView, Disk, Choices, str, int], Awaitable[DiskIntent | None]]


@dataclass(frozen=True)
class Plan:
    """What would be done; ``nothing_to_do`` names disks that are as they should be already.

    ``free`` has the free bytes at each disk's target, None where that cannot be seen.
    """

    move: Move
    free: tuple[int | None, ...]
    nothing_to_do: tuple[str, ...]
    warnings: tuple[str, ...]


async def make_plan(
    guest: Guest,
    identity: str,
    kind: Kind,
    choices: Choices,
    state: Path,
    check: Callable[[GuestView, list[Disk], Choices], None],
    plan_one: PlanDisk,
) -> Plan:
    """Plan an operation: ``check`` the guest, then ``plan_one`` disk after the other.

    ``state`` is the state directory, which says who this host is.
    """
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
    changed = {intent.key for intent in intents}
    for disk in disks if choices.verify else ():
        if disk.key in changed:
            check_verify(guest, view, disk)
    check_targets(intents)
    check_space(intents, views=choices.verify and isinstance(guest, Domain))
    await asyncio.to_thread(check_leases, intents, choices.old, guest.pid, state)
    address = DomainAddress(guest.uri, guest.uuid) if isinstance(guest, Domain) else None
    return Plan(
        Move(identity, guest.name, choices, tuple(intents), domain=address, kind=kind),
        free=tuple(_free(intent) for intent in intents),
        nothing_to_do=tuple(disk.name for disk in disks if disk.key not in changed),
        warnings=(
            *_bugs(kind, view, [disk for disk in disks if disk.key in changed]),
            *(warning for intent in intents for warning in _warnings(intent)),
            *(w for intent in intents for w in _on_full(choices, intent)),
        ),
    )


async def full_size(chain: BackingChain, geometry: Geometry) -> int:
    """The most bytes that the new disk can take at first."""
    whole = chain.active.virtual_size
    allocated = geometry.preallocation in (Preallocation.FALLOC, Preallocation.FULL)
    if is_encrypted(chain) or not is_local(chain):  # only QEMU can read it
        return whole
    measured = await images.measure(chain.images, geometry.format, geometry.options)
    return max(measured, whole) if allocated else measured


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
        target = _beside(old, choices, identity)
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


def name_remote(disk: Disk, choices: Choices, identity: str) -> Names:
    """As `choose_names`, for files of another host: nothing there can be looked at."""
    old = file_of(disk.chain.active)
    if choices.target:
        target = choices.target
    elif choices.target_dir:
        target = choices.target_dir / old.name
    else:
        target = _beside(old, choices, identity)
    return Names(
        old=None,
        path=old,
        target=target,
        aside=old,
        prepared=old,
        in_place=False,
        defined=True,
        stays=True,
    )


def _beside(old: Path, choices: Choices, identity: str) -> Path:
    return old.with_name(f"{old.stem}.promoted-{identity}.{choices.format}")


def choose_layout(chain: BackingChain, choices: Choices) -> Geometry:
    active = chain.active
    extended = active.extended_l2 if choices.extended_l2 is None else choices.extended_l2
    cluster = choices.cluster_size or active.cluster_size or DEFAULT_CLUSTER
    if extended and not choices.cluster_size:
        cluster = max(cluster, LEAST_EXTENDED)
    return Geometry(choices.format, cluster, extended, choices.preallocation)


def _free(intent: DiskIntent) -> int | None:
    return None if intent.names.remote else free_bytes(intent.names.target.parent)


def _bugs(kind: Kind, view: GuestView, disks: list[Disk]) -> Iterator[str]:
    version = ".".join(map(str, view.version))
    copies = kind is not Kind.SNAPSHOT
    if copies and loses_writes_at_start(view.version) and view.status == "running":
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


def _on_full(choices: Choices, intent: DiskIntent) -> Iterator[str]:
    if choices.on_full is OnFull.WAIT and intent.names.defined:
        yield f"{intent.name}: libvirt's copy cannot wait for room: without any it is put back"


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
    if intent.names.remote:
        warnings.append(
            f"{intent.name}: on another host, so all of it is copied by the guest's QEMU, the room"
            f" there is not known, and the old overlay stays {intent.names.path}"
        )
        warnings.append(
            f"{intent.name}: only libvirt flushes the domain's new definition: after a power cut on"
            " that host within seconds of the switchover, see what it boots from first"
        )
        warnings.append(
            f"{intent.name}: if the connection breaks during the switchover, the domain stays"
            " suspended until promoter gets there again"
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
    if intent.names.remote:
        same = [image.file for image in disk.chain] == [image.file for image in intent.chain]
        return same and disk.chain.active.virtual_size == intent.virtual_size
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
