"""From a command's arguments to a running operation, and from its end to an exit code.

Ctrl-C asks the operation to go back; SIGTERM leaves it for ``promoter job resume``.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import typer

from promoter.cli.output import Output
from promoter.errors import Cancelled, PromoterError, Refused
from promoter.guests.base import Guest, GuestView
from promoter.guests.libvirt import LibvirtGuest
from promoter.guests.qmp import QmpGuest
from promoter.operations import control
from promoter.operations.journal import Journal, OperationStatus, new_id
from promoter.operations.outcome import DiskReport
from promoter.operations.plan import Plan
from promoter.operations.promote import INTENT, PromoteOperation
from promoter.operations.promotion import Choices, DiskIntent, Promotion
from promoter.storage.names import Named
from promoter.storage.siblings import Siblings, find_siblings

Planner = Callable[[Guest, str, Choices], Awaitable[Plan]]
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
        made = await plan(guest, new_id(), choices)
        output.plan(made, dry_run=dry_run)
        promotion = made.promotion
        if dry_run or not promotion.disks:
            await guest.close()
            output.result(_result(promotion, "planned" if dry_run else "done"), [])
            return
        journal = Journal(state)
    except BaseException:
        await guest.close()
        raise
    with journal.hold(promotion.id):
        intent = INTENT.dump_json(promotion).decode()
        journal.open(promotion.id, promotion.kind, promotion.guest, intent)
        reports, alive = await _run(promotion, journal, guest, output)
    output.result(_result(promotion, "done") | alive, reports)


async def change_speed(identity: str, speed: int, state: Path, output: Output) -> None:
    """Give a running operation another limit."""
    entry = Journal(state).entry(identity)
    if entry.status is not OperationStatus.RUNNING:
        raise Refused(
            f"operation {entry.id} is not running: it is {entry.status}",
            "See which are: promoter job list",
        )
    await control.change_speed(state, entry.id, speed)
    output.speed(entry.id, speed)


async def resume(identity: str | None, state: Path, output: Output) -> None:
    """Finish what was interrupted, or put it back: one operation, or all of them.

    Without an id every operation is tried, and the first error's code is the command's.
    """
    journal = Journal(state)
    if identity is not None:
        await _resume(journal, journal.entry(identity).id, output)
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
    return promotion.tidied and any(map(_has_spare, promotion.disks))


def _has_spare(disk: DiskIntent) -> bool:
    """Is its new disk still the guest's, by a second name? If not, a later operation's it is."""
    return disk.names.look(disk.new) is Named.NEW and bool(disk.names.spares())


async def _resume(journal: Journal, identity: str, output: Output) -> None:
    with journal.hold(identity):
        entry = journal.entry(identity)
        promotion = INTENT.validate_json(entry.intent)
        if entry.status in ENDED and not _leaves_spare(entry.intent):
            output.result(_result(promotion, entry.status), [])
            return
        promotion = replace(promotion, tidied=False)
        reports, alive = await _run(promotion, journal, None, output)
    output.result(_result(promotion, "done") | alive, reports)


async def _run(
    promotion: Promotion, journal: Journal, guest: Guest | None, output: Output
) -> tuple[Sequence[DiskReport], dict[str, bool]]:
    progress = partial(output.progress, promotion.id)
    step = partial(output.step, promotion.id)
    operation = PromoteOperation(promotion, journal, connect_again, progress, step)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, operation.cancel)
    loop.add_signal_handler(signal.SIGTERM, operation.stop)
    async with control.controlled(journal.directory, promotion.id, operation.change_speed):
        return await operation.run(guest), {"guest_alive": operation.alive}


def _result(intent: Promotion, status: str) -> dict[str, Any]:
    return {
        "operation": intent.kind,
        "id": intent.id,
        "guest": intent.guest,
        "status": status,
        "exit_code": 0,
    }
