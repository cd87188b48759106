"""Live bars on a terminal, one per disk."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from promoter.blockjob import Progress


class DiskBars:
    """They are there from the first that is shown until `stop`."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        self._bars = Bars(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}

    def show(self, disk: str, phase: str, progress: Progress, text: str) -> None:
        """A disk's bar; ``disk`` and ``text`` are rich's markup."""
        if disk not in self._tasks:
            self._bars.start()
            self._tasks[disk] = self._bars.add_task(disk, text="")
        self._bars.update(
            self._tasks[disk],
            description=f"{disk} {phase}",
            completed=progress.done,
            total=max(progress.total, 1),
            text=text,
        )

    def stop(self) -> None:
        """Also where it has stopped before."""
        self._bars.stop()
