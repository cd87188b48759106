"""promote, snapshot and consolidate of disks that have a lease, in guests of ``promoter run``."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from promoter.lease import rules
from promoter.lease.claim import let_go
from promoter.lease.file import LeaseFile
from promoter.lease.host import Host, new_stamp, this_host
from promoter.lease.liveness import lock_on
from promoter.lease.record import DiskIdentity, LeaseRecord, State
from promoter.lease.rules import Lock
from tests import records
from tests.cli import Ran, ended, start
from tests.domains import Domain, Libvirtd
from tests.test_lease_run import LeasingHost, Running, record, said
from tests.vm import VM, Disk, ack_count, base, blank, linked_clone, qemu_img, wait_for

Hosts = tuple[LeasingHost, LeasingHost]
LEAKS = 3  # qemu-img check: clusters that nobody uses, which a killed QEMU may leave


class Leased:
    """A guest on a linked clone of a base of its own, run by host-a under a lease."""

    def __init__(self, directory: Path, hosts: Hosts, policy: str = "shutdown") -> None:
        self.a, self.b = hosts
        self.base = directory / "base.qcow2"
        shutil.copy(base(), self.base)
        self.disk = linked_clone(self.base, directory / "clone.qcow2")
        self.vm = VM(directory, [Disk(self.disk)], writer={"rate": 0})
        self.running: Running
        self.policy = policy

    def boot(self, host: LeasingHost | None = None) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", *self.vm.argv]
        self.running = (host or self.a).run(
            self.disk, self.policy, *command, qmp=self.vm.monitor, timeout=120
        )
        self.write(20)

    def write(self, count: int) -> None:
        wanted = ack_count(self.vm.log) + count

        def written() -> bool:
            return ack_count(self.vm.log) >= wanted or self.running.process.poll() is not None

        wait_for(written, f"{count} more records", 120)
        assert self.running.process.poll() is None, self.running.end()

    def start(self, *words: object, host: LeasingHost | None = None) -> subprocess.Popen[str]:
        act, *options = words
        state = (host or self.a).state
        return start(state, act, self.vm.monitor, *options, "--json")

    def perform(self, *words: object, host: LeasingHost | None = None) -> Ran:
        return ended(self.start(*words, host=host), 120)

    def strike(self, point: str, *words: object) -> None:
        act, *options = words
        command = (point, "promoter", 0, act, self.vm.monitor, *options, "--json")
        struck = ended(start(self.a.state, *command, module="tests.struck"), 120)
        assert struck.code == -signal.SIGKILL, struck

    def resume(self) -> Ran:
        return ended(start(self.a.state, "job", "resume", "--json"), 120)

    def passes_to_the_other_host(self) -> None:
        """It is asked for, let go, claimed, has every record, and boots there."""
        asked = self.b.lease("acquire", self.disk, "--timeout", 120)
        assert asked.code == 0, asked
        gone = self.running.end(120)
        assert said(gone, "releasing") == ["to host host-b"], gone
        assert not said(gone, "trouble"), gone
        assert lock_on(self.disk) is Lock.FREE
        assert self.b.lease("release", self.disk).code == 0
        report = records.check(self.disk, None, self.vm.log)
        report.raise_if_bad()
        check = subprocess.run(["qemu-img", "check", "-q", str(self.disk)], check=False)
        assert check.returncode in (0, LEAKS)

    def qemu(self) -> int:
        """The guest's process id."""
        tasks = Path(f"/proc/{self.running.process.pid}/task")
        (pid,) = [
            int(word)
            for task in tasks.iterdir()
            for word in (task / "children").read_text().split()
        ]
        return pid

    def names_its_file(self) -> bool:
        now = LeaseFile(self.disk).read_any()
        assert now
        return now.disk.inode == self.disk.stat().st_ino

    def close(self) -> None:
        shutil.rmtree(self.vm.monitor.parent)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    both = LeasingHost(tmp_path, "host-a"), LeasingHost(tmp_path, "host-b")
    yield both
    for host in both:
        host.close()


@pytest.fixture
def leased(tmp_path: Path, hosts: Hosts) -> Iterator[Leased]:
    made = Leased(tmp_path, hosts)
    yield made
    made.close()


def register_lease(file: Path, *readers: Path, owner: str | None = None) -> None:
    """A lease for a base: free, or held by a host, with these readers."""
    store = LeaseFile(file)
    host = Host(owner or "keeper", "boot")
    stamp = new_stamp()
    assert store.compare_and_swap(0, rules.create(store.identity(stamp.nonce), host.owner(), stamp))
    for reader in readers:
        now = record(file)
        entered = rules.add_reader(now, host.name, str(reader), new_stamp())
        assert store.compare_and_swap(now.epoch, entered)
    if owner is None:
        let_go(store, host)


def at_rest(now: LeaseRecord, owner: str) -> bool:
    held = now.state is State.HELD and now.owner is not None and now.owner.host == owner
    return held and now.operation is None and now.alternate is None


# --- in place ----------------------------------------------------------------------------------


def test_a_leased_disk_is_snapshotted_consolidated_and_promoted_and_its_lease_follows(
    leased: Leased,
) -> None:
    register_lease(leased.base)
    leased.boot()
    assert record(leased.base).readers == (str(leased.disk),), "whoever runs it is entered"
    uuid, inodes = record(leased.disk).disk.uuid, set()
    for act in ("snapshot", "consolidate", "promote"):
        done = leased.perform(act)
        assert done.code == 0, done
        now = record(leased.disk)
        assert at_rest(now, "host-a")
        assert leased.names_its_file()
        assert now.disk.uuid == uuid
        inodes.add(now.disk.inode)
        assert bool(record(leased.base).readers) is (act != "promote")
        leased.write(20)
    assert len(inodes) == 3, "each put another file there, or the first one back"
    assert record(leased.disk).epoch == 1 + 3 * 3
    assert "backing file" not in qemu_img("info", "-U", leased.disk)
    leased.passes_to_the_other_host()


def test_a_leased_promotion_is_undone_under_the_lease(leased: Leased) -> None:
    register_lease(leased.base)
    leased.boot()
    done = leased.perform("promote")
    assert done.code == 0, done
    leased.write(20)
    assert record(leased.base).readers == ()
    os.kill(leased.qemu(), signal.SIGTERM)
    assert leased.running.end(60).code == 0
    undo = ("job", "undo", done.result["id"], "--json")
    alone = ended(start(leased.a.state, *undo))
    assert (alone.code, alone.result["error"]) == (4, "Refused"), alone
    assert "promoter run" in alone.result["hint"]
    elsewhere = leased.b.run(leased.disk, "never", "promoter", *undo).end()
    assert elsewhere.code == 4, "its journal does not know the operation"
    undone = leased.a.run(leased.disk, "never", "promoter", *undo).end()
    assert undone.code == 0, undone
    now = record(leased.disk)
    assert (now.state, now.operation, now.alternate) == (State.FREE, None, None)
    assert leased.names_its_file()
    assert record(leased.base).readers == (str(leased.disk),)
    assert "backing file" in qemu_img("info", leased.disk)
    leased.boot()
    leased.passes_to_the_other_host()


def test_who_asks_for_a_disk_that_is_worked_on_hears_that_it_is_busy(leased: Leased) -> None:
    leased.boot()
    working = leased.start("promote", "--speed", "5M")
    try:
        told = LeaseFile(leased.disk)
        wait_for(lambda: told.told() is not None, "how far it is", 60)
        asked = leased.b.lease("request", leased.disk, "--timeout", 60)
        assert (asked.code, asked.result["error"]) == (10, "LeaseHeld"), asked
        answer = asked.lines[-2]
        assert (answer["said"], answer["retry_after"]) == ("busy", 5)
        assert answer["why"].startswith("promote ")
        assert 0 < answer["done"] < answer["total"]
        held = leased.b.lease("release", leased.disk)
        assert held.code == 4
        again = leased.perform("snapshot")
        assert again.code in (3, 4), "one at a time"
        waiting = start(leased.b.state, "lease", "acquire", leased.disk, "--timeout", 120, "--json")
        done = ended(working, 120)
        assert done.code == 0, done
    finally:
        working.kill()
    taken = ended(waiting, 120)
    assert taken.code == 0, taken
    assert taken.result["lease"]["owner"]["host"] == "host-b"
    assert said(leased.running.end(120), "releasing") == ["to host host-b"]
    records.check(leased.disk, None, leased.vm.log).raise_if_bad()


@pytest.mark.nightly
def test_a_leased_guest_is_backed_up(leased: Leased, tmp_path: Path) -> None:
    """The disk is given to nobody in between either."""
    leased.boot()
    copies = tmp_path / "copies"
    copies.mkdir()
    working = start(leased.a.state, "backup", leased.vm.monitor, copies, "--speed", "10M", "--json")

    def copies_under_the_lease() -> bool:
        operation = record(leased.disk).operation
        return operation is not None and operation.kind == "backup"

    wait_for(copies_under_the_lease, "the copy to begin", 60)
    asked = leased.b.lease("request", leased.disk, "--timeout", 60)
    assert asked.lines[-2]["said"] == "busy", asked
    done = ended(working, 120)
    assert done.code == 0, done
    assert at_rest(record(leased.disk), "host-a")
    leased.write(20)
    leased.passes_to_the_other_host()


# --- what is refused ---------------------------------------------------------------------------


def test_a_disk_whose_lease_is_elsewhere_is_refused_and_unchanged(
    leased: Leased, tmp_path: Path
) -> None:
    leased.boot()
    before = record(leased.disk), leased.disk.stat().st_ino
    other = leased.perform("promote", host=leased.b)
    assert (other.code, other.result["error"]) == (10, "LeaseHeld"), other
    assert "held by host host-a" in other.result["message"]
    assert "lease request" in other.result["hint"]
    dry = leased.perform("snapshot", "--dry-run", host=leased.b)
    assert dry.code == 10
    target = blank(tmp_path / "away.qcow2", 1 << 20)
    assert leased.b.lease("acquire", target).code == 0
    target.unlink()
    away = leased.perform("promote", "--target", target)
    assert (away.code, away.result["error"]) == (4, "Refused"), away
    assert "has a lease already: held by host host-b" in away.result["message"]
    newest = leased.disk.with_name(f"{leased.disk.name}.lease.d") / f"{before[0].epoch:08}"
    whole = newest.read_bytes()
    newest.chmod(0o644)
    newest.write_bytes(whole[:-9])
    corrupt = leased.perform("promote")
    assert (corrupt.code, corrupt.result["error"]) == (4, "BadRecord"), corrupt
    newest.write_bytes(whole)
    assert before == (record(leased.disk), leased.disk.stat().st_ino)
    assert not list(tmp_path.glob("*.new-*")) + list(tmp_path.glob("*.part-*"))
    far = "/elsewhere/web.qcow2"
    entered = rules.add_reader(before[0], "host-a", far, new_stamp())
    assert LeaseFile(leased.disk).compare_and_swap(before[0].epoch, entered)
    read = leased.perform("promote", "--old", "delete")
    assert (read.code, read.result["error"]) == (4, "Refused"), "the old overlay is read"
    assert far in read.result["message"]
    assert record(leased.disk) == entered
    assert leased.perform("promote").code == 0


@pytest.mark.nightly
def test_a_guest_that_runs_outside_of_its_disks_lease_is_refused(
    tmp_path: Path, hosts: Hosts
) -> None:
    """The lease is free; or a process holds it that did not start the guest."""
    a, _ = hosts
    disk = linked_clone(base(), tmp_path / "clone.qcow2")
    register_lease(disk)
    with VM(tmp_path, [Disk(disk)], writer={"rate": 0}) as vm:
        ran = ended(start(a.state, "promote", vm.monitor, "--json"))
        assert (ran.code, ran.result["error"]) == (4, "Refused"), ran
        assert "its lease is free" in ran.result["message"]
        free = record(disk)
        me = this_host(a.state).owner(process=os.getpid())
        taken = rules.claim(free, me, new_stamp())
        assert LeaseFile(disk).compare_and_swap(free.epoch, taken)
        ran = ended(start(a.state, "promote", vm.monitor, "--json"))
        assert (ran.code, ran.result["error"]) == (4, "Refused"), ran
        assert "did not start this guest" in ran.result["message"]
        assert record(disk) == taken


@pytest.mark.nightly
def test_a_host_that_holds_the_lease_itself_changes_the_disk(tmp_path: Path, hosts: Hosts) -> None:
    a, _ = hosts
    disk = linked_clone(base(), tmp_path / "clone.qcow2")
    assert a.lease("acquire", disk).code == 0
    with VM(tmp_path, [Disk(disk)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(20)
        ran = ended(start(a.state, "promote", vm.monitor, "--json"))
        assert ran.code == 0, ran
        assert at_rest(record(disk), "host-a")
        vm.wait_for_acks(20)
        vm.shutdown()
    assert a.lease("release", disk).code == 0
    records.check(disk, None, vm.log).raise_if_bad()


def test_a_layer_whose_lease_lists_other_readers_is_not_merged_into_or_deleted(
    leased: Leased, tmp_path: Path
) -> None:
    """Also when the reader cannot be found here at all."""
    far = Path("/elsewhere/web.qcow2")
    leased.disk.rename(tmp_path / "lower.qcow2")
    lower = tmp_path / "lower.qcow2"
    linked_clone(lower, leased.disk)
    register_lease(lower, leased.disk, far)
    leased.boot()
    refused = leased.perform("consolidate", "--base", lower.name)
    assert refused.code == 4, refused
    assert f"{far} (listed in a lease)" in refused.result["message"]
    drawn = ended(start(leased.a.state, "chain", leased.vm.monitor))
    assert f"{far} (listed in a lease)" in drawn.out.replace("\n", "")
    beside = leased.perform("consolidate", "--base", lower.name, "--beside", "--old", "delete")
    assert beside.code == 4, beside
    assert str(far) in beside.result["message"]
    nothing = leased.perform("consolidate")
    assert nothing.code == 0, "by itself it finds no layer that is the guest's alone"
    assert nothing.result["disks"] == []
    assert record(lower).readers == (str(leased.disk), str(far))
    forgot = leased.a.lease("forget", lower, far)
    assert forgot.code == 0, forgot
    kept = leased.a.lease("forget", lower, leased.disk)
    assert (kept.code, kept.result["error"]) == (4, "Refused"), "it reads through it"
    done = leased.perform("consolidate", "--base", lower.name)
    assert done.code == 0, done
    assert record(lower).readers == (str(leased.disk),), "it is the disk now, by another name"
    assert at_rest(record(leased.disk), "host-a")
    leased.write(20)
    leased.passes_to_the_other_host()


@pytest.mark.nightly
def test_a_disk_is_not_run_over_a_base_that_another_host_holds(
    hosts: Hosts, tmp_path: Path
) -> None:
    a, b = hosts
    lower = blank(tmp_path / "base.qcow2", 1 << 20)
    disk = linked_clone(lower, tmp_path / "clone.qcow2")
    assert b.lease("acquire", lower).code == 0
    ran = a.run(disk, "never", "true").end()
    assert ran.code == 4, ran
    assert LeaseFile(disk).read() is None
    assert b.lease("release", lower).code == 0
    assert a.run(disk, "never", "true").end().code == 0
    assert record(lower).readers == (str(disk),)


@pytest.mark.nightly
def test_a_domains_disk_is_taken_off_the_readers_and_its_own_lease_does_not_follow_it(
    libvirtd: Libvirtd, hosts: Hosts, tmp_path: Path
) -> None:
    a, _ = hosts
    lower = tmp_path / "base.qcow2"
    shutil.copy(base(), lower)
    disk = linked_clone(lower, tmp_path / "clone.qcow2")
    far = Path("/elsewhere/web.qcow2")
    register_lease(lower, disk, far)
    with Domain(libvirtd, tmp_path, [Disk(disk)]) as domain:
        refused = ended(start(a.state, "consolidate", *domain.address, "--base", lower, "--json"))
        assert refused.code == 4, refused
        assert f"{far} (listed in a lease)" in refused.result["message"]
        done = ended(start(a.state, "promote", *domain.address, "--json"))
        assert done.code == 0, done
        assert record(lower).readers == (str(far),)
        new = Path(done.result["disks"][0]["target"])
        assert LeaseFile(new).read() is None, "no lease is made for who has none"
        domain.kill()
        assert a.lease("acquire", new).code == 0
        domain.start()
        refused = ended(start(a.state, "snapshot", *domain.address, "--json"))
        assert (refused.code, refused.result["error"]) == (4, "Refused"), refused
        assert "does not follow" in refused.result["message"]


# --- to another path ---------------------------------------------------------------------------


class Moving(Leased):
    """Its disk is promoted to a path in another directory."""

    def __init__(self, directory: Path, hosts: Hosts) -> None:
        super().__init__(directory, hosts)
        (directory / "elsewhere").mkdir()
        self.home = self.disk
        self.target = directory / "elsewhere" / "web.qcow2"
        register_lease(self.base)

    def says(self, disk: Path) -> tuple[State, bool, str | None]:
        """Of a file's lease: its state, does an operation work, and where is the disk instead?"""
        now = LeaseFile(disk).read_any()
        assert now
        return now.state, now.operation is not None, now.elsewhere

    def follow(self) -> None:
        """The disk is at the target, under a lease there, and yesterday's is nobody's."""
        wait_for(self._has_followed, "the lease to be the target's", 20)
        self.disk = self.target
        assert at_rest(record(self.target), "host-a")
        refused = self.b.lease("acquire", self.home)
        assert (refused.code, refused.result["error"]) == (4, "Refused"), refused
        assert f"it is {self.target}" in refused.result["message"]
        shown = self.b.lease("show", self.home)
        assert shown.result["lease"]["elsewhere"] == str(self.target)
        assert not record(self.base).readers

    def _has_followed(self) -> bool:
        return self.says(self.home) == (State.FREE, False, str(self.target))


@pytest.fixture
def moving(tmp_path: Path, hosts: Hosts) -> Iterator[Moving]:
    made = Moving(tmp_path, hosts)
    yield made
    made.close()


def test_a_lease_follows_its_disk_to_another_path(moving: Moving) -> None:
    """There the disk is asked for, let go, and has every record; on its old path it is no more."""
    moving.boot()
    done = moving.perform("promote", "--target", moving.target)
    assert done.code == 0, done
    moving.follow()
    moving.write(20)
    again = moving.perform("snapshot")
    assert again.code == 0, again
    moving.write(20)
    moving.passes_to_the_other_host()


@pytest.mark.nightly
def test_a_disk_whose_lease_has_followed_it_is_not_undone(moving: Moving) -> None:
    moving.boot()
    done = moving.perform("promote", "--target", moving.target)
    assert done.code == 0, done
    os.kill(moving.qemu(), signal.SIGTERM)
    assert moving.running.end(60).code == 0
    refused = ended(start(moving.a.state, "job", "undo", done.result["id"], "--json"))
    assert refused.code == 4, refused
    assert "its lease has followed it" in refused.result["message"]


MOVES = ("joined", "announced", "drained", "renamed", "before TIDY", "after TIDY", "left")


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=() if p == "renamed" else pytest.mark.nightly) for p in MOVES]
)
def test_wherever_promoter_is_killed_on_the_way_to_another_path_the_lease_follows(
    moving: Moving, point: str
) -> None:
    moving.boot()
    moving.strike(point, "promote", "--target", moving.target)
    moving.write(20)
    resumed = moving.resume()
    assert resumed.code == 0, resumed
    moving.follow()
    moving.write(20)
    moving.passes_to_the_other_host()


@pytest.mark.nightly
@pytest.mark.parametrize("point", ["drained", "renamed", "after TIDY"])
def test_without_a_resume_a_disk_is_asked_for_where_it_is(moving: Moving, point: str) -> None:
    """Its guest's `promoter run` sees by itself whether it has moved; a resume harms nobody."""
    moving.boot()
    moving.strike(point, "promote", "--target", moving.target)
    there = moving.target if not moving.home.is_file() else moving.home
    wait_for(lambda: LeaseFile(there).read() is not None, "the guard to be done", 20)
    there = moving.disk = moving.target if not moving.home.is_file() else moving.home
    assert (there == moving.home) is (point == "drained")
    moving.write(20)
    moving.passes_to_the_other_host()
    moving.resume()
    assert record(there).state is State.FREE
    other = moving.target if there == moving.home else moving.home
    assert moving.says(other) == (State.FREE, False, str(there))
    assert moving.b.lease("acquire", there).code == 0


@pytest.mark.nightly
@pytest.mark.parametrize("point", ["announced", "renamed"])
def test_which_of_two_files_is_the_disk_is_settled_before_either_is_run(
    moving: Moving, point: str
) -> None:
    """promoter, the guest and its `promoter run` are killed as the disk was being moved."""
    moving.boot()
    pid = moving.qemu()
    moving.running.process.send_signal(signal.SIGSTOP)  # or it would see its guest end
    command = (point, "both", pid, "promote", moving.vm.monitor, "--target", moving.target)
    struck = ended(start(moving.a.state, *command, "--json", module="tests.struck"), 120)
    assert struck.code == -signal.SIGKILL, struck
    moving.running.process.kill()
    moving.running.end()
    for path in (moving.home, moving.target):
        ran = moving.a.run(path, "never", "true").end()
        assert ran.code == 4, ran
    resumed = moving.resume()
    there = moving.target if point == "renamed" else moving.home
    assert moving.says(there) == (State.HELD, False, None), resumed
    assert moving.a.run(there, "never", "true").end().code == 0
    records.check(there, None, moving.vm.log).raise_if_bad()


@pytest.mark.nightly
def test_a_disk_that_did_not_move_keeps_its_lease_and_may_move_there_later(moving: Moving) -> None:
    """The guest dies before the switch."""
    moving.boot()
    pid = moving.qemu()
    words = ("before SWITCH_OVER", "hang", pid, "promote", moving.vm.monitor)
    hanging = start(
        moving.a.state, *words, "--target", moving.target, "--json", module="tests.struck"
    )
    os.waitid(os.P_PID, hanging.pid, os.WSTOPPED | os.WNOWAIT)
    assert moving.says(moving.target) == (State.HELD, True, str(moving.home))
    assert moving.b.lease("acquire", moving.target, "--timeout", 2).code == 10
    os.kill(pid, signal.SIGKILL)
    os.kill(hanging.pid, signal.SIGCONT)
    assert ended(hanging, 120).code == 3
    assert not said(moving.running.end(60), "moved")
    assert moving.says(moving.home) == (State.FREE, False, None)
    assert moving.says(moving.target) == (State.FREE, False, str(moving.home))
    moving.boot()
    again = moving.perform("promote", "--target", moving.target)
    assert again.code == 0, again
    moving.follow()


# --- whatever is killed --------------------------------------------------------------------------

POINTS = (
    "before SEED",
    "joined",
    "before PREPARE",
    "announced",
    "before SWITCH_OVER",
    "drained",
    "renamed",
    "finalized",
    "before TIDY",
    "readers off",
    "after TIDY",
    "left",
)
SAMPLE = ("renamed",)
KILLS = [
    pytest.param("promote", point, marks=() if point in SAMPLE else pytest.mark.nightly)
    for point in POINTS
]
SNAPSHOT_KILLS = [
    pytest.param("snapshot", point, marks=pytest.mark.nightly)
    for point in ("joined", "announced", "settled", "after TIDY", "left")
]
COMMIT_KILLS = [
    pytest.param("consolidate", point, marks=() if point == "renamed" else pytest.mark.nightly)
    for point in ("joined", "announced", "drained", "renamed", "before TIDY", "left")
]


def files_that_may_be_there(now: LeaseRecord) -> set[int]:
    both: tuple[DiskIdentity | None, ...] = (now.disk, now.alternate)
    return {each.inode for each in both if each}


@pytest.mark.parametrize(("act", "point"), [*KILLS, *SNAPSHOT_KILLS, *COMMIT_KILLS])
def test_wherever_promoter_is_killed_the_lease_is_about_the_disk_and_the_disk_passes_on(
    leased: Leased, act: str, point: str
) -> None:
    register_lease(leased.base)
    leased.boot()
    if act == "consolidate":
        assert leased.perform("snapshot").code == 0
    leased.strike(point, act)
    struck = LeaseFile(leased.disk).read_any()
    assert struck
    assert leased.disk.stat().st_ino in files_that_may_be_there(struck)
    assert (struck.state, struck.owner and struck.owner.host) == (State.HELD, "host-a")
    wait_for(lambda: bool(LeaseFile(leased.disk).read()), "the lease to be read", 10)
    leased.write(20)
    if (act, point) == ("snapshot", "announced"):
        again = leased.perform(act, "--dry-run")
        assert again.code == 4, "first what was interrupted"
        assert "job resume" in again.result["hint"]
    resumed = leased.resume()
    assert resumed.code == 0, resumed
    assert at_rest(record(leased.disk), "host-a")
    assert leased.names_its_file()
    assert bool(record(leased.base).readers) is (act != "promote")
    leased.write(20)
    leased.passes_to_the_other_host()


@pytest.mark.parametrize(
    "point",
    [*(pytest.param(p, marks=pytest.mark.nightly) for p in ("announced", "drained")), "renamed"],
)
def test_when_promoter_and_the_guest_are_killed_the_disk_is_released_and_resume_harms_nobody(
    leased: Leased, point: str
) -> None:
    """The other host has it before `job resume` cleans up."""
    leased.boot()
    pid = leased.qemu()
    command = (point, "both", pid, "promote", leased.vm.monitor, "--json")
    struck = ended(start(leased.a.state, *command, module="tests.struck"), 120)
    assert struck.code == -signal.SIGKILL, struck
    leased.running.end(60)
    now = record(leased.disk)
    assert (now.state, now.operation, now.alternate) == (State.FREE, None, None)
    assert leased.names_its_file()
    promoted = "backing file" not in qemu_img("info", leased.disk)
    assert promoted is (point == "renamed")
    leased.boot(leased.b)
    before = record(leased.disk), leased.disk.stat().st_ino
    resumed = leased.resume()
    assert resumed.code == (0 if promoted else 4), "the guest that it finds is not its own"
    assert before == (record(leased.disk), leased.disk.stat().st_ino)
    leased.write(20)
    leased.running.ask_to_end()
    records.check(leased.disk, None, leased.vm.log).raise_if_bad()


@pytest.mark.nightly
@pytest.mark.parametrize("point", ["announced", "renamed"])
def test_of_two_leased_disks_both_leases_are_about_their_disks(
    hosts: Hosts, tmp_path: Path, point: str
) -> None:
    """promoter is killed when it has come to the first: of the second, its guard renames."""
    a, b = hosts
    disks = [linked_clone(base(), tmp_path / f"disk{number}.qcow2") for number in range(2)]
    vm = VM(tmp_path, [Disk(disk) for disk in disks], writer={"rate": 0})
    options = ["--disk", disks[0], "--disk", disks[1], "--policy", "shutdown", "--qmp", vm.monitor]
    command = ["setpriv", "--pdeathsig", "KILL", *vm.argv]
    running = Running(start(a.state, "run", *options, "--json", "--", *command))
    a.running.append(running.process)
    try:
        wait_for(lambda: ack_count(vm.log) >= 20, "records", 120)
        words = (point, "promoter", 0, "promote", vm.monitor, "--json")
        assert ended(start(a.state, *words, module="tests.struck"), 120).code == -signal.SIGKILL
        for disk in disks:
            assert LeaseFile(disk).read(), "it is about the file that lies there"
        resumed = ended(start(a.state, "job", "resume", "--json"), 120)
        assert resumed.code == 0, resumed
        for disk in disks:
            assert at_rest(record(disk), "host-a")
            assert record(disk).alternate is None
            assert "backing file" not in qemu_img("info", "-U", disk)
        assert b.lease("acquire", disks[1], "--timeout", 120).code == 0
        ran = running.end(120)
        assert not said(ran, "trouble"), ran
        assert all(LeaseFile(disk).read() for disk in disks)
        records.check(disks[0], None, vm.log).raise_if_bad()
    finally:
        shutil.rmtree(vm.monitor.parent)


def test_a_disk_is_not_let_go_while_an_operation_still_works_on_it(leased: Leased) -> None:
    """The guest dies; promoter, which hangs, could still give its path another file."""
    leased.boot()
    pid = leased.qemu()
    command = ("before SWITCH_OVER", "hang", pid, "promote", leased.vm.monitor, "--json")
    hanging = start(leased.a.state, *command, module="tests.struck")
    try:
        os.waitid(os.P_PID, hanging.pid, os.WSTOPPED | os.WNOWAIT)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: lock_on(leased.disk) is Lock.FREE, "the guest to be gone", 60)
        asked = leased.b.lease("acquire", leased.disk, "--timeout", 2)
        assert asked.code == 10, asked
        assert leased.a.lease("release", leased.disk).code == 4
        assert record(leased.disk).operation
    finally:
        os.kill(hanging.pid, signal.SIGCONT)
    woken = ended(hanging, 120)
    assert woken.code == 3, woken
    ran = leased.running.end(60)
    assert any("still works on it" in text for text in said(ran, "waiting")), ran
    assert record(leased.disk).state is State.FREE
    assert leased.names_its_file()
