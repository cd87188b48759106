"""promoter's end of the guard: while it holds, no death of promoter leaves the guest frozen."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from promoter.errors import JobFailed
from promoter.guests.base import PlainGuest
from promoter.operations import guard
from promoter.values import to_json

DEADLINE = 1.0


class Pulse:
    """promoter's end of the guard's pipe."""

    def __init__(self, pipe: asyncio.StreamWriter) -> None:
        self._pipe = pipe

    def beat(self, _: object = None) -> None:
        """Say that promoter lives and is at work."""
        self._pipe.write(guard.ALIVE)

    async def keep_beating(self) -> None:
        """Say so as long as promoter's event loop turns."""
        while True:
            self.beat()
            await asyncio.sleep(DEADLINE / 4)


@asynccontextmanager
async def guarded(
    guest: PlainGuest,
    switches: tuple[guard.Switch, ...] = (),
    starting: str | None = None,
    *,
    standing: bool = False,
    lock_fd: int | None = None,
    limits: tuple[dict[str, Any], ...] = (),
) -> AsyncIterator[Pulse]:
    """Have a guard for ``switches``, or for the guest's pause while job ``starting`` starts, or
    to give it back its ``limits``. ``lock_fd`` is the operation's lock: until the guard is done,
    names may change, and the operation is not over.
    """
    held = [] if lock_fd is None else [lock_fd]
    spec = guard.GuardSpec(guest.monitor_fd, DEADLINE, switches, starting, standing, limits)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", guard.__name__, to_json(spec)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=[guest.monitor_fd, *held],
        start_new_session=True,
    )
    assert process.stdin and process.stdout
    if await process.stdout.read(1) != guard.READY:
        raise JobFailed("the guard did not start")
    try:
        yield Pulse(process.stdin)
    finally:
        process.stdin.write(guard.LEAVE)
        with suppress(ConnectionError):
            await process.stdin.drain()
        process.stdin.close()
        await process.wait()
