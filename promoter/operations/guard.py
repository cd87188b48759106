"""The guard: nobody may be left frozen.

While a switchover has the guest's I/O drained, or its CPUs are stopped for the
start of a mirror, a promoter that died or hangs would leave the guest standing
still. This small process is started before, holds the same monitor connection,
and takes over when promoter's end of the pipe closes or nothing is heard for a
second. In a switchover: if the first name has not changed it takes the
prepared names away, which makes promoter's own commit impossible, and cancels
the jobs; otherwise it finishes names and jobs alike. At a start: it cancels
the job. Then, where promoter had stopped the guest, it continues it. While a
guest's writes are slowed for a copy, a guard of its own undoes that.

Run as ``python -m promoter.operations.guard SPEC`` with the pipe on standard input.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from promoter.storage.names import Names
from promoter.values import from_json

READY, ALIVE, LEAVE = b"r", b".", b"q"
LONGEST_SILENCE = 300.0
"""Seconds that a QEMU may take to answer: nobody waits for the guard."""


@dataclass(frozen=True)
class Switch:
    """One disk: its names, and its job."""

    job: str
    names: Names


@dataclass(frozen=True)
class GuardSpec:
    """``monitor`` is an inherited file descriptor, ``deadline`` in seconds.

    ``starting`` is the job for whose start the guest was stopped; ``standing``: it was stopped
    for a switchover; ``limits`` are the arguments that give it back its own I/O limits.
    """

    monitor: int
    deadline: float
    switches: tuple[Switch, ...] = ()
    starting: str | None = None
    standing: bool = False
    limits: tuple[dict[str, Any], ...] = ()


def watch(spec: GuardSpec, pipe: int) -> None:
    """Wait for promoter to say it is done; take over when it does not.

    It stays until promoter has said so or is dead, and then until QEMU has answered: what QEMU has
    not come to when the last end of its monitor is closed, it forgets.
    """
    finished: bool | None = None
    while True:
        patience = spec.deadline if finished is None else None
        heard, _, _ = select.select([pipe], [], [], patience)
        if heard and LEAVE in (said := os.read(pipe, 64)):
            return
        if not heard or not said:
            finished = take_over(spec) if finished is None else finished
        if heard and not said:
            _check(spec, finished=bool(finished))
            return


def take_over(spec: GuardSpec) -> bool:
    """Put everything back, or finish it when the first name has changed; was it finished?"""
    finished = False
    if spec.starting:
        _say(spec, "job-cancel", id=spec.starting)
    if spec.switches:
        finished = not spec.switches[0].names.revoke()
    for switch in spec.switches:
        if finished:
            switch.names.settle()
        else:
            switch.names.revoke()
        _say(spec, "job-finalize" if finished else "job-cancel", id=switch.job)
    if spec.starting or spec.standing:
        _say(spec, "cont")
    for limits in spec.limits:
        _say(spec, "block_set_io_throttle", **limits)
    return finished


def _check(spec: GuardSpec, *, finished: bool) -> None:
    """promoter is dead: a disk whose job failed to finalize gets its old name back.

    The answer also says that QEMU has come to all that was said before.
    """
    answer = _ask(spec, "query-jobs")
    errors = {job["id"]: job.get("error") for job in answer or ()}
    for switch in spec.switches if finished else ():
        if errors.get(switch.job):
            switch.names.put_back()


def _say(spec: GuardSpec, command: str, **arguments: object) -> None:
    _send(spec, {"execute": command, "arguments": arguments, "id": "guard"})


def _send(spec: GuardSpec, message: dict[str, Any]) -> None:
    with suppress(OSError):  # the guest is gone: then nobody stands still
        os.write(spec.monitor, json.dumps(message).encode() + b"\n")


def _ask(spec: GuardSpec, command: str) -> Any:
    """The answer to a query, past whatever else is in the stream; None when the guest is gone."""
    _send(spec, {"execute": command, "id": command})
    text = b""
    while select.select([spec.monitor], [], [], LONGEST_SILENCE)[0]:
        try:
            chunk = os.read(spec.monitor, 65536)
        except OSError:
            return None
        if not chunk:
            return None
        *lines, text = (text + chunk).split(b"\n")
        for line in lines:
            with suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict) and message.get("id") == command:
                    return message.get("return")
    return None


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    spec = from_json(GuardSpec, sys.argv[1])
    os.write(sys.stdout.fileno(), READY)
    watch(spec, sys.stdin.fileno())


if __name__ == "__main__":
    main()
