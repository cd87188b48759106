"""A libvirt domain. libvirt owns QEMU's monitor; its view is compared with QEMU's own.

libvirt's calls block, so each runs in a thread. What libvirt does not report, such as QEMU's
block graph, is read by pass-through; nothing is ever changed that way.
Source: libvirt's ``virConnect*`` and ``virDomain*``, ``virDomainQemuMonitorCommand``, and the
domain XML's ``<disk>`` with its ``<source>``, ``<backingStore>`` and ``<alias>``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import libvirt
import libvirt_qemu

from promoter.chain import Disk, LibvirtDisk
from promoter.errors import Refused, Unreachable
from promoter.guests import view
from promoter.guests.base import CommandFailed, ConnectionLost, GuestView

DEFAULT_URI = "qemu:///system"
LOST = frozenset(
    {
        libvirt.VIR_ERR_INTERNAL_ERROR,
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_SYSTEM_ERROR,
    }
)
DENIED = frozenset(
    {
        libvirt.VIR_ERR_AUTH_CANCELLED,
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    }
)

T = TypeVar("T")


class LibvirtGuest:
    """One running domain."""

    def __init__(self, uri: str, connection: libvirt.virConnect, domain: libvirt.virDomain) -> None:
        self._uri = uri
        self._connection = connection
        self._domain = domain
        self._pid = _pid(domain.UUIDString()) if _is_local(connection.getURI()) else None

    @classmethod
    async def connect(cls, name: str, uri: str) -> LibvirtGuest:
        """Find the running domain of this name or UUID.

        Raises `Unreachable` when libvirt does not answer at ``uri``, when there is no such
        domain and when it does not run; `Refused` when the driver there is not QEMU's.
        """
        return await asyncio.to_thread(cls._connect, name, uri)

    @classmethod
    def _connect(cls, name: str, uri: str) -> LibvirtGuest:
        libvirt.registerErrorHandler(lambda *_: None, None)  # it prints what it raises too
        try:
            connection = libvirt.open(uri)
            return cls(uri, connection, _find(connection, name, uri))
        except libvirt.libvirtError as error:
            raise Unreachable(f"no answer from {uri}: {error}", _hint(error)) from error

    @property
    def name(self) -> str:
        return str(self._domain.name())

    async def look(self) -> GuestView:
        """The domain as QEMU has it, its disks named as libvirt names them.

        Raises `CommandFailed`, `ConnectionLost` when libvirtd or the guest is gone, and
        `Refused` when the QEMU is older than 7.2.
        """
        await view.check_version(self._query, self.name)
        seen = await view.take(self._query, self.name, self._pid)
        live = _disks(await self._xml(0))
        persistent = {}
        if await self._call(self._domain.isPersistent):
            persistent = _disks(await self._xml(libvirt.VIR_DOMAIN_XML_INACTIVE))
        return replace(seen, disks=tuple(_named(disk, live, persistent) for disk in seen.disks))

    async def close(self) -> None:
        await asyncio.to_thread(self._connection.close)

    async def _xml(self, flags: int) -> Element:
        return ElementTree.fromstring(await self._call(self._domain.XMLDesc, flags))

    async def _query(self, command: str, **arguments: object) -> Any:
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        asked = json.dumps({"execute": command, "arguments": named})
        answer = json.loads(
            await self._call(libvirt_qemu.qemuMonitorCommand, self._domain, asked, 0)
        )
        if "error" in answer:
            raise CommandFailed(f"{self.name}: {command}: {answer['error']['desc']}")
        return answer["return"]

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return await asyncio.to_thread(function, *arguments)
        except libvirt.libvirtError as error:
            code = error.get_error_code()
            lost = code in LOST and not self._connection.isAlive()
            if lost or code == libvirt.VIR_ERR_OPERATION_INVALID:  # it does not run any more
                raise ConnectionLost(f"{self.name} on {self._uri}: {error}") from error
            raise CommandFailed(f"{self.name}: {error}") from error


def _find(connection: libvirt.virConnect, name: str, uri: str) -> libvirt.virDomain:
    if connection.getType() != "QEMU":
        raise Refused(
            f"{uri} has no QEMU guests: its driver is {connection.getType()}",
            f"Give QEMU's: --connect {DEFAULT_URI}",
        )
    domains = connection.listAllDomains()
    found = next((d for d in domains if name in (d.name(), d.UUIDString())), None)
    if found is None:
        known = ", ".join(sorted(d.name() for d in domains if d.isActive())) or "none"
        raise Unreachable(
            f"no such domain on {uri}: {name}",
            f"Those that run are: {known}. The path of a QMP socket has a slash in it.",
        )
    if not found.isActive():
        saved = found.hasManagedSaveImage()
        how = "It has a managed-save image, so it goes on from there." if saved else ""
        raise Unreachable(f"{name} does not run", f"Start it: virsh start {name}. {how}".strip())
    return found


def _hint(error: libvirt.libvirtError) -> str:
    if error.get_error_code() in DENIED or "Permission denied" in str(error):
        return "Be a member of the group libvirt, or root."
    return (
        f"Does libvirtd run there? Or name another: --connect {DEFAULT_URI}, qemu+ssh://HOST/system"
    )


def _is_local(uri: str) -> bool:
    """Is the guest's host this one? Such URIs name no host."""
    return ":///" in uri


def _pid(uuid: str) -> int | None:
    """QEMU's process: libvirt gives it ``-uuid``, but tells nobody its id."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"-uuid" in words and words[words.index(b"-uuid") + 1] == os.fsencode(uuid):
            return int(process.name)
    return None


def _disks(domain: Element) -> dict[str, Element]:
    """The ``<disk>`` elements by their targets."""
    return {_get(disk, "target", "dev"): disk for disk in domain.iterfind("devices/disk")}


def _named(disk: Disk, live: dict[str, Element], persistent: dict[str, Element]) -> Disk:
    """The disk under libvirt's name for it, with what libvirt believes of it."""
    for target, element in live.items():
        alias = _get(element, "alias", "name")
        if alias and disk.answers_to(alias):
            at_boot = next(iter(_sources(persistent[target])), "") if target in persistent else None
            believed = LibvirtDisk(tuple(_sources(element)), at_boot)
            return replace(disk, name=target, aliases=disk.aliases | {target}, libvirt=believed)
    return disk


def _sources(element: Element | None) -> Iterator[str]:
    """The files of a disk's chain, the active layer first; "" for one that is no file."""
    while element is not None:
        source = element.find("source")
        if source is not None:
            yield source.get("file") or source.get("dev") or ""
        element = element.find("backingStore")


def _get(element: Element, child: str, attribute: str) -> str:
    found = element.find(child)
    return "" if found is None else found.get(attribute, "")
