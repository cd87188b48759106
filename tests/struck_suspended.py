"""promoter's process for a guest that is suspended, struck at one point: see `struck.py`.

The environment's STRIKE says where, who is killed there, and the PID of libvirtd or QEMU; "ssh" is
what this process and promoter reach libvirtd by, killed once.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from promoter.guests.libvirt import LibvirtGuest
from promoter.guests.qmp import QmpGuest
from promoter.operations import suspended
from promoter.storage.names import Names
from tests.elsewhere import ssh_of
from tests.struck import striking

POINTS: dict[str, tuple[Any, str]] = {  # after which function of which class or module
    "frozen": (suspended, "freeze"),
    "suspended": (LibvirtGuest, "stop"),
    "pivoted": (LibvirtGuest, "pivot"),
    "defined": (LibvirtGuest, "define"),
    "overlays": (LibvirtGuest, "snapshot"),
    "overlay open": (QmpGuest, "attach"),
    "standing": (QmpGuest, "stop"),
    "reopened": (QmpGuest, "drop"),
    "snapshotted": (QmpGuest, "snapshot"),
    "settled": (Names, "settle"),
}


def main() -> None:
    point, whom, other = os.environ["STRIKE"].split(",")
    victims = {"libvirtd": int(other), "qemu": int(other)}
    victims |= {"promoter": os.getppid(), "itself": os.getpid()}
    struck = Path(os.environ["PROMOTER_STATE_DIR"]) / "struck"

    def hit() -> None:
        if "ssh" in whom and not struck.exists():
            struck.touch()
            for client in ssh_of(os.getpid()) + ssh_of(os.getppid()):
                os.kill(client, signal.SIGKILL)
        for name, pid in victims.items():
            if name in whom:
                with suppress(ProcessLookupError):  # struck before
                    os.kill(pid, signal.SIGKILL)

    owner, name = POINTS[point]
    setattr(owner, name, striking(getattr(owner, name), hit, before=False))
    suspended.main()


if __name__ == "__main__":
    main()
