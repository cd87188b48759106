"""Has a disk open as a QEMU does: ``python tests/lease_holder.py DISK LOG NAME``.

It takes the image lock, says so in the log, and closes the disk when it is told to end. What may
never be it says too: REFUSED, the disk is locked by another; TWO, another has it open, by a lock
of the tests' own; UNCLAIMED, by its lease it is not the host NAME's. It imports nothing of
promoter's, which would take longer than all else that it does.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import TextIO

FLOCK = "hhqqi4x"
TAKEN = (101, 201)
ALL = (*range(100, 104), *range(200, 204))  # of permissions held, and of those not shared


def main() -> int:
    disk, log, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with disk.open("rb+") as file, log.open("a", buffering=1) as said, log.open() as witness:
        if any(_is_taken(file.fileno(), byte) for byte in ALL):
            said.write(f"{name} REFUSED\n")
            return 3
        for byte in TAKEN:
            request = struct.pack(FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
        said.write(_look(witness, disk, name))
        said.write(f"{name} open {os.getpid()}\n")
        signal.sigwait([signal.SIGTERM])
        said.write(f"{name} close {os.getpid()}\n")
    return 0


def _is_taken(fd: int, byte: int) -> bool:
    request = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    return bool(struct.unpack(FLOCK, found)[0] != fcntl.F_UNLCK)


def _look(witness: TextIO, disk: Path, name: str) -> str:
    """What must not be, "" if it is not."""
    try:
        fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"{name} TWO\n"
    newest = max(Path(f"{disk}.lease.d").glob("[0-9]*"))
    owner = json.loads(newest.read_text())["owner"]
    return "" if owner and owner["host"] == name else f"{name} UNCLAIMED\n"


if __name__ == "__main__":
    sys.exit(main())
