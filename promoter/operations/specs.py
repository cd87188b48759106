"""What the hypervisor is told of a disk's move: nodes, jobs, snapshots, definitions."""

from __future__ import annotations

from collections.abc import Iterable

from promoter.guests.base import CommitSpec, DefinedDisk, MirrorSpec, NodeSpec, SnapshotSpec
from promoter.operations.move import CopyMode, DiskIntent, Move, OnFull, Way
from promoter.storage.images import Backing
from promoter.storage.seed import SeedMethod


def backing_of(disk: DiskIntent) -> Backing | None:
    """What lies below the file that is made."""
    if disk.way is Way.SNAPSHOT:
        return Backing(disk.names.aside, disk.chain.active.format)
    if disk.kept:
        below = disk.chain.images[-disk.kept]
        assert below.file, "checked to be a local file"
        return Backing(below.file, below.format)
    return None


def target_node(disk: DiskIntent) -> NodeSpec:
    below = disk.chain.images[-disk.kept].node if disk.kept else None
    node = (disk.node, disk.names.target, disk.geometry.format, disk.options)
    return NodeSpec(*node, backing=below)


def mirror_spec(disk: DiskIntent, move: Move) -> MirrorSpec:
    backing, choices = backing_of(disk), move.choices
    return MirrorSpec(
        job=disk.job,
        source=disk.root,
        replaces=disk.chain.active.node,
        target=disk.node,
        file=disk.names.target,
        format=disk.geometry.format,
        sync="full" if disk.method is SeedMethod.NONE and not disk.kept else "top",
        granularity=disk.chain.active.granularity,
        copy_mode=CopyMode.BACKGROUND if move.follows(disk) else choices.copy_mode,
        speed=choices.speed,
        backing=backing.name if backing else None,
        create=disk.names.remote,
        waits_for_room=choices.on_full is OnFull.WAIT,
    )


def commit_spec(disk: DiskIntent, speed: int) -> CommitSpec:
    top = disk.chain.images[disk.top] if disk.way is Way.COMMIT_BELOW else None
    return CommitSpec(
        job=disk.job,
        source=disk.root,
        target=disk.node,
        file=disk.names.target,
        speed=speed,
        top=top.node if top else None,
        top_file=top.file if top else None,
    )


def snapshot_spec(disk: DiskIntent) -> SnapshotSpec:
    active, *below = disk.chain
    frozen = NodeSpec(
        node=f"{disk.node}-below",
        file=disk.names.aside,
        format=active.format,
        options=disk.options,
        backing=below[0].node if below else None,
        read_only=True,
    )
    return SnapshotSpec(disk.name, active.node, active.file_node, target_node(disk), frozen)


def definitions(disks: Iterable[DiskIntent]) -> dict[str, DefinedDisk]:
    """What a domain's definition is to say of its new disks."""
    return {d.name: DefinedDisk(d.names.target, d.geometry.format) for d in disks}
