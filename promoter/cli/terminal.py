"""How operations are shown to people: live bars on a terminal, else plain lines.

``NO_COLOR`` is honoured. Errors name the file, say why and give the next step. Of rich, bars and
tables are loaded only where one is shown.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console
from rich.markup import escape

from promoter.blockjob import Progress
from promoter.cli.tree import tree
from promoter.cli.units import human_bytes, human_seconds
from promoter.errors import PromoterError
from promoter.guests.base import GuestView
from promoter.operations import room
from promoter.operations.backup import Copied
from promoter.operations.journal import Entry, OperationStatus, Step
from promoter.operations.leftovers import undone_file
from promoter.operations.move import DiskIntent, Kind, Way
from promoter.operations.outcome import DiskReport
from promoter.operations.plan import Plan
from promoter.operations.report import Report
from promoter.operations.verify import cost
from promoter.storage.siblings import Siblings

if TYPE_CHECKING:
    from promoter.cli.bars import DiskBars

LINE_EVERY = 5.0
NOTHING = {
    Kind.PROMOTE: "it has no backing file",
    Kind.CONSOLIDATE: "no layer below is known to be this guest's alone (--base LAYER names one)",
    Kind.SNAPSHOT: "it is read-only",
    Kind.UNDO: "it is on its old chain",
}
BECAME = {
    Way.MIRROR: "has a new disk now",
    Way.COMMIT: "is merged",
    Way.COMMIT_BELOW: "has fewer layers now",
    Way.SNAPSHOT: "goes on in an overlay",
}
DONE = {Kind.PROMOTE: "is a full clone now", Kind.UNDO: "is on its old chain again"}
ASKED = {
    "pause": "paused; the guest runs on. Go on: promoter job resume",
    "go on": "goes on",
    "undo": "it runs, and would be called off; the guest stays on its old chain",
    "cancel": "asked to go back; a switchover that has begun still goes through",
}
LOG_WIDTH = 500
ERROR, WARNING, INFO = 3, 4, 6  # syslog's


class PlainOutput:
    """Lines for a log: each phase when it begins, every few seconds, and at its end."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self.console = _console(sys.stdout, INFO, quiet=quiet)
        self._wide = _console(sys.stdout, INFO, quiet=quiet, wide=True)
        self.warnings = _console(sys.stderr, WARNING)
        self.errors = _console(sys.stderr, ERROR)
        self._verbose = verbose
        self._said: dict[tuple[str, str], float] = {}

    def chains(self, guest: str, view: GuestView, siblings: Siblings | None) -> None:
        self._wide.print(tree(guest, view, siblings))

    def operations(self, entries: Sequence[Entry]) -> None:
        rows: list[tuple[str, ...]] = [("ID", "OPERATION", "GUEST", "STATUS", "STARTED", "RESULT")]
        for entry in entries:
            texts = (entry.id, entry.kind, entry.guest, entry.status, entry.started)
            rows.append((*texts, entry.result or ""))
        self._listing(rows)

    def operation_steps(self, entry: Entry, steps: Sequence[Step]) -> None:
        self.operations([entry])
        rows: list[tuple[str, ...]] = [("STEP", "ACTION", "STARTED", "ENDED", "OUTCOME")]
        for step in steps:
            texts = (step.action, step.started, step.ended or "", step.outcome or "")
            rows.append((str(step.number), *texts))
        self._listing(rows)
        if entry.status is OperationStatus.INTERRUPTED:
            self.console.print(f"Continue: promoter job resume {entry.id}")

    def _listing(self, rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table

        head, *texts = rows
        table = Table(*head, box=None)
        for row in texts:
            table.add_row(*map(escape, row))
        self._wide.print(table)

    def report(self, report: Report) -> None:
        from promoter.cli.report import lines

        self.console.print(lines(report))

    def speed(self, operation: str, speed: int) -> None:
        limit = f"{human_bytes(speed)}/s" if speed else "none"
        self.console.print(f"{operation}: limit for each disk is now {limit}")

    def asked(self, operation: str, request: str) -> None:
        self.console.print(f"{operation}: {ASKED[request]}")

    def plan(self, plan: Plan, *, dry_run: bool) -> None:
        for name in plan.nothing_to_do:
            self.console.print(f"{escape(name)}: nothing to do, {NOTHING[plan.move.kind]}")
        undo = plan.move.kind is Kind.UNDO
        for disk, free in zip(plan.move.disks, plan.free, strict=True):
            room = "" if free is None else f", {human_bytes(free)} free"
            text = _way_back(disk) if undo else _intention(disk)
            needs = "" if undo else f", needs {human_bytes(disk.required)}"
            self.console.print(
                f"{escape(disk.name)}: {escape(text)}{needs}{room}{_verification(plan, disk)}"
            )
        for warning in plan.warnings:
            self.console.print(f"note: {escape(warning)}")
        if dry_run:
            self.console.print("dry run: nothing was changed")

    def step(self, operation: str, action: str) -> None:
        if self._verbose:
            self.console.print(f"step: {action}")

    def progress(self, operation: str, disk: str, phase: str, progress: Progress) -> None:
        last = self._said.get((disk, phase))
        done = progress.done >= progress.total
        if last is not None and progress.elapsed - last < LINE_EVERY and not done:
            return
        self._said[disk, phase] = progress.elapsed
        self.console.print(f"{escape(disk)}: {phase} {describe(progress, phase)}")

    def result(self, result: dict[str, Any], reports: Sequence[DiskReport]) -> None:
        for report in reports:
            self._summary(Kind(result["operation"]), report)
        if reports and not result["guest_alive"] and result["operation"] != Kind.UNDO:
            self.console.print("note: the guest is gone; its next boot has the new disk")

    def backups(self, result: dict[str, Any], copied: Sequence[Copied]) -> None:
        for each in copied:
            rows = [
                ("", f"[bold]{escape(each.disk)} is backed up: {escape(str(each.file))}"),
                ("takes", human_bytes(each.allocated_bytes)),
                ("lies on", escape(str(each.since or "nothing"))),
                ("took", human_seconds(each.duration_s)),
                ("stood still for the snapshot", human_seconds(each.snapshot_s)),
                *_frozen(each.frozen_s),
                ("stood still for the merge", human_seconds(each.switchover_s)),
                ("verified", "yes"),
            ]
            self._table(rows)

    def _table(self, rows: Sequence[tuple[str, str]]) -> None:
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False)
        for name, text in rows:
            table.add_row(name, text)
        self._wide.print(table)

    def _summary(self, operation: Kind, report: DiskReport) -> None:
        copied = (report.seeded_bytes or 0) + (report.mirrored_bytes or 0)
        rate = copied / report.duration_s if report.duration_s else 0
        became = DONE.get(operation) or BECAME[report.way]
        rows = [("", f"[bold]{escape(report.disk)} {became}: {escape(str(report.target))}")]
        if report.way is not Way.SNAPSHOT:
            seeded = human_bytes(report.seeded_bytes)
            seed = f"seed by {report.seed} {seeded}, " if report.seed else ""
            rows.append(
                (
                    "copied",
                    f"{human_bytes(copied)} in {human_seconds(report.duration_s)}"
                    f" ({human_bytes(rate)}/s): {seed}delta {human_bytes(report.mirrored_bytes)}",
                )
            )
        if report.start_pause_s is not None:
            pause = f"{human_seconds(report.start_pause_s)}, for a bug of this QEMU"
            rows.append(("stopped for the mirror's start", pause))
        if report.switchover_s is not None:
            rows.append(("guest's I/O stood still", human_seconds(report.switchover_s)))
        rows += _frozen(report.frozen_s)
        if report.way is Way.MIRROR:
            rows.append(("verified", _verified(report)))
        if report.way is Way.SNAPSHOT:
            rows.append(("frozen", escape(str(report.source))))
        for index, file in enumerate(report.kept):
            old = "new disk" if operation is Kind.UNDO else "old overlay"
            rows.append(("" if index else old, escape(str(file))))
        if report.spare:
            rows.append(("second name", f"{escape(str(report.spare))}, until this QEMU ends"))
        self._table(rows)

    def warning(self, text: str) -> None:
        self.warnings.print(f"warning: {escape(text)}")

    def error(self, error: PromoterError) -> None:
        self.errors.print(f"[bold red]error:[/] {escape(error.message)}")
        if error.hint:
            self.errors.print(f"  {escape(error.hint)}")

    def close(self) -> None:
        pass


class LiveOutput(PlainOutput):
    """Bars on a terminal, one per disk."""

    _bars: DiskBars | None = None

    def progress(self, operation: str, disk: str, phase: str, progress: Progress) -> None:
        from promoter.cli.bars import DiskBars

        self._bars = self._bars or DiskBars(self.console)
        self._bars.show(escape(disk), phase, progress, describe(progress, phase))

    def result(self, result: dict[str, Any], reports: Sequence[DiskReport]) -> None:
        self.close()
        super().result(result, reports)

    def backups(self, result: dict[str, Any], copied: Sequence[Copied]) -> None:
        self.close()
        super().backups(result, copied)

    def close(self) -> None:
        if self._bars:
            self._bars.stop()


class _Prioritised:
    """A stream to the journal, where each line begins with how grave it is."""

    def __init__(self, stream: TextIO, priority: int) -> None:
        self._stream, self._mark = stream, f"<{priority}>"
        self._begun = False

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._stream.write(line if self._begun else self._mark + line)
            self._begun = not line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def is_journal(stream: TextIO) -> bool:
    """Does what is written there go to systemd's journal? It says so by device and inode."""
    try:
        file = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file at all
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{file.st_dev}:{file.st_ino}"


def _console(stream: TextIO, priority: int, *, quiet: bool = False, wide: bool = False) -> Console:
    """A console that never breaks a path in a log; a ``wide`` one not on a terminal either, whose
    long lines are wrapped by itself.
    """
    file = cast(TextIO, _Prioritised(stream, priority)) if is_journal(stream) else stream
    console = Console(file=file, quiet=quiet, highlight=False, soft_wrap=True)
    if wide or not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def _frozen(seconds: float | None) -> list[tuple[str, str]]:
    """The row that says for how long the guest's file systems were frozen, if they were."""
    return [] if seconds is None else [("file systems frozen", human_seconds(seconds))]


def _verification(plan: Plan, disk: DiskIntent) -> str:
    if not plan.move.choices.verify:
        return ""
    return f", then reads up to {human_bytes(cost(disk))} to verify"


def _verified(report: DiskReport) -> str:
    if report.verified:
        return f"yes: {human_bytes(report.verified_bytes)} are the same"
    return f"no: {escape(report.unverified)}" if report.unverified else "no"


def describe(progress: Progress, phase: str) -> str:
    """Bytes, rate and time to go; and how the guest's writes stand against that."""
    if phase == room.PHASE:
        return f"({human_bytes(progress.done)} free, goes on with {human_bytes(progress.total)})"
    text = (
        f"{human_bytes(progress.done)} of {human_bytes(progress.total)},"
        f" {human_bytes(progress.rate)}/s, {human_seconds(progress.eta)} to go"
    )
    if progress.dirtied:
        text += f", the guest rewrites {human_bytes(progress.dirtied)}/s"
    if progress.limit is not None:
        text += f", slowed to {human_bytes(progress.limit)}/s"
    return text


def _intention(disk: DiskIntent) -> str:
    """What is to become of a disk."""
    old, new = disk.names.path, disk.names.path if disk.names.in_place else disk.names.target
    match disk.way:
        case Way.MIRROR:
            layers = len(disk.chain.below) - disk.kept
            above = f" above {disk.chain.images[-disk.kept].file}" if disk.kept else ""
            return f"{old} -> {new}{above}, {layers} below, seed by {disk.method}"
        case Way.COMMIT | Way.COMMIT_BELOW:
            merged = ", ".join(str(image.file) for image in disk.gone)
            return f"{merged} -> {disk.names.target}, by one commit"
        case Way.SNAPSHOT:
            frozen = f", frozen as {disk.names.aside}" if disk.names.in_place else ""
            return f"{old} -> {new}{frozen}"


def _way_back(disk: DiskIntent) -> str:
    return (
        f"{undone_file(disk)} -> {disk.names.path}: compares up to {human_bytes(cost(disk))},"
        " copies back what was written since the switchover"
    )


def choose(*, quiet: bool, verbose: bool) -> PlainOutput:
    """Bars on a terminal, else lines."""
    if not quiet and Console().is_terminal:
        return LiveOutput(quiet=False, verbose=verbose)
    return PlainOutput(quiet=quiet, verbose=verbose)
