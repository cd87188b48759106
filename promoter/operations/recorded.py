"""A journalled move, read again: perhaps after a reboot, which gives devices other numbers.

A file is known by its device's number and its inode's. The first is the kernel's to choose: LVM,
NFS, btrfs and loop devices may get another one each time they are mounted. The inode stays, and
the directory tells which number its file system has now.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from promoter.chain import FileId, FileStamp
from promoter.operations.journal import Entry
from promoter.operations.move import DiskIntent, Move
from promoter.storage.files import stamp
from promoter.values import from_json


def recorded_move(entry: Entry) -> Move:
    """What an operation intends. Its files are where they were, whatever their device's number."""
    move = from_json(Move, entry.intent)
    return replace(move, disks=tuple(_as_mounted_now(disk) for disk in move.disks))


def _as_mounted_now(disk: DiskIntent) -> DiskIntent:
    if disk.names.old is None or disk.names.stays:
        return disk
    old = _moved(disk.names.old, disk.names.path.parent)
    seeded = disk.seeded and _restamped(disk.seeded, disk.names.target.parent)
    files = [file for image in disk.chain.below for file in image.files]
    below = disk.below
    if len(files) == len(below):
        below = tuple(_as_found(was, file) for was, file in zip(below, files, strict=True))
    return replace(disk, names=replace(disk.names, old=old), seeded=seeded, below=below)


def _as_found(was: FileStamp, file: Path) -> FileStamp:
    found = stamp(file)
    return replace(was, id=found.id) if found and found.id.inode == was.id.inode else was


def _restamped(was: FileStamp, directory: Path) -> FileStamp:
    return replace(was, id=_moved(was.id, directory))


def _moved(was: FileId, directory: Path) -> FileId:
    found = stamp(directory)
    return replace(was, device=found.id.device) if found else was
