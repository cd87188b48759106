"""What an operation notes of itself for its report: few lines, however long it takes.

The gap between two samples of a rate grows with the time that the phase has taken: a second at
first, then a twentieth of it. So an hour has about 100 of them, and a day 170.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from promoter.blockjob import Progress
from promoter.operations.journal import Journal, NoteKind
from promoter.operations.outcome import DiskReport
from promoter.values import as_builtins

LEAST_GAP, GROWTH = 1.0, 0.05  # seconds; of what has passed


class History:
    """The notes of one operation."""

    def __init__(self, operation: str, journal: Journal) -> None:
        self._operation, self._journal = operation, journal
        self._noted: dict[str, tuple[str, float]] = {}
        self._latest: dict[str, tuple[str, Progress]] = {}
        self._reports: dict[str, dict[str, Any]] = {}

    def note(self, kind: NoteKind, **fields: Any) -> None:
        """Something that happened."""
        self._journal.note(self._operation, kind, fields)

    def progress(self, disk: str, phase: str, progress: Progress) -> None:
        """How far a phase is: noted when it is time for a sample."""
        self._latest[disk] = (phase, progress)
        before, at = self._noted.get(disk, ("", 0.0))
        fresh = phase != before or progress.elapsed < at
        if fresh or progress.elapsed - at >= LEAST_GAP + GROWTH * at:
            self._sample(disk)

    def step_ended(self, reports: Iterable[DiskReport]) -> None:
        """An action is over: where it left its phases, and what came to be known of the disks."""
        for disk in list(self._latest):
            self._sample(disk)
        for report in reports:
            fields = as_builtins(report)
            if self._reports.get(report.disk) != fields:
                self._reports[report.disk] = fields
                self.note(NoteKind.DISK, **fields)

    def _sample(self, disk: str) -> None:
        phase, progress = self._latest.pop(disk)
        self._noted[disk] = (phase, progress.elapsed)
        self.note(
            NoteKind.RATE,
            disk=disk,
            phase=phase,
            done=progress.done,
            total=progress.total,
            elapsed=round(progress.elapsed, 3),
            dirtied=progress.dirtied,
            limit=progress.limit,
        )
