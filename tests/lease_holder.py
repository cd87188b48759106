"""Has a disk open as a QEMU does: ``python -m tests.lease_holder DISK LOG NAME``.

It takes the image lock, says so in the log, and closes the disk when it is told to end. A disk
that is locked by another is the worst news a holder of a lease can get: it says REFUSED.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import sys
from pathlib import Path

from promoter.storage.files import is_locked

BYTES = (101, 201)


def main() -> int:
    disk, log, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with disk.open("rb+") as file, log.open("a", buffering=1) as said:
        if is_locked(disk):
            said.write(f"{name} REFUSED\n")
            return 3
        for byte in BYTES:
            request = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
        said.write(f"{name} open {os.getpid()}\n")
        signal.sigwait([signal.SIGTERM])
        said.write(f"{name} close {os.getpid()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
