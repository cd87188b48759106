"""A disk goes to and fro between two hosts: agents in two network namespaces, over one pool."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from promoter.lease.file import LeaseFile
from promoter.lease.liveness import lock_on
from promoter.lease.record import State
from promoter.lease.rules import Lock
from promoter.lease.run import HOLD_AT_LEAST
from tests import records
from tests.agents import agent, audit, certify, refusals
from tests.test_lease_run import (
    Hosts,
    LeasingHost,
    Running,
    export,
    owner_of,
    record,
    said,
    wait_until_open,
)
from tests.vm import VM, Bus, Disk, ack_count, base, blank, linked_clone, wait_for

PORT = 7443


@dataclass(frozen=True)
class Namespace:
    """A network namespace that a process holds, with the address ``10.99.0.NUMBER``."""

    number: int
    holder: subprocess.Popen[bytes]

    @property
    def enter(self) -> list[object]:
        return ["nsenter", "--target", self.holder.pid, "--net"]

    @property
    def address(self) -> str:
        return f"10.99.0.{self.number}"

    def ip(self, *words: object) -> None:
        subprocess.run([*map(str, self.enter), "ip", *map(str, words)], check=True)

    def is_ready(self) -> bool:
        return Path(f"/proc/{self.holder.pid}/comm").read_text() == "sleep\n"


Network = tuple[Namespace, Namespace]


@pytest.fixture
def network() -> Iterator[Network]:
    with two_namespaces() as both:
        yield both


@contextmanager
def two_namespaces() -> Iterator[Network]:
    """With one cable between them."""
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
    a, b = (Namespace(number, subprocess.Popen(command)) for number in (1, 2))
    for space in (a, b):
        wait_for(space.is_ready, "a namespace", 10)
    a.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b.holder.pid)
    for space in (a, b):
        space.ip("address", "add", f"{space.address}/24", "dev", "eth0")
        space.ip("link", "set", "eth0", "up")
    try:
        yield a, b
    finally:
        for space in (a, b):
            space.holder.kill()
            space.holder.wait()


@contextmanager
def cut(space: Namespace) -> Iterator[None]:
    """Without the network, with the storage."""
    space.ip("link", "set", "eth0", "down")
    yield
    space.ip("link", "set", "eth0", "up")


@pytest.fixture
def hosts(tmp_path: Path, network: Network) -> Iterator[Hosts]:
    with two_hosts(tmp_path, network) as both:
        yield both


@contextmanager
def two_hosts(directory: Path, network: Network) -> Iterator[Hosts]:
    """Each with an agent in its namespace."""
    a, b = (
        LeasingHost(directory, f"host-{name}", space.enter)
        for name, space in zip("ab", network, strict=True)
    )
    with ExitStack() as agents:
        for host, space in zip((a, b), network, strict=True):
            certify(directory / "ca", host.state, endpoint=f"{space.address}:{PORT}")
            agents.enter_context(agent(host.state, space.enter))
        try:
            yield a, b
        finally:
            for host in (a, b):
                host.close()


@dataclass(frozen=True)
class Handover:
    """When its owner began to let go and had closed the disk, and when it was claimed and opened
    by who asked; in milliseconds from the request on.
    """

    begun: float
    closed: float
    claimed: float
    opened: float


def summary(times: Sequence[Handover]) -> str:
    claimed, opened = ([getattr(t, what) for t in times] for what in ("claimed", "opened"))
    return f"claimed {percentiles(claimed)}; opened {percentiles(opened)}"


def percentiles(found: list[float]) -> str:
    p99 = sorted(found)[int(len(found) * 0.99)]
    return f"p50 {statistics.median(found):.0f} ms, p99 {p99:.0f} ms"


class ToAndFro:
    """One disk, and a QEMU for it on each host in turn: one whose guest never runs, or with the
    policy ``close`` an export. A loan goes to and fro between a lender and a borrower.
    """

    def __init__(self, directory: Path, hosts: Hosts, policy: str = "detach") -> None:
        self.disk = blank(directory / "disk.qcow2", 8 << 20)
        self.store = LeaseFile(self.disk)
        self.hosts, self.directory, self.policy = hosts, directory, policy
        self.times: list[Handover] = []
        self.running: Running | None = None
        self.count = 0
        self.monitor = Path()
        self.had_since = 0.0

    def next(self) -> None:
        """The disk goes to the other host, out of a QEMU that runs on without it."""
        host = self.hosts[self.count % 2]
        wait_for(self._may_be_asked, "the time that it is held for", 60)
        before, monitor, self.count = self.running, self.monitor, self.count + 1
        self.running = running = self._run(host, self.policy)
        opened = self._opened(host, running)
        if before:
            self._measure(host, opened)
            ran = before.end() if self.policy == "close" else before.ask_to_end()
            assert said(ran, "releasing") == [f"to host {host.name}"]
            shutil.rmtree(monitor.parent)

    def lend(self) -> None:
        """The first host's guest waits while the second host has the disk."""
        a, b = self.hosts
        wait_for(self._may_be_asked, "the time that it is held for", 60)
        monitor = self.monitor
        borrowing = self._run(b, "never", borrow=None)
        self._measure(b, self._opened(b, borrowing))
        borrowing.ask_to_end()
        shutil.rmtree(self.monitor.parent)
        assert self.running
        self.monitor = monitor
        self._opened(a, self.running)

    def _run(self, host: LeasingHost, policy: str, **options: object) -> Running:
        device = "werror=stop,rerror=stop"
        vm = VM(self.directory, [Disk(self.disk, bus=Bus.SCSI, device=device)], extra=["-S"])
        self.monitor = vm.monitor
        command = ["setpriv", "--pdeathsig", "KILL", *vm.argv]
        if policy == "close":
            command = list(map(str, export(self.disk, vm.monitor)))
        return host.run(self.disk, policy, *command, qmp=vm.monitor, **options)

    def _may_be_asked(self) -> bool:
        return time.monotonic() > self.had_since + HOLD_AT_LEAST

    def _opened(self, host: LeasingHost, running: Running) -> float:
        """When the new owner's QEMU has it."""
        deadline = time.monotonic() + 60
        while not self._has(host):
            assert time.monotonic() < deadline
            assert running.process.poll() is None, running.end()
            time.sleep(0.005)
        self.had_since = time.monotonic()
        return time.time()

    def _has(self, host: LeasingHost) -> bool:
        now = self.store.read()
        mine = now is not None and now.owner is not None and now.owner.host == host.name
        return mine and lock_on(self.disk) is Lock.HELD

    def _measure(self, host: LeasingHost, opened: float) -> None:
        lines = sorted((line for h in self.hosts for line in audit(h.state)), key=_at)
        asked = max(_at(line) for line in audit(host.state) if line["event"] == "asked")
        since = [line for line in lines if line["event"] == "lease" and _at(line) > asked]
        steps = {line["state"]: _at(line) for line in since}
        closed = steps.get("loaned") or steps["free"]
        reached = (steps["releasing"], closed, steps["held"], opened)
        self.times.append(Handover(*(1000 * (at - asked) for at in reached)))

    def end(self) -> None:
        assert self.running
        self.running.ask_to_end()
        shutil.rmtree(self.monitor.parent)
        assert record(self.disk).state is State.FREE


def _at(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["at"]).timestamp()


@pytest.mark.parametrize("rounds", [6, pytest.param(100, marks=pytest.mark.nightly)])
def test_a_disk_goes_to_and_fro_between_hosts_that_ask(
    hosts: Hosts,
    network: tuple[Namespace, Namespace],
    tmp_path: Path,
    rounds: int,
    record_property: Callable[[str, object], None],
) -> None:
    """Each time out of a QEMU that runs on; at last without the network."""
    disk = ToAndFro(tmp_path, hosts)
    for _ in range(rounds):
        disk.next()
    record_property("by the network", summary(disk.times))
    assert not [why for host in hosts for why in refusals(host.state)]
    disk.times = []
    with cut(network[0]):
        for _ in range(2):
            disk.next()
        last = hosts[(rounds + 1) % 2]
        wait_for(lambda: "was of no use" in " ".join(refusals(last.state)), "it to be said", 30)
    record_property("by the storage", summary(disk.times))
    disk.end()
    assert record(disk.disk).epoch == 3 * disk.count - 1


@pytest.mark.nightly
def test_a_disk_goes_to_and_fro_between_guests_that_write(hosts: Hosts, tmp_path: Path) -> None:
    """Each guest boots from a disk of its own, and writes on the one that goes."""
    disk = blank(tmp_path / "data.qcow2", 8 << 20)
    before: Running | None = None
    guests = [
        VM(
            tmp_path,
            [
                Disk(linked_clone(base(), tmp_path / f"root-{number}.qcow2")),
                Disk(disk, bus=Bus.SCSI),
            ],
            writer={"rate": 0, "dev": "/dev/sda"},
        )
        for number in range(3)
    ]
    log = guests[0].log
    for number, vm in enumerate(guests):
        host, wanted = hosts[number % 2], ack_count(log) + 40
        command = ["setpriv", "--pdeathsig", "KILL", *vm.argv]
        running = host.run(disk, "detach", *command, qmp=vm.monitor)
        wait_until_open(disk, host)
        if before:
            assert before.process.poll() is None, "its guest runs on"
            assert said(before.ask_to_end(), "releasing") == [f"to host {host.name}"]
        wait_for(partial(_has_acks, log, wanted), "records", 120)
        before = running
    assert before
    before.ask_to_end()
    assert owner_of(disk) is None
    report = records.check(disk, None, log)
    assert {finding.kind for finding in report.findings} <= {records.Kind.FAILED}
    assert report.records >= 3 * 40
    for vm in guests:
        shutil.rmtree(vm.monitor.parent)


def _has_acks(log: Path, wanted: int) -> bool:
    return ack_count(log) >= wanted
