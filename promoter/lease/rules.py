"""Every rule of who may write which lease record next. Pure.

Each rule takes the current record and returns the next one, or raises `Illegal` and has changed
nothing; a store then writes it if the epoch is still the one that the rule saw. All of them
serve one invariant:

    mark after close, open after claim: two guests never write one disk.

A record says who *may* open. It cannot stop a process that was paused and wakes up late:
QEMU's image lock, always on, or a real fence does that.

    STEPS      what leads from state to state
    TAKEOVER   when a silent owner's disk may be taken
    answer     what an owner says to a release request

No clock is read here and no two hosts' clocks are compared anywhere: whoever observes says
for how long it has seen a record or a heartbeat unchanged. Sources: LEASE, the project's
protocol; QEMU's block/file-posix.c for what the image lock is worth.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from promoter.errors import Refused
from promoter.lease.record import (
    LAST_EPOCH,
    Answer,
    DiskIdentity,
    Grant,
    LeaseRecord,
    Operation,
    Owner,
    Request,
    Said,
    Stamp,
    State,
    Work,
)

SUSPECT_AFTER = 30.0
STOPPED_AFTER = 180.0
GRANT_SECONDS = 30.0
WAITED_FOR = "a guest of this host has lent it and waits for it"


class Illegal(Refused):
    """A step that the rules do not allow; nothing was changed."""


class Unsettled(Illegal):
    """An operation that moved the disk was interrupted: it may be either of two files."""


class Step(StrEnum):
    """What leads from one record to the next."""

    CREATE = "create"
    CLAIM = "claim"
    RESUME = "resume"
    RELEASE = "release"
    ROLL_BACK = "roll back"
    FREE = "free"
    LEND = "lend"
    TAKE_OVER = "take over"
    BREAK = "break"
    READERS = "readers"
    WORK = "work"
    WORK_DONE = "work done"
    MOVE_IN = "move in"
    MOVED = "moved"


STEPS: Mapping[tuple[State | None, Step], State] = {
    (None, Step.CREATE): State.HELD,
    (State.FREE, Step.CLAIM): State.HELD,
    (State.LOANED, Step.CLAIM): State.HELD,  # by the borrower, or the lender takes it back
    (State.HELD, Step.RESUME): State.HELD,
    (State.RELEASING, Step.RESUME): State.HELD,
    (State.HELD, Step.RELEASE): State.RELEASING,
    (State.RELEASING, Step.ROLL_BACK): State.HELD,
    (State.HELD, Step.FREE): State.FREE,  # its guest has ended
    (State.RELEASING, Step.FREE): State.FREE,
    (State.RELEASING, Step.LEND): State.LOANED,
    (State.HELD, Step.TAKE_OVER): State.HELD,
    (State.RELEASING, Step.TAKE_OVER): State.HELD,
    (State.HELD, Step.BREAK): State.FREE,
    (State.RELEASING, Step.BREAK): State.FREE,
    (State.FREE, Step.BREAK): State.FREE,
    (State.LOANED, Step.BREAK): State.FREE,
    (State.FREE, Step.READERS): State.FREE,
    (State.HELD, Step.READERS): State.HELD,
    (State.HELD, Step.WORK): State.HELD,
    (State.HELD, Step.WORK_DONE): State.HELD,
    (State.RELEASING, Step.WORK_DONE): State.RELEASING,
    (State.FREE, Step.MOVE_IN): State.HELD,
    (State.HELD, Step.MOVED): State.FREE,
    (State.RELEASING, Step.MOVED): State.FREE,
}
"""An absent pair is illegal."""


@dataclass(frozen=True)
class Closed:
    """Proof that a disk is closed here: the guest has no node of it any more, and a fresh
    file descriptor found QEMU's lock bytes free. ``idle``: no operation is at work that could
    put another file in its place. ``here``: where an operation was to move the disk, it is this
    file and not the one elsewhere.
    """

    node_gone: bool
    locks_free: bool
    idle: bool = True
    here: bool = False


def create(disk: DiskIdentity, owner: Owner, stamp: Stamp) -> LeaseRecord:
    """The first record: the disk is the owner's."""
    return LeaseRecord(disk, 1, State.HELD, owner, stamp.nonce, stamp.wall)


def claim(
    record: LeaseRecord,
    owner: Owner,
    stamp: Stamp,
    *,
    unchanged: float = 0,
    through: Iterable[str] = (),
    lender_lives: bool = False,
) -> LeaseRecord:
    """A free or loaned disk becomes the owner's.

    ``unchanged``: for how many seconds the claimant has seen this very record, which lets a
    grant to somebody else lapse. ``through``: overlays that the claimant may write below.
    ``lender_lives``: the process that lent it runs here, and its guest waits for this disk.
    """
    _expect(record.elsewhere is None, f"the disk is {record.elsewhere} now")
    _expect(_may_claim(record, owner.host, unchanged), f"it is granted to {_grantee(record)}")
    others = set(record.readers) - set(through)
    _expect(not others, f"{', '.join(sorted(others))} read through it")
    lender = record.lender
    if lender and lender.host == owner.host:
        _expect(lender == owner or not lender_lives, WAITED_FOR)
        lender = None
    return _next(record, Step.CLAIM, stamp, owner=owner, lender=lender, grant=None, request=None)


def _may_claim(record: LeaseRecord, host: str, unchanged: float) -> bool:
    grant = record.grant
    if grant is None or grant.host == host:
        return True
    lapsed = grant.seconds is not None and unchanged >= grant.seconds
    return lapsed and (record.lender is None or record.lender.host == host)


def _grantee(record: LeaseRecord) -> str:
    return record.grant.host if record.grant else "nobody"


def resume(
    record: LeaseRecord, owner: Owner, stamp: Stamp, *, process_alive: bool, lock: Lock
) -> LeaseRecord:
    """A host takes up its own lease again: after a reboot, or when the process that held it is
    gone, and nothing has the disk open. It takes a new epoch, so that whoever judged the old
    one dead cannot act on that any more.
    """
    before = record.owner
    _expect(_is_host(before, owner.host), "it is not this host's")
    assert before is not None
    same_boot = before.boot == owner.boot
    _expect(not (same_boot and process_alive), f"process {before.pid} of this host holds it")
    _expect(lock is Lock.FREE, "a QEMU has the disk open")
    _expect_settled(record)
    return _next(record, Step.RESUME, stamp, owner=owner, request=None)


def release(record: LeaseRecord, host: str, request: str, stamp: Stamp) -> LeaseRecord:
    """The owner begins to let go for a request."""
    _expect(_is_host(record.owner, host), "only its owner releases it")
    return _next(record, Step.RELEASE, stamp, request=request, **_work_on(record))


def roll_back(record: LeaseRecord, host: str, stamp: Stamp) -> LeaseRecord:
    """The owner could not let go and keeps the disk."""
    _expect(_is_host(record.owner, host), "only its owner keeps it")
    return _next(record, Step.ROLL_BACK, stamp, request=None, **_work_on(record))


def free(
    record: LeaseRecord, host: str, closed: Closed, stamp: Stamp, grant: Grant | None = None
) -> LeaseRecord:
    """The owner has closed the disk. A borrowed one goes back to its lender alone."""
    _expect(_is_host(record.owner, host), "only its owner frees it")
    _expect_closed(record, closed)
    if lender := record.lender:
        grant = Grant(lender.host, record.request or record.nonce, None)
    return _next(record, Step.FREE, stamp, owner=None, grant=grant)


def lend(record: LeaseRecord, host: str, closed: Closed, grant: Grant, stamp: Stamp) -> LeaseRecord:
    """The owner has closed the disk behind a guest that waits for it to come back."""
    _expect(_is_host(record.owner, host), "only its owner lends it")
    _expect(record.lender is None, "it is borrowed")
    _expect(grant.host != host, "a loan is for another host")
    _expect_closed(record, closed)
    return _next(record, Step.LEND, stamp, owner=None, lender=record.owner, grant=grant)


def take_over(
    record: LeaseRecord,
    owner: Owner,
    evidence: Evidence,
    stamp: Stamp,
    *,
    lender_lives: bool = False,
) -> LeaseRecord:
    """The disk of an owner that may be dead becomes another's. A borrower's is its lender's.

    Where an operation was about to put another file in the disk's place, a free image lock does
    not say that it will not: silence does not suffice there. ``lender_lives``: as for `claim`.
    """
    _expect(evidence.epoch == record.epoch, "the evidence is of another epoch")
    found = verdict(evidence)
    _expect(found is Verdict.TAKE, EXPLAINED[found])
    _expect(evidence.fenced or not record.alternate, CHANGING)
    _expect_settled(record)
    lender = record.lender
    _expect(lender is None or lender.host == owner.host, "it is borrowed: its lender's to take")
    _expect(lender in (None, owner) or not lender_lives, WAITED_FOR)
    return _next(record, Step.TAKE_OVER, stamp, owner=owner, lender=None, request=None)


def break_lease(
    record: LeaseRecord, epoch: int, lock: Lock, reason: str, stamp: Stamp
) -> LeaseRecord:
    """An operator, who has looked at epoch ``epoch``, declares the disk free."""
    _expect(record.epoch == epoch, f"the lease is at epoch {record.epoch} now, not {epoch}")
    _expect(bool(reason.strip()), "there is no reason given")
    _expect(lock is Lock.FREE, "a QEMU has the disk open")
    gone = {"owner": None, "lender": None, "grant": None, "request": None}
    return _next(record, Step.BREAK, stamp, note=reason, **gone)


def repin(record: LeaseRecord, disk: DiskIdentity) -> LeaseRecord:
    """A broken lease is about the file that is there now."""
    return replace(record, disk=replace(disk, uuid=record.disk.uuid))


def add_reader(record: LeaseRecord, host: str, overlay: str, stamp: Stamp) -> LeaseRecord:
    """An overlay reads through the disk from now on; its base may not be written any more."""
    _expect_mine_or_free(record, host)
    readers = (*record.readers, overlay)
    return _next(record, Step.READERS, stamp, readers=readers, **_work_on(record))


def remove_reader(record: LeaseRecord, host: str, overlay: str, stamp: Stamp) -> LeaseRecord:
    """An overlay does not read through the disk any more."""
    _expect_mine_or_free(record, host)
    _expect(overlay in record.readers, f"{overlay} does not read through it")
    left = tuple(reader for reader in record.readers if reader != overlay)
    return _next(record, Step.READERS, stamp, readers=left, **_work_on(record))


def work(
    record: LeaseRecord,
    host: str,
    operation: Operation,
    stamp: Stamp,
    alternate: DiskIdentity | None = None,
    elsewhere: str | None = None,
) -> LeaseRecord:
    """An operation of the owner's works on the disk from now on; it may put ``alternate``, a file
    with the same bytes, in its place, or have the guest use one at the path ``elsewhere``. Nobody
    is given the disk meanwhile.
    """
    _expect(_is_host(record.owner, host), "only its owner works on it")
    other = record.operation
    if other and other.id != operation.id and (record.alternate or record.elsewhere):
        raise Illegal(
            f"{other.kind} {other.id} was interrupted as it changed the disk",
            f"Finish it first: promoter job resume {other.id}",
        )
    changes = {"operation": operation, "alternate": alternate, "elsewhere": elsewhere}
    return _next(record, Step.WORK, stamp, **changes)


def work_done(record: LeaseRecord, host: str, operation: str, stamp: Stamp) -> LeaseRecord:
    """The operation is over, whichever file it has left in the disk's place."""
    _expect(_is_host(record.owner, host), "only its owner works on it")
    mine = record.operation is not None and record.operation.id == operation
    _expect(mine, f"operation {operation} does not work on it")
    return _next(record, Step.WORK_DONE, stamp)


def move_in(
    before: LeaseRecord | None, disk: DiskIdentity, moving: LeaseRecord, path: str, stamp: Stamp
) -> LeaseRecord:
    """The file ``disk`` is its owner's, before the disk at ``path`` moves to it, whose lease is
    ``moving``. ``before`` is what the lease of an earlier file of its name says.
    """
    _expect(moving.operation is not None, "no operation works on it")
    assert moving.owner, "what is worked on has one"
    if before is None:
        made = create(disk, moving.owner, stamp)
    else:
        gone = {"grant": None, "request": None, "readers": ()}
        made = _next(before, Step.MOVE_IN, stamp, owner=moving.owner, **gone)
    return replace(repin(made, disk), operation=moving.operation, elsewhere=path)


def moved(record: LeaseRecord, host: str, stamp: Stamp) -> LeaseRecord:
    """The disk is not this file any more, or never came to be, but the one elsewhere."""
    _expect(_is_host(record.owner, host), "only its owner moves it")
    _expect(record.elsewhere is not None, "nothing has moved it")
    gone = {"owner": None, "lender": None, "request": None}
    return _next(record, Step.MOVED, stamp, **gone, elsewhere=record.elsewhere)


def is_lost(record: LeaseRecord, owner: Owner) -> bool:
    """Was the disk taken from its owner? Not one that an operation has moved: that is elsewhere."""
    return record.owner != owner and record.elsewhere is None


def found(record: LeaseRecord, inode: int) -> LeaseRecord | None:
    """The record when the file ``inode`` lies at the disk's path; None: it is not about that."""
    if inode == record.disk.inode:
        return record
    if record.alternate and inode == record.alternate.inode:
        return replace(record, disk=record.alternate, alternate=record.disk)
    return None


def _next(record: LeaseRecord, step: Step, stamp: Stamp, **changes: Any) -> LeaseRecord:
    state = STEPS.get((record.state, step))
    if state is None:
        raise Illegal(f"{step}: illegal while the lease is {record.state} (epoch {record.epoch})")
    if record.epoch == LAST_EPOCH:
        raise Illegal(f"{step}: epoch {LAST_EPOCH} is the last there is")
    place = {"epoch": record.epoch + 1, "state": state, "nonce": stamp.nonce, "wall": stamp.wall}
    over = {"note": "", "operation": None, "alternate": None, "elsewhere": None}
    return replace(record, **{**over, **changes, **place})


def _work_on(record: LeaseRecord) -> dict[str, Any]:
    at_work = ("operation", "alternate", "elsewhere")
    return {name: getattr(record, name) for name in at_work}


LOOK_AGAIN = "See what it says now: promoter lease show DISK"


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Illegal(f"the lease stays as it is: {otherwise}", LOOK_AGAIN)


def _expect_closed(record: LeaseRecord, closed: Closed) -> None:
    _expect(closed.node_gone, "the guest still has the disk")
    _expect(closed.locks_free, "QEMU's lock bytes are not free")
    _expect(closed.idle, "an operation works on it")
    if not closed.here:
        _expect_settled(record)


def _expect_settled(record: LeaseRecord) -> None:
    """Nobody is to take yesterday's disk, or a copy that is not whole, for the disk."""
    if record.elsewhere and (operation := record.operation):
        raise Unsettled(
            f"{operation.kind} {operation.id} was interrupted as it moved the disk: it is this file"
            f" or {record.elsewhere}",
            f"Finish it first: promoter job resume {operation.id}",
        )


def _expect_mine_or_free(record: LeaseRecord, host: str) -> None:
    mine = record.owner is None or record.owner.host == host
    _expect(mine, "another host holds it")


def _is_host(owner: Owner | None, host: str) -> bool:
    return owner is not None and owner.host == host


# --- when may it be taken from a silent owner? -----------------------------------------------


class Beat(StrEnum):
    """An owner's heartbeat, as one observer has timed it."""

    MOVING = "moving"
    SUSPECT = "suspect"
    STOPPED = "stopped"


class Lock(StrEnum):
    """QEMU's image lock on the disk."""

    HELD = "held"
    FREE = "free"


class Storage(StrEnum):
    """Does the disk lie on storage whose locks a lost connection can take away?"""

    LOCAL = "local"
    NETWORK = "network"


class Verdict(StrEnum):
    """What may be done about an owner that does not answer."""

    TAKE = "take"
    WAIT = "wait"
    FENCE = "fence"
    NEVER = "never"
    OPERATOR = "operator"


EXPLAINED: Mapping[Verdict, str] = {
    Verdict.TAKE: "it may be taken over",
    Verdict.WAIT: "its owner has not been silent for long enough",
    Verdict.FENCE: "its owner is silent but may still have it open: wait, or fence that host",
    Verdict.NEVER: "its owner is alive and has it open",
    Verdict.OPERATOR: "no QEMU has it open, but its host was not seen silent for long: ask there",
}
CHANGING = "an operation of its owner's may still put another file there: fence that host"
TAKEOVER: Mapping[tuple[Beat, Lock, Storage], Verdict] = {
    (Beat.MOVING, Lock.HELD, Storage.LOCAL): Verdict.NEVER,
    (Beat.MOVING, Lock.HELD, Storage.NETWORK): Verdict.NEVER,
    (Beat.MOVING, Lock.FREE, Storage.LOCAL): Verdict.OPERATOR,
    (Beat.MOVING, Lock.FREE, Storage.NETWORK): Verdict.OPERATOR,
    (Beat.SUSPECT, Lock.HELD, Storage.LOCAL): Verdict.WAIT,
    (Beat.SUSPECT, Lock.HELD, Storage.NETWORK): Verdict.WAIT,
    (Beat.SUSPECT, Lock.FREE, Storage.LOCAL): Verdict.WAIT,
    (Beat.SUSPECT, Lock.FREE, Storage.NETWORK): Verdict.WAIT,
    (Beat.STOPPED, Lock.HELD, Storage.LOCAL): Verdict.FENCE,
    (Beat.STOPPED, Lock.HELD, Storage.NETWORK): Verdict.FENCE,
    (Beat.STOPPED, Lock.FREE, Storage.LOCAL): Verdict.TAKE,
    (Beat.STOPPED, Lock.FREE, Storage.NETWORK): Verdict.FENCE,
}
"""On network storage one partition stops the beat and lets the server drop the lock, so that
both signs fail together: there silence never suffices."""


@dataclass(frozen=True)
class Evidence:
    """What an observer has seen of the owner of one epoch. ``fenced``: since it saw that epoch
    the owner's host was cut off by force.
    """

    epoch: int
    beat: Beat
    lock: Lock
    storage: Storage
    fenced: bool = False


def beat(silent: float) -> Beat:
    """The state of a heartbeat seen unchanged for ``silent`` seconds."""
    if silent < SUSPECT_AFTER:
        return Beat.MOVING
    return Beat.SUSPECT if silent < STOPPED_AFTER else Beat.STOPPED


def verdict(evidence: Evidence) -> Verdict:
    """What `TAKEOVER` says. A fence helps where it asks for one, once the lock is free."""
    found = TAKEOVER[evidence.beat, evidence.lock, evidence.storage]
    if found is Verdict.FENCE and evidence.fenced and evidence.lock is Lock.FREE:
        return Verdict.TAKE
    return found


# --- release requests ------------------------------------------------------------------------


class Policy(StrEnum):
    """How an owner lets go of a disk when it is asked to."""

    NEVER = "never"
    SHUTDOWN = "shutdown"
    DETACH = "detach"
    LOAN = "loan"
    CLOSE = "close"


class Role(StrEnum):
    """For what a host may ask, by its certificate."""

    REQUEST = "request"
    REQUEST_RUNNING = "request-running"
    METRICS = "metrics"


NEEDED: Mapping[Policy, Role] = {
    Policy.CLOSE: Role.REQUEST,
    Policy.SHUTDOWN: Role.REQUEST_RUNNING,
    Policy.DETACH: Role.REQUEST_RUNNING,
    Policy.LOAN: Role.REQUEST_RUNNING,
}
"""By how the owner would let go: what is taken from a running guest needs more."""


@dataclass(frozen=True)
class Holding:
    """What an owner knows of a disk that it is asked for. ``held_for`` and ``at_least`` are in
    seconds: a disk that has just come is not given away at once.
    """

    host: str
    policy: Policy
    work: Work | None = None
    held_for: float = 0
    at_least: float = 0


def answer(
    record: LeaseRecord | None,
    request: Request,
    holding: Holding,
    roles: Collection[Role] = tuple(Role),
) -> Answer:
    """What the owner says to a requester that has ``roles``. ACCEPTED means: it now begins to
    let go, or has begun to.
    """

    def say(said: Said, why: str = "", **more: Any) -> Answer:
        return Answer(request.id, said, record.epoch if record else 0, why, **more)

    if record is None:
        return say(Said.NOT_OWNER, "there is no lease")
    if record.request == request.id and record.state in (State.FREE, State.LOANED):
        return say(Said.RELEASED)
    if record.state is State.RELEASING and _is_host(record.owner, holding.host):
        if record.request == request.id:
            return say(Said.ACCEPTED)
        if request.epoch == record.epoch - 1:
            return say(Said.BUSY, "it is being released to another", retry_after=1)
    if not _is_host(record.owner, holding.host):
        return say(Said.NOT_OWNER)
    if request.epoch != record.epoch:
        return say(Said.NOT_OWNER, "the request is for another epoch")
    if holding.policy is Policy.LOAN and record.lender:
        return say(Said.REFUSED, "it is borrowed itself")
    if holding.policy is Policy.LOAN and request.requester.host == holding.host:
        return say(Said.REFUSED, "a loan is for another host")
    return _owners_answer(say, holding, roles)


def _owners_answer(say: Any, holding: Holding, roles: Collection[Role]) -> Answer:
    if holding.policy is Policy.NEVER:
        answered: Answer = say(Said.REFUSED, "its policy is never to release it")
    elif NEEDED[holding.policy] not in roles:
        answered = say(Said.REFUSED, f"the requester lacks the role {NEEDED[holding.policy]}")
    elif work := holding.work:
        progress = {"done": work.done, "total": work.total, "retry_after": 5}
        answered = say(Said.BUSY, work.name, **progress)
    elif holding.held_for < holding.at_least:
        wait = math.ceil(holding.at_least - holding.held_for)
        answered = say(Said.BUSY, "it has only just come here", retry_after=wait)
    else:
        answered = say(Said.ACCEPTED)
    return answered


def first_in_queue(requests: Sequence[Request], epoch: int) -> Request | None:
    """Who comes next: the first, in the order of their tickets, that asks for this epoch."""
    return next((request for request in requests if request.epoch == epoch), None)
