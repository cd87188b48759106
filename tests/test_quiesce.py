"""What --quiesce promises, on both kinds of guest, with a real guest agent in them."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from promoter.operations.quiesce import ANSWER, LONGEST_FREEZE
from tests import agent, records
from tests.cli import ended, promoter
from tests.deltas import Case
from tests.domains import Domain, Libvirtd
from tests.test_consolidate_kills import qemu_of
from tests.vm import VM, base, images, linked_clone, qemu_img

ROOT_OFFSET = 1 << 20  # of the root file system, in the disk
NOISE = 15.0  # seconds that a command may take besides, on a busy machine
SLOWER = 5  # seconds

MakeCase = Callable[[int], Case]
NIGHTLY_LIBVIRT = pytest.mark.parametrize(
    "make_case", ["qemu", pytest.param("libvirt", marks=pytest.mark.nightly)], indirect=True
)


@pytest.fixture(params=["qemu", "libvirt"])
def make_case(request: pytest.FixtureRequest, tmp_path: Path) -> MakeCase:
    """Makes a guest with an agent whose freeze takes so many seconds longer."""
    if not (images() / "vmlinux").exists():
        pytest.skip("CirrOS has no guest agent")
    disks = [linked_clone(base(), tmp_path / "disk.qcow2")]
    if request.param == "qemu":
        return lambda delay: Case(
            lambda disks: VM(tmp_path, disks, writer={"agent": delay}, channel=True),
            tmp_path,
            disks,
        )
    libvirtd: Libvirtd = request.getfixturevalue("libvirtd")
    return lambda delay: Case(
        lambda disks: Domain(libvirtd, tmp_path, disks, agent=delay), tmp_path, disks
    )


def started(guest: VM | Domain) -> None:
    guest.wait_for_acks(20)
    agent.wait_for_agent(guest)


def is_clean(layer: Path) -> bool:
    """Is the root file system in a layer as after an unmount? Else its journal has work to do."""
    raw = layer.with_name("root.raw.log")
    qemu_img("convert", "-U", "-O", "raw", layer, raw)
    where = f"{raw}?offset={ROOT_OFFSET}"
    shown = subprocess.run(["dumpe2fs", "-h", where], check=True, capture_output=True, text=True)
    checked = subprocess.run(["e2fsck", "-fn", where], check=False, capture_output=True, text=True)
    raw.unlink()
    if "needs_recovery" in shown.stdout:
        return False
    assert checked.returncode == 0, checked.stdout
    return True


def prove_writes(guest: VM | Domain) -> None:
    """The guest writes: records to its disk, and files."""
    guest.wait_for_acks(20)
    assert not agent.is_frozen(guest)
    agent.run(guest, "date > /written && sync")


@NIGHTLY_LIBVIRT
def test_a_quiesced_snapshot_has_a_clean_file_system(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(0)
    with case.guest as guest:
        started(guest)
        assert not is_clean(case.snapshot()), "nobody froze it"
        (disk,) = case.done("snapshot", "--quiesce")["disks"]
        assert is_clean(Path(disk["source"]))
        assert disk["switchover_s"] < disk["frozen_s"] < NOISE
        prove_writes(guest)
        backups = tmp_path / "backups"
        backups.mkdir()
        name, *connect = guest.address
        words = ("backup", name, backups, *connect, "--quiesce", "--json")
        ran = promoter(case.state, *words)
        assert ran.code == 0, ran
        (copied,) = ran.result["disks"]
        assert is_clean(Path(copied["file"]))
        assert copied["frozen_s"] > 0
        prove_writes(guest)
        case.prove_at_rest()
        case.prove_boots(4)


@NIGHTLY_LIBVIRT
def test_without_an_agent_that_answers_it_is_refused(make_case: MakeCase) -> None:
    case = make_case(0)
    with case.guest as guest:
        started(guest)
        chain, files = case.chain(), case.files()
        agent.ask(guest, "guest-fsfreeze-freeze")
        refused = case.run("snapshot", "--quiesce")
        assert refused.code == 4, refused
        assert "somebody has frozen" in refused.result["message"]
        assert agent.is_frozen(guest), "by somebody else"
        agent.ask(guest, "guest-fsfreeze-thaw")
        if isinstance(guest, VM):
            with agent.held(guest):
                refused = case.run("snapshot", "--quiesce")
            assert refused.code == 4, refused
            assert "another client" in refused.result["message"]
        agent.stop(guest)
        began = time.monotonic()
        refused = case.run("snapshot", "--quiesce")
        assert time.monotonic() - began < 2 * ANSWER + NOISE
        assert refused.code == 4, refused
        assert "--quiesce" in refused.result["hint"]
        case.prove_unchanged(chain, files)
        guest.pause()
        refused = case.run("snapshot", "--quiesce")
        assert refused.code == 4, refused
        assert "paused" in refused.result["message"]


@NIGHTLY_LIBVIRT
def test_a_guest_without_a_channel_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(0)
    if isinstance(case.guest, VM):
        case.guest = VM(tmp_path, case.disks)
    else:
        case.guest = Domain(case.guest.libvirtd, tmp_path, case.disks)
    with case.guest as guest:
        guest.wait_for_acks(20)
        chain, files = case.chain(), case.files()
        refused = case.run("snapshot", "--quiesce", "--dry-run")
        assert refused.code == 4, refused
        case.prove_unchanged(chain, files)


@pytest.mark.nightly
def test_a_freeze_that_takes_too_long_is_given_up_and_thawed(make_case: MakeCase) -> None:
    case = make_case(round(LONGEST_FREEZE) + SLOWER)
    with case.guest as guest:
        started(guest)
        chain, files = case.chain(), case.files() | {"state"}
        began = time.monotonic()
        failed = case.run("snapshot", "--quiesce")
        assert time.monotonic() - began < LONGEST_FREEZE + SLOWER + 2 * ANSWER + NOISE
        assert failed.code == 6, failed
        assert "freeze" in failed.result["message"]
        assert "unchanged" in failed.result["hint"]
        prove_writes(guest)
        case.prove_unchanged(chain, files)


KILLS = {("qemu", "promoter itself")}


@pytest.mark.parametrize(
    ("make_case", "whom"),
    [
        pytest.param(*kill, marks=() if kill in KILLS else pytest.mark.nightly)
        for kill in product(["qemu", "libvirt"], ["promoter", "itself", "promoter itself"])
    ],
    indirect=["make_case"],
)
def test_whoever_is_killed_between_freeze_and_thaw_the_guest_does_not_stay_frozen(
    make_case: MakeCase, whom: str
) -> None:
    case = make_case(0)
    with case.guest as guest:
        started(guest)
        ran = ended(case.strike("frozen", whom, qemu_of(guest), "snapshot", "--quiesce"))
        assert (ran.code == -signal.SIGKILL) is ("promoter" in whom), ran
        if whom == "promoter itself":
            assert agent.is_frozen(guest), "nobody is left who could thaw it"
        else:
            prove_writes(guest)
        resumed = case.resume()
        assert resumed.code == 0, resumed
        prove_writes(guest)
        taken = whom != "itself"
        assert len(case.chain()) == (3 if taken else 2)
        if taken:
            assert is_clean(case.chain()[1])
        case.prove_at_rest()
        active = guest.next_boot()[0] if isinstance(guest, Domain) else case.active
    records.check(Path(active), None, guest.log).raise_if_bad()


@pytest.mark.nightly
@pytest.mark.parametrize("make_case", ["libvirt"], indirect=True)
def test_libvirtd_killed_between_freeze_and_thaw_the_guest_is_thawed_when_it_is_back(
    make_case: MakeCase, libvirtd: Libvirtd
) -> None:
    case = make_case(0)
    with case.guest as guest:
        started(guest)
        snapshot = case.strike("frozen", "libvirtd", libvirtd.pid, "snapshot", "--quiesce")
        libvirtd.restart()
        ran = ended(snapshot)
        assert ran.code == 0, ran
        prove_writes(guest)
        assert is_clean(case.chain()[1])
        case.prove_at_rest()
