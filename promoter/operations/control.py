"""How other terminals reach a running operation: its socket in the state directory.

One line of JSON asks, one line answers. The directory is its owner's alone, and so the socket.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from promoter.errors import PromoterError, Unreachable

ANSWER_TIMEOUT = 10.0
ChangeSpeed = Callable[[int], Awaitable[None]]


@asynccontextmanager
async def controlled(directory: Path, operation: str, change: ChangeSpeed) -> AsyncIterator[None]:
    """Answer on ``operation``'s socket: ``change`` gets a new speed in bytes per second."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        error = ""
        try:
            await change(int(json.loads(await reader.readline())["speed"]))
        except PromoterError as failed:
            error = failed.message
        except (ValueError, KeyError, TypeError):
            error = "not a request"
        with suppress(ConnectionError):
            writer.write(json.dumps({"error": error}).encode() + b"\n")
            await writer.drain()
            writer.close()

    with _socket(directory, operation) as path:
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(answer, path)
        try:
            yield
        finally:
            server.close()
            path.unlink(missing_ok=True)


async def change_speed(directory: Path, operation: str, speed: int) -> None:
    """Give a running operation another limit. Raises `Unreachable` or what went wrong there."""
    try:
        with _socket(directory, operation) as path:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                reader, writer = await asyncio.open_unix_connection(path)
                writer.write(json.dumps({"speed": speed}).encode() + b"\n")
                answer = json.loads(await reader.readline())
                writer.close()
    except (OSError, ValueError) as error:
        raise Unreachable(
            f"operation {operation} does not answer: {error}", "Has it ended? promoter job list"
        ) from error
    if answer["error"]:
        raise PromoterError(f"operation {operation}: {answer['error']}")


@contextmanager
def _socket(directory: Path, operation: str) -> Iterator[Path]:
    """A name of at most 107 bytes for a socket in a directory with any name."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{fd}/{operation}.sock")
    finally:
        os.close(fd)
