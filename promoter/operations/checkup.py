"""A guest's disks, from every side: QEMU's graph, the files and their headers, what the next boot
opens, leases; and what QEMU, AppArmor and ``qemu-img check`` have to say.

The checks are those that every operation begins with: what they refuse is a finding.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from promoter.chain import Disk, Image
from promoter.errors import PromoterError
from promoter.guests import bugs
from promoter.guests.base import Domain, Guest, GuestView
from promoter.guests.cmdline import boot_file
from promoter.lease.host import started_at
from promoter.lease.liveness import boot_clock
from promoter.operations.findings import Check, Finding, Resume, Wrong, call, of_error, refusals
from promoter.operations.leases import check_lease, registered
from promoter.operations.preflight import (
    check_backing_names,
    check_definition,
    check_domain,
    check_files,
    check_guest,
    check_headers,
    check_pause,
    check_start,
)
from promoter.operations.remains import OURS, Known
from promoter.storage import denials, images
from promoter.storage.files import is_open, is_written, open_files, stamp


async def running_guest(
    guest: Guest, view: GuestView, operations: Mapping[str, Known], state: Path
) -> list[Finding]:
    """All that can be said of a guest that runs. ``operations`` are those of the journal."""
    found = await _as_a_whole(guest, view)
    busy = any(each.is_open and each.is_of(guest.name, guest) for each in operations.values())
    for disk in view.disks:
        found += [] if busy else _foreign_jobs(disk)
        found += await _next_boot(guest, disk)
    if guest.pid is None:
        return [*found, Finding(guest.name, "it runs on another host: see there for its files")]
    try:
        await asyncio.to_thread(open_files, guest.pid)
    except OSError:
        text = f"what its QEMU (pid {guest.pid}) has open cannot be seen"
        hint = "Run promoter as root, or as QEMU's own user."
        return [*found, Finding(guest.name, text, hint, Wrong.UNFIT)]
    for disk in view.disks:
        found += await _chain(guest, disk)
        found += await asyncio.to_thread(_lease, guest, disk, operations, state)
    found += await asyncio.to_thread(_denied, guest.pid, guest.name, view.disks)
    found += await asyncio.to_thread(_base_leases, view.disks)
    return found + await _checked(guest.name, *_layers(view.disks))


async def _as_a_whole(guest: Guest, view: GuestView) -> list[Finding]:
    checks: list[Check] = [partial(call, check_guest, view, guest.name)]
    checks.append(partial(call, check_start, view))
    if isinstance(guest, Domain):
        checks.append(partial(check_domain, guest, view))
    found = await refusals(guest.name, checks)
    pause = await refusals(guest.name, [partial(call, check_pause, view)])
    if not found:  # it says the same, for fewer operations
        found += [replace(each, wrong=Wrong.NOTHING) for each in pause]
    return [*found, *_traps(guest.name, view)]


def _traps(name: str, view: GuestView) -> Iterator[Finding]:
    """What this QEMU does wrong and promoter goes round."""
    qemu = f"QEMU {'.'.join(map(str, view.version))}"
    if bugs.loses_writes_at_start(view.version):
        yield Finding(
            name, f"{qemu} may lose writes as a mirror starts: the guest is stopped for it"
        )
    for disk in view.disks:
        if disk.options.detect_zeroes == "unmap" and bugs.unmaps_wrongly(view.version):
            yield Finding(
                disk.name,
                f"{qemu} may lose a write with detect-zeroes=unmap",
                "Use detect-zeroes=on.",
            )
        if bugs.aborts_on_raw(view.version, disk.device):
            yield Finding(
                disk.name, f"{qemu} may abort as {disk.device} is switched to a raw image"
            )


def _denied(pid: int, name: str, disks: Iterable[Disk]) -> list[Finding]:
    if not denials.is_confining():
        return []
    started = started_at(pid)
    text = denials.read_logs()
    if text is None or started is None:
        return [Finding(name, "AppArmor confines guests here, and its log cannot be read")]
    since = time.time() - (boot_clock() - started / os.sysconf("SC_CLK_TCK"))
    files = {file for disk in disks for image in disk.chain for file in image.files}
    return denied(name, denials.denials(text, files, since))


def denied(name: str, found: Iterable[denials.Denial]) -> list[Finding]:
    """What AppArmor denied, and how it is allowed."""
    return [Finding(name, str(each), _allow(each), Wrong.UNFIT) for each in found]


def _allow(denial: denials.Denial) -> str:
    """libvirt makes a profile of a domain's own once, and keeps what is added to it."""
    own = denial.profile.startswith("libvirt-")
    profile = f"/etc/apparmor.d/libvirt/{denial.profile}" if own else "/etc/apparmor.d"
    return f'Add "{denial.file}" rwk, to its profile; then: apparmor_parser -r {profile}'


def _foreign_jobs(disk: Disk) -> list[Finding]:
    foreign = [job for job in disk.jobs if not OURS.match(job)]
    return [Finding(disk.name, f"a block job, not promoter's, runs on it: {j}") for j in foreign]


async def _chain(guest: Guest, disk: Disk) -> list[Finding]:
    """Do QEMU's graph, the files and their headers agree?"""
    checks: list[Check] = [
        partial(asyncio.to_thread, check_files, guest, disk),
        partial(asyncio.to_thread, check_headers, disk),
    ]
    if not disk.backing_given and all(i.format == "qcow2" for i in disk.chain.images[:-1]):
        checks.append(partial(asyncio.to_thread, check_backing_names, disk))
    return _differing(await refusals(disk.name, checks))


def _differing(findings: Iterable[Finding]) -> list[Finding]:
    return [replace(finding, wrong=Wrong.DIFFERENT) for finding in findings]


async def _next_boot(guest: Guest, disk: Disk) -> list[Finding]:
    """Does the next boot open what the guest writes to?"""
    if isinstance(guest, Domain):
        return _differing(await refusals(disk.name, [partial(call, check_definition, disk)]))
    return await asyncio.to_thread(_by_command_line, guest.pid, disk) if guest.pid else []


def _by_command_line(pid: int, disk: Disk) -> list[Finding]:
    named, file = boot_file(pid, {disk.name, *disk.aliases}), disk.chain.active.file
    if named is None or file is None:
        return []
    opened, now = stamp(named), stamp(file)
    if opened is None:
        text = f"the guest's command line opens {named}, which is not there; it writes to {file}"
        return [Finding(disk.name, text, f"Start it with {file} the next time.")]
    if now and opened.id != now.id:
        text = f"the guest writes to {file}, but its command line opens {named}"
        hint = f"Start it with {file} the next time, or it has an older disk."
        return [Finding(disk.name, text, hint, Wrong.DIFFERENT)]
    return []


def _lease(guest: Guest, disk: Disk, operations: Mapping[str, Known], state: Path) -> list[Finding]:
    try:
        record = check_lease(disk, guest.pid, state)
    except PromoterError as error:
        return [of_error(disk.name, error)]
    if record is None or (operation := record.operation) is None:
        return []
    found = operations.get(operation.id)
    if found and not found.is_open:
        remedy = Resume(operation.id)
        text = f"its lease says that {operation.kind} {operation.id} works on it, which has ended"
        return [Finding(disk.name, text, f"Put it right: {remedy}", Wrong.HALF_DONE, remedy)]
    return []


def _base_leases(disks: Collection[Disk]) -> list[Finding]:
    """Readers that a layer's lease lists and that are not here any more."""
    listed = registered(disks)
    found = [
        Finding(str(each.path), each.reason, wrong=Wrong.DIFFERENT) for each in listed.unreadable
    ]
    for base, readers in listed.readers.items():
        for reader in readers:
            if not reader.exists():
                text = f"its lease lists {reader} as a reader, which is not here"
                hint = f"If it is no more: promoter lease forget {base} {reader}"
                found.append(Finding(str(base), text, hint))
    return found


def _layers(disks: Iterable[Disk]) -> tuple[list[Image], set[Path]]:
    """The images of the disks, each once; and the files that the guest itself writes to."""
    found, written = dict[tuple[Path, ...], Image](), set[Path]()
    for disk in disks:
        found |= {image.files: image for image in disk.chain if image.files}
        if not disk.read_only:
            written.update(disk.chain.active.files)
    return list(found.values()), written


async def _checked(name: str, layers: Iterable[Image], written: Collection[Path]) -> list[Finding]:
    """``qemu-img check`` of what nobody writes to, and what was left out."""
    found, left_out = list[Finding](), list[str]()
    for image in layers:
        assert image.file, "it has files"
        try:
            if image.file in written or await asyncio.to_thread(is_written, image.file):
                left_out.append(str(image.file))
            else:
                found += await _check(image, image.file)
        except OSError:
            continue  # it is missing: said already
    if left_out:
        text = f"open to write, so qemu-img check cannot tell: {', '.join(left_out)}"
        found.append(Finding(name, text, "Look again when the guest is off."))
    return found


async def _check(image: Image, file: Path) -> list[Finding]:
    if image.encrypted:
        return [Finding(str(file), "it is encrypted: qemu-img check needs its key")]
    try:
        checked = await images.check(image)
    except images.ImageError as error:
        return [Finding(str(file), error.message, "", Wrong.DIFFERENT)]
    if checked and checked.corruptions:
        text = f"qemu-img check finds {checked.corruptions} errors in it"
        hint = "Save its data first (qemu-img convert), then: qemu-img check -r all"
        return [Finding(str(file), text, hint, Wrong.DIFFERENT)]
    if checked and checked.leaks:
        text = f"qemu-img check finds {checked.leaks} leaked clusters in it: they cost space only"
        hint = "When nobody has it open: qemu-img check -r leaks"
        return [Finding(str(file), text, hint, Wrong.DIFFERENT)]
    return []


async def powered_off(domain: Domain) -> list[Finding]:
    """What the next start of a domain opens, and whether it can."""
    if not domain.is_here:
        return [Finding(domain.name, "it is of another host: see there for its files")]
    found: list[Finding] = []
    layers: dict[Path, Image] = {}
    for name, defined in (await domain.definition()).items():
        try:
            chain = await images.chain_of(defined.file, defined.format)
        except (images.ImageError, OSError) as error:
            found.append(Finding(name, str(error), "The next start fails.", Wrong.DIFFERENT))
            continue
        layers |= {image.file: image for image in chain if image.file}
    opened = [file for file in layers if await asyncio.to_thread(is_open, file)]
    return found + await _checked(domain.name, layers.values(), opened)
