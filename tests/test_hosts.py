"""Two hosts over real NFS: the handover, a partition longer than any lease, and the dead owner.

One box, whose hosts take part in one test after the other, in this order; the last one loses
host-a. What has the disks open is a QEMU whose guest never runs, or qemu-nbd, on which the tests'
writer writes: a guest in an emulated host would take minutes to boot.
"""

from __future__ import annotations

import base64
import gzip
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import pytest

from promoter.lease.rules import EXPLAINED, STOPPED_AFTER, Verdict
from promoter.lease.run import HOLD_AT_LEAST
from tests import records
from tests.agents import certify
from tests.hosts import PATIENCE, POOL, PROMOTER, STATE, Begun, Box, Host
from tests.test_lease_handover import percentiles
from tests.vm import wait_for

pytestmark = pytest.mark.nightly
PORT = 7443
ROUNDS = 10
Record = Callable[[str, object], None]

LANES = 3
WAITED = STOPPED_AFTER + 20
FREE = """
import sys, time
from pathlib import Path
from promoter.storage.files import is_locked
while is_locked(Path(sys.argv[1])):
    time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    directory = tmp_path_factory.mktemp("hosts")
    with Box(directory) as both:
        for host in both.hosts:
            introduce(host, directory)
        yield both


def introduce(host: Host, directory: Path) -> None:
    """Its name and its certificate, and its agent."""
    state = directory / f"{host.name}-state"
    state.mkdir()
    (state / "host-id").write_text(host.name)
    certify(directory / "ca", state, endpoint=f"{host.address}:{PORT}")
    host.put(state, STATE)
    host.begin(PROMOTER, "agent", "run")


def disk(box: Box, name: str, size: str) -> Path:
    path = POOL / name
    box.server.sh(f"qemu-img create -q -f qcow2 {path} {size}")
    return path


def run(host: Host, path: Path, policy: str, *command: object, **options: object) -> Begun:
    more = [word for name, value in options.items() for word in (f"--{name}", value)]
    words = ("--disk", path, "--policy", policy, "--timeout", 120, *more, "--json", "--")
    return host.begin(PROMOTER, "run", *words, *command)


def wait_for_epoch(host: Host, path: Path, epoch: int) -> None:
    """Until a QEMU there has the disk open under the claim of that epoch."""
    inode = host.sh(f"stat -c %i {path}").strip()
    script = f"""
    until [ -e {path}.lease.d/{epoch:08} ]; do sleep 1; done
    until grep -q OFDLCK.*:{inode}.20 /proc/locks; do sleep 1; done"""
    host.sh(script)


# --- the handover ----------------------------------------------------------------------------


def never_runs(path: Path, monitor: Path) -> list[object]:
    """A QEMU that has the disk open for a guest which does not run."""
    node = f"qcow2,node-name=disk,file.driver=file,file.filename={path}"
    return [
        "qemu-system-x86_64", "-nodefaults", "-display", "none", "-m", 32, "-S", "-accel", "tcg",
        "-blockdev", node, "-device", "virtio-scsi-pci,id=scsi",
        "-device", "scsi-hd,bus=scsi.0,drive=disk,id=vd0",
        "-qmp", f"unix:{monitor},server=on,wait=off",
    ]  # fmt: skip


def since_asked(host: Host, epoch: int) -> float:
    """Seconds until it had the disk, both by its own clock."""
    lines = host.audit()
    asked = max(line["at"] for line in lines if line["event"] == "asked")
    (held,) = (
        line["at"] for line in lines if line.get("epoch") == epoch and line["state"] == "held"
    )
    return (datetime.fromisoformat(held) - datetime.fromisoformat(asked)).total_seconds()


def test_a_disk_goes_to_and_fro_over_nfs(box: Box, record_property: Record) -> None:
    path = disk(box, "disk.qcow2", "8M")
    before: Begun | None = None
    claimed = []
    for count in range(ROUNDS + 1):
        host = box.hosts[count % 2]
        monitor = Path(f"/run/qmp-{count}")
        running = run(host, path, "detach", *never_runs(path, monitor), qmp=monitor)
        wait_for_epoch(host, path, 1 + 3 * count)
        if before:
            claimed.append(1000 * since_asked(host, 1 + 3 * count))
            assert f"to host {host.name}" in before.ask_to_end().err
        before = running
        time.sleep(HOLD_AT_LEAST)
    assert before
    before.ask_to_end()
    record_property("claimed by request over NFS", percentiles(claimed))


# --- the partition ---------------------------------------------------------------------------


def serve(host: Host, path: Path) -> Begun:
    """An owner whose disk is /dev/nbd0."""
    running = run(host, path, "never", "qemu-nbd", "-v", "-f", "qcow2", "-c", "/dev/nbd0", path)
    host.sh("until [ $(blockdev --getsize64 /dev/nbd0) -gt 0 ]; do sleep 1; done")
    return running


def write(host: Host) -> Begun:
    return host.begin("writer", "/dev/nbd0", 1, LANES, 0, "/dev/ttyS1")


@dataclass
class Written:
    """What writers said in this test, host by host."""

    begun: dict[Host, int]

    @classmethod
    def by(cls, *hosts: Host) -> Self:
        return cls({host: host.acks.stat().st_size for host in hosts})

    def of(self, host: Host) -> bytes:
        return host.acks.read_bytes()[self.begun[host] :]

    def acks(self, host: Host) -> int:
        return self.of(host).count(b"\nA ")

    def failures(self, host: Host) -> int:
        return self.of(host).count(b"\nE ")

    def wait_for_acks(self, host: Host, count: int) -> None:
        wanted = self.acks(host) + count
        wait_for(lambda: self.acks(host) >= wanted, "records", PATIENCE)

    def check(self, box: Box, path: Path, directory: Path) -> records.Report:
        """The disk and what was said, by one host after the other."""
        copy, log = directory / path.name, directory / "acks.log"
        packed = box.server.sh(f"gzip -c {path} | base64")
        copy.write_bytes(gzip.decompress(base64.b64decode(packed)))
        log.write_bytes(b"".join(map(self.of, self.begun)))
        return records.check(copy, "qcow2", log)


def until_free(host: Host, path: Path) -> Begun:
    """Until that host sees nobody's image lock on the disk any more."""
    return host.begin(PROMOTER.parent / "python", "-c", FREE, path)


def test_a_partition_longer_than_the_lease_makes_no_second_writer(
    box: Box, tmp_path: Path, record_property: Record
) -> None:
    """Even when an operator breaks the lease of a host that is only cut off, and not fenced."""
    a, b = box.hosts
    path = disk(box, "cut.qcow2", "16M")
    owner, written = serve(a, path), Written.by(a, b)
    write(a)
    written.wait_for_acks(a, 20)
    with box.cut(a):
        since = time.monotonic()
        until_free(b, path).end()
        record_property("partition: its image lock was free after, s", time.monotonic() - since)
        stood = written.acks(a)
        refused = b.promoter("lease", "acquire", path, "--timeout", 1)
        assert refused.code == 10, refused
        broken = b.promoter("lease", "break", path, "--epoch", 1, "--reason", "cut off")
        assert "not fenced" in broken.result["lease"]["note"]
        new = serve(b, path)
        record_property("partition: taken over after, s", time.monotonic() - since)
        write(b)
        written.wait_for_acks(b, 20)
        assert (written.acks(a), written.failures(a)) == (stood, 0), "its writes wait"
    since = time.monotonic()
    wait_for(lambda: written.failures(a) == LANES, "host-a's writes to fail", PATIENCE)
    record_property("partition: its writes failed, s after it was over", time.monotonic() - since)
    ran = owner.end()
    record_property("partition: its run ended, s after it was over", time.monotonic() - since)
    assert (ran.code, json.loads(ran.out)["error"]) == (10, "LeaseHeld")
    a.sh("! pidof qemu-nbd")
    written.wait_for_acks(b, 20)
    assert written.acks(a) == stood
    b.sh("kill $(pidof writer)")
    assert new.ask_to_end().code == 0
    report = written.check(box, path, tmp_path)
    assert [finding.kind for finding in report.findings] == [records.Kind.FAILED] * LANES, report


# --- the dead owner --------------------------------------------------------------------------


def test_the_disk_of_a_host_that_died_is_taken_when_it_is_fenced(
    box: Box, tmp_path: Path, record_property: Record
) -> None:
    a, b = box.hosts
    path = disk(box, "dead.qcow2", "16M")
    serve(a, path)
    written = Written.by(a, b)
    write(a)
    written.wait_for_acks(a, 20)
    a.kill()
    since = time.monotonic()
    waiting = b.begin(PROMOTER, "lease", "acquire", path, "--timeout", WAITED, "--json")
    until_free(b, path).end()
    record_property("dead owner: its image lock was free after, s", time.monotonic() - since)
    refused = waiting.end()
    assert refused.code == 10, refused
    assert EXPLAINED[Verdict.FENCE] in refused.result["hint"], "silence is not enough"
    b.sh(f"echo '#!/bin/sh' > {STATE}/fence && chmod +x {STATE}/fence")
    fenced = time.monotonic()
    broken = b.promoter("lease", "break", path, "--epoch", 1, "--reason", "it is off")
    assert broken.result["lease"]["note"] == "it is off (by host host-b, fenced)"
    new = serve(b, path)
    record_property("dead owner: taken over, s after the fence", time.monotonic() - fenced)
    record_property("dead owner: taken over after, s", time.monotonic() - since)
    write(b)
    written.wait_for_acks(b, 20)
    b.sh("kill $(pidof writer)")
    assert new.ask_to_end().code == 0
    written.check(box, path, tmp_path).raise_if_bad()
