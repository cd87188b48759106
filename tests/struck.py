"""promoter, struck at one point: ``python -m tests.struck POINT WHOM PID promote …``.

POINT is a step of the journal ("before mirror") or a place inside the commit point; WHOM is
killed there: promoter, qemu or libvirtd (PID), both, "promoter and guard", or "hang": promoter
is stopped, not killed. Inside what a process of its own does (`struck_suspended.py`) WHOM is
promoter, itself, the one of PID, or some of them. Only here does anything reach into promoter.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

from promoter.cli.main import app
from promoter.guests.qmp import QmpGuest
from promoter.operations import suspended
from promoter.operations.backup import BackupOperation
from promoter.operations.leases import Leases
from promoter.operations.move import Do
from promoter.operations.moving import MoveOperation
from promoter.storage import images, seed
from promoter.storage.names import Names

STEPS = (
    Do.SEED,
    Do.MIRROR,
    Do.AWAIT_READY,
    Do.PREPARE,
    Do.SWITCH_OVER,
    Do.DISMISS,
    Do.TIDY,
)
INSIDE: dict[str, tuple[Any, str, bool]] = {
    # name: whose function, its name, struck before it (or after)
    "unnamed seed": (seed, "publish", True),
    "named seed": (seed, "publish", False),
    "attached": (QmpGuest, "attach", False),
    "completing": (QmpGuest, "complete", False),
    "drained": (Names, "commit", True),
    "renamed": (Names, "commit", False),
    "finalized": (QmpGuest, "finalize", False),
}
AT_A_START: dict[str, tuple[Any, str, bool]] = {  # of a mirror that a QEMU bug makes a stop for
    "stopped": (QmpGuest, "stop", False),
    "starting": (QmpGuest, "begin", False),
}
IN_A_LEASE: dict[str, tuple[Any, str, bool]] = {
    "joined": (Leases, "join", False),
    "announced": (Leases, "announce", False),
    "readers off": (Leases, "take_off_readers", False),
    "left": (Leases, "leave", False),
}
IN_A_VERIFICATION: dict[str, tuple[Any, str, bool]] = {
    "view prepared": (QmpGuest, "prepare_view", False),
    "viewed": (QmpGuest, "take_view", False),
    "begun": (QmpGuest, "show_view", False),
    "compared": (images, "compare", False),
}
IN_AN_UNDO: dict[str, tuple[Any, str, bool]] = {
    "delta made": (images, "create", False),
    "delta found": (images, "rebase", False),
    "brought back": (images, "commit", False),
    "put back": (Names, "put_back", False),
}
PLACES = INSIDE | AT_A_START | IN_A_LEASE | IN_A_VERIFICATION | IN_AN_UNDO
POINTS = (*(f"before {do.name}" for do in STEPS), *INSIDE, "after TIDY")


def strike(whom: str, pid: int) -> None:
    if whom in ("qemu", "libvirtd", "both"):
        with suppress(ProcessLookupError):  # struck before
            os.kill(pid, signal.SIGKILL)
    if whom == "promoter and guard":
        for child in Path("/proc/self/task").glob("*/children"):
            for guard in child.read_text().split():
                os.kill(int(guard), signal.SIGKILL)
    if whom in ("promoter", "both", "promoter and guard"):
        os.kill(os.getpid(), signal.SIGKILL)
    if whom == "promoter of a stopped qemu":
        os.kill(pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)
    if whom == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)


def striking(function: Callable[..., Any], hit: Callable[[], None], *, before: bool) -> Any:
    """`function` with a hit before it, or after what it does has been done."""

    async def later(answer: Any) -> Any:
        result = await answer
        hit()
        return result

    @wraps(function)
    def struck(*arguments: Any, **named: Any) -> Any:
        if before:
            hit()
            return function(*arguments, **named)
        answer = function(*arguments, **named)
        if hasattr(answer, "__await__"):
            return later(answer)
        hit()
        return answer

    return struck


def install(point: str, hit: Callable[[], None]) -> None:
    from tests import struck_suspended  # which needs this module

    if point in struck_suspended.POINTS:
        os.environ["STRIKE"] = ",".join((point, *sys.argv[2:4]))
        os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
        suspended.__name__ = struck_suspended.__name__
        return
    if inside := PLACES.get(point):
        owner, name, before = inside
        setattr(owner, name, striking(getattr(owner, name), hit, before=before))
        return
    when, _, step = point.partition(" ")
    for operation in (MoveOperation, BackupOperation):
        strike_step(operation, when, step, hit)


def strike_step(operation: Any, when: str, step: str, hit: Callable[[], None]) -> None:
    """Have a hit before or after a step of the journal, whichever operation's it is."""
    act = operation.act

    async def struck(self: Any, action: Any) -> None:
        here = action.do.name == step
        if here and when == "before":
            hit()
        await act(self, action)
        if here and when == "after":
            hit()

    operation.act = struck


def main() -> None:
    point, whom, pid = sys.argv[1:4]
    install(point, cache(partial(strike, whom, int(pid))))  # once: it may come there again
    sys.argv[1:4] = []
    app()


if __name__ == "__main__":
    main()
