"""The checker is content with what a guest really wrote, and with nothing else.

One guest writes on a small disk of its own until every slot was written more than once;
then each test does one thing to a copy of that disk, or of its log, and sees what is said.
"""

import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import records
from tests.records import HEADER, SLOT, Finding, Kind, Lane
from tests.vm import VM, Disk, base, blank, linked_clone

SEED, LANES, SLOTS = 7, 3, 16
Bytes = bytearray


@dataclass(frozen=True)
class Written:
    """The disk as the guest left it, its log, and the disk as it was in the middle."""

    disk: Path
    log: Path
    earlier: bytes

    def check(self) -> tuple[Finding, ...]:
        return records.check(self.disk, "raw", self.log).findings

    def lanes(self) -> tuple[Lane, ...]:
        return records.read_log(self.log).lanes


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Written:
    directory = tmp_path_factory.mktemp("guest")
    system = Disk(linked_clone(base(), directory / "system.qcow2"))
    data = Disk(blank(directory / "data.raw", LANES * SLOTS * SLOT, "raw"), fmt="raw")
    writer = {"dev": "/dev/vdb", "seed": SEED, "lanes": LANES, "rate": 0}
    with VM(directory, [system, data], writer=writer) as vm:
        vm.wait_for_acks(500)
        vm.kill()
        earlier = data.path.read_bytes()
        vm.start()
        vm.wait_for_acks(500)
    return Written(data.path, vm.log, earlier)


@pytest.fixture
def written(original: Written, tmp_path: Path) -> Written:
    disk, log = tmp_path / "disk.raw", tmp_path / "acks.log"
    shutil.copy(original.disk, disk)
    shutil.copy(original.log, log)
    return Written(disk, log, original.earlier)


def settled_slot(written: Written, size: int = 0) -> int:
    """A slot without a record in flight whose record is longer than `size` bytes."""
    data = written.disk.read_bytes()
    return next(
        slot
        for lane in written.lanes()
        for slot in lane.expected
        if slot not in lane.in_flight and length(data, slot) > size
    )


def length(data: bytes | Bytes, slot: int) -> int:
    return int(HEADER.unpack_from(data, slot * SLOT)[-1])


def forge(data: Bytes, slot: int, **changes: int) -> None:
    """Changes the header of the slot's record and makes its checksum right again."""
    names = ("magic", "version", "lane", "seed", "seq", "slot", "length")
    header = dict(zip(names, HEADER.unpack_from(data, slot * SLOT), strict=True)) | changes
    HEADER.pack_into(data, slot * SLOT, *header.values())
    end = slot * SLOT + header["length"] - 4
    struct.pack_into("<I", data, end, zlib.crc32(data[slot * SLOT : end]))


def fill(data: Bytes, start: int, end: int, source: bytes | None = None) -> None:
    data[start:end] = source[start:end] if source else bytes(end - start)


def nothing(data: Bytes, slot: int, _: bytes) -> None:
    fill(data, slot * SLOT, (slot + 1) * SLOT)


def zero_half(data: Bytes, slot: int, _: bytes) -> None:
    fill(data, slot * SLOT + 512, (slot + 1) * SLOT)


def older_half(data: Bytes, slot: int, earlier: bytes) -> None:
    fill(data, slot * SLOT + 512, (slot + 1) * SLOT, earlier)


def older(data: Bytes, slot: int, earlier: bytes) -> None:
    fill(data, slot * SLOT, (slot + 1) * SLOT, earlier)


def one_bit(data: Bytes, slot: int, _: bytes) -> None:
    data[slot * SLOT + length(data, slot) - 100] ^= 1


def of_another_slot(data: Bytes, slot: int, _: bytes) -> None:
    other = (slot + 1) % SLOTS * SLOT
    data[slot * SLOT : (slot + 1) * SLOT] = data[other : other + SLOT]


def of_another_seed(data: Bytes, slot: int, _: bytes) -> None:
    forge(data, slot, seed=SEED + 1)


def of_another_lane(data: Bytes, slot: int, _: bytes) -> None:
    forge(data, slot, lane=LANES)


def of_the_future(data: Bytes, slot: int, _: bytes) -> None:
    forge(data, slot, seq=1_000_000)


def test_a_disk_that_a_killed_guest_wrote_is_all_there(written: Written) -> None:
    report = records.check(written.disk, "raw", written.log)
    report.raise_if_bad()
    cut_short = written.log.read_text().count("\nA ") - report.records
    assert 0 <= cut_short <= 2, "the last line of each of the two runs"
    assert report.records >= 998
    assert report.slots > LANES * SLOTS - 2 * LANES
    assert 0 < report.max_latency_s == max(report.latencies)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (nothing, Kind.LOST),
        (zero_half, Kind.TORN),
        (older_half, Kind.TORN),
        (one_bit, Kind.TORN),
        (older, Kind.STALE),
        (of_another_slot, Kind.ALIEN),
        (of_another_seed, Kind.ALIEN),
        (of_another_lane, Kind.ALIEN),
        (of_the_future, Kind.ALIEN),
    ],
)
def test_damage_to_one_slot_is_found_there_and_named(
    written: Written, damage: Callable[[Bytes, int, bytes], None], kind: Kind
) -> None:
    slot = settled_slot(written, size=1024)
    data = Bytes(written.disk.read_bytes())
    damage(data, slot, written.earlier)
    written.disk.write_bytes(data)
    assert [(finding.kind, finding.slot) for finding in written.check()] == [(kind, slot)]


def test_a_disk_cut_short_has_lost_what_was_behind(written: Written) -> None:
    written.disk.write_bytes(written.disk.read_bytes()[: -2 * SLOT])
    findings = written.check()
    assert findings
    assert {finding.kind for finding in findings} == {Kind.LOST}


def test_bytes_in_a_slot_that_nobody_wrote_are_found(written: Written) -> None:
    run = written.log.read_text().split("\n")[1]
    written.log.write_text(f"\n{run}\n")
    written.disk.write_bytes(bytes(5 * SLOT + 8000) + b"x" + bytes(60 * SLOT))
    assert [(finding.kind, finding.slot) for finding in written.check()] == [(Kind.ALIEN, 5)]


def test_the_record_in_flight_may_be_torn_but_no_other(written: Written) -> None:
    lane = written.lanes()[0]
    slot = lane.slot_of(lane.last + 1)
    data = Bytes(written.disk.read_bytes())
    forge(data, slot, seq=lane.last + 1)
    one_bit(data, slot, b"")
    written.disk.write_bytes(data)
    assert written.check() == ()
    forge(data, slot, seq=lane.last + 2)
    written.disk.write_bytes(data)
    assert [finding.kind for finding in written.check()] == [Kind.ALIEN]


def next_ack(written: Written, *, slot: int | None = None) -> str:
    """What lane 0 would have said next; `slot` instead of the right one."""
    lane = written.lanes()[0]
    seq = lane.last + 1
    return f"A 0 {seq} {lane.slot_of(seq) if slot is None else slot} 100\n"


def complete(log: str) -> str:
    return log[: log.rfind("\n") + 1]


def test_an_acknowledged_record_that_never_came_is_found(written: Written) -> None:
    lane = written.lanes()[0]
    slot = lane.slot_of(lane.last + 1)
    data = Bytes(written.disk.read_bytes())
    older(data, slot, written.earlier)
    written.disk.write_bytes(data)
    written.log.write_text(complete(written.log.read_text()) + next_ack(written))
    assert [(finding.kind, finding.slot) for finding in written.check()] == [(Kind.STALE, slot)]


def test_a_line_cut_short_by_a_kill_is_no_acknowledgement(written: Written) -> None:
    before = records.check(written.disk, "raw", written.log)
    line = next_ack(written)
    written.log.write_text(complete(written.log.read_text()) + line[:-1])
    assert records.check(written.disk, "raw", written.log) == before


@pytest.mark.parametrize(
    ("line", "kind"),
    [("S 0 1", Kind.LOST), ("S 0 1000000", Kind.ALIEN), ("E 0 9 5", Kind.FAILED)],
)
def test_what_a_lane_says_of_itself_is_held_against_it(
    written: Written, line: str, kind: Kind
) -> None:
    log = complete(written.log.read_text())
    run = log.split("\n")[1]
    written.log.write_text(f"{log}\n{run}\n{line}\n")
    assert kind in {finding.kind for finding in written.check() if finding.slot is None}


def test_an_acknowledgement_of_the_wrong_slot_is_found(written: Written) -> None:
    log = complete(written.log.read_text())
    written.log.write_text(log + next_ack(written, slot=LANES * SLOTS))
    assert Kind.ALIEN in {finding.kind for finding in written.check()}


def test_a_record_read_back_at_the_reboot_is_kept_by_the_next_flush() -> None:
    lane = Lane(0, SEED, SLOTS)
    assert list(lane.start(1)) == []
    lane.excuse_next()
    assert list(lane.start(2)) == []
    assert lane.expected == {}
    assert list(lane.acknowledge(records.Ack(0, 2, lane.slot_of(2), 0.0))) == []
    assert lane.expected == {lane.slot_of(1): 1} | {lane.slot_of(2): 2}
    assert [finding.kind for finding in lane.start(4)] == [Kind.ALIEN]


def test_zeros_around_a_record_and_in_its_place_are_found_where_the_base_has_none(
    tmp_path: Path,
) -> None:
    with VM(tmp_path, [Disk(linked_clone(base(), tmp_path / "disk.qcow2"))]) as vm:
        vm.wait_for_acks(60)
    written = Written(tmp_path / "disk.raw", vm.log, b"")
    subprocess.run(
        ["qemu-img", "convert", "-O", "raw", tmp_path / "disk.qcow2", written.disk], check=True
    )
    assert not written.check()
    start = records.partition_offset(written.disk, "/dev/vda2")
    for slot in (0, 16):
        with written.disk.open("r+b") as disk:
            disk.seek(start + slot * SLOT + SLOT - 512)
            disk.write(bytes(512))
    found = {(finding.kind, finding.slot) for finding in written.check()}
    assert {slot for _, slot in found} == {0, 16}


def test_a_log_that_is_none_is_refused(written: Written) -> None:
    written.log.write_text("nothing of the writer's\n")
    with pytest.raises(ValueError, match="expected one writer"):
        written.check()


def test_the_command_says_it_in_one_line_and_by_its_exit_code(written: Written) -> None:
    command = [sys.executable, "-m", "tests.records", str(written.disk), str(written.log)]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout.count("\n")) == (0, 1), good
    written.disk.write_bytes(bytes(LANES * SLOTS * SLOT))
    bad = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "LOST" in bad.stdout
