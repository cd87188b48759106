"""What snapshot and consolidate promise, on both kinds of guest."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests import records
from tests.deltas import Case, Make, backing_chain, digest
from tests.domains import Domain, Libvirtd
from tests.vm import (
    MIB,
    SPARE_OFFSET,
    VM,
    Disk,
    Style,
    base,
    blank,
    chain,
    linked_clone,
    qemu_img,
)

PAUSE = 0.5  # --max-pause, in seconds
NOISE = 1.0  # two guests under TCG share this machine with the tests


NIGHTLY_LIBVIRT = pytest.mark.parametrize(
    "make", ["qemu", pytest.param("libvirt", marks=pytest.mark.nightly)], indirect=True
)


@pytest.fixture(params=["qemu", "libvirt"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes a guest of one kind; it writes as fast as it can."""
    if request.param == "qemu":
        return lambda disks: VM(tmp_path, disks, writer={"rate": 0})
    libvirtd: Libvirtd = request.getfixturevalue("libvirtd")
    return lambda disks: Domain(libvirtd, tmp_path, disks)


def merged(result: dict[str, Any]) -> list[Path]:
    return [Path(file) for disk in result["disks"] for file in disk["kept"]]


def fill(image: Path, length: int) -> None:
    """Write to the guest's spare area in a layer, so that it has something to merge."""
    pattern = f"write -q -P 7 {SPARE_OFFSET} {length}"
    subprocess.run(["qemu-io", "-c", pattern, str(image)], check=True)


# --- snapshots --------------------------------------------------------------------------------


@pytest.mark.sampled(2)
def test_a_snapshot_freezes_every_disk_at_one_instant(make: Make, tmp_path: Path) -> None:
    first = linked_clone(base(), tmp_path / "first.qcow2")
    second = blank(tmp_path / "second.qcow2", MIB)
    case = Case(make, tmp_path, [first, second])
    with case.guest as guest:
        guest.wait_for_acks(60)
        guest.pause()
        log = tmp_path / "then.txt"
        shutil.copy(guest.log, log)
        result = case.done("snapshot")
        assert guest.paused
        assert [disk["switchover_s"] for disk in result["disks"]] == [None, None]
        guest.cont()
        guest.wait_for_acks(40)
        frozen, other = [Path(disk["source"]) for disk in result["disks"]]
        assert case.chain(0)[1:] == [frozen, base()]
        assert case.chain(1)[1:] == [other]
        before = digest(frozen), digest(other)
        again = case.done("snapshot")
        first_pause, second_pause = (disk["switchover_s"] for disk in again["disks"])
        assert 0 < first_pause == second_pause < PAUSE + NOISE
        case.prove_at_rest()
        case.prove_boots(4)
        assert (digest(frozen), digest(other)) == before
    records.check(frozen, None, log).raise_if_bad()
    log.unlink()
    assert backing_chain(case.active)[2] == frozen
    assert case.resume().code == 0
    assert len(case.files() - {"state"}) == 6, "three layers of each disk, by one name each"


@pytest.mark.nightly
def test_snapshots_promotions_and_consolidations_follow_each_other(
    make: Make, tmp_path: Path
) -> None:
    case = Case(make, tmp_path, [linked_clone(base(), tmp_path / "disk.qcow2")])
    with case.guest as guest:
        guest.wait_for_acks(40)
        first = case.snapshot()
        assert len(case.chain()) == 3
        case.done("promote", "--old", "delete")
        assert len(case.chain()) == 1
        case.snapshot()
        case.snapshot()
        assert len(case.chain()) == 3
        result = case.done("consolidate", "--old", "delete")
        (only,) = case.chain()
        assert only.samefile(result["disks"][0]["target"]), (
            "promoter froze it, so it is the guest's"
        )
        last = case.snapshot()
        assert len(case.chain()) == 2
        case.prove_at_rest()
        case.prove_boots(2)
    case.prove_tidy(case.active, last, first, case.state)


@pytest.mark.nightly
def test_what_follows_a_commit_finds_the_path_that_the_guest_boots_from(tmp_path: Path) -> None:
    """QEMU knows the disk by the layer's own name then, which says nothing of that path."""
    layers = chain(tmp_path, 2)
    case = Case(lambda disks: VM(tmp_path, disks, writer={"rate": 0}), tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(40)
        case.done("consolidate")
        assert case.chain() == [layers[1], base()]
        case.snapshot()
        guest.wait_for_acks(20)
        case.prove_at_rest()
        case.prove_boots(3)


@pytest.mark.nightly
def test_a_dry_run_of_a_snapshot_changes_nothing(make: Make, tmp_path: Path) -> None:
    case = Case(make, tmp_path, [linked_clone(base(), tmp_path / "disk.qcow2")])
    with case.guest:
        files, before = case.files(), case.chain()
        ran = case.run("snapshot", "--dry-run")
        assert (ran.code, ran.result["status"]) == (0, "planned")
        plan = ran.lines[0]["disks"][0]
        assert (plan["way"], plan["merged"]) == ("snapshot", [])
        case.prove_unchanged(before, files)


# --- consolidation ------------------------------------------------------------------------------


@NIGHTLY_LIBVIRT
@pytest.mark.parametrize(
    "deltas", [2, pytest.param(5, marks=pytest.mark.nightly)], ids="{} deltas".format
)
def test_the_deltas_are_merged_in_one_pass(make: Make, tmp_path: Path, deltas: int) -> None:
    layers = chain(tmp_path, deltas + 1)
    for layer in layers[2:]:
        fill(layer, 8 * MIB)
    case = Case(make, tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(60)
        assert case.chain() == layers[::-1]
        result = case.done("consolidate")
        (disk,) = result["disks"]
        assert disk["way"] == "commit"
        assert disk["source"] == str(layers[-1])
        assert 0 < disk["switchover_s"] < PAUSE + NOISE
        assert disk["mirrored_bytes"] >= 8 * MIB
        kept = merged(result)
        assert len(kept) == deltas
        assert all(".merged-" in path.name and path.exists() for path in kept)
        assert len(case.chain()) == 2
        case.prove_at_rest()
        case.prove_boots(2)
        first = [layers[1]] if not case.plain else [layers[1], layers[-1]]
        case.prove_tidy(*first, *kept, case.state)


@pytest.mark.nightly
def test_what_several_layers_hold_is_copied_once(tmp_path: Path) -> None:
    layers = chain(tmp_path, 6)
    for layer in layers[2:]:
        fill(layer, 16 * MIB)
    case = Case(
        lambda disks: VM(tmp_path, disks, writer={"rate": 5, "lanes": 1}), tmp_path, layers[-1:]
    )
    with case.guest as guest:
        guest.wait_for_acks(5)
        (disk,) = case.done("consolidate")["disks"]
        assert 16 * MIB <= disk["mirrored_bytes"] < 2 * 16 * MIB


@NIGHTLY_LIBVIRT
def test_layers_under_the_active_one_are_merged_without_a_switchover(
    make: Make, tmp_path: Path
) -> None:
    layers = chain(tmp_path, 5)  # base, 1, 2, 3, 4, 5
    case = Case(make, tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(40)
        result = case.done("consolidate", "--top", layers[4], "--base", "layer2.qcow2")
        (disk,) = result["disks"]
        assert (disk["way"], disk["switchover_s"]) == ("commit below", None)
        kept = merged(result)
        assert [path.name[:12] for path in kept] == ["layer4.qcow2", "layer3.qcow2"]
        assert case.chain() == [layers[5], layers[2], layers[1], base()]
        case.prove_at_rest()
        case.prove_boots(4)
        case.prove_tidy(*layers[1:3], layers[5], *kept, case.state)


@pytest.mark.parametrize("read_only", ["on", "off"])
def test_what_is_merged_below_is_flushed_or_it_is_refused(tmp_path: Path, read_only: str) -> None:
    """QEMU flushes it where it has the layers open read-only. A pulled plug shows that."""
    layers = chain(tmp_path, 4)  # base, 1, 2, 3, 4
    opened: list[str] = []
    for number, layer in enumerate(layers[1:-1], 1):
        node = f"driver=qcow2,node-name=layer{number},read-only={read_only}"
        node += f",file.driver=file,file.filename={layer},file.auto-read-only=on"
        below = f",backing=layer{number - 1}" if number > 1 else ""
        opened += ["-blockdev", node + below]
    disk = Disk(layers[-1], options="backing=layer3")
    case = Case(lambda _: VM(tmp_path, [disk], extra=opened), tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(20)
        files, before = case.files(), case.chain()
        ran = case.run("consolidate", "--top", layers[3], "--base", layers[1])
        if read_only == "on":
            assert ran.code == 0, ran
        else:
            assert (ran.code, ran.result["error"]) == (4, "Refused")
            assert "would not flush" in ran.result["message"]
            case.prove_unchanged(before, files)
        guest.kill()
    for number in (1, 2, 3, 4):
        pattern = f"read -P {number} {SPARE_OFFSET + number * MIB} 1M"
        subprocess.run(["qemu-io", "-r", "-c", pattern, layers[-1]], check=True)
    case.prove_disk(3 if read_only == "on" else 5, killed=True)


@NIGHTLY_LIBVIRT
@pytest.mark.parametrize(
    "where", ["in place", pytest.param("elsewhere", marks=pytest.mark.nightly)]
)
def test_beside_makes_a_new_disk_and_writes_into_none(
    make: Make, tmp_path: Path, where: str
) -> None:
    layers = chain(tmp_path, 3)
    before = [digest(layer) for layer in layers[:-1]]
    case = Case(make, tmp_path, layers[-1:])
    target = tmp_path / "beside.qcow2"
    words = ["--target", target] if where == "elsewhere" else []
    with case.guest as guest:
        guest.wait_for_acks(40)
        result = case.done("consolidate", "--beside", *words)
        (disk,) = result["disks"]
        assert disk["way"] == "mirror"
        assert disk["seeded_bytes"] > 0
        assert len(case.chain()) == 2
        case.prove_at_rest()
        if where == "elsewhere" and case.plain:
            guest.shutdown()
            case.active = target
            case.prove_disk(2)
        else:
            case.prove_boots(2)
    assert [digest(layer) for layer in layers[:-1]] == before
    new = target if words else case.active
    case.prove_tidy(*layers[1:-1], Path(disk["old"]), new, case.state)


def test_beside_keeps_what_the_shared_base_has_around_a_small_write(
    make: Make, tmp_path: Path
) -> None:
    """The guest writes parts of clusters that only the base has: the rest must still be its."""
    raw, root, length = tmp_path / "raw", tmp_path / "root.qcow2", 64 * MIB
    qemu_img("convert", "-O", "raw", base(), raw)
    start = records.partition_offset(raw, "/dev/vda2")
    with raw.open("r+b") as disk:
        disk.seek(start)
        disk.write(b"below" * (length // 5))
    qemu_img("convert", "-O", "qcow2", raw, root)
    layers = chain(tmp_path, 3, root)
    case = Case(make, tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(40)
        (merged,) = case.done("consolidate", "--beside", "--speed", "4M")["disks"]
        guest.wait_for_acks(20)
        guest.kill()
    qemu_img("convert", "-O", "raw", Path(merged["target"]), raw)
    with raw.open("rb") as disk:
        disk.seek(start)
        zeroed = [at for at in range(0, length, 512) if not any(disk.read(512))]
    assert not zeroed


@pytest.mark.nightly
@pytest.mark.parametrize("words", [(), ("--beside",)])
def test_old_files_are_deleted_when_asked_to(
    make: Make, tmp_path: Path, words: tuple[str, ...]
) -> None:
    layers = chain(tmp_path, 3)
    case = Case(make, tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(40)
        result = case.done("consolidate", "--old", "delete", *words)
        assert merged(result) == []
        case.prove_at_rest()
        case.prove_boots(2)
    assert case.resume().code == 0
    left = case.files() - {"state", case.active.name}
    assert left == ({"layer1.qcow2"} if case.plain and not words else set())


@pytest.mark.nightly
@pytest.mark.parametrize("words", [(), ("--beside",), ("--top", "layer2.qcow2")])
def test_a_paused_guest_stays_paused(make: Make, tmp_path: Path, words: tuple[str, ...]) -> None:
    layers = chain(tmp_path, 3)
    case = Case(make, tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(40)
        guest.pause()
        case.done("consolidate", *words)
        assert guest.paused
        guest.cont()
        case.prove_at_rest()
        case.prove_boots(3 if "--top" in words else 2)


@pytest.mark.nightly
@pytest.mark.parametrize("words", [(), ("--beside",)])
def test_a_dry_run_changes_nothing(make: Make, tmp_path: Path, words: tuple[str, ...]) -> None:
    layers = chain(tmp_path, 3)
    case = Case(make, tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(20)
        files = case.files()
        ran = case.run("consolidate", "--dry-run", *words)
        assert (ran.code, ran.result["status"]) == (0, "planned")
        plan = ran.lines[0]["disks"][0]
        assert plan["merged"] == [str(layers[3]), str(layers[2])][: 3 if words else 2] + (
            [str(layers[1])] if words else []
        )
        case.prove_unchanged(layers[::-1], files)


@pytest.mark.sampled(2)
def test_a_disk_without_a_base_is_merged_when_its_lowest_layer_is_named(
    make: Make, tmp_path: Path
) -> None:
    """A raw lowest layer becomes the disk of a domain, whose definition can say so."""
    root = tmp_path / "root.img"
    qemu_img("convert", "-O", "raw", base(), root)
    overlay = linked_clone(root, tmp_path / "overlay.qcow2", backing_fmt="raw")
    case = Case(make, tmp_path, [overlay])
    with case.guest as guest:
        guest.wait_for_acks(40)
        nothing = case.done("consolidate")
        assert nothing["disks"] == [], "it could be the base of clones that are not seen"
        ran = case.run("consolidate", "--base", root)
        if case.plain:
            assert ran.code == 4, ran.out
            assert "raw" in ran.result["message"]
            case.prove_unchanged([overlay, root], case.files())
        else:
            assert ran.code == 0, ran.out
            case.prove_at_rest()
            case.prove_boots(1)
            assert case.active == root


@pytest.mark.nightly
@NIGHTLY_LIBVIRT
def test_a_full_clone_is_one_disk_again(make: Make, tmp_path: Path) -> None:
    full = tmp_path / "full.qcow2"
    qemu_img("convert", "-O", "qcow2", base(), full)
    case = Case(make, tmp_path, [full])
    with case.guest as guest:
        guest.wait_for_acks(40)
        case.snapshot()
        result = case.done("consolidate", "--old", "delete")
        assert len(case.chain()) == 1
        assert merged(result) == []
        case.prove_at_rest()
        case.prove_boots(1)
        case.prove_tidy(full, case.state)
        assert case.active == full


@pytest.mark.nightly
@pytest.mark.parametrize("words", [(), ("--beside",)])
def test_a_grown_disk_is_merged_into_its_smaller_layer(
    make: Make, tmp_path: Path, words: tuple[str, ...]
) -> None:
    layers = chain(tmp_path, 2)
    size = int(json.loads(qemu_img("info", "--output=json", layers[-1]))["virtual-size"])
    qemu_img("resize", "-q", layers[-1], size + 64 * MIB)
    top = linked_clone(layers[-1], tmp_path / "top.qcow2")
    case = Case(make, tmp_path, [top])
    with case.guest as guest:
        guest.wait_for_acks(40)
        case.done("consolidate", *words)
        case.prove_at_rest()
        case.prove_boots(2)
    grown = json.loads(qemu_img("info", "--output=json", case.active))["virtual-size"]
    assert grown == size + 64 * MIB


@NIGHTLY_LIBVIRT
def test_a_guest_that_writes_faster_than_can_be_copied_is_slowed_until_a_short_pause_is_enough(
    make: Make, tmp_path: Path
) -> None:
    layers = chain(tmp_path, 3)
    case = Case(make, tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(60)
        ran = case.run("consolidate", "--speed", "3M", "--max-pause", "500ms")
        assert ran.code == 0, ran.out
        progress = [line for line in ran.lines if line["event"] == "progress"]
        assert max(line["dirtied"] for line in progress) > 0
        assert any(line["limit"] for line in progress)
        (disk,) = ran.result["disks"]
        assert 0 < disk["switchover_s"] < PAUSE + NOISE
        case.prove_at_rest()
        case.prove_boots(2)


@pytest.mark.nightly
def test_a_guest_keeps_the_limits_of_its_own(make: Make, tmp_path: Path) -> None:
    layers = chain(tmp_path, 3)
    case = Case(make, tmp_path, layers[-1:])
    if case.plain:
        case.guest = make([Disk(layers[-1], style=Style.DRIVE, iops=500)])
    with case.guest as guest:
        guest.wait_for_acks(40)
        if isinstance(guest, Domain):
            tune = {"write_bytes_sec": 8 * MIB, "write_iops_sec": 500}
            guest.domain.setBlockIoTune("vda", tune, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        before = throttles(case)
        ran = case.run("consolidate", "--speed", "3M")
        assert ran.code == 0, ran.out
        limits = [line["limit"] for line in ran.lines if line["event"] == "progress"]
        assert any(limits)
        assert throttles(case) == before
        assert 500 in before.values()
        guest.wait_for_acks(20)


def throttles(case: Case) -> dict[str, int]:
    (inserted,) = (entry["inserted"] for entry in case.query("query-block"))
    return {key: value for key, value in inserted.items() if key.startswith(("bps", "iops"))}


@pytest.mark.nightly
@NIGHTLY_LIBVIRT
def test_all_disks_are_merged_and_switch_together(make: Make, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    disks = [chain(tmp_path, 3)[-1], chain(tmp_path / "other", 2)[-1]]
    case = Case(make, tmp_path, disks)
    with case.guest as guest:
        guest.wait_for_acks(40)
        result = case.done("consolidate")
        assert [disk["way"] for disk in result["disks"]] == ["commit", "commit"]
        assert len(case.chain(0)) == len(case.chain(1)) == 2
        case.prove_at_rest()
        case.prove_boots(2)


@pytest.mark.nightly
@pytest.mark.parametrize("qemu", ["newer"], indirect=True)
def test_a_commits_start_stops_the_guest_where_qemu_would_lose_writes(
    tmp_path: Path, qemu: str
) -> None:
    layers = chain(tmp_path, 3)
    case = Case(lambda disks: VM(tmp_path, disks, writer={"rate": 0}), tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(60)
        (disk,) = case.done("consolidate")["disks"]
        version = tuple(case.query("query-version")["qemu"][k] for k in ("major", "minor", "micro"))
        from promoter.guests.bugs import loses_writes_at_start

        assert (disk["start_pause_s"] is not None) is loses_writes_at_start(version)
        case.snapshot()
        case.done("consolidate", "--beside")
        case.prove_at_rest()
        case.prove_boots(2)
