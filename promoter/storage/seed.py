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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

from promoter.chain import FileStamp, Image
from promoter.errors import NoSpace, Refused
from promoter.storage import images
from promoter.storage.files import stamp, sync, write_behind
from promoter.storage.images import LONGEST_NAP, Backing, Report
from promoter.storage.pace import Pace

FICLONE = 0x40049409
CHUNK = 8 * 1024 * 1024
LABEL = "security.selinux"
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

    ``like`` is the file whose owner, mode and SELinux label the seed gets. With ``backing`` it
    lies above that image, and ``layers`` are those above it.
    """

    layers: tuple[Image, ...]
    part: Path
    method: SeedMethod
    geometry: Geometry
    virtual_size: int
    like: Path
    backing: Backing | None = None


def copies_only_data(layer: Image, wanted: Geometry) -> bool:
    """Does copying the layer's file bring its guest data, in that format, and nothing else?

    A copied qcow2 would bring its bitmaps and snapshots along, and share its external
    data file with the base and write into it.
    """
    if layer.format == "raw":
        return layer.file_driver == "file" and wanted.format == "raw"
    return _is_plain(layer) and layer.format == wanted.format and layer.compat == "1.1"


def can_merge(layers: tuple[Image, ...]) -> bool:
    """Can the upper layers be committed into a copy of the lowest, each into what is below?"""
    grows = all(upper.virtual_size >= lower.virtual_size for upper, lower in pairwise(layers))
    return grows and all(map(_is_plain, layers[:-1]))


def _is_plain(layer: Image) -> bool:
    more = layer.data_file or layer.encrypted or layer.snapshots or layer.bitmaps
    return (layer.format, layer.file_driver) == ("qcow2", "file") and not more


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


async def make_seed(spec: SeedSpec, pace: Pace, report: Report) -> FileStamp:
    """Build the seed at ``spec.part``, durable; cancelling it stops the copying.

    Raises `NoSpace`, `ImageError` or OSError; what was built so far is then removed.
    """
    discard(spec.part)
    try:
        await _fill(spec, pace, report)
        await _resize(spec)
        await asyncio.to_thread(_finish, spec)
    except OSError as error:
        discard(spec.part)
        if error.errno == errno.ENOSPC:
            raise NoSpace(f"no space left for {spec.part}") from error
        raise
    except BaseException:  # a cancellation too
        discard(spec.part)
        raise
    made = stamp(spec.part)
    assert made
    return made


async def _resize(spec: SeedSpec) -> None:
    if spec.backing:  # it was made in its size
        return
    geometry, size = spec.geometry, spec.virtual_size
    grows = spec.method is not SeedMethod.NONE and size > spec.layers[0].virtual_size
    preallocation = geometry.preallocation if grows else Preallocation.OFF
    await images.resize(spec.part, geometry.format, size, preallocation)


def discard(part: Path) -> None:
    """Remove a half-made seed."""
    for file in (_delta(part), part):
        file.unlink(missing_ok=True)


def _delta(part: Path) -> Path:
    """Where a layer is copied to before it is committed into the part."""
    return part.with_name(f"{part.name}.delta")


def publish(part: Path, target: Path) -> None:
    """Give a whole seed its name. Raises `Refused` when the name is taken."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise Refused(f"{target} exists", "Choose another --target, or move it away.") from None
    part.unlink()
    sync(target.parent)


async def _fill(spec: SeedSpec, pace: Pace, report: Report) -> None:
    geometry = spec.geometry
    match spec.method:
        case SeedMethod.REFLINK:
            await asyncio.to_thread(_reflink, _file(spec.layers[-1]), spec.part)
            for layer in reversed(spec.layers[:-1]):
                await _merge(layer, spec, pace, report)
        case SeedMethod.COPY:
            await _copy(spec, pace, report)
        case SeedMethod.CONVERT if spec.backing:
            await _gather(spec, spec.backing, pace, report)
        case SeedMethod.CONVERT:
            await images.convert(
                spec.layers,
                spec.part,
                geometry.format,
                geometry.options,
                pace=pace,
                report=report,
            )
        case SeedMethod.NONE:
            await _create(spec, spec.backing)


async def _create(spec: SeedSpec, backing: Backing | None) -> None:
    geometry = spec.geometry
    made = (spec.part, geometry.format, geometry.options, spec.virtual_size)
    await images.create(*made, backing)


async def _gather(spec: SeedSpec, backing: Backing, pace: Pace, report: Report) -> None:
    """Write what the layers hold above ``backing`` into one image on it."""
    top = spec.layers[0]
    await _create(spec, Backing(_file(top), top.format))
    total = sum(layer.allocated for layer in spec.layers)
    await images.rebase(
        spec.part,
        backing,
        pace=pace,
        report=lambda percent: report(int(total * percent / 100), total),
    )


async def _merge(layer: Image, spec: SeedSpec, pace: Pace, report: Report) -> None:
    """Commit a copy of ``layer``, which shares its extents, into the part."""
    delta = _delta(spec.part)
    await asyncio.to_thread(_reflink, _file(layer), delta)
    await images.commit(
        delta,
        spec.part,
        spec.geometry.format,
        pace=pace,
        report=lambda percent: report(int(layer.allocated * percent / 100), layer.allocated),
    )
    delta.unlink()


def _reflink(source: Path, copy: Path) -> None:
    with (
        _opened(source, os.O_RDONLY) as base,
        _opened(copy, os.O_CREAT | os.O_EXCL | os.O_RDWR) as part,
    ):
        fcntl.ioctl(part, FICLONE, base)


async def _copy(spec: SeedSpec, pace: Pace, report: Report) -> None:
    stop = threading.Event()
    work = asyncio.to_thread(_copy_file, _file(spec.layers[0]), spec.part, stop, pace, report)
    try:
        await asyncio.shield(copying := asyncio.ensure_future(work))
    except asyncio.CancelledError:
        stop.set()
        await copying
        raise


def _copy_file(source: Path, copy: Path, stop: threading.Event, pace: Pace, report: Report) -> None:
    with (
        _opened(source, os.O_RDONLY) as base,
        _opened(copy, os.O_CREAT | os.O_EXCL | os.O_RDWR) as part,
    ):
        size = os.fstat(base).st_size
        os.ftruncate(part, size)
        extents = list(_data_extents(base, size))
        total = sum(end - start for start, end in extents)
        done = 0
        for start, end in extents:
            while start < end and not stop.is_set():
                moved = _copy_range(base, part, start, min(CHUNK, end - start))
                start, done = start + moved, done + moved
                os.posix_fadvise(part, 0, start, os.POSIX_FADV_DONTNEED)  # as `write_behind`
                report(done, total)
                while (left := pace.delay(done)) > 0 and not stop.is_set():
                    stop.wait(min(left, LONGEST_NAP))


def _file(layer: Image) -> Path:
    assert layer.file, f"{layer.node}: checked to be a local file"
    return layer.file


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


def _finish(spec: SeedSpec) -> None:
    """The owner, mode and label of the disk it will replace, on stable storage."""
    like = spec.like.stat()
    spec.part.chmod(stat.S_IMODE(like.st_mode))
    if (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(spec.part, like.st_uid, like.st_gid)
    with suppress(OSError):  # there is none, or not on this file system; libvirt labels again
        os.setxattr(spec.part, LABEL, os.getxattr(spec.like, LABEL))
    sync(spec.part)
    write_behind(spec.part)
    sync(spec.part.parent)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
