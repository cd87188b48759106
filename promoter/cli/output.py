"""One command's voice: one JSON object a line, or what terminal.py makes of it.

With ``--json`` nothing but JSON goes to standard output, and rich is not loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from promoter.blockjob import Progress
from promoter.chain import Disk, Image
from promoter.errors import PromoterError, as_fields, from_fields
from promoter.guests.base import GuestView
from promoter.operations.backup import KIND, Copied
from promoter.operations.journal import Entry, Step
from promoter.operations.outcome import DiskReport
from promoter.operations.plan import Plan
from promoter.operations.report import Report
from promoter.operations.verify import cost
from promoter.storage.siblings import Siblings
from promoter.values import as_builtins, from_builtins


class Output(Protocol):
    """One command's voice."""

    def chains(self, guest: str, view: GuestView, siblings: Siblings | None) -> None: ...

    def operations(self, entries: Sequence[Entry]) -> None: ...

    def operation_steps(self, entry: Entry, steps: Sequence[Step]) -> None: ...

    def report(self, report: Report) -> None: ...

    def speed(self, operation: str, speed: int) -> None: ...

    def asked(self, operation: str, request: str) -> None: ...

    def plan(self, plan: Plan, *, dry_run: bool) -> None: ...

    def step(self, operation: str, action: str) -> None: ...

    def progress(self, operation: str, disk: str, phase: str, progress: Progress) -> None: ...

    def result(self, result: dict[str, Any], reports: Sequence[DiskReport]) -> None: ...

    def backups(self, result: dict[str, Any], copied: Sequence[Copied]) -> None: ...

    def warning(self, text: str) -> None: ...

    def error(self, error: PromoterError) -> None: ...

    def close(self) -> None: ...


def _print(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event, default=str) + "\n")
    sys.stdout.flush()


class JsonOutput:
    """One JSON object a line, or for each a call of ``tell``."""

    def __init__(self, tell: Callable[[dict[str, Any]], None] = _print) -> None:
        self._tell = tell

    def _say(self, event: str, **fields: Any) -> None:
        self._tell({"event": event, **fields})

    def chains(self, guest: str, view: GuestView, siblings: Siblings | None) -> None:
        self._say("result", **chain_fields(guest, view, siblings))

    def operations(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._say("operation", **asdict(entry) | {"intent": json.loads(entry.intent)})

    def operation_steps(self, entry: Entry, steps: Sequence[Step]) -> None:
        self.operations([entry])
        for step in steps:
            self._say("step", id=entry.id, **asdict(step))

    def report(self, report: Report) -> None:
        self._say("report", **as_builtins(report))

    def speed(self, operation: str, speed: int) -> None:
        self._say("result", operation="speed", id=operation, speed=speed, exit_code=0)

    def asked(self, operation: str, request: str) -> None:
        self._say("result", operation=request, id=operation, exit_code=0)

    def plan(self, plan: Plan, *, dry_run: bool) -> None:
        self._say("plan", operation=plan.move.kind, **plan_fields(plan))

    def step(self, operation: str, action: str) -> None:
        self._say("step", id=operation, action=action)

    def progress(self, operation: str, disk: str, phase: str, progress: Progress) -> None:
        self._say(
            "progress",
            id=operation,
            disk=disk,
            phase=phase,
            done_bytes=progress.done,
            total_bytes=progress.total,
            elapsed_s=round(progress.elapsed, 3),
            rate=round(progress.rate),
            eta_s=progress.eta,
            dirtied=progress.dirtied,
            limit=progress.limit,
        )

    def result(self, result: dict[str, Any], reports: Sequence[DiskReport]) -> None:
        self._say("result", **result, disks=[asdict(report) for report in reports])

    def backups(self, result: dict[str, Any], copied: Sequence[Copied]) -> None:
        self._say("result", **result, disks=[asdict(each) for each in copied])

    def warning(self, text: str) -> None:
        sys.stderr.write(f"warning: {text}\n")  # the result stays the last event

    def error(self, error: PromoterError) -> None:
        self._say("error", **as_fields(error))

    def close(self) -> None:
        pass


def plan_fields(plan: Plan) -> dict[str, Any]:
    """A plan for ``--json``. Sizes in bytes."""
    move = plan.move
    return {
        "id": move.id,
        "guest": move.guest,
        "nothing_to_do": plan.nothing_to_do,
        "warnings": plan.warnings,
        "disks": [
            {
                "disk": disk.name,
                "source": disk.names.path,
                "target": disk.names.path if disk.names.in_place else disk.names.target,
                "old": disk.names.aside,
                "layers_below": len(disk.chain.below),
                "way": disk.way,
                "merged": [image.file for image in disk.gone],
                "seed": disk.method,
                "format": disk.geometry.format,
                "virtual_bytes": disk.virtual_size,
                "required_bytes": disk.required,
                "free_bytes": plan.free[index],
                "verify_bytes": cost(disk) if move.choices.verify else None,
            }
            for index, disk in enumerate(move.disks)
        ],
    }


def replay(event: dict[str, Any], output: Output) -> None:
    """Show what a running operation told. Raises the error that it ended with."""
    match event.pop("event"):
        case "step":
            output.step(event["id"], event["action"])
        case "progress":
            done, total, elapsed = (event[k] for k in ("done_bytes", "total_bytes", "elapsed_s"))
            progress = Progress(done, total, elapsed, event["dirtied"], event["limit"])
            output.progress(event["id"], event["disk"], event["phase"], progress)
        case "result" if event["operation"] == KIND:
            output.backups(event, from_builtins(list[Copied], event.pop("disks")))
        case "result":
            output.result(event, from_builtins(list[DiskReport], event.pop("disks")))
        case "error":
            raise from_fields(event)


def choose(*, as_json: bool, quiet: bool, verbose: bool) -> Output:
    """JSON if asked for, bars on a terminal, else lines."""
    if as_json:
        return JsonOutput()
    from promoter.cli import terminal

    return terminal.choose(quiet=quiet, verbose=verbose)


def chain_fields(guest: str, view: GuestView, siblings: Siblings | None) -> dict[str, Any]:
    """A guest's chains for ``--json``. Sizes in bytes."""
    return {
        "operation": "chain",
        "guest": guest,
        "status": view.status,
        "exit_code": 0,
        "not_looked_into": [asdict(item) for item in siblings.unreadable] if siblings else None,
        "disks": [
            {
                "disk": disk.name,
                "read_only": disk.read_only,
                "jobs": disk.jobs,
                "chain": [
                    {
                        **asdict(image),
                        "shared_by": shared_by(view, disk, image),
                        "read_by": [asdict(reader) for reader in siblings.of(disk, image)]
                        if siblings
                        else None,
                    }
                    for image in disk.chain
                ],
                "libvirt": asdict(disk.libvirt) if disk.libvirt else None,
                "differences": disk.differences,
            }
            for disk in view.disks
        ],
    }


def shared_by(view: GuestView, disk: Disk, image: Image) -> list[str]:
    """The guest's other disks that read through the same file."""
    return [
        other.name
        for other in view.disks
        if other.key != disk.key and image.file and image.file in [i.file for i in other.chain]
    ]
