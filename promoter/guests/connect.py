"""The way to a running guest.

A driver is imported when a guest needs it: loading libvirt takes longer than many a command.
"""

from __future__ import annotations

from pathlib import Path

from promoter.guests.base import Domain, PlainGuest


async def plain(monitor: Path) -> PlainGuest:
    """The QEMU whose QMP socket this is. Raises as `QmpGuest.connect`."""
    from promoter.guests.qmp import QmpGuest

    return await QmpGuest.connect(monitor)


async def knock(uri: str) -> None:
    """Does libvirt answer at ``uri``? Raises `Unreachable`."""
    from promoter.guests.libvirt import LibvirtGuest

    await LibvirtGuest.knock(uri)


async def domain(name: str, uri: str, *, running: bool = True) -> Domain:
    """The domain of that name or UUID, ``running`` or not. Raises as `LibvirtGuest.connect`."""
    from promoter.guests.libvirt import LibvirtGuest

    return await LibvirtGuest.connect(name, uri, running=running)
