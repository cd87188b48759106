"""The lease record: what is legal, and that nothing but a whole record is ever read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoter.lease import rules
from promoter.lease.record import (
    LARGEST,
    LAST_EPOCH,
    Answer,
    BadRecord,
    DiskIdentity,
    Grant,
    LeaseRecord,
    Operation,
    Owner,
    Request,
    Said,
    Stamp,
    State,
    Work,
    _checksum,
    encode,
    parse,
)
from promoter.lease.rules import (
    STEPS,
    Beat,
    Closed,
    Evidence,
    Holding,
    Illegal,
    Lock,
    Policy,
    Step,
    Storage,
    Unsettled,
)

DISK = DiskIdentity("d1", 7, 42)
ONE, TWO, THREE = (Owner(f"host-{name}", "boot-1") for name in ("one", "two", "three"))
STAMP = Stamp("n1", "2026-11-25T18:00:00Z")
CLOSED = Closed(node_gone=True, locks_free=True)
HELD = rules.create(DISK, ONE, STAMP)
RELEASING = rules.release(HELD, ONE.host, "r1", STAMP)
FREE = rules.free(RELEASING, ONE.host, CLOSED, STAMP)
LOANED = rules.lend(RELEASING, ONE.host, CLOSED, Grant(TWO.host, "r1", 30), STAMP)
RECORDS = {record.state: record for record in (HELD, RELEASING, FREE, LOANED)}
DEAD = Evidence(0, Beat.STOPPED, Lock.FREE, Storage.LOCAL)
GRANT = Grant(TWO.host, "r1", 30)
OPERATION = Operation("op1", "promote", "/state/op1.lock")
OTHER_FILE = DiskIdentity("d1", 7, 43)
WORKED_ON = rules.work(HELD, ONE.host, OPERATION, STAMP, OTHER_FILE)
MOVING = rules.work(HELD, ONE.host, OPERATION, STAMP, elsewhere="/vm/new")
MOVED_IN = rules.move_in(None, OTHER_FILE, MOVING, "/vm/old", STAMP)
ACTS: dict[Step, Callable[[LeaseRecord], LeaseRecord]] = {
    Step.CLAIM: lambda record: rules.claim(record, TWO, STAMP),
    Step.RESUME: lambda record: rules.resume(
        record, ONE, STAMP, process_alive=False, lock=Lock.FREE
    ),
    Step.RELEASE: lambda record: rules.release(record, ONE.host, "r2", STAMP),
    Step.ROLL_BACK: lambda record: rules.roll_back(record, ONE.host, STAMP),
    Step.FREE: lambda record: rules.free(record, ONE.host, CLOSED, STAMP),
    Step.LEND: lambda record: rules.lend(record, ONE.host, CLOSED, GRANT, STAMP),
    Step.TAKE_OVER: lambda record: rules.take_over(
        record, ONE, replace(DEAD, epoch=record.epoch), STAMP
    ),
    Step.BREAK: lambda record: rules.break_lease(record, record.epoch, Lock.FREE, "why", STAMP),
    Step.READERS: lambda record: rules.add_reader(record, ONE.host, "/vm/clone", STAMP),
    Step.WORK: lambda record: rules.work(record, ONE.host, OPERATION, STAMP, OTHER_FILE),
    Step.MOVE_IN: lambda record: rules.move_in(record, OTHER_FILE, MOVING, "/vm/old", STAMP),
    Step.MOVED: lambda record: rules.moved(moving(record), ONE.host, STAMP),
}


def moving(record: LeaseRecord) -> LeaseRecord:
    return replace(record, operation=OPERATION, elsewhere="/vm/new") if record.owner else record


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", ACTS)
def test_a_step_leads_where_the_table_says_or_changes_nothing(state: State, step: Step) -> None:
    record = RECORDS[state]
    before = encode(record)
    if wanted := STEPS.get((state, step)):
        after = ACTS[step](record)
        assert (after.state, after.epoch) == (wanted, record.epoch + 1)
        assert parse(LeaseRecord, encode(after), "x") == after
    else:
        with pytest.raises(Illegal):
            ACTS[step](record)
    assert encode(record) == before


@pytest.mark.parametrize(
    "act",
    [
        lambda: rules.release(HELD, TWO.host, "r", STAMP),
        lambda: rules.roll_back(RELEASING, TWO.host, STAMP),
        lambda: rules.free(HELD, TWO.host, CLOSED, STAMP),
        lambda: rules.lend(RELEASING, TWO.host, CLOSED, GRANT, STAMP),
        lambda: rules.add_reader(HELD, TWO.host, "/vm/clone", STAMP),
        lambda: rules.remove_reader(HELD, TWO.host, "/vm/clone", STAMP),
        lambda: rules.resume(HELD, TWO, STAMP, process_alive=False, lock=Lock.FREE),
        lambda: rules.resume(HELD, ONE, STAMP, process_alive=True, lock=Lock.FREE),
        lambda: rules.resume(HELD, ONE, STAMP, process_alive=False, lock=Lock.HELD),
        lambda: rules.free(HELD, ONE.host, Closed(True, False), STAMP),
        lambda: rules.free(HELD, ONE.host, Closed(False, True), STAMP),
        lambda: rules.lend(RELEASING, ONE.host, Closed(True, False), GRANT, STAMP),
        lambda: rules.free(HELD, ONE.host, Closed(True, True, idle=False), STAMP),
        lambda: rules.work(HELD, TWO.host, OPERATION, STAMP),
        lambda: rules.work(RELEASING, ONE.host, OPERATION, STAMP),
        lambda: rules.work(WORKED_ON, ONE.host, replace(OPERATION, id="op2"), STAMP),
        lambda: rules.work(MOVING, ONE.host, replace(OPERATION, id="op2"), STAMP),
        lambda: rules.move_in(None, OTHER_FILE, HELD, "/vm/old", STAMP),
        lambda: rules.moved(HELD, ONE.host, STAMP),
        lambda: rules.moved(MOVING, TWO.host, STAMP),
        lambda: rules.work_done(WORKED_ON, TWO.host, "op1", STAMP),
        lambda: rules.work_done(WORKED_ON, ONE.host, "op2", STAMP),
        lambda: rules.work_done(HELD, ONE.host, "op1", STAMP),
        lambda: rules.take_over(HELD, TWO, replace(DEAD, epoch=2), STAMP),
        lambda: rules.break_lease(HELD, 2, Lock.FREE, "why", STAMP),
        lambda: rules.break_lease(HELD, 1, Lock.HELD, "why", STAMP),
        lambda: rules.break_lease(HELD, 1, Lock.FREE, " ", STAMP),
        lambda: rules.claim(LOANED, THREE, STAMP, unchanged=1e6),
        lambda: rules.claim(LOANED, ONE, STAMP, unchanged=29),
        lambda: rules.lend(RELEASING, ONE.host, CLOSED, Grant(ONE.host, "r1", 30), STAMP),
    ],
)
def test_who_may_not_does_not(act: Callable[[], LeaseRecord]) -> None:
    with pytest.raises(Illegal):
        act()


def test_while_an_operation_works_the_lease_is_about_either_file_and_then_about_the_one_found() -> (
    None
):
    assert rules.found(WORKED_ON, 42) == WORKED_ON
    other = rules.found(WORKED_ON, 43)
    assert other
    assert (other.disk, other.alternate) == (OTHER_FILE, DISK)
    assert rules.found(WORKED_ON, 44) is None
    assert rules.found(HELD, 43) is None
    releasing = rules.release(other, ONE.host, "r1", STAMP)
    for after in (releasing, rules.roll_back(releasing, ONE.host, STAMP)):
        assert (after.operation, after.disk, after.alternate) == (OPERATION, OTHER_FILE, DISK)
        assert parse(LeaseRecord, encode(after), "x") == after
    evidence = replace(DEAD, epoch=other.epoch)
    with pytest.raises(Illegal, match="fence that host"):
        rules.take_over(other, TWO, evidence, STAMP)
    evidence = replace(evidence, fenced=True)
    for after in (
        rules.work_done(other, ONE.host, "op1", STAMP),
        rules.free(other, ONE.host, CLOSED, STAMP),
        rules.take_over(other, TWO, evidence, STAMP),
        rules.resume(other, ONE, STAMP, process_alive=False, lock=Lock.FREE),
    ):
        assert (after.operation, after.disk, after.alternate) == (None, OTHER_FILE, None)
    done = rules.work_done(releasing, ONE.host, "op1", STAMP)
    assert (done.state, done.request, done.operation) == (State.RELEASING, "r1", None)


@pytest.mark.parametrize("half", [MOVING, MOVED_IN])
def test_while_a_disk_moves_nobody_takes_either_file_for_it(half: LeaseRecord) -> None:
    evidence = replace(DEAD, epoch=half.epoch, fenced=True)
    releasing = rules.release(half, ONE.host, "r1", STAMP)
    acts: tuple[Callable[[], LeaseRecord], ...] = (
        lambda: rules.take_over(half, TWO, evidence, STAMP),
        lambda: rules.resume(half, ONE, STAMP, process_alive=False, lock=Lock.FREE),
        lambda: rules.free(half, ONE.host, CLOSED, STAMP),
        lambda: rules.lend(releasing, ONE.host, CLOSED, GRANT, STAMP),
    )
    for act in acts:
        with pytest.raises(Unsettled, match="it is this file or /vm/"):
            act()
    assert releasing.elsewhere == half.elsewhere
    here = replace(CLOSED, here=True)
    for settled in (
        rules.free(half, ONE.host, here, STAMP),
        rules.work_done(half, ONE.host, "op1", STAMP),
        rules.break_lease(half, half.epoch, Lock.FREE, "why", STAMP),
    ):
        assert (settled.operation, settled.elsewhere) == (None, None)


def test_a_disk_is_lost_when_its_lease_was_broken_and_not_when_it_has_moved() -> None:
    assert not rules.is_lost(HELD, ONE)
    assert rules.is_lost(HELD, TWO)
    assert rules.is_lost(rules.break_lease(HELD, HELD.epoch, Lock.FREE, "it burnt", STAMP), ONE)
    assert not rules.is_lost(rules.moved(MOVING, ONE.host, STAMP), ONE)


def test_what_was_moved_is_had_elsewhere_alone() -> None:
    assert (MOVED_IN.disk, MOVED_IN.owner, MOVED_IN.elsewhere) == (OTHER_FILE, ONE, "/vm/old")
    gone = rules.moved(MOVING, ONE.host, STAMP)
    assert (gone.state, gone.owner, gone.elsewhere) == (State.FREE, None, "/vm/new")
    with pytest.raises(Illegal, match="the disk is /vm/new now"):
        rules.claim(gone, TWO, STAMP, unchanged=1e6)
    back = rules.move_in(gone, DISK, MOVING, "/vm/other", STAMP)
    assert (back.state, back.elsewhere, back.epoch) == (State.HELD, "/vm/other", gone.epoch + 1)
    broken = rules.break_lease(gone, gone.epoch, Lock.FREE, "it is wanted as it was", STAMP)
    assert rules.claim(broken, TWO, STAMP).owner == TWO


def test_a_grant_keeps_others_away_until_it_lapses() -> None:
    granted = rules.free(RELEASING, ONE.host, CLOSED, STAMP, GRANT)
    assert rules.claim(granted, TWO, STAMP).owner == TWO
    with pytest.raises(Illegal, match="granted to host-two"):
        rules.claim(granted, THREE, STAMP, unchanged=29.9)
    assert rules.claim(granted, THREE, STAMP, unchanged=30).owner == THREE


def test_a_loan_goes_back_to_its_lender_and_to_nobody_else() -> None:
    borrowed = rules.claim(LOANED, TWO, STAMP)
    assert borrowed.lender == ONE
    back = rules.free(borrowed, TWO.host, CLOSED, STAMP)
    with pytest.raises(Illegal):
        rules.claim(back, THREE, STAMP, unchanged=1e9)
    again = rules.claim(back, ONE, STAMP)
    assert (again.owner, again.lender) == (ONE, None)
    evidence = replace(DEAD, epoch=borrowed.epoch)
    with pytest.raises(Illegal, match="its lender's"):
        rules.take_over(borrowed, THREE, evidence, STAMP)
    assert rules.take_over(borrowed, ONE, evidence, STAMP).lender is None


def test_a_loan_goes_back_to_the_guest_that_waits_and_to_no_other_of_its_host() -> None:
    borrowed = rules.claim(LOANED, TWO, STAMP)
    back = rules.free(borrowed, TWO.host, CLOSED, STAMP)
    another = replace(ONE, pid=77)
    evidence = replace(DEAD, epoch=borrowed.epoch)
    for lives in (True, False):
        assert rules.claim(back, ONE, STAMP, lender_lives=lives).owner == ONE
        taken = rules.take_over(borrowed, ONE, evidence, STAMP, lender_lives=lives)
        assert taken.owner == ONE
    with pytest.raises(Illegal, match="waits for it"):
        rules.claim(back, another, STAMP, lender_lives=True)
    with pytest.raises(Illegal, match="waits for it"):
        rules.take_over(borrowed, another, evidence, STAMP, lender_lives=True)
    assert rules.claim(back, another, STAMP).lender is None
    assert rules.take_over(borrowed, another, evidence, STAMP).lender is None


def test_a_base_is_not_claimed_while_others_read_through_it() -> None:
    base = rules.add_reader(FREE, TWO.host, "/vm/a", STAMP)
    base = rules.add_reader(base, ONE.host, "/vm/b", STAMP)
    with pytest.raises(Illegal, match="/vm/b read through it"):
        rules.claim(base, TWO, STAMP, through=["/vm/a"])
    base = rules.remove_reader(base, ONE.host, "/vm/b", STAMP)
    assert rules.claim(base, TWO, STAMP, through=["/vm/a"]).readers == ("/vm/a",)


def test_the_last_epoch_is_the_end_and_not_the_first_again() -> None:
    with pytest.raises(Illegal, match="the last"):
        rules.release(replace(HELD, epoch=LAST_EPOCH), ONE.host, "r", STAMP)


@pytest.mark.parametrize(
    ("record", "holding", "epoch", "said"),
    [
        (None, Holding("host-one", Policy.SHUTDOWN), 1, Said.NOT_OWNER),
        (HELD, Holding("host-two", Policy.SHUTDOWN), 1, Said.NOT_OWNER),
        (HELD, Holding("host-one", Policy.SHUTDOWN), 2, Said.NOT_OWNER),
        (HELD, Holding("host-one", Policy.SHUTDOWN), 1, Said.ACCEPTED),
        (HELD, Holding("host-one", Policy.NEVER), 1, Said.REFUSED),
        (HELD, Holding("host-one", Policy.CLOSE, Work("op1", "mirror", 1, 2)), 1, Said.BUSY),
        (HELD, Holding("host-one", Policy.CLOSE, held_for=1, at_least=5), 1, Said.BUSY),
        (HELD, Holding("host-one", Policy.CLOSE, held_for=5, at_least=5), 1, Said.ACCEPTED),
        (HELD, Holding("host-one", Policy.LOAN), 1, Said.ACCEPTED),
        (replace(HELD, lender=THREE), Holding("host-one", Policy.LOAN), 1, Said.REFUSED),
        (replace(HELD, owner=TWO), Holding("host-two", Policy.LOAN), 1, Said.REFUSED),
        (RELEASING, Holding("host-one", Policy.CLOSE), 1, Said.ACCEPTED),
        (replace(RELEASING, request="r2"), Holding("host-one", Policy.CLOSE), 1, Said.BUSY),
        (replace(RELEASING, request="r2"), Holding("host-one", Policy.CLOSE), 7, Said.NOT_OWNER),
        (FREE, Holding("host-one", Policy.CLOSE), 1, Said.RELEASED),
        (LOANED, Holding("host-one", Policy.CLOSE), 1, Said.RELEASED),
    ],
)
def test_an_owner_answers(
    record: LeaseRecord | None, holding: Holding, epoch: int, said: Said
) -> None:
    given_answer = rules.answer(record, Request("r1", epoch, TWO, ""), holding)
    assert given_answer.said is said
    assert parse(Answer, encode(given_answer), "x") == given_answer


def test_requests_are_served_in_the_order_of_their_tickets() -> None:
    queue = [Request("old", 1, TWO, ""), Request("a", 3, TWO, ""), Request("b", 3, THREE, "")]
    assert rules.first_in_queue(queue, 3) == queue[1]
    assert rules.first_in_queue(queue, 4) is None


# --- bytes -----------------------------------------------------------------------------------


def sealed(**changes: Any) -> bytes:
    """A record with other fields and the right checksum; None takes a field away."""
    body = json.loads(encode(RELEASING)) | changes
    body = {key: value for key, value in body.items() if value is not ...}
    del body["sha256"]
    return json.dumps({**body, "sha256": _checksum(body)}).encode()


def test_what_is_sealed_again_unchanged_is_read() -> None:
    assert parse(LeaseRecord, sealed(), "x") == RELEASING


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not whole JSON"),
        (b"null", "no JSON object"),
        (b"\xff\xfe", "not whole JSON"),
        (b"[" * 60000, "not whole JSON"),
        (b"1" * 5000, "not whole JSON"),
        (b" " * LARGEST + b"{}", "larger than"),
        (encode(HELD)[:-20], "not whole JSON"),
        (encode(HELD).replace(b'"epoch": 1', b'"epoch": 2'), "checksum"),
        (encode(HELD).replace(b'"epoch": 1', b'"epoch": NaN'), "not whole JSON"),
        (encode(HELD).replace(b'"epoch": 1', b'"epoch": 1, "epoch": 1'), "not whole JSON"),
        (encode(Request("r1", 1, TWO, "")), "format"),
        (sealed(format=...), "format"),
        (sealed(version=2), "version"),
        (sealed(version=True), "version"),
        (sealed(version=...), "version"),
        (re.sub(b'"sha256": ".', b'"sha256": "x', encode(HELD)), "checksum"),
        (sealed(epoch=0), "epoch"),
        (sealed(epoch=1e3), "epoch"),
        (sealed(epoch="1"), "epoch"),
        (sealed(epoch=10**9), "epoch"),
        (sealed(state="lent"), "state"),
        (sealed(surprise=1), "surprise"),
        (sealed(owner={"host": "a", "boot": "b", "root": True}), "root"),
        (sealed(owner={"host": "../../etc", "boot": "b"}), "host"),
        (sealed(owner=None), "without an owner"),
        (sealed(state="free"), "with an owner"),
        (sealed(request=None), "releasing without a request"),
        (sealed(nonce=...), "nonce"),
        (sealed(nonce="a\n"), "nonce"),
        (sealed(disk={"uuid": "d1", "device": 7, "inode": 2**64}), "not whole JSON.*too large"),
        (sealed(note="x" * 2000), "note"),
        (sealed(alternate={"uuid": "d1", "device": 7, "inode": 43}), "without an operation"),
        (
            sealed(state="free", owner=None, operation={"id": "a", "kind": "b", "lock": "c"}),
            "worked on",
        ),
    ],
)
def test_anything_but_a_whole_record_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(BadRecord, match=rf"/pool/disk\.lease is refused: .*{why}") as caught:
        parse(LeaseRecord, data, "/pool/disk.lease")
    assert caught.value.hint


names = st.text("abcdef0123456789-", min_size=1, max_size=64)
numbers = st.integers(0, 2**64 - 1)
texts = st.text(max_size=50)
owners = st.builds(Owner, names, names, st.none() | numbers, st.none() | numbers, st.none() | texts)
helds = st.builds(
    LeaseRecord,
    disk=st.builds(DiskIdentity, names, numbers, numbers),
    epoch=st.integers(1, LAST_EPOCH),
    state=st.just(State.HELD),
    owner=owners,
    nonce=names,
    wall=texts,
    lender=st.none() | owners,
    readers=st.lists(texts, max_size=5).map(tuple),
)


@given(helds)
def test_every_record_comes_back_as_it_was(record: LeaseRecord) -> None:
    assert parse(LeaseRecord, encode(record), "x") == record


@given(helds, st.data())
def test_no_damage_is_read_as_something_else(record: LeaseRecord, data: st.DataObject) -> None:
    whole = bytearray(encode(record))
    place = data.draw(st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "drop", "repeat"])):
        case "flip":
            whole[place] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del whole[place:]
        case "drop":
            del whole[place : place + data.draw(st.integers(1, 30))]
        case _:
            whole[place:place] = whole[place : place + 20]
    try:
        found = parse(LeaseRecord, bytes(whole), "x")
    except BadRecord:
        return
    assert found == record, "only the layout was touched"


@given(st.binary(max_size=2000) | st.text(max_size=500).map(str.encode))
def test_noise_is_refused_and_nothing_else_happens(noise: bytes) -> None:
    with pytest.raises(BadRecord):
        parse(LeaseRecord, noise, "x")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(json.loads(encode(LOANED)))), json_values)
def test_a_field_of_any_shape_is_read_or_refused(field: str, value: Any) -> None:
    with suppress(BadRecord):
        parse(LeaseRecord, sealed(**{field: value}), "x")
