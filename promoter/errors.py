"""Every error promoter reports, as one tree.

PromoterError (1, unexpected)
├── Unreachable (3)   the guest or its host does not answer
├── Refused (4)       a check failed; nothing was changed
├── NoSpace (5)       storage is full; nothing lost, the operation can be resumed
├── JobFailed (6)     a block job failed; the guest stays on its old chain
├── Cancelled (7)     somebody asked to stop; the guest stays on its old chain
├── Different (8)     a copy is not what it was copied from
├── Interrupted (9)   stopped half-way; ``promoter job resume`` continues by evidence
└── LeaseHeld (10)    another owner has the disk and refused, was busy or did not answer

An error carries a message that names what it is about and a hint that gives
the next step. The exit codes are part of the command line's contract.
"""

from __future__ import annotations

from typing import Any


class PromoterError(Exception):
    """Something promoter did not expect."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Unreachable(PromoterError):
    """The guest or its host does not answer."""

    exit_code = 3


class Refused(PromoterError):
    """A check failed before anything was changed."""

    exit_code = 4


class NoSpace(PromoterError):
    """Storage is full. Nothing is lost; make room and resume."""

    exit_code = 5


class JobFailed(PromoterError):
    """A block job failed. The guest is unchanged on its old chain."""

    exit_code = 6


class Cancelled(PromoterError):
    """The operation was cancelled. The guest is unchanged on its old chain."""

    exit_code = 7


class Different(PromoterError):
    """A copy is not what it was copied from. Both are kept."""

    exit_code = 8


class Interrupted(PromoterError):
    """The operation stopped half-way and can be resumed."""

    exit_code = 9


class LeaseHeld(PromoterError):
    """Another owner holds the disk and refused, was busy or did not answer."""

    exit_code = 10


KINDS = (
    *(PromoterError, Unreachable, Refused, NoSpace, JobFailed),
    *(Cancelled, Different, Interrupted, LeaseHeld),
)
BY_EXIT_CODE = {kind.exit_code: kind for kind in KINDS}


def as_fields(error: PromoterError) -> dict[str, Any]:
    """An error for ``--json`` and for other terminals."""
    return {
        "error": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }


def from_fields(fields: dict[str, Any]) -> PromoterError:
    """The error that `as_fields` told of, as the class that has its exit code."""
    kind = BY_EXIT_CODE.get(fields["exit_code"], PromoterError)
    return kind(fields["message"], fields["hint"])
