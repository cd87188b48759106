"""The backup round, on both kinds of guest: what is copied is what the disk was at one instant,
and the guest has the chain that it had, whatever happened meanwhile."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from promoter.operations.backup import Backup, Do, Part, Seen, decide
from promoter.operations.move import Choices
from tests import records
from tests.cli import Ran, ended, promoter, start
from tests.conftest import Make
from tests.test_contract import read_until
from tests.vm import MIB, VM, Disk, base, blank, file_system, linked_clone, qemu_img

LEAKS = 3  # qemu-img check: clusters that nobody uses, which a killed QEMU may leave


class Case:
    """A guest on a linked clone, and its backups."""

    def __init__(self, make: Make, directory: Path) -> None:
        self.directory, self.state = directory, directory / "state"
        self.clone = linked_clone(base(), directory / "clone.qcow2")
        self.guest = make([Disk(self.clone)])
        self.backups = directory / "backups"
        self.backups.mkdir()
        self.log = directory / "before.log"

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Begin a backup; what the guest was told until now must be in it."""
        shutil.copy(self.guest.log, self.log)
        name, *more = self.guest.address
        return start(self.state, "backup", name, self.backups, *more, *words, "--json")

    def back_up(self, *words: object) -> dict[str, Any]:
        ran = ended(self.start(*words))
        assert ran.code == 0, ran
        (disk,) = ran.result["disks"]
        self.check(Path(disk["file"]))
        return dict(disk)

    def resume(self) -> Ran:
        return promoter(self.state, "job", "resume", "--json")

    def check(self, backup: Path) -> None:
        """It has every record from before, or a newer one in its place."""
        found = records.check(backup, "qcow2", self.log).findings
        assert not [each for each in found if each.kind is not records.Kind.ALIEN]
        qemu_img("check", "-q", backup)

    def files(self) -> set[str]:
        return {path.name for path in self.directory.glob("*.qcow2*")}

    def copies(self) -> list[Path]:
        return sorted(self.backups.iterdir())

    def prove_as_before(self) -> None:
        """The chain is what it was, nothing else is left, and a boot has every record."""
        self.guest.wait_for_acks(20)
        assert not self.guest.paused
        (disk,) = promoter(self.state, "chain", *self.guest.address, "--json").result["disks"]
        assert [Path(image["file"]).samefile(wanted) for image, wanted in self.layers(disk)]
        assert (len(disk["chain"]), disk["jobs"]) == (2, [])
        self.guest.kill()
        self.guest.start()
        self.guest.wait_for_acks(20)
        self.guest.kill()
        assert self.resume().code == 0
        assert self.files() == {self.clone.name}
        records.check(self.clone, "qcow2", self.guest.log).raise_if_bad()

    def layers(self, disk: dict[str, Any]) -> Sequence[tuple[dict[str, Any], Path]]:
        return list(zip(disk["chain"], [self.clone, base()], strict=True))


@pytest.fixture
def case(make: Make, tmp_path: Path) -> Case:
    return Case(make, tmp_path)


@pytest.mark.sampled(2)
def test_rounds_in_a_row_leave_the_chain_as_it_was(case: Case) -> None:
    with case.guest as guest:
        guest.wait_for_acks(60)
        first = case.back_up()
        guest.wait_for_acks(20)
        second = case.back_up("--since", "last", "--keep", "1")
        assert second["since"] == first["file"]
        assert case.copies() == [Path(first["file"]), Path(second["file"])], "one lies on the other"
        guest.wait_for_acks(20)
        third = case.back_up("--keep", "1")
        assert case.copies() == [Path(third["file"])]
        assert third["verified"]
        assert max(third["snapshot_s"], third["switchover_s"]) < 2
        case.prove_as_before()


def test_a_backup_is_kept_though_an_older_one_cannot_be_removed(tmp_path: Path) -> None:
    case = Case(lambda disks: VM(tmp_path, disks, writer={"rate": 0}), tmp_path)
    older = case.backups / "clone.vd0.20260101T000000Z.qcow2"
    with case.guest as guest:
        guest.wait_for_acks(20)
        older.mkdir()
        ran = ended(case.start("--keep", "1"))
        assert (ran.code, ran.result["error"]) == (9, "Interrupted"), ran
        assert str(older) in ran.result["message"]
        assert len(case.copies()) == 2
        older.rmdir()
        assert case.resume().code == 0
        assert len(case.copies()) == 1
        case.prove_as_before()


@pytest.mark.nightly
def test_twenty_rounds_and_each_backup_boots(case: Case, tmp_path: Path) -> None:
    with case.guest as guest:
        guest.wait_for_acks(60)
        for _ in range(20):
            case.back_up("--keep", "2")
            guest.wait_for_acks(20)
            newest = linked_clone(case.copies()[-1], tmp_path / "restored")
            restored = tmp_path / "elsewhere"
            restored.mkdir()
            with VM(restored, [Disk(newest)]) as vm:
                vm.wait_for_acks(5)
            shutil.rmtree(restored)
            newest.unlink()
        case.prove_as_before()


@pytest.mark.sampled(2)
def test_all_disks_are_of_one_instant(make: Make, tmp_path: Path) -> None:
    case = Case(make, tmp_path)
    data = blank(tmp_path / "data.qcow2", MIB)
    case.guest = make([Disk(case.clone), Disk(data)])
    with case.guest as guest:
        guest.wait_for_acks(40)
        ran = ended(case.start())
        assert ran.code == 0, ran
        assert len(ran.result["disks"]) == 2
        assert len(case.copies()) == 2
        case.check(next(path for path in case.copies() if path.name.startswith("clone.")))
        guest.wait_for_acks(20)


STEPS = ["snapshot", "switch over", "copy", "consolidate", "mirror", "tidy", "prune"]
TYPICAL = {("copy", "both"), ("mirror", "promoter")}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("step", "whom"),
    [
        pytest.param(*strike, marks=() if strike in TYPICAL else pytest.mark.nightly)
        for strike in product(STEPS, ["promoter", "both"])
    ],
)
def test_killed_at_any_step_it_is_finished_by_resume(case: Case, step: str, whom: str) -> None:
    with case.guest as guest:
        guest.wait_for_acks(60)
        backing_up = case.start()
        read_until(backing_up, f'"action": "{step}')
        backing_up.kill()
        if whom == "both":
            guest.kill()
        ended(backing_up)
        if whom == "both":
            gone = case.resume()
            assert gone.code in (0, 3, 9), gone
            guest.start()
        guest.wait_for_acks(20)
        resumed = case.resume()
        assert resumed.code == 0, resumed
        for copy in case.copies():
            assert ".part-" not in copy.name
            case.check(copy)
        assert len(case.copies()) == (0 if whom == "both" and step in STEPS[:2] else 1)
        case.prove_as_before()


@pytest.mark.nightly
def test_cancelled_it_merges_the_delta_all_the_same(case: Case) -> None:
    with case.guest as guest:
        guest.wait_for_acks(60)
        backing_up = case.start("--speed", "5M")
        read_until(backing_up, '"phase": "copy"')
        backing_up.send_signal(signal.SIGINT)
        cancelled = ended(backing_up)
        assert cancelled.code == 7, cancelled
        assert case.copies() == []
        case.prove_as_before()


@pytest.mark.nightly
def test_a_directory_that_runs_full_ends_it_and_the_delta_is_merged(
    case: Case, tmp_path: Path
) -> None:
    with file_system("ext4", tmp_path, 256 * MIB) as small, case.guest as guest:
        case.backups = small / "backups"
        case.backups.mkdir()
        guest.wait_for_acks(60)
        backing_up = case.start("--speed", "20M")
        read_until(backing_up, '"phase": "copy"')
        with pytest.raises(OSError, match="No space"):
            (small / "filler").write_bytes(bytes(256 * MIB))
        full = ended(backing_up)
        assert full.code == 5, full
        assert case.copies() == []
        refused = ended(case.start())
        assert refused.code == 4, refused
        assert "not enough space" in refused.result["message"]
        case.prove_as_before()


@pytest.mark.sampled(2)
def test_what_cannot_be_is_refused(case: Case) -> None:
    with case.guest as guest:
        guest.wait_for_acks(20)
        for words, wanted in (
            (["--since", "last"], "no earlier backup"),
            (["--since", "/nowhere.qcow2"], "no such backup"),
        ):
            refused = ended(case.start(*words))
            assert refused.code == 4, refused
            assert wanted in refused.result["message"]
        case.backups.rmdir()
        assert ended(case.start()).code == 4
        case.backups.mkdir()
        case.prove_as_before()


# --- what comes next -------------------------------------------------------------------------


def intent(failure: str = "", *, pruned: bool = False) -> Backup:
    return Backup("00000000", "g", Choices(), (), "f", "m", failure=failure, pruned=pruned)


def test_a_delta_is_merged_before_anything_is_given_up() -> None:
    for merged in (Part.NOT_BEGUN, Part.OPEN, Part.FAILED):
        for copied in ((), (False,), (True,), (True, False)):
            seen = Seen(Part.DONE, merged, copied)
            assert decide(intent("it failed"), seen).do is Do.MERGE
            assert decide(intent(), seen).do is (Do.MERGE if all(copied) else Do.COPY)
    assert decide(intent("it failed"), Seen(Part.DONE, Part.DONE, (False,))).do is Do.GIVE_UP


def test_a_snapshot_that_was_begun_is_finished_and_one_that_was_not_is_not_begun() -> None:
    for copied in ((False,), (True,)):
        begun = Seen(Part.OPEN, Part.NOT_BEGUN, copied)
        assert decide(intent("cancelled"), begun).do is Do.FREEZE
        not_begun = Seen(Part.NOT_BEGUN, Part.NOT_BEGUN, copied)
        assert decide(intent("cancelled"), not_begun).do is Do.GIVE_UP
        failed = Seen(Part.FAILED, Part.NOT_BEGUN, copied)
        assert decide(intent(), failed).do is Do.GIVE_UP


def test_it_ends_with_the_old_backups_removed() -> None:
    seen = Seen(Part.DONE, Part.DONE, (True,))
    assert decide(intent(), seen).do is Do.PRUNE
    assert decide(intent(pruned=True), seen).do is Do.DONE
