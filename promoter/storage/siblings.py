"""Who else reads an image: overlays in files, and whoever has it open.

An image that somebody else reads through must not be written into. Looked for are

* overlays: qcow2 headers in the directories of the chain (not below them) and, with everything
  below them, in those given; symbolic links to files are followed, to directories not. A layer
  that promoter has merged, and called so, reads nothing any more. An
  overlay on an overlay counts, and an image that shares an external data file. Files are told
  apart by device and inode, never by name;
* overlays that a layer's lease lists (`Registered`), also those that cannot be found here;
* processes that have the image open, by ``/proc/*/fd``; loop devices; and QEMU's image locks
  (``/proc/locks``) of processes that cannot be seen, such as another container's.

What is neither running here nor in these directories is not found: powered-off guests
elsewhere, other hosts, overlays of other formats than qcow2 (QED, VMDK, VHD), qcow2 in block
devices, and a name in a ``json:`` header that starts from a directory only its QEMU knows. What
could not be looked into is in `Siblings.unreadable`, and says nothing about readers.

Source: QEMU's docs/interop/qcow2.txt and block/file-posix.c; proc(5), ``fdinfo`` and ``locks``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import struct
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from promoter.chain import BackingChain, Disk, FileId, Image
from promoter.storage.files import QEMU_PERMISSION_BYTES, QEMU_UNSHARED_BYTES
from promoter.storage.images import QCOW2_MAGIC
from promoter.storage.names import MERGED

HEADER_SIZE = 4096
SHORTEST, V3_SHORTEST = 72, 104
LONGEST_NAME, FARTHEST_NAME = 1023, 1 << 21  # in the first cluster
HAS_DATA_FILE = 1 << 2
END, DATA_FILE = 0, 0x44415441
ASIDE = re.compile(r"\.aside-[0-9a-f]{8}$")
OFD_LOCK = re.compile(r"OFDLCK +ADVISORY +\w+ +-?\d+ +(\w+):(\w+):(\d+) (\d+) ")
NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


@dataclass(frozen=True)
class Holder:
    """Who has a file open: ``name`` is a guest's, else the program's or the loop device's."""

    name: str
    pid: int | None = None

    def __str__(self) -> str:
        return f"{printable(self.name)}, pid {self.pid}" if self.pid else printable(self.name)


UNSEEN = Holder("a process that cannot be seen from here")


@dataclass(frozen=True)
class Reader:
    """By what an image is read besides its disk's own chain.

    ``path`` is an overlay on it, whether directly or through others, or an image that shares
    its data file; None for a holder of which no overlay was found. ``disk`` is another disk of
    the same guest, ``path`` then its active layer. ``aside``: an old overlay that promoter
    kept, to go back to. ``holders`` have it open: the overlay runs. ``listed``: a lease says so,
    whether the overlay can be found here or not.
    """

    path: Path | None
    disk: str | None = None
    aside: bool = False
    holders: tuple[Holder, ...] = ()
    listed: bool = False

    def __str__(self) -> str:
        held = " and ".join(map(str, self.holders))
        if self.path is None:
            return held
        notes = [f"{self.disk} of this guest"] if self.disk else []
        notes += ["kept by promoter"] if self.aside else []
        notes += ["listed in a lease"] if self.listed else []
        notes += [f"open in {held}"] if held else []
        name = printable(str(self.path))
        return f"{name} ({', '.join(notes)})" if notes else name


@dataclass(frozen=True)
class Unreadable:
    """What could not be looked into, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{printable(str(self.path))}: {self.reason}"


@dataclass(frozen=True)
class Registered:
    """The overlays that are said to read through a file, by whoever keeps a list of them."""

    readers: Mapping[Path, Collection[Path]]
    unreadable: tuple[Unreadable, ...] = ()


NOBODY = Registered({})


@dataclass(frozen=True)
class Siblings:
    """The readers of each image of each disk, by the disk's key and the image's node."""

    readers: Mapping[tuple[str, str], tuple[Reader, ...]]
    unreadable: tuple[Unreadable, ...]

    def of(self, disk: Disk, image: Image) -> tuple[Reader, ...]:
        return self.readers[disk.key, image.node]


def find_siblings(
    disks: Sequence[Disk],
    pid: int,
    scan: Collection[Path] = (),
    registered: Registered = NOBODY,
) -> Siblings:
    """Look for whoever else reads an image of a guest's disks. Blocks: for a thread.

    ``pid`` is the guest's own QEMU, on this host. ``scan`` has directories to look through
    besides those of the chains.
    """
    overlays = _Overlays()
    for directory in scan:
        overlays.scan(directory, deep=True)
    for directory in _directories(disks):
        overlays.scan(directory, deep=False)
    chains = {disk.key: overlays.take(disk.chain) for disk in disks}
    for file, readers in registered.readers.items():
        overlays.register(file, readers)
    above = [overlays.above(ids) for chain in chains.values() for ids in chain]
    held = _Held(pid)
    own = frozenset(file for chain in chains.values() for ids in chain for file in ids)
    held.look(own.union(*above))
    found = {
        (disk.key, image.node): tuple(_readers(disk, ids, disks, chains, overlays, held))
        for disk in disks
        for image, ids in zip(disk.chain, chains[disk.key], strict=True)
    }
    unreadable = (*registered.unreadable, *overlays.unreadable, *held.unreadable)
    return Siblings(found, unreadable)


def printable(name: str) -> str:
    """A name for people: what a terminal would obey, or cannot show, is escaped."""
    return name if name.isprintable() else repr(name)


def _readers(
    disk: Disk,
    ids: frozenset[FileId],
    disks: Sequence[Disk],
    chains: Mapping[str, Sequence[frozenset[FileId]]],
    overlays: _Overlays,
    held: _Held,
) -> Iterator[Reader]:
    own = frozenset[FileId]().union(*chains[disk.key])
    above = overlays.above(ids)
    files = above - own
    for other in disks:
        its = frozenset[FileId]().union(*chains[other.key])
        if other.key != disk.key and its & (ids | above):
            yield Reader(other.chain.active.file, disk=other.name)
            files -= its
    named = sorted(((overlays.name(file), file) for file in files), key=lambda found: found[0])
    for (aside, path), file in named:
        listed = overlays.is_listed(file)
        yield Reader(path, aside=aside, holders=held.by(file), listed=listed)
    for path in overlays.not_found(ids | above):
        yield Reader(path, listed=True)
    of_overlays = {holder for file in above - own for holder in held.by(file)} | {held.own}
    for holder in dict.fromkeys(holder for file in ids for holder in held.by(file)):
        if holder not in of_overlays:
            yield Reader(None, holders=(holder,))


def _directories(disks: Iterable[Disk]) -> list[Path]:
    """Where the images are: of a symbolic link the directory it is in and where it leads."""
    files = [file for disk in disks for image in disk.chain for file in image.files]
    return list(dict.fromkeys(d for file in files for d in (file.parent, _real(file).parent)))


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, or what is no name at all
        return path


def _identity(found: os.stat_result) -> FileId:
    """A block device is itself under every name, in a namespace of libvirt's too."""
    if stat.S_ISBLK(found.st_mode):
        return FileId(found.st_rdev, 0)
    return FileId(found.st_dev, found.st_ino)


class _Overlays:
    """Which file names which as its backing or data file, as far as it was looked at."""

    def __init__(self) -> None:
        self._unreadable: dict[Path, str] = {}
        self._names: dict[FileId, set[Path]] = defaultdict(set)
        self._above: dict[FileId, set[FileId]] = defaultdict(set)
        self._scanned: set[FileId] = set()
        self._unread: list[tuple[Path, FileId]] = []
        self._real: dict[Path, Path] = {}
        self._listed: set[FileId] = set()
        self._not_found: dict[FileId, list[Path]] = defaultdict(list)

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        return tuple(Unreadable(path, reason) for path, reason in self._unreadable.items())

    def scan(self, directory: Path, *, deep: bool) -> None:
        """Look at each file of a directory, and of those below it if ``deep``."""
        left = [_real(directory)]
        while left:
            place = left.pop()
            try:
                at = _identity(place.stat())
                if at not in self._scanned:
                    self._scanned.add(at)
                    left += self._scan_one(place, deep=deep)
            except OSError as error:
                self._unreadable[place] = error.strerror or "cannot be read"

    def _scan_one(self, directory: Path, *, deep: bool) -> list[Path]:
        below = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if MERGED.search(entry.name):
                    continue
                if entry.is_file(follow_symlinks=False) or entry.is_symlink():
                    self._look_at(Path(entry.path))
                elif deep and entry.is_dir(follow_symlinks=False):
                    below.append(Path(entry.path))
        return below

    def take(self, chain: BackingChain) -> tuple[frozenset[FileId], ...]:
        """The files of each image of a chain in use, whatever the headers say of it."""
        taken: list[frozenset[FileId]] = []
        for image in chain:
            found = {file: self._look_at(file) for file in image.files}
            gone = [file for file, at in found.items() if at is None]
            self._unreadable |= dict.fromkeys(gone, "it is not there") | self._unreadable
            ids = frozenset(filter(None, found.values()))
            for upper in taken[-1] if taken else ():
                self._link(upper, ids)
            taken.append(ids)
        return tuple(taken)

    def register(self, file: Path, readers: Iterable[Path]) -> None:
        """Take it as said that these read through the file."""
        lower = self._look_at(file)
        for reader in readers if lower else ():
            if upper := self._look_at(reader):
                self._listed.add(upper)
                self._link(upper, [lower])
            elif lower:
                self._not_found[lower].append(reader)

    def is_listed(self, file: FileId) -> bool:
        return file in self._listed

    def not_found(self, ids: frozenset[FileId]) -> list[Path]:
        """The readers of one of these files that were listed and are not here."""
        return sorted({path for file in ids for path in self._not_found[file]})

    def above(self, ids: frozenset[FileId]) -> frozenset[FileId]:
        """Everything that reads through one of these files."""
        found: set[FileId] = set()
        left = list(ids)
        while left:
            more = self._above[left.pop()] - found - ids
            found |= more
            left += more
        return frozenset(found)

    def name(self, file: FileId) -> tuple[bool, Path]:
        """Whether promoter left it aside, and its best name: one in use, and no link."""
        first, *others = [(bool(ASIDE.search(path.name)), path) for path in self._names[file]]
        if not others:
            return first
        return min(first, *others, key=lambda name: (name[0], name[1].is_symlink(), name[1]))

    def _look_at(self, path: Path) -> FileId | None:
        """Read a file's header, and of those that it names; None: there is no such file."""
        found = self._note(path)
        while self._unread:
            self._follow(*self._unread.pop())
        return found

    def _note(self, path: Path) -> FileId | None:
        """Which file it is, to be read under a name that it was not seen under before."""
        try:
            at = path.stat()
        except ValueError:  # no file can have that name
            return None
        except OSError as error:
            self._cannot(path, error)
            return None
        file = _identity(at)
        if stat.S_ISREG(at.st_mode) and path not in self._names[file]:
            self._names[file].add(path)
            if at.st_size >= SHORTEST:
                self._unread.append((path, file))
        return file

    def _follow(self, path: Path, file: FileId) -> None:
        try:
            named = list(_named_below(path))
        except (OSError, ValueError, RecursionError) as error:
            self._cannot(path, error)
            return
        places = {path.parent}  # QEMU starts from that of the name it was given, be it a link
        if named and path.is_symlink():
            places.add(_real(path).parent)
        for place in places:
            self._link(file, {self._note(self._plain(place / below)) for below in named})

    def _plain(self, path: Path) -> Path:
        """One name of a file in its directory: an image that names itself by ``../`` has no end."""
        if path.parent not in self._real:
            self._real[path.parent] = _real(path.parent)
        return self._real[path.parent] / path.name

    def _link(self, upper: FileId, lower: Iterable[FileId | None]) -> None:
        for file in lower:
            if file and file != upper:
                self._above[file].add(upper)

    def _cannot(self, path: Path, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in NOT_THERE:
            return
        reason = error.strerror if isinstance(error, OSError) else str(error)
        self._unreadable[path] = reason or "cannot be read"


def _named_below(path: Path) -> Iterator[str]:
    """The file names in a qcow2 header, none for other formats. Raises ValueError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        header = os.pread(fd, HEADER_SIZE, 0)
        if header[:4] != QCOW2_MAGIC:
            return
        version, offset, size = struct.unpack_from(">IQI", header, 4)
        if version not in (1, 2, 3) or size > LONGEST_NAME or offset > FARTHEST_NAME:
            raise ValueError("its qcow2 header makes no sense")
        if offset and size:
            backing = header[offset : offset + size]
            if len(backing) < size:
                backing = os.pread(fd, size, offset)
            if len(backing) < size:
                raise ValueError("its qcow2 header is cut short")
            yield from _files_of(backing)
        if version == 3 and (data := _data_file(header, offset)):
            yield from _files_of(data)
    finally:
        os.close(fd)


def _data_file(header: bytes, backing_offset: int) -> bytes | None:
    """The external data file that a version 3 header names, if it names one."""
    if len(header) < V3_SHORTEST:
        raise ValueError("its qcow2 header is cut short")
    (features,) = struct.unpack_from(">Q", header, 72)
    (at,) = struct.unpack_from(">I", header, 100)
    end = min(backing_offset or HEADER_SIZE, len(header))
    while features & HAS_DATA_FILE and at + 8 <= end:
        kind, size = struct.unpack_from(">II", header, at)
        if at < V3_SHORTEST or at + 8 + size > end:
            raise ValueError("its qcow2 header extensions make no sense")
        if kind == DATA_FILE:
            return header[at + 8 : at + 8 + size]
        if kind == END:
            break
        at += 8 + (size + 7) // 8 * 8
    return None  # or whoever opens it says which


def _files_of(field: bytes) -> list[str]:
    """The file names in a backing file's name: itself, or those in its ``json:``.

    QEMU takes what a header has for a C string.
    """
    name = os.fsdecode(field.partition(b"\0")[0])
    if name.startswith("json:"):
        return list(_filenames(json.loads(name[5:])))
    return [name.removeprefix("file:")]


def _filenames(value: object) -> Iterator[str]:
    """Both spellings: nested objects, and keys with dots."""
    if isinstance(value, list):
        for item in value:
            yield from _filenames(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str) and key.split(".")[-1] == "filename":
                yield item
            yield from _filenames(item)


class _Held:
    """Who has files open. ``own`` is the guest's own QEMU."""

    def __init__(self, pid: int) -> None:
        self.own = _holder(pid)
        self.unreadable: list[Unreadable] = []
        self._by: dict[FileId, dict[Holder, None]] = defaultdict(dict)
        self._locks = Counter[FileId]()

    def by(self, file: FileId) -> tuple[Holder, ...]:
        return tuple(self._by[file])

    def look(self, wanted: frozenset[FileId]) -> None:
        """Find who has one of these files open."""
        before = _all_locks()
        closed = [pid for pid in _processes() if not self._look_into(pid, wanted)]
        for device, file in _loop_devices():
            if file in wanted:
                self._by[file][device] = None
        if closed:
            what = f"what {len(closed)} of the processes have open: Permission denied"
            self.unreadable.append(Unreadable(Path("/proc"), what))
        if self.own.pid not in closed:
            locks = before & _all_locks()  # those that stayed: processes come and go
            for file in wanted:
                if locks[file] > self._locks[file]:
                    self._by[file][UNSEEN] = None

    def _look_into(self, pid: int, wanted: frozenset[FileId]) -> bool:
        """Note which of these files a process has open; False when we may not know."""
        if pid == os.getpid():
            return True
        try:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    file = _identity(fd.stat())
                    if file in wanted:
                        self._by[file][_holder(pid)] = None
                        self._locks.update(_image_locks(Path(f"/proc/{pid}/fdinfo/{fd.name}")))
        except (FileNotFoundError, ProcessLookupError):
            return True
        except PermissionError:
            return not _command(pid)  # the kernel's own threads have no files
        return True


def _processes() -> list[int]:
    return [int(process.name) for process in Path("/proc").glob("[0-9]*")]


def _command(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return []


def _holder(pid: int) -> Holder:
    """The process, by the name of its guest (``-name``) if it is a QEMU that has one."""
    words = _command(pid)
    if b"-name" in words[:-1]:
        given = os.fsdecode(words[words.index(b"-name") + 1])
        options = dict(part.partition("=")[::2] for part in given.split(","))
        return Holder(options.get("guest") or given.split(",")[0], pid)
    return Holder(Path(os.fsdecode(words[0])).name if words else "a process", pid)


def _loop_devices() -> Iterator[tuple[Holder, FileId]]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            at = Path(backing.read_text().rstrip("\n")).stat()
            yield Holder(f"/dev/{backing.parent.parent.name}"), _identity(at)


def _all_locks() -> Counter[FileId]:
    return Counter(_image_locks(Path("/proc/locks")))


def _image_locks(listing: Path) -> Iterator[FileId]:
    """The file of each image lock in ``/proc/locks`` or in a descriptor's ``fdinfo``."""
    with suppress(OSError):
        for major, minor, inode, first in OFD_LOCK.findall(listing.read_text()):
            if int(first) in (*QEMU_PERMISSION_BYTES, *QEMU_UNSHARED_BYTES):
                yield FileId(os.makedev(int(major, 16), int(minor, 16)), int(inode))
