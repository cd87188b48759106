"""The runbooks do what they say: each is played on real guests, and what they show is compared.

`PROMOTER_REWRITE_RUNBOOKS=1 pytest -n 0 -m '' tests/test_runbooks.py` writes into them what was
said, where it is not what they show; look at the difference, and make long outputs short by `…`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from promoter.lease.liveness import lock_on
from promoter.lease.rules import Lock
from promoter.operations.checkup import denied
from promoter.storage.denials import denials
from tests.cli import ended, start
from tests.domains import Domain, Libvirtd
from tests.runbooks import RUNBOOKS, Terminal, play
from tests.test_bad_input import fill, mounted
from tests.test_lease_run import LeasingHost
from tests.vm import MIB, VM, Disk, ack_count, base, linked_clone, wait_for

KINDS = ("qemu", "libvirt")
Guest = VM | Domain


@dataclass
class World:
    """What a runbook is about: images in `/vm`, guests on them, and terminals on hosts."""

    kind: str
    directory: Path
    libvirtd: Libvirtd | None
    opened: ExitStack
    places: dict[str, object] = field(default_factory=dict)
    states: dict[str, Path] = field(default_factory=dict)
    guests: dict[str, Guest] = field(default_factory=dict)

    @property
    def vm(self) -> Path:
        return self.directory / "vm"

    @property
    def log(self) -> Path:
        return self.directory / "promoter.log"

    @property
    def environment(self) -> Mapping[str, str]:
        return {"LIBVIRT_DEFAULT_URI": self.libvirtd.uri} if self.libvirtd else {}

    def boot(self, name: str = "web", rate: int = 100) -> Guest:
        """A guest `name` that writes, on the linked clone `/vm/NAME.qcow2` of `/vm/base.qcow2`."""
        disk = Disk(linked_clone(self.vm / "base.qcow2", self.vm / f"{name}.qcow2"))
        logs = self.directory / name
        logs.mkdir()
        guest: Guest
        if self.libvirtd:
            guest = Domain(self.libvirtd, logs, [disk], f"{name}01")
        else:
            guest = VM(logs, [disk], writer={"rate": rate})
            self.places[f"/run/vm/{name}.qmp"] = guest.monitor
        self.opened.enter_context(guest)
        guest.wait_for_acks(20)
        self.guests[name] = guest
        return guest

    def begin(self, *words: object) -> subprocess.Popen[bytes]:
        """Start `promoter WORDS`, of somebody who writes to `/var/log/promoter.log`."""
        command = [sys.executable, "-m", "promoter", *map(str, words)]
        environment = {**os.environ, **self.environment}
        environment["PROMOTER_STATE_DIR"] = str(self.states[""])
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.opened.callback(process.wait, 60)
        self.opened.callback(process.kill)
        return process

    def wait_for_word(self, word: str) -> None:
        wait_for(lambda: word in self.log.read_text(), f"{word!r} in its log", 60)

    def leasing(self, name: str) -> LeasingHost:
        host = LeasingHost(self.directory, name)
        self.states[name] = host.state
        self.opened.callback(end, host)
        return host


def end(host: LeasingHost) -> None:
    """Its runs, also those that have ended: what they said was not read yet."""
    for process in host.running:
        process.kill()
        process.communicate()


def address(guest: Guest) -> str:
    return str(guest.address[0])


# --- what happened before somebody looks up a runbook -------------------------------------------


def one_clone(world: World) -> None:
    world.boot()


def two_clones_and_one_that_is_off(world: World) -> None:
    world.boot("web")
    world.boot("mail")
    linked_clone(world.vm / "base.qcow2", world.vm / "old.qcow2")


def three_snapshots(world: World) -> None:
    guest = world.boot()
    for _ in range(3):
        ran = ended(start(world.states[""], "snapshot", *guest.address))
        assert ran.code == 0, ran
        guest.wait_for_acks(20)


def a_place_for_backups(world: World) -> None:
    world.boot()
    backup = world.directory / "backup"
    backup.mkdir()
    world.places["/backup"] = backup


def no_room(world: World) -> None:
    full = world.opened.enter_context(mounted(world.directory / "full", "size=128m"))
    guest = world.boot()
    world.places["/full"] = full
    fill(full, lambda: 110 * MIB)
    (full / "somebody-elses").rename(full / "backup-of-yesterday.tar")
    words = ("--target", full / "web.qcow2", "--speed", "10M")
    world.begin("promote", *guest.address, *words)
    world.wait_for_word(": seed ")
    fill(full, lambda: 0)
    (full / "somebody-elses").rename(full / "backup-of-today.tar")
    world.wait_for_word("waiting for room")


def promoter_was_killed(world: World) -> None:
    guest = world.boot()
    process = world.begin("promote", *guest.address, "--speed", "20M")
    world.wait_for_word(": seed ")
    process.kill()
    process.wait()


def a_guest_that_writes_faster_than_is_copied(world: World) -> None:
    guest = world.boot(rate=0)
    ran = ended(start(world.states[""], "snapshot", *guest.address))
    assert ran.code == 0, ran
    guest.wait_for_acks(100)
    world.begin("consolidate", *guest.address, "--speed", "2M")
    world.wait_for_word(": commit ")


def another_base_lies_there(world: World) -> None:
    world.boot()
    base = world.vm / "base.qcow2"
    base.rename(world.vm / "base.qcow2.before-restore")
    shutil.copy(world.vm / "base.qcow2.before-restore", base)


def run_under_a_lease(world: World) -> tuple[LeasingHost, VM]:
    host, _ = world.leasing("host-a"), world.leasing("host-b")
    disk = linked_clone(world.vm / "base.qcow2", world.vm / "web.qcow2")
    logs = world.directory / "web"
    logs.mkdir()
    guest = VM(logs, [Disk(disk)], writer={"rate": 100})
    world.opened.callback(shutil.rmtree, guest.monitor.parent)
    world.places["/run/vm/web.qmp"] = guest.monitor
    command = ["setpriv", "--pdeathsig", "KILL", *guest.argv]
    host.run(disk, "shutdown", *command, qmp=guest.monitor, timeout=120)
    wait_for(lambda: ack_count(guest.log) > 20, "the guest to write", 120)
    return host, guest


def a_guest_on_another_host(world: World) -> None:
    run_under_a_lease(world)


def a_host_that_died(world: World) -> None:
    host, guest = run_under_a_lease(world)
    (process,) = host.running
    process.kill()  # and with it, by its wish, its QEMU
    process.wait()
    wait_for(lambda: lock_on(guest.disks[0].path) is Lock.FREE, "the guest's end", 30)


def a_lease_of_a_host_that_is_gone(world: World) -> None:
    host, _ = world.leasing("host-a"), world.leasing("host-b")
    disk = linked_clone(world.vm / "base.qcow2", world.vm / "web.qcow2")
    assert host.lease("acquire", disk).code == 0


# --- the runbooks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One runbook: what it needs, the kinds of guest that it is about, how often it is played."""

    prepare: Callable[[World], None]
    kinds: tuple[str, ...] = KINDS
    always: tuple[str, ...] = ()


CASES = {
    "promote-one-vm": Case(one_clone, always=("qemu",)),
    "promote-all-clones": Case(two_clones_and_one_that_is_off),
    "merge-snapshots": Case(three_snapshots),
    "backup-round": Case(a_place_for_backups),
    "move-a-disk": Case(a_guest_on_another_host, ("qemu",)),
    "full-disk": Case(no_room, ("qemu",)),
    "host-died": Case(a_host_that_died, ("qemu",)),
    "promoter-was-killed": Case(promoter_was_killed),
    "copy-does-not-converge": Case(a_guest_that_writes_faster_than_is_copied),
    "chain-does-not-match": Case(another_base_lies_there),
    "break-a-lease": Case(a_lease_of_a_host_that_is_gone, ("qemu",), always=("qemu",)),
    "apparmor-selinux": Case(one_clone),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if kind in case.always else pytest.mark.nightly)
        for name, case in CASES.items()
        for kind in case.kinds
    ],
)
def test_a_runbook_is_true(
    name: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    libvirtd = request.getfixturevalue("libvirtd") if kind == "libvirt" else None
    with ExitStack() as opened:
        world = World(kind, tmp_path, libvirtd, opened)
        for directory in (world.vm, tmp_path / "state"):
            directory.mkdir()
        shutil.copy(base(), world.vm / "base.qcow2")
        world.states[""] = tmp_path / "state"
        world.places |= {
            "/vm": world.vm,
            "/var/log/promoter.log": world.log,
            "/var/lib/promoter": world.states[""],
        }
        CASES[name].prepare(world)
        terminal = Terminal(world.places, world.states, world.environment)
        rewrite = "PROMOTER_REWRITE_RUNBOOKS" in os.environ
        play(RUNBOOKS / f"{name}.md", kind, terminal, rewrite=rewrite)
        for guest in world.guests.values():
            guest.wait_for_acks(10)


def test_what_the_doctor_is_said_to_say_of_a_denial_is_what_it_says() -> None:
    shown = (RUNBOOKS / "apparmor-selinux.md").read_text()
    (finding,) = denied("web01", denials(shown, [Path("/vm/web.qcow2")], 0))
    assert f"wrong: web01: {finding.message}\n  {finding.hint}\n" in shown
