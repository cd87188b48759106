"""A plain QEMU guest, over its own QMP monitor socket.

promoter owns the monitor while it works: QEMU serves one client a socket.
Every failure of the connection comes out as `Unreachable` or
`ConnectionLost`, every refused command as `CommandFailed` or `NoSpace`.
Source: QEMU's QMP reference (``blockdev-*``, ``job-*``, ``query-*``).
"""

from __future__ import annotations

import asyncio
import socket
import stat
import struct
from collections.abc import Callable, Collection
from contextlib import suppress
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

from promoter.blockjob import ENDED, BlockJob, JobStatus
from promoter.chain import Disk, DiskOptions
from promoter.errors import NoSpace, Refused, Unreachable
from promoter.guests.base import CommandFailed, ConnectionLost, GuestView, MirrorSpec
from promoter.guests.cmdline import given
from promoter.guests.graph import BlockGraph

OLDEST = (7, 2, 0)
GREETING_TIMEOUT = 3.0
TICK = 0.2
LOOKS = 5
REPLY_LIMIT = 64 * 1024 * 1024


class QmpGuest:
    """One QEMU process, reached through the monitor socket at ``path``."""

    def __init__(self, path: Path, monitor: socket.socket, client: QMPClient) -> None:
        self._path = path
        self._monitor = monitor
        self._client = client
        self._pid = _peer_pid(monitor)
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
            raise Unreachable(
                f"{path} does not speak QMP",
                "Give the socket of a QMP monitor: qemu … -qmp unix:PATH,server=on,wait=off",
            ) from error
        guest = cls(path, monitor, client)
        try:
            await guest._check_version()
        except BaseException:
            await guest.close()
            raise
        return guest

    async def _check_version(self) -> None:
        if (version := await self._version()) < OLDEST:
            raise Refused(
                f"{self.name} runs QEMU {'.'.join(map(str, version))}; promoter needs 7.2 or newer",
                "Move the guest to a newer QEMU first.",
            )

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
            key = (str(data["id"]), JobStatus(data["status"]))
            self._times[key] = at["seconds"] + at["microseconds"] / 1e6
            self._changed.set()

    async def _execute(self, command: str, **arguments: object) -> Any:
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return await self._client.execute(command, named)
        except ExecuteError as error:
            if "No space left" in str(error):
                raise NoSpace(f"{self.name}: {error}") from error
            raise CommandFailed(f"{self.name}: {command}: {error}") from error
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            raise ConnectionLost(f"{self.name}: the monitor closed during {command}") from error

    async def _version(self) -> tuple[int, int, int]:
        qemu = (await self._execute("query-version"))["qemu"]
        return qemu["major"], qemu["minor"], qemu["micro"]

    async def look(self) -> GuestView:
        """The guest's disks, nodes and jobs as they are now."""
        for _ in range(LOOKS):
            with suppress(KeyError):  # the graph changed between two of the queries
                return await self._look()
        raise CommandFailed(f"{self.name}: its block graph does not stand still")

    async def _look(self) -> GuestView:
        graph = BlockGraph(
            await self._execute("query-named-block-nodes", flat=True),
            await self._execute("x-debug-query-block-graph"),
            Path(f"/proc/{self._pid}/cwd"),
        )
        entries = await self._execute("query-block")
        jobs = [_job(job) for job in await self._execute("query-jobs")]
        return GuestView(
            version=await self._version(),
            status=await self.status(),
            iothreads=bool(await self._execute("query-iothreads")),
            disks=tuple([await self._disk(graph, e) for e in entries if "inserted" in e]),
            nodes=graph.names,
            files=graph.files,
            jobs={job.id: job for job in jobs},
        )

    async def _device(self, qdev: str) -> str:
        path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
        try:
            return str(await self._execute("qom-get", path=path, property="type"))
        except CommandFailed:
            return ""

    async def _disk(self, graph: BlockGraph, entry: dict[str, Any]) -> Disk:
        inserted = entry["inserted"]
        root = inserted["node-name"]
        filters, chain = graph.chain(root)
        names = _names(entry, chain.active.node, root)
        cache = inserted["cache"]
        upper = [*filters, chain.active.node]
        line = given(self._pid, set(names))
        return Disk(
            key=entry.get("qdev") or entry["device"],
            name=names[0],
            aliases=frozenset(names),
            node=root,
            chain=chain,
            filters=tuple(node for node in filters if not graph.is_throttle(node)),
            read_only=inserted["ro"],
            jobs=graph.jobs_on([*filters, *(image.node for image in chain)]),
            other_writers=graph.unnamed_writers(upper),
            backing_given=line.backing,
            device=await self._device(str(entry.get("qdev", ""))),
            options=DiskOptions(
                cache_direct=cache["direct"],
                cache_no_flush=cache["no-flush"],
                writeback=cache["writeback"],
                detect_zeroes=inserted["detect_zeroes"],
                **line.options,
            ),
        )

    async def attach(self, node: str, file: Path, image_format: str, options: DiskOptions) -> None:
        cache = {"direct": options.cache_direct, "no-flush": options.cache_no_flush}
        given = {"aio": options.aio, "locking": options.locking}
        common = {"cache": cache, "discard": options.discard or "unmap"}
        await self._execute(
            "blockdev-add",
            driver="host_device" if file.is_block_device() else "file",
            node_name=f"{node}-file",
            filename=str(file),
            auto_read_only=True,
            **common,
            **{key: value for key, value in given.items() if value},
        )
        backing: dict[str, object] = {} if image_format == "raw" else {"backing": None}
        await self._execute(
            "blockdev-add",
            driver=image_format,
            node_name=node,
            file=f"{node}-file",
            detect_zeroes=options.detect_zeroes,
            **backing,
            **common,
        )

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
        return str((await self._execute("query-status"))["status"])

    async def stop(self) -> None:
        await self._execute("stop")

    async def cont(self) -> None:
        await self._execute("cont")

    async def mirror(self, spec: MirrorSpec) -> None:
        below_filter = {"replaces": spec.replaces} if spec.replaces != spec.source else {}
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
            auto_finalize=False,
            auto_dismiss=False,
            **below_filter,
        )

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

    async def write_blocking(self, job: str) -> None:
        commands = {command["name"] for command in await self._execute("query-commands")}
        if "block-job-change" in commands:
            await self._execute(
                "block-job-change", id=job, type="mirror", copy_mode="write-blocking"
            )

    async def job(self, job: str) -> BlockJob | None:
        found = map(_job, await self._execute("query-jobs"))
        return next((each for each in found if each.id == job), None)

    async def wait_for(
        self,
        job: str,
        wanted: Collection[JobStatus],
        tick: Callable[[BlockJob], None],
    ) -> BlockJob | None:
        """Events wake the wait; between them progress is asked for five times a second."""
        while True:
            self._changed.clear()
            now = await self.job(job)
            if now is None or now.status in wanted or now.status in ENDED:
                return now
            tick(now)
            try:
                async with asyncio.timeout(TICK):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def transition_time(self, job: str, status: JobStatus) -> float | None:
        return self._times.get((job, status))

    async def gone(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Give the monitor back. Safe to call when the connection is already lost."""
        self._events.cancel()
        with suppress(EOFError, OSError, QMPError):  # its own end is no news to who closes it
            await self._client.disconnect()
        self._monitor.close()


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


def _job(entry: dict[str, Any]) -> BlockJob:
    return BlockJob(
        id=entry["id"],
        type=entry["type"],
        status=JobStatus(entry["status"]),
        done=entry["current-progress"],
        total=entry["total-progress"],
        error=entry.get("error"),
    )


def _names(entry: dict[str, Any], *nodes: str) -> list[str]:
    """A disk's names, the best one first: device id, device name, node-names, QOM path."""
    qdev = str(entry.get("qdev", ""))
    device_id = qdev.removeprefix("/machine/peripheral/").partition("/")[0]
    named = [node for node in nodes if not node.startswith("#")]
    return [name for name in (device_id, entry["device"], *named, qdev) if name]
