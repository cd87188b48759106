"""When a copy behind the guest's writes is said to converge, and how far a guest is slowed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from promoter.operations.convergence import LEAST_LIMIT, WINDOW, Convergence

MIB = 1 << 20
STEP = 0.1


@dataclass
class Copy:
    """A job that copies ``rate`` bytes a second, behind a guest that writes ``writes``.

    It copies and counts every ``burst`` seconds.
    """

    rate: float
    writes: float
    left: float
    disk: float = 1000 * MIB
    burst: float = STEP
    done: float = 0.0
    at: float = 100.0
    due: float = 0.0
    shown: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.shown = 0, int(self.left)

    def go_on(self, convergence: Convergence, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            self.at += STEP
            limit = convergence.limit
            dirtied = min(self.writes, self.writes if limit is None else limit) * STEP
            self.left = min(self.disk, self.left + dirtied)
            self.due += STEP
            if self.due >= self.burst:
                copied = min(self.left, self.rate * self.due)
                self.left, self.done, self.due = self.left - copied, self.done + copied, 0.0
                self.shown = int(self.done), int(self.done + self.left)
            convergence.add(self.at, *self.shown)


@pytest.mark.parametrize("left", [100 * MIB, 900 * MIB])
def test_a_copy_that_gains_on_the_guest_slows_nobody(left: int) -> None:
    copy, convergence = Copy(rate=20 * MIB, writes=4 * MIB, left=left), Convergence()
    copy.go_on(convergence, STEP)
    while not convergence.fits(0.5):
        copy.go_on(convergence, STEP)
        assert not convergence.tighten()
    assert convergence.limit is None
    assert convergence.copy_rate == pytest.approx(20 * MIB, rel=0.01)
    assert convergence.dirty_rate == pytest.approx(4 * MIB, rel=0.01)


@pytest.mark.parametrize("writes", [3 * MIB, 4 * MIB, 40 * MIB, 4000 * MIB])
@pytest.mark.parametrize(("pause", "burst"), [(0.05, STEP), (0.5, STEP), (0.5, 5.0)])
def test_a_guest_that_writes_faster_is_slowed_until_the_rest_fits(
    writes: float, pause: float, burst: float
) -> None:
    copy, convergence = (
        Copy(rate=3 * MIB, writes=writes, left=20 * MIB, disk=64 * MIB, burst=burst),
        Convergence(),
    )
    limits = []
    for _ in range(1500):
        copy.go_on(convergence, STEP)
        if convergence.fits(pause):
            break
        if convergence.tighten():
            limits.append(convergence.limit or 0)
    assert convergence.fits(pause)
    assert limits == sorted(limits, reverse=True)
    assert limits
    assert limits[-1] < 3 * MIB
    assert copy.left <= 3 * MIB * pause / 2 * 1.01


def test_nothing_is_decided_before_a_window_has_passed() -> None:
    copy, convergence = Copy(rate=MIB, writes=2 * MIB, left=20 * MIB), Convergence()
    copy.go_on(convergence, WINDOW - STEP)
    assert not convergence.tighten()
    copy.go_on(convergence, 3 * STEP)
    assert convergence.tighten()
    assert not convergence.tighten(), "the next step is measured first"


def test_a_guest_is_never_slowed_to_a_standstill() -> None:
    copy, convergence = Copy(rate=100, writes=MIB, left=20 * MIB), Convergence()
    for _ in range(40):
        copy.go_on(convergence, 2 * WINDOW)
        convergence.tighten()
    assert convergence.limit == LEAST_LIMIT


def test_what_is_left_fits_when_half_the_pause_is_enough_for_it() -> None:
    convergence = Convergence()
    convergence.add(0.0, 0, 10 * MIB)
    convergence.add(2.0, 8 * MIB, 10 * MIB)
    assert convergence.left == 2 * MIB
    assert convergence.fits(1.0)
    assert not convergence.fits(0.9)
