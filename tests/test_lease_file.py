"""Leases as files: one winner an epoch, and nothing odd is ever taken for a lease."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from promoter.errors import NoSpace, Refused
from promoter.lease import rules
from promoter.lease.file import LeaseFile
from promoter.lease.record import (
    Answer,
    BadRecord,
    LeaseRecord,
    Owner,
    Request,
    Said,
    Stamp,
    Work,
    encode,
    parse,
)
from promoter.lease.rules import Lock
from promoter.lease.store import Asked, CouldNotTell
from tests.vm import file_system

ONE, TWO = Owner("host-one", "boot"), Owner("host-two", "boot")
MEMORY = Path("/dev/shm")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"image")
    return path


@pytest.fixture
def lease(disk: Path) -> LeaseFile:
    store = LeaseFile(disk)
    assert store.compare_and_swap(0, first(store))
    return store


def first(store: LeaseFile, owner: Owner = ONE, nonce: str = "n1") -> LeaseRecord:
    return rules.create(store.identity("d1"), owner, Stamp(nonce, "now"))


def freed(record: LeaseRecord) -> LeaseRecord:
    return rules.break_lease(record, record.epoch, Lock.FREE, "why", Stamp("n2", "now"))


def now(store: LeaseFile) -> LeaseRecord:
    record = store.read()
    assert record
    return record


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_disk_without_a_lease_has_none(disk: Path) -> None:
    assert LeaseFile(disk).read() is None
    assert names(disk.parent) == ["disk.qcow2"]


def test_the_newest_epoch_is_the_truth_and_the_pointer_says_it_to_people(
    lease: LeaseFile, disk: Path
) -> None:
    record = freed(now(lease))
    assert lease.compare_and_swap(1, record)
    assert lease.read() == record
    pointer = disk.with_name("disk.qcow2.lease")
    assert parse(LeaseRecord, pointer.read_bytes(), "x") == record
    assert json.loads(pointer.read_bytes())["state"] == "free"
    pointer.write_text("rubbish")
    assert lease.read() == record
    assert names(lease.epochs.path) == ["00000001", "00000002"]


def test_a_stale_view_writes_nothing(lease: LeaseFile) -> None:
    stale = freed(now(lease))
    assert lease.compare_and_swap(1, replace(stale, nonce="other"))
    before = now(lease)
    assert not lease.compare_and_swap(1, stale)
    assert lease.read() == before


def test_a_claim_whose_answer_was_lost_is_ones_own(
    lease: LeaseFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server made the link and the client sends it again: "it exists" is a success."""
    link = os.link

    def repeated(*words: Any, **named: Any) -> None:
        link(*words, **named)
        link(*words, **named)

    monkeypatch.setattr(os, "link", repeated)
    assert lease.compare_and_swap(1, freed(now(lease)))
    monkeypatch.undo()
    assert not lease.compare_and_swap(1, replace(freed(now(lease)), epoch=2))


def test_a_stale_file_handle_is_opened_again(
    lease: LeaseFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "stat", errno.ESTALE, times=2)
    assert now(lease).epoch == 1


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int = 10**9) -> None:
    """A system call fails ``times`` times, as storage lets it fail."""
    real = getattr(os, name)
    left = [times]

    def call(*words: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(*words, **named)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    ("call", "number", "error"),
    [
        ("link", errno.EOPNOTSUPP, Refused),
        ("link", errno.EPERM, Refused),
        ("link", errno.EIO, CouldNotTell),
        ("write", errno.EDQUOT, NoSpace),
        ("fsync", errno.EIO, CouldNotTell),
        ("fsync", errno.ENOSPC, NoSpace),
        ("stat", errno.ESTALE, CouldNotTell),
        ("stat", errno.ETIMEDOUT, CouldNotTell),
    ],
)
def test_yes_no_and_could_not_tell_are_never_mixed_up(
    lease: LeaseFile,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    error: type[Exception],
) -> None:
    record = freed(now(lease))
    failing(monkeypatch, call, number)
    with pytest.raises(error) as caught:
        lease.compare_and_swap(1, record)
    assert getattr(caught.value, "hint", "")
    monkeypatch.undo()
    assert now(lease).epoch == 1
    assert names(lease.epochs.path) == ["00000001"], "nothing is left behind"


def test_a_claim_that_may_have_been_written_is_not_called_lost(
    lease: LeaseFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the directory fails after the link: it is there, though perhaps not for long."""
    fsync = os.fsync
    calls = iter(range(100))

    def second(fd: int) -> None:
        if next(calls) == 1:
            raise OSError(errno.EIO, "gone")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", second)
    with pytest.raises(CouldNotTell):
        lease.compare_and_swap(1, freed(now(lease)))


def test_who_looks_as_the_first_record_is_written_sees_it_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"image")
    looking, writing = LeaseFile(disk), LeaseFile(disk)
    names = looking.epochs.names

    def before() -> list[str]:
        found = names()
        assert writing.compare_and_swap(0, first(writing))
        return found

    monkeypatch.setattr(looking.epochs, "names", before)
    assert looking.read() is None
    monkeypatch.undo()
    assert now(looking).epoch == 1


def test_only_what_decides_waits_for_stable_storage(
    lease: LeaseFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch's file, then its name in the directory; a handover writes three of them."""
    fsync, synced = os.fsync, list[str]()

    def noting(fd: int) -> None:
        fsync(fd)
        path = Path(f"/proc/self/fd/{fd}").readlink()
        synced.append(path.name if path.is_dir() else path.parent.name)

    monkeypatch.setattr(os, "fsync", noting)
    assert lease.compare_and_swap(1, freed(now(lease)))
    assert synced == [lease.epochs.path.name] * 2
    assert lease.beside.read(f"{lease.disk.name}.lease") == encode(now(lease))
    lease.ask(Request("r1", 2, TWO, "now"))
    synced.clear()
    lease.answer(1, Answer("r1", Said.BUSY, 2))
    lease.tell(Work("op", "mirror"))
    assert not synced


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda epoch: linked(epoch), "not what a lease is made of"),
        (lambda epoch: linked(epoch.parent), "not what a lease is made of"),
        (lambda epoch: a_pipe(epoch), "not what a lease is made of"),
        (lambda epoch: epoch.write_bytes(b""), "not whole JSON"),
        (lambda epoch: epoch.write_bytes(epoch.read_bytes()[:99]), "not whole JSON"),
        (lambda epoch: epoch.write_bytes(b"x" * 10**8), "larger than"),
        (lambda epoch: epoch.rename(epoch.with_name("00000002")), "epochs are missing"),
        (lambda epoch: epoch.unlink(), "a lease but no epochs"),
        (lambda epoch: os.link(epoch, epoch.with_name("00000002")), "holds epoch 1"),
    ],
)
def test_what_does_not_add_up_is_refused(
    lease: LeaseFile, damage: Callable[[Path], None], why: str
) -> None:
    record = now(lease)
    damage(lease.epochs.path / "00000001")
    store = LeaseFile(lease.disk)
    with pytest.raises(Refused, match=why) as caught:
        store.read()
    assert caught.value.hint
    with pytest.raises(Refused, match=why):
        store.compare_and_swap(1, freed(record))


def test_an_epoch_that_was_seen_and_is_gone_is_missed(lease: LeaseFile) -> None:
    assert now(lease)
    (lease.epochs.path / "00000001").unlink()
    with pytest.raises(BadRecord, match="epoch 1 was removed"):
        lease.read()


def test_a_lease_of_another_file_is_refused(lease: LeaseFile, disk: Path) -> None:
    copy = disk.with_name("copy")
    copy.write_bytes(disk.read_bytes())
    copy.rename(disk)
    with pytest.raises(BadRecord, match="about another file"):
        lease.read()
    assert lease.read_any()


@pytest.mark.parametrize("kind", ["directory", "pipe", "nothing"])
def test_only_a_regular_file_has_a_lease(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(Refused):
        LeaseFile(path)


def test_a_disk_under_another_name_has_the_same_lease(lease: LeaseFile, disk: Path) -> None:
    other = disk.with_name("link")
    other.symlink_to(disk)
    assert LeaseFile(other).read() == lease.read()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with file_system("ext4", tmp_path, 2 << 20) as mounted:
        (mounted / "disk").write_bytes(b"image")
        yield mounted


def test_a_full_pool_refuses_and_has_lost_nothing(small: Path) -> None:
    store = LeaseFile(small / "disk")
    assert store.compare_and_swap(0, first(store))
    with (
        (small / "filler").open("wb", buffering=0) as filler,
        pytest.raises(OSError, match="No space"),
    ):
        while True:
            filler.write(b"x" * 512)
    with pytest.raises(NoSpace, match="No space left"):
        store.compare_and_swap(1, freed(now(store)))
    assert now(store).epoch == 1
    (small / "filler").unlink()
    assert store.compare_and_swap(1, freed(now(store)))


def test_a_read_only_pool_is_read_and_not_claimed(small: Path) -> None:
    store = LeaseFile(small / "disk")
    assert store.compare_and_swap(0, first(store))
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    with pytest.raises(Refused, match="Read-only"):
        store.compare_and_swap(1, freed(now(store)))
    assert now(store).epoch == 1


def test_requests_queue_by_ticket_and_are_answered(lease: LeaseFile) -> None:
    tickets = [lease.ask(Request(f"r{number}", 1, TWO, "now")) for number in (1, 2, 3)]
    assert tickets == [1, 2, 3]
    (lease.queue.path / "00000002").write_text("rubbish")
    assert [asked.request.id for asked in lease.requests()] == ["r1", "r3"]
    asked = lease.requests()[0]
    assert lease.answer_to(asked) is None
    said = Answer("r1", Said.BUSY, 1, "mirror", retry_after=5)
    lease.answer(1, said)
    assert lease.answer_to(asked) == said
    (lease.queue.path / "00000001.answer").write_bytes(encode(said)[:-9])
    assert lease.answer_to(asked) is None, "it is torn"
    lease.answer(1, said)
    again = Asked(1, Request("r1-again", 2, TWO, "now"))
    lease.renew(again)
    assert lease.requests()[0] == again
    assert lease.answer_to(again) is None, "that answer was to what it asked before"
    lease.withdraw(1)
    assert [asked.ticket for asked in lease.requests()] == [3]


def test_a_flood_of_requests_is_bounded(lease: LeaseFile) -> None:
    lease.queue.make()
    data = encode(Request("r", 1, TWO, ""))
    for number in range(1, 2000):
        (lease.queue.path / f"{number:08}").write_bytes(data)
    assert len(lease.requests()) == 256


def test_what_killed_writers_left_is_swept(lease: LeaseFile) -> None:
    old, new = (lease.epochs.path / f".tmp-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    assert LeaseFile(lease.disk).read()
    assert not old.exists()
    assert new.exists()


def test_a_watcher_hears_of_the_next_epoch(lease: LeaseFile) -> None:
    assert not lease.watch(1, 0)
    assert lease.compare_and_swap(1, freed(now(lease)))
    assert lease.watch(1, 10)


# --- races -----------------------------------------------------------------------------------

RACER = """
import sys
from pathlib import Path
from dataclasses import replace
from promoter.lease import rules
from promoter.lease.file import LeaseFile
from promoter.lease.record import LeaseRecord, Owner, Stamp, State
me, pool, attempts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
stores = [LeaseFile(disk) for disk in sorted(pool.glob("disk?"))]
owner = Owner(me, "boot")
print("ready", flush=True)
sys.stdin.readline()
for number in range(attempts):
    store = stores[number // 50 % len(stores)]
    seen = store.read()
    epoch = seen.epoch if seen else 0
    disk = seen.disk if seen else store.identity("d1")
    mine = LeaseRecord(disk, epoch + 1, State.HELD, owner, f"{me}-{number}", "")
    if store.compare_and_swap(epoch, mine):
        print(store.disk.name, epoch + 1, mine.nonce)
"""


def race(pool: Path, attempts: int, racers: int) -> dict[tuple[str, int], list[str]]:
    """Who says of which epoch that it won it."""
    for number in range(9):
        (pool / f"disk{number}").write_bytes(b"image")
    share = attempts // racers
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, f"racer-{number}", str(pool), str(share)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(racers)
    ]
    for racer in running:
        assert racer.stdout and racer.stdout.readline() == "ready\n"
    for racer in running:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    winners: dict[tuple[str, int], list[str]] = {}
    for racer in running:
        out, _ = racer.communicate()
        assert racer.returncode == 0
        for line in out.splitlines():
            disk, epoch, nonce = line.split()
            winners.setdefault((disk, int(epoch)), []).append(nonce)
    return winners


@pytest.mark.parametrize("claims", [20_000, pytest.param(1_000_000, marks=pytest.mark.nightly)])
def test_no_epoch_has_two_winners(claims: int, tmp_path: Path) -> None:
    pool = MEMORY / f"promoter-race-{os.getpid()}" if MEMORY.is_dir() else tmp_path / "pool"
    pool.mkdir()
    try:
        winners = race(pool, claims, racers=4)
        assert all(len(nonces) == 1 for nonces in winners.values())
        assert len(winners) < claims, "they did race"
        for disk in pool.glob("disk?"):
            for path in LeaseFile(disk).epochs.path.iterdir():
                record = parse(LeaseRecord, path.read_bytes(), str(path))
                assert winners.pop((disk.name, record.epoch)) == [record.nonce]
        assert not winners
    finally:
        subprocess.run(["rm", "-rf", pool], check=True)
