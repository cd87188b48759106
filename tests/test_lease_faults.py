"""Every step of a handover, of owner and requester, and every fault: docs/handover-faults.md.

Two hosts' ``promoter run`` over one pool, each holding the disk for a small process with a real
image lock (lease_holder.py). One of them stops before one of its steps, a fault happens, and it
goes on, or does not. Whatever comes of the request, never do two have the disk, nobody has it
without its lease, and afterwards both hosts can have it again, by the rules alone. The clock runs
ahead when a silent owner has to be dead for long enough.

Which steps there are is seen in a handover without faults: every call that writes on the pool, each
look at the image lock, each start and end of a process, each ring at the other's agent.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from promoter.lease.file import LeaseFile
from promoter.lease.liveness import lock_on
from promoter.lease.record import State
from promoter.lease.rules import STOPPED_AFTER, Lock
from promoter.lease.run import HOLD_AT_LEAST
from tests.agents import certify, free_port
from tests.test_lease_run import HOLDER
from tests.vm import wait_for

SEED = 20261126
SAMPLE = 24
AT_ONCE = 3
WANTED = 2000
OWNER, REQUESTER = "owner", "requester"
FAULTS = (
    "killed",
    "killed with its guest",
    "stopped",
    "request dropped",
    "request delayed",
    "request duplicated",
    "network cut",
    "ENOSPC",
    "EIO",
)
OVER_NETWORK = ("request dropped", "request delayed", "request duplicated", "network cut")
AFTERWARDS = ("the other host", "its own host", "handed over")
"""Who has the disk first when all is over."""
CAME = ("passed on", "not passed on")
PATIENCE = 60.0
DROPPED = 0.7  # seconds, after which who was not heard gives up
SHORT = 0.15
LOOKS = 0.5  # in which who waits has looked more than once
MEMORY = Path("/dev/shm")
ROOT = Path(__file__).parent.parent
HEAD = """\
# Faults in a handover

Written by tests/test_lease_faults.py in its nightly run: {0} faults, at {owners} steps of the
owner's and {requesters} of the requester's, in {minutes} min, none failed. Two hosts'
`promoter run` over one pool, one fault in each handover, before a step of either's. Whatever
became of the request, never had two of them the disk, nobody had it without its lease, and
afterwards both had it again by the rules.

| fault | owner's: passed on | not passed on | requester's: passed on | not passed on |
|---|---|---|---|---|"""


@dataclass(frozen=True)
class Case:
    """A fault at a step. ``role``: whose step it is, and whom the fault hits."""

    role: str
    step: str
    fault: str
    afterwards: str


class Party:
    """One process, and what it says."""

    def __init__(self, server: Path, told: Mapping[str, object]) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(server))
        self._buffer = b""
        self.send(told)
        self.name = str(told["state"]).rpartition("/")[2]
        self.steps: list[str] = []
        self.waiting = False
        self.over = False
        self.listening = False
        self.code: int | None = None
        self.pid = 0
        while not self.pid:
            self.hear(PATIENCE)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, line: Mapping[str, object]) -> None:
        with suppress(BrokenPipeError):
            self._connection.sendall(json.dumps(line).encode() + b"\n")

    def hear(self, timeout: float) -> None:
        """Take in what it has said."""
        if self.over or not select.select([self], [], [], timeout)[0]:
            return
        try:
            data = self._connection.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        self.over = not data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in map(json.loads, lines):
            self.pid = line.get("pid", self.pid)
            self.code = line.get("exit", self.code)
            self.listening |= line.get("event") == "listening"
            if "step" in line:
                self.steps.append(line["step"])
                self.waiting = True

    def go(self, word: str = "") -> None:
        self.waiting = False
        self.send({"go": word})

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            if not self.over:
                os.kill(self.pid, number)

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self._connection.close()


@dataclass
class Scene:
    """One disk, two hosts, and one fault at most."""

    server: Path
    directory: Path
    case: Case | None = None
    authority: Path | None = None
    parties: list[Party] = field(default_factory=list)
    agents: list[Party] = field(default_factory=list)
    struck: bool = False
    later: list[tuple[float, Callable[[], object]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.disk = self.directory / "disk.img"
        self.disk.write_bytes(b"image")
        self.log = self.directory / "log"
        self.log.touch()
        self.ahead = self.directory / "ahead"
        self.ahead.write_bytes(struct.pack("d", 0))
        for name in ("host-a", "host-b"):
            state = self.directory / name
            state.mkdir()
            (state / "host-id").write_text(name)
            if self.authority:
                shutil.copytree(self.authority / name, state / "agent")
                (state / "agent" / "endpoint").write_text(f"127.0.0.1:{free_port()}\n")

    def wait_clock(self, seconds: float) -> None:
        """The clock runs ahead, for all."""
        with self.ahead.open("r+b") as opened, mmap.mmap(opened.fileno(), 8) as now:
            now[:] = struct.pack("d", struct.unpack("d", now[:])[0] + seconds)

    def party(self, name: str, stop: str = "", act: str = "run") -> Party:
        told = {
            "act": act,
            "state": str(self.directory / name),
            "disk": str(self.disk),
            "command": [sys.executable, "-IS", str(HOLDER), str(self.disk), str(self.log), name],
            "clock": str(self.ahead),
            "stop": stop,
        }
        made = Party(self.server, told)
        (self.parties if act == "run" else self.agents).append(made)
        return made

    # --- what is seen ---

    def opened(self, name: str) -> int:
        """How often that host has had it open."""
        return self.log.read_text().count(f"{name} open ")

    def holders(self) -> list[int]:
        """The processes that may have it open."""
        told = re.findall(r" (open|close) (\d+)", self.log.read_text())
        closed = {pid for what, pid in told if what == "close"}
        return [int(pid) for what, pid in told if what == "open" and pid not in closed]

    def until(self, reached: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Let all go on until it is so; strike when it is time."""
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                return False
            for at, act in list(self.later):
                if time.monotonic() > at:
                    self.later.remove((at, act))
                    act()
            living = [party for party in (*self.parties, *self.agents) if not party.over]
            select.select(living, [], [], 0.01)
            for party in living:
                party.hear(0)
                if party.waiting and self.case:
                    self.strike(party, self.case.fault)
        return True

    # --- what happens ---

    def strike(self, party: Party, fault: str) -> None:
        self.struck = True
        word = ""
        match fault:
            case "killed":
                party.signal(signal.SIGKILL)
            case "killed with its guest":
                party.signal(signal.SIGKILL)
                self.end_guests()
            case "stopped":
                party.signal(signal.SIGSTOP)
                self.later.append((time.monotonic() + SHORT, lambda: party.signal(signal.SIGCONT)))
            case "request dropped":
                self.take_requests()
            case "request delayed":
                taken = self.take_requests()
                self.later.append((time.monotonic() + SHORT, lambda: self.put_requests(taken)))
            case "request duplicated":
                self.duplicate_request()
            case "network cut":
                for agent in self.agents:
                    agent.signal(signal.SIGKILL)
            case "ENOSPC" | "EIO":
                word = fault
            case _:
                raise AssertionError(fault)
        party.go(word)

    def end_guests(self) -> None:
        for pid in self.holders():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def requests(self) -> list[Path]:
        return sorted(LeaseFile(self.disk).queue.path.glob("[0-9]" * 8))

    def take_requests(self) -> dict[Path, bytes]:
        taken = {}
        for path in self.requests():
            with suppress(FileNotFoundError):
                taken[path] = path.read_bytes()
                path.unlink()
        return taken

    def put_requests(self, taken: dict[Path, bytes]) -> None:
        for path, data in taken.items():
            with suppress(FileExistsError), path.open("xb") as opened:
                opened.write(data)

    def duplicate_request(self) -> None:
        for path in self.requests():
            with suppress(FileNotFoundError):
                self.put_requests({path.with_name(f"{int(path.name) + 1:08}"): path.read_bytes()})

    def close(self) -> None:
        for party in (*self.parties, *self.agents):
            party.close()
        self.end_guests()

    # --- the handover ---

    def play(self) -> str:
        """What became of the request."""
        stops = {self.case.role: self.case.step} if self.case else {}
        if self.authority:
            for name in ("host-a", "host-b"):
                self.party(name, act="agent")
            assert self.until(lambda: all(agent.listening for agent in self.agents))
        stop = "" if self.case else "*"
        owner = self.party("host-a", stops.get(OWNER, stop))
        assert self.until(lambda: bool(self.opened("host-a")) or owner.over), "the owner hangs"
        self.wait_clock(HOLD_AT_LEAST + 1)
        requester = self.party("host-b", stops.get(REQUESTER, stop))
        came = self._wait_for_requester(owner, requester)
        self._end(requester, owner)
        return CAME[0] if came else CAME[1]

    def _wait_for_requester(self, owner: Party, requester: Party) -> bool:
        def done() -> bool:
            return bool(self.opened("host-b")) or requester.over

        patience = DROPPED if self.case and self.case.fault == "request dropped" else PATIENCE
        deadline = time.monotonic() + patience
        while not self.until(done, 0.2) and time.monotonic() < deadline:
            if owner.over:  # nobody is left who would be taken for dead, and is not
                self.wait_clock(STOPPED_AFTER + 1)
                self.until(done, LOOKS)  # but a guest may be, which keeps the disk
                self.end_guests()
        if patience == PATIENCE:
            assert done(), "the requester hangs"
        return bool(self.opened("host-b"))

    def _end(self, *parties: Party) -> None:
        for party in parties:
            party.signal(signal.SIGTERM)
            if not self.until(lambda over=party: over.over, 0.5):  # type: ignore[misc]
                if party.over is False and not self.later:
                    self.end_guests()
                assert self.until(lambda over=party: over.over), f"{party.name} hangs"  # type: ignore[misc]
        self.end_guests()
        self.until(lambda: lock_on(self.disk) is Lock.FREE)

    # --- afterwards ---

    def open_again(self) -> None:
        """Both hosts have it once more, by the rules."""
        assert self.case
        own = "host-a" if self.case.role == OWNER else "host-b"
        other = "host-b" if own == "host-a" else "host-a"
        order = (other, own) if self.case.afterwards == "the other host" else (own, other)
        before: Party | None = None
        for name in order:
            count = self.opened(name)
            party = self.party(name)
            alone = before is None
            for _ in range(8):
                if self.until(lambda: self.opened(name) > count or party.over, 0.3):  # noqa: B023
                    break
                self.wait_clock(STOPPED_AFTER + 1 if alone else HOLD_AT_LEAST + 1)
            assert self.until(lambda: self.opened(name) > count or party.over), f"{name} hangs"  # noqa: B023
            assert self.opened(name) > count, f"{name} could not have it"
            if self.case.afterwards == "handed over":
                self.wait_clock(HOLD_AT_LEAST + 1)
                before = party
            else:
                self._end(party)
        self._end(*self.parties)

    def check(self) -> None:
        told = self.log.read_text()
        assert not re.findall("REFUSED|TWO|UNCLAIMED", told), told
        now = LeaseFile(self.disk).read()
        assert now
        assert now.state is State.FREE, now


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("parties") / "socket"
    command = [sys.executable, "-m", "tests.lease_party", str(path)]
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command])
    wait_for(path.exists, "the server of parties", 60)
    yield path
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates for the two hosts, by name."""
    directory = tmp_path_factory.mktemp("authority")
    for name in ("host-a", "host-b"):
        state = directory / f"state-{name}"
        state.mkdir()
        (state / "host-id").write_text(name)
        certify(directory / "ca", state)
        (state / "agent").rename(directory / name)
    return directory


@contextmanager
def scene(server: Path, case: Case | None = None, authority: Path | None = None) -> Iterator[Scene]:
    directory = Path(subprocess.check_output(["mktemp", "-dp", MEMORY], text=True).strip())
    made = Scene(server, directory, case, authority)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(directory)


def steps_of_a_handover(server: Path) -> list[tuple[str, str]]:
    """Each party's steps, in a handover without a fault."""
    with scene(server) as quiet:
        assert quiet.play() == CAME[0]
        roles = zip((OWNER, REQUESTER), quiet.parties, strict=True)
        return [(role, step) for role, party in roles for step in party.steps]


def run_case(server: Path, authority: Path, case: Case) -> tuple[Case, bool, str]:
    """The case, did the fault happen, and what became of it: a failure begins with FAILED."""
    over_network = authority if case.fault in OVER_NETWORK else None
    with scene(server, case, over_network) as made:
        try:
            became = made.play()
            made.open_again()
            made.check()
        except AssertionError as error:
            return case, made.struck, f"FAILED: {error}\n{made.log.read_text()}"
        return case, made.struck, became


def all_cases(server: Path) -> list[Case]:
    return [
        Case(role, step, fault, afterwards)
        for role, step in steps_of_a_handover(server)
        for fault in FAULTS
        for afterwards in AFTERWARDS
        if not (step == "terminate" and fault in errno.errorcode.values())  # a signal has none
    ]


def run_all(server: Path, authority: Path, cases: Sequence[Case]) -> Counter[tuple[str, str, str]]:
    """How many faults there were, by role, fault, and what became of the request."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ran = list(pool.map(lambda case: run_case(server, authority, case), cases))
    failed = [f"{case}: {became}" for case, _, became in ran if became.startswith("FAILED")]
    assert not failed, f"{len(failed)} of {len(ran)}:\n" + "\n".join(failed[:20])
    return Counter((case.role, case.fault, became) for case, struck, became in ran if struck)


def test_two_never_have_the_disk_whatever_fails_in_a_handover(
    server: Path, authority: Path, record_property: Callable[[str, object], None]
) -> None:
    cases = random.Random(SEED).sample(all_cases(server), SAMPLE)
    ran = run_all(server, authority, cases)
    record_property("faults", ran.total())
    assert ran.total() > SAMPLE * 0.8, "most are reached"


@pytest.mark.nightly
def test_two_never_have_the_disk_with_every_fault_at_every_step(
    server: Path, authority: Path, record_property: Callable[[str, object], None]
) -> None:
    """And writes docs/handover-faults.md."""
    cases = all_cases(server)
    random.Random(SEED).shuffle(cases)
    began = time.monotonic()
    ran = run_all(server, authority, cases)
    record_property("faults", ran.total())
    assert ran.total() >= WANTED
    (ROOT / "docs" / "handover-faults.md").write_text(table(ran, cases, time.monotonic() - began))


def table(ran: Counter[tuple[str, str, str]], cases: Sequence[Case], seconds: float) -> str:
    steps = Counter(role for role, _ in {(case.role, case.step) for case in cases})
    outcomes = [(role, came) for role in (OWNER, REQUESTER) for came in CAME]
    rows = [
        " | ".join((f"| {fault}", *(str(ran[role, fault, came]) for role, came in outcomes), ""))
        for fault in FAULTS
    ]
    head = HEAD.format(
        ran.total(), owners=steps[OWNER], requesters=steps[REQUESTER], minutes=round(seconds / 60)
    )
    return "\n".join((head, *(row.rstrip() for row in rows))) + "\n"
