"""Every pair of circumstances of a promotion meets on some guest that writes: docs/coverage.md.

`Cell` has the dimensions and their values. What promoter must refuse is said here a second time,
in other words than promoter's, and kept out of the table but for REFUSED: a pair of which only a
refusal were seen would not be covered.
"""

import functools
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from contextlib import ExitStack
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args, get_type_hints

import pytest

from tests import records
from tests.cli import promoter
from tests.vm import (
    MIB,
    SPARE_OFFSET,
    VM,
    Bus,
    Disk,
    Style,
    base,
    file_system,
    linked_clone,
    qemu_img,
)


class Cell(NamedTuple):
    """The circumstances of one promotion; the defaults go with everything else."""

    target: Literal[
        "in place",
        "in place, clusters 2M",
        "in place, extended L2",
        "in place, preallocated",
        "elsewhere, qcow2",
        "elsewhere, raw",
    ] = "in place"
    base: Literal[
        "qcow2", "raw", "snapshot", "bitmap", "data file", "compressed", "compat 0.10"
    ] = "qcow2"
    overlay: Literal["64k", "4k", "2M", "extended L2", "compat 0.10"] = "64k"
    seed: Literal["auto", "convert", "copy", "reflink", "none"] = "auto"
    bus: Literal["virtio-blk", "virtio-scsi", "ahci", "nvme"] = "virtio-blk"
    content: Literal["data", "zeroed", "discarded", "compressed"] = "data"
    files: Literal["ext4", "xfs", "btrfs"] = "ext4"
    style: Literal["nodes", "inline", "drive"] = "nodes"
    throttle: Literal["none", "node", "drive"] = "none"
    size: Literal["as base", "larger", "smaller"] = "as base"
    qemu: Literal["system", "newer", "newest"] = "system"
    iothread: Literal["no", "yes"] = "no"
    depth: Literal["1", "2"] = "1"
    guest: Literal["running", "paused", "prelaunch"] = "running"
    copy_mode: Literal["write-blocking", "background"] = "write-blocking"
    second_disk: Literal["no", "yes"] = "no"


TARGETS: Mapping[str, list[str]] = {
    "in place": [],
    "in place, clusters 2M": ["--cluster-size", "2M"],
    "in place, extended L2": ["--extended-l2"],
    "in place, preallocated": ["--preallocation", "metadata"],
    "elsewhere, qcow2": [],
    "elsewhere, raw": ["--format", "raw"],
}
OVERLAYS = {
    "64k": {"cluster_size": "64k"},
    "4k": {"cluster_size": "4k"},
    "2M": {"cluster_size": "2M"},
    "extended L2": {"cluster_size": "128k", "extended_l2": "on"},
    "compat 0.10": {"compat": "0.10"},
}
LAYOUTS = {  # of the overlays: cluster size, extended L2
    "64k": (65536, False),
    "4k": (4096, False),
    "2M": (2 * MIB, False),
    "extended L2": (2 * 65536, True),
    "compat 0.10": (65536, False),
}
SIZES = {"as base": 192 * MIB, "larger": 200 * MIB, "smaller": 184 * MIB}
AREA = f"{SPARE_OFFSET + 4 * MIB} 2M"  # where the overlay's contents differ, cell by cell
CONTENTS = {
    "data": [],
    "zeroed": [f"write -q -z {AREA}"],
    "discarded": [f"write -q -P 5 {AREA}", f"discard -q {AREA}"],
    "compressed": [f"write -q -c -P 6 {AREA}"],
}


# --- the table -----------------------------------------------------------------------------

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]
Rule = Mapping[str, Set[str]]  # holds for a row that has one of the values of every column


IMPOSSIBLE: list[Rule] = [
    {"iothread": {"yes"}, "bus": {"ahci", "nvme"}},
    {"throttle": {"drive"}, "style": {"nodes", "inline"}},
    {"throttle": {"node"}, "style": {"drive"}},
    # These QEMUs may lose an interrupt in `stop`, see guests/bugs.py: the guest would hang.
    {"guest": {"paused"}, "iothread": {"yes"}, "qemu": {"newer", "newest"}},
]
COPYING = {"copy", "reflink"}
REFUSALS: dict[str, Rule] = {
    "throttle filter and iothreads": {
        "throttle": {"node"},
        "iothread": {"yes"},
        "qemu": {"system"},
    },
    "no safe start with iothreads": {
        "iothread": {"yes"},
        "qemu": {"newer"},
        "guest": {"running"},
    },
    "raw on an emulated device": {
        "target": {"elsewhere, raw"},
        "bus": {"ahci", "nvme"},
        "qemu": {"system"},
    },
    "no reflinks on ext4": {"seed": {"reflink"}, "files": {"ext4"}},
    "a copy is one layer": {"seed": {"copy"}, "depth": {"2"}},
    "a copy is not just data": {
        "seed": COPYING,
        "base": {"snapshot", "bitmap", "data file", "compat 0.10"},
    },
    "a copy keeps its layout": {
        "seed": COPYING,
        "target": {"in place, clusters 2M", "in place, extended L2", "in place, preallocated"},
    },
    "a copied qcow2 is no raw image": {
        "seed": COPYING,
        "base": {"qcow2", "compressed"},
        "target": {"elsewhere, raw"},
    },
    "a copied raw image is no qcow2": {
        "seed": COPYING,
        "base": {"raw"},
        "target": {"in place", "elsewhere, qcow2"},
    },
}


def holds(rule: Rule, row: Row) -> bool:
    return all(row.get(name) in values for name, values in rule.items())


def refusal(cell: Cell) -> str:
    """Why promoter must refuse, "" if it must not."""
    return next((why for why, rule in REFUSALS.items() if holds(rule, cell._asdict())), "")


def pairs(row: Row) -> Iterator[Pair]:
    return combinations(((name, row[name]) for name in VALUES if name in row), 2)


def completed(row: Row, wanted: Collection[Pair]) -> Row | None:
    """A row with these values that is promoted, and has many of the wanted pairs."""
    if any(holds(rule, row) for rule in (*IMPOSSIBLE, *REFUSALS.values())):
        return None
    missing = next((name for name in VALUES if name not in row), None)
    if missing is None:
        return row

    def worth(row: Row) -> tuple[int, int]:
        value = (missing, row[missing])
        return sum(pair in wanted for pair in pairs(row)), sum(value in pair for pair in wanted)

    rows = sorted(({**row, missing: value} for value in VALUES[missing]), key=worth, reverse=True)
    return next(filter(None, (completed(row, wanted) for row in rows)), None)


def rows() -> Iterator[Cell]:
    """Every pair of values that can be promoted is in one of them."""
    wanted = {
        ((one, value), (other, beside))
        for one, other in combinations(VALUES, 2)
        for value, beside in product(VALUES[one], VALUES[other])
    }
    wanted = {pair for pair in wanted if completed(dict(pair), ())}
    while wanted:
        row = completed(dict(min(wanted)), wanted)
        assert row
        wanted -= set(pairs(row))
        yield Cell(**cast(dict[str, Any], row))


REFUSED = [
    Cell(seed="copy", base="data file", files="btrfs"),
    Cell(seed="copy", depth="2", qemu="newer", style="drive", guest="paused"),
    Cell(seed="reflink", target="elsewhere, qcow2", bus="nvme", second_disk="yes"),
    Cell(throttle="node", iothread="yes", style="inline", files="xfs"),
    Cell(iothread="yes", qemu="newer"),
    Cell(target="elsewhere, raw", bus="nvme"),
    Cell(target="elsewhere, raw", bus="ahci"),
]
VALUES: dict[str, tuple[str, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(Cell).items()
}
CELLS = [*rows(), *REFUSED]


def of_sample(number: int) -> bool:
    """Is the cell tried for every change?"""
    return number % 20 == 0


def table(outcomes: Mapping[int, str]) -> str:
    """docs/coverage.md."""
    rows = [(str(number), *CELLS[number], outcomes[number]) for number in range(len(CELLS))]
    head = ("", *(name.replace("_", " ") for name in Cell._fields), "outcome")
    lines = (f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    return "\n".join([INTRODUCTION, *lines, ""])


INTRODUCTION = """\
# Coverage

`ci/nightly` writes this file when every cell below held, `ci/test` tries every twentieth; see
tests/test_coverage.py. Each cell is a real guest that writes while its disk is promoted, and is
checked record by record. Any two values of different columns that can go together are in one cell
that is promoted.
"""


# --- what a cell is made of ----------------------------------------------------------------


@pytest.fixture(scope="session")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Where each file system is mounted."""
    directory = tmp_path_factory.mktemp("file-systems")
    with ExitStack() as mounts:
        yield {
            kind: mounts.enter_context(file_system(kind, directory, 2048 * MIB))
            for kind in ("ext4", "xfs", "btrfs")
        }


@pytest.fixture
def place(cell: Cell, file_systems: dict[str, Path]) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir=file_systems[cell.files]))
    yield directory
    shutil.rmtree(directory)


def qemu_io(image: Path, *commands: str) -> None:
    words = (word for command in commands for word in ("-c", command))
    subprocess.run(["qemu-io", *words, image], check=True, stdout=subprocess.DEVNULL)


def make_base(kind: str, place: Path) -> Path:
    """A base of its own for each cell, with data in the whole spare area."""
    path, whole = place / "base", place / "whole.qcow2"
    whole.write_bytes(base().read_bytes())
    qemu_io(whole, f"write -q -P 1 {SPARE_OFFSET} 16M")
    convert = ["convert", "-f", "qcow2", whole, path, "-O"]
    match kind:
        case "raw":
            qemu_img(*convert, "raw")
        case "data file":
            qemu_img(*convert, "qcow2", "-o", f"data_file={path}.data")
        case "compressed":
            qemu_img(*convert, "qcow2", "-c")
        case "compat 0.10":
            qemu_img(*convert, "qcow2", "-o", "compat=0.10")
        case _:
            whole.rename(path)
    if kind == "snapshot":
        qemu_img("snapshot", "-c", "before", path)
        qemu_io(path, f"write -q -P 2 {SPARE_OFFSET} 1M")
    if kind == "bitmap":
        qemu_img("bitmap", "--add", path, "backup")
    whole.unlink(missing_ok=True)
    return path


def make_chain(cell: Cell, place: Path) -> list[Path]:
    layers = [make_base(cell.base, place)]
    fmt = "raw" if cell.base == "raw" else "qcow2"
    if cell.depth == "2":
        layers.append(linked_clone(layers[0], place / "middle.qcow2", backing_fmt=fmt))
        qemu_io(layers[1], f"write -q -P 3 {SPARE_OFFSET + MIB} 1M")
        fmt = "qcow2"
    layout = OVERLAYS[cell.overlay] | {"size": str(SIZES[cell.size])}
    clone = linked_clone(layers[-1], place / "clone.qcow2", backing_fmt=fmt, **layout)
    qemu_io(clone, f"write -q -P 4 {SPARE_OFFSET + 2 * MIB} 1M", *CONTENTS[cell.content])
    return [*layers, clone]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(image: Path, fmt: str, start: int) -> str:
    """What a guest reads from `start` to the disk's end, hashed."""
    with tempfile.TemporaryDirectory() as directory:
        read = Path(directory) / "read"
        places = (f"skip={start // MIB}", f"if={image}", f"of={read}")
        qemu_img("dd", "-f", fmt, "-O", "raw", "bs=1M", *places)
        return digest(read)


def check_layout(cell: Cell, seed: str, disk: Path) -> None:
    info = json.loads(qemu_img("info", "--output=json", disk))
    assert "backing-filename" not in info
    assert info["virtual-size"] == SIZES[cell.size]
    if cell.target == "elsewhere, raw":
        assert info["format"] == "raw"
        return
    copied = seed in ("copy", "reflink")
    cluster, extended = LAYOUTS["64k" if copied else cell.overlay]
    match cell.target:
        case "in place, clusters 2M":
            cluster = 2 * MIB
        case "in place, extended L2":
            cluster, extended = max(cluster, 16384), True
        case "in place, preallocated":
            assert disk.stat().st_size >= SIZES[cell.size]
    found = info["format-specific"]["data"]
    assert (info["cluster-size"], found["extended-l2"]) == (cluster, extended)
    assert (found["compat"], "bitmaps" in found) == ("1.1", False)
    assert "snapshots" not in info
    assert "data-file" not in found


# --- the cells -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("qemu", "number", "cell"),
    [
        pytest.param(
            cell.qemu, number, cell, marks=() if of_sample(number) else pytest.mark.nightly
        )
        for number, cell in enumerate(CELLS)
    ],
    indirect=["qemu"],
    ids=map(str, range(len(CELLS))),
)
@pytest.mark.usefixtures("qemu")
def test_cell(
    tmp_path: Path,
    place: Path,
    number: int,
    cell: Cell,
    record_property: Callable[[str, object], None],
) -> None:
    *below, clone = make_chain(cell, place)
    disks = [
        Disk(
            clone,
            style=Style(cell.style),
            bus=Bus(cell.bus),
            iops=0 if cell.throttle == "none" else 3000,
            iothread=cell.iothread == "yes",
        )
    ]
    parts = [SPARE_OFFSET]  # from where a disk's contents stay the same
    if cell.second_disk == "yes":
        fmt = "raw" if cell.base == "raw" else "qcow2"
        disks.append(Disk(linked_clone(below[0], place / "second.qcow2", backing_fmt=fmt)))
        parts.append(0)
    read = functools.partial(map, contents)
    before = list(read([disk.path for disk in disks], ["qcow2"] * 2, parts))
    kept = {path: digest(path) for path in place.iterdir() if path not in {d.path for d in disks}}

    fmt, targets = "qcow2", [disk.path for disk in disks]
    words = [*TARGETS[cell.target], "--copy-mode", cell.copy_mode, "--seed", cell.seed, "--json"]
    if cell.target.startswith("elsewhere"):
        fmt = cell.target.split()[-1]
        elsewhere = place / "elsewhere"
        elsewhere.mkdir()
        targets = [elsewhere / target.name for target in targets]
        one = ["--target", str(targets[0])]
        words += one if len(targets) == 1 else ["--target-dir", str(elsewhere)]

    names = set(place.rglob("*"))
    stands = ["-S"] if cell.guest == "prelaunch" else []
    with VM(tmp_path, disks, writer={"rate": 0}, extra=stands) as vm:
        if not stands:
            vm.wait_for_acks(60)
        if cell.guest == "paused":
            vm.qmp("stop")
        acked = len(vm.acks())
        ran = promoter(tmp_path / "state", "promote", vm.monitor, *words)
        if cell.guest != "running":
            vm.qmp("cont")
        else:
            assert len(vm.acks()) > acked or refusal(cell)
        vm.wait_for_acks(60)
        if refusal(cell):
            assert ran.code == 4, ran
            assert set(place.rglob("*")) == names
            fmt, targets = "qcow2", [disk.path for disk in disks]
            outcome = f"refused: {refusal(cell)}"
        else:
            assert ran.code == 0, ran
            seeds = {disk["disk"]: disk["seed"] for disk in ran.result["disks"]}
            assert len(seeds) == len(disks)
            assert cell.seed in ("auto", seeds["vd0"])
            outcome = f"promoted, seed {seeds['vd0']}"
        vm.shutdown()
        if cell.target.startswith("in place") and not refusal(cell):
            vm.start()
            if stands:
                vm.qmp("cont")
            vm.wait_for_acks(20)
            vm.shutdown()

    records.check(targets[0], fmt, vm.log).raise_if_bad()
    if not refusal(cell):
        check_layout(cell, seeds["vd0"], targets[0])
    for target in targets:
        if fmt == "qcow2":
            qemu_img("check", "-q", "-f", fmt, target)
        assert refusal(cell) or "backing file" not in qemu_img("info", target)
    assert list(read(targets, [fmt] * 2, parts)) == before
    assert {path: digest(path) for path in kept} == kept
    record_property("covered", (number, outcome))
