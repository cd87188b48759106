"""The runbooks of docs/runbooks, as texts whose console blocks can be played.

A console block is a conversation: `$ command` (or `host-b$ command`), then what it says; `…` in
place of lines that may be left out. A block of one kind of guest says so after the word console
("```console qemu"). A command that is not followed by `$ echo $?` must end with 0.

A runbook names nice places (`/vm/web.qcow2`) where the test has others: `Terminal` puts those
in, and takes them out of what is said. Ids and times in names are told apart by the order in
which they come up; sizes, rates, durations, dates and process ids may be any.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.vm import ROOT

RUNBOOKS = ROOT / "docs" / "runbooks"
BLOCK = re.compile(r"^```console *(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"([\w-]*)\$ (.*)")
LEFT_OUT = "…"
VARYING = re.compile(r".*/s, .* to go.*|/\S+: \S+, .* free, with.*")  # how far; file systems
IDS = ("6b417bf7", "bc659be6", "78302c16", "5b8dbb8a", "f92ae06c", "51ff44c4", "aef304c7")
TIMES = tuple(f"20261126T03{minute:02}27Z" for minute in range(4, 60, 7))
ANY = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*(?:Z|\+00:00)"), "DATE"),
    (re.compile(r"(?:[\d,]+(?:\.\d+)?|\?) ?(?:bytes|[KMGT]iB|B)\b"), "SIZE"),
    (re.compile(r"\b\d+(?:\.\d+)? (?:ms|s|min)\b"), "TIME"),
    (re.compile(r"\b(?:pid|process) \d+"), "pid N"),
    (re.compile(r"\s+"), " "),
)


@dataclass(frozen=True)
class Exchange:
    """One command, on which host (or ""), and what it said, by line."""

    host: str
    command: str
    said: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join((f"{self.host}$ {self.command}", *self.said)) + "\n"


def exchanges(block: str) -> Iterator[Exchange]:
    """The conversation of a console block."""
    host, command, said = "", "", list[str]()
    for line in block.splitlines():
        if begins := COMMAND.fullmatch(line):
            if command:
                yield Exchange(host, command, tuple(said))
            (host, command), said = begins.groups(), []
        else:
            said.append(line)
    yield Exchange(host, command, tuple(said))


def normal(line: str) -> str:
    for pattern, name in ANY:
        line = pattern.sub(name, line)
    return line.strip()


def agrees(shown: tuple[str, ...], said: tuple[str, ...]) -> bool:
    """Is what was said what is shown, lines left out and numbers aside?"""
    parts = [".*" if line == LEFT_OUT else re.escape(normal(line) + "\n") for line in shown]
    text = "".join(normal(line) + "\n" for line in said)
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None


def shortened(said: tuple[str, ...]) -> tuple[str, ...]:
    """Without the lines that are others at each time, unless there is nothing else."""
    kept = list[str]()
    for line in said:
        if not VARYING.fullmatch(line):
            kept.append(line)
        elif kept[-1:] != [LEFT_OUT]:
            kept.append(LEFT_OUT)
    return said if kept == [LEFT_OUT] else tuple(kept)


def without_other_peoples_processes(text: str) -> str:
    """Where not even root may look into a process, `chain` has one line more at its end."""
    found = re.search(r"^└── not looked into: /proc: .*\n", text, re.MULTILINE)
    if found is None:
        return text
    head, branch, last = text[: found.start()].rpartition("\n├── ")
    return head + branch.replace("├", "└") + last.replace("\n│", "\n ") + text[found.end() :]


@dataclass
class Terminal:
    """Plays commands as they are written. ``places`` are the test's, by their nice names;
    ``environment`` is that of every host, ``states`` each host's state directory.
    """

    places: Mapping[str, object]
    states: Mapping[str, Path]
    environment: Mapping[str, str]
    _code: int = 0
    _tokens: dict[str, str] = field(default_factory=dict)

    def play(self, exchange: Exchange) -> tuple[str, ...]:
        """Run it; what it said, with nice names."""
        command = f"(exit {self._code}); {self._real(exchange.command)}"
        ran = subprocess.run(
            ["bash", "-c", command],
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PROMOTER_STATE_DIR": str(self.states[exchange.host]),
                **self.environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
            check=False,
        )
        self._code = ran.returncode
        return tuple(line.rstrip() for line in self._nice(ran.stdout).splitlines())

    @property
    def code(self) -> int:
        """The last command's."""
        return self._code

    def _real(self, command: str) -> str:
        for real, nice in self._tokens.items():
            command = command.replace(nice, real)
        names = "|".join(map(re.escape, sorted(self.places, key=len, reverse=True)))
        return re.sub(
            rf"(?<![\w.-])(?:{names})(?![\w-])", lambda m: str(self.places[m[0]]), command
        )

    def _nice(self, text: str) -> str:
        for nice, real in sorted(self.places.items(), key=lambda p: len(str(p[1])), reverse=True):
            text = text.replace(str(real), nice)
        text = without_other_peoples_processes(text)
        for pattern, names in ((r"\b[0-9a-f]{8}\b", IDS), (r"\b\d{8}T\d{6}Z", TIMES)):
            for real in re.findall(pattern, text):
                text = text.replace(real, self._token(real, names))
        return text

    def _token(self, real: str, names: tuple[str, ...]) -> str:
        if real not in self._tokens:
            taken = set(self._tokens.values())
            self._tokens[real] = next(name for name in names if name not in taken)
        return self._tokens[real]


def play(runbook: Path, kind: str, terminal: Terminal, *, rewrite: bool) -> None:
    """Play all that a runbook has for one kind of guest. With ``rewrite`` what the runbook shows
    becomes what was said, where the two do not agree; else that is an AssertionError.
    """
    text = runbook.read_text()
    wrong, now, done = [], "", 0
    for block in BLOCK.finditer(text):
        if block[1] not in ("", kind):
            continue
        played = list[Exchange]()
        conversation = list(exchanges(block[2]))
        for exchange, then in zip(conversation, [*conversation[1:], None], strict=True):
            said = terminal.play(exchange)
            if terminal.code and (then is None or then.command != "echo $?"):
                wrong.append(f"$ {exchange.command}\nends with {terminal.code}:\n{said}")
            if not agrees(exchange.said, said):
                wrong.append("\n".join((f"$ {exchange.command}", "says:", *said)))
                said = shortened(said)
            else:
                said = exchange.said
            played.append(Exchange(exchange.host, exchange.command, said))
        now += text[done : block.start(2)] + "".join(exchange.text for exchange in played)
        done = block.end(2)
    if rewrite:
        runbook.write_text(now + text[done:])
    assert rewrite or not wrong, f"{runbook.name}, {kind}:\n" + "\n".join(wrong)
