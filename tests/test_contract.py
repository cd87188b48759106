"""What promote promises, on both kinds of guest: plain QEMU, and domains of a real libvirtd."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from promoter.operations.move import Do
from tests import records
from tests.cli import Ran, ended, promoter, start
from tests.conftest import Make
from tests.vm import Disk, base, blank, chain, linked_clone, qemu_img, wait_for

SLOW = "2M"  # a seed at this speed takes about 20 s: time for others to interfere
LEAKS = 3  # qemu-img check: clusters that nobody uses, which a killed QEMU may leave


class Case:
    """A guest with some disks, and what promoter does to it."""

    def __init__(self, make: Make, directory: Path, disks: Sequence[Path]) -> None:
        self.directory, self.disks = directory, list(disks)
        self.guest = make([Disk(disk) for disk in disks])

    def start(self, *words: object, module: str = "promoter") -> subprocess.Popen[str]:
        words = (*words, *self.guest.address, "--json")
        return start(self.directory / "state", *words, module=module)

    def promote(self, *words: object) -> Ran:
        return ended(self.start("promote", *words))

    def strike(self, point: str, *words: object) -> None:
        struck = ended(self.start(point, "promoter", 0, "promote", *words, module="tests.struck"))
        assert struck.code == -signal.SIGKILL, struck

    def resume(self) -> Ran:
        return promoter(self.directory / "state", "job", "resume", "--json")

    def job(self, *words: object) -> Ran:
        return promoter(self.directory / "state", "job", *words, "--json")

    def seeded_blocks(self) -> list[int]:
        """What the seeds that grow hold."""
        return [path.stat().st_blocks for path in self.directory.glob("*.part-*")]

    def files(self) -> set[str]:
        return {path.name for path in self.directory.glob("*.qcow2*")}

    def prove(self, result: dict[str, Any]) -> None:
        """The guest runs on full clones, boots from them, and they have every record."""
        assert result["status"] == "done"
        targets = [Path(disk["target"]) for disk in result["disks"]]
        self.guest.wait_for_acks(40)
        assert set(map(str, targets)) <= self.all_names(self.guest.files(), targets)
        self.guest.kill()
        self.guest.start()
        self.guest.wait_for_acks(40)
        assert set(map(str, targets)) <= set(self.guest.files())
        self.guest.shutdown()
        for target, disk in zip(targets, result["disks"], strict=True):
            assert "backing file" not in qemu_img("info", target)
            assert "backing file" in qemu_img("info", disk["old"])
            check = subprocess.run(["qemu-img", "check", "-q", target], check=False)
            assert check.returncode in (0, LEAKS)
        made = {Path(disk[name]).name for disk in result["disks"] for name in ("target", "old")}
        assert {name for name in self.files() if ".new-" not in name} == made
        records.check(targets[0], None, self.guest.log).raise_if_bad()

    def all_names(self, names: Sequence[str], targets: Sequence[Path]) -> set[str]:
        """With the other names that the same files have."""
        same = {t for t in targets for name in names if Path(name).samefile(t)}
        return {*names, *map(str, same)}

    def prove_unchanged(self, files: set[str]) -> None:
        """The guest runs on its old chain, and nothing was left behind."""
        assert self.guest.files() == [str(disk) for disk in self.disks]
        assert not self.guest.paused
        self.guest.wait_for_acks(20)
        assert self.files() == files
        self.guest.kill()
        records.check(self.disks[0], None, self.guest.log).raise_if_bad()


@pytest.fixture
def case(make: Make, tmp_path: Path) -> Case:
    """One disk, a linked clone on the base."""
    return Case(make, tmp_path, [linked_clone(base(), tmp_path / "clone.qcow2")])


def test_a_linked_clone_becomes_a_full_clone(case: Case) -> None:
    before = sha256(base().read_bytes()).hexdigest()
    with case.guest as guest:
        guest.wait_for_acks(60)
        promoted = case.promote()
        assert promoted.code == 0, promoted.out
        (disk,) = promoted.result["disks"]
        assert 0 < disk["switchover_s"] < 1
        assert disk["mirrored_bytes"] > 0 < disk["seeded_bytes"]
        case.prove(promoted.result)
    assert sha256(base().read_bytes()).hexdigest() == before


@pytest.mark.sampled(6)
@pytest.mark.parametrize("options", [("--seed", "none"), ("--format", "raw"), ("--speed", "20M")])
def test_however_it_is_asked_for(case: Case, options: tuple[str, ...], tmp_path: Path) -> None:
    with case.guest as guest:
        guest.wait_for_acks(60)
        target = tmp_path / "target.qcow2"
        promoted = case.promote("--target", target, *options)
        assert promoted.code == 0, promoted.out
        assert promoted.result["disks"][0]["target"] == str(target)
        guest.wait_for_acks(20)
        guest.shutdown()
    records.check(target, "raw" if "raw" in options else "qcow2", guest.log).raise_if_bad()
    assert not case.disks[0].exists()


@pytest.mark.sampled(2)
def test_a_base_that_only_qemu_can_read_comes_by_the_mirror(
    make: Make, tmp_path: Path, sockets: Path
) -> None:
    socket = sockets / "nbd"
    serve = ["qemu-nbd", "--read-only", "--persistent", "--shared=9", "-f", "qcow2"]
    command = ["setpriv", "--pdeathsig", "KILL", *serve, "-k", str(socket), str(base())]
    with subprocess.Popen(command) as server:
        try:
            wait_for(socket.exists, "qemu-nbd", 10)
            name = f"nbd+unix:///?socket={socket}"
            clone = linked_clone(name, tmp_path / "clone.qcow2", backing_fmt="raw")
            case = Case(make, tmp_path, [clone])
            with case.guest as guest:
                guest.wait_for_acks(60)
                copied = case.promote("--seed", "convert")
                assert copied.code == 4, copied.out
                assert "is not a local file" in copied.result["message"]
                promoted = case.promote()
                assert promoted.code == 0, promoted.out
                assert promoted.result["disks"][0]["seed"] == "none"
                case.prove(promoted.result)
        finally:
            server.kill()


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A directory whose name is short enough for a socket's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


@pytest.mark.sampled(2)
def test_all_disks_are_promoted_and_full_ones_left_alone(make: Make, tmp_path: Path) -> None:
    first = linked_clone(base(), tmp_path / "first.qcow2")
    second = chain(tmp_path, 3)[-1]
    full = blank(tmp_path / "full.img", 1 << 20, "raw")
    case = Case(make, tmp_path, [first, second])
    case.guest = make([Disk(first), Disk(second), Disk(full, fmt="raw")])
    with case.guest as guest:
        guest.wait_for_acks(60)
        promoted = case.promote()
        assert promoted.code == 0, promoted.out
        assert len(promoted.result["disks"]) == 2
        guest.wait_for_acks(20)
        again = case.promote()
        assert again.code == 0, again.out
        assert again.result["disks"] == []
        guest.kill()
        guest.start()
        guest.wait_for_acks(20)
    for disk in promoted.result["disks"]:
        assert "backing file" not in qemu_img("info", disk["target"])
    records.check(Path(promoted.result["disks"][0]["target"]), None, guest.log).raise_if_bad()


@pytest.mark.sampled(2)
def test_a_paused_guest_stays_paused(case: Case) -> None:
    with case.guest as guest:
        guest.wait_for_acks(60)
        guest.pause()
        promoted = case.promote()
        assert promoted.code == 0, promoted.out
        assert guest.paused
        guest.cont()
        case.prove(promoted.result)


@pytest.mark.sampled(2)
def test_a_dry_run_changes_nothing(case: Case) -> None:
    with case.guest as guest:
        guest.wait_for_acks(20)
        files = case.files()
        planned = case.promote("--dry-run")
        assert (planned.code, planned.result["status"]) == (0, "planned")
        case.prove_unchanged(files)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("phase", "speed"), [("seed", SLOW), ("mirror", "20M")])
def test_cancelled_it_leaves_nothing_behind(case: Case, phase: str, speed: str) -> None:
    with case.guest as guest:
        guest.wait_for_acks(100)
        files = case.files()
        words = ["--seed", "none"] if phase == "mirror" else []
        promoting = case.start("promote", "--speed", speed, *words)
        seen = read_until(promoting, f'"phase": "{phase}"')
        promoting.send_signal(signal.SIGINT)
        cancelled = ended(promoting)
        assert cancelled.code == 7, (seen, cancelled)
        case.prove_unchanged(files)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("phase", ["seed", "mirror"])
def test_paused_it_copies_nothing_until_it_is_resumed(case: Case, phase: str) -> None:
    with case.guest as guest:
        guest.wait_for_acks(100)
        words = ["--seed", "none"] if phase == "mirror" else []
        promoting = case.start("promote", "--speed", SLOW, *words)
        identity = json.loads(read_until(promoting, f'"phase": "{phase}"')[-1])["id"]
        assert case.job("pause", identity).code == 0
        assert case.job("speed", identity, "0").code == 0  # now only the pause holds it
        before = case.seeded_blocks()
        guest.wait_for_acks(40)
        with pytest.raises(subprocess.TimeoutExpired):
            promoting.wait(3)
        assert case.seeded_blocks() == before
        resumed = case.job("resume", identity)
        assert (resumed.code, resumed.result["operation"]) == (0, "go on"), resumed
        promoted = ended(promoting)
        assert promoted.code == 0, promoted
        guest.wait_for_acks(20)
        guest.shutdown()
    records.check(Path(promoted.result["disks"][0]["target"]), None, guest.log).raise_if_bad()


@pytest.mark.nightly
def test_killed_while_paused_it_goes_on_when_resumed(case: Case) -> None:
    with case.guest as guest:
        guest.wait_for_acks(60)
        promoting = case.start("promote", "--speed", SLOW, "--seed", "none")
        identity = json.loads(read_until(promoting, '"phase": "mirror"')[-1])["id"]
        assert case.job("pause", identity).code == 0
        assert case.job("speed", identity, "20M").code == 0
        promoting.kill()
        ended(promoting)
        resumed = case.resume()
        assert resumed.code == 0, resumed.out
        case.prove(resumed.result)


@pytest.mark.sampled(2)
def test_terminated_it_goes_on_when_resumed(case: Case) -> None:
    with case.guest as guest:
        guest.wait_for_acks(60)
        promoting = case.start("promote", "--speed", "20M", "--seed", "none")
        read_until(promoting, '"phase": "mirror"')
        promoting.send_signal(signal.SIGTERM)
        assert ended(promoting).code == 9
        guest.wait_for_acks(20)
        resumed = case.resume()
        assert resumed.code == 0, resumed.out
        case.prove(resumed.result)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("step", [Do.SEED, Do.AWAIT_READY, Do.SWITCH_OVER, Do.TIDY])
def test_killed_at_any_step_it_goes_on_when_resumed(case: Case, step: Do) -> None:
    with case.guest as guest:
        guest.wait_for_acks(40)
        case.strike(f"before {step.name}")
        guest.wait_for_acks(20)
        resumed = case.resume()
        assert resumed.code == 0, resumed.out
        case.prove(resumed.result)


@pytest.mark.sampled(2)
def test_a_guest_that_dies_in_the_middle_has_its_old_disk(case: Case) -> None:
    with case.guest as guest:
        guest.wait_for_acks(60)
        files = case.files()
        promoting = case.start("promote", "--speed", SLOW)
        read_until(promoting, '"phase": "seed"')
        guest.kill()
        died = ended(promoting)
        assert died.code == 3, died.out
        assert case.files() == files
        guest.start()
        case.prove_unchanged(files)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["vdz"], "no such disk"),
        (["--target", "/nowhere/disk.qcow2"], "no such directory"),
        (["--target", base()], "exists"),
        (["--seed", "reflink", "--cluster-size", "4k"], "cannot be reflinked"),
    ],
)
def test_what_cannot_be_is_refused(case: Case, words: list[object], wanted: str) -> None:
    with case.guest as guest:
        guest.wait_for_acks(20)
        files = case.files()
        refused = promoter(case.directory / "state", "promote", *guest.address, *words, "--json")
        assert refused.code == 4, refused.out
        assert wanted in refused.result["message"]
        case.prove_unchanged(files)


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    return lines
