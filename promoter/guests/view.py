"""One look at a guest, whoever passes the questions on to its QEMU."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from promoter.blockjob import ENDED, BlockJob, JobStatus
from promoter.chain import Disk, DiskOptions
from promoter.errors import Refused, Unreachable
from promoter.guests.base import CommandFailed, ConnectionLost, GuestView, Version
from promoter.guests.cmdline import given
from promoter.guests.graph import BlockGraph

OLDEST = (7, 2, 0)
LOOKS = 5
TICK = 0.2
NONSENSE = (KeyError, TypeError, ValueError, AttributeError)

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Execute(Protocol):
    """Execute a QMP command; ``_`` in names stands for ``-``. Raises `CommandFailed`."""

    def __call__(self, command: str, **arguments: object) -> Awaitable[Any]: ...


def sensible(
    function: Callable[Arguments, Coroutine[Any, Any, Answer]],
) -> Callable[Arguments, Coroutine[Any, Any, Answer]]:
    """Where QEMU's answers are not of QMP's shape, the connection counts as lost; where it does
    not answer a question, the guest cannot be looked at.
    """

    @wraps(function)
    async def checked(*arguments: Arguments.args, **named: Arguments.kwargs) -> Answer:
        try:
            return await function(*arguments, **named)
        except NONSENSE as error:
            raise ConnectionLost(f"QEMU's answers make no sense: {error!r}") from error
        except CommandFailed as error:
            raise Unreachable(error.message, error.hint) from error

    return checked


@sensible
async def version(execute: Execute, name: str) -> Version:
    """QEMU's version. Raises `Refused` when it is older than 7.2."""
    qemu = (await execute("query-version"))["qemu"]
    found = (qemu["major"], qemu["minor"], qemu["micro"])
    if found < OLDEST:
        raise Refused(
            f"{name} runs QEMU {'.'.join(map(str, found))}; promoter needs 7.2 or newer",
            "Move the guest to a newer QEMU first.",
        )
    return found


@sensible
async def take(execute: Execute, name: str, pid: int | None, version: Version) -> GuestView:
    """The guest's disks and nodes as they are now, without its jobs.

    ``pid`` is its QEMU's process, None when it is not on this host.
    """
    for _ in range(LOOKS):
        with suppress(KeyError):  # the graph changed between two of the queries
            return await _take(execute, pid, version)
    raise CommandFailed(f"{name}: its block graph does not stand still")


@sensible
async def jobs(execute: Execute) -> dict[str, BlockJob]:
    """The block jobs by their ids."""
    full = {
        job["device"]
        for job in await execute("query-block-jobs")
        if (job["paused"], job["io-status"]) == (True, "nospace")
    }
    found = [_job(entry, full) for entry in await execute("query-jobs")]
    return {job.id: job for job in found}


@sensible
async def status(execute: Execute) -> str:
    """QAPI's ``RunState``."""
    return str((await execute("query-status"))["status"])


async def wait_for(
    ask: Callable[[], Awaitable[BlockJob | None]],
    changed: asyncio.Event,
    wanted: Collection[JobStatus],
    tick: Callable[[BlockJob], None],
) -> BlockJob | None:
    """Wait for a job. Events wake the wait; between them progress is asked for."""
    while True:
        changed.clear()
        now = await ask()
        if now is None or now.status in wanted or now.status in ENDED:
            return now
        tick(now)
        await news(changed)


async def news(changed: asyncio.Event) -> None:
    """Wait for an event, but not for long: what it tells of can be asked for."""
    with suppress(TimeoutError):
        async with asyncio.timeout(TICK):
            await changed.wait()


async def _take(execute: Execute, pid: int | None, version: Version) -> GuestView:
    """All questions at once: on a busy host each wait for an answer costs milliseconds."""
    nodes, edges, entries, run_state, iothreads = await asyncio.gather(
        execute("query-named-block-nodes", flat=True),
        execute("x-debug-query-block-graph"),
        execute("query-block"),
        status(execute),
        execute("query-iothreads"),
    )
    graph = BlockGraph(nodes, edges, Path(f"/proc/{pid}/cwd"))
    inserted = [entry for entry in entries if "inserted" in entry]
    return GuestView(
        version=version,
        status=run_state,
        iothreads=bool(iothreads),
        disks=tuple(await asyncio.gather(*(_disk(execute, graph, e, pid) for e in inserted))),
        nodes=graph.names,
        files=graph.files,
        jobs={},
    )


async def files(execute: Execute, pid: int | None) -> frozenset[str]:
    """The files that the guest has open, as `GuestView.files`."""
    nodes = await execute("query-named-block-nodes", flat=True)
    return BlockGraph(nodes, {"nodes": [], "edges": []}, Path(f"/proc/{pid}/cwd")).files


async def _disk(
    execute: Execute, graph: BlockGraph, entry: dict[str, Any], pid: int | None
) -> Disk:
    inserted = entry["inserted"]
    root = inserted["node-name"]
    filters, chain = graph.chain(root)
    names = _names(entry, chain.active.node, root)
    cache = inserted["cache"]
    upper = [*filters, chain.active.node]
    line = given(pid, set(names))
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
        device=await _device(execute, str(entry.get("qdev", ""))),
        options=DiskOptions(
            cache_direct=cache["direct"],
            cache_no_flush=cache["no-flush"],
            writeback=cache["writeback"],
            detect_zeroes=inserted["detect_zeroes"],
            **line.options,
        ),
    )


async def _device(execute: Execute, qdev: str) -> str:
    path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
    try:
        return str(await execute("qom-get", path=path, property="type"))
    except CommandFailed:
        return ""


def _job(entry: dict[str, Any], full: Collection[str]) -> BlockJob:
    return BlockJob(
        id=entry["id"],
        type=entry["type"],
        status=JobStatus(entry["status"]),
        done=entry["current-progress"],
        total=entry["total-progress"],
        error=entry.get("error"),
        full=entry["id"] in full,
    )


def _names(entry: dict[str, Any], *nodes: str) -> list[str]:
    """A disk's names, the best one first: device id, device name, node-names, QOM path."""
    qdev = str(entry.get("qdev", ""))
    device_id = qdev.removeprefix("/machine/peripheral/").partition("/")[0]
    named = [node for node in nodes if not node.startswith("#")]
    return [name for name in (device_id, entry["device"], *named, qdev) if name]
