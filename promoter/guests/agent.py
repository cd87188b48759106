"""The guest agent of a plain QEMU guest, over the socket that its channel ends in.

Nobody has to name that socket: QEMU tells which of its character devices the port of the agent's
name is wired to. The agent speaks nearly QMP, without a greeting and one command after the other.
What an earlier client left in the channel is passed over, on both sides.

Source: the guest agent's reference (``guest-sync-delimited``); QOM of ``virtserialport`` and
``chardev-socket``.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from pathlib import Path
from typing import Any

from promoter.guests.base import AgentSilent, CommandFailed, ConnectionLost
from promoter.guests.view import Execute

CHANNEL = "org.qemu.guest_agent.0"
ADD_CHANNEL = (
    "Give the guest one: -chardev socket,id=agent,path=PATH,server=on,wait=off"
    f" -device virtio-serial -device virtserialport,chardev=agent,name={CHANNEL}"
)
LOOK_EVERY = 0.05
DELIMITER = b"\xff"  # no part of JSON: the reader begins anew


class Agent:
    """A guest agent; ``guest`` is the name of whose it is."""

    def __init__(
        self, guest: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._guest = guest
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, guest: str, execute: Execute, cwd: Path, within: float) -> Agent:
        """Take the agent's channel. QEMU's relative names start from ``cwd``.

        Raises `CommandFailed` when the guest has none that can be taken, `AgentSilent` when
        somebody else does not let it go ``within`` seconds.
        """
        chardev = await _find(guest, execute)
        path = cwd / await _path(guest, execute, chardev)
        deadline = time.monotonic() + within
        while await execute("qom-get", path=chardev, property="connected"):
            if time.monotonic() > deadline:
                raise AgentSilent(
                    f"{guest}: another client has its guest agent's socket, {path}",
                    "QEMU serves one client a socket. Close the other one.",
                )
            await asyncio.sleep(LOOK_EVERY)  # QEMU may not have seen yet that one is gone
        try:
            return cls(guest, *await asyncio.open_unix_connection(path))
        except OSError as error:
            raise CommandFailed(
                f"{guest}: cannot connect to its guest agent at {path}: {error.strerror or error}",
                "Run promoter on the guest's host, where it may open that socket.",
            ) from error

    async def ask(self, command: str, within: float) -> Any:
        """Have the agent execute a command. Raises as `Guest.ask_agent`."""
        try:
            async with asyncio.timeout(within):
                answer = await self._ask(command)
        except TimeoutError:
            raise AgentSilent(
                f"{self._guest}: its guest agent does not answer within {within:g} s"
            ) from None
        except (EOFError, OSError) as error:
            raise ConnectionLost(f"{self._guest}: its guest agent's channel closed") from error
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise self._nonsense() from error
        match answer:
            case {"return": value}:
                return value
            case {"error": {"desc": why}}:
                raise CommandFailed(f"{self._guest}: {command}: {why}")
        raise self._nonsense()

    def _nonsense(self) -> CommandFailed:
        """The guest may say what it likes."""
        return CommandFailed(f"{self._guest}: what its guest agent answers is no answer")

    async def _ask(self, command: str) -> Any:
        """Both at once, so that the agent executes the command also after we have given up."""
        number = secrets.randbits(31)
        sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        words = (json.dumps(each).encode() + b"\n" for each in (sync, {"execute": command}))
        self._writer.write(DELIMITER + b"".join(words))
        await self._writer.drain()
        while await self._after_delimiter() != {"return": number}:
            pass  # somebody else's, who had given up
        return json.loads(await self._line())

    async def _after_delimiter(self) -> Any:
        await self._reader.readuntil(DELIMITER)
        return json.loads(await self._line())

    async def _line(self) -> bytes:
        return await self._reader.readuntil(b"\n")

    def close(self) -> None:
        self._writer.close()


async def _find(guest: str, execute: Execute) -> str:
    """What the agent's channel ends in: a character device."""
    for port in await _ports(execute):
        if await execute("qom-get", path=port, property="name") == CHANNEL:
            label = await execute("qom-get", path=port, property="chardev")
            return f"/chardevs/{label}"
    raise CommandFailed(f"{guest} has no channel for a guest agent", ADD_CHANNEL)


async def _ports(execute: Execute) -> list[str]:
    return [
        f"{parent}/{child['name']}"
        for parent in ("/machine/peripheral", "/machine/peripheral-anon")
        for child in await execute("qom-list", path=parent)
        if child["type"] == "child<virtserialport>"
    ]


async def _path(guest: str, execute: Execute, chardev: str) -> str:
    """The socket's."""
    kind = await execute("qom-get", path=chardev, property="type")
    address = {}
    if kind == "chardev-socket":
        address = await execute("qom-get", path=chardev, property="addr")
    if address.get("type") != "unix" or address.get("abstract"):
        raise CommandFailed(
            f"{guest}: its guest agent's channel is no socket that has a path", ADD_CHANNEL
        )
    return str(address["path"])
