"""A disk with a volatile write cache, for power cuts: what was not flushed can be gone.

A file system is mounted on a loop device above a file that qemu-storage-daemon exports by FUSE. Its
`blklogwrites` keeps every write and every flush, in their order. From that log the disk is made as
it is after a power cut at any instant of the past: all that was written before the last flush is
there, and of what was written since, sector by sector, what the dice say. Nothing that was only in
the page cache, or in a process, gets there.

Source: dm-log-writes, "log writes target", in the kernel's documentation: the format of the log.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import struct
import subprocess
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random

from tests.vm import MIB, wait_for

SECTOR = 512
ENTRY = struct.Struct("<4Q")  # sector, sectors, flags, unused
FLUSH, DISCARD = 1, 4
CLONE_NEWNS = 0x20000


class Keeps(Enum):
    """What a cut leaves of the writes that no flush came after."""

    NOTHING = "nothing"
    WHAT_THE_DICE_SAY = "some sectors"
    EVERYTHING = "everything"


@dataclass(frozen=True)
class Write:
    """An entry of the log, to its byte ``end``; ``length`` bytes of data are at ``data``."""

    end: int
    flush: bool
    offset: int
    length: int
    data: int


class VolatileDisk:
    """A disk of ``size`` bytes with a file system of one kind, and the log of what it was told.

    ``directory`` has its files, ``path`` is where the file system is mounted.
    """

    def __init__(self, kind: str, directory: Path, size: int = 768 * MIB) -> None:
        self.path = directory / "pool"
        self._empty, self._disk = directory / "empty", directory / "disk"
        self._exported, self._log = directory / "exported", directory / "log"
        self.path.mkdir(parents=True)
        with self._empty.open("wb") as file:
            file.truncate(size)
        subprocess.run([f"mkfs.{kind}", "-q", self._empty], check=True)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The file system, empty and mounted; all that is written to its disk is logged."""
        copy(self._empty, self._disk)
        self._log.touch()
        self._exported.touch()
        nodes = [
            f"driver=file,node-name=file,filename={self._disk}",
            f"driver=file,node-name=log,filename={self._log}",
            "driver=blklogwrites,node-name=disk,file=file,log=log",
        ]
        export = f"type=fuse,id=export,node-name=disk,mountpoint={self._exported},writable=on"
        command = ["setpriv", "--pdeathsig", "KILL", "qemu-storage-daemon"]
        command += [word for node in nodes for word in ("--blockdev", node)]
        with subprocess.Popen([*command, "--export", export]) as daemon:
            wait_for(lambda: self._exported.stat().st_size > 0, "the exported disk", 30)
            try:
                with mounted(self._exported, self.path):
                    yield
            finally:
                daemon.send_signal(signal.SIGTERM)

    @property
    def now(self) -> int:
        """This instant, as a place in the log: all that the disk has been told is before it."""
        return self._log.stat().st_size

    @contextmanager
    def after_a_cut(self, instant: int, keeps: Keeps, dice: Random) -> Iterator[None]:
        """The file system, mounted again after the power was cut at an ``instant``."""
        copy(self._empty, self._disk)
        with self._log.open("rb") as log, self._disk.open("r+b") as disk:
            writes = list(entries(log.fileno()))
            writes = writes[: bisect_right(writes, instant, key=lambda write: write.end)]
            flushed = max((n for n, write in enumerate(writes) if write.flush), default=0)
            for number, write in enumerate(writes):
                data = os.pread(log.fileno(), write.length, write.data)
                os.pwrite(disk.fileno(), data, write.offset) if number < flushed else put(
                    disk.fileno(), write, data, keeps, dice
                )
        with mounted(self._disk, self.path):
            yield


def put(disk: int, write: Write, data: bytes, keeps: Keeps, dice: Random) -> None:
    """What of one write that was not flushed is on the disk nevertheless."""
    if keeps is Keeps.EVERYTHING:
        os.pwrite(disk, data, write.offset)
    if keeps is not Keeps.WHAT_THE_DICE_SAY or dice.random() < 1 / 3:
        return
    torn = dice.random() < 1 / 2
    for at in range(0, write.length, SECTOR):
        if not torn or dice.random() < 1 / 2:
            os.pwrite(disk, data[at : at + SECTOR], write.offset + at)


def entries(log: int) -> Iterator[Write]:
    """What the disk was told, in its order."""
    at, end = SECTOR, os.fstat(log).st_size
    while at + SECTOR <= end:
        sector, sectors, flags, _ = ENTRY.unpack(os.pread(log, ENTRY.size, at))
        assert not flags & DISCARD, "FUSE makes zeroes of them"
        data, length = at + SECTOR, sectors * SECTOR
        at = data + length
        yield Write(at, bool(flags & FLUSH), sector * SECTOR, length, data)


@contextmanager
def own_mounts() -> Iterator[None]:
    """What is mounted is seen by this thread and its processes. Else every mount namespace made
    meanwhile, such as a domain's, keeps it mounted, and its device in use, to that one's end.
    """
    libc, directory = ctypes.CDLL(None, use_errno=True), Path.cwd()
    outside = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        yield
    finally:
        if libc.setns(outside, CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(outside)
        os.chdir(directory)


@contextmanager
def mounted(disk: Path, path: Path) -> Iterator[None]:
    loop = f"/dev/loop{secrets.randbelow(1 << 19) + 256}"  # another each time, as after a boot
    subprocess.run(["losetup", loop, disk], check=True)
    try:
        subprocess.run(["mount", loop, path], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", path], check=True)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
