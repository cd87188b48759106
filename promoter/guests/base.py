"""What promoter asks of a running guest, whoever manages it.

A look is a snapshot of the guest's own graph and jobs: the truth that every
decision rests on. The acts are single hypervisor commands. After
`ConnectionLost` the outcome of the last command is unknown: look again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from promoter.blockjob import BlockJob, JobStatus
from promoter.chain import Disk, DiskOptions
from promoter.errors import JobFailed, Unreachable


class ConnectionLost(Unreachable):
    """The monitor closed in mid-operation; what the guest did last is unknown."""


class CommandFailed(JobFailed):
    """The hypervisor refused a command and changed nothing."""


@dataclass(frozen=True)
class GuestView:
    """One look at a guest. ``status`` is QAPI's ``RunState``; ``iothreads``: has it any?"""

    version: tuple[int, int, int]
    status: str
    iothreads: bool
    disks: tuple[Disk, ...]
    nodes: frozenset[str]
    jobs: dict[str, BlockJob]
    files: frozenset[str]

    def disk(self, name: str) -> Disk | None:
        """The disk that answers to ``name``."""
        return next((disk for disk in self.disks if disk.answers_to(name)), None)


@dataclass(frozen=True)
class MirrorSpec:
    """One mirror: ``blockdev-mirror`` from a disk's root node onto a target node.

    ``replaces`` is the node that the target takes the place of: the active layer.
    ``sync`` is "top" (the active layer only, onto a seeded target) or "full".
    ``granularity`` is in bytes, ``speed`` in bytes per second (0: no limit).
    """

    job: str
    source: str
    replaces: str
    target: str
    sync: str
    granularity: int
    copy_mode: str
    speed: int


class Guest(Protocol):
    """A running guest."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int:
        """The process id of the guest's QEMU."""

    @property
    def monitor_fd(self) -> int:
        """The file descriptor of the control connection, for the switchover's guard."""

    async def look(self) -> GuestView: ...

    async def attach(self, node: str, file: Path, image_format: str, options: DiskOptions) -> None:
        """Open ``file`` as a node without a backing file (``blockdev-add``)."""

    async def detach(self, node: str) -> None:
        """Close a node made by `attach` (``blockdev-del``)."""

    async def drop(self, node: str) -> bool:
        """Close a node unless something uses it; tells whether it is closed."""

    async def status(self) -> str:
        """QAPI's ``RunState``."""

    async def stop(self) -> None:
        """Stop the guest's CPUs."""

    async def cont(self) -> None:
        """Continue the guest's CPUs."""

    async def mirror(self, spec: MirrorSpec) -> None: ...

    async def set_speed(self, job: str, speed: int) -> None:
        """Limit a block job to ``speed`` bytes per second, 0 for no limit."""

    async def write_blocking(self, job: str) -> None:
        """Have a background mirror write to both disks from now on, if this QEMU can."""

    async def job(self, job: str) -> BlockJob | None:
        """The job as it is now."""

    async def complete(self, job: str) -> None: ...

    async def finalize(self, job: str) -> None: ...

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

    def transition_time(self, job: str, status: JobStatus) -> float | None:
        """When the hypervisor says ``job`` entered ``status``: seconds of its clock."""

    async def gone(self) -> None:
        """Return when the connection to the guest is lost."""

    async def close(self) -> None: ...
