"""The loop every operation is: look, decide, journal, act.

What the look shows is the truth; the journal only says what was meant. A
fresh run and a recovery enter the same loop at different places. The journal
is written on the event loop itself: the next act must wait for it anyway.
"""

from __future__ import annotations

import errno
from typing import Protocol, TypeVar

from promoter.errors import JobFailed, NoSpace, PromoterError
from promoter.operations.journal import Journal

MOST_STEPS = 500

S = TypeVar("S")
A = TypeVar("A")


class Operation(Protocol[S, A]):
    """One operation: S is what it sees, A are its actions."""

    @property
    def id(self) -> str: ...

    async def look(self) -> S: ...

    def decide(self, seen: S) -> A: ...

    def is_final(self, action: A) -> bool: ...

    async def act(self, action: A) -> None: ...

    def failed(self, action: A, error: PromoterError) -> None:
        """Take note that an action failed; raises what cannot be put back."""


async def run(operation: Operation[S, A], journal: Journal) -> A:
    """Act until the decision is final; that decision."""
    for _ in range(MOST_STEPS):
        action = operation.decide(await operation.look())
        if operation.is_final(action):
            return action
        step = journal.begin(operation.id, str(action))
        try:
            await operation.act(action)
        except (PromoterError, OSError) as caught:
            error = caught if isinstance(caught, PromoterError) else _translated(action, caught)
            journal.end(operation.id, step, f"failed: {error.message}")
            operation.failed(action, error)
        else:
            journal.end(operation.id, step, "done")
    raise PromoterError(f"operation {operation.id} does not come to an end")


def _translated(action: object, error: OSError) -> PromoterError:
    kind = NoSpace if error.errno == errno.ENOSPC else JobFailed
    made = kind(f"{action}: {error}")
    made.__cause__ = error
    return made
