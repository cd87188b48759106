"""The requester's side of the network: it rings at the agent of a disk's owner.

The request lies on the storage and the lease says what became of it; the agent only wakes
whoever holds the disk, and answers when there is an answer. So nothing that a bell says is
believed, a liar at the other end gains nothing, and where nobody answers the storage is looked
at as if there were no network. The other end must still prove to be the host that the lease
names, before it is told anything.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from contextlib import suppress

from promoter.errors import Refused
from promoter.lease.credentials import Credentials, Untrusted, parse_endpoint, peer_in
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
        self._answered = threading.Event()
        self._request: Request | None = None

    @property
    def rings(self) -> bool:
        """Is somebody asked, who has not answered?"""
        return self._request is not None

    def ring(self, owner: Owner, disk: str, request: Request) -> None:
        """Wake the owner of a disk, if it has an agent."""
        if owner.endpoint is None:
            self._request = None
            return
        self._request = request
        self._answered.clear()
        threading.Thread(
            target=self._ring, args=(owner, disk, request), name="bell", daemon=True
        ).start()

    def wait(self, timeout: float) -> None:
        """Until the agent has answered or cannot; ``timeout`` seconds at most."""
        self._answered.wait(timeout)

    def _ring(self, owner: Owner, disk: str, request: Request) -> None:
        try:
            while self._request is request and self._ask(owner, disk, request) == STILL_ACCEPTED:
                time.sleep(AGAIN)  # it has waited for us; one that did not is not hurried
        except (OSError, http.client.HTTPException, Refused) as error:
            if self._ledger:
                about = {"host": owner.host, "endpoint": owner.endpoint}
                self._ledger.refused(f"the owner's agent was of no use: {error}", **about)
        if self._request is request:  # else somebody else is asked by now
            self._request = None
            self._answered.set()

    def _ask(self, owner: Owner, disk: str, request: Request) -> int:
        assert owner.endpoint, "looked at by ring"
        address, port = parse_endpoint(owner.endpoint)
        context = self._credentials.context(ssl.Purpose.SERVER_AUTH)
        connection = http.client.HTTPSConnection(
            address, port, context=context, timeout=CONNECT_TIMEOUT
        )
        try:
            connection.connect()
            there = peer_in(connection.sock.getpeercert())
            if there.host != owner.host:
                raise Untrusted(f"at {owner.endpoint} is host {there.host}, not {owner.host}")
            connection.sock.settimeout(WAIT + SLACK)
            connection.request("POST", f"{PATH}/{disk}?wait={WAIT}", body=encode(request))
            return connection.getresponse().status
        finally:
            with suppress(OSError):
                connection.close()
