"""``job undo``: a guest goes back to the chain that it had, with all that it wrote since."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from promoter.storage.files import is_written
from tests.cli import Ran, ended, promoter, start
from tests.conftest import Make
from tests.deltas import Case, backing_chain, digest
from tests.struck import IN_AN_UNDO
from tests.vm import (
    MIB,
    SPARE_OFFSET,
    VM,
    Disk,
    base,
    blank,
    file_system,
    linked_clone,
    qemu_img,
    wait_for,
)

UNTOUCHED = 40 * MIB  # of the base's root file system at least: no guest writes there


def promoted(case: Case, *words: object) -> str:
    """Promote, and let the guest write on the new disk; the operation."""
    case.guest.wait_for_acks(40)
    result = case.done("promote", *words)
    case.guest.wait_for_acks(100)
    return str(result["id"])


def undo(case: Case, identity: str, *words: object) -> Ran:
    return promoter(case.state, "job", "undo", identity, *words, "--json")


def prove_undone(case: Case, ran: Ran, layers: list[Path]) -> None:
    """It boots from its old chain, and that has every record."""
    assert ran.code == 0, (ran.out, ran.err)
    (disk,) = ran.result["disks"]
    assert (disk["target"], disk["verified"]) == (str(layers[0]), True)
    case.guest.start()
    case.guest.wait_for_acks(20)
    assert case.chain() == layers
    case.guest.shutdown()
    case.active = layers[0]
    case.prove_disk(len(layers))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("where", ["in place", "elsewhere"])
def test_a_promoted_disk_goes_back_with_what_was_written_since(
    make: Make, tmp_path: Path, where: str
) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    case = Case(make, tmp_path, [clone])
    target = tmp_path / "target.qcow2"
    with case.guest as guest:
        identity = promoted(case, *(["--target", target] if where == "elsewhere" else []))
        refused = undo(case, identity)
        assert refused.code == 4
        assert "runs" in refused.result["message"]
        assert "Shut the guest down" in refused.result["hint"]
        guest.shutdown()
        planned = undo(case, identity, "--dry-run")
        assert (planned.code, planned.result["status"]) == (0, "planned")
        ran = undo(case, identity)
        prove_undone(case, ran, [clone, base()])
        (disk,) = ran.result["disks"]
        kept = Path(disk["old"])
        assert 0 < disk["mirrored_bytes"] < kept.stat().st_blocks * 512 - UNTOUCHED
        if case.plain or where == "elsewhere":
            beside = Path(f"{clone}.undone-{identity}")
            assert kept == (target if where == "elsewhere" else beside)
        assert backing_chain(kept) == [kept]
        told = promoter(case.state, "report", ran.result["id"], "--json").result
        assert "are the same" in told["disks"][0]["verification"]
        assert [layer["file"] for layer in told["disks"][0]["after"]] == [str(clone), str(base())]
        assert case.resume().code == 0
        assert set(tmp_path.glob("*.qcow2*")) == {clone, kept}
        assert undo(case, identity).result["disks"] == []


@pytest.mark.sampled(2)
def test_a_disk_that_was_consolidated_beside_goes_back(make: Make, tmp_path: Path) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    case = Case(make, tmp_path, [clone])
    with case.guest as guest:
        guest.wait_for_acks(40)
        case.snapshot()
        guest.wait_for_acks(40)
        layers = case.chain()
        if case.plain:
            layers[0] = clone
        identity = case.done("consolidate", "--beside")["id"]
        guest.wait_for_acks(100)
        guest.shutdown()
        prove_undone(case, undo(case, identity), layers)


@pytest.mark.nightly
def test_a_disk_that_grew_on_its_new_file_goes_back_as_large(tmp_path: Path) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    data = blank(tmp_path / "data.qcow2", 64 * MIB)
    top = linked_clone(data, tmp_path / "top.qcow2")
    state = tmp_path / "state"
    with VM(tmp_path, [Disk(clone), Disk(top)]) as vm:
        vm.wait_for_acks(20)
        ran = promoter(state, "promote", vm.monitor, "vd1", "--json")
        assert ran.code == 0, ran.out
        (node,) = (d["inserted"]["node-name"] for d in vm.qmp("query-block") if "vd1" in d["qdev"])
        vm.qmp("block_resize", **{"node-name": node, "size": 96 * MIB})
        vm.shutdown()
    subprocess.run(["qemu-io", "-c", f"write -q -P 5 {80 * MIB} 1M", top], check=True)
    undone = promoter(state, "job", "undo", ran.result["id"], "--json")
    assert undone.code == 0, (undone.out, undone.err)
    assert json.loads(qemu_img("info", "--output=json", top))["virtual-size"] == 96 * MIB
    assert backing_chain(top) == [top, data]
    check = ["qemu-io", "-r", "-c", f"read -q -P 5 {80 * MIB} 1M", str(top)]
    assert "failed" not in subprocess.run(check, check=True, capture_output=True, text=True).stdout


@pytest.mark.sampled(10)
@pytest.mark.parametrize("point", [*IN_AN_UNDO, "before TIDY"])
def test_an_undo_that_is_killed_is_finished_by_resume(
    make: Make, tmp_path: Path, point: str
) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    case = Case(make, tmp_path, [clone])
    with case.guest as guest:
        identity = promoted(case)
        guest.shutdown()
        words = [point, "promoter", 0, "job", "undo", identity, "--json"]
        struck = ended(start(case.state, *words, module="tests.struck"))
        assert struck.code == -signal.SIGKILL, struck
        guest.start()  # on one disk or the other: it has every record
        guest.wait_for_acks(20)
        guest.shutdown()
        resumed = case.resume()
        assert resumed.code == 0, (resumed.out, resumed.err)
        guest.start()
        guest.wait_for_acks(20)
        assert case.chain() == [clone, base()]
        guest.shutdown()
        case.prove_disk(2)


def test_what_nothing_brings_back_is_refused(tmp_path: Path) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    case = Case(lambda disks: VM(tmp_path, disks, writer={"rate": 0}), tmp_path, [clone])
    with case.guest as guest:
        guest.wait_for_acks(20)
        snapshot = case.done("snapshot")["id"]
        refused = undo(case, snapshot)
        assert refused.code == 4
        assert "promoter consolidate" in refused.result["hint"]
        merge = case.done("consolidate")["id"]
        guest.shutdown()
        refused = undo(case, merge)
        assert refused.code == 4
        assert "merged" in refused.result["message"]
        assert promoter(case.state, "job", "undo", "ffffffff", "--json").code == 4


def test_an_old_chain_that_is_not_what_it_was_is_left_alone(tmp_path: Path) -> None:
    middle = linked_clone(base(), tmp_path / "middle.qcow2")
    clone = linked_clone(middle, tmp_path / "clone.qcow2")
    state = tmp_path / "state"
    with VM(tmp_path, [Disk(clone)]) as vm:
        vm.wait_for_acks(20)
        ran = promoter(state, "promote", vm.monitor, "--json")
        assert ran.code == 0, ran.out
        vm.shutdown()
    (disk,) = ran.result["disks"]
    old, before = Path(disk["old"]), digest(clone)

    def refused(why: str) -> None:
        said = promoter(state, "job", "undo", ran.result["id"], "--json")
        assert said.code == 4, said.out
        assert why in said.result["message"]
        assert digest(clone) == before

    reader = linked_clone(old, tmp_path / "reader.qcow2")
    refused("another image reads through")
    reader.unlink()
    with subprocess.Popen(["tail", "-f", old], stdout=subprocess.DEVNULL) as holder:
        refused("open")
        holder.terminate()
    io = ["qemu-io", "-c", "sleep 600000", str(clone)]
    with subprocess.Popen(io, stdin=subprocess.DEVNULL) as writer:
        wait_for(lambda: is_written(clone), "qemu-io to open it", 10)
        refused("a guest has its new disk")
        writer.terminate()
    subprocess.run(["qemu-io", "-c", f"write -q {SPARE_OFFSET} 64k", middle], check=True)
    refused("what lies below")
    old.unlink()
    refused("its old overlay")
    clone.rename(tmp_path / "away.qcow2")
    gone = promoter(state, "job", "undo", ran.result["id"], "--json")
    assert gone.code == 4, gone.out


@pytest.mark.parametrize("interrupted", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_what_has_not_switched_is_called_off(tmp_path: Path, *, interrupted: bool) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    case = Case(lambda disks: VM(tmp_path, disks, writer={"rate": 0}), tmp_path, [clone])
    with case.guest as guest:
        guest.wait_for_acks(20)
        words = ["promote", "--speed", "1M", "--seed", "convert"]
        if interrupted:
            struck = ended(case.strike("before PREPARE", "promoter", 0, "promote"))
            assert struck.code == -signal.SIGKILL
        else:
            running = case.start(*words)
            assert running.stdout
            running.stdout.readline()
        (entry,) = promoter(case.state, "job", "list", "--json").lines
        assert undo(case, entry["id"], "--dry-run").code == 0
        undone = undo(case, entry["id"])
        assert undone.code == 0, (undone.out, undone.err)
        if not interrupted:
            assert ended(running).code == 7
        assert case.chain() == [clone, base()]
        assert set(tmp_path.glob("*.qcow2*")) == {clone}
        case.prove_at_rest()


def test_without_room_an_undo_says_so_and_goes_on_when_there_is(tmp_path: Path) -> None:
    with file_system("ext4", tmp_path, 400 * MIB) as small:
        clone = linked_clone(base(), small / "clone.qcow2")
        state = tmp_path / "state"
        with VM(tmp_path, [Disk(clone)]) as vm:
            vm.wait_for_acks(20)
            ran = promoter(state, "promote", vm.monitor, "--json")
            assert ran.code == 0, ran.out
            vm.shutdown()
        fill = f"write -q -P 9 {SPARE_OFFSET} 14M"
        subprocess.run(["qemu-io", "-c", fill, clone], check=True)
        ballast = small / "ballast"
        room = int(subprocess.check_output(["df", "--output=avail", "-B1", small]).split()[-1])
        subprocess.run(["fallocate", "-l", str(room - 8 * MIB), ballast], check=True)
        full = promoter(state, "job", "undo", ran.result["id"], "--json")
        assert full.code == 5, full.out
        assert not list(small.glob("*.part-*"))
        ballast.unlink()
        resumed = promoter(state, "job", "resume", "--json")
        assert resumed.code == 0, resumed.out
        assert backing_chain(clone) == [clone, base()]
