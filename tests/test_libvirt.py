"""Real libvirt domains: what promoter sees of them, and what it says when it cannot."""

import contextlib
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from promoter.guests.bugs import loses_writes_at_start
from promoter.operations.suspended import LONGEST_ABSENCE
from tests import records
from tests.cli import Ran, ended, promoter, start
from tests.domains import Domain, Libvirtd
from tests.vm import (
    MIB,
    Bus,
    Disk,
    base,
    blank,
    linked_clone,
    other_qemu,
    qemu_img,
    wait_for,
)


def chains(domain: Domain) -> list[dict[str, Any]]:
    ran = promoter(Path(), "chain", domain.name, "--connect", domain.libvirtd.uri, "--json")
    assert ran.code == 0, ran
    disks: list[dict[str, Any]] = ran.result["disks"]
    return disks


def files(disk: dict[str, Any]) -> list[str]:
    return [image["file"] for image in disk["chain"]]


def test_a_domains_chains_are_shown_under_libvirts_names(
    libvirtd: Libvirtd, tmp_path: Path
) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    data = blank(tmp_path / "data.qcow2", 1 << 20)
    with Domain(libvirtd, tmp_path, [Disk(clone), Disk(data)]) as domain:
        domain.wait_for_acks(20)
        first, second = chains(domain)
        assert (first["disk"], second["disk"]) == ("vda", "vdb")
        chain = [str(clone), str(base())]
        assert files(first) == chain
        assert first["libvirt"] == {"chain": chain, "next_boot": str(clone), "mirror": None}
        assert first["differences"] == second["differences"] == []
        by_uuid = promoter(Path(), "chain", domain.uuid, "-c", libvirtd.uri)
        assert "vda" in by_uuid.out
        assert "libvirt believes" not in by_uuid.out
        domain.shutdown()
    records.check(clone, "qcow2", domain.log).raise_if_bad()


def test_what_libvirt_believes_is_shown_where_it_is_wrong(
    libvirtd: Libvirtd, tmp_path: Path
) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    snapshot, other = tmp_path / "snapshot.qcow2", tmp_path / "other.qcow2"
    arguments = {
        "node-name": "libvirt-1-format",
        "snapshot-file": str(snapshot),
        "snapshot-node-name": "mine",
    }
    command = {"execute": "blockdev-snapshot-sync", "arguments": arguments}
    with Domain(libvirtd, tmp_path, [Disk(clone)]) as domain:
        domain.wait_for_acks(20)
        answer = libvirt_qemu.qemuMonitorCommand(domain.domain, json.dumps(command), 0)
        assert "error" not in answer
        persistent = domain.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        domain.domain.connect().defineXML(persistent.replace(str(clone), str(other)))
        (disk,) = chains(domain)
        assert files(disk) == [str(snapshot), str(clone), str(base())]
        assert disk["differences"] == [
            f"libvirt believes: {clone} on {base()}",
            f"the next boot opens: {other}",
        ]
        shown = promoter(Path(), "chain", domain.name, "-c", libvirtd.uri).out
        assert "libvirt believes" in shown
        assert "the next boot opens" in shown


def test_a_transient_domain_has_no_next_boot(libvirtd: Libvirtd, tmp_path: Path) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    with Domain(libvirtd, tmp_path, [Disk(clone)]) as domain:
        domain.wait_for_acks(1)
        domain.domain.undefine()
        (disk,) = chains(domain)
        domain.define()
        assert disk["libvirt"]["next_boot"] is None
        assert disk["differences"] == []


def test_a_domain_that_is_not_there_or_does_not_run(libvirtd: Libvirtd, tmp_path: Path) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    with Domain(libvirtd, tmp_path, [Disk(clone)]) as domain:
        refused(["web02", "-c", libvirtd.uri], 3, "no such domain", "web02", "web01")
        domain.domain.managedSave()
        refused(["web01", "-c", libvirtd.uri], 3, "does not run", "virsh start", "managed-save")


@pytest.mark.parametrize(
    ("uri", "code", "words"),
    [
        ("test:///default", 4, ["TEST", "qemu:///system"]),
        ("nonsense:///x", 3, ["nonsense:///x", "--connect"]),
        ("qemu+unix:///system?socket=/nowhere/libvirt-sock", 3, ["libvirtd"]),
    ],
)
def test_a_uri_that_leads_to_no_domain(uri: str, code: int, words: list[str]) -> None:
    refused(["web01", "-c", uri], code, *words)


def test_a_socket_that_may_not_be_opened(libvirtd: Libvirtd) -> None:
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
    command += ["-m", "promoter", "chain", "web01", "-c", libvirtd.uri]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 3, ran
    assert "group libvirt" in ran.stderr


def refused(words: list[str], code: int, *wanted: str) -> None:
    ran = promoter(Path(), "chain", *words)
    assert ran.code == code, ran
    assert "Traceback" not in ran.err
    for word in wanted:
        assert word in ran.err, ran


TYPICAL = ("pivoted", "promoter libvirtd")


class Case:
    """A domain on a linked clone, and a promotion of it."""

    def __init__(
        self, libvirtd: Libvirtd, directory: Path, disk: Disk | None = None, **options: Any
    ) -> None:
        self.libvirtd, self.directory = libvirtd, directory
        disk = disk or Disk(linked_clone(base(), directory / "clone.qcow2"))
        self.clone = disk.path
        self.domain = Domain(libvirtd, directory, [disk], **options)
        self.state = directory / "state"

    def strike(self, point: str, whom: str, *words: str) -> subprocess.Popen[str]:
        promote = ("promote", *self.domain.address, *words, "--json")
        return start(self.state, point, whom, self.libvirtd.pid, *promote, module="tests.struck")

    def resume(self) -> Ran:
        return promoter(self.state, "job", "resume", "--json")

    def prove(self, *, promoted: bool) -> None:
        """libvirt, QEMU and the files agree, now and at the next boot; nothing was lost."""
        self.domain.wait_for_acks(40)
        (disk,) = chains(self.domain)
        assert disk["differences"] == []
        assert (disk["jobs"], len(disk["chain"])) == ([], 1 if promoted else 2)
        assert self.domain.next_boot() == self.domain.files() == files(disk)[:1]
        self.domain.kill()
        self.domain.start()
        self.domain.wait_for_acks(40)
        self.domain.kill()
        (new,) = self.domain.next_boot()
        assert (Path(new) == self.clone) is not promoted
        left = {path.name for path in self.directory.glob("*.qcow2*")} - {Path(new).name}
        assert len(left) == promoted
        records.check(Path(new), "qcow2", self.domain.log).raise_if_bad()


@pytest.fixture
def case(libvirtd: Libvirtd, tmp_path: Path) -> Case:
    return Case(libvirtd, tmp_path)


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("pivoted", []),
        pytest.param("unnamed seed", [], marks=pytest.mark.nightly),
        pytest.param("before AWAIT_READY", ["--speed", "20M"], marks=pytest.mark.nightly),
        pytest.param("before SWITCH_OVER", [], marks=pytest.mark.nightly),
        pytest.param("suspended", [], marks=pytest.mark.nightly),
        pytest.param("defined", [], marks=pytest.mark.nightly),
        pytest.param("before TIDY", [], marks=pytest.mark.nightly),
    ],
)
def test_a_libvirtd_that_is_killed_and_comes_back_is_no_hindrance(
    case: Case, point: str, words: list[str]
) -> None:
    with case.domain as domain:
        domain.wait_for_acks(60)
        promoting = case.strike(point, "libvirtd", *words)
        case.libvirtd.restart()
        promoted = ended(promoting)
        assert promoted.code == 0, promoted
        case.prove(promoted=True)


@pytest.mark.nightly
@pytest.mark.parametrize("point", ["before AWAIT_READY", "before SWITCH_OVER"])
def test_promoter_and_libvirtd_are_killed_and_resume_finishes(case: Case, point: str) -> None:
    with case.domain as domain:
        domain.wait_for_acks(60)
        assert ended(case.strike(point, "both", "--speed", "20M")).code == -signal.SIGKILL
        case.libvirtd.restart()
        domain.wait_for_acks(20)
        resumed = case.resume()
        assert resumed.code == 0, resumed.out
        case.prove(promoted=True)


@pytest.mark.parametrize(
    ("point", "whom"),
    [
        pytest.param(*strike, marks=() if strike == TYPICAL else pytest.mark.nightly)
        for strike in product(
            ["suspended", "pivoted", "defined"],
            ["promoter", "itself", "promoter itself", "promoter libvirtd"],
        )
    ],
)
def test_no_death_in_the_switchover_leaves_a_domain_suspended(
    case: Case, point: str, whom: str
) -> None:
    with case.domain as domain:
        domain.wait_for_acks(60)
        promoting = case.strike(point, whom)
        if "libvirtd" in whom:
            case.libvirtd.restart()
        ran = ended(promoting)
        assert (ran.code == -signal.SIGKILL) is ("promoter" in whom), ran
        if whom == "promoter itself":
            assert domain.paused
        else:
            domain.wait_for_acks(20)
        if "promoter" in whom:
            ran = case.resume()
        promoted = whom != "itself" or point != "suspended"
        assert ran.code == (0 if promoted else 6), ran
        case.prove(promoted=promoted)


def test_what_libvirt_would_get_wrong_is_refused(case: Case, tmp_path: Path) -> None:
    with case.domain as domain:
        domain.wait_for_acks(20)
        persistent = domain.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        other = persistent.replace(str(case.clone), str(tmp_path / "other.qcow2"))
        domain.domain.connect().defineXML(other)
        promoted = promoter(case.state, "promote", *domain.address)
        assert promoted.code == 4, promoted
        assert "the next boot opens" in promoted.err
        domain.domain.connect().defineXML(persistent)
        name_backing_file(case.clone, "/nowhere.qcow2")
        promoted = promoter(case.state, "promote", *domain.address)
        name_backing_file(case.clone, str(base()))
        assert promoted.code == 4, promoted
        assert "the header of" in promoted.err
        domain.wait_for_acks(20)
        case.prove(promoted=False)


def name_backing_file(image: Path, name: str) -> None:
    """In the header of an image that QEMU has open, which qemu-img would not write to."""
    with image.open("r+b") as file:
        (offset,) = struct.unpack(">Q", file.read(16)[8:])
        file.write(struct.pack(">I", len(name)))
        file.seek(offset)
        file.write(name.encode())


def test_a_managed_save_image_beside_a_running_domain_is_refused(case: Case) -> None:
    """libvirtd finds it when it starts."""
    with case.domain as domain:
        saved = Path(f"/proc/{case.libvirtd.pid}/root/var/lib/libvirt/qemu/save/web01.save")
        saved.touch()
        os.kill(case.libvirtd.pid, signal.SIGKILL)
        case.libvirtd.restart()
        promoted = promoter(case.state, "promote", *domain.address)
        assert promoted.code == 4, promoted
        assert "web01 has a managed-save image" in promoted.err
        assert "virsh managedsave-remove web01" in promoted.err
        domain.domain.managedSaveRemove(0)
        assert domain.files() == [str(case.clone)]


def test_a_disk_on_the_network_is_refused(case: Case, tmp_path: Path) -> None:
    disk = linked_clone(blank(tmp_path / "below.img", MIB), tmp_path / "far.img")
    with tempfile.TemporaryDirectory(dir="/tmp") as short, case.domain as domain:
        at = Path(short) / "nbd"
        serve = ["setpriv", "--pdeathsig", "KILL", "qemu-nbd", "--persistent", "-f", "raw"]
        with subprocess.Popen([*serve, "-k", at, disk]) as server:
            wait_for(at.exists, "qemu-nbd", 10)
            domain.domain.attachDevice(
                f"""<disk type="network" device="disk"><driver name="qemu" type="qcow2"/>
                <source protocol="nbd"><host transport="unix" socket="{at}"/></source>
                <target dev="vdb" bus="virtio"/></disk>"""
            )
            promoted = promoter(case.state, "promote", *domain.address, "vdb")
            assert promoted.code == 4, promoted
            assert "vdb: its active layer" in promoted.err
            assert "is not a local file" in promoted.err
            domain.kill()
            server.kill()


@pytest.mark.nightly
def test_a_libvirtd_that_stays_away_leaves_it_for_resume(case: Case) -> None:
    with case.domain as domain:
        domain.wait_for_acks(60)
        promoting = case.strike("before AWAIT_READY", "libvirtd", "--speed", "20M")
        left = ended(promoting, LONGEST_ABSENCE + 60)
        assert left.code == 9, left
        assert "promoter job resume" in left.result["hint"]
        case.libvirtd.restart()
        domain.wait_for_acks(20)
        resumed = case.resume()
        assert resumed.code == 0, resumed
        case.prove(promoted=True)


def test_a_transient_domain_is_promoted_and_stays_transient(case: Case) -> None:
    with case.domain as domain:
        domain.wait_for_acks(60)
        domain.domain.undefine()
        promoted = promoter(case.state, "promote", *domain.address, "--json")
        assert promoted.code == 0, promoted.out
        assert not domain.domain.isPersistent()
        domain.wait_for_acks(20)
        (new,) = domain.files()
        domain.define()
    records.check(Path(new), "qcow2", domain.log).raise_if_bad()


@pytest.mark.nightly
def test_a_volume_of_a_pool_in_an_iothread(libvirtd: Libvirtd, tmp_path: Path) -> None:
    disk = Disk(linked_clone(base(), tmp_path / "clone.qcow2"), iothread=True)
    with pool(libvirtd, tmp_path) as name:
        case = Case(libvirtd, tmp_path, disk, pool=name)
        with case.domain as domain:
            domain.wait_for_acks(60)
            before = chains(domain)[0]
            believed = {"chain": files(before), "next_boot": str(disk.path), "mirror": None}
            assert before["libvirt"] == believed
            promote(case)
            case.prove(promoted=True)


@contextlib.contextmanager
def pool(libvirtd: Libvirtd, directory: Path) -> Iterator[str]:
    """A pool whose volumes are the files of a directory."""
    xml = f"<pool type='dir'><name>pool</name><target><path>{directory}</path></target></pool>"
    with libvirtd.connect() as connection:
        made = connection.storagePoolCreateXML(xml)
        yield made.name()
        made.destroy()


@pytest.mark.nightly
def test_a_spelled_out_chain_on_virtio_scsi(libvirtd: Libvirtd, tmp_path: Path) -> None:
    disk = Disk(linked_clone(base(), tmp_path / "clone.qcow2"), bus=Bus.SCSI)
    disk.path.chmod(0o640)
    label = b"system_u:object_r:svirt_image_t:s0:c1,c2\0"
    os.setxattr(disk.path, "security.selinux", label)
    case = Case(libvirtd, tmp_path, disk, spelled_out=True)
    with case.domain as domain:
        domain.wait_for_acks(60)
        target = Path(promote(case)["target"])
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        assert os.getxattr(target, "security.selinux") == label
        case.prove(promoted=True)


@pytest.mark.nightly
def test_a_block_device_on_sata_is_left_as_it_was(libvirtd: Libvirtd, tmp_path: Path) -> None:
    with device(tmp_path / "device.qcow2") as path:
        case = Case(libvirtd, tmp_path, Disk(path, bus=Bus.SATA))
        with case.domain as domain:
            domain.wait_for_acks(60)
            nowhere = promoter(case.state, "promote", *domain.address)
            assert nowhere.code == 4, nowhere
            assert "Give a --target" in nowhere.err
            words = ["promote", *domain.address, "--target", tmp_path / "target.qcow2", "--json"]
            promoting = start(case.state, *words, "--seed", "none", "--speed", "20M")
            assert promoting.stdout
            while '"phase": "mirror"' not in promoting.stdout.readline():
                assert promoting.poll() is None
            promoting.send_signal(signal.SIGINT)
            assert ended(promoting).code == 7
            assert (domain.files(), (tmp_path / "target.qcow2").exists()) == ([""], False)
            promoted = promoter(case.state, *words)
            assert promoted.code == 0, promoted.out
            case.prove(promoted=True)
        assert "backing file" in qemu_img("info", path)


@contextlib.contextmanager
def device(file: Path) -> Iterator[Path]:
    """A loop device that holds a linked clone."""
    with file.open("wb") as image:
        image.truncate(512 * MIB)
    command = ["losetup", "--find", "--show", str(file)]
    path = Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout[:-1])
    try:
        yield linked_clone(base(), path)
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


def promote(case: Case, *words: object) -> dict[str, Any]:
    """The disk's part of promoter's result."""
    promoted = promoter(case.state, "promote", *case.domain.address, *words, "--json")
    assert promoted.code == 0, promoted.out
    (disk,) = promoted.result["disks"]
    return dict(disk)


def test_a_job_of_somebody_else_is_left_alone(case: Case, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    with case.domain as domain:
        domain.wait_for_acks(60)
        copy_to(other, domain)
        promoted = promoter(case.state, "promote", *domain.address)
        assert promoted.code == 4, promoted
        assert "a block job runs on it" in promoted.err
        assert "mirror" in domain.domain.XMLDesc(0)
        domain.domain.blockJobAbort("vda", 0)
        other.unlink()
        copy_to(other, domain, flags=libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW)
        promoted = promoter(case.state, "promote", *domain.address, "--adopt")
        assert promoted.code == 4, promoted
        assert "only the active layer" in promoted.err
        domain.domain.blockJobAbort("vda", 0)
        other.unlink()
        case.prove(promoted=False)


def copy_to(target: Path, domain: Domain, speed: int = 0, flags: int = 0) -> None:
    """What ``virsh blockcopy`` does; `speed` is in bytes per second."""
    copy = f"<disk type='file'><driver type='qcow2'/><source file='{target}'/></disk>"
    flags |= libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    options = {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: speed}
    domain.domain.blockCopy("vda", copy, options, flags)


@pytest.mark.nightly
def test_a_copy_of_somebody_else_is_adopted(case: Case, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    words = ("promote", *case.domain.address, "--adopt", "--json")
    with case.domain as domain:
        domain.wait_for_acks(60)
        copy_to(other, domain, 4 * MIB)
        promoting = start(case.state, *words)
        assert promoting.stdout
        while '"phase": "mirror"' not in promoting.stdout.readline():
            assert promoting.poll() is None
        promoting.send_signal(signal.SIGINT)
        assert ended(promoting).code == 7
        assert "mirror" not in domain.domain.XMLDesc(0)
        other.unlink()  # somebody else's file was left to him
        copy_to(other, domain)
        promoted = promoter(case.state, *words)
        assert promoted.code == 0, promoted.out
        assert promoted.result["disks"][0]["target"] == str(other)
        case.prove(promoted=True)


@pytest.mark.nightly
def test_incremental_backups_go_on(case: Case, tmp_path: Path) -> None:
    with case.domain as domain:
        domain.wait_for_acks(60)
        domain.domain.checkpointCreateXML(
            "<domaincheckpoint><name>monday</name></domaincheckpoint>"
        )
        domain.wait_for_acks(400)
        only_disk = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        domain.domain.snapshotCreateXML("<domainsnapshot/>", only_disk)
        domain.wait_for_acks(20)
        domain.pause()
        before = dirty_bytes(domain, "monday")
        raw = promoter(case.state, "promote", *domain.address, "--format", "raw", "--dry-run")
        assert "monday) stay behind" in " ".join(raw.err.split()) + raw.out, raw
        promoted = promoter(case.state, "promote", *domain.address, "--json")
        assert promoted.code == 0, promoted.out
        assert promoted.result["disks"][0]["seed"] == "none"
        (after,) = dirty_bytes(domain, "monday")
        assert after >= max(before) > min(before) > 0
        backup = f"""
            <domainbackup><incremental>monday</incremental><disks>
              <disk name="vda" type="file"><target file="{tmp_path}/backup"/></disk>
            </disks></domainbackup>"""
        domain.domain.backupBegin(
            backup, "<domaincheckpoint><name>tuesday</name></domaincheckpoint>"
        )
        domain.cont()
        domain.wait_for_acks(20)


def dirty_bytes(domain: Domain, bitmap: str) -> list[int]:
    """What the bitmap of this name counts in each of the images that have one."""
    command = {"execute": "query-named-block-nodes", "arguments": {"flat": True}}
    answer = libvirt_qemu.qemuMonitorCommand(domain.domain, json.dumps(command), 0)
    nodes = json.loads(answer)["return"]
    found = {
        node["file"]: known["count"]
        for node in nodes
        for known in node.get("dirty-bitmaps", ())
        if known.get("name") == bitmap
    }
    return list(found.values())


@pytest.mark.nightly
def test_a_domain_whose_qemu_can_lose_writes_at_a_start_is_suspended_for_it(
    libvirtd: Libvirtd, tmp_path: Path
) -> None:
    case = Case(libvirtd, tmp_path, emulator=other_qemu("newer") / "qemu-system-x86_64")
    with case.domain as domain:
        domain.wait_for_acks(60)
        promoted = promoter(case.state, "promote", *domain.address, "--json")
        assert promoted.code == 0, promoted.out
        (disk,) = promoted.result["disks"]
        assert loses_writes_at_start(version(domain)) is (disk["start_pause_s"] is not None)
        case.prove(promoted=True)


def version(domain: Domain) -> tuple[int, int, int]:
    answer = libvirt_qemu.qemuMonitorCommand(domain.domain, '{"execute": "query-version"}', 0)
    found = json.loads(answer)["return"]["qemu"]
    return found["major"], found["minor"], found["micro"]
