"""From an action that `move.decide` has said to what does it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from promoter.errors import JobFailed, Refused
from promoter.operations import clearing, copying, proving, seeding, switching, undo, verify
from promoter.operations.course import Course
from promoter.operations.move import Action, DiskIntent, Do, Kind, next_of_each
from promoter.operations.promote import plan_disk
from promoter.operations.switchover import commit_all

MOST_REPLANS = 3


async def perform(course: Course, action: Action) -> None:
    """Do what `move.decide` has said."""
    if action.disk is None:
        await _together(course, action.do)
    else:
        await _one(course, action.do, action.disk, course.intent.disks[action.disk])


async def _together(course: Course, do: Do) -> None:
    match do:
        case Do.CONTINUE:
            await switching.continue_guest(course)
        case Do.UNLIMIT:
            await course.slowing.undo(course.alive)
            course.save(replace(course.intent, limits={}))
        case Do.SEED:
            needed = next_of_each(course.intent, course.seen)
            await seeding.seed_all(course, [index for index, need in needed.items() if need is do])
        case Do.FINISH_SWITCHOVER:
            await commit_all(course.plain, [d for d, s in course.pairs() if s.can_finish])
        case Do.AWAIT_READY:
            await copying.await_ready(course)
        case Do.SWITCH_OVER if course.intent.kind is Kind.SNAPSHOT:
            await switching.snapshot(course)
        case Do.SWITCH_OVER:
            await switching.switch_over(course)
        case Do.TIDY if course.intent.kind is Kind.UNDO:
            await undo.tidy(course)
        case Do.TIDY:
            await clearing.tidy(course)
        case _:
            raise AssertionError(do)


async def _one(course: Course, do: Do, index: int, disk: DiskIntent) -> None:
    match do:
        case Do.PUT_NAME_BACK:
            await switching.name(course, disk, disk.chain.active.file)
        case Do.COMMIT_NAME:
            await switching.name(course, disk, disk.names.target)
        case Do.PREPARE:
            await asyncio.to_thread(course.leases.announce, disk, disk.new)
            disk.names.prepare()
        case Do.DISCARD if disk.names.remote:
            await clearing.discard_remote(course, index, disk)
        case Do.DISCARD:
            clearing.discard(course, disk)
        case Do.REPLAN:
            await _replan(course, index, disk)
        case Do.CANCEL | Do.UNFREEZE:
            await copying.cancel(course, disk)
        case Do.DISMISS:
            await copying.dismiss(course, disk)
        case Do.MIRROR if disk.names.remote:
            await copying.start_remote(course, index, disk)
        case Do.MIRROR:
            await copying.start(course, course.with_its_nodes(index, disk))
        case Do.GO_BACK:
            await undo.go_back(course, index, disk)
        case Do.VERIFY:
            await proving.verify_disk(course, index, disk)
        case Do.DETACH:
            if course.intent.choices.verify:
                await verify.end(course.plain, disk)
            await course.plain.detach(disk.node)
        case _:
            raise AssertionError(do)


async def _replan(course: Course, index: int, disk: DiskIntent) -> None:
    """The chain is no longer the one that was seeded: plan and seed what is there now."""
    view = await course.alive.look()
    found = view.disk(disk.key)
    if found is None:
        raise JobFailed(f"{disk.name} was unplugged from the guest")
    if course.intent.kind is not Kind.PROMOTE:
        raise Refused(f"{disk.name}: its chain changed meanwhile", "Look at it, and try again.")
    if disk.replanned == MOST_REPLANS:
        raise JobFailed(f"{disk.name}: its chain changed {MOST_REPLANS + 1} times")
    if len(found.chain) == 1:
        course.save(course.intent.without_disk(index))
        return
    again = await plan_disk(course.alive, view, found, course.intent.choices, course.id, disk.index)
    assert again, "it has layers below"
    again = replace(again, replanned=disk.replanned + 1)
    course.save(course.intent.with_disk(index, again))
