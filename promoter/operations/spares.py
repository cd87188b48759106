"""The other names of a disk that has switched: kept as long as a QEMU remembers them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from promoter.errors import Unreachable
from promoter.guests.base import Guest, GuestView
from promoter.operations.promotion import Promotion
from promoter.storage.files import is_open
from promoter.storage.images import backing_name
from promoter.storage.names import MERGED, Names


async def sweep(intent: Promotion, connect: Callable[[Promotion], Awaitable[Guest]]) -> None:
    """Remove the names that an operation which has ended left, if no QEMU needs them."""
    view = None
    try:
        guest = await connect(intent)
    except Unreachable:
        if any([await asyncio.to_thread(is_open, disk.names.path) for disk in intent.disks]):
            return
    else:
        try:
            view = await guest.look()
        finally:
            await guest.close()
    for disk in intent.disks:
        remove_spares(disk.names, view)


def remove_spares(names: Names, view: GuestView | None) -> None:
    """Remove the names that no QEMU remembers and no header has; None: there is no QEMU."""
    for spare in names.spares():
        remembered = view is not None and str(spare) in view.files
        if not remembered and not is_named_as_backing(spare):
            spare.unlink()


def is_named_as_backing(file: Path) -> bool:
    """Does an image in the same directory that is not merged have this name in its header?"""
    siblings = (p for p in file.parent.iterdir() if p.is_file() and not MERGED.search(p.name))
    return any(Path(backing_name(path) or "").name == file.name for path in siblings)
