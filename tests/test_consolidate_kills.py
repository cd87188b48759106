"""Whatever is killed while disks are frozen or merged: one chain is the true one, and whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from promoter.operations.guarding import DEADLINE
from tests.cli import Ran, ended, promoter
from tests.deltas import Case, Make
from tests.domains import Domain, Libvirtd
from tests.vm import VM, base, chain, linked_clone, wait_for

DEPTHS = {"snapshot": (2, 3), "consolidate": (4, 2), "consolidate --beside": (4, 2)}
SLOW = "20M"  # or there is nothing to wait for


@dataclass(frozen=True)
class Cell:
    """Who is killed at which point of which command, in which kind of guest."""

    kind: str
    command: str
    point: str
    whom: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.command}, {self.point}, {self.whom}"


WAYS = {
    "snapshot": ("SEED", "PREPARE", "SWITCH_OVER"),
    "consolidate": ("MIRROR", "AWAIT_READY", "PREPARE", "SWITCH_OVER", "DISMISS"),
    "consolidate --beside": ("SEED", "MIRROR", "AWAIT_READY", "PREPARE", "SWITCH_OVER", "DISMISS"),
}
IN_PROMOTER = {  # the points of a plain guest's switchover
    "consolidate": ("stopped", "completing", "drained", "renamed", "finalized"),
    "consolidate --beside": ("completing", "drained", "renamed", "finalized"),
}
IN_ITS_OWN = {  # those in the process that has the guest suspended
    ("qemu", "snapshot"): ("overlay open", "standing", "reopened", "snapshotted", "settled"),
    ("libvirt", "snapshot"): ("suspended", "overlays"),
    ("libvirt", "consolidate"): ("suspended", "pivoted", "defined"),
    ("libvirt", "consolidate --beside"): ("suspended", "pivoted", "defined"),
}

IN_ITS_OWN_WHOM = ("promoter", "itself", "promoter itself", "qemu", "promoter itself qemu")


def every_cell() -> Iterator[Cell]:
    for kind in ("qemu", "libvirt"):
        for command, steps in WAYS.items():
            points = [f"before {step}" for step in steps] + ["before TIDY", "after TIDY"]
            points += IN_PROMOTER.get(command, ()) if kind == "qemu" else ()
            for point in points:
                for whom in ("promoter", "qemu", "both", "both, resumed first"):
                    yield Cell(kind, command, point, whom)
            for point in IN_ITS_OWN.get((kind, command), ()):
                for whom in (
                    "promoter",
                    "itself",
                    "promoter itself",
                    "qemu",
                    "promoter itself qemu",
                ):
                    yield Cell(kind, command, point, whom)
    for point in ("stopped", "drained", "renamed"):
        yield Cell("qemu", "consolidate", point, "promoter and guard")


TYPICAL = {
    Cell("qemu", "consolidate", "drained", "both, resumed first"),
    Cell("libvirt", "consolidate", "pivoted", "promoter itself qemu"),
}
CELLS = [
    pytest.param(cell, marks=() if cell in TYPICAL else pytest.mark.nightly, id=str(cell))
    for cell in every_cell()
]


def qemu_of(guest: VM | Domain) -> int:
    if isinstance(guest, VM):
        return guest.pid
    wanted = str(guest.uuid).encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"-uuid" in words and wanted in words:
            return int(process.name)
    raise AssertionError("it runs")


def make_guest(kind: str, directory: Path, request: pytest.FixtureRequest) -> Make:
    if kind == "qemu":
        return lambda disks: VM(directory, disks, writer={"rate": 0})
    libvirtd: Libvirtd = request.getfixturevalue("libvirtd")
    return lambda disks: Domain(libvirtd, directory, disks)


def strike(case: Case, cell: Cell) -> Ran:
    command, *words = cell.command.split()
    if cell.point == "before AWAIT_READY":
        words += ["--speed", SLOW]
    pid = qemu_of(case.guest)
    whom = "both" if cell.whom.startswith("both") else cell.whom
    return ended(case.strike(cell.point, whom, pid, command, *words), 120)


def is_gone(guest: VM | Domain) -> bool:
    return not (guest.running if isinstance(guest, VM) else guest.domain.isActive())


def prove_after(case: Case, cell: Cell) -> None:
    guest = case.guest
    ran = strike(case, cell)
    promoter_died = "promoter" in cell.whom or cell.whom.startswith("both")
    assert (ran.code == -signal.SIGKILL) is promoter_died, ran
    qemu_died = "qemu" in cell.whom or cell.whom.startswith("both")
    if qemu_died:
        wait_for(lambda: is_gone(guest), "the guest's end", 30)
        if isinstance(guest, VM):
            guest.wait()
        if not cell.whom.endswith("resumed first"):
            guest.start()
            guest.wait_for_acks(20)
    elif cell.whom not in ("promoter itself", "promoter and guard"):
        guest.wait_for_acks(30)
    resumed = case.resume()
    done = status(case) == "done"
    assert resumed.code in (0, 3) if qemu_died else resumed.code == 0, resumed.out
    if is_gone(guest):
        guest.start()
    case.prove_at_rest()
    old, new = DEPTHS[cell.command]
    assert len(case.chain()) == (new if done else old)
    case.prove_boots(new if done else old, killed=True)
    again = case.resume()
    assert again.code == 0, again.out
    if done and case.plain:
        assert not [name for name in case.files() if ".new-" in name], "QEMU is gone, and the spare"
    assert not [name for name in case.files() if ".next-" in name or ".part-" in name]


def status(case: Case) -> str:
    (job,) = promoter(case.state, "job", "list", "--json").lines
    assert job["status"] in ("done", "failed"), job
    return str(job["status"])


@pytest.mark.parametrize("cell", CELLS)
def test_one_chain_is_the_true_one(
    request: pytest.FixtureRequest, tmp_path: Path, cell: Cell
) -> None:
    if cell.command == "snapshot":
        disks = [linked_clone(base(), tmp_path / "disk.qcow2")]
    else:
        disks = chain(tmp_path, 3)[-1:]
    case = Case(make_guest(cell.kind, tmp_path, request), tmp_path, disks)
    with case.guest as guest:
        guest.wait_for_acks(60)
        prove_after(case, cell)


@pytest.mark.nightly
def test_a_promoter_that_hangs_in_a_commits_switchover_does_not_freeze_its_guest(
    tmp_path: Path,
) -> None:
    layers = chain(tmp_path, 3)
    case = Case(lambda disks: VM(tmp_path, disks, writer={"rate": 0}), tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(60)
        hanging = case.strike("drained", "hang", qemu_of(guest), "consolidate")
        os.waitid(os.P_PID, hanging.pid, os.WSTOPPED | os.WNOWAIT)
        wait_for(lambda: not guest.paused, "the guard", 3 * DEADLINE)
        guest.wait_for_acks(40)
        os.kill(hanging.pid, signal.SIGCONT)
        woken = ended(hanging)
        assert woken.code == 6, woken.out
        assert case.chain() == layers[::-1]
        case.prove_at_rest()
        case.prove_boots(4)


@pytest.mark.nightly
def test_a_killed_promoter_leaves_no_guest_slowed(tmp_path: Path) -> None:
    layers = chain(tmp_path, 3)
    case = Case(lambda disks: VM(tmp_path, disks, writer={"rate": 0}), tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(60)
        running = case.start("consolidate", "--speed", "3M")
        wait_for(lambda: case.limits() > {0}, "the guest to be slowed", 60)
        running.send_signal(signal.SIGKILL)
        assert ended(running).code == -signal.SIGKILL
        wait_for(lambda: case.limits() == {0}, "the guard", 3 * DEADLINE)
        resumed = case.resume()
        assert resumed.code == 0, resumed.out
        case.prove_at_rest()
        case.prove_boots(2)
