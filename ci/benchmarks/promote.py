"""promoter's own promotions: by what seed, on what base, and how long the guest stands still."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ci.benchmarks.harness import TIME, Measure, Table, turns
from tests import records
from tests.vm import MIB, VM, Disk, base, blank, file_system, linked_clone

STEP = 64 * MIB
GIB = 1024 * MIB


@dataclass(frozen=True)
class Case:
    """What is promoted, sizes in bytes, and the seed that it must be by.

    The base's data ends 1 GiB before the disk. With a `middle` it is a clone of a clone; a
    layer's data is at the beginning of the disk.
    """

    name: str
    base: int
    delta: int
    seed: str
    auto: bool = False
    middle: int = 0


SEEDS = [Case(seed, 2 * GIB, 256 * MIB, seed) for seed in ("none", "copy", "convert")]
GROWTH = [Case(f"{size} GiB", size * GIB, 128 * MIB, "reflink", auto=True) for size in (1, 8, 16)]
CHAINS = [
    *(replace(case, middle=64 * MIB) for case in GROWTH),
    Case("8 GiB, convert", 8 * GIB, 128 * MIB, "convert", middle=64 * MIB),
]


def promote(state: Path, vm: VM, *options: object) -> dict[str, Any]:
    """The disk's part of promoter's result."""
    command = ["promoter", "promote", vm.monitor, *options, "--json", "--state-dir", state]
    words = list(map(str, command))
    out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    (disk,) = json.loads(out.splitlines()[-1])["disks"]
    return dict(disk)


def filled(disk: Path, size: int, pattern: int, start: int = 0) -> Path:
    steps = [(at, min(STEP, size - at)) for at in range(0, size, STEP)]
    writes = (f"write -q -P {pattern} {start + at} {length}" for at, length in steps)
    commands = (word for write in writes for word in ("-c", write))
    subprocess.run(["qemu-io", "-t", "none", *commands, str(disk)], check=True)
    return disk


def below(directory: Path, case: Case) -> Path:
    """What the case's disk is a linked clone of; made once."""
    lowest = directory / f"base-{case.base}.qcow2"
    if not lowest.exists():
        filled(blank(lowest, case.base + GIB), case.base, 1)
    if not case.middle:
        return lowest
    middle = directory / f"middle-{case.base}-{case.middle}.qcow2"
    return middle if middle.exists() else filled(linked_clone(lowest, middle), case.middle, 3)


def clone(directory: Path, case: Case) -> Path:
    """The case's disk, anew."""
    return filled(linked_clone(below(directory, case), directory / "data.qcow2"), case.delta, 2)


def seconds(directory: Path, root: Path, case: Case) -> float:
    """One promotion of a data disk, of which the guest's system disk is independent."""
    data = clone(directory, case)
    target = directory / "target.qcow2"
    with VM(directory, [Disk(root), Disk(data)]) as vm:
        vm.wait_for_acks(20)
        options = ["vd1", "--seed", "auto" if case.auto else case.seed, "--target", target]
        disk = promote(directory / "state", vm, *options)
    assert disk["seed"] == case.seed, f"the seed was {disk['seed']}, not {case.seed}"
    for left in (*directory.glob("data.qcow2*"), target):
        left.unlink()
    return float(disk["duration_s"])


def compare(directory: Path, cases: Sequence[Case], rounds: int) -> Table:
    table = Table([TIME], cases[0].name)
    root = linked_clone(base(), directory / "system.qcow2")
    for case in cases:
        below(directory, case)
    os.sync()  # or the first promotion waits for what was written here
    for case in turns(cases, rounds):
        table.add("", case.name, seconds(directory, root, case))
    return table


def seeds(directory: Path, whole: bool) -> Table:
    return compare(directory, SEEDS, 5 if whole else 3)


def on_xfs(directory: Path, cases: Sequence[Case], whole: bool) -> Table:
    chosen = [case for case in cases if whole or (case.base <= 8 * GIB and case.seed != "convert")]
    with file_system("xfs", directory, 64 * GIB) as mounted:
        return compare(mounted, chosen, 5 if whole else 3)


def growth(directory: Path, whole: bool) -> Table:
    return on_xfs(directory, GROWTH, whole)


def chains(directory: Path, whole: bool) -> Table:
    return on_xfs(directory, CHAINS, whole)


def pauses(directory: Path, whole: bool) -> Table:
    """One guest, made a linked clone again by a snapshot after every promotion."""
    table = Table([Measure("switchover, ms", 1)])
    system = linked_clone(base(), directory / "paused.qcow2")
    with VM(directory, [Disk(system)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(100)
        node, disk = "disk0", system
        for number in range(50 if whole else 12):
            promoted = promote(directory / "state", vm)
            table.add("", "promoter promote", promoted["switchover_s"] * 1000)
            disk, node = directory / f"snapshot{number}.qcow2", promoted["node"]
            vm.qmp(
                "blockdev-snapshot-sync",
                node_name=node,
                snapshot_file=str(disk),
                snapshot_node_name=f"snapshot{number}",
                format="qcow2",
            )
            vm.wait_for_acks(100)
        vm.kill()
    records.check(disk, "qcow2", vm.log).raise_if_bad()
    return table
