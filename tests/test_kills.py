"""Whatever is killed, and wherever: the guest's next boot has every acknowledged write."""

from __future__ import annotations

import os
import signal
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from promoter.operations.guarding import DEADLINE
from tests import records
from tests.cli import Ran, ended, promoter, start
from tests.struck import AT_A_START, POINTS
from tests.vm import VM, Disk, GuestDied, base, linked_clone, qemu_img, wait_for

LEAKS = 3  # qemu-img check: clusters that nobody uses, which a killed QEMU may leave


def first_way(sample: tuple[str, ...]) -> list[object]:
    """Every point, in place; those that are not of the sample in the nightly run."""
    rest = pytest.mark.nightly
    return [pytest.param(p, False, marks=() if p in sample else rest) for p in POINTS]


NEAR_THE_COMMIT = POINTS[POINTS.index("before PREPARE") :]
SECOND_WAY = [pytest.param(point, True, marks=pytest.mark.nightly) for point in NEAR_THE_COMMIT]
MARGIN = 0.5  # of the deadline: two guests under TCG share this machine with the tests


class Case:
    """A guest on a linked clone, and a promotion of it that is struck."""

    def __init__(self, directory: Path, *, target: bool) -> None:
        self.state = directory / "state"
        self.clone = linked_clone(base(), directory / "clone.qcow2")
        self.target = directory / "target.qcow2" if target else None
        self.directory = directory
        self.vm = VM(directory, [Disk(self.clone)], writer={"rate": 0})

    def strike(self, point: str, whom: str) -> subprocess.Popen[str]:
        words = ["--target", self.target] if self.target else []
        if point == "before AWAIT_READY":
            words += ["--speed", "20M"]  # or there is nothing to wait for
        command = (point, whom, self.vm.pid, "promote", self.vm.monitor, *words, "--json")
        return start(self.state, *command, module="tests.struck")

    def resume(self) -> Ran:
        return promoter(self.state, "job", "resume", "--json")

    @property
    def disk(self) -> Path:
        """The disk that is the true one now."""
        return self.clone if self.clone.exists() or self.target is None else self.target

    def boot(self) -> None:
        """By the guest's own command line; where the disk is gone, that must fail loudly."""
        if self.disk == self.target:
            with pytest.raises(GuestDied, match=r"clone\.qcow2.*No such file"):
                self.vm.start()
            moved = VM(self.directory, [Disk(self.target)], writer={"rate": 0})
            with moved:
                moved.wait_for_acks(20)
        else:
            self.vm.start()
            self.vm.wait_for_acks(20)

    def prove(self, *, promoted: bool) -> None:
        """Every record is there, the image is clean, and nothing is left lying about."""
        self.vm.kill()
        report = records.check(self.disk, "qcow2", self.vm.log)
        report.raise_if_bad()
        assert report.records > 100
        assert report.max_latency_s < DEADLINE + MARGIN
        check = subprocess.run(["qemu-img", "check", "-q", str(self.disk)], check=False)
        assert check.returncode in (0, LEAKS)
        assert ("backing file" in qemu_img("info", self.disk)) is not promoted
        kept = {path.name for path in self.directory.glob("*.qcow2*")}
        asides = {name for name in kept if ".aside-" in name}
        spares = {name for name in kept if ".new-" in name}
        assert kept - asides - spares == {self.disk.name}
        assert len(asides) == promoted
        assert len(spares) <= promoted


@pytest.fixture(scope="module")
def base_digest() -> str:
    return sha256(base().read_bytes()).hexdigest()


def is_promoted(case: Case) -> bool:
    status = promoter(case.state, "job", "list", "--json").lines
    assert [entry["status"] for entry in status] in (["done"], ["failed"])
    return bool(status[0]["status"] == "done")


@pytest.mark.parametrize(("point", "target"), [*first_way(POINTS[::5]), *SECOND_WAY])
def test_a_killed_promoter_is_finished_by_resume(
    tmp_path: Path, base_digest: str, point: str, target: bool
) -> None:
    case = Case(tmp_path, target=target)
    with case.vm:
        case.vm.wait_for_acks(60)
        assert ended(case.strike(point, "promoter")).code == -signal.SIGKILL
        case.vm.wait_for_acks(40)
        resumed = case.resume()
        assert resumed.code == 0, resumed.out
        case.vm.wait_for_acks(20)
        case.vm.kill()
        assert is_promoted(case)
        case.boot()
        case.prove(promoted=True)
    assert sha256(base().read_bytes()).hexdigest() == base_digest


@pytest.mark.parametrize(("point", "target"), [*first_way(POINTS[1::7]), *SECOND_WAY])
def test_a_killed_qemu_leaves_one_true_disk(
    tmp_path: Path, base_digest: str, point: str, target: bool
) -> None:
    case = Case(tmp_path, target=target)
    with case.vm:
        case.vm.wait_for_acks(60)
        promoted = ended(case.strike(point, "qemu"))
        case.vm.wait()
        assert promoted.code in (0, 3), promoted.out
        assert is_promoted(case) is (promoted.code == 0)
        assert (promoted.code == 0) is (is_committed(point) or point == "drained")
        assert promoted.code or not promoted.result["guest_alive"], "and the operator is told"
        case.boot()
        case.prove(promoted=promoted.code == 0)
    assert sha256(base().read_bytes()).hexdigest() == base_digest


@pytest.mark.parametrize(("point", "resumed_first"), [*first_way(POINTS[2::7]), *SECOND_WAY])
def test_when_both_are_killed_boot_and_resume_agree_in_either_order(
    tmp_path: Path, base_digest: str, point: str, resumed_first: bool
) -> None:
    case = Case(tmp_path, target=False)
    with case.vm:
        case.vm.wait_for_acks(60)
        assert ended(case.strike(point, "both")).code == -signal.SIGKILL
        case.vm.wait()
        if not resumed_first:
            case.boot()
        resumed = case.resume()
        assert resumed.code == (0 if is_committed(point) or not resumed_first else 3), resumed.out
        assert is_promoted(case) is (resumed.code == 0)
        if resumed_first:
            case.boot()
        case.vm.wait_for_acks(20)
        case.prove(promoted=resumed.code == 0)
    assert sha256(base().read_bytes()).hexdigest() == base_digest


@pytest.mark.sampled(6)
@pytest.mark.parametrize("qemu", ["newer"], indirect=True)
@pytest.mark.parametrize("point", AT_A_START)
@pytest.mark.parametrize("whom", ["promoter", "promoter and guard"])
def test_a_guest_that_was_stopped_for_a_mirrors_start_is_continued(
    tmp_path: Path, base_digest: str, qemu: str, point: str, whom: str
) -> None:
    case = Case(tmp_path, target=False)
    with case.vm as vm:
        vm.wait_for_acks(60)
        assert ended(case.strike(point, whom)).code == -signal.SIGKILL
        if whom == "promoter":
            vm.wait_for_acks(40)
        else:
            assert vm.qmp("query-status")["status"] == "paused"
        resumed = case.resume()
        assert resumed.code == 0, resumed.out
        assert vm.qmp("query-status")["status"] == "running"
        vm.wait_for_acks(20)
        vm.shutdown()
        case.prove(promoted=True)


@pytest.mark.nightly
@pytest.mark.parametrize("qemu", ["newer"], indirect=True)
def test_a_promoter_that_hangs_at_a_mirrors_start_does_not_freeze_its_guest(
    tmp_path: Path, qemu: str
) -> None:
    case = Case(tmp_path, target=False)
    with case.vm as vm:
        vm.wait_for_acks(60)
        hanging = case.strike("stopped", "hang")
        os.waitid(os.P_PID, hanging.pid, os.WSTOPPED | os.WNOWAIT)
        vm.wait_for_acks(60)
        os.kill(hanging.pid, signal.SIGCONT)
        woken = ended(hanging)
        assert woken.code == 6, woken.out
        assert "continued while its mirror started" in woken.result["message"]
        assert vm.qmp("query-jobs") == []
        vm.wait_for_acks(20)
        case.prove(promoted=False)


def test_a_guard_stays_until_a_slow_qemu_has_heard_it(tmp_path: Path) -> None:
    """QEMU forgets what it has not come to when its monitor's last client goes away."""
    case = Case(tmp_path, target=False)
    with case.vm:
        case.vm.wait_for_acks(60)
        struck = case.strike("completing", "promoter of a stopped qemu")
        assert struck.wait(60) == -signal.SIGKILL
        wait_for(lambda: not list(tmp_path.glob("*.next-*")), "the guard", 10)
        os.kill(case.vm.pid, signal.SIGCONT)
        ended(struck)  # the guard too
        case.vm.wait_for_acks(40)
        assert case.resume().code == 0
        case.vm.kill()
        case.boot()
        case.prove(promoted=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("point", "code"), [("drained", 6), ("renamed", 0)])
def test_a_promoter_that_hangs_does_not_freeze_its_guest(
    tmp_path: Path, point: str, code: int
) -> None:
    case = Case(tmp_path, target=False)
    with case.vm:
        case.vm.wait_for_acks(60)
        hanging = case.strike(point, "hang")
        os.waitid(os.P_PID, hanging.pid, os.WSTOPPED | os.WNOWAIT)
        case.vm.wait_for_acks(60)
        os.kill(hanging.pid, signal.SIGCONT)
        woken = ended(hanging)
        assert woken.code == code, woken.out
        case.vm.wait_for_acks(20)
        case.vm.kill()
        case.boot()
        case.prove(promoted=code == 0)


def is_committed(point: str) -> bool:
    """Has the path its new disk when everything dies at this point?

    A promoter that lives on commits a disk whose QEMU died drained: both disks are equal.
    """
    return point in ("renamed", "finalized", "before DISMISS", "before TIDY", "after TIDY")
