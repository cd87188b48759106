"""What was intended and done, in SQLite, on stable storage before the act.

The journal says only what we meant; what is true is asked of the hypervisor
and the files. A running operation holds a lock on a file of its own, so that
whoever reads the journal can tell running from interrupted.

*Notes* are what nobody decides by: for `promoter.operations.report`. They survive promoter, but
perhaps not this host: none of them waits for the disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from promoter.errors import PromoterError, Refused

SCHEMA = """
CREATE TABLE IF NOT EXISTS operations (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, guest TEXT NOT NULL, intent TEXT NOT NULL,
    status TEXT NOT NULL, result TEXT, started TEXT NOT NULL, updated TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS steps (
    operation TEXT NOT NULL REFERENCES operations(id), number INTEGER NOT NULL,
    action TEXT NOT NULL, started TEXT NOT NULL, ended TEXT, outcome TEXT,
    PRIMARY KEY (operation, number));
CREATE TABLE IF NOT EXISTS notes (
    operation TEXT NOT NULL, at TEXT NOT NULL, kind TEXT NOT NULL, fields TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS notes_of ON notes (operation);
"""


class OperationStatus(StrEnum):
    """Where an operation stands. Only the last three are final."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


OPEN = frozenset({OperationStatus.RUNNING, OperationStatus.INTERRUPTED})


@dataclass(frozen=True)
class Entry:
    """One operation; ``intent`` and ``result`` are JSON, times are UTC in ISO 8601."""

    id: str
    kind: str
    guest: str
    intent: str
    status: OperationStatus
    result: str | None
    started: str
    updated: str


@dataclass(frozen=True)
class Step:
    """One action of an operation; ``outcome`` is None while it is under way."""

    number: int
    action: str
    started: str
    ended: str | None
    outcome: str | None


class NoteKind(StrEnum):
    """What is noted of an operation."""

    RESUMED = "resumed"
    LOST = "connection lost"
    ASKED = "asked"
    SLOWED = "slowed"
    RATE = "rate"
    LEASE = "lease"
    DISK = "disk"
    SWITCHED = "switched"
    HOOK = "hook"


@dataclass(frozen=True)
class Note:
    """Something that happened in an operation; ``fields`` are what JSON can hold."""

    at: str
    kind: NoteKind
    fields: dict[str, Any]


def state_directory() -> Path:
    """Where the journal lives: PROMOTER_STATE_DIR, /var/lib/promoter for root, else XDG's."""
    if given := os.environ.get("PROMOTER_STATE_DIR"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/promoter")
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local/state") / "promoter"


class Journal:
    """The operations of this host, in ``directory``. Every write is on disk when it returns."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._locks: dict[str, int] = {}
        with self._writing():
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(directory / "journal.sqlite", isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(SCHEMA)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise PromoterError(
                f"cannot keep the journal in {self.directory}: {error}",
                "Make room there, or give a writable directory: --state-dir or PROMOTER_STATE_DIR.",
            ) from error

    def _write(self, statement: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        with self._writing():
            return self._db.execute(statement, values).fetchall()

    def close(self) -> None:
        self._db.close()

    def open(self, operation: str, kind: str, guest: str, intent: str) -> None:
        """Record a new operation before its first act."""
        now = _now()
        row = (operation, kind, guest, intent, OperationStatus.RUNNING, None, now, now)
        self._write("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def save(self, operation: str, intent: str) -> None:
        """Record what is intended now."""
        self._write(
            "UPDATE operations SET intent = ?, updated = ? WHERE id = ?",
            (intent, _now(), operation),
        )

    def begin(self, operation: str, action: str) -> int:
        """Record an action before it happens; the step's number."""
        ((number,),) = self._write(
            "INSERT INTO steps SELECT ?1, coalesce(max(number), 0) + 1, ?2, ?3, NULL, NULL"
            " FROM steps WHERE operation = ?1 RETURNING number",
            (operation, action, _now()),
        )
        return int(number)

    def end(self, operation: str, number: int, outcome: str) -> None:
        """Record how an action went."""
        self._write(
            "UPDATE steps SET ended = ?, outcome = ? WHERE operation = ? AND number = ?",
            (_now(), outcome, operation, number),
        )

    def conclude(self, operation: str, status: OperationStatus, result: str) -> None:
        """Record where an operation ended, and its result line."""
        self._write(
            "UPDATE operations SET status = ?, result = ?, updated = ? WHERE id = ?",
            (status, result, _now(), operation),
        )

    def note(self, operation: str, kind: NoteKind, fields: dict[str, Any]) -> None:
        """Note what happened, without an fsync. That it cannot be noted stops nothing."""
        row = (operation, _now(), kind, json.dumps(fields, default=str))
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA synchronous=NORMAL")
            try:
                self._db.execute("INSERT INTO notes VALUES (?, ?, ?, ?)", row)
            finally:
                self._db.execute("PRAGMA synchronous=FULL")

    def notes(self, operation: str) -> list[Note]:
        """What was noted of an operation, in its order."""
        rows = self._db.execute(
            "SELECT at, kind, fields FROM notes WHERE operation = ? ORDER BY rowid", (operation,)
        )
        return [Note(at, NoteKind(kind), json.loads(fields)) for at, kind, fields in rows]

    def entries(self) -> list[Entry]:
        """All operations, the newest last."""
        return [
            self._entry(row)
            for row in self._db.execute("SELECT * FROM operations ORDER BY started")
        ]

    def entry(self, operation: str) -> Entry:
        """One operation by its id, or by the beginning of it if only one fits."""
        rows = self._db.execute(
            "SELECT * FROM operations WHERE substr(id, 1, ?) = ?", (len(operation), operation)
        ).fetchall()
        if len(rows) != 1:
            raise Refused(f"no such operation: {operation}", "See: promoter job list")
        return self._entry(rows[0])

    def find(self, operation: str) -> Entry | None:
        """The operation of this id, if there is one."""
        rows = self._db.execute("SELECT * FROM operations WHERE id = ?", (operation,)).fetchall()
        return self._entry(rows[0]) if rows else None

    def steps(self, operation: str) -> list[Step]:
        """An operation's actions in their order."""
        rows = self._db.execute(
            "SELECT number, action, started, ended, outcome FROM steps"
            " WHERE operation = ? ORDER BY number",
            (operation,),
        )
        return [Step(*row) for row in rows]

    @contextmanager
    def hold(self, operation: str) -> Iterator[None]:
        """Own an operation while it runs. Raises `Refused` when another process does."""
        with self.lock_file(operation).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(
                    f"operation {operation} is running in another process",
                    f"See: promoter job show {operation}",
                ) from None
            self._locks[operation] = lock.fileno()
            yield

    def lock_file(self, operation: str) -> Path:
        """The file by whose lock an operation is held while it runs."""
        return (self.directory / f"{operation}.lock").absolute()

    def lock_fd(self, operation: str) -> int:
        """The file descriptor that holds an operation; who inherits it holds it too."""
        return self._locks[operation]

    def _entry(self, row: tuple[str, str, str, str, str, str | None, str, str]) -> Entry:
        identity, kind, guest, intent, status, result, started, updated = row
        state = OperationStatus(status)
        if state is OperationStatus.RUNNING and not self._is_held(identity):
            state = OperationStatus.INTERRUPTED
        return Entry(identity, kind, guest, intent, state, result, started, updated)

    def _is_held(self, operation: str) -> bool:
        try:
            with self.hold(operation):
                return False
        except Refused:
            return True


def new_id() -> str:
    """A fresh operation id: short enough for a node-name, QEMU allows 31 characters."""
    return secrets.token_hex(4)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
