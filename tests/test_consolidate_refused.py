"""What consolidate must not do is refused, and what breaks it changes nothing."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli import Ran, ended, promoter
from tests.deltas import Case, Make, digest, interrupted, read_until
from tests.domains import Domain, Libvirtd
from tests.test_bad_input import fill, halted, mounted, unchanged
from tests.vm import (
    KEY,
    MIB,
    SPARE_OFFSET,
    VM,
    Disk,
    base,
    blank,
    chain,
    encrypted_clone,
    linked_clone,
    qemu_img,
)

SMALL = 16 * MIB
SLOW = "3M"


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


# --- siblings -----------------------------------------------------------------------------------


def powered_off(layer: Path, place: Path) -> Iterator[Path]:
    yield linked_clone(layer, place / "sibling.qcow2")


def running(layer: Path, place: Path) -> Iterator[Path]:
    sibling = linked_clone(layer, place / "sibling.qcow2")
    with halted(place, [Disk(sibling)]):
        yield sibling


def stopped_elsewhere(layer: Path, place: Path) -> Iterator[Path]:
    (place / "below").mkdir()
    yield linked_clone(layer, place / "below" / "sibling.qcow2")


SIBLINGS: dict[str, tuple[Callable[[Path, Path], Iterator[Path]], bool]] = {
    # where it is: who it is, is it found only with --scan
    "beside it": (powered_off, False),
    "elsewhere, running": (running, False),
    "elsewhere, powered off": (stopped_elsewhere, True),
}


@NIGHTLY_LIBVIRT
@pytest.mark.parametrize(
    "where",
    [
        pytest.param(where, marks=() if where == "elsewhere, running" else pytest.mark.nightly)
        for where in SIBLINGS
    ],
)
def test_a_layer_that_a_sibling_reads_is_never_written_to(
    make: Make, tmp_path: Path, where: str
) -> None:
    sibling_of, only_scanned = SIBLINGS[where]
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    images.mkdir()
    elsewhere.mkdir()
    layers = chain(images, 4)
    place = images if where == "beside it" else elsewhere
    case = Case(make, tmp_path, layers[-1:])
    scan = ["--scan", elsewhere] if only_scanned else []
    with case.guest as guest:
        guest.wait_for_acks(20)
        for sibling in sibling_of(layers[2], place):
            before = [digest(path) for path in (*layers[1:3], sibling)]
            for shared in layers[1:3]:
                refused = case.run("consolidate", "--base", shared, *scan)
                assert refused.code == 4, refused.out
                named = "pid" if where.endswith("running") else str(sibling)
                assert named in refused.result["message"]
                assert "--beside" in refused.result["hint"]
            words = ("--beside", "--base", layers[2], "--old", "delete", *scan)
            refused = case.run("consolidate", *words)
            assert refused.code == 4, refused.out
            assert "cannot be deleted" in refused.result["hint"]
            assert case.chain() == layers[::-1]
            planned = case.run("consolidate", "--dry-run", *scan)
            assert planned.lines[0]["disks"][0]["target"] == str(
                layers[4] if case.plain else layers[3]
            )
            assert planned.lines[0]["disks"][0]["merged"] == [str(layers[4])]
            case.done("consolidate", *scan)
            assert [digest(path) for path in (*layers[1:3], sibling)] == before
            assert len(case.chain()) == 4
            case.prove_at_rest()
        case.prove_boots(4)


# --- bad input ----------------------------------------------------------------------------------


def small_chain(directory: Path, name: str) -> list[Path]:
    """`NAME-base`, which has data, `NAME-mid` on it, and the name for one above."""
    lowest = blank(directory / f"{name}-base.qcow2", SMALL)
    subprocess.run(["qemu-io", "-c", f"write -q -P 7 0 {MIB}", str(lowest)], check=True)
    middle = linked_clone(lowest, directory / f"{name}-mid.qcow2")
    return [lowest, middle, directory / f"{name}.qcow2"]


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VM]:
    """A guest, not begun to run, with a disk for each of the bad chains."""
    directory = tmp_path_factory.mktemp("refused")
    images = directory / "images"
    images.mkdir()
    disks, extra = [], ["-object", KEY]
    for name in NAMES:
        _, middle, top = small_chain(images, name)
        options = ""
        if name == "larger":
            qemu_img("resize", "-q", middle, 2 * SMALL)
            qemu_img("create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, SMALL)
        elif name == "encrypted":
            encrypted_clone(middle, top)
            options = "encrypt.format=luks,encrypt.key-secret=key"
        else:
            if name == "snapshots":
                qemu_img("snapshot", "-c", "before-upgrade", middle)
            linked_clone(middle, top)
        if name == "readonly":
            options = "read-only=on"
        if name == "fixed":
            options = "backing=fixed-upper"
            upper = linked_clone(middle, images / "fixed-upper.qcow2")
            qemu_img("rebase", "-u", "-b", upper, "-F", "qcow2", top)
            for node, file, more in (
                ("fixed-mid", middle, "read-only=on"),
                ("fixed-upper", upper, "read-only=on,backing=fixed-mid"),
            ):
                driver = f"driver=qcow2,file.driver=file,file.filename={file}"
                extra += ["-blockdev", f"node-name={node},{driver},file.read-only=on,{more}"]
        disks.append(Disk(top, options=options))
    with halted(directory, disks, *extra) as guest:
        guest.qmp("block-stream", device="disk3", job_id="busy", speed=1)
        yield guest


NAMES = ("good", "larger", "snapshots", "busy", "encrypted", "readonly", "fixed")
REFUSED: dict[str, tuple[str, str]] = {
    # what is wrong: the words of the command, what is said
    "no such disk": ("vdz", "no such disk"),
    "base of another chain": ("vd0 --base larger-mid.qcow2", "is not in its chain"),
    "top of another chain": ("vd0 --top larger-mid.qcow2", "is not in its chain"),
    "top below base": ("vd0 --top good-base.qcow2 --base good-mid.qcow2", "is not above the base"),
    "base is the active layer": ("vd0 --base good.qcow2", "is not above the base"),
    "target larger than the disk": ("vd1", "is larger than the disk"),
    "internal snapshots": ("vd2", "internal snapshots: before-upgrade"),
    "internal snapshots, beside": ("vd2 --beside", "internal snapshots"),
    "a job runs": ("vd3", "a block job runs on it"),
    "encrypted": ("vd4", "is encrypted"),
    "read-only": ("vd5", "it is read-only"),
    "command line has the chain": ("vd6 --base fixed-mid.qcow2", "spells out"),
    "two disks to one target": ("vd0 vd1 --beside --target new.qcow2", "names one file"),
}


def consolidate(vm: VM, text: str) -> Ran:
    return promoter(vm.directory / "state", "consolidate", vm.monitor, *text.split(), "--json")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_why_and_changes_nothing(vm: VM, case: str) -> None:
    words, said = REFUSED[case]
    with unchanged(vm, vm.directory / "images"):
        refused = consolidate(vm, words)
    assert refused.code == 4, refused.out
    assert said in refused.result["message"]
    assert refused.result["hint"]


@pytest.mark.parametrize(
    "words",
    [
        "--top good-mid.qcow2 --beside",
        "--target new.qcow2",
        "--max-pause 1h",
        "--max-pause 5ms",
        "--scan /no/such/directory",
    ],
)
def test_words_that_do_not_go_together_are_a_usage_error(vm: VM, words: str) -> None:
    with unchanged(vm, vm.directory / "images"):
        assert consolidate(vm, f"vd0 {words}").code == 2


def test_a_target_that_qemu_may_not_write_to_fails_and_changes_nothing(vm: VM) -> None:
    with unchanged(vm, vm.directory / "images"):
        failed = consolidate(vm, "vd6 --top fixed-upper.qcow2 --base fixed-mid.qcow2")
    assert failed.code in (4, 6), failed.out
    assert "read-only" in failed.result["message"].lower()


def test_a_snapshot_of_what_cannot_be_frozen_is_refused(vm: VM) -> None:
    for words, said in (("vd3", "a block job runs"), ("vd5", "read-only"), ("vd6", "spells out")):
        with unchanged(vm, vm.directory / "images"):
            refused = promoter(vm.directory / "state", "snapshot", vm.monitor, words, "--json")
        assert refused.code == 4, refused.out
        assert said in refused.result["message"]


# --- in the middle ------------------------------------------------------------------------------


def heavy(directory: Path) -> list[Path]:
    """Three layers; the active one has much to merge."""
    layers = chain(directory, 2)
    pattern = f"write -q -P 9 {SPARE_OFFSET} 16M"
    subprocess.run(["qemu-io", "-c", pattern, str(layers[-1])], check=True)
    return layers


PHASES = {"": "commit", "--beside": "mirror"}


@pytest.mark.nightly
@NIGHTLY_LIBVIRT
@pytest.mark.parametrize("words", [(), pytest.param(("--beside",), marks=pytest.mark.nightly)])
def test_cancelled_it_leaves_the_guest_on_its_chain(
    make: Make, tmp_path: Path, words: tuple[str, ...]
) -> None:
    layers = heavy(tmp_path)
    case = Case(make, tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(40)
        files = case.files() | {"state"}
        running = case.start("consolidate", "--speed", SLOW, *words)
        read_until(running, f'"phase": "{PHASES["".join(words)]}"')
        cancelled = interrupted(running, signal.SIGINT)
        assert cancelled.code == 7, cancelled
        case.prove_unchanged(layers[::-1], files)
        case.prove_boots(3)


@pytest.mark.nightly
@pytest.mark.parametrize("words", [(), ("--beside",)])
def test_terminated_it_goes_on_when_resumed(
    make: Make, tmp_path: Path, words: tuple[str, ...]
) -> None:
    layers = heavy(tmp_path)
    case = Case(make, tmp_path, layers[-1:])
    with case.guest as guest:
        guest.wait_for_acks(40)
        running = case.start("consolidate", "--speed", SLOW, *words)
        read_until(running, f'"phase": "{PHASES["".join(words)]}"')
        assert interrupted(running, signal.SIGTERM).code == 9
        guest.wait_for_acks(20)
        assert case.limits() <= {0}
        resumed = case.resume()
        assert resumed.code == 0, resumed.out
        assert len(case.chain()) == 2
        case.prove_at_rest()
        case.prove_boots(2)


@pytest.mark.nightly
def test_without_room_in_the_target_nothing_changes_and_it_works_when_there_is(
    tmp_path: Path,
) -> None:
    """The target is elsewhere, so it cannot take the place of the active layer."""
    with mounted(tmp_path / "small", "size=24m") as small:
        lower = linked_clone(base(), small / "lower.qcow2")
        middle = linked_clone(lower, tmp_path / "middle.qcow2")
        pattern = f"write -q -P 9 {SPARE_OFFSET} 16M"
        subprocess.run(["qemu-io", "-c", pattern, str(middle)], check=True)
        upper = linked_clone(middle, tmp_path / "upper.qcow2")
        case = Case(lambda disks: VM(tmp_path, disks, writer={"rate": 0}), tmp_path, [upper])
        words = ("--top", middle, "--base", lower)
        with case.guest as guest:
            guest.wait_for_acks(40)
            refused = case.run("consolidate", "--base", lower)
            assert refused.code == 4, refused.out
            assert "is not in the directory of" in refused.result["message"]
            running = case.start("consolidate", "--speed", "2M", *words)
            read_until(running, '"phase": "commit below"')
            filler = fill(small, lambda: 0)
            failed = ended(running, 120)
            assert failed.code in (5, 6), failed.out
            assert case.chain() == [upper, middle, lower, base()]
            case.prove_at_rest()
            filler.unlink()
            if failed.code == 5:
                resumed = case.resume()
                assert resumed.code == 0, resumed.out
            else:
                case.done("consolidate", *words)
            assert len(case.chain()) == 3
            case.prove_at_rest()
            case.prove_boots(3)
