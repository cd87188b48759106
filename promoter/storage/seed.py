"""The seed: the second base disk, filled with everything below the active layer.

Below the active layer nothing changes while the guest runs, so the seed is
made outside the guest and needs no mirror. It is built under a name of its own
(``part``), made durable, and only then given its name, so that a file under
the target's name is always a whole seed. A target that exists is never
overwritten.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from promoter.chain import FileStamp, Image
from promoter.errors import NoSpace, Refused
from promoter.storage import images
from promoter.storage.files import stamp, sync
from promoter.storage.images import Report

FICLONE = 0x40049409
CHUNK = 8 * 1024 * 1024
LEAST_EXTENDED = 16 * 1024
"""The smallest cluster that can have subclusters, in bytes."""


class SeedMethod(StrEnum):
    """How the second base disk is filled; ``none`` leaves everything to the mirror."""

    REFLINK = "reflink"
    COPY = "copy"
    CONVERT = "convert"
    NONE = "none"


class Preallocation(StrEnum):
    """What of a new image is allocated at once (QAPI ``PreallocMode``)."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


@dataclass(frozen=True)
class Geometry:
    """The shape of an image: format, cluster layout (sizes in bytes), preallocation."""

    format: str
    cluster_size: int = 64 * 1024
    extended_l2: bool = False
    preallocation: Preallocation = Preallocation.OFF

    @property
    def options(self) -> str:
        """What ``qemu-img -o`` is given to make such an image."""
        options = [f"preallocation={self.preallocation}"]
        if self.format == "qcow2":
            extended = "on" if self.extended_l2 else "off"
            options += ["compat=1.1", f"cluster_size={self.cluster_size}"]
            options += [f"extended_l2={extended}"]
        return ",".join(options)


@dataclass(frozen=True)
class SeedSpec:
    """One seed: ``layers`` as one image of ``virtual_size`` bytes.

    ``like`` is the file whose owner and mode the seed gets; ``speed`` is in bytes per
    second, 0 for no limit.
    """

    layers: tuple[Image, ...]
    part: Path
    method: SeedMethod
    geometry: Geometry
    virtual_size: int
    like: Path
    speed: int = 0


def copies_only_data(layers: tuple[Image, ...], wanted: Geometry) -> bool:
    """Does copying the one file below bring guest data and nothing else?

    A copied qcow2 would bring its bitmaps and snapshots along, and share its external
    data file with the base and write into it.
    """
    if len(layers) != 1 or layers[0].file_driver != "file":
        return False
    layer = layers[0]
    if layer.format == "raw":
        return wanted.format == "raw"
    plain = not (layer.data_file or layer.encrypted or layer.snapshots or layer.bitmaps)
    return layer.format == wanted.format == "qcow2" and layer.compat == "1.1" and plain


def can_reflink(source: Path, directory: Path) -> bool:
    """Can the directory's file system share the source's extents? Tried on an unnamed file."""
    try:
        with (
            _opened(directory, os.O_TMPFILE | os.O_RDWR) as probe,
            _opened(source, os.O_RDONLY) as base,
        ):
            fcntl.ioctl(probe, FICLONE, base)
    except OSError:
        return False
    return True


async def make_seed(spec: SeedSpec, report: Report) -> FileStamp:
    """Build the seed at ``spec.part``, durable; cancelling it stops the copying.

    Raises `NoSpace`, `ImageError` or OSError; what was built so far is then removed.
    """
    await discard(spec.part)
    try:
        await _fill(spec, report)
        await _resize(spec)
        await asyncio.to_thread(_finish, spec)
    except OSError as error:
        await discard(spec.part)
        if error.errno == errno.ENOSPC:
            raise NoSpace(f"no space left for {spec.part}") from error
        raise
    except BaseException:
        await discard(spec.part)
        raise
    made = stamp(spec.part)
    assert made
    return made


async def _resize(spec: SeedSpec) -> None:
    geometry, size = spec.geometry, spec.virtual_size
    grows = spec.method is not SeedMethod.NONE and size > spec.layers[0].virtual_size
    preallocation = geometry.preallocation if grows else Preallocation.OFF
    await images.resize(spec.part, geometry.format, size, preallocation)


async def discard(part: Path) -> None:
    """Remove a half-made seed."""
    await asyncio.to_thread(part.unlink, missing_ok=True)


def publish(part: Path, target: Path) -> None:
    """Give a whole seed its name. Raises `Refused` when the name is taken."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise Refused(f"{target} exists", "Choose another --target, or move it away.") from None
    part.unlink()
    sync(target.parent)


async def _fill(spec: SeedSpec, report: Report) -> None:
    geometry = spec.geometry
    match spec.method:
        case SeedMethod.REFLINK | SeedMethod.COPY:
            await _copy(spec, report)
        case SeedMethod.CONVERT:
            await images.convert(
                spec.layers,
                spec.part,
                geometry.format,
                geometry.options,
                direct=_takes_direct_io(spec.part),
                speed=spec.speed,
                report=report,
            )
        case SeedMethod.NONE:
            await images.create(spec.part, geometry.format, geometry.options, spec.virtual_size)


async def _copy(spec: SeedSpec, report: Report) -> None:
    stop = threading.Event()
    source = spec.layers[0].file
    assert source
    work = asyncio.to_thread(_copy_file, source, spec, stop, report)
    try:
        await asyncio.shield(copying := asyncio.ensure_future(work))
    except asyncio.CancelledError:
        stop.set()
        await copying
        raise


def _copy_file(source: Path, spec: SeedSpec, stop: threading.Event, report: Report) -> None:
    with (
        _opened(source, os.O_RDONLY) as base,
        _opened(spec.part, os.O_CREAT | os.O_EXCL | os.O_RDWR) as part,
    ):
        if spec.method is SeedMethod.REFLINK:
            fcntl.ioctl(part, FICLONE, base)
            return
        size = os.fstat(base).st_size
        os.ftruncate(part, size)
        extents = list(_data_extents(base, size))
        total = sum(end - start for start, end in extents)
        done, began = 0, time.monotonic()
        for start, end in extents:
            while start < end and not stop.is_set():
                moved = _copy_range(base, part, start, min(CHUNK, end - start))
                start, done = start + moved, done + moved
                report(done, total)
                if spec.speed:
                    stop.wait(done / spec.speed - (time.monotonic() - began))


def _copy_range(source: int, target: int, offset: int, length: int) -> int:
    try:
        moved = os.copy_file_range(source, target, length, offset, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        moved = os.pwrite(target, os.pread(source, length, offset), offset)
    if not moved:
        raise OSError(errno.EIO, "the base became shorter while it was copied")
    return moved


def _data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    offset = 0
    with suppress(OSError):  # ENXIO: only a hole is left
        while offset < size:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            offset = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, offset


def _takes_direct_io(part: Path) -> bool:
    try:
        with _opened(part.parent, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT):
            return True
    except OSError:
        return False


def _finish(spec: SeedSpec) -> None:
    """The owner and mode of the disk it will replace, on stable storage."""
    like = spec.like.stat()
    spec.part.chmod(stat.S_IMODE(like.st_mode))
    if (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(spec.part, like.st_uid, like.st_gid)
    sync(spec.part)
    sync(spec.part.parent)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
