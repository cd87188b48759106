"""``--verify``: old chain and new disk are proven the same, on guests that write on meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from promoter.chain import Image
from promoter.storage.images import compare, nbd
from promoter.storage.pace import Pace
from tests import records
from tests.cli import ended, promoter, start
from tests.domains import Libvirtd
from tests.test_libvirt import Case
from tests.vm import (
    MIB,
    VM,
    Disk,
    base,
    blank,
    chain,
    file_system,
    linked_clone,
    qemu_img,
    wait_for,
)


def nodes(vm: VM) -> set[str]:
    return {str(node["node-name"]) for node in vm.qmp("query-named-block-nodes", flat=True)}


def prove_gone(vm: VM, directory: Path) -> None:
    """Nothing is left of the view but the disk that has switched."""
    assert not [node for node in nodes(vm) if node.endswith(("-then", "-save", "-before", "-room"))]
    assert vm.qmp("query-block-exports") == []
    assert not list(directory.glob("*.scratch"))


NEWER = [pytest.param(qemu, marks=pytest.mark.nightly) for qemu in ("newer", "newest")]


@pytest.mark.parametrize("qemu", ["system", *NEWER], indirect=True)
def test_a_promotion_is_verified_while_the_guest_writes(tmp_path: Path, qemu: str) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(100)
        words = ["promote", vm.monitor, "--verify", "--old", "delete", "--json"]
        promoted = promoter(tmp_path / "state", *words)
        assert promoted.code == 0, promoted.out
        (disk,) = promoted.result["disks"]
        size = json.loads(qemu_img("info", "-U", "--output=json", clone))["virtual-size"]
        assert (disk["verified"], disk["verified_bytes"]) == (True, size)
        assert disk["unverified"] is None
        assert disk["old"] is None
        assert disk["switchover_s"] < 1
        assert any(event.get("phase") == "verify" for event in promoted.lines)
        prove_gone(vm, tmp_path)
        vm.wait_for_acks(100)
        vm.kill()
        report = records.check(clone, None, vm.log)
        report.raise_if_bad()
        vm.start()
        vm.wait_for_acks(20)


def test_a_comparison_reads_no_faster_than_it_may(tmp_path: Path) -> None:
    """Two hundred MiB of the old chain, at a hundred a second; the other side comes over NBD."""
    size, socket = 200 * MIB, tmp_path / "nbd"
    old, new = (blank(tmp_path / name, size) for name in ("old.qcow2", "new.qcow2"))
    for image in (old, new):
        subprocess.run(["qemu-io", "-c", f"write -q -P 7 0 {size}", str(image)], check=True)
    serve = ["qemu-nbd", "-k", str(socket), "-r", "-t", "-f", "qcow2", "-x", "new", str(new)]
    chain_of_old = (Image("old", "qcow2", old, "file", "file", size, size),)
    with subprocess.Popen(serve) as server:
        wait_for(socket.exists, "qemu-nbd", 10)
        began = time.monotonic()
        comparing = compare(chain_of_old, nbd(socket, "new"), Pace(100 * MIB), lambda _: None)
        assert asyncio.run(comparing) == ""
        assert time.monotonic() - began > 1.5
        server.terminate()


def plant(target: Path, image_format: str) -> list[int]:
    """Change two bytes that the guest does not write to, behind QEMU's back; where, for the guest:
    in its boot sector, and far behind it in its root file system.
    """
    opened = {"driver": "file", "filename": str(target), "locking": "off"}
    image = "json:" + json.dumps({"driver": image_format, "file": opened})
    extents = json.loads(qemu_img("map", "--output=json", image))
    data = [e for e in extents if e["data"] and not e["zero"] and e["start"] < 32 * MIB]
    places = [(data[0], 0), (data[-1], data[-1]["length"] // 2)]
    with target.open("r+b") as file:
        for extent, within in places:
            file.seek(extent["offset"] + within)
            (byte,) = file.read(1)
            file.seek(extent["offset"] + within)
            file.write(bytes([byte ^ 0xFF]))
    return [extent["start"] + within for extent, within in places]


def prove_told(message: str, planted: list[int]) -> None:
    """The first difference is told to the byte, and the others by their clusters."""
    assert f"at offset {planted[0]}" in message
    found = re.findall(r"0x([0-9a-f]+) to 0x([0-9a-f]+)", message)
    told = [range(int(start, 16), int(end, 16)) for start, end in found]
    assert [place.start for place in told] == [at - at % 65536 for at in planted], message
    assert {len(place) for place in told} == {65536}


def test_a_difference_ends_with_exit_code_8_and_both_disks(tmp_path: Path) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    state = tmp_path / "state"
    target = tmp_path / "target.qcow2"
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(100)
        words = ["--target", target, "--verify", "--old", "delete", "--json"]
        command = ["before PREPARE", "hang", vm.pid, "promote", vm.monitor, *words]
        struck = start(state, *command, module="tests.struck")
        os.waitid(os.P_PID, struck.pid, os.WSTOPPED | os.WNOWAIT)
        where = plant(target, "qcow2")
        os.kill(struck.pid, signal.SIGCONT)
        promoted = ended(struck)
        assert promoted.code == 8, promoted.out
        told = promoted.result
        assert told["error"] == "Different"
        prove_told(told["message"], where)
        (old,) = tmp_path.glob("clone.qcow2.aside-*")
        assert str(old) in told["hint"]
        assert str(target) in told["hint"]
        prove_gone(vm, tmp_path)
        assert vm.files() == [str(target)]
        vm.wait_for_acks(100)
        vm.kill()
    records.check(target, None, vm.log).raise_if_bad()
    assert "backing file" in qemu_img("info", old)
    assert promoter(state, "job", "list", "--json").result["status"] == "failed"


@pytest.mark.parametrize("at", ["begun", pytest.param("compared", marks=pytest.mark.nightly)])
def test_a_promoter_that_is_killed_in_a_verification_is_finished_by_resume(
    tmp_path: Path, at: str
) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    state = tmp_path / "state"
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(100)
        command = [at, "promoter", vm.pid, "promote", vm.monitor, "--verify", "--json"]
        struck = ended(start(state, *command, module="tests.struck"))
        assert struck.code == -signal.SIGKILL
        assert list(vm.qmp("query-block-exports"))
        vm.wait_for_acks(40)
        resumed = promoter(state, "job", "resume", "--json")
        assert resumed.code == 0, resumed.out
        (disk,) = resumed.result["disks"]
        assert disk["verified"]
        prove_gone(vm, tmp_path)
        vm.wait_for_acks(40)
        vm.kill()
        records.check(clone, None, vm.log).raise_if_bad()
    assert "backing file" not in qemu_img("info", clone)


@pytest.mark.nightly
@pytest.mark.parametrize("point", ["viewed", "view prepared"])
def test_a_view_that_nobody_vouches_for_is_no_proof(tmp_path: Path, point: str) -> None:
    """promoter is killed while the guest stands still for its view."""
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    state = tmp_path / "state"
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(100)
        words = ["--verify", "--old", "delete", "--json"]
        command = [point, "promoter", vm.pid, "promote", vm.monitor, *words]
        assert ended(start(state, *command, module="tests.struck")).code == -signal.SIGKILL
        vm.wait_for_acks(40)
        resumed = promoter(state, "job", "resume", "--json")
        assert resumed.code == 0, resumed.out
        (disk,) = resumed.result["disks"]
        if point == "viewed":
            assert not disk["verified"]
            assert "interrupted" in disk["unverified"]
            assert Path(disk["old"]).exists(), "what is not proven is not let go"
        else:
            assert disk["verified"]
        prove_gone(vm, tmp_path)
        vm.wait_for_acks(40)
        vm.kill()
        records.check(clone, None, vm.log).raise_if_bad()


@pytest.mark.nightly
@pytest.mark.parametrize("point", ["begun", "viewed"])
def test_a_qemu_that_dies_in_a_verification_leaves_one_true_disk(
    tmp_path: Path, point: str
) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    state = tmp_path / "state"
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(100)
        command = [point, "qemu", vm.pid, "promote", vm.monitor, "--verify", "--json"]
        struck = ended(start(state, *command, module="tests.struck"))
        assert struck.code == 0, struck.out
        (disk,) = struck.result["disks"]
        assert not disk["verified"]
        assert "went away" in disk["unverified"] or "interrupted" in disk["unverified"]
        vm.wait()
        vm.start()
        vm.wait_for_acks(20)
        vm.kill()
        records.check(clone, None, vm.log).raise_if_bad()
    assert "backing file" not in qemu_img("info", clone)


@pytest.mark.nightly
def test_who_else_uses_the_nbd_server_keeps_it_and_the_guest_its_chain(tmp_path: Path) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    state = tmp_path / "state"
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(20)
        address = {"type": "unix", "data": {"path": str(vm.monitor.with_name("nbd.sock"))}}
        vm.qmp("nbd-server-start", addr=address)
        promoted = promoter(state, "promote", vm.monitor, "--verify", "--json")
        assert promoted.code == 6, promoted.out
        assert "NBD server already running" in promoted.result["message"]
        assert vm.files() == [str(clone)]
        assert [path.name for path in tmp_path.glob("clone*")] == ["clone.qcow2"]
        vm.wait_for_acks(20)
        vm.kill()
        records.check(clone, None, vm.log).raise_if_bad()
    assert "backing file" in qemu_img("info", clone)


def test_a_domains_promotion_is_verified_while_it_writes(
    libvirtd: Libvirtd, tmp_path: Path
) -> None:
    case = Case(libvirtd, tmp_path)
    with case.domain as domain:
        domain.wait_for_acks(60)
        with file_system("ext4", tmp_path, 200 * MIB) as small:
            words = ["promote", *domain.address, "--target-dir", small, "--dry-run"]
            assert promoter(case.state, *words).code == 0
            refused = promoter(case.state, *words, "--verify")
            assert (refused.code, "leave out --verify" in refused.err) == (4, True), refused
        promoted = promoter(case.state, "promote", *domain.address, "--verify", "--json")
        assert promoted.code == 0, promoted.out
        (disk,) = promoted.result["disks"]
        assert disk["verified"], disk
        assert disk["verified_bytes"] > 0
        assert any(event.get("phase") == "verify" for event in promoted.lines)
        case.prove(promoted=True)


@pytest.mark.nightly
def test_a_difference_in_a_domain_is_found(libvirtd: Libvirtd, tmp_path: Path) -> None:
    case = Case(libvirtd, tmp_path)
    with case.domain as domain:
        domain.wait_for_acks(60)
        struck = case.strike("before PREPARE", "hang", "--verify")
        os.waitid(os.P_PID, struck.pid, os.WSTOPPED | os.WNOWAIT)
        (target,) = tmp_path.glob("*.promoted-*")
        where = plant(target, "qcow2")
        os.kill(struck.pid, signal.SIGCONT)
        promoted = ended(struck)
        assert promoted.code == 8, promoted.out
        prove_told(promoted.result["message"], where)
        case.prove(promoted=True)


@pytest.mark.nightly
@pytest.mark.parametrize("whom", ["promoter", "both"])
def test_whoever_is_killed_in_a_domains_verification_it_is_finished(
    libvirtd: Libvirtd, tmp_path: Path, whom: str
) -> None:
    case = Case(libvirtd, tmp_path)
    with case.domain as domain:
        domain.wait_for_acks(60)
        assert ended(case.strike("compared", whom, "--verify")).code == -signal.SIGKILL
        if whom == "both":
            libvirtd.restart()
        resumed = case.resume()
        assert resumed.code == 0, resumed.out
        (disk,) = resumed.result["disks"]
        assert disk["verified"], disk
        case.prove(promoted=True)


@pytest.mark.nightly
def test_a_guest_with_iothreads_is_refused_in_the_plan(tmp_path: Path) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    with VM(tmp_path, [Disk(clone, iothread=True)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(20)
        refused = promoter(tmp_path / "state", "promote", vm.monitor, "--verify", "--json")
        assert refused.code == 4, refused.out
        assert "iothread" in refused.result["message"]
        assert "--verify" in refused.result["hint"]
        assert vm.files() == [str(clone)]
        vm.wait_for_acks(20)


def test_two_disks_one_of_them_throttled_are_verified_beside_what_they_share(
    tmp_path: Path,
) -> None:
    """consolidate --beside, with a rate limit on the comparison."""
    layers = chain(tmp_path, 3)
    data = linked_clone(blank(tmp_path / "data.qcow2", 64 * MIB), tmp_path / "middle.qcow2")
    top = linked_clone(data, tmp_path / "top.qcow2")
    with VM(tmp_path, [Disk(layers[-1]), Disk(top, iops=500)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(60)
        state = tmp_path / "state"
        words = ["consolidate", vm.monitor, "--beside", "--verify", "--json"]
        plan = promoter(state, *words, "--dry-run").result
        assert all(disk["verify_bytes"] > 0 for disk in plan["disks"])
        done = promoter(state, *words, "--speed", "200M")
        assert done.code == 0, done.out
        assert [disk["unverified"] for disk in done.result["disks"]] == [None, None]
        prove_gone(vm, tmp_path)
        vm.wait_for_acks(60)
        vm.kill()
    records.check(layers[-1], None, vm.log).raise_if_bad()


@pytest.mark.nightly
def test_a_view_without_room_is_given_up_and_the_guest_writes_on(tmp_path: Path) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    state = tmp_path / "state"
    with (
        file_system("ext4", tmp_path, 256 * MIB) as small,
        VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm,
    ):
        vm.wait_for_acks(60)
        target = small / "target.qcow2"
        words = ["--target", target, "--preallocation", "full", "--seed", "none", "--verify"]
        command = ["begun", "hang", vm.pid, "promote", vm.monitor, *words, "--json"]
        struck = start(state, *command, module="tests.struck")
        os.waitid(os.P_PID, struck.pid, os.WSTOPPED | os.WNOWAIT)
        with target.open("r+b") as file:  # room for all its own clusters
            os.posix_fallocate(file.fileno(), 0, target.stat().st_size)
        with (small / "fill").open("wb", buffering=0) as fill, suppress(OSError):
            while fill.write(bytes(64 * 1024)):
                pass
        vm.wait_for_acks(300)
        os.kill(struck.pid, signal.SIGCONT)
        promoted = ended(struck)
        assert promoted.code == 0, promoted.out
        (disk,) = promoted.result["disks"]
        assert not disk["verified"]
        assert "qemu-img" in disk["unverified"]
        assert Path(disk["old"]).exists()
        vm.wait_for_acks(60)
        vm.kill()
        records.check(target, None, vm.log).raise_if_bad()
