"""What an operator has run at an operation's end changes nothing; and what a log says of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from promoter.operations import ending
from promoter.operations.journal import Journal, OperationStatus
from tests.vm import wait_for

EVENT = {"event": "error", "exit_code": 5, "message": "full"}


def tell(directory: Path, *command: str) -> tuple[str, str]:
    """What is reported of a hook, and what the journal has."""
    journal = Journal(directory)
    journal.open("a", "promote", "guest", "{}")
    failure = asyncio.run(ending.tell(command, journal, "a", EVENT))
    assert journal.entry("a").status is OperationStatus.INTERRUPTED
    return failure, journal.notes("a")[-1].fields["outcome"]


def test_a_hook_hears_how_it_ended(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    assert tell(tmp_path, "sh", "-c", f"cat > {heard}") == ("", "done")
    about = {"id": "a", "operation": "promote", "guest": "guest", "status": "interrupted"}
    assert json.loads(heard.read_text()) == EVENT | about


def test_a_hook_that_fails_is_reported(tmp_path: Path) -> None:
    assert tell(tmp_path, "false") == ("the hook false: exit code 1", "exit code 1")
    assert "cannot be run: No such file" in tell(tmp_path / "2", str(tmp_path / "none"))[0]
    assert tell(tmp_path / "3", "true") == ("", "done")  # which does not read


def test_a_hook_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "LONGEST", 0.3)
    pid = tmp_path / "pid"
    failure, _ = tell(tmp_path, "sh", "-c", f"sleep 100 & echo $! > {pid}; wait")
    assert "was not done" in failure
    wait_for(lambda: ended(int(pid.read_text())), "the hook's child to end", 5)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_the_journal_is_told_how_grave_a_line_is(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "promoter",
        "job",
        "show",
        "none",
        "--state-dir",
        str(tmp_path),
    ]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        file = os.fstat(stream.fileno())
        for there in (f"{file.st_dev}:{file.st_ino}", "1:1"):
            environment = {**os.environ, "JOURNAL_STREAM": there}
            subprocess.run(command, stderr=stream, env=environment, check=False)
    lines = log.read_text().splitlines()
    assert [line.split("no such")[0] for line in (lines[0], lines[2])] == ["<3>error: ", "error: "]
    assert lines[1].startswith("<3>  See:")
