"""Who this host is: a name that stays, and the boot it is in.

The name is ``host-id`` in the state directory if an operator put one there, else it is made
of /etc/machine-id, which machines made from one image may share: give those names of their own.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from promoter.errors import Refused
from promoter.lease.record import LeaseRecord, Owner, Stamp
from promoter.storage.files import is_flocked

BOOT = Path("/proc/sys/kernel/random/boot_id")
MACHINE = Path("/etc/machine-id")
NAME = re.compile(r"[0-9A-Za-z-]{1,64}")
HELD_BY = "PROMOTER_LEASES_HELD_BY"


@dataclass(frozen=True)
class Host:
    """One host in one of its boots; ``endpoint`` is where its agent listens, if it has one."""

    name: str
    boot: str
    endpoint: str | None = None

    def owner(self, *, process: int | None = None, guest: str | None = None) -> Owner:
        """As the owner of a lease: the process ``process``, or the host itself."""
        started = started_at(process) if process else None
        return Owner(self.name, self.boot, process, started, guest, self.endpoint)

    def lives(self, owner: Owner) -> bool:
        """Does a process of this host, in this boot, hold what ``owner`` holds?"""
        if owner.pid is None or (owner.host, owner.boot) != (self.name, self.boot):
            return False
        return started_at(owner.pid) == owner.started

    def works(self, record: LeaseRecord) -> bool:
        """Is an operation of this host at work on the disk?"""
        operation, owner = record.operation, record.owner
        if operation is None or owner is None or owner.host != self.name:
            return False
        return is_flocked(Path(operation.lock))


def this_host(state: Path) -> Host:
    """This host, with its state in ``state``."""
    given = state / "host-id"
    if given.exists():
        name = given.read_text().strip()
        if not NAME.fullmatch(name):
            raise Refused(f"{given} is no host's name", "Up to 64 letters, digits and dashes.")
    else:
        name = _from_machine_id(given)
    return Host(name, BOOT.read_text().strip(), _endpoint(agent_directory(state) / "endpoint"))


def _endpoint(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Refused(f"{file} cannot be read: {error}", "Run promoter as root.") from error


def agent_directory(state: Path) -> Path:
    """Where ``promoter agent init`` put this host's certificate, and where its agent listens."""
    return state / "agent"


def _from_machine_id(given: Path) -> str:
    """Not the machine-id itself, which is not to be shown around (machine-id(5))."""
    try:
        machine = MACHINE.read_text().strip()
    except OSError:
        machine = ""
    if len(machine) != 32:
        raise Refused("this host has no /etc/machine-id", f"Write a name of its own into {given}.")
    return hashlib.sha256(f"promoter {machine}".encode()).hexdigest()[:32]


def started_at(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def held_by(owner: Owner) -> str:
    """What `HELD_BY` is in the environment of what the owner starts, inside of others."""
    outer = os.environ.get(HELD_BY)
    return f"{outer + ':' if outer else ''}{owner.pid}.{owner.started}"


def runs_under(pid: int, owner: Owner) -> bool:
    """Was the process ``pid`` started by the owner, directly or not? Raises OSError."""
    for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        name, _, value = os.fsdecode(variable).partition("=")
        if name == HELD_BY:
            return f"{owner.pid}.{owner.started}" in value.split(":")
    return False


def new_stamp() -> Stamp:
    """For one writing of a record."""
    wall = datetime.now(UTC).isoformat(timespec="seconds")
    return Stamp(f"{os.getpid()}-{secrets.token_hex(8)}", wall)


def new_request_id() -> str:
    return secrets.token_hex(8)
