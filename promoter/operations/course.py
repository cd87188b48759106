"""What a move has in hand while it runs: its journalled intent, its guest, what was seen last.

The actions (`acts.py` and what it calls) are functions of it; `moving.py` decides which is next.
All that they want to be known after a kill they `Course.save`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from promoter.blockjob import Progress
from promoter.errors import Interrupted, JobFailed, PromoterError, Unreachable
from promoter.guests.base import ConnectionLost, Domain, Guest, GuestView, NoGuest, PlainGuest
from promoter.operations.history import History
from promoter.operations.journal import Journal, NoteKind
from promoter.operations.leases import Leases
from promoter.operations.leftovers import kept_files, undone_file
from promoter.operations.move import DiskIntent, DiskSeen, Failure, Job, Kind, Move, Seen, Way
from promoter.operations.outcome import DiskReport
from promoter.operations.slowing import Slowing
from promoter.operations.suspended import (
    LONGEST_ABSENCE,
    LONGEST_STANDSTILL,
    Done,
    Work,
    Worker,
    until_next_try,
)
from promoter.storage.files import is_locked, is_open
from promoter.storage.pace import Pace
from promoter.values import to_json

LONGEST_DEATH = 5.0
MOST_LOST = 10

Connect = Callable[[Move], Awaitable[Guest]]
OnProgress = Callable[[str, str, Progress], None]
"""Called with a disk's name, the phase ("seed" or "mirror") and how far it is."""


class Course:
    """One move's means and memory; the memory is only for the report."""

    def __init__(self, intent: Move, journal: Journal, connect: Connect, show: OnProgress) -> None:
        self.intent = intent
        self.journal = journal
        self.connect = connect
        self.show = show
        self.leases = Leases(intent.id, str(intent.kind), journal.lock_file(intent.id))
        self.history = History(intent.id, journal)
        self.guest: Guest | None = None
        self.worker: Worker | None = None
        self.seen = Seen(alive=False, disks=())
        self.looked: GuestView | None = None
        self.going = asyncio.Event()
        self.going.set()
        self.expected_cancels: set[str] = set()
        self.reports: dict[str, DiskReport] = {}
        self.paces: dict[str, Pace] = {}
        self.slowing = Slowing(lambda: self.intent.limits, self._remember_limits)
        self.paused_in_vain = 0
        self.hurried = False
        self.began = time.monotonic()

    def save(self, intent: Move) -> None:
        self.journal.save(self.id, to_json(intent))
        self.intent = intent

    def fail(self, failure: Failure, reason: str) -> None:
        if self.intent.failure is None:
            self.save(replace(self.intent, failure=failure, reason=reason))

    def report(self, disk: DiskIntent) -> DiskReport:
        names = disk.names
        undo = self.intent.kind is Kind.UNDO
        source = names.aside if disk.way is Way.SNAPSHOT else names.path
        method = disk.method if disk.way is Way.MIRROR and not undo else None
        report = self.reports.setdefault(
            disk.mark,
            DiskReport(disk.name, source, names.target, disk.way, method, node=disk.node),
        )
        if disk.verdict:
            report.verified = disk.verdict.same is not None
            report.verified_bytes = disk.verdict.same
            report.unverified = disk.verdict.unproven or None
        if undo:
            report.target, report.old = names.path, undone_file(disk)
            report.source, report.kept = report.old, (report.old,)
            return report
        report.target = names.path if names.in_place else names.target
        report.kept = kept_files(disk)
        report.old = next(iter(report.kept), None)
        report.spare = next(iter(names.spares()), None)
        return report

    def tell(self, disk: str, phase: str, progress: Progress) -> None:
        self.leases.note(disk, phase, progress)
        self.history.progress(disk, phase, progress)
        self.show(disk, phase, progress)

    def pairs(self) -> list[tuple[DiskIntent, DiskSeen]]:
        return list(zip(self.intent.disks, self.seen.disks, strict=True))

    def with_job(self, job: Job) -> list[DiskIntent]:
        return [disk for disk, seen in self.pairs() if seen.job is job]

    def with_its_nodes(self, index: int, disk: DiskIntent) -> DiskIntent:
        """The disk, whose files are seen to be the planned ones, by the node-names that it has now:
        those that nobody gave are others after a reboot.
        """
        found = self.last_look.disk(disk.key)
        if found is None:
            raise JobFailed(f"{disk.name} was unplugged from the guest")
        disk = replace(disk, chain=found.chain, root=found.node)
        self.save(self.intent.with_disk(index, disk))
        return disk

    async def while_suspended(self, work: Work) -> Done:
        if not self.intent.domain:
            await self.let_go()
        worker, self.worker = self.worker or await Worker.start(), None
        return await worker.do(work, self.lock_fd)

    async def let_go(self) -> None:
        if self.guest:
            with suppress(PromoterError):  # gone: then nobody is slow
                await self.slowing.undo(self.guest)
            await self.slowing.leave()
            await self.guest.close()
        self.guest = None

    async def view(self) -> GuestView | None:
        """One look at the guest, or None when it is certainly gone."""
        began = time.monotonic()
        lost = 0
        while True:
            try:
                self.guest = self.guest or await self.connect(self.intent)
                self.looked = await self.guest.look()
            except NoGuest:
                return None
            except Unreachable as error:
                if isinstance(error, ConnectionLost):
                    self.history.note(NoteKind.LOST, why=error.message)
                    await self.let_go()
                    lost += 1
                    if lost < MOST_LOST:
                        continue
                if not self.intent.domain and not await asyncio.to_thread(self._in_use):
                    return None
                if (waited := time.monotonic() - began) > self._patience:
                    raise Interrupted(
                        f"{error.message}, but its disks may be in use",
                        f"{error.hint} Then: promoter job resume {self.id}",
                    ) from error
                await asyncio.sleep(until_next_try(waited))
            else:
                return self.looked

    @property
    def _patience(self) -> float:
        if not self.intent.domain:
            return LONGEST_DEATH
        stands = self.intent.stopped and not self.hurried
        return LONGEST_STANDSTILL if stands else LONGEST_ABSENCE

    def _in_use(self) -> bool:
        names = [
            name
            for disk in self.intent.disks
            for name in (disk.names.path, disk.names.aside, disk.names.target)
            if name.exists()
        ]
        return any(is_locked(name) or is_open(name) for name in names)

    def _remember_limits(self, disk: str, limits: Mapping[str, int]) -> None:
        self.history.note(NoteKind.SLOWED, disk=disk)
        self.save(replace(self.intent, limits={**self.intent.limits, disk: limits}))

    def note_leases(self) -> None:
        for written in self.leases.written():
            self.history.note(NoteKind.LEASE, **written)

    async def jobs(self) -> list[tuple[Guest, str]]:
        """Our jobs that are there."""
        if (guest := self.guest) is None:
            return []
        return [(guest, disk.job) for disk in self.intent.disks if await guest.job(disk.job)]

    @property
    def alive(self) -> Guest:
        assert self.guest, "only a guest that is there is acted upon"
        return self.guest

    @property
    def last_look(self) -> GuestView:
        """That on which the present action was decided."""
        assert self.looked, "only a guest that was looked at is acted upon"
        return self.looked

    @property
    def plain(self) -> PlainGuest:
        assert isinstance(self.guest, PlainGuest), "planned as plain QEMU"
        return self.guest

    @property
    def domain(self) -> Domain:
        assert isinstance(self.guest, Domain), "planned as a domain"
        return self.guest

    @property
    def lock_fd(self) -> int:
        return self.journal.lock_fd(self.id)

    @property
    def id(self) -> str:
        return self.intent.id
