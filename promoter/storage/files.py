"""Files as they are on this host: identity, durability, who has them open, room."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promoter.chain import FileId, FileStamp

QEMU_PERMISSION_BYTES = range(100, 104)
QEMU_UNSHARED_BYTES = range(200, 204)
WRITE, RESIZE = 1, 3
"""Which of these bytes are a permission's (QAPI ``BlockPermission``)."""
LOCK = "hhqqi4x"
"""``struct flock``."""


def file_id(path: Path) -> FileId | None:
    """The file that ``path`` itself names (a symbolic link is not followed)."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return FileId(found.st_dev, found.st_ino)


def stamp(path: Path) -> FileStamp | None:
    """What ``path`` leads to and when it was last written; None when it is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return FileStamp(FileId(found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_behind(path: Path) -> None:
    """Have the kernel begin to store what of a file is only in the page cache, and forget the
    rest of it. Nothing is waited for, and nothing is promised.

    Source: posix_fadvise(2), POSIX_FADV_DONTNEED.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Put a file in the place of another: whole and durable, and with no more than
    ``mode`` from the first moment.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    temporary.rename(path)


def free_bytes(directory: Path) -> int:
    """Bytes this process may still allocate on the directory's file system."""
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize


def open_files(pid: int) -> frozenset[FileId]:
    """The files a process has open. Raises PermissionError for another user's process."""
    return frozenset(_ids(Path(f"/proc/{pid}/fd")))


def _ids(directory: Path) -> Iterator[FileId]:
    for entry in directory.iterdir():
        try:
            found = entry.stat()
        except FileNotFoundError:
            continue
        yield FileId(found.st_dev, found.st_ino)


def is_locked(path: Path) -> bool:
    """Does a QEMU process hold its image lock on the file?

    Source: QEMU's block/file-posix.c: open file description locks, byte 100+i
    for a permission held and 200+i for one not shared.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        return any(_busy(fd, byte) for byte in (*QEMU_PERMISSION_BYTES, *QEMU_UNSHARED_BYTES))
    finally:
        os.close(fd)


@contextmanager
def kept_from_writers(path: Path) -> Iterator[None]:
    """No QEMU can open the file to write meanwhile. Raises BlockingIOError when one has it so.

    Source: QEMU's block/file-posix.c, as a process that does not share the permissions to write
    and to resize: it takes its locks, and then looks for those of others.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for permission in (WRITE, RESIZE):
            byte = QEMU_UNSHARED_BYTES[permission]
            request = struct.pack(LOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        if any(_busy(fd, QEMU_PERMISSION_BYTES[permission]) for permission in (WRITE, RESIZE)):
            raise BlockingIOError(errno.EAGAIN, "a process may write to it", str(path))
        yield
    finally:
        os.close(fd)


def is_written(path: Path) -> bool:
    """Does a QEMU process hold the lock of one that may write to the file?"""
    fd = os.open(path, os.O_RDONLY)
    try:
        return _busy(fd, QEMU_PERMISSION_BYTES[WRITE])
    finally:
        os.close(fd)


def _busy(fd: int, byte: int) -> bool:
    request = struct.pack(LOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    found: int = struct.unpack(LOCK, answer)[0]
    return found != fcntl.F_UNLCK


def is_flocked(path: Path) -> bool:
    """Does a process of this host hold the file by flock(2), or can that not be known?"""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def is_open(path: Path) -> bool:
    """Does any process that we may look into have the file open?"""
    wanted = stamp(path)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted and wanted.id in open_files(int(process.name)):
                return True
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
    return False
