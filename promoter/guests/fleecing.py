"""Fleecing: others read a plain guest's disk as it was at one instant while the guest writes on.

A ``copy-before-write`` filter between the device and its disk saves what the guest is about to
overwrite into a scratch image; ``snapshot-access`` shows the disk as it was, over NBD. A scratch
image that is full or slow ends the view, never a write of the guest's (``break-snapshot``).
``snapshot-access`` says of what lies below the disk's node that it is not allocated, which is
zero to who asks. So a layered disk is shown by the scratch image, with the node as its backing
file; but only ``snapshot-access`` fails once the view has ended, so that one is asked afterwards.
Source: QAPI ``copy-before-write``, ``snapshot-access``, ``nbd-server-start``, ``block-export-add``;
QEMU's iotest ``image-fleecing``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from promoter.guests.base import CommandFailed, ViewSpec
from promoter.guests.view import Execute

LONGEST_COPY = 4  # seconds that a write may wait for the scratch image; 7.2 cannot count further
LISTENING = "promoter-view"
Send = Callable[[int], None]


async def prepare(execute: Execute, spec: ViewSpec) -> None:
    """Open the scratch image's file."""
    await execute("blockdev-add", driver="file", node_name=_file(spec), filename=str(spec.scratch))


async def take(execute: Execute, spec: ViewSpec) -> None:
    """Have it be the disk as it is now. The guest must stand still."""
    backing = {"backing": spec.node} if spec.layered else {}
    await execute(
        "blockdev-add", driver="qcow2", node_name=_scratch(spec), file=_file(spec), **backing
    )
    await execute(
        "blockdev-add",
        driver="copy-before-write",
        node_name=_filter(spec),
        file=spec.node,
        target=_scratch(spec),
        discard="unmap",
        **{"on-cbw-error": "break-snapshot", "cbw-timeout": LONGEST_COPY},
    )
    await execute("qom-set", path=spec.device, property="drive", value=_filter(spec))


async def is_taken(execute: Execute, spec: ViewSpec) -> bool:
    return _filter(spec) in await _nodes(execute)


async def serve(execute: Execute, send: Send, listening: int) -> None:
    """Start QEMU's NBD server, of which it has one, on a socket that listens.

    Raises `CommandFailed` when it serves somebody else.
    """
    send(listening)
    await execute("getfd", fdname=LISTENING)
    try:
        address = {"type": "fd", "data": {"str": LISTENING}}
        await execute("nbd-server-start", addr=address)
    except CommandFailed:
        with suppress(CommandFailed):  # it is taken when the server tries it
            await execute("closefd", fdname=LISTENING)
        raise


async def show(execute: Execute, send: Send, spec: ViewSpec, listening: int) -> None:
    """Export the view as ``spec.export``, read-only."""
    await _hide(execute, spec)
    await execute(
        "blockdev-add", driver="snapshot-access", node_name=spec.export, file=_filter(spec)
    )
    await serve(execute, send, listening)
    for name in {spec.export, spec.whole}:
        await execute("block-export-add", type="nbd", id=name, node_name=name, name=name)


async def end(execute: Execute, spec: ViewSpec) -> None:
    """Leave nothing of it. Repeatable."""
    await _hide(execute, spec)
    nodes = await _nodes(execute)
    if _filter(spec) in nodes:
        if await _has_filter(execute, spec):
            await execute("qom-set", path=spec.device, property="drive", value=spec.node)
        await execute("blockdev-del", node_name=_filter(spec))
    for name in (_scratch(spec), _file(spec)):
        if name in nodes:
            await execute("blockdev-del", node_name=name)


async def _hide(execute: Execute, spec: ViewSpec) -> None:
    operation, _, _ = spec.mark.rpartition("-")  # whose other disks have views too
    exports = await execute("query-block-exports")
    if any(export["id"].startswith(f"{operation}-") for export in exports):
        await execute("nbd-server-stop")
    if spec.export in await _nodes(execute):
        await execute("blockdev-del", node_name=spec.export)


async def _has_filter(execute: Execute, spec: ViewSpec) -> bool:
    roots = [entry.get("inserted", {}).get("node-name") for entry in await execute("query-block")]
    return _filter(spec) in roots


async def _nodes(execute: Execute) -> set[str]:
    named: list[dict[str, Any]] = await execute("query-named-block-nodes", flat=True)
    return {node["node-name"] for node in named}


def _scratch(spec: ViewSpec) -> str:
    return f"{spec.mark}-before"


def _file(spec: ViewSpec) -> str:
    return f"{spec.mark}-room"


def _filter(spec: ViewSpec) -> str:
    return f"{spec.mark}-save"
