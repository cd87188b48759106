"""A libvirt domain. libvirt owns QEMU's monitor; its view is compared with QEMU's own.

libvirt's calls block, so each runs in a thread, and another one waits for its events: its
adapter for asyncio is no good among threads. What libvirt does not report, such as QEMU's block
graph, is read by pass-through; nothing is ever changed that way. The guest agent is spoken to
by pass-through too, since libvirt's own calls to freeze and thaw have no bound.
Source: libvirt's ``virConnect*`` and ``virDomain*``, ``virDomainQemuMonitorCommand``,
``virDomainQemuAgentCommand``, and the domain XML's ``<disk>`` with its ``<source>``,
``<backingStore>`` and ``<alias>``.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import libvirt
import libvirt_qemu

from promoter.blockjob import BlockJob, JobStatus
from promoter.chain import Disk, LibvirtDisk
from promoter.errors import Refused, Unreachable
from promoter.guests import view
from promoter.guests.base import (
    DEFAULT_URI,
    SHUTOFF,
    AgentSilent,
    CommandFailed,
    CommitSpec,
    ConnectionLost,
    DefinedDisk,
    GuestView,
    MirrorSpec,
    NoGuest,
    RunningCopy,
    SnapshotSpec,
    Start,
    Version,
)

DEFINITION = libvirt.VIR_DOMAIN_XML_INACTIVE
LONGEST_ABORT = 30.0
SLOWEST = 1  # byte a second; 0 is no limit
KEEPALIVE, KEEPALIVES = 5, 3  # seconds between them, and how many may stay unanswered
ENDINGS = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_COMPLETED: None,
    libvirt.VIR_DOMAIN_BLOCK_JOB_CANCELED: "Operation canceled",
    libvirt.VIR_DOMAIN_BLOCK_JOB_FAILED: "QEMU's own words were lost; its log may have more",
}
JOBS = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "copy",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: "commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: "active-commit",
}
OF_THE_CONNECTION = frozenset({libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE})
SILENT = frozenset({libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_OPERATION_TIMEOUT})
DENIED = frozenset(
    {
        libvirt.VIR_ERR_AUTH_CANCELLED,
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    }
)

T = TypeVar("T")


class LibvirtGuest:
    """One domain."""

    def __init__(self, uri: str, connection: libvirt.virConnect, domain: libvirt.virDomain) -> None:
        self._uri = uri
        self._connection = connection
        self._domain = domain
        self._pid = _pid(domain.UUIDString()) if self.is_here else None
        self._changed = asyncio.Event()
        self._gone = asyncio.Event()
        self._ended: dict[str, BlockJob] = {}
        self._reasons: dict[str, str] = {}
        self._version: Version | None = None

    @classmethod
    async def connect(cls, name: str, uri: str, *, running: bool = True) -> LibvirtGuest:
        """Find the domain of this name or UUID.

        Raises `Unreachable` when libvirt does not answer at ``uri``, when there is no such
        domain and when it does not run, but has to; `Refused` when the driver there is not
        QEMU's.
        """
        _start_events()
        try:
            connection = await asyncio.to_thread(_open, uri)
            domain = await asyncio.to_thread(_find, connection, name, uri, running=running)
            guest = cls(uri, connection, domain)
            await asyncio.to_thread(guest._listen, asyncio.get_running_loop())
        except libvirt.libvirtError as error:
            raise _unreachable(uri, error) from error
        return guest

    @classmethod
    async def knock(cls, uri: str) -> None:
        """Does libvirt answer? Raises `Unreachable`."""
        _start_events()
        try:
            connection = await asyncio.to_thread(_open, uri)
        except libvirt.libvirtError as error:
            raise _unreachable(uri, error) from error
        connection.close()

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        def later(function: Callable[..., None]) -> Callable[..., None]:
            def call(_: libvirt.virConnect, *arguments: object) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(function, *arguments)

            return call

        register = partial(self._connection.domainEventRegisterAny, self._domain)
        register(libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, later(self._on_job), None)
        libvirt_qemu.qemuMonitorEventRegister(
            *(self._connection, self._domain, "BLOCK_JOB_COMPLETED"), later(self._on_end), None
        )
        register(libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, later(self._on_backup), None)
        register(libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, later(self._on_lifecycle), None)
        self._connection.registerCloseCallback(later(self._on_close), None)
        self._connection.setKeepAlive(KEEPALIVE, KEEPALIVES)

    def _on_end(self, _: object, _event: str, *at_and_details: Any) -> None:
        """QEMU tells why a job failed, before libvirt tells that it did."""
        details = json.loads(at_and_details[2])
        if error := details.get("error"):
            self._reasons[details["device"]] = error

    def _on_job(self, _: object, disk: str, kind: int, status: int, _opaque: object) -> None:
        if kind in JOBS and status in ENDINGS:
            error = ENDINGS[status]
            if status == libvirt.VIR_DOMAIN_BLOCK_JOB_FAILED:
                error = self._reason(disk) or error
            self._ended[disk] = BlockJob(disk, JOBS[kind], JobStatus.CONCLUDED, error=error)
        self._changed.set()

    def _reason(self, disk: str) -> str:
        """libvirt's names of QEMU's jobs have the disk in the middle: copy-vda-libvirt-3-format."""
        named = [job for job in self._reasons if job.split("-")[1:2] == [disk]]
        return "; ".join(self._reasons.pop(job) for job in named)

    def _on_backup(self, *_: object) -> None:
        self._changed.set()

    def _on_lifecycle(self, _: object, event: int, _detail: int, _opaque: object) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            self._gone.set()

    def _on_close(self, _reason: int, _opaque: object) -> None:
        self._gone.set()

    @property
    def name(self) -> str:
        return str(self._domain.name())

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def uuid(self) -> str:
        return str(self._domain.UUIDString())

    @property
    def is_here(self) -> bool:
        return _is_local(self._connection.getURI())

    @property
    def pid(self) -> int | None:
        return self._pid

    async def look(self) -> GuestView:
        """The domain as QEMU has it, its disks and jobs named as libvirt names them.

        Raises `CommandFailed`, `ConnectionLost` when libvirtd or the guest is gone, and
        `Refused` when the QEMU is older than 7.2.
        """
        defined = None
        if await self._call(self._domain.isPersistent):
            persistent = _disks(await self._resolved(DEFINITION))
            defined = {name: _source(element) for name, element in persistent.items()}
        if not await self._call(self._domain.isActive):
            nothing = (frozenset[str](), dict[str, BlockJob](), frozenset[str]())
            return GuestView((0, 0, 0), SHUTOFF, False, (), *nothing, defined)
        self._version = self._version or await view.version(self._query, self.name)
        seen = await view.take(self._query, self.name, self._pid, self._version)
        live = _disks(await self._resolved(0))
        jobs = {name: job for name in live if (job := await self.job(name))}
        disks = tuple(_named(disk, live, defined or {}) for disk in seen.disks)
        return replace(seen, disks=disks, jobs=jobs, defined=defined)

    async def status(self) -> str:
        return await view.status(self._query)

    async def stop(self) -> None:
        await self._call(self._domain.suspend)

    async def cont(self) -> None:
        await self._call(self._domain.resume)

    async def begin(self, spec: Start) -> None:
        self._ended.pop(spec.job, None)
        if isinstance(spec, MirrorSpec):
            await self._copy(spec)
        else:
            await self._commit(spec)

    async def _commit(self, spec: CommitSpec) -> None:
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
        if spec.top_file is None:
            flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        top = None if spec.top_file is None else str(spec.top_file)
        files = (spec.job, str(spec.file), top)
        await self._call(self._domain.blockCommit, *files, spec.speed, flags)

    async def snapshot(self, specs: Sequence[SnapshotSpec]) -> None:
        """As `Guest.snapshot`; libvirt rewrites the persistent definition too."""
        view = await self.look()
        overlays = {spec.disk: spec.overlay for spec in specs}
        if all(_is_active(view.disk(name), overlay.file) for name, overlay in overlays.items()):
            return
        snapshot = Element("domainsnapshot")
        disks = SubElement(snapshot, "disks")
        for disk in view.disks:
            if (overlay := overlays.get(disk.name)) is None:
                SubElement(disks, "disk", name=disk.name, snapshot="no")
                continue
            element = SubElement(disks, "disk", name=disk.name, snapshot="external", type="file")
            SubElement(element, "driver", type=overlay.format)
            SubElement(element, "source", file=str(overlay.file))
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        text = ElementTree.tostring(snapshot, "unicode")
        await self._call(self._domain.snapshotCreateXML, text, flags)

    async def ask_agent(self, command: str, within: float) -> Any:
        asked = json.dumps({"execute": command})
        arguments = (self._domain, asked, math.ceil(within), 0)
        try:
            answer = json.loads(await self._call(libvirt_qemu.qemuAgentCommand, *arguments))
        except CommandFailed as error:
            cause = error.__cause__
            assert isinstance(cause, libvirt.libvirtError)
            if cause.get_error_code() in SILENT:
                raise AgentSilent(error.message) from error
            raise
        return answer["return"]

    async def _copy(self, spec: MirrorSpec) -> None:
        disk = Element("disk", type="file")
        SubElement(disk, "driver", type=spec.format)
        SubElement(disk, "source", file=str(spec.file))
        if spec.backing is None:
            SubElement(disk, "backingStore")  # an empty one: nothing lies below
        flags = libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        if not spec.create:
            flags |= libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
        if spec.sync == "top":
            flags |= libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW
        if spec.copy_mode == "write-blocking":
            flags |= libvirt.VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES
        await self._call(
            self._domain.blockCopy,
            spec.job,
            ElementTree.tostring(disk, "unicode"),
            {
                libvirt.VIR_DOMAIN_BLOCK_COPY_GRANULARITY: spec.granularity,
                libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: spec.speed,
            },
            flags,
        )

    async def set_speed(self, job: str, speed: int) -> None:
        in_bytes = libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
        await self._call(self._domain.blockJobSetSpeed, job, speed, in_bytes)

    async def pause_job(self, job: str) -> None:
        await self.set_speed(job, SLOWEST)

    async def resume_job(self, job: str, speed: int) -> None:
        await self.set_speed(job, speed)

    async def job(self, job: str) -> BlockJob | None:
        """The block job that runs on the disk of this name, or how its last one ended."""
        disk = _disks(await self._xml(0)).get(job)
        mirror = None if disk is None else disk.find("mirror")
        if disk is None or (mirror is None and job in self._ended):
            return self._ended.get(job)
        in_bytes = libvirt.VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES
        info = await self._call(self._domain.blockJobInfo, job, in_bytes)
        if not info and mirror is None:
            return None
        is_ready = mirror is not None and mirror.get("ready") == "yes"
        status = JobStatus.READY if is_ready else JobStatus.RUNNING
        kind = JOBS.get(info.get("type", 0), "")
        return BlockJob(job, kind, status, info.get("cur", 0), info.get("end", 0))

    async def cancel(self, job: str) -> None:
        await self._call(self._domain.blockJobAbort, job, 0)

    async def dismiss(self, job: str) -> None:
        self._ended.pop(job, None)

    async def wait_for(
        self,
        job: str,
        wanted: Collection[JobStatus],
        tick: Callable[[BlockJob], None],
    ) -> BlockJob | None:
        return await view.wait_for(partial(self.job, job), self._changed, wanted, tick)

    async def limits(self, disk: Disk) -> dict[str, int]:
        """Source: ``virDomainGetBlockIoTune``."""
        live = libvirt.VIR_DOMAIN_AFFECT_LIVE
        found = await self._call(self._domain.blockIoTune, disk.name, live)
        return {key: value for key, value in found.items() if isinstance(value, int)}

    async def limit(self, disk: Disk, limits: Mapping[str, int], writes: int | None = None) -> None:
        slowed = dict(limits)
        if writes is not None:
            total = libvirt.VIR_DOMAIN_BLOCK_IOTUNE_TOTAL_BYTES_SEC
            key = total if limits.get(total) else libvirt.VIR_DOMAIN_BLOCK_IOTUNE_WRITE_BYTES_SEC
            slowed[key] = min(writes, limits.get(key) or writes)
            slowed.pop(f"{key}_max", None)
            slowed.pop(f"{key}_max_length", None)
        live = libvirt.VIR_DOMAIN_AFFECT_LIVE
        await self._call(self._domain.setBlockIoTune, disk.name, slowed, live)

    async def copy(self, disk: str) -> RunningCopy | None:
        mirror = _disks(await self._xml(0))[disk].find("mirror[@job='copy']")
        if mirror is None:
            return None
        whole = await asyncio.to_thread(self._copies_all, disk)
        return RunningCopy(Path(_source(mirror)), _get(mirror, "format", "type"), whole)

    def _copies_all(self, disk: str) -> bool | None:
        """libvirt's API does not tell how a copy was started, but what it keeps for itself does."""
        jobs = f"blockjobs/blockjob[@type='copy']/disk[@dst='{disk}']/.."
        try:
            status = ElementTree.parse(f"{self._states}/{self.name}.xml")
        except OSError:
            return None
        flags = [job.get("jobflags") for job in status.iterfind(jobs)]
        if len(flags) != 1 or flags[0] is None:
            return None
        return not int(flags[0], 16) & libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW

    @property
    def _states(self) -> Path:
        """The directory of what libvirt knows of its running domains."""
        if self._connection.getURI().endswith("/session"):
            runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
            return Path(runtime) / "libvirt/qemu/run"
        return Path(f"/proc/{self._pid}/root/run/libvirt/qemu")  # QEMU's /run is libvirtd's

    async def has_managed_save(self) -> bool:
        return bool(await self._call(self._domain.hasManagedSaveImage))

    async def pivot(self, disk: str) -> None:
        await self._call(self._domain.blockJobAbort, disk, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)

    async def define(self, disks: Mapping[str, DefinedDisk]) -> None:
        if not await self._call(self._domain.isPersistent):
            return
        definition = await self._xml(DEFINITION | libvirt.VIR_DOMAIN_XML_SECURE)
        for name, element in _disks(definition).items():
            if name in disks:
                _point(element, disks[name])
        text = ElementTree.tostring(definition, "unicode")
        await self._call(self._connection.defineXML, text)

    async def definition(self) -> Mapping[str, DefinedDisk]:
        if not await self._call(self._domain.isPersistent):
            return {}
        disks = _disks(await self._resolved(DEFINITION))
        return {
            name: DefinedDisk(Path(file), _get(disk, "driver", "type") or "raw")
            for name, disk in disks.items()
            if (file := _source(disk))
        }

    async def begin_view(self, disks: Mapping[str, Path]) -> None:
        backup = Element("domainbackup", mode="pull")
        SubElement(backup, "server", transport="unix", socket=str(await self._view_socket()))
        elements = SubElement(backup, "disks")
        for name in _disks(await self._xml(0)):
            if name not in disks:
                SubElement(elements, "disk", name=name, backup="no")
                continue
            element = SubElement(elements, "disk", name=name, backup="yes", type="file")
            SubElement(element, "driver", type="qcow2")
            SubElement(element, "scratch", file=str(disks[name]))
        await self._call(self._domain.backupBegin, ElementTree.tostring(backup, "unicode"), None, 0)

    async def _view_socket(self) -> Path:
        """Beside the monitor's, where the domain's QEMU may make one, whoever it runs as."""
        for chardev in await self._query("query-chardev"):
            if found := re.search(r"unix:(/[^,]+)/[^/,]+", chardev["filename"]):
                return Path(found[1]) / "promoter.sock"
        raise CommandFailed(f"{self.name}: its monitor is not on a socket")

    async def view(self, scratch: Path) -> Path | None:
        try:
            backup = await self._call(self._domain.backupGetXMLDesc, 0)
        except CommandFailed:
            return None
        xml = ElementTree.fromstring(backup)
        if str(scratch) not in [found.get("file") for found in xml.iterfind("disks/disk/scratch")]:
            return None
        return Path(f"/proc/{self._pid}/root{_get(xml, 'server', 'socket')}")

    async def end_view(self) -> None:
        await self._call(self._domain.abortJob)
        async with asyncio.timeout(LONGEST_ABORT):
            while await self._call(self._job_type):
                await view.news(self._changed)
                self._changed.clear()

    def _job_type(self) -> int:
        return int(self._domain.jobInfo()[0])

    async def has_volume(self, file: Path) -> bool:
        try:
            await self._call(self._find_volume, file)
        except CommandFailed:
            return False
        return True

    async def delete_volume(self, file: Path) -> bool:
        try:
            await self._call((await self._call(self._find_volume, file)).delete)
        except CommandFailed:
            return False
        return True

    def _find_volume(self, file: Path) -> libvirt.virStorageVol:
        """libvirt knows the files that a pool had when it was refreshed last."""
        self._connection.storagePoolLookupByTargetPath(str(file.parent)).refresh()
        return self._connection.storageVolLookupByPath(str(file))

    @property
    def definitions(self) -> Path | None:
        if self._pid is None:
            return None
        if self._connection.getURI().endswith("/session"):
            config = os.environ.get("XDG_CONFIG_HOME")
            return (Path(config) if config else Path.home() / ".config") / "libvirt/qemu"
        return Path(f"/proc/{self._pid}/root/etc/libvirt/qemu")  # QEMU's /etc is libvirtd's

    async def gone(self) -> None:
        await self._gone.wait()

    async def close(self) -> None:
        with suppress(libvirt.libvirtError):  # its own end is no news to who closes it
            await asyncio.to_thread(self._connection.close)

    async def _xml(self, flags: int) -> Element:
        return ElementTree.fromstring(await self._call(self._domain.XMLDesc, flags))

    async def _resolved(self, flags: int) -> Element:
        """The XML with the files of its pool volumes, which it does not name."""
        xml = await self._xml(flags)
        for source in xml.iterfind("devices/disk/source[@pool]"):
            path = await self._call(self._volume, source.get("pool"), source.get("volume"))
            source.set("file", path)
        return xml

    def _volume(self, pool: str, volume: str) -> str:
        return str(
            self._connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path()
        )

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
            if await asyncio.to_thread(self._is_lost, error):
                raise ConnectionLost(f"{self.name} on {self._uri}: {error}") from error
            raise CommandFailed(f"{self.name}: {error}") from error

    def _is_lost(self, error: libvirt.libvirtError) -> bool:
        """Did a call fail because libvirtd or the guest is gone?"""
        try:
            gone = error.get_error_domain() in OF_THE_CONNECTION
            return gone or not (self._connection.isAlive() and self._domain.isActive())
        except libvirt.libvirtError:
            return True


@cache
def _start_events() -> None:
    libvirt.registerErrorHandler(lambda *_: None, None)  # it prints what it raises too
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt events", daemon=True).start()


def _find(
    connection: libvirt.virConnect, name: str, uri: str, *, running: bool
) -> libvirt.virDomain:
    if connection.getType() != "QEMU":
        raise Refused(
            f"{uri} has no QEMU guests: its driver is {connection.getType()}",
            f"Give QEMU's: --connect {DEFAULT_URI}",
        )
    domains = connection.listAllDomains()
    found = next((d for d in domains if name in (d.name(), d.UUIDString())), None)
    if found is None:
        known = ", ".join(sorted(d.name() for d in domains if d.isActive())) or "none"
        raise NoGuest(
            f"no such domain on {uri}: {name}",
            f"Those that run are: {known}. The path of a QMP socket has a slash in it.",
        )
    if running and not found.isActive():
        saved = found.hasManagedSaveImage()
        how = "It has a managed-save image, so it goes on from there." if saved else ""
        raise Unreachable(f"{name} does not run", f"Start it: virsh start {name}. {how}".strip())
    return found


def _open(uri: str) -> libvirt.virConnect:
    """ssh may ask nobody for a password: it is needed again where there is nobody, too."""
    if _transport(uri) == "ssh":
        uri += f"{'&' if '?' in uri else '?'}no_tty=1"
    return libvirt.open(uri)


def _transport(uri: str) -> str:
    return uri.partition("://")[0].partition("+")[2]


def _unreachable(uri: str, error: libvirt.libvirtError) -> Unreachable:
    return Unreachable(f"no answer from {uri}: {' '.join(str(error).split())}", _hint(uri, error))


def _hint(uri: str, error: libvirt.libvirtError) -> str:
    remote = not _is_local(uri)
    denied = error.get_error_code() in DENIED or "Permission denied" in str(error)
    if denied and not remote:
        return "Be a member of the group libvirt, or root."
    if _transport(uri) == "ssh":
        return f"Does libvirtd run there, and does ssh get there unasked? Try: {_ssh(uri)}"
    if remote and _transport(uri) in ("tls", ""):  # it is TLS where none is named
        return (
            "Does libvirtd listen for TLS there? Each certificate must be of an authority that"
            " the other side knows, the host's for the name in the URI: ?pkipath=DIR"
        )
    return (
        f"Does libvirtd run there? Or name another: --connect {DEFAULT_URI}, qemu+ssh://HOST/system"
    )


def _ssh(uri: str) -> str:
    """About the command that libvirt reaches the host by."""
    host, _, options = uri.partition("://")[2].partition("/")
    key = re.search(r"[?&]keyfile=([^&]+)", options)
    return f"ssh -o BatchMode=yes {f'-i {key[1]} ' if key else ''}ssh://{host} true"


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


def _named(disk: Disk, live: dict[str, Element], defined: Mapping[str, str]) -> Disk:
    """The disk under libvirt's name for it, with what libvirt believes of it."""
    for target, element in live.items():
        alias = _get(element, "alias", "name")
        if alias and disk.answers_to(alias):
            mirror = element.find("mirror")
            copied_to = None if mirror is None else _source(mirror)
            believed = LibvirtDisk(tuple(_sources(element)), defined.get(target), copied_to)
            return replace(disk, name=target, aliases=disk.aliases | {target}, libvirt=believed)
    return disk


def _is_active(disk: Disk | None, file: Path) -> bool:
    return disk is not None and disk.chain.active.file == file


def _source(element: Element) -> str:
    """The file of a disk or of its copy; "" when it is no file."""
    return next(_sources(element), "")


def _point(disk: Element, to: DefinedDisk) -> None:
    """Have a disk's definition name another file, with nothing below it."""
    disk.set("type", "file")
    _child(disk, "driver").set("type", to.format)
    source = _child(disk, "source")
    labels = source.findall("seclabel")
    source.clear()
    source.set("file", str(to.file))
    source.extend(labels)
    for below in disk.findall("backingStore"):
        disk.remove(below)


def _child(element: Element, name: str) -> Element:
    found = element.find(name)
    return SubElement(element, name) if found is None else found


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
