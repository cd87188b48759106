"""The tests' own way to a guest's agent, and through it into the guest."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import libvirt
import libvirt_qemu

from tests.domains import Domain
from tests.vm import VM, wait_for

PATIENCE = 10  # seconds


class Agent(Protocol):
    """A machine whose agent's channel is the socket `agent`."""

    @property
    def agent(self) -> Path: ...


def ask(guest: Agent | Domain, command: str, patience: int = PATIENCE, **arguments: object) -> Any:
    """The agent's answer. Raises TimeoutError when there is none."""
    words = json.dumps({"execute": command, "arguments": arguments})
    if isinstance(guest, Domain):
        try:
            answer = libvirt_qemu.qemuAgentCommand(guest.domain, words, patience, 0)
        except libvirt.libvirtError as error:
            raise TimeoutError(error) from error
        return json.loads(answer)["return"]
    number = secrets.randbits(31)
    sync = json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": number}})
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(patience)
        channel.connect(str(guest.agent))
        channel.sendall(b"\xff" + f"{sync}\n{words}\n".encode())
        with channel.makefile("rb") as replies:
            while not replies.readline().endswith(b'\xff{"return": %d}\n' % number):
                pass
            return json.loads(replies.readline())["return"]


@contextmanager
def held(guest: VM) -> Iterator[None]:
    """Another client than promoter has the agent's channel."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(guest.agent))
        yield


def answers(guest: Agent | Domain) -> bool:
    try:
        ask(guest, "guest-ping", 1)
    except TimeoutError:
        return False
    return True


def wait_for_agent(guest: VM | Domain) -> None:
    wait_for(lambda: answers(guest), "the guest agent", 60)


def is_frozen(guest: VM | Domain) -> bool:
    return bool(ask(guest, "guest-fsfreeze-status") == "frozen")


def run(guest: VM | Domain, script: str) -> None:
    """Runs a shell script in the guest, which must succeed, to its end."""
    pid = begin(guest, script)

    def has_ended() -> bool:
        status = ask(guest, "guest-exec-status", pid=pid)
        assert not status["exited"] or status.get("exitcode") == 0, status
        return bool(status["exited"])

    wait_for(has_ended, f"{script} in the guest", 30)


def begin(guest: VM | Domain, script: str) -> int:
    """Begins a shell script in the guest; its process there."""
    return int(ask(guest, "guest-exec", path="/bin/sh", arg=["-c", script])["pid"])


def stop(guest: VM | Domain) -> None:
    """Has the agent stopped by a signal: it is there, and does not answer."""
    begin(guest, "sleep 1; kill -STOP $(pidof qemu-ga)")
    wait_for(lambda: not answers(guest), "the guest agent to be stopped", 30)
