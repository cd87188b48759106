"""How long promote, consolidate and a disk's handover take; how long the guest stands still for it.

Everything is compared within one run on one guest that writes all the while. What is compared
takes turns, so that a machine whose speed drifts is as unfair to one as to another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import libvirt

from promoter.guests.qmp import QmpGuest
from tests import records
from tests.domains import Domain, Libvirtd
from tests.test_lease_handover import ToAndFro, two_hosts, two_namespaces
from tests.vm import MIB, VM, Bus, Disk, base, blank, file_system, linked_clone

STEP = 64 * MIB
GIB = 1024 * MIB
ROUNDS = 3
SWITCHOVERS = 20
HANDOVERS = 12
UNPLUGS = 7
STARTS = 15
XFS = 24 * GIB
PEER_BASES = (1 * GIB, 4 * GIB)
VIRSH = ["virsh", "blockcopy", "--dest", "{target}", "--format", "qcow2"]
VIRSH += ["--transient-job", "--wait", "--pivot"]
PEERS = {
    "virsh blockcopy": VIRSH,
    "virsh blockcopy --synchronous-writes": [*VIRSH, "--synchronous-writes"],
    "promoter promote": [
        *("promoter", "promote", "--target", "{target}"),
        *("--quiet", "--state-dir", "{state}"),
    ],
}
OFFLINE = "qemu-img convert -O qcow2 -W -m 16 -t writeback"
UNION = 128 * MIB
DEPTHS = (2, 5, 20)
CONSOLIDATIONS = 7
LONGEST_COMMIT = 300.0
MEASURE = """
import resource, subprocess, sys, time
began = time.monotonic()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
COMMITS = {
    "virsh blockcommit": [
        *("virsh", "blockcommit", "--base", "{base}"),
        *("--active", "--wait", "--pivot"),
    ],
    "promoter consolidate": ["promoter", "consolidate", "--json", "--state-dir", "{state}"],
}

SLOW = {
    "virsh blockcommit": ["--bandwidth", "3"],
    "promoter consolidate": ["--speed", "3M", "--max-pause", "500ms"],
}
SOON = 60.0


@dataclass(frozen=True)
class Case:
    """A row of a table: what is promoted, sizes in bytes, and the seed that it must be by.

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
GROWTH = [Case(f"{size} GiB", size * GIB, 128 * MIB, "reflink", auto=True) for size in (1, 8)]
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


def filled(disk: Path, size: int, pattern: int) -> Path:
    writes = (f"write -q -P {pattern} {offset} {STEP}" for offset in range(0, size, STEP))
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


def seconds(directory: Path, root: Path, case: Case) -> float:
    """One promotion of a data disk, of which the guest's system disk is independent."""
    data = filled(linked_clone(below(directory, case), directory / "data.qcow2"), case.delta, 2)
    target = directory / "target.qcow2"
    with VM(directory, [Disk(root), Disk(data)]) as vm:
        vm.wait_for_acks(20)
        options = ["vd1", "--seed", "auto" if case.auto else case.seed, "--target", target]
        disk = promote(directory / "state", vm, *options)
    assert disk["seed"] == case.seed, f"the seed was {disk['seed']}, not {case.seed}"
    for left in (*directory.glob("data.qcow2*"), target):
        left.unlink()
    return float(disk["duration_s"])


def compare(directory: Path, cases: Sequence[Case]) -> None:
    root = linked_clone(base(), directory / "system.qcow2")
    for case in cases:
        below(directory, case)
    os.sync()  # or the first promotion waits for what was written here
    taken = defaultdict(list)
    for number in range(ROUNDS):
        for case in cases:
            took = seconds(directory, root, case)
            taken[case.name].append(took)
            print(f"round {number + 1}, {case.name}: {took:.2f} s", file=sys.stderr)
    first = statistics.median(taken[cases[0].name])
    print(f"| | median of {ROUNDS}, s | least | most | against {cases[0].name} |")
    print("|---|---|---|---|---|")
    for name, times in taken.items():
        median = statistics.median(times)
        figures = f"{median:.2f} | {min(times):.2f} | {max(times):.2f}"
        print(f"| {name} | {figures} | {median / first:.2f} |")


def domains(directory: Path) -> None:
    """``virsh blockcopy`` and promoter in turns, on the data disk of a libvirt domain."""
    libvirt.registerErrorHandler(lambda *_: None, None)  # it prints what it raises too
    with file_system("xfs", directory, XFS) as xfs:
        for kind, place in ((file_system_of(directory), directory), ("XFS", xfs)):
            compare_on(place, kind)


def file_system_of(directory: Path) -> str:
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(directory)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def compare_on(mounted: Path, kind: str) -> None:
    with (
        Libvirtd(mounted) as libvirtd,  # whose mounts are those of its beginning
        Domain(libvirtd, mounted, [Disk(linked_clone(base(), mounted / "root"))]) as domain,
    ):
        domain.wait_for_acks(20)
        for size in PEER_BASES:
            against_virsh(mounted, kind, domain, size)


def against_virsh(directory: Path, kind: str, domain: Domain, size: int) -> None:
    case = Case(f"{kind}, {size // GIB} GiB", size, round(size / 10 / STEP) * STEP, "auto")
    below(directory, case)
    os.sync()
    tools = [*PEERS, OFFLINE]
    taken: dict[str, list[float]] = {tool: [] for tool in tools}
    for number in range(ROUNDS):
        for tool in tools[number:] + tools[:number]:
            if tool == OFFLINE:
                took = offline_seconds(directory, case)
            else:
                took = domain_seconds(directory, domain, case, tool)
            taken[tool].append(took)
            print(f"round {number + 1}, {case.name}, {tool}: {took:.2f} s", file=sys.stderr)
    ours = statistics.median(taken["promoter promote"])
    print(f"| {case.name} | median of {ROUNDS}, s | least | most | times promoter's |")
    print("|---|---|---|---|---|")
    for tool, times in taken.items():
        median = statistics.median(times)
        figures = f"{median:.2f} | {min(times):.2f} | {max(times):.2f}"
        print(f"| {tool} | {figures} | {median / ours:.1f} |", flush=True)


def domain_seconds(directory: Path, domain: Domain, case: Case, tool: str) -> float:
    """From the command's start to its end, for a linked clone that was just plugged in."""
    data = filled(linked_clone(below(directory, case), directory / "data.qcow2"), case.delta, 2)
    target = directory / "target.qcow2"
    words = [word.format(target=target, state=directory / "state") for word in PEERS[tool]]
    target_name = domain.plug(Disk(data))
    os.sync()  # or it waits for what was written here
    began = time.monotonic()
    subprocess.run(
        [*words[:2], domain.name, target_name, *words[2:]],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "LIBVIRT_DEFAULT_URI": domain.libvirtd.uri},
    )
    took = time.monotonic() - began
    assert domain.files()[1:] == domain.next_boot()[1:] == [str(target)]
    domain.unplug(target_name)
    for left in (*directory.glob("data.qcow2*"), target):
        left.unlink()
    return took


def offline_seconds(directory: Path, case: Case) -> float:
    """The same chain copied while nobody has it open."""
    data = filled(linked_clone(below(directory, case), directory / "data.qcow2"), case.delta, 2)
    target = directory / "target.qcow2"
    os.sync()  # or it waits for what was written here
    began = time.monotonic()
    subprocess.run([*OFFLINE.split(), str(data), str(target)], check=True)
    took = time.monotonic() - began
    for left in (data, target):
        left.unlink()
    return took


@dataclass(frozen=True)
class Merged:
    """One merge: its time from the command's start to its end, and for how long no record of the
    guest's was acknowledged meanwhile, in seconds. promoter also tells for how long the guest was
    suspended, and how many bytes were copied.
    """

    took: float
    silence: float
    pause: float | None = None
    copied: int | None = None


def consolidate(directory: Path) -> None:
    """``virsh blockcommit`` and promoter in turns, on the disk that a libvirt domain writes to.

    Every delta but the active one holds all of the same data, which the guest does not touch.
    """
    libvirt.registerErrorHandler(lambda *_: None, None)  # it prints what it raises too
    with Libvirtd(directory) as libvirtd:
        for depth in DEPTHS:
            found: dict[str, list[Merged | None]] = {tool: [] for tool in COMMITS}
            layers = deltas(directory / f"{depth}-deltas", depth)
            for number in range(CONSOLIDATIONS):
                tools = list(COMMITS)[:: -1 if number % 2 else 1]
                for tool in tools:
                    merged = merge(directory / "turn", libvirtd, layers, COMMITS[tool])
                    found[tool].append(merged)
                    print(f"round {number + 1}, {depth} deltas, {tool}: {merged}", file=sys.stderr)
            show_merges(depth, found)


def deltas(directory: Path, depth: int) -> list[Path]:
    """The layer to merge into, which is empty, and the deltas above it; by names in `turn`."""
    turn = directory.parent / "turn"
    turn.mkdir()
    directory.mkdir()
    layers = [linked_clone(base(), turn / "target.qcow2")]
    size = 256 * MIB + UNION  # behind the guest's partitions
    subprocess.run(["qemu-img", "resize", "-q", str(layers[0]), str(size)], check=True)
    for number in range(1, depth):
        layers.append(linked_clone(layers[-1], turn / f"delta{number}.qcow2"))
        write = f"write -q -P {number} {256 * MIB} {UNION}"
        subprocess.run(["qemu-io", "-t", "none", "-c", write, str(layers[-1])], check=True)
    for layer in layers:
        layer.rename(directory / layer.name)
    turn.rmdir()
    return [directory / layer.name for layer in layers]


def convergence(directory: Path) -> None:
    """A guest that writes faster than is copied: what merges the delta above it, and ends?"""
    libvirt.registerErrorHandler(lambda *_: None, None)  # it prints what it raises too
    found: dict[str, list[Merged | None]] = {tool: [] for tool in COMMITS}
    with Libvirtd(directory) as libvirtd:
        layers = deltas(directory / "layers", 1)
        for number in range(ROUNDS):
            for tool, words in COMMITS.items():
                merged = merge(directory / "turn", libvirtd, layers, [*words, *SLOW[tool]], SOON)
                found[tool].append(merged)
                print(f"round {number + 1}, {tool}: {merged}", file=sys.stderr)
    show_merges(1, found)


def merge(
    turn: Path,
    libvirtd: Libvirtd,
    layers: Sequence[Path],
    words: Sequence[str],
    longest: float = LONGEST_COMMIT,
) -> Merged | None:
    """One merge, of deltas that all turns have, into a layer of its own; None: it did not end."""
    turn.mkdir()
    target = Path(shutil.copy(layers[0], turn))
    for layer in layers[1:]:
        (turn / layer.name).hardlink_to(layer)
    active = linked_clone(turn / layers[-1].name, turn / "active.qcow2")
    with Domain(libvirtd, turn, [Disk(active)]) as domain:
        domain.wait_for_acks(100)
        os.sync()  # or it waits for what was written here
        given = [word.format(base=target, state=turn / "state") for word in words]
        found = timed(domain, given, longest)
        if found:
            assert domain.files() == domain.next_boot() == [str(target)]
            domain.wait_for_acks(20)
            domain.kill()
            records.check(target, "qcow2", domain.log).raise_if_bad()
    shutil.rmtree(turn)
    return found


def timed(domain: Domain, words: Sequence[str], longest: float) -> Merged | None:
    environment = {**os.environ, "LIBVIRT_DEFAULT_URI": domain.libvirtd.uri}
    with watched(domain.log) as silence:
        began = time.monotonic()
        try:
            said = subprocess.run(
                [*words[:2], domain.name, "vda", *words[2:]],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                timeout=longest,
            ).stdout
        except subprocess.TimeoutExpired:
            return None
        took = time.monotonic() - began
    if words[0] != "promoter":
        return Merged(took, max(silence))
    (disk,) = json.loads(said.splitlines()[-1])["disks"]
    return Merged(took, max(silence), disk["switchover_s"], disk["mirrored_bytes"])


@contextmanager
def watched(log: Path) -> Iterator[list[float]]:
    """For how many seconds a file did not grow, each time that it grew."""
    silences: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        size, since = log.stat().st_size, time.monotonic()
        while not ended.wait(0.002):
            if (now := log.stat().st_size) != size:
                silences.append(time.monotonic() - since)
                size, since = now, time.monotonic()

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield silences
    finally:
        ended.set()
        watching.join()


def show_merges(depth: int, found: dict[str, list[Merged | None]]) -> None:
    print(f"| {depth} deltas | ended | median, s (least, most) | against virsh", end="")
    print(" | no record for, ms: median (most) | suspended, ms | copied, MiB |")
    print("|---|---|---|---|---|---|---|")
    theirs = [run.took for run in next(iter(found.values())) if run]
    for tool, all_runs in found.items():
        runs = [run for run in all_runs if run]
        ended = f"{len(runs)} of {len(all_runs)}"
        if not runs:
            print(f"| {tool} | {ended} | | | | | |", flush=True)
            continue
        took, silence = [run.took for run in runs], [run.silence * 1000 for run in runs]
        median = statistics.median(took)
        ratio = f"{median / statistics.median(theirs):.2f}" if theirs else ""
        figures = f"{median:.2f} ({min(took):.2f}, {max(took):.2f}) | {ratio}"
        figures += f" | {statistics.median(silence):.0f} ({max(silence):.0f})"
        pauses = [run.pause * 1000 for run in runs if run.pause is not None]
        copied = [run.copied / MIB for run in runs if run.copied is not None]
        figures += f" | {statistics.median(pauses):.0f} ({max(pauses):.0f})" if pauses else " |"
        figures += f" | {statistics.median(copied):.0f} ({max(copied):.0f})" if copied else " |"
        print(f"| {tool} | {ended} | {figures} |", flush=True)


def pauses(directory: Path) -> None:
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
    median, worst = statistics.median(found) * 1000, max(found) * 1000
    print(f"switchover, {len(found)} promotions: median {median:.1f} ms, worst {worst:.1f} ms")


def handover(directory: Path) -> None:
    """Between two hosts with agents, in network namespaces of their own, over one pool."""
    print("| policy | begun | closed | claimed | opened: p50 | p99 |\n|---|---|---|---|---|---|")
    for policy in ("detach", "loan", "close"):
        turn = directory / policy
        turn.mkdir()
        with two_namespaces() as network, two_hosts(turn, network) as hosts:
            disk = ToAndFro(turn, hosts, policy)
            disk.next()
            for number in range(HANDOVERS):
                (disk.lend if policy == "loan" else disk.next)()
                print(f"{policy} {number + 1}: {disk.times[-1]}", file=sys.stderr)
            disk.end()
        parts = zip(*map(astuple, disk.times), strict=True)
        *middle, opened = [sorted(part) for part in parts]
        medians = " | ".join(f"{statistics.median(part):.0f}" for part in [*middle, opened])
        print(f"| `{policy}` | {medians} | {opened[int(len(opened) * 0.99)]:.0f} |", flush=True)
    for bus in (Bus.SCSI, Bus.VIRTIO):
        took = [1000 * seconds for seconds in unplugged(directory / bus.name, bus)]
        print(f"{bus.value}: the guest's own part of `detach`: median", end=" ")
        print(f"{statistics.median(took):.0f} ms, most {max(took):.0f} ms", flush=True)


def unplugged(directory: Path, bus: Bus) -> list[float]:
    """For how long a guest, in seconds, keeps a disk that it is asked to give up."""
    directory.mkdir()
    disks = [linked_clone(base(), directory / "root"), blank(directory / "data", 8 * MIB)]
    with VM(directory, [Disk(disk, bus=bus) for disk in disks]) as vm:
        vm.wait_for_acks(20)
        return [unplug(vm, bus) for _ in range(UNPLUGS)]


def unplug(vm: VM, bus: Bus) -> float:
    async def work() -> float:
        guest = await QmpGuest.connect(vm.monitor)
        began = time.monotonic()
        await guest.unplug("/machine/peripheral/vd1")
        took = time.monotonic() - began
        await guest.close()
        return took

    took = asyncio.run(work())
    scsi = {"driver": "scsi-hd", "bus": "host1.0"}
    device = scsi if bus is Bus.SCSI else {"driver": "virtio-blk-pci"}
    vm.qmp("device_add", id="vd1", drive="disk1", **device)
    vm.wait_for_acks(100)  # it finds the disk meanwhile
    return took


def commands(directory: Path) -> None:
    """The command itself, with a guest that writes all the while."""
    print("| command | median, s (least, most) | memory, MiB |\n|---|---|---|")
    with VM(directory, [Disk(linked_clone(base(), directory / "root"))]) as vm:
        vm.wait_for_acks(20)
        for words in (
            ["--version"],
            ["--help"],
            ["chain", vm.monitor],
            ["chain", "--json", vm.monitor],
        ):
            runs = [measured(["promoter", *map(str, words)]) for _ in range(STARTS)]
            took, memory = zip(*runs, strict=True)
            shown = " ".join(str(word) for word in words if word != vm.monitor)
            times = f"{statistics.median(took):.2f} ({min(took):.2f}, {max(took):.2f})"
            print(f"| `promoter {shown}` | {times} | {max(memory) / MIB:.0f} |", flush=True)


def measured(command: Sequence[str]) -> tuple[float, int]:
    """A command's seconds, and the most bytes of memory that it had."""
    told = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, *command], check=True, capture_output=True, text=True
    )
    took, memory = told.stdout.split()
    return float(took), int(memory) * 1024


def on_xfs(directory: Path, cases: Sequence[Case]) -> None:
    with file_system("xfs", directory, XFS) as mounted:
        compare(mounted, cases)


TABLES = {
    "seeds": lambda directory: compare(directory, SEEDS),
    "growth": lambda directory: on_xfs(directory, GROWTH),
    "chains": lambda directory: on_xfs(directory, CHAINS),
    "pauses": pauses,
    "domains": domains,
    "consolidate": consolidate,
    "convergence": convergence,
    "handover": handover,
    "commands": commands,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="ci/bench")
    parser.add_argument("table", nargs="*", default=list(TABLES), help=", ".join(TABLES))
    tables = parser.parse_args().table
    if unknown := set(tables) - set(TABLES):
        parser.error(f"no such table: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up
    for name in tables:
        with tempfile.TemporaryDirectory() as directory:
            print(f"\n{name}\n", flush=True)
            TABLES[name](Path(directory))


if __name__ == "__main__":
    main()
