"""A disk is lent out of a running guest, which waits for it, and comes back."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from promoter.lease.claim import Acquisition, let_go
from promoter.lease.file import LeaseFile
from promoter.lease.host import this_host
from promoter.lease.liveness import lock_on
from promoter.lease.record import LeaseRecord, State
from promoter.lease.rules import Lock
from tests import records
from tests.agents import audit, ledger
from tests.test_lease_handover import percentiles
from tests.test_lease_run import (
    Hosts,
    LeasingHost,
    Running,
    export,
    hosts,
    owner_of,
    record,
    said,
    wait_until_open,
)
from tests.vm import MIB, VM, Bus, Disk, ack_count, base, blank, linked_clone, qemu_img, wait_for

__all__ = ["hosts"]

STOPPING = "werror=stop,rerror=stop"


class Lender:
    """A guest that writes on a disk which is an overlay, and that its host lends."""

    def __init__(self, directory: Path, host: LeasingHost, bus: Bus) -> None:
        self.below = blank(directory / "below.qcow2", 8 * MIB)
        self.disk = linked_clone(self.below, directory / "data.qcow2")
        self.host, self.store = host, LeaseFile(self.disk)
        root = Disk(linked_clone(base(), directory / "root.qcow2"), bus=bus)
        device = "/dev/sdb" if bus is Bus.SCSI else "/dev/vdb"
        self.vm = VM(
            directory,
            [root, Disk(self.disk, bus=bus, device=STOPPING)],
            writer={"rate": 0, "dev": device},
        )
        self.running = self.run()

    def run(self) -> Running:
        return self.host.run(self.disk, "loan", *self.vm.command, qmp=self.vm.monitor)

    def wait_for_acks(self, count: int) -> None:
        wanted = ack_count(self.vm.log) + count
        wait_for(lambda: ack_count(self.vm.log) >= wanted, f"{count} more records", 120)

    def check(self) -> None:
        """Every acknowledged record is there, and no write of the guest's has failed."""
        report = records.check(self.disk, None, self.vm.log)
        report.raise_if_bad()
        assert report.records >= 40

    def kill(self) -> None:
        """End the guest; its run may be gone."""
        for process in Path("/proc").glob("[0-9]*"):
            if is_running(process, self.vm):
                os.kill(int(process.name), signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.vm.monitor.parent)


def is_running(process: Path, vm: VM) -> bool:
    """Is it the QEMU of this test's guest?"""
    try:
        return f"unix:{vm.monitor},".encode() in (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def lend(tmp_path: Path, hosts: Hosts) -> Iterator[Callable[[Bus], Lender]]:
    made: list[Lender] = []

    def make(bus: Bus) -> Lender:
        made.append(Lender(tmp_path, hosts[0], bus))
        made[-1].wait_for_acks(40)
        return made[-1]

    yield make
    for lender in made:
        lender.close()


class Borrower:
    """A host that asks for the disk, has it, and gives it back."""

    def __init__(self, host: LeasingHost, disk: Path) -> None:
        self.host, self.state = this_host(host.state), host.state
        self.store = LeaseFile(disk, ledger(host.state))

    def borrow(self) -> LeaseRecord:
        asking = Acquisition(self.store, self.host, self.host.owner(), borrow=True)
        return asking.run(60)

    def give_back(self) -> LeaseRecord:
        return let_go(self.store, self.host)

    def latencies(self) -> list[float]:
        """Of all loans, in milliseconds from the request that was granted to the claim."""
        asked, found = 0.0, []
        for line in audit(self.state):
            at = datetime.fromisoformat(line["at"]).timestamp()
            asked = at if line["event"] == "asked" else asked
            if line["event"] == "lease" and line["state"] == "held":
                found.append(1000 * (at - asked))
        return found


@pytest.mark.parametrize(
    ("qemu", "bus", "rounds"),
    [
        ("system", Bus.SCSI, 5),
        pytest.param("newest", Bus.VIRTIO, 5, marks=pytest.mark.nightly),
        pytest.param("newer", Bus.SCSI, 5, marks=pytest.mark.nightly),
        pytest.param("system", Bus.VIRTIO, 200, marks=pytest.mark.nightly),
        pytest.param("newest", Bus.SCSI, 200, marks=pytest.mark.nightly),
    ],
    indirect=["qemu"],
)
def test_a_disk_is_lent_again_and_again_and_its_guest_notices_nothing(
    qemu: str,
    hosts: Hosts,
    lend: Callable[[Bus], Lender],
    bus: Bus,
    rounds: int,
    record_property: Callable[[str, object], None],
) -> None:
    lender = lend(bus)
    borrower = Borrower(hosts[1], lender.disk)
    for number in range(rounds):
        borrowed = borrower.borrow()
        assert borrowed.lender
        assert borrowed.lender.host == "host-a"
        assert lock_on(lender.disk) is Lock.FREE
        before = ack_count(lender.vm.log)
        qemu_img("check", "-q", lender.disk)
        if number % 2:
            qemu_img("commit", "-q", lender.disk)
        assert ack_count(lender.vm.log) - before <= 1, "it waits"
        freed = borrower.give_back()
        assert freed.grant
        assert freed.grant.host == "host-a"
        lender.wait_for_acks(20)
        assert owner_of(lender.disk) == "host-a"
    record_property("loan", percentiles(borrower.latencies()))
    ran = lender.running.ask_to_end()
    assert len(said(ran, "lent")) == len(said(ran, "returned")) == rounds
    assert not said(ran, "trouble")
    qemu_img("check", "-q", lender.disk)
    lender.check()


def test_a_borrower_that_is_killed_owes_the_disk_still(
    hosts: Hosts, lend: Callable[[Bus], Lender], tmp_path: Path
) -> None:
    """Its host says when nothing has the disk open any more; until then the guest waits."""
    lender, b = lend(Bus.SCSI), hosts[1]
    borrowing = b.run(lender.disk, "never", *export(lender.disk, tmp_path / "nbd"), borrow=None)
    wait_until_open(lender.disk, b)
    borrowing.process.kill()
    borrowing.process.wait()
    wait_for(lambda: lock_on(lender.disk) is Lock.FREE, "the export to be gone", 60)
    borrowing.end()
    assert owner_of(lender.disk) == "host-b"
    assert b.lease("release", lender.disk).code == 0
    lender.wait_for_acks(20)
    lender.running.ask_to_end()
    lender.check()


def test_a_lender_that_is_killed_takes_its_disk_up_anew(
    hosts: Hosts, lend: Callable[[Bus], Lender]
) -> None:
    """Its guest stands still without the disk, and never has it open again."""
    lender = lend(Bus.SCSI)
    borrower = Borrower(hosts[1], lender.disk)
    borrower.borrow()
    lender.running.process.kill()
    lender.running.process.wait()
    assert any(is_running(process, lender.vm) for process in Path("/proc").glob("[0-9]*"))
    freed = borrower.give_back()
    assert freed.grant
    assert freed.grant.seconds is None, "nobody else can have it"
    assert hosts[1].lease("acquire", lender.disk, "--timeout", 0).code == 10
    assert lock_on(lender.disk) is Lock.FREE
    mine = hosts[0].lease("acquire", lender.disk)
    assert (mine.code, mine.result["lease"]["lender"]) == (0, None)
    assert lock_on(lender.disk) is Lock.FREE
    lender.kill()
    lender.running.end()
    lender.check()


def test_a_lenders_guest_that_ends_leaves_the_disk_to_its_host(
    hosts: Hosts, lend: Callable[[Bus], Lender]
) -> None:
    lender = lend(Bus.SCSI)
    borrower = Borrower(hosts[1], lender.disk)
    borrower.borrow()
    ran = lender.running.ask_to_end()
    assert said(ran, "trouble") == ["it is still lent; it goes back to this host"]
    borrower.give_back()
    assert hosts[1].lease("acquire", lender.disk, "--timeout", 0).code == 10
    assert hosts[0].lease("acquire", lender.disk).code == 0
    assert hosts[0].lease("release", lender.disk).code == 0
    assert hosts[1].lease("acquire", lender.disk).code == 0
    lender.check()


def test_no_guest_is_started_on_a_disk_that_is_only_lent(
    hosts: Hosts, lend: Callable[[Bus], Lender], tmp_path: Path
) -> None:
    lender = lend(Bus.SCSI)
    ran = hosts[1].run(lender.disk, "never", "touch", tmp_path / "ran").end()
    assert (ran.code, ran.result["error"]) == (4, "Refused")
    assert "only lent, by host host-a" in ran.result["message"]
    assert not (tmp_path / "ran").exists()
    lender.wait_for_acks(20)
    lender.running.ask_to_end()
    lender.check()


def test_a_guest_does_not_get_a_disk_back_that_was_others_meanwhile(
    hosts: Hosts, lend: Callable[[Bus], Lender]
) -> None:
    """An operator broke the loan: who has had the disk since owes the guest nothing."""
    lender, b = lend(Bus.SCSI), hosts[1]
    borrower = Borrower(b, lender.disk)
    epoch = borrower.borrow().epoch
    broken = b.lease("break", lender.disk, "--epoch", epoch, "--reason", "it is mine now")
    assert (broken.code, broken.result["lease"]["lender"]) == (0, None)
    assert b.lease("acquire", lender.disk).code == 0
    assert b.lease("release", lender.disk).code == 0
    before = ack_count(lender.vm.log)
    ran = lender.running.ask_to_end()
    assert any("it stays without" in text for text in said(ran, "trouble"))
    assert not said(ran, "returned")
    assert ack_count(lender.vm.log) == before
    assert record(lender.disk).state is State.FREE
    lender.check()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (partial(Disk, bus=Bus.SCSI), "needs werror=stop,rerror=stop"),
        (partial(Disk, device=STOPPING, iothread=True), "has iothreads"),
        (partial(Disk, device=STOPPING, iops=100), "throttled"),
    ],
)
def test_a_disk_that_could_not_come_back_as_it_was_is_not_lent(
    hosts: Hosts, tmp_path: Path, given: Callable[[Path], Disk], why: str
) -> None:
    disk = blank(tmp_path / "disk.qcow2", MIB)
    vm = VM(tmp_path, [given(disk)], extra=["-S"])
    command = ["setpriv", "--pdeathsig", "KILL", *vm.argv]
    running = hosts[0].run(disk, "loan", *command, qmp=vm.monitor)
    wait_until_open(disk, hosts[0])
    ran = hosts[1].lease("acquire", disk)
    assert ran.code == 10
    assert why in ran.result["message"]
    assert record(disk).state is State.HELD
    assert lock_on(disk) is Lock.HELD
    running.ask_to_end()
    shutil.rmtree(vm.monitor.parent)
