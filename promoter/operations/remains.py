"""What operations have left: those that were interrupted, and jobs, nodes and names of ours.

What the journal does not know may be another host's, or another state directory's: it is named
and left, unless QEMU itself says that nothing uses it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from promoter.blockjob import JobStatus
from promoter.chain import Disk
from promoter.errors import PromoterError
from promoter.guests.base import Domain, Guest, GuestView
from promoter.operations.backup import KIND, Backup
from promoter.operations.findings import CloseNode, EndJob, Finding, Remedy, Remove, Resume, Wrong
from promoter.operations.journal import OPEN, Entry, Journal, OperationStatus
from promoter.operations.leftovers import half_made, is_needed
from promoter.operations.move import Move, Seen, decide
from promoter.operations.observation import observe
from promoter.operations.recorded import recorded_move
from promoter.storage.names import Named
from promoter.values import from_json

OURS = re.compile(r"promoter-([0-9a-f]{8})-")

Connect = Callable[[Move | Backup], Awaitable[Guest]]


@dataclass(frozen=True)
class Known:
    """An operation that the journal has."""

    entry: Entry
    intent: Move | Backup

    @property
    def is_open(self) -> bool:
        return self.entry.status in OPEN

    def is_of(self, name: str, guest: Guest | None) -> bool:
        """Is it the guest's? A domain may have been renamed since."""
        if isinstance(guest, Domain) and self.intent.domain:
            return self.intent.domain.uuid == guest.uuid
        return self.entry.guest == (guest.name if guest else name)


def known(journal: Journal) -> list[Known]:
    """The operations of the journal, the newest last."""
    return [Known(entry, _intent(entry)) for entry in journal.entries()]


def _intent(entry: Entry) -> Move | Backup:
    if entry.kind == KIND:
        return from_json(Backup, entry.intent)
    return recorded_move(entry)


def running(operations: Iterable[Known]) -> list[Finding]:
    entries = [e.entry for e in operations if e.entry.status is OperationStatus.RUNNING]
    return [
        Finding(
            entry.guest,
            f"{entry.kind} {entry.id} runs; what it works on was not looked into",
            f"See: promoter job watch {entry.id}",
        )
        for entry in entries
    ]


def half_done(operation: Known, view: GuestView | None) -> Finding:
    """An interrupted operation: where it stands, and which disk is the true one meanwhile."""
    entry, intent = operation.entry, operation.intent
    message = f"{entry.kind} {entry.id} stopped half-way"
    if isinstance(intent, Move):
        try:
            message += _standing(intent, view)
        except OSError as error:
            message += f"; its files cannot be seen: {error}"
    remedy = Resume(entry.id)
    return Finding(entry.guest, message, f"Finish it: {remedy}", Wrong.HALF_DONE, remedy)


def _standing(move: Move, view: GuestView | None) -> str:
    seen = tuple(observe(disk, view) for disk in move.disks)
    text = f"; next: {decide(move, Seen(view is not None and view.runs, seen))}"
    for disk, shown in zip(move.disks, seen, strict=True):
        new = disk.names.path if disk.names.in_place else disk.names.target
        files = {Named.OLD: disk.chain.active.file, Named.NEW: new}
        if shown.named is Named.OLD and not disk.names.defined:
            files[Named.OLD] = disk.names.path
        text += (
            f"; {disk.name}: the next boot opens {files.get(shown.named) or 'what nobody knows'}"
        )
    return text


async def view_of(intent: Move | Backup, connect: Connect) -> GuestView | None:
    try:
        guest = await connect(intent)
    except PromoterError:
        return None
    try:
        return await guest.look()
    except PromoterError:
        return None
    finally:
        await guest.close()


def spares(operation: Known, spares: Iterable[Path]) -> Iterator[Finding]:
    """Second names whose QEMU is gone. They take no space, and nothing is wrong with them."""
    remedy = Resume(operation.entry.id)
    for spare in spares:
        message = f"{spare} is not needed any more: the QEMU that remembered the name is gone"
        yield Finding(operation.entry.guest, message, f"Remove it: {remedy}", remedy=remedy)


def names_left(directory: Path, operations: Mapping[str, Known]) -> list[Finding]:
    """Names that operations make on their way, and remove: what of them is left."""
    return list(_names_left(directory, operations))


def _names_left(directory: Path, operations: Mapping[str, Known]) -> Iterator[Finding]:
    for file, identity in half_made(directory):
        operation = operations.get(identity)
        if operation is None:
            yield Finding(
                str(file),
                f"it is of operation {identity}, of which this journal knows nothing",
                "Another host's, or another --state-dir's? If it is nobody's: rm",
            )
        elif not operation.is_open:
            remedy = None if is_needed(file) else Remove(file)
            yield Finding(
                str(file),
                f"{operation.entry.kind} {identity} has ended and left it",
                "Nobody needs it: rm" if remedy else "Something still uses it: leave it.",
                Wrong.HALF_DONE,
                remedy,
            )


def orphans(name: str, view: GuestView, operations: Mapping[str, Known]) -> Iterator[Finding]:
    """Jobs and nodes of ours in QEMU, for which no operation comes back.

    A job that still copies is ended only where the journal knows that its operation has ended.
    """
    busy = {operation for operation, known in operations.items() if known.is_open}
    for job in view.jobs.values():
        if (found := OURS.match(job.id)) and found[1] not in busy:
            busy.add(found[1])  # it uses the nodes
            certain = found[1] in operations or job.status is JobStatus.CONCLUDED
            remedy = EndJob(job.id) if certain else None
            yield _orphan(
                name, f"block job {job.id} ({job.status.value})", found[1], operations, remedy
            )
    used = set(_used(view.disks))
    for node in sorted(view.nodes - used):
        if (found := OURS.match(node)) and found[1] not in busy:
            yield _orphan(name, f"block node {node}", found[1], operations, CloseNode(node))


def _used(disks: Iterable[Disk]) -> Iterator[str | None]:
    for disk in disks:
        yield from (disk.node, *disk.filters)
        for image in disk.chain:
            yield from (image.node, image.file_node)


def _orphan(
    name: str, what: str, identity: str, operations: Mapping[str, Known], remedy: Remedy | None
) -> Finding:
    of = f"operation {identity}, which has ended"
    if identity not in operations:
        of = f"operation {identity}, of which this journal knows nothing"
    hint = "Another --state-dir's? If it is nobody's: job-cancel, then job-dismiss (QMP)"
    if remedy:
        hint = f"To be done: {remedy}"
    return Finding(name, f"{what} is of {of}", hint, Wrong.HALF_DONE, remedy)
