"""The harness itself: what the other tests take for granted."""

from pathlib import Path

import pytest

from tests import records
from tests.vm import (
    QEMUS,
    VM,
    Bus,
    Disk,
    GuestDied,
    QMPError,
    Style,
    base,
    blank,
    chain,
    linked_clone,
    qemu_img,
)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("style", "bus"),
    [*((style, Bus.VIRTIO) for style in Style), *((Style.NODES, bus) for bus in list(Bus)[1:])],
)
def test_a_guest_boots_writes_and_powers_off_at_the_button(
    tmp_path: Path, style: Style, bus: Bus
) -> None:
    disk = Disk(linked_clone(base(), tmp_path / "clone.qcow2"), bus=bus, style=style)
    with VM(tmp_path, [disk]) as vm:
        vm.wait_for_acks(30)
        assert vm.qmp("query-status")["status"] == "running"
        assert "vd0" in vm.qmp("query-block")[0]["qdev"]
        vm.shutdown()
        acknowledged = len(vm.acks())
    report = records.check(disk.path, None, vm.log)
    report.raise_if_bad()
    assert report.records == acknowledged >= 30


def test_guest_and_tools_are_of_the_chosen_qemu(tmp_path: Path, qemu: str) -> None:
    with VM(tmp_path, [Disk(linked_clone(base(), tmp_path / "clone.qcow2"))]) as vm:
        vm.wait_for_acks(1)
        version = vm.qmp("query-version")["package"]
        started = Path(f"/proc/{vm.pid}/cmdline").read_text().split("\0")
    assert version in qemu_img("--version")
    assert "-blockdev" in started
    assert any(str(QEMUS / qemu) in word for word in started) == (qemu != "system")


def test_a_killed_guest_goes_on_by_its_own_command_line(tmp_path: Path) -> None:
    active = chain(tmp_path, depth=3)[-1]
    with VM(tmp_path, [Disk(active)], writer={"seed": 5, "rate": 0}) as vm:
        vm.wait_for_acks(100)
        vm.kill()
        assert not vm.running
        before = len(vm.acks())
        vm.start()
        vm.wait_for_acks(100)
        vm.kill()
        assert len(vm.acks()) >= before + 100
    records.check(active, None, vm.log).raise_if_bad()


def test_the_layers_of_a_chain_have_data_of_their_own(tmp_path: Path) -> None:
    for number, layer in enumerate(chain(tmp_path, depth=2)[1:], 1):
        own = [
            extent
            for extent in map_of(layer)
            if '"depth": 0' in extent and '"data": true' in extent
        ]
        assert len(own) == 1, number


def map_of(image: Path) -> list[str]:
    return qemu_img("map", "--output=json", image).splitlines()


def test_the_writer_can_have_a_disk_of_its_own(tmp_path: Path) -> None:
    system = Disk(linked_clone(base(), tmp_path / "clone.qcow2"))
    data = Disk(blank(tmp_path / "data.qcow2", 4 << 20))
    with VM(tmp_path, [system, data], writer={"dev": "/dev/vdb"}) as vm:
        vm.wait_for_acks(10)
    records.check(data.path, "qcow2", vm.log).raise_if_bad()


def test_a_guest_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(GuestDied, match="no-such-image"),
        VM(tmp_path, [Disk(tmp_path / "no-such-image")]),
    ):
        pass


def test_a_refused_command_raises_what_qemu_said(tmp_path: Path) -> None:
    with VM(tmp_path, [Disk(linked_clone(base(), tmp_path / "clone.qcow2"))]) as vm:
        with pytest.raises(QMPError, match="nobody") as refused:
            vm.qmp("blockdev-del", node_name="nobody")
        assert refused.value.kind == "GenericError"
