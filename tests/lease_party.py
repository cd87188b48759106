"""The parties of a handover, each a process that stops at each of its steps: see test_lease_faults.

``python -m tests.lease_party SOCKET`` loads promoter once and forks a party for each connection.
A party runs what ``promoter run`` or ``promoter agent run`` does,
with a clock of the tests', and speaks JSON lines on its connection: of its process, of each step
when it comes to it for the first time, of its end. At one step it waits for what it is told: to go
on, or the name of the error that the operating system is to give there.
"""

from __future__ import annotations

import asyncio
import errno
import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

from promoter.errors import PromoterError
from promoter.lease import agent as agents
from promoter.lease import claim, directory, liveness, signing
from promoter.lease import file as files
from promoter.lease import run as runs
from promoter.lease.agent import Agent
from promoter.lease.bell import Bell
from promoter.lease.credentials import Credentials
from promoter.lease.directory import SharedDirectory
from promoter.lease.host import this_host
from promoter.lease.ledger import Ledger
from promoter.lease.liveness import boot_clock
from promoter.lease.rules import Policy
from promoter.lease.run import LeasedRun, RunSpec
from promoter.storage.files import is_locked

assert signing, "loaded before the parties are forked"
CALLS = ("write", "fsync", "link", "rename", "unlink", "mkdir", "pwrite", "read")
PROBES = 3  # of the image lock: later ones are a wait's


class Gate:
    """The party's end of its connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rw")
        self.told: dict[str, Any] = json.loads(self._lines.readline())
        self._passed: set[str] = set()
        self._one = threading.Lock()
        self._doing = threading.local()
        self._times = Counter[str]()
        self._probes = 0

    def say(self, **what: object) -> None:
        self._lines.write(json.dumps(what) + "\n")
        self._lines.flush()

    def at(self, step: str) -> None:
        """The party comes to a step. Raises OSError if it is told to."""
        with self._one:
            if step in self._passed:
                return
            self._passed.add(step)
            stop = self.told.get("stop")
            if stop not in ("*", step):
                return
            self.say(step=step)
            if stop == "*":
                return
            word = json.loads(self._lines.readline())["go"]
        if word:
            raise OSError(getattr(errno, word), os.strerror(getattr(errno, word)))

    def probe(self, real: Callable[[Path], bool], disk: Path) -> bool:
        self._probes += 1
        if self._probes <= PROBES:
            self.at(f"probe {self._probes}")
        return real(disk)

    def before(self, step: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(real)
        def stepping(*arguments: Any, **named: Any) -> Any:
            self.at(step)
            return real(*arguments, **named)

        return stepping

    @contextmanager
    def doing(self, what: str, *, counted: bool) -> Iterator[None]:
        """What is called now is a part of it. ``counted``: it is told from the first time."""
        self._times[what] += 1
        number = self._times[what]
        self._doing.what = f"({what}, {number})" if counted and number > 1 else f"({what})"
        self._doing.calls = Counter[str]()
        try:
            yield
        finally:
            self._doing.what = ""

    def call(self, name: str, always: str) -> None:
        """The party calls the operating system."""
        if what := getattr(self._doing, "what", ""):
            self._doing.calls[name] += 1
            self.at(f"{name} {self._doing.calls[name]} {what}")
        elif always:
            self.at(f"{name} {always}")


class Calls:
    """``os``, as promoter sees it where it writes on the storage."""

    def __init__(self, gate: Gate, always: str = "") -> None:
        self._gate, self._always = gate, always

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "open":
            return partial(self._open, real)
        return partial(self._call, name, real) if name in CALLS else real

    def _open(self, real: Callable[..., int], path: str, flags: int, *more: int, **at: int) -> int:
        if flags & os.O_CREAT:
            self._step("create")
        return real(path, flags, *more, **at)

    def _call(self, name: str, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self._step(name)
        return real(*arguments, **named)

    def _step(self, name: str) -> None:
        self._gate.call(name, self._always)


def install(gate: Gate) -> None:
    """Have the gate passed at every step, and no time lost between them."""
    for module, always in ((directory, ""), (liveness, "the heartbeat")):
        module.os = Calls(gate, always)  # type: ignore[attr-defined]
    for name in ("put_if_absent", "replace", "remove", "read"):
        setattr(SharedDirectory, name, _naming(gate, name, getattr(SharedDirectory, name)))
    execute = asyncio.create_subprocess_exec
    asyncio.create_subprocess_exec = gate.before("start", execute)
    terminate = asyncio.subprocess.Process.terminate
    asyncio.subprocess.Process.terminate = gate.before("terminate", terminate)  # type: ignore[method-assign]
    Bell._ask = gate.before("ring", Bell._ask)  # type: ignore[method-assign]
    for module, name, value in (
        (liveness, "is_locked", partial(gate.probe, is_locked)),
        (runs, "BEAT_EVERY", 0.05),
        (agents, "BEAT_EVERY", 0.05),
        (runs, "ANSWER_EVERY", 0.05),
        (claim, "LOOK_EVERY", 0.05),
        (claim, "WATCH_EVERY", 0.02),
        (files, "WATCH_EVERY", 0.02),
    ):
        setattr(module, name, value)


def _naming(gate: Gate, verb: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(real)
    def named(self: SharedDirectory, name: str, *arguments: Any) -> Any:
        place = {"requests": "request ", "hosts": "host "}.get(self.path.name, "")
        with gate.doing(f"{verb} {place}{name}", counted=verb != "read"):  # waits read
            return real(self, name, *arguments)

    return named


def clock(file: Path) -> Callable[[], float]:
    """The boot clock, and what the tests have it run ahead by, in seconds."""
    with file.open("r+b") as opened:
        ahead = mmap.mmap(opened.fileno(), 8)
    return lambda: boot_clock() + float(struct.unpack("d", ahead)[0])


def party(gate: Gate) -> None:
    told = gate.told
    state = Path(told["state"])
    host, credentials = this_host(state), Credentials.of(state)
    ledger = Ledger(state, host.name)
    if told["act"] == "agent":
        assert credentials
        agent = Agent(host, credentials, ledger, lambda event, _: gate.say(event=event))
        asyncio.run(agent.run())
        return
    install(gate)
    spec = RunSpec((Path(told["disk"]),), tuple(told["command"]), Policy.CLOSE, None, 1e6)
    run = LeasedRun(spec, host, ledger, credentials, lambda *_: None, clock(Path(told["clock"])))
    try:
        code, why = asyncio.run(run.run()), ""
    except PromoterError as error:
        code, why = error.exit_code, error.message
    gate.say(exit=code, why=why)


def serve(path: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        while True:
            connection, _ = listening.accept()
            with connection:
                if os.fork():
                    continue
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                gate = Gate(connection)
                gate.say(pid=os.getpid())
                try:
                    party(gate)
                finally:
                    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
