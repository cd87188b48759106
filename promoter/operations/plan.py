"""Preflight: what a promotion will do and what it costs, or why not.

Every check is made here, before the first change, and changes nothing. What
QEMU has open is compared with what its file names lead to now, so that a base
that was moved, replaced or deleted is noticed while it can still be refused.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from promoter.chain import BackingChain, Disk, DiskOptions, FileStamp, Image
from promoter.errors import Refused, Unreachable
from promoter.guests.base import Guest, GuestView
from promoter.guests.bugs import hangs_below_a_filter, loses_writes_at_start, unmaps_wrongly
from promoter.operations.promotion import Choices, DiskIntent, Loss, Promotion
from promoter.storage import images
from promoter.storage.files import file_id, free_bytes, open_files, stamp
from promoter.storage.names import Names
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
PROMOTABLE = frozenset({"running", "paused", "prelaunch", "suspended"})


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
    view = await guest.look()
    _check_guest(view, guest.name)
    disks = _select(view, choices.disks)
    linked = [disk for disk in disks if len(disk.chain) > 1]
    if choices.target and len(linked) > 1:
        raise Refused(
            "--target names one file, but several disks would be promoted",
            "Name one disk, or give --target-dir.",
        )
    _check_throttles(view, linked)
    intents = [
        await plan_disk(guest, view, disk, choices, identity, index)
        for index, disk in enumerate(linked)
    ]
    _check_targets(intents)
    _check_space(intents)
    return Plan(
        Promotion(identity, guest.name, choices, tuple(intents)),
        free=tuple(free_bytes(intent.names.target.parent) for intent in intents),
        nothing_to_do=tuple(disk.name for disk in disks if len(disk.chain) == 1),
        warnings=(
            *_bugs(view, linked),
            *(warning for intent in intents for warning in _warnings(intent)),
        ),
    )


async def plan_disk(
    guest: Guest, view: GuestView, disk: Disk, choices: Choices, identity: str, index: int
) -> DiskIntent:
    """Plan one linked disk. Raises `Refused` with the reason."""
    _check_disk(disk, choices.lose)
    await asyncio.to_thread(_check_files, guest, disk)
    await _check_headers(disk)
    names = _names(disk, choices, identity)
    geometry = _geometry(disk.chain, choices, names)
    below = disk.chain.below
    method, geometry = await asyncio.to_thread(_method, below, choices, geometry, names.target)
    full = await _full_size(disk.chain, geometry)
    return DiskIntent(
        node=f"promoter-{identity}-{index}",
        index=index,
        key=disk.key,
        name=disk.name,
        root=disk.node,
        chain=disk.chain,
        below=_stamps(disk.chain),
        options=_options(disk, view),
        names=names,
        method=method,
        geometry=geometry,
        required=_new_size(disk.chain, full) if method is SeedMethod.REFLINK else full,
    )


async def _full_size(chain: BackingChain, geometry: Geometry) -> int:
    """The most bytes that the new disk can take at first."""
    whole = chain.active.virtual_size
    allocated = geometry.preallocation in (Preallocation.FALLOC, Preallocation.FULL)
    if _is_encrypted(chain):  # only QEMU has the key
        return whole
    measured = await images.measure(chain.images, geometry.format, geometry.options)
    return max(measured, whole) if allocated else measured


def _new_size(chain: BackingChain, full: int) -> int:
    """What is left of the full size when the lowest layer is shared and the rest written to it."""
    *upper, base = chain
    return max(full - base.allocated, sum(image.allocated for image in upper))


def _options(disk: Disk, view: GuestView) -> DiskOptions:
    """The new disk's: as the old one's, but nothing that this QEMU does wrong meanwhile."""
    if disk.options.detect_zeroes == "unmap" and unmaps_wrongly(view.version):
        return replace(disk.options, detect_zeroes="on")
    return disk.options


def _check_guest(view: GuestView, name: str) -> None:
    if view.status == "shutdown":
        raise Unreachable(f"{name} is shutting down", "Start the guest again first.")
    if view.status not in PROMOTABLE:
        raise Refused(f"{name} is in state {view.status}", "Promote it while it runs or is paused.")


def _select(view: GuestView, names: tuple[str, ...]) -> list[Disk]:
    if not names:
        return [disk for disk in view.disks if not disk.read_only]
    found = {name: view.disk(name) for name in names}
    for name, disk in found.items():
        if disk is None:
            known = ", ".join(sorted(d.name for d in view.disks)) or "none"
            raise Refused(f"no such disk: {name}", f"The guest's disks are: {known}.")
    return list(dict.fromkeys(disk for disk in found.values() if disk))


def _is_encrypted(chain: Iterable[Image]) -> bool:
    return any(image.encrypted for image in chain)


def _check_disk(disk: Disk, lose: tuple[Loss, ...]) -> None:
    active = disk.chain.active
    why = ""
    hint = ""
    if disk.jobs:
        why = f"a block job runs on it: {', '.join(disk.jobs)}"
        hint = "Wait for it or end it. If it is promoter's: promoter job list"
    elif disk.filters:
        why = f"a filter lies above its image: {', '.join(disk.filters)}"
        hint = "Remove the filter first; a throttle filter may stay."
    elif disk.read_only:
        why = "it is read-only"
        hint = "Only disks that the guest writes to are promoted."
    elif disk.other_writers:
        why = "something besides the guest writes to it, such as a writable NBD export"
        hint = "It would go on writing to the old disk. Remove it: block-export-del"
    elif active.format != "qcow2":
        why = f"its active layer is {active.format}, not qcow2"
        hint = "A linked clone is a qcow2 overlay."
    elif active.snapshots and Loss.SNAPSHOTS not in lose:
        why = f"its active layer holds internal snapshots: {', '.join(active.snapshots)}"
        hint = (
            "The new disk would not have them. Delete them first (delvm, qemu-img snapshot -d),"
            " or: --lose snapshots"
        )
    elif _is_encrypted(disk.chain) and Loss.ENCRYPTION not in lose:
        why = "its chain has encrypted images"
        hint = "The new disk would be in clear text. If it may be: --lose encryption --target FILE"
    elif remote := next((image for image in disk.chain if image.file is None), None):
        why = f"{remote.node} is not a local file"
        hint = "Run promoter where the chain's files are."
    if why:
        raise Refused(f"{disk.name}: {why}", hint)


def _check_throttles(view: GuestView, disks: list[Disk]) -> None:
    throttled = [disk.name for disk in disks if disk.node != disk.chain.active.node]
    if throttled and view.iothreads and hangs_below_a_filter(view.version):
        raise Refused(
            f"{', '.join(throttled)}: under a throttle filter in a guest with iothreads,"
            f" QEMU {'.'.join(map(str, view.version))} would hang at the switchover",
            "Throttle with -drive or the device instead, or use QEMU 9.0 or newer.",
        )


def _check_files(guest: Guest, disk: Disk) -> None:
    """Are the chain's files the ones that QEMU has open?"""
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


async def _check_headers(disk: Disk) -> None:
    for image in disk.chain:
        try:
            found = await images.info(image)
        except images.ImageError as error:
            why = error.message.rpartition(": ")[2]
            raise Refused(
                f"{disk.name}: {image.file} cannot be read: {why}",
                "The guest still has it open: save its data before anything else.",
            ) from error
        if found.get("format-specific", {}).get("data", {}).get("corrupt"):
            raise Refused(f"{disk.name}: {image.file} is marked corrupt", "See: qemu-img check")


def _names(disk: Disk, choices: Choices, identity: str) -> Names:
    old = _file(disk.chain.active).resolve()
    in_place = not (choices.target or choices.target_dir)
    if in_place and disk.backing_given:
        raise Refused(
            f"{disk.name}: the guest's command line spells out what lies below {old}",
            "It would put the base below the full clone again. Give a --target.",
        )
    if in_place:
        target = old.with_name(f"{old.name}.new-{identity}")
    elif choices.target:
        target = choices.target.absolute()
    else:
        target = Path(choices.target_dir or ".").absolute() / old.name
    if in_place and disk.chain.active.encrypted:
        raise Refused(
            f"{disk.name}: the guest's command line opens {old} with a key",
            "The new disk is in clear text and cannot take its place. Give a --target.",
        )
    overlay = file_id(old)
    assert overlay, f"{old}: checked to be there"
    for directory in {old.parent, target.parent}:
        _check_directory(directory)
    if os.path.lexists(target):
        same = target.exists() and stamp(target) == stamp(old)
        why = "is the disk itself" if same else "exists"
        raise Refused(f"target {target} {why}", "Choose another --target, or move it away.")
    _check_name(target.with_name(f"{target.name}.part-{identity}"))
    _check_name(old.with_name(f"{old.name}.aside-{identity}.back"))
    return Names(
        old=overlay,
        path=old,
        target=target,
        aside=old.with_name(f"{old.name}.aside-{identity}"),
        prepared=old.with_name(f"{old.name}.next-{identity}"),
        in_place=in_place,
    )


def _check_name(path: Path) -> None:
    """The longest names on the way must be possible too, and the journal must hold them."""
    if not str(path).isprintable():
        raise Refused(f"{str(path)!r} is not a name for people", "Choose another --target.")
    most = os.pathconf(path.parent, "PC_NAME_MAX")
    if (length := len(os.fsencode(path.name))) > most:
        raise Refused(
            f"the name {path.name} would be too long: {length} bytes, {most} are possible",
            "Choose a shorter --target.",
        )


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        what = "not a directory" if directory.exists() else "no such directory"
        raise Refused(f"{what}: {directory}", "Create it, or choose another --target.")
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        raise Refused(f"{directory} is on a read-only file system", "Choose another --target.")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise Refused(f"{directory} is not writable", "Run promoter as its owner or as root.")


def _geometry(chain: BackingChain, choices: Choices, names: Names) -> Geometry:
    if names.in_place and choices.format != "qcow2":
        raise Refused(
            f"a {choices.format} image cannot take the place of {names.path}",
            "The guest's command line opens that path as qcow2. Give a --target.",
        )
    active = chain.active
    extended = active.extended_l2 if choices.extended_l2 is None else choices.extended_l2
    cluster = choices.cluster_size or active.cluster_size or DEFAULT_CLUSTER
    if extended and not choices.cluster_size:
        cluster = max(cluster, LEAST_EXTENDED)
    return Geometry(choices.format, cluster, extended, choices.preallocation)


def _method(
    below: tuple[Image, ...], choices: Choices, geometry: Geometry, target: Path
) -> tuple[SeedMethod, Geometry]:
    """How to seed, and the geometry that comes of it: a copied file keeps its own."""
    if _is_encrypted(below):
        if choices.seed not in (None, SeedMethod.NONE):
            raise Refused(
                "only the guest's QEMU has the key of an encrypted layer below", "Use --seed none."
            )
        return SeedMethod.NONE, geometry
    base = below[-1]
    copied = replace(
        geometry,
        cluster_size=base.cluster_size or geometry.cluster_size,
        extended_l2=base.extended_l2,
    )
    fits = copies_only_data(base, geometry) and _fits(copied, choices)
    copyable = fits and len(below) == 1
    reflinks = fits and can_merge(below) and can_reflink(_file(base), target.parent)
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


def _check_targets(intents: list[DiskIntent]) -> None:
    targets = [intent.names.target for intent in intents]
    if twice := next((target for target in targets if targets.count(target) > 1), None):
        raise Refused(f"two disks would be promoted to {twice}", "Promote them one by one.")
    paths = [intent.names.path for intent in intents]
    if shared := next((path for path in paths if paths.count(path) > 1), None):
        raise Refused(
            f"two disks of the guest are the same file: {shared}", "Give each disk its own overlay."
        )


def _check_space(intents: list[DiskIntent]) -> None:
    needed: dict[int, int] = defaultdict(int)
    places: dict[int, Path] = {}
    for intent in intents:
        place = intent.names.target.parent
        device = place.stat().st_dev
        needed[device] += intent.required
        places[device] = place
    for device, required in needed.items():
        if (free := free_bytes(places[device])) < required:
            raise Refused(
                f"not enough space in {places[device]}: {required:,} bytes needed, {free:,} free",
                "Make room, or choose another --target.",
            )


def _bugs(view: GuestView, disks: list[Disk]) -> Iterator[str]:
    version = ".".join(map(str, view.version))
    if loses_writes_at_start(view.version) and view.status == "running":
        yield (
            f"QEMU {version} can lose writes while a mirror starts:"
            " the guest will stand still for each start, as a rule for milliseconds"
        )
    for disk in disks:
        if _options(disk, view) != disk.options:
            yield (
                f"{disk.name}: QEMU {version} can lose writes with detect-zeroes=unmap:"
                " the new disk has detect-zeroes=on until the guest's next boot"
            )


def _warnings(intent: DiskIntent) -> list[str]:
    warnings = []
    if bitmaps := [name for image in intent.chain for name in image.bitmaps]:
        warnings.append(
            f"{intent.name}: dirty bitmaps stay behind ({', '.join(bitmaps)}):"
            " the next incremental backup must be a full one"
        )
    if _is_encrypted(intent.chain):
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


def _file(image: Image) -> Path:
    assert image.file, f"{image.node}: checked to be a local file"
    return image.file


def same_files(intent: DiskIntent, disk: Disk) -> bool:
    """Is the chain still the one that was planned and seeded: files, order, contents, size?"""
    planned = [image.file for image in intent.chain]
    return (
        [image.file for image in disk.chain] == planned
        and disk.chain.active.virtual_size == intent.virtual_size
        and _stamps(disk.chain) == intent.below
    )


def _stamps(chain: BackingChain) -> tuple[FileStamp, ...]:
    """The files under the active layer; one that is missing makes the tuple shorter."""
    files = (file for image in chain.below for file in image.files)
    return tuple(found for file in files if (found := stamp(file)))
