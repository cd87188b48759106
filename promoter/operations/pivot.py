"""The switchover of a libvirt domain: a process of its own, so that nobody stays frozen.

libvirt has no PENDING. So the guest is suspended, its disks pivot one after the
other, the persistent definition gets the new files, and the guest goes on: a
write can be acknowledged only where the next boot finds it. Whatever becomes of
promoter meanwhile, this process goes on to the end; it holds the operation's
lock, so that ``job resume`` does not come in between. Should it die itself,
promoter sees a guest that it had stopped, and does the rest.

Run as ``python -m promoter.operations.pivot SPEC``; its answer is on standard output.
Source: ``virDomainSuspend``, ``virDomainBlockJobAbort`` (``PIVOT``), ``virDomainDefineXML``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from pydantic import TypeAdapter

from promoter.errors import JobFailed, Unreachable
from promoter.guests.base import CommandFailed, ConnectionLost, DefinedDisk, Domain, GuestView
from promoter.guests.libvirt import LibvirtGuest
from promoter.storage.files import sync

LONGEST_PIVOT = 60.0
LONGEST_ABSENCE = 60.0
"""How long libvirtd may be gone, in seconds, before promoter gives up waiting for it."""


@dataclass(frozen=True)
class PivotSpec:
    """The disks that are ready, by name. ``running``: the guest is to be suspended for it."""

    uri: str
    uuid: str
    running: bool
    disks: dict[str, DefinedDisk]


@dataclass(frozen=True)
class Pivoted:
    """How it went: for how many seconds the guest was suspended, and what failed, by disk."""

    pause: float | None
    failures: dict[str, str]


SPEC, ANSWER = TypeAdapter(PivotSpec), TypeAdapter(Pivoted)


async def pivot_over(spec: PivotSpec, lock_fd: int) -> Pivoted:
    """Have a process of its own pivot the disks. Raises `JobFailed` when it did not end well."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", __name__, SPEC.dump_json(spec).decode()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=[lock_fd],
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(LONGEST_PIVOT + LONGEST_ABSENCE):
            answer, _ = await process.communicate()
    except TimeoutError as error:
        process.kill()
        raise JobFailed("libvirt did not pivot in time") from error
    if process.returncode == ConnectionLost.exit_code:
        raise ConnectionLost(f"libvirt at {spec.uri} went away during the switchover")
    if process.returncode:
        raise JobFailed("the switchover's own process did not end well")
    return ANSWER.validate_json(answer)


async def go_on(domain: Domain, disks: Mapping[str, DefinedDisk]) -> None:
    """After a switchover that broke off: define the disks that have switched, and continue."""
    view = await domain.look()
    switched = {name: new for name, new in disks.items() if _is_on(view, name, new)}
    await define(domain, switched)
    if view.status == "paused":
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


async def _pivot_all(domain: Domain, spec: PivotSpec) -> Pivoted:
    began = time.monotonic()
    failures: dict[str, str] = {}
    done: dict[str, DefinedDisk] = {}
    if spec.running:
        await domain.stop()
    try:
        for name, new in spec.disks.items():
            try:
                await domain.pivot(name)
            except CommandFailed as error:
                failures[name] = error.message
                if not done:
                    break
            else:
                done[name] = new
        await define(domain, done)
    finally:
        if spec.running:
            await domain.cont()
    return Pivoted(time.monotonic() - began if spec.running else None, failures)


async def _run(spec: PivotSpec) -> Pivoted:
    domain = await LibvirtGuest.connect(spec.uuid, spec.uri)
    try:
        return await _pivot_all(domain, spec)
    except ConnectionLost:
        await domain.close()
        domain = await _come_back(spec)
        await go_on(domain, spec.disks)
        raise
    finally:
        await domain.close()


async def _come_back(spec: PivotSpec) -> LibvirtGuest:
    async with asyncio.timeout(LONGEST_ABSENCE):
        while True:
            with suppress(Unreachable):
                return await LibvirtGuest.connect(spec.uuid, spec.uri)
            await asyncio.sleep(0.1)


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    try:
        pivoted = asyncio.run(_run(SPEC.validate_json(sys.argv[1])))
    except ConnectionLost as error:
        sys.exit(error.exit_code)
    sys.stdout.write(ANSWER.dump_json(pivoted).decode())


if __name__ == "__main__":
    main()
