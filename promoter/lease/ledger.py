"""What this host holds and what became of it: for its agent, and for people.

    STATE/held/DISK    the path of a disk that this host holds, by the name its lease gives it
    STATE/audit.log    one JSON object a line: each step of a lease, each request of
                       this host's, each refusal

Both only tell. The lease beside the disk is the truth: what was written there is done, even
where it could not be told of here.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from promoter.lease.record import LeaseRecord, Owner, Request
from promoter.storage.files import write_whole

REFUSALS_A_SECOND = 10.0
MOST_REFUSALS = 100.0


class Allowance:
    """``rate`` a second, up to ``most`` at once: what bounds a flood."""

    def __init__(self, rate: float, most: float) -> None:
        self._rate, self._most = rate, most
        self._left, self._at = most, time.monotonic()

    def take(self) -> bool:
        """Is there one left? It is taken then."""
        now = time.monotonic()
        self._left = min(self._most, self._left + self._rate * (now - self._at))
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Ledger:
    """The ledger of ``host``, whose state is in ``state``. ``on_refusal`` is called for each."""

    on_refusal: Callable[[], None] | None = None

    def __init__(self, state: Path, host: str) -> None:
        self._host = host
        self._held, self._log = state / "held", state / "audit.log"
        self._allowance = Allowance(REFUSALS_A_SECOND, MOST_REFUSALS)
        self._left_out = 0
        self._one = threading.Lock()

    def wrote(self, disk: Path, before: LeaseRecord | None, record: LeaseRecord) -> None:
        """A record of the lease of ``disk`` was written."""
        with suppress(OSError):
            self._keep(disk, record)
        self._say(
            "lease",
            disk=str(disk),
            epoch=record.epoch,
            state=record.state,
            owner=_name(record.owner),
            before=_name(before.owner) if before else None,
            lender=_name(record.lender),
            granted=record.grant.host if record.grant else None,
            request=record.request,
            note=record.note,
        )

    def _keep(self, disk: Path, record: LeaseRecord) -> None:
        entry = self._held / record.disk.uuid
        if record.owner and record.owner.host == self._host:
            self._held.mkdir(parents=True, exist_ok=True)
            write_whole(entry, str(disk).encode())
        else:
            entry.unlink(missing_ok=True)

    def held(self) -> dict[str, Path]:
        """What this host was seen to hold last; its leases say whether it still does."""
        found = {}
        for entry in self._held.glob("[0-9A-Za-z]*"):
            with suppress(FileNotFoundError):
                found[entry.name] = Path(entry.read_text())
        return found

    def asked(self, disk: Path, record: LeaseRecord, request: Request) -> None:
        """This host has asked for a disk."""
        owner, mine = _name(record.owner), request.id
        self._say("asked", disk=str(disk), epoch=record.epoch, owner=owner, request=mine)

    def refused(self, why: str, **about: Any) -> None:
        """Somebody asked and was refused. In a flood some are left out, and counted."""
        if self.on_refusal:
            self.on_refusal()
        with self._one:
            if not self._allowance.take():
                self._left_out += 1
                return
            left_out, self._left_out = self._left_out, 0
        self._say("refused", why=why, **about, **({"left_out": left_out} if left_out else {}))

    def _say(self, event: str, **fields: Any) -> None:
        line = json.dumps({"at": datetime.now(UTC).isoformat(), "event": event, **fields})
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self._log, flags, 0o600)
            try:
                os.write(fd, line.encode() + b"\n")
            finally:
                os.close(fd)


def _name(owner: Owner | None) -> str | None:
    return owner.host if owner else None
