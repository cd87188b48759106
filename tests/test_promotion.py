"""`decide`, over every combination of intent and observation, and over every history.

The first half asks it about everything that could be seen, also what should never be. The
second half is a model of the guest, the files and whatever may kill, reboot or disturb
them: it walks every history and holds the promise after every step: the disk that the
next boot opens has every acknowledged write, and nobody stays frozen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from promoter.chain import BackingChain, DiskOptions, FileId, Image
from promoter.operations.promotion import (
    FINAL,
    Action,
    Active,
    Choices,
    DiskIntent,
    DiskSeen,
    Do,
    Failure,
    Job,
    Promotion,
    Seen,
    Target,
    decide,
    next_of_each,
)
from promoter.storage.names import Named, Names
from promoter.storage.seed import Geometry, SeedMethod
from tests.struck import STEPS

BOOL = (False, True)
FILES_ONLY = FINAL | {Do.DISCARD, Do.TIDY}


def disk_intent(index: int) -> DiskIntent:
    image = Image("node", "qcow2", Path("/d"), "file", None, 1, 1)
    path = Path(f"/disk{index}")
    return DiskIntent(
        mark=f"promoter-00000000-{index}",
        index=index,
        key=f"vd{index}",
        name=f"vd{index}",
        chain=BackingChain((image, image)),
        root="#block1",
        below=(),
        options=DiskOptions(),
        names=Names(FileId(1, index), path, path, path, path, in_place=True),
        method=SeedMethod.CONVERT,
        geometry=Geometry("qcow2"),
        required=0,
    )


def promotion(disks: int, failure: Failure | None = None, *, tidied: bool = False) -> Promotion:
    intents = tuple(disk_intent(index) for index in range(disks))
    return Promotion("00000000", "g", Choices(), intents, failure=failure, tidied=tidied)


INTENTS = {
    (count, failure, tidied): promotion(count, failure, tidied=tidied)
    for count, failure, tidied in itertools.product((1, 2), (None, *Failure), BOOL)
}


def every_disk(*, unchanged: tuple[bool, ...] = BOOL) -> Iterator[DiskSeen]:
    for fields in itertools.product(Active, Job, Named, Target, BOOL, BOOL, unchanged):
        yield DiskSeen(*fields)


def after_death(disk: DiskSeen) -> DiskSeen:
    return replace(disk, active=Active.ABSENT, job=Job.NONE, attached=False, unchanged=False)


def check_decision(intent: Promotion, seen: Seen) -> None:
    """What must hold whatever is seen."""
    action = decide(intent, seen)
    disks = seen.disks
    disk = disks[action.disk] if action.disk is not None else None
    frozen = any(d.job is Job.PENDING for d in disks)
    assert not frozen or action.do in (Do.FINISH_SWITCHOVER, Do.UNFREEZE)
    assert seen.alive or action.do in FILES_ONLY
    match action.do:
        case Do.FINISH_SWITCHOVER:
            assert frozen
            assert any(d.named is Named.NEW for d in disks)
        case Do.UNFREEZE:
            assert disk
            assert disk.named is not Named.NEW
        case Do.PUT_NAME_BACK:
            assert disk
            assert (disk.named, disk.active) == (Named.NEW, Active.OLD)
        case Do.COMMIT_NAME:
            assert disk
            assert (disk.named, disk.active, disk.prepared) == (Named.OLD, Active.NEW, True)
        case Do.CANCEL:
            assert disk
            assert disk.named is Named.OLD
            assert disk.active is not Active.NEW
        case Do.DETACH | Do.DISCARD:
            assert disk
            assert disk.active is not Active.NEW
            assert (disk.job, disk.named) == (Job.NONE, Named.OLD)
            assert action.do is Do.DETACH or not disk.attached
        case Do.SEED:
            seeded = [disks[i] for i, do in next_of_each(intent, seen).items() if do is Do.SEED]
            assert seeded
            assert not intent.failure
            assert all(d.job is Job.NONE and d.unchanged and not d.attached for d in seeded)
            assert all(d.target is Target.ABSENT for d in seeded)
        case Do.MIRROR | Do.REPLAN:
            assert disk
            assert not intent.failure
            assert disk.job is Job.NONE
            assert disk.unchanged or action.do is Do.REPLAN
            assert (disk.target is Target.ABSENT) is (action.do is Do.REPLAN)
            assert disk.attached or disk.target is not Target.USED
        case Do.SWITCH_OVER:
            assert not intent.failure
            rest = [d for d in disks if not d.switched]
            assert all(d.job is Job.READY and d.prepared and d.unchanged for d in rest)
            assert all((d.active, d.named) == (Active.OLD, Named.OLD) for d in rest)
        case Do.TIDY | Do.DONE:
            assert all(d.switched for d in disks)
            assert intent.tidied is (action.do is Do.DONE)
        case Do.GIVE_UP:
            left = [d for d in disks if not d.switched]
            assert left
            assert all(d.named is Named.OLD and d.job is Job.NONE for d in left)
            assert not any(d.attached or d.prepared for d in left)
            assert all(d.target is Target.ABSENT for d in left)
        case Do.STUCK:
            assert any(d.named is not Named.OLD and not d.switched for d in disks)
        case _:
            assert action.do in (Do.DISMISS, Do.AWAIT_READY, Do.PREPARE)


def test_every_combination_for_one_disk_is_decided_safely() -> None:
    for disk in every_disk():
        for failure, tidied in itertools.product((None, *Failure), BOOL):
            intent = INTENTS[1, failure, tidied]
            check_decision(intent, Seen(alive=True, disks=(disk,)))
            check_decision(intent, Seen(alive=False, disks=(after_death(disk),)))


def test_every_combination_for_two_disks_is_decided_safely() -> None:
    some = [disk for disk in every_disk(unchanged=(True,)) if disk.named is not Named.UNKNOWN]
    intents = [INTENTS[2, failure, False] for failure in (None, Failure.JOB_FAILED)]
    for first, second in itertools.product(some, some[::7]):
        for intent in intents:
            check_decision(intent, Seen(alive=True, disks=(first, second)))


def test_a_guest_that_we_stopped_is_continued_before_anything_else() -> None:
    stopped = replace(INTENTS[1, None, False], stopped=True)
    for disk in every_disk():
        assert decide(stopped, Seen(alive=True, disks=(disk,))) == Action(Do.CONTINUE)
        dead = Seen(alive=False, disks=(after_death(disk),))
        assert decide(stopped, dead) == decide(INTENTS[1, None, False], dead)


def test_a_decision_is_the_same_when_asked_again() -> None:
    for disk in every_disk():
        seen = Seen(alive=True, disks=(disk,))
        assert decide(INTENTS[1, None, False], seen) == decide(INTENTS[1, None, False], seen)


@dataclass(frozen=True)
class World:
    """A guest with one disk, its files, and where the acknowledged writes are."""

    seen: DiskSeen
    alive: bool = True
    failure: Failure | None = None
    tidied: bool = False
    writes_on: frozenset[Named] = frozenset({Named.OLD})

    @property
    def writing(self) -> bool:
        return self.alive and self.seen.job is not Job.PENDING

    def with_seen(self, **changes: object) -> World:
        return replace(self, seen=replace(self.seen, **changes))  # type: ignore[arg-type]

    def running(self) -> World:
        """The guest writes: only the disk that it writes to has every write."""
        if not self.writing:
            return self
        side = Named.NEW if self.seen.active is Active.NEW else Named.OLD
        return replace(self, writes_on=frozenset({side}))


START = World(
    DiskSeen(
        active=Active.OLD,
        job=Job.NONE,
        named=Named.OLD,
        target=Target.ABSENT,
        attached=False,
        prepared=False,
        unchanged=True,
    )
)


def acted(world: World, action: Action) -> list[World]:
    """The worlds that an action passes through; the last one is its success."""
    match action.do:
        case Do.SEED:
            return [world.with_seen(target=Target.USED), world.with_seen(target=Target.SEEDED)]
        case Do.MIRROR:
            attached = world.with_seen(attached=True)
            return [attached, attached.with_seen(job=Job.RUNNING, target=Target.USED)]
        case Do.AWAIT_READY:
            return [world.with_seen(job=Job.READY)]
        case Do.PREPARE:
            return [world.with_seen(prepared=True)]
        case Do.SWITCH_OVER:
            both = frozenset({Named.OLD, Named.NEW})
            drained = replace(world.with_seen(job=Job.PENDING), writes_on=both)
            return [drained, *finished(drained)]
        case Do.FINISH_SWITCHOVER:
            return finished(world)
        case Do.CANCEL | Do.UNFREEZE:
            return [world.with_seen(job=Job.FAILED)]
        case Do.DISMISS:
            failed = world.seen.job is Job.FAILED and world.failure is None
            failure = Failure.JOB_FAILED if failed else world.failure
            return [replace(world.with_seen(job=Job.NONE), failure=failure)]
        case Do.PUT_NAME_BACK:
            return [world.with_seen(named=Named.OLD)]
        case Do.COMMIT_NAME:
            return [world.with_seen(named=Named.NEW, prepared=False)]
        case Do.DETACH:
            return [world.with_seen(attached=False)]
        case Do.DISCARD:
            return [world.with_seen(target=Target.ABSENT, prepared=False)]
        case Do.REPLAN:
            return [world.with_seen(active=Active.OLD, unchanged=True)]
        case Do.TIDY:
            return [replace(world, tidied=True)]
        case _:
            raise AssertionError(action)


def finished(drained: World) -> list[World]:
    committed = drained.with_seen(named=Named.NEW, prepared=False)
    switched = committed.with_seen(job=Job.DONE, active=Active.NEW, unchanged=False)
    return [committed, switched]


def disturbed(world: World) -> Iterator[World]:
    """What others may do at any moment."""
    seen = world.seen
    if world.failure is None:
        yield replace(world, failure=Failure.CANCELLED)
    if world.alive:
        yield replace(world, seen=after_death(seen), alive=False)
    else:
        active = Active.NEW if seen.named is Named.NEW else Active.OLD
        back = replace(seen, active=active, unchanged=seen.named is Named.OLD)
        yield replace(world, seen=back, alive=True)
    if world.alive and seen.job in (Job.RUNNING, Job.READY):
        yield world.with_seen(job=Job.FAILED)
    if world.alive and seen.job is Job.NONE and seen.active is Active.OLD:
        yield world.with_seen(active=Active.OTHER, unchanged=False)
        yield world.with_seen(unchanged=False)


def decision(world: World) -> Action:
    intent = INTENTS[1, world.failure, world.tidied]
    return decide(intent, Seen(alive=world.alive, disks=(world.seen,)))


def reachable() -> set[World]:
    found: set[World] = set()
    todo = [START]
    while todo:
        world = todo.pop().running()
        if world in found:
            continue
        found.add(world)
        todo.extend(disturbed(world))
        if (action := decision(world)).do not in FINAL:
            todo.extend(acted(world, action))
    return found


WORLDS = reachable()


def test_whoever_boots_gets_every_acknowledged_write_after_any_history() -> None:
    frozen = {world.seen.named for world in WORLDS if world.seen.job is Job.PENDING}
    dead = {world.seen.named for world in WORLDS if not world.alive}
    assert frozen == dead == {Named.OLD, Named.NEW}
    for world in WORLDS:
        assert world.seen.named in world.writes_on, world


def test_every_history_comes_to_an_end_that_the_names_agree_with() -> None:
    for start in WORLDS:
        world = start
        for _ in range(40):
            action = decision(world)
            if action.do in FINAL:
                break
            world = acted(world, action)[-1].running()
        else:
            pytest.fail(f"no end from {start}")
        assert action.do is (Do.DONE if world.seen.named is Named.NEW else Do.GIVE_UP), start
        assert world.seen.job is Job.NONE
        assert world.seen.switched is (world.seen.named is Named.NEW)


def test_a_fresh_promotion_goes_through_the_patents_steps_in_order() -> None:
    world, steps = START, []
    while (action := decision(world)).do not in FINAL:
        steps.append(action.do)
        world = acted(world, action)[-1].running()
    assert steps == list(STEPS)
    assert action == Action(Do.DONE)
