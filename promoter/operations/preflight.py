"""Preflight: every reason not to act, found before the first change.

The checks change nothing. What QEMU has open is compared with what its file
names lead to now, so that a base that was moved, replaced or deleted is
noticed while it can still be refused. They raise `Refused`, or
`Unreachable` for a guest that is going away.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from promoter.chain import Disk, Image
from promoter.errors import Refused, Unreachable
from promoter.guests.base import Domain, Guest, GuestView, PlainGuest, RunningCopy
from promoter.guests.bugs import (
    aborts_on_raw,
    hangs_below_a_filter,
    loses_interrupts,
    loses_writes_at_start,
)
from promoter.operations.move import Choices, DiskIntent, Loss, Old
from promoter.storage import images
from promoter.storage.files import free_bytes, open_files, stamp
from promoter.storage.names import Names
from promoter.storage.seed import Preallocation, SeedMethod

PROMOTABLE = frozenset({"running", "paused", "prelaunch", "suspended"})


def check_guest(view: GuestView, name: str) -> None:
    if view.status == "shutdown":
        raise Unreachable(f"{name} is shutting down", "Start the guest again first.")
    if view.status not in PROMOTABLE:
        raise Refused(f"{name} is in state {view.status}", "Promote it while it runs or is paused.")


def check_start(view: GuestView) -> None:
    """Can a mirror start safely, whether the guest runs meanwhile or stands still?"""
    unsafe = loses_writes_at_start(view.version) and loses_interrupts(view.version)
    if view.status == "running" and view.iothreads and unsafe:
        raise Refused(
            f"QEMU {'.'.join(map(str, view.version))} may lose writes as a mirror starts in a"
            " guest that runs, and with iothreads an interrupt when the guest is paused for that",
            "Use QEMU 10.0.9, 10.2.2 or newer, or boot the guest without iothreads.",
        )


def check_pause(view: GuestView) -> None:
    """Can the guest be stopped for an instant?"""
    if view.status == "running" and view.iothreads and loses_interrupts(view.version):
        raise Refused(
            f"QEMU {'.'.join(map(str, view.version))} may lose an interrupt when a guest with"
            " iothreads is stopped for an instant",
            "Stop the guest yourself, or boot it without iothreads.",
        )


def check_verify(guest: Guest, view: GuestView, disk: Disk) -> None:
    """Can the disk's old chain and its new disk be compared as of the switchover?"""
    version = ".".join(map(str, view.version))
    why = ""
    if guest.pid is None or not is_local(disk.chain):
        why = "a layer is not a file of this host"
    elif is_encrypted(disk.chain):
        why = "only the guest's QEMU has the key of an encrypted layer"
    elif view.iothreads and loses_interrupts(view.version):
        why = f"QEMU {version} may lose an interrupt when a guest with iothreads is stopped for it"
    elif view.iothreads:
        why = f"QEMU {version} can abort when a disk with an iothread is exported or plugged over"
    elif isinstance(guest, PlainGuest) and not disk.device:
        why = "nothing in QEMU's device tree has it, so nothing can be put above it"
    elif isinstance(guest, PlainGuest) and view.status != "running":
        why = "the guest does not run, so that somebody else could continue it too early"
    if why:
        raise Refused(
            f"{disk.name} cannot be verified: {why}",
            "Leave out --verify, or change that for the guest's next boot and do it then.",
        )


async def check_managed_save(domain: Domain) -> None:
    """Will the next start open what the definition says?"""
    if await domain.has_managed_save():
        raise Refused(
            f"{domain.name} has a managed-save image: its next start goes on with these disks",
            f"Remove it: virsh managedsave-remove {domain.name}",
        )


async def check_domain(domain: Domain, view: GuestView) -> None:
    """Will the next start open the new disks, and can the guest be suspended for the switchover?"""
    await check_managed_save(domain)
    if view.status == "running" and view.iothreads and loses_interrupts(view.version):
        raise Refused(
            f"QEMU {'.'.join(map(str, view.version))} may lose an interrupt when a guest with"
            " iothreads is suspended, and libvirt's disks switch safely only in a suspended guest",
            "Run the domain without iothreads, or suspend it yourself (virsh suspend).",
        )


def select_disks(view: GuestView, names: tuple[str, ...]) -> list[Disk]:
    if not names:
        return [disk for disk in view.disks if not disk.read_only]
    found = {name: view.disk(name) for name in names}
    for name, disk in found.items():
        if disk is None:
            known = ", ".join(sorted(d.name for d in view.disks)) or "none"
            raise Refused(f"no such disk: {name}", f"The guest's disks are: {known}.")
    return list(dict.fromkeys(disk for disk in found.values() if disk))


def is_encrypted(chain: Iterable[Image]) -> bool:
    return any(image.encrypted for image in chain)


def is_local(chain: Iterable[Image]) -> bool:
    return all(image.file for image in chain)


def check_idle(disk: Disk, *, adopted: bool = False) -> None:
    """Does nothing but the guest use the disk? A job that is ``adopted`` may."""
    why = ""
    hint = ""
    if disk.jobs and not adopted:
        why = f"a block job runs on it: {', '.join(disk.jobs)}"
        more = " A copy to a whole new disk: --adopt" if disk.libvirt else ""
        hint = f"Wait for it or end it. If it is promoter's: promoter job list.{more}"
    elif disk.filters and not adopted:
        why = f"a filter lies above its image: {', '.join(disk.filters)}"
        hint = "Remove the filter first; a throttle filter may stay."
    elif disk.read_only:
        why = "it is read-only"
        hint = "Only disks that the guest writes to are changed."
    elif disk.other_writers:
        why = "something besides the guest writes to it, such as a writable NBD export"
        hint = "It would go on writing to the old disk. Remove it: block-export-del"
    if why:
        raise Refused(f"{disk.name}: {why}", hint)


def check_local(disk: Disk) -> None:
    """Are all layers files, here, whose names can be changed?"""
    for image in disk.chain:
        if image.file is None or image.file.is_block_device():
            raise Refused(
                f"{disk.name}: {image.file or image.node} is not a local file",
                "Run promoter where the chain's files are. Block devices can only be promoted.",
            )


def check_clone(disk: Disk, lose: tuple[Loss, ...], *, adopted: bool = False) -> None:
    """Can the disk be promoted, and would nothing be lost that may not be?"""
    check_idle(disk, adopted=adopted)
    active = disk.chain.active
    why = ""
    if active.format != "qcow2":
        why = f"its active layer is {active.format}, not qcow2"
        hint = "A linked clone is a qcow2 overlay."
    elif active.snapshots and Loss.SNAPSHOTS not in lose:
        why = f"its active layer holds internal snapshots: {', '.join(active.snapshots)}"
        hint = (
            "The new disk would not have them. Delete them first (delvm, qemu-img snapshot -d),"
            " or: --lose snapshots"
        )
    elif is_encrypted(disk.chain) and Loss.ENCRYPTION not in lose:
        why = "its chain has encrypted images"
        hint = "The new disk would be in clear text. If it may be: --lose encryption --target FILE"
    elif active.file is None:
        why = f"its active layer, {active.node}, is not a local file"
        hint = "Run promoter where its files are."
    if why:
        raise Refused(f"{disk.name}: {why}", hint)


def check_copy(disk: Disk, copy: RunningCopy, view: GuestView) -> None:
    """Will the copy that somebody else started be the full clone?"""
    why = ""
    if copy.whole is None:
        why = f"libvirt on this host does not tell what the copy to {copy.file} takes along"
    elif not copy.whole:
        why = f"the copy to {copy.file} takes only the active layer along"
    elif not copy.file.is_file():
        why = f"the copy goes to {copy.file or 'somewhere'}, which is not a local file"
    elif images.backing_name(copy.file):
        why = f"{copy.file} has a backing file"
    elif copy.format == "raw" and aborts_on_raw(view.version, disk.device):
        why = f"this QEMU may abort when a disk on {disk.device} is switched to a raw image"
    elif loses_writes_at_start(view.version):
        why = "this QEMU can have lost writes when the copy started"
    elif disk.chain.active.file and disk.chain.active.file.is_block_device():
        why = f"{disk.chain.active.file} is a block device"
    if why:
        raise Refused(
            f"{disk.name}: cannot adopt: {why}",
            f"End it (virsh blockjob {disk.name} --abort) and promote without --adopt.",
        )


def remote(guest: Guest) -> Domain | None:
    """The guest, when it is a domain whose QEMU cannot be seen: it runs on another host."""
    return guest if isinstance(guest, Domain) and guest.pid is None else None


def check_remote(domain: Domain, disk: Disk, choices: Choices) -> None:
    """Is nothing asked for that only the guest's host could do, with the files at hand?"""
    asked = {
        f"--seed {choices.seed}": choices.seed not in (None, SeedMethod.NONE),
        "--old delete": choices.old is Old.DELETE,
        "--preallocation": choices.preallocation is not Preallocation.OFF,
        "--cluster-size": choices.cluster_size is not None,
        "--extended-l2": choices.extended_l2 is not None,
        "--adopt": choices.adopt,
    }
    if impossible := [option for option, given in asked.items() if given]:
        raise Refused(
            f"{domain.name} does not run on this host: {', '.join(impossible)} cannot be done",
            "There libvirt makes the new disk, laid out as the old one, and QEMU copies it all."
            " Run promoter on the guest's host, or leave that out.",
        )
    is_device = disk.chain.active.file_driver == "host_device"
    if is_device and not (choices.target or choices.target_dir):
        raise Refused(
            f"{disk.name}: {disk.chain.active.file} is a block device, with no room for a file"
            " beside it",
            "Give a --target.",
        )


async def check_remote_target(domain: Domain, disk: Disk, target: Path) -> None:
    """Will libvirt make this file, as far as it can tell? It takes one that is empty, too."""
    why = ""
    if not target.is_absolute() or ".." in target.parts:
        why = "is not the absolute path of a file on the guest's host"
    elif target.is_relative_to("/dev"):
        why = "is a device: libvirt would write over what it holds"
    elif any(target in image.files for image in disk.chain):
        why = "is of the disk's own chain"
    elif await domain.has_volume(target):
        why = f"exists on the host of {domain.name}"
    if why:
        raise Refused(f"target {target} {why}", "Choose another --target.")
    check_printable(target)


def check_definition(disk: Disk) -> None:
    """Are libvirt and the guest's QEMU of one mind about the chain?"""
    if disk.libvirt is None:
        raise Refused(
            f"{disk.name}: libvirt does not know this disk",
            "Somebody gave it to QEMU without libvirt. Detach it the same way, or promote others.",
        )
    if disk.differences:
        raise Refused(
            f"{disk.name}: libvirt and QEMU differ: {'; '.join(disk.differences)}",
            "See: promoter chain. Mend libvirt's definition (virsh edit), or restart the guest"
            " from the right disk, first.",
        )


def check_backing_names(disk: Disk) -> None:
    """Do the images' headers name what the guest's QEMU has below them?"""
    for upper, lower in pairwise(disk.chain):
        if not (upper.file and lower.file):
            continue  # how the name of what is elsewhere is written is QEMU's and libvirt's affair
        named = (images.backing_name(upper.file) or "").removeprefix("file:")
        found = stamp(upper.file.parent / named)
        if not named.startswith("json:") and found != stamp(lower.file):
            raise Refused(
                f"{disk.name}: the header of {upper.file} names {named or 'nothing'} below it,"
                f" but QEMU has {lower.file} there",
                "The next boot would open another chain. Mend it: qemu-img rebase -u",
            )


def check_device(disk: Disk, has_target: bool) -> None:
    """Can the guest leave the block device that its active layer is on?"""
    path = disk.chain.active.file
    if disk.libvirt is None:
        raise Refused(
            f"{disk.name}: {path} is a block device, whose name cannot lead to another disk",
            "The guest's command line would boot the old disk again. Move it to a file first.",
        )
    if not has_target:
        raise Refused(
            f"{disk.name}: {path} is a block device, with no room for a file beside it",
            "Give a --target.",
        )


def check_in_place(disk: Disk, wanted: str) -> None:
    """Will the guest's own command line open the new disk rightly?"""
    path = disk.chain.active.file
    if disk.backing_given:
        raise Refused(
            f"{disk.name}: the guest's command line spells out what lies below {path}",
            "It would put the base below the full clone again. Give a --target.",
        )
    if disk.chain.active.encrypted:
        raise Refused(
            f"{disk.name}: the guest's command line opens {path} with a key",
            "The new disk is in clear text and cannot take its place. Give a --target.",
        )
    if wanted != "qcow2":
        raise Refused(
            f"a {wanted} image cannot take the place of {path}",
            "The guest's command line opens that path as qcow2. Give a --target.",
        )


def check_raw(view: GuestView, disks: list[Disk]) -> None:
    """Can this QEMU switch these disks to raw images?"""
    if wrong := [disk for disk in disks if aborts_on_raw(view.version, disk.device)]:
        raise Refused(
            f"{', '.join(disk.name for disk in wrong)}: QEMU {'.'.join(map(str, view.version))} may"
            f" abort when a disk on {wrong[0].device} is switched to a raw image",
            "Promote to qcow2, or use QEMU 9.0 or newer.",
        )


def check_throttles(view: GuestView, disks: list[Disk]) -> None:
    above = [disk for disk in disks if disk.node != disk.chain.active.node]
    throttled = [disk.name for disk in above if not disk.jobs]
    if throttled and view.iothreads and hangs_below_a_filter(view.version):
        raise Refused(
            f"{', '.join(throttled)}: under a throttle filter in a guest with iothreads,"
            f" QEMU {'.'.join(map(str, view.version))} would hang at the switchover",
            "Throttle with -drive or the device instead, or use QEMU 9.0 or newer.",
        )


async def check_chain(guest: Guest, disk: Disk) -> None:
    """Are the files, the headers, QEMU's picture and libvirt's of one mind about the chain?"""
    await asyncio.to_thread(check_files, guest, disk)
    check_headers(disk)
    if isinstance(guest, Domain):
        check_definition(disk)
        check_backing_names(disk)


def check_files(guest: Guest, disk: Disk) -> None:
    """Are the chain's files the ones that QEMU has open?"""
    if guest.pid is None:
        raise Refused(
            f"{guest.name} does not run on this host, or its QEMU cannot be found",
            "Run promoter on the guest's host, as root.",
        )
    try:
        opened = open_files(guest.pid)
    except OSError as error:
        raise Refused(
            f"{guest.name}: cannot see which files its QEMU (pid {guest.pid}) has open",
            "Run promoter on the guest's host, as root or as QEMU's own user.",
        ) from error
    for file in (file.resolve() for image in disk.chain for file in image.files):
        found = stamp(file)
        if found is None:
            raise Refused(f"{disk.name}: {file} is missing", "QEMU still has it open; put it back.")
        if found.id not in opened and not file.is_block_device():
            raise Refused(
                f"{disk.name}: {file} is not the file that QEMU has open",
                "It was replaced after the guest started. Put the original back.",
            )


def check_headers(disk: Disk) -> None:
    for image in disk.chain:
        if image.file is None or image.format != "qcow2":
            continue
        try:
            fault = images.header_fault(image.file)
        except OSError as error:
            raise Refused(
                f"{disk.name}: {image.file} cannot be read: {error.strerror}",
                "The guest still has it open: save its data before anything else.",
            ) from error
        if fault:
            raise Refused(f"{disk.name}: {image.file} {fault}", "See: qemu-img check")


def check_names(names: Names, *more: Path) -> None:
    """Are all names on the way possible?"""
    for name in (names.aside.with_name(f"{names.aside.name}.back"), names.prepared, *more):
        _check_name(name)


def _check_name(path: Path) -> None:
    """The longest names on the way must be possible too, and the journal must hold them."""
    check_printable(path)
    most = os.pathconf(path.parent, "PC_NAME_MAX")
    if (length := len(os.fsencode(path.name))) > most:
        raise Refused(
            f"the name {path.name} would be too long: {length} bytes, {most} are possible",
            "Choose a shorter --target.",
        )


def check_printable(path: Path) -> None:
    if not str(path).isprintable():
        raise Refused(f"{str(path)!r} is not a name for people", "Choose another --target.")


def check_directory(directory: Path) -> None:
    if not directory.is_dir():
        what = "not a directory" if directory.exists() else "no such directory"
        raise Refused(f"{what}: {directory}", "Create it, or choose another.")
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        raise Refused(f"{directory} is on a read-only file system", "Choose another --target.")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise Refused(f"{directory} is not writable", "Run promoter as its owner or as root.")


def check_targets(intents: list[DiskIntent]) -> None:
    targets = [intent.names.target for intent in intents]
    if twice := next((target for target in targets if targets.count(target) > 1), None):
        raise Refused(f"two disks would be promoted to {twice}", "Promote them one by one.")
    paths = [intent.names.path for intent in intents]
    if shared := next((path for path in paths if paths.count(path) > 1), None):
        raise Refused(
            f"two disks of the guest are the same file: {shared}", "Give each disk its own overlay."
        )


def check_space(intents: list[DiskIntent], *, views: bool) -> None:
    """Is there room? With ``views`` also for all that a guest could overwrite meanwhile: libvirt's
    backup has its writes fail where there is none.
    """
    needed: dict[int, int] = defaultdict(int)
    places: dict[int, Path] = {}
    for intent in (intent for intent in intents if not intent.names.remote):
        place = intent.names.target.parent
        device = place.stat().st_dev
        needed[device] += intent.required + views * intent.chain.active.virtual_size
        places[device] = place
    for device, required in needed.items():
        if (free := free_bytes(places[device])) < required:
            raise Refused(
                f"not enough space in {places[device]}: {required:,} bytes needed, {free:,} free",
                f"Make room, {'leave out --verify, ' * views}or choose another --target.",
            )
