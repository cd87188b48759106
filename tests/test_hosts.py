"""Two hosts over real NFS: the handover, a partition longer than any lease, and the dead owner.

One box, whose hosts take part in one test after the other, in this order; the last one loses
host-a. What has the disks open is a QEMU whose guest never runs, or qemu-nbd, on which the tests'
writer writes: a guest in an emulated host would take minutes to boot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from promoter.lease.rules import STOPPED_AFTER
from promoter.lease.run import HOLD_AT_LEAST
from tests import records
from tests.agents import certify
from tests.hosts import PATIENCE, POOL, PROMOTER, STATE, Begun, Box, Host
from tests.test_lease_handover import percentiles
from tests.vm import ack_count, wait_for

pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("hosts")]
PORT = 7443
ROUNDS = 10
Record = Callable[[str, object], None]

LOCKED = """
import sys, time
from pathlib import Path
from promoter.storage.files import is_locked
began = time.monotonic()
while is_locked(Path(sys.argv[1])):
    time.sleep(0.5)
print(time.monotonic() - began)
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
    until [ -e {path}.lease.d/{epoch:08} ]; do sleep 0.2; done
    until grep -q OFDLCK.*:{inode}.20 /proc/locks; do sleep 0.2; done"""
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
            lines = host.audit()
            asked = max(line["at"] for line in lines if line["event"] == "asked")
            held = next(line for line in lines if line.get("epoch") == 1 + 3 * count)
            claimed.append(1000 * (at(held["at"]) - at(asked)))
            ran = before.ask_to_end()
            assert f"to host {host.name}" in ran.err, ran
        before = running
        time.sleep(HOLD_AT_LEAST)
    assert before
    before.ask_to_end()
    record_property("claimed by request over NFS", percentiles(claimed))
    print(percentiles(claimed), sorted(map(round, claimed)))


def at(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


# --- the partition ---------------------------------------------------------------------------


def serve(host: Host, path: Path) -> Begun:
    """An owner whose disk is /dev/nbd0."""
    running = run(host, path, "never", "qemu-nbd", "-v", "-f", "qcow2", "-c", "/dev/nbd0", path)
    host.sh("until [ $(blockdev --getsize64 /dev/nbd0) -gt 0 ]; do sleep 0.2; done")
    return running


def write(host: Host) -> Begun:
    return host.begin("writer", "/dev/nbd0", 1, 3, 0, "/dev/ttyS1")


def wait_for_acks(host: Host, count: int) -> None:
    wanted = ack_count(host.acks) + count
    wait_for(lambda: ack_count(host.acks) >= wanted, "records", PATIENCE)


def failures(host: Host) -> int:
    return host.acks.read_bytes().count(b"\nE ")


def test_a_partition_longer_than_the_lease_makes_no_second_writer(
    box: Box, tmp_path: Path, record_property: Record
) -> None:
    """Even when an operator breaks the lease of a host that is only cut off, and not fenced."""
    a, b = box.hosts
    path = disk(box, "cut.qcow2", "16M")
    owner = serve(a, path)
    write(a)
    wait_for_acks(a, 20)
    with box.cut(a):
        began = time.monotonic()
        watch = b.begin("/bin/sh", "-c", f"cd {PROMOTER.parents[2]}; .venv/bin/python -c '{LOCKED}' {path}")
        refused = b.promoter("lease", "acquire", path, "--timeout", 1)
        assert refused.code == 10, refused
        watch.end(300)
        free = time.monotonic() - began
        print("free after", free)
        refused = b.promoter("lease", "acquire", path, "--timeout", 1)
        print(refused)
        assert refused.code == 10, refused
        broken = b.promoter("lease", "break", path, "--epoch", 1, "--reason", "cut off")
        assert broken.code == 0, broken
        new = serve(b, path)
        stood = ack_count(a.acks)
        print("taken over after", time.monotonic() - began)
        writing = write(b)
        wait_for_acks(b, 20)
        assert (ack_count(a.acks), failures(a)) == (stood, 0)
    healed = time.monotonic()
    wait_for(lambda: failures(a) == 3, "host-a's writers to fail", 400)
    print("failed after", time.monotonic() - healed)
    assert ack_count(a.acks) == stood
    wait_for_acks(b, 20)
    print(a.sh("cat /proc/locks; dmesg | tail -5; ps ax"))
    b.sh("pkill writer; sleep 1")
    print(writing.end())
    new.ask_to_end()
    print(owner.ask_to_end())
    log = tmp_path / "acks.log"
    log.write_bytes(a.acks.read_bytes() + b.acks.read_bytes())
    copy = tmp_path / "cut.raw"
    print(copy, log)
