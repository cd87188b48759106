"""The command itself: from its start to its end, and the memory it takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ci.benchmarks.harness import TIME, Measure, Table, turns
from tests.vm import MIB, VM, Disk, base, linked_clone

MEASURE = """
import resource, subprocess, sys, time
began = time.monotonic()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def commands(directory: Path, whole: bool) -> Table:
    table = Table([TIME, Measure("memory, MiB")])
    with VM(directory, [Disk(linked_clone(base(), directory / "root"))]) as vm:
        vm.wait_for_acks(20)
        asked = ("--version", "--help", "chain SOCKET", "chain SOCKET --json")
        for words in turns(asked, 30 if whole else 15):
            given = [str(vm.monitor) if word == "SOCKET" else word for word in words.split()]
            took, memory = measured(["promoter", *given])
            table.add("", f"`promoter {words}`", took, memory / MIB)
    return table


def measured(command: Sequence[str]) -> tuple[float, int]:
    """A command's seconds, and the most bytes of memory that it had."""
    told = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, *command], check=True, capture_output=True, text=True
    )
    took, memory = told.stdout.split()
    return float(took), int(memory) * 1024
