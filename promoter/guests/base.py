"""What promoter asks of a running guest, whoever manages it.

A look is a snapshot of the guest's own graph and jobs: the truth that every
decision rests on. The acts are single hypervisor commands. After
`ConnectionLost` the outcome of the last command is unknown: look again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from promoter.blockjob import BlockJob, JobStatus
from promoter.chain import Disk, DiskOptions
from promoter.errors import JobFailed, Unreachable

SHUTOFF = "shutoff"
DEFAULT_URI = "qemu:///system"


class ConnectionLost(Unreachable):
    """The monitor closed in mid-operation; what the guest did last is unknown."""


class NoGuest(Unreachable):
    """There is no such guest: whoever manages the host's guests knows none of that name."""


class CommandFailed(JobFailed):
    """The hypervisor, or the guest agent, refused a command and changed nothing."""


class AgentSilent(JobFailed):
    """The guest agent did not answer in time; whether it does what it was asked is unknown."""


Version = tuple[int, int, int]


@dataclass(frozen=True)
class GuestView:
    """One look at a guest. ``status`` is QAPI's ``RunState``, or "shutoff" for a domain that
    does not run; ``iothreads``: has it any? ``defined`` has the files that a domain's persistent
    definition names, by disk; None for a transient one and for plain QEMU.
    """

    version: Version
    status: str
    iothreads: bool
    disks: tuple[Disk, ...]
    nodes: frozenset[str]
    jobs: dict[str, BlockJob]
    files: frozenset[str]
    defined: Mapping[str, str] | None = None

    @property
    def runs(self) -> bool:
        return self.status != SHUTOFF

    def disk(self, name: str) -> Disk | None:
        """The disk that answers to ``name``."""
        return next((disk for disk in self.disks if disk.answers_to(name)), None)


@dataclass(frozen=True)
class NodeSpec:
    """An image to open as ``node``, with the node ``backing`` below it, None for nothing; or with
    what its header names there (``by_header``).
    """

    node: str
    file: Path
    format: str
    options: DiskOptions
    backing: str | None = None
    read_only: bool = False
    by_header: bool = False


@dataclass(frozen=True)
class MirrorSpec:
    """One mirror: ``blockdev-mirror`` from a disk's root node onto a target node.

    ``replaces`` is the node that the target takes the place of: the active layer. ``target``
    is the target's node; plain QEMU opens ``file`` as it beforehand, libvirt names its own.
    ``sync`` is "top" (the active layer only, onto a seeded target) or "full".
    ``granularity`` is in bytes, ``speed`` in bytes per second (0: no limit). ``create``: libvirt
    makes the file, which must not be there. ``target_is_zero``: the target shows nothing but zeros,
    so that none need be written; a false claim corrupts it. ``waits_for_room``: in plain QEMU it
    stands still when the target's storage is full, until `PlainGuest.retry`.
    """

    job: str
    source: str
    replaces: str
    target: str
    file: Path
    format: str
    sync: str
    granularity: int
    copy_mode: str
    speed: int
    backing: Path | None = None
    create: bool = False
    target_is_zero: bool = False
    waits_for_room: bool = False


@dataclass(frozen=True)
class CommitSpec:
    """One commit: ``block-commit`` of the layers from ``top`` down into ``target``, a layer of
    the same chain. When ``top`` is the active layer (None) it is a mirror as well, and ends with
    a switchover, else it ends by itself. ``file`` is the target's, ``top_file`` the top's.
    """

    job: str
    source: str
    target: str
    file: Path
    speed: int
    top: str | None = None
    top_file: Path | None = None


Start = MirrorSpec | CommitSpec


@dataclass(frozen=True)
class SnapshotSpec:
    """One disk's snapshot: the active layer ``node`` is frozen and gets ``overlay`` above it.

    Plain QEMU then reads the frozen layer as ``frozen``, by another name, and closes ``node``
    and its ``file_node``; libvirt leaves that as it is.
    """

    disk: str
    node: str
    file_node: str | None
    overlay: NodeSpec
    frozen: NodeSpec


@dataclass(frozen=True)
class ViewSpec:
    """A disk as it is at one instant, for others to read.

    ``device`` is the QOM path of what the guest sees the disk by, ``node`` what that has;
    ``scratch`` the file for what is overwritten. ``layered``: other layers lie below the node.
    """

    mark: str
    device: str
    node: str
    scratch: Path
    layered: bool = False

    @property
    def export(self) -> str:
        """The name by which NBD has it."""
        return f"{self.mark}-then"

    @property
    def whole(self) -> str:
        """The name by which NBD has it with all that lies below the node."""
        return f"{self.mark}-before" if self.layered else self.export


class Guest(Protocol):
    """A running guest."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int | None:
        """The process id of the guest's QEMU, None when that is not on this host."""

    async def look(self) -> GuestView: ...

    async def status(self) -> str:
        """QAPI's ``RunState``."""

    async def stop(self) -> None:
        """Stop the guest's CPUs."""

    async def cont(self) -> None:
        """Continue the guest's CPUs."""

    async def begin(self, spec: Start) -> None:
        """Start a mirror or a commit."""

    async def snapshot(self, specs: Sequence[SnapshotSpec]) -> None:
        """Put overlays above disks, all at one instant. Repeatable while the guest is stopped."""

    async def ask_agent(self, command: str, within: float) -> Any:
        """Have the guest agent execute a command without arguments; its answer.

        Raises `AgentSilent` when there is none ``within`` seconds, or somebody else keeps it busy;
        `CommandFailed` when it refuses or when the guest has no channel for one.
        """

    async def set_speed(self, job: str, speed: int) -> None:
        """Limit a block job to ``speed`` bytes per second, 0 for no limit."""

    async def limits(self, disk: Disk) -> dict[str, int]:
        """The disk's I/O limits, by the hypervisor's own names for them."""

    async def limit(self, disk: Disk, limits: Mapping[str, int], writes: int | None = None) -> None:
        """Set the disk's I/O limits, but let it write at most ``writes`` bytes per second."""

    async def pause_job(self, job: str) -> None:
        """Have a block job copy nothing of its own until `resume_job`.

        libvirt has no pause: there it is slowed down to a byte a second.
        """

    async def resume_job(self, job: str, speed: int) -> None:
        """End a pause; go on at ``speed`` bytes per second, 0 for no limit."""

    async def job(self, job: str) -> BlockJob | None:
        """The job as it is now."""

    async def cancel(self, job: str) -> None: ...

    async def dismiss(self, job: str) -> None: ...

    async def wait_for(
        self,
        job: str,
        wanted: Collection[JobStatus],
        tick: Callable[[BlockJob], None],
    ) -> BlockJob | None:
        """Wait until ``job`` has a wanted status or has ended; None: it is not there.

        ``tick`` is called at every change and at least every fifth of a second.
        """

    async def gone(self) -> None:
        """Return when the connection to the guest is lost, or the guest has ended."""

    async def close(self) -> None: ...


@runtime_checkable
class PlainGuest(Guest, Protocol):
    """A QEMU whose monitor is promoter's: every step of a job is its own to take."""

    @property
    def monitor_fd(self) -> int:
        """The file descriptor of the control connection, for the switchover's guard."""

    async def attach(self, spec: NodeSpec) -> None:
        """Open an image as a node (``blockdev-add``). Repeatable."""

    async def detach(self, node: str) -> None:
        """Close a node made by `attach` (``blockdev-del``)."""

    async def drop(self, node: str) -> bool:
        """Close a node unless something uses it; tells whether it is closed."""

    def throttle(self, disk: Disk, limits: Mapping[str, int]) -> dict[str, object]:
        """The arguments of ``block_set_io_throttle`` that set these limits."""

    async def write_blocking(self, job: str) -> None:
        """Have a background mirror write to both disks from now on, if this QEMU can."""

    async def retry(self, job: str) -> None:
        """Have a job that found its target's storage full try again."""

    async def complete(self, job: str) -> None: ...

    async def finalize(self, job: str) -> None: ...

    async def try_to_serve(self, listening: int) -> None:
        """Could QEMU's NBD server be had? Raises `CommandFailed`."""

    async def prepare_view(self, spec: ViewSpec) -> None:
        """Open what a view needs."""

    async def take_view(self, spec: ViewSpec) -> None:
        """Have the view be the disk as it is now; the guest must stand still."""

    async def has_view(self, spec: ViewSpec) -> bool:
        """Is there a view that was taken?"""

    async def show_view(self, spec: ViewSpec, listening: int) -> None:
        """Export a view by NBD, on a unix socket that listens. Repeatable."""

    async def end_view(self, spec: ViewSpec) -> None:
        """Leave nothing of a view. Repeatable."""

    def transition_time(self, job: str, status: JobStatus) -> float | None:
        """When the hypervisor says ``job`` entered ``status``: seconds of its clock."""


@runtime_checkable
class Domain(Guest, Protocol):
    """A guest whose monitor is libvirt's. Its jobs have the names of their disks."""

    @property
    def uri(self) -> str:
        """Where libvirt answers."""

    @property
    def uuid(self) -> str: ...

    @property
    def is_here(self) -> bool:
        """Is its libvirt this host's?"""

    async def copy(self, disk: str) -> RunningCopy | None:
        """The copy of a disk (``virDomainBlockCopy``) that runs, whoever started it."""

    async def has_managed_save(self) -> bool:
        """Is there an image of its memory that its next start goes on from?"""

    async def pivot(self, disk: str) -> None:
        """Switch a disk to the copy that is ready (``virDomainBlockJobAbort``, ``PIVOT``)."""

    async def define(self, disks: Mapping[str, DefinedDisk]) -> None:
        """Have the persistent definition, if there is one, name these files, by disk.

        libvirt has written and flushed the file then, not its directory
        (``virDomainDefineXML``).
        """

    async def definition(self) -> Mapping[str, DefinedDisk]:
        """The files that the next start opens, by disk: those of the persistent definition."""

    async def begin_view(self, disks: Mapping[str, Path]) -> None:
        """Have views be the disks as they are now; what is overwritten goes to these files, by
        disk, which libvirt makes and removes (``virDomainBackupBegin``).
        """

    async def view(self, scratch: Path) -> Path | None:
        """Where the views are served, one of which has this file; each has its disk's name."""

    async def end_view(self) -> None:
        """End the views."""

    async def has_volume(self, file: Path) -> bool:
        """Is there such a file in a pool that libvirt knows? Of others nothing can be said."""

    async def delete_volume(self, file: Path) -> bool:
        """Remove a file from the pool it is in; False when no pool has it, or may lose it."""

    @property
    def definitions(self) -> Path | None:
        """The directory of the definitions, None when it is not on this host."""


@dataclass(frozen=True)
class RunningCopy:
    """What a disk is being copied to. ``whole``: with all that lies below the active layer; None
    where that cannot be known.
    """

    file: Path
    format: str
    whole: bool | None


@dataclass(frozen=True)
class DefinedDisk:
    """What a domain's definition says of a disk."""

    file: Path
    format: str
