"""``promoter doctor``: shows what is found, and with ``--repair`` has it mended and looks again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from promoter.cli import run
from promoter.cli.lease import Voice
from promoter.cli.output import Output
from promoter.cli.units import human_bytes
from promoter.errors import PromoterError
from promoter.guests import connect
from promoter.guests.base import Guest
from promoter.operations.doctor import examine_guest, examine_host, mend
from promoter.operations.findings import Diagnosis, Finding, Remedy, Resume
from promoter.operations.journal import Journal
from promoter.storage.abilities import Abilities

ABILITIES = {
    "hard_links": "hard links",
    "reflink": "reflink",
    "direct_io": "O_DIRECT",
    "flock": "flock",
    "ofd_locks": "OFD locks",
}


class Doctor:
    """One visit, to a guest or, without ``name``, to this host."""

    def __init__(
        self, name: str | None, uri: str, state: Path, output: Output, *, as_json: bool
    ) -> None:
        self._name, self._uri, self._state = name, uri, state
        self._output, self._voice = output, Voice(as_json=as_json)
        self._shown: set[Finding] = set()
        self._tried: dict[Remedy, None] = {}

    async def visit(self, *, repair: bool) -> None:
        """Ends with the exit code of what is gravest, of what is left if it was to ``repair``."""
        while True:
            diagnosis = await self._look()
            for finding in diagnosis.findings:
                self._show(finding, repair=repair)
            left = self._remedies(diagnosis)
            if not repair or not left:
                break
            for remedy in left:
                await self._mend(remedy)
        self._conclude(diagnosis, repair=repair)

    async def _look(self) -> Diagnosis:
        journal = Journal(self._state)
        try:
            if self._name is None:
                return await examine_host(self._uri, journal, run.connect_again)
            return await examine_guest(self._called, self._meet, journal)
        except OSError as error:
            hint = "Run promoter as root, or as the files' owner."
            raise PromoterError(f"cannot look at everything: {error}", hint) from error
        finally:
            journal.close()

    @property
    def _called(self) -> str:
        name = self._name or ""
        return str(Path(name).absolute()) if "/" in name else name

    async def _meet(self) -> Guest:
        if "/" in self._called:
            return await connect.plain(Path(self._called))
        return await connect.domain(self._called, self._uri, running=False)

    def _remedies(self, diagnosis: Diagnosis) -> list[Remedy]:
        """What was not tried yet. Operations come first: they clear up more than themselves."""
        found = dict.fromkeys(f.remedy for f in diagnosis.findings if f.remedy)
        left = [remedy for remedy in found if remedy not in self._tried]
        return [remedy for remedy in left if isinstance(remedy, Resume)] or left

    async def _mend(self, remedy: Remedy) -> None:
        self._tried[remedy] = None
        self._voice.event("repair", f"repair: {remedy}", remedy=str(remedy))
        try:
            if isinstance(remedy, Resume):
                await run.resume(remedy.operation, self._state, self._output)
            else:
                await mend(remedy, self._meet)
        except PromoterError as error:
            self._output.error(error)

    def _show(self, finding: Finding, *, repair: bool) -> None:
        if finding in self._shown:
            return
        self._shown.add(finding)
        kind = "finding" if finding.wrong else "note"
        text = f"{'wrong' if finding.wrong else 'note'}: {finding.about}: {finding.message}"
        if finding.hint:
            does = " (--repair does it)" if finding.remedy and not repair else ""
            text += f"\n  {finding.hint}{does}"
        self._voice.event(kind, text, **_fields(finding))

    def _conclude(self, diagnosis: Diagnosis, *, repair: bool) -> None:
        lines = [_describe(each) for each in diagnosis.directories]
        wrong, mendable = diagnosis.wrong, [f for f in diagnosis.wrong if f.remedy]
        if not wrong:
            lines.append("nothing is wrong")
        elif repair:
            lines.append(f"left that is wrong: {len(wrong)}")
        else:
            lines.append(f"wrong: {len(wrong)}, of which --repair mends {len(mendable)}")
        self._voice.event(
            "result",
            "\n".join(lines),
            operation="doctor",
            guest=self._name,
            findings=[_fields(finding) for finding in wrong],
            repaired=[str(remedy) for remedy in self._tried],
            directories=[asdict(each) for each in diagnosis.directories],
            exit_code=diagnosis.exit_code,
        )
        if diagnosis.exit_code:
            raise typer.Exit(diagnosis.exit_code)


def _fields(finding: Finding) -> dict[str, Any]:
    return {
        "about": finding.about,
        "message": finding.message,
        "hint": finding.hint,
        "exit_code": int(finding.wrong),
        "remedy": str(finding.remedy) if finding.remedy else None,
    }


def _describe(found: Abilities) -> str:
    """What a directory's file system can do, in one line."""
    can = [text for name, text in ABILITIES.items() if getattr(found, name)]
    cannot = [text for name, text in ABILITIES.items() if not getattr(found, name)]
    without = f"; without {', '.join(cannot)}" if cannot else ""
    free = f"{human_bytes(found.free)} free"
    return f"{found.directory}: {found.file_system}, {free}, with {', '.join(can)}{without}"
