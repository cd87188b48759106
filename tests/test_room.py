"""A new disk finds no room: the guest goes on, and promoter when there is some again."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli import Ran, ended, start
from tests.deltas import read_until
from tests.domains import Domain, Libvirtd
from tests.test_bad_input import (
    fill,
    fill_in_the_mirror,
    fill_in_the_seed,
    is_stopped,
    mounted,
    only_job,
    promoting,
    prove,
)
from tests.vm import (
    MIB,
    SPARE_OFFSET,
    VM,
    Disk,
    base,
    file_system,
    linked_clone,
    qemu_img,
    wait_for,
)

BUSY: dict[str, object] = {"rate": 200}
WAITS = '"phase": "waiting for room"'


def fill_when_it_is_ready(vm: VM, small: Path, process: subprocess.Popen[str]) -> Path:
    """By then only what the guest writes needs room, and its writes do not fail."""
    wait_for(lambda: is_stopped(process), "the mirror", 30)
    filler = fill(small, lambda: 0)
    wait_for(lambda: vm.qmp("query-jobs")[0]["status"] == "standby", "the mirror to stop", 30)
    process.send_signal(signal.SIGCONT)
    return filler


def clone_with_a_delta(directory: Path) -> Path:
    directory.mkdir()
    clone = linked_clone(base(), directory / "clone.qcow2")
    delta = f"write -q -P 9 {SPARE_OFFSET} 12M"
    subprocess.run(["qemu-io", "-c", delta, str(clone)], check=True)
    return clone


TakeSpace = Callable[[VM, Path, subprocess.Popen[str]], Path]


@contextmanager
def waiting_for_room(
    directory: Path, take_space: TakeSpace, hang: str = ""
) -> Iterator[tuple[VM, Path, Path, subprocess.Popen[str]]]:
    """A guest, its new disk, what took the space for that, and the promotion, which waits."""
    clone = clone_with_a_delta(directory / "images")
    with (
        mounted(directory / "small", "size=128m") as small,
        VM(directory, [Disk(clone)], writer=BUSY) as vm,
    ):
        vm.wait_for_acks(1)
        words = ("--target-dir", small, "--speed", "20M", "--json")
        with promoting(directory / "state", vm, *words, hang=hang) as process:
            filler = take_space(vm, small, process)
            read_until(process, WAITS)
            yield vm, small / clone.name, filler, process


@pytest.mark.parametrize(
    ("take_space", "hang"),
    [
        (fill_in_the_seed, ""),
        (fill_in_the_mirror, ""),
        (fill_when_it_is_ready, "before PREPARE"),
    ],
)
def test_without_room_it_waits_and_goes_on_when_there_is_some(
    tmp_path: Path, take_space: TakeSpace, hang: str
) -> None:
    with waiting_for_room(tmp_path, take_space, hang) as (vm, target, filler, process):
        vm.wait_for_acks(50)
        filler.unlink()
        ran = ended(process)
        assert ran.code == 0, ran
        assert only_job(tmp_path / "state")["status"] == "done"
        prove(vm, target)


@pytest.mark.nightly
@pytest.mark.parametrize("take_space", [fill_in_the_seed, fill_in_the_mirror])
def test_who_waits_for_room_can_be_cancelled(tmp_path: Path, take_space: TakeSpace) -> None:
    with waiting_for_room(tmp_path, take_space) as (vm, target, filler, process):
        process.send_signal(signal.SIGINT)
        ran = ended(process)
        assert ran.code == 7, ran
        assert list(target.parent.iterdir()) == [filler]
        assert vm.qmp("query-jobs") == []
        vm.wait_for_acks(50)


@contextmanager
def seen_by(libvirtd: Libvirtd, mounted: Path) -> Iterator[None]:
    """The file system is mounted in libvirtd's namespace too: it is the same one."""
    find = ["findmnt", "--noheadings", "--output", "SOURCE", str(mounted)]
    device = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([*libvirtd.enter, "mount", device, mounted], check=True)
    try:
        yield
    finally:
        subprocess.run([*libvirtd.enter, "umount", mounted], check=True)


@pytest.mark.nightly
def test_a_domains_seed_waits_and_its_copy_fails_cleanly(
    tmp_path: Path, libvirtd: Libvirtd
) -> None:
    clone = clone_with_a_delta(tmp_path / "images")
    state, target = tmp_path / "state", tmp_path / "xfs" / "clone.qcow2"

    def promotion(domain: Domain) -> subprocess.Popen[str]:
        words = ("--target", target, "--speed", "5M", "--json")
        return start(state, "promote", *domain.address, *words)

    with (
        file_system("xfs", tmp_path, 400 * MIB) as small,
        seen_by(libvirtd, small),
        Domain(libvirtd, tmp_path, [Disk(clone)]) as domain,
    ):
        domain.wait_for_acks(20)
        process = promotion(domain)
        read_until(process, "libvirt's copy cannot wait for room")
        read_until(process, '"phase": "mirror"')
        filler = fill(small, lambda: 0)
        failed: Ran = ended(process)
        assert failed.code == 5, failed
        assert f"no room in {small}" in failed.result["message"]
        assert list(small.iterdir()) == [filler]
        assert domain.files() == domain.next_boot() == [str(clone)]
        domain.wait_for_acks(20)
        filler.unlink()
        process = promotion(domain)
        read_until(process, '"phase": "seed"')
        filler = fill(small, lambda: 0)
        read_until(process, WAITS)
        domain.wait_for_acks(20)
        filler.unlink()
        ran = ended(process, 120)
        assert ran.code == 0, ran
        assert domain.files() == [str(target)]
        assert "backing file" not in qemu_img("info", "-U", target)
        domain.kill()
