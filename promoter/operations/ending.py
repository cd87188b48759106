"""The command that an operator has run at the end of each operation.

It gets the result, or the error, as JSON on its standard input, and a bounded time. The operation
is over before it begins, so nothing that becomes of it changes what became of the operation.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from promoter.operations.journal import OPEN, Journal, NoteKind, OperationStatus

LONGEST = 30.0  # seconds


async def tell(
    command: Sequence[str], journal: Journal, operation: str, event: Mapping[str, Any]
) -> str:
    """Run the command; why it failed, or nothing. What came of it is in the journal."""
    entry = journal.entry(operation)
    status = OperationStatus.INTERRUPTED if entry.status in OPEN else entry.status
    about = {"id": entry.id, "operation": entry.kind, "guest": entry.guest}
    text = json.dumps({**event, **about, "status": status}, default=str)
    failure = await _run(command, text.encode() + b"\n")
    journal.note(operation, NoteKind.HOOK, {"outcome": failure or "done"})
    return failure and f"the hook {command[0]}: {failure}"


async def _run(command: Sequence[str], said: bytes) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return f"it cannot be run: {error.strerror}"
    try:
        async with asyncio.timeout(LONGEST):
            await process.communicate(said)
    except (TimeoutError, asyncio.CancelledError):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        return f"it was ended, since it was not done in {LONGEST:.0f} s or promoter was told to"
    return f"exit code {process.returncode}" if process.returncode else ""
