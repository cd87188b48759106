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
from itertools import count
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
LAST = 0.5


@dataclass
class Move:
    """Of the guest's disk, from `disk0` on the clone to `target`; until a `deadline`, after which
    TimeoutError is raised. `file` is what the guest has now.
    """

    vm: VM
    file: Path
    target: Path
    deadline: float

    def mirror(self, copy_mode: str) -> None:
        self.vm.qmp(
            "blockdev-mirror",
            job_id="job",
            device="disk0",
            target="target",
            sync="full",
            speed=SPEED,
            copy_mode=copy_mode,
        )
        self.complete()

    def complete(self) -> None:
        self.until(lambda: self.jobs()[0]["ready"])
        self.vm.qmp("job-complete", id="job")
        self.until(lambda: not self.jobs())

    def jobs(self) -> Any:
        return self.vm.qmp("query-block-jobs")

    def until(self, condition: Callable[[], bool]) -> None:
        wait_for(condition, "the job", self.deadline - time.monotonic())

    def snapshot(self, number: int) -> None:
        """The guest writes to `snapshotN` from now on."""
        active, new = f"snapshot{number - 1}" if number else "disk0", f"snapshot{number}"
        file = {
            "driver": "file",
            "filename": str(self.target.with_name(new)),
            "node-name": f"{new}-file",
        }
        self.file = linked_clone(self.file, self.target.with_name(new))
        self.vm.qmp("blockdev-add", driver="qcow2", node_name=new, file=file, backing=None)
        self.vm.qmp("blockdev-snapshot", node=active, overlay=new)

    def copy_below(self) -> None:
        """The target is what the first snapshot is a snapshot of."""
        self.vm.qmp(
            "blockdev-backup",
            job_id="job",
            device="disk0",
            target="target",
            sync="full",
            speed=SPEED,
        )
        self.until(lambda: not self.jobs())
        new = {
            "driver": "qcow2",
            "node-name": "snapshot0",
            "file": "snapshot0-file",
            "backing": "target",
        }
        self.vm.qmp("blockdev-reopen", options=[new])

    def commit(self, active: int, **top: str) -> None:
        """Everything below the top, or the active snapshot itself, goes into the target."""
        self.vm.qmp(
            "block-commit",
            job_id="job",
            device=f"snapshot{active}",
            base_node="target",
            speed=SPEED,
            **top,
        )


def snapshots(move: Move) -> float:
    """The disk, then each snapshot, is copied while the guest writes to the next; the guest is
    stopped for the last, once one took no longer than it may be stopped.
    """
    add_target(move)
    move.snapshot(0)
    move.copy_below()
    for number in count(1):
        move.snapshot(number)
        began = time.monotonic()
        move.commit(number, top_node=f"snapshot{number - 1}")
        move.until(lambda: not move.jobs())
        if time.monotonic() - began < LAST:
            break
    move.vm.pause()
    move.commit(number)
    move.complete()
    move.vm.cont()
    return between(move.vm.events("STOP")[-1], move.vm.events("RESUME")[-1])


def mirror(copy_mode: str, move: Move) -> float:
    add_target(move)
    move.mirror(copy_mode)
    states = {e["data"]["status"]: e for e in move.vm.events("JOB_STATUS_CHANGE")}
    return between(states["waiting"], states["concluded"])


def add_target(move: Move) -> None:
    size = json.loads(qemu_img("info", "-U", "--output=json", move.file))["virtual-size"]
    file = {"driver": "file", "filename": str(blank(move.target, size))}
    # Without discard a job counts zeros as bytes that it copies.
    move.vm.qmp("blockdev-add", driver="qcow2", node_name="target", file=file, discard="unmap")


def between(first: dict[str, Any], last: dict[str, Any]) -> float:
    """Seconds from one of QEMU's events to another."""
    a, b = (e["timestamp"]["seconds"] + e["timestamp"]["microseconds"] / 1e6 for e in (first, last))
    return float(b - a)


def seeded(seed: str, move: Move) -> float:
    words = ["promoter", "promote", move.vm.monitor, "--target", move.target, "--seed", seed]
    words += ["--speed", SPEED, "--json", "--state-dir", move.target.with_name("state")]
    try:
        said = subprocess.run(
            list(map(str, words)),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=move.deadline - time.monotonic(),
        ).stdout
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(*error.args) from error
    (disk,) = json.loads(said.splitlines()[-1])["disks"]
    return float(disk["switchover_s"] + (disk["start_pause_s"] or 0))


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
                figures = run(turn, lowest, LOADS[name], WAYS[way], 120 if whole else 45)
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
