"""Every interleaving of three hosts over one lease, with the real rules of `lease/rules.py`.

A world is the newest record and what each host is: well, stalled (its agent stands still, its
QEMU goes on), cut off from the storage, or dead; what it has read, perhaps long ago; what it
believes; whether its QEMU has the disk open, and whether the storage still has its lock. On
network storage being cut off takes the lock away from a QEMU that may write on: the worst that
can be. An operation may put another file in the disk's place, also after its guest has died, which
is as good as writing: whoever has the old file open loses what it writes. A guest whose disk is
lent waits for it; meanwhile a borrower may write, since it leaves the same bytes, but nobody else,
until an operator breaks the loan; then that guest never has the disk again. Beside a guest that
waits, another process of its host may want the disk. `explore` looks for a move after which two
hosts write, or which robs or misleads a guest that waits. A guard is a rule or a habit that can be
left out, to see whether the search would notice.

One thing is taken for granted: that nobody opens a disk under a claim that is out of date while
an operation of its new owner's, whose guest has died, is about to rename, while its new owner's
guest has lent it and waits, or for a guest that waited. No image lock is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from functools import cache
from itertools import product
from typing import Generic, NamedTuple, TypeVar

from promoter.lease import rules
from promoter.lease.record import DiskIdentity, Grant, LeaseRecord, Operation, Owner, Stamp
from promoter.lease.rules import Beat, Closed, Evidence, Illegal, Lock, Storage, Verdict

HOSTS = range(3)
Value = TypeVar("Value")
CLOSED = Closed(node_gone=True, locks_free=True)


class Guard(Enum):
    """What can be left out. From EVIDENCE_OF_EPOCH to NETWORK_IS_FENCED, and from BACK_TO_LENDER
    on, they are in the rules' own code; the model calls them with a lie there, changes what they
    said, or gives them a table in which the verdict is another.
    """

    ATOMIC_CLAIM = "a record is written only if the epoch is still the one that was read"
    OPEN_AFTER_CLAIM = "a disk is opened only under a claim of one's own"
    IMAGE_LOCK = "a disk is opened with QEMU's image lock"
    RESUME_IS_AN_EPOCH = "a host that comes back takes a new epoch"
    MARK_AFTER_CLOSE = "a disk is marked free only when it is proved closed"
    OWNER_FREES = "nobody but the owner marks a disk free"
    FREE_WHEN_IDLE = "a disk is not marked free while an operation works on it"
    WORK_IS_FENCED = "what may still get another file is taken only from a host that was fenced"
    EVIDENCE_OF_EPOCH = "what was seen of one epoch says nothing of another"
    MOVING_IS_ALIVE = "nothing is taken from a host whose heart beats"
    LOCKED_IS_OPEN = "nothing is taken that a QEMU has open"
    NETWORK_IS_FENCED = "on network storage silence does not suffice"
    BORROWED_IS_NOT_OWNED = "no guest is started on a disk that is only lent"
    LEASE_NAMES_WHO_WAITS = "a guest has its disk again only by a lease that names it as lender"
    BACK_TO_LENDER = "a borrower gives the disk back to its lender alone"
    LENDER_TAKES = "from a borrower that is silent only the lender takes it"
    LENDER_WAITS = "a lender's host gives the disk to no other while its guest waits"


LOANS = tuple(Guard)[tuple(Guard).index(Guard.BORROWED_IS_NOT_OWNED) :]


class Condition(IntEnum):
    WELL = 0
    STALLED = 1
    CUT = 2
    DEAD = 3


class Waits(IntEnum):
    """Does a guest here wait for a disk that it has lent? BROKEN: in vain."""

    NO = 0
    YES = 1
    BROKEN = 2


class Host(NamedTuple):
    """`view` is the number of a record that it once read, `evidence` that of what it has seen
    of that record's owner, if it lets the disk be taken; `claimed`: it thinks the disk its own;
    `working`: an operation of its own is about to put another file there; `borrowed`: what it
    claimed was lent; `other`: who claimed it is not the process whose guest waits.
    """

    boot: int = 0
    condition: Condition = Condition.WELL
    view: int = 0
    evidence: int = 0
    claimed: bool = False
    open: bool = False
    lock: bool = False
    working: bool = False
    borrowed: bool = False
    waits: Waits = Waits.NO
    other: bool = False


class World(NamedTuple):
    """`record` is the number of the newest record, 0 for none; `faults` may still happen."""

    record: int
    faults: int
    hosts: tuple[Host, ...]


class Around(NamedTuple):
    """What a host's next moves depend on besides itself."""

    record: int
    locked: bool  # by others
    open: bool  # by others
    well: tuple[bool, ...]
    waited_for: bool  # by others


class Move(NamedTuple):
    """What a host does: it becomes `host`, writes `record`, costs a fault, kills another; `breaks`:
    guests wait in vain from then on; `wrong`: that must never be.
    """

    name: str
    host: Host
    record: int
    faults: int = 0
    kills: int | None = None
    breaks: bool = False
    wrong: bool = False


@dataclass(frozen=True)
class Found:
    """How a search ended: the moves to what must never be, if there are such."""

    worlds: int
    moves: tuple[str, ...] | None


def explore(
    storage: Storage,
    without: Guard | None = None,
    *,
    faults: int,
    epochs: int,
    most: int,
    lent: bool = False,
) -> Found:
    """Breadth first, until what must never be is there or there is nothing new. It begins without
    a lease, or with a disk that the first host has ``lent``; ``epochs`` are written from there on.

    Raises AssertionError after ``most`` worlds: then the bounds are too wide, and nothing is
    proved.
    """
    model = Model(storage, without, epochs)
    first = World(0, faults, (Host(),) * len(HOSTS))
    if lent:
        first = model.lent(first)
    came: dict[World, tuple[str, World] | None] = {first: None}
    todo = deque([first])
    while todo:
        world = todo.popleft()
        for name, after, wrong in model.moves(world):
            if wrong:
                return Found(len(came), (*way_to(world, came), name))
            if after in came:
                continue
            came[after] = (name, world)
            todo.append(after)
            if sum(host.open for host in after.hosts) > 1:
                return Found(len(came), tuple(way_to(after, came)))
        assert len(came) <= most, f"more than {most} worlds"
    return Found(len(came), None)


def way_to(world: World, came: dict[World, tuple[str, World] | None]) -> list[str]:
    names: list[str] = []
    while (step := came[world]) is not None:
        name, world = step
        names.insert(0, name)
    return names


@cache
def owner(number: int, boot: int, pid: int | None = None) -> Owner:
    return Owner(f"host{number}", f"boot{boot}", pid)


class Table(Generic[Value]):
    """Values by number, so that a world is made of numbers; 0 is none."""

    def __init__(self) -> None:
        self.values: list[Value | None] = [None]
        self.numbers: dict[Value, int] = {}

    def number(self, value: Value | None) -> int:
        if value is None:
            return 0
        if value not in self.numbers:
            self.numbers[value] = len(self.values)
            self.values.append(value)
        return self.numbers[value]


class Model:
    """The moves there are; `without` is the guard that is left out."""

    def __init__(self, storage: Storage, without: Guard | None, epochs: int) -> None:
        self.storage, self.without, self.epochs = storage, without, epochs
        self.records: Table[LeaseRecord] = Table()
        self.evidences: Table[Evidence] = Table()
        self.cached: dict[tuple[int, Host, Around], list[Move]] = {}

    def lent(self, world: World) -> World:
        """The first host has the disk, lends it to the next, and its guest waits."""
        me = owner(0, 0)
        held = rules.create(DiskIdentity("disk", 1, 1), me, stamp(me))
        releasing = rules.release(held, me.host, "request", stamp(me))
        borrower = Grant(owner(1, 0).host, "request", 30)
        record = rules.lend(releasing, me.host, CLOSED, borrower, stamp(me))
        number = self.records.number(record)
        self.epochs += record.epoch
        lender = Host(view=number, waits=Waits.YES)
        return World(number, world.faults, (lender, *world.hosts[1:]))

    def moves(self, world: World) -> Iterator[tuple[str, World, bool]]:
        well = tuple(host.condition is Condition.WELL for host in world.hosts)
        for number, host in enumerate(world.hosts):
            locked = any(h.lock for other, h in enumerate(world.hosts) if other != number)
            others = any(h.open for other, h in enumerate(world.hosts) if other != number)
            waited = any(
                h.waits is Waits.YES for other, h in enumerate(world.hosts) if other != number
            )
            key = (number, host, Around(world.record, locked, others, well, waited))
            if key not in self.cached:
                self.cached[key] = list(self.moves_of(*key))
            for move in self.cached[key]:
                if move.faults <= world.faults:
                    yield f"{number} {move.name}", after(world, number, move), move.wrong

    def moves_of(self, number: int, host: Host, around: Around) -> Iterator[Move]:
        record = around.record
        match host.condition:
            case Condition.WELL:
                yield from self.agents_moves(number, host, around)
                yield from self.faults(number, host, record)
            case Condition.STALLED | Condition.CUT:
                yield Move("recovers", host._replace(condition=Condition.WELL), record)
            case Condition.DEAD:
                yield Move("boots", Host(boot=host.boot + 1), record)
        if host.open:
            yield Move("closes", host._replace(open=False, lock=False), record)
        if host.waits:
            yield Move("ends its guest", host._replace(waits=Waits.NO), record)

    def faults(self, number: int, host: Host, record: int) -> Iterator[Move]:
        yield Move("dies", dead(host), record, faults=1)
        yield Move("stalls", host._replace(condition=Condition.STALLED), record, faults=1)
        if self.storage is Storage.NETWORK:
            cut = host._replace(condition=Condition.CUT, lock=False)
            yield Move("is cut off", cut, record, faults=1)

    def agents_moves(self, number: int, host: Host, around: Around) -> Iterator[Move]:
        record = around.record
        if host.view != record:
            kept = host.evidence if self.without is Guard.EVIDENCE_OF_EPOCH else 0
            yield Move("reads", host._replace(view=record, evidence=kept), record)
        may = host.claimed or self.without is Guard.OPEN_AFTER_CLAIM
        unlocked = not around.locked or self.without is Guard.IMAGE_LOCK
        newest = self.records.values[record]
        theirs = newest and newest.owner and newest.owner.host != owner(number, 0).host
        unlocked &= not (newest and newest.alternate and theirs)
        outdated = newest is None or newest.owner is None or bool(theirs)
        lent = newest is not None and newest.lender is not None
        unlocked &= not (outdated and (lent or (host.waits and not host.other)))
        if may and not host.open and unlocked:
            yield self.opens(host, around)
        if host.working:
            yield Move(
                "renames", host._replace(working=False, open=host.open or around.open), record
            )
        yield from self.looks(number, host, around)
        yield from self.writes(number, host, around)

    def opens(self, host: Host, around: Around) -> Move:
        """It writes then, and what it writes is its own unless it borrows."""
        again = bool(host.waits) and not host.other
        borrows = host.borrowed and self.without is not Guard.BORROWED_IS_NOT_OWNED
        robs = not borrows and (around.waited_for or (host.waits is Waits.YES and host.other))
        opened = host._replace(open=True, lock=not around.locked)
        if again:
            opened = opened._replace(waits=Waits.NO)
        misled = again and host.waits is Waits.BROKEN
        return Move("opens", opened, around.record, wrong=robs or misled)

    def looks(self, number: int, host: Host, around: Around) -> Iterator[Move]:
        """At the heartbeat and the lock of whom it believes to be the owner, or fences it."""
        view = self.records.values[host.view]
        if view is None or view.owner is None or view.owner.host == owner(number, 0).host:
            return
        other = int(view.owner.host[-1])
        beat = Beat.MOVING if around.well[other] else Beat.STOPPED
        lock = Lock.HELD if around.locked or host.lock else Lock.FREE
        before = self.evidences.values[host.evidence]
        fenced = bool(before and before.fenced)
        seen = Evidence(view.epoch, beat, lock, self.storage, fenced)
        if rules.verdict(seen) is Verdict.TAKE:
            number_of_it = self.evidences.number(seen)
            yield Move(f"looks at {other}", host._replace(evidence=number_of_it), around.record)
        if not around.well[other] and self.storage is Storage.NETWORK and not fenced:
            known = self.evidences.number(replace(seen, fenced=True))
            fencing = host._replace(evidence=known)
            yield Move(f"fences {other}", fencing, around.record, kills=other)

    def writes(self, number: int, host: Host, around: Around) -> Iterator[Move]:
        stale = host.view != around.record and self.without is not Guard.ATOMIC_CLAIM
        view = self.records.values[host.view]
        if stale or (view is not None and view.epoch >= self.epochs):
            return
        lock = Lock.HELD if around.locked or host.lock else Lock.FREE
        if lock is Lock.FREE and view and view.lender and view.owner is None:
            broken = rules.break_lease(view, view.epoch, lock, "lost", stamp(owner(number, 0)))
            seen = host._replace(view=self.records.number(broken), evidence=0)
            yield Move("breaks the loan", seen, seen.view, faults=1, breaks=True)
        for step, me in product(STEPS, processes(number, host)):
            if step is create and not around.record and number:
                continue  # the hosts are alike: call the first to write 0
            again = bool(host.waits) and me.pid is None and step in TAKING
            named = view is not None and view.lender == me
            if again and not named and self.without is not Guard.LEASE_NAMES_WHO_WAITS:
                continue
            try:
                written = step(view, me, host, lock, self)
            except Illegal:
                continue
            if written is None:
                continue
            if step is resume and self.without is Guard.RESUME_IS_AN_EPOCH:
                yield Move("goes on", host._replace(claimed=True), around.record)
                continue
            new = self.records.number(written)
            mine = written.owner is not None
            working = written.operation is not None and mine
            after = host._replace(
                view=new,
                evidence=0,
                claimed=mine,
                borrowed=mine and written.lender is not None,
                other=written.owner is not None and written.owner.pid is not None,
            )
            if step is lend:
                after = after._replace(waits=Waits.YES)
            if step in (announce, leave):
                after = after._replace(working=working)
            taken = step is take_over and view is not None and view.lender is None
            yield Move(step.__name__, after, new, breaks=taken)


def after(world: World, number: int, move: Move) -> World:
    hosts = list(world.hosts)
    hosts[number] = move.host
    if move.kills is not None:
        hosts[move.kills] = dead(hosts[move.kills])
    if move.breaks:
        hosts = [host._replace(waits=Waits.BROKEN if host.waits else Waits.NO) for host in hosts]
    return World(move.record, world.faults - move.faults, tuple(hosts))


def dead(host: Host) -> Host:
    return Host(boot=host.boot, condition=Condition.DEAD)


def processes(number: int, host: Host) -> list[Owner]:
    """Those of a host that may take a step; the other is there only beside a guest that waits."""
    first, other = owner(number, host.boot), owner(number, host.boot, 2)
    if host.other:
        return [other]
    return [first, other] if host.waits else [first]


Write = Callable[[LeaseRecord | None, Owner, Host, Lock, Model], LeaseRecord | None]


def stamp(me: Owner) -> Stamp:
    return Stamp(f"{me.host}-{me.boot}", "")


def create(
    view: LeaseRecord | None, me: Owner, _: Host, __: Lock, ___: Model
) -> LeaseRecord | None:
    return None if view else rules.create(DiskIdentity("disk", 1, 1), me, stamp(me))


def claim(
    view: LeaseRecord | None, me: Owner, host: Host, _: Lock, model: Model
) -> LeaseRecord | None:
    lives = waited_for(host, model)
    return rules.claim(view, me, stamp(me), lender_lives=lives) if view else None


def claim_late(
    view: LeaseRecord | None, me: Owner, host: Host, _: Lock, model: Model
) -> LeaseRecord | None:
    """When what was promised to another has lapsed."""
    if view is None or not view.grant:
        return None
    lives = waited_for(host, model)
    return rules.claim(view, me, stamp(me), unchanged=1e6, lender_lives=lives)


def waited_for(host: Host, model: Model) -> bool:
    return host.waits is not Waits.NO and model.without is not Guard.LENDER_WAITS


def lend(view: LeaseRecord | None, me: Owner, host: Host, _: Lock, __: Model) -> LeaseRecord | None:
    """To the next host, with a guest that waits."""
    if view is None or host.open:
        return None
    borrower = owner((int(me.host[-1]) + 1) % len(HOSTS), 0).host
    return rules.lend(view, me.host, CLOSED, Grant(borrower, "request", 30), stamp(me))


def resume(
    view: LeaseRecord | None, me: Owner, host: Host, lock: Lock, _: Model
) -> LeaseRecord | None:
    alive = host.claimed
    return rules.resume(view, me, stamp(me), process_alive=alive, lock=lock) if view else None


def release(
    view: LeaseRecord | None, me: Owner, _: Host, __: Lock, ___: Model
) -> LeaseRecord | None:
    return rules.release(view, me.host, "request", stamp(me)) if view else None


def roll_back(
    view: LeaseRecord | None, me: Owner, _: Host, __: Lock, ___: Model
) -> LeaseRecord | None:
    return rules.roll_back(view, me.host, stamp(me)) if view else None


def free(
    view: LeaseRecord | None, me: Owner, host: Host, _: Lock, model: Model
) -> LeaseRecord | None:
    if view is None or (host.waits and not host.other):  # its guest has it first, or ends
        return None
    by = view.owner if model.without is Guard.OWNER_FREES and view.owner else me
    idle = not host.working or model.without is Guard.FREE_WHEN_IDLE
    closed = replace(CLOSED, idle=idle)
    if host.open and model.without is not Guard.MARK_AFTER_CLOSE:
        closed = Closed(node_gone=False, locks_free=False)
    freed = rules.free(view, by.host, closed, stamp(me))
    if model.without is Guard.BACK_TO_LENDER:
        return replace(freed, lender=None, grant=None)
    return freed


def take_over(
    view: LeaseRecord | None, me: Owner, host: Host, _: Lock, model: Model
) -> LeaseRecord | None:
    evidence = model.evidences.values[host.evidence]
    if view is None or evidence is None:
        return None
    if model.without is Guard.EVIDENCE_OF_EPOCH:
        evidence = replace(evidence, epoch=view.epoch)
    if model.without is Guard.WORK_IS_FENCED:
        view = replace(view, alternate=None)
    if model.without is Guard.LENDER_TAKES:
        view = replace(view, lender=None)
    lives = waited_for(host, model)
    return rules.take_over(view, me, evidence, stamp(me), lender_lives=lives)


def announce(
    view: LeaseRecord | None, me: Owner, host: Host, _: Lock, __: Model
) -> LeaseRecord | None:
    """An operation of the guest that has the disk is about to put another file there."""
    if view is None or not host.open or view.operation:
        return None
    operation = Operation(f"work-of-{me.host}", "promote", "lock")
    return rules.work(view, me.host, operation, stamp(me), DiskIdentity("disk", 1, 2))


def leave(view: LeaseRecord | None, me: Owner, _: Host, __: Lock, ___: Model) -> LeaseRecord | None:
    """The operation is over, whether it has put a file there or not."""
    return rules.work_done(view, me.host, f"work-of-{me.host}", stamp(me)) if view else None


STEPS: tuple[Write, ...] = (
    create,
    claim,
    claim_late,
    resume,
    release,
    roll_back,
    free,
    lend,
    take_over,
    announce,
    leave,
)
TAKING = (create, claim, claim_late, take_over)
