"""A guest's backing chains, drawn as trees."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.tree import Tree

from promoter.chain import Disk, Image
from promoter.cli.output import shared_by
from promoter.cli.units import human_bytes
from promoter.guests.base import GuestView
from promoter.storage.siblings import Reader, Siblings

MOST_LINES = 6


def tree(guest: str, view: GuestView, siblings: Siblings | None) -> Tree:
    """One branch per disk, the active layer at the top and the base at the bottom.

    ``siblings`` is None where nobody looked for them.
    """
    root = Tree(f"[bold]{escape(guest)}[/] ({view.status})")
    for disk in view.disks:
        kind = "full clone" if len(disk.chain) == 1 else "linked clone"
        access = ", read-only" if disk.read_only else ""
        branch = top = root.add(f"[bold]{escape(disk.name)}[/] {kind}{access}")
        for image in disk.chain:
            branch = branch.add(_describe(image, shared_by(view, disk, image)))
            _list(branch, "read by", _outside(siblings, disk, image))
        for difference in disk.differences:
            top.add(f"[yellow]{escape(difference)}[/]")
    if siblings is None:
        root.add("[yellow]the guest is not on this host: who else reads its images is not known[/]")
    else:
        _list(root, "[yellow]not looked into:[/]", siblings.unreadable)
    return root


def _list(branch: Tree, what: str, items: Sequence[object]) -> None:
    """A line for each, as far as people read them."""
    for item in items[:MOST_LINES]:
        branch.add(f"{what} {escape(str(item))}")
    if len(items) > MOST_LINES:
        branch.add(f"{what} {len(items) - MOST_LINES} more, see --json")


def _outside(siblings: Siblings | None, disk: Disk, image: Image) -> list[Reader]:
    """The readers that are not the guest's own disks."""
    found = siblings.of(disk, image) if siblings else ()
    return [reader for reader in found if reader.disk is None]


def _describe(image: Image, shared: list[str]) -> str:
    name = escape(str(image.file or image.node))
    sharing = f", shared with {', '.join(shared)}" if shared else ""
    return (
        f"{name}: {image.format}, {human_bytes(image.virtual_size)},"
        f" {human_bytes(image.allocated)} allocated{sharing}"
    )
