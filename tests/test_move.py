"""`decide`, over every way, combination of intent and observation, and over every history.

The first half asks it about everything that could be seen, also what should never be. The
second half is a model of the guest, the files and whatever may kill, reboot or disturb
them: it walks every history and holds the promise after every step: the disk that the
next boot opens has every acknowledged write, and nobody stays frozen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from promoter.chain import BackingChain, DiskOptions, FileId, Image
from promoter.operations.move import (
    FINAL,
    Action,
    Active,
    Choices,
    DiskIntent,
    DiskSeen,
    Do,
    Failure,
    Job,
    Kind,
    Move,
    Seen,
    Target,
    Verdict,
    Way,
    decide,
    next_of_each,
)
from promoter.storage.names import Named, Names
from promoter.storage.seed import Geometry, SeedMethod
from tests.struck import STEPS

BOOL = (False, True)
FILES_ONLY = FINAL | {Do.DISCARD, Do.TIDY}
LAYER_JOBS = tuple(job for job in Job if job not in (Job.READY, Job.PENDING))  # they end alone


def disk_intent(index: int, way: Way) -> DiskIntent:
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
        way=way,
    )


@cache
def promotion(
    way: Way = Way.MIRROR,
    disks: int = 1,
    failure: Failure | None = None,
    *,
    tidied: bool = False,
    stopped: bool = False,
    slowed: bool = False,
) -> Move:
    return Move(
        "00000000",
        "g",
        Choices(),
        tuple(disk_intent(index, way) for index in range(disks)),
        failure=failure,
        tidied=tidied,
        stopped=stopped,
        limits={"vd0": {"bps_wr": 0}} if slowed else {},
    )


@cache
def every_disk(way: Way, *, changed: bool = True) -> tuple[DiskSeen, ...]:
    """Everything that could be seen of a disk that goes this way."""
    targets: list[Target] = [target for target in Target if target is not Target.LAYER]
    jobs, attached, prepared = tuple(Job), list(BOOL), list(BOOL)
    if way in (Way.COMMIT, Way.COMMIT_BELOW):
        targets, attached = [Target.LAYER], [False]
    if way is Way.COMMIT_BELOW:
        jobs, prepared = LAYER_JOBS, [False]
    unchanged = BOOL if changed else (True,)
    fields = itertools.product(Active, jobs, Named, targets, attached, prepared, unchanged)
    return tuple(DiskSeen(*each) for each in fields)


def after_death(disk: DiskSeen) -> DiskSeen:
    return replace(disk, active=Active.ABSENT, job=Job.NONE, attached=False, unchanged=False)


def check_decision(intent: Move, seen: Seen) -> None:
    """What must hold whatever is seen."""
    action = decide(intent, seen)
    way = intent.disks[0].way
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
            assert disk.target is not Target.LAYER or disk.prepared, "a layer is nobody's to remove"
        case Do.SEED:
            seeded = [disks[i] for i, do in next_of_each(intent, seen).items() if do is Do.SEED]
            assert seeded
            assert not intent.failure
            assert all(d.job is Job.NONE or way is Way.SNAPSHOT for d in seeded)
            assert all(d.unchanged and not d.attached for d in seeded)
            assert all(d.target is Target.ABSENT for d in seeded)
        case Do.MIRROR | Do.REPLAN:
            assert disk
            assert not intent.failure
            assert disk.job is Job.NONE
            assert disk.unchanged or action.do is Do.REPLAN
            made = disk.target in (Target.SEEDED, Target.USED)
            assert made is not (action.do is Do.REPLAN) or disk.target is Target.LAYER
            assert disk.attached or disk.target is not Target.USED
            assert way is not Way.SNAPSHOT or action.do is Do.REPLAN
        case Do.SWITCH_OVER:
            assert not intent.failure
            rest = [d for d in disks if not d.switched]
            assert all(d.prepared and d.unchanged for d in rest)
            assert all((d.active, d.named) == (Active.OLD, Named.OLD) for d in rest)
            if way is Way.SNAPSHOT:
                assert all(d.target is Target.SEEDED for d in rest)
            else:
                assert all(d.job is Job.READY for d in rest)
            assert way is not Way.COMMIT_BELOW
        case Do.TIDY | Do.DONE:
            assert all(d.switched for d in disks)
            assert intent.tidied is (action.do is Do.DONE)
            assert not (seen.alive and intent.limits)
        case Do.GIVE_UP:
            left = [d for d in disks if not d.switched]
            assert left
            assert all(d.named is Named.OLD and d.job is Job.NONE for d in left)
            assert not any(d.attached or d.prepared for d in left)
            assert all(d.target in (Target.ABSENT, Target.LAYER) for d in left)
            assert not (seen.alive and intent.limits)
        case Do.UNLIMIT:
            assert intent.limits
            assert not next_of_each(intent, seen), "all that can still stand still goes first"
        case Do.STUCK:
            assert any(d.named is not Named.OLD and not d.switched for d in disks)
        case _:
            assert action.do in (Do.DISMISS, Do.AWAIT_READY, Do.PREPARE)


@pytest.mark.parametrize("way", Way)
def test_every_combination_for_one_disk_is_decided_safely(way: Way) -> None:
    for disk in every_disk(way):
        for failure, tidied in itertools.product((None, *Failure), BOOL):
            slowed = failure in (None, Failure.CANCELLED)
            intent = promotion(way, 1, failure, tidied=tidied, slowed=slowed)
            check_decision(intent, Seen(alive=True, disks=(disk,)))
            check_decision(intent, Seen(alive=False, disks=(after_death(disk),)))


@pytest.mark.parametrize("way", Way)
def test_every_combination_for_two_disks_is_decided_safely(way: Way) -> None:
    some = [d for d in every_disk(way, changed=False) if d.named is not Named.UNKNOWN]
    others = some[::17] if len(some) > 200 else some[::3]
    intents = [promotion(way, 2, failure) for failure in (None, Failure.JOB_FAILED)]
    for first, second in itertools.product(some, others):
        for intent in intents:
            check_decision(intent, Seen(alive=True, disks=(first, second)))


@pytest.mark.parametrize("way", Way)
def test_a_guest_that_we_stopped_is_continued_before_anything_else(way: Way) -> None:
    stopped = promotion(way, stopped=True)
    for disk in every_disk(way):
        assert decide(stopped, Seen(alive=True, disks=(disk,))) == Action(Do.CONTINUE)
        dead = Seen(alive=False, disks=(after_death(disk),))
        assert decide(stopped, dead) == decide(promotion(way), dead)


@pytest.mark.parametrize("failure", [None, Failure.NO_SPACE])
def test_an_undo_goes_back_with_one_disk_after_the_other_and_does_no_more(
    failure: Failure | None,
) -> None:
    some = every_disk(Way.MIRROR, changed=False)[::7]
    for first, second in itertools.product(some, some[::5]):
        intent = replace(promotion(Way.MIRROR, 2, failure), kind=Kind.UNDO)
        names = [first.named, second.named]
        for alive, tidied in itertools.product(BOOL, BOOL):
            found = replace(intent, tidied=tidied)
            action = decide(found, Seen(alive=alive, disks=(first, second)))
            match action.do:
                case Do.GO_BACK:
                    assert action.disk is not None
                    assert names[action.disk] is Named.NEW
                    assert failure is None
                case Do.GIVE_UP:
                    assert Named.NEW in names
                    assert failure
                case Do.STUCK:
                    assert Named.UNKNOWN in names
                case _:
                    assert names == [Named.OLD, Named.OLD]
                    assert action.do is (Do.DONE if tidied else Do.TIDY)


@pytest.mark.parametrize("failure", [None, *Failure])
def test_a_verification_comes_when_all_is_done_but_tidying(failure: Failure | None) -> None:
    plain = promotion(failure=failure)
    asked = replace(plain, choices=Choices(verify=True))
    found = asked.with_disk(0, replace(asked.disks[0], verdict=Verdict(difference="here")))
    for disk in every_disk(Way.MIRROR):
        for seen in (Seen(alive=True, disks=(disk,)), Seen(False, (after_death(disk),))):
            usual = decide(plain, seen)
            before_tidying = Action(Do.VERIFY, 0) if usual.do is Do.TIDY else usual
            assert decide(asked, seen) == before_tidying
            assert decide(found, seen) == usual


def test_a_decision_is_the_same_when_asked_again() -> None:
    for disk in every_disk(Way.MIRROR):
        seen = Seen(alive=True, disks=(disk,))
        assert decide(promotion(), seen) == decide(promotion(), seen)


@dataclass(frozen=True)
class World:
    """A guest with one disk, its files, and where the acknowledged writes are.

    ``stopped`` is what the intent says of the guest's CPUs, ``standing`` how they are;
    ``slowed``: the intent has limits that were the guest's own.
    """

    way: Way
    seen: DiskSeen
    alive: bool = True
    failure: Failure | None = None
    tidied: bool = False
    stopped: bool = False
    standing: bool = False
    slowed: bool = False
    writes_on: frozenset[Named] = frozenset({Named.OLD})

    @property
    def writing(self) -> bool:
        return self.alive and not self.standing and self.seen.job is not Job.PENDING

    def with_seen(self, **changes: Any) -> World:
        return replace(self, seen=replace(self.seen, **changes))

    def running(self) -> World:
        """The guest writes: only the disk that it writes to has every write.

        A commit below merges layers that nobody writes to: either chain has the active one.
        """
        if not self.writing or self.way is Way.COMMIT_BELOW:
            return self
        side = Named.NEW if self.seen.active is Active.NEW else Named.OLD
        return replace(self, writes_on=frozenset({side}))


BOTH = frozenset({Named.OLD, Named.NEW})


def start(way: Way) -> World:
    commits = way in (Way.COMMIT, Way.COMMIT_BELOW)
    seen = DiskSeen(
        active=Active.OLD,
        job=Job.NONE,
        named=Named.OLD,
        target=Target.LAYER if commits else Target.ABSENT,
        attached=False,
        prepared=False,
        unchanged=True,
    )
    return World(way, seen)


def acted(world: World, action: Action) -> list[World]:
    """The worlds that an action passes through; the last one is its success."""
    match action.do:
        case Do.SEED:
            return [world.with_seen(target=Target.USED), world.with_seen(target=Target.SEEDED)]
        case Do.MIRROR if world.seen.target is Target.LAYER:
            return [world.with_seen(job=Job.RUNNING)]
        case Do.MIRROR:
            attached = world.with_seen(attached=True)
            return [attached, attached.with_seen(job=Job.RUNNING, target=Target.USED)]
        case Do.AWAIT_READY:
            return ready(world)
        case Do.PREPARE:
            return [world.with_seen(prepared=True)]
        case Do.SWITCH_OVER:
            return switched_over(world)
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
            layer = world.seen.target is Target.LAYER
            target = Target.LAYER if layer else Target.ABSENT
            return [world.with_seen(target=target, prepared=False)]
        case Do.REPLAN if world.way is not Way.MIRROR:
            return [replace(world, failure=Failure.REFUSED)]
        case Do.REPLAN:
            return [world.with_seen(active=Active.OLD, unchanged=True)]
        case Do.TIDY:
            return [replace(world, tidied=True)]
        case Do.CONTINUE:
            return continued(world)
        case Do.UNLIMIT:
            return [replace(world, slowed=False)]
        case _:
            raise AssertionError(action)


def ready(world: World) -> list[World]:
    match world.way:
        case Way.COMMIT:
            slowed = replace(world, slowed=True)
            return [slowed, slowed.with_seen(job=Job.READY)]
        case Way.COMMIT_BELOW:
            merged = replace(world, writes_on=BOTH)
            named = merged.with_seen(named=Named.NEW)  # QEMU rewrites the header, then the graph
            dead = replace(named, seen=after_death(named.seen), alive=False)
            ended = named.with_seen(active=Active.NEW, job=Job.DONE, unchanged=False)
            return [merged, dead, ended]
        case _:
            return [world.with_seen(job=Job.READY)]


def switched_over(world: World) -> list[World]:
    if world.way is Way.MIRROR:
        drained = replace(world.with_seen(job=Job.PENDING), writes_on=BOTH)
        return [drained, *finished(drained)]
    told = replace(world, stopped=True)
    standing = replace(told, standing=True, writes_on=BOTH)
    if world.way is Way.COMMIT:
        late = replace(told, writes_on=frozenset({Named.OLD}), standing=True)
        drained = standing.with_seen(job=Job.PENDING)
        steps = [told, late, drained, *finished(drained)]
    else:
        frozen = standing.with_seen(active=Active.NEW, attached=True, unchanged=False)
        steps = [told, standing, standing.with_seen(attached=True), frozen, *settled(frozen)]
    return [*steps, *continued(steps[-1])]


def finished(drained: World) -> list[World]:
    committed = drained.with_seen(named=Named.NEW, prepared=False)
    switched = committed.with_seen(job=Job.DONE, active=Active.NEW, unchanged=False)
    return [committed, switched]


def settled(world: World) -> list[World]:
    return [world.with_seen(named=Named.NEW, prepared=False)]


def continued(world: World) -> list[World]:
    """A snapshot's name follows what the guest has before it goes on."""
    seen = world.seen
    steps: list[World] = []
    if world.way is Way.SNAPSHOT and (seen.active, seen.named) == (Active.NEW, Named.OLD):
        steps = settled(world)
    going = replace((steps or [world])[-1], standing=False)
    return [*steps, going, replace(going, stopped=False)]


def disturbed(world: World) -> Iterator[World]:
    """What others may do at any moment."""
    seen = world.seen
    if world.failure is None:
        yield replace(world, failure=Failure.CANCELLED)
    if world.alive:
        yield replace(world, seen=after_death(seen), alive=False, standing=False)
    else:
        active = Active.NEW if seen.named is Named.NEW else Active.OLD
        back = replace(seen, active=active, unchanged=seen.named is Named.OLD)
        yield replace(world, seen=back, alive=True)
    if world.alive and seen.job in (Job.RUNNING, Job.READY):
        yield world.with_seen(job=Job.FAILED)
    if world.alive and seen.job is Job.PENDING:
        yield guarded(world)
    if world.alive and seen.job is Job.NONE and seen.active is Active.OLD:
        yield world.with_seen(active=Active.OTHER, unchanged=False)
        yield world.with_seen(unchanged=False)


def guarded(world: World) -> World:
    """promoter is dead or hangs, and the guard takes over."""
    if world.seen.named is Named.NEW:
        *_, world = finished(world)
    else:
        world = world.with_seen(job=Job.FAILED, prepared=False)
    return replace(world, standing=False)


def decision(world: World) -> Action:
    intent = promotion(
        world.way,
        1,
        world.failure,
        tidied=world.tidied,
        stopped=world.stopped,
        slowed=world.slowed,
    )
    return decide(intent, Seen(alive=world.alive, disks=(world.seen,)))


@cache
def reachable(way: Way) -> frozenset[World]:
    found: set[World] = set()
    todo = [start(way)]
    while todo:
        world = todo.pop().running()
        if world in found:
            continue
        found.add(world)
        todo.extend(disturbed(world))
        if (action := decision(world)).do not in FINAL:
            todo.extend(acted(world, action))
    return frozenset(found)


@pytest.mark.parametrize("way", Way)
def test_whoever_boots_gets_every_acknowledged_write_after_any_history(way: Way) -> None:
    worlds = reachable(way)
    assert {world.seen.named for world in worlds if not world.alive} == BOTH
    if way in (Way.MIRROR, Way.COMMIT):
        assert {world.seen.named for world in worlds if world.seen.job is Job.PENDING} == BOTH
    if way in (Way.COMMIT, Way.SNAPSHOT):
        assert {world.seen.named for world in worlds if world.standing} == BOTH
    for world in worlds:
        assert world.seen.named in world.writes_on, world


@pytest.mark.parametrize("way", Way)
def test_every_history_comes_to_an_end_that_the_names_agree_with(way: Way) -> None:
    for beginning in reachable(way):
        world = beginning
        for _ in range(40):
            action = decision(world)
            if action.do in FINAL:
                break
            world = acted(world, action)[-1].running()
        else:
            pytest.fail(f"no end from {beginning}")
        new = world.seen.named is Named.NEW
        assert action.do is (Do.DONE if new else Do.GIVE_UP), beginning
        assert world.seen.job is Job.NONE
        assert world.seen.switched is new
        assert not (world.alive and (world.standing or world.slowed)), beginning


IN_ORDER = {
    Way.MIRROR: list(STEPS),
    Way.COMMIT: [
        *(Do.MIRROR, Do.AWAIT_READY, Do.PREPARE, Do.SWITCH_OVER),
        *(Do.DISMISS, Do.UNLIMIT, Do.TIDY),
    ],
    Way.COMMIT_BELOW: [Do.MIRROR, Do.AWAIT_READY, Do.DISMISS, Do.TIDY],
    Way.SNAPSHOT: [Do.SEED, Do.PREPARE, Do.SWITCH_OVER, Do.TIDY],
}


@pytest.mark.parametrize("way", Way)
def test_a_fresh_operation_goes_through_its_steps_in_order(way: Way) -> None:
    """Of a mirror, the patent's (ARCHITECTURE.md)."""
    world, steps = start(way), []
    while (action := decision(world)).do not in FINAL:
        steps.append(action.do)
        world = acted(world, action)[-1].running()
    assert steps == IN_ORDER[way]
    assert action == Action(Do.DONE)
