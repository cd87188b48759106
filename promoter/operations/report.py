"""What happened in an operation, from the journal alone: for people, and for the audit.

Nothing is asked of the guest, so it can be told long after, and of an operation that still runs.
What the journal does not know is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

from promoter.chain import Image
from promoter.operations.backup import KIND, Backup
from promoter.operations.journal import (
    OPEN,
    Entry,
    Journal,
    Note,
    NoteKind,
    OperationStatus,
    Step,
)
from promoter.operations.move import DiskIntent, Kind, Move, Way
from promoter.operations.outcome import DiskReport
from promoter.operations.room import PHASE as WAITING
from promoter.values import from_builtins, from_json

CUT_OFF = "cut off: promoter was killed, or its host"


@dataclass(frozen=True)
class Layer:
    """One image of a chain; bytes, None for what is not known."""

    file: str
    format: str
    virtual_bytes: int | None = None
    allocated_bytes: int | None = None


@dataclass(frozen=True)
class Facts:
    """What became of one disk. Bytes and seconds. ``after`` is empty where nobody knows yet."""

    disk: str
    way: str
    before: tuple[Layer, ...]
    after: tuple[Layer, ...] = ()
    seed: str | None = None
    seeded_bytes: int | None = None
    copied_bytes: int | None = None
    switchover_s: float | None = None
    start_pause_s: float | None = None
    frozen_s: float | None = None
    verification: str = ""
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Happening:
    """One line of the timeline; ``seconds`` for what has taken some."""

    at: str
    what: str
    seconds: float | None = None
    outcome: str = ""


@dataclass(frozen=True)
class Sample:
    """``elapsed`` seconds into a phase, the bytes done, and a second's since the last sample."""

    elapsed: float
    done: int
    total: int
    rate: float
    dirtied: float | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Phase:
    """One disk's seed, mirror, comparison or wait, from when promoter began to look at it."""

    at: str
    disk: str
    phase: str
    samples: tuple[Sample, ...]

    @property
    def seconds(self) -> float:
        return self.samples[-1].elapsed

    @property
    def rate(self) -> float:
        """Bytes a second, over the whole of it."""
        return self.samples[-1].done / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Epoch:
    """A record of a lease that the operation wrote."""

    at: str
    file: str
    epoch: int


@dataclass(frozen=True)
class Report:
    """One operation; times are UTC in ISO 8601. ``parts`` are those that a backup is made of."""

    id: str
    kind: str
    guest: str
    status: OperationStatus
    result: str | None
    started: str
    updated: str
    resumed: int
    disks: tuple[Facts, ...]
    timeline: tuple[Happening, ...]
    phases: tuple[Phase, ...]
    epochs: tuple[Epoch, ...]
    parts: tuple[Report, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """From its beginning to its end, or to what is known last."""
        return _between(self.started, self.updated)


def make(journal: Journal, entry: Entry) -> Report:
    """The report of an operation."""
    steps, notes = journal.steps(entry.id), journal.notes(entry.id)
    phases = _phases(notes)
    report = Report(
        id=entry.id,
        kind=entry.kind,
        guest=entry.guest,
        status=entry.status,
        result=entry.result,
        started=entry.started,
        updated=max([entry.updated, *(step.ended or "" for step in steps)]),
        resumed=sum(note.kind is NoteKind.RESUMED for note in notes),
        disks=(),
        timeline=_timeline(steps, notes, phases, entry.status),
        phases=phases,
        epochs=tuple(
            Epoch(note.at, **note.fields) for note in notes if note.kind is NoteKind.LEASE
        ),
    )
    if entry.kind == KIND:
        return _of_backup(journal, report, from_json(Backup, entry.intent))
    move = from_json(Move, entry.intent)
    return replace(report, disks=tuple(_facts(disk, move, entry, notes) for disk in move.disks))


def _of_backup(journal: Journal, report: Report, intent: Backup) -> Report:
    found = (journal.find(part) for part in (intent.frozen, intent.merged))
    parts = tuple(make(journal, part) for part in found if part)
    frozen = {facts.disk: facts for facts in (parts[0].disks if parts else ())}
    done = report.status is OperationStatus.DONE
    facts = tuple(
        Facts(
            disk=each.disk,
            way="copy",
            before=frozen[each.disk].before if each.disk in frozen else (),
            after=tuple(Layer(str(file), "qcow2") for file in (each.file, each.since) if file)
            if done
            else (),
            verification="the copy is what was frozen" if done else "nothing is proven",
        )
        for each in intent.disks
    )
    return replace(report, disks=facts, parts=parts)


# --- the disks ---------------------------------------------------------------------------------


def _facts(disk: DiskIntent, move: Move, entry: Entry, notes: Sequence[Note]) -> Facts:
    known: dict[str, Any] = {}
    for note in notes:
        if note.kind is NoteKind.DISK and note.fields["disk"] == disk.name:
            new = {key: value for key, value in note.fields.items() if value is not None}
            known = note.fields | known | new  # one that was resumed has forgotten what it knew
    report = from_builtins(DiskReport, known) if known else None
    before = tuple(map(_layer, disk.chain))
    after = _after(disk, entry, notes, before)
    if move.kind is Kind.UNDO:
        after = before if entry.status is OperationStatus.DONE else ()
        before = _new_chain(disk, before)
    facts = Facts(disk.name, str(disk.way), before, after)
    facts = replace(facts, verification=_verification(disk, move))
    if report is None:
        return facts
    return replace(
        facts,
        seed=report.seed,
        seeded_bytes=report.seeded_bytes,
        copied_bytes=report.mirrored_bytes,
        switchover_s=report.switchover_s,
        start_pause_s=report.start_pause_s,
        frozen_s=report.frozen_s,
        kept=tuple(map(str, report.kept)),
    )


def _layer(image: Image) -> Layer:
    file = str(image.file or f"{image.file_driver} {image.node}")
    return Layer(file, image.format, image.virtual_size, image.allocated)


def _after(
    disk: DiskIntent, entry: Entry, notes: Sequence[Note], before: tuple[Layer, ...]
) -> tuple[Layer, ...]:
    """The chain that the operation has left; empty while that is open."""
    if entry.status in OPEN:
        return ()
    switched = [note.fields["disks"] for note in notes if note.kind is NoteKind.SWITCHED]
    if entry.status is OperationStatus.DONE or any(disk.name in names for names in switched):
        return _new_chain(disk, before)
    return before


def _new_chain(disk: DiskIntent, before: tuple[Layer, ...]) -> tuple[Layer, ...]:
    names = disk.names
    place = names.path if names.in_place else names.target
    new = Layer(str(place), disk.geometry.format, disk.virtual_size)
    match disk.way:
        case Way.MIRROR:
            return (new, *before[len(before) - disk.kept :])
        case Way.SNAPSHOT:
            return (new, replace(before[0], file=str(names.aside)), *before[1:])
        case Way.COMMIT:
            return (new, *before[disk.into + 1 :])
        case Way.COMMIT_BELOW:
            return (*before[: disk.top], *before[disk.into :])


def _verification(disk: DiskIntent, move: Move) -> str:
    verdict = disk.verdict
    if verdict is None:
        return "asked for, and not done" if move.choices.verify else "not asked for"
    if verdict.same is not None:
        return f"old and new disk are the same: {verdict.same:,} bytes compared"
    if verdict.difference:
        return f"THEY DIFFER: {verdict.difference}"
    return f"nothing is proven: {verdict.unproven}"


# --- the time that it took ---------------------------------------------------------------------


def _phases(notes: Sequence[Note]) -> tuple[Phase, ...]:
    """Samples of one disk and phase belong together until its clock, or promoter, starts anew."""
    runs: list[list[Note]] = []
    open_runs: dict[str, list[Note]] = {}
    for note in notes:
        if note.kind is NoteKind.RESUMED:
            open_runs.clear()
        if note.kind is not NoteKind.RATE:
            continue
        run = open_runs.get(note.fields["disk"])
        last = run[-1].fields if run else None
        waits = note.fields["phase"] == WAITING  # its clock stands still
        if (
            last is None
            or last["phase"] != note.fields["phase"]
            or (last["elapsed"] > note.fields["elapsed"] and not waits)
        ):
            run = open_runs[note.fields["disk"]] = []
            runs.append(run)
        assert run is not None
        run.append(note)
    return tuple(map(_phase, runs))


def _phase(run: Sequence[Note]) -> Phase:
    first = run[0].fields
    if first["phase"] == WAITING:
        clock = [_between(run[0].at, note.at) for note in run]
    else:
        clock = [note.fields["elapsed"] for note in run]
    points = [(0.0, 0), *zip(clock, (note.fields["done"] for note in run), strict=True)]
    samples = tuple(
        Sample(
            elapsed=after[0],
            done=after[1],
            total=note.fields["total"],
            rate=max(0.0, (after[1] - before[1]) / (after[0] - before[0]))
            if after[0] > before[0] and first["phase"] != WAITING
            else 0.0,
            dirtied=note.fields["dirtied"],
            limit=note.fields["limit"],
        )
        for (before, after), note in zip(pairwise(points), run, strict=True)
    )
    return Phase(run[0].at, first["disk"], first["phase"], samples)


def _timeline(
    steps: Sequence[Step], notes: Sequence[Note], phases: Sequence[Phase], status: OperationStatus
) -> tuple[Happening, ...]:
    happened = [_step(step, last=step is steps[-1], status=status) for step in steps]
    happened += [told for note in notes if (told := _told(note))]
    happened += [
        Happening(phase.at, f"{phase.disk}: waited for room", phase.seconds)
        for phase in phases
        if phase.phase == WAITING
    ]
    return tuple(sorted(happened, key=lambda each: each.at))


def _step(step: Step, *, last: bool, status: OperationStatus) -> Happening:
    if step.ended is None:
        under_way = last and status is OperationStatus.RUNNING
        return Happening(step.started, step.action, None, "under way" if under_way else CUT_OFF)
    took = _between(step.started, step.ended)
    return Happening(step.started, step.action, took, step.outcome or "")


def _told(note: Note) -> Happening | None:
    fields = note.fields
    match note.kind:
        case NoteKind.RESUMED:
            return Happening(note.at, "resumed, going by the guest and the files")
        case NoteKind.LOST:
            return Happening(note.at, "lost the guest's monitor, or libvirtd", None, fields["why"])
        case NoteKind.ASKED:
            rate = f" {fields['speed']:,} B/s" if "speed" in fields else ""
            return Happening(note.at, f"asked for: {fields['request']}{rate}")
        case NoteKind.SLOWED:
            what = f"{fields['disk']}: the guest's writes were slowed, so that the copy gains"
            return Happening(note.at, what)
        case NoteKind.HOOK:
            return Happening(note.at, "hook command", None, fields["outcome"])
        case NoteKind.RATE | NoteKind.LEASE | NoteKind.DISK | NoteKind.SWITCHED:
            return None


def _between(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
