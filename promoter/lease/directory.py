"""A directory on shared storage that several hosts write, and that anybody may have prepared.

A file appears whole or not at all, and on stable storage unless that is not asked for. No symbolic
link is followed, nothing but regular files is read, and no more of them than `LARGEST` bytes. What
the storage says comes out as `Refused` or `NoSpace` (nothing was changed), or as `CouldNotTell`.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from promoter.errors import NoSpace, PromoterError, Refused
from promoter.lease.record import LARGEST
from promoter.lease.store import CouldNotTell

STALE_RETRIES = 5
TEMPORARY = ".tmp-"
ABANDONED = 3600.0
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
MISLEADING = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)
Result = TypeVar("Result")


class SharedDirectory:
    """The directory at ``path``, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Make the directory, durably. Repeatable."""
        with self._translated("make"):
            if not self.path.is_dir():
                with suppress(FileExistsError):
                    self.path.mkdir()
                _sync(self.path.parent)
            _sync(self.path)

    def names(self) -> list[str]:
        """What is in it; nothing when it is not there."""
        return self._tried("list", _names) or []

    def exists(self, name: str) -> bool:
        """Is there a file of this name?"""
        return self._tried("look into", lambda fd: _exists(fd, name)) or False

    def read(self, name: str) -> bytes | None:
        """The bytes of a regular file, `LARGEST` + 1 at most; None when it is not there."""
        return self._tried(f"read {name} in", lambda fd: _read(fd, name))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Make the file unless there is one. Only one of several that try gets True.

        ``data`` must be unlike anybody else's: a server that repeats a lost answer calls one's
        own file one that existed before.
        """

        def put(directory: int) -> bool:
            with _temporary(directory, data, durable=True) as temporary:
                mine = self._link(directory, temporary, name, data)
                os.fsync(directory)
                return mine

        made = self._tried(f"write {name} in", put)
        if made is None:
            raise CouldNotTell(f"{self.path} has vanished", "Look for what removes lease files.")
        return made

    def _link(self, directory: int, temporary: str, name: str, data: bytes) -> bool:
        try:
            os.link(
                temporary,
                name,
                src_dir_fd=directory,
                dst_dir_fd=directory,
                follow_symlinks=False,
            )
        except FileExistsError:
            return _read(directory, name) == data
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            raise Refused(
                f"{self.path}: this file system makes no hard links ({error.strerror})",
                "A lease needs them: link(2) is how one of several claims wins. Keep the disk on"
                " NFS, ext4, XFS or another file system that has them.",
            ) from error
        return True

    def replace(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Put a file in its place, whatever was there. Not ``durable``: after a power cut what was
        there before may be again, or something torn.
        """

        def put(directory: int) -> bool:
            with _temporary(directory, data, durable=durable) as temporary:
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                if durable:
                    os.fsync(directory)
            return True

        self._tried(f"write {name} in", put)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""

        def unlink(directory: int) -> None:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)

        self._tried(f"remove {name} in", unlink)

    def sweep(self) -> None:
        """Remove what writers that were killed left behind, when that was long ago.

        Ages are by this host's clock; one that is far ahead removes what another host is
        writing, which then could not tell, and tries again.
        """

        def unlink(directory: int) -> None:
            for name in _names(directory):
                if name.startswith(TEMPORARY):
                    with suppress(FileNotFoundError, PermissionError):
                        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                        if found.st_mtime < time.time() - ABANDONED:
                            os.unlink(name, dir_fd=directory)

        with suppress(PromoterError):  # it is only for order's sake
            self._tried("sweep", unlink)

    def open_own(self, name: str) -> int:
        """A descriptor to read and write a file that stays, made if it is not there."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = self._tried(f"open {name} in", lambda fd: os.open(name, flags, 0o644, dir_fd=fd))
        if fd is None:
            raise CouldNotTell(f"{self.path} has vanished", "Look for what removes lease files.")
        return fd

    def _tried(self, doing: str, act: Callable[[int], Result]) -> Result | None:
        """What ``act`` returns for the open directory, None when there is no directory."""
        with self._translated(doing):
            for attempt in range(STALE_RETRIES):
                with suppress(FileNotFoundError):
                    try:
                        with _directory(self.path) as fd:
                            return act(fd)
                    except OSError as error:
                        if error.errno != errno.ESTALE or attempt == STALE_RETRIES - 1:
                            raise
                    continue
                return None
        return None

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _translate(error, doing, self.path) from error


def _translate(error: OSError, doing: str, path: Path) -> PromoterError:
    what = f"cannot {doing} {path}: {error.strerror}"
    if error.errno in FULL:
        return NoSpace(what, "Nothing was changed. Make room there and try again.")
    if error.errno in FORBIDDEN:
        return Refused(what, "The lease is kept beside the disk: let promoter write there.")
    if error.errno in MISLEADING:
        return Refused(
            f"{what}: it is not what a lease is made of",
            "Lease files are regular files in real directories; links are not followed. Somebody"
            " put something else there: find out who.",
        )
    return CouldNotTell(what, "The storage does not work as it should; try again when it does.")


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _names(directory: int) -> list[str]:
    return os.listdir(directory)


def _exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _read(directory: int, name: str) -> bytes | None:
    try:
        fd = os.open(
            name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory
        )
    except FileNotFoundError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENXIO, f"{name} is no regular file")
        return _read_all(fd)
    finally:
        os.close(fd)


def _read_all(fd: int) -> bytes:
    data = b""
    while len(data) <= LARGEST and (more := os.read(fd, LARGEST + 1 - len(data))):
        data += more
    return data


@contextmanager
def _temporary(directory: int, data: bytes, *, durable: bool) -> Iterator[str]:
    """A file under a name of its own, gone afterwards."""
    name = TEMPORARY + secrets.token_hex(8)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o644, dir_fd=directory)
    try:
        try:
            _write_all(fd, data)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        yield name
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _sync(path: Path) -> None:
    with _directory(path) as fd:
        os.fsync(fd)
