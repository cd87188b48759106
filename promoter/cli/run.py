"""From a command's arguments to a running operation, and from its end to an exit code.

Ctrl-C asks the operation to go back; SIGTERM leaves it for ``promoter job resume``.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Collection, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import typer

from promoter.blockjob import Progress
from promoter.cli.output import JsonOutput, Output, replay
from promoter.errors import Cancelled, Interrupted, PromoterError, Refused
from promoter.guests.base import Guest, GuestView
from promoter.guests.libvirt import LibvirtGuest
from promoter.guests.qmp import QmpGuest
from promoter.operations import control
from promoter.operations.journal import Journal, OperationStatus, new_id
from promoter.operations.plan import plan
from promoter.operations.promote import INTENT, PromoteOperation
from promoter.operations.promotion import Choices, Promotion
from promoter.storage.siblings import Siblings, find_siblings

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
    return view, await asyncio.to_thread(find_siblings, view.disks, guest.pid, scan)


async def connect(name: str, uri: str) -> Guest:
    """The running guest that ``name`` means: a domain of ``uri``, or the path of a socket."""
    if "/" in name:
        return await QmpGuest.connect(Path(name).absolute())
    return await LibvirtGuest.connect(name, uri)


async def connect_again(promotion: Promotion) -> Guest:
    """The guest of a promotion; a domain also when it does not run any more."""
    if domain := promotion.domain:
        return await LibvirtGuest.connect(domain.uuid, domain.uri, running=False)
    return await QmpGuest.connect(Path(promotion.guest))


async def promote(
    name: str, uri: str, choices: Choices, state: Path, output: Output, *, dry_run: bool
) -> None:
    """Plan, and unless it is a dry run, promote."""
    guest = await connect(name, uri)
    try:
        made = await plan(guest, new_id(), choices)
        output.plan(made, dry_run=dry_run)
        promotion = made.promotion
        if dry_run or not promotion.disks:
            await guest.close()
            output.result(_result(promotion.id, name, "planned" if dry_run else "done"), [])
            return
        journal = Journal(state)
    except BaseException:
        await guest.close()
        raise
    with journal.hold(promotion.id):
        intent = INTENT.dump_json(promotion).decode()
        journal.open(promotion.id, "promote", promotion.guest, intent)
        await _run(promotion, journal, guest, name, output)


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
    await control.watch(state, running, partial(replay, output=output))
    if Journal(state).entry(running).status is OperationStatus.INTERRUPTED:
        raise Interrupted(
            f"operation {running} stopped half-way", f"Continue: promoter job resume {running}"
        )


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
        if entry.status is OperationStatus.INTERRUPTED or _leaves_spare(entry.intent):
            try:
                await _resume(journal, entry.id, output)
            except PromoterError as error:
                codes.append(error.exit_code)
                output.error(error)
    if codes:
        raise typer.Exit(codes[0])


def _leaves_spare(intent: str) -> bool:
    promotion = INTENT.validate_json(intent)
    return promotion.tidied and any(
        disk.names.in_place and disk.names.target.exists() for disk in promotion.disks
    )


async def _resume(journal: Journal, identity: str, output: Output) -> None:
    with journal.hold(identity):
        entry = journal.entry(identity)
        if entry.status in ENDED and not _leaves_spare(entry.intent):
            output.result(_result(identity, entry.guest, entry.status), [])
            return
        promotion = replace(INTENT.validate_json(entry.intent), tidied=False)
        await _run(promotion, journal, None, entry.guest, output)


async def _run(
    promotion: Promotion, journal: Journal, guest: Guest | None, name: str, output: Output
) -> None:
    """Run it to its end, before the eyes of everyone who watches."""
    events = control.Events()
    watchers = JsonOutput(events.publish)

    def progress(disk: str, phase: str, how_far: Progress) -> None:
        output.progress(promotion.id, disk, phase, how_far)
        watchers.progress(promotion.id, disk, phase, how_far)

    def step(action: str) -> None:
        output.step(promotion.id, action)
        watchers.step(promotion.id, action)

    operation = PromoteOperation(promotion, journal, connect_again, progress, step)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, operation.cancel)
    loop.add_signal_handler(signal.SIGTERM, operation.stop)
    async with control.controlled(journal.directory, promotion.id, operation, events):
        try:
            reports = await operation.run(guest)
        except PromoterError as error:
            watchers.error(error)
            raise
        result = _result(promotion.id, name, "done") | {"guest_alive": operation.alive}
        output.result(result, reports)
        watchers.result(result, reports)


def _result(identity: str, guest: str, status: str) -> dict[str, Any]:
    return {
        "operation": "promote",
        "id": identity,
        "guest": guest,
        "status": status,
        "exit_code": 0,
    }
