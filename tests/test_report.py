"""What is told of an operation afterwards is what was seen while it ran."""

from __future__ import annotations

import json
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from promoter.blockjob import Progress
from promoter.cli.report import page
from promoter.operations import report
from promoter.operations.history import History
from promoter.operations.journal import Entry, Journal, NoteKind, OperationStatus
from promoter.values import to_json
from tests.cli import Ran, ended, promoter, start
from tests.conftest import Make
from tests.test_contract import SLOW, read_until
from tests.vm import Disk, base, linked_clone


class Case:
    """A guest with one linked clone, and what promoter tells of it."""

    def __init__(self, make: Make, directory: Path) -> None:
        self.state = directory / "state"
        self.clone = linked_clone(base(), directory / "clone.qcow2")
        self.guest = make([Disk(self.clone)])

    def run(self, *words: object) -> Ran:
        return promoter(self.state, *words, *self.guest.address, "--json")

    def until(self, text: str, *words: object) -> tuple[Any, dict[str, Any]]:
        config = self.state.with_name("promoter.toml")
        told = {"PROMOTER_CONFIG": str(config)} if config.exists() else {}
        process = start(self.state, *words, *self.guest.address, "--json", environment=told)
        return process, json.loads(read_until(process, text)[-1])

    def report(self, identity: str) -> dict[str, Any]:
        told = promoter(self.state, "report", identity, "--json")
        assert told.code == 0, told
        return told.result

    def chain(self) -> list[Path]:
        (disk,) = self.run("chain").result["disks"]
        return [Path(image["file"]) for image in disk["chain"]]

    def is_chain(self, layers: list[dict[str, Any]]) -> bool:
        running = self.chain()
        return len(running) == len(layers) and all(
            Path(layer["file"]).samefile(file) for layer, file in zip(layers, running, strict=True)
        )


@pytest.mark.sampled(2)
def test_a_report_tells_what_was_seen(make: Make, tmp_path: Path) -> None:
    case = Case(make, tmp_path)
    hook = f"hook = ['sh', '-c', 'cat > {tmp_path}/told; exit 3']"
    (tmp_path / "promoter.toml").write_text(hook)
    with case.guest as guest:
        guest.wait_for_acks(60)
        running, seen = case.until('"phase": "seed"', "promote", "--speed", SLOW)
        cancelled = seen["id"]
        assert promoter(case.state, "job", "cancel", cancelled).code == 0
        assert ended(running).code == 7
        told = case.report(cancelled)
        assert told["status"] == "cancelled"
        assert case.is_chain(told["disks"][0]["after"])
        assert any(each["what"] == "asked for: cancel" for each in told["timeline"])
        last = told["timeline"][-1]
        assert (last["what"], last["outcome"]) == ("hook command", "exit code 3")
        heard = json.loads((tmp_path / "told").read_text())
        assert (heard["id"], heard["status"], heard["exit_code"]) == (cancelled, "cancelled", 7)

        how = ("promote", "--seed", "none", "--verify")
        running, seen = case.until('"phase": "mirror"', *how, "--speed", "10M")
        promoted = seen["id"]
        running.send_signal(signal.SIGKILL)
        ended(running)
        told = case.report(promoted)
        assert (told["status"], told["disks"][0]["after"]) == ("interrupted", [])
        assert told["timeline"][-1]["outcome"] == report.CUT_OFF
        resumed = promoter(case.state, "job", "resume", promoted, "--json")
        assert resumed.code == 0, resumed
        told = case.report(promoted)
        (disk,), (result,) = told["disks"], resumed.result["disks"]
        assert (told["status"], told["resumed"]) == ("done", 1)
        assert len(disk["before"]) == 2
        assert case.is_chain(disk["after"])
        assert disk["switchover_s"] == result["switchover_s"] > 0
        assert f"{result['verified_bytes']:,} bytes compared" in disk["verification"]
        mirrors = [phase for phase in told["phases"] if phase["phase"] == "mirror"]
        assert len(mirrors) == 2
        assert disk["copied_bytes"] == result["mirrored_bytes"]
        assert result["mirrored_bytes"] >= mirrors[-1]["samples"][-1]["done"] > 0

        (tmp_path / "backups").mkdir()
        words = ("backup", *guest.address, tmp_path / "backups", "--json")
        backed = promoter(case.state, *words)
        assert backed.code == 0, backed
        told = case.report(backed.result["id"])
        assert [part["kind"] for part in told["parts"]] == ["snapshot", "consolidate"]
        snapshot, merge = (part["disks"][0] for part in told["parts"])
        assert snapshot["switchover_s"] == backed.result["disks"][0]["snapshot_s"]
        assert [len(chain) for chain in (snapshot["after"], merge["after"])] == [2, 1]
        assert case.is_chain(merge["after"])
        assert told["disks"][0]["after"][0]["file"] == backed.result["disks"][0]["file"]
    lines = promoter(case.state, "report", promoted)
    assert lines.code == 0
    assert "resumed, going by the guest and the files" in lines.out
    written = tmp_path / "report.html"
    assert promoter(case.state, "report", backed.result["id"], "--html", written).code == 0
    assert_stands_alone(written.read_text())


def assert_stands_alone(text: str) -> None:
    for outside in ("http:", "https:", "//", "url(", "<script", "<link", "<img", "@import"):
        assert outside not in text
    assert text.startswith("<!doctype html>")


def told(journal: Journal, notes: list[dict[str, Any]]) -> report.Report:
    """A backup of which there are only samples of its rate."""
    from promoter.operations.backup import Backup
    from promoter.operations.move import Choices

    intent = Backup("b", "<script>guest</script>", Choices(), (), "f", "m")
    journal.open("b", "backup", intent.guest, to_json(intent))
    for fields in notes:
        journal.note("b", NoteKind.RATE, fields)
    entry: Entry = journal.entry("b")
    return report.make(journal, entry)


def sample(done: int, elapsed: float, phase: str = "copy") -> dict[str, Any]:
    places = {"disk": "vda", "phase": phase, "total": 100, "dirtied": None, "limit": None}
    return {**places, "done": done, "elapsed": elapsed}


def test_a_phase_that_began_anew_is_another_one(tmp_path: Path) -> None:
    made = told(
        Journal(tmp_path), [sample(10, 1), sample(40, 3), sample(5, 1), sample(7, 2, "merge")]
    )
    assert [len(phase.samples) for phase in made.phases] == [2, 1, 1]
    assert [each.rate for each in made.phases[0].samples] == [10, 15]


def test_names_are_text_in_a_page(tmp_path: Path) -> None:
    text = page(told(Journal(tmp_path), [sample(10, 1), sample(40, 3)]))
    assert_stands_alone(text)
    assert "&lt;script&gt;guest" in text
    body = text.partition("<svg")[2].partition("</svg>")[0]
    picture = ElementTree.fromstring(f"<svg{body}</svg>")
    assert picture[0].attrib["points"] == "213.3,40.0 640.0,0.0"


def test_a_long_operation_has_few_samples(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    history = History("x", journal)
    for tick in range(24 * 3600 * 2):  # a day, at two looks a second
        history.progress("vda", "mirror", Progress(tick, 10**6, tick / 2))
    history.step_ended(())
    noted = journal.notes("x")
    assert 100 < len(noted) < 200
    assert noted[-1].fields["done"] == 24 * 3600 * 2 - 1


def test_a_note_waits_for_no_disk_and_an_act_does(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.note("x", NoteKind.RESUMED, {})
    (mode,) = journal._db.execute("PRAGMA synchronous").fetchone()
    assert mode == 2  # FULL again
    journal.open("x", "promote", "guest", "{}")
    assert journal.entry("x").status is OperationStatus.INTERRUPTED


def test_prometheus_hears_of_every_outcome(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for status in (OperationStatus.DONE, OperationStatus.FAILED):
        journal.open(status, "promote", "guest", "{}")
        journal.note(status, NoteKind.DISK, {"disk": "vda", "switchover_s": 0.03})
        journal.note(status, NoteKind.DISK, {"disk": "vda", "mirrored_bytes": 5, "old": None})
        journal.conclude(status, status, "")
    journal.open("left", "backup", "guest", "{}")
    file = tmp_path / "promoter.prom"
    wrote = promoter(tmp_path, "job", "list", "--prometheus", file)
    assert (wrote.code, wrote.out) == (0, "")
    lines = file.read_text().splitlines()
    for line in (
        'promoter_operations{operation="promote",status="done"} 1.0',
        'promoter_operations{operation="promote",status="failed"} 1.0',
        'promoter_operations{operation="backup",status="interrupted"} 1.0',
        'promoter_operations{operation="snapshot",status="interrupted"} 0.0',
        'promoter_copied_bytes{operation="promote"} 10.0',
        'promoter_switchover_seconds_bucket{le="0.02",operation="promote"} 0.0',
        'promoter_switchover_seconds_bucket{le="0.05",operation="promote"} 2.0',
    ):
        assert line in lines
    success = [line for line in lines if line.startswith("promoter_last_success")]
    assert [line.split("}")[0] for line in success] == [
        'promoter_last_success_timestamp_seconds{guest="guest",operation="promote"'
    ]
    assert [path.name for path in tmp_path.glob("promoter.prom*")] == ["promoter.prom"]
    nowhere = promoter(tmp_path, "job", "list", "--prometheus", tmp_path / "nowhere" / "file")
    assert nowhere.code == 4
