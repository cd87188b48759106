"""Leases as files beside their disks: the default store.

    disk.qcow2.lease             the newest record, for people and quick reads
    disk.qcow2.lease.d/00000042  one immutable record an epoch, made with link(2)
    disk.qcow2.lease.d/requests/ release requests by ticket, and their answers
    disk.qcow2.lease.d/work      how far the operation is that works on the disk
    POOL/.promoter/hosts/HOST    one heartbeat a host; the pool is the disk's directory

The highest epoch is the truth. A number is never freed for reuse: with every epoch there, a
link to the next one can succeed only once, however old the view is that it was made from.
"""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from promoter.errors import PromoterError, Refused
from promoter.lease.directory import SharedDirectory
from promoter.lease.ledger import Ledger
from promoter.lease.record import (
    Answer,
    BadRecord,
    DiskIdentity,
    LeaseRecord,
    Request,
    Work,
    encode,
    parse,
)
from promoter.lease.rules import found
from promoter.lease.store import Asked, CouldNotTell

NUMBER = re.compile(r"[0-9]{8}")
MOST_REQUESTS = 256
WORK = "work"
WATCH_EVERY = 0.1


class LeaseFile:
    """The lease of the file at ``disk``. Raises `Refused` when that is no regular file, unless one
    was there whose lease is left.

    What is written is told to the ``ledger``.
    """

    def __init__(self, disk: Path, ledger: Ledger | None = None) -> None:
        self.disk = _path_of(disk)
        if self.is_there:
            self.identity("")
        self.beside = SharedDirectory(self.disk.parent)
        self.epochs = SharedDirectory(directory_of(self.disk))
        self.queue = SharedDirectory(self.epochs.path / "requests")
        self.hosts = hosts_of(self.disk.parent)
        self.ledger = ledger
        self._seen = 0  # the newest epoch so far: before it nothing needs to be looked at again

    @property
    def is_there(self) -> bool:
        """Is there a file, and not only a lease that was left?"""
        return self.disk.exists()

    def identity(self, uuid: str) -> DiskIdentity:
        """The file that is there now, under the name ``uuid``."""
        try:
            found = self.disk.lstat()
        except FileNotFoundError as error:
            raise Refused(f"no such disk: {self.disk}", "Its lease was left.") from error
        if not stat.S_ISREG(found.st_mode):
            raise Refused(
                f"{self.disk} is not a regular file", "Leases lie beside image files; see doctor."
            )
        return DiskIdentity(uuid, found.st_dev, found.st_ino)

    def read(self) -> LeaseRecord | None:
        record = self.read_any()
        if record is None:
            return None
        if record.elsewhere and not (record.owner and self.is_there):
            raise Refused(
                f"{self.disk} is not the disk any more: it is {record.elsewhere}",
                "Use it by that path.",
            )
        if (seen := found(record, self.identity("").inode)) is None:
            raise BadRecord(
                f"{self.disk}: its lease is about another file (inode {record.disk.inode})",
                "The image was replaced or copied. When you know that nobody has it open: promoter"
                f" lease break {self.disk} --epoch {record.epoch} --reason …",
            )
        return seen

    def read_any(self) -> LeaseRecord | None:
        """The newest record, even if it is about another file."""
        newest = self._seen or self._list()
        if not newest:
            return None
        while self.epochs.exists(_name(newest + 1)):
            newest += 1
        self._expect(self.epochs.exists(_name(newest)), f"epoch {newest} was removed")
        self._seen = newest
        return self._epoch(newest)

    def _list(self) -> int:
        """The newest epoch, when all before it are there too."""
        numbers = sorted(int(name) for name in self.epochs.names() if NUMBER.fullmatch(name))
        if not numbers:
            self._expect(not self.beside.exists(self._pointer), "there is a lease but no epochs")
            return 0
        self._expect(numbers == list(range(1, numbers[-1] + 1)), "epochs are missing")
        self.epochs.sweep()
        return numbers[-1]

    @property
    def _pointer(self) -> str:
        return f"{self.disk.name}.lease"

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise BadRecord(
                f"{self.epochs.path} does not add up: {otherwise}",
                "Somebody removed files there. Put them back from a copy of the directory; or, when"
                " you know that nobody has the disk open, move lease and directory away.",
            )

    def _epoch(self, number: int) -> LeaseRecord:
        name = _name(number)
        data = self.epochs.read(name)
        if data is None:
            raise CouldNotTell(f"{self.epochs.path / name} has vanished", "Read it again.")
        record = parse(LeaseRecord, data, str(self.epochs.path / name))
        self._expect(record.epoch == number, f"{name} holds epoch {record.epoch}")
        return record

    def compare_and_swap(self, expected: int, record: LeaseRecord) -> bool:
        assert record.epoch == expected + 1, "a rule returned it for another epoch"
        before = self.read_any()
        if (before.epoch if before else 0) != expected:
            return False
        if not expected:
            self.epochs.make()
        data = encode(record)
        if not self.epochs.put_if_absent(_name(record.epoch), data):
            return False
        with suppress(PromoterError):  # the epoch is the truth and is written
            self.beside.replace(self._pointer, data)
        if self.ledger:
            self.ledger.wrote(self.disk, before, record)
        return True

    def watch(self, epoch: int, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not self.epochs.exists(_name(epoch + 1)):
            if time.monotonic() >= deadline:
                return False
            time.sleep(WATCH_EVERY)
        return True

    def pulse(self, host: str) -> bytes:
        return self.hosts.read(host) or b""

    def ask(self, request: Request) -> int:
        self.queue.make()
        data = encode(request)
        while True:
            ticket = max(self._tickets(), default=0) + 1
            if self.queue.put_if_absent(_name(ticket), data):
                return ticket

    def renew(self, asked: Asked) -> None:
        self.queue.replace(_name(asked.ticket), encode(asked.request))

    def _tickets(self) -> list[int]:
        return sorted(int(name) for name in self.queue.names() if NUMBER.fullmatch(name))

    def requests(self) -> Sequence[Asked]:
        found = []
        for ticket in self._tickets()[:MOST_REQUESTS]:
            with suppress(BadRecord):  # hostile or torn: it must not keep others waiting
                if data := self.queue.read(_name(ticket)):
                    found.append(Asked(ticket, parse(Request, data, _name(ticket))))
        return found

    def answer(self, ticket: int, answer: Answer) -> None:
        self.queue.replace(f"{_name(ticket)}.answer", encode(answer))

    def answer_to(self, asked: Asked) -> Answer | None:
        name = f"{_name(asked.ticket)}.answer"
        data = self.queue.read(name)
        answer = parse(Answer, data, name) if data else None
        return answer if answer and answer.request == asked.request.id else None

    def tell(self, work: Work) -> None:
        self.epochs.replace(WORK, encode(work))

    def told(self) -> Work | None:
        data = self.epochs.read(WORK)
        return parse(Work, data, str(self.epochs.path / WORK)) if data else None

    def withdraw(self, ticket: int) -> None:
        self.queue.remove(f"{_name(ticket)}.answer")
        self.queue.remove(_name(ticket))


def _path_of(disk: Path) -> Path:
    """Where its lease lies beside it, also when only that is left."""
    with suppress(OSError, RuntimeError):
        return disk.resolve(strict=True)
    with suppress(OSError, RuntimeError):
        left = disk.parent.resolve(strict=True) / disk.name
        if directory_of(left).is_dir():
            return left
    raise Refused(f"no such disk: {disk}", "Give the path of an image.")


def directory_of(disk: Path) -> Path:
    """Where the epochs of a disk's lease lie."""
    return disk.with_name(f"{disk.name}.lease.d")


def hosts_of(pool: Path) -> SharedDirectory:
    """Where the hosts of a pool leave their heartbeats."""
    return SharedDirectory(pool / ".promoter" / "hosts")


def _name(number: int) -> str:
    return f"{number:08}"
