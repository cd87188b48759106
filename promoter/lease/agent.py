"""``promoter agent run``: the network's door to the disks that this host holds.

    POST /v1/release/DISK?wait=SECONDS         the signed request that lies on the storage
    GET /v1/release/DISK/REQUEST?wait=SECONDS  what became of it, to who has sent it
    GET /metrics                               for Prometheus, to who has the role metrics
    200 released   202 accepted, ask again   409 other owner or epoch   423 busy   403 refused

Who holds a disk goes on to be the process of ``promoter run``, which reads requests from the
storage and answers there. The agent checks who asks (mutual TLS), wakes that process, and
hands on its answer: it can change no owner. It writes in a pool only this host's heartbeat,
and answers, which are refusals, for leases that no process of this host answers for. Without
it everything works, later.

DISK is the name in the lease. A path never comes from the network.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from promoter.errors import PromoterError, Refused
from promoter.lease import notify, rules
from promoter.lease.bell import PATH
from promoter.lease.credentials import Credentials, Peer, Untrusted, parse_endpoint, peer_in
from promoter.lease.file import LeaseFile, hosts_of
from promoter.lease.host import Host
from promoter.lease.ledger import Allowance, Ledger
from promoter.lease.liveness import BEAT_EVERY, Heartbeat, Silence, boot_clock
from promoter.lease.metrics import CONTENT_TYPE, Metrics
from promoter.lease.record import (
    LARGEST,
    Answer,
    BadRecord,
    LeaseRecord,
    Owner,
    Request,
    Said,
    encode,
    parse,
)
from promoter.lease.rules import Holding, Policy, Role
from promoter.lease.store import Asked

MOST_CONNECTIONS = 128
MOST_FROM_ONE_ADDRESS = 32
MOST_WAITING = 8
MOST_SENT = 1024
REQUESTS_A_SECOND, MOST_REQUESTS = 10.0, 40.0
HANDSHAKE = 5.0
LONGEST_CONNECTION = 60.0
LONGEST_WAIT = 30.0
LOOK_EVERY = 0.01
KEEP_ALIVE = 5.0
ACCEPT_AGAIN = 0.25
LONGEST_END = 0.25
STATUS = {
    Said.RELEASED: 200,
    Said.ACCEPTED: 202,
    Said.BUSY: 423,
    Said.REFUSED: 403,
    Said.NOT_OWNER: 409,
}
Say = Callable[[str, str], None]


class Agent:
    """One host's agent. ``say`` is told what an operator wants to know."""

    def __init__(self, host: Host, credentials: Credentials, ledger: Ledger, say: Say) -> None:
        if host.endpoint is None:
            raise Refused(
                "nothing says where the agent listens", "Write ADDRESS:PORT into agent/endpoint."
            )
        self.host, self.ledger, self.say = host, ledger, say
        self._endpoint = parse_endpoint(host.endpoint)
        self._credentials = credentials
        self._context = credentials.context(ssl.Purpose.CLIENT_AUTH)
        self._hearts: dict[Path, Heartbeat] = {}
        self._silences: dict[Path, Silence] = {}
        self._metrics = Metrics()
        ledger.on_refusal = self._metrics.refused
        self._connections: set[asyncio.Task[None]] = set()
        self._addresses = Counter[str]()
        self._waiting = Counter[str]()
        self._allowances: dict[str, Allowance] = {}
        self._trouble: dict[str, str] = {}
        self._sent: dict[tuple[str, str, str], tuple[LeaseFile, Asked, int]] = {}
        self._arrived: dict[str, float] = {}

    async def run(self) -> None:
        """Serve until SIGTERM."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        runner = web.AppRunner(
            self._application(),
            access_log_class=_auditing(self.ledger),
            logger=_logger(),
            keepalive_timeout=KEEP_ALIVE,
            shutdown_timeout=LONGEST_END,
            max_line_size=1024,
            max_field_size=1024,
        )
        await runner.setup()
        listening = self._listen()
        try:
            async with asyncio.TaskGroup() as tasks:
                assert runner.server, "it is set up"
                serving = [
                    tasks.create_task(self._accept(listening, runner.server, tasks), name="accept"),
                    tasks.create_task(self._beat(), name="heartbeats"),
                    tasks.create_task(self._answer_for_host(), name="leases without a process"),
                    tasks.create_task(notify.keep_alive(), name="watchdog"),
                ]
                self.say("listening", str(self.host.endpoint))
                notify.send("READY=1")
                await stop.wait()
                notify.send("STOPPING=1")
                for task in (*serving, *self._connections):
                    task.cancel()
        finally:
            listening.close()
            await runner.cleanup()
            for heart in self._hearts.values():
                heart.stop()

    def _listen(self) -> socket.socket:
        address, port = self._endpoint
        try:
            family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
            listening = socket.create_server((address, port), family=family)
        except OSError as error:
            raise Refused(
                f"cannot listen at {self.host.endpoint}: {error.strerror}",
                "One agent runs on a host; its address is in agent/endpoint.",
            ) from error
        listening.setblocking(False)
        return listening

    # --- connections ---

    async def _accept(
        self, listening: socket.socket, server: web.Server, tasks: asyncio.TaskGroup
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, (address, *_) = await loop.sock_accept(listening)
            except OSError as error:  # no descriptors left, or the client is gone again
                self._say_trouble("accept", str(error))
                await asyncio.sleep(ACCEPT_AGAIN)  # or it would be tried, and fail, at once
                continue
            many = self._addresses[address] >= MOST_FROM_ONE_ADDRESS
            if many or self._addresses.total() >= MOST_CONNECTIONS:
                self.ledger.refused("too many connections", address=address)
                connection.close()
                continue
            task = tasks.create_task(
                self._connected(connection, address, server), name=f"connection of {address}"
            )
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _connected(self, connection: socket.socket, address: str, server: web.Server) -> None:
        """One connection; it has an end, whatever the client does."""
        loop = asyncio.get_running_loop()
        self._addresses[address] += 1
        try:
            _, served = await loop.connect_accepted_socket(
                lambda: _Served(server()),
                connection,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE,
            )
            try:
                async with asyncio.timeout(LONGEST_CONNECTION):
                    await served.over.wait()
            except TimeoutError:
                self.ledger.refused("the connection was too long", address=address)
            finally:
                with suppress(OSError):  # it has ended
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError as error:  # TLS errors are
            self.ledger.refused(f"no TLS connection: {error}", address=address)
        finally:
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    # --- requests ---

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=LARGEST, middlewares=[_refusing])
        application.router.add_post(PATH + "/{disk:[0-9A-Za-z-]{1,64}}", self._release)
        application.router.add_get(PATH + "/{disk}/{request:[0-9A-Za-z-]{1,64}}", self._poll)
        application.router.add_get("/metrics", self._show_metrics)
        return application

    async def _release(self, http: web.Request) -> web.Response:
        peer = self._credentials.peer(http.get_extra_info("peercert"))
        wait = _seconds(http.query.get("wait", "0"))
        with self._turn(peer):
            wanted = parse(Request, await http.read(), "the request")
            if wanted.requester.host != peer.host:
                raise Untrusted(f"host {peer.host} asks in the name of another")
            self._arrived.setdefault(wanted.id, boot_clock())
            _forget_oldest(self._arrived)
            answer = await self._answer(http.match_info["disk"], wanted, wait)
        return self._said(http, answer)

    async def _poll(self, http: web.Request) -> web.Response:
        peer = self._credentials.peer(http.get_extra_info("peercert"))
        wait = _seconds(http.query.get("wait", "0"))
        with self._turn(peer):
            disk, identity = http.match_info["disk"], http.match_info["request"]
            place = self._sent.get((peer.host, disk, identity))
            if place is None:
                raise web.HTTPNotFound(text="this host has sent no such request; send it again")
            answer = await self._answered(*place, wait)
        return self._said(http, answer)

    async def _show_metrics(self, http: web.Request) -> web.Response:
        peer = self._credentials.peer(http.get_extra_info("peercert"))
        with self._turn(peer):
            if Role.METRICS not in peer.roles:
                raise Untrusted(f"host {peer.host} lacks the role {Role.METRICS}")
            held = await asyncio.to_thread(self.ledger.held)
        ages = {pool: silence.seconds for pool, silence in self._silences.items()}
        headers = {"Content-Type": CONTENT_TYPE}
        return web.Response(body=self._metrics.shown(held, ages), headers=headers)

    def _said(self, http: web.Request, answer: Answer) -> web.Response:
        if answer.said is not Said.ACCEPTED and answer.request in self._arrived:
            self._metrics.answered(answer.said, boot_clock() - self._arrived.pop(answer.request))
        return _said(http, answer)

    @contextmanager
    def _turn(self, peer: Peer) -> Iterator[None]:
        fresh = Allowance(REQUESTS_A_SECOND, MOST_REQUESTS)
        allowed = self._allowances.setdefault(peer.host, fresh).take()
        if not allowed or self._waiting[peer.host] >= MOST_WAITING:
            raise web.HTTPTooManyRequests(headers={"Retry-After": "1"})
        self._waiting[peer.host] += 1
        try:
            yield
        finally:
            self._waiting[peer.host] -= 1

    async def _answer(self, disk: str, wanted: Request, wait: float) -> Answer:
        """What whoever holds the disk answers within ``wait`` seconds, once it is awake."""
        found = await asyncio.to_thread(self._find, disk, wanted)
        if isinstance(found, Answer):
            return found
        store, record, asked = found
        assert record.owner, "looked at"
        if not wake(self.host, record.owner):
            await asyncio.to_thread(self._answer_all, store)
        self._sent[wanted.requester.host, disk, wanted.id] = store, asked, record.epoch
        _forget_oldest(self._sent)
        return await self._answered(store, asked, record.epoch, wait)

    async def _answered(self, store: LeaseFile, asked: Asked, epoch: int, wait: float) -> Answer:
        """What is on the storage within ``wait`` seconds."""
        deadline = asyncio.get_running_loop().time() + wait
        while True:
            answer = await asyncio.to_thread(store.answer_to, asked)
            if answer and answer.said is not Said.ACCEPTED:
                return answer
            if asyncio.get_running_loop().time() >= deadline:
                return answer or Answer(asked.request.id, Said.ACCEPTED, epoch)
            await asyncio.sleep(LOOK_EVERY)  # it lies on the pool, where no event is to be had

    def _find(self, disk: str, wanted: Request) -> Answer | tuple[LeaseFile, LeaseRecord, Asked]:
        path = self.ledger.held().get(disk)
        if path is None:
            return Answer(wanted.id, Said.NOT_OWNER, 0, "this host does not hold it")
        store = LeaseFile(path, self.ledger)
        record = store.read()
        if record is None or record.disk.uuid != disk:
            return Answer(wanted.id, Said.NOT_OWNER, 0, "this host does not hold it")
        roles = self._credentials.roles_of(wanted, disk)
        asked = next((asked for asked in store.requests() if asked.request == wanted), None)
        if asked is None:
            return Answer(wanted.id, Said.NOT_OWNER, record.epoch, "it is not on the storage")
        holding = Holding(self.host.name, Policy.CLOSE)  # whoever holds it knows better
        said = rules.answer(record, wanted, holding, tuple(Role) if roles - {Role.METRICS} else ())
        return (store, record, asked) if said.said is Said.ACCEPTED else said

    # --- what runs here ---

    async def _beat(self) -> None:
        while True:
            held = await asyncio.to_thread(self.ledger.held)
            pools = {path.parent for path in held.values()}
            for pool in pools - self._hearts.keys():
                self._hearts[pool] = Heartbeat(hosts_of(pool), self.host)
                self._silences[pool] = Silence()
            for pool in self._hearts.keys() - pools:
                self._hearts.pop(pool).stop()
                del self._silences[pool]
            for pool, heart in self._hearts.items():
                await self._tolerantly(pool, heart.beat)
                await self._tolerantly(pool, partial(self._look_at_heart, pool))
            await asyncio.sleep(BEAT_EVERY)

    def _look_at_heart(self, pool: Path) -> None:
        """Whichever process of this host it is that beats."""
        self._silences[pool].of(hosts_of(pool).read(self.host.name))

    async def _answer_for_host(self) -> None:
        while True:
            for path in (await asyncio.to_thread(self.ledger.held)).values():
                await self._tolerantly(path, partial(self._answer_at, path))
            await asyncio.sleep(BEAT_EVERY)

    def _answer_at(self, path: Path) -> None:
        self._answer_all(LeaseFile(path, self.ledger))

    def _answer_all(self, store: LeaseFile) -> None:
        """Refuse, for a lease that is this host's and that no process of it answers for."""
        record = store.read()
        owner = record.owner if record else None
        if owner is None or owner.host != self.host.name or self.host.lives(owner):
            return
        for asked in store.requests():
            answer = rules.answer(record, asked.request, Holding(self.host.name, Policy.NEVER))
            answer = replace(answer, why="no process of its owner's answers for it")
            if answer.said is Said.REFUSED and store.answer_to(asked) != answer:
                self.ledger.refused(answer.why, disk=str(store.disk), request=asked.request.id)
                store.answer(asked.ticket, answer)

    async def _tolerantly(self, about: Path, act: Callable[[], object]) -> None:
        try:
            await asyncio.to_thread(act)
            self._trouble.pop(str(about), None)
        except PromoterError as error:
            self._say_trouble(str(about), error.message)

    def _say_trouble(self, about: str, text: str) -> None:
        """Once, until it is something else."""
        if self._trouble.get(about) != text:
            self._trouble[about] = text
            self.say("trouble", f"{about}: {text}")


def wake(host: Host, owner: Owner) -> bool:
    """Tell the process that holds a lease to look at the storage; False: there is none.

    By SIGURG, which a process that does not know it ignores, so that no lease, whatever it
    says, can make an agent harm a process.
    """
    if owner.pid is None or not host.lives(owner):
        return False
    try:
        descriptor = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        return False
    try:
        if not host.lives(owner):  # the number was another's when it was opened
            return False
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGURG)
        return True
    finally:
        os.close(descriptor)


def _forget_oldest(known: dict[Any, Any]) -> None:
    while len(known) > MOST_SENT:
        del known[next(iter(known))]


def _said(http: web.Request, answer: Answer) -> web.Response:
    if answer.said not in (Said.RELEASED, Said.ACCEPTED):
        http["why"] = f"{answer.said} {answer.why}".strip()
    later = {} if answer.retry_after is None else {"Retry-After": f"{answer.retry_after:.0f}"}
    return web.Response(status=STATUS[answer.said], body=encode(answer), headers=later)


def _seconds(text: str) -> float:
    if not (text.isascii() and text.isdigit() and len(text) < 4):
        raise web.HTTPBadRequest(text="wait: a whole number of seconds")
    return min(float(text), LONGEST_WAIT)


@web.middleware
async def _refusing(request: web.Request, handler: Handler) -> web.StreamResponse:
    """An error of ours as an answer."""
    try:
        return await handler(request)
    except Untrusted as error:
        status, why = 403, error.message
    except BadRecord as error:
        status, why = 400, error.message
    except PromoterError as error:
        status, why = 503, error.message
    request["why"] = why
    return web.Response(status=status, text=why)


class _Served(asyncio.Protocol):
    """aiohttp's side of a connection, whose end can be waited for."""

    def __init__(self, handler: asyncio.Protocol) -> None:
        self._handler = handler
        self.over = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._handler.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._handler.data_received(data)

    def eof_received(self) -> bool | None:
        return self._handler.eof_received()

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._handler.connection_lost(error)
        self.over.set()


def _auditing(ledger: Ledger) -> type[AbstractAccessLogger]:
    """Has every refusal in the ledger, those too that aiohttp makes itself."""

    class Audit(AbstractAccessLogger):
        def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
            if response.status < 400:
                return
            try:
                host = peer_in(request.get_extra_info("peercert")).host
            except Untrusted:
                host = None
            ledger.refused(
                str(request.get("why") or response.reason),
                status=response.status,
                host=host,
                address=request.remote,
                path=request.path[:200],
            )

    return Audit


def _logger() -> logging.Logger:
    """aiohttp's own: of bad HTTP it would say more than the one line in the audit log."""
    logger = logging.getLogger("promoter.agent")
    logger.addFilter(
        lambda entry: not (entry.exc_info and isinstance(entry.exc_info[1], HttpProcessingError))
    )
    return logger
