"""A disk passes from host to host: two hosts, which are two state directories, over one pool."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest

from promoter.errors import Refused
from promoter.lease.claim import Acquisition, request
from promoter.lease.file import LeaseFile
from promoter.lease.host import this_host
from promoter.lease.liveness import lock_on
from promoter.lease.record import Answer, LeaseRecord, Said, State
from promoter.lease.rules import GRANT_SECONDS, STOPPED_AFTER, Lock, Policy
from promoter.lease.run import HOLD_AT_LEAST, LeasedRun, RunSpec
from tests import records
from tests.agents import ledger
from tests.cli import Ran, ended, promoter, start
from tests.vm import VM, Bus, Disk, ack_count, base, blank, linked_clone, wait_for


class LeasingHost:
    """A host of the tests': a name and a state directory, and the command that enters it.
    Its runs end with the test.
    """

    def __init__(self, directory: Path, name: str, enter: Sequence[object] = ()) -> None:
        self.name, self.state, self.enter = name, directory / name, enter
        self.state.mkdir()
        (self.state / "host-id").write_text(name)
        self.running: list[subprocess.Popen[str]] = []

    def lease(self, act: str, disk: Path, *words: object) -> Ran:
        ran = promoter(self.state, "lease", act, disk, *words, "--json")
        assert all("event" in line for line in ran.lines)
        return ran

    def run(self, disk: Path, policy: str, *words: object, **options: object) -> Running:
        options = {"policy": policy, "timeout": 60} | options
        given = [word for name, value in options.items() for word in (f"--{name}", value)]
        given = [word for word in given if word is not None]  # a flag
        arguments = ("run", "--disk", disk, *given, "--json", "--", *words)
        process = start(self.state, *arguments, enter=self.enter)
        self.running.append(process)
        return Running(process)

    def close(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.communicate()


class Running:
    """A ``promoter run``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def end(self, timeout: float = 60) -> Ran:
        return ended(self.process, timeout)

    def ask_to_end(self) -> Ran:
        self.process.send_signal(signal.SIGTERM)
        return self.end()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[LeasingHost, LeasingHost]]:
    both = LeasingHost(tmp_path, "host-a"), LeasingHost(tmp_path, "host-b")
    yield both
    for host in both:
        host.close()


Hosts = tuple[LeasingHost, LeasingHost]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return blank(tmp_path / "disk.qcow2", 1 << 20)


def export(disk: Path, socket: Path) -> list[object]:
    """An NBD server: it has the disk open, with QEMU's lock, and ends when it is told to."""
    return ["setpriv", "--pdeathsig", "KILL", "qemu-nbd", "-t", "-k", socket, "-f", "qcow2", disk]


def said(ran: Ran, event: str) -> list[str]:
    lines = [json.loads(line) for line in ran.err.splitlines() if line.startswith("{")]
    return [line["text"] for line in lines if line["event"] == event]


def record(disk: Path) -> LeaseRecord:
    found = LeaseFile(disk).read()
    assert found
    return found


def owner_of(disk: Path) -> str | None:
    found = LeaseFile(disk).read_any()
    return found.owner.host if found and found.owner else None


def wait_until_open(disk: Path, host: LeasingHost) -> None:
    wait_for(
        lambda: owner_of(disk) == host.name and lock_on(disk) is Lock.HELD,
        f"{host.name} to have {disk.name} open",
        60,
    )


# --- the commands ----------------------------------------------------------------------------


def test_a_host_acquires_shows_and_releases_a_disk(hosts: Hosts, disk: Path) -> None:
    a, b = hosts
    none = a.lease("show", disk).result
    assert (none["lease"], none["lock"], none["waiting"]) == (None, "free", 0)
    assert a.lease("acquire", disk).code == 0
    assert a.lease("acquire", disk).result["lease"]["epoch"] == 1, "it has it already"
    shown = b.lease("show", disk).result["lease"]
    assert (shown["state"], shown["owner"]["host"]) == ("held", "host-a")
    refused = b.lease("release", disk)
    assert (refused.code, refused.result["error"]) == (4, "Illegal")
    held = b.lease("acquire", disk, "--timeout", 0)
    assert (held.code, held.result["error"]) == (10, "LeaseHeld")
    assert "it did not answer" in held.result["message"]
    assert held.result["hint"]
    assert a.lease("release", disk).result["lease"]["state"] == "free"
    assert b.lease("acquire", disk).result["lease"]["owner"]["host"] == "host-b"
    assert "epoch 3: held by host host-b since" in promoter(b.state, "lease", "show", disk).out


def test_an_operator_breaks_a_lease(hosts: Hosts, disk: Path) -> None:
    a, b = hosts
    assert a.lease("acquire", disk).code == 0
    assert b.lease("break", disk, "--epoch", 9, "--reason", "gone").code == 4
    broken = b.lease("break", disk, "--epoch", 1, "--reason", "gone").result["lease"]
    assert (broken["state"], broken["epoch"]) == ("free", 2)
    assert broken["note"] == "gone (by host host-b, not fenced)"


def test_what_is_no_disk_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    for act, path in (("show", tmp_path), ("acquire", tmp_path / "missing")):
        ran = hosts[0].lease(act, path)
        assert (ran.code, ran.result["error"]) == (4, "Refused")
        assert ran.result["hint"]


# --- run -------------------------------------------------------------------------------------


def fill(pipe: IO[str] | None) -> None:
    """So that nothing more goes into it until somebody reads."""
    assert pipe
    end = os.open(f"/proc/self/fd/{pipe.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while os.write(end, bytes(4096)):
            pass
    os.close(end)


def test_a_run_lets_go_though_nobody_reads_what_it_says(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    a, b = hosts
    running = a.run(disk, "close", *export(disk, tmp_path / "nbd"))
    fill(running.process.stderr)
    wait_until_open(disk, a)
    assert b.lease("acquire", disk).code == 0
    assert running.process.wait(60) == 0
    running.process.communicate()


def test_a_run_whose_lease_was_broken_ends_its_command(hosts: Hosts, disk: Path) -> None:
    """As after a partition in which its lock was lost; who has the disk then keeps it."""
    a, b = hosts
    running = a.run(disk, "never", "sleep", 60)
    wait_for(lambda: owner_of(disk) == a.name, "the disk to be claimed", 30)
    assert b.lease("break", disk, "--epoch", 1, "--reason", "thought dead").code == 0
    assert b.lease("acquire", disk).code == 0
    ran = running.end(30)
    assert (ran.code, json.loads(ran.out)["error"]) == (10, "LeaseHeld")
    assert said(ran, "lost") == ["its lease is not ours any more"]
    assert (owner_of(disk), record(disk).epoch) == (b.name, 3)


def test_a_run_has_the_exit_code_of_its_command_and_frees_the_disk(
    hosts: Hosts, disk: Path
) -> None:
    a, _ = hosts
    ran = a.run(disk, "never", "sh", "-c", "exit 7").end()
    assert ran.code == 7
    assert record(disk).state is State.FREE
    killed = a.run(disk, "never", "sh", "-c", "kill -9 $$").end()
    assert killed.code == 128 + 9
    missing = a.run(disk, "never", "/no/such/qemu").end()
    assert (missing.code, json.loads(missing.out)["error"]) == (4, "Refused")
    assert record(disk).state is State.FREE


def test_an_export_is_closed_for_whoever_asks(hosts: Hosts, disk: Path, tmp_path: Path) -> None:
    """And whoever only asks finds it kept for itself."""
    hosts_in_turn = [hosts[0], hosts[1], hosts[0]]
    before = None
    for number, host in enumerate(hosts_in_turn):
        running = host.run(disk, "close", *export(disk, tmp_path / f"nbd-{number}"))
        wait_until_open(disk, host)
        if before:
            ran = before.end()
            assert ran.code == 0, ran
            assert said(ran, "releasing") == [f"to host {host.name}"]
        before = running
    assert before
    asked = hosts[1].lease("request", disk)
    assert asked.code == 0, asked
    assert asked.lines[-2]["said"] == "released"
    assert asked.result["lease"]["grant"]["host"] == "host-b"
    before.end()
    assert record(disk).epoch == 3 * 3
    late = hosts[0].lease("acquire", disk, "--timeout", 0)
    assert (late.code, late.result["error"]) == (10, "LeaseHeld")
    assert "promised to host host-b" in late.result["message"]
    assert hosts[1].lease("acquire", disk).code == 0


def test_a_policy_of_never_is_an_answer(hosts: Hosts, disk: Path, tmp_path: Path) -> None:
    a, b = hosts
    running = a.run(disk, "never", *export(disk, tmp_path / "nbd"))
    wait_until_open(disk, a)
    for ran in (b.lease("request", disk), b.lease("acquire", disk)):
        assert (ran.code, ran.result["error"]) == (10, "LeaseHeld")
        assert "refused: its policy is never" in ran.result["message"]
    taken = b.lease("break", disk, "--epoch", 1, "--reason", "I want it")
    assert (taken.code, taken.result["error"]) == (4, "Illegal")
    assert record(disk).epoch == 1
    running.ask_to_end()
    assert record(disk).state is State.FREE


def test_who_waits_can_stop_waiting(hosts: Hosts, disk: Path, tmp_path: Path) -> None:
    a, b = hosts
    assert a.lease("acquire", disk).code == 0
    waiting = b.run(disk, "never", "touch", tmp_path / "ran")
    wait_for(lambda: bool(LeaseFile(disk).requests()), "its request", 60)
    ran = waiting.ask_to_end()
    assert (ran.code, json.loads(ran.out)["error"]) == (7, "Cancelled")
    assert not LeaseFile(disk).requests()
    assert not (tmp_path / "ran").exists()


def test_a_run_that_is_killed_leaves_its_guest_and_its_host_takes_up_the_lease(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    a, b = hosts
    pid_file = tmp_path / "pid"
    command = export(disk, tmp_path / "nbd")[3:]
    running = a.run(disk, "close", *command, f"--pid-file={pid_file}")
    wait_until_open(disk, a)
    wait_for(pid_file.exists, "the pid", 10)
    running.process.kill()
    running.process.wait()
    try:
        again = a.run(disk, "never", "true", timeout=1).end()
        assert (again.code, json.loads(again.out)["error"]) == (10, "LeaseHeld")
        assert b.lease("acquire", disk, "--timeout", 1).code == 10
        assert record(disk).epoch == 1
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
    running.end()
    wait_for(lambda: lock_on(disk) is Lock.FREE, "the export to be gone", 60)
    assert b.lease("acquire", disk, "--timeout", 1).code == 10, "host-a may come back"
    assert a.run(disk, "never", "true").end().code == 0
    assert (record(disk).state, record(disk).epoch) == (State.FREE, 3)


def test_two_disks_are_had_both_or_none(hosts: Hosts, disk: Path, tmp_path: Path) -> None:
    a, b = hosts
    other = blank(tmp_path / "a-disk.qcow2", 1 << 20)
    assert a.lease("acquire", disk).code == 0
    b_words = ["run", "--disk", other, "--disk", disk, "--timeout", 0, "--json", "--", "true"]
    both = promoter(b.state, *b_words)
    assert both.code == 10
    assert record(other).state is State.FREE
    assert a.lease("release", disk).code == 0
    assert promoter(b.state, *b_words).code == 0


def test_what_was_broken_while_another_disk_was_waited_for_is_not_opened(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    a, b = hosts
    later = blank(tmp_path / "later.qcow2", 1 << 20)
    assert b.lease("acquire", later).code == 0
    words = ["run", "--disk", disk, "--disk", later, "--timeout", 120, "--json", "--"]
    running = start(a.state, *words, "touch", tmp_path / "ran")
    wait_for(lambda: owner_of(disk) == a.name, "the first to be claimed", 60)
    assert b.lease("break", disk, "--epoch", 1, "--reason", "it looked dead").code == 0
    assert b.lease("acquire", disk).code == 0
    assert b.lease("release", later).code == 0
    ran = ended(running, 120)
    assert (ran.code, ran.result["error"]) == (10, "LeaseHeld")
    assert "was ours, and is another's" in ran.result["message"]
    assert not (tmp_path / "ran").exists()
    assert owner_of(disk) == b.name
    assert record(later).state is State.FREE


FAULTS = ("none", "owner killed", "owner stalls", "disk's user killed", "requester killed")


HOLDER = Path(__file__).with_name("lease_holder.py")


def holder(disk: Path, log: Path, name: str) -> list[object]:
    return [sys.executable, "-IS", HOLDER, disk, log, name]


@pytest.mark.parametrize("rounds", [len(FAULTS), pytest.param(50, marks=pytest.mark.nightly)])
def test_whatever_dies_the_disk_has_one_user_and_can_be_had_again(
    hosts: Hosts, disk: Path, tmp_path: Path, rounds: int
) -> None:
    """Each round the disk goes to the other host, and something happens meanwhile."""
    log = tmp_path / "log"
    owner, other = hosts
    running = owner.run(disk, "close", *holder(disk, log, owner.name))
    wait_until_open(disk, owner)
    for number in range(rounds):
        fault = FAULTS[number % len(FAULTS)]
        asking = other.run(disk, "close", *holder(disk, log, other.name))
        if fault == "requester killed":
            wait_until_asked(disk, other)
            asking.process.kill()
            asking.end()
            running.end()  # it let go all the same, for a host that does not come
            asking = other.run(disk, "close", *holder(disk, log, other.name))
        elif fault == "owner stalls":
            running.process.send_signal(signal.SIGSTOP)
            wait_until_asked(disk, other)
            assert owner_of(disk) == owner.name
            running.process.send_signal(signal.SIGCONT)
        elif fault == "owner killed":
            running.process.kill()
            os.kill(user_of(log), signal.SIGKILL)
            running.end()
            running = owner.run(disk, "close", *holder(disk, log, owner.name))
        elif fault == "disk's user killed":
            os.kill(user_of(log), signal.SIGKILL)
        running.end(120)
        wait_until_open(disk, other)
        running, owner, other = asking, other, owner
    running.ask_to_end()
    assert record(disk).state is State.FREE
    assert len(LeaseFile(disk).requests()) <= 1, "what the killed asked for is swept"
    assert not re.findall("REFUSED|TWO|UNCLAIMED", log.read_text())


def wait_until_asked(disk: Path, host: LeasingHost) -> None:
    def asked() -> bool:
        epoch = record(disk).epoch
        requests = [asked.request for asked in LeaseFile(disk).requests()]
        return any((r.requester.host, r.epoch) == (host.name, epoch) for r in requests)

    wait_for(asked, f"{host.name} to ask", 60)


def user_of(log: Path) -> int:
    """The process that has the disk open, by what it said last."""

    def last() -> int:
        return int(re.findall(r" open (\d+)$", log.read_text(), re.MULTILINE)[-1])

    wait_for(lambda: Path(f"/proc/{last()}").exists(), "who opened it to say so", 60)
    return last()


class Guest:
    """One guest that is run by one host or the other, by the same command line but its monitor."""

    def __init__(self, directory: Path) -> None:
        self.disk = linked_clone(base(), directory / "clone.qcow2")
        self.vms = [VM(directory, [Disk(self.disk)], writer={"rate": 0}) for _ in range(2)]
        self.log = self.vms[0].log

    def run(self, host: LeasingHost, vm: VM, policy: str) -> Running:
        command = ["setpriv", "--pdeathsig", "KILL", *vm.argv]
        return host.run(self.disk, policy, *command, qmp=vm.monitor)

    def wait_for_acks(self, count: int, running: Running) -> None:
        wanted = ack_count(self.log) + count

        def written() -> bool:
            return ack_count(self.log) >= wanted or running.process.poll() is not None

        wait_for(written, f"{count} more records", 120)
        assert running.process.poll() is None, running.end()

    def close(self) -> None:
        for vm in self.vms:
            shutil.rmtree(vm.monitor.parent)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    yield made
    made.close()


def runs_in(log: Path) -> int:
    return len(re.findall(r"^W ", log.read_text(), re.MULTILINE))


def test_a_guests_disk_passes_to_the_host_that_asks_and_no_write_is_lost(
    hosts: Hosts, guest: Guest
) -> None:
    a, b = hosts
    first = guest.run(a, guest.vms[0], "shutdown")
    guest.wait_for_acks(40, first)
    second = guest.run(b, guest.vms[1], "shutdown")
    gone = first.end(120)
    assert gone.code == 0, gone
    assert said(gone, "releasing") == ["to host host-b"]
    guest.wait_for_acks(40, second)
    assert owner_of(guest.disk) == "host-b"
    asked = a.lease("acquire", guest.disk, "--timeout", 120)
    assert asked.code == 0, asked
    assert second.end().code == 0
    assert lock_on(guest.disk) is Lock.FREE
    assert runs_in(guest.log) == 2
    report = records.check(guest.disk, None, guest.log)
    report.raise_if_bad()
    assert report.records >= 80


@pytest.mark.parametrize("bus", [Bus.SCSI, pytest.param(Bus.VIRTIO, marks=pytest.mark.nightly)])
def test_a_disk_is_taken_out_of_a_guest_that_writes_on_it(
    hosts: Hosts, tmp_path: Path, bus: Bus
) -> None:
    a, b = hosts
    disk = blank(tmp_path / "data.qcow2", 8 << 20)
    disks = [Disk(linked_clone(base(), tmp_path / "root.qcow2")), Disk(disk, bus=bus)]
    device = "/dev/sda" if bus is Bus.SCSI else "/dev/vdb"
    vm = VM(tmp_path, disks, writer={"rate": 0, "dev": device})
    command = ["setpriv", "--pdeathsig", "KILL", *vm.argv]
    running = a.run(disk, "detach", *command, qmp=vm.monitor)
    try:
        wait_for(lambda: ack_count(vm.log) >= 40, "records", 120)
        asked = b.lease("acquire", disk, "--timeout", 120)
        assert asked.code == 0, (asked, running.process.poll())
        assert lock_on(disk) is Lock.FREE
        assert running.process.poll() is None, "the guest runs on"
        report = records.check(disk, None, vm.log)
        assert {finding.kind for finding in report.findings} <= {records.Kind.FAILED}
        assert report.records >= 40
    finally:
        ran = running.ask_to_end()
        shutil.rmtree(vm.monitor.parent)
    assert said(ran, "releasing") == ["to host host-b"]
    assert owner_of(disk) == "host-b"


def test_a_guest_that_does_not_go_down_keeps_its_disk(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    """Its monitor does not answer, so that nobody can press its power button."""
    a, b = hosts
    running = a.run(disk, "shutdown", *export(disk, tmp_path / "nbd"), qmp=tmp_path / "none")
    wait_until_open(disk, a)
    ran = b.lease("acquire", disk)
    assert (ran.code, ran.result["error"]) == (10, "LeaseHeld")
    assert "refused: no such socket" in ran.result["message"]
    wait_for(lambda: record(disk).state is State.HELD, "it to be kept", 60)
    assert record(disk).epoch == 3
    assert lock_on(disk) is Lock.HELD
    running.ask_to_end()


@pytest.mark.parametrize(
    ("policy", "command"),
    [
        ("shutdown", ["true"]),
        ("loan", ["true"]),
        ("never", ["qemu", "-drive", "file=disk,file.locking=off"]),
        ("never", ["qemu", "-blockdev", '{"driver": "file", "locking": "off"}']),
    ],
)
def test_a_run_that_could_not_keep_the_rules_is_refused(
    disk: Path, policy: str, command: list[str]
) -> None:
    spec = RunSpec((disk,), tuple(command), Policy(policy), None, 0)
    with pytest.raises(Refused) as caught:
        spec.check()
    assert caught.value.hint


def test_a_refused_run_has_claimed_nothing(hosts: Hosts, disk: Path) -> None:
    ran = hosts[0].run(disk, "shutdown", "true").end()
    error: dict[str, Any] = json.loads(ran.out)
    assert (ran.code, error["error"]) == (4, "Refused")
    assert LeaseFile(disk).read() is None


# --- by another clock ------------------------------------------------------------------------


class Clocked:
    """A ``promoter run`` in this process, on ``host``, by a clock that only `passes` moves."""

    def __init__(self, host: LeasingHost, spec: RunSpec) -> None:
        self.now = 0.0
        self.told: list[tuple[str, str]] = []
        run = LeasedRun(
            spec, this_host(host.state), ledger(host.state), None, self._say, lambda: self.now
        )
        self.running = asyncio.create_task(run.run())

    def _say(self, event: str, disk: Path, text: str) -> None:
        self.told.append((event, text))

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        await asyncio.to_thread(wait_for, condition, what, 60)

    def has_said(self, event: str) -> bool:
        return event in dict(self.told)

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_a_disk_that_has_just_come_is_not_given_away_again(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    """Who asks waits, and has it when it was held for long enough."""
    a, b = hosts
    command = tuple(map(str, export(disk, tmp_path / "nbd")))
    heard: list[Answer] = []
    me = this_host(b.state)
    asking = Acquisition(LeaseFile(disk), me, me.owner(), heard=heard.append)

    async def pass_on() -> LeaseRecord:
        run = Clocked(a, RunSpec((disk,), command, Policy.CLOSE, None, 5))
        await run.until(lambda: lock_on(disk) is Lock.HELD, "the export")
        asked = asyncio.create_task(asyncio.to_thread(asking.run, 60))
        await run.until(lambda: bool(heard), "an answer")
        run.passes(HOLD_AT_LEAST - 0.5)
        await run.until(lambda: len(heard) == 2, "another answer")
        assert record(disk).epoch == 1
        run.passes(0.5)
        await run.running
        return await asked

    assert asyncio.run(pass_on()).owner == me.owner()
    assert [answer.said for answer in heard[:2]] == [Said.BUSY, Said.BUSY]
    assert [answer.retry_after for answer in heard[:2]] == [HOLD_AT_LEAST, 1]
    assert {answer.why for answer in heard[:2]} == {"it has only just come here"}


def test_who_rings_as_the_command_ends_does_not_keep_the_run_from_ending(
    hosts: Hosts, disk: Path
) -> None:
    spec = RunSpec((disk,), ("true",), Policy.CLOSE, None, 5)
    state = hosts[0].state

    async def serve() -> None:
        run = LeasedRun(spec, this_host(state), ledger(state), None, lambda *_: None)
        serving = asyncio.create_task(run._serve(run.stores[0]))
        while not run._bells[run.stores[0]]._waiters:  # noqa: ASYNC110 - that very moment is wanted
            await asyncio.sleep(0)
        run._wake()
        serving.cancel()
        await asyncio.wait([serving], timeout=2)
        assert serving.cancelled()

    asyncio.run(serve())


def test_a_loan_ends_when_it_is_not_fetched_or_its_borrower_is_silent(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    """Then the guest that waits has the disk again, and before that it has not."""
    a, b = hosts
    vm = VM(tmp_path, [Disk(disk, device="werror=stop,rerror=stop")], extra=["-S"])
    command = ("setpriv", "--pdeathsig", "KILL", *vm.argv)
    me, store = this_host(b.state), LeaseFile(disk)

    async def lent_and_lost() -> None:
        run = Clocked(a, RunSpec((disk,), command, Policy.LOAN, vm.monitor, 5))
        for fetched, patience in ((False, GRANT_SECONDS), (True, STOPPED_AFTER)):
            await run.until(lambda: lock_on(disk) is Lock.HELD, "the guest to have it")
            run.passes(HOLD_AT_LEAST)
            await asyncio.to_thread(request, store, me, None, 60, lambda _: None)
            assert record(disk).state is State.LOANED
            if fetched:
                asking = Acquisition(store, me, me.owner(), borrow=True)
                await asyncio.to_thread(asking.run, 5)
            lent = record(disk)
            await asyncio.sleep(1)  # it looks, several times
            run.passes(patience - 1)
            await asyncio.sleep(1)
            assert (record(disk), lock_on(disk)) == (lent, Lock.FREE)
            run.passes(1)
            await run.until(partial(run.has_said, "returned"), "it to be returned")
            run.told.clear()
            assert (owner_of(disk), record(disk).lender) == (a.name, None)
        os.kill(os.getpid(), signal.SIGTERM)
        await run.running

    asyncio.run(lent_and_lost())
    assert record(disk).state is State.FREE
    shutil.rmtree(vm.monitor.parent)
