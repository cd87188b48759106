"""A move, as values: what is intended, what is seen, and what comes next.

A *move* takes the guest's disks off their active layers, all together: onto new disks (promote,
consolidate --beside), into layers below (consolidate), or onto overlays above (snapshot).
`decide` is pure. A fresh run, a retry and a recovery after a kill are the same
function asked at another moment; nothing depends on what promoter remembers
having done. The rules it keeps, whatever it is shown:

* a guest that stands still comes first: finish its switchover if the names
  have begun to change, else cancel;
* the path that the next boot opens must name the disk the guest writes to;
* names are changed only when every disk's mirror is ready and every chain is
  still the one that was seeded;
* nothing that a guest writes to, or that its next boot opens, is discarded.

Source: US 10585690 B2, claims 1 to 7, and US 10956041 B2 (docs name the steps); QAPI
``blockdev-mirror``, ``block-commit``, ``job-complete``, ``job-finalize``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum, StrEnum
from pathlib import Path

from promoter.chain import BackingChain, DiskOptions, FileId, FileStamp, Image
from promoter.storage.names import Named, Names
from promoter.storage.seed import Geometry, Preallocation, SeedMethod


class CopyMode(StrEnum):
    """When a guest's write reaches the target (QAPI ``MirrorCopyMode``)."""

    WRITE_BLOCKING = "write-blocking"
    BACKGROUND = "background"


class Kind(StrEnum):
    """The operations whose intent this is."""

    PROMOTE = "promote"
    CONSOLIDATE = "consolidate"
    SNAPSHOT = "snapshot"
    UNDO = "undo"

    @property
    def done(self) -> str:
        """What it has done to the disks that are named after this word."""
        said = {Kind.SNAPSHOT: "took a snapshot of", Kind.UNDO: "went back with"}
        return said.get(self, f"{self}d")


class Old(StrEnum):
    """What becomes of files that no chain needs any more."""

    ASIDE = "aside"
    DELETE = "delete"


class OnFull(StrEnum):
    """What happens when there is no room for the new disk any more."""

    WAIT = "wait"
    FAIL = "fail"


class Way(StrEnum):
    """How a disk leaves its active layer.

    A mirror goes onto a new disk; a commit into a layer of the disk's own chain, by the same
    job of QEMU's; a commit below merges layers under the active one, which stays; a snapshot
    puts a new, empty overlay above it.
    """

    MIRROR = "mirror"
    COMMIT = "commit"
    COMMIT_BELOW = "commit below"
    SNAPSHOT = "snapshot"


class Loss(StrEnum):
    """What a move may leave behind, if the operator says so."""

    SNAPSHOTS = "snapshots"
    ENCRYPTION = "encryption"


@dataclass(frozen=True)
class Choices:
    """What the operator asked for; None where promoter is to choose.

    ``speed`` is in bytes per second, 0 for no limit; ``cluster_size`` in bytes;
    ``parallel`` is the most disks to seed at once. ``adopt``: a copy that somebody else started.
    ``verify``: prove that old and new disk are the same before the old one is let go.
    ``quiesce``: a snapshot of frozen file systems.
    ``top`` and ``base`` name the layers of a commit, one for each disk; ``max_pause`` is how long
    the guest may stand still for one, in seconds; ``scan`` are directories in which to look for
    who else reads its target.
    """

    disks: tuple[str, ...] = ()
    target: Path | None = None
    target_dir: Path | None = None
    format: str = "qcow2"
    cluster_size: int | None = None
    extended_l2: bool | None = None
    preallocation: Preallocation = Preallocation.OFF
    seed: SeedMethod | None = None
    speed: int = 0
    parallel: int | None = None
    lose: tuple[Loss, ...] = ()
    copy_mode: CopyMode = CopyMode.WRITE_BLOCKING
    beside: bool = False
    top: tuple[str, ...] = ()
    base: tuple[str, ...] = ()
    max_pause: float = 0.5
    scan: tuple[Path, ...] = ()
    old: Old = Old.ASIDE
    adopt: bool = False
    verify: bool = False
    quiesce: bool = False
    on_full: OnFull = OnFull.FAIL


@dataclass(frozen=True)
class DomainAddress:
    """Where a libvirt domain is found again."""

    uri: str
    uuid: str


@dataclass(frozen=True)
class Verdict:
    """What came of a verification: the bytes that are the ``same`` on both disks, or where they
    differ, or why nothing is proven.
    """

    same: int | None = None
    difference: str = ""
    unproven: str = ""


@dataclass(frozen=True)
class DiskIntent:
    """One disk of a move.

    ``mark`` is what we name ours by; ``root`` is the node that the guest's device has;
    ``below`` are the files under the active layer, as they were planned. ``kept`` counts the
    lowest layers that stay below a new disk. A commit merges the layers from ``top``, counted
    from the active one, down to the target, layer ``into``. On another host libvirt makes the
    target: ``made``, it has; ``left``: there may be one, half-made, that is not removed from here.
    ``viewed``: a view of the new disk was taken at the switchover; ``verdict``: what it proved.
    """

    mark: str
    index: int
    key: str
    name: str
    root: str
    chain: BackingChain
    below: tuple[FileStamp, ...]
    options: DiskOptions
    names: Names
    method: SeedMethod
    geometry: Geometry
    required: int
    seeded: FileStamp | None = None
    replanned: int = 0
    way: Way = Way.MIRROR
    kept: int = 0
    top: int = 0
    into: int = 0
    made: bool = False
    left: bool = False
    viewed: bool = False
    verdict: Verdict | None = None

    @property
    def commits(self) -> bool:
        """Is the target a layer of the disk's own chain?"""
        return self.way in (Way.COMMIT, Way.COMMIT_BELOW)

    @property
    def gone(self) -> tuple[Image, ...]:
        """The layers that are not in the chain any more when it is done."""
        match self.way:
            case Way.MIRROR:
                return self.chain.images[: len(self.chain) - self.kept]
            case Way.SNAPSHOT:
                return ()
            case _:
                return self.chain.images[self.top : self.into]

    @property
    def new(self) -> FileId | None:
        """The file that the guest is to have: ``seeded`` once it is made, or a layer's."""
        return self.seeded.id if self.seeded else None

    @property
    def node(self) -> str:
        """The target's node in plain QEMU."""
        return self.chain.images[self.into].node if self.commits else self.mark

    @property
    def job(self) -> str:
        """The name of its job: libvirt's have those of their disks."""
        return self.name if self.names.defined else self.mark

    @property
    def identity(self) -> str:
        """The id of the operation."""
        return self.mark.split("-")[1]

    @property
    def part(self) -> Path:
        """Where the seed grows before it has its name."""
        target = self.names.target
        return target.with_name(f"{target.name}.part-{self.identity}")

    @property
    def virtual_size(self) -> int:
        return self.chain.active.virtual_size


class Failure(StrEnum):
    """Why a move goes no further."""

    CANCELLED = "cancelled"
    NO_SPACE = "no space"
    REFUSED = "refused"
    JOB_FAILED = "job failed"


@dataclass(frozen=True)
class Move:
    """The journalled intent. ``failure`` says why it is being put back, if it is.

    ``stopped``: the guest's CPUs are stopped, by us; so we are to continue them. ``domain`` is
    None for plain QEMU. ``limits`` are the I/O limits, by disk, of those whose writes we slow.
    ``frozen`` is the process of the QEMU whose guest's file systems may be frozen, by us.
    """

    id: str
    guest: str
    choices: Choices
    disks: tuple[DiskIntent, ...]
    failure: Failure | None = None
    reason: str = ""
    tidied: bool = False
    stopped: bool = False
    domain: DomainAddress | None = None
    kind: Kind = Kind.PROMOTE
    frozen: int | None = None
    limits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def address(self) -> DomainAddress | str:
        """Where the guest is found again: its domain, or the path of its monitor."""
        return self.domain or self.guest

    def follows(self, disk: DiskIntent) -> bool:
        """Is what the guest writes copied only afterwards, so that its copy need not end?

        An active commit has no other way. libvirt opens what is to lie below a copy's target at the
        pivot, and until then QEMU would put zeros around a write that is smaller than a cluster
        there; what it copies afterwards are whole clusters.
        """
        return disk.way is Way.COMMIT or bool(self.domain and disk.kept)

    def with_disk(self, index: int, disk: DiskIntent) -> Move:
        return replace(self, disks=(*self.disks[:index], disk, *self.disks[index + 1 :]))

    def without_disk(self, index: int) -> Move:
        return replace(self, disks=self.disks[:index] + self.disks[index + 1 :])


class Active(Enum):
    """What the guest writes to, going by its own graph."""

    OLD = "old"
    NEW = "new"
    OTHER = "other"
    ABSENT = "absent"


class Job(Enum):
    """Where our mirror job stands."""

    NONE = "none"
    RUNNING = "running"
    READY = "ready"
    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Target(Enum):
    """The target's file: not there, exactly as it was seeded, or half-made or written to.

    A layer of the disk's own chain is none of them: nobody makes it, and nobody removes it. Nor
    is a file on another host, until libvirt has made it.
    """

    ABSENT = "absent"
    SEEDED = "seeded"
    USED = "used"
    LAYER = "layer"


@dataclass(frozen=True)
class DiskSeen:
    """One disk as the guest and the files show it."""

    active: Active
    job: Job
    named: Named
    target: Target
    attached: bool
    prepared: bool
    unchanged: bool

    @property
    def switched(self) -> bool:
        """The disk is promoted: the guest's path names the new image and nobody uses the old."""
        return self.named is Named.NEW and self.active in (Active.NEW, Active.ABSENT)

    @property
    def can_finish(self) -> bool:
        """Drained, and its name has changed or can still change."""
        return self.job is Job.PENDING and (self.prepared or self.named is Named.NEW)


@dataclass(frozen=True)
class Seen:
    """One look at everything. In a guest that is gone every disk is absent, without a job."""

    alive: bool
    disks: tuple[DiskSeen, ...]


class Do(IntEnum):
    """The actions, in the order in which a group of disks goes through them."""

    CONTINUE = 1
    FINISH_SWITCHOVER = 2
    UNFREEZE = 3
    PUT_NAME_BACK = 4
    STUCK = 5
    CANCEL = 6
    DISMISS = 7
    COMMIT_NAME = 8
    DETACH = 9
    DISCARD = 10
    REPLAN = 11
    SEED = 12
    MIRROR = 13
    AWAIT_READY = 14
    PREPARE = 15
    SWITCH_OVER = 16
    TIDY = 17
    DONE = 18
    GIVE_UP = 19
    UNLIMIT = 20
    VERIFY = 21
    GO_BACK = 22


FINAL = frozenset({Do.STUCK, Do.DONE, Do.GIVE_UP})
TOGETHER = frozenset({Do.SEED, Do.AWAIT_READY, Do.SWITCH_OVER, Do.FINISH_SWITCHOVER})


@dataclass(frozen=True, order=True)
class Action:
    """One next step; ``disk`` is an index, or None for all disks."""

    do: Do
    disk: int | None = None

    def __str__(self) -> str:
        name = self.do.name.lower().replace("_", " ")
        return name if self.disk is None else f"{name} (disk {self.disk})"


def decide(intent: Move, seen: Seen) -> Action:
    """The next action that brings the move to its end, or safely back."""
    if intent.kind is Kind.UNDO:
        return _undo(intent, seen)
    if intent.stopped and seen.alive:
        return Action(Do.CONTINUE)
    needed = next_of_each(intent, seen)
    if not needed:
        return _end(intent, seen)
    index, first = min(needed.items(), key=lambda item: item[1])
    return Action(first, None if first in TOGETHER else index)


def _undo(intent: Move, seen: Seen) -> Action:
    """What takes disks that have switched back to their old chains."""
    for index, disk in enumerate(seen.disks):
        if disk.named is Named.UNKNOWN:
            return Action(Do.STUCK)
        if disk.named is Named.NEW:
            return Action(Do.GIVE_UP) if intent.failure else Action(Do.GO_BACK, index)
    return Action(Do.DONE if intent.tidied else Do.TIDY)


def next_of_each(intent: Move, seen: Seen) -> dict[int, Do]:
    """What each disk, by its index, needs next by itself; not those that need nothing."""
    committed = any(disk.named is Named.NEW for disk in seen.disks)
    steps = (
        _next(intent, disk.way, shown, alive=seen.alive, committed=committed)
        for disk, shown in zip(intent.disks, seen.disks, strict=True)
    )
    return {index: do for index, do in enumerate(steps) if do is not None}


def _end(intent: Move, seen: Seen) -> Action:
    if intent.limits and seen.alive:
        return Action(Do.UNLIMIT)
    pairs = zip(intent.disks, seen.disks, strict=True)
    for index, (disk, shown) in enumerate(pairs if intent.choices.verify else ()):
        if shown.switched and disk.verdict is None:
            return Action(Do.VERIFY, index)
    if not all(disk.switched for disk in seen.disks):
        return Action(Do.GIVE_UP)
    return Action(Do.DONE if intent.tidied else Do.TIDY)


def _next(intent: Move, way: Way, disk: DiskSeen, *, alive: bool, committed: bool) -> Do | None:
    """What one disk needs next; None when there is nothing left to do for it."""
    if disk.job is Job.PENDING:
        return Do.FINISH_SWITCHOVER if committed and disk.can_finish else Do.UNFREEZE
    if disk.named is Named.UNKNOWN:
        return Do.STUCK
    if disk.named is Named.NEW and disk.active is Active.OLD:
        return Do.PUT_NAME_BACK
    if disk.job in (Job.DONE, Job.FAILED):
        return Do.DISMISS
    if disk.active is Active.NEW and disk.named is Named.OLD:
        return Do.COMMIT_NAME if disk.prepared else Do.PREPARE
    if disk.switched:
        return None
    if disk.named is Named.NEW:
        return Do.STUCK
    if intent.failure or not alive:
        return _back(disk)
    return _forward(way, disk)


def _back(disk: DiskSeen) -> Do | None:
    if disk.job is not Job.NONE:
        return Do.CANCEL
    if disk.attached:
        return Do.DETACH
    if disk.target in (Target.SEEDED, Target.USED) or disk.prepared:
        return Do.DISCARD
    return None


def _forward(way: Way, disk: DiskSeen) -> Do:
    if not disk.unchanged or disk.active is not Active.OLD:
        return _back(disk) or Do.REPLAN
    if way is Way.SNAPSHOT:
        return _to_the_snapshot(disk)
    match disk.job:
        case Job.RUNNING:
            return Do.AWAIT_READY
        case Job.READY:
            return Do.SWITCH_OVER if disk.prepared else Do.PREPARE
        case _:
            return _to_the_mirror(disk)


def _to_the_mirror(disk: DiskSeen) -> Do:
    match disk.target:
        case Target.ABSENT:
            return Do.DETACH if disk.attached else Do.SEED
        case Target.USED:
            return Do.MIRROR if disk.attached else Do.DISCARD
        case Target.SEEDED | Target.LAYER:
            return Do.MIRROR


def _to_the_snapshot(disk: DiskSeen) -> Do:
    match disk.target:
        case Target.SEEDED:
            return Do.SWITCH_OVER if disk.prepared else Do.PREPARE
        case Target.ABSENT if not disk.attached:
            return Do.SEED
        case _:
            return _back(disk) or Do.SEED
