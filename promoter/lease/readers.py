"""Who reads through a base, in the base's lease.

A disk that is had under a lease is entered in the leases of the layers below it, where those have
one: so that nobody writes a base, or removes it, through which a guest reads that does not run
now. Promoting the disk takes it off again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from promoter.errors import Refused
from promoter.lease import rules
from promoter.lease.file import LeaseFile
from promoter.lease.host import Host, new_stamp
from promoter.lease.record import LeaseRecord
from promoter.storage.images import backing_name

MOST_LAYERS = 200


def lease_of(file: Path | None) -> LeaseFile | None:
    """The lease of an image file, None when it has none, or is none. Raises `BadRecord`."""
    if file is None or not file.is_file():
        return None
    store = LeaseFile(file)
    return store if store.read_any() else None


def layers_below(disk: Path) -> Iterator[Path]:
    """The files that the headers name, as far as they are here."""
    for _ in range(MOST_LAYERS):
        named = backing_name(disk) or "" if disk.is_file() else ""
        disk = disk.parent / named.removeprefix("file:")
        if not named or named.startswith("json:") or not disk.is_file():
            return
        yield disk


def enter(disk: Path, host: Host) -> list[Path]:
    """Enter a disk as a reader where the layers below it have leases; where it was not yet.

    Raises `Illegal` when another host holds such a layer, and may write it.
    """
    return [
        store.disk
        for file in layers_below(disk)
        if (store := lease_of(file)) and _enter(store, str(disk), host)
    ]


def _enter(store: LeaseFile, disk: str, host: Host) -> bool:
    while True:
        record = store.read()
        if record is None or disk in record.readers:
            return False
        if store.compare_and_swap(
            record.epoch, rules.add_reader(record, host.name, disk, new_stamp())
        ):
            return True


def forget(store: LeaseFile, reader: Path, host: Host) -> LeaseRecord:
    """Take off a reader that is no more. Refused when its file is here and reads through it."""
    layers = (reader, *layers_below(reader)) if reader.is_file() else ()
    if any(store.disk.samefile(file) for file in layers):
        raise Refused(f"{reader} reads through {store.disk}", "Promote it, or remove it, first.")
    while True:
        record = store.read()
        if record is None:
            raise Refused(f"{store.disk} has no lease", "There is nothing to forget.")
        left = rules.remove_reader(record, host.name, str(reader), new_stamp())
        if store.compare_and_swap(record.epoch, left):
            return left
