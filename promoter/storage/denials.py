"""What AppArmor kept a QEMU from, by the logs that can be read.

Source: the kernel's audit messages, in /dev/kmsg, or in auditd's log where it runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ENABLED = Path("/sys/module/apparmor/parameters/enabled")
KERNEL = Path("/dev/kmsg")
LOGS = (Path("/var/log/audit/audit.log"), Path("/var/log/kern.log"))
LONGEST = 1 << 13
MOST_LOG = 1 << 24
DENIED = re.compile(
    r'audit\((\d+)\.\d+:\d+\): apparmor="DENIED" operation="(\w+)".*? profile="([^"]*)"'
    r' name=("[^"]*"|[0-9A-F]+).*? denied_mask="(\w+)"'
)


@dataclass(frozen=True)
class Denial:
    """One: ``mask`` is what was asked for and not given, such as "r" or "wr"."""

    file: Path
    operation: str
    profile: str
    mask: str

    def __str__(self) -> str:
        return f"AppArmor ({self.profile}) denied {self.operation} ({self.mask}) of {self.file}"


def is_confining() -> bool:
    """Does this host's kernel use AppArmor?"""
    with suppress(OSError):
        return ENABLED.read_text().strip() == "Y"
    return False


def denials(text: str, files: Collection[Path], since: float) -> tuple[Denial, ...]:
    """Those of these files after ``since`` (seconds since the epoch), each once."""
    found: dict[Denial, None] = {}
    for time, operation, profile, name, mask in DENIED.findall(text):
        file = Path(_plain(name))
        if int(time) + 1 > since and file in files:
            found[Denial(file, operation, profile, mask)] = None
    return tuple(found)


def _plain(name: str) -> str:
    """Names with spaces and the like are told in hexadecimal."""
    return name[1:-1] if name.startswith('"') else os.fsdecode(bytes.fromhex(name))


def read_logs() -> str | None:
    """What the logs that can be read say; None: there is none. Blocks: for a thread."""
    texts = [text for text in (_kernel(), *map(_end_of, LOGS)) if text is not None]
    return "\n".join(texts) if texts else None


def _kernel() -> str | None:
    try:
        fd = os.open(KERNEL, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return "\n".join(_records(fd))
    except OSError:
        return None
    finally:
        os.close(fd)


def _records(fd: int) -> Iterator[str]:
    while True:
        try:
            record = os.read(fd, LONGEST)
        except BlockingIOError:
            return
        except BrokenPipeError:  # it was overwritten meanwhile
            continue
        if not record:
            return
        yield record.decode(errors="replace")


def _end_of(log: Path) -> str | None:
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MOST_LOG))
            return file.read(MOST_LOG).decode(errors="replace")
    except OSError:
        return None
