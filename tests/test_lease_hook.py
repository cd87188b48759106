"""libvirt's hook: two libvirtds, which are two hosts, over one pool."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import libvirt
import pytest

from promoter.errors import Refused
from promoter.lease import hook
from promoter.lease.file import LeaseFile
from promoter.lease.record import State
from tests.agents import agent, audit, certify
from tests.cli import ended, start
from tests.domains import Domain, Libvirtd
from tests.test_lease_run import LeasingHost, owner_of, record
from tests.vm import Disk, base, blank, linked_clone, wait_for


class LibvirtHost(LeasingHost):
    """A host whose libvirt has the hook."""

    def __init__(self, directory: Path, name: str, libvirtd: Libvirtd) -> None:
        super().__init__(directory, name)
        self.libvirtd = libvirtd
        words = ("hook", "install", "--timeout", 2, "--json")
        ran = ended(start(self.state, *words, enter=libvirtd.enter))
        assert ran.code == 0, ran
        os.kill(libvirtd.pid, signal.SIGTERM)
        libvirtd.restart()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[LibvirtHost, LibvirtHost]]:
    libvirt.registerErrorHandler(lambda *_: None, None)
    with ExitStack() as daemons:
        made = []
        for name in ("host-a", "host-b"):
            directory = tmp_path / f"libvirt-{name}"
            directory.mkdir()
            daemon = daemons.enter_context(Libvirtd(directory))
            made.append(LibvirtHost(tmp_path, name, daemon))
        yield made[0], made[1]


def test_a_domain_starts_only_where_its_disks_can_be_had(
    hosts: tuple[LibvirtHost, LibvirtHost], tmp_path: Path
) -> None:
    """And frees them when it ends, however it ends."""
    a, b = hosts
    for host in hosts:
        certify(tmp_path / "ca", host.state)
    root, data = linked_clone(base(), tmp_path / "root.qcow2"), blank(tmp_path / "d.qcow2", 1 << 20)
    disks = [Disk(root), Disk(data)]
    here, there = (Domain(host.libvirtd, tmp_path, disks, boots=True) for host in hosts)
    with here:
        held = record(root)
        assert held.owner and held.owner.guest == f"domain web01 {here.uuid}"
        assert {owner_of(root), owner_of(data)} == {a.name}
        held_by = "is held by host host-a for domain web01 .*it did not answer"
        with pytest.raises(libvirt.libvirtError, match=held_by):
            there.__enter__()
        with agent(a.state), pytest.raises(libvirt.libvirtError, match="it answered refused: "):
            there.__enter__()
        assert (record(root).epoch, record(data).epoch) == (1, 1)
    assert {record(disk).state for disk in (root, data)} == {State.FREE}
    with there:
        assert {owner_of(root), owner_of(data)} == {b.name}
        os.kill(_qemu(there), signal.SIGKILL)
        for disk in (root, data):
            wait_for(partial(_is_free, disk), "it to be freed", 60)
    steps = [line["state"] for line in audit(b.state) if line["event"] == "lease"]
    assert steps == ["held", "held", "free", "free"]


@pytest.mark.nightly
@pytest.mark.parametrize("point", ["", "pivoted"])
def test_a_domains_lease_follows_its_disk_and_is_freed_where_it_is(
    hosts: tuple[LibvirtHost, LibvirtHost], tmp_path: Path, point: str
) -> None:
    """Also when promoter and its worker are killed half-way, and the domain ends."""
    a, b = hosts
    disk = linked_clone(base(), tmp_path / "root.qcow2")
    with Domain(a.libvirtd, tmp_path, [Disk(disk)]) as domain:
        domain.wait_for_acks(10)
        words = ["promote", *domain.address, "--json"]
        if point:
            command = (point, "itself promoter", 0, *words)
            struck = start(a.state, *command, module="tests.struck")
            assert ended(struck, 120).code == -signal.SIGKILL
            (target,) = tmp_path.glob("root.promoted-*.qcow2")
        else:
            done = ended(start(a.state, *words), 120)
            assert done.code == 0, done
            target = Path(done.result["disks"][0]["target"])
            assert record(target).state is State.HELD
        domain.kill()
        wait_for(partial(_is_elsewhere, disk, target), "the old lease to say where it is", 60)
        assert b.lease("acquire", disk).code == 4
        wait_for(partial(_is_free, target), "it to be freed", 60)
        if point:
            resumed = ended(start(a.state, "job", "resume", "--json"), 120)
            assert resumed.code == 0, resumed
            assert domain.next_boot() == [str(target)]
    assert record(target).state is State.FREE
    assert b.lease("acquire", target).code == 0


def _is_elsewhere(disk: Path, target: Path) -> bool:
    now = LeaseFile(disk).read_any()
    assert now
    return (now.state, now.elsewhere) == (State.FREE, str(target))


def _is_free(disk: Path) -> bool:
    return record(disk).state is State.FREE


def _qemu(domain: Domain) -> int:
    (found,) = (
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if f"uuid {domain.uuid}".encode() in _command_line(process)
    )
    return found


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ")
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.nightly
def test_of_several_disks_a_domain_has_all_or_none(
    hosts: tuple[LibvirtHost, LibvirtHost], tmp_path: Path
) -> None:
    a, b = hosts
    root, data = linked_clone(base(), tmp_path / "a.qcow2"), blank(tmp_path / "b.qcow2", 1 << 20)
    assert b.lease("acquire", data).code == 0
    with pytest.raises(libvirt.libvirtError, match="held by host host-b"):
        Domain(a.libvirtd, tmp_path, [Disk(root), Disk(data)]).__enter__()
    assert (record(root).state, record(root).epoch) == (State.FREE, 2)
    assert owner_of(data) == b.name
    assert not LeaseFile(data).requests()


@pytest.mark.nightly
def test_of_a_domains_disks_those_count_that_it_may_write() -> None:
    found = hook.parse(
        """
        <domain><name>web</name><uuid>u</uuid><devices>
          <disk type='file' device='disk'><source file='/vm/b'/></disk>
          <disk type='file'><source file='/vm/a'/></disk>
          <disk type='file' device='disk'><source file='/vm/c'/><readonly/></disk>
          <disk type='file' device='cdrom'><source file='/vm/d'/></disk>
          <disk type='block' device='disk'><source dev='/dev/sda'/></disk>
          <disk type='file' device='disk'/>
        </devices></domain>"""
    )
    assert found == hook.Domain("domain web u", (Path("/vm/a"), Path("/vm/b")))
    with pytest.raises(Refused):
        hook.parse("<domain>")
