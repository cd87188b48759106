"""``promoter doctor``: what is wrong with a guest's disks, or on this host, and who can mend it.

It changes nothing, except that file systems are tried on files that are gone afterwards. What it
finds carries a `Remedy` only where it is certainly promoter's own; everything else is named and
left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

from promoter.blockjob import JobStatus
from promoter.errors import PromoterError
from promoter.guests.base import Domain, Guest, GuestView, PlainGuest
from promoter.operations.checkup import powered_off, running_guest
from promoter.operations.findings import CloseNode, Diagnosis, EndJob, Finding, Remove, of_error
from promoter.operations.fitness import directory, libvirt, tools
from promoter.operations.journal import Journal, OperationStatus
from promoter.operations.leftovers import spares_left, unneeded
from promoter.operations.move import Move
from promoter.operations.remains import (
    Connect,
    Known,
    half_done,
    known,
    names_left,
    orphans,
    running,
    spares,
    view_of,
)
from promoter.storage.abilities import Abilities
from promoter.storage.names import boot_name

ENDING = 10.0  # seconds for a job that was told to end

Meet = Callable[[], Awaitable[Guest]]


async def examine_guest(name: str, meet: Meet, journal: Journal) -> Diagnosis:
    """A guest, running or, if it is a domain, not. It is met, looked at, and let go again.

    One on which an operation runs is not looked into: it is on its way.
    """
    everything = known(journal)
    own = [each for each in everything if each.is_of(name, None)]
    try:
        guest = await meet()
        try:
            view = await guest.look()
            own = [each for each in everything if each.is_of(name, guest)]
            if busy := running(own):
                return _diagnosis(busy)
            return await _examine(guest, view, own, everything, journal.directory)
        finally:
            await guest.close()
    except PromoterError as error:
        if busy := running(own):
            return _diagnosis(busy)
        left = [half_done(each, None) for each in own if each.is_open]
        return _diagnosis([of_error(name, error), *left])


async def _examine(
    guest: Guest,
    view: GuestView,
    own: Iterable[Known],
    everything: Collection[Known],
    state: Path,
) -> Diagnosis:
    operations = {each.entry.id: each for each in everything}
    findings: list[Finding] = []
    for each in own:
        if each.is_open:
            findings.append(half_done(each, view))
        elif isinstance(each.intent, Move) and each.intent.tidied:
            names = [name for disk in each.intent.disks for name in unneeded(disk.names, view)]
            findings += spares(each, names)
    findings += orphans(guest.name, view, operations)
    if view.runs:
        findings += await running_guest(guest, view, operations, state)
    elif isinstance(guest, Domain):
        findings += await powered_off(guest)
    places = await asyncio.to_thread(_places, guest, view)
    return await _with_directories(findings, everything, places, state)


def _places(guest: Guest, view: GuestView) -> set[Path]:
    """Where the guest's disks are, and what is made beside them, if that is on this host."""
    if not view.runs:
        here = isinstance(guest, Domain) and guest.is_here
        files = [Path(file) for file in (view.defined or {}).values() if file and here]
    else:
        active = [disk.chain.active.file for disk in view.disks if not disk.read_only]
        files = [boot_name(file) for file in active if file and file.is_file() and guest.pid]
    return {file.parent for file in files}


async def examine_host(uri: str, journal: Journal, connect: Connect) -> Diagnosis:
    """This host: the tools, the journal, libvirt, file systems and what was left in them.

    ``connect`` reaches the guest of an operation again.
    """
    everything = known(journal)
    findings = [*tools(), *await libvirt(uri, everything), *running(everything)]
    for each in everything:
        if each.entry.status is OperationStatus.INTERRUPTED:
            findings.append(half_done(each, await view_of(each.intent, connect)))
        elif isinstance(each.intent, Move) and each.intent.tidied:
            findings += spares(each, await spares_left(each.intent, connect))
    moves = [each.intent for each in everything if isinstance(each.intent, Move)]
    disks = [disk for move in moves for disk in move.disks if not disk.names.remote]
    places = {file.parent for disk in disks for file in (disk.names.path, disk.names.target)}
    return await _with_directories(findings, everything, places, journal.directory)


async def _with_directories(
    findings: list[Finding], everything: Iterable[Known], places: Iterable[Path], state: Path
) -> Diagnosis:
    operations = {each.entry.id: each for each in everything}
    there: list[Abilities] = []
    for place in sorted({*places, state}):
        if place.is_dir():
            findings += await asyncio.to_thread(names_left, place, operations)
            found, wrong = await asyncio.to_thread(directory, place, is_state=place == state)
            findings += wrong
            there += [found] if found else []
    return _diagnosis(findings, there)


def _diagnosis(findings: Iterable[Finding], directories: Iterable[Abilities] = ()) -> Diagnosis:
    once = dict.fromkeys(findings)
    return Diagnosis(tuple(sorted(once, key=lambda f: not f.wrong)), tuple(directories))


async def mend(remedy: EndJob | CloseNode | Remove, meet: Meet) -> None:
    """Do it. Whether it worked, the next look shows."""
    if isinstance(remedy, Remove):
        remedy.file.unlink(missing_ok=True)
        return
    guest = await meet()
    try:
        if isinstance(remedy, EndJob):
            await _end(guest, remedy.job)
        else:
            assert isinstance(guest, PlainGuest), "libvirt's nodes have no names of ours"
            await guest.drop(remedy.node)
    finally:
        await guest.close()


async def _end(guest: Guest, name: str) -> None:
    job = await guest.job(name)
    if job and job.status is not JobStatus.CONCLUDED:
        await guest.cancel(name)
        with suppress(TimeoutError):  # then the dismissal is refused, which tells more
            async with asyncio.timeout(ENDING):
                await guest.wait_for(name, {JobStatus.CONCLUDED}, lambda _: None)
    await guest.dismiss(name)
