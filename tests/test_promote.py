"""Promote, on guests that write while it works: nothing is lost, and nothing else changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from itertools import product
from pathlib import Path

import pytest

from promoter.guests.bugs import loses_writes_at_start, unmaps_wrongly
from tests import records
from tests.cli import Ran, ended, promoter, start
from tests.deltas import read_until
from tests.vm import (
    KEY,
    MIB,
    SPARE_OFFSET,
    VM,
    Disk,
    QMPError,
    Style,
    base,
    blank,
    chain,
    encrypted_clone,
    file_system,
    linked_clone,
    qemu_img,
    wait_for,
)

SLOW = "2M"  # a seed at this speed takes about 20 s: time for others to interfere


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def untouched_base() -> Iterator[Path]:
    before = digest(base())
    yield base()
    assert digest(base()) == before


def prove_full_clone(disk: Path, log: Path) -> records.Report:
    """The disk stands alone, is clean, and holds every acknowledged record."""
    assert "backing file" not in qemu_img("info", disk)
    qemu_img("check", "-q", disk)
    report = records.check(disk, None, log)
    report.raise_if_bad()
    return report


def file_names(vm: VM) -> set[str]:
    return {str(node["file"]) for node in vm.qmp("query-named-block-nodes", flat=True)}


UNUSUAL = [case for at, case in enumerate(product([1, 2, 5], Style)) if at % 4]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("qemu", "depth", "style"),
    [
        *(pytest.param("system", *case, marks=pytest.mark.nightly) for case in UNUSUAL),
        ("system", 1, Style.NODES),
        ("system", 2, Style.INLINE),
        ("system", 5, Style.DRIVE),
        ("newer", 1, Style.INLINE),
        ("newer", 2, Style.DRIVE),
        ("newer", 5, Style.NODES),
        ("newest", 1, Style.NODES),
        ("newest", 2, Style.DRIVE),
    ],
    indirect=["qemu"],
)
def test_a_writing_clone_of_any_depth_becomes_a_full_clone_in_place(
    tmp_path: Path, untouched_base: Path, qemu: str, depth: int, style: Style
) -> None:
    layers = chain(tmp_path, depth)
    sibling = linked_clone(untouched_base, tmp_path / "sibling.qcow2")
    before = {layer: digest(layer) for layer in (*layers[:-1], sibling)}
    with VM(tmp_path, [Disk(layers[-1], style=style)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(100)
        promoted = promoter(tmp_path / "state", "promote", vm.monitor, "--json")
        assert promoted.code == 0, promoted.out
        vm.wait_for_acks(100)
        assert not file_names(vm) & {str(layer) for layer in layers}
        (disk,) = promoted.result["disks"]
        assert promoted.result["status"] == "done"
        assert (disk["disk"], disk["target"]) == ("vd0", str(layers[-1]))
        assert 0 < disk["switchover_s"] < 1
        assert disk["mirrored_bytes"] > 0 < disk["seeded_bytes"]
        assert Path(disk["old"]).exists()
        vm.shutdown()
        assert prove_full_clone(layers[-1], vm.log).records > 200
        vm.start()
        vm.wait_for_acks(20)
        vm.shutdown()
    prove_full_clone(layers[-1], vm.log)
    assert {layer: digest(layer) for layer in before} == before


@pytest.mark.sampled(6)
@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
@pytest.mark.parametrize("seed", ["auto", "convert", "none"])
def test_a_target_elsewhere_is_a_full_clone_and_the_old_path_is_gone(
    tmp_path: Path, untouched_base: Path, image_format: str, seed: str
) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    target = tmp_path / f"target.{image_format}"
    options = ["--target", target, "--format", image_format, "--seed", seed]
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(60)
        promoted = promoter(tmp_path / "state", "promote", vm.monitor, *options, "--json")
        assert promoted.code == 0, promoted.out
        vm.wait_for_acks(60)
        vm.shutdown()
    assert not clone.exists()
    assert not clone.is_symlink()
    old = Path(promoted.result["disks"][0]["old"])
    assert "backing file" in qemu_img("info", old)
    assert records.check(target, image_format, vm.log).findings == ()
    assert "backing file" not in qemu_img("info", target)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("words", "layout"),
    [
        (["--cluster-size", "2M"], {"cluster-size": 2 * MIB}),
        (["--cluster-size", "4k"], {"cluster-size": 4096}),
        (["--extended-l2"], {"extended-l2": True, "cluster-size": 65536}),
        (["--preallocation", "metadata", "--seed", "none"], {"cluster-size": 65536}),
        (["--preallocation", "full"], {"cluster-size": 65536}),
    ],
)
def test_the_layout_of_the_new_disk_can_be_chosen(
    tmp_path: Path, untouched_base: Path, words: list[str], layout: dict[str, object]
) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(60)
        promoted = promoter(tmp_path / "state", "promote", vm.monitor, *words, "--json")
        assert promoted.code == 0, promoted.out
        vm.wait_for_acks(20)
        vm.shutdown()
    prove_full_clone(clone, vm.log)
    info = json.loads(qemu_img("info", "--output=json", clone))
    found = info | info["format-specific"]["data"]
    assert {key: found[key] for key in layout} == layout
    if "--preallocation" in words:
        assert clone.stat().st_size >= info["virtual-size"]
        assert (info["actual-size"] >= info["virtual-size"]) is ("full" in words)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("depth", [1, 2])
def test_an_encrypted_clone_is_promoted_to_clear_text_when_asked(
    tmp_path: Path, untouched_base: Path, depth: int
) -> None:
    """With two layers the lower one is encrypted too: only QEMU can read it."""
    target, options = tmp_path / "target.qcow2", "encrypt.format=luks,encrypt.key-secret=key"
    below, key = untouched_base, ""
    if depth == 2:
        below = encrypted_clone(below, tmp_path / "below.qcow2")
        words = ("driver=qcow2", "file.driver=file", f"file.filename={below}", *options.split(","))
        key = "".join(f",backing.{word}" for word in words)
    clone = encrypted_clone(below, tmp_path / "clone.qcow2")
    disk = Disk(clone, options=options + key)
    with VM(tmp_path, [disk], writer={"rate": 0}, extra=["-object", KEY]) as vm:
        vm.wait_for_acks(60)
        asked = ("--lose", "encryption", "--target", target, "--json")
        promoted = promoter(tmp_path / "state", "promote", vm.monitor, *asked)
        assert promoted.code == 0, promoted.out
        assert promoted.result["disks"][0]["seed"] == ("none" if depth == 2 else "convert")
        assert any("clear text" in warning for warning in promoted.lines[0]["warnings"])
        vm.wait_for_acks(60)
        vm.shutdown()
    prove_full_clone(target, vm.log)
    assert "encrypted: yes" in qemu_img("info", promoted.result["disks"][0]["old"])
    assert "encrypted: yes" not in qemu_img("info", target)


@pytest.mark.nightly
def test_internal_snapshots_stay_in_the_old_overlay_when_asked(
    tmp_path: Path, untouched_base: Path
) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    qemu_img("snapshot", "-c", "before-upgrade", clone)
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(60)
        words = ("--lose", "snapshots", "--json")
        promoted = promoter(tmp_path / "state", "promote", vm.monitor, *words)
        assert promoted.code == 0, promoted.out
        vm.wait_for_acks(20)
        vm.shutdown()
    prove_full_clone(clone, vm.log)
    assert "before-upgrade" not in qemu_img("snapshot", "-l", clone)
    assert "before-upgrade" in qemu_img("snapshot", "-l", promoted.result["disks"][0]["old"])


@pytest.mark.nightly
def test_a_copied_seed_needs_no_conversion(tmp_path: Path, untouched_base: Path) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(60)
        promoted = promoter(tmp_path / "state", "promote", vm.monitor, "--seed", "copy", "--json")
        assert promoted.code == 0, promoted.out
        assert promoted.result["disks"][0]["seed"] == "copy"
        vm.wait_for_acks(20)
        vm.shutdown()
    prove_full_clone(clone, vm.log)


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    with file_system("xfs", tmp_path, 512 * MIB) as mounted:
        yield mounted


def test_a_seed_is_reflinked_where_the_file_system_can(xfs: Path) -> None:
    own_base = xfs / "base.qcow2"
    own_base.write_bytes(base().read_bytes())
    before = digest(own_base)
    clone = linked_clone(own_base, xfs / "clone.qcow2")
    with VM(xfs, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(60)
        promoted = promoter(xfs / "state", "promote", vm.monitor, "--json")
        assert promoted.code == 0, promoted.out
        assert promoted.result["disks"][0]["seed"] == "reflink"
        vm.wait_for_acks(60)
        vm.shutdown()
    prove_full_clone(clone, vm.log)
    assert digest(own_base) == before


def fill(image: Path, pattern: int, mebibytes: int) -> None:
    """Write over the beginning of the area that no guest uses."""
    command = f"write -q -P {pattern} {SPARE_OFFSET} {mebibytes}M"
    subprocess.run(["qemu-io", "-c", command, str(image)], check=True)


def test_a_clone_of_a_clone_shares_the_lowest_layer_and_gets_the_others(xfs: Path) -> None:
    root = xfs / "root.qcow2"
    root.write_bytes(base().read_bytes())
    fill(root, 8, 8)
    layers = chain(xfs, 3, root)
    fill(layers[1], 9, 8)
    before = {layer: digest(layer) for layer in layers[:-1]}
    with VM(xfs, [Disk(layers[-1])], writer={"rate": 0}) as vm:
        vm.wait_for_acks(60)
        promoted = promoter(xfs / "state", "promote", vm.monitor, "--json")
        assert promoted.code == 0, promoted.out
        assert promoted.result["disks"][0]["seed"] == "reflink"
        assert promoted.lines[0]["disks"][0]["required_bytes"] > 8 * MIB, "to write over the base"
        vm.wait_for_acks(60)
        vm.shutdown()
    prove_full_clone(layers[-1], vm.log)
    patterns = (f"read -q -P {9 if n == 1 else n} {SPARE_OFFSET + n * MIB} 1M" for n in (1, 2, 3))
    commands = (word for pattern in patterns for word in ("-c", pattern))
    subprocess.run(["qemu-io", "-r", *commands, str(layers[-1])], check=True)
    assert {layer: digest(layer) for layer in before} == before
    assert not list(xfs.glob("*.delta"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", ["convert", "copy", "none"])
def test_a_running_promotion_takes_another_speed(
    tmp_path: Path, untouched_base: Path, seed: str
) -> None:
    state = tmp_path / "state"
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    with VM(tmp_path, [Disk(clone)]) as vm:
        vm.wait_for_acks(20)
        words = ("promote", vm.monitor, "--seed", seed, "--speed", "100k", "--json")
        process = start(state, *words)
        out = process.stdout
        assert out
        phase = "mirror" if seed == "none" else "seed"
        wait_for(lambda: f'"phase": "{phase}"' in out.readline(), phase, 20)
        identity = only_job(state)["id"]
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        assert promoter(state, "job", "speed", identity, "1X").code == 2
        changed = promoter(state, "job", "speed", identity, "0", "--json")
        assert changed.code == 0, changed
        assert changed.result["speed"] == 0
        ran = ended(process, timeout=30)
        assert ran.code == 0, ran
        late = promoter(state, "job", "speed", identity, "1M")
        assert late.code == 4
        assert "not running" in late.err
        vm.wait_for_acks(20)
        vm.shutdown()
    prove_full_clone(clone, vm.log)


@pytest.mark.nightly
@pytest.mark.parametrize(("words", "together"), [([], False), (["--parallel", "2"], True)])
def test_disks_on_one_file_system_are_seeded_in_turn_unless_asked_for_more(
    tmp_path: Path, untouched_base: Path, words: list[str], together: bool
) -> None:
    clones = [linked_clone(untouched_base, tmp_path / f"{name}.qcow2") for name in "ab"]
    with VM(tmp_path, [Disk(clone) for clone in clones]) as vm:
        vm.wait_for_acks(20)
        slowly = ("promote", vm.monitor, "--speed", "20M", *words, "--json")
        promoted = promoter(tmp_path / "state", *slowly)
        assert promoted.code == 0, promoted.out
        vm.shutdown()
    seeding = [line["disk"] for line in promoted.lines if line.get("phase") == "seed"]
    assert len(seeding) > 8
    in_turn = seeding == sorted(seeding)
    assert in_turn is not together
    prove_full_clone(clones[0], vm.log)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("qemu", ["newer"], indirect=True)
@pytest.mark.parametrize("copy_mode", ["write-blocking", "background"])
def test_a_qemu_that_loses_writes_at_a_mirrors_start_loses_none(
    tmp_path: Path, untouched_base: Path, qemu: str, copy_mode: str
) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    below = blank(tmp_path / "data-base.qcow2", 240 * MIB)
    data = linked_clone(below, tmp_path / "data.qcow2", cluster_size="4k")
    scattered = "".join(f"write -q -P 0 {n * 8192} 4k\n" for n in range(8000))
    command = ["qemu-io", str(data)]
    subprocess.run(command, input=scattered, text=True, stdout=subprocess.DEVNULL, check=True)
    disks = [Disk(clone), Disk(data)]
    with VM(tmp_path, disks, writer={"rate": 0, "lanes": 8, "dev": "/dev/vdb"}) as vm:
        vm.wait_for_acks(100)
        words = ("vd1", "--copy-mode", copy_mode, "--json")
        promoted = promoter(tmp_path / "state", "promote", vm.monitor, *words)
        assert promoted.code == 0, promoted.out
        assert vm.qmp("query-status")["status"] == "running"
        affected = loses_writes_at_start(version(vm))
        pause = promoted.result["disks"][0]["start_pause_s"]
        assert (pause is not None and 0 < pause < 10) is affected
        vm.wait_for_acks(100)
        vm.shutdown()
    prove_full_clone(data, vm.log)


@pytest.mark.parametrize("qemu", ["newest"], indirect=True)
@pytest.mark.usefixtures("qemu")
def test_only_a_target_that_is_still_blank_is_taken_for_zeros(
    tmp_path: Path, untouched_base: Path
) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    commands = ["-trace", "handle_qmp_command"]
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}, extra=commands) as vm:
        vm.wait_for_acks(60)
        words = ("promote", vm.monitor, "--seed", "none", "--speed", "8M", "--json")
        promoting = start(tmp_path / "state", *words)
        read_until(promoting, '"phase": "mirror"')
        promoting.kill()
        ended(promoting)
        (job,) = vm.qmp("query-jobs")
        vm.qmp("block-job-cancel", device=job["id"], force=True)
        resumed = promoter(tmp_path / "state", "job", "resume", "--json")
        assert resumed.code == 0, resumed.out
        vm.wait_for_acks(60)
        vm.shutdown()
    mirrors = [line for line in vm.stderr.read_text().splitlines() if "blockdev-mirror" in line]
    assert ["target-is-zero" in line for line in mirrors] == [True, False]
    prove_full_clone(clone, vm.log)


@pytest.mark.nightly
@pytest.mark.parametrize("qemu", ["newer"], indirect=True)
@pytest.mark.usefixtures("qemu")
def test_a_guest_with_iothreads_that_is_continued_meanwhile_stays_where_it_is(
    tmp_path: Path, untouched_base: Path
) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    case = Interference(tmp_path, Disk(clone, iothread=True), "-S")
    with case.vm as vm:
        process = case.seeding()
        vm.qmp("cont")
        vm.wait_for_acks(20)
        ran = case.end(process)
        assert ran.code == 4, ran
        assert "interrupt" in ran.out
        vm.kill()
    records.check(clone, "qcow2", vm.log).raise_if_bad()
    assert "backing file" in qemu_img("info", clone)
    assert not list(tmp_path.glob("*.part-*"))


def version(vm: VM) -> tuple[int, int, int]:
    found = vm.qmp("query-version")["qemu"]
    return found["major"], found["minor"], found["micro"]


def test_a_guest_that_discards_loses_nothing_and_is_told_to_trim_again(
    tmp_path: Path, untouched_base: Path
) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    disk = Disk(clone, options="discard=unmap,detect-zeroes=unmap")
    with VM(tmp_path, [disk], writer={"trim": 1, "rate": 0}) as vm:
        vm.wait_for_acks(60)
        words = ("--seed", "none", "--speed", "10M")
        promoted = promoter(tmp_path / "state", "promote", vm.monitor, *words)
        assert promoted.code == 0, promoted
        assert "run fstrim in the guest" in promoted.out
        unsafe = unmaps_wrongly(version(vm))
        assert ("detect-zeroes=on until" in promoted.out) is unsafe
        (entry,) = vm.qmp("query-block")
        assert entry["inserted"]["detect_zeroes"] == ("on" if unsafe else "unmap")
        vm.wait_for_acks(60)
        vm.shutdown()
    prove_full_clone(clone, vm.log)


def two_disks(directory: Path, data_directory: Path) -> list[Path]:
    """A root disk, and a data disk that the writer has for itself; both linked clones."""
    below = blank(data_directory / "data-base.qcow2", 96 * MIB)
    root = linked_clone(base(), directory / "clone.qcow2")
    return [root, linked_clone(below, data_directory / "data.qcow2")]


DATA_WRITER: dict[str, object] = {"rate": 0, "dev": "/dev/vdb"}


def test_when_one_target_fails_before_the_commit_both_disks_stay(
    tmp_path: Path, untouched_base: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", small], check=True)
    try:
        state, paths = tmp_path / "state", two_disks(tmp_path, small)
        with VM(tmp_path, [Disk(path) for path in paths], writer={"dev": "/dev/vdb"}) as vm:
            vm.wait_for_acks(20)
            struck = ("before SWITCH_OVER", "hang", vm.pid, "promote", vm.monitor, "--json")
            process = start(state, *struck, module="tests.struck")
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            jobs = vm.qmp("query-jobs")
            assert [job["status"] for job in jobs] == ["ready", "ready"]
            vm.qmp("block-job-cancel", device=jobs[1]["id"], force=True)
            os.kill(process.pid, signal.SIGCONT)
            ran = ended(process)
            assert ran.code == 6, ran.out
            assert vm.qmp("query-jobs") == []
            vm.wait_for_acks(20)
            vm.shutdown()
            for path in paths:
                assert "backing file" in qemu_img("info", path)
            records.check(paths[1], "qcow2", vm.log).raise_if_bad()
            assert not list(tmp_path.rglob("*.qcow2.*"))
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("point", ["renamed", "finalized"])
@pytest.mark.parametrize("whom", ["promoter", "promoter and guard", "both"])
def test_a_kill_between_the_commits_of_two_disks_leaves_both_promoted(
    tmp_path: Path, untouched_base: Path, point: str, whom: str
) -> None:
    state, paths = tmp_path / "state", two_disks(tmp_path, tmp_path)
    with VM(tmp_path, [Disk(path) for path in paths], writer=DATA_WRITER) as vm:
        vm.wait_for_acks(60)
        struck = (point, whom, vm.pid, "promote", vm.monitor, "--json")
        assert ended(start(state, *struck, module="tests.struck")).code == -signal.SIGKILL
        if whom == "promoter and guard":
            assert "pending" in [job["status"] for job in vm.qmp("query-jobs")]
        resumed = promoter(state, "job", "resume", "--json")
        assert resumed.code == 0, resumed.out
        assert [disk["disk"] for disk in resumed.result["disks"]] == ["vd0", "vd1"]
        if whom == "both":
            vm.wait()
            vm.start()
        vm.wait_for_acks(20)
        vm.shutdown()
    prove_full_clone(paths[1], vm.log)
    assert "backing file" not in qemu_img("info", paths[0])


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("qemu")
def test_the_disks_of_a_guest_switch_together(tmp_path: Path, untouched_base: Path) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    below = blank(tmp_path / "data-base.qcow2", 96 * MIB)
    data = linked_clone(below, tmp_path / "data.qcow2")
    full = blank(tmp_path / "full.qcow2", 16 * MIB)
    disks = [Disk(clone), Disk(data), Disk(full)]
    with VM(tmp_path, disks, writer={"rate": 0, "dev": "/dev/vdb"}) as vm:
        vm.wait_for_acks(60)
        promoted = promoter(tmp_path / "state", "promote", vm.monitor, "--json")
        assert promoted.code == 0, promoted.out
        assert [disk["disk"] for disk in promoted.result["disks"]] == ["vd0", "vd1"]
        assert promoted.lines[0]["nothing_to_do"] == ["vd2"]
        vm.wait_for_acks(60)
        vm.shutdown()
    prove_full_clone(data, vm.log)
    assert "backing file" not in qemu_img("info", clone)


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("qemu")
def test_after_it_a_snapshot_by_name_and_one_onto_a_node_lose_nothing(
    tmp_path: Path, untouched_base: Path
) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    first, second = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(60)
        promoted = promoter(tmp_path / "state", "promote", vm.monitor, "--json")
        node = promoted.result["disks"][0]["node"]
        vm.wait_for_acks(20)
        vm.qmp(
            "blockdev-snapshot-sync",
            node_name=node,
            snapshot_file=str(first),
            snapshot_node_name="first",
            format="qcow2",
        )
        vm.wait_for_acks(60)
        qemu_img("create", "-q", "-f", "qcow2", second, "192M")
        vm.qmp(
            "blockdev-add",
            driver="qcow2",
            node_name="second",
            backing=None,
            file={"driver": "file", "filename": str(second), "auto-read-only": True},
        )
        vm.qmp("blockdev-snapshot", node="first", overlay="second")
        vm.wait_for_acks(60)
        vm.kill()
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", first, "-F", "qcow2", second)
    records.check(second, "qcow2", vm.log).raise_if_bad()
    again = VM(tmp_path, [Disk(second)], writer={"rate": 0})
    with again:
        again.wait_for_acks(20)
        again.shutdown()
        state = tmp_path / "state"
        assert promoter(state, "job", "resume").code == 0
    spare = Path(promoted.result["disks"][0]["spare"])
    assert spare.exists(), "the first snapshot's header names it"
    records.check(second, "qcow2", vm.log).raise_if_bad()


def test_the_second_name_goes_when_its_qemu_is_gone(tmp_path: Path, untouched_base: Path) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    state = tmp_path / "state"
    with VM(tmp_path, [Disk(clone)]) as vm:
        vm.wait_for_acks(5)
        promoted = promoter(state, "promote", vm.monitor, "--json")
        spare = Path(promoted.result["disks"][0]["spare"])
        assert promoter(state, "job", "resume").code == 0
        assert spare.samefile(clone), "its QEMU still knows the disk by this name"
        vm.shutdown()
        assert promoter(state, "job", "resume").code == 0
    assert not spare.exists()
    prove_full_clone(clone, vm.log)


def only_job(state: Path) -> dict[str, str]:
    (job,) = promoter(state, "job", "list", "--json").lines
    return job


class Interference:
    """A slow promotion whose seed leaves others the time to interfere."""

    def __init__(self, directory: Path, disk: Disk, *options: str) -> None:
        self.directory, self.state = directory, directory / "state"
        self.vm = VM(directory, [disk], writer={"rate": 0}, extra=options)

    def seeding(self, *options: str) -> subprocess.Popen[str]:
        command = ("promote", self.vm.monitor, "--speed", SLOW, *options, "--json")
        process = start(self.state, *command)
        wait_for(lambda: bool(list(self.directory.glob("*.part-*"))), "the seed to grow", 20)
        return process

    def end(self, process: subprocess.Popen[str]) -> Ran:
        faster = promoter(self.state, "job", "speed", only_job(self.state)["id"], "0")
        assert faster.code == 0, faster
        ran = ended(process, timeout=120)
        self.vm.wait_for_acks(40)
        return ran


def test_a_snapshot_by_somebody_else_during_the_seed_is_promoted_too(
    tmp_path: Path, untouched_base: Path
) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    case = Interference(tmp_path, Disk(clone))
    snapshot = tmp_path / "snapshot.qcow2"
    with case.vm as vm:
        vm.wait_for_acks(60)
        process = case.seeding()
        vm.qmp(
            "blockdev-snapshot-sync",
            node_name="disk0",
            snapshot_file=str(snapshot),
            snapshot_node_name="snapshot",
            format="qcow2",
        )
        ran = case.end(process)
        assert ran.code == 0, ran.out
        assert ran.result["disks"][0]["target"] == str(snapshot)
        assert any("replan" in line.get("action", "") for line in ran.lines)
        vm.kill()
    report = records.check(snapshot, "qcow2", vm.log)
    report.raise_if_bad()
    assert "backing file" not in qemu_img("info", snapshot)
    assert "backing file" in qemu_img("info", clone), "the layer below is as it was"


@pytest.mark.nightly
def test_a_commit_into_a_layer_that_is_being_seeded_is_refused_by_its_lock(
    tmp_path: Path, untouched_base: Path
) -> None:
    layers = chain(tmp_path, 3)
    case = Interference(tmp_path, Disk(layers[-1]))
    with case.vm as vm:
        vm.wait_for_acks(60)
        process = case.seeding()
        nodes = {node["file"]: node["node-name"] for node in formats(vm)}
        top, bottom = nodes[str(layers[2])], nodes[str(layers[1])]
        with pytest.raises(QMPError, match="lock"):
            vm.qmp("block-commit", job_id="theirs", device="disk0", top_node=top, base_node=bottom)
        ran = case.end(process)
        assert ran.code == 0, ran.out
        vm.shutdown()
    prove_full_clone(layers[-1], vm.log)


@pytest.mark.nightly
def test_a_commit_of_the_clone_into_its_base_while_that_is_copied_is_noticed(
    tmp_path: Path, untouched_base: Path
) -> None:
    own_base = tmp_path / "base.qcow2"
    own_base.write_bytes(untouched_base.read_bytes())
    clone = linked_clone(own_base, tmp_path / "clone.qcow2")
    case = Interference(tmp_path, Disk(clone))
    with case.vm as vm:
        vm.wait_for_acks(60)
        process = case.seeding("--seed", "copy")
        vm.qmp("block-commit", job_id="theirs", device="disk0")
        wait_for(lambda: vm.qmp("query-jobs")[0]["status"] == "ready", "the commit", 60)
        vm.qmp("job-complete", id="theirs")
        wait_for(lambda: not vm.qmp("query-jobs"), "the commit's end", 30)
        ran = case.end(process)
        assert ran.code == 0, ran.out
        assert ran.result["disks"] == []
        vm.shutdown()
    prove_full_clone(own_base, vm.log)
    assert {path.name for path in tmp_path.glob("*.qcow2*")} == {"base.qcow2", "clone.qcow2"}


@pytest.mark.nightly
def test_a_stream_by_somebody_else_during_the_seed_leaves_nothing_to_do(
    tmp_path: Path, untouched_base: Path
) -> None:
    clone = linked_clone(untouched_base, tmp_path / "clone.qcow2")
    case = Interference(tmp_path, Disk(clone))
    with case.vm as vm:
        vm.wait_for_acks(60)
        process = case.seeding()
        vm.qmp("block-stream", job_id="theirs", device="disk0")
        wait_for(lambda: not vm.qmp("query-jobs"), "the stream", 30)
        ran = case.end(process)
        assert ran.code == 0, ran.out
        assert ran.result["disks"] == []
        vm.shutdown()
    prove_full_clone(clone, vm.log)
    assert {path.name for path in tmp_path.glob("clone.qcow2*")} == {"clone.qcow2"}


def formats(vm: VM) -> list[dict[str, str]]:
    nodes = vm.qmp("query-named-block-nodes", flat=True)
    return [node for node in nodes if node["drv"] == "qcow2"]
