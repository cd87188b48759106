"""Signs of life: heartbeats, the image lock, the kind of storage, and the fence.

A host beats by writing a counter through a locked descriptor, so that a lock that the storage
has lost shows as an error. An observer times *unchanged* bytes on its own boot clock, which
goes on in a suspend; no wall clock is read, and no two clocks are compared.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from promoter.errors import Refused
from promoter.lease.directory import SharedDirectory
from promoter.lease.host import Host
from promoter.lease.record import LeaseRecord
from promoter.lease.rules import Evidence, Lock, Storage, beat
from promoter.lease.store import CouldNotTell, LeaseStore
from promoter.storage.abilities import is_exported, mount_of
from promoter.storage.files import is_locked

BEAT_EVERY = 5.0
FENCE_TIMEOUT = 60.0
LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs"}
LOCAL |= {"tmpfs", "xfs", "zfs"}
Clock = Callable[[], float]


def boot_clock() -> float:
    """Seconds since boot, those asleep too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Heartbeat:
    """This host's heartbeat in one pool. One process a host beats; others stand by."""

    def __init__(self, hosts: SharedDirectory, host: Host) -> None:
        self._hosts, self._host = hosts, host
        self._fd: int | None = None
        self._count = 0

    def beat(self) -> bool:
        """Beat once; False when another process of this host does.

        Raises `Refused` when another *machine* beats under this host's name, and `CouldNotTell`
        when the storage has lost the lock or does not answer.
        """
        if self._fd is None and not self._lock():
            return False
        assert self._fd is not None
        self._count += 1
        try:
            os.pwrite(self._fd, f"{self._host.boot} {self._count:020}\n".encode(), 0)
            os.fsync(self._fd)
        except OSError as error:
            self.stop()
            raise CouldNotTell(
                f"cannot beat in {self._hosts.path}: {error.strerror}",
                "Others will think that this host is dead. Look at the storage.",
            ) from error
        return True

    def _lock(self) -> bool:
        SharedDirectory(self._hosts.path.parent).make()
        self._hosts.make()
        fd = self._hosts.open_own(self._host.name)
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        except OSError:
            said = os.pread(fd, 256, 0).decode(errors="replace")
            os.close(fd)
            self._check_boot(said)
            return False
        before = re.search(r" (\d+)\n", os.pread(fd, 256, 0).decode(errors="replace"))
        self._fd, self._count = fd, int(before[1]) if before else 0
        return True

    def _check_boot(self, said: str) -> None:
        if said and not said.startswith(self._host.boot):
            raise Refused(
                f"another machine is host {self._host.name} too: it beats in {self._hosts.path}",
                "Give each its own name: write one into host-id in the state directory.",
            )

    def stop(self) -> None:
        """Beat no more; another process of this host may."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Silence:
    """For how long one thing has stood unchanged, as this observer saw it."""

    def __init__(self, clock: Clock = boot_clock) -> None:
        self._clock = clock
        self._seen: object = None
        self._since = clock()

    def of(self, now: object) -> float:
        """Seconds since it was first seen to be ``now``."""
        if now != self._seen:
            self._seen, self._since = now, self._clock()
        return self.seconds

    @property
    def seconds(self) -> float:
        """For how long it has been what it was seen to be last."""
        return self._clock() - self._since


class Observer:
    """What can be said of a lease's owner: it has to be looked at more than once."""

    def __init__(self, store: LeaseStore, disk: Path, clock: Clock = boot_clock) -> None:
        self._store, self._disk = store, disk
        self._pulse, self._record = Silence(clock), Silence(clock)

    def unchanged(self, record: LeaseRecord) -> float:
        """For how many seconds this very record has stood."""
        return self._record.of(record)

    def evidence(self, record: LeaseRecord) -> Evidence:
        """Of whoever holds the disk, or lent it."""
        owner = record.responsible
        pulse = self._store.pulse(owner.host) if owner else b""
        silent = self._pulse.of((owner, pulse))
        return Evidence(record.epoch, beat(silent), lock_on(self._disk), storage_of(self._disk))


def lock_on(disk: Path) -> Lock:
    """Has a QEMU the disk open? Asked through a fresh descriptor."""
    try:
        return Lock.HELD if is_locked(disk) else Lock.FREE
    except OSError as error:
        raise CouldNotTell(
            f"cannot look at the locks of {disk}: {error.strerror}", "Look at the storage."
        ) from error


def storage_of(path: Path) -> Storage:
    """Local only where the file system is known to be, and no other host has it by NFS from here;
    everything else may lose locks.
    """
    local = mount_of(path).kind in LOCAL and not is_exported(path)
    return Storage.LOCAL if local else Storage.NETWORK


def fence(state: Path, host: str, disk: Path, epoch: int) -> bool:
    """Run the operator's fence command ``STATE/fence HOST DISK EPOCH``; False: there is none.

    Only its exit code 0 says that the host can write no more. Raises `Refused` else.
    """
    command = state / "fence"
    if not command.exists():
        return False
    words = [str(command), host, str(disk), str(epoch)]
    try:
        ran = subprocess.run(words, timeout=FENCE_TIMEOUT, check=False, capture_output=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _not_fenced(command, host, str(error)) from error
    if ran.returncode:
        said = ran.stderr.decode(errors="replace").strip()[-500:]
        raise _not_fenced(command, host, f"exit code {ran.returncode} {said}")
    return True


def _not_fenced(command: Path, host: str, why: str) -> Refused:
    return Refused(
        f"{command} did not fence host {host}: {why}",
        "Nothing was changed: that host may still write. Cut it off by other means.",
    )
