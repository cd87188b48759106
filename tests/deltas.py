"""A guest of either kind with deltas, what promoter does to it, and what must hold afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import libvirt_qemu

from tests import records
from tests.cli import Ran, ended, promoter, start
from tests.domains import Domain
from tests.vm import VM, Disk, base, qemu_img

LEAKS = 3  # qemu-img check: clusters that nobody uses, which a killed QEMU may leave
Guest = VM | Domain
Make = Callable[[Sequence[Disk]], Guest]


class Case:
    """A guest that writes, with an empty journal.

    ``active`` is the file that the next boot opens as the first disk; a domain's changes.
    """

    def __init__(self, make: Make, directory: Path, disks: Sequence[Path]) -> None:
        self.directory, self.state = directory, directory / "state"
        self.disks = [Disk(disk, fmt="raw" if disk.suffix == ".img" else "qcow2") for disk in disks]
        self.guest = make(self.disks)
        self.base_digest = digest(base())
        self.active = self.disks[0].path

    @property
    def plain(self) -> bool:
        return isinstance(self.guest, VM)

    # What promoter does

    def start(self, command: str, *words: object) -> subprocess.Popen[str]:
        return start(self.state, command, *self.guest.address, *words, "--json")

    def strike(self, point: str, whom: str, pid: int, *command: object) -> subprocess.Popen[str]:
        words = (point, whom, pid, *command, *self.guest.address, "--json")
        return start(self.state, *words, module="tests.struck")

    def run(self, command: str, *words: object) -> Ran:
        return ended(self.start(command, *words), 120)

    def done(self, command: str, *words: object) -> dict[str, Any]:
        """Run a command that must succeed; its result."""
        ran = self.run(command, *words)
        assert ran.code == 0, (ran.out, ran.err)
        assert ran.result["status"] == "done"
        return ran.result

    def snapshot(self) -> Path:
        """Take one; the frozen layer of the first disk."""
        return Path(self.done("snapshot")["disks"][0]["source"])

    def resume(self) -> Ran:
        return promoter(self.state, "job", "resume", "--json")

    # What is there

    def chain(self, disk: int = 0) -> list[Path]:
        """A disk's layers as the running guest has them, the active one first."""
        shown = promoter(self.state, "chain", *self.guest.address, "--json")
        assert shown.code == 0, shown.out
        return [Path(image["file"]) for image in shown.result["disks"][disk]["chain"]]

    def query(self, command: str, **arguments: object) -> Any:
        if isinstance(self.guest, VM):
            return self.guest.qmp(command, **arguments)
        asked = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuMonitorCommand(self.guest.domain, asked, 0))["return"]

    def limits(self) -> set[int]:
        """The I/O limits of all disks."""
        return {
            value
            for entry in self.query("query-block")
            for key, value in entry.get("inserted", {}).items()
            if key.startswith(("bps", "iops"))
        }

    def files(self) -> set[str]:
        return {path.name for path in self.directory.iterdir() if path.suffix not in NOT_OURS}

    # What must hold

    def prove_at_rest(self) -> None:
        """The guest runs, unlimited; in it is nothing of ours that is not in a chain."""
        self.guest.wait_for_acks(20)
        assert not self.guest.paused
        assert self.query("query-jobs") == []
        assert self.limits() <= {0}
        used = {entry["inserted"]["node-name"] for entry in self.query("query-block")}
        graph = self.query("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        used |= {names[edge["child"]] for edge in graph["edges"]}
        nodes = {n["node-name"] for n in self.query("query-named-block-nodes", flat=True)}
        assert {node for node in nodes if node.startswith("promoter")} <= used

    def prove_boots(self, depth: int, *, killed: bool = False) -> None:
        """By its own command line or definition; then the disk has every record.

        Its plug is pulled, so the active layer may have leaks; if ``killed`` the others too.
        """
        if isinstance(self.guest, Domain):
            self.active = Path(self.guest.next_boot()[0])
        self.guest.kill()
        self.guest.start()
        self.guest.wait_for_acks(20)
        self.guest.shutdown()
        self.prove_disk(depth, killed=killed)

    def prove_disk(self, depth: int, *, killed: bool = False) -> None:
        layers = backing_chain(self.active)
        assert len(layers) == depth, layers
        for layer in layers:
            if layer.suffix != ".img":
                checked = subprocess.run(["qemu-img", "check", "-q", layer], check=False)
                may_leak = killed or layer == self.active
                assert checked.returncode in ((0, LEAKS) if may_leak else (0,)), layer
        records.check(self.active, None, self.guest.log).raise_if_bad()
        assert digest(base()) == self.base_digest

    def prove_tidy(self, *files: Path) -> None:
        """Once its QEMU is gone and ``job resume`` was run: these files and no others."""
        resumed = self.resume()
        assert resumed.code == 0, resumed.out
        assert self.files() == {file.name for file in files}

    def prove_unchanged(self, chain: Sequence[Path], files: set[str]) -> None:
        """The guest runs on its chain, and nothing was left behind."""
        assert self.chain() == list(chain)
        assert self.files() == files
        self.prove_at_rest()


NOT_OURS = {".log"}


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def backing_chain(path: Path) -> list[Path]:
    """The files of a powered-off disk, going by their headers."""
    shown = qemu_img("info", "--backing-chain", "--output=json", path)
    return [Path(image["filename"]) for image in json.loads(shown)]


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Read a running command's output up to a line with a text in it."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return line
    raise AssertionError(f"no {text!r} in {lines}, {process.stderr and process.stderr.read()}")


def interrupted(process: subprocess.Popen[str], sent: signal.Signals) -> Ran:
    """Send a running command a signal, and wait for its end."""
    process.send_signal(sent)
    return ended(process)
