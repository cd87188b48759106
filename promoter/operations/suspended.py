"""What is done to a guest while it is suspended: by a process of its own.

libvirt has no PENDING, and a snapshot has none either. So for the switchover the guest is
suspended, its disks pivot one after the other or get their overlays at once, what the next boot
opens is changed, and the guest goes on: a write can be acknowledged only where the next boot
finds it. Where QEMU can lose writes while a domain's mirror starts, the domain is suspended for
that too.

Whatever becomes of promoter meanwhile, this process goes on to the end, and so nobody stays
frozen. It holds the operation's lock, so that ``job resume`` does not come in between. Should it
die itself, promoter sees a guest that it had stopped, and does the rest. A plain guest's monitor
serves one client: promoter closes its own before.

Run as ``python -m promoter.operations.suspended``, with a socket as its standard input, over which
the work comes; its answer is on standard output.
Source: ``virDomainSuspend``, ``virDomainBlockCopy``, ``virDomainBlockJobAbort`` (``PIVOT``),
``virDomainDefineXML``, ``virDomainSnapshotCreateXML``; QAPI ``transaction``, ``blockdev-reopen``.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from promoter.errors import JobFailed, Unreachable
from promoter.guests import connect
from promoter.guests.base import (
    CommandFailed,
    CommitSpec,
    ConnectionLost,
    DefinedDisk,
    Domain,
    Guest,
    GuestView,
    MirrorSpec,
    NodeSpec,
    PlainGuest,
    SnapshotSpec,
)
from promoter.operations.move import DomainAddress
from promoter.operations.quiesce import NotQuiesced, freeze, thaw
from promoter.operations.start import scanned, start
from promoter.operations.switchover import TooSlow, settle
from promoter.storage.files import sync
from promoter.storage.names import Names
from promoter.values import from_json, to_json

LONGEST = 60.0
MOST_AT_ONCE = 1 << 16
LONGEST_ABSENCE = 60.0
"""How long libvirtd may be gone, in seconds, before promoter gives up waiting for it."""
LONGEST_STANDSTILL = 3600.0
"""The same while a guest stands still that promoter has stopped."""


@dataclass(frozen=True)
class Work:
    """What to do in a guest, a domain or one behind a monitor's path: a mirror or commit to start,
    the disks to pivot, by name, or snapshots, with the names that a plain guest's next boot goes
    by. ``running``: suspend the guest for it; ``settle``: for as many seconds at most while the
    copies catch up; ``quiesce``: freeze the guest's file systems around it; ``view``: take views
    of disks that have pivoted, with these files for what is overwritten.
    """

    guest: DomainAddress | str
    running: bool
    mirror: MirrorSpec | None = None
    commit: CommitSpec | None = None
    pivot: dict[str, DefinedDisk] = field(default_factory=dict)
    settle: float | None = None
    snapshots: tuple[SnapshotSpec, ...] = ()
    names: tuple[Names, ...] = ()
    quiesce: bool = False
    view: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """How it went: for how many seconds the guest was suspended, its file systems were frozen,
    and what failed. ``not_quiesced``: at the freeze, so that nothing else was begun;
    ``unviewed``: why no views were taken.
    """

    pause: float | None
    failures: tuple[str, ...] = ()
    too_slow: bool = False
    not_quiesced: bool = False
    frozen: float | None = None
    unviewed: str = ""


class Worker:
    """The process, from promoter's side. It is started early, since that takes a while; without
    work, it ends with promoter.
    """

    def __init__(self, process: asyncio.subprocess.Process, work: socket.socket) -> None:
        self._process = process
        self._work = work

    @classmethod
    async def start(cls) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", __name__),
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        return cls(process, ours)

    async def do(self, work: Work, lock_fd: int) -> Done:
        """Have it done. ``lock_fd`` is the operation's lock.

        Raises `JobFailed` when something failed, `TooSlow` when the copies did not catch up,
        `NotQuiesced` when the file systems did not freeze, `ConnectionLost` when libvirtd or the
        guest went away.
        """
        try:
            async with asyncio.timeout(LONGEST + LONGEST_ABSENCE):
                with suppress(ConnectionError):  # it has died: its exit code says so
                    await asyncio.to_thread(self._send, work, lock_fd)
                answer, _ = await self._process.communicate()
        except TimeoutError as error:
            raise JobFailed("no answer in time while the guest was suspended") from error
        finally:
            await self.dismiss()
        if self._process.returncode == Unreachable.exit_code:
            raise ConnectionLost("the guest's host went away while the guest was suspended")
        if self._process.returncode:
            raise JobFailed("the process that had the guest suspended did not end well")
        done = from_json(Done, answer)
        if done.failures:
            raise _kind(done)("; ".join(done.failures))
        return done

    def _send(self, work: Work, lock_fd: int) -> None:
        text = to_json(work).encode()
        sent = socket.send_fds(self._work, [text], [lock_fd])
        self._work.sendall(text[sent:])
        self._work.shutdown(socket.SHUT_WR)

    async def dismiss(self) -> None:
        """End it, if it has not ended."""
        self._work.close()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


def _kind(done: Done) -> type[JobFailed]:
    if done.not_quiesced:
        return NotQuiesced
    return TooSlow if done.too_slow else JobFailed


def _receive() -> bytes:
    """The work, and the lock, which is held as long as this process lives; nothing: no work."""
    with socket.socket(fileno=sys.stdin.fileno()) as work:
        text, _locks, *_ = socket.recv_fds(work, MOST_AT_ONCE, 1)
        while more := work.recv(MOST_AT_ONCE):
            text += more
    return text


async def go_on(
    guest: Guest,
    disks: Mapping[str, DefinedDisk],
    snapshots: Sequence[SnapshotSpec] = (),
    names: Sequence[Names] = (),
    *,
    proceed: bool = True,
    frozen: bool = False,
) -> None:
    """After work that broke off: the next boot opens the disks that have switched, and the
    guest continues, if it is to ``proceed``; its file systems are thawed if they may be ``frozen``.
    """
    view = await guest.look()
    if isinstance(guest, Domain):
        await define(guest, {name: new for name, new in disks.items() if _is_on(view, name, new)})
    elif any(_is_on(view, spec.disk, spec.overlay) for spec in snapshots):
        await _snapshot(guest, snapshots, names)
    if proceed and view.status == "paused":
        for job in view.jobs:
            await scanned(guest, job)
        await guest.cont()
    if frozen:
        await thaw(guest)


def _is_on(view: GuestView, name: str, new: DefinedDisk | NodeSpec) -> bool:
    disk = view.disk(name)
    return disk is not None and disk.chain.active.file == new.file


async def _snapshot(
    guest: Guest, snapshots: Sequence[SnapshotSpec], names: Sequence[Names]
) -> None:
    """Freeze the disks and have the next boot open the overlays.

    It does also when QEMU has made the snapshot, but not learnt the frozen layers' new names:
    the error then comes afterwards.
    """
    try:
        await guest.snapshot(snapshots)
    finally:
        if isinstance(guest, Domain):
            await _make_durable(guest)
        else:
            await _settle(guest, snapshots, names)


async def _settle(guest: Guest, snapshots: Sequence[SnapshotSpec], names: Sequence[Names]) -> None:
    view = await guest.look()
    if all(_is_on(view, spec.disk, spec.overlay) for spec in snapshots):
        for each in names:
            each.settle()


async def define(domain: Domain, disks: Mapping[str, DefinedDisk]) -> None:
    """Have the next boot open these files, also after a power cut."""
    if disks:
        await domain.define(disks)
        await _make_durable(domain)


async def _make_durable(domain: Domain) -> None:
    if domain.definitions:
        await asyncio.to_thread(sync, domain.definitions)


async def _pivot(domain: Domain, disks: Mapping[str, DefinedDisk]) -> tuple[str, ...]:
    """Pivot and define the disks; what failed. Nothing is tried once the first one has failed."""
    failures = []
    done: dict[str, DefinedDisk] = {}
    for name, new in disks.items():
        try:
            await domain.pivot(name)
        except CommandFailed as error:
            failures.append(f"{name} did not switch: {error.message}")
            if not done:
                break
        else:
            done[name] = new
    await define(domain, done)
    return tuple(failures)


async def _view(domain: Domain, scratch: Mapping[str, Path]) -> str:
    """Take views of disks; why it did not work, if it did not."""
    try:
        await domain.begin_view(scratch)
    except CommandFailed as error:
        return error.message
    return "somebody continued the guest" if await domain.status() == "running" else ""


async def _work(guest: Guest, work: Work) -> Done:
    if isinstance(guest, PlainGuest):
        for spec in work.snapshots:
            await guest.attach(spec.overlay)
    return await (_quiesced if work.quiesce else _suspended)(guest, work)


async def _quiesced(guest: Guest, work: Work) -> Done:
    began = time.monotonic()
    try:
        await freeze(guest)
    except JobFailed as error:
        return Done(None, (error.message,), not_quiesced=isinstance(error, NotQuiesced))
    failures: tuple[str, ...] = ()
    try:
        done = await _suspended(guest, work)
    finally:
        try:
            await thaw(guest)
        except JobFailed as error:
            failures = (error.message,)
    took = time.monotonic() - began
    return replace(done, frozen=took, failures=(*done.failures, *failures))


async def _suspended(guest: Guest, work: Work) -> Done:
    failures: tuple[str, ...] = ()
    unviewed = ""
    too_slow = False
    began = time.monotonic()
    if work.running:
        await guest.stop()
    try:
        if begun := work.mirror or work.commit:
            await start(guest, begun)
        if work.settle is not None:
            await settle(guest, work.pivot, work.settle)
        if isinstance(guest, Domain):
            failures = await _pivot(guest, work.pivot)
            if work.view and not failures:
                unviewed = await _view(guest, work.view)
        if work.snapshots:
            await _snapshot(guest, work.snapshots, work.names)
    except JobFailed as error:
        failures = (error.message,)
        too_slow = isinstance(error, TooSlow)
    finally:
        if work.running:
            await guest.cont()
    pause = time.monotonic() - began if work.running else None
    return Done(pause, failures, too_slow, unviewed=unviewed)


async def _run(work: Work) -> Done:
    try:
        guest = await _reach(work.guest)
    except Unreachable as error:
        return Done(None, (error.message,))
    try:
        return await _work(guest, work)
    except ConnectionLost:
        await guest.close()
        if isinstance(work.guest, DomainAddress):
            guest = await _reach(work.guest)
            await go_on(guest, work.pivot, frozen=work.quiesce)
        raise
    finally:
        await guest.close()


async def _reach(address: DomainAddress | str) -> Guest:
    if isinstance(address, str):
        return await connect.plain(Path(address))
    deadline = time.monotonic() + LONGEST_ABSENCE
    while True:
        try:
            return await connect.domain(address.uuid, address.uri)
        except Unreachable:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.1)


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    if not (work := _receive()):
        return
    try:
        done = asyncio.run(_run(from_json(Work, work)))
    except Unreachable as error:
        sys.exit(error.exit_code)
    sys.stdout.write(to_json(done))


if __name__ == "__main__":
    main()
