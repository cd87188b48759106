"""promoter's process for a domain's switchover, struck at one point: see `struck.py`.

The environment's STRIKE says where, who is killed there, and libvirtd's PID.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from promoter.guests.libvirt import LibvirtGuest
from promoter.operations import suspended
from tests.struck import striking

POINTS = {"suspended": "stop", "pivoted": "pivot", "defined": "define"}


def main() -> None:
    point, whom, libvirtd = os.environ["STRIKE"].split(",")
    victims = {"promoter": os.getppid(), "itself": os.getpid(), "libvirtd": int(libvirtd)}

    def hit() -> None:
        for name, pid in victims.items():
            if name in whom:
                with suppress(ProcessLookupError):  # struck before
                    os.kill(pid, signal.SIGKILL)

    name = POINTS[point]
    setattr(LibvirtGuest, name, striking(getattr(LibvirtGuest, name), hit, before=False))
    suspended.main()


if __name__ == "__main__":
    main()
