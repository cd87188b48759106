"""The host loses power, and its disk what was not flushed: one chain is true, with every record.

A cut is an instant of an operation that really ran, in a guest that really wrote: the disk is made
as the cut leaves it (`volatile.py`), the acknowledgements are those that had come out of the guest
by then. All else, processes and page cache, is gone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from random import Random

import pytest

from promoter.chain import BackingChain, Image
from promoter.operations.journal import Entry, OperationStatus
from promoter.operations.move import Way
from promoter.operations.recorded import recorded_move
from promoter.storage.files import stamp
from promoter.storage.names import Names
from promoter.values import to_json
from tests import records
from tests.cli import promoter, start
from tests.deltas import LEAKS, backing_chain
from tests.test_move import disk_intent, promotion
from tests.vm import MIB, VM, Disk, GuestDied, ack_count, base, chain, linked_clone
from tests.volatile import Keeps, VolatileDisk, own_mounts

CUTS = 4  # of each recording
SLOW_DISK_S = 300.0  # each flush goes through a process that logs it, on a machine that is busy
SEED = int(os.environ.get("PROMOTER_TEST_SEED", "1"))


@dataclass(frozen=True)
class Operation:
    """A command, and how many layers a disk has before and after it."""

    command: str
    before: int
    after: int


OPERATIONS = [
    Operation("promote", 2, 1),
    Operation("promote --preallocation full", 2, 1),
    Operation("promote --target", 2, 1),
    Operation("snapshot", 2, 3),
    Operation("consolidate", 4, 2),
    Operation("consolidate --beside", 4, 2),
]


@dataclass(frozen=True)
class Instant:
    """What had been said by then, in bytes: by promoter, the guest, and to the two disks."""

    said: int
    acknowledged: int
    told: int
    journalled: int


class Case:
    """A guest on a disk of a host that will lose its power, and what is done to it there.

    promoter's journal is on another disk, or its flushes would be the guest's disk's too.
    """

    def __init__(self, directory: Path, kind: str, operation: Operation) -> None:
        self.operation = operation
        self.host = VolatileDisk(kind, directory)
        self.var = VolatileDisk("ext4", directory / "var", 256 * MIB)
        self.state, self.target = self.var.path / "state", self.host.path / "target.qcow2"
        self.old = self.host.path / ("layer3.qcow2" if operation.before > 2 else "clone.qcow2")
        self.said = directory / "said"
        self.directory = directory
        self.vm = self.guest(self.old)

    def guest(self, disk: Path) -> VM:
        return VM(self.directory, [Disk(disk)], writer={"rate": 0})

    def record(self, *, paused: bool = False) -> list[Instant]:
        """The operation, to its end; then, if the guest runs, some records more."""
        with self.host.recorded(), self.var.recorded():
            if self.operation.before > 2:
                chain(self.host.path, 3)
            else:
                linked_clone(base(), self.old)
            subprocess.run(["sync", "-f", self.old], check=True)
            with self.ended():
                self.vm.start()
                self.vm.wait_for_acks(20, SLOW_DISK_S)
                if paused:
                    self.vm.pause()
                return [*self._while_it_works(), *(self._afterwards() if not paused else ())]

    def _while_it_works(self) -> Iterator[Instant]:
        command, *words = self.operation.command.split()
        words += [str(self.target)] if words == ["--target"] else []
        with (
            self.said.open("wb") as said,
            start(self.state, command, self.vm.monitor, *words, "--json", output=said) as process,
        ):
            while process.poll() is None:
                yield from self._instant()
            yield from self._instant()
        assert process.returncode == 0, self.said.read_text()[-2000:]

    def _afterwards(self) -> Iterator[Instant]:
        wanted = ack_count(self.vm.log) + 40
        while ack_count(self.vm.log) < wanted:
            yield from self._instant()

    def _instant(self) -> Iterator[Instant]:
        """Not one while something was said elsewhere: then nobody knows which came first."""
        said, acknowledged, told = size(self.said), size(self.vm.log), self.host.now
        journalled = self.var.now
        if (acknowledged, told) == (size(self.vm.log), self.host.now):
            yield Instant(said, acknowledged, told, journalled)
        time.sleep(0.001)

    @property
    def disk(self) -> Path:
        """The disk that is the true one now."""
        return self.old if self.old.exists() else self.target

    def cut(self, instant: Instant, acks: bytes, dice: Random) -> None:
        """The power is cut, and comes back: what must hold then."""
        keeps = dice.choice(list(Keeps))
        with self.after_a_cut(instant, acks, keeps, dice), self.ended():
            if dice.random() < 1 / 2:
                self.resume(0, 3)
            self.boot()
            done = self.is_done()
            assert done or not self.had_said_so(instant)
            self.prove(self.operation.after if done else self.operation.before)

    @contextmanager
    def after_a_cut(
        self, instant: Instant, acks: bytes, keeps: Keeps, dice: Random
    ) -> Iterator[None]:
        self.vm.log.write_bytes(acks[: instant.acknowledged])
        with (
            self.host.after_a_cut(instant.told, keeps, dice),
            self.var.after_a_cut(instant.journalled, keeps, dice),
        ):
            yield

    @contextmanager
    def ended(self) -> Iterator[None]:
        """However it goes, the guest does not use the disk afterwards."""
        try:
            yield
        finally:
            self.vm.kill()

    def boot(self) -> None:
        """By the guest's own command line; where the disk is gone, that must fail loudly."""
        if self.disk == self.old:
            self.vm.start()
            self.vm.wait_for_acks(20, SLOW_DISK_S)
            self.resume(0)
            self.vm.shutdown()
            return
        with pytest.raises(GuestDied, match=r"clone\.qcow2.*No such file"):
            self.vm.start()
        with self.guest(self.target) as moved:
            moved.wait_for_acks(20, SLOW_DISK_S)
            moved.shutdown()
        self.resume(0)  # at its end: this guest has another monitor

    def resume(self, *codes: int) -> None:
        resumed = promoter(self.state, "job", "resume", "--json")
        assert resumed.code in codes, resumed.out

    def is_done(self) -> bool:
        """Not if it was cut before its journal knew of it."""
        jobs = promoter(self.state, "job", "list", "--json").lines
        assert [job["status"] for job in jobs] in ([], ["done"], ["failed"])
        return bool(jobs) and jobs[0]["status"] == "done"

    def had_said_so(self, instant: Instant) -> bool:
        said = self.said.read_bytes()[: instant.said].splitlines(keepends=True)
        return any(json.loads(line)["event"] == "result" for line in said if line.endswith(b"\n"))

    def prove(self, depth: int) -> None:
        layers = backing_chain(self.disk)
        assert len(layers) == depth, layers
        for layer in layers:
            checked = subprocess.run(["qemu-img", "check", "-q", layer], check=False)
            assert checked.returncode in (0, LEAKS), layer
        records.check(self.disk, None, self.vm.log).raise_if_bad()
        self.resume(0)
        looked = promoter(self.state, "doctor", "--repair")
        assert looked.code == 0, looked.out
        left = {path.name for path in self.host.path.iterdir()}
        assert not [name for name in left if ".next-" in name or ".part-" in name]


def size(path: Path) -> int:
    return path.stat().st_size


def choose(instants: list[Instant], count: int, dice: Random) -> list[Instant]:
    """Instants of which each is in some step of the operation, however short the step is."""
    steps = [list(step) for _, step in groupby(instants, key=lambda instant: instant.said)]
    return [dice.choice(dice.choice(steps)) for _ in range(count)]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with own_mounts():
        yield


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_cut_loses_what_was_not_flushed_and_nothing_else(tmp_path: Path, kind: str) -> None:
    host, dice = VolatileDisk(kind, tmp_path), Random(SEED)
    with host.recorded():
        before = host.now
        (host.path / "flushed").write_bytes(b"whole" * 10000)
        for path in (host.path / "flushed", host.path):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        (host.path / "not flushed").write_bytes(b"whole" * 10000)
        after = host.now
    for keeps in Keeps:
        with host.after_a_cut(before, keeps, dice):
            assert {path.name for path in host.path.iterdir()} <= {"lost+found"}
        with host.after_a_cut(after, keeps, dice):
            assert (host.path / "flushed").read_bytes() == b"whole" * 10000
            assert not (host.path / "not flushed").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.command)
def test_one_chain_is_true_after_a_power_cut(
    tmp_path: Path, kind: str, operation: Operation
) -> None:
    case, dice = Case(tmp_path, kind, operation), Random(f"{SEED} {kind} {operation}")
    with ExitStack() as stack:
        stack.push(case.vm)
        instants = case.record()
        acks = case.vm.log.read_bytes()
        for instant in choose(instants, CUTS, dice):
            case.cut(instant, acks, dice)


@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=pytest.mark.nightly)])
def test_what_is_said_to_be_done_is_done_though_the_guest_flushes_nothing(
    tmp_path: Path, kind: str
) -> None:
    case, dice = Case(tmp_path, kind, OPERATIONS[0]), Random(SEED)
    with ExitStack() as stack:
        stack.push(case.vm)
        last = case.record(paused=True)[-1]
        assert case.had_said_so(last)
        with case.after_a_cut(last, case.vm.log.read_bytes(), Keeps.NOTHING, dice):
            assert case.is_done()
            case.prove(case.operation.after)


def test_a_device_that_has_another_number_after_a_boot_is_the_same(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("path", "target", "below")]
    for file in files:
        file.write_bytes(b"")
    path, target, below = (found for file in files if (found := stamp(file)))
    aside, prepared = tmp_path / "aside", tmp_path / "next"
    names = Names(path.id, files[0], files[1], aside, prepared, in_place=True)
    chain = BackingChain(
        tuple(Image(file.name, "qcow2", file, "file", None, 1, 1) for file in files[::2])
    )
    disk = replace(
        disk_intent(0, Way.MIRROR), names=names, seeded=target, below=(below,), chain=chain
    )
    now = replace(promotion(), disks=(disk,))
    kept = re.sub(r'"device":\d+', '"device":1', to_json(now))
    assert kept != to_json(now)
    status = OperationStatus.INTERRUPTED
    assert recorded_move(Entry("00000000", "promote", "g", kept, status, None, "", "")) == now
