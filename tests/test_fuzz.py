"""A monitor that says nonsense: promoter says so, and nothing is lost."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import records
from tests.cli import Ran, ended, promoter, start
from tests.test_siblings import find
from tests.vm import MIB, VM, Disk, base, blank, linked_clone

SEEDS = range(600)
NONSENSE_FOR_GOOD = 314
HEADERS = [
    *range(60),
    *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(60, 2000)),
]


def fuzzed(state: Path, seed: int, lines: int, *words: object) -> Ran:
    ran = ended(start(state, seed, lines, *words, module="tests.fuzzed"), timeout=100)
    assert ran.code in (0, 3, 4, 6, 9), ran
    assert "Traceback" not in ran.err, ran
    assert ran.code == 0 or "error" in ran.err or "error" in ran.out, ran
    return ran


@pytest.fixture(scope="module")
def halted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VM]:
    directory = tmp_path_factory.mktemp("halted")
    clone = linked_clone(base(), directory / "clone.qcow2")
    with VM(directory, [Disk(clone)], extra=("-S",)) as vm:
        yield vm


@pytest.mark.sampled(40)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_chain_is_shown_or_it_is_said_why_not(halted: VM, tmp_path: Path, seed: int) -> None:
    ran = fuzzed(tmp_path, seed, 11, "chain", halted.monitor)
    assert ran.code in (0, 3, 4), ran


@pytest.mark.sampled(60)
@pytest.mark.parametrize("seed", [NONSENSE_FOR_GOOD, *SEEDS])
def test_whatever_is_heard_in_a_promotion_one_disk_is_the_true_one(
    tmp_path: Path, seed: int
) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    state = tmp_path / "state"
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(20)
        fuzzed(state, seed, 80, "promote", vm.monitor)
        vm.wait_for_acks(20)
        resumed = promoter(state, "job", "resume")
        if resumed.code:  # it was put back, for the reason that it tells
            assert (resumed.code, "unchanged on its old chain" in resumed.err) == (6, True), resumed
            assert promoter(state, "job", "resume").code == 0
        assert vm.qmp("query-jobs") == []
        vm.wait_for_acks(20)
        vm.kill()
        assert promoter(state, "job", "resume").code == 0  # the spare name goes with its QEMU
        vm.start()
        vm.wait_for_acks(20)
        vm.kill()
    records.check(clone, "qcow2", vm.log).raise_if_bad()
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith("clone.qcow2.")}
    assert all(".aside-" in name for name in left), left


@pytest.mark.parametrize("seed", HEADERS)
def test_no_header_that_qemu_understands_hides_a_reader(tmp_path: Path, seed: int) -> None:
    """A sibling's header is changed; whatever QEMU then still reads through it is listed."""
    rng = random.Random(seed)
    lowest = blank(tmp_path / "base.qcow2", MIB)
    clone = linked_clone(lowest, tmp_path / "clone.qcow2")
    sibling = linked_clone(lowest, tmp_path / "sibling.qcow2")
    with sibling.open("r+b") as file:
        for _ in range(rng.randrange(1, 4)):
            file.seek(rng.randrange(4, 600))
            file.write(rng.randbytes(rng.choice((1, 1, 4))))
    found = find(clone, lowest)
    listed = {reader.path for reader in found.readers["vd0", str(lowest)]}
    named = listed | {Path(unreadable.path) for unreadable in found.unreadable}
    command = ["qemu-img", "info", "--output=json", "-f", "qcow2", str(sibling)]
    info = subprocess.run(command, capture_output=True, check=False)
    if info.returncode == 0:
        below = json.loads(info.stdout).get("full-backing-filename")
        assert below != str(lowest) or sibling in named, found
