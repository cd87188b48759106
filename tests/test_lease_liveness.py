"""Signs of life, and what is taken from a host that gives none: with a clock of the tests' own."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from promoter.errors import LeaseHeld, Refused
from promoter.lease import claim, liveness
from promoter.lease.claim import Acquisition
from promoter.lease.file import LeaseFile
from promoter.lease.host import Host, this_host
from promoter.lease.liveness import Heartbeat, Silence, fence, storage_of
from promoter.lease.record import Answer, LeaseRecord, Said, State
from promoter.lease.rules import Illegal, Lock, Storage
from promoter.lease.store import CouldNotTell
from promoter.storage import abilities

ONE, TWO = Host("host-one", "boot-1"), Host("host-two", "boot-1")


class Clock:
    """A boot clock that stands until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"image")
    return path


@contextmanager
def image_lock(disk: Path) -> Iterator[None]:
    """What a QEMU that writes has locked."""
    with disk.open("rb+") as file:
        for byte in (101, 201):
            request = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
        yield


def hold(disk: Path, host: Host) -> LeaseRecord:
    return Acquisition(LeaseFile(disk), host, host.owner()).run(0)


def test_one_process_of_a_host_beats_and_another_takes_its_place(disk: Path) -> None:
    store = LeaseFile(disk)
    first, second = Heartbeat(store.hosts, ONE), Heartbeat(store.hosts, ONE)
    assert first.beat()
    before = store.pulse("host-one")
    assert not second.beat()
    assert store.pulse("host-one") == before
    first.stop()
    assert second.beat()
    assert store.pulse("host-one") != before, "and does not repeat what was said before"


def test_two_machines_of_one_name_are_noticed(disk: Path) -> None:
    hosts = LeaseFile(disk).hosts
    assert Heartbeat(hosts, ONE).beat()
    with pytest.raises(Refused, match="another machine is host host-one too"):
        Heartbeat(hosts, Host("host-one", "boot-2")).beat()


def test_a_heart_that_cannot_beat_says_so(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heart = Heartbeat(LeaseFile(disk).hosts, ONE)
    assert heart.beat()

    def lost(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", lost)
    with pytest.raises(CouldNotTell, match="Input/output error"):
        heart.beat()


def test_silence_is_timed_by_the_observer_alone() -> None:
    clock = Clock()
    silence = Silence(clock)
    assert silence.of(b"beat 1") == 0
    clock.now += 170
    assert silence.of(b"beat 1") == 170
    assert silence.of(b"beat 2") == 0
    clock.now += 3 * 365 * 86400
    assert silence.of(b"beat 3") == 0, "the owner beat meanwhile, however long it was"


def test_a_silent_owner_loses_a_disk_that_nothing_has_open(disk: Path) -> None:
    clock, store = Clock(), LeaseFile(disk)
    heart = Heartbeat(store.hosts, ONE)
    heart.beat()
    held = hold(disk, ONE)
    taker = Acquisition(store, TWO, TWO.owner(), clock=clock)
    for _ in range(100):  # it beats
        heart.beat()
        assert taker.attempt(held) is None
        clock.now += 20
    heart.stop()
    assert taker.attempt(held) is None, "20 s without a beat"
    clock.now += 159
    assert taker.attempt(held) is None
    with image_lock(disk):
        clock.now += 1000
        assert taker.attempt(held) is None
    taken = taker.attempt(held)
    assert taken
    assert (taken.owner, taken.epoch) == (TWO.owner(), 2)


def test_on_network_storage_silence_takes_nothing(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "LOCAL", frozenset())
    assert storage_of(disk) is Storage.NETWORK
    clock, held = Clock(), hold(disk, ONE)
    taker = Acquisition(LeaseFile(disk), TWO, TWO.owner(), clock=clock)
    assert taker.attempt(held) is None
    clock.now += 1e6
    assert taker.attempt(held) is None
    with pytest.raises(LeaseHeld, match="held by host host-one; it did not answer") as caught:
        taker.run(0)
    assert "fence that host" in caught.value.hint


def test_an_owner_that_wakes_up_finds_its_lease_gone(disk: Path) -> None:
    clock, held = Clock(), hold(disk, ONE)
    taker = Acquisition(LeaseFile(disk), TWO, TWO.owner(), clock=clock)
    taker.attempt(held)
    clock.now += 180
    assert taker.attempt(held)
    with pytest.raises(Illegal):
        claim.let_go(LeaseFile(disk), ONE)


def test_a_host_takes_up_what_a_dead_process_of_its_own_left(disk: Path) -> None:
    store = LeaseFile(disk)
    owner = ONE.owner(process=os.getpid())
    first = Acquisition(store, ONE, owner).run(0)
    again = Acquisition(store, ONE, ONE.owner())
    assert again.attempt(first) is None, "that process runs"
    gone = ONE.owner(process=os.getpid(), guest="x")
    assert gone.started
    claim.let_go(store, ONE)
    dead = Acquisition(store, ONE, type(owner)("host-one", "boot-1", 2**22 + 1, 5)).run(0)
    with image_lock(disk):
        assert again.attempt(dead) is None, "its QEMU runs"
    resumed = again.attempt(dead)
    assert resumed
    assert resumed.epoch == dead.epoch + 1


def test_a_host_takes_up_its_leases_after_a_reboot(disk: Path) -> None:
    before = hold(disk, ONE)
    booted = Host("host-one", "boot-2")
    resumed = Acquisition(LeaseFile(disk), booted, booted.owner()).run(0)
    assert (resumed.epoch, resumed.owner) == (before.epoch + 1, booted.owner())


def test_a_free_disk_that_is_open_anyway_is_refused(disk: Path) -> None:
    with image_lock(disk), pytest.raises(Refused, match="a QEMU has it open"):
        hold(disk, ONE)
    assert LeaseFile(disk).read() is None


def test_what_the_owner_says_is_heard(disk: Path) -> None:
    held, store = hold(disk, ONE), LeaseFile(disk)
    heard: list[Answer] = []
    asking = Acquisition(store, TWO, TWO.owner(), heard=heard.append)
    asking._ask(held)
    (asked,) = store.requests()
    store.answer(asked.ticket, Answer(asked.request.id, Said.BUSY, 1, "mirror"))
    asking._ask(held)
    store.answer(asked.ticket, Answer(asked.request.id, Said.REFUSED, 1, "no"))
    with pytest.raises(LeaseHeld, match="it answered refused: no") as caught:
        asking.run(60)
    assert caught.value.exit_code == 10
    assert [answer.said for answer in heard] == [Said.BUSY, Said.REFUSED]
    assert not store.requests(), "it does not wait any more"


# --- breaking, and the fence -----------------------------------------------------------------


def fence_command(state: Path, script: str) -> None:
    command = state / "fence"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)


def test_an_operator_breaks_the_epoch_that_was_looked_at_and_the_reason_stays(
    disk: Path, tmp_path: Path
) -> None:
    hold(disk, ONE)
    store = LeaseFile(disk)
    with pytest.raises(Illegal, match="at epoch 1 now, not 7"):
        claim.break_lease(store, 7, "burnt down", TWO, tmp_path)
    with image_lock(disk), pytest.raises(Illegal, match="a QEMU has the disk open"):
        claim.break_lease(store, 1, "burnt down", TWO, tmp_path)
    broken, fenced = claim.break_lease(store, 1, "burnt down", TWO, tmp_path)
    assert not fenced
    assert broken.state is State.FREE
    assert broken.note == "burnt down (by host host-two, not fenced)"
    assert hold(disk, TWO).epoch == 3


def test_the_fence_is_told_whom_to_fence_and_may_fail(disk: Path, tmp_path: Path) -> None:
    hold(disk, ONE)
    store = LeaseFile(disk)
    fence_command(tmp_path, f'echo "$@" > {tmp_path}/called; echo "no such PDU" >&2; exit 1')
    with pytest.raises(Refused, match="did not fence host host-one: exit code 1 no such PDU"):
        claim.break_lease(store, 1, "why", TWO, tmp_path)
    assert (tmp_path / "called").read_text() == f"host-one {disk} 1\n"
    record = store.read()
    assert record
    assert record.state is State.HELD
    fence_command(tmp_path, "exit 0")
    broken, fenced = claim.break_lease(store, 1, "why", TWO, tmp_path)
    assert fenced
    assert "fenced" in broken.note


def test_a_fence_that_hangs_has_not_fenced(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "FENCE_TIMEOUT", 0.2)
    fence_command(tmp_path, "exec sleep 60")
    with pytest.raises(Refused, match="timed out"):
        fence(tmp_path, "host-one", disk, 1)


def test_a_lease_of_a_replaced_image_is_broken_and_is_about_the_new_one(
    disk: Path, tmp_path: Path
) -> None:
    hold(disk, ONE)
    copy = tmp_path / "copy"
    copy.write_bytes(disk.read_bytes())
    copy.rename(disk)
    with pytest.raises(Refused, match="about another file"):
        hold(disk, TWO)
    claim.break_lease(LeaseFile(disk), 1, "restored from a backup", TWO, tmp_path)
    assert hold(disk, TWO).disk.inode == disk.stat().st_ino


def test_a_host_has_a_name_that_stays(tmp_path: Path) -> None:
    assert this_host(tmp_path) == this_host(tmp_path / "elsewhere")
    (tmp_path / "host-id").write_text("rack-7\n")
    assert this_host(tmp_path).name == "rack-7"
    (tmp_path / "host-id").write_text("../rack")
    with pytest.raises(Refused, match="no host's name"):
        this_host(tmp_path)


@pytest.mark.parametrize("path", ["/proc/self/status", "/sys/kernel/mm"])
def test_what_is_not_known_to_be_local_is_network_storage(path: str) -> None:
    assert storage_of(Path(path)) is Storage.NETWORK
    assert Lock.FREE is liveness.lock_on(Path("/proc/self/status"))


def test_what_this_host_serves_by_nfs_is_network_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the others it is, and their locks lapse with their connection."""
    served, etab = tmp_path / "the pool", tmp_path / "etab"
    monkeypatch.setattr(abilities, "EXPORTED", etab)
    assert storage_of(served / "disk") is Storage.LOCAL
    etab.write_text(str(served).replace(" ", "\\040") + "\t*(rw,sync)\n")
    assert storage_of(served / "disk") is Storage.NETWORK
    assert storage_of(tmp_path / "disk") is Storage.LOCAL
