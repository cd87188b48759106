"""A guest's backing chains, drawn as trees."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from promoter.chain import Disk, Image
from promoter.guests.base import GuestView


def human_bytes(count: float | None) -> str:
    """A size for people, in binary units."""
    if count is None:
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def tree(guest: str, view: GuestView) -> Tree:
    """One branch per disk, the active layer at the top and the base at the bottom."""
    root = Tree(f"[bold]{escape(guest)}[/] ({view.status})")
    for disk in view.disks:
        kind = "full clone" if len(disk.chain) == 1 else "linked clone"
        access = ", read-only" if disk.read_only else ""
        branch = top = root.add(f"[bold]{escape(disk.name)}[/] {kind}{access}")
        for image in disk.chain:
            branch = branch.add(_describe(image, shared_by(view, disk, image)))
        for difference in disk.differences:
            top.add(f"[yellow]{escape(difference)}[/]")
    return root


def chain_fields(guest: str, view: GuestView) -> dict[str, Any]:
    """The same for ``--json``. Sizes in bytes."""
    return {
        "operation": "chain",
        "guest": guest,
        "status": view.status,
        "exit_code": 0,
        "disks": [
            {
                "disk": disk.name,
                "read_only": disk.read_only,
                "jobs": disk.jobs,
                "chain": [
                    {**asdict(image), "shared_by": shared_by(view, disk, image)}
                    for image in disk.chain
                ],
                "libvirt": asdict(disk.libvirt) if disk.libvirt else None,
                "differences": disk.differences,
            }
            for disk in view.disks
        ],
    }


def shared_by(view: GuestView, disk: Disk, image: Image) -> list[str]:
    """The guest's other disks that read through the same file."""
    return [
        other.name
        for other in view.disks
        if other.key != disk.key and image.file in [layer.file for layer in other.chain]
    ]


def _describe(image: Image, shared: list[str]) -> str:
    name = escape(str(image.file or image.node))
    sharing = f", shared with {', '.join(shared)}" if shared else ""
    return (
        f"{name}: {image.format}, {human_bytes(image.virtual_size)},"
        f" {human_bytes(image.allocated)} allocated{sharing}"
    )
