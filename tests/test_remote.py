"""Domains of another host: libvirt answers, but no file of theirs is seen from here.

The host is a libvirtd to which a directory is another one than here, where files of the same
names have other contents; it answers over a relay, as over ssh.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from promoter.operations.journal import Journal, OperationStatus
from promoter.operations.move import Move
from promoter.values import from_json
from tests import records
from tests.cli import Ran, ended, promoter, start
from tests.domains import Domain, Libvirtd
from tests.vm import Disk, base, qemu_img, wait_for

RELAY = """#!{python}
import os, socket, threading

libvirtd = socket.socket(socket.AF_UNIX)
libvirtd.connect("{socket}")

def answer():
    while data := libvirtd.recv(1 << 16):
        os.write(1, data)

threading.Thread(target=answer, daemon=True).start()
while data := os.read(0, 1 << 16):
    libvirtd.sendall(data)
"""
DECOY = "not that host's"


class Elsewhere:
    """A domain on a host whose ``there`` is ``here`` to it."""

    def __init__(self, libvirtd: Libvirtd, directory: Path) -> None:
        self.libvirtd, self.state = libvirtd, directory / "state"
        self.here, self.there = directory / "images", directory / "there"
        self.here.mkdir()
        self.there.mkdir()
        self.clone = self.here / "clone.qcow2"
        qemu_img("convert", "-O", "qcow2", base(), self.there / "base.qcow2")
        layers = ("-b", "base.qcow2", "-F", "qcow2", self.there / self.clone.name)
        qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *layers)
        for file in self.there.iterdir():
            (self.here / file.name).write_text(DECOY)
        relay = directory / "relay"
        relay.write_text(RELAY.format(python=sys.executable, socket=libvirtd.socket))
        relay.chmod(0o755)
        self.uri = f"qemu+ext://elsewhere/system?command={relay}"
        self.domain = Domain(libvirtd, directory, [Disk(self.clone)])

    @contextmanager
    def running(self) -> Iterator[Domain]:
        with self.libvirtd.seeing(self.there, self.here), self.domain as domain:
            domain.wait_for_acks(40)
            yield domain

    @contextmanager
    def pool(self) -> Iterator[None]:
        xml = f"<pool type='dir'><name>elsewhere</name><target><path>{self.here}</path></target>"
        with self.libvirtd.connect() as connection:
            made = connection.storagePoolCreateXML(f"{xml}</pool>")
            yield
            made.destroy()

    def run(self, command: object, *words: object) -> Ran:
        return promoter(self.state, command, "web01", *words, "-c", self.uri, "--json")

    def strike(self, point: str, whom: str, *words: str) -> subprocess.Popen[str]:
        promote = ("promote", "web01", *words, "-c", self.uri, "--json")
        return start(self.state, point, whom, self.libvirtd.pid, *promote, module="tests.struck")

    def files(self) -> set[str]:
        return {file.name for file in self.there.iterdir()}

    def prove(self, *, promoted: bool, left: int = 0) -> None:
        """The next boot is that of the true disk, nothing was lost and no file here was touched."""
        self.domain.wait_for_acks(40)
        assert self.domain.next_boot() == self.domain.files()
        self.domain.kill()
        self.domain.start()
        self.domain.wait_for_acks(40)
        self.domain.kill()
        (name,) = self.domain.next_boot()
        assert (Path(name) == self.clone) is not promoted
        disk = self.there / Path(name).name
        assert ("backing file" in qemu_img("info", disk)) is not promoted
        records.check(disk, disk.suffix[1:], self.domain.log).raise_if_bad()
        assert len(self.files()) == 2 + promoted + left
        assert {file.name for file in self.here.iterdir()} == {"base.qcow2", "clone.qcow2"}
        assert all(file.read_text() == DECOY for file in self.here.iterdir())


@pytest.fixture
def elsewhere(libvirtd: Libvirtd, tmp_path: Path) -> Elsewhere:
    return Elsewhere(libvirtd, tmp_path)


def test_a_domain_of_another_host_is_promoted_there(elsewhere: Elsewhere) -> None:
    with elsewhere.running() as domain:
        shown = elsewhere.run("chain").result
        chain = [image["file"] for image in shown["disks"][0]["chain"]]
        assert chain == [str(elsewhere.clone), str(elsewhere.here / "base.qcow2")]
        promoted = elsewhere.run("promote")
        assert promoted.code == 0, promoted
        plan = promoted.lines[0]
        assert any("the room there is not known" in warning for warning in plan["warnings"])
        assert any("after a power cut on that host" in warning for warning in plan["warnings"])
        assert (plan["disks"][0]["seed"], plan["disks"][0]["free_bytes"]) == ("none", None)
        (disk,) = promoted.result["disks"]
        assert disk["target"] == domain.files()[0]
        assert disk["old"] == str(elsewhere.clone)
        elsewhere.prove(promoted=True)
        new = elsewhere.there / Path(disk["target"]).name
        assert "cluster_size: 4096" in qemu_img("info", new)
        again = elsewhere.run("promote")
        assert again.code == 3, again  # it does not run now


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("point", "whom"),
    [
        ("before AWAIT_READY", "promoter"),
        ("pivoted", "promoter itself"),
        pytest.param("before MIRROR", "promoter", marks=pytest.mark.nightly),
        pytest.param("before SWITCH_OVER", "both", marks=pytest.mark.nightly),
        pytest.param("suspended", "promoter itself", marks=pytest.mark.nightly),
        pytest.param("defined", "promoter itself", marks=pytest.mark.nightly),
        pytest.param("before TIDY", "promoter", marks=pytest.mark.nightly),
    ],
)
def test_a_killed_promotion_is_finished_by_resume(
    elsewhere: Elsewhere, point: str, whom: str
) -> None:
    with elsewhere.running() as domain:
        words = ["--speed", "50M"]
        if point == "pivoted":
            words += ["--format", "raw", "--target", str(elsewhere.here / "new.raw")]
        struck = ended(elsewhere.strike(point, whom, *words))
        assert struck.code == -signal.SIGKILL, struck
        if whom == "both":
            elsewhere.libvirtd.restart()
        resumed = promoter(elsewhere.state, "job", "resume", "--json")
        assert resumed.code == 0, resumed
        assert domain.files() != [str(elsewhere.clone)]
        elsewhere.prove(promoted=True)


@pytest.mark.nightly
def test_cancelled_what_was_half_made_goes_or_is_named(elsewhere: Elsewhere) -> None:
    with elsewhere.running() as domain:
        with elsewhere.pool():
            cancelled = cancel(elsewhere)
        assert cancelled.code == 7, cancelled
        assert "Half-made" not in cancelled.result["hint"]
        assert elsewhere.files() == {"base.qcow2", "clone.qcow2"}
        cancelled = cancel(elsewhere)
        assert cancelled.code == 7, cancelled
        (left,) = elsewhere.files() - {"base.qcow2", "clone.qcow2"}
        assert (
            f"Half-made on its host, if it is there: {elsewhere.here / left}."
            in (cancelled.result["hint"])
        )
        assert domain.files() == [str(elsewhere.clone)]
        elsewhere.prove(promoted=False, left=1)


@pytest.mark.nightly
def test_a_domain_that_is_killed_keeps_its_old_disk(elsewhere: Elsewhere) -> None:
    with elsewhere.running() as domain, elsewhere.pool():
        promoting = copying(elsewhere)
        domain.kill()
        promoted = ended(promoting)
        assert promoted.code == 3, promoted
        assert elsewhere.files() == {"base.qcow2", "clone.qcow2"}
        domain.start()
        elsewhere.prove(promoted=False)


def cancel(elsewhere: Elsewhere) -> Ran:
    promoting = copying(elsewhere)
    promoting.send_signal(signal.SIGINT)
    return ended(promoting)


def copying(elsewhere: Elsewhere) -> subprocess.Popen[str]:
    promote = ("promote", "web01", "--speed", "1M", "-c", elsewhere.uri, "--json")
    promoting = start(elsewhere.state, *promote)
    wait_for(lambda: made(elsewhere), "the copy to start", 60)
    return promoting


def made(elsewhere: Elsewhere) -> bool:
    """Does promoter know that libvirt has made the target?"""
    running = [e for e in Journal(elsewhere.state).entries() if e.status is OperationStatus.RUNNING]
    return any(from_json(Move, entry.intent).disks[0].made for entry in running)


@pytest.mark.nightly
def test_what_cannot_be_done_there_is_refused(elsewhere: Elsewhere) -> None:
    taken = elsewhere.there / "taken.qcow2"
    taken.write_text("somebody's")
    target = elsewhere.here / taken.name
    with elsewhere.running() as domain:
        refusals: list[tuple[list[object], str]] = [
            (["promote", "--seed", "copy"], "--seed copy"),
            (["promote", "--old", "delete"], "--old delete"),
            (["promote", "--preallocation", "full"], "--preallocation"),
            (["promote", "--cluster-size", "128k"], "--cluster-size"),
            (["promote", "--adopt"], "--adopt"),
            (["promote", "--target", "new.qcow2"], "absolute path"),
            (["promote", "--target", "/dev/vdb"], "is a device"),
            (["promote", "--target", elsewhere.clone], "the disk's own chain"),
            (["consolidate"], "does not run on this host"),
            (["snapshot"], "does not run on this host"),
            (["backup", elsewhere.there], "does not run on this host"),
        ]
        for words, why in refusals:
            ran = elsewhere.run(*words)
            assert ran.code == 4, ran
            assert why in ran.result["message"], ran
        with elsewhere.pool():
            ran = elsewhere.run("promote", "--target", target)
            assert ran.code == 4, ran
            assert f"{target} exists on the host" in ran.result["message"]
        ran = elsewhere.run("promote", "--target", target)  # no pool tells, but libvirt refuses
        assert ran.code == 6, ran
        assert "already exists" in ran.result["message"]
        assert "Half-made" not in ran.result["hint"]
        assert domain.files() == [str(elsewhere.clone)]
        elsewhere.prove(promoted=False, left=1)
    assert taken.read_text() == "somebody's"
