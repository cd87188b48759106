"""Quiesce: a guest's file systems are frozen, by its guest agent, and thawed whatever happens.

A frozen file system has written all it had to and takes no write: what lies on the disks is as
clean as after an unmount. Every wait has a bound. A freeze that has been asked for is followed by
a thaw, also when no answer came: an agent that was only slow freezes, and thaws at once.

Source: the guest agent's reference, ``guest-fsfreeze-status``, ``-freeze``, ``-thaw``.
"""

from __future__ import annotations

import asyncio
import time

from promoter.errors import JobFailed, Refused
from promoter.guests.base import AgentSilent, Guest

ANSWER = 5.0
LONGEST_FREEZE = 20.0
LONGEST_THAW = 60.0
WITHOUT = "Leave out --quiesce for a snapshot like after a power cut."


class NotQuiesced(JobFailed):
    """The file systems are not frozen, or not any more, and nothing else was begun."""


async def check(guest: Guest) -> None:
    """Can the file systems be frozen? Raises `Refused`."""
    status = await guest.status()
    if status != "running":
        raise Refused(
            f"{guest.name} is {status}: its guest agent cannot freeze anything",
            f"Continue the guest first. {WITHOUT}",
        )
    try:
        await _expect_thawed(guest)
    except JobFailed as error:
        hint = error.hint or "Does qemu-guest-agent run in the guest, and does no one else use it?"
        raise Refused(f"cannot quiesce: {error.message}", f"{WITHOUT} {hint}") from error


async def freeze(guest: Guest) -> None:
    """Freeze them.

    Raises `NotQuiesced` when they did not freeze, and `JobFailed` when they may still be frozen,
    since the agent does not answer any more.
    """
    try:
        await _expect_thawed(guest)
    except JobFailed as error:
        raise NotQuiesced(error.message, error.hint) from error
    try:
        frozen = await guest.ask_agent("guest-fsfreeze-freeze", LONGEST_FREEZE)
        why = "" if frozen else f"{guest.name}: its guest agent found no file system to freeze"
    except AgentSilent:
        why = f"{guest.name}: its file systems did not freeze in {LONGEST_FREEZE:g} s"
    except JobFailed as error:
        why = error.message
    if why:
        await thaw(guest)
        raise NotQuiesced(f"{why}; they are thawed")


async def thaw(guest: Guest) -> None:
    """Thaw them, if they are frozen. Raises `JobFailed` when the agent does not answer in 60 s."""
    deadline = time.monotonic() + LONGEST_THAW
    while True:
        try:
            await guest.ask_agent("guest-fsfreeze-thaw", ANSWER)
        except AgentSilent as error:
            if time.monotonic() > deadline:
                raise JobFailed(
                    f"{error.message}; the guest's file systems may be frozen",
                    "In the guest: start qemu-guest-agent again, or fsfreeze --unfreeze.",
                ) from error
            await asyncio.sleep(0.2)  # one that is not there yet answers so at once
        else:
            return


async def _expect_thawed(guest: Guest) -> None:
    """Does the agent answer, and has nobody frozen anything?"""
    status = await guest.ask_agent("guest-fsfreeze-status", ANSWER)
    if status != "thawed":
        raise JobFailed(
            f"{guest.name}: somebody has frozen its file systems",
            "Wait for whoever did it, or thaw them: guest-fsfreeze-thaw, virsh domfsthaw.",
        )
