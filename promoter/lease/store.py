"""Where leases are kept, whatever keeps them.

Three outcomes are never mixed up: yes, no, and *could not tell*, which raises `CouldNotTell`.
After it the only way on is to read again. Every call may block on storage: make it in a
thread. The image lock and the fence are no part of a store: they hold whatever it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from promoter.errors import Unreachable
from promoter.lease.record import Answer, LeaseRecord, Request, Work


class CouldNotTell(Unreachable):
    """The storage failed in the middle: whether a write happened is unknown. Read again."""


@dataclass(frozen=True)
class Asked:
    """A request in the queue. Lower tickets come first."""

    ticket: int
    request: Request


class LeaseStore(Protocol):
    """The lease of one disk."""

    def read(self) -> LeaseRecord | None:
        """The newest record; None when the disk never had a lease.

        Raises `BadRecord` when it does not add up, or is about another file.
        """

    def compare_and_swap(self, expected: int, record: LeaseRecord) -> bool:
        """Make ``record`` the newest if the newest is still epoch ``expected`` (0: none).

        False: somebody else was first, and nothing was changed. Durable when True.
        """

    def watch(self, epoch: int, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for an epoch after ``epoch``; is there one?"""

    def pulse(self, host: str) -> bytes:
        """The heartbeat of a host as it stands; while it does not change the host is silent."""

    def ask(self, request: Request) -> int:
        """Queue a request; its ticket."""

    def renew(self, asked: Asked) -> None:
        """Ask again, at the same place in the queue."""

    def requests(self) -> Sequence[Asked]:
        """The queue. What cannot be read as a request is left out."""

    def answer(self, ticket: int, answer: Answer) -> None:
        """Answer a request."""

    def answer_to(self, asked: Asked) -> Answer | None:
        """The answer to a request, if there is one."""

    def tell(self, work: Work) -> None:
        """Say how far the operation is that works on the disk."""

    def told(self) -> Work | None:
        """What an operation said last, if any did."""

    def withdraw(self, ticket: int) -> None:
        """Take a request and its answer away."""
