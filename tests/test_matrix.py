"""Every operation, before each of its steps, and every fault: docs/reliability.md.

promoter stops between two steps, the fault happens, promoter goes on; then the operator mends what
he would, and asks for ``job resume`` or ``doctor --repair``. After it exactly one chain is the true
one and boots, it has every acknowledged record, and nothing of ours is left.

`ROUTES` are the steps that operations have; every cell holds them against the journal that it
made, and `test_every_action_is_on_a_route_or_a_way_back` against the actions that there are. So a
step without cells is found.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from promoter.operations import backup
from promoter.operations.move import FINAL, Do
from tests import records
from tests.cli import Ran, promoter, start
from tests.deltas import Case, backing_chain
from tests.domains import Domain, Libvirtd
from tests.faults import (
    BREAKS,
    FAULTS,
    LEFT,
    OF_THE_TARGET,
    FileSystem,
    Scene,
    heal,
    standing_at,
)
from tests.records import Kind
from tests.vm import SPARE_OFFSET, VM, Disk, base, linked_clone

SEED = 20263219
SAMPLE = 1
PATIENCE = 300.0  # seconds for what a busy machine does at last
LEAKS = 3  # qemu-img check: clusters that nobody uses
SLOW = ("--speed", "20M")  # or there is nothing to wait for

MIRRORED = ("MIRROR", "AWAIT_READY", "PREPARE", "SWITCH_OVER", "DISMISS")
FROZEN = ("SEED", "PREPARE", "SWITCH_OVER", "TIDY")
ROUTES: Mapping[str, tuple[str, ...]] = {
    "promote": ("SEED", *MIRRORED, "VERIFY", "TIDY"),
    "consolidate": (*MIRRORED, "TIDY"),
    "consolidate --beside": ("SEED", *MIRRORED, "TIDY"),
    "snapshot": FROZEN,
    "backup": ("FREEZE", *FROZEN, "COPY", "MERGE", *MIRRORED, "PRUNE"),
}
WAY_BACK = {  # only after something else went wrong
    *("CONTINUE", "FINISH_SWITCHOVER", "UNFREEZE", "PUT_NAME_BACK", "CANCEL", "COMMIT_NAME"),
    *("DETACH", "DISCARD", "REPLAN", "UNLIMIT"),
}
OF_NO_GUEST = {"GO_BACK"}  # an undo's: test_undo.py strikes it
BESIDE_ITSELF = {"consolidate", "snapshot"}  # a target there fails together with the guest's disk
DEPTHS = {  # before, after
    "promote": (2, 1),
    "consolidate": (4, 2),
    "consolidate --beside": (4, 2),
    "snapshot": (2, 3),
    "backup": (2, 2),
}
ENDED = {"done", "failed", "cancelled"}
CODES = {0, 3, 4, 5, 6, 7, 8, 9}  # those that promise something; 1 is not among them


@dataclass(frozen=True)
class Cell:
    """One fault before one step of one operation, in one kind of guest."""

    kind: str
    operation: str
    step: str
    fault: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.operation}, {self.step}, {self.fault}"

    @property
    def possible(self) -> bool:
        """A domain's job is gone when libvirt has switched, and its snapshot takes no name."""
        if self.kind == "qemu":
            return self.fault != "SIGKILL libvirtd"
        return self.step != "DISMISS" and (self.operation, self.step) != ("snapshot", "PREPARE")


def every_cell() -> Iterator[Cell]:
    for operation, steps in ROUTES.items():
        for kind in ("qemu", "libvirt"):
            for step in dict.fromkeys(steps):
                for fault in FAULTS:
                    cell = Cell(kind, operation, step, fault)
                    if cell.possible:
                        yield cell


CELLS = random.Random(SEED).sample(cells := list(every_cell()), len(cells))
PARAMETERS = [
    pytest.param(number, cell, marks=() if number < SAMPLE else pytest.mark.nightly, id=str(cell))
    for number, cell in enumerate(CELLS)
]


def test_every_action_is_on_a_route_or_a_way_back() -> None:
    routed = {step for steps in ROUTES.values() for step in steps}
    final = {do.name for do in FINAL} | {"DONE", "GIVE_UP"}
    assert {do.name for do in (*Do, *backup.Do)} == routed | WAY_BACK | OF_NO_GUEST | final
    assert not routed & (WAY_BACK | final)


# --- one cell ------------------------------------------------------------------------------


class Place:
    """Where a cell's files are: the base, the disk's directory, and where new ones go."""

    def __init__(self, directory: Path, cell: Cell, stack: ExitStack, libvirtd: Libvirtd | None):
        self.cell, self.directory = cell, directory
        self.disks, self.room, self.lower = (
            directory / name for name in ("disks", "room", "lower")
        )
        if cell.operation in BESIDE_ITSELF:
            self.room = self.disks
        else:
            self.disks.mkdir()
        self.target = self.source = None
        if cell.fault in OF_THE_TARGET:
            self.target = stack.enter_context(FileSystem(self.room, libvirtd))
        else:
            self.room.mkdir()
        if cell.fault == "source EIO":
            self.source = stack.enter_context(FileSystem(self.lower, libvirtd))
        else:
            self.lower.mkdir()
        self.base = self.lower / "base.qcow2"
        self.base.write_bytes(base().read_bytes())
        linked_clone(self.base, self.lower / "other.qcow2")  # it is shared
        self.active = self._make_disk()
        os.sync()  # what breaks down loses what was not

    def _make_disk(self) -> Path:
        if DEPTHS[self.cell.operation][0] == 2:
            return self._layer(self.base, self.disks / "disk.qcow2", 1)
        layers = (self.room / "layer1.qcow2", *(self.disks / f"layer{n}.qcow2" for n in (2, 3)))
        below = self.base
        for number, layer in enumerate(layers, 1):
            below = self._layer(below, layer, number)
        return below

    def _layer(self, below: Path, path: Path, number: int) -> Path:
        linked_clone(below, path)
        pattern = f"write -q -P {number} {SPARE_OFFSET + number * 2**20} 1M"
        subprocess.run(["qemu-io", "-c", pattern, str(path)], check=True)
        return path

    def command(self) -> tuple[str, list[object]]:
        operation, *words = self.cell.operation.split()
        more: list[object] = [*words]
        if operation == "backup":
            more.append(self.room)
        elif self.target and self.room != self.disks:
            more += ["--target-dir", self.room]
        if operation == "promote":
            more.append("--verify")
        if self.cell.step == "AWAIT_READY":
            more += SLOW
        return operation, more

    def names(self) -> set[str]:
        found = [path for place in (self.disks, self.room, self.lower) for path in place.iterdir()]
        return {path.name for path in found}


def end(process: subprocess.Popen[str], mend: Callable[[], None]) -> Ran:
    """promoter's end; what it may be waiting for happens after a while."""
    try:
        out, err = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        mend()
        out, err = process.communicate(timeout=PATIENCE)
    else:
        mend()
    return Ran(process.returncode, out, err)


def make_guest(directory: Path, active: Path, libvirtd: Libvirtd | None) -> VM | Domain:
    if libvirtd:
        return Domain(libvirtd, directory, [Disk(active)])
    return VM(directory, [Disk(active)], writer={"rate": 0})


def get_going(guest: VM | Domain) -> None:
    """Whoever looks after the guest has it run."""
    if isinstance(guest, VM):
        if not guest.running:
            guest.wait()
            guest.start()
        if guest.qmp("query-status")["status"] != "running":
            guest.cont()
        return
    if not guest.domain.isActive():
        guest.start()
    if guest.paused:
        guest.cont()


def jobs(state: Path) -> list[dict[str, Any]]:
    if not (state / "journal.sqlite").exists():
        return []
    listed = promoter(state, "job", "list", "--json")
    assert listed.code == 0, listed
    return [line for line in listed.lines if line["event"] == "operation"]


@contextmanager
def booted(case: Case, place: Place, done: str | None) -> Iterator[VM | Domain]:
    """The guest, by its own command line or definition; where its disk has moved, by a new one."""
    moved = place.room / place.active.name
    if isinstance(case.guest, VM) and done == "done" and not place.active.exists():
        case.active = moved
        if case.guest.running:
            get_going(case.guest)  # it may have stopped where there was no room
            case.guest.wait_for_acks(20, PATIENCE)
            case.prove_at_rest()
        case.guest.kill()
        with VM(case.directory, [Disk(moved)], writer={"rate": 0}) as guest:
            yield guest
        return
    if isinstance(case.guest, Domain):
        case.active = Path(case.guest.next_boot()[0])
    get_going(case.guest)
    yield case.guest


def check_code(ran: Ran, *, killed: bool) -> None:
    assert "Traceback" not in ran.err, ran.err
    assert ran.code in (CODES | ({-9} if killed else set())), ran


def bring_to_an_end(case: Case, place: Place, number: int) -> None:
    """``job resume`` or ``doctor --repair``, before or after the guest's next boot.

    One that has open what is not there any more has to boot first.
    """
    if number % 2 and place.active.exists():
        get_going(case.guest)
    for attempt in range(3):
        if number % 3 == 0:
            ran = promoter(case.state, "doctor", *case.guest.address, "--repair", "--json")
        else:
            ran = case.resume()
        check_code(ran, killed=False)
        if all(job["status"] in ENDED for job in jobs(case.state)):
            return
        if attempt == 1 and place.cell.fault == "base deleted":
            case.guest.kill()  # it has the deleted one open, and no other can take its place
        if place.active.exists():
            get_going(case.guest)
        number = 1  # by now it is for job resume
    raise AssertionError(f"{jobs(case.state)} after {ran}")


def prove(case: Case, place: Place, cell: Cell) -> str:
    """Exactly one chain is true and boots, nothing is lost, nothing is left; the outcome."""
    listed = jobs(case.state)
    status = next((job["status"] for job in listed if job["kind"] == cell.operation.split()[0]), "")
    with booted(case, place, status) as guest:
        if cell.fault in BREAKS:  # it may not have come through that itself
            guest.kill()
            get_going(guest)
        guest.wait_for_acks(20, PATIENCE)
        if guest is case.guest:
            case.prove_at_rest()
        guest.kill()
        assert case.resume().code == 0
        if isinstance(guest, Domain):
            case.active = Path(guest.next_boot()[0])
        get_going(guest)
        guest.wait_for_acks(20, PATIENCE)
        guest.kill()
    depth = DEPTHS[cell.operation][status == "done"]
    layers = backing_chain(case.active)
    assert len(layers) == depth, (status, layers)
    for layer in layers:
        assert subprocess.run(["qemu-img", "check", "-q", layer], check=False).returncode in (
            0,
            LEAKS,
        ), layer
    report = records.check(case.active, None, case.guest.log)
    bad = [f for f in report.findings if f.kind is not Kind.FAILED or cell.fault not in BREAKS]
    assert not bad, [str(finding) for finding in bad[:10]]
    left = {name for name in place.names() if LEFT.fullmatch(name)}
    assert not left
    if status != "done":
        assert not [name for name in place.names() if ".aside-" in name or ".merged-" in name]
    return {"done": "done", "": "nothing begun"}.get(status, "old chain")


def check_route(case: Case, cell: Cell) -> None:
    """What the journal has are steps that cells are made of."""
    known = {*ROUTES[cell.operation], *WAY_BACK}
    for job in jobs(case.state):
        shown = promoter(case.state, "job", "show", job["id"], "--json")
        for line in shown.lines:
            if line["event"] == "step":
                name = line["action"].partition(" (")[0]
                step = BACKUPS.get(name) if job["kind"] == "backup" else None
                assert (step or name.upper().replace(" ", "_")) in known, line


BACKUPS = {str(do): do.name for do in backup.Do}


def try_out(tmp_path: Path, number: int, cell: Cell, libvirtd: Libvirtd | None) -> str:
    """What became of the cell."""
    with ExitStack() as stack:
        place = Place(tmp_path, cell, stack, libvirtd)
        case = Case(
            lambda disks: make_guest(tmp_path, disks[0].path, libvirtd), tmp_path, [place.active]
        )
        stack.enter_context(case.guest)
        case.guest.wait_for_acks(60, PATIENCE)
        scene = Scene(case.guest, libvirtd, place.lower, place.base, place.target, place.source)
        operation, words = place.command()
        command = (f"before {cell.step}", "hang", 0, operation, *case.guest.address, *words)
        scene.promoter = process = start(case.state, *command, "--json", module="tests.struck")
        try:
            standing_at(process, PATIENCE)
            FAULTS[cell.fault](scene)
            process.send_signal(signal.SIGCONT)
            ran = end(process, lambda: heal(scene, cell.fault))
        finally:
            process.kill()
            process.wait()
        check_code(ran, killed=cell.fault in ("SIGKILL promoter", "SIGKILL both"))
        if cell.fault == "pause":
            get_going(case.guest)
        bring_to_an_end(case, place, number)
        check_route(case, cell)
        return prove(case, place, cell)


@pytest.mark.parametrize(("number", "cell"), PARAMETERS)
def test_cell(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    number: int,
    cell: Cell,
    record_property: Callable[[str, object], None],
) -> None:
    libvirtd = request.getfixturevalue("libvirtd") if cell.kind == "libvirt" else None
    outcome = try_out(tmp_path, number, cell, libvirtd)
    record_property("outcome", outcome)


# --- docs/reliability.md ---------------------------------------------------------------------


def table(outcomes: Mapping[str, str]) -> str:
    """The cells that were tried, by their names, and what became of them."""
    tried = {cell: outcomes[str(cell)] for cell in CELLS if str(cell) in outcomes}
    rows = []
    for (operation, fault), possible in Counter((c.operation, c.fault) for c in CELLS).items():
        found = Counter(
            outcome for c, outcome in tried.items() if (c.operation, c.fault) == (operation, fault)
        )
        what = ", ".join(f"{count} {text}" for text, count in sorted(found.items()))
        rows.append(f"| {operation} | {fault} | {found.total()} of {possible} | {what} |")
    failed = [str(cell) for cell, outcome in tried.items() if outcome == "did not hold"]
    rows.sort()
    if failed:
        rows += ["", "## Cells that did not hold", "", *(f"- {cell}" for cell in failed)]
    return HEADER.format(
        faults=len(tried),
        held=len(tried) - len(failed),
        failed=len(failed),
        cells=len(CELLS),
        steps=len({(c.kind, c.operation, c.step) for c in CELLS}),
        kinds=len(FAULTS),
    ) + "\n".join([*rows, ""])


HEADER = """# Reliability

Written by `tests/test_matrix.py`, by the run itself.

promoter was stopped before a step, the fault happened, promoter went on if it could; then
`job resume` or `doctor --repair`. A cell holds when after that exactly one chain is the true one
and boots, twice, every acknowledged record is in it, and nothing of promoter's is left.

**{faults} faults: {held} cells held, {failed} did not.** There are {cells} cells: {steps} steps
of operations on plain QEMU and libvirt, and {kinds} kinds of fault. A cell that is not counted as
tried was not tried in these runs.

`done`: the operation came to its end. `old chain`: it was put back, and the guest has its old one.

| operation | fault | tried | outcomes |
|---|---|---|---|
"""
