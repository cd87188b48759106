"""What the doctor finds, as values; and what ``--repair`` would do about it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from promoter.errors import (
    Different,
    Interrupted,
    LeaseHeld,
    NoSpace,
    PromoterError,
    Refused,
    Unreachable,
)
from promoter.storage.abilities import Abilities

Check = Callable[[], Awaitable[None]]


class Wrong(IntEnum):
    """How a thing is wrong: the exit code that says so, as those of errors do."""

    NOTHING = 0
    UNREACHABLE = Unreachable.exit_code
    UNFIT = Refused.exit_code
    FULL = NoSpace.exit_code
    DIFFERENT = Different.exit_code
    HALF_DONE = Interrupted.exit_code
    LEASE = LeaseHeld.exit_code


GRAVEST_FIRST = (
    *(Wrong.DIFFERENT, Wrong.HALF_DONE, Wrong.UNREACHABLE),
    *(Wrong.LEASE, Wrong.FULL, Wrong.UNFIT),
)


@dataclass(frozen=True)
class Resume:
    """Finish an operation, or put it back; of one that has ended: remove what it has left."""

    operation: str

    def __str__(self) -> str:
        return f"promoter job resume {self.operation}"


@dataclass(frozen=True)
class EndJob:
    """End a block job of promoter's that no operation waits for; a concluded one is dismissed."""

    job: str

    def __str__(self) -> str:
        return f"end block job {self.job}"


@dataclass(frozen=True)
class CloseNode:
    """Close a block node of promoter's (``blockdev-del``), which QEMU refuses for one in use."""

    node: str

    def __str__(self) -> str:
        return f"close block node {self.node}"


@dataclass(frozen=True)
class Remove:
    """Remove a name that an operation which has ended made on its way."""

    file: Path

    def __str__(self) -> str:
        return f"remove {self.file}"


Remedy = Resume | EndJob | CloseNode | Remove


@dataclass(frozen=True)
class Finding:
    """One thing ``about`` a guest, a disk, a file or a directory.

    ``wrong`` is `Wrong.NOTHING` for what is only to be known. ``remedy`` is what ``--repair``
    does; None: that is left to people, and ``hint`` says what they can do.
    """

    about: str
    message: str
    hint: str = ""
    wrong: Wrong = Wrong.NOTHING
    remedy: Remedy | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All that was found; what is wrong comes first."""

    findings: tuple[Finding, ...]
    directories: tuple[Abilities, ...] = ()

    @property
    def wrong(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.wrong)

    @property
    def exit_code(self) -> int:
        """That of what is gravest."""
        found = {finding.wrong for finding in self.wrong}
        return next((int(wrong) for wrong in GRAVEST_FIRST if wrong in found), 0)


def of_error(about: str, error: PromoterError) -> Finding:
    """An error as a finding; one that has no code of its own among these makes the guest unfit."""
    known = {int(wrong): wrong for wrong in Wrong if wrong}
    wrong = known.get(error.exit_code, Wrong.UNFIT)
    return Finding(about, error.message, error.hint, wrong)


async def call(check: Callable[..., None], *arguments: object) -> None:
    check(*arguments)


async def refusals(about: str, checks: Iterable[Check]) -> list[Finding]:
    found = []
    for check in checks:
        try:
            await check()
        except PromoterError as error:
            found.append(of_error(about, error))
    return found
