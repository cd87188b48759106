"""What the guest feels of a promotion: its own writes, by the time that its writer notes."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
from itertools import pairwise
from pathlib import Path

from ci.benchmarks.harness import Measure, Table, as_a_host_runs_it, file_system_of, turns, writes
from ci.benchmarks.promote import GIB, filled
from tests import records
from tests.vm import MIB, VM, Disk, base, file_system, linked_clone

PARTITIONS = 256 * MIB  # the guest's end before
SEED = "seed"
STEPS = {"mirror (disk 0)": "mirror", "switch over": "switchover", "dismiss (disk 0)": "after"}
MEASURES = [
    Measure("records a second"),
    Measure("p50, ms", 1),
    Measure("p99, ms", 1),
    Measure("worst, ms", 1),
]


def guest(directory: Path, whole: bool) -> Table:
    """A guest that writes without a limit, before, in each step of, and after a promotion."""
    table = Table(MEASURES, "before")
    size = (4 if whole else 1) * GIB
    with file_system("xfs", directory, 3 * size + 2 * GIB) as xfs:
        places = {"convert": directory, "reflink": xfs}
        for place in places.values():
            lowest = Path(shutil.copy(base(), place / "base.qcow2"))
            subprocess.run(["qemu-img", "resize", "-q", lowest, str(PARTITIONS + size)], check=True)
            filled(lowest, size, 1, PARTITIONS)
        for seed in turns(list(places), 5 if whole else 2):
            group = f"{file_system_of(places[seed])}, {seed}"
            for phase, figures in phases(places[seed], seed, 15 if whole else 6).items():
                table.add(group, phase, *figures)
    return table


def phases(place: Path, seed: str, idle: float) -> dict[str, tuple[float, ...]]:
    """A table's figures of each phase, with as many seconds as an idle guest is watched for."""
    turn = place / "turn"
    turn.mkdir()
    disk, target = linked_clone(place / "base.qcow2", turn / "disk.qcow2"), turn / "target.qcow2"
    with VM(turn, [Disk(disk)], writer={"rate": 0}) as vm:
        as_a_host_runs_it(vm)
        vm.wait_for_acks(100)
        with writes(vm.log) as written:
            began = {"before": time.monotonic()}
            time.sleep(idle)
            began[SEED] = time.monotonic()
            words = ["promoter", "promote", vm.monitor, "--target", target, "--seed", seed]
            words += ["--json", "--state-dir", turn / "state"]
            with subprocess.Popen(
                list(map(str, words)), stdout=subprocess.PIPE, text=True
            ) as promotion:
                assert promotion.stdout
                for line in promotion.stdout:
                    if phase := STEPS.get(json.loads(line).get("action")):
                        began[phase] = time.monotonic()
            assert promotion.returncode == 0
            time.sleep(idle)
            ends = [*began.values(), time.monotonic()]
        vm.kill()
    records.check(target, "qcow2", vm.log).raise_if_bad()
    shutil.rmtree(turn)
    spans = dict(zip(began, pairwise(ends), strict=True))
    spans["seed to switchover"] = began[SEED], began["after"]
    return {
        phase: figures_of([w.took * 1000 for w in written if start <= w.heard < end], end - start)
        for phase, (start, end) in spans.items()
    }


def figures_of(took: list[float], seconds: float) -> tuple[float, ...]:
    """Of writes that took so many milliseconds each."""
    p99 = sorted(took)[int(len(took) * 0.99)]
    return len(took) / seconds, statistics.median(took), p99, max(took)
