"""The lease record, and every rule of who may write which one next. Pure.

A disk's lease is a line of records, numbered by epoch; the highest is the truth. Each rule
below takes the current record and returns the next one, or raises `Illegal` and has changed
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

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from promoter.errors import Refused

VERSION = 1
LARGEST = 64 * 1024
LAST_EPOCH = 99_999_999
SUSPECT_AFTER = 30.0
STOPPED_AFTER = 180.0
GRANT_SECONDS = 30.0

Identity = Annotated[str, Meta(pattern=r"^[0-9A-Za-z-]{1,64}\Z")]
Text = Annotated[str, Meta(max_length=1024)]
Pem = Annotated[str, Meta(max_length=8192)]
Number = Annotated[int, Meta(ge=0)]
Epoch = Annotated[int, Meta(ge=1, le=LAST_EPOCH)]
Seconds = Annotated[float, Meta(ge=0, le=86400)]


class BadRecord(Refused):
    """A record that is torn, unknown or does not add up: refused, never guessed at."""


class Illegal(Refused):
    """A step that the rules do not allow; nothing was changed."""


class State(StrEnum):
    """What a disk's lease says of it."""

    HELD = "held"
    RELEASING = "releasing"
    FREE = "free"
    LOANED = "loaned"


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
}
"""An absent pair is illegal."""


@dataclass(frozen=True)
class DiskIdentity:
    """The file a lease is about. ``inode`` is pinned: a copy renamed over a live disk has
    none of its locks. ``device`` is only that of the host that wrote the record: device
    numbers of network storage differ from host to host.
    """

    uuid: Identity
    device: Number
    inode: Number


@dataclass(frozen=True)
class Owner:
    """Who holds a disk: a host in one of its boots, and there a process, which ``pid`` and
    ``started`` (of /proc/PID/stat, in clock ticks) tell from any other; without a process the
    host holds it until it says otherwise.
    """

    host: Identity
    boot: Identity
    pid: Number | None = None
    started: Number | None = None
    guest: Text | None = None
    endpoint: Text | None = None
    fingerprint: Text | None = None


@dataclass(frozen=True)
class Grant:
    """To whom a free disk was promised. It lapses when the record has stood unchanged for
    ``seconds``, as each observer times it on its own clock; None: never.
    """

    host: Identity
    request: Identity
    seconds: Seconds | None


@dataclass(frozen=True)
class Operation:
    """What changes the disk while its guest runs: an operation of its owner's host, at work as
    long as somebody there holds the lock on the file ``lock``.
    """

    id: Identity
    kind: Text
    lock: Text


@dataclass(frozen=True)
class Stamp:
    """What tells one writing of a record from another: ``nonce`` is unique, ``wall`` is the
    wall time for people only.
    """

    nonce: str
    wall: str


@dataclass(frozen=True)
class LeaseRecord:
    """One epoch of a disk's lease.

    ``readers`` are the overlays that read through this disk, as absolute paths. ``lender`` is
    who wants a loaned disk back, with the same bytes. ``request`` is the release request that
    is being served. ``note`` says why an operator broke a lease. ``alternate`` is the file that
    ``operation`` puts, or has put, in the place of ``disk``, by one rename: either may be found
    until the operation is over. Whatever ends the owner's holding settles it: then the disk is
    the one that was found.
    """

    disk: DiskIdentity
    epoch: Epoch
    state: State
    owner: Owner | None
    nonce: Identity
    wall: Text
    lender: Owner | None = None
    grant: Grant | None = None
    request: Identity | None = None
    readers: Annotated[tuple[Text, ...], Meta(max_length=4096)] = ()
    note: Text = ""
    operation: Operation | None = None
    alternate: DiskIdentity | None = None

    def __post_init__(self) -> None:
        if fault := _fault(self):
            raise BadRecord(f"epoch {self.epoch} does not add up: {fault}")

    @property
    def responsible(self) -> Owner | None:
        """Who has the disk, or, when it is not with a borrower, wants it back."""
        return self.owner or self.lender


def _fault(record: LeaseRecord) -> str:
    owned = record.state in (State.HELD, State.RELEASING)
    if owned != (record.owner is not None):
        return f"{record.state} {'without' if owned else 'with'} an owner"
    if owned and record.grant:
        return f"{record.state} and granted"
    if record.state is State.RELEASING and not record.request:
        return "releasing without a request"
    if record.state is State.LOANED and not (record.lender and record.grant):
        return "loaned without lender and borrower"
    if record.operation and not owned:
        return f"{record.state} and worked on"
    if record.alternate and not record.operation:
        return "an alternate without an operation"
    return ""


# --- as bytes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """That a request is of the host it names: its certificate, and its signature of `to_sign`
    in hexadecimal digits.
    """

    certificate: Pem
    signature: Text


@dataclass(frozen=True)
class Request:
    """Somebody asks for a disk. It is good for the epoch it names and no other."""

    id: Identity
    epoch: Epoch
    requester: Owner
    wall: Text
    proof: Proof | None = None


class Said(StrEnum):
    """What an owner answers."""

    RELEASED = "released"
    ACCEPTED = "accepted"
    BUSY = "busy"
    REFUSED = "refused"
    NOT_OWNER = "not_owner"


@dataclass(frozen=True)
class Answer:
    """An owner's answer to a request. ``epoch`` is the current one; ``retry_after`` is in
    seconds, ``done`` and ``total`` tell how far the work is that keeps the disk busy.
    """

    request: Identity
    said: Said
    epoch: Number
    why: Text = ""
    retry_after: Seconds | None = None
    done: Number | None = None
    total: Number | None = None


@dataclass(frozen=True)
class Work:
    """What keeps a disk busy, and how far it is, in bytes."""

    operation: Identity
    name: Text
    done: Number = 0
    total: Number = 0


Sealed = TypeVar("Sealed", LeaseRecord, Request, Answer, Work)
KINDS: Mapping[type, str] = {
    LeaseRecord: "lease",
    Request: "request",
    Answer: "answer",
    Work: "work",
}


def encode(value: LeaseRecord | Request | Answer | Work) -> bytes:
    """The value as JSON, with format, version and checksum."""
    kind = type(value)
    fields = msgspec.to_builtins(value)
    body = {"format": f"promoter-{KINDS[kind]}", "version": VERSION, **fields}
    data = _canonical({**body, "sha256": _checksum(body)}, indent=1) + b"\n"
    if len(data) > LARGEST:
        raise BadRecord(f"a {KINDS[kind]} record of {len(data)} bytes is too large to be written")
    return data


def parse(kind: type[Sealed], data: bytes, where: str) -> Sealed:
    """The value that `encode` made ``data`` of. Raises `BadRecord`; ``where`` names the file."""
    body = _object(data, where)
    wanted = f"promoter-{KINDS[kind]}"
    if body.get("format") != wanted:
        _bad(where, f"its format is not {wanted}")
    if body.get("version") != VERSION or isinstance(body["version"], bool):
        _bad(where, f"its version is not {VERSION}, which this promoter knows")
    checksum = body.pop("sha256", None)
    if checksum != _checksum(body):
        _bad(where, "its checksum is wrong: torn or changed")
    del body["format"], body["version"]
    try:
        value = msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        _bad(where, str(error))
    except BadRecord as error:
        _bad(where, error.message)
    if surplus := _surplus(body, msgspec.to_builtins(value)):
        _bad(where, f"it has a {surplus}, which this promoter does not know")
    return value


def _surplus(found: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """The first field, also of what is inside, that no record has; "" if there is none."""
    for name, value in found.items():
        if name not in known:
            return name
        if isinstance(value, dict) and (inside := _surplus(value, known[name])):
            return inside
    return ""


def _object(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > LARGEST:
        _bad(where, f"it is larger than {LARGEST} bytes")
    try:
        body = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_of_64_bits,
        )
    except (ValueError, RecursionError) as error:
        _bad(where, f"it is not whole JSON: {error}")
    if not isinstance(body, dict):
        _bad(where, "it is no JSON object")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _of_64_bits(text: str) -> int:
    if (number := int(text)) >= 2**64:
        raise ValueError(f"{number} is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _canonical(body: Mapping[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(body, sort_keys=True, indent=indent).encode()


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _bad(where: str, why: str) -> NoReturn:
    raise BadRecord(
        f"{where} is refused: {why}",
        "Nobody can tell from it who may open the disk. Look at the other epochs beside it, make"
        " sure that no guest has the disk open, and put the newest whole one in its place.",
    )


def to_sign(request: Request, disk: str) -> bytes:
    """What a requester signs: all it asks, of the disk that the lease calls ``disk``."""
    return encode(replace(request, proof=None)) + disk.encode()


# --- the rules -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Closed:
    """Proof that a disk is closed here: the guest has no node of it any more, and a fresh
    file descriptor found QEMU's lock bytes free. ``idle``: no operation is at work that could
    put another file in its place.
    """

    node_gone: bool
    locks_free: bool
    idle: bool = True


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
) -> LeaseRecord:
    """A free or loaned disk becomes the owner's.

    ``unchanged``: for how many seconds the claimant has seen this very record, which lets a
    grant to somebody else lapse. ``through``: overlays that the claimant may write below.
    """
    _expect(_may_claim(record, owner.host, unchanged), f"it is granted to {_grantee(record)}")
    others = set(record.readers) - set(through)
    _expect(not others, f"{', '.join(sorted(others))} read through it")
    lender = record.lender
    if lender and lender.host == owner.host:
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
    _expect_closed(closed)
    if lender := record.lender:
        grant = Grant(lender.host, record.request or record.nonce, None)
    return _next(record, Step.FREE, stamp, owner=None, grant=grant)


def lend(record: LeaseRecord, host: str, closed: Closed, grant: Grant, stamp: Stamp) -> LeaseRecord:
    """The owner has closed the disk behind a guest that waits for it to come back."""
    _expect(_is_host(record.owner, host), "only its owner lends it")
    _expect(record.lender is None, "it is borrowed")
    _expect_closed(closed)
    return _next(record, Step.LEND, stamp, owner=None, lender=record.owner, grant=grant)


def take_over(record: LeaseRecord, owner: Owner, evidence: Evidence, stamp: Stamp) -> LeaseRecord:
    """The disk of an owner that may be dead becomes another's. A borrower's is its lender's.

    Where an operation was about to put another file in the disk's place, a free image lock does
    not say that it will not: silence does not suffice there.
    """
    _expect(evidence.epoch == record.epoch, "the evidence is of another epoch")
    found = verdict(evidence)
    _expect(found is Verdict.TAKE, EXPLAINED[found])
    _expect(evidence.fenced or not record.alternate, CHANGING)
    lender = record.lender
    _expect(lender is None or lender.host == owner.host, "it is borrowed: its lender's to take")
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
) -> LeaseRecord:
    """An operation of the owner's works on the disk from now on; it may put ``alternate``, a file
    with the same bytes, in its place. Nobody is given the disk meanwhile.
    """
    _expect(_is_host(record.owner, host), "only its owner works on it")
    other = record.operation
    if other and other.id != operation.id and record.alternate:
        raise Illegal(
            f"{other.kind} {other.id} was interrupted as it changed the disk",
            f"Finish it first: promoter job resume {other.id}",
        )
    return _next(record, Step.WORK, stamp, operation=operation, alternate=alternate)


def work_done(record: LeaseRecord, host: str, operation: str, stamp: Stamp) -> LeaseRecord:
    """The operation is over, whichever file it has left in the disk's place."""
    _expect(_is_host(record.owner, host), "only its owner works on it")
    mine = record.operation is not None and record.operation.id == operation
    _expect(mine, f"operation {operation} does not work on it")
    return _next(record, Step.WORK_DONE, stamp)


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
    over = {"note": "", "operation": None, "alternate": None}
    return replace(record, **{**over, **changes, **place})


def _work_on(record: LeaseRecord) -> dict[str, Any]:
    return {"operation": record.operation, "alternate": record.alternate}


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Illegal(f"the lease stays as it is: {otherwise}")


def _expect_closed(closed: Closed) -> None:
    _expect(closed.node_gone, "the guest still has the disk")
    _expect(closed.locks_free, "QEMU's lock bytes are not free")
    _expect(closed.idle, "an operation works on it")


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
    Verdict.OPERATOR: "its owner is alive and does not have it open: ask its operator",
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
        wait = holding.at_least - holding.held_for
        answered = say(Said.BUSY, "it has only just come here", retry_after=wait)
    else:
        answered = say(Said.ACCEPTED)
    return answered


def first_in_queue(requests: Sequence[Request], epoch: int) -> Request | None:
    """Who comes next: the first, in the order of their tickets, that asks for this epoch."""
    return next((request for request in requests if request.epoch == epoch), None)
