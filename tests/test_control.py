"""A running operation and the other terminals: it is watched, asked, and never held up by them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from promoter.operations import control
from tests import records
from tests.cli import Ran, ended, promoter, start
from tests.test_contract import read_until
from tests.vm import VM, Disk, base, linked_clone

FLOOD = 20_000
SLOW = "2M"


class Promoting:
    """A promotion on its way, by the mirror alone; its guest writes as fast as it can."""

    def __init__(self, directory: Path, vm: VM) -> None:
        self.state, self.vm = directory / "state", vm
        words = ("promote", vm.monitor, "--seed", "none", "--speed", SLOW, "--json")
        self.process = start(self.state, *words)
        line = read_until(self.process, '"phase": "mirror"')[-1]
        self.id = str(json.loads(line)["id"])

    def job(self, *words: object) -> Ran:
        return promoter(self.state, "job", *words)

    def watch(self, *words: object) -> subprocess.Popen[str]:
        return start(self.state, "job", "watch", self.id, *words)

    def ask(self, line: bytes) -> socket.socket:
        """A client of its own, which has asked for something."""
        control = socket.socket(socket.AF_UNIX)
        control.settimeout(20)
        directory = os.open(self.state, os.O_PATH)
        try:  # a socket's path has at most 107 bytes
            control.connect(f"/proc/self/fd/{directory}/{self.id}.sock")
        finally:
            os.close(directory)
        control.sendall(line)
        return control

    def ended(self) -> Ran:
        """Let it go as fast as it can, to its end."""
        self.job("speed", self.id, "0")
        return ended(self.process)


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[VM]:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(40)
        yield vm


def test_any_number_of_terminals_see_it_to_its_end(vm: VM, tmp_path: Path) -> None:
    promoting = Promoting(tmp_path, vm)
    as_json, plain = promoting.watch("--json"), promoting.watch()
    read_until(as_json, '"event": "progress"')
    promoted = promoting.ended()
    assert promoted.code == 0, promoted
    watched, said = ended(as_json), ended(plain)
    assert (watched.code, said.code) == (0, 0), (watched, said)
    assert watched.result == promoted.result
    assert "is a full clone now" in said.out
    late = promoting.job("watch", promoting.id)
    assert late.code == 4
    assert "not running: it is done" in late.err
    vm.shutdown()
    records.check(vm.disks[0].path, "qcow2", vm.log).raise_if_bad()


class Idle:
    """An operation that nobody asks for anything."""

    async def change_speed(self, speed: int) -> None: ...

    async def pause(self) -> None: ...

    async def go_on(self) -> None: ...

    def cancel(self) -> None: ...


def test_who_does_not_read_misses_events_but_not_the_last_and_holds_nothing_up(
    tmp_path: Path,
) -> None:
    async def flood() -> list[bytes]:
        events = control.Events()
        async with control.controlled(tmp_path, "op", Idle(), events):
            with contextlib.chdir(tmp_path):
                reader, writer = await asyncio.open_unix_connection("op.sock", limit=1 << 10)
                deaf = [await asyncio.open_unix_connection("op.sock") for _ in range(9)]
            for _, asking in [(reader, writer), *deaf]:
                asking.write(b'{"request": "watch"}\n')
            await reader.readline()
            for number in range(FLOOD):
                events.publish({"event": "progress", "disk": "vd0", "number": number})
                await asyncio.sleep(0)
            events.publish({"event": "result"})
            lines: list[bytes] = []
            while b"result" not in (lines or [b""])[-1]:
                lines.append(await reader.readline())
        for _, asking in [(reader, writer), *deaf]:
            asking.close()
        return lines

    began = time.monotonic()
    assert 0 < len(asyncio.run(flood())) < FLOOD
    assert time.monotonic() - began < 30


def test_a_paused_operation_is_seen_where_it_stands_and_by_what_it_ends(
    vm: VM, tmp_path: Path
) -> None:
    promoting = Promoting(tmp_path, vm)
    not_paused = promoting.job("resume", promoting.id)
    assert not_paused.code == 4
    assert "is not paused" in not_paused.err
    assert "the guest runs on" in promoting.job("pause", promoting.id).out
    assert {job["status"] for job in vm.qmp("query-jobs")} <= {"paused", "standby"}
    watching = promoting.watch("--json")
    assert watching.stdout
    seen = [json.loads(watching.stdout.readline()) for _ in range(2)]
    assert {event["event"] for event in seen} == {"step", "progress"}
    assert "pause" in {event.get("action") for event in seen}
    vm.wait_for_acks(20)
    assert "asked to go back" in promoting.job("cancel", promoting.id).out
    assert (ended(promoting.process).code, ended(watching).code) == (7, 7)


def test_who_watches_is_told_when_promoter_dies(vm: VM, tmp_path: Path) -> None:
    promoting = Promoting(tmp_path, vm)
    watching = promoting.watch("--json")
    read_until(watching, '"event": "progress"')
    promoting.process.kill()
    ended(promoting.process)
    told = ended(watching)
    assert told.code == 9, told
    assert f"promoter job resume {promoting.id}" in told.result["hint"]
    dead = promoting.job("pause", promoting.id)
    assert dead.code == 4
    assert "it is interrupted" in dead.err


@pytest.mark.nightly
def test_to_stop_watching_stops_nothing_else(promoting: Promoting) -> None:
    watching = promoting.watch("--json")
    read_until(watching, '"event": "progress"')
    watching.send_signal(signal.SIGINT)
    assert ended(watching).code == 7
    assert promoting.process.poll() is None


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"[]\n",
        b'{"request": "explode"}\n',
        b'{"request": "speed"}\n',
        b'{"request": "speed", "speed": "fast"}\n',
        b"\xff\xfe\n",
        b"x" * 100_000 + b"\n",
    ],
)
def test_nonsense_is_answered_and_changes_nothing(line: bytes, promoting: Promoting) -> None:
    with promoting.ask(line) as client:
        answer = client.makefile().readline()
    assert not answer or json.loads(answer)["message"] == "not a request"
    assert promoting.process.poll() is None


@pytest.fixture(scope="module")
def promoting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Promoting]:
    directory = tmp_path_factory.mktemp("control")
    clone = linked_clone(base(), directory / "clone.qcow2")
    with VM(directory, [Disk(clone)]) as vm:
        vm.wait_for_acks(10)
        promoting = Promoting(directory, vm)
        yield promoting
        promoting.job("cancel", promoting.id)
        assert ended(promoting.process).code == 7
