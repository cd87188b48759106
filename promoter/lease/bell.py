"""The requester's side of the network: it rings at the agent of a disk's owner.

The request lies on the storage and the lease says what became of it; the agent only wakes
whoever holds the disk, and answers when there is an answer. So nothing that a bell says is
believed, a liar at the other end gains nothing, and where nobody answers the storage is looked
at as if there were no network. The other end must still prove to be the host that the lease
names, before it is told anything.

http.client is loaded where somebody is rung: it would be a part of every command's start.
"""

from __future__ import annotations

import ssl
import threading
from contextlib import suppress

from promoter.errors import Refused
from promoter.lease.credentials import Credentials, Untrusted, parse_endpoint
from promoter.lease.ledger import Ledger
from promoter.lease.record import Owner, Request, encode

PATH = "/v1/release"
WAIT = 20
CONNECT_TIMEOUT = 5.0
SLACK = 5.0
AGAIN = 0.1
STILL_ACCEPTED = 202


class Bell:
    """Rings at one agent at a time, in a thread of its own. Why one was of no use is told to
    the ``ledger``.
    """

    def __init__(self, credentials: Credentials, ledger: Ledger | None) -> None:
        self._credentials, self._ledger = credentials, ledger
        self._over = threading.Event()
        self._over.set()

    @property
    def rings(self) -> bool:
        """Is somebody asked, who has not answered?"""
        return not self._over.is_set()

    def ring(self, owner: Owner, disk: str, request: Request) -> None:
        """Wake the owner of a disk, if it has an agent."""
        self._over.set()  # for whoever was asked before
        if owner.endpoint is None:
            return
        self._over = threading.Event()
        asking = (owner, disk, request, self._over)
        threading.Thread(target=self._ring, args=asking, name="bell", daemon=True).start()

    def wait(self, timeout: float) -> None:
        """Until the agent has answered or cannot; ``timeout`` seconds at most."""
        self._over.wait(timeout)

    def _ring(self, owner: Owner, disk: str, request: Request, over: threading.Event) -> None:
        from http.client import HTTPException

        try:
            status = self._ask(owner, "POST", f"{PATH}/{disk}", encode(request))
            while status == STILL_ACCEPTED and not over.wait(AGAIN):  # one that did not wait for
                status = self._ask(owner, "GET", f"{PATH}/{disk}/{request.id}")  # us is not hurried
        except (OSError, HTTPException, Refused) as error:
            if self._ledger:
                about = {"host": owner.host, "endpoint": owner.endpoint}
                self._ledger.refused(f"the owner's agent was of no use: {error}", **about)
        over.set()

    def _ask(self, owner: Owner, method: str, path: str, body: bytes | None = None) -> int:
        from http.client import HTTPSConnection

        assert owner.endpoint, "looked at by ring"
        address, port = parse_endpoint(owner.endpoint)
        context = self._credentials.context(ssl.Purpose.SERVER_AUTH)
        connection = HTTPSConnection(address, port, context=context, timeout=CONNECT_TIMEOUT)
        try:
            connection.connect()
            there = self._credentials.peer(connection.sock.getpeercert())
            if there.host != owner.host:
                raise Untrusted(f"at {owner.endpoint} is host {there.host}, not {owner.host}")
            connection.sock.settimeout(WAIT + SLACK)
            connection.request(method, f"{path}?wait={WAIT}", body=body)
            return connection.getresponse().status
        finally:
            with suppress(OSError):
                connection.close()
