"""Domains of another host, over ssh: libvirt answers, but no file of theirs is seen from here."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from promoter.operations.journal import Journal, OperationStatus
from promoter.operations.move import Move
from promoter.operations.suspended import LONGEST_ABSENCE
from promoter.values import from_json
from tests.cli import Ran, ended, promoter, start
from tests.domains import Libvirtd
from tests.elsewhere import Elsewhere, Pki, Sshd, free_port, listens, ssh_of
from tests.vm import qemu_img, wait_for


@pytest.fixture(scope="session")
def sshd(libvirtd: Libvirtd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = Sshd(libvirtd, tmp_path_factory.mktemp("sshd"))
    server.start()
    yield server


@pytest.fixture
def elsewhere(libvirtd: Libvirtd, sshd: Sshd, tmp_path: Path) -> Elsewhere:
    return Elsewhere(libvirtd, tmp_path, sshd.uri())


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
        assert any("stays suspended until" in warning for warning in plan["warnings"])
        assert (plan["disks"][0]["seed"], plan["disks"][0]["free_bytes"]) == ("none", None)
        (disk,) = promoted.result["disks"]
        assert disk["target"] == domain.files()[0]
        assert disk["old"] == str(elsewhere.clone)
        elsewhere.prove(promoted=True)
        new = elsewhere.there / Path(disk["target"]).name
        assert "cluster_size: 4096" in qemu_img("info", new)
        again = elsewhere.run("promote")
        assert again.code == 3, again  # it does not run now


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Libvirtd, Pki, int]]:
    directory = tmp_path_factory.mktemp("tls")
    pki, port = Pki(directory / "pki"), free_port()
    with Libvirtd(directory, pki.options(port)) as libvirtd:
        wait_for(lambda: listens(port), "TLS", 30)
        yield libvirtd, pki, port


@pytest.mark.nightly
def test_a_domain_is_promoted_over_tls(tls: tuple[Libvirtd, Pki, int], tmp_path: Path) -> None:
    libvirtd, pki, port = tls
    elsewhere = Elsewhere(libvirtd, tmp_path, pki.uri(port))
    with elsewhere.running():
        promoted = elsewhere.run("promote")
        assert promoted.code == 0, promoted
        elsewhere.prove(promoted=True)


@pytest.mark.nightly
def test_certificates_that_are_not_believed_are_told(
    tls: tuple[Libvirtd, Pki, int], tmp_path: Path
) -> None:
    _, pki, port = tls
    other, half = Pki(tmp_path / "other"), Pki(tmp_path / "half")
    (half.directory / "cacert.pem").write_bytes((pki.directory / "cacert.pem").read_bytes())
    for uri, said in [
        (other.uri(port), "Failed to verify peer's certificate"),
        (half.uri(port), "The certificate is not trusted"),
        (pki.uri(port, "127.0.0.1"), "Failed to verify peer's certificate"),
        (f"{pki.uri(port)}/nowhere", "nowhere"),
    ]:
        ran = promoter(tmp_path, "chain", "web01", "-c", uri)
        assert ran.code == 3, ran
        *_, message, hint = ran.err.splitlines()  # libvirt's own warnings come first
        assert message.startswith(f"error: no answer from {uri}: ")
        assert said in message
        assert "pkipath=" in hint
    known = promoter(tmp_path, "chain", "web01", "-c", pki.uri(port))
    assert "no such domain" in known.err


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
def test_ctrl_c_ends_ssh_too_and_cancels_nevertheless(elsewhere: Elsewhere) -> None:
    with elsewhere.running() as domain, elsewhere.pool():
        promoting = copying(elsewhere, enter=("setsid",))
        os.killpg(promoting.pid, signal.SIGINT)
        cancelled = ended(promoting)
        assert cancelled.code == 7, cancelled
        assert domain.files() == [str(elsewhere.clone)]
        elsewhere.prove(promoted=False)


@pytest.mark.nightly
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_connection_that_is_cut_while_it_copies_is_made_again(
    elsewhere: Elsewhere, how: signal.Signals
) -> None:
    with elsewhere.running():
        promoting = copying(elsewhere)
        (ssh,) = ssh_of(promoting.pid)
        os.kill(ssh, how)  # standing still it is like a network that is silent
        if how == signal.SIGSTOP:
            wait_for(lambda: ssh not in ssh_of(promoting.pid), "promoter to give it up", 40)
        speed = promoter(elsewhere.state, "job", "speed", only_job(elsewhere), "50M")
        assert speed.code == 0, speed
        promoted = ended(promoting)
        assert promoted.code == 0, promoted
        elsewhere.prove(promoted=True)


@pytest.mark.nightly
@pytest.mark.parametrize("point", ["suspended", "pivoted"])
def test_a_connection_that_is_cut_while_it_stands_still_is_made_again(
    elsewhere: Elsewhere, point: str
) -> None:
    with elsewhere.running():
        promoted = ended(elsewhere.strike(point, "ssh"))
        assert promoted.code == 0, promoted
        elsewhere.prove(promoted=True)


@pytest.mark.nightly
def test_a_domain_that_stands_still_goes_on_when_its_host_can_be_reached_again(
    elsewhere: Elsewhere, sshd: Sshd
) -> None:
    with elsewhere.running() as domain:
        promoting = elsewhere.strike("pivoted", "ssh libvirtd", pid=sshd.pid)
        wait_for(lambda: domain.paused, "the switchover", 60)
        with pytest.raises(subprocess.TimeoutExpired):
            promoting.wait(2 * LONGEST_ABSENCE + 20)  # of its two processes
        assert domain.paused
        sshd.start()
        promoted = ended(promoting)
        assert promoted.code == 0, promoted
        elsewhere.prove(promoted=True)


@pytest.mark.nightly
def test_several_disks_there_switch_in_one_suspend(
    libvirtd: Libvirtd, sshd: Sshd, tmp_path: Path
) -> None:
    elsewhere = Elsewhere(libvirtd, tmp_path, sshd.uri(), clones=2)
    with elsewhere.running() as domain:
        promoted = elsewhere.run("promote")
        assert promoted.code == 0, promoted
        first, second = promoted.result["disks"]
        assert first["switchover_s"] == second["switchover_s"] < 1
        assert [first["target"], second["target"]] == domain.files()
        elsewhere.prove(promoted=True)


@pytest.mark.nightly
def test_without_room_there_no_disk_switches_and_resume_goes_on(
    libvirtd: Libvirtd, sshd: Sshd, tmp_path: Path
) -> None:
    elsewhere = Elsewhere(libvirtd, tmp_path, sshd.uri(), clones=2)
    small = tmp_path / "small"
    small.mkdir()
    with elsewhere.running() as domain, libvirtd.small(small, "16m"), elsewhere.pool(small):
        words = ("--target-dir", small, "--speed", "20M")
        full = elsewhere.run("promote", *words)
        assert full.code == 5, full
        assert "No space left" in full.result["message"]
        assert domain.files() == list(map(str, elsewhere.clones))
        domain.wait_for_acks(40)
        libvirtd.grow(small, "512m")
        resumed = promoter(elsewhere.state, "job", "resume", "--json")
        assert resumed.code == 0, resumed
        assert domain.files() == [str(small / clone.name) for clone in elsewhere.clones]
        domain.wait_for_acks(40)


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


def copying(elsewhere: Elsewhere, enter: Sequence[str] = ()) -> subprocess.Popen[str]:
    promoting = elsewhere.promoting("--speed", "1M", enter=enter)
    wait_for(lambda: made(elsewhere), "the copy to start", 60)
    return promoting


def only_job(elsewhere: Elsewhere) -> str:
    (job,) = Journal(elsewhere.state).entries()
    return job.id


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


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("way", "said"),
    [
        ({"key": "stranger"}, "Permission denied (publickey)"),
        ({"key": "locked"}, "Permission denied (publickey)"),
        ({"known": "unknown"}, "Host key verification failed"),
        ({"port": 1}, "Connection refused"),
    ],
)
def test_what_ssh_says_is_told_and_nobody_is_asked(
    sshd: Sshd, tmp_path: Path, way: dict[str, Any], said: str
) -> None:
    asked = tmp_path / "asked"
    ask = tmp_path / "ask"
    ask.write_text(f"#!/bin/sh\ntouch {asked}\n")
    ask.chmod(0o755)
    uri = sshd.uri(**way)
    command = start(
        tmp_path,
        *("promote", "web01", "-c", uri),
        enter=("setsid",),  # without a terminal
        environment={"SSH_ASKPASS": str(ask), "DISPLAY": ":0"},
    )
    ran = ended(command)
    assert ran.code == 3, ran
    message, hint = ran.err.splitlines()
    assert message.startswith(f"error: no answer from {uri}: ")
    assert said in message
    key, port = sshd.directory / way.get("key", "user"), way.get("port", sshd.port)
    assert f"ssh -o BatchMode=yes -i {key} ssh://root@127.0.0.1:{port} true" in hint
    assert not asked.exists()
