"""The agent as a service of systemd: what it may do is what it needs.

It runs as root since it wakes processes, and writes heartbeats and answers, whoever they are of:
with the capabilities for just that.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from promoter.errors import Refused

UNIT = """\
[Unit]
Description=promoter's agent: answers release requests for the disks of this host
After=network-online.target remote-fs.target
Wants=network-online.target

[Service]
Type=notify
NotifyAccess=main
WatchdogSec=30
Restart=always
RestartSec=2
ExecStart={python} -m promoter agent run --state-dir {state}
ReadWritePaths={writable}
CapabilityBoundingSet=CAP_KILL CAP_DAC_OVERRIDE
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
PrivateDevices=yes
PrivateTmp=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0022
MemoryMax=256M
TasksMax=64

[Install]
WantedBy=multi-user.target
"""


def unit(python: Path, state: Path, pools: Iterable[Path]) -> str:
    """The unit's text. Raises `Refused` for a path that a unit file would take apart."""
    writable = [state.absolute(), *(pool.absolute() for pool in pools)]
    for path in (python, *writable):
        if set(str(path)) & set(" \t\n\"'\\%$;"):
            raise Refused(f"{str(path)!r} does not fit into a unit file", "Name it otherwise.")
    return UNIT.format(
        python=python, state=writable[0], writable=" ".join(str(path) for path in writable)
    )
