"""A command that runs under leases: ``promoter run``.

It claims the disks, runs the command, beats, answers release requests that it finds on the
storage (at once when the agent wakes it, by SIGURG), and frees the disks when the command has
ended and their locks are free. A disk that an operation has moved is served where it is then.
Trouble with the storage never ends the guest: the image lock protects the disk, and others only
wait. A disk that it has lent it claims again when the rules allow, for the guest that waits, as
long as the lease names this very process as its lender. When it sees that the lease of a disk is
its own no more, since an operator broke it, it kills its command.

Killed itself, it leaves its command running and the leases held; the next ``promoter run`` on
this host takes them up when nothing has the disks open.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, assert_never

from promoter.errors import Cancelled, Interrupted, LeaseHeld, PromoterError, Refused
from promoter.lease import claim, rules
from promoter.lease.claim import Acquisition, let_go
from promoter.lease.credentials import Credentials, Untrusted
from promoter.lease.file import LeaseFile
from promoter.lease.host import HELD_BY, Host, held_by, new_stamp
from promoter.lease.ledger import Ledger
from promoter.lease.liveness import BEAT_EVERY, Clock, Heartbeat, boot_clock, lock_on
from promoter.lease.readers import enter
from promoter.lease.record import Answer, LeaseRecord, Request, Said, State, Work
from promoter.lease.release import (
    DiskBusy,
    Loan,
    detach,
    lend,
    shut_down,
    take_back,
)
from promoter.lease.rules import Holding, Lock, Policy
from promoter.lease.store import Asked

ANSWER_EVERY = 0.25
PATIENCE = 120.0
"""Seconds for a guest to go down, or to give up a disk, when it is asked to."""
RETRY_AFTER = 5.0
HOLD_AT_LEAST = 2.0
"""Seconds for which a disk that has just come is not given away again."""
LOCKING_OFF = re.compile(r"\blocking\W{1,5}off\b")
OLD_EPOCHS = 16
FINAL = (Said.REFUSED, Said.RELEASED)
NEED_MONITOR = (Policy.SHUTDOWN, Policy.DETACH, Policy.LOAN)
Say = Callable[[str, Path, str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class RunSpec:
    """What to run, and how to let go of its disks. ``monitor`` is a QMP socket of its own;
    ``timeout`` is for each disk's owner to let go, in seconds. ``borrow``: disks that are only lent
    will do, since the command leaves the guest-visible bytes as they are.
    """

    disks: tuple[Path, ...]
    command: tuple[str, ...]
    policy: Policy
    monitor: Path | None
    timeout: float
    borrow: bool = False

    def check(self) -> None:
        """Raises `Refused` when the policy cannot be followed."""
        if LOCKING_OFF.search(" ".join(self.command)):
            raise Refused(
                "the command turns QEMU's image lock off",
                "The lock is what stops a guest that a lease cannot stop. Leave locking=off out.",
            )
        if self.policy in NEED_MONITOR and self.monitor is None:
            raise Refused(
                f"the policy {self.policy} needs the guest's monitor",
                "Give it: --qmp SOCKET, and to QEMU: -qmp unix:SOCKET,server=on,wait=off",
            )


class LeasedRun:
    """One run, from the first claim to the last disk freed."""

    def __init__(
        self,
        spec: RunSpec,
        host: Host,
        ledger: Ledger,
        credentials: Credentials | None,
        say: Say,
        clock: Clock = boot_clock,
    ) -> None:
        spec.check()
        self._clock = clock
        self.spec, self.host, self.say = spec, host, say
        self.ledger, self.credentials = ledger, credentials
        self.owner = host.owner(process=os.getpid(), guest=_guest_name(spec))
        stores = {store.disk: store for store in (LeaseFile(disk, ledger) for disk in spec.disks)}
        self.stores = [stores[disk] for disk in sorted(stores)]  # in one order everywhere
        pools = {store.hosts.path: store.hosts for store in self.stores}
        self.hearts = [Heartbeat(hosts, host) for hosts in pools.values()]
        self._acquisition: Acquisition | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._asked: asyncio.Queue[LeaseFile] = asyncio.Queue()
        self._going: set[LeaseFile] = set()
        self._held: list[LeaseFile] = []
        self._since: dict[LeaseFile, float] = {}
        self._lent: dict[LeaseFile, tuple[Loan, Acquisition]] = {}
        self._lending = asyncio.Lock()
        self._trouble: dict[LeaseFile, str] = {}
        self._lost: Path | None = None
        self._bells = {store: asyncio.Event() for store in self.stores}
        self._said: dict[str, Answer] = {}
        self._writing = threading.Lock()  # an answer and the record it is about go together

    async def run(self) -> int:
        """The command's exit code; 128 + n if signal n ended it."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._stop)
        self._loop.add_signal_handler(signal.SIGURG, self._wake)
        for heart in self.hearts:
            await asyncio.to_thread(heart.beat)
        beating = asyncio.create_task(self._beat(), name="heartbeat")
        try:
            await asyncio.to_thread(self._enter)
            for store in self.stores:
                await self._acquire(store)
                self._came(store)
            await asyncio.to_thread(self._expect_all)
            return await self._supervise()
        finally:
            await self._free()
            beating.cancel()
            for heart in self.hearts:
                heart.stop()

    def _stop(self) -> None:
        self._stopping = True
        if self._acquisition:
            self._acquisition.cancel()
        if self._process:
            with suppress(ProcessLookupError):
                self._process.terminate()

    def _wake(self) -> None:
        for bell in self._bells.values():
            bell.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_EVERY)
            for heart in self.hearts:
                await self._tolerantly(self.stores[0].disk, heart.beat)

    async def _tolerantly(self, disk: Path, act: Callable[[], object]) -> None:
        """Trouble is told and the guest goes on."""
        try:
            await asyncio.to_thread(act)
        except PromoterError as error:
            self.say("trouble", disk, error.message)

    def _alone(self, act: Callable[..., Result], *arguments: object) -> Result:
        with self._writing:
            return act(*arguments)

    async def _acquire(self, store: LeaseFile) -> None:
        heard = self._heard(store)
        self._acquisition = Acquisition(
            store,
            self.host,
            self.owner,
            credentials=self.credentials,
            heard=heard,
            clock=self._clock,
            borrow=self.spec.borrow,
        )
        record = await asyncio.to_thread(self._acquisition.run, self.spec.timeout)
        self.say("acquired", store.disk, f"epoch {record.epoch}")

    def _came(self, store: LeaseFile) -> None:
        self._held.append(store)
        self._since[store] = self._clock()

    def _expect_all(self) -> None:
        """Nothing was broken, or taken over, while others were waited for or we stood still."""
        for store in self.stores:
            record = store.read()
            if record is None or record.owner != self.owner:
                raise LeaseHeld(
                    f"{store.disk} was ours, and is another's before it was opened",
                    "Nothing was started. Look who has it: promoter lease show, and run it again.",
                )

    def _enter(self) -> None:
        for store in self.stores:
            for layer in enter(store.disk, self.host):
                self.say("reader", layer, f"{store.disk} reads through it")

    def _heard(self, store: LeaseFile) -> Callable[[Answer], None]:
        return lambda answer: self.say("answer", store.disk, f"{answer.said} {answer.why}".strip())

    async def _supervise(self) -> int:
        if self._stopping:
            raise Cancelled("cancelled before the command was run", "The disks are free again.")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.command, env=os.environ | {HELD_BY: held_by(self.owner)}
            )
        except OSError as error:
            raise Refused(
                f"cannot run {self.spec.command[0]}: {error.strerror}", "Nothing was started."
            ) from error
        if self.credentials:
            await asyncio.to_thread(self.credentials.load)
        async with asyncio.TaskGroup() as tasks:
            serving = [
                tasks.create_task(self._serve(store), name=f"requests for {store.disk}")
                for store in self.stores
            ]
            serving.append(tasks.create_task(self._let_go(self._process), name="letting go"))
            serving.append(tasks.create_task(self._watch(self._process), name="leases lost"))
            code = await self._process.wait()
            for task in serving:
                task.cancel()
        if self._lost:
            raise LeaseHeld(
                f"{self._lost} was taken from this host while it was open",
                "The command was killed. Look who has the disk: promoter lease show.",
            )
        return code if code >= 0 else 128 - code

    # --- leases lost ---

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Who comes back from a partition must write no more, whatever became of its locks."""
        while not self._lost:
            await asyncio.sleep(BEAT_EVERY)
            for store in tuple(self._held):
                look = partial(self._alone, self._look, store)
                await self._tolerantly(store.disk, look)
        with suppress(ProcessLookupError):
            process.kill()

    def _look(self, store: LeaseFile) -> None:
        record = store.read_any()
        if store in self._held and record and rules.is_lost(record, self.owner):
            self._held.remove(store)
            self._lost = store.disk
            self.say("lost", store.disk, "its lease is not ours any more")

    # --- release requests ---

    async def _serve(self, store: LeaseFile) -> None:
        bell = self._bells[store]
        while True:
            bell.clear()
            store = await self._followed(store)
            await self._tolerantly(store.disk, partial(self._alone, self._answer_all, store))
            await self._bring_back(store)
            with suppress(TimeoutError):  # wait_for could lose a cancellation (CPython issue 86296)
                async with asyncio.timeout(ANSWER_EVERY):
                    await bell.wait()

    async def _followed(self, store: LeaseFile) -> LeaseFile:
        """The disk's lease, which an operation may have moved with the disk."""
        moved: list[LeaseFile] = []
        await self._tolerantly(store.disk, partial(self._alone, self._follow, store, moved))
        if not moved:
            return store
        (there,) = moved
        heart = Heartbeat(there.hosts, self.host)
        self.hearts.append(heart)
        await self._tolerantly(there.disk, heart.beat)
        self.stores[self.stores.index(store)] = there
        self._held[self._held.index(store)] = there
        self._since[there] = self._since[store]
        self._bells[there] = self._bells[store]
        self.say("moved", store.disk, f"the disk is {there.disk}")
        return there

    def _follow(self, store: LeaseFile, moved: list[LeaseFile]) -> None:
        if store in self._held and (there := claim.follow(store, self.host, gone=False)):
            moved.append(there)

    def _answer_all(self, store: LeaseFile) -> None:
        waiting = store.requests()
        record = store.read() if waiting else None
        if record and record.state is State.RELEASING and record.owner == self.owner:
            self._go(store)  # it could not be told whether that was written
        for asked in waiting:
            before = self._said.get(asked.request.id)
            if record is None or (before and before.said in FINAL):
                continue
            if asked.request.epoch + OLD_EPOCHS < record.epoch:
                store.withdraw(asked.ticket)  # who waits asks again at every epoch
                continue
            answer = self._judge(store, record, asked.request)
            if answer.said is Said.NOT_OWNER:
                continue  # its owner's to answer
            if answer.said is Said.ACCEPTED and record.state is State.HELD:
                going = rules.release(record, self.host.name, asked.request.id, new_stamp())
                if not store.compare_and_swap(record.epoch, going):
                    return
                self.say("releasing", store.disk, f"to host {asked.request.requester.host}")
                self._go(store)
                record = going
            self._answer(store, asked, answer)

    def _go(self, store: LeaseFile) -> None:
        """Have the disk let go of, unless it is being."""
        if store not in self._going:
            self._going.add(store)
            self._loop.call_soon_threadsafe(self._asked.put_nowait, store)

    def _work(self, store: LeaseFile, record: LeaseRecord) -> Work | None:
        """What an operation does to the disk, as it said last, while it is at work."""
        if record.operation is None or not self.host.works(record):
            return None
        told = None
        with suppress(PromoterError):  # how far it is: for people
            told = store.told()
        if told and told.operation == record.operation.id:
            return told
        return Work(record.operation.id, f"{record.operation.kind} {record.operation.id}")

    def _judge(self, store: LeaseFile, record: LeaseRecord, request: Request) -> Answer:
        held_for = self._clock() - self._since.get(store, 0)
        work = self._work(store, record)
        holding = Holding(self.host.name, self.spec.policy, work, held_for, HOLD_AT_LEAST)
        answer = rules.answer(record, request, holding)
        if self.credentials is None or answer.said is Said.NOT_OWNER:
            return answer
        try:
            roles = self.credentials.roles_of(request, record.disk.uuid)
        except Untrusted as error:
            return Answer(request.id, Said.REFUSED, record.epoch, error.message[:1024])
        return rules.answer(record, request, holding, roles)

    def _answer(self, store: LeaseFile, asked: Asked, answer: Answer) -> None:
        if self._said.get(asked.request.id) != answer:
            if answer.said is Said.REFUSED:  # nobody hears of a refusal that is not in the log
                self.ledger.refused(
                    answer.why,
                    disk=str(store.disk),
                    host=asked.request.requester.host,
                    request=asked.request.id,
                )
            store.answer(asked.ticket, answer)
            self._said[asked.request.id] = answer

    async def _let_go(self, process: asyncio.subprocess.Process) -> None:
        """Whenever asked: give the disk, or end the guest, or keep the disk and say so."""
        while True:
            store = await self._asked.get()
            try:
                if not await asyncio.to_thread(self._is_releasing, store):
                    continue  # it was kept with another that could not be given
                async with asyncio.timeout(PATIENCE):
                    await self._close(store, process)
            except TimeoutError:
                why = f"the guest did not let go within {PATIENCE:g} s"
                await self._keep(store, Said.REFUSED, why)
            except DiskBusy as error:
                await self._keep(store, Said.BUSY, error.message)
            except PromoterError as error:
                await self._keep(store, Said.REFUSED, error.message)
            finally:
                self._going.discard(store)

    def _is_releasing(self, store: LeaseFile) -> bool:
        record = store.read()
        return record is not None and record.state is State.RELEASING

    async def _close(self, store: LeaseFile, process: asyncio.subprocess.Process) -> None:
        match self.spec.policy:
            case Policy.SHUTDOWN:
                assert self.spec.monitor, "checked"
                await shut_down(self.spec.monitor)
                await process.wait()
            case Policy.CLOSE:
                with suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()
            case Policy.DETACH:
                assert self.spec.monitor, "checked"
                gone = await detach(self.spec.monitor, store.disk)
                free = partial(self._free_one, store, node_gone=gone)
                await asyncio.to_thread(self._alone, free)
            case Policy.LOAN:
                await self._lend(store, self.spec.monitor)
            case Policy.NEVER:
                raise AssertionError(f"nothing is given by {self.spec.policy}")
            case other:
                assert_never(other)

    async def _keep(self, store: LeaseFile, said: Said, why: str) -> None:
        """The disk stays; with a guest that does not end, all of its disks do."""
        alone = self.spec.policy in (Policy.DETACH, Policy.LOAN)
        staying = [store] if alone else self._held
        for kept in staying:
            await self._tolerantly(kept.disk, partial(self._alone, self._keep_one, kept, said, why))
            self._bells[kept].set()

    def _keep_one(self, store: LeaseFile, said: Said, why: str) -> None:
        record = store.read()
        if record is None or record.state is not State.RELEASING:
            return
        self._answer_served(store, record, said, why)  # before: else it asks again at once
        kept = rules.roll_back(record, self.host.name, new_stamp())
        if store.compare_and_swap(record.epoch, kept):
            self.say("kept", store.disk, why)

    def _answer_served(
        self, store: LeaseFile, record: LeaseRecord, said: Said, why: str = ""
    ) -> None:
        for asked in store.requests():
            if asked.request.id == record.request:
                later = RETRY_AFTER if said is Said.BUSY else None
                answer = Answer(asked.request.id, said, record.epoch, why, later)
                self._answer(store, asked, answer)

    # --- loans ---

    async def _lend(self, store: LeaseFile, monitor: Path | None) -> None:
        """Have the guest wait for a disk that goes to another host. Where that fails and the disk
        is kept, `_bring_back` puts things right.
        """
        assert monitor, "checked"
        async with self._lending:
            record = await asyncio.to_thread(store.read)
            assert record and record.request, "it is releasing"
            begins = partial(self._begin_loan, store)
            gone = await lend(monitor, store.disk, record.request[:8], begins)
            marking = partial(self._lend_one, store, node_gone=gone)
            await asyncio.to_thread(self._alone, marking)

    def _begin_loan(self, store: LeaseFile, loan: Loan) -> None:
        back = Acquisition(store, self.host, self.owner, clock=self._clock)
        self._lent[store] = loan, back

    def _lend_one(self, store: LeaseFile, *, node_gone: bool) -> None:
        lent = claim.lend(store, self.host, node_gone=node_gone)
        assert lent.grant, "the rule saw to it"
        self._held.remove(store)
        self.say("lent", store.disk, f"epoch {lent.epoch} to host {lent.grant.host}")
        self._answer_served(store, lent, Said.RELEASED)

    async def _bring_back(self, store: LeaseFile) -> None:
        """Claim a disk that was lent when it may be, and give it to the guest that waits."""
        if store in self._lent:
            async with self._lending:
                await self._return(store, *self._lent[store])

    async def _return(self, store: LeaseFile, loan: Loan, back: Acquisition) -> None:
        try:
            if not await asyncio.to_thread(self._alone, self._claim_back, store, back):
                return
            assert self.spec.monitor, "checked"
            await take_back(self.spec.monitor, loan)
        except PromoterError as error:
            if self._trouble.get(store) != error.message:
                self._trouble[store] = error.message
                self.say("trouble", store.disk, error.message)
            return
        del self._lent[store]
        self._trouble.pop(store, None)
        self.say("returned", store.disk, "the guest has it again")

    def _claim_back(self, store: LeaseFile, back: Acquisition) -> bool:
        """Is it ours again? Not if others could have had it who owe us nothing: the guest knows
        what was on it.
        """
        record = store.read()
        if record and record.owner == self.owner:
            return record.state is State.HELD  # else it is being kept
        if store in self._held:  # it is lent, though whether it would be could not be told
            self._held.remove(store)
        if record is None or record.lender != self.owner:
            raise Refused(
                "its lease says no more that this guest waits for it: it stays without",
                "End the guest, and run it anew.",
            )
        if (mine := back.attempt(record)) is None:
            return False
        self._came(store)
        self.say("acquired", store.disk, f"epoch {mine.epoch}")
        return True

    # --- the end ---

    async def _free(self) -> None:
        for store, (_, back) in self._lent.items():  # what has come back, but no guest is left for
            claiming = partial(self._alone, self._claim_back, store, back)
            await self._tolerantly(store.disk, claiming)
            if store not in self._held:
                self.say("trouble", store.disk, "it is still lent; it goes back to this host")
        for held in tuple(self._held):
            await self._wait_until_closed(held)
            store = await self._followed(held)
            await self._wait_until_closed(store)
            await self._tolerantly(store.disk, partial(self._alone, self._free_one, store))

    async def _wait_until_closed(self, store: LeaseFile) -> None:
        self._stopping = False
        told = ""
        while why := self._in_use(store):
            if why != told:
                self.say("waiting", store.disk, why)
                told = why
            if self._stopping:
                raise Interrupted(
                    f"{store.disk} is still open, its lease is still held",
                    "It is taken up by the next promoter run here, or freed when it is closed by:"
                    f" promoter lease release {store.disk}",
                )
            await asyncio.sleep(ANSWER_EVERY)

    def _in_use(self, store: LeaseFile) -> str:
        """Why it cannot be freed yet."""
        if store.is_there and lock_on(store.disk) is Lock.HELD:
            return "a QEMU still has it open"
        record = store.read_any()
        if record and record.operation and self.host.works(record):
            return f"{record.operation.kind} {record.operation.id} still works on it"
        return ""

    def _free_one(self, store: LeaseFile, *, node_gone: bool = True) -> None:
        freed = let_go(store, self.host, node_gone=node_gone, here=True)
        self._held.remove(store)
        to = f"for host {freed.grant.host}" if freed.grant else ""
        self.say("released", store.disk, f"epoch {freed.epoch} {to}".strip())
        self._answer_served(store, freed, Said.RELEASED)


def _guest_name(spec: RunSpec) -> str:
    return str(spec.monitor or Path(spec.command[0]).name)[:1024]
