"""The way to a running guest.

A driver is imported when a guest needs it: loading libvirt takes longer than many a command, and
a host without domains need not have it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from promoter.errors import Unreachable
from promoter.guests.base import Domain, PlainGuest

if TYPE_CHECKING:
    from promoter.guests.libvirt import LibvirtGuest


async def plain(monitor: Path) -> PlainGuest:
    """The QEMU whose QMP socket this is. Raises as `QmpGuest.connect`."""
    from promoter.guests.qmp import QmpGuest

    return await QmpGuest.connect(monitor)


def _libvirt() -> type[LibvirtGuest]:
    """Raises `Unreachable` where libvirt's Python module, a part of its own, cannot be loaded."""
    try:
        import libvirt  # noqa: F401 - is it there?
    except ImportError as error:
        raise Unreachable(
            f"libvirt's domains cannot be reached from this Python: {error}",
            "Install promoter with libvirt, as its README says, or give a QMP socket's path.",
        ) from error
    from promoter.guests.libvirt import LibvirtGuest

    return LibvirtGuest


async def knock(uri: str) -> None:
    """Does libvirt answer at ``uri``? Raises `Unreachable`."""
    await _libvirt().knock(uri)


async def domain(name: str, uri: str, *, running: bool = True) -> Domain:
    """The domain of that name or UUID, ``running`` or not. Raises as `LibvirtGuest.connect`, and
    `Unreachable` without libvirt's Python module.
    """
    return await _libvirt().connect(name, uri, running=running)
