"""Agents of the tests': real processes, with certificates of an authority of their own."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from promoter.lease import certificates
from promoter.lease.credentials import Credentials
from promoter.lease.host import agent_directory, this_host
from promoter.lease.ledger import Ledger
from promoter.lease.record import LARGEST
from promoter.lease.rules import Role
from tests.cli import start


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def certify(
    authority: Path,
    state: Path,
    roles: Sequence[Role] = tuple(Role),
    endpoint: str | None = None,
    days: int = 30,
) -> None:
    """Give the host of ``state`` a certificate."""
    certificates.authority(authority)
    where = endpoint or f"127.0.0.1:{free_port()}"
    name = (state / "host-id").read_text()
    made = certificates.issue(authority, name, where, list(roles), days)
    made.rename(agent_directory(state))


@contextmanager
def agent(state: Path, enter: Sequence[object] = (), **environment: str) -> Iterator[int]:
    """An agent that listens; its pid."""
    process = start(state, "agent", "run", "--json", enter=enter, environment=environment)
    try:
        assert process.stdout
        first = process.stdout.readline()
        assert '"listening"' in first, (first, process.communicate(timeout=30))
        yield process.pid
        assert process.poll() is None, process.communicate()
    finally:
        process.terminate()
        try:
            _, said = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 0, said
    assert not said, said


def audit(state: Path) -> list[dict[str, Any]]:
    """The lines of a host's audit log."""
    log = state / "audit.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def refusals(state: Path) -> list[str]:
    return [line["why"] for line in audit(state) if line["event"] == "refused"]


def address_of(state: Path) -> tuple[str, int]:
    host, port = str(this_host(state).endpoint).split(":")
    return host, int(port)


def ledger(state: Path) -> Ledger:
    return Ledger(state, (state / "host-id").read_text())


def client(state: Path) -> ssl.SSLContext:
    """How the host of ``state`` talks to agents."""
    credentials = Credentials.of(state)
    assert credentials
    return credentials.context(ssl.Purpose.SERVER_AUTH)


def exchange(address: tuple[str, int], context: ssl.SSLContext, data: bytes) -> bytes:
    """Send bytes over TLS; what comes back until the other side ends. Raises OSError."""
    plain = socket.create_connection(address, timeout=10)
    with plain, context.wrap_socket(plain) as connection:
        connection.sendall(data)
        answer = b""
        while len(answer) <= LARGEST and (more := connection.recv(LARGEST)):
            answer += more
        return answer


def post(path: str, body: bytes) -> bytes:
    """A request for `exchange`."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def poll(path: str) -> bytes:
    """Another, for what became of one that was sent."""
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])
