"""A plain QEMU guest, over its own QMP monitor socket.

promoter owns the monitor while it works: QEMU serves one client a socket.
Every failure of the connection comes out as `Unreachable` or
`ConnectionLost`, every refused command as `CommandFailed` or `NoSpace`.
Source: QEMU's QMP reference (``blockdev-*``, ``job-*``, ``query-*``).
"""

from __future__ import annotations

import asyncio
import errno
import socket
import stat
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)
from qemu.qmp.qmp_client import NegotiationError

from promoter.blockjob import PAUSED, BlockJob, JobStatus
from promoter.chain import Disk, DiskOptions
from promoter.errors import NoSpace, Unreachable
from promoter.guests import fleecing, view
from promoter.guests.agent import Agent
from promoter.guests.base import (
    CommandFailed,
    CommitSpec,
    ConnectionLost,
    GuestView,
    MirrorSpec,
    NodeSpec,
    SnapshotSpec,
    Start,
    ViewSpec,
)

GREETING_TIMEOUT = 3.0
REPLY_TIMEOUT = 120.0
"""Seconds until a monitor counts as lost: a QEMU is silent while its storage stalls."""
RESUMING = 2.0
REPLY_LIMIT = 64 * 1024 * 1024


class QmpGuest:
    """One QEMU process, reached through the monitor socket at ``path``."""

    def __init__(self, path: Path, monitor: socket.socket, client: QMPClient) -> None:
        self._path = path
        self._monitor = monitor
        self._client = client
        self._pid = _peer_pid(monitor)
        self._version = (0, 0, 0)
        self._agent: Agent | None = None
        self._times: dict[tuple[str, JobStatus], float] = {}
        self._changed = asyncio.Event()
        self._listener = EventListener(names=["JOB_STATUS_CHANGE"])
        client.register_listener(self._listener)
        self._events = asyncio.create_task(self._watch(), name=f"events of {path}")

    @classmethod
    async def connect(cls, path: Path) -> QmpGuest:
        """Take the monitor at ``path``.

        Raises `Unreachable` when nobody answers there as QMP within 3 seconds
        and `Refused` when the QEMU is older than 7.2.
        """
        guest = cls(path, *await _negotiated(path))
        try:
            guest._version = await view.version(guest._execute, guest.name)
        except BaseException:  # a cancellation too: nobody else can have the monitor meanwhile
            await guest.close()
            raise
        return guest

    @property
    def name(self) -> str:
        return str(self._path)

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def monitor_fd(self) -> int:
        return self._monitor.fileno()

    async def _watch(self) -> None:
        async for event in self._listener:
            data: Any = event["data"]
            at: Any = event["timestamp"]
            with suppress(*view.NONSENSE):  # jobs are looked at now and then without it
                key = (str(data["id"]), JobStatus(data["status"]))
                self._times[key] = at["seconds"] + at["microseconds"] / 1e6
                self._changed.set()

    async def _execute(self, command: str, **arguments: object) -> Any:
        return await self._ask(command, _dashed(arguments))

    async def _ask(self, command: str, arguments: Mapping[str, object]) -> Any:
        try:
            async with asyncio.timeout(REPLY_TIMEOUT):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            if "No space left" in str(error):
                raise NoSpace(f"{self.name}: {error}") from error
            raise CommandFailed(f"{self.name}: {command}: {error}") from error
        except TimeoutError as error:
            raise ConnectionLost(f"{self.name}: no answer to {command}") from error
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            raise ConnectionLost(f"{self.name}: the monitor closed during {command}") from error
        except (QMPError, ValueError, TypeError) as error:
            raise ConnectionLost(f"{self.name}: the answer to {command} is no QMP") from error

    async def look(self) -> GuestView:
        """The guest's disks, nodes and jobs as they are now."""
        look = view.take(self._execute, self.name, self._pid, self._version)
        seen: GuestView
        seen, jobs = await asyncio.gather(look, view.jobs(self._execute))
        return replace(seen, jobs=jobs)

    async def files(self) -> frozenset[str]:
        """The files that the guest has open."""
        return await view.files(self._execute, self._pid)

    async def attach(self, spec: NodeSpec) -> None:
        given = {"aio": spec.options.aio, "locking": spec.options.locking}
        present = (await self.look()).nodes
        if f"{spec.node}-file" not in present:
            await self._execute(
                "blockdev-add",
                driver="host_device" if spec.file.is_block_device() else "file",
                node_name=f"{spec.node}-file",
                filename=str(spec.file),
                auto_read_only=True,
                **_common(spec.options),
                **{key: value for key, value in given.items() if value},
            )
        if spec.node not in present:
            await self._execute("blockdev-add", **_format_node(spec))

    async def detach(self, node: str) -> None:
        present = (await self.look()).nodes
        for name in (node, f"{node}-file"):
            if name in present:
                await self._execute("blockdev-del", node_name=name)

    async def drop(self, node: str) -> bool:
        try:
            await self._execute("blockdev-del", node_name=node)
        except CommandFailed:
            return False
        return True

    async def status(self) -> str:
        return await view.status(self._execute)

    async def stop(self) -> None:
        await self._execute("stop")

    async def cont(self) -> None:
        await self._execute("cont")

    async def power_down(self) -> None:
        """Press the power button (``system_powerdown``); the guest goes down when it likes."""
        await self._execute("system_powerdown")

    async def unplug(self, device: str) -> None:
        """Take a device, by its QOM path, away (``device_del``); it is gone when this returns.

        How long that takes is the guest's to say (``DEVICE_DELETED``).
        """
        deleted = EventListener(names=["DEVICE_DELETED"])
        with self._client.listen(deleted):
            await self._execute("device_del", id=device)
            async for event in deleted:
                data: Any = event["data"]
                if data["path"] == device:
                    return

    async def get(self, device: str, name: str) -> str:
        """A property of a device, by its QOM path; "" where it has none of that name."""
        try:
            return str(await self._execute("qom-get", path=device, property=name))
        except CommandFailed:
            return ""

    async def put_behind(self, device: str, node: str) -> None:
        """Have a device, by its QOM path, work on another node from now on (``qom-set``).

        What the guest has asked for already is done on the old one before.
        """
        await self._execute("qom-set", path=device, property="drive", value=node)

    async def add_erring(self, node: str, size: int) -> None:
        """Make a node of ``size`` bytes that fails whatever it is asked for, with EIO.

        Source: QEMU's block/blkdebug.c; what a null-co alone is written, is gone.
        """
        await self._execute(
            "blockdev-add",
            driver="blkdebug",
            node_name=node,
            image={"driver": "null-co", "size": size},
            inject_error=[{"event": "none", "errno": errno.EIO, "once": False}],
        )

    async def virtual_size(self, node: str) -> int:
        """The size of a node in bytes, as a guest sees it."""
        nodes = await self._execute("query-named-block-nodes", flat=True)
        sizes = {entry["node-name"]: entry["image"]["virtual-size"] for entry in nodes}
        return int(sizes[node])

    async def begin(self, spec: Start) -> None:
        if isinstance(spec, MirrorSpec):
            await self._mirror(spec)
        else:
            await self._commit(spec)

    async def _commit(self, spec: CommitSpec) -> None:
        below: dict[str, object] = {}
        if spec.top is not None:  # its overlay's header names the target from now on
            below = {"top_node": spec.top, "backing_file": str(spec.file)}
        await self._execute(
            "block-commit",
            job_id=spec.job,
            device=spec.source,
            base_node=spec.target,
            speed=spec.speed,
            filter_node_name=f"{spec.job}-commit",
            auto_finalize=spec.top is not None,
            auto_dismiss=False,
            **below,
        )

    async def snapshot(self, specs: Sequence[SnapshotSpec]) -> None:
        """As `Guest.snapshot`; the overlays are nodes already.

        QEMU may open a file again by the name that it remembers. So it is told of the frozen
        layers' new names here, before their old ones lead to the overlays.
        """
        chains = {image.node for disk in (await self.look()).disks for image in disk.chain}
        if not all(spec.overlay.node in chains for spec in specs):
            actions = [
                {
                    "type": "blockdev-snapshot",
                    "data": {"node": spec.node, "overlay": spec.overlay.node},
                }
                for spec in specs
            ]
            await self._execute("transaction", actions=actions)
        for spec in specs:
            await self.attach(spec.frozen)
            overlay = _format_node(replace(spec.overlay, backing=spec.frozen.node))
            await self._execute("blockdev-reopen", options=[_dashed(overlay)])
            for node in (spec.node, spec.file_node):
                if node:
                    await self.drop(node)

    async def ask_agent(self, command: str, within: float) -> Any:
        """As `Guest.ask_agent`; the agent's channel is ours from then on until `close`."""
        if self._agent is None:
            cwd = Path(f"/proc/{self._pid}/cwd")
            self._agent = await Agent.connect(self.name, self._execute, cwd, within)
        return await self._agent.ask(command, within)

    async def _mirror(self, spec: MirrorSpec) -> None:
        more: dict[str, object] = {}
        if spec.replaces != spec.source:
            more["replaces"] = spec.replaces
        if spec.target_is_zero and await self._takes("blockdev-mirror", "target-is-zero"):
            more["target_is_zero"] = True
        await self._execute(
            "blockdev-mirror",
            job_id=spec.job,
            device=spec.source,
            target=spec.target,
            sync=spec.sync,
            granularity=spec.granularity,
            copy_mode=spec.copy_mode,
            speed=spec.speed,
            filter_node_name=f"{spec.target}-mirror",
            on_target_error="enospc" if spec.waits_for_room else "report",
            auto_finalize=False,
            auto_dismiss=False,
            **more,
        )

    @view.sensible
    async def _takes(self, command: str, argument: str) -> bool:
        """Has this QEMU's command such an argument (``query-qmp-schema``)?"""
        schema = {entry["name"]: entry for entry in await self._execute("query-qmp-schema")}
        members = schema[schema[command]["arg-type"]]["members"]
        return any(member["name"] == argument for member in members)

    async def try_to_serve(self, listening: int) -> None:
        await fleecing.serve(self._execute, self._client.send_fd_scm, listening)
        await self._execute("nbd-server-stop")

    async def prepare_view(self, spec: ViewSpec) -> None:
        await fleecing.prepare(self._execute, spec)

    async def take_view(self, spec: ViewSpec) -> None:
        await fleecing.take(self._execute, spec)

    async def has_view(self, spec: ViewSpec) -> bool:
        return await fleecing.is_taken(self._execute, spec)

    async def show_view(self, spec: ViewSpec, listening: int) -> None:
        await fleecing.show(self._execute, self._client.send_fd_scm, spec, listening)

    async def end_view(self, spec: ViewSpec) -> None:
        await fleecing.end(self._execute, spec)

    async def complete(self, job: str) -> None:
        await self._execute("job-complete", id=job)

    async def finalize(self, job: str) -> None:
        await self._execute("job-finalize", id=job)

    async def cancel(self, job: str) -> None:
        await self._execute("job-cancel", id=job)

    async def dismiss(self, job: str) -> None:
        await self._execute("job-dismiss", id=job)

    async def set_speed(self, job: str, speed: int) -> None:
        await self._execute("block-job-set-speed", device=job, speed=speed)

    async def limits(self, disk: Disk) -> dict[str, int]:
        """Source: ``query-block``, the fields that ``block_set_io_throttle`` takes."""
        entries = await self._execute("query-block")
        (inserted,) = (e["inserted"] for e in entries if _key(e) == disk.key)
        return {key: value for key, value in inserted.items() if key.startswith(("bps", "iops"))}

    async def limit(self, disk: Disk, limits: Mapping[str, int], writes: int | None = None) -> None:
        slowed = dict(limits)
        if writes is not None:  # a total excludes a limit for writes alone
            key = "bps" if limits.get("bps") else "bps_wr"
            slowed[key] = min(writes, limits.get(key) or writes)
            slowed.pop(f"{key}_max", None)
            slowed.pop(f"{key}_max_length", None)
        await self._ask("block_set_io_throttle", self.throttle(disk, slowed))  # no dashes in it

    def throttle(self, disk: Disk, limits: Mapping[str, int]) -> dict[str, object]:
        return {"id": disk.key, **limits}

    async def pause_job(self, job: str) -> None:
        await self._execute("job-pause", id=job)

    async def resume_job(self, job: str, speed: int) -> None:
        await self.retry(job)
        with suppress(TimeoutError):  # it stands still again at once: there is no room
            async with asyncio.timeout(RESUMING):
                await self.wait_for(job, tuple(set(JobStatus) - PAUSED), lambda _: None)

    async def retry(self, job: str) -> None:
        await self._execute("job-resume", id=job)

    async def write_blocking(self, job: str) -> None:
        commands = {command["name"] for command in await self._execute("query-commands")}
        if "block-job-change" in commands:
            await self._execute(
                "block-job-change", id=job, type="mirror", copy_mode="write-blocking"
            )

    async def job(self, job: str) -> BlockJob | None:
        return (await view.jobs(self._execute)).get(job)

    async def wait_for(
        self,
        job: str,
        wanted: Collection[JobStatus],
        tick: Callable[[BlockJob], None],
    ) -> BlockJob | None:
        return await view.wait_for(partial(self.job, job), self._changed, wanted, tick)

    def transition_time(self, job: str, status: JobStatus) -> float | None:
        return self._times.get((job, status))

    async def gone(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Give the monitor back. Safe to call when the connection is already lost."""
        self._events.cancel()
        if self._agent:
            self._agent.close()
        with suppress(Exception):  # its own end is no news to who closes it
            await self._client.disconnect()
        self._monitor.close()


def _key(entry: Mapping[str, Any]) -> str:
    return str(entry.get("qdev") or entry["device"])


def _dashed(arguments: Mapping[str, object]) -> dict[str, object]:
    return {key.replace("_", "-"): value for key, value in arguments.items()}


def _common(options: DiskOptions) -> dict[str, object]:
    cache = {"direct": options.cache_direct, "no-flush": options.cache_no_flush}
    return {"cache": cache, "discard": options.discard or "unmap"}


def _format_node(spec: NodeSpec) -> dict[str, object]:
    spelled_out = spec.format != "raw" and not spec.by_header
    backing: dict[str, object] = {"backing": spec.backing} if spelled_out else {}
    return {
        "driver": spec.format,
        "node_name": spec.node,
        "file": f"{spec.node}-file",
        "read_only": spec.read_only,
        "detect_zeroes": "off" if spec.read_only else spec.options.detect_zeroes,
        **backing,
        **_common(spec.options),
    }


async def _negotiated(path: Path, tries: int = 3) -> tuple[socket.socket, QMPClient]:
    """A connection, ready for commands.

    An event of QEMU's may overtake its answer to ``qmp_capabilities``, which qemu.qmp takes for a
    failure: a guest that has just stopped for an I/O error sends some.
    """
    monitor = await asyncio.to_thread(_connect, path)
    client = QMPClient(path.name, readbuflen=REPLY_LIMIT)
    try:
        async with asyncio.timeout(GREETING_TIMEOUT):
            await client.connect(monitor)
    except TimeoutError:
        monitor.close()
        raise _busy(path) from None
    except ConnectError as error:
        monitor.close()
        if tries > 1 and isinstance(error.exc, NegotiationError):
            return await _negotiated(path, tries - 1)
        raise Unreachable(
            f"{path} does not speak QMP",
            "Give the socket of a QMP monitor: qemu … -qmp unix:PATH,server=on,wait=off",
        ) from error
    return monitor, client


def _connect(path: Path) -> socket.socket:
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise Unreachable(f"{path} is not a socket", "Give the path of a QMP socket.")
    except FileNotFoundError:
        raise Unreachable(
            f"no such socket: {path}",
            "Is the guest running? Start it with -qmp unix:PATH,server=on,wait=off",
        ) from None
    except OSError as error:
        raise _connect_error(path, error) from error
    monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    monitor.settimeout(GREETING_TIMEOUT)
    try:
        monitor.connect(str(path))
    except OSError as error:
        monitor.close()
        raise _connect_error(path, error) from error
    monitor.setblocking(False)
    return monitor


def _connect_error(path: Path, error: OSError) -> Unreachable:
    if isinstance(error, BlockingIOError | TimeoutError):
        return _busy(path)
    if isinstance(error, ConnectionRefusedError):
        return Unreachable(f"nobody listens on {path}", "Is the guest still running?")
    return Unreachable(
        f"cannot connect to {path}: {error.strerror or error}",
        "Give the path of a QMP socket that you may open, of at most 107 bytes.",
    )


def _busy(path: Path) -> Unreachable:
    return Unreachable(
        f"{path} does not greet: another client has this monitor, or it is not QMP",
        "QEMU serves one client a socket. Close the other one, or give the guest a second"
        " monitor: qemu … -qmp unix:SECOND,server=on,wait=off",
    )


def _peer_pid(monitor: socket.socket) -> int:
    credentials = monitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid
