"""What is done to a libvirt domain while it is suspended: by a process of its own.

libvirt has no PENDING. So for the switchover the guest is suspended, its disks pivot one
after the other, the persistent definition gets the new files, and the guest goes on: a write
can be acknowledged only where the next boot finds it. Where QEMU can lose writes while a
mirror starts, the guest is suspended for that too.

Whatever becomes of promoter meanwhile, this process goes on to the end, and so nobody stays
frozen. It holds the operation's lock, so that ``job resume`` does not come in between. Should it
die itself, promoter sees a guest that it had stopped, and does the rest.

Run as ``python -m promoter.operations.suspended SPEC``; its answer is on standard output.
Source: ``virDomainSuspend``, ``virDomainBlockCopy``, ``virDomainBlockJobAbort`` (``PIVOT``),
``virDomainDefineXML``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from promoter.errors import JobFailed, Unreachable
from promoter.guests.base import (
    CommandFailed,
    ConnectionLost,
    DefinedDisk,
    Domain,
    GuestView,
    MirrorSpec,
)
from promoter.guests.libvirt import LibvirtGuest
from promoter.operations.start import scanned, start
from promoter.storage.files import sync

LONGEST = 60.0
LONGEST_ABSENCE = 60.0
"""How long libvirtd may be gone, in seconds, before promoter gives up waiting for it."""


@dataclass(frozen=True)
class Work:
    """A mirror to start, or the disks to pivot, by name. ``running``: suspend the guest for it."""

    uri: str
    uuid: str
    running: bool
    start: MirrorSpec | None = None
    pivot: dict[str, DefinedDisk] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """How it went: for how many seconds the guest was suspended, and what failed."""

    pause: float | None
    failures: tuple[str, ...] = ()


WORK, DONE = TypeAdapter(Work), TypeAdapter(Done)


async def while_suspended(work: Work, lock_fd: int) -> float | None:
    """Have a process of its own do it; for how many seconds it had the guest suspended.

    Raises `JobFailed` when something failed, `ConnectionLost` when libvirtd went away.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", __name__, WORK.dump_json(work).decode()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=[lock_fd],
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(LONGEST + LONGEST_ABSENCE):
            answer, _ = await process.communicate()
    except TimeoutError as error:
        process.kill()
        raise JobFailed("libvirt did not answer in time while the guest was suspended") from error
    if process.returncode == ConnectionLost.exit_code:
        raise ConnectionLost(f"libvirt at {work.uri} went away while the guest was suspended")
    if process.returncode:
        raise JobFailed("the process that had the guest suspended did not end well")
    done = DONE.validate_json(answer)
    if done.failures:
        raise JobFailed("; ".join(done.failures))
    return done.pause


async def go_on(domain: Domain, disks: Mapping[str, DefinedDisk]) -> None:
    """After work that broke off: define the disks that have switched, and continue the guest."""
    view = await domain.look()
    switched = {name: new for name, new in disks.items() if _is_on(view, name, new)}
    await define(domain, switched)
    if view.status == "paused":
        for job in view.jobs:
            await scanned(domain, job)
        await domain.cont()


def _is_on(view: GuestView, name: str, new: DefinedDisk) -> bool:
    disk = view.disk(name)
    return disk is not None and any(image.file == new.file for image in disk.chain)


async def define(domain: Domain, disks: Mapping[str, DefinedDisk]) -> None:
    """Have the next boot open these files, also after a power cut."""
    if disks:
        await domain.define(disks)
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


async def _work(domain: Domain, work: Work) -> Done:
    began = time.monotonic()
    failures: tuple[str, ...] = ()
    if work.running:
        await domain.stop()
    try:
        if work.start:
            await start(domain, work.start)
        failures = await _pivot(domain, work.pivot)
    except JobFailed as error:
        failures = (error.message,)
    finally:
        if work.running:
            await domain.cont()
    return Done(time.monotonic() - began if work.running else None, failures)


async def _run(work: Work) -> Done:
    domain = await LibvirtGuest.connect(work.uuid, work.uri)
    try:
        return await _work(domain, work)
    except ConnectionLost:
        await domain.close()
        domain = await _come_back(work)
        await go_on(domain, work.pivot)
        raise
    finally:
        await domain.close()


async def _come_back(work: Work) -> LibvirtGuest:
    async with asyncio.timeout(LONGEST_ABSENCE):
        while True:
            with suppress(Unreachable):
                return await LibvirtGuest.connect(work.uuid, work.uri)
            await asyncio.sleep(0.1)


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    try:
        done = asyncio.run(_run(WORK.validate_json(sys.argv[1])))
    except ConnectionLost as error:
        sys.exit(error.exit_code)
    sys.stdout.write(DONE.dump_json(done).decode())


if __name__ == "__main__":
    main()
