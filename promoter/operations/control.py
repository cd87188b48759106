"""How other terminals reach a running operation: its socket in the state directory.

One line of JSON asks, one line answers; who asks to watch then gets each event as a line, the
one that ends the operation last. Any number may watch: each has a queue of its own, and one
that does not keep up misses events, so that it never slows the operation. The directory is its
owner's alone, and so the socket.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from promoter.errors import PromoterError, Unreachable, as_fields, from_fields

ANSWER_TIMEOUT = 10.0
MOST_EVENTS = 256
LONGEST_EVENT = 1 << 24
LAST_WORDS = 1.0  # seconds for watchers to take what is left when the operation has ended

Event = dict[str, Any]
NO_REQUEST = as_fields(PromoterError("not a request"))


class Controllable(Protocol):
    """What a running operation can be asked for."""

    async def change_speed(self, speed: int) -> None:
        """From now on ``speed`` bytes per second, 0 for no limit."""

    async def pause(self) -> None:
        """Copy nothing more until `go_on`; what the guest writes goes on to both disks."""

    async def go_on(self) -> None:
        """Copy on. Raises `Refused` when it is not paused."""

    def cancel(self) -> None:
        """Ask for the old state."""


class _Watcher:
    """One who watches, and the events not taken yet."""

    def __init__(self, events: list[Event]) -> None:
        self._events = deque(events, maxlen=MOST_EVENTS)  # the oldest are lost first
        self._more = asyncio.Event()
        self._ended = False

    def tell(self, event: Event) -> None:
        self._events.append(event)
        self._more.set()

    def end(self) -> None:
        self._ended = True
        self._more.set()

    async def write(self, writer: asyncio.StreamWriter) -> None:
        """Pass the events on until the operation has ended, or the other one is gone."""
        while self._events or not self._ended:
            self._more.clear()
            while self._events:
                writer.write(_line(self._events.popleft()))
                await writer.drain()
            if not self._ended:
                await self._more.wait()


class Events:
    """What happens in an operation, as ``--json`` tells it."""

    def __init__(self) -> None:
        self._watchers: set[_Watcher] = set()
        self._ended = False
        self._latest: dict[tuple[object, object], Event] = {}
        self.last: Event | None = None
        """How the operation ended, once it has."""

    def publish(self, event: Event) -> None:
        """Tell everyone who watches. Never waits for them."""
        if event["event"] in ("result", "error"):
            self.last = event
        key = (event.get("event"), event.get("disk"))
        self._latest.pop(key, None)  # so that it becomes the last one
        self._latest[key] = event
        for watcher in self._watchers:
            watcher.tell(event)

    async def stream(self, writer: asyncio.StreamWriter) -> None:
        """Where the operation stands, then everything that happens."""
        watcher = _Watcher(list(self._latest.values()))
        self._watchers.add(watcher)
        if self._ended:
            watcher.end()
        try:
            await watcher.write(writer)
        finally:
            self._watchers.discard(watcher)

    def end(self) -> None:
        """Nothing happens any more: those who watch leave when they have it all."""
        self._ended = True
        for watcher in self._watchers:
            watcher.end()


@asynccontextmanager
async def controlled(
    directory: Path, identity: str, operation: Controllable, events: Events
) -> AsyncIterator[None]:
    """Answer on an operation's socket while it runs."""
    talks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request, answer = await _obey(operation, await reader.readline())
            writer.write(_line(answer))
            await writer.drain()
            if request == "watch":
                await events.stream(writer)
        except (ConnectionError, ValueError):  # gone, or its line has no end
            pass
        finally:
            writer.close()

    def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer), name="control")
        talks.add(task)
        task.add_done_callback(talks.discard)

    with _socket(directory, identity) as path:
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(talk, path)
        try:
            yield
        finally:
            server.close()
            path.unlink(missing_ok=True)
            events.end()
            await _finish(talks)


async def _finish(talks: set[asyncio.Task[None]]) -> None:
    left = set(talks)
    if left:
        _, late = await asyncio.wait(left, timeout=LAST_WORDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


async def _obey(operation: Controllable, line: bytes) -> tuple[str, Event]:
    """Do what is asked for; the request's name, and the answer."""
    try:
        asked = json.loads(line)
        name = str(asked["request"])
        match name:
            case "speed":
                await operation.change_speed(int(asked["speed"]))
            case "pause":
                await operation.pause()
            case "go on":
                await operation.go_on()
            case "cancel":
                operation.cancel()
            case "watch":
                pass
            case _:
                return "", NO_REQUEST
    except PromoterError as error:
        return "", as_fields(error)
    except (ValueError, KeyError, TypeError):
        return "", NO_REQUEST
    return name, {}


async def ask(directory: Path, operation: str, request: str, **arguments: int) -> None:
    """Ask a running operation for something.

    Raises `Unreachable`, or what the operation raised.
    """
    async with _asking(directory, operation, request, **arguments):
        pass


async def watch(directory: Path, operation: str, show: Callable[[Event], None]) -> bool:
    """Show a running operation's events until nobody tells them any more; was its end told?"""
    told = False
    async with _asking(directory, operation, "watch") as reader:
        while (line := await _next(reader)).endswith(b"\n"):
            event = json.loads(line)
            told = event["event"] in ("result", "error")
            show(event)
    return told


async def _next(reader: asyncio.StreamReader) -> bytes:
    """The next line; without an end of line when whoever told them is gone."""
    try:
        return await reader.readline()
    except ConnectionError:
        return b""


@asynccontextmanager
async def _asking(
    directory: Path, operation: str, request: str, **arguments: int
) -> AsyncIterator[asyncio.StreamReader]:
    try:
        with _socket(directory, operation) as path:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                reader, writer = await asyncio.open_unix_connection(path, limit=LONGEST_EVENT)
                writer.write(_line({"request": request, **arguments}))
                answer = json.loads(await reader.readline())
    except (OSError, ValueError) as error:
        raise Unreachable(
            f"operation {operation} does not answer: {error}", "Has it ended? promoter job list"
        ) from error
    try:
        if answer:
            raise from_fields(answer)
        yield reader
    finally:
        writer.close()


def _line(event: Event) -> bytes:
    return json.dumps(event, default=str).encode() + b"\n"


@contextmanager
def _socket(directory: Path, operation: str) -> Iterator[Path]:
    """A name of at most 107 bytes for a socket in a directory with any name."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{fd}/{operation}.sock")
    finally:
        os.close(fd)
