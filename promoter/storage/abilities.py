"""What a directory's file system can do, as far as promoter's promises rest on it.

It is tried, on files of its own that are gone afterwards, and for NFS read from the mount's options
too. Locks are tried between two open file descriptions, which exclude each other as two processes
do; what another host sees of them cannot be tried from here.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import tempfile
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from promoter.storage.files import free_bytes
from promoter.storage.seed import can_reflink

BLOCK = 1 << 16
LOST_LOCKS = Path("/sys/module/nfs/parameters/recover_lost_locks")
EXPORTED = Path("/var/lib/nfs/etab")
NFS = ("nfs", "nfs4")
LEAST_NFS = (4, 1)


@dataclass(frozen=True)
class Mount:
    """A mount: its file system's ``kind``, as the kernel calls it, and its options."""

    kind: str
    options: frozenset[str]


def mount_of(path: Path) -> Mount:
    """The mount that ``path`` lies on. Source: proc(5), ``mountinfo``."""
    found, longest = Mount("", frozenset()), -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        _, _, _, _, point, options, *_ = before.split()
        kind, _, more = (*after.split(), "", "")[:3]
        if len(point) >= longest and path.is_relative_to(_unescaped(point)):
            found, longest = (
                Mount(kind, frozenset((*options.split(","), *more.split(",")))),
                len(point),
            )
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def is_exported(path: Path) -> bool:
    """Does this host's NFS server give ``path`` to others? Source: exportfs(8), ``etab``."""
    try:
        lines = EXPORTED.read_text().splitlines()
    except FileNotFoundError:
        return False
    return any(path.is_relative_to(_unescaped(line.partition("\t")[0])) for line in lines)


def nfs_faults(options: Collection[str]) -> tuple[str, ...]:
    """What of an NFS mount's options breaks locks or leases (nfs(5))."""
    values = dict(option.partition("=")[::2] for option in options)
    version = values.get("vers", "")
    faults = []
    if tuple(map(int, re.findall(r"\d+", version))) < LEAST_NFS:
        faults.append(f"it is NFS {version or 'of an unknown version'}: 4.1 or newer is needed")
    if "hard" not in values:
        faults.append("it is mounted soft: a write may be lost without a word")
    if "nolock" in values or values.get("local_lock", "none") != "none":
        faults.append("its locks are this host's own (nolock or local_lock)")
    if "nocto" in values:
        faults.append("it is mounted nocto: what another host wrote may not be seen")
    if values.get("lookupcache") != "none":
        faults.append("it is mounted without lookupcache=none: a lease's next epoch may be hidden")
    return tuple(faults)


def _lost_locks_come_back() -> bool:
    with suppress(OSError):
        return LOST_LOCKS.read_text().strip() == "Y"
    return False


@dataclass(frozen=True)
class Abilities:
    """What was found. ``free`` is in bytes; ``faults`` are those of an NFS mount."""

    directory: Path
    file_system: str
    free: int
    hard_links: bool
    reflink: bool
    direct_io: bool
    flock: bool
    ofd_locks: bool
    faults: tuple[str, ...] = ()


def abilities(directory: Path) -> Abilities:
    """Try what a directory's file system can do. Raises OSError where nothing can be made."""
    mount = mount_of(directory.resolve())
    faults = nfs_faults(mount.options) if mount.kind in NFS else ()
    if mount.kind in NFS and _lost_locks_come_back():
        faults += ("nfs.recover_lost_locks is on: a lock that was lost is taken again unasked",)
    with tempfile.TemporaryDirectory(prefix=".promoter-doctor-", dir=directory) as name:
        place = Path(name)
        file = place / "file"
        file.write_bytes(bytes(BLOCK))
        return Abilities(
            directory=directory,
            file_system=mount.kind,
            free=free_bytes(directory),
            hard_links=_works(lambda: _links(file, place / "link")),
            reflink=can_reflink(file, place),
            direct_io=_works(lambda: _opens_directly(file)),
            flock=_works(lambda: _excludes(file, _flock)),
            ofd_locks=_works(lambda: _excludes(file, _ofd_lock)),
            faults=faults,
        )


def _works(attempt: Callable[[], bool]) -> bool:
    try:
        return attempt()
    except OSError:
        return False


def _links(file: Path, link: Path) -> bool:
    """A link can be made, and only where nothing is."""
    os.link(file, link)
    try:
        os.link(file, link)
    except FileExistsError:
        return True
    return False


def _opens_directly(file: Path) -> bool:
    os.close(os.open(file, os.O_RDWR | os.O_DIRECT))
    return True


def _excludes(file: Path, lock: Callable[[int], None]) -> bool:
    with ExitStack() as stack:
        first, second = (stack.enter_context(file.open("r+b")).fileno() for _ in range(2))
        lock(first)
        try:
            lock(second)
        except BlockingIOError:
            return True
        return False


def _flock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _ofd_lock(fd: int) -> None:
    fcntl.fcntl(
        fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0)
    )
