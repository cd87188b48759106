"""From a command's arguments to a running operation, and from its end to an exit code.

Ctrl-C asks the operation to go back; SIGTERM leaves it for ``promoter job resume``.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import typer

from promoter.blockjob import Progress
from promoter.cli.config import settings
from promoter.cli.output import JsonOutput, Output, replay
from promoter.errors import Cancelled, Interrupted, PromoterError, Refused, Unreachable
from promoter.guests import connect as guests
from promoter.guests.base import Guest, GuestView
from promoter.operations import backup, control, ending, metrics
from promoter.operations import report as reports
from promoter.operations import undo as undoing
from promoter.operations.backup import Backup, BackupOperation
from promoter.operations.course import OnProgress
from promoter.operations.journal import Entry, Journal, OperationStatus, new_id
from promoter.operations.leases import leave, registered
from promoter.operations.leftovers import sweep
from promoter.operations.move import Choices, Failure, Move
from promoter.operations.moving import MoveOperation, OnStep
from promoter.operations.plan import Plan
from promoter.operations.recorded import recorded_move
from promoter.storage.siblings import Siblings, find_siblings
from promoter.values import from_json, to_json

Op = TypeVar("Op", MoveOperation, BackupOperation)
Planner = Callable[[Guest, str, Choices, Path], Awaitable[Plan]]
ENDED = frozenset({OperationStatus.DONE, OperationStatus.FAILED, OperationStatus.CANCELLED})


def finish(work: Coroutine[Any, Any, None], output: Output) -> None:
    """Run a command; its error becomes a message and an exit code."""
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        _fail(Cancelled("cancelled", "Nothing was changed."), output)
    except PromoterError as error:
        _fail(error, output)
    finally:
        output.close()


def _fail(error: PromoterError, output: Output) -> None:
    output.close()
    output.error(error)
    raise typer.Exit(error.exit_code) from error


async def look(name: str, uri: str, scan: Collection[Path]) -> tuple[GuestView, Siblings | None]:
    """One look at the running guest that ``name`` means; domains are those of ``uri``.

    And who else reads its images, when they are on this host.
    """
    guest = await connect(name, uri)
    try:
        view = await guest.look()
    finally:
        await guest.close()
    if guest.pid is None:
        return view, None
    listed = await asyncio.to_thread(registered, view.disks)
    return view, await asyncio.to_thread(find_siblings, view.disks, guest.pid, scan, listed)


async def connect(name: str, uri: str) -> Guest:
    """The running guest that ``name`` means: a domain of ``uri``, or the path of a socket."""
    if "/" in name:
        return await guests.plain(Path(name).absolute())
    try:
        return await guests.domain(name, uri)
    except Unreachable as error:
        if Path(name).is_socket():
            error.hint = f"That is a domain's name. For the socket of this directory: ./{name}"
        raise


async def connect_again(intent: Move | Backup) -> Guest:
    """The guest of an operation; a domain also when it does not run any more."""
    if domain := intent.domain:
        return await guests.domain(domain.uuid, domain.uri, running=False)
    return await guests.plain(Path(intent.guest))


async def perform(
    plan: Planner,
    name: str,
    uri: str,
    choices: Choices,
    state: Path,
    output: Output,
    *,
    dry_run: bool,
) -> None:
    """Plan an operation, and unless it is a dry run, do it."""
    guest = await connect(name, uri)
    try:
        made = await plan(guest, new_id(), choices, state)
        output.plan(made, dry_run=dry_run)
        move = made.move
        if dry_run or not move.disks:
            await guest.close()
            output.result(_result(move, "planned" if dry_run else "done"), [])
            return
        journal = Journal(state)
    except BaseException:  # Ctrl-C too: nobody else can have the monitor meanwhile
        await guest.close()
        raise
    with journal.hold(move.id):
        intent = to_json(move)
        journal.open(move.id, move.kind, move.guest, intent)
        await _run(move, journal, guest, output)


async def back_up(
    name: str,
    uri: str,
    choices: Choices,
    directory: Path,
    since: str | None,
    keep: int | None,
    state: Path,
    output: Output,
) -> None:
    """Plan a backup, and do it."""
    guest = await connect(name, uri)
    try:
        intent = await backup.plan(guest, new_id(), choices, directory, since, keep, state)
    finally:
        await guest.close()
    journal = Journal(state)
    with journal.hold(intent.id):
        kept = to_json(intent)
        journal.open(intent.id, backup.KIND, intent.guest, kept)
        await _run_backup(intent, journal, output)


async def change_speed(identity: str, speed: int, state: Path, output: Output) -> None:
    """Give a running operation another limit."""
    running = _running(identity, state)
    await control.ask(state, running, "speed", speed=speed)
    output.speed(running, speed)


async def ask(identity: str, request: str, state: Path, output: Output) -> None:
    """Ask a running operation for something."""
    running = _running(identity, state)
    await control.ask(state, running, request)
    output.asked(running, request)


async def watch(identity: str, state: Path, output: Output) -> None:
    """Show a running operation until it ends; its error is raised here too."""
    running = _running(identity, state)
    told = await control.watch(state, running, partial(replay, output=output))
    if not told and Journal(state).entry(running).status is not OperationStatus.DONE:
        raise Interrupted(
            f"operation {running} stopped half-way", f"Continue: promoter job resume {running}"
        )


async def list_operations(state: Path, output: Output, prometheus: Path | None) -> None:
    """Show the operations of this host, or write what Prometheus is to know of them."""
    journal = Journal(state)
    if prometheus:
        metrics.write(journal, prometheus)
    else:
        output.operations(journal.entries())


async def report(identity: str, state: Path, output: Output, html: Path | None) -> None:
    """Tell what happened in an operation, or write it into a file."""
    journal = Journal(state)
    told = reports.make(journal, journal.entry(identity))
    if html:
        from promoter.cli.report import write_page

        write_page(told, html)
    else:
        output.report(told)


def _running(identity: str, state: Path) -> str:
    entry = Journal(state).entry(identity)
    if entry.status is not OperationStatus.RUNNING:
        raise Refused(
            f"operation {entry.id} is not running: it is {entry.status}",
            "See which are: promoter job list",
        )
    return entry.id


async def resume(identity: str | None, state: Path, output: Output) -> None:
    """Finish what was interrupted, or put it back: one operation, or all of them.

    One that runs and is paused goes on.
    Without an id every operation is tried, and the first error's code is the command's.
    """
    journal = Journal(state)
    if identity is not None:
        entry = journal.entry(identity)
        if entry.status is OperationStatus.RUNNING:
            await ask(identity, "go on", state, output)
        else:
            await _resume(journal, entry.id, output)
        return
    codes = []
    for entry in journal.entries():
        if entry.status is OperationStatus.INTERRUPTED or _leaves_spare(entry):
            try:
                await _resume(journal, entry.id, output)
            except PromoterError as error:
                codes.append(error.exit_code)
                output.error(error)
    if codes:
        raise typer.Exit(codes[0])


async def undo(identity: str, state: Path, output: Output, *, dry_run: bool) -> None:
    """Go back from an operation: called off while that is possible, else by an undo of its own."""
    journal = Journal(state)
    entry = journal.entry(identity)
    if entry.kind == backup.KIND:
        raise Refused(
            f"operation {entry.id} is a backup: it leaves the guest on the chain that it had",
            "Its copies are files of their own: remove those that you do not want.",
        )
    if entry.status is OperationStatus.RUNNING:
        if dry_run:
            output.asked(entry.id, "undo")
        else:
            await ask(entry.id, "cancel", state, output)
        return
    with journal.hold(entry.id):
        if entry.status is OperationStatus.INTERRUPTED and not dry_run:
            with suppress(Cancelled):
                await _call_off(journal, entry.id, output)
        await _take_back(recorded_move(journal.entry(entry.id)), journal, output, dry_run=dry_run)


async def _take_back(move: Move, journal: Journal, output: Output, *, dry_run: bool) -> None:
    """Undo what has switched."""
    guest = await _connect_if_it_runs(move)
    try:
        made = await undoing.plan(guest, move, new_id(), journal.directory)
        output.plan(made, dry_run=dry_run)
    finally:
        if guest:
            await guest.close()
    if dry_run or not made.move.disks:
        output.result(_result(made.move, "planned" if dry_run else "done"), [])
        return
    with journal.hold(made.move.id):
        journal.open(made.move.id, made.move.kind, made.move.guest, to_json(made.move))
        await _run(made.move, journal, None, output)


async def _call_off(journal: Journal, identity: str, output: Output) -> None:
    """Put back what stopped half-way, where it has not switched; else finish it."""
    move = recorded_move(journal.entry(identity))
    if move.failure is None:
        move = replace(move, failure=Failure.CANCELLED, reason="cancelled")
    await _run(replace(move, tidied=False), journal, None, output)


async def _connect_if_it_runs(move: Move) -> Guest | None:
    try:
        return await connect_again(move)
    except Unreachable:
        if move.domain:
            raise
        return None


def _leaves_spare(entry: Entry) -> bool:
    if entry.kind == backup.KIND:
        return False
    move = recorded_move(entry)
    return move.tidied and any(disk.names.spares() for disk in move.disks)


async def _resume(journal: Journal, identity: str, output: Output) -> None:
    with journal.hold(identity):
        entry = journal.entry(identity)
        if entry.kind == backup.KIND:
            await _run_backup(from_json(Backup, entry.intent), journal, output)
            return
        move = recorded_move(entry)
        if entry.status in ENDED:
            await asyncio.to_thread(leave, move, journal.lock_file(identity))
            if move.tidied:
                await sweep(move, connect_again)
            output.result(_result(move, entry.status), [])
            return
        await _run(replace(move, tidied=False), journal, None, output)


async def _run(move: Move, journal: Journal, guest: Guest | None, output: Output) -> None:
    """Run a move, consolidation or snapshot to its end."""

    def make(progress: OnProgress, step: OnStep) -> MoveOperation:
        return MoveOperation(move, journal, connect_again, progress, step)

    async with _watched(move.id, journal, output, make) as (operation, outputs):
        reports = await operation.run(guest)
        result = _result(move, "done") | {"guest_alive": operation.alive}
        for each in outputs:
            each.result(result, reports)


async def _run_backup(intent: Backup, journal: Journal, output: Output) -> None:
    def make(progress: OnProgress, step: OnStep) -> BackupOperation:
        return BackupOperation(intent, journal, connect_again, progress, step)

    async with _watched(intent.id, journal, output, make) as (operation, outputs):
        copied = await operation.run()
        for each in outputs:
            each.backups(_result(intent, "done"), copied)


@asynccontextmanager
async def _watched(
    identity: str, journal: Journal, output: Output, make: Callable[[OnProgress, OnStep], Op]
) -> AsyncIterator[tuple[Op, tuple[Output, Output]]]:
    """An operation before the eyes of everyone who watches, and in the hands of signals and of
    other terminals.
    """
    events = control.Events()
    outputs = (output, JsonOutput(events.publish))

    def progress(disk: str, phase: str, how_far: Progress) -> None:
        for each in outputs:
            each.progress(identity, disk, phase, how_far)

    def step(action: str) -> None:
        for each in outputs:
            each.step(identity, action)

    operation = make(progress, step)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, operation.cancel)
    loop.add_signal_handler(signal.SIGTERM, operation.stop)
    try:
        async with control.controlled(journal.directory, identity, operation, events):
            try:
                yield operation, outputs
            except PromoterError as error:
                outputs[1].error(error)
                raise
    finally:
        if (command := settings().hook) and events.last:
            await _tell(command, journal, identity, events.last, output)


async def _tell(
    command: tuple[str, ...],
    journal: Journal,
    identity: str,
    event: dict[str, Any],
    output: Output,
) -> None:
    """Run the operator's hook; a signal ends it, and only it."""
    work = ending.tell(command, journal, identity, event)
    telling = asyncio.create_task(work, name="hook")
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, telling.cancel)
    if failure := await telling:
        output.warning(failure)


def _result(intent: Move | Backup, status: str) -> dict[str, Any]:
    return {
        "operation": intent.kind if isinstance(intent, Move) else backup.KIND,
        "id": intent.id,
        "guest": intent.guest,
        "status": status,
        "exit_code": 0,
    }
