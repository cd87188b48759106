"""Proves that a disk holds every record that a guest's writer was told is durable.

    python -m tests.records IMAGE LOG

The log is what the writer (`vm-images/writer.c`, which says what its lines mean) sent over
the serial port, over all runs of the guest since its region was empty.  A slot must hold
the last record acknowledged for it, whole.  Excused is only what the writer cannot know:
when a lane's run ends, one record may be in flight, and its slot may hold that record, the
one before, or a torn mix of the two, until another record there is acknowledged.  When the
lane then goes on after the record in flight, it has read it, and the next flush keeps it.
Slots that were never written must be as they were: empty, or, in every fourth cluster of a
base's region, GROUND, which must also be left around the records.  Anything else is a finding.
"""

import json
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

SLOT, SECTOR, SLOTS_OF_A_CLUSTER = 16384, 512, 4
GROUND = b"promoter"  # as vm-images/build.py lays it
HEADER = struct.Struct("<8sIIQQII")
MAGIC, VERSION = b"PROMOREC", 1
MASK = (1 << 64) - 1
SHOWN = 20


class Kind(Enum):
    LOST = "nothing there, or the writer could not find it again"
    TORN = "not whole"
    STALE = "an older record, whole"
    ALIEN = "nobody was told that this was written here"
    FAILED = "the guest's write failed"


@dataclass(frozen=True)
class Finding:
    kind: Kind
    slot: int | None
    text: str

    def __str__(self) -> str:
        return f"{self.kind.name}: {self.text}"


@dataclass(frozen=True)
class Report:
    """What `check` found.  `records` acknowledged in `slots` slots, latencies in seconds."""

    records: int
    slots: int
    latencies: tuple[float, ...]
    findings: tuple[Finding, ...]

    @property
    def max_latency_s(self) -> float:
        return max(self.latencies, default=0.0)

    def raise_if_bad(self) -> None:
        """Raises AssertionError with the findings."""
        if self.findings:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        """One line, and one for each of the first findings."""
        verdict = f"{len(self.findings)} findings" if self.findings else "all there"
        summary = (
            f"{self.records} records acknowledged, {self.slots} slots: {verdict}; "
            f"longest write {self.max_latency_s:.3f} s"
        )
        return "\n".join([summary, *map(str, self.findings[:SHOWN])])


@dataclass(frozen=True)
class Ack:
    lane: int
    seq: int
    slot: int
    latency_s: float


@dataclass(frozen=True)
class Record:
    """A record's header; `whole` if its checksum is right."""

    lane: int
    seed: int
    seq: int
    slot: int
    whole: bool


def splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


@dataclass
class Lane:
    """What the log says of one lane's slots."""

    number: int
    seed: int
    slots: int
    last: int = 0
    read_back: set[int] = field(default_factory=set)  # were in flight, not flushed since
    expected: dict[int, int] = field(default_factory=dict)
    in_flight: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    def slot_of(self, seq: int) -> int:
        key = splitmix64(splitmix64(splitmix64(self.seed) ^ self.number) ^ seq)
        return self.number * self.slots + key % self.slots

    def excuse_next(self) -> None:
        """The run ended; one record more than was acknowledged may have been written."""
        self.in_flight[self.slot_of(self.last + 1)].add(self.last + 1)

    def start(self, first: int) -> Iterator[Finding]:
        found, text = first - 1, f"lane {self.number} had {self.last}, found {first - 1}"
        if found < self.last:
            yield Finding(Kind.LOST, None, text)
        elif found in self.in_flight[self.slot_of(found)]:
            self.read_back.add(found)
        elif found > self.last:
            yield Finding(Kind.ALIEN, None, text)
        self.last = found

    def acknowledge(self, ack: Ack) -> Iterator[Finding]:
        if (ack.seq, ack.slot) != (self.last + 1, self.slot_of(ack.seq)):
            yield Finding(Kind.ALIEN, ack.slot, f"{ack} after {self.last} of this lane")
        for seq in (*sorted(self.read_back), ack.seq):
            self.expected[self.slot_of(seq)] = seq
            self.in_flight.pop(self.slot_of(seq), None)
        self.read_back.clear()
        self.last = ack.seq


@dataclass(frozen=True)
class History:
    """The whole log: the device as the last run called it, the lanes as they were left."""

    device: str
    lanes: tuple[Lane, ...]
    acks: tuple[Ack, ...]
    findings: tuple[Finding, ...]


def runs(log: str) -> Iterator[list[list[str]]]:
    """The complete lines of each run, in words.  Only a run's last line can be incomplete."""
    for run in re.split(r"\n(?=W )", log):
        if run.startswith("W "):
            yield [line.split() for line in run[: run.rfind("\n") + 1].splitlines()]


def read_acks(log: Path) -> list[Ack]:
    """Every acknowledgement in the log, in its order."""
    return [ack_of(words) for run in runs(log.read_text()) for words in run if words[:1] == ["A"]]


def ack_of(words: list[str]) -> Ack:
    lane, seq, slot, usec = map(int, words[1:])
    return Ack(lane, seq, slot, usec / 1e6)


def read_log(log: Path) -> History:
    """Raises ValueError for a log without a run, and for runs of different writers."""
    lines = [run for run in runs(log.read_text()) if run]
    writers = {tuple(run[0][2:]) for run in lines}
    if len(writers) != 1:
        raise ValueError(f"{log}: expected one writer, found {writers or 'none'}")
    ((seed, count, slots),) = writers
    lanes = tuple(Lane(number, int(seed), int(slots)) for number in range(int(count)))
    acks: list[Ack] = []
    findings: list[Finding] = []
    for run in lines:
        for words in run[1:]:
            findings.extend(replay(words, lanes, acks))
        for lane in lanes:
            lane.excuse_next()
    return History(lines[-1][0][1], lanes, tuple(acks), tuple(findings))


def replay(words: list[str], lanes: tuple[Lane, ...], acks: list[Ack]) -> Iterator[Finding]:
    match words:
        case ["S", lane, first]:
            yield from lanes[int(lane)].start(int(first))
        case ["A", lane, _, _, _]:
            acks.append(ack_of(words))
            yield from lanes[int(lane)].acknowledge(acks[-1])
        case ["E", lane, seq, errno]:
            yield Finding(Kind.FAILED, None, f"lane {lane} record {seq}: errno {errno}")
        case []:
            pass
        case _:
            raise ValueError(f"not a line of the writer's: {' '.join(words)}")


def record_in(slot: bytes) -> Record | None:
    magic, version, lane, seed, seq, place, length = HEADER.unpack_from(slot)
    if magic != MAGIC or version != VERSION or not HEADER.size < length <= SLOT:
        return None
    (checksum,) = struct.unpack_from("<I", slot, length - 4)
    return Record(lane, seed, seq, place, zlib.crc32(slot[: length - 4]) == checksum)


def ground_of(slot: int, *, laid: bool) -> bytes:
    """What a slot holds before it is written."""
    if laid and slot // SLOTS_OF_A_CLUSTER % 4 == 0:
        return GROUND * (SLOT // len(GROUND))
    return bytes(SLOT)


def judge(lane: Lane, slot: int, data: bytes, ground: bytes) -> Finding | None:
    """What is wrong with a slot of the lane's, and with what was there before, its ``ground``."""
    if finding := judge_record(lane, slot, data, ground):
        return finding
    sectors = (data[at : at + SECTOR] for at in range(0, SLOT, SECTOR))
    if any(ground) and not all(map(any, sectors)):
        return Finding(Kind.LOST, slot, f"slot {slot}: zeros where nobody has written any")
    return None


def judge_record(lane: Lane, slot: int, data: bytes, ground: bytes) -> Finding | None:
    expected, in_flight = lane.expected.get(slot), lane.in_flight.get(slot, set())
    where = f"slot {slot}: expected record {expected} of lane {lane.number}"
    found = record_in(data)
    if found is None:
        unwritten = data[: HEADER.size] if in_flight else data
        if expected is None and unwritten == ground[: len(unwritten)]:
            return None
        return Finding(Kind.LOST if expected else Kind.ALIEN, slot, f"{where}, found no record")
    if (found.seed, found.lane, found.slot) != (lane.seed, lane.number, slot):
        return Finding(Kind.ALIEN, slot, f"{where}, found {found}")
    if found.seq in in_flight or (found.seq == expected and (found.whole or in_flight)):
        return None
    if expected is None or found.seq > expected:
        return Finding(Kind.ALIEN, slot, f"{where}, found {found}")
    return Finding(Kind.STALE if found.whole else Kind.TORN, slot, f"{where}, found {found}")


def partition_offset(disk: Path, device: str) -> int:
    """Where the device, as the guest calls it, begins on its disk, in bytes."""
    number = re.fullmatch(r"/dev/(?:(?!nbd)[a-z]+|nvme\d+n\d+p|nbd\d+p)(\d+)", device)
    if number is None:
        return 0
    command = ["sfdisk", "--json", str(disk)]
    table = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    ends = re.compile(rf"\D{number[1]}$")
    (start,) = (
        partition["start"]
        for partition in table["partitiontable"]["partitions"]
        if ends.search(partition["node"])
    )
    return int(start) * 512


def judge_disk(disk: Path, history: History) -> Iterator[Finding]:
    with disk.open("rb") as raw:
        raw.seek(start := partition_offset(disk, history.device))
        for lane in history.lanes:
            for slot in range(lane.number * lane.slots, (lane.number + 1) * lane.slots):
                data, ground = raw.read(SLOT), ground_of(slot, laid=start > 0)
                if finding := judge(lane, slot, data.ljust(SLOT, b"\0"), ground):
                    yield finding


def check(image: Path, fmt: str | None, log: Path) -> Report:
    """Checks a disk that the writer wrote on against its log.

    `fmt` is the image's format, None to let qemu-img find out.  Nothing may be writing to
    the image.  Raises ValueError for a log that is none, CalledProcessError for an image
    that cannot be read.
    """
    history = read_log(log)
    with tempfile.TemporaryDirectory() as directory:
        disk = Path(directory) / "disk.raw"
        source = ["-f", fmt] if fmt else []
        command = ["qemu-img", "convert", *source, "-O", "raw", str(image), str(disk)]
        subprocess.run(command, check=True)
        findings = (*history.findings, *judge_disk(disk, history))
    return Report(
        records=len(history.acks),
        slots=sum(len(lane.expected) for lane in history.lanes),
        latencies=tuple(ack.latency_s for ack in history.acks),
        findings=findings,
    )


def main() -> int:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tests.records IMAGE LOG")
    report = check(Path(sys.argv[1]), None, Path(sys.argv[2]))
    sys.stdout.write(f"{report}\n")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
