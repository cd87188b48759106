"""A move, done: what `promoter.operations.move.decide` says, one action after the other.

Promote's are the steps of US 10585690 B2, in QEMU's terms: the second base disk is created and
filled with everything below the active layer (seed); ``blockdev-mirror``, the mirror driver, copies
the delta while every guest write goes to both disks; the switchover moves the guest to the new disk
and removes the mirror.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from promoter.errors import Cancelled, Interrupted, NoSpace, PromoterError, Refused
from promoter.guests.base import CommandFailed, ConnectionLost, Guest
from promoter.operations import acts, operation, verify
from promoter.operations.course import Connect, Course, OnProgress
from promoter.operations.journal import Journal, NoteKind, OperationStatus
from promoter.operations.move import FINAL, Action, Do, Failure, Kind, Move, Seen, decide
from promoter.operations.observation import has_made, observe
from promoter.operations.outcome import DiskReport, error_of

STOPPABLE = frozenset({Do.SEED, Do.AWAIT_READY, Do.VERIFY, Do.GO_BACK})
FORWARD = frozenset({Do.SEED, Do.MIRROR, Do.AWAIT_READY, Do.PREPARE, Do.SWITCH_OVER, Do.GO_BACK})
MUST_WORK = frozenset(
    {Do.CONTINUE, Do.PUT_NAME_BACK, Do.COMMIT_NAME, Do.DETACH, Do.DISCARD, Do.TIDY, Do.UNLIMIT}
)

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
        self._course = Course(intent, journal, connect, on_progress)
        self._on_step = on_step
        self._acting: asyncio.Task[None] | None = None
        self._stopped = False
        self._joined = False

    @property
    def id(self) -> str:
        return self.intent.id

    @property
    def intent(self) -> Move:
        return self._course.intent

    @property
    def alive(self) -> bool:
        """Was the guest there at the last look?"""
        return self._course.seen.alive

    async def run(self, guest: Guest | None) -> list[DiskReport]:
        """Bring the move to its end, from wherever it is; what became of each disk.

        Raises what DESIGN's exit codes name: `Cancelled`, `JobFailed`, `NoSpace`, `Refused`
        or `Unreachable` with the guest on its untouched old chain, `Interrupted` half-way.
        """
        self._course.guest = guest
        if guest is None and self.intent.kind is not Kind.UNDO:
            # a resume: the guard may have put the switchover back
            self._course.history.note(NoteKind.RESUMED)
            self._course.expected_cancels.update(disk.node for disk in self.intent.disks)
            await self._end_pause()
        telling = asyncio.create_task(self._course.leases.keep_telling(), name="telling the leases")
        try:
            last = await operation.run(self, self._course.journal)
            if last.do in (Do.DONE, Do.GIVE_UP):
                await asyncio.to_thread(self._course.leases.leave, self.intent.disks)
                self._course.note_leases()
        except Interrupted:
            raise
        except PromoterError as error:
            hint = f"{error.hint} Continue: promoter job resume {self.id}".strip()
            raise Interrupted(error.message, hint) from error
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            await self._course.let_go()
            if self._course.worker:
                await self._course.worker.dismiss()
        if last.do is not Do.DONE:
            raise self._conclude(last)
        reports = [self._course.report(disk) for disk in self.intent.disks]
        self._course.history.step_ended(reports)
        if different := verify.difference_of(self.intent):
            self._note_switched()
            self._course.journal.conclude(self.id, OperationStatus.FAILED, different.message)
            raise different
        names = ", ".join(report.disk for report in reports)
        done = f"{self.intent.kind.done} {names or 'nothing'}"
        self._course.journal.conclude(self.id, OperationStatus.DONE, done)
        return reports

    def cancel(self) -> None:
        """Ask for the old state; takes effect unless the switchover has begun."""
        self._course.history.note(NoteKind.ASKED, request="cancel")
        self._course.hurried = True
        self._course.fail(Failure.CANCELLED, "cancelled")
        self._course.going.set()
        self._interrupt()

    def stop(self) -> None:
        """Leave everything as it is, jobs running, for ``promoter job resume``."""
        self._course.history.note(NoteKind.ASKED, request="stop")
        self._course.hurried = True
        self._stopped = True
        self._course.going.set()
        self._interrupt()

    async def change_speed(self, speed: int) -> None:
        """Limit each disk's seed or mirror to ``speed`` bytes per second, 0 for no limit."""
        self._course.history.note(NoteKind.ASKED, request="speed", speed=speed)
        self._course.save(replace(self.intent, choices=replace(self.intent.choices, speed=speed)))
        for pace in self._course.paces.values():
            pace.change(speed)
        if not (self.intent.domain and not self._course.going.is_set()):  # its pause is a speed
            for guest, job in await self._course.jobs():
                await guest.set_speed(job, speed)

    async def pause(self) -> None:
        """Stop copying until `go_on`. A switchover that has begun is not held up."""
        self._course.history.note(NoteKind.ASKED, request="pause")
        self._course.going.clear()
        for pace in self._course.paces.values():
            pace.pause()
        if self._acting:
            await self._pause_jobs()
        self._on_step("pause")

    async def go_on(self) -> None:
        """Copy on after a `pause`."""
        if self._course.going.is_set():
            raise Refused(
                f"operation {self.id} runs and is not paused", f"See: promoter job watch {self.id}"
            )
        self._course.history.note(NoteKind.ASKED, request="go on")
        for pace in self._course.paces.values():
            pace.go_on()
        await self._resume_jobs()
        self._course.going.set()
        self._on_step("go on")

    async def _pause_jobs(self) -> None:
        for guest, job in await self._course.jobs():
            with suppress(CommandFailed):  # paused before, or it has just ended
                await guest.pause_job(job)

    async def _resume_jobs(self) -> None:
        for guest, job in await self._course.jobs():
            with suppress(CommandFailed):  # not paused, or it has just ended
                await guest.resume_job(job, self.intent.choices.speed)

    async def _end_pause(self) -> None:
        """Whoever paused the jobs of an interrupted operation is gone."""
        with suppress(PromoterError):  # no guest: the look finds out more
            self._course.guest = await self._course.connect(self.intent)
            await self._resume_jobs()

    def _interrupt(self) -> None:
        if self._acting:
            self._acting.cancel()

    async def look(self) -> Seen:
        """What there is now; not before `go_on` when the next step would be one forward."""
        seen = await self._look()
        while not self._course.going.is_set() and self.decide(seen).do in FORWARD:
            await self._pause_jobs()
            await self._course.going.wait()
            seen = await self._look()
        return seen

    async def _look(self) -> Seen:
        view = await self._course.view()
        for index, disk in enumerate(self.intent.disks):
            if view and not disk.made and has_made(disk, view):
                self._course.save(self.intent.with_disk(index, replace(disk, made=True)))
        try:
            disks = tuple(observe(disk, view) for disk in self.intent.disks)
        except OSError as error:
            hint = f"Mend that, then: promoter job resume {self.id}"
            raise Interrupted(f"cannot see the disks' files: {error}", hint) from error
        self._course.seen = Seen(alive=view is not None and view.runs, disks=disks)
        return self._course.seen

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
        switched = any(disk.switched for disk in self._course.seen.disks)
        if switched and self.intent.kind is not Kind.UNDO:
            self._note_switched()
            names = [d.name for d, s in self._course.pairs() if not s.switched]
            error: PromoterError = Interrupted(
                f"{', '.join(names)} stayed on the old chain, the other disks are done:"
                f" {self.intent.reason or 'the guest is gone'}",
                f"{self.intent.kind} what is left once more.".capitalize(),
            )
        else:
            error = error_of(self.intent)
        if isinstance(error, NoSpace):
            self._course.save(replace(self.intent, failure=None, reason=""))
        else:
            cancelled = isinstance(error, Cancelled)
            status = OperationStatus.CANCELLED if cancelled else OperationStatus.FAILED
            self._course.journal.conclude(self.id, status, error.message)
        return error

    def _note_switched(self) -> None:
        switched = [disk.name for disk, seen in self._course.pairs() if seen.switched]
        self._course.history.note(NoteKind.SWITCHED, disks=switched)

    async def act(self, action: Action) -> None:
        """Do one action. `cancel` and `stop` end a seed or a wait at once, nothing else."""
        self._on_step(str(action))
        if action.do in FORWARD and not self._joined:
            await asyncio.to_thread(self._course.leases.join, self.intent.disks)
            self._joined = True
        work = asyncio.create_task(acts.perform(self._course, action), name=str(action))
        self._acting = work if action.do in STOPPABLE else None
        try:
            await work
        except asyncio.CancelledError:
            if not (self._stopped or self.intent.failure is Failure.CANCELLED):
                raise
        finally:
            self._acting = None
            self._course.note_leases()
            self._course.history.step_ended(self._course.reports.values())

    def failed(self, action: Action, error: PromoterError) -> None:
        if isinstance(error, ConnectionLost):
            return
        if action.do in MUST_WORK:
            hint = f"{error.hint} Continue: promoter job resume {self.id}".strip()
            raise Interrupted(f"{action} did not work: {error.message}", hint) from error
        kinds = {NoSpace: Failure.NO_SPACE, Refused: Failure.REFUSED}
        found = next((kinds[kind] for kind in kinds if isinstance(error, kind)), Failure.JOB_FAILED)
        self._course.fail(found, error.message)
