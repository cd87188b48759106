"""What systemd wants to hear of a service (sd_notify(3)); silence where there is no systemd."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

MICROSECONDS = 1_000_000


def send(state: str) -> None:
    """``READY=1``, ``WATCHDOG=1``, ``STOPPING=1``."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = "\0" + address[1:]
    if address:
        out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        with out, suppress(OSError):
            out.sendto(state.encode(), address)


async def keep_alive() -> None:
    """Tell the watchdog, if there is one, that the event loop turns."""
    limit = int(os.environ.get("WATCHDOG_USEC", "0")) / MICROSECONDS
    while limit:
        send("WATCHDOG=1")
        await asyncio.sleep(limit / 3)
