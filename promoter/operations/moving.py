"""A move, done: what `promoter.operations.move.decide` says, one action after the other.

Promote's are the steps of US 10585690 B2, in QEMU's terms: the second base disk is created and
filled with everything below the active layer (seed); ``blockdev-mirror``, the mirror driver, copies
the delta while every guest write goes to both disks; the switchover moves the guest to the new disk
and removes the mirror.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from promoter.blockjob import ENDED, READY, BlockJob, Progress
from promoter.chain import FileStamp
from promoter.errors import (
    Cancelled,
    Interrupted,
    JobFailed,
    NoSpace,
    PromoterError,
    Refused,
    Unreachable,
)
from promoter.guests.base import (
    CommandFailed,
    ConnectionLost,
    DefinedDisk,
    Domain,
    Guest,
    GuestView,
    MirrorSpec,
    NoGuest,
    PlainGuest,
    Start,
)
from promoter.guests.bugs import loses_writes_at_start
from promoter.operations import operation, room, verify
from promoter.operations.history import History
from promoter.operations.journal import Journal, NoteKind, OperationStatus
from promoter.operations.leases import Leases
from promoter.operations.leftovers import call_merged, delete_old, kept_files, remove_spares
from promoter.operations.move import (
    FINAL,
    Action,
    Active,
    CopyMode,
    DiskIntent,
    DiskSeen,
    Do,
    Failure,
    Job,
    Kind,
    Move,
    Old,
    OnFull,
    Seen,
    Verdict,
    Way,
    decide,
    next_of_each,
)
from promoter.operations.observation import has_made, observe
from promoter.operations.outcome import DiskReport, error_of, job_failure
from promoter.operations.preflight import check_start
from promoter.operations.promote import plan_disk
from promoter.operations.quiesce import NotQuiesced
from promoter.operations.slowing import Slowing
from promoter.operations.specs import (
    backing_of,
    commit_spec,
    definitions,
    mirror_spec,
    snapshot_spec,
    target_node,
)
from promoter.operations.start import start_standing
from promoter.operations.suspended import LONGEST_ABSENCE, Done, Work, Worker, define, go_on
from promoter.operations.switchover import (
    TooSlow,
    commit_all,
    pause_seconds,
    switch_over,
    switch_over_standing,
)
from promoter.storage import images, seed
from promoter.storage.files import file_id, is_locked, is_open, sync
from promoter.storage.pace import Pace
from promoter.storage.seed import SeedSpec
from promoter.values import to_json

MOST_REPLANS = 3
CANCELED = "Operation canceled"
LONGEST_DEATH = 5.0
MOST_LOST = 10
MOST_PAUSES = 10
STOPPABLE = frozenset({Do.SEED, Do.AWAIT_READY, Do.VERIFY})
FORWARD = frozenset({Do.SEED, Do.MIRROR, Do.AWAIT_READY, Do.PREPARE, Do.SWITCH_OVER})
MUST_WORK = frozenset(
    {Do.CONTINUE, Do.PUT_NAME_BACK, Do.COMMIT_NAME, Do.DETACH, Do.DISCARD, Do.TIDY, Do.UNLIMIT}
)

T = TypeVar("T")
Connect = Callable[[Move], Awaitable[Guest]]
OnProgress = Callable[[str, str, Progress], None]
"""Called with a disk's name, the phase ("seed" or "mirror") and how far it is."""
OnStep = Callable[[str], None]
"""Called with each action that begins."""


class MoveOperation:
    """One move on its way: run it, `cancel` it, or `stop` it for a later resume."""

    def __init__(
        self,
        intent: Move,
        journal: Journal,
        connect: Connect,
        on_progress: OnProgress,
        on_step: OnStep,
    ) -> None:
        self.intent = intent
        self._journal = journal
        self._connect = connect
        self._history = History(intent.id, journal)
        self._leases = Leases(intent.id, str(intent.kind), journal.lock_file(intent.id))
        self._show = on_progress
        self._on_step = on_step
        self._guest: Guest | None = None
        self._worker: Worker | None = None
        self._seen = Seen(alive=False, disks=())
        self._acting: asyncio.Task[None] | None = None
        self._stopped = False
        self._going = asyncio.Event()
        self._going.set()
        self._expected_cancels: set[str] = set()
        self._reports: dict[str, DiskReport] = {}
        self._paces: dict[str, Pace] = {}
        self._slowing = Slowing(lambda: self.intent.limits, self._remember_limits)
        self._joined = False
        self._paused_in_vain = 0
        self._began = time.monotonic()

    @property
    def id(self) -> str:
        return self.intent.id

    @property
    def alive(self) -> bool:
        """Was the guest there at the last look?"""
        return self._seen.alive

    async def run(self, guest: Guest | None) -> list[DiskReport]:
        """Bring the move to its end, from wherever it is; what became of each disk.

        Raises what DESIGN's exit codes name: `Cancelled`, `JobFailed`, `NoSpace`, `Refused`
        or `Unreachable` with the guest on its untouched old chain, `Interrupted` half-way.
        """
        self._guest = guest
        if guest is None:  # a resume: the guard may have put the switchover back
            self._history.note(NoteKind.RESUMED)
            self._expected_cancels.update(disk.node for disk in self.intent.disks)
            await self._end_pause()
        telling = asyncio.create_task(self._leases.keep_telling(), name="telling the leases")
        try:
            last = await operation.run(self, self._journal)
            if last.do in (Do.DONE, Do.GIVE_UP):
                await asyncio.to_thread(self._leases.leave, self.intent.disks)
                self._note_leases()
        except Interrupted:
            raise
        except PromoterError as error:
            hint = f"{error.hint} Continue: promoter job resume {self.id}".strip()
            raise Interrupted(error.message, hint) from error
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            await self._let_go()
            if self._worker:
                await self._worker.dismiss()
        if last.do is not Do.DONE:
            raise self._conclude(last)
        reports = [self._report(disk) for disk in self.intent.disks]
        self._history.step_ended(reports)
        if different := verify.difference_of(self.intent):
            self._note_switched()
            self._journal.conclude(self.id, OperationStatus.FAILED, different.message)
            raise different
        names = ", ".join(report.disk for report in reports)
        done = f"{self.intent.kind.done} {names or 'nothing'}"
        self._journal.conclude(self.id, OperationStatus.DONE, done)
        return reports

    def cancel(self) -> None:
        """Ask for the old state; takes effect unless the switchover has begun."""
        self._history.note(NoteKind.ASKED, request="cancel")
        self._fail(Failure.CANCELLED, "cancelled")
        self._going.set()
        self._interrupt()

    def stop(self) -> None:
        """Leave everything as it is, jobs running, for ``promoter job resume``."""
        self._history.note(NoteKind.ASKED, request="stop")
        self._stopped = True
        self._going.set()
        self._interrupt()

    async def change_speed(self, speed: int) -> None:
        """Limit each disk's seed or mirror to ``speed`` bytes per second, 0 for no limit."""
        self._history.note(NoteKind.ASKED, request="speed", speed=speed)
        self._save(replace(self.intent, choices=replace(self.intent.choices, speed=speed)))
        for pace in self._paces.values():
            pace.change(speed)
        if not (self.intent.domain and not self._going.is_set()):  # its pause is a speed
            for guest, job in await self._jobs():
                await guest.set_speed(job, speed)

    async def pause(self) -> None:
        """Stop copying until `go_on`. A switchover that has begun is not held up."""
        self._history.note(NoteKind.ASKED, request="pause")
        self._going.clear()
        for pace in self._paces.values():
            pace.pause()
        if self._acting:
            await self._pause_jobs()
        self._on_step("pause")

    async def go_on(self) -> None:
        """Copy on after a `pause`."""
        if self._going.is_set():
            raise Refused(
                f"operation {self.id} runs and is not paused", f"See: promoter job watch {self.id}"
            )
        self._history.note(NoteKind.ASKED, request="go on")
        for pace in self._paces.values():
            pace.go_on()
        await self._resume_jobs()
        self._going.set()
        self._on_step("go on")

    async def _pause_jobs(self) -> None:
        for guest, job in await self._jobs():
            with suppress(CommandFailed):  # paused before, or it has just ended
                await guest.pause_job(job)

    async def _resume_jobs(self) -> None:
        for guest, job in await self._jobs():
            with suppress(CommandFailed):  # not paused, or it has just ended
                await guest.resume_job(job, self.intent.choices.speed)

    async def _jobs(self) -> list[tuple[Guest, str]]:
        """Our jobs that are there."""
        if (guest := self._guest) is None:
            return []
        return [(guest, disk.job) for disk in self.intent.disks if await guest.job(disk.job)]

    async def _end_pause(self) -> None:
        """Whoever paused the jobs of an interrupted operation is gone."""
        with suppress(PromoterError):  # no guest: the look finds out more
            self._guest = await self._connect(self.intent)
            await self._resume_jobs()

    def _interrupt(self) -> None:
        if self._acting:
            self._acting.cancel()

    # Look

    async def look(self) -> Seen:
        """What there is now; not before `go_on` when the next step would be one forward."""
        seen = await self._look()
        while not self._going.is_set() and self.decide(seen).do in FORWARD:
            await self._pause_jobs()
            await self._going.wait()
            seen = await self._look()
        return seen

    async def _look(self) -> Seen:
        view = await self._view()
        for index, disk in enumerate(self.intent.disks):
            if view and not disk.made and has_made(disk, view):
                self._save(self.intent.with_disk(index, replace(disk, made=True)))
        try:
            disks = tuple(observe(disk, view) for disk in self.intent.disks)
        except OSError as error:
            hint = f"Mend that, then: promoter job resume {self.id}"
            raise Interrupted(f"cannot see the disks' files: {error}", hint) from error
        self._seen = Seen(alive=view is not None and view.runs, disks=disks)
        return self._seen

    async def _view(self) -> GuestView | None:
        """One look at the guest, or None when it is certainly gone."""
        patience = LONGEST_ABSENCE if self.intent.domain else LONGEST_DEATH
        deadline = time.monotonic() + patience
        lost = 0
        while True:
            try:
                self._guest = self._guest or await self._connect(self.intent)
                return await self._guest.look()
            except NoGuest:
                return None
            except Unreachable as error:
                if isinstance(error, ConnectionLost):
                    self._history.note(NoteKind.LOST, why=error.message)
                    await self._let_go()
                    lost += 1
                    if lost < MOST_LOST:
                        continue
                if not self.intent.domain and not await asyncio.to_thread(self._in_use):
                    return None
                if time.monotonic() > deadline:
                    raise Interrupted(
                        f"{error.message}, but its disks may be in use",
                        f"{error.hint} Then: promoter job resume {self.id}",
                    ) from error
                await asyncio.sleep(0.2)

    async def _let_go(self) -> None:
        if self._guest:
            with suppress(PromoterError):  # gone: then nobody is slow
                await self._slowing.undo(self._guest)
            await self._slowing.leave()
            await self._guest.close()
        self._guest = None

    def _in_use(self) -> bool:
        names = [
            name
            for disk in self.intent.disks
            for name in (disk.names.path, disk.names.aside, disk.names.target)
            if name.exists()
        ]
        return any(is_locked(name) or is_open(name) for name in names)

    # Decide

    def decide(self, seen: Seen) -> Action:
        return decide(self.intent, seen)

    def is_final(self, action: Action) -> bool:
        return action.do in FINAL or self._stopped

    def _conclude(self, last: Action) -> PromoterError:
        """The error of a move that is not done, after the journal has it."""
        if last.do is not Do.GIVE_UP:
            what = "stopped half-way" if self._stopped else "somebody moved its files"
            hint = f"Continue: promoter job resume {self.id}"
            return Interrupted(f"{self.intent.kind} {self.id}: {what}", hint)
        if any(disk.switched for disk in self._seen.disks):
            self._note_switched()
            names = [d.name for d, s in self._pairs() if not s.switched]
            error: PromoterError = Interrupted(
                f"{', '.join(names)} stayed on the old chain, the other disks are done:"
                f" {self.intent.reason or 'the guest is gone'}",
                f"{self.intent.kind} what is left once more.".capitalize(),
            )
        else:
            error = error_of(self.intent)
        if isinstance(error, NoSpace):
            self._save(replace(self.intent, failure=None, reason=""))
        else:
            cancelled = isinstance(error, Cancelled)
            status = OperationStatus.CANCELLED if cancelled else OperationStatus.FAILED
            self._journal.conclude(self.id, status, error.message)
        return error

    def _note_switched(self) -> None:
        self._history.note(
            NoteKind.SWITCHED, disks=[disk.name for disk, seen in self._pairs() if seen.switched]
        )

    def _note_leases(self) -> None:
        for written in self._leases.written():
            self._history.note(NoteKind.LEASE, **written)

    def _pairs(self) -> list[tuple[DiskIntent, DiskSeen]]:
        return list(zip(self.intent.disks, self._seen.disks, strict=True))

    # Act

    async def act(self, action: Action) -> None:
        """Do one action. `cancel` and `stop` end a seed or a wait at once, nothing else."""
        self._on_step(str(action))
        if action.do in FORWARD and not self._joined:
            await asyncio.to_thread(self._leases.join, self.intent.disks)
            self._joined = True
        work = asyncio.create_task(self._do(action), name=str(action))
        self._acting = work if action.do in STOPPABLE else None
        try:
            await work
        except asyncio.CancelledError:
            if not (self._stopped or self.intent.failure is Failure.CANCELLED):
                raise
        except OSError as error:
            kind = NoSpace if error.errno == errno.ENOSPC else JobFailed
            raise kind(f"{action}: {error}") from error
        finally:
            self._acting = None
            self._note_leases()
            self._history.step_ended(self._reports.values())

    def failed(self, action: Action, error: PromoterError) -> None:
        if isinstance(error, ConnectionLost):
            return
        if action.do in MUST_WORK:
            hint = f"{error.hint} Continue: promoter job resume {self.id}".strip()
            raise Interrupted(f"{action} did not work: {error.message}", hint) from error
        kinds = {NoSpace: Failure.NO_SPACE, Refused: Failure.REFUSED}
        found = next((kinds[kind] for kind in kinds if isinstance(error, kind)), Failure.JOB_FAILED)
        self._fail(found, error.message)

    def _fail(self, failure: Failure, reason: str) -> None:
        if self.intent.failure is None:
            self._save(replace(self.intent, failure=failure, reason=reason))

    def _save(self, intent: Move) -> None:
        self._journal.save(self.id, to_json(intent))
        self.intent = intent

    def _on_progress(self, disk: str, phase: str, progress: Progress) -> None:
        self._leases.note(disk, phase, progress)
        self._history.progress(disk, phase, progress)
        self._show(disk, phase, progress)

    def _remember_limits(self, disk: str, limits: Mapping[str, int]) -> None:
        self._history.note(NoteKind.SLOWED, disk=disk)
        self._save(replace(self.intent, limits={**self.intent.limits, disk: limits}))

    async def _do(self, action: Action) -> None:
        if action.disk is None:
            await self._do_together(action.do)
        else:
            await self._do_one(action.do, action.disk, self.intent.disks[action.disk])

    async def _do_together(self, do: Do) -> None:
        match do:
            case Do.CONTINUE:
                await self._continue()
            case Do.UNLIMIT:
                await self._slowing.undo(self._alive)
                self._save(replace(self.intent, limits={}))
            case Do.SEED:
                needed = next_of_each(self.intent, self._seen)
                await self._seed_all([index for index, need in needed.items() if need is do])
            case Do.FINISH_SWITCHOVER:
                await commit_all(self._plain, [d for d, s in self._pairs() if s.can_finish])
            case Do.AWAIT_READY:
                await self._await_ready()
            case Do.SWITCH_OVER if self.intent.kind is Kind.SNAPSHOT:
                await self._snapshot()
            case Do.SWITCH_OVER:
                ready = self._with_job(Job.READY)
                jobs = (await self._alive.look()).jobs
                for disk in ready:
                    self._report(disk).mirrored_bytes = jobs[disk.job].done
                    is_file = not disk.names.remote and disk.names.target.is_file()
                    if is_file:  # QEMU flushes it while the guest stands still
                        await asyncio.to_thread(sync, disk.names.target)
                await self._switch_over(ready)
            case Do.TIDY:
                await self._tidy()
            case _:
                raise AssertionError(do)

    async def _do_one(self, do: Do, index: int, disk: DiskIntent) -> None:
        match do:
            case Do.PUT_NAME_BACK:
                await self._name(disk, disk.chain.active.file)
            case Do.COMMIT_NAME:
                await self._name(disk, disk.names.target)
            case Do.PREPARE:
                await asyncio.to_thread(self._leases.announce, disk)
                disk.names.prepare()
            case Do.DISCARD if disk.names.remote:
                await self._discard_remote(index, disk)
            case Do.DISCARD:
                self._discard(disk)
            case Do.REPLAN:
                await self._replan(index, disk)
            case Do.CANCEL | Do.UNFREEZE:
                await self._cancel_job(disk)
            case Do.DISMISS:
                await self._dismiss(disk)
            case Do.MIRROR if disk.names.remote:
                await self._mirror_remote(index, disk)
            case Do.MIRROR:
                await self._mirror(await self._with_its_nodes(index, disk))
            case Do.VERIFY:
                await self._verify(index, disk)
            case Do.DETACH:
                if self.intent.choices.verify:
                    await verify.end(self._plain, disk)
                await self._plain.detach(disk.node)
            case _:
                raise AssertionError(do)

    @property
    def _alive(self) -> Guest:
        assert self._guest, "only a guest that is there is acted upon"
        return self._guest

    @property
    def _lock_fd(self) -> int:
        return self._journal.lock_fd(self.id)

    @property
    def _plain(self) -> PlainGuest:
        assert isinstance(self._guest, PlainGuest), "planned as plain QEMU"
        return self._guest

    @property
    def _domain(self) -> Domain:
        assert isinstance(self._guest, Domain), "planned as a domain"
        return self._guest

    def _with_job(self, job: Job) -> list[DiskIntent]:
        return [disk for disk, seen in self._pairs() if seen.job is job]

    async def _seed_all(self, indices: list[int]) -> None:
        """Seed disks side by side, but in turn where they share a file system."""
        most = self.intent.choices.parallel
        gates = defaultdict[int | None, asyncio.Semaphore](lambda: asyncio.Semaphore(most or 1))

        async def seed_one(index: int) -> None:
            disk = self.intent.disks[index]
            directory = disk.names.target.parent
            async with gates[None if most else directory.stat().st_dev]:
                await self._seed(index, disk)

        work = [
            asyncio.create_task(seed_one(i), name=f"seed {i}") for i in indices if i is not None
        ]
        try:
            await asyncio.gather(*work)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _seed(self, index: int, disk: DiskIntent) -> None:
        loop = asyncio.get_running_loop()
        began = time.monotonic()

        def report(done: int, total: int) -> None:
            progress = Progress(done, total, time.monotonic() - began)
            loop.call_soon_threadsafe(self._on_progress, disk.name, "seed", progress)

        spec = SeedSpec(
            layers=disk.chain.images[1 : len(disk.chain) - disk.kept],
            part=disk.part,
            method=disk.method,
            geometry=disk.geometry,
            virtual_size=disk.virtual_size,
            like=disk.names.path,
            backing=backing_of(disk),
        )
        pace = self._paces[disk.node] = Pace(self.intent.choices.speed)
        if not self._going.is_set():
            pace.pause()
        made = await self._while_alive(self._make_seed(disk, spec, pace, report))
        self._report(disk).seeded_bytes = disk.part.stat().st_blocks * 512
        self._save(self.intent.with_disk(index, replace(disk, seeded=made)))
        seed.publish(disk.part, disk.names.target)

    async def _make_seed(
        self, disk: DiskIntent, spec: SeedSpec, pace: Pace, report: Callable[[int, int], None]
    ) -> FileStamp:
        """Make the seed, at the first try or, if that is wished, when there is room."""
        while True:
            try:
                return await seed.make_seed(spec, pace, report)
            except (NoSpace, OSError) as error:
                full = isinstance(error, NoSpace) or error.errno == errno.ENOSPC
                if not full or self.intent.choices.on_full is OnFull.FAIL:
                    raise
            await asyncio.to_thread(seed.discard, spec.part)
            tell = partial(self._on_progress, disk.name, room.PHASE)
            await room.wait_for_room(spec.part.parent, disk.required, tell)

    async def _while_alive(self, work: Coroutine[None, None, T]) -> T:
        """Work outside the guest, given up when the guest goes away."""
        working = asyncio.create_task(work, name="outside the guest")
        gone = asyncio.create_task(self._alive.gone(), name="guest gone")
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise ConnectionLost(f"{self.intent.guest}: the monitor closed")
        finally:
            working.cancel()
            gone.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)

    async def _mirror(self, disk: DiskIntent) -> None:
        spec: Start
        if disk.commits:
            spec = commit_spec(disk, self.intent.choices.speed)
        else:
            spec = mirror_spec(disk, self.intent.choices)
            if not self.intent.domain:
                spec = replace(spec, target_is_zero=await self._is_blank(disk, spec))
                await self._plain.attach(target_node(disk))
        await self._begin(disk, spec)

    async def _is_blank(self, disk: DiskIntent, spec: MirrorSpec) -> bool:
        """Was nothing written yet to the target, which the mirror is to fill?"""
        if spec.sync != "full" or disk.node in (await self._alive.look()).nodes:
            return False
        return await images.reads_as_zeros(disk.names.target, disk.geometry.format)

    async def _with_its_nodes(self, index: int, disk: DiskIntent) -> DiskIntent:
        """The disk, whose files are seen to be the planned ones, by the node-names that it has now:
        those that nobody gave are others after a reboot.
        """
        found = (await self._alive.look()).disk(disk.key)
        if found is None:
            raise JobFailed(f"{disk.name} was unplugged from the guest")
        disk = replace(disk, chain=found.chain, root=found.node)
        self._save(self.intent.with_disk(index, disk))
        return disk

    async def _mirror_remote(self, index: int, disk: DiskIntent) -> None:
        """Have libvirt make the target and copy to it; it leaves none where it refuses."""
        self._save(self.intent.with_disk(index, replace(disk, left=True)))
        try:
            await self._mirror(disk)
        except JobFailed:
            self._save(self.intent.with_disk(index, replace(disk, left=False)))
            raise

    async def _begin(self, disk: DiskIntent, spec: Start) -> None:
        view = await self._alive.look()
        if loses_writes_at_start(view.version):
            check_start(view)
            running = view.status == "running"
            self._save(replace(self.intent, stopped=running))
            if self.intent.domain:
                mirror, commit = (spec, None) if isinstance(spec, MirrorSpec) else (None, spec)
                work = Work(self.intent.domain, running, mirror, commit)
                pause = (await self._while_suspended(work)).pause
            else:
                pause = await start_standing(self._plain, spec, running=running)
            self._report(disk).start_pause_s = pause
            self._save(replace(self.intent, stopped=False))
        else:
            await self._alive.begin(spec)
        if (speed := self.intent.choices.speed) != spec.speed:
            await self._alive.set_speed(disk.job, speed)

    async def _switch_over(self, ready: list[DiskIntent]) -> None:
        background = self.intent.choices.copy_mode is CopyMode.BACKGROUND
        running = await self._alive.status() == "running"
        if ready[0].way is Way.MIRROR and not self.intent.domain:
            for disk in ready if background else ():
                await self._plain.write_blocking(disk.node)
            if not (self.intent.choices.verify and running):
                await switch_over(self._plain, ready, self._lock_fd)
                return
            await verify.prepare(self._plain, ready)
        longest = self.intent.choices.max_pause if ready[0].commits and running else None
        if longest is not None:
            await self._slowing.approach(self._alive, ready, longest)
        self._save(replace(self.intent, stopped=running))
        try:
            pause = await self._switch_over_standing(ready, longest)
        except TooSlow:
            self._paused_in_vain += 1
            if self._paused_in_vain == MOST_PAUSES:
                raise
        else:
            for disk in ready:
                self._report(disk).switchover_s = pause
        self._save(replace(self.intent, stopped=False))

    async def _switch_over_standing(
        self, ready: list[DiskIntent], longest: float | None
    ) -> float | None:
        if domain := self.intent.domain:
            running = self.intent.stopped
            work = Work(domain, running, pivot=definitions(ready), settle=longest)
            if self.intent.choices.verify:
                scratch = {disk.name: verify.view_of(disk).scratch for disk in ready}
                work = replace(work, view=scratch)
            done = await self._while_suspended(work)
            if self.intent.choices.verify:
                self._note_views(ready, done.unviewed)
            return done.pause
        if longest is not None:
            how = (self._plain, ready, self._lock_fd)
            return await switch_over_standing(*how, pause=longest)
        if ready[0].way is Way.MIRROR:
            return await self._switch_over_viewed(ready)
        await switch_over(self._plain, ready, self._lock_fd)
        return None

    async def _switch_over_viewed(self, ready: list[DiskIntent]) -> float:
        """Switch over, and take views of the new disks before the guest goes on."""
        why_not = ""

        async def take() -> None:
            nonlocal why_not
            why_not = await verify.take(self._plain, ready)

        how = (self._plain, ready, self._lock_fd)
        pause = await switch_over_standing(*how, before_it_goes_on=take)
        self._note_views(ready, why_not)
        return pause

    def _note_views(self, ready: list[DiskIntent], why_not: str) -> None:
        disks = [verify.taken(d, why_not) if d in ready else d for d in self.intent.disks]
        self._save(replace(self.intent, disks=tuple(disks)))

    async def _verify(self, index: int, disk: DiskIntent) -> None:
        """Prove that the old chain and the new disk are the same, or say why not."""
        if self.intent.failure is Failure.CANCELLED:
            verdict = Verdict(unproven="it was cancelled")
        elif not self._seen.alive:
            verdict = Verdict(unproven=verify.GONE)
        else:
            pace = self._paces[disk.node] = Pace(self.intent.choices.speed)
            report = partial(self._on_progress, disk.name, "verify")
            verdict = await verify.verify(self._alive, disk, pace, report)
        self._save(self.intent.with_disk(index, replace(disk, verdict=verdict)))
        if all(other.verdict for other in self.intent.disks if other.viewed):
            await self._end_views()

    async def _end_views(self) -> None:
        for disk in self.intent.disks if self.intent.choices.verify and self._seen.alive else ():
            await verify.end(self._alive, disk)

    async def _snapshot(self) -> None:
        """Put all the disks' overlays above them in one short pause."""
        left = [(i, d) for i, (d, s) in enumerate(self._pairs()) if not s.switched]
        disks = [await self._with_its_nodes(*each) for each in left]
        running = await self._alive.status() == "running"
        quiesce = self.intent.choices.quiesce
        frozen = self._alive.pid if quiesce else None
        self._save(replace(self.intent, stopped=running, frozen=frozen))
        names = tuple(disk.names for disk in disks)
        specs = tuple(map(snapshot_spec, disks))
        work = Work(self.intent.address, running, snapshots=specs, names=names, quiesce=quiesce)
        try:
            done = await self._while_suspended(work)
        except NotQuiesced:
            self._save(replace(self.intent, stopped=False, frozen=None))
            raise
        self._save(replace(self.intent, stopped=False, frozen=None))
        for disk in disks:
            report = self._report(disk)
            report.switchover_s, report.frozen_s = done.pause, done.frozen

    async def _while_suspended(self, work: Work) -> Done:
        if not self.intent.domain:
            await self._let_go()
        worker, self._worker = self._worker or await Worker.start(), None
        return await worker.do(work, self._lock_fd)

    async def _name(self, disk: DiskIntent, file: Path | None) -> None:
        """Have the next boot open the disk's old file or its new one."""
        assert file
        new = file == disk.names.target
        if new and disk.way is Way.SNAPSHOT:
            await self._go_on()
            return
        if self.intent.domain:
            form = disk.geometry.format if new else disk.chain.active.format
            await define(self._domain, {disk.name: DefinedDisk(file, form)})
        elif new:
            disk.names.commit()
        else:
            disk.names.put_back()

    async def _continue(self) -> None:
        """Continue a guest that was left stopped, once no mirror of ours is starting in it, and
        thaw its file systems.
        """
        await self._go_on()
        self._save(replace(self.intent, stopped=False, frozen=None))

    async def _go_on(self) -> None:
        disks = self.intent.disks
        snapshots = [disk for disk in disks if disk.way is Way.SNAPSHOT]
        await go_on(
            self._alive,
            definitions(disks),
            [snapshot_spec(disk) for disk in snapshots],
            [disk.names for disk in snapshots],
            proceed=self.intent.stopped,
            frozen=self.intent.frozen is not None and self.intent.frozen == self._alive.pid,
        )

    async def _await_ready(self) -> None:
        began = time.monotonic()
        if self.intent.domain:
            self._worker = self._worker or await Worker.start()
        running = self._with_job(Job.RUNNING)
        commits = [disk for disk in running if disk.way is Way.COMMIT]
        keep_slowing = self._slowing.keep_slowing(self._alive, commits)
        slowing = asyncio.create_task(keep_slowing, name="convergence")
        relieving = asyncio.create_task(self._keep_relieving(running), name="room")
        try:
            for disk in running:

                def tick(job: BlockJob, disk: DiskIntent = disk) -> None:
                    for helping in (slowing, relieving):
                        if helping.done():
                            helping.result()  # raises what went wrong with it
                    self._copied(disk, began, job)

                job = await self._wait_until_ready(disk, tick)
                if job is None or job.status in ENDED:
                    return
                tick(job)
        finally:
            slowing.cancel()
            relieving.cancel()
            await asyncio.gather(slowing, relieving, return_exceptions=True)

    async def _wait_until_ready(
        self, disk: DiskIntent, tick: Callable[[BlockJob], None]
    ) -> BlockJob | None:
        """QEMU says standby, as of one that is ready, of one that has no room, too."""
        while True:
            job = await self._alive.wait_for(disk.job, READY, tick)
            if job is None or not job.full:
                return job
            tick(job)
            await asyncio.sleep(room.LOOK_EVERY)

    async def _keep_relieving(self, running: list[DiskIntent]) -> None:
        if self.intent.choices.on_full is OnFull.WAIT and isinstance(self._guest, PlainGuest):
            mirrors = [disk for disk in running if disk.way is Way.MIRROR]
            relief = room.Relief(self._guest, self._on_progress)
            await relief.keep_relieving(mirrors, self._going)

    def _copied(self, disk: DiskIntent, began: float, job: BlockJob) -> None:
        progress = Progress(job.done, job.total, time.monotonic() - began)
        if disk.way is Way.COMMIT:
            convergence = self._slowing.note(disk, job)
            progress = replace(progress, dirtied=convergence.dirty_rate, limit=convergence.limit)
        self._on_progress(disk.name, str(disk.way), progress)

    async def _cancel_job(self, disk: DiskIntent) -> None:
        self._expected_cancels.add(disk.node)
        with suppress(CommandFailed):  # it ended by itself: the next look tells how
            await self._alive.cancel(disk.job)
        await self._alive.wait_for(disk.job, (), lambda _: None)

    async def _dismiss(self, disk: DiskIntent) -> None:
        """Read how the job ended, then let QEMU forget it."""
        view = await self._alive.look()
        job = view.jobs.get(disk.job)
        seen = observe(disk, view)
        if seen.active is Active.NEW:
            if disk.way is Way.MIRROR and not (self.intent.domain or disk.viewed):
                self._report(disk).switchover_s = pause_seconds(self._plain, disk)
        elif job and not (job.error == CANCELED and disk.node in self._expected_cancels):
            self._fail(*job_failure(disk, job))
        self._expected_cancels.discard(disk.node)
        await self._alive.dismiss(disk.job)

    def _discard(self, disk: DiskIntent) -> None:
        """Remove what was made for a disk that stays on its old chain."""
        disk.names.withdraw()
        if disk.commits:
            return
        seed.discard(disk.part)
        if disk.seeded and file_id(disk.names.target) == disk.seeded.id:
            disk.names.target.unlink()
        sync(disk.names.target.parent)

    async def _discard_remote(self, index: int, disk: DiskIntent) -> None:
        removed = await self._domain.delete_volume(disk.names.target)
        self._save(self.intent.with_disk(index, replace(disk, made=False, left=not removed)))

    async def _replan(self, index: int, disk: DiskIntent) -> None:
        """The chain is no longer the one that was seeded: plan and seed what is there now."""
        view = await self._alive.look()
        found = view.disk(disk.key)
        if found is None:
            raise JobFailed(f"{disk.name} was unplugged from the guest")
        if self.intent.kind is not Kind.PROMOTE:
            raise Refused(f"{disk.name}: its chain changed meanwhile", "Look at it, and try again.")
        if disk.replanned == MOST_REPLANS:
            raise JobFailed(f"{disk.name}: its chain changed {MOST_REPLANS + 1} times")
        if len(found.chain) == 1:
            self._save(self.intent.without_disk(index))
            return
        again = await plan_disk(self._alive, view, found, self.intent.choices, self.id, disk.index)
        assert again, "it has layers below"
        again = replace(again, replanned=disk.replanned + 1)
        self._save(self.intent.with_disk(index, again))

    async def _tidy(self) -> None:
        """After the switch: close the old nodes, remove the names that were only on the way."""
        await self._end_views()
        for disk in self.intent.disks:
            if self._guest and not self.intent.domain:
                await self._drop_old_nodes(disk)
            view = await self._alive.look() if self._guest else None
            if disk.way is not Way.COMMIT_BELOW:
                disk.names.tidy()
            if not (disk.commits or disk.names.remote):
                seed.discard(disk.part)
            remove_spares(disk.names, view)
            await asyncio.to_thread(call_merged, disk)
            if self.intent.choices.old is Old.DELETE and self._is_proven(disk):
                await asyncio.to_thread(delete_old, disk)
            await asyncio.to_thread(self._leases.take_off_readers, disk)
            report = self._report(disk)
            report.duration_s = time.monotonic() - self._began
        self._save(replace(self.intent, tidied=True))

    def _is_proven(self, disk: DiskIntent) -> bool:
        """Is all the proof there that was asked for?"""
        proven = disk.verdict is not None and disk.verdict.same is not None
        return proven or not self.intent.choices.verify

    async def _drop_old_nodes(self, disk: DiskIntent) -> None:
        view = await self._alive.look()
        found = view.disk(disk.key)
        if found and any(image.node == disk.node for image in found.chain):
            for node in (n for image in disk.gone for n in (image.node, image.file_node) if n):
                await self._plain.drop(node)

    def _report(self, disk: DiskIntent) -> DiskReport:
        names = disk.names
        snapshot = disk.way is Way.SNAPSHOT
        source = names.aside if snapshot else names.path
        method = disk.method if disk.way is Way.MIRROR else None
        report = self._reports.setdefault(
            disk.mark,
            DiskReport(disk.name, source, names.target, disk.way, method, node=disk.node),
        )
        report.target = names.path if names.in_place else names.target
        if disk.verdict:
            report.verified = disk.verdict.same is not None
            report.verified_bytes = disk.verdict.same
            report.unverified = disk.verdict.unproven or None
        report.kept = kept_files(disk)
        report.old = next(iter(report.kept), None)
        report.spare = next(iter(names.spares()), None)
        return report
