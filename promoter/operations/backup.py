"""Backup: a snapshot, a copy of what it froze, a comparison, and the delta is merged again.

One operation made of others, each with a journal entry of its own. What comes next goes by what
became of those and by which copies are whole, so a fresh run and ``job resume`` are the same. A
copy grows under a name of its own and gets its final one when it has been compared; whatever goes
wrong before, the delta is merged, and the guest has the chain that it had.

Source: the backup round of US 10956041 B2; ``qemu-img convert``, ``rebase`` and ``compare``.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum, StrEnum
from pathlib import Path

from promoter.blockjob import Progress
from promoter.chain import Image
from promoter.errors import (
    BY_EXIT_CODE,
    Cancelled,
    Different,
    Interrupted,
    PromoterError,
    Refused,
)
from promoter.guests.base import Domain, Guest
from promoter.operations import consolidate, operation, snapshot
from promoter.operations.course import OnProgress
from promoter.operations.history import History
from promoter.operations.journal import Journal, NoteKind, OperationStatus, new_id
from promoter.operations.leases import Leases
from promoter.operations.move import Choices, DiskIntent, DomainAddress, Move, Old
from promoter.operations.moving import MoveOperation, OnStep
from promoter.operations.outcome import DiskReport
from promoter.operations.plan import Plan, file_of
from promoter.operations.preflight import check_directory
from promoter.operations.recorded import recorded_move
from promoter.storage import images, seed
from promoter.storage.files import free_bytes
from promoter.storage.images import Backing, backing_name
from promoter.storage.names import boot_name
from promoter.storage.pace import Pace
from promoter.storage.seed import Geometry, SeedMethod, SeedSpec
from promoter.values import to_json

KIND = "backup"
LAST = "last"
STAMP = "[0-9]{8}T[0-9]{6}Z"


@dataclass(frozen=True)
class DiskBackup:
    """One disk's copy: ``file``, above the earlier backup ``since`` if that is given."""

    disk: str
    file: Path
    since: Path | None


@dataclass(frozen=True)
class Backup:
    """The journalled intent. ``frozen`` and ``merged`` are the ids of the operations it is
    made of; ``failure`` says why there is to be no backup, with the exit code that it means.
    """

    id: str
    guest: str
    choices: Choices
    disks: tuple[DiskBackup, ...]
    frozen: str
    merged: str
    keep: int | None = None
    domain: DomainAddress | None = None
    failure: str = ""
    hint: str = ""
    exit_code: int = 0
    pruned: bool = False


class Part(Enum):
    """Where one of the operations stands that a backup is made of."""

    NOT_BEGUN = "not begun"
    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Seen:
    """What the journal and the files show; ``copied`` tells which copies are whole."""

    frozen: Part
    merged: Part
    copied: tuple[bool, ...]


class Do(StrEnum):
    """The actions, in their order."""

    FREEZE = "snapshot"
    COPY = "copy"
    MERGE = "consolidate"
    PRUNE = "prune"
    DONE = "done"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Action:
    """One next step; ``disk`` is the index of the one to copy."""

    do: Do
    disk: int = 0

    def __str__(self) -> str:
        return f"{self.do} (disk {self.disk})" if self.do is Do.COPY else str(self.do)


def decide(intent: Backup, seen: Seen) -> Action:
    """The next action. Once there is a delta it is merged, whatever becomes of the copies."""
    if seen.frozen is Part.FAILED or (seen.frozen is Part.NOT_BEGUN and intent.failure):
        return Action(Do.GIVE_UP)
    if seen.frozen is not Part.DONE:
        return Action(Do.FREEZE)
    if not (intent.failure or all(seen.copied)):
        return Action(Do.COPY, seen.copied.index(False))
    if seen.merged is not Part.DONE:
        return Action(Do.MERGE)
    if intent.failure:
        return Action(Do.GIVE_UP)
    return Action(Do.DONE if intent.pruned else Do.PRUNE)


@dataclass(frozen=True)
class Copied:
    """What became of one disk's backup: sizes in bytes, times in seconds."""

    disk: str
    file: Path
    since: Path | None
    allocated_bytes: int
    duration_s: float
    snapshot_s: float | None
    frozen_s: float | None
    switchover_s: float | None
    mirrored_bytes: int | None
    verified: bool = True


async def plan(
    guest: Guest,
    identity: str,
    choices: Choices,
    directory: Path,
    since: str | None,
    keep: int | None,
    state: Path,
) -> Backup:
    """Plan a backup. Raises `Refused` with the reason, or `Unreachable`."""
    check_directory(directory)
    frozen = new_id()
    move = (await snapshot.plan(guest, frozen, choices, state)).move
    now = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    if since not in (None, LAST) and len(move.disks) > 1:
        raise Refused("--since names one file, but the guest has several disks", f"Use: {LAST}")
    disks = tuple(_plan_disk(disk, directory, since, now) for disk in move.disks)
    needed = sum([await _measure(disk) for disk in move.disks]) if since is None else 0
    if (free := free_bytes(directory)) < needed:
        raise Refused(
            f"not enough space in {directory}: {needed:,} bytes needed, {free:,} free",
            "Make room, or choose another directory.",
        )
    return Backup(
        id=identity,
        guest=guest.name,
        choices=choices,
        disks=disks,
        frozen=frozen,
        merged=new_id(),
        keep=keep,
        domain=DomainAddress(guest.uri, guest.uuid) if isinstance(guest, Domain) else None,
    )


def _plan_disk(disk: DiskIntent, directory: Path, since: str | None, now: str) -> DiskBackup:
    first = _first_name(disk, directory)
    file = first.with_name(f"{first.name}.{now}.qcow2")
    if file.exists():
        raise Refused(f"{file} exists", "Try again in a second.")
    earlier = _earlier(first)
    if since == LAST and not earlier:
        raise Refused(f"{directory} has no earlier backup of {disk.name}", "Leave out --since.")
    if since is None:
        return DiskBackup(disk.name, file, None)
    below = earlier[-1] if since == LAST else Path(since).absolute()
    if not below.is_file():
        raise Refused(f"no such backup: {below}", f"Give a file, or: --since {LAST}")
    return DiskBackup(disk.name, file, below)


def _first_name(disk: DiskIntent, directory: Path) -> Path:
    """How the names of all backups of a disk begin."""
    stem = snapshot.DELTA.sub("", boot_name(file_of(disk.chain.active)).stem)
    return directory.absolute() / f"{stem}.{disk.name}"


def _earlier(first: Path) -> list[Path]:
    """The backups of a disk, the oldest first."""
    name = re.compile(rf"{re.escape(first.name)}\.{STAMP}\.qcow2")
    return sorted(path for path in first.parent.iterdir() if name.fullmatch(path.name))


async def _measure(disk: DiskIntent) -> int:
    return await images.measure(disk.chain.images, "qcow2", Geometry("qcow2").options)


class BackupOperation:
    """One backup on its way: run it, `cancel` it, or `stop` it for a later resume."""

    def __init__(
        self,
        intent: Backup,
        journal: Journal,
        connect: Callable[[Move | Backup], Awaitable[Guest]],
        on_progress: OnProgress,
        on_step: OnStep,
    ) -> None:
        self.intent = intent
        self._journal = journal
        self._connect = connect
        self._show = on_progress
        self._on_step = on_step
        self._stopped = False
        self._child: MoveOperation | None = None
        self._copying: asyncio.Task[None] | None = None
        self._history = History(intent.id, journal)
        self._leases = Leases(intent.id, KIND, journal.lock_file(intent.id))
        self._pace = Pace(intent.choices.speed)
        self._reports: dict[str, list[DiskReport]] = {}
        self._began = time.monotonic()

    @property
    def id(self) -> str:
        return self.intent.id

    async def run(self) -> list[Copied]:
        """Bring the backup to its end, from wherever it is; what became of each disk.

        Raises what made it fail, after the delta has been merged; `Interrupted` half-way.
        """
        if self._journal.steps(self.id):
            self._history.note(NoteKind.RESUMED)
        last = await operation.run(self, self._journal)
        if last.do not in (Do.DONE, Do.GIVE_UP):
            raise Interrupted(
                f"backup {self.id}: stopped half-way", f"Continue: promoter job resume {self.id}"
            )
        if last.do is Do.GIVE_UP:
            cancelled = self.intent.exit_code == Cancelled.exit_code
            status = OperationStatus.CANCELLED if cancelled else OperationStatus.FAILED
            self._remove_copies()
            self._journal.conclude(self.id, status, self.intent.failure)
            raise _error(self.intent)
        names = ", ".join(str(disk.file) for disk in self.intent.disks)
        self._journal.conclude(self.id, OperationStatus.DONE, names)
        return [self._report(disk) for disk in self.intent.disks]

    def _remove_copies(self) -> None:
        try:
            for disk in self.intent.disks:
                disk.file.unlink(missing_ok=True)
        except OSError as error:
            hint = f"Mend that, then: promoter job resume {self.id}"
            raise Interrupted(f"what was copied cannot be removed: {error}", hint) from error

    def cancel(self) -> None:
        """Ask for no backup; a delta that is there is merged all the same."""
        self._history.note(NoteKind.ASKED, request="cancel")
        self._fail(Cancelled(f"backup {self.id} was cancelled", "The guest has its old chain."))
        if self._copying:
            self._copying.cancel()
        elif self._child and self._child.id == self.intent.frozen:
            self._child.cancel()

    def stop(self) -> None:
        """Leave everything as it is for ``promoter job resume``."""
        self._history.note(NoteKind.ASKED, request="stop")
        self._stopped = True
        if self._child:
            self._child.stop()
        if self._copying:
            self._copying.cancel()

    async def change_speed(self, speed: int) -> None:
        """Limit copying and merging to ``speed`` bytes per second, 0 for no limit."""
        self._history.note(NoteKind.ASKED, request="speed", speed=speed)
        self._save(replace(self.intent, choices=replace(self.intent.choices, speed=speed)))
        self._pace.change(speed)
        if self._child:
            await self._child.change_speed(speed)

    async def pause(self) -> None:
        """Copy and merge nothing more until `go_on`."""
        self._history.note(NoteKind.ASKED, request="pause")
        self._pace.pause()
        if self._child:
            await self._child.pause()

    async def go_on(self) -> None:
        """Copy on after a `pause`. Raises `Refused` when there was none."""
        if not self._pace.paused:
            raise Refused(f"backup {self.id} is not paused", f"See: promoter job watch {self.id}")
        self._history.note(NoteKind.ASKED, request="go on")
        self._pace.go_on()
        if self._child:
            await self._child.go_on()

    async def look(self) -> Seen:
        try:
            copied = tuple(disk.file.exists() for disk in self.intent.disks)
        except OSError as error:
            hint = f"Mend that, then: promoter job resume {self.id}"
            raise Interrupted(f"cannot see the backups: {error}", hint) from error
        return Seen(self._part(self.intent.frozen), self._part(self.intent.merged), copied)

    def _part(self, identity: str) -> Part:
        entry = self._journal.find(identity)
        if entry is None:
            return Part.NOT_BEGUN
        if entry.status is OperationStatus.DONE:
            return Part.DONE
        ended = entry.status in (OperationStatus.FAILED, OperationStatus.CANCELLED)
        return Part.FAILED if ended else Part.OPEN

    def decide(self, seen: Seen) -> Action:
        return decide(self.intent, seen)

    def is_final(self, action: Action) -> bool:
        return action.do in (Do.DONE, Do.GIVE_UP) or self._stopped

    async def act(self, action: Action) -> None:
        self._on_step(str(action))
        match action.do:
            case Do.FREEZE:
                await self._perform(self.intent.frozen, snapshot.plan, self.intent.choices)
            case Do.COPY:
                await asyncio.to_thread(self._leases.join, self._frozen().disks)
                await self._copy_unless_cancelled(self.intent.disks[action.disk])
            case Do.MERGE:
                await asyncio.to_thread(self._leases.leave, self._frozen().disks)
                await self._perform(self.intent.merged, _plan_merge, self._delta())
            case _:
                self._prune()

    def failed(self, action: Action, error: PromoterError) -> None:
        if self._stopped:
            return
        if action.do is Do.MERGE:
            self._save(replace(self.intent, merged=new_id()))
            raise Interrupted(
                f"the delta that the backup's snapshot made is not merged yet: {error.message}",
                f"{error.hint} Then: promoter job resume {self.id}".strip(),
            ) from error
        if isinstance(error, Interrupted):
            raise error
        if action.do is Do.PRUNE:
            raise Interrupted(
                f"the backups are made, but older ones are not removed yet: {error.message}",
                f"Mend that, then: promoter job resume {self.id}",
            ) from error
        self._fail(error)

    def _on_progress(self, disk: str, phase: str, progress: Progress) -> None:
        self._history.progress(disk, phase, progress)
        self._show(disk, phase, progress)

    def _fail(self, error: PromoterError) -> None:
        if not self.intent.failure:
            why, hint, code = error.message, error.hint, error.exit_code
            self._save(replace(self.intent, failure=why, hint=hint, exit_code=code))

    def _save(self, intent: Backup) -> None:
        self._journal.save(self.id, to_json(intent))
        self.intent = intent

    async def _perform(
        self,
        identity: str,
        planner: Callable[[Guest, str, Choices, Path], Awaitable[Plan]],
        choices: Choices,
    ) -> None:
        """Begin, or go on with, one of the operations that the backup is made of."""
        with self._journal.hold(identity):
            guest = None
            if (entry := self._journal.find(identity)) is None:
                guest = await self._connect(self.intent)
                try:
                    plan = await planner(guest, identity, choices, self._journal.directory)
                    move = plan.move
                except BaseException:  # a cancellation too; once it runs, the operation closes it
                    await guest.close()
                    raise
                kept = to_json(move)
                self._journal.open(identity, move.kind, move.guest, kept)
            else:
                move = recorded_move(entry)
            connect, progress, step = self._connect, self._show, self._on_step
            self._child = MoveOperation(move, self._journal, connect, progress, step)
            if self._pace.paused:
                await self._child.pause()
            try:
                self._reports[identity] = await self._child.run(guest)
            finally:
                self._child = None

    def _frozen(self) -> Move:
        entry = self._journal.find(self.intent.frozen)
        assert entry, "it was journalled before it began"
        return recorded_move(entry)

    def _delta(self) -> Choices:
        """What the backup's own snapshot put above the disks, and nothing else, is merged."""
        disks = self._frozen().disks
        return Choices(
            disks=tuple(disk.name for disk in disks),
            base=tuple(str(disk.names.aside) for disk in disks),
            speed=self.intent.choices.speed,
            scan=self.intent.choices.scan,
            max_pause=self.intent.choices.max_pause,
            old=Old.DELETE,
        )

    async def _copy_unless_cancelled(self, disk: DiskBackup) -> None:
        self._copying = asyncio.create_task(self._copy(disk), name=f"copy {disk.disk}")
        try:
            await self._copying
        except asyncio.CancelledError:
            if not (self._stopped or self.intent.failure):
                raise
        finally:
            self._copying = None

    async def _copy(self, disk: DiskBackup) -> None:
        (frozen,) = (d for d in self._frozen().disks if d.name == disk.disk)
        active, *below = frozen.chain
        layers = (replace(active, file=frozen.names.aside), *below)
        spec = SeedSpec(
            layers=layers,
            part=disk.file.with_name(f"{disk.file.name}.part-{self.id}"),
            method=SeedMethod.CONVERT,
            geometry=Geometry("qcow2"),
            virtual_size=active.virtual_size,
            like=frozen.names.aside,
            backing=Backing(disk.since, "qcow2") if disk.since else None,
        )
        await seed.make_seed(spec, self._pace, self._reporter(disk.disk, layers))
        if difference := await images.differ(layers, spec.part, "qcow2"):
            raise Different(
                f"{spec.part} is not what was frozen of {disk.disk}: {difference}",
                "Keep it for whoever looks into that. The disk itself is as it was.",
            )
        seed.publish(spec.part, disk.file)

    def _reporter(self, disk: str, layers: Iterable[Image]) -> Callable[[int, int], None]:
        loop = asyncio.get_running_loop()
        began = time.monotonic()

        def report(done: int, total: int) -> None:
            progress = Progress(done, total, time.monotonic() - began)
            loop.call_soon_threadsafe(self._on_progress, disk, "copy", progress)

        return report

    def _prune(self) -> None:
        """Remove the oldest backups, but none that a newer one lies on."""
        for disk in self.intent.disks:
            first = disk.file.with_name(re.sub(rf"\.{STAMP}\.qcow2$", "", disk.file.name))
            needed: set[Path] = set()
            for age, path in enumerate(reversed(_earlier(first))):
                if self.intent.keep is None or age < self.intent.keep or path in needed:
                    needed.add(Path(backing_name(path) or ""))
                else:
                    path.unlink()
        self._save(replace(self.intent, pruned=True))

    def _report(self, disk: DiskBackup) -> Copied:
        frozen, merged = (
            next((r for r in self._reports.get(part, ()) if r.disk == disk.disk), None)
            for part in (self.intent.frozen, self.intent.merged)
        )
        return Copied(
            disk=disk.disk,
            file=disk.file,
            since=disk.since,
            allocated_bytes=disk.file.stat().st_blocks * 512,
            duration_s=time.monotonic() - self._began,
            snapshot_s=frozen.switchover_s if frozen else None,
            frozen_s=frozen.frozen_s if frozen else None,
            switchover_s=merged.switchover_s if merged else None,
            mirrored_bytes=merged.mirrored_bytes if merged else None,
        )


async def _plan_merge(guest: Guest, identity: str, choices: Choices, state: Path) -> Plan:
    plan = await consolidate.plan(guest, identity, choices, state)
    if more := [disk.name for disk in plan.move.disks if len(disk.gone) > 1]:
        raise Refused(
            f"{', '.join(more)}: somebody took another snapshot meanwhile",
            "Merge that first: promoter consolidate --top LAYER",
        )
    return plan


def _error(intent: Backup) -> PromoterError:
    return BY_EXIT_CODE.get(intent.exit_code, PromoterError)(intent.failure, intent.hint)
