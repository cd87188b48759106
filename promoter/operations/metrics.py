"""The journal as Prometheus sees it: a file for node-exporter's textfile collector.

Everything is counted anew from the journal each time, so nothing is lost when the file is. The
file changes as a whole. prometheus_client is loaded by whoever asks for it alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from itertools import product
from pathlib import Path

from promoter.errors import Refused
from promoter.operations.backup import KIND
from promoter.operations.journal import Journal, NoteKind, OperationStatus
from promoter.operations.move import Kind

KINDS = (*map(str, Kind), KIND)
PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)  # seconds


def write(journal: Journal, file: Path) -> None:
    """Write the file. Raises `Refused` when it cannot be."""
    from prometheus_client import (
        CollectorRegistry,
        Gauge,
        Histogram,
        disable_created_metrics,
        write_to_textfile,
    )

    # The library gives this function no types. When a process counted first says nothing here.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    count = Gauge(
        "promoter_operations",
        "Operations by what became of them; interrupted ones wait for promoter job resume.",
        ["operation", "status"],
        registry=registry,
    )
    success = Gauge(
        "promoter_last_success_timestamp_seconds",
        "When a guest's last operation of a kind was done.",
        ["operation", "guest"],
        registry=registry,
    )
    copied = Gauge(
        "promoter_copied_bytes",
        "Bytes that operations have copied.",
        ["operation"],
        registry=registry,
    )
    pause = Histogram(
        "promoter_switchover_seconds",
        "How long guests' I/O stood still.",
        ["operation"],
        buckets=PAUSES,
        registry=registry,
    )
    for kind, status in product(KINDS, OperationStatus):
        count.labels(kind, status)
    for entry in journal.entries():
        count.labels(entry.kind, entry.status).inc()
        if entry.status is OperationStatus.DONE:
            success.labels(entry.kind, entry.guest).set(_seconds(entry.updated))
        for seen, known in _disks(journal, entry.id):
            copied.labels(entry.kind).inc(known)
            if seen is not None:
                pause.labels(entry.kind).observe(seen)
    try:
        write_to_textfile(str(file), registry)
    except OSError as error:
        raise Refused(f"cannot write {file}: {error}", "Name another file.") from error


def _disks(journal: Journal, operation: str) -> Iterable[tuple[float | None, int]]:
    """Of each disk, how long it stood still, and the bytes that were copied."""
    disks: dict[str, dict[str, float]] = {}
    for note in journal.notes(operation):
        if note.kind is NoteKind.DISK:
            known = {k: v for k, v in note.fields.items() if isinstance(v, int | float)}
            disks.setdefault(note.fields["disk"], {}).update(known)
    for known in disks.values():
        copied = known.get("seeded_bytes", 0) + known.get("mirrored_bytes", 0)
        yield known.get("switchover_s"), int(copied)


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()
