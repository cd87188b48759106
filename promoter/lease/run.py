"""A command that runs under leases: ``promoter run``.

It claims the disks, runs the command, beats, answers release requests that it finds on the
storage (at once when the agent wakes it, by SIGURG), and frees the disks when the command has
ended and their locks are free. Trouble with the storage never ends the guest: the image lock
protects the disk, and others only wait.

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
from typing import assert_never

from promoter.errors import Cancelled, Interrupted, PromoterError, Refused
from promoter.lease import rules
from promoter.lease.claim import Acquisition, let_go
from promoter.lease.credentials import Credentials, Untrusted
from promoter.lease.file import LeaseFile
from promoter.lease.host import HELD_BY, Host, held_by, new_stamp
from promoter.lease.ledger import Ledger
from promoter.lease.liveness import BEAT_EVERY, Heartbeat, lock_on
from promoter.lease.readers import enter
from promoter.lease.record import Answer, LeaseRecord, Request, Said, State, Work
from promoter.lease.release import DiskBusy, detach, shut_down
from promoter.lease.rules import Holding, Lock, Policy
from promoter.lease.store import Asked

ANSWER_EVERY = 0.25
PATIENCE = 120.0
"""Seconds for a guest to go down, or to give up a disk, when it is asked to."""
RETRY_AFTER = 5.0
LOCKING_OFF = re.compile(r"\blocking\W{1,5}off\b")
OLD_EPOCHS = 16
FINAL = (Said.REFUSED, Said.RELEASED)
Say = Callable[[str, Path, str], None]


@dataclass(frozen=True)
class RunSpec:
    """What to run, and how to let go of its disks. ``monitor`` is a QMP socket of its own;
    ``timeout`` is for each disk's owner to let go, in seconds.
    """

    disks: tuple[Path, ...]
    command: tuple[str, ...]
    policy: Policy
    monitor: Path | None
    timeout: float

    def check(self) -> None:
        """Raises `Refused` when the policy cannot be followed."""
        if LOCKING_OFF.search(" ".join(self.command)):
            raise Refused(
                "the command turns QEMU's image lock off",
                "The lock is what stops a guest that a lease cannot stop. Leave locking=off out.",
            )
        if self.policy is Policy.LOAN:
            raise Refused(
                "promoter run cannot lend a disk yet",
                "Its policies are never, shutdown, detach and close.",
            )
        if self.policy in (Policy.SHUTDOWN, Policy.DETACH) and self.monitor is None:
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
    ) -> None:
        spec.check()
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
        self._held: list[LeaseFile] = []
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
                self._held.append(store)
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

    def _alone(self, act: Callable[..., None], *arguments: object) -> None:
        with self._writing:
            act(*arguments)

    async def _acquire(self, store: LeaseFile) -> None:
        heard = self._heard(store)
        self._acquisition = Acquisition(
            store, self.host, self.owner, credentials=self.credentials, heard=heard
        )
        record = await asyncio.to_thread(self._acquisition.run, self.spec.timeout)
        self.say("acquired", store.disk, f"epoch {record.epoch}")

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
            code = await self._process.wait()
            for task in serving:
                task.cancel()
        return code if code >= 0 else 128 - code

    # --- release requests ---

    async def _serve(self, store: LeaseFile) -> None:
        bell = self._bells[store]
        while True:
            bell.clear()
            await self._tolerantly(store.disk, partial(self._alone, self._answer_all, store))
            with suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), ANSWER_EVERY)

    def _answer_all(self, store: LeaseFile) -> None:
        waiting = store.requests()
        record = store.read() if waiting else None
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
                self._loop.call_soon_threadsafe(self._asked.put_nowait, store)
                record = going
            self._answer(store, asked, answer)

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
        holding = Holding(self.host.name, self.spec.policy, self._work(store, record))
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
            case Policy.NEVER | Policy.LOAN:
                raise AssertionError(f"nothing is given by {self.spec.policy}")
            case other:
                assert_never(other)

    async def _keep(self, store: LeaseFile, said: Said, why: str) -> None:
        """The disk stays; with a guest that does not end, all of its disks do."""
        staying = [store] if self.spec.policy is Policy.DETACH else self._held
        for kept in staying:
            await self._tolerantly(kept.disk, partial(self._alone, self._keep_one, kept, said, why))

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

    # --- the end ---

    async def _free(self) -> None:
        for store in tuple(self._held):
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
        if lock_on(store.disk) is Lock.HELD:
            return "a QEMU still has it open"
        record = store.read_any()
        if record and record.operation and self.host.works(record):
            return f"{record.operation.kind} {record.operation.id} still works on it"
        return ""

    def _free_one(self, store: LeaseFile, *, node_gone: bool = True) -> None:
        freed = let_go(store, self.host, node_gone=node_gone)
        self._held.remove(store)
        to = f"for host {freed.grant.host}" if freed.grant else ""
        self.say("released", store.disk, f"epoch {freed.epoch} {to}".strip())
        self._answer_served(store, freed, Said.RELEASED)


def _guest_name(spec: RunSpec) -> str:
    return str(spec.monitor or Path(spec.command[0]).name)[:1024]
