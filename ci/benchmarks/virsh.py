"""What a user of libvirt would take instead, in turns with promoter, on domains that write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

from ci.benchmarks.harness import TIME, Measure, Table, file_system_of, turns, writes
from ci.benchmarks.promote import GIB, Case, below, clone, filled
from tests import records
from tests.domains import Domain, Libvirtd
from tests.vm import MIB, Disk, base, file_system, linked_clone

OURS = "promoter promote"
COPY = ["virsh", "blockcopy", "--dest", "{target}", "--format", "qcow2"]
COPY += ["--transient-job", "--wait", "--pivot"]
PULL = ["virsh", "blockpull", "--wait"]
PROMOTE = ["promoter", "promote", "--target", "{target}", "--quiet", "--state-dir", "{state}"]
CONVERT = ["qemu-img", "convert", "-O", "qcow2", "-W", "-m", "16"]
PEERS = {
    "virsh blockcopy": COPY,
    "virsh blockcopy --synchronous-writes": [*COPY, "--synchronous-writes"],
    "virsh blockpull": PULL,
    OURS: PROMOTE,
    "qemu-img convert, offline": [*CONVERT, "-t", "writeback"],
    "qemu-img convert -t none, offline": [*CONVERT, "-t", "none"],
}

MERGES = {
    "virsh blockcommit": [
        *("virsh", "blockcommit", "--base", "{target}"),
        *("--active", "--wait", "--pivot"),
    ],
    "promoter consolidate": ["promoter", "consolidate", "--json", "--state-dir", "{state}"],
}
SLOW = {
    "virsh blockcommit": ["--bandwidth", "3"],
    "promoter consolidate": ["--speed", "3M", "--max-pause", "500ms"],
}
FELT = [TIME, Measure("no record for, ms"), Measure("suspended, ms"), Measure("copied, MiB")]
UNION = 128 * MIB
LONGEST = 300.0
SOON = 60.0


def domains(directory: Path, whole: bool) -> Table:
    """The data disk of a libvirt domain that writes to its other disk."""
    table = Table([TIME], OURS)
    all_cases = list(product((1, 4, 16), (0.01, 0.3)))
    with file_system("xfs", directory, 64 * GIB) as xfs:
        compare(directory, file_system_of(directory), all_cases if whole else [(1, 0.1)], table)
        compare(xfs, "XFS", all_cases if whole else [(2, 0.1)], table)
    return table


def compare(place: Path, kind: str, cases: Sequence[tuple[int, float]], table: Table) -> None:
    """Of bases of so many GiB, and deltas that are a part of it; those that there is room for."""
    with (
        Libvirtd(place) as libvirtd,  # whose mounts are those of its beginning
        Domain(libvirtd, place, [Disk(linked_clone(base(), place / "root"))]) as domain,
    ):
        domain.wait_for_acks(20)
        for size, part in cases:
            delta = round(size * 1024 * part) * MIB
            case = Case(f"{kind}, {size} GiB, delta {part:.0%}", size * GIB, delta, "auto")
            if shutil.disk_usage(place.parent).free < 3 * case.base:
                print(f"{case.name}: no room", file=sys.stderr)
                continue
            lowest = below(place, case)
            for tool in turns(list(PEERS), 1 if size > 4 else 3 if len(cases) > 1 else 2):
                table.add(case.name, tool, seconds(place, domain, case, tool))
            lowest.unlink()


def seconds(directory: Path, domain: Domain, case: Case, tool: str) -> float:
    """From the command's start to its end, for a linked clone that was just plugged in, or that
    nobody has open.
    """
    data, target = clone(directory, case), directory / "target.qcow2"
    words = [word.format(target=target, state=directory / "state") for word in PEERS[tool]]
    if tool.endswith("offline"):
        took = timed([*words, str(data), str(target)])
    else:
        name = domain.plug(Disk(data))
        took = timed([*words[:2], domain.name, name, *words[2:]], domain)
        new = data if words[1] == "blockpull" else target
        assert domain.files()[1:] == domain.next_boot()[1:] == [str(new)]
        domain.unplug(name)
    for left in (*directory.glob("data.qcow2*"), *directory.glob(target.name)):
        left.unlink()
    return took


def timed(words: Sequence[str], domain: Domain | None = None) -> float:
    os.sync()  # or it waits for what was written before
    began = time.monotonic()
    environment = {**os.environ, "LIBVIRT_DEFAULT_URI": domain.libvirtd.uri} if domain else None
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - began


def consolidate(directory: Path, whole: bool) -> Table:
    """The disk that a libvirt domain writes to.

    Every delta but the active one holds all of the same data, which the guest does not touch.
    """
    table = Table(FELT, next(iter(MERGES)))
    with Libvirtd(directory) as libvirtd:
        for depth in (2, 5, 20) if whole else (5,):
            layers = deltas(directory / f"{depth}-deltas", depth)
            for tool in turns(list(MERGES), 7 if whole else 3):
                figures = merge(directory / "turn", libvirtd, layers, MERGES[tool], LONGEST)
                table.add(f"{depth} deltas", tool, *figures)
    return table


def convergence(directory: Path, whole: bool) -> Table:
    """A guest that writes faster than is copied."""
    table = Table(FELT, next(iter(MERGES)))
    with Libvirtd(directory) as libvirtd:
        layers = deltas(directory / "layers", 1)
        for tool in turns(list(MERGES), 3 if whole else 1):
            words = [*MERGES[tool], *SLOW[tool]]
            table.add("", tool, *merge(directory / "turn", libvirtd, layers, words, SOON))
    return table


def deltas(directory: Path, depth: int) -> list[Path]:
    """The layer to merge into, which is empty, and the deltas above it; by names in `turn`."""
    turn = directory.parent / "turn"
    turn.mkdir()
    directory.mkdir()
    layers = [linked_clone(base(), turn / "target.qcow2")]
    size = 256 * MIB + UNION  # behind the guest's partitions
    subprocess.run(["qemu-img", "resize", "-q", str(layers[0]), str(size)], check=True)
    for number in range(1, depth):
        delta = linked_clone(layers[-1], turn / f"delta{number}.qcow2")
        layers.append(filled(delta, UNION, number, 256 * MIB))
    for layer in layers:
        layer.rename(directory / layer.name)
    turn.rmdir()
    return [directory / layer.name for layer in layers]


def merge(
    turn: Path, libvirtd: Libvirtd, layers: Sequence[Path], words: Sequence[str], longest: float
) -> tuple[float | None, ...]:
    """One merge, of deltas that all turns have, into a layer of its own; nothing: no end."""
    turn.mkdir()
    target = Path(shutil.copy(layers[0], turn))
    for layer in layers[1:]:
        (turn / layer.name).hardlink_to(layer)
    active = linked_clone(turn / layers[-1].name, turn / "active.qcow2")
    with Domain(libvirtd, turn, [Disk(active)]) as domain:
        domain.wait_for_acks(100)
        os.sync()  # or it waits for what was written here
        given = [word.format(target=target, state=turn / "state") for word in words]
        if found := felt(domain, given, longest):
            assert domain.files() == domain.next_boot() == [str(target)]
            domain.wait_for_acks(20)
        disk = Path(domain.files()[0])
        domain.kill()
        records.check(disk, "qcow2", domain.log).raise_if_bad()
    shutil.rmtree(turn)
    return found


def felt(domain: Domain, words: Sequence[str], longest: float) -> tuple[float | None, ...]:
    """A command's time from start to end, and for how long no record of the guest's was
    acknowledged meanwhile. promoter also tells for how long the guest was suspended, and how
    many bytes were copied.
    """
    environment = {**os.environ, "LIBVIRT_DEFAULT_URI": domain.libvirtd.uri}
    with writes(domain.log) as written:
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
            return ()
        took = time.monotonic() - began
    gaps = (after.heard - before.heard for before, after in pairwise(written))
    silence = 1000 * max(gaps, default=took)
    if words[0] != "promoter":
        return took, silence, None, None
    (disk,) = json.loads(said.splitlines()[-1])["disks"]
    return took, silence, disk["switchover_s"] * 1000, disk["mirrored_bytes"] / MIB
