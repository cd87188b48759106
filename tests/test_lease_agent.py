"""The agent: who may ask for a disk over the network, and that nothing else opens that door."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promoter.errors import LeaseHeld, Refused
from promoter.lease import certificates, claim, rules
from promoter.lease.agent import MOST_FROM_ONE_ADDRESS, MOST_REQUESTS, wake
from promoter.lease.bell import PATH
from promoter.lease.credentials import Credentials, Untrusted, parse_endpoint, peer_of
from promoter.lease.file import LeaseFile, hosts_of
from promoter.lease.host import Host, agent_directory, this_host
from promoter.lease.ledger import MOST_REFUSALS
from promoter.lease.liveness import BEAT_EVERY
from promoter.lease.record import (
    LARGEST,
    Answer,
    DiskIdentity,
    LeaseRecord,
    Owner,
    Request,
    Said,
    State,
    encode,
    parse,
)
from promoter.lease.rules import Holding, Policy, Role
from promoter.lease.run import HOLD_AT_LEAST
from promoter.lease.store import Asked
from promoter.lease.unit import unit
from tests.agents import (
    address_of,
    agent,
    audit,
    certify,
    client,
    exchange,
    free_port,
    ledger,
    poll,
    post,
    refusals,
    status,
)
from tests.cli import ended, promoter, start
from tests.test_lease_run import (
    Hosts,
    LeasingHost,
    Running,
    export,
    owner_of,
    record,
    said,
    wait_until_open,
)
from tests.vm import blank, wait_for


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return blank(tmp_path / "disk.qcow2", 1 << 20)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts with certificates."""
    both = LeasingHost(tmp_path, "host-a"), LeasingHost(tmp_path, "host-b")
    for host in both:
        certify(tmp_path / "ca", host.state)
    yield both
    for host in both:
        host.close()


def credentials(state: Path) -> Credentials:
    found = Credentials.of(state)
    assert found
    return found


def exported(disk: Path, host: LeasingHost, directory: Path) -> Running:
    """The disk, open on that host, which lets it go when it is asked to."""
    running = host.run(disk, "close", *export(disk, directory / "nbd"))
    wait_until_open(disk, host)
    return running


def signed(state: Path, disk: Path, **changes: Any) -> Request:
    """A request of the host of ``state`` for the disk as it is now."""
    now = record(disk)
    owner = this_host(state).owner(process=os.getpid())
    asked = dataclasses.replace(Request("r1", now.epoch, owner, "now"), **changes)
    return credentials(state).sign(asked, now.disk.uuid)


# --- the road ----------------------------------------------------------------------------------


def test_an_agent_brings_the_owners_answer_before_the_storage_would(
    hosts: Hosts, disk: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    a, b = hosts
    a.run(disk, "never", *export(disk, tmp_path / "nbd"))
    wait_until_open(disk, a)
    with agent(a.state):
        fast = statistics.median(refused_after(b.state, disk) for _ in range(15))
    slow = statistics.median(refused_after(b.state, disk) for _ in range(5))
    record_property("ms", f"{1000 * fast:.0f} by the agent, {1000 * slow:.0f} by the storage")
    assert fast < slow
    assert owner_of(disk) == a.name
    assert "its policy is never to release it" in refusals(a.state)
    assert any("the owner's agent was of no use" in why for why in refusals(b.state))


def refused_after(state: Path, disk: Path) -> float:
    host = this_host(state)
    store = LeaseFile(disk, ledger(state))
    before = time.monotonic()
    with pytest.raises(LeaseHeld, match="its policy is never"):
        claim.request(store, host, credentials(state), 30, lambda _: None)
    return time.monotonic() - before


def test_a_disk_passes_by_the_network_and_by_the_storage_when_that_is_cut(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    """The first owner's agent answers, the second's stands still."""
    before = None
    with agent(hosts[0].state), agent(hosts[1].state) as second:
        for number, host in enumerate((*hosts, hosts[0])):
            if number == 2:
                os.kill(second, signal.SIGSTOP)
            running = host.run(disk, "close", *export(disk, tmp_path / f"nbd-{number}"))
            wait_until_open(disk, host)
            if before:
                assert before.end().code == 0
            before = running
        os.kill(second, signal.SIGCONT)
    running.ask_to_end()
    steps = [line for host in hosts for line in audit(host.state) if line["event"] == "lease"]
    assert {line["epoch"] for line in steps} == set(range(1, 3 * 3))
    assert record(disk).state is State.FREE
    assert not list((hosts[0].state / "held").iterdir())


def test_a_lease_that_no_process_holds_is_answered_and_beaten_for(hosts: Hosts, disk: Path) -> None:
    a, b = hosts
    assert a.lease("acquire", disk).code == 0
    with agent(a.state):
        wait_for(lambda: bool(LeaseFile(disk).pulse(a.name)), "a heartbeat", 30)
        before = time.monotonic()
        ran = b.lease("acquire", disk)
        assert time.monotonic() - before < 20
    assert (ran.code, ran.result["error"]) == (10, "LeaseHeld")
    assert "no process of its owner's answers for it" in ran.result["message"]
    assert record(disk).epoch == 1


def test_who_was_told_that_a_disk_is_let_go_of_hears_when_nobody_is_left_to(
    hosts: Hosts, disk: Path
) -> None:
    """Its owner's process is killed while it waits for its command to end."""
    a, b = hosts
    deaf = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
    running = a.run(disk, "close", *deaf)
    wait_for(lambda: owner_of(disk) == a.name, "it to be had", 60)
    asking = start(b.state, "lease", "acquire", disk, "--timeout", 300, "--json")
    wait_for(lambda: record(disk).state is State.RELEASING, "it to be let go of", 60)
    running.process.kill()
    running.end()
    with agent(a.state):
        ran = ended(asking, 60)
    assert (ran.code, ran.result["error"]) == (10, "LeaseHeld"), ran
    assert "no process of its owner's answers for it" in ran.result["message"]
    assert a.lease("release", disk).code == 0


# --- who is believed ---------------------------------------------------------------------------


@pytest.mark.parametrize("forged", ["another host's agent", "another CA", "nobody", "nonsense"])
def test_a_forged_endpoint_does_no_harm(
    hosts: Hosts, disk: Path, tmp_path: Path, forged: str
) -> None:
    """Whoever wrote the lease can send a requester anywhere, where it says nothing."""
    a, b = hosts
    liar = LeasingHost(tmp_path, "host-c")
    authority = tmp_path / ("other-ca" if forged == "another CA" else "ca")
    certify(authority, liar.state)
    endpoint = {
        "nobody": f"127.0.0.1:{free_port()}",
        "nonsense": "http://[::1]/etc/passwd\nX: y",
    }.get(forged, "{}:{}".format(*address_of(liar.state)))
    (agent_directory(a.state) / "endpoint").write_text(endpoint)
    running = exported(disk, a, tmp_path)
    owner = record(disk).owner
    assert owner
    assert owner.endpoint == endpoint
    with agent(liar.state):
        ran = b.lease("acquire", disk)
    assert ran.code == 0, ran
    assert running.end().code == 0
    assert owner_of(disk) == b.name
    told = [line for line in audit(b.state) if line["event"] == "refused"]
    assert [line["host"] for line in told] == [a.name]
    why = {
        "another host's agent": "is host host-c, not host-a",
        "another CA": "certificate verify failed",
        "nobody": "refused",
        "nonsense": "is not where an agent could listen",
    }[forged]
    assert why in told[0]["why"]


def unproved(disk: Path, a: Path, b: Path, c: Path) -> dict[str, Request]:
    """Requests for the disk of ``a`` that prove nothing; ``c`` has another authority."""
    good = signed(b, disk)
    assert good.proof
    other_signature = f"{'0' * 8}{good.proof.signature[8:]}"
    named_b = dataclasses.replace(this_host(c), name="host-b")
    return {
        "unsigned": dataclasses.replace(good, proof=None),
        "changed": dataclasses.replace(good, epoch=good.epoch + 1),
        "another signature": dataclasses.replace(
            good, proof=dataclasses.replace(good.proof, signature=other_signature)
        ),
        "no certificate": dataclasses.replace(
            good, proof=dataclasses.replace(good.proof, certificate="-----BEGIN CERTIFICATE-----")
        ),
        "no hexadecimal digits": dataclasses.replace(
            good, proof=dataclasses.replace(good.proof, signature="zz")
        ),
        "another disk": credentials(b).sign(dataclasses.replace(good, proof=None), "other"),
        "another CA": signed(c, disk, requester=named_b.owner()),
        "another host": signed(b, disk, requester=this_host(a).owner()),
    }


def test_only_who_signs_is_believed_whichever_way_the_request_comes(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    a, b = hosts
    stranger = LeasingHost(tmp_path, "host-c")
    certify(tmp_path / "other-ca", stranger.state)
    running = exported(disk, a, tmp_path)
    store, disk_name = LeaseFile(disk), record(disk).disk.uuid
    with pytest.raises(Untrusted):
        peer_of(["urn:promoter:host:a", "urn:promoter:host:b"], 1)
    for what, wrong in unproved(disk, a.state, b.state, stranger.state).items():
        with pytest.raises(Untrusted):
            credentials(a.state).roles_of(wrong, disk_name)
        wrong = dataclasses.replace(wrong, id=what.replace(" ", "-"), epoch=1)
        assert answer_on_storage(store, wrong).said is Said.REFUSED, what
    assert record(disk).epoch == 1
    assert len(refusals(a.state)) == len(unproved(disk, a.state, b.state, stranger.state))
    assert credentials(a.state).roles_of(signed(b.state, disk), disk_name) == set(Role)
    lost = signed(b.state, disk, id="lost")
    (agent_directory(a.state) / "ca.pem").rename(tmp_path / "ca.pem")
    assert answer_on_storage(store, lost).said is Said.REFUSED, "it cannot know who asks"
    assert running.process.poll() is None
    running.ask_to_end()


def answer_on_storage(store: LeaseFile, request: Request) -> Answer:
    asked = Asked(store.ask(request), request)
    wait_for(lambda: store.answer_to(asked) is not None, f"an answer to {request.id}", 30)
    answer = store.answer_to(asked)
    assert answer
    store.withdraw(asked.ticket)
    return answer


@pytest.mark.parametrize("policy", Policy)
def test_what_a_running_guest_has_needs_a_role_of_its_own(policy: Policy) -> None:
    held = LeaseRecord(DiskIdentity("d", 1, 1), 1, State.HELD, Owner("a", "b"), "n", "")
    asked = Request("r", 1, Owner("b", "b"), "")

    def answer(*roles: Role) -> Said:
        return rules.answer(held, asked, Holding("a", policy), roles).said

    given_to = {
        Policy.NEVER: set[Role](),
        Policy.CLOSE: {Role.REQUEST},
    }.get(policy, {Role.REQUEST_RUNNING})
    assert {role for role in Role if answer(role) is Said.ACCEPTED} == given_to
    assert answer() is Said.REFUSED


def test_a_host_without_the_role_is_refused(hosts: Hosts, disk: Path, tmp_path: Path) -> None:
    a, b = hosts
    shutil.rmtree(agent_directory(b.state))
    certify(tmp_path / "ca", b.state, roles=[Role.REQUEST_RUNNING])
    exported(disk, a, tmp_path)
    with agent(a.state):
        ran = b.lease("request", disk)
        asked = signed(b.state, disk)
        LeaseFile(disk).ask(asked)
        data = post(f"{PATH}/{record(disk).disk.uuid}?wait=20", encode(asked))
        assert status(exchange(address_of(a.state), client(b.state), data)) == 403
        wait_for(lambda: over_network(a.state) != [], "the audit log", 10)
    assert (ran.code, ran.result["error"]) == (10, "LeaseHeld")
    assert "lacks the role request" in ran.result["message"]
    assert owner_of(disk) == a.name
    assert set(over_network(a.state)) == {b.name}


def over_network(state: Path) -> list[str]:
    """Whom the agent has refused."""
    return [line["host"] for line in audit(state) if line.get("status") == 403]


def test_a_host_that_was_shut_out_is_believed_no_more_and_at_once(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    """Over the network, on the storage, and as one that is asked; until it has another."""
    a, b = hosts
    running = exported(disk, a, tmp_path)
    store, path = LeaseFile(disk), f"{PATH}/{record(disk).disk.uuid}?wait=0"
    old = signed(b.state, disk, id="old")
    with agent(a.state):
        post_it = partial(exchange, address_of(a.state), client(b.state))
        assert status(post_it(post(path, encode(old)))) == 409, "it is not on the storage"
        revoked = promoter(a.state, "agent", "revoke", tmp_path / "ca", "--host", b.name, "--json")
        assert revoked.code == 0, revoked
        listed = Path(revoked.result["list"])
        shutil.copy(listed, agent_directory(a.state))
        assert status(post_it(post(path, encode(old)))) == 403
        assert status(post_it(poll(path.replace("?", "/old?")))) == 403
        why = "the certificate of host host-b was revoked"
        wait_for(lambda: refusals(a.state).count(why) == 2, "both in the audit log", 10)
        assert why in answer_on_storage(store, old).why
        assert record(disk).epoch == 1
        shutil.rmtree(agent_directory(b.state))
        certify(tmp_path / "ca", b.state)
        assert listed.read_bytes() == (agent_directory(b.state) / "revoked").read_bytes()
        new = signed(b.state, disk, id="new")
        assert credentials(a.state).roles_of(new, record(disk).disk.uuid) == set(Role)
        (agent_directory(a.state) / "revoked").write_text("no number\n")
        with pytest.raises(Untrusted, match="nobody is believed"):
            credentials(a.state).roles_of(new, record(disk).disk.uuid)
    running.ask_to_end()
    unknown = promoter(a.state, "agent", "revoke", tmp_path / "ca", "--host", "host-z", "--json")
    assert (unknown.code, unknown.result["error"]) == (4, "Refused")


def test_an_agent_that_was_shut_out_is_told_nothing(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    a, b = hosts
    running = exported(disk, a, tmp_path)
    shutil.copy(certificates.revoke(tmp_path / "ca", a.name), agent_directory(b.state))
    with agent(a.state):
        assert b.lease("acquire", disk).code == 0, "by the storage"
    assert any("host-a was revoked" in why for why in refusals(b.state))
    assert "asked" not in {line["event"] for line in audit(a.state)}
    running.end()


def test_what_became_of_a_request_is_told_to_who_has_sent_it(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    a, b = hosts
    running = exported(disk, a, tmp_path)
    wait_until_held_for_a_while()
    running.process.send_signal(signal.SIGSTOP)
    asked = signed(b.state, disk)
    LeaseFile(disk).ask(asked)
    path = f"{PATH}/{record(disk).disk.uuid}"
    with agent(a.state):

        def ask(data: bytes, state: Path) -> bytes:
            return exchange(address_of(a.state), client(state), data)

        assert status(ask(poll(f"{path}/{asked.id}?wait=0"), b.state)) == 404, "not sent yet"
        assert status(ask(post(f"{path}?wait=0", encode(asked)), b.state)) == 202
        assert status(ask(poll(f"{path}/{asked.id}?wait=0"), b.state)) == 202
        assert status(ask(poll(f"{path}/{asked.id}?wait=0"), a.state)) == 404, "another's"
        running.process.send_signal(signal.SIGCONT)
        told = ask(poll(f"{path}/{asked.id}?wait=20"), b.state)
        assert running.end().code == 0
        assert status(ask(poll(f"{path}/{asked.id}?wait=0"), b.state)) == 200, "and later"
    assert status(told) == 200
    body = told.partition(b"\r\n\r\n")[2]
    assert parse(Answer, body, "the answer").said is Said.RELEASED


# --- what is counted ---------------------------------------------------------------------------


def test_prometheus_is_told_what_the_agent_has_seen(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    """By who has the role, whom it serves as any TLS client, and by nobody else."""
    a, b = hosts
    watcher = LeasingHost(tmp_path, "prometheus")
    certify(tmp_path / "ca", watcher.state, roles=[Role.METRICS])
    certify_again(tmp_path / "ca", b.state, [Role.REQUEST])
    running = exported(disk, a, tmp_path)
    with agent(a.state):
        assert exchange(address_of(a.state), client(b.state), poll("/metrics")).split()[1] == b"403"
        assert any("host-b lacks the role metrics" in why for why in refusals(a.state))
        asked = signed(watcher.state, disk)
        LeaseFile(disk).ask(asked)
        body = encode(asked)
        path = f"{PATH}/{record(disk).disk.uuid}?wait=0"
        assert status(exchange(address_of(a.state), client(watcher.state), post(path, body))) == 403
        pool = f'promoter_heartbeat_age_seconds{{pool="{disk.parent}"}}'
        wait_for(lambda: pool in later(a.state, watcher.state), "a heartbeat", 30)
        before = metrics(a.state, watcher.state)
        assert before["promoter_leases_held"] == 1
        assert before["promoter_refusals_total"] == 2
        assert before['promoter_release_requests_total{outcome="refused"}'] == 1
        wait_until_held_for_a_while()
        running.process.send_signal(signal.SIGSTOP)
        wanted = signed(b.state, disk, id="r2")
        LeaseFile(disk).ask(wanted)
        path = f"{PATH}/{record(disk).disk.uuid}"
        sent = exchange(
            address_of(a.state), client(b.state), post(f"{path}?wait=0", encode(wanted))
        )
        assert status(sent) == 202
        running.process.send_signal(signal.SIGCONT)
        told = exchange(address_of(a.state), client(b.state), poll(f"{path}/{wanted.id}?wait=20"))
        assert status(told) == 200
        assert running.end().code == 0
        after = metrics(a.state, watcher.state)
    assert after["promoter_leases_held"] == 0
    assert after['promoter_release_requests_total{outcome="released"}'] == 1
    assert after["promoter_handover_seconds_count"] == 1
    assert 0 < after["promoter_handover_seconds_sum"] < 60


def test_a_heart_that_stands_still_is_seen_in_the_metrics(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    a, b = hosts
    assert a.lease("acquire", disk).code == 0
    pool = f'promoter_heartbeat_age_seconds{{pool="{disk.parent}"}}'
    with agent(a.state):
        wait_for(lambda: pool in later(a.state, b.state), "a heartbeat", 30)
        hosts_of(disk.parent).path.rename(tmp_path / "gone")
        hosts_of(disk.parent).path.write_text("in its way")
        wait_for(lambda: later(a.state, b.state)[pool] > BEAT_EVERY + 1, "it to stand still", 30)


def metrics(state: Path, watcher: Path) -> dict[str, float]:
    """As curl or Prometheus asks, which check the address."""
    directory = agent_directory(watcher)
    context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    context.load_cert_chain(directory / "host.pem", directory / "host.key")
    url = f"https://{this_host(state).endpoint}/metrics"
    with urlopen(url, timeout=30, context=context) as answer:
        text = answer.read().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def later(state: Path, watcher: Path) -> dict[str, float]:
    """No agent shows them to one host as often as a test would look."""
    time.sleep(0.5)
    return metrics(state, watcher)


def certify_again(authority: Path, state: Path, roles: list[Role]) -> None:
    shutil.rmtree(agent_directory(state))
    certify(authority, state, roles=roles)


# --- nothing but refusals ----------------------------------------------------------------------


@dataclass
class Door:
    """An agent and a holder of its host, whose policy is to let go; who stands before it."""

    directory: Path
    owner: LeasingHost
    friend: LeasingHost
    disk: Path
    path: str

    @property
    def address(self) -> tuple[str, int]:
        return address_of(self.owner.state)

    def someone(self, name: str, authority: str = "ca", **how: Any) -> Path:
        """The state of a host with another certificate."""
        state = self.directory / f"{name}-{free_port()}"
        state.mkdir()
        (state / "host-id").write_text(name)
        certify(self.directory / authority, state, **how)
        return state

    def send(self, data: bytes, state: Path | None = None) -> bytes:
        return exchange(self.address, client(state or self.friend.state), data)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    directory = tmp_path_factory.mktemp("door")
    disk = blank(directory / "disk.qcow2", 1 << 20)
    owner, friend = LeasingHost(directory, "host-a"), LeasingHost(directory, "host-b")
    for host in (owner, friend):
        certify(directory / "ca", host.state)
    running = owner.run(disk, "close", *export(disk, directory / "nbd"))
    try:
        wait_until_open(disk, owner)
        with agent(owner.state):
            yield Door(directory, owner, friend, disk, f"{PATH}/{record(disk).disk.uuid}?wait=0")
        assert record(disk).epoch == 1, "nothing of all that has moved it"
        assert not said(running.ask_to_end(), "releasing")
    finally:
        owner.close()


def no_certificate(door: Door) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(agent_directory(door.owner.state) / "ca.pem")
    return exchange(door.address, context, post(door.path, b""))


def no_tls(door: Door) -> bytes:
    with socket.create_connection(door.address, timeout=10) as connection:
        connection.sendall(post(door.path, b""))
        return connection.recv(100)


def older_tls(door: Door) -> bytes:
    context = client(door.friend.state)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return exchange(door.address, context, post(door.path, b""))


def wrong_authority(door: Door) -> bytes:
    state = door.someone("host-b", "other-ca")
    shutil.copy(
        agent_directory(door.owner.state) / "ca.pem", agent_directory(state)
    )  # it believes us, and we do not believe it
    return door.send(post(door.path, b""), state)


def expired(door: Door) -> bytes:
    state = door.someone("host-b", days=0)
    made = (state / "agent" / "host.pem").stat().st_mtime
    wait_for(lambda: time.time() > made + 1.5, "its end", 5)
    return door.send(post(door.path, b""), state)


@pytest.mark.parametrize(
    ("stranger", "why"),
    [
        (no_tls, "HTTP_REQUEST"),
        (older_tls, "UNSUPPORTED_PROTOCOL"),
        (no_certificate, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        (wrong_authority, "certificate verify failed"),
        (expired, "certificate has expired"),
    ],
)
def test_who_has_no_valid_certificate_gets_no_answer(
    door: Door, stranger: Callable[[Door], bytes], why: str
) -> None:
    before = len(refusals(door.owner.state))
    try:
        answer = stranger(door)
    except OSError:
        answer = b""
    assert answer == b""
    assert why in wait_for_refusal(door, before)


def queued(door: Door, asked: Request) -> bytes:
    LeaseFile(door.disk).ask(asked)
    return encode(asked)


def wrong_requests(door: Door) -> dict[str, tuple[int, bytes, Path | None]]:
    """What has a valid certificate and is refused: the status, the bytes, whose they are."""
    good, friend = signed(door.friend.state, door.disk), door.friend.state
    no_role = door.someone("host-d", roles=())
    other = door.someone("host-e")
    body = encode(good)
    return {
        "not on the storage": (409, post(door.path, body), None),
        "empty": (400, post(door.path, b""), None),
        "no JSON": (400, post(door.path, b"\xff" * 100), None),
        "torn": (400, post(door.path, body[:-20]), None),
        "changed": (400, post(door.path, body.replace(b'"r1"', b'"r2"')), None),
        "oversized": (413, post(door.path, b" " * (2 * LARGEST)), None),
        "larger than it says": (400, post(door.path, body) + b"x" * 100, None),
        "of another host": (403, post(door.path, body), other),
        "without any role": (
            403,
            post(door.path, queued(door, signed(no_role, door.disk))),
            no_role,
        ),
        "unsigned": (403, post(door.path, encode(dataclasses.replace(good, proof=None))), None),
        "for another epoch": (
            409,
            post(door.path, queued(door, signed(friend, door.disk, id="old", epoch=7))),
            None,
        ),
        "for another disk": (409, post(f"{PATH}/other", body), None),
        "for a path": (404, post(f"{PATH}/../../etc/passwd", body), None),
        "for an encoded path": (404, post(f"{PATH}/..%2f..%2fetc%2fpasswd", body), None),
        "elsewhere": (404, post("/", body), None),
        "another method": (405, post(door.path, body).replace(b"POST", b"GET", 1), None),
        "for what became of nothing": (404, poll(f"{PATH}/x/y?wait=0"), None),
        "an endless wait": (400, post(door.path.replace("=0", "=1e9"), body), None),
        "no HTTP": (400, b"\0\1\2\3\r\n\r\n", None),
        "a long line": (400, post(door.path + "&" + "x" * 5000, body), None),
        "a long header": (
            400,
            post(door.path, body).replace(b"x\r", b"y" * 70_000 + b"\r", 1),
            None,
        ),
    }


def test_a_wrong_request_is_refused_and_said_to_have_been(door: Door) -> None:
    for what, (wanted, data, state) in wrong_requests(door).items():
        before = len(refusals(door.owner.state))
        answer = door.send(data, state)
        if what != "larger than it says":  # what follows is another request, and nobody's
            assert status(answer) == wanted, (what, answer)
            wait_for_refusal(door, before)
        assert record(door.disk).epoch == 1, what


def wait_for_refusal(door: Door, before: int) -> str:
    """The last line of the log when it has more than ``before``."""
    wait_for(lambda: len(refusals(door.owner.state)) > before, "a line in the audit log", 10)
    return refusals(door.owner.state)[-1]


def wait_until_held_for_a_while() -> None:
    """Until then a disk that has just come is not given away."""
    since = time.monotonic()
    wait_for(lambda: time.monotonic() > since + HOLD_AT_LEAST, "the holding time", 10)


def test_a_request_that_was_served_is_not_served_again(
    hosts: Hosts, disk: Path, tmp_path: Path
) -> None:
    """Sent again, at once, and later, when its epoch is long over."""
    a, b = hosts
    running = exported(disk, a, tmp_path)
    wait_until_held_for_a_while()
    asked = signed(b.state, disk)
    ticket = LeaseFile(disk).ask(asked)
    data = post(f"{PATH}/{record(disk).disk.uuid}?wait=20", encode(asked))
    with agent(a.state):
        with ThreadPoolExecutor(6) as pool:
            sent = [pool.submit(exchange, address_of(a.state), client(b.state), data)] * 6
            assert {status(future.result()) for future in sent} <= {200, 409}
        assert running.end().code == 0
        freed = record(disk)
        assert (freed.epoch, freed.state) == (3, State.FREE)
        assert freed.grant and freed.grant.host == b.name
        assert b.lease("acquire", disk).code == 0
        assert b.lease("release", disk).code == 0
        running = a.run(disk, "close", *export(disk, tmp_path / "nbd-2"))
        wait_until_open(disk, a)
        epoch = record(disk).epoch
        assert status(exchange(address_of(a.state), client(b.state), data)) == 409
        store = LeaseFile(disk)
        store.withdraw(ticket)
        store.ask(asked)
        assert status(exchange(address_of(a.state), client(b.state), data)) == 409
        assert record(disk).epoch == epoch
        running.ask_to_end()


def test_a_flood_is_bounded(door: Door) -> None:
    """Of requests, and of connections; afterwards the agent answers others as before."""
    state = door.someone("host-f")
    data = post(f"{PATH}/other", encode(signed(state, door.disk)))
    another = data.replace(b"Connection: close", b"Connection: keep-alive", 1)
    before = len(refusals(door.owner.state))
    answers = door.send(3 * int(MOST_REQUESTS) * another + data, state)
    found = re.findall(rb"HTTP/1.1 (\d+)", answers)
    assert set(found) == {b"409", b"429"}
    open_ones = []
    for _ in range(2 * MOST_FROM_ONE_ADDRESS):
        with suppress(OSError):
            open_ones.append(socket.create_connection(door.address, timeout=5))

    def said() -> bool:  # a flood of refusals before may have had it left out
        with suppress(OSError):
            open_ones.append(socket.create_connection(door.address, timeout=5))
        return "too many connections" in refusals(door.owner.state)

    wait_for(said, "it to be said", 20)
    for connection in open_ones:
        connection.close()
    assert len(refusals(door.owner.state)) - before <= MOST_REFUSALS * 2 + 100
    other = door.someone("host-g")
    wait_for(lambda: answers_to(door, other), "an answer to another", 20)
    assert record(door.disk).epoch == 1


def answers_to(door: Door, state: Path) -> bool:
    try:
        data = post(f"{PATH}/other", encode(signed(state, door.disk)))
        return status(door.send(data, state)) == 409
    except (OSError, IndexError):
        return False


WORD = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)
BODY = st.one_of(
    st.binary(max_size=300),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORD, inner, max_size=4),
    ).map(lambda value: json.dumps(value).encode()),
)


@given(
    method=st.sampled_from(["POST", "GET", "PUT", "HEAD", "CONNECT", "OPTIONS"]) | WORD,
    path=st.sampled_from([PATH, f"{PATH}/", "*", "http://x/"]) | WORD,
    given_path=st.booleans(),
    headers=st.dictionaries(
        st.sampled_from(["Host", "Content-Length", "Transfer-Encoding", "Expect", "Upgrade"])
        | WORD,
        st.sampled_from(["chunked", "-1", "0", "99999999999", "100-continue", "websocket"]) | WORD,
        max_size=4,
    ),
    body=BODY,
)
@settings(max_examples=150)
def test_whatever_is_sent_changes_no_owner(
    door: Door,
    method: str,
    path: str,
    given_path: bool,
    headers: dict[str, str],
    body: bytes,
) -> None:
    """By somebody with a certificate: it is refused, or the connection ends."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    target = door.path if given_path else path
    head = "\r\n".join([f"{method} {target} HTTP/1.1", *lines, "Connection: close", "", ""])
    state = door.friend.state
    with suppress(TimeoutError, ConnectionError, ssl.SSLError):
        answer = short_exchange(door.address, client(state), head.encode() + body)
        for code in re.findall(rb"^HTTP/1\.[01] (\d+)", answer, re.MULTILINE):
            assert 400 <= int(code) < 500 or int(code) == 100, (head, answer)
    assert record(door.disk).epoch == 1


def short_exchange(address: tuple[str, int], context: ssl.SSLContext, data: bytes) -> bytes:
    """As `exchange`, for what may wait for more bytes for ever."""
    plain = socket.create_connection(address, timeout=5)
    with plain, context.wrap_socket(plain) as connection:
        connection.settimeout(0.5)
        connection.sendall(data)
        with suppress(TimeoutError):
            return connection.recv(LARGEST)
    return b""


@pytest.fixture(scope="module")
def good(door: Door) -> Request:
    return signed(door.friend.state, door.disk)


@pytest.mark.parametrize("changed", [0, 1, 2])
@given(data=st.data())
@settings(max_examples=200)
def test_no_other_request_has_a_signature_that_holds(
    door: Door, good: Request, changed: int, data: st.DataObject
) -> None:
    assert good.proof
    parts = [good.proof.certificate, good.proof.signature, good.id]
    place = data.draw(st.integers(0, len(parts[changed]) - 1))
    letter = data.draw(st.sampled_from("0123456789abcdefXYZ=\n-"))
    part = parts[changed][:place] + letter + parts[changed][place + 1 :]
    wrong = [
        dataclasses.replace(good, proof=dataclasses.replace(good.proof, certificate=part)),
        dataclasses.replace(good, proof=dataclasses.replace(good.proof, signature=part)),
        dataclasses.replace(good, id=part),
    ][changed]
    uuid = record(door.disk).disk.uuid
    try:
        roles = credentials(door.owner.state).roles_of(wrong, uuid)
    except Untrusted:
        return
    assert roles == set(Role)
    assert parts[changed].split() == part.split() or changed == 0, "only white space may differ"


# --- of one piece ------------------------------------------------------------------------------


def test_a_process_that_knows_no_agent_is_not_harmed_by_one() -> None:
    here = this_host_now()
    with subprocess.Popen(["sleep", "60"]) as process:
        owner = here.owner(process=process.pid)
        assert wake(here, owner)
        assert not wake(here, dataclasses.replace(owner, started=1))
        assert not wake(here, dataclasses.replace(owner, boot="another"))
        assert process.poll() is None
        process.kill()
        process.wait()
        assert not wake(here, owner)


def this_host_now() -> Host:
    return Host("here", "boot")


def test_init_makes_a_certificate_and_does_not_show_the_keys(tmp_path: Path) -> None:
    words = ["agent", "init", tmp_path / "ca", "--host", "rack-7", "--endpoint", "[::1]:7443"]
    ran = promoter(tmp_path, *words, "--role", "request-running", "--json")
    assert ran.code == 0, ran
    made = Path(ran.result["directory"])
    (tmp_path / "ca" / "rack-7").rename(tmp_path / "agent")
    (tmp_path / "host-id").write_text("rack-7")
    assert made == tmp_path / "ca" / "rack-7"
    assert this_host(tmp_path).endpoint == "[::1]:7443"
    credentials(tmp_path).check("rack-7")
    with pytest.raises(Refused, match="is of host rack-7, and this is rack-8"):
        credentials(tmp_path).check("rack-8")
    keys = [tmp_path / "agent" / "host.key", tmp_path / "ca" / "ca.key"]
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    before = (tmp_path / "ca" / "ca.pem").read_bytes()
    certificates.authority(tmp_path / "ca")
    assert (tmp_path / "ca" / "ca.pem").read_bytes() == before
    keys[1].rename(tmp_path / "ca.key")
    with pytest.raises(Refused, match="one file is missing"):
        certificates.authority(tmp_path / "ca")
    (tmp_path / "ca.key").rename(keys[1])
    for wrong in (["--host", "a/b"], ["--endpoint", "nowhere"], ["--endpoint", "a:70000"]):
        refused = promoter(tmp_path, *words, *wrong, "--json")
        assert (refused.code, refused.result["hint"] != "") == (4, True), wrong


def test_an_agent_without_certificates_or_with_anothers_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "host-id").write_text("host-a")
    assert promoter(tmp_path, "agent", "run", "--json").code == 4
    certify(tmp_path / "ca", tmp_path)
    (tmp_path / "host-id").write_text("host-b")
    ran = promoter(tmp_path, "agent", "run", "--json")
    assert (ran.code, ran.result["error"]) == (4, "Refused")
    (tmp_path / "host-id").write_text("host-a")
    with agent(tmp_path):
        second = promoter(tmp_path, "agent", "run", "--json")
    assert (second.code, second.result["error"]) == (4, "Refused")
    assert "Address already in use" in second.result["message"]


@pytest.mark.parametrize("text", ["", ":1", "a:0", "a:65536", "a:1:2", "a b:1", "a:1\n", "[x]:1"])
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(Untrusted):
        parse_endpoint(text)


def test_systemd_is_told_that_the_agent_is_ready_and_alive(tmp_path: Path) -> None:
    (tmp_path / "host-id").write_text("host-a")
    certify(tmp_path / "ca", tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.settimeout(30)
        heard.bind("\0promoter-test-" + str(os.getpid()))
        name = "@promoter-test-" + str(os.getpid())
        with agent(tmp_path, NOTIFY_SOCKET=name, WATCHDOG_USEC="300000"):
            told = [heard.recv(100) for _ in range(4)]
        assert set(told) == {b"READY=1", b"WATCHDOG=1"}


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    ran = promoter(tmp_path, "agent", "unit", "--pool", tmp_path)
    assert ran.code == 0, ran
    assert f"ReadWritePaths={tmp_path} {tmp_path}\n" in ran.out
    made = tmp_path / "promoter-agent.service"
    made.write_text(ran.out)
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", made], capture_output=True, text=True, check=False
    )
    about_it = [line for line in checked.stderr.splitlines() if made.name in line]
    assert (checked.returncode, about_it) == (0, []), checked.stderr
    with pytest.raises(Refused):
        unit(Path(sys.executable), tmp_path, [Path("/vm\nExecStartPre=/bin/evil")])


def test_what_needs_no_agent_loads_none_of_it(tmp_path: Path, disk: Path) -> None:
    code = (
        "import sys, promoter.cli.main;"
        "print([name for name in ('aiohttp', 'cryptography') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
