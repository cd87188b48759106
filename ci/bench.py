"""How long promote takes by each seed, and how long the guest's I/O stands still.

Everything is compared within one run on one guest that writes all the while. The seeds take
turns, so that a machine whose speed drifts is as unfair to one as to another.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests import records
from tests.vm import MIB, VM, Disk, base, blank, linked_clone

BASE, DELTA, SIZE, STEP = 2048 * MIB, 256 * MIB, 3072 * MIB, 64 * MIB
SEEDS = ("none", "copy", "convert")
ROUNDS = 3
SWITCHOVERS = 20


def promote(state: Path, vm: VM, *options: object) -> dict[str, Any]:
    """The disk's part of promoter's result."""
    command = ["promoter", "promote", vm.monitor, *options, "--json", "--state-dir", state]
    words = list(map(str, command))
    out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    (disk,) = json.loads(out.splitlines()[-1])["disks"]
    return dict(disk)


def filled(disk: Path, size: int, pattern: int) -> Path:
    writes = (f"write -q -P {pattern} {offset} {STEP}" for offset in range(0, size, STEP))
    commands = (word for write in writes for word in ("-c", write))
    subprocess.run(["qemu-io", "-t", "none", *commands, str(disk)], check=True)
    return disk


def seconds_by_seed(directory: Path) -> dict[str, list[float]]:
    """Promotions of a data disk, of which the guest's system disk is independent."""
    root = linked_clone(base(), directory / "system.qcow2")
    below = filled(blank(directory / "data-base.qcow2", SIZE), BASE, 1)
    taken = defaultdict(list)
    for number in range(ROUNDS):
        for seed in SEEDS:
            data = linked_clone(below, directory / "data.qcow2")
            filled(data, DELTA, 2)
            target = directory / "target.qcow2"
            with VM(directory, [Disk(root), Disk(data)]) as vm:
                vm.wait_for_acks(20)
                options = ["vd1", "--seed", seed, "--target", target]
                disk = promote(directory / "state", vm, *options)
            taken[seed].append(float(disk["duration_s"]))
            print(f"round {number + 1}, seed {seed}: {disk['duration_s']:.2f} s", file=sys.stderr)
            for left in (*directory.glob("data.qcow2*"), target):
                left.unlink()
    return taken


def pauses(directory: Path) -> list[float]:
    """One guest, made a linked clone again by a snapshot after every promotion."""
    system = linked_clone(base(), directory / "paused.qcow2")
    found = []
    with VM(directory, [Disk(system)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(100)
        node, disk = "disk0", system
        for number in range(SWITCHOVERS):
            promoted = promote(directory / "state", vm)
            found.append(float(promoted["switchover_s"]))
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
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        taken = seconds_by_seed(Path(name))
        print(f"| seed | median of {ROUNDS}, s | least | most | against `none` |")
        print("|---|---|---|---|---|")
        mirrored = statistics.median(taken["none"])
        for seed, times in taken.items():
            median = statistics.median(times)
            figures = f"{median:.2f} | {min(times):.2f} | {max(times):.2f}"
            print(f"| {seed} | {figures} | {median / mirrored:.2f} |")
    with tempfile.TemporaryDirectory() as name:
        found = pauses(Path(name))
        median, worst = statistics.median(found) * 1000, max(found) * 1000
        print(
            f"\nswitchover, {len(found)} promotions: median {median:.1f} ms, worst {worst:.1f} ms"
        )


if __name__ == "__main__":
    main()
