"""What a move leaves: second names, kept as long as a QEMU remembers them, and old layers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

from promoter.chain import Image
from promoter.errors import Unreachable
from promoter.guests.base import Guest, GuestView
from promoter.operations.leases import is_listed
from promoter.operations.move import DiskIntent, Move, Way
from promoter.storage.files import is_open, sync
from promoter.storage.images import backing_name
from promoter.storage.names import MERGED, Names, merged_name

ON_THE_WAY = re.compile(
    r".+\.(?:part|next)-([0-9a-f]{8})(?:\.delta)?|.+\.aside-([0-9a-f]{8})\.back"
)


async def sweep(intent: Move, connect: Callable[[Move], Awaitable[Guest]]) -> None:
    """Remove the names that an operation which has ended left, if no QEMU needs them."""
    for spare in await spares_left(intent, connect):
        spare.unlink()


async def spares_left(intent: Move, connect: Callable[[Move], Awaitable[Guest]]) -> list[Path]:
    """The second names that no QEMU needs any more; none where that cannot be known."""
    if not any(disk.names.spares() for disk in intent.disks):
        return []
    view = None
    try:
        guest = await connect(intent)
    except Unreachable:
        here = [disk.names.path for disk in intent.disks if not disk.names.remote]
        if any([await asyncio.to_thread(is_open, path) for path in here]):
            return []
    else:
        try:
            view = await guest.look()
        finally:
            await guest.close()
    return [spare for disk in intent.disks for spare in unneeded(disk.names, view)]


def remove_spares(names: Names, view: GuestView | None) -> None:
    """Remove the names that no QEMU remembers and no header has; None: there is no QEMU."""
    for spare in unneeded(names, view):
        spare.unlink()


def unneeded(names: Names, view: GuestView | None) -> list[Path]:
    """The second names that no QEMU remembers and no header has; None: there is no QEMU."""
    return [
        spare
        for spare in names.spares()
        if not (view is not None and names.is_remembered(spare, view.files))
        and not is_named_as_backing(spare)
    ]


def half_made(directory: Path) -> Iterator[tuple[Path, str]]:
    """The names in a directory that an operation makes on its way and removes, with its id."""
    for path in sorted(directory.iterdir()):
        if found := ON_THE_WAY.fullmatch(path.name):
            yield path, found[1] or found[2]


def is_needed(path: Path) -> bool:
    """Would something be lost with one of the `half_made` names?

    A seed that grows is nobody's yet; the others are second names of what has another.
    """
    if is_named_as_backing(path):
        return True
    if ".part-" in path.name:
        return is_open(path)
    return not path.is_symlink() and path.stat().st_nlink == 1


def is_named_as_backing(file: Path) -> bool:
    """Does an image in the same directory that is not merged have this name in its header?"""
    siblings = (p for p in file.parent.iterdir() if p.is_file() and not MERGED.search(p.name))
    return any(Path(backing_name(path) or "").name == file.name for path in siblings)


def old_files(disk: DiskIntent) -> tuple[Path, ...]:
    """The files that only the old chain had, the upper ones first, as they are called now."""
    if disk.way is Way.SNAPSHOT:
        return ()
    active = () if disk.way is Way.COMMIT_BELOW else (disk.names.aside,)
    if disk.commits:
        return (*active, *_merged(disk).values())
    return (*active, *_files(disk.gone[1:])) if disk.kept else active


def kept_files(disk: DiskIntent) -> tuple[Path, ...]:
    """Those of them that are there, as far as can be seen from here."""
    files = old_files(disk)
    return files if disk.names.remote else tuple(filter(Path.exists, files))


def undone_file(disk: DiskIntent) -> Path:
    """What the new disk is called once the next boot opens the old one again."""
    if not disk.names.in_place:
        return disk.names.target
    return disk.names.path.with_name(f"{disk.names.path.name}.undone-{disk.identity}")


def _merged(disk: DiskIntent) -> dict[Path, Path]:
    """What the layers under the active one are called once they are merged."""
    below = disk.gone if disk.way is Way.COMMIT_BELOW else disk.gone[1:]
    return {file: merged_name(file, disk.identity) for file in _files(below)}


def call_merged(disk: DiskIntent) -> None:
    """Give the layers that were merged their new names, so that nobody takes them for readers."""
    for file, merged in _merged(disk).items() if disk.commits else ():
        if file.exists() and not is_open(file):
            file.rename(merged)
            sync(file.parent)


def delete_old(disk: DiskIntent) -> None:
    """Remove what was left behind, unless somebody has or names it, the upper ones first."""
    for file in old_files(disk):
        named = is_named_as_backing(file) or is_listed(file, disk)
        if file.exists() and not is_open(file) and not named:
            file.unlink()
            sync(file.parent)


def _files(images: Iterable[Image]) -> tuple[Path, ...]:
    return tuple(image.file for image in images if image.file)
