"""The rules of `lease/rules.py`, over every interleaving of three hosts (`lease_model.py`)."""

from __future__ import annotations

import pytest

from promoter.lease import rules
from promoter.lease.rules import Beat, Lock, Storage, Verdict
from tests.lease_model import LOANS, Guard, explore

VERDICTS = {
    Guard.MOVING_IS_ALIVE: (Beat.MOVING, Lock.FREE, Storage.NETWORK),
    Guard.LOCKED_IS_OPEN: (Beat.STOPPED, Lock.HELD, Storage.NETWORK),
    Guard.NETWORK_IS_FENCED: (Beat.STOPPED, Lock.FREE, Storage.NETWORK),
}


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize(
    ("faults", "epochs"),
    [(1, 4), (2, 3), pytest.param(2, 4, marks=pytest.mark.nightly)],
)
def test_two_guests_never_write_one_disk(storage: Storage, faults: int, epochs: int) -> None:
    found = explore(storage, faults=faults, epochs=epochs, most=1_000_000)
    assert found.moves is None
    assert found.worlds > 5000


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize(
    ("faults", "epochs"), [(1, 3), pytest.param(2, 3, marks=pytest.mark.nightly)]
)
def test_a_guest_that_waits_for_what_it_lent_is_neither_robbed_nor_misled(
    storage: Storage, faults: int, epochs: int
) -> None:
    found = explore(storage, faults=faults, epochs=epochs, most=2_000_000, lent=True)
    assert found.moves is None
    assert found.worlds > 5000


@pytest.mark.parametrize("guard", Guard)
def test_without_any_one_guard_two_guests_write_one_disk(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = guard in (Guard.IMAGE_LOCK, Guard.WORK_IS_FENCED)
    storage = Storage.LOCAL if local else Storage.NETWORK
    if guard in VERDICTS:
        monkeypatch.setitem(rules.TAKEOVER, VERDICTS[guard], Verdict.TAKE)
    epochs = 4 if guard is Guard.FREE_WHEN_IDLE else 3
    lent = guard in LOANS
    found = explore(storage, guard, faults=2, epochs=epochs, most=1_000_000, lent=lent)
    assert found.moves, guard.value
