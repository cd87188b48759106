"""How a host comes by a lease, and how it lets go when nothing has the disk open.

Each act reads, asks the rules, writes if the epoch is still the same, and else begins anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from promoter.errors import Cancelled, LeaseHeld, Refused
from promoter.lease import rules
from promoter.lease.bell import Bell
from promoter.lease.credentials import Credentials
from promoter.lease.file import WATCH_EVERY, LeaseFile
from promoter.lease.host import Host, new_request_id, new_stamp
from promoter.lease.liveness import Clock, Observer, boot_clock, fence, lock_on, storage_of
from promoter.lease.record import Answer, Grant, LeaseRecord, Owner, Request, Said, Stamp, State
from promoter.lease.rules import Closed, Evidence, Illegal, Lock, Unsettled
from promoter.lease.store import Asked, CouldNotTell

LOOK_EVERY = 0.5
ANSWER_EVERY = 0.1
SHORT = 3.0
"""Seconds for which a busy disk is waited for, though it was only asked for."""
Heard = Callable[[Answer], None]


def _ignore(_: Answer) -> None:
    pass


class Acquisition:
    """One host's way to one disk: it claims what is free and asks for what is not."""

    def __init__(
        self,
        store: LeaseFile,
        host: Host,
        owner: Owner,
        *,
        credentials: Credentials | None = None,
        heard: Heard = _ignore,
        clock: Clock = boot_clock,
        borrow: bool = False,
    ) -> None:
        """``borrow``: a disk that is only lent will do."""
        self.store, self.host, self.owner = store, host, owner
        self._borrow = borrow
        self._heard, self._clock = heard, clock
        self._asking = Asking(store, host, credentials)
        self._observer = Observer(store, store.disk, clock)
        self._answer: Answer | None = None
        self._patient_until = 0.0
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Have `run`, in another thread, raise `Cancelled` soon."""
        self._cancelled.set()

    def run(self, timeout: float) -> LeaseRecord:
        """The record under which the disk is the owner's, within ``timeout`` seconds.

        Raises `LeaseHeld` when the disk stays another's, and `Refused` when it is open outside
        of any lease.
        """
        deadline = self._clock() + timeout
        try:
            while not self._cancelled.is_set():
                record = self.store.read()
                if (mine := self.attempt(record)) is not None:
                    return mine
                assert record is not None, "what has no lease can be claimed"
                self._ask(record)
                left = deadline - self._clock()
                if left <= 0:
                    raise self._held(record)
                self._asking.wait(record.epoch, min(LOOK_EVERY, left))
            raise Cancelled("cancelled while waiting for a disk", "Its lease is as it was.")
        finally:
            self._asking.withdraw()

    def attempt(self, record: LeaseRecord | None) -> LeaseRecord | None:
        """Claim it if the rules allow that now; the record that is ours then."""
        if record and self._is_mine(record):
            return record
        claimed = self._claimed(record)
        if claimed is None:
            return None
        if lock_on(self.store.disk) is Lock.HELD:
            raise Refused(
                f"{self.store.disk} is free by its lease, but a QEMU has it open",
                "It was started outside of promoter's leases. Stop it first.",
            )
        if not self.store.compare_and_swap(record.epoch if record else 0, claimed):
            return None
        newest = self.store.read()
        if newest is None or newest.nonce != claimed.nonce:
            raise CouldNotTell(f"{self.store.disk} was claimed and is another's", "Try again.")
        if newest.lender and not self._borrow:
            let_go(self.store, self.host)
            raise only_lent(self.store, newest.lender)
        return newest

    def _is_mine(self, record: LeaseRecord) -> bool:
        return record.state is State.HELD and record.owner == self.owner

    def _claimed(self, record: LeaseRecord | None) -> LeaseRecord | None:
        """The record that the rules allow now."""
        try:
            return self._next(record, new_stamp())
        except Unsettled:  # it does not pass by itself
            raise
        except Illegal:
            return None

    def _next(self, record: LeaseRecord | None, stamp: Stamp) -> LeaseRecord:
        if record is None:
            return rules.create(self.store.identity(stamp.nonce), self.owner, stamp)
        unchanged = self._observer.unchanged(record)
        waited = record.lender is not None and self.host.lives(record.lender)
        if record.state in (State.FREE, State.LOANED):
            return rules.claim(record, self.owner, stamp, unchanged=unchanged, lender_lives=waited)
        evidence = self._observer.evidence(record)
        if record.owner and record.owner.host == self.host.name:
            alive = self.host.lives(record.owner) or self.host.works(record)
            return rules.resume(record, self.owner, stamp, process_alive=alive, lock=evidence.lock)
        return rules.take_over(record, self.owner, evidence, stamp, lender_lives=waited)

    def _ask(self, record: LeaseRecord) -> None:
        """Hear what the owner says, and ask whoever holds the disk now."""
        answer = self._asking.answer()
        if answer and answer != self._answer:
            self._answer = answer
            self._heard(answer)
            self._patient_until = self._clock() + (answer.retry_after or 0)
        if answer and answer.said is Said.REFUSED:
            raise self._held(record)
        may_ask = record.epoch != self._asking.epoch and self._clock() >= self._patient_until
        if record.state is State.HELD and may_ask:
            self._asking.ask(record)

    def _held(self, record: LeaseRecord) -> LeaseHeld:
        return held(self.store, record, self._observer.evidence(record), self._answer)


class Asking:
    """A place in a disk's queue, signed where this host has a certificate; and its owner's agent
    is told of it, where it has one.
    """

    def __init__(self, store: LeaseFile, host: Host, credentials: Credentials | None) -> None:
        self._store, self._host, self._credentials = store, host, credentials
        self._bell = Bell(credentials, store.ledger) if credentials else None
        self._asked: Asked | None = None

    @property
    def epoch(self) -> int:
        """What was asked for last; 0: nothing."""
        return self._asked.request.epoch if self._asked else 0

    def ask(self, record: LeaseRecord) -> None:
        """Ask the owner of the disk, at the same place in the queue."""
        me = self._host.owner(process=os.getpid())
        request = Request(new_request_id(), record.epoch, me, new_stamp().wall)
        if self._credentials:
            request = self._credentials.sign(request, record.disk.uuid)
        if self._asked:
            self._asked = replace(self._asked, request=request)
            self._store.renew(self._asked)
        else:
            withdraw_orphans(self._store, self._host)
            self._asked = Asked(self._store.ask(request), request)
        if self._store.ledger:
            self._store.ledger.asked(self._store.disk, record, request)
        if self._bell and record.owner:
            self._bell.ring(record.owner, record.disk.uuid, request)

    def answer(self) -> Answer | None:
        """What the owner has answered so far."""
        return self._store.answer_to(self._asked) if self._asked else None

    def wait(self, epoch: int, timeout: float) -> None:
        """Until there may be news: an answer, or an epoch after ``epoch``."""
        if self._bell and self._bell.rings:
            self._bell.wait(min(timeout, WATCH_EVERY))
        else:
            self._store.watch(epoch, timeout)

    def withdraw(self) -> None:
        """Leave the queue."""
        if self._asked:
            self._store.withdraw(self._asked.ticket)


def withdraw_orphans(store: LeaseFile, host: Host) -> None:
    """Take away what processes of this host asked for that are gone."""
    for asked in store.requests():
        requester = asked.request.requester
        if requester.host == host.name and not host.lives(requester):
            store.withdraw(asked.ticket)


def request(
    store: LeaseFile, host: Host, credentials: Credentials | None, timeout: float, heard: Heard
) -> LeaseRecord:
    """Ask a disk's owner to let go, and wait ``timeout`` seconds for it; the free lease.

    Raises `LeaseHeld` when the disk stays its owner's.
    """
    record = _existing(store)
    if record.owner is None:
        return record
    asking = Asking(store, host, credentials)
    try:
        asking.ask(record)
        answer = _final_answer(asking, timeout, heard)
    finally:
        asking.withdraw()
    now = _existing(store)
    if answer is None or answer.said is not Said.RELEASED:
        raise held(store, now, Observer(store, store.disk).evidence(now), answer)
    return now


def _final_answer(asking: Asking, timeout: float, heard: Heard) -> Answer | None:
    last: Answer | None = None
    end = deadline = boot_clock() + timeout
    while boot_clock() < end:
        answer = asking.answer()
        if answer and answer != last:
            last = answer
            heard(answer)
            soon = boot_clock() + (answer.retry_after or 0) + 1
            end = min(deadline, soon) if _is_soon_free(answer) else deadline
        if answer and answer.said is not Said.ACCEPTED and not _is_soon_free(answer):
            return answer
        asking.wait(asking.epoch + 1, ANSWER_EVERY)
    return last


def _is_soon_free(answer: Answer) -> bool:
    """Its owner judges it again by itself."""
    return answer.said is Said.BUSY and (answer.retry_after or 0) <= SHORT


def held(
    store: LeaseFile, record: LeaseRecord, evidence: Evidence, answer: Answer | None
) -> LeaseHeld:
    """Why the disk cannot be had."""
    said = f"it answered {answer.said}: {answer.why}" if answer else "it did not answer"
    if record.grant and not record.owner:
        who = f"promised to host {record.grant.host}"
    else:
        who = f"held by {describe(record.owner)}; {said}"
    found = rules.verdict(evidence)
    changing = found is rules.Verdict.TAKE and record.alternate
    why = rules.CHANGING if changing else rules.EXPLAINED[found]
    hint = f"Of its owner: {why}. See: promoter lease show {store.disk}"
    if evidence.lock is Lock.FREE and record.owner and answer is None:
        words = f"{store.disk} --epoch {record.epoch} --reason WHY"
        hint += f". If that host is off for good: promoter lease break {words}"
    return LeaseHeld(f"{store.disk} is {who}", hint)


def describe(owner: Owner | None) -> str:
    """An owner for people."""
    if owner is None:
        return "nobody"
    guest = f" for {owner.guest}" if owner.guest else ""
    process = f", process {owner.pid}" if owner.pid else ""
    return f"host {owner.host}{process}{guest}"


def let_go(
    store: LeaseFile, host: Host, *, node_gone: bool = True, here: bool = False
) -> LeaseRecord:
    """Mark a disk of ours free, when it is proved closed, for the first who waits for it.

    ``here``: it is this file that was the disk. Raises `Illegal` when it is not ours, or not
    closed.
    """
    while True:
        record = _existing(store)
        locks_free = lock_on(store.disk) is Lock.FREE
        closed = Closed(node_gone, locks_free, idle=not host.works(record), here=here)
        grant = _grant(store, record)
        freed = rules.free(record, host.name, closed, new_stamp(), grant)
        if store.compare_and_swap(record.epoch, freed):
            return freed


def lend(store: LeaseFile, host: Host, *, node_gone: bool) -> LeaseRecord:
    """Mark a disk of ours lent, when it is proved closed, to the host that asked for it.

    Raises `Illegal` when it is not closed, and `Refused` when nobody asks any more.
    """
    while True:
        record = _existing(store)
        if (grant := _grant(store, record)) is None:
            raise Refused("nobody waits for it any more", "It stays with its guest.")
        locks_free, idle = lock_on(store.disk) is Lock.FREE, not host.works(record)
        closed = Closed(node_gone, locks_free, idle, here=True)
        lent = rules.lend(record, host.name, closed, grant, new_stamp())
        if store.compare_and_swap(record.epoch, lent):
            return lent


def follow(store: LeaseFile, host: Host, *, gone: bool) -> LeaseFile | None:
    """The lease of a disk of ours where an operation has moved it; None: it is where it was.

    ``gone``: the guest's disk is seen not to be this file any more, even if it is still there.
    """
    record = store.read_any()
    if record is None or record.elsewhere is None:
        return None
    if record.owner:
        if (store.is_there and not gone) or host.works(record):
            return None
        if not store.compare_and_swap(record.epoch, rules.moved(record, host.name, new_stamp())):
            return None
    return LeaseFile(Path(record.elsewhere), store.ledger)


def only_lent(store: LeaseFile, lender: Owner) -> Refused:
    """Why no guest may be run on a borrowed disk."""
    return Refused(
        f"{store.disk} is only lent, by {describe(lender)}: its guest waits for the same bytes",
        "Read it, commit it or flatten it under: promoter run --borrow, or promoter lease acquire."
        " It was given back.",
    )


def _grant(store: LeaseFile, record: LeaseRecord) -> Grant | None:
    asked = store.requests()
    served = next((a.request for a in asked if a.request.id == record.request), None)
    first = served or rules.first_in_queue([a.request for a in asked], record.epoch)
    return Grant(first.requester.host, first.id, rules.GRANT_SECONDS) if first else None


def release(store: LeaseFile, host: Host) -> LeaseRecord:
    """Let go of a disk that no process holds any more."""
    record = _existing(store)
    if record.owner and host.lives(record.owner):
        raise Refused(
            f"{store.disk} is held by {describe(record.owner)}, which runs",
            f"End it, or ask it: promoter lease request {store.disk}",
        )
    return let_go(store, host)


def break_lease(
    store: LeaseFile, epoch: int, reason: str, host: Host, state: Path
) -> tuple[LeaseRecord, bool]:
    """An operator takes the lease from its owner; and was that host fenced?

    Refused while a QEMU has the disk open, whatever the operator says.
    """
    record = store.read_any()
    if record is None:
        raise Refused(f"{store.disk} has no lease", "There is nothing to break.")
    rules.break_lease(record, epoch, Lock.FREE, reason, new_stamp())  # before anything is fenced
    if host.works(record):
        raise Illegal(f"the lease of {store.disk} stays as it is: an operation works on the disk")
    owner = record.responsible
    other = owner is not None and owner.host != host.name
    fenced = bool(owner and other and fence(state, owner.host, store.disk, epoch))
    note = f"{reason} (by host {host.name}, {'fenced' if fenced else 'not fenced'})"
    broken = rules.break_lease(record, epoch, lock_on(store.disk), note, new_stamp())
    broken = rules.repin(broken, store.identity(record.disk.uuid))
    if not store.compare_and_swap(epoch, broken):
        raise Illegal(f"the lease of {store.disk} has moved on", "Look at it again.")
    return broken, fenced


def _existing(store: LeaseFile) -> LeaseRecord:
    record = store.read()
    if record is None:
        raise Refused(f"{store.disk} has no lease", f"See: promoter lease acquire {store.disk}")
    return record


def look(store: LeaseFile) -> tuple[LeaseRecord | None, Lock, str, int]:
    """The record, the image lock, the kind of storage, and how many wait."""
    return (
        store.read_any(),
        lock_on(store.disk) if store.is_there else Lock.FREE,
        storage_of(store.disk),
        len(store.requests()),
    )
