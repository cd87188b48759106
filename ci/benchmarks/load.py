"""A guest's disk moves to slow storage while the guest writes: which ways end, how long the guest
stands still.

The table of the paper on I/O mirroring (USENIX ATC 2011, "The design and evolution of live storage
migration"), with QEMU's own means: snapshots that are committed one after the other, a mirror with
a dirty bitmap, a mirror that every write goes to, and promoter's, where a seed comes first. The
storage is slow by each job's `speed`: the load dirties a little less in a second than that, twice
the load more.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ci.benchmarks.harness import TIME, Measure, Table, as_a_host_runs_it, turns, writes
from ci.benchmarks.promote import GIB
from tests import records
from tests.vm import MIB, VM, Disk, base, blank, file_system, linked_clone, qemu_img, wait_for

SPEED = 4 * MIB
LOADS: dict[str, dict[str, object]] = {  # a record dirties 64 KiB; the guest's own logs some too
    "no load": {"lanes": 1, "rate": 1},
    "the load": {"lanes": 3, "rate": 14},
    "twice the load": {"lanes": 3, "rate": 28},
}
LAST = 1.0  # seconds that a guest may be stopped for


@dataclass
class Move:
    """Of a guest's disk, whose node is `disk0` and file is `source`, to the file `target`. It has
    until the `deadline`: TimeoutError. The guest writes to `file`.
    """

    vm: VM
    source: Path
    target: Path
    deadline: float

    def __post_init__(self) -> None:
        self.file = self.source

    def run(self, *words: object) -> str:
        """What a program says that must end in time."""
        left = self.deadline - time.monotonic()
        command = list(map(str, words))
        try:
            return subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, timeout=left
            ).stdout
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(*error.args) from error

    def job(self, command: str, **arguments: object) -> None:
        self.vm.qmp(command, job_id="job", speed=SPEED, **arguments)

    def complete(self) -> None:
        self.until(lambda: self.jobs()[0]["ready"])
        self.vm.qmp("job-complete", id="job")
        self.end()

    def end(self) -> None:
        self.until(lambda: not self.jobs())

    def jobs(self) -> Any:
        return self.vm.qmp("query-block-jobs")

    def until(self, condition: Callable[[], bool]) -> None:
        wait_for(condition, "the job", self.deadline - time.monotonic())

    def add(self, name: str, image: Path, **options: object) -> None:
        """A node, and its file's."""
        file = {"driver": "file", "filename": str(image), "node-name": f"{name}-file"}
        self.vm.qmp("blockdev-add", driver="qcow2", node_name=name, file=file, **options)

    def add_target(self) -> None:
        self.add("target", self.target, discard="unmap")  # else a job counts zeros as copied bytes

    def snapshot(self, number: int) -> None:
        """The guest writes to `snapshotN` from now on."""
        active, new = f"snapshot{number - 1}" if number else "disk0", f"snapshot{number}"
        overlay = linked_clone(self.file, self.target.with_name(new))
        self.add(new, overlay, backing=None)
        self.vm.qmp("blockdev-snapshot", node=active, overlay=new)
        self.file = overlay


def snapshots(move: Move) -> float:
    """The disk, then each snapshot, is copied while the guest writes to the next; once one took
    no longer than the guest may be stopped, it is stopped for the last.
    """
    move.snapshot(0)
    copy = ("qemu-img", "convert", "-U", "-O", "qcow2", "-r", SPEED)
    move.run(*copy, move.source, move.target)
    move.add_target()
    below = {"file": "snapshot0-file", "backing": "target"}
    move.vm.qmp("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "snapshot0", **below}])
    number, took = 0, move.deadline
    while took > LAST:
        began = time.monotonic()
        move.snapshot(number := number + 1)
        into = {"device": f"snapshot{number}", "base_node": "target"}
        move.job("block-commit", **into, top_node=f"snapshot{number - 1}")
        move.end()
        took = time.monotonic() - began
    move.vm.pause()
    move.job("block-commit", **into)
    move.complete()
    move.vm.cont()
    return between(move.vm.events("STOP")[-1], move.vm.events("RESUME")[-1])


def mirror(copy_mode: str, move: Move) -> float:
    size = json.loads(qemu_img("info", "-U", "--output=json", move.source))["virtual-size"]
    blank(move.target, size)
    move.add_target()
    nodes = {"device": "disk0", "target": "target"}
    move.job("blockdev-mirror", **nodes, sync="full", copy_mode=copy_mode)
    move.complete()
    states = {e["data"]["status"]: e for e in move.vm.events("JOB_STATUS_CHANGE")}
    return between(states["waiting"], states["concluded"])


def seeded(seed: str, move: Move) -> float:
    words = ["promoter", "promote", move.vm.monitor, "--target", move.target, "--seed", seed]
    words += ["--speed", SPEED, "--json", "--state-dir", move.target.with_name("state")]
    (disk,) = json.loads(move.run(*words).splitlines()[-1])["disks"]
    return float(disk["switchover_s"] + (disk["start_pause_s"] or 0))


def between(first: dict[str, Any], last: dict[str, Any]) -> float:
    """Seconds from one of QEMU's events to another."""
    a, b = (e["timestamp"]["seconds"] + e["timestamp"]["microseconds"] / 1e6 for e in (first, last))
    return float(b - a)


WAYS: dict[str, Callable[[Move], float]] = {
    "snapshots, committed": snapshots,
    "dirty bitmap (background)": partial(mirror, "background"),
    "I/O mirroring (write-blocking)": partial(mirror, "write-blocking"),
    "seeded mirroring, convert": partial(seeded, "convert"),
    "seeded mirroring, reflink": partial(seeded, "reflink"),
}


def load(directory: Path, whole: bool) -> Table:
    measures = [TIME, Measure("downtime, ms", 1), Measure("worst write, ms")]
    table = Table(measures, "I/O mirroring (write-blocking)")
    loads = list(LOADS) if whole else ["no load", "twice the load"]
    with file_system("xfs", directory, 4 * GIB) as xfs:
        lowest = Path(shutil.copy(base(), xfs))
        for name in loads:
            for way in turns(list(WAYS), 3 if whole else 1):
                turn = xfs / "turn"
                turn.mkdir()
                figures = run(turn, lowest, LOADS[name], WAYS[way], 90 if whole else 40)
                table.add(name, way, *figures)
                shutil.rmtree(turn)
    return table


def run(
    turn: Path,
    lowest: Path,
    writer: dict[str, object],
    way: Callable[[Move], float],
    longest: float,
) -> tuple[float, ...]:
    """Seconds, and in milliseconds downtime and the guest's worst write; nothing: no end."""
    disk = linked_clone(lowest, turn / "disk.qcow2")
    figures: tuple[float, ...] = ()
    with VM(turn, [Disk(disk)], writer=writer) as vm:
        as_a_host_runs_it(vm)
        vm.wait_for_acks(5)
        began = time.monotonic()
        move = Move(vm, disk, turn / "target.qcow2", began + longest)
        with suppress(TimeoutError), writes(vm.log) as written:
            downtime = way(move)
            took, move.file = time.monotonic() - began, move.target
            vm.wait_for_acks(5)
            figures = took, downtime * 1000
        vm.kill()
    records.check(move.file, "qcow2", vm.log).raise_if_bad()
    return (*figures, max(write.took for write in written) * 1000) if figures else ()
