"""``promoter lease`` and ``promoter run``: the lease file, on the command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Annotated, Any, TextIO

import typer

from promoter.cli import run as running
from promoter.cli.output import choose
from promoter.cli.units import human_bytes
from promoter.lease import claim
from promoter.lease.claim import Acquisition, describe
from promoter.lease.credentials import Credentials
from promoter.lease.file import LeaseFile
from promoter.lease.host import Host, this_host
from promoter.lease.ledger import Ledger
from promoter.lease.readers import enter, forget
from promoter.lease.record import Answer, LeaseRecord
from promoter.lease.rules import Policy
from promoter.operations.journal import state_directory

lease_app = typer.Typer(help="Who may open a disk.", no_args_is_help=True)

Disk = Annotated[Path, typer.Argument(metavar="DISK", help="The path of an image file.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
State = Annotated[
    Path,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        envvar="PROMOTER_STATE_DIR",
        default_factory=state_directory,
        help="Where this host's name and its fence command are.",
        show_default="/var/lib/promoter, or ~/.local/state/promoter",
    ),
]
MOST_UNSAID = 1000  # lines
FAREWELL = 1.0  # seconds
Timeout = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="For the owner to let go.")]


class Unheeded:
    """Standard error for who must not wait until it is read: what finds no room is not said."""

    def __init__(self) -> None:
        self._texts = Queue[str](MOST_UNSAID)
        Thread(target=self._write, name="standard error", daemon=True).start()

    def write(self, text: str) -> None:
        with suppress(Full):
            self._texts.put_nowait(text)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        """Give the last words a moment."""
        with self._texts.all_tasks_done:
            self._texts.all_tasks_done.wait_for(lambda: not self._texts.unfinished_tasks, FAREWELL)

    def _write(self) -> None:
        while True:
            left = self._texts.get().encode(errors="backslashreplace")
            with suppress(OSError):  # nobody is there
                while left:  # not by `sys.stderr`, which would be locked at promoter's end
                    left = left[os.write(sys.stderr.fileno(), left) :]
            self._texts.task_done()


class Voice:
    """Says what happens, as JSON or as lines."""

    def __init__(self, *, as_json: bool, stream: TextIO | Unheeded | None = None) -> None:
        self._as_json = as_json
        self._stream = stream or sys.stdout

    def event(self, event: str, line: str, **fields: Any) -> None:
        if self._as_json:
            line = json.dumps({"event": event, **fields}, default=str)
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def result(self, operation: str, disk: Path, record: LeaseRecord | None, line: str) -> None:
        lease = asdict(record) if record else None
        self.event("result", line, operation=operation, disk=disk, lease=lease, exit_code=0)

    def answer(self, disk: Path) -> Callable[[Answer], None]:
        return lambda answer: self.event(
            "answer",
            f"{disk}: the owner answers {answer.said} {answer.why}{_far(answer)}".rstrip(),
            disk=disk,
            **asdict(answer),
        )


def _far(answer: Answer) -> str:
    return f", {human_bytes(answer.done)} of {human_bytes(answer.total)}" if answer.total else ""


def _finish(work: Callable[[], None], *, as_json: bool) -> None:
    async def call() -> None:
        work()

    running.finish(call(), choose(as_json=as_json, quiet=False, verbose=False))


def _open(disk: Path, state: Path) -> tuple[LeaseFile, Host]:
    host = this_host(state)
    return LeaseFile(disk, Ledger(state, host.name)), host


def describe_record(record: LeaseRecord | None) -> str:
    """A lease in one line."""
    if record is None:
        return "no lease"
    parts = [f"epoch {record.epoch}: {record.state}"]
    if record.owner:
        parts.append(f"by {describe(record.owner)}")
    if record.lender:
        parts.append(f"lent by {describe(record.lender)}")
    if record.grant:
        parts.append(f"for host {record.grant.host}")
    if record.elsewhere:
        parts.append(f"{'perhaps ' if record.operation else ''}the disk is {record.elsewhere}")
    if record.operation:
        parts.append(f"{record.operation.kind} {record.operation.id} works on it")
    if record.readers:
        parts.append(f"read by {', '.join(record.readers)}")
    if record.note:
        parts.append(f"broken: {record.note}")
    return " ".join([*parts, f"since {record.wall}"])


@lease_app.command()
def show(disk: Disk, as_json: Json = False) -> None:
    """Show who may open the disk, and whether a QEMU has it open."""
    voice = Voice(as_json=as_json)

    def work() -> None:
        store = LeaseFile(disk)
        record, lock, storage, waiting = claim.look(store)
        voice.event(
            "result",
            f"{store.disk}: {describe_record(record)}\nimage lock {lock}, storage {storage},"
            f" {waiting} waiting",
            operation="lease show",
            disk=store.disk,
            lease=asdict(record) if record else None,
            lock=lock,
            storage=storage,
            waiting=waiting,
            exit_code=0,
        )

    _finish(work, as_json=as_json)


@lease_app.command()
def acquire(disk: Disk, state: State, timeout: Timeout = 30, as_json: Json = False) -> None:
    """Claim the disk for this host, asking its owner when there is one.

    It is held until `promoter lease release`. Nothing beats for it: on local storage another
    host may take it after three minutes of silence unless a QEMU has it open.
    """
    voice = Voice(as_json=as_json)

    def work() -> None:
        store, host = _open(disk, state)
        heard = voice.answer(store.disk)
        enter(store.disk, host)
        mine, credentials = host.owner(), Credentials.of(state)
        asking = Acquisition(store, host, mine, credentials=credentials, heard=heard, borrow=True)
        record = asking.run(timeout)
        voice.result(
            "lease acquire", store.disk, record, f"{store.disk}: {describe_record(record)}"
        )

    _finish(work, as_json=as_json)


@lease_app.command()
def release(disk: Disk, state: State, as_json: Json = False) -> None:
    """Let go of a disk that this host holds and nothing has open."""
    voice = Voice(as_json=as_json)

    def work() -> None:
        store, host = _open(disk, state)
        record = claim.release(store, host)
        voice.result(
            "lease release", store.disk, record, f"{store.disk}: {describe_record(record)}"
        )

    _finish(work, as_json=as_json)


@lease_app.command()
def request(disk: Disk, state: State, timeout: Timeout = 30, as_json: Json = False) -> None:
    """Ask the owner to let go, and do not claim the disk.

    It is kept for this host for 30 s.
    """
    voice = Voice(as_json=as_json)

    def work() -> None:
        store, host = _open(disk, state)
        heard = voice.answer(store.disk)
        record = claim.request(store, host, Credentials.of(state), timeout, heard)
        voice.result(
            "lease request", store.disk, record, f"{store.disk}: {describe_record(record)}"
        )

    _finish(work, as_json=as_json)


@lease_app.command("forget")
def forget_reader(
    disk: Disk,
    reader: Annotated[Path, typer.Argument(metavar="OVERLAY", help="As `lease show` names it.")],
    state: State,
    as_json: Json = False,
) -> None:
    """Take an overlay that is no more off the readers of a disk."""
    voice = Voice(as_json=as_json)

    def work() -> None:
        store = LeaseFile(disk)
        record = forget(store, reader, this_host(state))
        voice.result("lease forget", store.disk, record, f"{store.disk}: {describe_record(record)}")

    _finish(work, as_json=as_json)


@lease_app.command("break")
def break_lease(
    disk: Disk,
    state: State,
    epoch: Annotated[int, typer.Option(metavar="N", help="The epoch that `lease show` told.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; it is kept in the lease.")],
    as_json: Json = False,
) -> None:
    """Declare a disk free whose owner is gone for good.

    You answer for it that its owner's host can write no more; the command STATE-DIR/fence, if
    there is one, is run first and must succeed. Refused while a QEMU is seen to have it open.
    """
    voice = Voice(as_json=as_json)

    def work() -> None:
        store, host = _open(disk, state)
        record, _ = claim.break_lease(store, epoch, reason, host, state)
        voice.result("lease break", store.disk, record, f"{store.disk}: {describe_record(record)}")

    _finish(work, as_json=as_json)


def run(
    state: State,
    disks: Annotated[
        list[Path], typer.Option("--disk", metavar="DISK", help="An image it opens; repeatable.")
    ],
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="A QEMU.")],
    policy: Annotated[
        Policy, typer.Option(help="How to let go of the disks when another host asks.")
    ] = Policy.NEVER,
    qmp: Annotated[
        Path | None, typer.Option(metavar="SOCKET", help="A monitor of the guest's.")
    ] = None,
    borrow: Annotated[
        bool,
        typer.Option(
            "--borrow",
            help="Disks that are only lent will do: what a guest reads there stays as it is.",
        ),
    ] = False,
    timeout: Timeout = 30,
    as_json: Json = False,
) -> None:
    """Run a QEMU under leases.

    It claims the disks, answers requests to let go of them, and frees them at the end. The exit
    code is the command's. What promoter says goes to standard error.
    """
    from promoter.lease.run import LeasedRun, RunSpec

    stream = Unheeded()
    voice = Voice(as_json=as_json, stream=stream)
    codes: list[int] = []

    def say(event: str, disk: Path, text: str) -> None:
        voice.event(event, f"promoter: {disk}: {event}: {text}", disk=disk, text=text)

    async def work() -> None:
        spec = RunSpec(tuple(disks), tuple(command), policy, qmp, timeout, borrow)
        host = this_host(state)
        ledger, credentials = Ledger(state, host.name), Credentials.of(state)
        codes.append(await LeasedRun(spec, host, ledger, credentials, say).run())

    try:
        running.finish(work(), choose(as_json=as_json, quiet=False, verbose=False))
    finally:
        stream.close()
    raise typer.Exit(codes[0])
